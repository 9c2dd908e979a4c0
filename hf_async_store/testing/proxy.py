"""A proxy in front of the server of an engine, which cuts connections and loses answers, for harnesses.

It runs in a thread with an event loop of its own, so that it responds even if that of a test is blocked.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Self

_SECONDS = 10.0


class HeldRequest:
    """A request that a proxy has not passed on yet; it is used in another thread than that of the proxy."""

    def __init__(self) -> None:
        self._arrived: Future[None] = Future()
        self._released: Future[None] = Future()
        self._answered: Future[None] = Future()

    async def arrived(self) -> None:
        """Wait until a client has sent the request."""
        await _done(self._arrived)

    async def release(self) -> None:
        """Pass the request on, even if its client has gone, and wait until the server has responded."""
        self._released.set_result(None)
        await _done(self._answered)

    async def hold(self) -> None:
        """Of the proxy: wait until the request may be passed on."""
        self._arrived.set_result(None)
        await asyncio.wrap_future(self._released)

    def answer(self) -> None:
        """Of the proxy: the server has responded, or the connection to it is lost."""
        if not self._answered.done():
            self._answered.set_result(None)


async def _done(future: Future[None]) -> None:
    async with asyncio.timeout(_SECONDS):
        await asyncio.shield(asyncio.wrap_future(future))


class FaultyProxy:
    """A proxy for all connections to one server.

        with FaultyProxy("127.0.0.1", 6379) as proxy:
            url = f"redis://127.0.0.1:{proxy.port}"

    Attributes:
        port: of 127.0.0.1, on which it listens.
        to: host and port of the server to which new connections lead.
        lost: how many answers it has lost.
    """

    def __init__(self, host: str, port: int) -> None:
        self.to = host, port
        self._loses: Callable[[bytes], bool] | None = None
        self._loses_more = False
        self._holds: tuple[Callable[[bytes], bool], HeldRequest] | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.port = 0
        self.lost = 0

    def lose_next_answer(self, to: Callable[[bytes], bool]) -> None:
        """Pass the next request on that `to` accepts, and break the connection instead of the answer.

        Args:
            to: is called with what a client sends, as it arrives: a part of a request, or several. It
                accepts the commit alone: with the answer to an earlier statement, nothing was written.
        """
        self._loses = to
        self._loses_more = False

    @contextmanager
    def lose_answers(self, to: Callable[[bytes], bool]) -> Iterator[None]:
        """Within the context, lose the answer to each request that `to` accepts, as `lose_next_answer`."""
        self._loses_more, self._loses = True, to
        try:
            yield
        finally:
            self._loses = None

    def hold_next_request(self, to: Callable[[bytes], bool]) -> HeldRequest:
        """Hold up the next request that `to` accepts, as in `lose_next_answer`, until it is released."""
        held = HeldRequest()
        self._holds = to, held
        return held

    def cut_connections(self) -> None:
        """Break all connections; new ones are accepted."""
        self._run(self._cut())

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._listen())
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_SECONDS)
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_SECONDS)

    async def _listen(self) -> None:
        self._listening = await self._start_server()
        self.port = self._listening.sockets[0].getsockname()[1]

    async def _start_server(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def _cut(self) -> None:
        for each in self._writers:
            each.transport.abort()

    async def _close(self) -> None:
        self._listening.close()
        await self._cut()
        await self._end()
        await asyncio.sleep(0.01)  # for the transports, which end in the next steps of the loop

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:  # not cancelled: of a cancelled connection, the streams of asyncio log an error
            await asyncio.wait(others, timeout=_SECONDS / 2)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            answers, requests = await asyncio.open_connection(*self.to)
        except OSError:
            writer.transport.abort()
            return
        silent, answered = asyncio.Event(), asyncio.Event()
        self._writers |= {writer, requests}
        answering = asyncio.create_task(self._answer(answers, writer, silent, answered))
        try:
            while data := await reader.read(65536):
                loses = self._loses  # read once: another thread sets it
                if loses is not None and loses(data):
                    self._loses = loses if self._loses_more else None
                    self.lost += 1
                    silent.set()
                if self._holds is not None and self._holds[0](data):
                    (_, held), self._holds = self._holds, None
                    await held.hold()
                    answered.clear()
                    requests.write(data)
                    await answered.wait()  # before the client can close the connection
                    held.answer()
                    continue
                requests.write(data)
                await requests.drain()
            requests.close()
            await answering
        except OSError:
            answering.cancel()
        finally:
            self._writers -= {writer, requests}
            for each in (writer, requests):
                each.transport.abort()

    async def _answer(
        self,
        answers: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        silent: asyncio.Event,
        answered: asyncio.Event,
    ) -> None:
        try:
            while (data := await answers.read(65536)) and not silent.is_set():
                answered.set()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            answered.set()
        writer.transport.abort()
