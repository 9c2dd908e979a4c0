"""Case 112: `wait_for`, on collections with and without a change feed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, cast

import pytest

from hf_async_store.coalescing import taking_at_once
from hf_async_store.errors import (
    CorruptionError,
    EntityNotFoundError,
    InvalidInputError,
    InvalidKeyError,
    InvalidQueryError,
    OperationTimeoutError,
    StoreClosedError,
    TransactionReentryError,
    UnavailableError,
    UnknownCollectionError,
)
from hf_async_store.expiry import Expire
from hf_async_store.migration_routing import unrouted
from hf_async_store.query import in_
from hf_async_store.schema import Collection, Field
from hf_async_store.testing.concurrency import HANG_SECONDS, seeded
from hf_async_store.testing.feed import feed_of, no_other_task, second
from hf_async_store.testing.repetitions import repetitions

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hf_async_store.changes import Record
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.harness import Harness
    from hf_async_store.values import Key

_WAITERS: Final = 1000


def _before_reads(
    store: StorageStrategy, act: Callable[[int], Awaitable[object]]
) -> Callable[[], None]:
    """Call a function before each read by key, with the number of the read; returns what ends this."""
    number = 0

    async def numbered(keys: Sequence[Key]) -> None:
        nonlocal number
        number += 1
        await act(number)

    return _before_reads_of(store, numbered)


def _before_reads_of(
    store: StorageStrategy, act: Callable[[Sequence[Key]], Awaitable[object]]
) -> Callable[[], None]:
    """The same with the keys that are read."""
    engine = cast("Any", unrouted(store.engine))
    fetch: Callable[[Sequence[Key]], Awaitable[list[Record | None]]] = engine.fetch

    async def acting(keys: Sequence[Key]) -> list[Record | None]:
        await act(keys)
        return await fetch(keys)

    # The requests of a store may be shared, by what has the method already.
    engine.fetch = acting
    reads = cast("Any", store)._reads
    if reads is not None:
        reads._run = taking_at_once(acting)

    def end() -> None:
        engine.fetch = fetch
        if reads is not None:
            reads._run = taking_at_once(fetch)

    return end


async def _looked_at(store: StorageStrategy, jobs: Collection) -> None:
    """Wait until all waiters have looked at their entities at first.

    From then on they do not read, or together at most 12 times a second.
    """
    allowed = 12.0 if jobs.feed is None else 0.0
    rates: list[float] = []
    while not rates or (rates[-1] > allowed and len(rates) < 20):
        rates.append(await _reads_in_a_second(store))
    assert rates[-1] <= allowed, rates


async def _reads_in_a_second(store: StorageStrategy) -> float:
    reads = 0

    async def count(number: int) -> None:
        nonlocal reads
        reads = number

    end = _before_reads(store, count)
    began = time.monotonic()
    await asyncio.sleep(1.0)
    end()
    return reads / (time.monotonic() - began)


class WaitingContract:
    """Case 112."""

    @pytest.fixture(params=["with a feed", "without a feed"])
    def jobs(self, request: pytest.FixtureRequest, harness: Harness) -> Collection:
        """A collection with a feed, if the engine has any, and one without."""
        has_feed = request.param == "with a feed"
        if has_feed:
            feed_of(harness)
        return Collection(
            "jobs",
            key="job_id",
            fields=["status", Field("until", "timestamp")],
            expires=Expire("until"),
            feed=3600 if has_feed else None,
        )

    async def test_112_what_matches_is_returned_at_once(
        self, harness: Harness, jobs: Collection
    ) -> None:
        async with harness.store([jobs]) as store:
            await store.create_entity("jobs", {"job_id": "a", "status": "DONE"})
            stored = await store.get_entity("jobs", "a")
            for filters in (None, {"status": "DONE"}, {"status": in_(["DONE", "FAILED"])}):
                assert await store.wait_for("jobs", "a", filters, timeout=5) == stored

    async def test_112_a_change_ends_the_wait(self, harness: Harness, jobs: Collection) -> None:
        async with harness.store([jobs]) as store, second(harness, store, [jobs]) as other:
            await store.create_entity("jobs", {"job_id": "a", "status": "NEW"})
            waiting = asyncio.create_task(
                store.wait_for("jobs", "a", {"status": "DONE"}, timeout=HANG_SECONDS)
            )
            for status in ("RUNNING", "DONE"):
                await asyncio.sleep(0.1)
                assert not waiting.done()
                await other.update_entity("jobs", "a", {"status": status})
            assert await waiting == await store.get_entity("jobs", "a")

    async def test_112_wrong_arguments(self, harness: Harness, jobs: Collection) -> None:
        async with harness.store([jobs]) as store:
            for call, error in (
                (store.wait_for("nothing", "a", timeout=5), UnknownCollectionError),
                (store.wait_for("jobs", "", timeout=5), InvalidKeyError),
                (store.wait_for("jobs", "a", {"nothing": 1}, timeout=5), InvalidQueryError),
                (store.wait_for("jobs", "a", timeout=cast("Any", "5")), InvalidInputError),
            ):
                with pytest.raises(error):
                    await call

    async def test_112_what_does_not_exist(self, harness: Harness, jobs: Collection) -> None:
        async with harness.store([jobs]) as store:
            for filters in (None, {"status": "DONE"}):
                with pytest.raises(EntityNotFoundError):
                    await store.wait_for("jobs", "a", filters, timeout=HANG_SECONDS)

    async def test_112_a_deletion_ends_the_wait(self, harness: Harness, jobs: Collection) -> None:
        async with harness.store([jobs]) as store, second(harness, store, [jobs]) as other:
            await store.create_entity("jobs", {"job_id": "a", "status": "NEW"})
            waiting = asyncio.create_task(
                store.wait_for("jobs", "a", {"status": "DONE"}, timeout=HANG_SECONDS)
            )
            await asyncio.sleep(0.1)
            await other.delete_entity("jobs", "a")
            with pytest.raises(EntityNotFoundError):
                await waiting

    async def test_112_expiry_ends_the_wait(self, harness: Harness, jobs: Collection) -> None:
        now = datetime(2040, 1, 1, tzinfo=UTC)
        store = harness.store([jobs])
        store._set_clock(lambda: now, None)
        async with store:
            until = now + timedelta(hours=1)
            await store.create_entity("jobs", {"job_id": "a", "status": "NEW", "until": until})
            waiting = asyncio.create_task(
                store.wait_for("jobs", "a", {"status": "DONE"}, timeout=HANG_SECONDS)
            )
            await asyncio.sleep(0.1)
            assert not waiting.done()
            now += timedelta(hours=2)
            with pytest.raises(EntityNotFoundError):
                await waiting
            with pytest.raises(EntityNotFoundError):
                await store.wait_for("jobs", "a", timeout=HANG_SECONDS)

    async def test_112_the_time_ends(self, harness: Harness, jobs: Collection) -> None:
        async with harness.store([jobs]) as store:
            await store.create_entity("jobs", {"job_id": "a", "status": "NEW"})
            for timeout in (0, 0.001, 0.2):
                with pytest.raises(OperationTimeoutError) as caught:
                    await store.wait_for("jobs", "a", {"status": "DONE"}, timeout=timeout)
                assert caught.value.retryable
                assert not caught.value.outcome_unknown
                assert "jobs 'a'" in str(caught.value)

    async def test_112_a_change_between_the_look_and_the_subscription(
        self, harness: Harness, jobs: Collection
    ) -> None:
        async with harness.store([jobs]) as store, second(harness, store, [jobs]) as other:
            for number_of_read in (1, 2, 3):
                entity_id = f"{number_of_read}"
                await store.create_entity("jobs", {"job_id": entity_id, "status": "NEW"})

                async def act(number: int) -> None:
                    if number == number_of_read:  # noqa: B023
                        await asyncio.create_task(
                            other.update_entity("jobs", entity_id, {"status": "DONE"})  # noqa: B023
                        )

                end = _before_reads(store, act)
                waiting = asyncio.create_task(
                    store.wait_for("jobs", entity_id, {"status": "DONE"}, timeout=HANG_SECONDS)
                )
                await asyncio.sleep(0.2)
                end()
                if not waiting.done():  # so many reads are not made
                    await store.update_entity("jobs", entity_id, {"status": "DONE"})
                assert (await waiting)["status"] == "DONE"

    async def test_112_no_change_is_missed_at_any_moment(
        self, harness: Harness, jobs: Collection
    ) -> None:
        with seeded() as random:
            async with harness.store([jobs]) as store, second(harness, store, [jobs]) as other:
                for number in range(repetitions(100, 25)):
                    entity_id = f"{number}"
                    await store.create_entity("jobs", {"job_id": entity_id, "status": "NEW"})
                    waiting = asyncio.create_task(
                        store.wait_for("jobs", entity_id, {"status": "DONE"}, timeout=HANG_SECONDS)
                    )
                    for _ in range(random.randrange(4)):
                        await asyncio.sleep(0)
                    await asyncio.sleep(random.choice([0, 0, 0.001, 0.005, 0.02]))
                    await other.update_entity("jobs", entity_id, {"status": "DONE"})
                    assert (await waiting)["version"] == 2

    async def test_112_a_short_state_is_not_missed_with_a_feed(self, harness: Harness) -> None:
        feed_of(harness)
        jobs = Collection("jobs", key="job_id", fields=["status"], feed=3600)
        async with harness.store([jobs]) as store:
            await store.create_entity("jobs", {"job_id": "a", "status": "NEW"})
            waiting = asyncio.create_task(
                store.wait_for("jobs", "a", {"status": "DONE"}, timeout=HANG_SECONDS)
            )
            await asyncio.sleep(0.5)
            for status in ("DONE", "NEW", "DONE", "NEW"):
                await store.update_entity("jobs", "a", {"status": status})
            assert (await waiting)["version"] == 2

    async def test_112_what_was_before_the_call_does_not_count(
        self, harness: Harness, jobs: Collection
    ) -> None:
        async with harness.store([jobs]) as store:
            await store.create_entity("jobs", {"job_id": "other", "status": "NEW"})
            beside = asyncio.create_task(
                store.wait_for("jobs", "other", {"status": "DONE"}, timeout=HANG_SECONDS)
            )
            await asyncio.sleep(0.1)
            for number in range(10):
                entity_id = f"{number}"
                await store.create_entity("jobs", {"job_id": entity_id, "status": "DONE"})
                await store.delete_entity("jobs", entity_id)
                await store.create_entity("jobs", {"job_id": entity_id, "status": "DONE"})
                await store.update_entity("jobs", entity_id, {"status": "NEW"})
                with pytest.raises(OperationTimeoutError):
                    await store.wait_for("jobs", entity_id, {"status": "DONE"}, timeout=0.05)
            await store.update_entity("jobs", "other", {"status": "DONE"})
            await beside

    async def test_112_a_thousand_waiters_share_their_reads(
        self, harness: Harness, jobs: Collection
    ) -> None:
        async with harness.store([jobs]) as store:
            ids = [f"{each}" for each in range(20)]
            await store.create_entities("jobs", [{"job_id": each, "status": "NEW"} for each in ids])
            waiters = [
                asyncio.create_task(
                    store.wait_for("jobs", ids[each % 20], {"status": "DONE"}, timeout=HANG_SECONDS)
                )
                for each in range(_WAITERS)
            ]
            await asyncio.sleep(0.5)
            await _looked_at(store, jobs)
            await store.update_where("jobs", None, {"status": "DONE"})
            found = await asyncio.gather(*waiters)
            assert {each["version"] for each in found} == {2}
            cast("Any", found[0])["status"] = "changed by its receiver"
            assert {each["status"] for each in found[1:]} == {"DONE"}

    async def test_112_an_error_that_passes_is_retried(
        self, harness: Harness, jobs: Collection
    ) -> None:
        async with harness.store([jobs]) as store:
            await store.create_entity("jobs", {"job_id": "a", "status": "NEW"})
            waiting = asyncio.create_task(
                store.wait_for("jobs", "a", {"status": "DONE"}, timeout=HANG_SECONDS)
            )
            await _looked_at(store, jobs)

            async def fail(number: int) -> None:
                if number < 3:
                    raise UnavailableError("lost")

            end = _before_reads(store, fail)
            await asyncio.sleep(0.5)
            end()
            await store.update_entity("jobs", "a", {"status": "DONE"})
            assert (await waiting)["status"] == "DONE"

    async def test_112_a_damaged_entity_ends_only_its_own_wait(
        self, harness: Harness, jobs: Collection
    ) -> None:
        async with harness.store([jobs]) as store:
            await store.create_entities("jobs", [{"job_id": each} for each in "ab"])
            damaged, whole = (
                asyncio.create_task(
                    store.wait_for("jobs", each, {"status": "DONE"}, timeout=HANG_SECONDS)
                )
                for each in "ab"
            )
            await _looked_at(store, jobs)

            async def fail(keys: Sequence[Key]) -> None:
                if any(each.id == "a" for each in keys):
                    raise CorruptionError("a is damaged")

            end = _before_reads_of(store, fail)
            if jobs.feed is None:
                with pytest.raises(CorruptionError):
                    await damaged
            damaged.cancel()
            await store.update_where("jobs", {"job_id": "b"}, {"status": "DONE"})
            assert (await whole)["version"] == 2
            end()

    async def test_112_not_inside_a_transaction(self, harness: Harness, jobs: Collection) -> None:
        async with harness.store([jobs]) as store:
            async with store.begin_transaction() as tx:
                await tx.create_entity("jobs", {"job_id": "a", "status": "NEW"})
                with pytest.raises(TransactionReentryError):
                    await store.wait_for("jobs", "a", timeout=5)
            assert await store.wait_for("jobs", "a", timeout=5)

    async def test_112_a_cancelled_wait_leaves_nothing(
        self, harness: Harness, jobs: Collection
    ) -> None:
        async with harness.store([jobs]) as store:
            await store.create_entity("jobs", {"job_id": "a", "status": "NEW"})
            for pause in (0, 0.001, 0.01, 0.1):
                waiting = asyncio.create_task(
                    store.wait_for("jobs", "a", {"status": "DONE"}, timeout=None)
                )
                await asyncio.sleep(pause)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
                await no_other_task()

    async def test_112_closing_the_store_ends_the_wait(
        self, harness: Harness, jobs: Collection
    ) -> None:
        async with harness.store([jobs]) as store:
            await store.create_entity("jobs", {"job_id": "a", "status": "NEW"})
            waiting = [
                asyncio.create_task(store.wait_for("jobs", "a", {"status": "DONE"}, timeout=None))
                for _ in range(3)
            ]
            await asyncio.sleep(0.1)
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(each) for each in ended] == 3 * [StoreClosedError]
