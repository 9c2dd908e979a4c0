"""The connection of a store: one client of aiobotocore, made at the first use.

Calls of the data plane do not go through the client's methods, whose way of building, signing,
checking and parsing a request costs 500 to 700 microseconds of CPU whatever it carries: the body is
written and read by msgspec, signed by botocore's own signer with the client's credentials, and sent
through the client's own pool of connections, with its proxies, certificates and timeouts.
`docs/decisions` tells what was measured.
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
from hf_async_store.errors import ConfigurationError, StorageError, StoreClosedError
from hf_async_store.strategies.dynamodb.answers import read_answer
from hf_async_store.strategies.dynamodb.backoff import retry
from hf_async_store.strategies.dynamodb.errors import before_sending, of_client

if TYPE_CHECKING:
    from collections.abc import Mapping

_ENCODE: Final = msgspec.json.Encoder().encode
_SERVICE: Final = "dynamodb"
_LARGE_BODY: Final = 2**20


class Client:
    """Requests to DynamoDB, each tried once; its failures come out as the store's errors."""

    def __init__(self, config: DynamoDBConfig) -> None:
        check_endpoint(config.endpoint_url)
        self.config = config
        self._opening: asyncio.Task[_Connection] | None = None
        self._connection: _Connection | None = None
        self._closed = False

    async def connection(self) -> _Connection:
        """The connection, made now if there is none yet; by one task for all that wait for it."""
        if self._closed:
            raise StoreClosedError("this store was closed")
        if self._connection is not None:
            return self._connection
        if self._opening is None:
            self._opening = asyncio.get_running_loop().create_task(_connect(self.config))
        opening = self._opening
        try:
            self._connection = await asyncio.shield(opening)
        except asyncio.CancelledError:
            raise
        except BaseException:
            self._opening = None
            raise
        return self._connection

    async def call(self, operation: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            StorageError: by `answers.read_answer`.
        """
        connection = self._connection or await self.connection()
        return await connection.call(operation, params)

    async def read(self, operation: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request that may be sent any number of times; failures are outlasted."""
        return await retry(
            lambda: self.call(operation, params), self.config.retry_timeout, idempotent=True
        )

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


class _Connection:
    """An open client of aiobotocore, and what of it the hot path uses."""

    def __init__(self, client: Any, credentials: Any, stack: AsyncExitStack, session: Any) -> None:
        from botocore.auth import SigV4Auth  # type: ignore[import-untyped]  # it has no types
        from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped]

        self.client = client
        self.session = session
        self._stack = stack
        self._credentials = credentials
        self._send = client._endpoint.http_session.send
        self._url = client.meta.endpoint_url.rstrip("/") + "/"
        self._place = urlsplit(self._url).netloc.rpartition("@")[2]
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
            raise of_client(exc, self._place) from exc
        return read_answer(operation, params, response.status_code, response.headers, body)

    async def _signed(self, operation: str, params: Mapping[str, Any]) -> Any:
        credentials = await self._credentials.get_frozen_credentials()
        request = self._request(
            method="POST",
            url=self._url,
            headers={
                "X-Amz-Target": f"DynamoDB_20120810.{operation}",
                "Content-Type": "application/x-amz-json-1.0",
            },
            data=_ENCODE(params),
        )
        self._signer(credentials, _SERVICE, self._region).add_auth(request)
        prepared = request.prepare()
        if len(prepared.body) > _LARGE_BODY:
            prepared.body = BytesIO(prepared.body)  # sent in pieces, as aiohttp wants it
        return prepared

    async def close(self) -> None:
        await self._stack.aclose()


def check_endpoint(url: str | None) -> None:
    """That an endpoint is one.

    Raises:
        ConfigurationError: it does not show the URL, in which a password may stand.
    """
    try:
        place = urlsplit(url or "http://region")
        usable = place.scheme in ("http", "https") and bool(place.hostname) and place.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigurationError(
            "dynamodb_strategy.endpoint_url: not a URL with http:// or https:// and a host"
        )


async def _connect(config: DynamoDBConfig) -> _Connection:
    """A new client. What botocore reads and imports for it is read in a thread."""
    async with AsyncExitStack() as stack:
        try:
            session = await asyncio.to_thread(_prepare, config)
            client = await stack.enter_async_context(
                session.create_client(
                    _SERVICE, region_name=config.region, endpoint_url=config.endpoint
                )
            )
            credentials = await session.get_credentials()
            if credentials is None:
                from botocore.exceptions import NoCredentialsError  # type: ignore[import-untyped]

                raise NoCredentialsError
        except Exception as exc:
            raise before_sending(exc) from exc
        return _Connection(client, credentials, stack.pop_all(), session)


@lru_cache
def _loader(data_path: str | None) -> Any:
    """What reads the service model, and keeps it: one for all stores of the process.

    To read it takes about 0.1 s.
    """
    from botocore.loaders import create_loader  # type: ignore[import-untyped]

    return create_loader(data_path)


def _prepare(config: DynamoDBConfig) -> Any:
    """A session with the service model in its cache: the slow part, which blocks.

    All clients that it makes, those that ask for credentials among them, use our transport.
    """
    from aiobotocore.config import AioConfig  # type: ignore[import-untyped]  # it has no types
    from aiobotocore.session import AioSession  # type: ignore[import-untyped]

    from hf_async_store.strategies.dynamodb.transport import Transport

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
    loader.load_service_model(_SERVICE, "service-2")
    loader.load_service_model(_SERVICE, "endpoint-rule-set-1")
    for name in ("endpoints", "partitions", "sdk-default-configuration"):
        loader.load_data(name)
    return session
