"""Pauses between attempts: exponential backoff with full jitter, until a deadline."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Final

log: Final = logging.getLogger("hf_async_store.retries")


def between(low: float, high: float) -> float:
    """A random number between two others."""
    from random import uniform  # most processes never wait

    return uniform(low, high)


class Backoff:
    """The pauses between the attempts of one operation.

    Each pause is of random length: at first up to `first` seconds, and up to twice as long after each
    attempt, but never longer than `longest`.

    Args:
        seconds: no attempt begins later than this after the first one.
        jitter: returns a random number between two others.
        what: the operation, for the log; without it, the pauses are not logged.
    """

    def __init__(
        self,
        seconds: float,
        *,
        first: float,
        longest: float,
        clock: Callable[[], float] = monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        jitter: Callable[[float, float], float] = between,
        what: str = "",
    ) -> None:
        self._what = what
        self._clock = clock
        self._sleep = sleep
        self._jitter = jitter
        self._deadline = clock() + seconds
        self._next = first
        self._longest = longest

    @property
    def remaining(self) -> float:
        """The seconds until the deadline; negative after it."""
        return self._deadline - self._clock()

    async def pause(self, up_to: float | None = None) -> bool:
        """Wait before the next attempt; return False without waiting if it would be too late.

        Args:
            up_to: the maximum of this pause, if the caller knows a better one; also at most `longest`.
        """
        if up_to is None:
            up_to = self._next
            self._next *= 2
        seconds = self._jitter(0, min(up_to, self._longest))
        if seconds >= self.remaining:
            return False
        if self._what:
            log.debug("%s failed; the next attempt is in %.3f s", self._what, seconds)
        await self._sleep(seconds)
        return True
