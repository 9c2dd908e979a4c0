"""The change feed as server-sent events, for Starlette and FastAPI.

@app.get("/machines/changes")
async def changes(request: Request) -> Response:
    return ChangesResponse(store_of(request).watch("machines", since=last_event_id(request)))
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AbstractAsyncContextManager, suppress
from typing import TYPE_CHECKING, Any, Final

import msgspec
from starlette.responses import Response

from hf_async_store.arguments import check_seconds
from hf_async_store.errors import InvalidInputError, StorageError
from hf_async_store.feed import Changes, EntityChange

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import HTTPConnection
    from starlette.types import Receive, Scope, Send

log: Final = logging.getLogger("hf_async_store.http")

HEARTBEAT_SECONDS: Final = 15.0

_HEADERS: Final = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx would keep events until its buffer is full
}


def last_event_id(connection: HTTPConnection) -> str | None:
    """The token after which a client goes on, as `since` of `watch`; None: it begins now.

    That is the header `Last-Event-ID`, which a browser sends when it connects again; or the query parameter
    `since`, with which a page can begin.
    """
    return connection.headers.get("last-event-id") or connection.query_params.get("since") or None


class ChangesResponse(Response):
    """The changes of a watch as server-sent events, until the client goes away.

    * `start` is the first: the watch has begun. A client that reads what it shows after this event misses
      no change. Its data is `{}`.
    * `put` has `{"id": ..., "version": ..., "entity": {...}}`, `delete` the same without the entity.
    * Each has the token to go on after it as its id. If nothing happens, so has a comment, by which proxies
      and clients see that the connection lives.

    What `watch` raises before the first event is answered as an error: an invalid token by 422, and one
    whose changes are not kept any more by 410, after which a client must read everything again. Later, the
    stream ends, the client connects again, and gets this answer.

    Args:
        watch: what `store.watch(...)` returns.
        heartbeat: after how many seconds without a change a comment is sent.
    """

    def __init__(
        self,
        watch: AbstractAsyncContextManager[Changes],
        *,
        heartbeat: float = HEARTBEAT_SECONDS,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        check_seconds(heartbeat, "heartbeat")
        if not heartbeat > 0:
            raise InvalidInputError("heartbeat must be greater than 0")
        super().__init__(headers={**_HEADERS, **(headers or {})})
        del self.headers["content-length"]
        self._watch = watch
        self._heartbeat = heartbeat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._watch as changes:
            start = {"status": self.status_code, "headers": self.raw_headers}
            await send({"type": "http.response.start", **start})
            if scope["method"] == "HEAD":
                await send({"type": "http.response.body", "body": b""})
            else:
                await self._follow(changes, receive, send)

    async def _follow(self, changes: Changes, receive: Receive, send: Send) -> None:
        """Send changes until the client has gone away, or the watch has ended."""
        sending = asyncio.create_task(self._send_changes(changes, send))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait([sending, leaving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            sending.cancel()
            leaving.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
        if not sending.cancelled():
            sending.result()

    async def _send_changes(self, changes: Changes, send: Send) -> None:
        async def write(text: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": text, "more_body": more})

        with suppress(OSError):  # the client has gone away
            await write(_event("start", {}, changes.token))
            try:
                while True:
                    await write(await self._next(changes))
            except StorageError as exc:
                log.info("a stream of changes of %s ends: %s", changes.collection, exc)
                await write(b"", more=False)

    async def _next(self, changes: Changes) -> bytes:
        """The next event, or after some time a comment."""
        try:
            async with asyncio.timeout(self._heartbeat):
                change = await anext(changes)
        except TimeoutError:
            # Changes that the filter leaves out move the token, too. An id without data is no event.
            return b":\nid: %s\n\n" % changes.token.encode()
        return _event(change.kind, _data(change), change.token)


async def _disconnected(receive: Receive) -> None:
    """Wait until the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _data(change: EntityChange) -> dict[str, Any]:
    data: dict[str, Any] = {"id": change.id, "version": change.version}
    return data if change.entity is None else {**data, "entity": change.entity}


def _event(kind: str, data: object, token: str) -> bytes:
    # Encoded JSON and tokens have no line breaks.
    return b"event: %s\nid: %s\ndata: %s\n\n" % (
        kind.encode(),
        token.encode(),
        msgspec.json.encode(data),
    )
