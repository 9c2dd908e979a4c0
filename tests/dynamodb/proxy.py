"""A proxy in front of the DynamoDB server that counts requests and injects network faults.

It runs in a thread with its own event loop, so that it responds even if the event loop of the test is
blocked.
"""

from __future__ import annotations

import asyncio
import io
import json
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import aiohttp
from aiohttp import web

_WRITES = ("BatchExecuteStatement", "BatchWriteItem", "TransactWriteItems", "PutItem", "UpdateItem")
WRITES = (*_WRITES, "DeleteItem")


class Request(NamedTuple):
    """A request as it was received."""

    operation: str
    params: dict[str, Any]

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


class Torn(NamedTuple):
    """The first half of the response of the server."""


Fault = Raw | Dripped | Endless | Torn | Changed | Answer | Cut | Late | Failed | Partly
Rule = Callable[[Request], Fault | None]


def throttled() -> Answer:
    return Answer(400, {"__type": "com.amazonaws#ProvisionedThroughputExceededException"})


def failed() -> Answer:
    return Answer(500, {"__type": "InternalServerError", "message": "try again"})


class Proxy:
    """A running proxy.

    Attributes:
        url: its address.
        rule: returns the fault for a request; None: the request is forwarded.
        requests: all requests except `looks`.
        looks: the periodic requests by which a store checks whether it is being migrated.
    """

    def __init__(self, server_url: str) -> None:
        self._server_url = server_url
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stop: asyncio.Event | None = None
        self.url = ""
        self.rule: Rule | None = None
        self.requests: list[Request] = []
        self.looks: list[Request] = []
        self._thread = threading.Thread(
            target=lambda: self._loop.run_until_complete(self._run()), daemon=True
        )

    def counted(self) -> Counter[str]:
        """The number of requests of each operation."""
        return Counter(each.operation for each in self.requests)

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(20), "the proxy did not start"

    def stop(self) -> None:
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    async def _run(self) -> None:
        self._stop = asyncio.Event()
        timeout = aiohttp.ClientTimeout(total=None)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as self._session:
            server = web.Server(self._handle)
            runner = web.ServerRunner(server, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            self._ready.set()
            await self._stop.wait()
            await runner.cleanup()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for each in others:
                each.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    async def _handle(self, incoming: web.BaseRequest) -> web.StreamResponse:
        body = await incoming.content.read()  # `read()` has a limit
        operation = incoming.headers.get("X-Amz-Target", "").rpartition(".")[2]
        request = Request(operation, json.loads(body or b"{}"))
        (self.looks if request.is_migration_check else self.requests).append(request)
        fault = None if self.rule is None else self.rule(request)
        if isinstance(fault, Answer):
            return _response(fault.status, json.dumps(fault.body).encode())
        if isinstance(fault, Raw) and not fault.applied:
            return web.Response(status=fault.status, body=fault.body, headers=fault.headers)
        if isinstance(fault, Endless):
            return await self._endless(incoming)
        if isinstance(fault, Late):
            await asyncio.sleep(fault.seconds)
        if isinstance(fault, Cut) and not fault.applied:
            return await self._cut(incoming, fault)
        if isinstance(fault, Partly):
            return await self._partly(incoming, request)
        try:
            status, answer = await self._pass_on(incoming, body)
        except aiohttp.ClientError:
            return await self._cut(incoming, Cut(applied=False))
        if isinstance(fault, Cut):
            return await self._cut(incoming, fault)
        if isinstance(fault, Raw):
            return web.Response(status=fault.status, body=fault.body, headers=fault.headers)
        if isinstance(fault, Dripped):
            return await self._drip(incoming, answer, fault.seconds)
        if isinstance(fault, Torn):
            return await self._tear(incoming, answer)
        if isinstance(fault, Changed):
            answer = json.dumps(fault.change(json.loads(answer))).encode()
        if isinstance(fault, Failed):
            return _response(500, json.dumps(failed().body).encode())
        return _response(status, answer)

    async def _pass_on(self, incoming: web.BaseRequest, body: bytes) -> tuple[int, bytes]:
        headers = {
            name: value
            for name, value in incoming.headers.items()
            if name.lower() not in ("host", "content-length")
        }
        data = io.BytesIO(body)
        async with self._session.post(self._server_url, data=data, headers=headers) as answer:
            return answer.status, await answer.read()

    async def _drip(
        self, incoming: web.BaseRequest, body: bytes, seconds: float
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/x-amz-json-1.0"})
        await response.prepare(incoming)
        with suppress(ConnectionError):
            for each in body:
                await response.write(bytes((each,)))
                await asyncio.sleep(seconds)
            await response.write_eof()
        return response

    async def _endless(self, incoming: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/x-amz-json-1.0"})
        await response.prepare(incoming)
        with suppress(ConnectionError):
            while True:
                await response.write(b" " * 2**20)
        return response

    async def _tear(self, incoming: web.BaseRequest, body: bytes) -> web.StreamResponse:
        headers = {"Content-Type": "application/x-amz-json-1.0", "Content-Length": str(len(body))}
        response = web.StreamResponse(headers=headers)
        await response.prepare(incoming)
        await response.write(body[: len(body) // 2])
        return await self._cut(incoming, Cut(applied=True))

    async def _cut(self, incoming: web.BaseRequest, fault: Cut) -> web.StreamResponse:
        await asyncio.sleep(fault.stall)
        if incoming.transport is not None:
            if fault.reset:
                connection = incoming.transport.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            incoming.transport.abort()
        return web.Response()

    async def _partly(self, incoming: web.BaseRequest, request: Request) -> web.StreamResponse:
        """Every second item is processed, the others are returned as unprocessed."""
        params = request.params
        if request.operation == "BatchExecuteStatement":
            statements = params["Statements"]
            kept = {**params, "Statements": statements[::2]}
            status, body = await self._pass_on(incoming, json.dumps(kept).encode())
            done = iter(json.loads(body)["Responses"])
            error = {"Error": {"Code": "ThrottlingError", "Message": "slow down"}}
            answers = [error if place % 2 else next(done) for place in range(len(statements))]
            return _response(status, json.dumps({"Responses": answers}).encode())
        if request.operation in ("BatchGetItem", "BatchWriteItem"):
            return await self._half(incoming, request)
        return _response(400, json.dumps(throttled().body).encode())

    async def _half(self, incoming: web.BaseRequest, request: Request) -> web.StreamResponse:
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
        status, answer = await self._pass_on(incoming, body)
        merged = {**json.loads(answer), "UnprocessedKeys" if reads else "UnprocessedItems": left}
        return _response(status, json.dumps(merged).encode())


def _response(status: int, body: bytes) -> web.Response:
    return web.Response(status=status, body=body, content_type="application/x-amz-json-1.0")


@contextmanager
def proxy_before(server_url: str) -> Iterator[Proxy]:
    """A proxy for as long as the context lasts."""
    proxy = Proxy(server_url)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()
