"""`DynamoDBStorageStrategy`: the store on DynamoDB, and the verbs that only it has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from hf_async_store.config import DynamoDBConfig, StorageConfig, strategy_config
from hf_async_store.entities import ANY, HOST_FACTORY, Collection, Entity, Expect
from hf_async_store.strategies.dynamodb.engine import DynamoDBEngine
from hf_async_store.strategy import StorageStrategy, schema_of

if TYPE_CHECKING:
    from pathlib import Path


class DynamoDBStorageStrategy(StorageStrategy):
    """A store on DynamoDB.

    Args:
        config: `dynamodb://REGION/PREFIX`, a map in the spec's shape, a `StorageConfig` or a
            `DynamoDBConfig`.
        collections: what may be stored.

    Raises:
        ConfigurationError.
    """

    def __init__(
        self,
        config: StorageConfig | DynamoDBConfig | Mapping[str, object] | str | Path,
        *,
        collections: Iterable[Collection] = HOST_FACTORY,
    ) -> None:
        schema = schema_of(collections)
        self._dynamodb = DynamoDBEngine(strategy_config(config, DynamoDBConfig), schema)
        super().__init__(self._dynamodb, schema)

    async def create_tables(self) -> list[str]:
        """Make the tables and indexes that are declared and missing, and wait until they are there.

        Sets auto scaling and point-in-time recovery as configured. Safe when several processes do
        it at once; returns what this one made, in words.
        """
        self._usable()
        return await self._dynamodb.tables.create()
