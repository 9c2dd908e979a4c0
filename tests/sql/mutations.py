"""A proxy that damages one message of a PostgreSQL server."""

from __future__ import annotations

import asyncio
import random
import struct
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

KINDS = (
    *("flip", "flip", "flip", "flip_many", "type", "length", "huge", "empty", "cut", "silence"),
    *("drop", "twice", "garbage", "drip", "cut_body", "text"),
)
TYPES = b"DDCCZZTTtE12n"


class Damage:
    """How one message is damaged, determined by a seed.

    Attributes:
        kind: one of KINDS.
        type: only a message of this type is damaged; None: any.
        skip: the number of such messages that are passed on unchanged first.
    """

    def __init__(self, seed: int, kind: str | None = None) -> None:
        self.random = random.Random(seed)
        self.kind = kind or self.random.choice(KINDS)
        self.type = self.random.choice([None, None, *(bytes([each]) for each in TYPES)])
        self.skip = self.random.choice([0, 0, 0, 0, 1, 1, 2, 3])

    def __repr__(self) -> str:
        return f"{self.kind} of {self.type or 'any'} after {self.skip}"

    def applies(self, message: bytes) -> bool:
        if self.type is not None and message[:1] != self.type:
            return False
        self.skip -= 1
        return self.skip < 0

    def of(self, message: bytes) -> bytes | None:
        """The damaged message; None: nothing more is sent, and the connection stays open."""
        chance, body = self.random, bytearray(message)
        match self.kind:
            case "flip" | "flip_many":
                for _ in range(1 if self.kind == "flip" else 8):
                    if len(body) > 5:
                        body[chance.randrange(5, len(body))] ^= 1 << chance.randrange(8)
            case "type":
                body[0] = chance.randrange(256)
            case "length":
                length = struct.unpack(">i", body[1:5])[0] + chance.choice([-2, -1, 1, 2, 7])
                body[1:5] = struct.pack(">i", length)
            case "negative":  # not used with a seed: see `test_a_negative_length`
                body[1:5] = struct.pack(">i", -chance.randrange(1, 2**31))
            case "huge":
                body[1:5] = struct.pack(">i", chance.randrange(2**20, 2**31))
            case "empty":
                body = body[:1] + struct.pack(">i", 4)
            case "cut_body" if len(body) > 5:
                kept = chance.randrange(5, len(body))
                body = body[:1] + struct.pack(">i", kept - 1) + body[5:kept]
            case "drop":
                return b""
            case "twice":
                body *= 2
            case "garbage":
                return chance.randbytes(chance.randrange(1, 64))
            case "text":
                body[5:] = bytes(chance.choice(b"\xff\xfe\xc3\x00") for _ in body[5:])
            case "silence":
                return None
        return bytes(body)


class DamagingLink:
    """A proxy for all connections to one port.

    Attributes:
        port: the port on which it listens.
        damage: applied to the next matching message from the server, and then removed.
        done: the number of damaged messages.
    """

    def __init__(self, host: str, port: int) -> None:
        self._to = host, port
        self.port = 0
        self.damage: Damage | None = None
        self.done = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        there, back = await asyncio.open_connection(*self._to)
        answers = asyncio.create_task(self._answers(there, writer))
        try:
            while data := await reader.read(65536):
                back.write(data)
                await back.drain()
        except OSError:
            pass
        finally:
            answers.cancel()
            writer.close()
            back.close()
            with suppress(asyncio.CancelledError, OSError, asyncio.IncompleteReadError):
                await answers

    async def _answers(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, OSError):
            while True:
                head = await there.readexactly(5)
                message = head + await there.readexactly(struct.unpack(">i", head[1:])[0] - 4)
                damage = self.damage
                if damage is None or not damage.applies(message):
                    writer.write(message)
                    await writer.drain()
                    continue
                self.damage = None
                self.done += 1
                if not await _damaged(damage, message, writer):
                    await asyncio.Event().wait()  # sends nothing more
        writer.close()

    async def close(self) -> None:
        for each in list(self._tasks):
            each.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _damaged(damage: Damage, message: bytes, writer: asyncio.StreamWriter) -> bool:
    """Pass a message on with its damage; returns whether anything is sent after it."""
    sent = damage.of(message)
    if sent is None:
        return False
    if damage.kind == "cut":
        writer.write(sent[: damage.random.randrange(len(sent))])
        writer.close()
    elif damage.kind == "drip":
        for each in sent[:200]:
            writer.write(bytes([each]))
            await writer.drain()
            await asyncio.sleep(0.002)
        writer.write(sent[200:])
    else:
        writer.write(sent)
    return True


@asynccontextmanager
async def damaging_link(host: str, port: int) -> AsyncGenerator[DamagingLink, None]:
    link = DamagingLink(host, port)
    server = await asyncio.start_server(link.serve, "127.0.0.1", 0)
    link.port = server.sockets[0].getsockname()[1]
    try:
        yield link
    finally:
        server.close()
        await link.close()
