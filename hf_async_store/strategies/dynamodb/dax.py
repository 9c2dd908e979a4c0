"""DAX: eventually consistent reads through a cache cluster, with Amazon's own client in threads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_async_store.config import DynamoDBConfig

if TYPE_CHECKING:
    from collections.abc import Mapping


class Cache:
    def takes(self, operation: str, params: Mapping[str, Any]) -> bool:
        return False

    async def read(self, operation: str, params: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    async def close(self) -> None: ...


def cache_of(config: DynamoDBConfig) -> Cache | None:
    return None
