"""Signals between processes that a lock file was released, so that the next one need not poll for it."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from typing import Final

_NAME: Final = "\0hf_async_store:{}:{}"


class ReleaseSignal:
    """Signals to the process that is next in line for a lock file that it was released.

    A signal is a datagram to an abstract socket, which is named after the file: it leaves no file behind,
    and ends with its process. It is only a hint to try again at once; a process that gets none polls. So it
    does not matter who sends one, or that only Linux has such sockets, and only in one network namespace.

    Args:
        path: the lock file.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._sender: socket.socket | None = None

    def send(self) -> None:
        """Never waits or raises."""
        with suppress(OSError):
            if self._sender is None:
                self._sender = _socket()
            self._sender.sendto(b"\0", _name_for(self._path))

    def listener(self) -> Listener | None:
        """A listener; None where there can be none. The caller closes it."""
        try:
            receiver = _socket()
            try:
                receiver.bind(_name_for(self._path))
            except OSError:
                receiver.close()
                return None
        except OSError:
            return None
        return Listener(receiver)

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()
            self._sender = None


class Listener:
    """Receives the signals for one lock file."""

    def __init__(self, receiver: socket.socket) -> None:
        self._receiver = receiver
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.Future[None] | None = None
        self._signalled = False
        self._loop.add_reader(receiver, self._receive)

    async def wait(self, seconds: float) -> None:
        """Wait for a signal since the last wait, at most so many seconds."""
        if not self._signalled:
            self._waiting = self._loop.create_future()
            timer = self._loop.call_later(seconds, self._end)
            try:
                await self._waiting
            finally:
                timer.cancel()
                self._waiting = None
        self._signalled = False

    def close(self) -> None:
        self._loop.remove_reader(self._receiver)
        self._receiver.close()

    def _receive(self) -> None:
        with suppress(OSError):
            self._receiver.recv(1)
        self._signalled = True
        self._end()

    def _end(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


def _socket() -> socket.socket:
    created = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    created.setblocking(False)
    return created


def _name_for(path: str) -> str:
    status = os.stat(path)  # noqa: PTH116  # a Path is slower
    return _NAME.format(status.st_dev, status.st_ino)
