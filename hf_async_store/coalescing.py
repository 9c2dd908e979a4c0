"""Coalescing: single operations that wait at the same time share one commit or round trip.

For many concurrent tasks this is faster than one driver call per operation. A lane runs one batch at
a time; when it becomes free, the operations that are waiting form its next batch. So an idle store
delays an operation by one iteration of the event loop, and a busy store forms larger batches without
a timer or anything to tune. A caller who seems to be the only one needs no lane, if the engine allows it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from time import perf_counter
from typing import Final, Generic, Protocol, TypeAlias, TypeVar

from msgspec import Struct

from hf_async_store.arguments import check_seconds
from hf_async_store.errors import LockTimeoutError, StorageError
from hf_async_store.repository import timed_out
from hf_async_store.values import Key

Item = TypeVar("Item")
Result = TypeVar("Result")
Observed = TypeVar("Observed", contravariant=True)

Take: TypeAlias = Callable[[], list[Item]]
"""Begins a batch: returns those of its items whose callers still wait for them; always the same ones.

Until then, a caller that is cancelled or whose timeout expires withdraws its items; after that, they may
be applied. It may be called in another thread.
"""

Run: TypeAlias = Callable[[Take[Item]], Awaitable[Sequence[Result]]]
"""Runs a batch: calls `Take`, and returns one result for each item, in order. May fail as a whole."""

RunCancellable: TypeAlias = Callable[[list[Item]], Awaitable[Sequence[Result]] | None]
"""As `Run`, in the task of the only caller, which may be cancelled; None if that is not possible."""

_NO_RESULT: Final = StorageError("there is no result yet")

log: Final = logging.getLogger("hf_async_store.slow")

_SLOW_SECONDS: Final = 0.1
"""A batch that takes at least this time is logged."""

_MAX_WAITING: Final = 4
"""How many calls of `wait` may run at once."""

_BATCHES_OF_A_LANE: Final = 64
"""How many batches of an only caller a lane runs before `run_cancellable`, which was not possible, is asked
again: with a lane for each of them, each would take two more iterations of the event loop."""


class _Waiter(Struct, Generic[Item, Result], eq=False):
    """One call of `submit`: its items, and the results of the batches that contained them."""

    items: Sequence[Item]
    done: asyncio.Future[None]
    results: list[Result | StorageError]
    remaining: int  # the number of items without a result
    begun: int = 0  # the number of items that may have been applied: those in batches that began
    in_progress: int = 0  # the number of items in batches that began and run
    batches_ended: asyncio.Future[None] | None = None
    caller: object | None = None  # for the observer of batches

    def release(self, count: int) -> None:
        """Record that the batch of so many items has ended."""
        self.in_progress -= count
        ended = self.batches_ended
        if ended is not None and not self.in_progress and not ended.done():
            ended.set_result(None)

    async def wait_for_batches(self) -> None:
        """Wait until no running batch contains an item, even if the caller is cancelled again."""
        while self.in_progress:
            self.batches_ended = asyncio.get_running_loop().create_future()
            with suppress(asyncio.CancelledError):
                await self.batches_ended


class BatchObserver(Protocol[Observed, Result]):
    """Observes the batches of a coalescer."""

    @property
    def caller(self) -> Callable[[], object | None]:
        """Identifies the caller of `submit`; None if it need not be told to `run`."""

    async def run(
        self,
        items: Sequence[Observed],
        callers: Sequence[object],
        work: Callable[[], Awaitable[Sequence[Result]]],
    ) -> Sequence[Result]:
        """Return what `work()` does, the results of a batch; `callers` has each of its callers once."""
        ...


_Batch: TypeAlias = "list[tuple[_Waiter[Item, Result], int, int]]"
"""Calls, each with a range of its items: one entry even for 100,000 of them."""


def taking_at_once(
    run: Callable[[list[Item]], Awaitable[Sequence[Result]]],
) -> Run[Item, Result]:
    """The `Run` of a function that waits for nothing before it applies the items."""

    async def taken(take: Take[Item]) -> Sequence[Result]:
        items = take()
        return await run(items) if items else ()

    return taken


class Coalescer(Generic[Item, Result]):
    """Combines the items of concurrent `submit` calls into batches, each passed to one `run` call.

    * Each caller gets the results of its own items, in their order. If a whole batch fails, each of
      its items gets a separate copy of the error as its result.
    * Items with the same key run in the order in which they were submitted, never in two batches at
      the same time.
    * An item that `run` ends by a `LockTimeoutError` runs again by `wait`, outside the lanes, so that
      neither its batch nor later ones wait for the lock.
    * If a caller is cancelled, its items are withdrawn at once whose batch has not begun. If the
      items are writes, the caller then waits until the batches that contain its other items have
      ended, so that nothing is written after the task has ended. The duration of this wait is
      limited only by that of `run`.

    Args:
        run: runs a batch.
        writes: the items may change stored data.
        lanes: the maximum number of batches that run at once.
        size: the maximum number of items in a batch.
        key: returns the key of an item; items with the same key are kept in order. None: the order
            does not matter.
        wait: as `run`, for items that were blocked, for whose locks it waits. Requires `key`.
        run_cancellable: as `run`, in the task of the only caller, which may be cancelled; returns None if
            that is not possible. No item of it is ever blocked.

    Attributes:
        let_callers_run: what a lane awaits between two batches; by default, one iteration of the event
            loop.
        observer: of the batches.
    """

    def __init__(
        self,
        run: Run[Item, Result],
        *,
        lanes: int,
        size: int,
        writes: bool,
        key: Callable[[Item], Key] | None = None,
        wait: Run[Item, Result] | None = None,
        run_cancellable: RunCancellable[Item, Result] | None = None,
    ) -> None:
        self._run = run
        self._wait = wait
        self._run_cancellable = run_cancellable
        self._writes = writes
        self._key = key
        self._lanes = lanes
        self._size = size
        self._queue: deque[tuple[_Waiter[Item, Result], int, int]] = deque()
        # The keys of running batches, without those of a single lane, which keeps the order itself.
        # Further items with them must wait.
        self._busy: set[Key] = set()
        self._running: set[asyncio.Task[None]] = set()  # the tasks of the lanes
        self._blocked: _Batch[Item, Result] = []  # to be run by `wait`
        self._waiting: set[asyncio.Task[None]] = set()  # the tasks that call `wait`
        self._start_scheduled = False
        # Held while a batch begins, perhaps in another thread, and while a caller withdraws its items.
        self._beginning = threading.Lock()
        self._had_one_caller = False  # the last batch: probably the next one has one, too
        self._batches_of_lane = 0  # how many more batches of an only caller a lane runs
        self._without_lane: asyncio.Future[None] | None = None  # the end of a batch without a lane
        self.let_callers_run: Callable[[], Awaitable[None]] = partial(asyncio.sleep, 0)
        self.observer: BatchObserver[Item, Result] | None = None

    @property
    def waiting(self) -> int:
        """How many calls of `submit` wait for a batch, for all or the rest of their items."""
        return len(self._queue)

    def use(
        self,
        run: Run[Item, Result],
        wait: Run[Item, Result] | None = None,
        run_cancellable: RunCancellable[Item, Result] | None = None,
    ) -> None:
        """Replace the functions that run batches, while there are none."""
        self._run = run
        self._wait = wait
        self._run_cancellable = run_cancellable

    async def submit(
        self, items: Sequence[Item], timeout: float | None
    ) -> list[Result | StorageError]:
        """The results of `items`, in order.

        Raises:
            OperationTimeoutError: with `outcome_unknown` if the items are writes, and one of them
                may have been applied. The others are never applied.
        """
        if timeout is not None:
            check_seconds(timeout, "timeout")
        if not items:
            return []
        work = None if timeout is not None or self._running else self._work_without_lane(items)
        if work is not None:
            return await self._complete_without_lane(work, len(items))
        loop = asyncio.get_running_loop()
        count = len(items)
        waiter: _Waiter[Item, Result] = _Waiter(
            items, loop.create_future(), [_NO_RESULT] * count, count
        )
        if self.observer is not None:
            waiter.caller = self.observer.caller()
        self._queue.append((waiter, 0, count))
        self._schedule_start()
        timer = None
        if timeout is not None:
            # Not a cancellation, which would wait for the batch: the caller must return in time.
            timer = loop.call_later(timeout, self._expire, waiter, timeout)
        try:
            await waiter.done
        except asyncio.CancelledError:
            self._withdraw_blocked(waiter)
            with self._beginning:  # no batch that begins later contains its items
                in_progress = self._writes and waiter.in_progress > 0
            if in_progress:
                await waiter.wait_for_batches()
            raise
        finally:
            if timer is not None:
                timer.cancel()
        return waiter.results

    async def drain(self) -> None:
        """Wait until everything that was submitted is done."""
        while self._queue or self._running or self._waiting or self._without_lane is not None:
            if self._running or self._waiting:
                await asyncio.wait(self._running | self._waiting)
            elif self._without_lane is None:
                await asyncio.sleep(0)  # a lane is about to start
            else:
                await asyncio.wait([self._without_lane])

    def _expire(self, waiter: _Waiter[Item, Result], timeout: float) -> None:
        """Fail the call with a timeout; its items whose batch has not begun are withdrawn."""
        with self._beginning:
            if not waiter.done.done():
                unknown = self._writes and waiter.begun > 0
                waiter.done.set_exception(timed_out(timeout, outcome_unknown=unknown))

    # -- without a lane ----------------------------------------------------------------------

    def _work_without_lane(self, items: Sequence[Item]) -> Awaitable[Sequence[Result]] | None:
        """What the caller of `submit` may await if no lane runs; None if others wait, or may join him."""
        if (
            self._run_cancellable is None
            or self._start_scheduled
            or not self._is_no_lane_needed()
            or self._without_lane is not None
            or self._busy  # of items that are blocked: others with their keys must wait
            or len(items) > self._size
        ):
            return None
        work = self._run_cancellable(list(items))
        self._batches_of_lane = _BATCHES_OF_A_LANE if work is None else 0
        return work

    def _is_no_lane_needed(self) -> bool:
        is_possible = self._run_cancellable is not None and self.observer is None
        return is_possible and self._had_one_caller and not self._queue

    async def _complete_without_lane(
        self, work: Awaitable[Sequence[Result]], count: int
    ) -> list[Result | StorageError]:
        started = perf_counter()
        self._without_lane = ended = asyncio.get_running_loop().create_future()
        try:
            return [*await work]
        except StorageError as exc:
            await asyncio.sleep(0)  # the caller may try again at once
            return [exc.copy() for _ in range(count)]
        finally:
            if (seconds := perf_counter() - started) >= _SLOW_SECONDS:
                self._log_slow(seconds, count)
            self._without_lane = None
            ended.set_result(None)
            if self._queue:
                self._schedule_start()

    # -- lanes -------------------------------------------------------------------------------

    def _schedule_start(self) -> None:
        # Not at once, so that tasks that run later in this iteration of the loop join the batch.
        is_free = len(self._running) < self._lanes and self._without_lane is None
        if is_free and not self._start_scheduled:
            self._start_scheduled = True
            asyncio.get_running_loop().call_soon(self._start_lanes)

    def _start_lanes(self) -> None:
        self._start_scheduled = False
        while len(self._running) < self._lanes:
            batch = self._next_batch()
            if not batch:
                return
            lane = asyncio.get_running_loop().create_task(self._run_lane(batch))
            self._running.add(lane)
            lane.add_done_callback(partial(self._fail_unstarted, batch))

    def _fail_unstarted(self, batch: _Batch[Item, Result], lane: asyncio.Task[None]) -> None:
        """Fail a batch whose lane was cancelled before it began, for example by a closing event loop."""
        if lane not in self._running:
            return  # the lane ran, and has ended its batches itself
        self._running.discard(lane)
        self._busy.difference_update(self._keys(batch))
        self._fail(self._begin(batch), asyncio.CancelledError())
        if self._queue:
            self._schedule_start()

    async def _run_lane(self, batch: _Batch[Item, Result]) -> None:
        lane = asyncio.current_task()
        assert lane is not None
        try:
            while batch:
                await self._run_batch(batch, self._run)
                if self._is_no_lane_needed():
                    if not self._batches_of_lane:
                        return
                    self._batches_of_lane -= 1
                # The callers that just got their results run: if they submit again at once, their items
                # join the next batch instead of waiting behind a small one.
                await self.let_callers_run()
                batch = self._next_batch()
        finally:
            # Not in a done callback, which runs one iteration of the event loop later: an item that
            # is submitted in between would wait for a lane that has ended.
            self._running.discard(lane)
            if self._queue:
                self._schedule_start()

    def _next_batch(self) -> _Batch[Item, Result]:
        """Remove the next batch from the queue, in order.

        Items whose call has ended are dropped; items whose key is in a running batch stay queued.
        """
        batch: _Batch[Item, Result] = []
        skipped: _Batch[Item, Result] = []
        queue, free = self._queue, self._size
        while queue and free:
            waiter, index, stop = queue.popleft()
            if waiter.done.done():
                continue
            # Without busy keys, as many as fit in one step; else one by one.
            end = index + 1 if self._busy else min(stop, index + free)
            if end < stop:
                queue.appendleft((waiter, end, stop))
            if (
                self._busy
                and self._key is not None
                and self._key(waiter.items[index]) in self._busy
            ):
                skipped.append((waiter, index, end))
                continue
            free -= end - index
            batch.append((waiter, index, end))
        if batch:
            self._had_one_caller = len(batch) == 1
        queue.extendleft(reversed(skipped))
        if self._lanes > 1:
            self._busy.update(self._keys(batch))
        return batch

    def _keys(self, batch: _Batch[Item, Result]) -> list[Key]:
        return [] if self._key is None else list(map(self._key, _items(batch)))

    def _begin(self, batch: _Batch[Item, Result]) -> _Batch[Item, Result]:
        """Begin a batch: returns it without the items that were withdrawn."""
        begun: _Batch[Item, Result] = []
        with self._beginning:
            for entry in batch:
                waiter, index, end = entry
                if not waiter.done.done():
                    waiter.begun += end - index
                    waiter.in_progress += end - index
                    begun.append(entry)
        return begun

    async def _run_batch(self, batch: _Batch[Item, Result], run: Run[Item, Result]) -> None:
        begun: _Batch[Item, Result] | None = None

        def begin() -> _Batch[Item, Result]:
            nonlocal begun
            if begun is None:
                begun = self._begin(batch)
            return begun

        blocked: _Batch[Item, Result] = []
        try:
            results: Sequence[Result | StorageError] = await self._results(
                batch, run, lambda: _items(begin())
            )
        except StorageError as exc:
            failed = begin()
            self._deliver(failed, [exc.copy() for _ in _items(failed)])
        except BaseException as exc:
            # A defect, or the event loop is closing: no caller may wait forever. If a caller receives
            # the exception of a defect, the lane continues with the next batch.
            delivered = self._fail(begin(), exc)
            if not delivered or not isinstance(exc, Exception):
                raise
        else:
            done = begin()
            if self._wait is not None and run is not self._wait:
                done, results, blocked = _without_blocked(done, results)
            self._deliver(done, results)
        finally:
            if self._busy:
                self._busy.difference_update(self._keys(batch))
        if blocked:
            blocked = self._not_begun(blocked)
            self._busy.update(self._keys(blocked))
            self._blocked += blocked
            self._start_waiting()

    def _not_begun(self, blocked: _Batch[Item, Result]) -> _Batch[Item, Result]:
        """The items of a batch that had no effect, without those that were withdrawn meanwhile."""
        with self._beginning:
            for waiter, index, end in blocked:
                waiter.begun -= end - index
                waiter.release(end - index)
        return [entry for entry in blocked if not entry[0].done.done()]

    def _deliver(
        self, batch: _Batch[Item, Result], results: Sequence[Result | StorageError]
    ) -> None:
        """Give the callers the results of their items, which are in the order of the batch."""
        assert len(results) == sum([end - index for _, index, end in batch]), "one result per item"
        place = 0
        with self._beginning:
            for waiter, index, end in batch:
                count = end - index
                waiter.results[index:end] = results[place : place + count]
                place += count
                waiter.remaining -= count
                waiter.release(count)
                if not waiter.remaining and not waiter.done.done():
                    waiter.done.set_result(None)

    def _fail(self, batch: _Batch[Item, Result], exc: BaseException) -> bool:
        """End all calls with items in a batch by an exception; returns whether any was waiting."""
        delivered = False
        with self._beginning:
            for waiter, index, end in batch:
                waiter.release(end - index)
                if not waiter.done.done():
                    if isinstance(exc, asyncio.CancelledError):
                        waiter.done.cancel()
                    else:
                        waiter.done.set_exception(exc)
                    delivered = True
        return delivered

    async def _results(
        self,
        batch: _Batch[Item, Result],
        run: Run[Item, Result],
        take: Take[Item],
    ) -> Sequence[Result]:
        """What `run(take)` returns, observed, and logged if it is slow."""
        started = perf_counter()
        try:
            if self.observer is None:
                return await run(take)
            callers = [each.caller for each, _, _ in batch if each.caller is not None]
            distinct = list(dict.fromkeys(callers))
            return await self.observer.run(_items(batch), distinct, partial(run, take))
        finally:
            if (seconds := perf_counter() - started) >= _SLOW_SECONDS:
                self._log_slow(seconds, len(_items(batch)))

    def _log_slow(self, seconds: float, count: int) -> None:
        what = "commit" if self._writes else "read"
        log.debug("a shared %s of %d took %.3f s", what, count, seconds)

    # -- items that wait for a lock ----------------------------------------------------------

    def _start_waiting(self) -> None:
        while self._blocked and (free := _MAX_WAITING - len(self._waiting)) > 0:
            batch = self._next_blocked(free)
            task = asyncio.get_running_loop().create_task(self._run_waiting(batch))
            self._waiting.add(task)
            task.add_done_callback(partial(self._end_waiting, batch))

    def _next_blocked(self, tasks: int) -> _Batch[Item, Result]:
        """Remove the blocked items of some keys, in order: those of the next one of some tasks, which
        share all keys evenly."""
        keys = self._keys(self._blocked)
        distinct = list(dict.fromkeys(keys))
        wanted = set(distinct[: math.ceil(len(distinct) / tasks)])
        pairs = list(zip(keys, self._blocked, strict=True))
        self._blocked = [entry for key, entry in pairs if key not in wanted]
        return [entry for key, entry in pairs if key in wanted]

    def _withdraw_blocked(self, waiter: _Waiter[Item, Result]) -> None:
        """Remove the items of a call that a call of `wait` has not taken yet."""
        withdrawn = [entry for entry in self._blocked if entry[0] is waiter]
        if not withdrawn:
            return
        self._blocked = [entry for entry in self._blocked if entry[0] is not waiter]
        self._busy.difference_update(self._keys(withdrawn))
        self._busy.update(self._keys(self._blocked))
        if self._queue:
            self._schedule_start()

    async def _run_waiting(self, batch: _Batch[Item, Result]) -> None:
        task = asyncio.current_task()
        assert task is not None
        assert self._wait is not None
        try:
            await self._run_batch(batch, self._wait)
        finally:
            # Not in the done callback: in the meantime, another batch may begin with the same key.
            self._busy.difference_update(self._keys(batch))
            self._waiting.discard(task)

    def _end_waiting(self, batch: _Batch[Item, Result], task: asyncio.Task[None]) -> None:
        if task in self._waiting:  # it was cancelled before it began
            self._waiting.discard(task)
            self._busy.difference_update(self._keys(batch))
            self._fail(self._begin(batch), asyncio.CancelledError())
        self._start_waiting()
        if self._queue:
            self._schedule_start()


def _items(batch: _Batch[Item, Result]) -> list[Item]:
    items: list[Item] = []
    for waiter, index, end in batch:
        items += waiter.items[index:end]
    return items


def _without_blocked(
    batch: _Batch[Item, Result], results: Sequence[Result | StorageError]
) -> tuple[_Batch[Item, Result], Sequence[Result | StorageError], _Batch[Item, Result]]:
    """A batch and its results without the items that were blocked, and those."""
    kinds = set(map(type, results))  # mostly few, so not `isinstance` for each result
    if not any(issubclass(each, LockTimeoutError) for each in kinds):
        return batch, results, []
    singles = [(waiter, each, each + 1) for waiter, *of in batch for each in range(*of)]
    pairs = list(zip(singles, results, strict=True))
    done = [each for each in pairs if not isinstance(each[1], LockTimeoutError)]
    blocked = [entry for entry, each in pairs if isinstance(each, LockTimeoutError)]
    return [entry for entry, _ in done], [each for _, each in done], blocked
