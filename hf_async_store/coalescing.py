"""Coalescing: single operations that wait at the same moment share one commit or round trip.

This is where many tasks on one store beat one driver call each. A batch takes whatever waits when
a lane becomes free, so an idle store adds one turn of the loop to an operation, and a busy one
grows its batches by itself: there is no timer and nothing to tune.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Generic, TypeAlias, TypeVar, cast

from hf_async_store.errors import StorageError
from hf_async_store.repository import check_seconds, timed_out
from hf_async_store.values import Key

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Waiter(Generic[Item, Result]):
    """One caller: its items, and their results as batches bring them."""

    __slots__ = ("batches_ended", "done", "items", "left", "results", "taken", "under_way")

    def __init__(self, items: Sequence[Item], done: asyncio.Future[None]) -> None:
        self.items = items
        self.done = done
        self.results: list[Result | StorageError | None] = [None] * len(items)
        self.left = len(items)
        self.taken = False  # a batch took one of them, now or before
        self.under_way = 0  # how many of them batches hold now
        self.batches_ended: asyncio.Future[None] | None = None

    def release(self) -> None:
        """A batch that held one of the items has ended."""
        self.under_way -= 1
        ended = self.batches_ended
        if ended is not None and not self.under_way and not ended.done():
            ended.set_result(None)

    async def wait_for_batches(self) -> None:
        """Wait until no batch holds an item any more, however often the caller is cancelled."""
        while self.under_way:
            self.batches_ended = asyncio.get_running_loop().create_future()
            with suppress(asyncio.CancelledError):
                await self.batches_ended


_Batch: TypeAlias = "list[tuple[_Waiter[Item, Result], int]]"


class Coalescer(Generic[Item, Result]):
    """Shares calls of `run` among the callers of `submit`.

    * Each caller gets the results of its own items, in their order; a failure of a whole batch
      stands as an error of its own at each item that was in it.
    * Items of one key run in the order in which they were submitted, one batch after another.
    * A caller that is cancelled withdraws what no batch has taken yet, at once. Of writes it then
      waits until the batches that hold the others have ended, so that nothing of a task that is
      gone lands later; what bounds that is what bounds `run`.

    Args:
        run: one result per item, in order; may fail as a whole.
        writes: the items may change what is stored.
        lanes: how many batches may be under way at once.
        size: how many items a batch takes at most.
        key: the key of an item, whose order must be kept; None where order does not matter.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Awaitable[Sequence[Result]]],
        *,
        lanes: int,
        size: int,
        writes: bool,
        key: Callable[[Item], Key] | None = None,
    ) -> None:
        self._run = run
        self._writes = writes
        # One lane keeps the order by itself.
        self._key = key if lanes > 1 else None
        self._lanes = lanes
        self._size = size
        self._queue: deque[tuple[_Waiter[Item, Result], int]] = deque()
        self._busy: set[Key] = set()  # keys under way, whose next items must wait
        self._active: set[asyncio.Task[None]] = set()
        self._started = False

    async def submit(
        self, items: Sequence[Item], timeout: float | None
    ) -> list[Result | StorageError]:
        """The results of `items`, in order.

        Raises:
            OperationTimeoutError: `outcome_unknown` if they write, and a batch had taken any.
        """
        if timeout is not None:
            check_seconds(timeout, "timeout")
        if not items:
            return []
        loop = asyncio.get_running_loop()
        waiter: _Waiter[Item, Result] = _Waiter(items, loop.create_future())
        self._queue.extend((waiter, index) for index in range(len(items)))
        self._start_soon()
        timer = None
        if timeout is not None:
            # Not a cancellation, which would wait for the batch: the caller wants an answer now.
            timer = loop.call_later(timeout, self._expire, waiter, timeout)
        try:
            await waiter.done
        except asyncio.CancelledError:
            if self._writes:
                await waiter.wait_for_batches()
            raise
        finally:
            if timer is not None:
                timer.cancel()
        return waiter.results  # type: ignore[return-value]  # every None was replaced by a result

    async def drain(self) -> None:
        """Wait until everything that was submitted is done."""
        while self._queue or self._active:
            if self._active:
                await asyncio.wait(self._active)
            else:
                await asyncio.sleep(0)

    def _expire(self, waiter: _Waiter[Item, Result], timeout: float) -> None:
        """The caller's time is up: what no batch has taken yet is withdrawn."""
        if not waiter.done.done():
            unknown = self._writes and waiter.taken
            waiter.done.set_exception(timed_out(timeout, outcome_unknown=unknown))

    # -- lanes -------------------------------------------------------------------------------

    def _start_soon(self) -> None:
        # Not at once: tasks that run later in this turn of the loop join the batch.
        if not self._started and len(self._active) < self._lanes:
            self._started = True
            asyncio.get_running_loop().call_soon(self._start)

    def _start(self) -> None:
        self._started = False
        while len(self._active) < self._lanes:
            batch = self._take()
            if not batch:
                return
            lane = asyncio.get_running_loop().create_task(self._lane(batch))
            self._active.add(lane)
            lane.add_done_callback(partial(self._release_unsent, batch))

    def _release_unsent(self, batch: _Batch[Item, Result], lane: asyncio.Task[None]) -> None:
        """Release a batch whose lane was cancelled before its first step, as by a loop that ends."""
        if lane not in self._active:
            return  # it ran, and has released its batches itself
        self._active.discard(lane)
        if self._key is not None:
            self._busy.difference_update(self._key(w.items[index]) for w, index in batch)
        _abandon(batch, asyncio.CancelledError())
        if self._queue:
            self._start_soon()

    async def _lane(self, batch: _Batch[Item, Result]) -> None:
        try:
            while batch:
                await self._run_batch(batch)
                # One turn for the callers that were just answered: in a closed loop they submit
                # again, and join the next batch instead of waiting behind a small one.
                await asyncio.sleep(0)
                batch = self._take()
        finally:
            # Here and not in a callback of the task: that runs a turn later, and who submits in
            # between would rely on a lane that has ended.
            self._active.discard(cast("asyncio.Task[None]", asyncio.current_task()))
            if self._queue:
                self._start_soon()

    def _take(self) -> _Batch[Item, Result]:
        """The next batch: in order, without what was cancelled or must wait for another lane."""
        batch: _Batch[Item, Result] = []
        passed: _Batch[Item, Result] = []
        queue = self._queue
        while queue and len(batch) < self._size:
            entry = queue.popleft()
            waiter, index = entry
            if waiter.done.done():
                continue
            if (
                self._busy
                and self._key is not None
                and self._key(waiter.items[index]) in self._busy
            ):
                passed.append(entry)
                continue
            waiter.taken = True
            waiter.under_way += 1
            batch.append(entry)
        queue.extendleft(reversed(passed))
        if self._key is not None:
            self._busy.update(self._key(waiter.items[index]) for waiter, index in batch)
        return batch

    async def _run_batch(self, batch: _Batch[Item, Result]) -> None:
        items = [waiter.items[index] for waiter, index in batch]
        try:
            results = await self._run(items)
        except StorageError as exc:
            _answer(batch, [exc.copy() for _ in batch])
        except BaseException as exc:
            # A defect, or the loop is closing: nobody may wait for ever. Whoever waits for a defect
            # hears of it; the lane goes on for the others.
            told = _abandon(batch, exc)
            if not told or not isinstance(exc, Exception):
                raise
        else:
            _answer(batch, results)
        finally:
            if self._key is not None:
                self._busy.difference_update(map(self._key, items))


def _answer(batch: _Batch[Item, Result], results: Sequence[Result | StorageError]) -> None:
    for (waiter, index), result in zip(batch, results, strict=True):
        waiter.results[index] = result
        waiter.left -= 1
        waiter.release()
        if not waiter.left and not waiter.done.done():
            waiter.done.set_result(None)


def _abandon(batch: _Batch[Item, Result], exc: BaseException) -> bool:
    """End the waiting of all callers of a batch; whether there was one."""
    told = False
    for waiter, _ in batch:
        waiter.release()
        if not waiter.done.done():
            if isinstance(exc, asyncio.CancelledError):
                waiter.done.cancel()
            else:
                waiter.done.set_exception(exc)
            told = True
    return told
