"""Load: so many tasks as fast as they are answered, or operations at the times that were set for them.

In the open loop, a latency counts from the moment at which the operation was due, not from the one
at which somebody got round to it. So a store that stalls cannot hide what it kept waiting.
"""

from __future__ import annotations

import asyncio
from collections import deque
from time import perf_counter, perf_counter_ns
from typing import TYPE_CHECKING, Final, Protocol

from hf_async_store.bench.plan import Tally, WrongAnswerError
from hf_async_store.errors import ConcurrencyConflictError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

_MILLISECOND: Final = 1_000_000
_SHOWN: Final = 10
_PATIENCE: Final = 3.0
"""An open round is broken off when it takes so many times its length."""


class Work(Protocol):
    """One operation, again and again."""

    retries: int

    async def one(self, lane: int) -> int:
        """Do it once, in this lane: no two run in one lane at a time. Returns the entities."""
        ...


async def closed_loop(work: Work, lanes: int, seconds: float) -> Tally:
    """Each lane begins its next operation when the last one was answered."""
    tally = Tally()
    started = perf_counter()
    until = started + seconds

    async def run(lane: int) -> None:
        # At least once, however long the others held the loop.
        while True:
            await _attempt(work, lane, tally, perf_counter_ns())
            if perf_counter() >= until:
                return

    await _side_by_side(run, lanes)
    tally.seconds = perf_counter() - started
    return tally


async def open_loop(work: Work, lanes: int, seconds: float, rate: float) -> Tally:
    """`rate` operations a second, evenly; each waits for a free lane if the store falls behind."""
    tally = Tally()
    arrivals = _Arrivals()
    started = perf_counter_ns()
    broken_off = started + int(seconds * _PATIENCE * 1e9)

    async def run(lane: int) -> None:
        while (intended := await arrivals.next()) is not None:
            if perf_counter_ns() < broken_off:
                await _attempt(work, lane, tally, intended)
            else:
                tally.unserved += 1
                tally.latencies.record(perf_counter_ns() - intended)

    async def dispatch() -> None:
        clock = _Clock()
        for number in range(max(1, int(seconds * rate))):
            arrivals.add(await clock.until(started + int(number / rate * 1e9)))
        arrivals.end()

    async with asyncio.TaskGroup() as group:
        group.create_task(dispatch())
        group.create_task(_side_by_side(run, lanes))
    tally.seconds = (perf_counter_ns() - started) / 1e9
    return tally


class _Arrivals:
    """What is due and has not begun. Lighter than a queue: this is paid for every operation."""

    def __init__(self) -> None:
        self._due: deque[int] = deque()
        self._idle: deque[asyncio.Future[int | None]] = deque()
        self._ended = False

    def add(self, intended: int) -> None:
        if self._idle:
            self._idle.popleft().set_result(intended)
        else:
            self._due.append(intended)

    def end(self) -> None:
        self._ended = True
        for each in self._idle:
            each.set_result(None)

    async def next(self) -> int | None:
        if self._due:
            return self._due.popleft()
        if self._ended:
            return None
        waiting: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._idle.append(waiting)
        return await waiting


class _Clock:
    """Tells when operations are due.

    A loop's timer counts whole milliseconds, so whatever falls between two of them is due at the
    second: else the timer's own part would be told as the store's latency. What comes later than
    that is the store's. (Waiting busily would be exact, and starve the threads of the store.)
    """

    def __init__(self) -> None:
        self._tick = 0

    async def until(self, moment: int) -> int:
        """Wait for a moment; returns when the operation was due."""
        now = perf_counter_ns()
        if now < moment:
            steps = -((now - moment) // _MILLISECOND)  # rounded up
            self._tick = now + steps * _MILLISECOND
            await asyncio.sleep(steps * _MILLISECOND / 1e9)
        return max(moment, self._tick)


async def _attempt(work: Work, lane: int, tally: Tally, intended: int) -> None:
    try:
        units = await work.one(lane)
    except ConcurrencyConflictError:
        tally.conflicts += 1
    except Exception as exc:  # noqa: BLE001  # whatever a driver or a peer raises is a figure here
        name = type(exc).__name__
        if isinstance(exc, WrongAnswerError) and len(tally.wrong) < _SHOWN:
            tally.wrong.append(str(exc))
        tally.errors[name] = tally.errors.get(name, 0) + 1
    else:
        tally.operations += 1
        tally.units += units
        tally.latencies.record(perf_counter_ns() - intended)


async def _side_by_side(run: Callable[[int], Coroutine[None, None, None]], lanes: int) -> None:
    async with asyncio.TaskGroup() as group:
        for lane in range(lanes):
            group.create_task(run(lane))
