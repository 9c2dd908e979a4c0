"""Waiting for changes of the files in a folder: by inotify, or where that is not available by polling."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

_IN_MODIFY: Final = 0x2
_IN_MOVED_TO: Final = 0x80
_EVENTS_BYTES: Final = 1 << 16

_FIRST_POLL: Final = 0.005
_LAST_POLL: Final = 0.05
_POLL_GROWTH: Final = 1.5
_POLL_BESIDE_INOTIFY: Final = 1.0
"""inotify does not report what another machine writes to a shared folder, nor that the folder was
replaced."""


class FolderWatch:
    """Waits for changes in one folder. From the first wait until `close` it has one descriptor."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fd = -1
        self._is_available = sys.platform == "linux"
        self._event: asyncio.Future[None] | None = None

    async def wait(self, is_changed: Callable[[], bool], seconds: float) -> None:
        """Wait until `is_changed` returns True, at most this many seconds.

        It is called at once, and whenever a file in the folder may have changed.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        pause = _FIRST_POLL
        self._open()
        while not is_changed() and (left := deadline - loop.time()) > 0:
            if self._fd >= 0:
                await self._wait_for_event(min(left, _POLL_BESIDE_INOTIFY))
            else:
                await asyncio.sleep(min(left, pause))
                pause = min(pause * _POLL_GROWTH, _LAST_POLL)

    def close(self) -> None:
        """End a wait. `is_changed` is called once more."""
        self._is_available = False
        fd, self._fd = self._fd, -1
        if self._event is not None:
            # Before the descriptor is closed: another file may get its number.
            self._event.get_loop().remove_reader(fd)
            _complete(self._event)
        if fd >= 0:
            os.close(fd)

    def _open(self) -> None:
        if self._is_available and self._fd < 0:
            try:
                self._fd = _inotify(self._folder)
            except (OSError, AttributeError):
                self._is_available = False  # for example, a limit of the system is reached
        self._drain()

    async def _wait_for_event(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        fd = self._fd
        self._event = loop.create_future()
        loop.add_reader(fd, _complete, self._event)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._event
        finally:
            if self._fd == fd:
                loop.remove_reader(fd)
            self._event = None
        self._drain()

    def _drain(self) -> None:
        """Read the events before the files are checked; what they contain does not matter."""
        if self._fd >= 0:
            with suppress(BlockingIOError):
                while len(os.read(self._fd, _EVENTS_BYTES)) > _EVENTS_BYTES // 2:
                    pass


def _complete(event: asyncio.Future[None]) -> None:
    if not event.done():
        event.set_result(None)


def _inotify(folder: Path) -> int:
    """A descriptor that can be read when a file in the folder was written or renamed."""
    import ctypes  # here, because only programs that watch need it

    library = ctypes.CDLL(None, use_errno=True)
    fd = int(library.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
    if (
        fd >= 0
        and library.inotify_add_watch(fd, os.fsencode(folder), _IN_MODIFY | _IN_MOVED_TO) < 0
    ):
        os.close(fd)
        fd = -1
    if fd < 0:
        raise OSError(ctypes.get_errno(), "inotify is not available")
    return fd
