"""Baselines of the PostgreSQL engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg  # type: ignore[import-untyped]  # it has no types
from sqlalchemy.ext.asyncio import create_async_engine

from hf_async_store_bench.baselines import Baseline, tables
from hf_async_store_bench.baselines.batching import BatchedOperations, Batching
from hf_async_store_bench.data import Entity, utc_now

_CONNECTIONS = 32
_BATCHES_AT_ONCE = 4
_VALUES = tables.marks("postgresql", len(tables.COLUMNS))
_UPSERT = f"{tables.INTO_MACHINES} VALUES ({_VALUES}) {tables.ON_CONFLICT}"
_ARRAYS = ", ".join(
    f"{mark}::{'jsonb' if name == 'doc' else 'bigint' if name == 'version' else 'text'}[]"
    for mark, name in zip(_VALUES.split(", "), tables.COLUMNS, strict=True)
)
_INSERT_ALL = f"{tables.INTO_MACHINES} SELECT * FROM unnest({_ARRAYS})"
_UPSERT_ALL = f"{_INSERT_ALL} {tables.ON_CONFLICT}"
_SELECT = f"{tables.SELECT} = $1"
_SELECT_ALL = f"{tables.SELECT} = ANY($1::text[])"
_INSERT_TEMPLATES = "INSERT INTO hand_templates SELECT unnest($1::text[])"
_INSERT_REQUEST = f"{tables.INTO_REQUESTS} VALUES ({tables.marks('postgresql', 8)})"


def _columns(machines: Sequence[Entity]) -> list[Sequence[Any]]:
    return list(zip(*tables.rows_of(machines), strict=True))


class _Baseline(Baseline):
    """The parts that are not measured, on a connection of their own."""

    async def start(self) -> None:
        self.connection = await self.connect()
        for each in tables.ddl("postgresql"):
            await self.connection.execute(each)

    async def connect(self) -> Any:
        connection = await asyncpg.connect(self.environment.server)
        self.stack.push_async_callback(connection.close)
        return connection

    async def fill(self, machines: Sequence[Entity]) -> None:
        templates, requests = tables.parents_of(machines)
        rows = list(map(tables.request_of, requests))
        await self.connection.execute(f"{_INSERT_TEMPLATES} ON CONFLICT DO NOTHING", templates)
        await self.connection.executemany(f"{_INSERT_REQUEST} ON CONFLICT DO NOTHING", rows)
        await self.connection.execute(_INSERT_ALL, *_columns(machines))

    async def read_back(self, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
        return await _select_all(self.connection, ids)


class _Each(_Baseline):
    """A connection is taken and given back for each operation."""

    taken: Any

    async def save(self, machine: Entity) -> None:
        row = tables.row_of(machine, utc_now())
        async with self.taken() as connection:
            await connection.execute(_UPSERT, *row)

    async def get(self, machine: str) -> Mapping[str, Any] | None:
        async with self.taken() as connection:
            return tables.entity_of(await connection.fetchrow(_SELECT, machine))


class Pool(_Each):
    """asyncpg's pool of 32 connections as it comes (it resets each connection on release); a statement
    for each operation."""

    async def start(self) -> None:
        await super().start()
        size = {"min_size": _CONNECTIONS, "max_size": _CONNECTIONS}
        pool = asyncpg.create_pool(self.environment.server, **size)
        self._pool = await self.stack.enter_async_context(pool)

    def taken(self) -> Any:
        return self._pool.acquire()


class Held(_Each):
    """32 connections that are never reset; a prepared statement for each operation."""

    count = _CONNECTIONS

    async def start(self) -> None:
        await super().start()
        self._idle: asyncio.Queue[Any] = asyncio.Queue()
        for _ in range(self.count):
            self._idle.put_nowait(await self.connect())

    @asynccontextmanager
    async def taken(self) -> AsyncIterator[Any]:
        connection = await self._idle.get()
        try:
            yield connection
        finally:
            self._idle.put_nowait(connection)


class Batched(BatchedOperations, Held):
    """Up to 64 waiting operations as one statement of arrays, on 4 connections; imports by COPY."""

    count = _BATCHES_AT_ONCE

    async def start(self) -> None:
        await super().start()
        self._saves = Batching(self.save_many, size=64, at_once=_BATCHES_AT_ONCE)
        self._gets = Batching(self._get_all, size=64, at_once=_BATCHES_AT_ONCE)

    async def save_many(self, machines: Sequence[Entity]) -> None:
        async with self.taken() as connection:
            await connection.execute(_UPSERT_ALL, *_columns(machines))

    async def import_many(self, machines: Sequence[Entity]) -> None:
        rows = tables.rows_of(machines)
        async with self.taken() as connection:
            copy = connection.copy_records_to_table
            await copy("hand_machines", records=rows, columns=tables.COLUMNS)

    async def rows(self, statement: str, arguments: Sequence[str]) -> Any:
        async with self.taken() as connection:
            return await connection.fetch(statement, *arguments)

    async def _get_all(self, ids: Sequence[str]) -> Sequence[Mapping[str, Any] | None]:
        async with self.taken() as connection:
            return await _select_all(connection, ids)


class MultiRow(_Baseline):
    """One INSERT of arrays, in one transaction."""

    async def start(self) -> None:
        await super().start()
        self._turn = asyncio.Lock()

    async def create_many(self, machines: Sequence[Entity]) -> None:
        async with self._turn:
            await self.connection.execute(_INSERT_ALL, *_columns(machines))

    async def acquire(self, request: Entity, machines: Sequence[Entity]) -> None:
        columns = _columns(machines)
        async with self._turn, self.connection.transaction():
            await self.connection.execute(_INSERT_REQUEST, *tables.request_of(request))
            await self.connection.execute(_INSERT_ALL, *columns)


class Core(tables.CoreOperations, _Baseline):
    """create_async_engine with 32 connections in autocommit; a statement each."""

    upsert = tables.upsert("postgresql")

    async def start(self) -> None:
        await super().start()
        url = self.environment.server.replace("postgresql://", "postgresql+asyncpg://", 1)
        how = {"isolation_level": "AUTOCOMMIT", "pool_size": _CONNECTIONS}
        texts = {"json_serializer": str, "json_deserializer": str}  # rows hold documents as text
        self.engine = create_async_engine(url, **how, **texts)
        self.stack.push_async_callback(self.engine.dispose)


async def _select_all(connection: Any, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
    rows = await connection.fetch(_SELECT_ALL, list(ids))
    found = {each[0]: tables.entity_of(each) for each in rows}
    return [found.get(each) for each in ids]
