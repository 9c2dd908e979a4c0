"""pydynox: an async DynamoDB client whose core is written in Rust."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from pydynox import DynamoDBClient

if TYPE_CHECKING:
    from hf_async_store.bench.data import Entity
    from hf_async_store.bench.plan import Place

_KEY = "machine_id"


class Target:
    def __init__(self, client: DynamoDBClient, table: str) -> None:
        self._client = client
        self._table = table

    @classmethod
    async def open(cls, place: Place) -> Self:
        client = DynamoDBClient(
            region="eu-west-1",
            access_key="bench",
            secret_key="bench",
            endpoint_url=place.server,
        )
        table = f"{place.prefix}-pydynox"
        if not await client.table_exists(table):
            await client.create_table(table, (_KEY, "S"), wait=True)
        return cls(client, table)

    async def close(self) -> None:
        pass  # it has nothing to close

    async def fill(self, machines: Sequence[Entity]) -> None:
        await self.create_many(machines)

    async def read_back(self, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
        return [await self.get(each) for each in ids]

    async def save(self, machine: Entity) -> None:
        await self._client.put_item(self._table, machine)

    async def get(self, machine: str) -> Mapping[str, Any] | None:
        return await self._client.get_item(self._table, {_KEY: machine}, consistent_read=True)

    async def create_many(self, machines: Sequence[Entity]) -> None:
        await self._client.batch_write(self._table, put_items=list(machines))
