"""The DynamoDB strategy."""

from __future__ import annotations

from hf_async_store.strategies.dynamodb.strategy import DynamoDBStorageStrategy

__all__ = ["DynamoDBStorageStrategy"]
