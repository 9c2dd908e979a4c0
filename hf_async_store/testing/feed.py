"""Cases 109 to 111 and 113: the change feed of a collection."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, cast

import pytest

from hf_async_store.changes import ABSENT
from hf_async_store.driver import FeedBatch
from hf_async_store.errors import (
    ConfigurationError,
    FeedExpiredError,
    InvalidCursorError,
    InvalidInputError,
    StorageError,
    StoreClosedError,
    TransactionReentryError,
    UnavailableError,
    UnknownCollectionError,
)
from hf_async_store.expiry import Expire
from hf_async_store.field_operations import increment
from hf_async_store.query import in_
from hf_async_store.schema import Collection, Field
from hf_async_store.testing.assertions import payload
from hf_async_store.testing.concurrency import HANG_SECONDS, is_shared, seeded
from hf_async_store.testing.harness import (
    FED,
    FEED_COLLECTIONS,
    UNFED,
    DisturbsFeeds,
    ForgetsFeed,
    HasStranger,
    SharesDatabase,
    skip_fault,
)
from hf_async_store.testing.repetitions import repetitions

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine
    from random import Random

    from hf_async_store.feed import Changes, EntityChange
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.harness import Harness
    from hf_async_store.values import Entity

TWO_FED: Final = (FED, Collection("memos", key="memo_id", feed=timedelta(hours=1)))
_LAST: Final = "the last one"
_PROMPT_SECONDS: Final = 3.0
"""Longer than any engine takes to notice a change, but shorter than the pauses between reads."""


def feed_of(harness: Harness) -> None:
    """Skip the test if the engine has no feed."""
    if not harness.capabilities.feed:
        pytest.skip("the engine has no change feed")


async def taken(changes: Changes, number: int) -> list[EntityChange]:
    """The next changes."""
    async with asyncio.timeout(HANG_SECONDS):
        return [await anext(changes) for _ in range(number)]


async def all_until(changes: Changes, wanted: Iterable[tuple[str, int]]) -> list[EntityChange]:
    """The next changes, until these versions of ids have come."""
    missing = set(wanted)
    found: list[EntityChange] = []
    try:
        async with asyncio.timeout(HANG_SECONDS):
            while missing:
                found.append(await anext(changes))
                missing.discard((found[-1].id, found[-1].version))
    except TimeoutError:
        pytest.fail(f"the feed lacks {sorted(missing)[:10]}")
    return found


async def all_before(store: StorageStrategy, changes: Changes) -> list[EntityChange]:
    """All changes until now, of a watcher without a filter."""
    await store.create_entity("notes", {"note_id": _LAST})
    found = await all_until(changes, [(_LAST, 1)])
    await store.delete_entity("notes", _LAST)
    return [each for each in found if each.id != _LAST]


def briefly(changes: Iterable[EntityChange]) -> list[tuple[str, str, int]]:
    return [(each.kind, each.id, each.version) for each in changes]


def by_entity(changes: Iterable[tuple[str, str, int]]) -> dict[str, list[tuple[str, int]]]:
    """The kinds and versions of each entity in order. A change that came again is left out."""
    found: dict[str, list[tuple[str, int]]] = {}
    for kind, entity_id, version in changes:
        versions = found.setdefault(entity_id, [])
        if (kind, version) not in versions[-1:]:
            versions.append((kind, version))
    return found


@asynccontextmanager
async def second(
    harness: Harness, store: StorageStrategy, collections: Iterable[Collection] = FEED_COLLECTIONS
) -> AsyncGenerator[StorageStrategy, None]:
    """Another store on the same data; `store` itself if the engine does not share its data."""
    if is_shared(harness.capabilities):
        async with harness.store(collections) as other:
            yield other
    else:
        yield store


def stranger(harness: Harness, collections: Iterable[Collection]) -> StorageStrategy:
    """A store on other data."""
    if isinstance(harness, HasStranger):
        return harness.stranger(collections)
    if isinstance(harness, SharesDatabase):
        return harness.neighbour("other_", collections)
    if is_shared(harness.capabilities):
        skip_fault(harness, HasStranger)
    return harness.store(collections)


def _altered(token: str) -> Iterable[str]:
    for at in range(0, len(token), 7):
        other = "A" if token[at] != "A" else "B"
        yield token[:at] + other + token[at + 1 :]
    yield from (token[:-1], token + "A", "", "x", token.upper(), f" {token}")


async def no_other_task() -> None:
    """Assert that no other task is running; what was cancelled may need a moment to end."""
    for _ in range(100):
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if not others:
            return
        await asyncio.sleep(0.02)
    pytest.fail(f"tasks are still running: {others}")


def _count_one_more(entity: Entity) -> Entity:
    return {**entity, "count": cast("int", entity["count"]) + 1}


class FeedContract:
    """Cases 109 to 111 and 113."""

    # -- declarations ------------------------------------------------------------------------

    async def test_109_a_feed_that_the_engine_cannot_keep_is_refused(
        self, harness: Harness
    ) -> None:
        if not harness.capabilities.feed:
            with pytest.raises(ConfigurationError, match="notes declares a feed"):
                harness.store(FEED_COLLECTIONS)
            return
        longest = harness.capabilities.max_feed_retention
        if longest is not None:
            with pytest.raises(ConfigurationError, match="max_feed_retention"):
                harness.store([Collection("notes", key="note_id", feed=2 * longest)])
            async with harness.store([Collection("notes", key="note_id", feed=longest)]):
                pass

    async def test_109_only_a_collection_with_a_feed_is_watched(self, harness: Harness) -> None:
        collections = FEED_COLLECTIONS if harness.capabilities.feed else (UNFED,)
        async with harness.store(collections) as store:
            with pytest.raises(InvalidInputError, match="feed="):
                store.watch("drafts")
            with pytest.raises(InvalidInputError, match="feed="):
                store.subscribe("name", "drafts")
            with pytest.raises(UnknownCollectionError):
                store.watch("nothing")

    # -- what comes --------------------------------------------------------------------------

    async def test_109_every_change_of_every_method_comes(self, harness: Harness) -> None:
        feed_of(harness)
        async with harness.store(FEED_COLLECTIONS) as store:
            await store.create_entity("notes", {"note_id": "before"})
            async with store.watch("notes") as changes:
                await store.create_entity("notes", {"note_id": "a", "count": 1})
                await store.save_entity("notes", {"note_id": "a", "count": 2})
                await store.update_entity("notes", "a", {"count": increment(1)})
                await store.update_entity("notes", "a", {"count": 4}, returning=True)
                await store.modify_entity("notes", "a", lambda each: {**each, "count": 5})
                await store.update_where("notes", {"note_id": "a"}, {"count": 6})
                await store.create_entities("notes", [{"note_id": "b"}, {"note_id": "c"}])
                await store.create_entities(
                    "notes", [{"note_id": "c"}, {"note_id": "d"}], if_absent=True
                )
                await store.save_entities("notes", [{"note_id": "b"}, {"note_id": "c"}])
                await store.update_entities("notes", {"b": {"count": 1}, "c": {"count": 1}})
                await store.import_entities("notes", [{"note_id": "e", "version": 7}])
                async with store.begin_transaction() as tx:
                    await tx.update_entity("notes", "e", {"count": 1})
                    await tx.create_entity("notes", {"note_id": "f"})
                await store.delete_entity("notes", "a")
                await store.delete_entities("notes", ["b", "nothing"])
                await store.delete_where("notes", {"note_id": in_(["c", "before"])})
                await store.create_entity("notes", {"note_id": "a"})
                found = await all_before(store, changes)
        assert by_entity(briefly(found)) == {
            "a": [*(("put", each) for each in range(1, 7)), ("delete", 6), ("put", 1)],
            "b": [("put", 1), ("put", 2), ("put", 3), ("delete", 3)],
            "c": [("put", 1), ("put", 2), ("put", 3), ("delete", 3)],
            "d": [("put", 1)],
            "e": [("put", 7), ("put", 8)],
            "f": [("put", 1)],
            "before": [("delete", 1)],
        }
        counts = [each.entity and each.entity.get("count") for each in found if each.id == "a"]
        assert counts == [1, 2, 3, 4, 5, 6, None, None]

    async def test_109_an_entity_comes_as_it_was_written(self, harness: Harness) -> None:
        feed_of(harness)
        data = {"note_id": "a", "label": "\u00e9\U0001f600", "deep": {"n": [1, 1.5, None, True]}}
        async with (
            harness.store(FEED_COLLECTIONS) as store,
            store.watch("notes") as first,
            store.watch("notes") as other,
        ):
            await store.create_entity("notes", data)
            stored = await store.get_entity("notes", "a")
            [change] = await taken(first, 1)
            assert change.entity == stored
            assert payload(change.entity) == data
            cast("Any", change.entity)["deep"]["n"].append("changed")
            [change] = await taken(other, 1)
            assert change.entity == stored
            await store.delete_entity("notes", "a")
            [change] = await taken(first, 1)
            assert (change.kind, change.version, change.entity) == ("delete", 1, None)

    async def test_109_what_was_not_committed_does_not_come(self, harness: Harness) -> None:
        feed_of(harness)
        async with harness.store(FEED_COLLECTIONS) as store:
            await store.create_entity("notes", {"note_id": "a"})
            async with store.watch("notes") as changes:
                with pytest.raises(KeyError):
                    async with store.begin_transaction() as tx:
                        await tx.update_entity("notes", "a", {"count": 1})
                        await tx.create_entity("notes", {"note_id": "b"})
                        raise KeyError
                for refused in (
                    store.create_entity("notes", {"note_id": "a"}),
                    store.update_entity("notes", "a", {"count": 1}, expected_version=9),
                    store.save_entity("notes", {"note_id": "a"}, expected_version=ABSENT),
                    store.update_entity("notes", "b", {"count": 1}),
                ):
                    with pytest.raises(StorageError):
                        await refused
                assert not await store.delete_entity("notes", "b")
                async with store.begin_transaction() as tx:
                    await tx.create_entity("notes", {"note_id": "c"})
                    await tx.delete_entity("notes", "c")
                if harness.capabilities.savepoints:
                    async with store.begin_transaction() as tx:
                        await tx.create_entity("notes", {"note_id": "outer"})
                        with pytest.raises(KeyError):
                            async with tx.begin_transaction() as inner:
                                await inner.create_entity("notes", {"note_id": "inner"})
                                raise KeyError
                else:
                    await store.create_entity("notes", {"note_id": "outer"})
                assert briefly(await all_before(store, changes)) == [("put", "outer", 1)]

    async def test_109_each_modification_of_an_entity_comes(self, harness: Harness) -> None:
        feed_of(harness)
        tasks = 12
        async with harness.store(FEED_COLLECTIONS) as store:
            await store.create_entity("notes", {"note_id": "a", "count": 0})
            async with store.watch("notes") as changes:
                async with asyncio.TaskGroup() as group:
                    for _ in range(tasks):
                        group.create_task(store.modify_entity("notes", "a", _count_one_more))
                found = await all_before(store, changes)
        assert by_entity(briefly(found)) == {"a": [("put", n + 1) for n in range(1, tasks + 1)]}
        counts = [each.entity and each.entity["count"] for each in found]
        assert counts == [each.version - 1 for each in found]

    async def test_109_changes_of_one_commit_are_one(self, harness: Harness) -> None:
        feed_of(harness)
        async with harness.store(FEED_COLLECTIONS) as store:
            await store.create_entity("notes", {"note_id": "a"})
            async with store.watch("notes") as changes:
                async with store.begin_transaction() as tx:
                    for count in range(3):
                        await tx.save_entity("notes", {"note_id": "b", "count": count})
                    await tx.update_entity("notes", "a", {"count": 1})
                found = {each.id: each for each in await all_before(store, changes)}
        assert set(found) == {"a", "b"}
        assert found["b"].version == 3
        assert payload(found["b"].entity) == {"note_id": "b", "count": 2}

    async def test_109_a_claim_is_no_change(self, harness: Harness) -> None:
        feed_of(harness)
        if not harness.capabilities.claims:
            pytest.skip("the engine has no claims")
        async with harness.store(FEED_COLLECTIONS) as store:
            await store.create_entity("notes", {"note_id": "a"})
            async with store.watch("notes") as changes:
                [claim] = await store.claim_entities("notes", wait=10)
                await claim.renew()
                await claim.update({"count": 1})
                await claim.release()
                [claim] = await store.claim_entities("notes", wait=10)
                await claim.finish({"count": 2})
                async with store.lock("a"):
                    pass
                found = await all_before(store, changes)
        assert by_entity(briefly(found)) == {"a": [("put", 2), ("put", 3)]}

    async def test_109_a_claim_that_waits_is_woken(self, harness: Harness) -> None:
        feed_of(harness)
        if not harness.capabilities.claims:
            pytest.skip("the engine has no claims")
        async with harness.store(FEED_COLLECTIONS) as store, second(harness, store) as other:
            await store.create_entity("notes", {"note_id": "older", "label": "y"})
            waiting = [
                asyncio.create_task(store.claim_entities("notes", {"label": "x"}, wait=wait))
                for wait in (HANG_SECONDS, HANG_SECONDS / 2)
            ]
            await asyncio.sleep(2.0)  # the intervals are long by now
            await other.create_entity("notes", {"note_id": "a", "label": "x"})
            await other.create_entity("notes", {"note_id": "b", "label": "x"})
            found = await asyncio.gather(*waiting)
            assert sorted(each.id for claims in found for each in claims) == ["a", "b"]
            assert await store.claim_entities("notes", {"label": "x"}, wait=0.1) == []

    async def test_109_a_claim_does_not_wait_for_the_feed(self, harness: Harness) -> None:
        feed_of(harness)
        if not harness.capabilities.claims:
            pytest.skip("the engine has no claims")
        async with harness.store(FEED_COLLECTIONS) as store:
            await store.create_entity("notes", {"note_id": "a"})
            watcher = asyncio.create_task(_counted(store, None, 1, asyncio.Semaphore()))
            await asyncio.sleep(0.2)

            async def failing(collection: str, since: str, limit: int) -> FeedBatch:
                raise UnavailableError("lost")

            read, cast("Any", store.engine).read_feed = store.engine.read_feed, failing
            async with asyncio.timeout(HANG_SECONDS):
                assert await store.claim_entities("notes", {"label": "x"}, wait=0.5) == []
            cast("Any", store.engine).read_feed = read
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)

    async def test_109_not_inside_a_transaction(self, harness: Harness) -> None:
        feed_of(harness)
        async with harness.store(FEED_COLLECTIONS) as store, store.watch("notes") as changes:
            async with store.begin_transaction() as tx:
                await tx.create_entity("notes", {"note_id": "a"})
                with pytest.raises(TransactionReentryError):
                    await anext(changes)
                with pytest.raises(TransactionReentryError):
                    async with store.watch("notes"):
                        pass
            assert briefly(await taken(changes, 1)) == [("put", "a", 1)]

    async def test_109_a_filter_matches_before_or_after(self, harness: Harness) -> None:
        feed_of(harness)
        async with (
            harness.store(FEED_COLLECTIONS) as store,
            store.watch("notes", {"label": "x"}) as changes,
        ):
            await store.create_entity("notes", {"note_id": "a", "label": "y"})
            await store.update_entity("notes", "a", {"label": "x"})
            await store.update_entity("notes", "a", {"count": 1})
            await store.update_entity("notes", "a", {"label": "y"})
            await store.update_entity("notes", "a", {"count": 2})
            await store.update_entity("notes", "a", {"label": "x"})
            await store.delete_entity("notes", "a")
            await store.create_entity("notes", {"note_id": "b", "label": "y"})
            await store.delete_entity("notes", "b")
            await store.create_entity("notes", {"note_id": "c", "label": "x"})
            found = briefly(await all_until(changes, [("a", 6), ("c", 1)]))
            if ("delete", "a", 6) not in found:  # it may come after that of another entity
                found += briefly(await taken(changes, 1))
        assert by_entity(found) == {
            "a": [("put", 2), ("put", 3), ("put", 4), ("put", 6), ("delete", 6)],
            "c": [("put", 1)],
        }

    async def test_109_commits_come_in_their_order(self, harness: Harness) -> None:
        feed_of(harness)
        if not harness.capabilities.feed_order:
            pytest.skip("the engine has an order for each entity only")
        async with (
            harness.store(FEED_COLLECTIONS) as store,
            second(harness, store) as other,
            store.watch("notes") as changes,
        ):
            ids = [f"{each}" for each in range(20)]
            for number, each in enumerate(ids):
                await (store if number % 2 else other).create_entity("notes", {"note_id": each})
            assert [each.id for each in await taken(changes, 20)] == ids

    async def test_109_a_program_that_declares_no_feed_feeds_it(self, harness: Harness) -> None:
        feed_of(harness)
        if not is_shared(harness.capabilities):
            pytest.skip("each store has data of its own")
        without = Collection("notes", key="note_id", fields=["label"])
        async with (
            harness.store(FEED_COLLECTIONS) as store,
            store.watch("notes") as changes,
            harness.store([without]) as other,
        ):
            await other.create_entity("notes", {"note_id": "a"})
            async with other.begin_transaction() as tx:
                await tx.update_entity("notes", "a", {"label": "x"})
            await other.delete_entity("notes", "a")
            found = await taken(changes, 3)
            assert briefly(found) == [("put", "a", 1), ("put", "a", 2), ("delete", "a", 2)]

    async def test_109_an_expired_entity_is_deleted_when_it_is_removed(
        self, harness: Harness
    ) -> None:
        feed_of(harness)
        if harness.capabilities.removes_expired:
            pytest.skip("the engine removes expired entities some time later")
        expiring = Collection(
            "notes",
            key="note_id",
            fields=[Field("due_at", "timestamp")],
            expires=Expire("due_at"),
            feed=3600,
        )
        async with harness.store([expiring]) as store:
            await store.create_entity("notes", {"note_id": "a", "due_at": "2020-01-01T00:00:00Z"})
            async with store.watch("notes") as changes:
                await store.create_entity("notes", {"note_id": "b"})
                assert await store.purge_expired() == 1
                found = briefly(await all_before(store, changes))
        assert sorted(found) == [("delete", "a", 1), ("put", "b", 1)]

    async def test_109_a_watch_begins_when_it_is_entered(self, harness: Harness) -> None:
        feed_of(harness)
        async with harness.store(FEED_COLLECTIONS) as store:
            for number in range(5):
                await store.create_entity("notes", {"note_id": f"{number} before"})
                async with store.watch("notes") as changes:
                    await store.create_entity("notes", {"note_id": f"{number} after"})
                    assert briefly(await taken(changes, 1)) == [("put", f"{number} after", 1)]

    async def test_109_a_watcher_waits_and_is_woken(self, harness: Harness) -> None:
        feed_of(harness)
        async with (
            harness.store(FEED_COLLECTIONS) as store,
            second(harness, store) as other,
            store.watch("notes") as changes,
        ):
            for number in range(3):
                waiting = asyncio.create_task(taken(changes, 1))
                await asyncio.sleep(0.1)
                assert not waiting.done()
                await other.create_entity("notes", {"note_id": f"{number}"})
                assert briefly(await waiting) == [("put", f"{number}", 1)]

    async def test_109_a_cancelled_wait_loses_nothing(self, harness: Harness) -> None:
        feed_of(harness)
        async with harness.store(FEED_COLLECTIONS) as store, store.watch("notes") as changes:
            found: list[tuple[str, str, int]] = []
            for number in range(10):
                waiting = asyncio.create_task(taken(changes, 1))
                await asyncio.sleep(0.002 * number)
                if number % 2:
                    await store.create_entity("notes", {"note_id": f"{number}"})
                waiting.cancel()
                [ended] = await asyncio.gather(waiting, return_exceptions=True)
                found += [] if isinstance(ended, BaseException) else briefly(ended)
            found += briefly(await all_before(store, changes))
        assert found == [("put", f"{each}", 1) for each in (1, 3, 5, 7, 9)]

    async def test_109_a_watcher_that_did_not_wait_is_not_late(self, harness: Harness) -> None:
        # The wait for changes, which all watchers share, ends because of what nobody reads then.
        feed_of(harness)
        async with harness.store(TWO_FED) as store, store.watch("notes") as changes:
            other = asyncio.create_task(_counted(store, None, 1, asyncio.Semaphore(), "memos"))
            for number in range(2):
                waiting = asyncio.create_task(taken(changes, 1))
                await asyncio.sleep(0.3)
                if number:
                    waiting.cancel()
                await store.create_entity("notes", {"note_id": f"{number} at once"})
                if not number:
                    await waiting
                await asyncio.sleep(0.5)
                await store.create_entity("notes", {"note_id": f"{number} later"})
                await asyncio.sleep(0.5)
                async with asyncio.timeout(_PROMPT_SECONDS):
                    found = [await anext(changes) for _ in range(1 + number)]
                assert found[-1].id == f"{number} later"
            await store.create_entity("memos", {"memo_id": "a"})
            await other

    # -- gaps --------------------------------------------------------------------------------

    async def test_110_a_reader_that_ends_goes_on_after_its_token(self, harness: Harness) -> None:
        feed_of(harness)
        with seeded() as random:
            async with harness.store(FEED_COLLECTIONS) as store:
                async with store.watch("notes") as changes:
                    token = changes.token
                writing = asyncio.create_task(_write_randomly(store, random, repetitions(300, 60)))
                found: list[EntityChange] = []
                while not writing.done():
                    async with second(harness, store) as reader:
                        async with reader.watch("notes", since=token) as changes:
                            for each in await _some(changes, random.randrange(1, 8)):
                                found.append(each)
                                token = each.token
                        if random.random() < 0.3 and isinstance(harness, DisturbsFeeds):
                            await harness.disturb(store)
                history = await writing
                async with store.watch("notes", since=token) as changes:
                    found += await all_before(store, changes)
        assert by_entity(briefly(found)) == by_entity(history)

    async def test_110_a_transaction_that_is_open_at_the_position(self, harness: Harness) -> None:
        feed_of(harness)
        async with (
            harness.store(FEED_COLLECTIONS) as store,
            second(harness, store) as other,
            second(harness, store) as reader,
        ):
            await store.create_entity("notes", {"note_id": "older"})
            async with reader.watch("notes") as changes:
                token = changes.token
                async with store.begin_transaction() as tx:
                    await tx.create_entity("notes", {"note_id": "older 2"})
                    await tx.update_entity("notes", "older", {"count": 1})
                    # It may have to wait for the transaction.
                    writing = asyncio.create_task(
                        other.create_entity("notes", {"note_id": "younger"})
                    )
                    await asyncio.wait([writing], timeout=0.3)
                    # In a task of its own, because `reader` may be the store of the transaction.
                    while found := await asyncio.create_task(_some(changes, 5, seconds=0.5)):
                        token = found[-1].token
                        assert {each.id for each in found} == {"younger"}
                await writing
                expected = {("older", 2), ("older 2", 1)}
                await all_until(changes, expected)
            async with reader.watch("notes", since=token) as changes:
                await all_until(changes, expected)

    async def test_110_a_rolled_back_transaction_at_the_position(self, harness: Harness) -> None:
        feed_of(harness)
        async with (
            harness.store(FEED_COLLECTIONS) as store,
            second(harness, store) as other,
            store.watch("notes") as changes,
        ):
            with pytest.raises(KeyError):
                async with store.begin_transaction() as tx:
                    await tx.create_entity("notes", {"note_id": "never"})
                    writing = asyncio.create_task(other.create_entity("notes", {"note_id": "a"}))
                    await asyncio.wait([writing], timeout=0.3)
                    raise KeyError
            await writing
            assert briefly(await all_before(store, changes)) == [("put", "a", 1)]

    async def test_110_what_happens_to_the_data_makes_no_gap(self, harness: Harness) -> None:
        feed_of(harness)
        if not isinstance(harness, DisturbsFeeds):
            skip_fault(harness, DisturbsFeeds)
        async with harness.store(FEED_COLLECTIONS) as store, second(harness, store) as reader:
            async with reader.watch("notes") as changes:
                token = changes.token
                for number in range(5):
                    await store.create_entity("notes", {"note_id": f"{number}"})
                    await harness.disturb(store)
                    await store.update_entity("notes", f"{number}", {"count": 1})
                    await harness.disturb(reader)
                expected = {f"{each}": [("put", 1), ("put", 2)] for each in range(5)}
                assert by_entity(briefly(await all_before(store, changes))) == expected
            async with reader.watch("notes", since=token) as changes:
                found = await all_until(changes, [(_LAST, 1)])
                assert by_entity(briefly(found))["4"] == expected["4"]

    async def test_110_watchers_at_different_places_get_the_same(self, harness: Harness) -> None:
        feed_of(harness)
        with seeded() as random:
            async with harness.store(FEED_COLLECTIONS) as store, store.watch("notes") as first:
                token = first.token
                number = repetitions(200, 60)
                watchers = [asyncio.create_task(_sluggish(store, token, random)) for _ in range(8)]
                history = await _write_randomly(store, random, number)
                await store.create_entity("notes", {"note_id": _LAST})
                expected = by_entity([*history, ("put", _LAST, 1)])
                for each in await asyncio.gather(*watchers):
                    assert by_entity(briefly(each)) == expected

    # -- tokens ------------------------------------------------------------------------------

    async def test_111_a_token_is_altered_or_of_something_else(self, harness: Harness) -> None:
        feed_of(harness)
        others = Collection("others", key="other_id", feed=3600)
        async with harness.store([*FEED_COLLECTIONS, others]) as store:
            await store.create_entities("notes", [{"note_id": each} for each in "abc"])
            async with store.watch("notes") as changes:
                token = changes.token
            async with store.watch("others") as changes:
                other = changes.token
            page = await store.query_page("notes", limit=1)
            wrong = [*_altered(token), other, page.cursor, b"x", 7, ["x"]]
            for each in wrong:
                with pytest.raises(InvalidCursorError):
                    store.watch("notes", since=cast("Any", each))

    async def test_111_a_token_of_another_store(self, harness: Harness) -> None:
        feed_of(harness)
        async with (
            harness.store(FEED_COLLECTIONS) as store,
            stranger(harness, FEED_COLLECTIONS) as foreign,
        ):
            for each in (store, foreign):
                await each.create_entity("notes", {"note_id": "a"})
            async with foreign.watch("notes") as changes:
                await foreign.create_entity("notes", {"note_id": "b"})
                [change] = await taken(changes, 1)
            for token in (change.token, changes.token):
                with pytest.raises((InvalidCursorError, FeedExpiredError)):
                    async with store.watch("notes", since=token) as changes:
                        await taken(changes, 1)

    async def test_111_a_token_that_is_too_old(self, harness: Harness) -> None:
        feed_of(harness)
        if not isinstance(harness, ForgetsFeed):
            skip_fault(harness, ForgetsFeed)
        async with harness.store(FEED_COLLECTIONS) as store:
            async with store.watch("notes") as changes:
                old = changes.token
                await store.create_entities("notes", [{"note_id": each} for each in "abc"])
                found = await taken(changes, 3)
                await harness.forget_feed(store, "notes")
                await store.create_entity("notes", {"note_id": "d"})
                # This one has read them in time.
                assert briefly(await taken(changes, 1)) == [("put", "d", 1)]
            for token in (old, found[0].token):
                for _ in range(2):
                    with pytest.raises(FeedExpiredError):
                        async with store.watch("notes", since=token) as late:
                            await taken(late, 1)
            async with store.watch("notes", since=changes.token) as late:
                await store.create_entity("notes", {"note_id": "e"})
                assert briefly(await taken(late, 1)) == [("put", "e", 1)]

    # -- watchers ----------------------------------------------------------------------------

    async def test_113_a_slow_reader_holds_up_nobody(self, harness: Harness) -> None:
        feed_of(harness)
        number = repetitions(1000, 300)
        async with (
            harness.store(FEED_COLLECTIONS) as store,
            store.watch("notes") as slow,
            store.watch("notes") as quick,
        ):
            await store.create_entity("notes", {"note_id": "first"})
            assert briefly(await taken(slow, 1)) == [("put", "first", 1)]
            await taken(quick, 1)
            ids = [f"{each:04}" for each in range(number)]
            async with asyncio.timeout(HANG_SECONDS):
                for each in range(0, number, 50):
                    batch = ids[each : each + 50]
                    await store.create_entities("notes", [{"note_id": i} for i in batch])
                    found = await taken(quick, 50)
                    assert {each.id for each in found} == set(batch)
            assert {each.id for each in await taken(slow, number)} == set(ids)

    async def test_113_watchers_share_their_reads(self, harness: Harness) -> None:
        feed_of(harness)
        async with harness.store(FEED_COLLECTIONS) as store, store.watch("notes") as first:
            token = first.token
            async with asyncio.TaskGroup() as group:
                ready = asyncio.Semaphore(0)
                watchers = [
                    group.create_task(_counted(store, token, 30, ready)) for _ in range(100)
                ]
                for _ in watchers:
                    await ready.acquire()
                await asyncio.sleep(0.2)
                with _calls_of(store, "read_feed") as calls:
                    for each in range(30):
                        await store.create_entity("notes", {"note_id": f"{each}"})
                        await asyncio.sleep(0.01)
                    await asyncio.wait(watchers, timeout=HANG_SECONDS)
            # At most two for each change, and one for each watcher that was late.
            assert len(calls) < 200
            for watcher in watchers:
                assert by_entity(briefly(watcher.result())) == {
                    f"{each}": [("put", 1)] for each in range(30)
                }

    async def test_113_idle_watchers_cost_what_one_costs(self, harness: Harness) -> None:
        feed_of(harness)
        async with harness.store(FEED_COLLECTIONS) as store, asyncio.TaskGroup() as group:
            ready = asyncio.Semaphore(0)
            watchers = [group.create_task(_counted(store, None, 1, ready)) for _ in range(100)]
            for _ in watchers:
                await ready.acquire()
            await asyncio.sleep(0.5)
            with _calls_of(store, "read_feed") as reads:
                await asyncio.sleep(1.0)
            assert len(reads) <= 8
            await store.create_entity("notes", {"note_id": "a"})

    async def test_113_leaving_in_any_way_leaves_nothing(self, harness: Harness) -> None:
        # After each case, it is checked that no task is running.
        feed_of(harness)
        async with harness.store(FEED_COLLECTIONS) as store:
            with pytest.raises(KeyError):
                async with store.watch("notes"):
                    raise KeyError
            async with store.watch("notes") as changes:
                await store.create_entity("notes", {"note_id": "a"})
                async for _ in changes:
                    break
            for pause in (0.0, 0.001, 0.02, 0.1):
                watching = asyncio.create_task(_counted(store, None, 1, asyncio.Semaphore()))
                await asyncio.sleep(pause)
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
                await no_other_task()
            with pytest.raises(InvalidInputError, match="ended"):
                await anext(changes)

    async def test_113_closing_the_store_ends_the_watchers(self, harness: Harness) -> None:
        feed_of(harness)
        ready = asyncio.Semaphore(0)
        async with harness.store(FEED_COLLECTIONS) as store:
            watchers = [asyncio.create_task(_counted(store, None, 1, ready)) for _ in range(3)]
            for _ in watchers:
                await ready.acquire()
            await asyncio.sleep(0.05)
        async with asyncio.timeout(HANG_SECONDS):
            ended = await asyncio.gather(*watchers, return_exceptions=True)
        assert [type(each) for each in ended] == 3 * [StoreClosedError]

    async def test_113_an_error_that_passes_is_retried(self, harness: Harness) -> None:
        feed_of(harness)
        async with harness.store(FEED_COLLECTIONS) as store, store.watch("notes") as changes:
            read = store.engine.read_feed
            failures = 3

            async def failing(collection: str, since: str, limit: int) -> FeedBatch:
                nonlocal failures
                failures -= 1
                if failures >= 0:
                    raise UnavailableError("lost")
                return await read(collection, since, limit)

            cast("Any", store.engine).read_feed = failing
            await store.create_entity("notes", {"note_id": "a"})
            assert briefly(await taken(changes, 1)) == [("put", "a", 1)]
            assert failures < 0

    async def test_113_another_error_ends_all_watchers(self, harness: Harness) -> None:
        feed_of(harness)
        async with harness.store(FEED_COLLECTIONS) as store:
            ready = asyncio.Semaphore(0)
            watchers = [asyncio.create_task(_counted(store, None, 1, ready)) for _ in range(3)]
            for _ in watchers:
                await ready.acquire()
            await asyncio.sleep(0.2)

            async def failing(collection: str, since: str, limit: int) -> FeedBatch:
                raise FeedExpiredError("gone")

            cast("Any", store.engine).read_feed = failing
            await store.create_entity("notes", {"note_id": "a"})
            async with asyncio.timeout(HANG_SECONDS):
                ended = await asyncio.gather(*watchers, return_exceptions=True)
            assert [type(each) for each in ended] == 3 * [FeedExpiredError]
            assert len({id(each) for each in ended}) == 3


class _Calls:
    """Counts the calls of a method of an engine."""

    def __init__(self, engine: Any, name: str) -> None:
        self._engine, self._name = engine, name
        self._method: Callable[..., Coroutine[Any, Any, Any]] = getattr(engine, name)
        self.number = 0

    def __len__(self) -> int:
        return self.number

    def __enter__(self) -> _Calls:
        async def counted(*given: Any) -> Any:
            self.number += 1
            return await self._method(*given)

        setattr(self._engine, self._name, counted)
        return self

    def __exit__(self, *exc_info: object) -> None:
        setattr(self._engine, self._name, self._method)


def _calls_of(store: StorageStrategy, name: str) -> _Calls:
    return _Calls(store.engine, name)


async def _counted(
    store: StorageStrategy,
    since: str | None,
    number: int,
    ready: asyncio.Semaphore,
    collection: str = "notes",
) -> list[EntityChange]:
    """The first changes of a watcher, which releases `ready` when it watches."""
    async with store.watch(collection, since=since) as changes:
        ready.release()
        return [await anext(changes) for _ in range(number)]


async def _some(changes: Changes, number: int, seconds: float = 2.0) -> list[EntityChange]:
    """Up to `number` changes that come soon."""
    found: list[EntityChange] = []
    try:
        async with asyncio.timeout(seconds):
            while len(found) < number:
                found.append(await anext(changes))
    except TimeoutError:
        pass
    return found


async def _sluggish(store: StorageStrategy, token: str, random: Random) -> list[EntityChange]:
    """All changes of a watcher that is slow at times."""
    found: list[EntityChange] = []
    async with asyncio.timeout(HANG_SECONDS), store.watch("notes", since=token) as changes:
        async for each in changes:
            found.append(each)
            if each.id == _LAST:
                break
            if random.random() < 0.1:
                await asyncio.sleep(random.random() * 0.05)
    return found


async def _write_randomly(
    store: StorageStrategy, random: Random, number: int
) -> list[tuple[str, str, int]]:
    """Write entities; returns what the feed must contain."""
    history: list[tuple[str, str, int]] = []
    for _ in range(number):
        entity_id = f"{random.randrange(10)}"
        if random.random() < 0.2:
            deleted = await store.get_entity("notes", entity_id)
            if await store.delete_entity("notes", entity_id):
                assert deleted is not None
                history.append(("delete", entity_id, cast("int", deleted["version"])))
        elif random.random() < 0.2:
            async with store.begin_transaction() as tx:
                written = [f"{entity_id} {each}" for each in range(3)]
                for each in written:
                    version = await tx.save_entity("notes", {"note_id": each})
                    history.append(("put", each, version))
        else:
            version = await store.save_entity("notes", {"note_id": entity_id})
            history.append(("put", entity_id, version))
        await asyncio.sleep(random.choice([0, 0, 0.002]))
    return history
