"""The blocking store on DynamoDB."""

from __future__ import annotations

from hf_async_store.strategies.dynamodb import DynamoDBStorageStrategy
from hf_async_store.sync.calls import blocking
from hf_async_store.sync.store import Store


class DynamoDBStore(Store):
    """As `DynamoDBStorageStrategy`."""

    def __init__(self, store: DynamoDBStorageStrategy) -> None:
        super().__init__(store)

    create_tables = blocking(DynamoDBStorageStrategy.create_tables)
    compare_tables = blocking(DynamoDBStorageStrategy.compare_tables)
    query_by_gsi = blocking(DynamoDBStorageStrategy.query_by_gsi)
    _update_entity = blocking(DynamoDBStorageStrategy.update_entity)
    update_entity = _update_entity  # directly, mypy would infer the type of the base class
