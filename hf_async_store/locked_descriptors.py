"""Descriptors of files that are locked: a forked child must not keep them open.

A lock of `flock` belongs to the open file, which a child shares: it would stay locked after the process
that locked it was killed, for as long as the child runs; and a child that unlocks it unlocks it for its
parent. The same holds for a pipe that an event loop watches: a child that frees the store would take it out
of the selector of its parent.
"""

from __future__ import annotations

import os
from typing import Final

_OPEN: Final[set[int]] = set()


def register_locked(fd: int) -> int:
    """Let forked children not have this descriptor; returns it. Only `close_locked` may close it."""
    _OPEN.add(fd)
    return fd


def close_locked(fd: int) -> None:
    _OPEN.discard(fd)
    os.close(fd)


def _replace() -> None:
    """In a child, replace the files by the null device: the objects of the parent still have the numbers,
    which must not become those of other files."""
    if _OPEN:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for fd in _OPEN:
            os.dup2(null, fd, inheritable=False)
        os.close(null)
        _OPEN.clear()


os.register_at_fork(after_in_child=_replace)
