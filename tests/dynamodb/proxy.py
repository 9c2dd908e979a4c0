"""A proxy in front of the DynamoDB server that counts requests and injects network faults.

It understands the requests, other than that of the kit.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import socket
import struct
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp

from hf_async_store.testing.proxy import FaultyProxy, HeldRequest

_WRITES = ("BatchExecuteStatement", "BatchWriteItem", "TransactWriteItems", "PutItem", "UpdateItem")
WRITES = (*_WRITES, "DeleteItem")

_JSON = "application/x-amz-json-1.0"
_PLAIN = {"Content-Type": _JSON}
_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *([0-9]+)")
_TARGET = re.compile(rb"(?i)\r\nx-amz-target: *[^\r\n]*\.([A-Za-z]+)")


class Request(NamedTuple):
    """A request as it was received.

    Attributes:
        head: its first line and its headers.
    """

    operation: str
    params: dict[str, Any]
    head: bytes = b""
    body: bytes = b""

    @property
    def is_migration_check(self) -> bool:
        """Whether it is the periodic request by which a store checks that it is not being migrated."""
        return str(self.params.get("TableName")).endswith("_hf_move")


class Answer(NamedTuple):
    """A response of the proxy, without forwarding the request."""

    status: int
    body: dict[str, Any]


class Cut(NamedTuple):
    """Close the connection after `stall` seconds, before or after the server has got the request.

    Attributes:
        reset: close it by a TCP reset, like a server that crashes.
    """

    applied: bool
    stall: float = 0.0
    reset: bool = False


class Late(NamedTuple):
    """Forward the request after a delay in seconds."""

    seconds: float


class Failed(NamedTuple):
    """Forward the request, and return status 500."""


class Partly(NamedTuple):
    """Execute a part of the request, and report the rest as unprocessed."""


class Changed(NamedTuple):
    """The modified response of the server."""

    change: Callable[[dict[str, Any]], dict[str, Any]]


class Raw(NamedTuple):
    """A response that DynamoDB never gives.

    Attributes:
        applied: the request is forwarded to the server first.
    """

    status: int
    body: bytes
    headers: Mapping[str, str]
    applied: bool = False


class Dripped(NamedTuple):
    """The response of the server, byte by byte, with a delay in seconds between them."""

    seconds: float


class Endless(NamedTuple):
    """A response with an endless body."""


class Held(NamedTuple):
    """The response of the server, to which the request is passed on when it is released."""

    request: HeldRequest


class Torn(NamedTuple):
    """The first half of the response of the server."""


Fault = Held | Raw | Dripped | Endless | Torn | Changed | Answer | Cut | Late | Failed | Partly
Rule = Callable[[Request], Fault | None]


def throttled() -> Answer:
    return Answer(400, {"__type": "com.amazonaws#ProvisionedThroughputExceededException"})


def failed() -> Answer:
    return Answer(500, {"__type": "InternalServerError", "message": "try again"})


class Proxy(FaultyProxy):
    """A running proxy, as a context manager.

    Attributes:
        rule: returns the fault for a request; None: the request is forwarded.
        requests: all requests except `looks`.
        looks: the periodic requests by which a store checks whether it is being migrated.
    """

    def __init__(self, server_url: str) -> None:
        parts = urlsplit(server_url)
        assert parts.hostname is not None
        assert parts.port is not None
        super().__init__(parts.hostname, parts.port)
        self._server_url = server_url
        self.rule: Rule | None = None
        self.requests: list[Request] = []
        self.looks: list[Request] = []
        self.connections: set[_Incoming] = set()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def counted(self) -> Counter[str]:
        """The number of requests of each operation."""
        return Counter(each.operation for each in self.requests)

    async def _start_server(self) -> asyncio.Server:
        timeout = aiohttp.ClientTimeout(total=None)
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=connector)
        loop = asyncio.get_running_loop()
        return await loop.create_server(lambda: _Incoming(self), "127.0.0.1", 0)

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for each in others:
            each.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._session.close()

    async def _cut(self) -> None:
        for each in list(self.connections):
            each.abort()

    def receive(self, request: Request) -> Fault | None:
        """Record a request; returns its fault."""
        (self.looks if request.is_migration_check else self.requests).append(request)
        return None if self.rule is None else self.rule(request)

    async def answer(self, incoming: _Incoming, request: Request, fault: Fault) -> None:
        """Respond to a request with a fault. An error in it ends the connection, and is not lost."""
        try:
            await self._answer(incoming, request, fault)
        except Exception:
            incoming.abort()
            raise

    async def _answer(self, incoming: _Incoming, request: Request, fault: Fault) -> None:
        if isinstance(fault, Answer):
            return incoming.respond(fault.status, json.dumps(fault.body).encode())
        if isinstance(fault, Raw) and not fault.applied:
            return incoming.respond(fault.status, fault.body, fault.headers)
        if isinstance(fault, Endless):
            return await incoming.respond_endlessly()
        if isinstance(fault, Held):
            await fault.request.hold()
        if isinstance(fault, Late):
            await asyncio.sleep(fault.seconds)  # and even if the client has given up
        if isinstance(fault, Cut) and not fault.applied:
            return await incoming.cut(fault)
        if isinstance(fault, Partly):
            return incoming.respond(*await self._partly(request))
        try:
            status, answer = await self._pass_on(request, request.body)
        except aiohttp.ClientError:
            return await incoming.cut(Cut(applied=False))
        if isinstance(fault, Held):
            fault.request.answer()
        if isinstance(fault, Cut):
            return await incoming.cut(fault)
        if isinstance(fault, Raw):
            return incoming.respond(fault.status, fault.body, fault.headers)
        if isinstance(fault, Dripped):
            return await incoming.drip(answer, fault.seconds)
        if isinstance(fault, Torn):
            return await incoming.tear(answer)
        if isinstance(fault, Changed):
            answer = json.dumps(fault.change(json.loads(answer))).encode()
        if isinstance(fault, Failed):
            return incoming.respond(500, json.dumps(failed().body).encode())
        return incoming.respond(status, answer)

    async def _pass_on(self, request: Request, body: bytes) -> tuple[int, bytes]:
        lines = request.head.decode().split("\r\n")[1:]
        headers = {
            name: value.strip()
            for name, _, value in (each.partition(":") for each in lines)
            if name.lower() not in ("host", "content-length")
        }
        url = self._server_url
        async with self._session.post(url, data=io.BytesIO(body), headers=headers) as answer:
            return answer.status, await answer.read()

    async def _partly(self, request: Request) -> tuple[int, bytes]:
        """Every second item is processed, the others are returned as unprocessed."""
        params = request.params
        if request.operation == "BatchExecuteStatement":
            statements = params["Statements"]
            kept = {**params, "Statements": statements[::2]}
            status, body = await self._pass_on(request, json.dumps(kept).encode())
            done = iter(json.loads(body)["Responses"])
            error = {"Error": {"Code": "ThrottlingError", "Message": "slow down"}}
            answers = [error if place % 2 else next(done) for place in range(len(statements))]
            return status, json.dumps({"Responses": answers}).encode()
        if request.operation in ("BatchGetItem", "BatchWriteItem"):
            return await self._half(request)
        return 400, json.dumps(throttled().body).encode()

    async def _half(self, request: Request) -> tuple[int, bytes]:
        reads = request.operation == "BatchGetItem"
        kept: dict[str, Any] = {}
        left: dict[str, Any] = {}
        for table, asked in request.params["RequestItems"].items():
            parts = asked["Keys"] if reads else asked
            first, second = parts[: (len(parts) + 1) // 2], parts[(len(parts) + 1) // 2 :]
            kept[table] = {**asked, "Keys": first} if reads else first
            if second:
                left[table] = {**asked, "Keys": second} if reads else second
        body = json.dumps({**request.params, "RequestItems": kept}).encode()
        status, answer = await self._pass_on(request, body)
        merged = {**json.loads(answer), "UnprocessedKeys" if reads else "UnprocessedItems": left}
        return status, json.dumps(merged).encode()


class _Incoming(asyncio.Protocol):
    """A connection of a client. A request without a fault is forwarded as it was received, and so is its
    response: a proxy that parses both takes longer than the server."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._received = b""
        self._request = b""
        self._transport: Any = None
        self._server: Any = None
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._proxy.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._proxy.connections.discard(self)
        if self._server is not None:
            self._server.close()

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (head := self._received.find(b"\r\n\r\n")) >= 0:
            length = _LENGTH.search(self._received, 0, head)
            end = head + 4 + (int(length[1]) if length is not None else 0)
            if len(self._received) < end:
                return
            self._request, self._received = self._received[:end], self._received[end:]
            body = self._request[head + 4 :]
            target = _TARGET.search(self._request, 0, head)
            request = Request(
                target[1].decode() if target is not None else "",
                json.loads(body or b"{}"),
                self._request[:head],
                body,
            )
            fault = self._proxy.receive(request)
            if fault is None:
                self.forward()
            else:
                self._spawn(self._proxy.answer(self, request, fault))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def forward(self) -> None:
        """Send the last request to the server, which will respond to the client."""
        if self._server is None or self._server.is_closing():
            self._spawn(self._connect())
        else:
            self._server.write(self._request)

    async def _connect(self) -> None:
        request = self._request
        try:
            server, _ = await asyncio.get_running_loop().create_connection(
                lambda: _Outgoing(self), *self._proxy.to
            )
        except OSError:
            self._transport.abort()
            return
        server.write(request)
        if self._transport.is_closing():
            server.close()  # the client has gone; the request is executed all the same
        else:
            self._server = server

    def relay(self, data: bytes) -> None:
        """Send a part of a response of the server to the client."""
        if not self._transport.is_closing():
            self._transport.write(data)

    def server_closed(self, server: Any, exc: Exception | None) -> None:
        if server is not self._server:
            return  # it was replaced meanwhile
        self._server = None
        if exc is None:
            self._transport.close()  # after the response has been sent
        else:
            self._transport.abort()

    def abort(self) -> None:
        for each in (self._transport, self._server):
            if each is not None:
                each.abort()

    def respond(self, status: int, body: bytes, headers: Mapping[str, str] = _PLAIN) -> None:
        if not self._transport.is_closing():
            self._write_head(status, len(body), headers)
            self._transport.write(body)

    def _write_head(
        self, status: int, length: int | None, headers: Mapping[str, str] = _PLAIN
    ) -> None:
        lines = [f"HTTP/1.1 {status} Status", *(f"{each}: {headers[each]}" for each in headers)]
        if length is not None and "Content-Length" not in headers:
            lines.append(f"Content-Length: {length}")
        self._transport.write("\r\n".join([*lines, "", ""]).encode())

    async def drip(self, body: bytes, seconds: float) -> None:
        self._write_head(200, len(body))
        for each in body:
            if self._transport.is_closing():
                return
            self._transport.write(bytes((each,)))
            await asyncio.sleep(seconds)

    async def respond_endlessly(self) -> None:
        self._write_head(200, None)
        while not self._transport.is_closing():
            if not self._transport.get_write_buffer_size():
                self._transport.write(b" " * 2**20)
            await asyncio.sleep(0.001)

    async def tear(self, body: bytes) -> None:
        self._write_head(200, len(body))
        self._transport.write(body[: len(body) // 2])
        await self.cut(Cut(applied=True))

    async def cut(self, fault: Cut) -> None:
        await asyncio.sleep(fault.stall)
        if fault.reset:
            connection = self._transport.get_extra_info("socket")
            with suppress(OSError):  # the client has closed it
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()


class _Outgoing(asyncio.Protocol):
    """The connection to the server of one connection of a client."""

    def __init__(self, client: _Incoming) -> None:
        self._client = client
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._client.relay(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.server_closed(self._transport, exc)
