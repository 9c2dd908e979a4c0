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
from aiodynamo.models import KeySchema, KeySpec, KeyType, PayPerRequest
from aiohttp import ClientSession
from yarl import URL

if TYPE_CHECKING:
    from hf_async_store.bench.data import Entity
    from hf_async_store.bench.plan import Place

_KEY = "machine_id"
_AT_ONCE = 32


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
        gate = asyncio.Semaphore(_AT_ONCE)

        async def put(machine: Entity) -> None:
            async with gate:
                await self.save(machine)

        async with asyncio.TaskGroup() as group:
            for each in machines:
                group.create_task(put(each))

    async def read_back(self, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
        return [await self.get(each) for each in ids]

    async def save(self, machine: Entity) -> None:
        await self._client.put_item(self._table, machine)

    async def get(self, machine: str) -> Mapping[str, Any] | None:
        try:
            return await self._client.get_item(self._table, {_KEY: machine}, consistent_read=True)
        except ItemNotFound:
            return None
