"""The proxy of the kit, in front of a server that answers each line with the same line."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from hf_async_store.testing.proxy import FaultyProxy

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

SECONDS = 10


@asynccontextmanager
async def echo(seen: list[bytes]) -> AsyncGenerator[int, None]:
    tasks: set[asyncio.Task[None] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        with suppress(ConnectionError):
            while line := await reader.readline():
                seen.append(line)
                writer.write(line)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await asyncio.gather(*filter(None, tasks))


async def ask(proxy: FaultyProxy, line: bytes) -> bytes:
    async with asyncio.timeout(SECONDS):
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        try:
            writer.write(line)
            return await reader.readline()
        except ConnectionError:
            return b""
        finally:
            writer.close()


async def test_an_answer_is_lost_after_its_request_was_passed_on() -> None:
    seen: list[bytes] = []
    async with echo(seen) as port:
        with FaultyProxy("127.0.0.1", port) as proxy:
            assert await ask(proxy, b"write\n") == b"write\n"
            proxy.lose_next_answer(lambda data: b"write" in data)
            assert await ask(proxy, b"read\n") == b"read\n"
            assert await ask(proxy, b"write again\n") == b""
            assert proxy.lost == 1
            assert await ask(proxy, b"write\n") == b"write\n"
    assert seen == [b"write\n", b"read\n", b"write again\n", b"write\n"]


async def test_the_answers_to_all_repetitions_are_lost() -> None:
    seen: list[bytes] = []
    async with echo(seen) as port:
        with FaultyProxy("127.0.0.1", port) as proxy:
            with proxy.lose_answers(lambda data: b"write" in data):
                assert await ask(proxy, b"write\n") == b""
                assert await ask(proxy, b"read\n") == b"read\n"
                assert await ask(proxy, b"write again\n") == b""
            assert await ask(proxy, b"write\n") == b"write\n"
            assert proxy.lost == 2
            proxy.lose_next_answer(lambda data: b"write" in data)
            assert await ask(proxy, b"write\n") == b""
            assert await ask(proxy, b"write\n") == b"write\n"
    assert seen.count(b"write again\n") == 1


async def test_a_request_is_held_up_and_passed_on_though_its_client_has_gone() -> None:
    seen: list[bytes] = []
    async with echo(seen) as port:
        with FaultyProxy("127.0.0.1", port) as proxy:
            for stays in (True, False):
                held = proxy.hold_next_request(lambda data: b"write" in data)
                assert await ask(proxy, b"read\n") == b"read\n"
                asking = asyncio.create_task(ask(proxy, b"write\n"))
                await held.arrived()
                assert b"write\n" not in seen
                if not stays:
                    asking.cancel()
                    await asyncio.wait({asking})
                await held.release()
                assert seen.pop() == b"write\n"
                if stays:
                    assert await asking == b"write\n"


async def test_connections_are_cut_and_new_ones_accepted() -> None:
    async with echo([]) as port:
        with FaultyProxy("127.0.0.1", port) as proxy:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(b"x\n")
            assert await reader.readline() == b"x\n"
            proxy.cut_connections()
            async with asyncio.timeout(SECONDS):
                with suppress(ConnectionError):
                    assert await reader.readline() == b""
            writer.close()
            assert await ask(proxy, b"y\n") == b"y\n"


async def test_a_server_that_is_not_there() -> None:
    async with echo([]) as port:
        pass
    with FaultyProxy("127.0.0.1", port) as proxy:
        assert await ask(proxy, b"x\n") == b""
