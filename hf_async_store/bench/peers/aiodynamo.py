"""aiodynamo on aiohttp: an async DynamoDB client that signs by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Self

from aiodynamo.client import Client
from aiodynamo.credentials import Key, StaticCredentials
from aiodynamo.errors import ItemNotFound
from aiodynamo.http.aiohttp import AIOHTTP
from aiodynamo.models import BatchWriteRequest, KeySchema, KeySpec, KeyType, PayPerRequest
from aiohttp import ClientSession
from yarl import URL

if TYPE_CHECKING:
    from hf_async_store.bench.data import Entity
    from hf_async_store.bench.plan import Place

_KEY = "machine_id"
_BATCH = 25
_AT_ONCE = 8


class Target:
    def __init__(self, client: Client, table: str, stack: AsyncExitStack) -> None:
        self._client = client
        self._table = table
        self._stack = stack

    @classmethod
    async def open(cls, place: Place) -> Self:
        stack = AsyncExitStack()
        session = await stack.enter_async_context(ClientSession())
        credentials = StaticCredentials(Key(id="bench", secret="bench"))
        client = Client(AIOHTTP(session), credentials, "eu-west-1", URL(place.server))
        table = f"{place.prefix}-aiodynamo"
        if not await client.table_exists(table):
            keys = KeySchema(KeySpec(_KEY, KeyType.string))
            await client.create_table(table, PayPerRequest(), keys)
        return cls(client, table, stack)

    async def close(self) -> None:
        await self._stack.aclose()

    async def fill(self, machines: Sequence[Entity]) -> None:
        await self.create_many(machines)

    async def create_many(self, machines: Sequence[Entity]) -> None:
        """In batches of 25, eight at once."""
        gate = asyncio.Semaphore(_AT_ONCE)

        async def put(some: Sequence[Entity]) -> None:
            async with gate:
                left = list(some)
                while left:
                    request = {self._table: BatchWriteRequest(items_to_put=left)}
                    answer = (await self._client.batch_write(request)).get(self._table)
                    left = answer.unput_items if answer else []

        async with asyncio.TaskGroup() as group:
            for start in range(0, len(machines), _BATCH):
                group.create_task(put(machines[start : start + _BATCH]))

    async def read_back(self, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
        return [await self.get(each) for each in ids]

    async def save(self, machine: Entity) -> None:
        await self._client.put_item(self._table, machine)

    async def get(self, machine: str) -> Mapping[str, Any] | None:
        try:
            return await self._client.get_item(self._table, {_KEY: machine}, consistent_read=True)
        except ItemNotFound:
            return None
