"""A small proxy in front of a server, whose connections can be broken."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


class Link:
    """A proxy for all connections to one port.

    Attributes:
        port: the port on which it listens.
        to: host and port of the server to which new connections are forwarded.
        cut_after: when a client sends this, it is passed on, and the connection breaks before the
            response.
        passed: the bytes that were passed on since then.
    """

    def __init__(self, host: str, port: int) -> None:
        self.to = host, port
        self.port = 0
        self.cut_after: bytes | None = None
        self.cuts = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())  # type: ignore[arg-type]  # a server's callback is one
        there, back = await asyncio.open_connection(*self.to)
        silent = asyncio.Event()
        answers = asyncio.create_task(self._answers(there, writer, silent))
        try:
            while data := await reader.read(65536):
                cut = self.cut_after is not None and self.cut_after in data
                if cut:
                    silent.set()
                    self.cut_after = None
                    self.cuts += 1
                back.write(data)
                await back.drain()
                if cut:
                    await asyncio.sleep(0.2)  # by then the server has executed it
                    break
        finally:
            answers.cancel()
            for each in (writer, back):
                each.close()
            with suppress(asyncio.CancelledError, OSError):
                await answers

    async def _answers(
        self, there: asyncio.StreamReader, writer: asyncio.StreamWriter, silent: asyncio.Event
    ) -> None:
        while data := await there.read(65536):
            if silent.is_set():
                return
            writer.write(data)
            with suppress(OSError):
                await writer.drain()
        writer.close()

    async def close(self) -> None:
        for each in self._tasks:
            each.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def link_to(host: str, port: int) -> AsyncGenerator[Link, None]:
    link = Link(host, port)
    server = await asyncio.start_server(link.serve, "127.0.0.1", 0)
    link.port = server.sockets[0].getsockname()[1]
    try:
        yield link
    finally:
        server.close()
        await link.close()
