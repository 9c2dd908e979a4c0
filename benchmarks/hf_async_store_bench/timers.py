"""Timers: how long something takes, systems that take turns, and how long the event loop is held."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

_TICK: Final = 0.001


async def seconds(work: Awaitable[object]) -> float:
    """How long it takes."""
    gc.collect()
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


async def alternate(rounds: int, *sides: Callable[[], Awaitable[float]]) -> list[list[float]]:
    """What each side gives in each round, A B A B: the noise of the machine hits all alike.

    A round before the first is not counted.
    """
    found: list[list[float]] = [[] for _ in sides]
    for number in range(rounds + 1):
        for side, samples in zip(sides, found, strict=True):
            value = await side()
            if number:
                samples.append(value)
    return found


def ratios(of: list[float], to: list[float]) -> list[float]:
    """Round by round."""
    return [one / other for one, other in zip(of, to, strict=True)]


class Hold:
    """The longest time in seconds for which other tasks could not run; right once it was left."""

    longest = 0.0


@asynccontextmanager
async def watched_loop() -> AsyncIterator[Hold]:
    """Watches the running loop by a task that wakes each millisecond; an idle loop shows that."""
    hold = Hold()
    gc.collect()
    ticker = asyncio.get_running_loop().create_task(_tick(hold))
    await asyncio.sleep(2 * _TICK)
    try:
        yield hold
    finally:
        # What held the loop last shows in the tick that comes after it.
        await asyncio.sleep(2 * _TICK)
        ticker.cancel()


async def _tick(hold: Hold) -> None:
    last = time.perf_counter()
    while True:
        await asyncio.sleep(_TICK)
        now = time.perf_counter()
        hold.longest = max(hold.longest, now - last)
        last = now
