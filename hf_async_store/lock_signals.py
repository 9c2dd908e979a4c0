"""Signals between the processes that wait for a lock, so that they need not poll for it."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final
from weakref import ref

from hf_async_store.event_loop import Continuation

_NAME: Final = "\0hf_async_store:{}:{}:{}"

_PLACES: Final = 64
"""How many processes have a place; others poll."""

_ABSENT: Final = b"\0"
_WAITING: Final = b"\1"
_NEXT: Final = b"\2"


class WaitingLine:
    """The processes that wait for a lock, and how each release wakes the one whose turn it is.

    A process has a place from its first wait on: an abstract socket, whose name contains the number of the
    place, and that byte of a file, which says whether the process waits. Whoever releases the lock reads
    the bytes and sends a datagram to one process: the next in line, else the one that waits in the first
    place after its own, so that all have their turns. A socket ends with its process and leaves no file.

    All this is only a hint to try again at once. It does not matter who sends one, whether a byte is out of
    date, or that only Linux has such sockets, and only in one network namespace: a process that gets none
    polls.

    Args:
        file: returns the descriptor of the file; None if it is not open.
    """

    def __init__(self, file: Callable[[], int | None]) -> None:
        self._file = file
        self._socket: socket.socket | None = None
        self._name = ""
        self._place: int | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # that receives the signals
        self._process = 0  # whose loop it is
        self._has_joined = False
        self._waiting: _Signal | None = None
        self._is_signalled = False

    # -- in the process that waits -----------------------------------------------------------

    def join(self, *, is_next: bool) -> bool:
        """Wait from now on for signals; False if there can be none.

        Args:
            is_next: this process is next in line.
        """
        file = self._file()
        try:
            if file is None or (self._place is None and not self._take_place(file)):
                return False
            assert self._place is not None
            self._receive_in(asyncio.get_running_loop())
            os.pwrite(file, _NEXT if is_next else _WAITING, self._place)
        except OSError:
            return False
        self._has_joined = True
        return True

    def leave(self) -> None:
        """Wait no longer."""
        if not self._has_joined:
            return
        self._has_joined = self._is_signalled = False
        file = self._file()
        if file is not None and self._place is not None:
            with suppress(OSError):
                os.pwrite(file, _ABSENT, self._place)

    async def wait(self, seconds: float) -> None:
        """Wait for a signal since the last wait, at most so many seconds. The process has joined."""
        if not self._is_signalled:
            loop = asyncio.get_running_loop()
            self._waiting = waiting = _Signal(loop)
            timer = loop.call_later(seconds, waiting.end)
            try:
                await waiting
            finally:
                timer.cancel()
                self._waiting = None
        self._is_signalled = False

    def close(self) -> None:
        """Give up the place."""
        self.leave()
        self._receive_in(None)
        if self._socket is not None:
            self._socket.close()
        self._socket = self._place = None

    def __del__(self) -> None:
        # The loop would go on with the number of the socket, which may become that of another.
        self._has_joined = False  # the file may be another by now
        self.close()

    def _receive_in(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """Receive signals in this event loop from now on, and in no other. Not only while the process
        waits: beginning and ending it would take two system calls for each wait."""
        if self._socket is None or loop is self._loop:
            return
        # By number: the loop would format the socket, with its addresses, for an error.
        number, earlier = self._socket.fileno(), self._loop
        self._loop = None
        # A forked child must leave the loop of its parent alone: both have one selector.
        if earlier is not None and not earlier.is_closed() and self._process == os.getpid():
            earlier.remove_reader(number)
        if loop is not None:
            loop.add_reader(number, _receive, ref(self))
            self._loop, self._process = loop, os.getpid()

    def _take_place(self, file: int) -> bool:
        taken = self._opened(file)
        for place in range(_PLACES):
            with suppress(OSError):  # another process has this place
                taken.bind(self._address(place))
                self._place = place
                return True
        return False

    def receive(self) -> None:
        """Called by the event loop for each signal."""
        with suppress(OSError):
            if self._socket is not None:
                self._socket.recv(1)
        # A signal for an earlier wait has no effect.
        self._is_signalled = self._has_joined
        if self._waiting is not None:
            self._waiting.end()

    # -- in the process that releases the lock -----------------------------------------------

    def is_waiting(self) -> bool:
        """Whether another process waits."""
        file = self._file()
        try:
            return file is not None and self._next_place(file) is not None
        except OSError:
            return False

    def wake(self) -> None:
        """Signal to the process whose turn it is. Never waits or raises."""
        try:
            file = self._file()
            while file is not None and (place := self._next_place(file)) is not None:
                try:
                    self._opened(file).sendto(b"\0", self._address(place))
                except (ConnectionRefusedError, BlockingIOError):
                    # Its process has ended, or is suspended and has some signals already.
                    os.pwrite(file, _ABSENT, place)
                else:
                    return
        except OSError:
            pass  # without a signal, processes poll

    def _next_place(self, file: int) -> int | None:
        """The place of the process whose turn it is, among the others; None if none of them waits."""
        places = os.pread(file, _PLACES, 0)
        if not places.strip(_ABSENT):
            return None
        places = places.ljust(_PLACES, _ABSENT)
        own = -1 if self._place is None else self._place
        others = places[own + 1 :] + places[: max(own, 0)]  # those after the own one come first
        found = others.find(_NEXT)
        if found < 0:
            found = others.find(_WAITING)
        return None if found < 0 else (own + 1 + found) % _PLACES

    # -- both --------------------------------------------------------------------------------

    def _opened(self, file: int) -> socket.socket:
        if self._socket is None:
            status = os.fstat(file)
            self._name = _NAME.format(status.st_dev, status.st_ino, "{}")
            self._socket = _socket()
        return self._socket

    def _address(self, place: int) -> str:
        return self._name.format(place)


def _socket() -> socket.socket:
    created = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    created.setblocking(False)
    return created


class _Signal(Continuation):
    """A signal, or the end of the time for it."""

    __slots__ = ()

    def cancel(self, msg: object = None) -> bool:
        self._loop.call_soon(self.end)
        return False  # the task is cancelled when it continues


def _receive(line: ref[WaitingLine]) -> None:
    # The loop must not keep alive a store that was not closed.
    if (found := line()) is not None:
        found.receive()
