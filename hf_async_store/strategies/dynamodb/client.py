"""The connection of a store: one client of aiobotocore, made at the first use.

Calls of the data plane do not go through the client's methods, whose way of building, signing,
checking and parsing a request costs 500 to 700 microseconds of CPU whatever it carries: the body is
written and read by msgspec, signed by botocore's own signer with the client's credentials, and sent
through the client's own pool of connections, with its proxies, certificates and timeouts.
`docs/decisions` tells what was measured.
"""

from __future__ import annotations

import asyncio
import zlib
from contextlib import AsyncExitStack
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final

import msgspec

from hf_async_store.config import DynamoDBConfig
from hf_async_store.engine import finish
from hf_async_store.errors import StorageError, StoreClosedError
from hf_async_store.strategies.dynamodb.errors import AnswerLost, of_client, translate
from hf_async_store.strategies.dynamodb.retries import retried

if TYPE_CHECKING:
    from collections.abc import Mapping

_ENCODE: Final = msgspec.json.Encoder().encode
_DECODE: Final = msgspec.json.Decoder(dict[str, Any]).decode
_SERVICE: Final = "dynamodb"
_LARGE_BODY: Final = 2**20


class Client:
    """Requests to DynamoDB, each tried once; its failures come out as the store's errors."""

    def __init__(self, config: DynamoDBConfig) -> None:
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
            StorageError: by `errors.translate`.
        """
        connection = self._connection or await self.connection()
        return await connection.call(operation, params)

    async def read(self, operation: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request that may be sent any number of times; failures are outlasted."""
        return await retried(
            lambda: self.call(operation, params), self.config.retry_timeout, harmless=True
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
            await finish(connection.close())


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
        self._region = client.meta.region_name
        self._request = AWSRequest
        self._signer = SigV4Auth
        self.region: str = self._region

    async def call(self, operation: str, params: Mapping[str, Any]) -> dict[str, Any]:
        try:
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
            response = await self._send(prepared)
            body = await response.content
        except Exception as exc:
            raise of_client(exc) from exc
        return _answer(response.status_code, response.headers, body)

    async def close(self) -> None:
        await self._stack.aclose()


def _answer(status: int, headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
    """What an answer says.

    Raises:
        StorageError.
    """
    checksum = headers.get("x-amz-crc32")
    if checksum is not None and int(checksum) != zlib.crc32(body):
        raise AnswerLost("the answer of DynamoDB came damaged", outcome_unknown=True)
    try:
        answer = _DECODE(body) if body else {}
    except msgspec.DecodeError as exc:
        if status < 300:
            raise AnswerLost("the answer of DynamoDB came torn", outcome_unknown=True) from exc
        answer = {}
    if status < 300:
        return answer
    message = answer.get("message") or answer.get("Message") or ""
    raise translate(str(answer.get("__type", "")), str(message), status, answer)


async def _connect(config: DynamoDBConfig) -> _Connection:
    """A new client. What botocore reads and imports for it is read in a thread."""
    try:
        session, make_config = await asyncio.to_thread(_prepare, config)
        stack = AsyncExitStack()
        client = await stack.enter_async_context(
            session.create_client(
                _SERVICE,
                region_name=config.region,
                endpoint_url=config.endpoint,
                config=make_config(
                    parameter_validation=False,
                    connect_timeout=config.connect_timeout,
                    read_timeout=config.read_timeout,
                    max_pool_connections=config.max_pool_connections,
                    retries={"total_max_attempts": 1},
                ),
            )
        )
        credentials = await session.get_credentials()
        if credentials is None:
            await stack.aclose()
            from botocore.exceptions import NoCredentialsError  # type: ignore[import-untyped]

            raise NoCredentialsError
        return _Connection(client, credentials, stack, session)
    except Exception as exc:
        raise of_client(exc) from exc


def _prepare(config: DynamoDBConfig) -> tuple[Any, Any]:
    """A session with the service model in its cache: the slow part, which blocks."""
    from aiobotocore.config import AioConfig  # type: ignore[import-untyped]  # it has no types
    from aiobotocore.session import AioSession  # type: ignore[import-untyped]

    session = AioSession(profile=config.profile)
    loader = session.get_component("data_loader")
    loader.load_service_model(_SERVICE, "service-2")
    loader.load_service_model(_SERVICE, "endpoint-rule-set-1")
    for name in ("endpoints", "partitions", "sdk-default-configuration"):
        loader.load_data(name)
    return session, AioConfig
