"""Competitors: what a user would pick instead, each as its own documentation says to use it.

None of them is required: each is imported when it is opened, and what is not installed is listed as
skipped. Most know neither versions nor transactions, so read their figures with what they promise.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias

import msgspec

from hf_async_store_bench.data import batches

if TYPE_CHECKING:
    from hf_async_store_bench.data import Entity
    from hf_async_store_bench.messages import Environment

Machine: TypeAlias = Mapping[str, Any]

_KEY: Final = "machine_id"
_BATCH: Final = 25
_AT_ONCE: Final = 8
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


class Competitor:
    """Filled by its own batches and read back one by one, unless it can do better."""

    def __init__(self, library: Any, name: str = "") -> None:
        self.library = library
        self.name = name

    @classmethod
    async def open(cls, environment: Environment) -> Self:
        raise NotImplementedError

    async def close(self) -> None:
        """Release everything."""

    async def save(self, machine: Entity) -> None:
        raise NotImplementedError

    async def get(self, machine: str) -> Machine | None:
        raise NotImplementedError

    async def create_many(self, machines: Sequence[Entity]) -> None:
        raise NotImplementedError

    async def fill(self, machines: Sequence[Entity]) -> None:
        await self.create_many(machines)

    async def read_back(self, ids: Sequence[str]) -> list[Machine | None]:
        return [await self.get(each) for each in ids]


class TinyDB(Competitor):
    """A JSON file that is written whole at every change, without a sync."""

    @classmethod
    async def open(cls, environment: Environment) -> Self:
        from tinydb import TinyDB as Library

        return cls(Library(Path(environment.folder) / "tinydb.json"))

    async def close(self) -> None:
        self.library.close()

    async def save(self, machine: Entity) -> None:
        from tinydb import where

        self.library.upsert(machine, where(_KEY) == machine[_KEY])

    async def get(self, machine: str) -> Machine | None:
        from tinydb import where

        found: Machine | None = self.library.get(where(_KEY) == machine)
        return found

    async def create_many(self, machines: Sequence[Entity]) -> None:
        self.library.insert_multiple(machines)

    async def read_back(self, ids: Sequence[str]) -> list[Machine | None]:
        stored = {each[_KEY]: each for each in self.library.all()}
        return [stored.get(each) for each in ids]


class Orb(Competitor):
    """orb-py's own JSON storage: it blocks, and writes its whole file at every save."""

    @classmethod
    async def open(cls, environment: Environment) -> Self:
        from orb.infrastructure.storage.json.strategy import JSONStorageStrategy

        logging.disable(logging.INFO)  # it logs every save
        return cls(JSONStorageStrategy(str(Path(environment.folder) / "machines.json")))

    async def close(self) -> None:
        self.library.cleanup()

    async def save(self, machine: Entity) -> None:
        self.library.save(machine[_KEY], machine)

    async def get(self, machine: str) -> Machine | None:
        found: Machine | None = self.library.find_by_id(machine)
        return found

    async def create_many(self, machines: Sequence[Entity]) -> None:
        self.library.save_batch({each[_KEY]: each for each in machines})


class DiskCache(Competitor):
    """A synchronous map on SQLite, that does not sync."""

    @classmethod
    async def open(cls, environment: Environment) -> Self:
        from diskcache import Cache

        return cls(Cache(environment.folder, eviction_policy="none"))

    async def close(self) -> None:
        self.library.close()

    async def save(self, machine: Entity) -> None:
        self.library.set(machine[_KEY], machine)

    async def get(self, machine: str) -> Machine | None:
        found: Machine | None = self.library.get(machine)
        return found

    async def create_many(self, machines: Sequence[Entity]) -> None:
        with self.library.transact():
            for each in machines:
                self.library.set(each[_KEY], each)


class KeyValueDisk(Competitor):
    """py-key-value-aio, one async interface over many stores: its store on diskcache."""

    @classmethod
    async def open(cls, environment: Environment) -> Self:
        from key_value.aio.stores.disk import DiskStore

        store = DiskStore(directory=environment.folder)
        await store.setup()
        return cls(store)

    async def close(self) -> None:
        await self.library.close()

    async def save(self, machine: Entity) -> None:
        await self.library.put(machine[_KEY], machine)

    async def get(self, machine: str) -> Machine | None:
        found: Machine | None = await self.library.get(machine)
        return found

    async def create_many(self, machines: Sequence[Entity]) -> None:
        await self.library.put_many([each[_KEY] for each in machines], machines)


class KeyValuePostgreSQL(KeyValueDisk):
    """Its store on an asyncpg pool of its own."""

    @classmethod
    async def open(cls, environment: Environment) -> Self:
        from key_value.aio.stores.postgresql import PostgreSQLStore

        store = PostgreSQLStore(url=environment.server)
        await store.__aenter__()
        return cls(store)

    async def close(self) -> None:
        await self.library.__aexit__(None, None, None)


class AdvancedAlchemy(Competitor):
    """Repositories over SQLAlchemy's ORM, a session for each operation, on SQLite in WAL mode."""

    engine: Any
    row: Any
    repository: Any

    @classmethod
    async def open(cls, environment: Environment) -> Self:
        from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

        from hf_async_store_bench.baselines.sqlite import on_connect

        file = Path(environment.folder) / "competitor.sqlite"
        engine = on_connect(create_async_engine(f"sqlite+aiosqlite:///{file}"), environment)
        adapter = cls(async_sessionmaker(engine, expire_on_commit=False))
        adapter.engine = engine
        adapter.row, adapter.repository = _alchemy_classes()
        async with engine.begin() as connection:
            await connection.run_sync(adapter.row.metadata.create_all)
        return adapter

    async def close(self) -> None:
        await self.engine.dispose()

    def _row(self, machine: Entity) -> Any:
        return self.row(id=machine[_KEY], doc=_encode(machine).decode())

    async def save(self, machine: Entity) -> None:
        async with self.library() as session:
            await self.repository(session=session, auto_commit=True).upsert(self._row(machine))

    async def get(self, machine: str) -> Machine | None:
        async with self.library() as session:
            row = await self.repository(session=session).get_one_or_none(id=machine)
        found: Machine | None = None if row is None else _decode(row.doc)
        return found

    async def create_many(self, machines: Sequence[Entity]) -> None:
        async with self.library() as session:
            rows = list(map(self._row, machines))
            await self.repository(session=session, auto_commit=True).add_many(rows)


@cache
def _alchemy_classes() -> tuple[Any, Any]:
    """The mapped class and its repository; a table can be declared once."""
    from advanced_alchemy.base import DefaultBase
    from advanced_alchemy.repository import SQLAlchemyAsyncRepository
    from sqlalchemy import Column, String

    columns = {"id": Column(String, primary_key=True), "doc": Column(String)}
    row = type("Row", (DefaultBase,), {"__tablename__": "machines", **columns})
    return row, type("Machines", (SQLAlchemyAsyncRepository,), {"model_type": row})


class AioDynamo(Competitor):
    """aiodynamo on aiohttp: an async DynamoDB client that signs by itself."""

    stack: AsyncExitStack

    @classmethod
    async def open(cls, environment: Environment) -> Self:
        from aiodynamo.client import Client
        from aiodynamo.credentials import Key, StaticCredentials
        from aiodynamo.http.aiohttp import AIOHTTP
        from aiodynamo.models import KeySchema, KeySpec, KeyType, PayPerRequest
        from aiohttp import ClientSession
        from yarl import URL

        stack = AsyncExitStack()
        session = await stack.enter_async_context(ClientSession())
        credentials = StaticCredentials(Key(id="bench", secret="bench"))
        client = Client(AIOHTTP(session), credentials, "eu-west-1", URL(environment.server))
        adapter = cls(client, f"{environment.prefix}-aiodynamo")
        adapter.stack = stack
        if not await client.table_exists(adapter.name):
            keys = KeySchema(KeySpec(_KEY, KeyType.string))
            await client.create_table(adapter.name, PayPerRequest(), keys)
        return adapter

    async def close(self) -> None:
        await self.stack.aclose()

    async def create_many(self, machines: Sequence[Entity]) -> None:
        """In batches of 25, eight at once."""
        from aiodynamo.models import BatchWriteRequest

        gate = asyncio.Semaphore(_AT_ONCE)

        async def put(left: Sequence[Entity]) -> None:
            async with gate:
                while left:
                    request = {self.name: BatchWriteRequest(items_to_put=list(left))}
                    answer = (await self.library.batch_write(request)).get(self.name)
                    left = answer.unput_items if answer else []

        async with asyncio.TaskGroup() as group:
            for batch in batches(machines, _BATCH):
                group.create_task(put(batch))

    async def save(self, machine: Entity) -> None:
        await self.library.put_item(self.name, machine)

    async def get(self, machine: str) -> Machine | None:
        from aiodynamo.errors import ItemNotFound

        try:
            found: Machine = await self.library.get_item(
                self.name, {_KEY: machine}, consistent_read=True
            )
        except ItemNotFound:
            return None
        return found


class Pydynox(Competitor):
    """pydynox: an async DynamoDB client whose core is written in Rust."""

    @classmethod
    async def open(cls, environment: Environment) -> Self:
        from pydynox import DynamoDBClient

        keys = {"access_key": "bench", "secret_key": "bench"}
        client = DynamoDBClient(region="eu-west-1", endpoint_url=environment.server, **keys)
        name = f"{environment.prefix}-pydynox"
        if not await client.table_exists(name):
            await client.create_table(name, (_KEY, "S"), wait=True)
        return cls(client, name)

    async def save(self, machine: Entity) -> None:
        await self.library.put_item(self.name, machine)

    async def get(self, machine: str) -> Machine | None:
        found: Machine | None = await self.library.get_item(
            self.name, {_KEY: machine}, consistent_read=True
        )
        return found

    async def create_many(self, machines: Sequence[Entity]) -> None:
        await self.library.batch_write(self.name, put_items=list(machines))
