"""The HTTP transport: aiobotocore's session, without redirects and with bounded responses.

All clients of a store use it: for DynamoDB, for Application Auto Scaling, and the clients with which
botocore obtains credentials. It is imported with the driver, at the first use of a store.
"""

from __future__ import annotations

import asyncio
import warnings
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self, cast

from aiobotocore.httpsession import AIOHTTPSession  # type: ignore[import-untyped]  # no types
from aiohttp import ClientPayloadError, ClientSession, ClientTimeout
from botocore.exceptions import ReadTimeoutError  # type: ignore[import-untyped]  # it has no types

if TYPE_CHECKING:
    from collections.abc import Mapping

# The largest response is that of BatchGetItem: 16 MB of items, whose JSON is at most 7 times as large.
MAX_BYTES: Final = 128 * 2**20

_DEFAULT_SECONDS: Final = 60.0
"""The timeout for a client that sets none."""


class _Response(NamedTuple):
    """The parts of a response that aiobotocore uses, with the body already received."""

    url: Any
    status: int
    raw_headers: Any
    body: bytes

    async def read(self) -> bytes:
        return self.body


class _BoundedSession:
    """An aiohttp session that follows no redirects and limits the size of a response.

    The headers are signed for one host and contain a session token that is valid for any host.
    They must not be sent to another host because of a redirect.
    """

    def __init__(self, session: ClientSession) -> None:
        self._session = session

    async def request(self, method: str, **options: Any) -> _Response:
        response = await self._session.request(method, **options, allow_redirects=False)
        try:
            chunks: list[bytes] = []
            size = 0
            while chunk := await response.content.readany():
                size += len(chunk)
                if size > MAX_BYTES:
                    raise ClientPayloadError(f"the response is larger than {MAX_BYTES} bytes")
                chunks.append(chunk)
        except BaseException:
            response.close()
            raise
        response.release()
        return _Response(response.url, response.status, response.raw_headers, b"".join(chunks))


class Transport(AIOHTTPSession):  # type: ignore[misc]  # its base has no types
    """The transport. A request takes at most `connect_timeout` plus `read_timeout` in total."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        timeout = cast("ClientTimeout", vars(self)["_timeout"])
        connect, read = (
            timeout.sock_connect or _DEFAULT_SECONDS,
            timeout.sock_read or _DEFAULT_SECONDS,
        )
        self._total_seconds = connect + read
        # `connect` includes name resolution. It includes no wait for a free connection of the
        # pool, because of `_slots`.
        self._timeout = ClientTimeout(connect=connect, sock_connect=connect, sock_read=read)
        # As many slots as connections, so that the timeouts exclude the wait for a connection.
        self._slots = asyncio.Semaphore(self._max_pool_connections)
        self._unclosed: weakref.finalize[Any, Any] | None = None

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        self._unclosed = weakref.finalize(self, _close_abandoned, self._sessions)
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._unclosed is not None:
            self._unclosed.detach()
        await super().__aexit__(*exc)

    def abandon(self) -> None:
        """Leave the sessions open until the process ends, without a warning."""
        if self._unclosed is not None:
            self._unclosed.detach()

    async def _get_session(self, proxy_url: str | None) -> _BoundedSession:
        return _BoundedSession(await super()._get_session(proxy_url))

    async def send(self, request: Any) -> Any:
        async with self._slots:
            try:
                async with asyncio.timeout(self._total_seconds):
                    return await super().send(request)
            except TimeoutError as exc:
                raise ReadTimeoutError(endpoint_url=request.url, error=exc) from exc


def _close_abandoned(sessions: Mapping[object, ClientSession]) -> None:
    """Close the sessions of a store that was not closed; otherwise aiohttp logs errors for each."""
    if not sessions:
        return
    warnings.warn(
        "a DynamoDB store was not closed: use `async with`, or `await store.close()`",
        ResourceWarning,
        stacklevel=2,
    )
    for session in sessions.values():
        connector = session.connector
        session.detach()
        if connector is not None:
            with suppress(RuntimeError):  # the event loop is closed
                connector._close()  # `close()` must be awaited, which is impossible here
