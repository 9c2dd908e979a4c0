"""Cases 109 to 111 for named subscriptions to a change feed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import pytest

from hf_async_store.errors import (
    EntityNotFoundError,
    FeedExpiredError,
    InvalidCursorError,
    InvalidInputError,
    StorageError,
    SubscriptionAdvancedError,
    TransactionAbortedError,
)
from hf_async_store.testing.concurrency import HANG_SECONDS, seeded
from hf_async_store.testing.feed import briefly, feed_of, second, taken
from hf_async_store.testing.harness import FEED_COLLECTIONS, ForgetsFeed, skip_fault
from hf_async_store.testing.repetitions import repetitions

if TYPE_CHECKING:
    from random import Random

    from hf_async_store.feed import EntityChange
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.subscriptions import Subscription
    from hf_async_store.testing.harness import Harness
    from hf_async_store.transaction import Transaction


async def _applied(
    store: StorageStrategy, changes: Subscription, change: EntityChange, *, fails: bool = False
) -> None:
    """Write what follows from a change: a draft in which it is counted."""

    async def work(tx: Transaction) -> None:
        draft_id = f"{change.id} {change.version} {change.kind}"
        draft = await tx.get_entity("drafts", draft_id)
        number = 0 if draft is None else cast("int", draft["number"])
        await tx.save_entity("drafts", {"draft_id": draft_id, "number": number + 1})
        await changes.advance(change, tx)
        if fails:
            raise KeyError

    await store.run_transaction(work)


async def _consume(store: StorageStrategy, random: Random, last: str) -> None:
    """Apply changes until the last one was, by whichever consumer, and fail now and then."""
    while True:
        async with store.subscribe("copy", "notes") as changes:
            try:
                async with asyncio.timeout(random.choice([0.1, 0.5])):
                    async for each in changes:
                        await _applied(store, changes, each, fails=random.random() < 0.1)
            except (KeyError, SubscriptionAdvancedError):
                pass
            except TimeoutError:
                if await store.get_entity("drafts", last) is not None:
                    return


class SubscriptionContract:
    """Named subscriptions."""

    async def test_109_a_subscription_goes_on_where_it_was(self, harness: Harness) -> None:
        feed_of(harness)
        async with harness.store(FEED_COLLECTIONS) as store:
            await store.create_entity("notes", {"note_id": "before"})
            async with store.subscribe("copy", "notes") as changes:
                pass
            await store.create_entity("notes", {"note_id": "a"})
            for _ in range(2):  # until it is advanced
                async with store.subscribe("copy", "notes") as changes:
                    assert briefly(await taken(changes, 1)) == [("put", "a", 1)]
            await store.update_entity("notes", "a", {"count": 1})
            async with second(harness, store) as other:
                async with other.subscribe("copy", "notes") as changes:
                    [first] = await taken(changes, 1)
                    await changes.advance(first)
                    [following] = await taken(changes, 1)
                async with other.subscribe("copy", "notes") as changes:
                    assert briefly(await taken(changes, 1)) == [("put", "a", 2)]
                    async with other.begin_transaction() as tx:
                        await changes.advance(following, tx)
                    await other.create_entity("notes", {"note_id": "b"})
                    assert briefly(await taken(changes, 1)) == [("put", "b", 1)]
                async with other.subscribe("copy", "notes") as changes:
                    assert briefly(await taken(changes, 1)) == [("put", "b", 1)]

    async def test_109_subscriptions_are_listed_and_dropped(self, harness: Harness) -> None:
        feed_of(harness)
        async with harness.store(FEED_COLLECTIONS) as store:
            assert await store.subscriptions() == []
            for name in ("b", "a \u00e9"):
                async with store.subscribe(name, "notes", {"label": "x"}) as changes:
                    token = changes.token
            listed = await store.subscriptions()
            assert [(each.name, each.collection) for each in listed] == [
                ("a \u00e9", "notes"),
                ("b", "notes"),
            ]
            assert listed[1].token == token or len(listed[1].token) > 10
            assert await store.drop_subscription("b")
            assert not await store.drop_subscription("b")
            assert [each.name for each in await store.subscriptions()] == ["a \u00e9"]
            assert await store.undeclared() == []

    async def test_109_a_subscription_has_one_collection_and_filter(self, harness: Harness) -> None:
        feed_of(harness)
        async with harness.store(FEED_COLLECTIONS) as store:
            async with store.subscribe("copy", "notes", {"label": "x", "count": 1}):
                pass
            async with store.subscribe("copy", "notes", {"count": 1, "label": "x"}):
                pass
            for filters in (None, {"label": "x"}, {"label": "y", "count": 1}):
                with pytest.raises(InvalidInputError, match="another filter"):
                    async with store.subscribe("copy", "notes", filters):
                        pass
            for name in ("", 7, "x" * 1001, "a\0b"):
                with pytest.raises(InvalidInputError):
                    store.subscribe(cast("Any", name), "notes")

    async def test_110_the_position_is_moved_with_the_transaction(self, harness: Harness) -> None:
        feed_of(harness)
        async with harness.store(FEED_COLLECTIONS) as store:
            async with store.subscribe("copy", "notes") as changes:
                await store.create_entities("notes", [{"note_id": each} for each in "ab"])
                first, other = await taken(changes, 2)
                for _ in range(2):
                    with pytest.raises(KeyError):
                        await _applied(store, changes, first, fails=True)
                await _applied(store, changes, first)
                # It is not known to a consumer whose commit had no answer.
                with pytest.raises(SubscriptionAdvancedError):
                    await _applied(store, changes, first)
                await _applied(store, changes, other)
            drafts = await store.query_entities("drafts")
            assert [each["number"] for each in drafts] == [1, 1]

    async def test_110_the_second_consumer_of_a_change_is_refused(self, harness: Harness) -> None:
        feed_of(harness)
        async with harness.store(FEED_COLLECTIONS) as store, second(harness, store) as other:
            async with (
                store.subscribe("copy", "notes") as mine,
                other.subscribe("copy", "notes") as theirs,
            ):
                await store.create_entity("notes", {"note_id": "a"})
                [change], [same] = await taken(mine, 1), await taken(theirs, 1)
                await _applied(store, mine, change)
                with pytest.raises(SubscriptionAdvancedError, match="'copy' was advanced"):
                    await _applied(other, theirs, same)
                with pytest.raises(SubscriptionAdvancedError):
                    await theirs.advance(same)
                # Even if the error is ignored, nothing is written.
                with pytest.raises(TransactionAbortedError):
                    async with other.begin_transaction() as tx:
                        await tx.create_entity("drafts", {"draft_id": "twice"})
                        with pytest.raises(SubscriptionAdvancedError):
                            await theirs.advance(same, tx)
                assert await store.get_entity("drafts", "twice") is None
            async with other.subscribe("copy", "notes") as theirs:
                await store.create_entity("notes", {"note_id": "b"})
                [change] = await taken(theirs, 1)
                assert change.id == "b"
                await _applied(other, theirs, change)

    async def test_110_each_change_is_applied_once(self, harness: Harness) -> None:
        feed_of(harness)
        with seeded() as random:
            async with harness.store(FEED_COLLECTIONS) as store, second(harness, store) as other:
                async with store.subscribe("copy", "notes"):
                    pass
                expected = set()
                async with asyncio.TaskGroup() as group, asyncio.timeout(2 * HANG_SECONDS):
                    for each in (store, other):
                        group.create_task(_consume(each, random, "last 1 put"))
                    for number in range(repetitions(60, 15)):
                        entity_id = f"{number % 5}"
                        version = await store.save_entity("notes", {"note_id": entity_id})
                        expected.add(f"{entity_id} {version} put")
                        await asyncio.sleep(random.choice([0, 0.01]))
                    await store.create_entity("notes", {"note_id": "last"})
                drafts = await store.query_entities("drafts")
                assert {each["draft_id"] for each in drafts} >= expected
                assert {each["number"] for each in drafts} == {1}

    async def test_110_a_dropped_subscription(self, harness: Harness) -> None:
        feed_of(harness)
        async with (
            harness.store(FEED_COLLECTIONS) as store,
            store.subscribe("copy", "notes") as changes,
        ):
            await store.create_entity("notes", {"note_id": "a"})
            [change] = await taken(changes, 1)
            await store.drop_subscription("copy")
            with pytest.raises(EntityNotFoundError):
                await changes.advance(change)
            async with store.subscribe("copy", "notes"):
                pass
            # It is another subscription of the same name, and version.
            with pytest.raises(SubscriptionAdvancedError):
                await changes.advance(change)

    async def test_111_wrong_changes(self, harness: Harness) -> None:
        feed_of(harness)
        async with (
            harness.store(FEED_COLLECTIONS) as store,
            store.subscribe("copy", "notes") as changes,
        ):
            for wrong in (None, "x", 7, changes.token):
                with pytest.raises(StorageError):
                    await changes.advance(cast("Any", wrong))

    async def test_111_a_subscription_that_was_left_for_too_long(self, harness: Harness) -> None:
        feed_of(harness)
        if not isinstance(harness, ForgetsFeed):
            skip_fault(harness, ForgetsFeed)
        async with harness.store(FEED_COLLECTIONS) as store:
            async with store.subscribe("copy", "notes"):
                await store.create_entity("notes", {"note_id": "a"})
            await harness.forget_feed(store, "notes")
            for _ in range(2):
                with pytest.raises((FeedExpiredError, InvalidCursorError)):
                    async with store.subscribe("copy", "notes") as changes:
                        await taken(changes, 1)
            await store.drop_subscription("copy")
            async with store.subscribe("copy", "notes") as changes:
                await store.create_entity("notes", {"note_id": "b"})
                assert briefly(await taken(changes, 1)) == [("put", "b", 1)]
