"""The clocks by which the leases of claims end.

A lease ends by the clock of the store itself where it has one (PostgreSQL). For files, it is the clock of
the machine that counts from its start, also while it is suspended, together with the identity of that
start: nothing sets this clock, and all processes of the machine read the same. After a restart of the
machine, no earlier claim is held.
"""

from __future__ import annotations

import sys
import time
from functools import cache
from pathlib import Path
from typing import ClassVar, Final, NamedTuple, Protocol

_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""On macOS, CLOCK_MONOTONIC continues while the machine is suspended."""


class Moment(NamedTuple):
    """A moment by some clock.

    Attributes:
        era: moments can be compared only within an era, such as the time since the machine started.
        seconds: since any fixed moment of the era; None: the store uses its own clock.
    """

    era: str
    seconds: float | None


class ClaimClock(Protocol):
    """The clock by which the leases of a store end. Tests replace it, in `Engine.claim_clock`."""

    def now(self) -> Moment: ...


def boot_seconds() -> float:
    """The seconds since the machine started, including those in which it was suspended."""
    return time.clock_gettime(_CLOCK)


class BootClock:
    """The clock of the machine that counts from its start; the wall clock if that start has no identity.

    Without it, a claim of before a restart would seem to be held for as long as the machine had run.
    """

    def now(self) -> Moment:
        boot = _boot_id()
        return Moment(boot, boot_seconds()) if boot else WallClock().now()


class WallClock:
    """The wall clock, for stores that several machines share and that have no clock of their own.

    It never runs backwards within a process: if the wall clock is set back, it stands still until that has
    reached its time again.
    """

    _latest: ClassVar[float] = 0.0

    def now(self) -> Moment:
        WallClock._latest = max(WallClock._latest, time.time())
        return Moment("", WallClock._latest)


class ServerClock:
    """The clock of the server that holds the store."""

    def now(self) -> Moment:
        return Moment("", None)


@cache
def _boot_id() -> str:
    """The identity of the last start of the machine; "" if it cannot be determined."""
    try:
        if sys.platform == "darwin":
            return _boot_session()
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _boot_session() -> str:
    import ctypes  # a large module, which other systems do not need

    library = ctypes.CDLL(None)
    text = ctypes.create_string_buffer(64)
    size = ctypes.c_size_t(len(text))
    failed = library.sysctlbyname(b"kern.bootsessionuuid", text, ctypes.byref(size), None, 0)
    return "" if failed else text.value.decode()
