"""The connection of a store: one aiobotocore client, created at the first use; another one for Streams.

Requests to the data plane do not use the methods of the client, because these take 500 to 700
microseconds of CPU time for each request, whatever its size, to build, validate, sign and parse
it. Instead, msgspec encodes and decodes the bodies, botocore's signer signs them with the client's
credentials, and the client's connection pool sends them with its proxies, certificates and
timeouts. The measurements are in `docs/decisions`.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import msgspec

from hf_async_store.config import DynamoDBConfig
from hf_async_store.driver import run_to_completion
from hf_async_store.errors import (
    ConfigurationError,
    StorageError,
    StoreClosedError,
    UnavailableError,
)
from hf_async_store.event_loop import in_thread, long_work
from hf_async_store.logs import hide_debug_messages
from hf_async_store.strategies.dynamodb.errors import before_sending, of_client
from hf_async_store.strategies.dynamodb.request_retry import Retries, retry
from hf_async_store.strategies.dynamodb.responses import Received, read_in_parts

if TYPE_CHECKING:
    from collections.abc import Mapping

_ENCODE: Final = msgspec.json.Encoder().encode
_SIGNED_AS: Final = "dynamodb"
_TARGETS: Final = {"dynamodb": "DynamoDB_20120810", "dynamodbstreams": "DynamoDBStreams_20120810"}
_LARGE_BODY: Final = 2**20


class Client:
    """Sends requests to DynamoDB; raises failures as errors of the store.

    Args:
        service: "dynamodb" or "dynamodbstreams", which has an endpoint of its own.
    """

    def __init__(self, config: DynamoDBConfig, service: str = "dynamodb") -> None:
        check_endpoint(config.endpoint_url)
        self.config = config
        self._service = service
        self._opening: asyncio.Task[_Connection] | None = None
        self._connection: _Connection | None = None
        self._closing = asyncio.Event()
        self._closed = False

    async def connection(self) -> _Connection:
        """The connection, opened at the first call; concurrent callers wait for the same task."""
        self.check_open()
        if self._connection is not None:
            return self._connection
        if self._opening is None:
            self._opening = asyncio.get_running_loop().create_task(
                _connect(self.config, self._service)
            )
        opening = self._opening
        try:
            connection = await asyncio.shield(opening)
        except asyncio.CancelledError:
            raise
        except BaseException:
            self._opening = None
            raise
        self.check_open()  # `close`, if it was called meanwhile, closes the connection
        self._connection = connection
        return connection

    def check_open(self) -> None:
        """Raise StoreClosedError after `close`."""
        if self._closed:
            raise _closed()

    async def call(self, operation: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request once and return its response.

        Raises:
            StorageError: see `responses.read_response`.
        """
        connection = self._connection or await self.connection()
        return await connection.call(operation, params)

    async def read(self, operation: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """Send an idempotent request and return its response; transient failures are retried."""
        try:
            return await retry(lambda: self.call(operation, params), self.retries())
        except UnavailableError as exc:
            if self._closed:
                raise _closed() from exc
            raise

    def retries(self, seconds: float | None = None) -> Retries:
        """The retries of one operation, by default until `retry_timeout` has passed."""
        return Retries(self.config.retry_timeout if seconds is None else seconds, self._closing)

    def end_retries(self) -> None:
        """Let each operation end after its current attempt."""
        self._closing.set()

    async def close(self) -> None:
        self._closed = True
        opening, self._opening = self._opening, None
        connection, self._connection = self._connection, None
        if connection is None and opening is not None:
            try:
                connection = await opening
            except StorageError:
                return
        if connection is not None:
            await run_to_completion(connection.close())

    def abandon(self) -> None:
        self._closed = True
        if self._connection is not None:
            self._connection.abandon()


def _closed() -> StoreClosedError:
    return StoreClosedError("this store was closed")


class _Connection:
    """An open aiobotocore client and the parts of it that every request uses."""

    def __init__(
        self, client: Any, target: str, credentials: Any, stack: AsyncExitStack, session: Any
    ) -> None:
        from botocore.auth import SigV4Auth  # type: ignore[import-untyped]  # it has no types
        from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped]

        self.client = client
        self.session = session
        self._target = target
        self._stack = stack
        self._credentials = credentials
        self._transport = client._endpoint.http_session
        self._send = self._transport.send
        self._url = client.meta.endpoint_url.rstrip("/") + "/"
        self._host = urlsplit(self._url).netloc.rpartition("@")[2]
        self._region = client.meta.region_name
        self._request = AWSRequest
        self._signer = SigV4Auth
        self.region: str = self._region

    async def call(self, operation: str, params: Mapping[str, Any]) -> dict[str, Any]:
        try:
            request = await self._signed(operation, params)
        except Exception as exc:
            raise before_sending(exc) from exc
        try:
            response = await self._send(request)
            body = await response.content
        except Exception as exc:
            raise of_client(exc, "DynamoDB", self._host) from exc
        # To use a response, and to sign the next request, takes 1 to 3 ms; a batch of 1,000 has 40.
        await long_work().pause_if_due()
        received = Received(response.status_code, response.headers, body)
        return await read_in_parts(operation, params, received)

    async def _signed(self, operation: str, params: Mapping[str, Any]) -> Any:
        credentials = await self._credentials.get_frozen_credentials()
        request = self._request(
            method="POST",
            url=self._url,
            headers={
                "X-Amz-Target": f"{self._target}.{operation}",
                "Content-Type": "application/x-amz-json-1.0",
            },
            data=_ENCODE(params),
        )
        self._signer(credentials, _SIGNED_AS, self._region).add_auth(request)
        prepared = request.prepare()
        if len(prepared.body) > _LARGE_BODY:
            prepared.body = BytesIO(prepared.body)  # aiohttp sends it in chunks
        return prepared

    async def close(self) -> None:
        await self._stack.aclose()

    def abandon(self) -> None:
        self._transport.abandon()


def check_endpoint(url: str | None) -> None:
    """Check that an endpoint is a valid URL.

    Raises:
        ConfigurationError: it is not. The message omits the URL, which may contain a password.
    """
    try:
        parts = urlsplit(url or "http://region")
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigurationError(
            "dynamodb_strategy.endpoint_url: must be a URL with http:// or https:// and a host"
        )


async def _connect(config: DynamoDBConfig, service: str) -> _Connection:
    """Open a client. botocore's imports and file reads run in a thread."""
    async with AsyncExitStack() as stack:
        try:
            session = await in_thread(_create_session, config)
            client = await stack.enter_async_context(
                session.create_client(
                    service, region_name=config.region, endpoint_url=config.endpoint
                )
            )
            credentials = await session.get_credentials()
            if credentials is None:
                from botocore.exceptions import NoCredentialsError  # type: ignore[import-untyped]

                raise NoCredentialsError
        except Exception as exc:
            raise before_sending(exc) from exc
        return _Connection(client, _TARGETS[service], credentials, stack.pop_all(), session)


@lru_cache
def _loader(data_path: str | None) -> Any:
    """Botocore's loader of data files, shared by all stores of the process: it caches them."""
    from botocore.loaders import create_loader  # type: ignore[import-untyped]

    from hf_async_store.strategies.dynamodb.service_data import ServiceData

    search_paths = create_loader(data_path).search_paths
    return ServiceData(search_paths, include_default_search_paths=False)


def _create_session(config: DynamoDBConfig) -> Any:
    """Create a session and load data files into its cache, which is slow and blocks.

    All clients of the session, including those that request credentials, use `Transport`.
    """
    from aiobotocore.config import AioConfig  # type: ignore[import-untyped]  # it has no types
    from aiobotocore.session import AioSession  # type: ignore[import-untyped]

    from hf_async_store.strategies.dynamodb.transport import Transport

    hide_debug_messages("aiobotocore", "botocore")
    session = AioSession(profile=config.profile)
    session.set_default_client_config(
        AioConfig(
            http_session_cls=Transport,
            parameter_validation=False,
            connect_timeout=config.connect_timeout,
            read_timeout=config.read_timeout,
            max_pool_connections=config.max_pool_connections,
            retries={"total_max_attempts": 1},
        )
    )
    loader = _loader(session.get_config_variable("data_path"))
    session.register_component("data_loader", loader)
    for name in ("endpoints", "partitions", "sdk-default-configuration", "_retry"):
        loader.load_data(name)
    return session
