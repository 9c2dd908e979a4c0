"""Cases 47 to 53: isolation of concurrent callers."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager, suppress
from itertools import chain
from random import Random
from typing import TYPE_CHECKING, Any, Final

import pytest
from msgspec import convert

from hf_async_store.errors import ConcurrencyConflictError
from hf_async_store.query import begins_with
from hf_async_store.testing.concurrency import (
    HANG_SECONDS,
    PATIENCE,
    failure_of,
    second_store,
    seeded,
)
from hf_async_store.testing.concurrent_workloads import (
    TOTAL,
    count_up,
    open_accounts,
    total,
    transfer,
)
from hf_async_store.testing.consistency_checkers import (
    NOTHING,
    Act,
    Txn,
    unlinearizable,
    unserializable,
)
from hf_async_store.testing.history_recorder import ActRecorder, TxnRecorder, installed
from hf_async_store.testing.process_workers import run_workers, version_race
from hf_async_store.values import Key, canonical

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from hf_async_store.repository import RepositoryInterface
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.harness import Harness
    from hf_async_store.testing.process_workers import Work
    from hf_async_store.transaction import Transaction
    from hf_async_store.values import Entity

KEYS: Final = ("k0", "k1", "k2", "k3", "k4")


ROWS: Final = 700
"""More than any engine reads in one chunk."""


class _RollbackError(Exception):
    """Raised to roll a transaction back."""


async def beside(
    work: Sequence[Coroutine[Any, Any, object]],
    *watchers: Callable[[], Awaitable[object]],
) -> None:
    """Run `work`, and meanwhile each watcher in a loop, at least once."""
    done = asyncio.Event()

    async def watch(watcher: Callable[[], Awaitable[object]]) -> None:
        while True:
            await watcher()
            if done.is_set():
                return
            await asyncio.sleep(0)  # a read of the memory engine does not suspend

    async with asyncio.timeout(HANG_SECONDS), asyncio.TaskGroup() as group:
        for watcher in watchers:
            group.create_task(watch(watcher))
        await asyncio.gather(*work)
        done.set()


def _queried_sums(store: StorageStrategy) -> list[Callable[[], Awaitable[None]]]:
    """Checks of the total by queries, if the engine declares that their results are consistent."""

    async def outside() -> None:
        found = await store.query_entities("accounts")
        assert sum(int(str(each["balance"])) for each in found) == TOTAL

    async def inside() -> None:
        async def work(tx: Transaction) -> int:
            return sum(int(str(e["balance"])) for e in await tx.query_entities("accounts"))

        assert await store.run_transaction(work) == TOTAL

    checks: list[Callable[[], Awaitable[None]]] = []
    if store.capabilities.query_isolation == "snapshot":
        checks.append(outside)
    if store.capabilities.queries_in_transaction == "serializable":
        checks.append(inside)
    return checks


async def _check_by_key(store: StorageStrategy, key: str) -> None:
    _check_clean([await store.get_entity("items", key)])
    _check_clean(await store.get_entities("items", [*KEYS, "new"]))
    with suppress(ConcurrencyConflictError):
        async with store.begin_transaction() as tx:
            _check_clean(await tx.get_entities("items", [key, "new"]))


async def _check_by_query(store: StorageStrategy, key: str) -> None:
    dirty = {"label": begins_with("dirty")}
    assert await store.query_entities("items", dirty) == []
    assert await store.count_entities("items", dirty) == 0
    _check_clean([each async for each in store.stream_entities("items")])
    _check_clean((await store.query_page("items", limit=10)).items)


def _check_clean(seen: Sequence[Entity | None]) -> None:
    assert {each["label"] for each in seen if each is not None} <= {"clean"}


async def _stream_generations(rows: AsyncGenerator[Entity, None]) -> set[int]:
    async with aclosing(rows):
        return {int(str(each["count"])) async for each in rows}


async def _write_generation(store: StorageStrategy, generation: int) -> None:
    """Write a generation to the rows in one transaction, to as many rows as its limit allows."""
    limit = store.capabilities.max_transaction_changes or ROWS
    async with store.begin_transaction() as tx:
        await tx.save_entities(
            "items",
            [
                {"item_id": f"i{n:03}", "count": generation, "label": "x" * 100}
                for n in range(min(limit, ROWS))
            ],
        )


async def _create_keys(store: StorageStrategy) -> None:
    """Create entities for all keys except the last."""
    await store.create_entities(
        "counters", [{"counter_id": each, "value": "start"} for each in KEYS[:-1]]
    )


async def _check_serializable(store: StorageStrategy, txns: list[Txn]) -> None:
    found = await store.get_entities("counters", KEYS)
    last = Txn(
        caller="at the end",
        reads=[(key, installed(each)) for key, each in zip(KEYS, found, strict=True)],
        writes={},
        committed=True,
        began=max(each.ended for each in txns) + 1,
        ended=max(each.ended for each in txns) + 1,
    )
    initial = {**dict.fromkeys(KEYS, (1, "start")), KEYS[-1]: NOTHING}
    assert unserializable([*txns, last], initial) == []
    assert sum(bool(each.committed and each.writes) for each in txns) > 10, (
        "too few transactions committed"
    )


async def _add_one(tx: Transaction, item_id: str) -> None:
    entity = await tx.get_entity("items", item_id)
    assert entity is not None
    await tx.update_entity("items", item_id, {"count": int(str(entity["count"])) + 1})


async def _counts(store: RepositoryInterface) -> list[object]:
    found = await store.get_entities("items", ["x", "y"])
    return [None if each is None else each["count"] for each in found]


@asynccontextmanager
async def _streaming(store: StorageStrategy) -> AsyncGenerator[None, None]:
    async with aclosing(store.stream_entities("items")) as rows:
        await anext(rows)
        yield
        async for _ in rows:
            pass


@asynccontextmanager
async def _reading_inside(store: StorageStrategy) -> AsyncGenerator[None, None]:
    async with store.begin_transaction() as tx:
        await tx.get_entity("items", "i0")
        yield
        await tx.get_entity("items", "i1")


@asynccontextmanager
async def _holding_the_lock(store: StorageStrategy) -> AsyncGenerator[None, None]:
    async with store.acquire_read_lock():  # type: ignore[attr-defined]
        yield


READING: Final[Mapping[str, Callable[[StorageStrategy], AbstractAsyncContextManager[None]]]] = {
    "streams": _streaming,
    "transactions": _reading_inside,
    "locks": _holding_the_lock,
}


_HANDOVER_SECONDS: Final = 0.1


class _OverlappingReaders:
    """Overlapping readers: each one reads until the next one has started.

    If the next reader has not started after `_HANDOVER_SECONDS`, because it waits for a writer, the
    current reader ends nevertheless.
    """

    def __init__(self, store: StorageStrategy, reading: str) -> None:
        self._store = store
        self._reading = READING[reading]
        self.is_running = asyncio.Event()
        self.stop = asyncio.Event()

    async def run(self) -> None:
        leave_before = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            while not self.stop.is_set():
                inside, leave = asyncio.Event(), asyncio.Event()
                group.create_task(self._read(inside, leave))
                with suppress(TimeoutError):
                    async with asyncio.timeout(_HANDOVER_SECONDS):
                        await inside.wait()
                self.is_running.set()
                leave_before.set()
                leave_before = leave
            leave_before.set()

    async def _read(self, inside: asyncio.Event, leave: asyncio.Event) -> None:
        with suppress(ConcurrencyConflictError):
            async with self._reading(self._store):
                inside.set()
                await leave.wait()


def _history_works(role: str, random: Random, keys: Sequence[str], steps: int) -> list[Work]:
    return [
        (
            role,
            {
                "seed": random.randrange(2**32),
                "caller": f"process {n}",
                "keys": keys,
                "steps": steps,
                "tasks": 2,
            },
        )
        for n in range(2)
    ]


class IsolationContract:
    """Cases 47 to 53."""

    # -- 47: transfers -----------------------------------------------------------------------

    async def test_47_the_sum_is_constant_in_every_snapshot(
        self, store: StorageStrategy, harness: Harness
    ) -> None:
        await open_accounts(store)

        async def in_one_read() -> None:
            assert await store.run_transaction(total) == TOTAL

        async def one_by_one() -> None:
            assert await store.run_transaction(lambda tx: total(tx, one_by_one=True)) == TOTAL

        with seeded() as random:
            async with second_store(harness, store) as other:
                transfers = [
                    transfer(each, Random(random.random()), 10)
                    for each in (store, other, store, other, store)
                ]
                await beside(transfers, in_one_read, one_by_one, *_queried_sums(store))
                assert await total(store) == await total(other) == TOTAL

    async def test_47_a_snapshot_does_not_change_while_it_is_open(
        self, store: StorageStrategy
    ) -> None:
        if store.capabilities.query_isolation != "snapshot":
            pytest.skip("the engine declares no snapshots")
        await store.create_entities("items", [{"item_id": each, "label": "old"} for each in KEYS])
        await store.create_entity("counters", {"counter_id": "c", "n": 1})
        everything = store._query("items", None, None, None, None)
        async with store.snapshot() as snapshot:
            before = [each async for each in snapshot.select(everything)]
            await store.delete_entity("items", KEYS[0])
            await store.update_entity("items", KEYS[1], {"label": "new"})
            await store.create_entity("items", {"item_id": "later"})
            await store.update_entity("counters", "c", {"n": 2})
            assert [each async for each in snapshot.select(everything)] == before
            assert await snapshot.count(everything) == len(KEYS)
            [counter] = await snapshot.fetch([Key("counters", "c")])
            assert counter is not None
            assert counter.entity["n"] == 1
            found = [e async for batch in snapshot.select_batches(everything) for e in batch]
            assert list(map(canonical, found)) == [canonical(each.entity) for each in before]

    # -- 48: dirty reads and lost updates ----------------------------------------------------

    async def test_48_no_reader_sees_rolled_back_changes(
        self, store: StorageStrategy, harness: Harness
    ) -> None:
        await store.create_entities("items", [{"item_id": each, "label": "clean"} for each in KEYS])

        async def write_and_roll_back(times: int) -> None:
            for n in range(times):
                with suppress(_RollbackError, ConcurrencyConflictError):
                    async with store.begin_transaction() as tx:
                        await tx.update_entity("items", KEYS[n % 5], {"label": f"dirty {n}"})
                        await tx.save_entity("items", {"item_id": "new", "label": "dirty"})
                        await asyncio.sleep(0.002)
                        raise _RollbackError

        with seeded() as random:
            async with second_store(harness, store) as other:
                checks = [
                    lambda each=each, check=check: check(each, random.choice(KEYS))
                    for each in (store, other)
                    for check in (_check_by_key, _check_by_query)
                ]
                await beside([write_and_roll_back(25)], *checks)

    async def test_48_no_update_is_lost_at_any_mix_of_verbs(
        self, store: StorageStrategy, harness: Harness
    ) -> None:
        await store.create_entity("counters", {"counter_id": "c", "value": 0})
        with seeded() as random:
            async with second_store(harness, store) as other:
                work = [
                    count_up(each, Random(random.random()), "c", 12)
                    for each in (store, other, store, other, store)
                ]
                await beside(work)
                for each in (store, other):
                    counter = await each.get_entity("counters", "c")
                    assert counter is not None
                    assert (counter["value"], counter["version"]) == (60, 61)

    async def test_48_concurrent_updates_of_different_fields_are_all_kept(
        self, store: StorageStrategy
    ) -> None:
        await store.create_entity("counters", {"counter_id": "c"})

        async def count(field: str) -> None:
            for n in range(1, 11):
                await store.update_entity("counters", "c", {field: n})

        await beside([count(f"field {n}") for n in range(6)])
        counter = await store.get_entity("counters", "c")
        assert counter is not None
        assert [counter[f"field {n}"] for n in range(6)] == [10] * 6
        assert counter["version"] == 61

    # -- 49: streams -------------------------------------------------------------------------

    async def test_49_a_stream_does_not_show_part_of_a_transaction(
        self, store: StorageStrategy
    ) -> None:
        await _write_generation(store, 0)
        for order in (None, "item_id", "-count"):
            first = await _stream_generations(store.stream_entities("items", None, order))
            stream = store.stream_entities("items", None, order)
            async with aclosing(stream), asyncio.timeout(HANG_SECONDS):
                seen = [(await anext(stream))["count"] for _ in range(3)]
                # In the same task: an open stream does not block writers.
                await _write_generation(store, 1 + int(str(seen[0])))
                seen += [each["count"] async for each in stream]
            if store.capabilities.query_isolation == "snapshot":
                assert set(seen) == first
            else:
                assert set(seen) <= {each + more for each in first for more in (0, 1)}

    async def test_49_streams_under_load_do_not_show_part_of_a_transaction(
        self, store: StorageStrategy, harness: Harness
    ) -> None:
        await _write_generation(store, 0)

        async def renew() -> None:
            for generation in range(1, 6):
                await _write_generation(store, generation)
                await asyncio.sleep(0)

        async with second_store(harness, store) as other:

            async def check_stream(at: StorageStrategy) -> None:
                seen = await _stream_generations(at.stream_entities("items"))
                if at.capabilities.query_isolation == "snapshot":
                    assert len(seen) == 1, f"one stream showed the generations {seen}"
                else:
                    assert seen <= set(range(6))

            await beside([renew()], lambda: check_stream(store), lambda: check_stream(other))

    # -- 50: histories -----------------------------------------------------------------------

    async def test_50_single_keys_are_linearizable(
        self, store: StorageStrategy, harness: Harness
    ) -> None:
        with seeded() as random:
            async with second_store(harness, store) as other:
                callers = [
                    ActRecorder(each, Random(random.random()), f"caller {n}")
                    for n, each in enumerate((store, other, store, store, other, store))
                ]
                await beside([each.run(KEYS[:3], 50) for each in callers])
            acts = [act for each in callers for act in each.acts]
            assert unlinearizable(acts) == []
            assert sum(isinstance(each.answer, int) for each in acts) > 50, (
                "too few writes succeeded"
            )

    async def test_50_transactions_are_serializable(
        self, store: StorageStrategy, harness: Harness
    ) -> None:
        with seeded() as random:
            await _create_keys(store)
            async with second_store(harness, store) as other:
                callers = [
                    TxnRecorder(each, Random(random.random()), f"caller {n}")
                    for n, each in enumerate((store, other, store, store, other, store))
                ]
                await beside([each.run(KEYS, 15) for each in callers])
            await _check_serializable(store, [txn for each in callers for txn in each.txns])

    # -- 51: processes -----------------------------------------------------------------------

    async def test_51_the_url_agrees_with_the_declared_multi_process(
        self, harness: Harness
    ) -> None:
        assert (harness.url() is not None) is harness.capabilities.multi_process

    async def test_51_one_writer_of_several_processes_wins(
        self, store: StorageStrategy, url: str
    ) -> None:
        await store.create_entity("counters", {"counter_id": "race"})
        work = {"counter_id": "race", "rounds": 30, "writers": 10}
        here, *there = await asyncio.gather(
            version_race(store, counter_id="race", rounds=30, writers=10),
            run_workers(url, ("version-race", work), ("version-race", work)),
        )
        won = sorted([*here, *(version for process in there[0] for version in process)])
        assert won == list(range(2, 32))

    async def test_51_no_update_of_several_processes_is_lost(
        self, store: StorageStrategy, url: str
    ) -> None:
        await store.create_entity("counters", {"counter_id": "c", "value": 0})
        with seeded() as random:
            works = [
                ("increments", {"seed": random.randrange(2**32), "counter_id": "c", "times": 30})
                for _ in range(2)
            ]
            await asyncio.gather(
                run_workers(url, *works), count_up(store, Random(random.random()), "c", 30)
            )
        counter = await store.get_entity("counters", "c")
        assert counter is not None
        assert (counter["value"], counter["version"]) == (90, 91)

    async def test_51_the_sum_is_constant_between_processes(
        self, store: StorageStrategy, url: str
    ) -> None:
        await open_accounts(store)
        with seeded() as random:
            works = [
                ("transfers", {"seed": random.randrange(2**32), "times": 20}) for _ in range(2)
            ]

            async def check_total() -> None:
                assert await store.run_transaction(total) == TOTAL

            await beside([run_workers(url, *works)], check_total, *_queried_sums(store))
            assert await total(store) == TOTAL

    async def test_51_single_keys_are_linearizable_between_processes(
        self, store: StorageStrategy, url: str
    ) -> None:
        with seeded() as random:
            here = [ActRecorder(store, Random(random.random()), f"here {n}") for n in range(3)]
            found, *_ = await asyncio.gather(
                run_workers(url, *_history_works("single-keys", random, KEYS[:3], 60)),
                *(each.run(KEYS[:3], 120) for each in here),
            )
            acts = [act for each in here for act in each.acts]
            acts += chain.from_iterable(convert(found, list[list[Act]]))
            assert unlinearizable(acts) == []

    async def test_51_transactions_are_serializable_between_processes(
        self, store: StorageStrategy, url: str
    ) -> None:
        with seeded() as random:
            await _create_keys(store)
            here = [TxnRecorder(store, Random(random.random()), f"here {n}") for n in range(2)]
            found, *_ = await asyncio.gather(
                run_workers(url, *_history_works("transactions", random, KEYS, 15)),
                *(each.run(KEYS, 30) for each in here),
            )
            txns = [txn for each in here for txn in each.txns]
            txns += chain.from_iterable(convert(found, list[list[Txn]]))
            await _check_serializable(store, txns)

    @pytest.fixture
    def url(self, harness: Harness) -> str:
        url = harness.url()
        if url is None:
            pytest.skip("the engine does not declare multi_process")
        return url

    # -- 52: opposed orders ------------------------------------------------------------------

    async def test_52_opposed_orders_end_by_success_or_a_retryable_conflict(
        self, store: StorageStrategy
    ) -> None:
        await store.create_entities("items", [{"item_id": each, "count": 0} for each in "xy"])
        landed = 0
        for _ in range(4):
            ready = {each: asyncio.Event() for each in "xy"}

            async def both(first: str, second: str, ready: dict[str, asyncio.Event]) -> None:
                async with store.begin_transaction() as tx:
                    await _add_one(tx, first)
                    ready[first].set()
                    with suppress(TimeoutError):
                        async with asyncio.timeout(PATIENCE):
                            await ready[second].wait()
                    await _add_one(tx, second)

            async with asyncio.timeout(HANG_SECONDS):
                failures = await asyncio.gather(
                    failure_of(both("x", "y", ready)), failure_of(both("y", "x", ready))
                )
            for failure in failures:
                if failure is not None:
                    assert isinstance(failure, ConcurrencyConflictError), failure
                    assert failure.retryable
            landed += failures.count(None)
            assert await _counts(store) == [landed, landed]

    async def test_52_opposed_orders_succeed_when_they_are_retried(
        self, store: StorageStrategy, harness: Harness
    ) -> None:
        await store.create_entities("items", [{"item_id": each, "count": 0} for each in "xy"])

        async def work(at: StorageStrategy, order: str) -> None:
            async def both(tx: Transaction) -> None:
                for each in order:
                    await _add_one(tx, each)
                    await asyncio.sleep(0.001)

            for _ in range(5):
                await at.run_transaction(both)

        async with second_store(harness, store) as other:
            await beside([work(store, "xy"), work(other, "yx"), work(store, "yx")])
        assert await _counts(store) == [15, 15]

    async def test_52_batches_in_opposed_orders_succeed_without_a_retry(
        self, store: StorageStrategy, harness: Harness
    ) -> None:
        entities = [{"item_id": f"i{n}", "count": 0} for n in range(30)]

        async def save(at: StorageStrategy, batch: list[dict[str, object]]) -> None:
            for _ in range(5):
                await at.save_entities("items", batch)

        async with second_store(harness, store) as other:
            await beside(
                [
                    save(each, batch)
                    for each in (store, other)
                    for batch in ([*entities], [*reversed(entities)])
                ]
            )
        found = await store.get_entities("items", [f"i{n}" for n in range(30)])
        assert [each and each["version"] for each in found] == [20] * 30

    # -- 53: writers among readers -----------------------------------------------------------

    @pytest.mark.parametrize("how", ["update", "batch", "transaction"])
    @pytest.mark.parametrize("reading", READING)
    async def test_53_a_writer_is_not_starved_by_readers(
        self, store: StorageStrategy, harness: Harness, reading: str, how: str
    ) -> None:
        if reading == "locks" and not hasattr(store, "acquire_read_lock"):
            pytest.skip("the engine has no acquire_read_lock")
        await store.create_entities("items", [{"item_id": f"i{n}"} for n in range(50)])

        async def write(repository: RepositoryInterface) -> None:
            await repository.update_entity("items", "i0", {"label": "new"})

        async def writer() -> None:
            for _ in range(2):
                if how == "update":
                    await write(store)
                elif how == "batch":
                    await store.save_entities("items", [{"item_id": f"i{n}"} for n in range(50)])
                else:
                    await store.run_transaction(write)

        async with second_store(harness, store) as other:
            readers = [_OverlappingReaders(each, reading) for each in (store, other)]
            async with asyncio.timeout(HANG_SECONDS), asyncio.TaskGroup() as group:
                for each in readers:
                    group.create_task(each.run())
                    await each.is_running.wait()
                # The readers run until the writer is done.
                await writer()
                for each in readers:
                    each.stop.set()
        entity = await store.get_entity("items", "i0")
        assert entity is not None
        assert entity["version"] == 3
