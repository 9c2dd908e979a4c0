"""Coalescing: queued operations share a batch, and otherwise behave as if each were alone."""

from __future__ import annotations

import asyncio
import random
import types
from collections.abc import Awaitable, Generator, Sequence
from typing import Any

import pytest

from hf_async_store import (
    InvalidInputError,
    LockTimeoutError,
    OperationTimeoutError,
    StorageError,
    UnavailableError,
)
from hf_async_store.coalescing import Coalescer, Take, taking_at_once
from hf_async_store.values import Key


class Recorder:
    """A fake engine that returns the id of each item, and records the batches."""

    def __init__(self, *, turns: int = 1) -> None:
        self.batches: list[list[Key]] = []
        self.under_way: list[Key] = []
        self.turns = turns
        self.fail: StorageError | None = None

    async def run(self, items: Sequence[Key]) -> list[str]:
        assert not set(self.under_way) & set(items), (
            "two batches with the same key run at the same time"
        )
        self.batches.append(list(items))
        self.under_way += items
        for _ in range(self.turns):
            await asyncio.sleep(0)
        for each in items:
            self.under_way.remove(each)
        if self.fail is not None:
            raise self.fail
        return [each.id for each in items]


def keys(*ids: str) -> list[Key]:
    return [Key("things", each) for each in ids]


def identity(key: Key) -> Key:
    return key


async def test_tasks_of_one_iteration_share_a_batch() -> None:
    recorder = Recorder()
    calls: Coalescer[Key, str] = Coalescer(
        taking_at_once(recorder.run), lanes=1, size=100, writes=True
    )
    results = await asyncio.gather(*(calls.submit(keys(str(each)), None) for each in range(64)))
    assert [each[0] for each in results] == [str(each) for each in range(64)]
    assert len(recorder.batches) == 1


async def test_items_submitted_during_a_batch_share_the_next_one() -> None:
    recorder = Recorder(turns=5)
    calls: Coalescer[Key, str] = Coalescer(
        taking_at_once(recorder.run), lanes=1, size=100, writes=True
    )
    first = asyncio.create_task(calls.submit(keys("a"), None))
    while not recorder.batches:
        await asyncio.sleep(0)
    await asyncio.gather(first, *(calls.submit(keys(each), None) for each in "bcd"))
    assert [len(each) for each in recorder.batches] == [1, 3]


async def test_a_closed_loop_keeps_its_batches_whole() -> None:
    recorder = Recorder(turns=3)
    calls: Coalescer[Key, str] = Coalescer(
        taking_at_once(recorder.run), lanes=1, size=100, writes=True
    )

    async def worker(name: str) -> None:
        for _ in range(20):
            await calls.submit(keys(name), None)

    await asyncio.gather(*(worker(str(each)) for each in range(16)))
    assert [len(each) for each in recorder.batches] == [16] * 20


async def test_a_large_call_is_split_and_comes_back_in_order() -> None:
    recorder = Recorder()
    calls: Coalescer[Key, str] = Coalescer(
        taking_at_once(recorder.run), lanes=1, size=10, writes=True
    )
    ids = [str(each) for each in range(35)]
    assert await calls.submit(keys(*ids), None) == ids
    assert [len(each) for each in recorder.batches] == [10, 10, 10, 5]


async def test_a_failed_batch_gives_each_item_a_separate_error() -> None:
    recorder = Recorder()
    recorder.fail = UnavailableError("gone")
    calls: Coalescer[Key, str] = Coalescer(
        taking_at_once(recorder.run), lanes=1, size=10, writes=True
    )
    (one, other), (third,) = await asyncio.gather(
        calls.submit(keys("a", "b"), None), calls.submit(keys("c"), None)
    )
    assert isinstance(one, UnavailableError)
    assert isinstance(other, UnavailableError)
    assert isinstance(third, UnavailableError)
    assert len({id(one), id(other), id(third)}) == 3


async def test_an_unexpected_exception_reaches_every_caller() -> None:
    async def broken(items: Sequence[Key]) -> list[str]:
        raise ZeroDivisionError

    calls: Coalescer[Key, str] = Coalescer(taking_at_once(broken), lanes=1, size=10, writes=True)
    results = await asyncio.gather(
        *(calls.submit(keys(each), None) for each in "ab"), return_exceptions=True
    )
    assert [type(each) for each in results] == [ZeroDivisionError] * 2
    # The lane stays usable, and the event loop has logged no error: every caller got the exception.
    results = await asyncio.gather(calls.submit(keys("c"), None), return_exceptions=True)
    assert [type(each) for each in results] == [ZeroDivisionError]


async def test_a_cancelled_item_outside_a_batch_is_removed() -> None:
    recorder = Recorder(turns=5)
    calls: Coalescer[Key, str] = Coalescer(
        taking_at_once(recorder.run), lanes=1, size=10, writes=True
    )
    first = asyncio.create_task(calls.submit(keys("a"), None))
    while not recorder.batches:
        await asyncio.sleep(0)
    late = asyncio.create_task(calls.submit(keys("b"), None))
    await asyncio.sleep(0)
    late.cancel()
    await first
    await calls.drain()
    assert recorder.batches == [keys("a")]


async def test_a_timeout_reports_whether_the_item_was_in_a_batch() -> None:
    started = asyncio.Event()
    release = asyncio.Event()

    async def slow(items: Sequence[Key]) -> list[str]:
        started.set()
        await release.wait()
        return [each.id for each in items]

    calls: Coalescer[Key, str] = Coalescer(taking_at_once(slow), lanes=1, size=10, writes=True)
    taken = asyncio.create_task(calls.submit(keys("a"), 0.05))
    await started.wait()
    with pytest.raises(OperationTimeoutError) as queued:
        await calls.submit(keys("b"), 0.01)
    assert not queued.value.outcome_unknown
    assert queued.value.retryable
    with pytest.raises(OperationTimeoutError) as unknown:
        await taken
    assert unknown.value.outcome_unknown
    release.set()
    await calls.drain()


class StoreLock:
    """A fake engine that waits for a lock before it takes the items, in a thread if so told."""

    def __init__(self, *, in_thread: bool = False) -> None:
        self.waiting, self.free = asyncio.Event(), asyncio.Event()
        self.in_thread = in_thread
        self.taken: list[str] = []

    async def run(self, take: Take[Key]) -> list[str]:
        self.waiting.set()
        await self.free.wait()
        items = await asyncio.to_thread(take) if self.in_thread else take()
        assert take() == items
        await asyncio.sleep(0.02)
        self.taken += [each.id for each in items]
        return [each.id for each in items]


@pytest.mark.parametrize("in_thread", [False, True])
async def test_items_are_withdrawn_until_their_batch_begins(in_thread: bool) -> None:
    lock = StoreLock(in_thread=in_thread)
    calls: Coalescer[Key, str] = Coalescer(lock.run, lanes=1, size=10, writes=True)
    kept = asyncio.create_task(calls.submit(keys("kept"), None))
    late = asyncio.create_task(calls.submit(keys("late"), 0.01))
    cancelled = asyncio.create_task(calls.submit(keys("cancelled", "cancelled"), None))
    await lock.waiting.wait()
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled  # it does not wait for the lock
    with pytest.raises(OperationTimeoutError) as caught:
        await late
    assert (caught.value.outcome_unknown, caught.value.retryable) == (False, True)
    lock.free.set()
    assert await kept == ["kept"]
    assert lock.taken == ["kept"]


async def test_items_are_not_withdrawn_after_their_batch_has_begun() -> None:
    lock = StoreLock()
    calls: Coalescer[Key, str] = Coalescer(lock.run, lanes=1, size=10, writes=True)
    late = asyncio.create_task(calls.submit(keys("late"), 0.01))
    cancelled = asyncio.create_task(calls.submit(keys("cancelled"), None))
    await lock.waiting.wait()
    lock.free.set()
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(OperationTimeoutError) as caught:
        await late
    assert caught.value.outcome_unknown
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert sorted(lock.taken) == ["cancelled", "late"]


async def test_a_batch_of_which_all_items_were_withdrawn_does_not_run() -> None:
    lock = StoreLock()
    calls: Coalescer[Key, str] = Coalescer(lock.run, lanes=1, size=10, writes=True)
    with pytest.raises(OperationTimeoutError):
        await calls.submit(keys("a"), 0.01)
    lock.free.set()
    await calls.drain()
    assert not lock.taken
    assert await calls.submit(keys("b"), None) == ["b"]


async def test_a_batch_that_fails_before_it_begins_fails_its_calls() -> None:
    async def locked(take: Take[Key]) -> list[str]:
        del take
        raise LockTimeoutError("locked")

    calls: Coalescer[Key, str | StorageError] = Coalescer(locked, lanes=1, size=10, writes=True)
    results = await asyncio.gather(*(calls.submit(keys(each), None) for each in "ab"))
    assert [type(each) for [each] in results] == [LockTimeoutError] * 2


@pytest.mark.parametrize("seed", range(20))
async def test_several_lanes_keep_the_order_of_each_key(seed: int) -> None:
    chance = random.Random(seed)
    done: dict[str, list[int]] = {}
    under_way: set[str] = set()

    async def run(items: Sequence[tuple[Key, int]]) -> list[int]:
        ids = {key.id for key, _ in items}
        assert not ids & under_way
        under_way.update(ids)
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
        for key, number in items:
            done.setdefault(key.id, []).append(number)
        under_way.difference_update(ids)
        return [number for _, number in items]

    calls: Coalescer[tuple[Key, int], int] = Coalescer(
        taking_at_once(run), lanes=4, size=3, writes=True, key=lambda item: item[0]
    )
    waiting: list[asyncio.Task[object]] = []
    for number in range(200):
        key = Key("things", chance.choice("abcdef"))
        waiting.append(asyncio.create_task(calls.submit([(key, number)], None)))
        if chance.random() < 0.2:
            await asyncio.sleep(0)
        if chance.random() < 0.1:
            chance.choice(waiting).cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await calls.drain()
    assert all(each == sorted(each) for each in done.values())
    kept = {number for each in done.values() for number in each}
    assert all(task.cancelled() for number, task in enumerate(waiting) if number not in kept)


async def test_a_submit_after_the_end_of_a_lane_starts_another_lane() -> None:
    """A submit in the same event-loop iteration in which a lane ends must start another lane."""
    recorder = Recorder(turns=0)
    calls: Coalescer[Key, str] = Coalescer(
        taking_at_once(recorder.run), lanes=1, size=10, writes=True
    )
    for turns in range(12):
        await calls.submit(keys("a"), None)
        for _ in range(turns):
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await calls.submit(keys("b"), None)


class Gate:
    """A fake engine whose batch does not end until it is released."""

    def __init__(self) -> None:
        self.taken = asyncio.Event()
        self.let_through = asyncio.Event()
        self.landed: list[str] = []

    async def run(self, items: Sequence[Key]) -> list[str]:
        self.taken.set()
        await self.let_through.wait()
        self.landed += [each.id for each in items]
        return [each.id for each in items]


@pytest.mark.parametrize("cancellations", [1, 2, 5])
async def test_a_cancelled_write_in_a_batch_waits_for_the_batch(cancellations: int) -> None:
    gate = Gate()
    calls: Coalescer[Key, str] = Coalescer(taking_at_once(gate.run), lanes=1, size=10, writes=True)
    task = asyncio.create_task(calls.submit(keys("a"), None))
    await gate.taken.wait()
    for _ in range(cancellations):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done(), "a write of a cancelled task took effect later"
    gate.let_through.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gate.landed == ["a"]


class Alone:
    """A fake engine that can write in the task of the caller; records how each batch was written."""

    def __init__(self, *, possible: bool = True) -> None:
        self.possible = possible
        self.asked = 0
        self.batches: list[tuple[str, list[str]]] = []
        self.fail: StorageError | None = None
        self.calls: Coalescer[Key, str] = Coalescer(
            taking_at_once(lambda items: self._write("lane", items)), lanes=1, size=10, writes=True,
            run_cancellable=self._work,
        )  # fmt: skip

    def _work(self, items: Sequence[Key]) -> Awaitable[Sequence[str]] | None:
        self.asked += 1
        return self._write("caller", items) if self.possible else None

    async def _write(self, how: str, items: Sequence[Key]) -> list[str]:
        self.batches.append((how, [each.id for each in items]))
        for _ in range(4):
            await asyncio.sleep(0)
        if self.fail is not None:
            raise self.fail
        return [each.id for each in items]

    async def submit(self, *ids: str, timeout: float | None = None) -> list[str | StorageError]:
        return await self.calls.submit(keys(*ids), timeout)


async def test_the_only_caller_writes_in_his_own_task() -> None:
    alone = Alone()
    for each in "abc":
        assert await alone.submit(each) == [each]
    assert await alone.submit("d", timeout=5) == ["d"]  # he must return in time
    assert await alone.submit(*map(str, range(11))) == [*map(str, range(11))]
    how = [how for how, _ in alone.batches]
    assert how == ["lane", "caller", "caller", "lane", "lane", "lane"]
    alone.possible = False
    assert await alone.submit("e") == ["e"]
    assert alone.batches[-1] == ("lane", ["e"])


async def test_a_lane_goes_on_if_its_only_caller_cannot_write_himself() -> None:
    alone = Alone(possible=False)
    for _ in range(100):
        await alone.submit("a")
    assert alone.asked <= 3  # each time, a lane had ended, and another one had to start
    alone.possible = True
    for _ in range(100):
        await alone.submit("a")
    assert alone.batches[-1] == ("caller", ["a"])


async def test_others_join_the_batch_after_that_of_the_only_caller() -> None:
    alone = Alone()
    await alone.submit("a")

    async def many(name: str) -> None:
        for number in range(3):
            await alone.submit(f"{name}{number}")

    await asyncio.gather(*map(many, "xyz"))
    assert alone.batches[1] == ("caller", ["x0"])
    assert {how for how, _ in alone.batches[2:]} == {"lane"}
    assert sorted(alone.batches[2][1]) == ["x1", "y0", "z0"]
    await alone.calls.drain()


async def test_a_close_waits_for_the_only_caller() -> None:
    alone = Alone()
    await alone.submit("a")
    task = asyncio.create_task(alone.submit("b"))
    await asyncio.sleep(0)
    assert not task.done()
    await alone.calls.drain()
    await asyncio.sleep(0)
    assert task.done()
    assert alone.batches[-1] == ("caller", ["b"])


async def test_a_close_does_not_wait_busily_for_the_only_caller() -> None:
    alone = Alone()
    await alone.submit("a")
    free, steps = asyncio.Event(), 0

    async def locked(items: list[Key]) -> list[str]:
        await free.wait()
        return [each.id for each in items]

    @types.coroutine
    def drain() -> Generator[Any, None, None]:
        nonlocal steps
        for each in alone.calls.drain().__await__():
            steps += 1
            yield each

    alone.calls.use(taking_at_once(locked), run_cancellable=locked)
    tasks = [asyncio.create_task(alone.submit(each)) for each in "bc"]
    await asyncio.sleep(0)
    draining = asyncio.ensure_future(drain())
    await asyncio.sleep(0.01)
    free.set()
    await draining
    assert [await each for each in tasks] == [["b"], ["c"]]
    assert steps < 10


async def test_the_only_caller_lets_others_run_although_each_call_fails() -> None:
    alone = Alone()
    await alone.submit("a")

    async def locked(items: list[Key]) -> list[str]:
        raise LockTimeoutError("locked")

    alone.calls.use(taking_at_once(locked), run_cancellable=locked)
    task = asyncio.create_task(asyncio.sleep(0))
    assert [type(each) for each in await alone.submit("b")] == [LockTimeoutError]
    await asyncio.sleep(0)
    assert task.done()


async def test_a_failure_of_the_only_caller_is_the_outcome_of_each_item() -> None:
    alone = Alone()
    await alone.submit("a")
    alone.fail = UnavailableError("full")
    outcomes = await alone.submit("b", "c")
    assert [type(each) for each in outcomes] == [UnavailableError] * 2
    assert outcomes[0] is not outcomes[1]
    alone.fail = None
    assert await alone.submit("d") == ["d"]


async def test_a_cancelled_large_call_waits_only_for_items_in_batches() -> None:
    gate = Gate()
    calls: Coalescer[Key, str] = Coalescer(taking_at_once(gate.run), lanes=1, size=2, writes=True)
    task = asyncio.create_task(calls.submit(keys("a", "b", "c", "d"), None))
    await gate.taken.wait()
    task.cancel()
    gate.let_through.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    await calls.drain()
    assert gate.landed == ["a", "b"], "an item that was not in a batch yet was written"


async def test_a_cancelled_write_waits_for_a_failing_batch() -> None:
    started, fail = asyncio.Event(), asyncio.Event()

    async def run(items: Sequence[Key]) -> list[str]:
        started.set()
        await fail.wait()
        raise UnavailableError("gone")

    calls: Coalescer[Key, str] = Coalescer(taking_at_once(run), lanes=1, size=10, writes=True)
    task = asyncio.create_task(calls.submit(keys("a"), None))
    await started.wait()
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    fail.set()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancelled_read_does_not_wait() -> None:
    gate = Gate()
    calls: Coalescer[Key, str] = Coalescer(taking_at_once(gate.run), lanes=1, size=10, writes=False)
    task = asyncio.create_task(calls.submit(keys("a"), None))
    await gate.taken.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.let_through.set()
    await calls.drain()


async def test_a_timeout_of_reads_has_no_unknown_outcome() -> None:
    gate = Gate()
    calls: Coalescer[Key, str] = Coalescer(taking_at_once(gate.run), lanes=1, size=10, writes=False)
    with pytest.raises(OperationTimeoutError) as late:
        await calls.submit(keys("a"), 0.01)
    assert (late.value.outcome_unknown, late.value.retryable) == (False, True)
    gate.let_through.set()
    await calls.drain()


@pytest.mark.parametrize("timeout", ["1", True, float("nan"), [1], 10**400])
async def test_an_invalid_timeout_is_refused(timeout: Any) -> None:
    gate = Gate()
    calls: Coalescer[Key, str] = Coalescer(taking_at_once(gate.run), lanes=1, size=10, writes=True)
    with pytest.raises(InvalidInputError, match="timeout"):
        await calls.submit(keys("a"), timeout)
    await calls.drain()
    assert not gate.taken.is_set()


async def test_a_lane_that_is_cancelled_before_its_first_step_releases_its_callers() -> None:
    recorder = Recorder()
    calls: Coalescer[Key, str] = Coalescer(
        taking_at_once(recorder.run), lanes=1, size=100, writes=True
    )
    waiting = [asyncio.create_task(calls.submit(keys(each), None)) for each in "abc"]
    known = asyncio.all_tasks()
    while not (lanes := asyncio.all_tasks() - known):
        await asyncio.sleep(0)
    for each in (*lanes, *waiting):  # as `asyncio.run` does at its end
        each.cancel()
    async with asyncio.timeout(10):
        results = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(each, asyncio.CancelledError) for each in results)
    assert not recorder.batches
    assert await calls.submit(keys("d"), None) == ["d"]


class Locks:
    """Ends the items of locked keys by `LockTimeoutError`, or waits for them."""

    def __init__(self, *locked: str) -> None:
        self.free = asyncio.Event()
        self.locked = set(locked)
        self.waiting = 0
        self.most_waiting = 0
        self.written: list[Key] = []
        self.batches: list[list[str]] = []  # those that waited

    async def run(self, items: Sequence[Key]) -> list[str | StorageError]:
        await asyncio.sleep(0)
        return [
            LockTimeoutError("locked") if each.id in self.locked else self._write(each)
            for each in items
        ]

    async def wait(self, items: Sequence[Key]) -> list[str | StorageError]:
        self.batches.append([each.id for each in items])
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)
        try:
            await self.free.wait()
        finally:
            self.waiting -= 1
        return [self._write(each) for each in items]

    def _write(self, key: Key) -> str:
        self.written.append(key)
        return key.id

    def coalescer(self, lanes: int = 1) -> Coalescer[Key, str | StorageError]:
        return Coalescer(
            taking_at_once(self.run),
            wait=taking_at_once(self.wait),
            key=identity,
            lanes=lanes,
            size=100,
            writes=True,
        )


@pytest.mark.parametrize("lanes", [1, 3])
async def test_items_that_wait_for_a_lock_delay_no_others(lanes: int) -> None:
    locks = Locks(*"abcdefgh")
    calls = locks.coalescer(lanes)
    blocked = [asyncio.create_task(calls.submit(keys(each), None)) for each in "abcdefgh"]
    assert await calls.submit(keys("x"), None) == ["x"]
    later = asyncio.create_task(calls.submit(keys("y", "a"), None))
    assert await calls.submit(keys("z"), None) == ["z"]
    assert not any(each.done() for each in [*blocked, later])
    locks.locked.clear()
    locks.free.set()
    assert await asyncio.gather(*blocked) == [[each] for each in "abcdefgh"]
    assert await later == ["y", "a"]
    assert locks.most_waiting == 4
    await calls.drain()


async def test_all_blocked_items_wait_at_once() -> None:
    """Else the last of many would begin to wait when the wait of the first ones had timed out."""
    names = [f"{each:03}" for each in range(99)]
    locks = Locks(*names, "late", "later")
    calls = locks.coalescer()
    alone = [asyncio.create_task(calls.submit(keys(each), None)) for each in ("late", "later")]
    while locks.waiting < 2:
        await asyncio.sleep(0)
    many = asyncio.create_task(calls.submit(keys(*names), None))
    while locks.waiting < 4:
        await asyncio.sleep(0)
    assert locks.batches == [["late"], ["later"], names[:50], names[50:]]
    locks.free.set()
    assert await many == names
    await asyncio.gather(*alone)


@pytest.mark.parametrize("lanes", [1, 3])
async def test_items_of_a_locked_key_keep_their_order(lanes: int) -> None:
    numbers: list[int] = []
    free = asyncio.Event()

    async def run(items: Sequence[tuple[Key, int]]) -> list[int | StorageError]:
        if not free.is_set():
            return [LockTimeoutError("locked") for _ in items]
        numbers.extend(number for _, number in items)
        return [number for _, number in items]

    async def wait(items: Sequence[tuple[Key, int]]) -> list[int | StorageError]:
        await free.wait()
        await asyncio.sleep(0)
        numbers.extend(number for _, number in items)
        return [number for _, number in items]

    calls: Coalescer[tuple[Key, int], int | StorageError] = Coalescer(
        taking_at_once(run),
        wait=taking_at_once(wait),
        key=lambda item: item[0],
        lanes=lanes,
        size=2,
        writes=True,
    )
    [key] = keys("a")
    tasks = [asyncio.create_task(calls.submit([(key, each)], None)) for each in range(9)]
    await asyncio.sleep(0.01)
    assert not numbers
    free.set()
    await asyncio.gather(*tasks)
    assert numbers == list(range(9))


async def test_a_lock_timeout_of_the_call_that_waits_is_final() -> None:
    async def run(items: Sequence[Key]) -> list[str | StorageError]:
        return [LockTimeoutError("locked") for _ in items]

    calls: Coalescer[Key, str | StorageError] = Coalescer(
        taking_at_once(run), wait=taking_at_once(run), key=identity, lanes=1, size=10, writes=True
    )
    assert [type(each) for each in await calls.submit(keys("a"), None)] == [LockTimeoutError]


async def test_withdrawn_items_are_not_written_when_their_lock_is_free() -> None:
    locks = Locks(*"abcdef")
    calls = locks.coalescer()
    tasks = [asyncio.create_task(calls.submit(keys(each), None)) for each in "abcd"]
    while locks.waiting < 4:
        await asyncio.sleep(0)
    tasks += [asyncio.create_task(calls.submit(keys(each), None)) for each in "ef"]
    await asyncio.sleep(0.01)  # they are blocked, too
    for each in tasks:
        each.cancel()
    await asyncio.sleep(0.01)
    assert not any(each.done() for each in tasks[:4])  # they wait for their writes
    assert all(each.done() for each in tasks[4:])
    locks.free.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    await calls.drain()
    assert all(each.cancelled() for each in tasks)
    assert sorted(each.id for each in locks.written) == ["a", "b", "c", "d"]


def test_a_loop_that_closes_ends_the_items_that_wait_for_a_lock() -> None:
    locks = Locks(*"abcdef")
    ended: list[str] = []

    async def submit(calls: Coalescer[Key, str | StorageError], name: str) -> None:
        try:
            await calls.submit(keys(name), None)
        finally:
            ended.append(name)

    async def begin() -> list[asyncio.Task[None]]:
        calls = locks.coalescer()
        tasks = [asyncio.create_task(submit(calls, each)) for each in "abcd"]
        while locks.waiting < 4:
            await asyncio.sleep(0)
        tasks += [asyncio.create_task(submit(calls, each)) for each in "ef"]
        await asyncio.sleep(0.01)
        return tasks

    asyncio.run(begin())
    assert sorted(ended) == list("abcdef")
    assert not locks.written


@pytest.mark.parametrize("seed", range(20))
async def test_items_that_were_locked_and_cancellations_at_any_moment(seed: int) -> None:
    chance = random.Random(seed)
    running: set[Key] = set()

    async def run(items: Sequence[Key], *, locks: bool) -> list[str | StorageError]:
        assert not running & set(items), "two batches with the same key run at the same time"
        running.update(items)
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
        running.difference_update(items)
        locked = {each for each in items if locks and chance.random() < 0.5}
        return [LockTimeoutError("locked") if each in locked else each.id for each in items]

    calls: Coalescer[Key, str | StorageError] = Coalescer(
        taking_at_once(lambda items: run(items, locks=True)),
        wait=taking_at_once(lambda items: run(items, locks=False)),
        key=identity,
        lanes=3,
        size=2,
        writes=True,
    )

    async def submit_all() -> None:
        for _ in range(50):
            names = chance.choices("abcdefg", k=chance.choice([1, 1, 3]))
            task = asyncio.create_task(calls.submit(keys(*names), None))
            if chance.random() < 0.3:
                for _ in range(chance.randrange(12)):
                    await asyncio.sleep(0)
                task.cancel()
            [results] = await asyncio.gather(task, return_exceptions=True)
            assert results == names or isinstance(results, asyncio.CancelledError)

    await asyncio.gather(*(submit_all() for _ in range(12)))
    await calls.drain()
    assert await calls.submit(keys(*"abcdefg"), None) == list("abcdefg"), "no key is left busy"
