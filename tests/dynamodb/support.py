"""Helpers of the tests of the DynamoDB strategy."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from hf_async_store import HOST_FACTORY, DynamoDBStorageStrategy
from hf_async_store.testing.harness import CONTRACT_COLLECTIONS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hf_async_store import Collection


def new_prefix() -> str:
    return f"d{secrets.token_hex(6)}"


def store_at(
    url: str,
    prefix: str | None = None,
    collections: Iterable[Collection] = CONTRACT_COLLECTIONS,
    **settings: Any,
) -> DynamoDBStorageStrategy:
    """A store on the server at this address, not opened yet."""
    block = {
        "region": "us-east-1",
        "table_prefix": prefix or new_prefix(),
        "endpoint_url": url,
        **settings,
    }
    return DynamoDBStorageStrategy(
        {"strategy": "dynamodb", "dynamodb_strategy": block}, collections=collections
    )


__all__ = ["HOST_FACTORY", "new_prefix", "store_at"]
