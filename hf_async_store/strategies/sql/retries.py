"""The pauses between the attempts of work that failed without any effect."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Final

_FIRST_PAUSE: Final = 0.002
_MAX_PAUSE: Final = 0.1


class Attempts:
    """Counts the attempts of some work, which may be repeated for a number of seconds."""

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._pause = _FIRST_PAUSE

    @property
    def ended(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() > self._deadline

    async def wait(self) -> None:
        """Wait for a random time, each time up to twice as long as before."""
        await asyncio.sleep(random.uniform(0, self._pause))
        self._pause = min(self._pause * 2, _MAX_PAUSE)
