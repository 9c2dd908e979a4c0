"""Eventually consistent reads through a DAX cache cluster.

Amazon's client, the only one available, is blocking; it is called in separate threads.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from hf_async_store.errors import ConfigurationError, StorageError, UnavailableError
from hf_async_store.strategies.dynamodb.errors import of_client, translate
from hf_async_store.strategies.dynamodb.request_retry import Retries, retry
from hf_async_store.strategies.dynamodb.responses import convert

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hf_async_store.config import DynamoDBConfig

_MODULE: Final = "amazondax"
_METHODS: Final = {
    "GetItem": "get_item",
    "BatchGetItem": "batch_get_item",
    "Query": "query",
    "Scan": "scan",
}
_THREADS: Final = 16


class Cache:
    """A DAX cluster.

    Args:
        make_client: creates Amazon's client; called once, in a thread, at the first read.
    """

    def __init__(self, make_client: Callable[[], Any], retry_seconds: float) -> None:
        self._make_client = make_client
        self._retry_seconds = retry_seconds
        self._client: Any = None
        self._opening = asyncio.Lock()
        self._closing = asyncio.Event()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="dax")

    def can_serve(self, operation: str, params: Mapping[str, Any]) -> bool:
        """Whether the cache may serve this read: only if it need not be strongly consistent."""
        if operation == "BatchGetItem":
            return not any(each.get("ConsistentRead") for each in params["RequestItems"].values())
        return operation in _METHODS and not params.get("ConsistentRead")

    async def read(self, operation: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """The response to a read; transient failures are retried as those of DynamoDB are.

        Raises:
            StorageError.
        """
        return await retry(
            lambda: self._read_once(operation, params), Retries(self._retry_seconds, self._closing)
        )

    async def _read_once(self, operation: str, params: Mapping[str, Any]) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        try:
            async with self._opening:
                if self._client is None:
                    self._client = await loop.run_in_executor(self._threads, self._make_client)
            method = getattr(self._client, _METHODS[operation])
            response = await loop.run_in_executor(self._threads, lambda: method(**params))
        except Exception as exc:
            raise _store_error(exc) from exc
        return convert(operation, params, response)

    async def close(self) -> None:
        self._closing.set()
        client, self._client = self._client, None
        if client is not None:
            await asyncio.get_running_loop().run_in_executor(self._threads, client.close)
        self._threads.shutdown(wait=False)


def _store_error(exc: Exception) -> StorageError:
    response = getattr(exc, "response", None)
    if isinstance(response, dict) and response.get("Error"):
        error = response["Error"]
        if type(exc).__name__ == "DaxClientError":  # no response was received
            return UnavailableError(f"the DAX cluster cannot be used: {error.get('Code')}")
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 400)
        return translate(
            str(error.get("Code", "")), str(error.get("Message", "")), status, response
        )
    return of_client(exc, "the DAX cluster")


def cache_of(config: DynamoDBConfig) -> Cache | None:
    """The DAX cluster of a configuration; None if DAX is not enabled.

    Raises:
        ConfigurationError: DAX is enabled, but its endpoint or Amazon's client is missing.
    """
    if not config.enable_dax:
        return None
    if not config.dax_endpoint:
        raise ConfigurationError(
            "dynamodb_strategy.dax_endpoint: required by enable_dax; set it to the endpoint of "
            "the cluster (dax://... or daxs://...)"
        )
    if find_spec(_MODULE) is None:
        raise ConfigurationError(
            "dynamodb_strategy.enable_dax: Amazon's client is not installed; "
            "install hf_async_store[dax]"
        )
    return Cache(lambda: _amazon_client(config), config.retry_timeout)


def _amazon_client(config: DynamoDBConfig) -> Any:
    from botocore.session import Session  # type: ignore[import-untyped]  # it has no types

    session = Session(profile=config.profile)
    client = import_module(_MODULE).AmazonDaxClient
    return client(session, region_name=config.region, endpoint_url=config.dax_endpoint)
