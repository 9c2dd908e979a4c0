"""Load: tasks that go as fast as they are answered, or operations at the times set for them.

In the open loop, a latency counts from when the operation was due: a stall cannot hide what waited.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import perf_counter, perf_counter_ns
from typing import Final, TypeAlias

from hf_async_store import ConcurrencyConflictError
from hf_async_store_bench.concurrency import side_by_side
from hf_async_store_bench.messages import RoundStats, WrongAnswerError

_MILLISECOND: Final = 1_000_000
_MAX_SHOWN: Final = 10
_PATIENCE: Final = 3.0  # an open round is ended when it takes so many times its length


# One operation in a slot, where no other runs at the time; gives how many entities it was about.
Work: TypeAlias = Callable[[int], Awaitable[int]]


async def closed_loop(work: Work, slots: int, seconds: float) -> RoundStats:
    """Each slot begins its next operation when the last one was answered."""
    stats = RoundStats()
    started = perf_counter()
    until = started + seconds

    async def run(slot: int) -> None:
        # At least once, however long the others held the loop.
        while True:
            await _attempt(work, slot, stats, perf_counter_ns())
            if perf_counter() >= until:
                return

    await side_by_side(run, range(slots))
    stats.seconds = perf_counter() - started
    return stats


async def open_loop(work: Work, slots: int, seconds: float, rate: float) -> RoundStats:
    """`rate` operations a second, evenly; each waits for a free slot if the store falls behind."""
    stats = RoundStats()
    due: asyncio.Queue[int | None] = asyncio.Queue()
    started = perf_counter_ns()
    ended = started + int(seconds * _PATIENCE * 1e9)

    async def run(slot: int) -> None:
        while (intended := await due.get()) is not None:
            if perf_counter_ns() < ended:
                await _attempt(work, slot, stats, intended)
            else:
                stats.unserved += 1
                stats.latencies.record(perf_counter_ns() - intended)

    async def dispatch() -> None:
        # A loop's timer counts whole milliseconds, so whatever falls between two of them is due at the
        # second: else the timer's own part would be told as the store's.
        tick = 0
        for number in range(max(1, int(seconds * rate))):
            moment, now = started + int(number / rate * 1e9), perf_counter_ns()
            if now < moment:
                steps = -((now - moment) // _MILLISECOND)  # rounded up
                tick = now + steps * _MILLISECOND
                await asyncio.sleep(steps / 1000)
            due.put_nowait(max(moment, tick))
        for _ in range(slots):
            due.put_nowait(None)

    async with asyncio.TaskGroup() as group:
        group.create_task(dispatch())
        group.create_task(side_by_side(run, range(slots)))
    stats.seconds = (perf_counter_ns() - started) / 1e9
    return stats


async def _attempt(work: Work, slot: int, stats: RoundStats, intended: int) -> None:
    try:
        units = await work(slot)
    except ConcurrencyConflictError:
        stats.conflicts += 1
    except Exception as exc:  # noqa: BLE001  # whatever a driver or a competitor raises is a figure here
        name = type(exc).__name__
        if isinstance(exc, WrongAnswerError) and len(stats.wrong) < _MAX_SHOWN:
            stats.wrong.append(str(exc))
        stats.errors[name] = stats.errors.get(name, 0) + 1
    else:
        stats.operations += 1
        stats.units += units
        stats.latencies.record(perf_counter_ns() - intended)
