"""Competitors: what a user would pick instead, each as its own documentation says to use it.

Each is imported when it is opened. Most know neither versions nor transactions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import cache
from inspect import isawaitable
from pathlib import Path
from typing import Any, Final, Self

import msgspec

from hf_async_store_bench.concurrency import side_by_side
from hf_async_store_bench.data import Entity, batches
from hf_async_store_bench.messages import Environment

_KEY: Final = "machine_id"


@dataclass
class Competitor:
    """What a library does for each operation, in functions that are asynchronous or block; `everything`
    gives all that is stored, where reading it one by one would take too long."""

    _save: Callable[[Entity], Any]
    _get: Callable[[str], Any]
    _create_many: Callable[[Sequence[Entity]], Any]
    _close: Callable[[], Any] = lambda: None
    _everything: Callable[[], Sequence[Entity]] | None = None

    async def close(self) -> None:
        await _result(self._close())

    async def save(self, machine: Entity) -> None:
        await _result(self._save(machine))

    async def get(self, machine: str) -> Mapping[str, Any] | None:
        return await _result(self._get(machine))

    async def create_many(self, machines: Sequence[Entity]) -> None:
        await _result(self._create_many(machines))

    fill = create_many

    async def read_back(self, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
        if self._everything is None:
            return [await self.get(each) for each in ids]
        stored = {each[_KEY]: each for each in self._everything()}
        return [stored.get(each) for each in ids]


async def _result(outcome: Any) -> Any:
    return await outcome if isawaitable(outcome) else outcome


class TinyDB(Competitor):
    """A JSON file that is written whole at every change, without a sync."""

    @classmethod
    async def open(cls, environment: Environment) -> Self:
        import tinydb

        database = tinydb.TinyDB(Path(environment.folder) / "tinydb.json")
        key = tinydb.where(_KEY)
        others = (database.insert_multiple, database.close, database.all)
        return cls(
            lambda machine: database.upsert(machine, key == machine[_KEY]),
            lambda machine: database.get(key == machine),
            *others,
        )


class Orb(Competitor):
    """orb-py's own JSON storage: it blocks, and writes its whole file at every save."""

    @classmethod
    async def open(cls, environment: Environment) -> Self:
        from orb.infrastructure.storage.json.strategy import JSONStorageStrategy

        logging.disable(logging.INFO)  # it logs every save
        storage = JSONStorageStrategy(str(Path(environment.folder) / "machines.json"))
        return cls(
            lambda machine: storage.save(machine[_KEY], machine),
            storage.find_by_id,
            lambda machines: storage.save_batch({each[_KEY]: each for each in machines}),
            storage.cleanup,
        )


class DiskCache(Competitor):
    """A synchronous map on SQLite, that does not sync."""

    @classmethod
    async def open(cls, environment: Environment) -> Self:
        from diskcache import Cache

        stored = Cache(environment.folder, eviction_policy="none")

        def create_many(machines: Sequence[Entity]) -> None:
            with stored.transact():
                for each in machines:
                    stored.set(each[_KEY], each)

        others = (stored.get, create_many, stored.close)
        return cls(lambda machine: stored.set(machine[_KEY], machine), *others)


class KeyValuePostgreSQL(Competitor):
    """py-key-value-aio, one async interface over many stores: its store on an asyncpg pool."""

    @classmethod
    async def open(cls, environment: Environment) -> Self:
        from key_value.aio.stores.postgresql import PostgreSQLStore

        store = PostgreSQLStore(url=environment.server)
        await store.__aenter__()
        return cls(
            lambda machine: store.put(machine[_KEY], machine),
            store.get,
            lambda machines: store.put_many([i[_KEY] for i in machines], machines),
            lambda: store.__aexit__(None, None, None),
        )


class AdvancedAlchemy(Competitor):
    """Repositories over SQLAlchemy's ORM, a session for each operation, on SQLite in WAL mode."""

    @classmethod
    async def open(cls, environment: Environment) -> Self:
        from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

        from hf_async_store_bench.baselines.sqlite import on_connect

        file = Path(environment.folder) / "competitor.sqlite"
        engine = on_connect(create_async_engine(f"sqlite+aiosqlite:///{file}"), environment)
        row_type, repository = _alchemy_classes()
        session_of = async_sessionmaker(engine, expire_on_commit=False)
        async with engine.begin() as connection:
            await connection.run_sync(row_type.metadata.create_all)

        def row_of(machine: Entity) -> Any:
            return row_type(id=machine[_KEY], doc=msgspec.json.encode(machine).decode())

        async def save(machine: Entity) -> None:
            async with session_of() as session:
                await repository(session=session, auto_commit=True).upsert(row_of(machine))

        async def get(machine: str) -> Any:
            async with session_of() as session:
                row = await repository(session=session).get_one_or_none(id=machine)
            return None if row is None else msgspec.json.decode(row.doc)

        async def create_many(machines: Sequence[Entity]) -> None:
            async with session_of() as session:
                rows = list(map(row_of, machines))
                await repository(session=session, auto_commit=True).add_many(rows)

        return cls(save, get, create_many, engine.dispose)


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

    @classmethod
    async def open(cls, environment: Environment) -> Self:
        from aiodynamo.client import Client
        from aiodynamo.credentials import Key, StaticCredentials
        from aiodynamo.errors import ItemNotFound
        from aiodynamo.http.aiohttp import AIOHTTP
        from aiodynamo.models import BatchWriteRequest, KeySchema, KeySpec, KeyType, PayPerRequest
        from aiohttp import ClientSession
        from yarl import URL

        stack = AsyncExitStack()
        session = await stack.enter_async_context(ClientSession())
        credentials = StaticCredentials(Key(id="bench", secret="bench"))
        client = Client(AIOHTTP(session), credentials, "eu-west-1", URL(environment.server))
        name = f"{environment.prefix}-aiodynamo"
        if not await client.table_exists(name):
            keys = KeySchema(KeySpec(_KEY, KeyType.string))
            await client.create_table(name, PayPerRequest(), keys)

        async def put(left: Sequence[Entity]) -> None:
            while left:
                request = {name: BatchWriteRequest(items_to_put=list(left))}
                answer = (await client.batch_write(request)).get(name)
                left = answer.unput_items if answer else []

        async def get(machine: str) -> Any:
            try:
                return await client.get_item(name, {_KEY: machine}, consistent_read=True)
            except ItemNotFound:
                return None

        return cls(
            lambda machine: client.put_item(name, machine),
            get,
            lambda machines: side_by_side(put, batches(machines, 25), 8),
            stack.aclose,
        )
