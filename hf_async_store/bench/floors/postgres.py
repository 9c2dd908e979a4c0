"""Beneath the PostgreSQL store: the driver by hand, an operation each and all that wait together."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import asyncpg  # type: ignore[import-untyped]  # it has no types
import msgspec
from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from hf_async_store.bench.floors import rows
from hf_async_store.bench.floors.together import Together

if TYPE_CHECKING:
    from sqlalchemy import Table

    from hf_async_store.bench.data import Entity
    from hf_async_store.bench.plan import Place

_CREATE = 'CREATE TABLE IF NOT EXISTS machines (id TEXT COLLATE "C" PRIMARY KEY, doc TEXT NOT NULL)'
_UPSERT = "INSERT INTO machines VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET doc = excluded.doc"
_UPSERT_ALL = (
    "INSERT INTO machines SELECT * FROM unnest($1::text[], $2::text[]) "
    "ON CONFLICT (id) DO UPDATE SET doc = excluded.doc"
)
_INSERT_ALL = "INSERT INTO machines SELECT * FROM unnest($1::text[], $2::text[])"
_SELECT = "SELECT doc FROM machines WHERE id = $1"
_SELECT_ALL = "SELECT id, doc FROM machines WHERE id = ANY($1::text[])"
_CONNECTIONS = 32
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


def _row(machine: Entity) -> tuple[str, str]:
    return machine["machine_id"], _encode(machine).decode()


def _columns(machines: Sequence[Entity]) -> tuple[list[str], list[str]]:
    # In one order everywhere, so that two statements never wait for one another's rows.
    rows = sorted({each["machine_id"]: _row(each) for each in machines}.values())
    return [each[0] for each in rows], [each[1] for each in rows]


class _Plain:
    """The parts that are not measured, on one connection."""

    def __init__(self, place: Place, connection: Any) -> None:
        self._place = place
        self._connection = connection

    @staticmethod
    async def connect(place: Place) -> Any:
        connection = await asyncpg.connect(place.server)
        await connection.execute(_CREATE)
        return connection

    async def close(self) -> None:
        await self._connection.close()

    async def fill(self, machines: Sequence[Entity]) -> None:
        await self._connection.copy_records_to_table("machines", records=map(_row, machines))

    async def read_back(self, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
        found = await _select_all(self._connection, ids)
        return [found.get(each) for each in ids]


class Pool(_Plain):
    """An asyncpg pool as it comes: a connection is taken and given back for each operation."""

    _pool: Any

    @classmethod
    async def open(cls, place: Place) -> Self:
        target = cls(place, await cls.connect(place))
        target._pool = await asyncpg.create_pool(
            place.server, min_size=_CONNECTIONS, max_size=_CONNECTIONS
        )
        return target

    async def close(self) -> None:
        await self._pool.close()
        await super().close()

    async def save(self, machine: Entity) -> None:
        async with self._pool.acquire() as connection:
            await connection.execute(_UPSERT, *_row(machine))

    async def get(self, machine: str) -> Mapping[str, Any] | None:
        async with self._pool.acquire() as connection:
            return _decoded(await connection.fetchval(_SELECT, machine))


class Held(_Plain):
    """Connections that are held, each with its prepared statements."""

    _statements: asyncio.Queue[tuple[Any, Any]]
    _held: list[Any]

    @classmethod
    async def open(cls, place: Place) -> Self:
        target = cls(place, await cls.connect(place))
        target._held = [await cls.connect(place) for _ in range(_CONNECTIONS)]
        target._statements = asyncio.Queue()
        for each in target._held:
            target._statements.put_nowait(
                (await each.prepare(_UPSERT), await each.prepare(_SELECT))
            )
        return target

    async def close(self) -> None:
        for each in self._held:
            await each.close()
        await super().close()

    async def save(self, machine: Entity) -> None:
        statements = await self._statements.get()
        try:
            await statements[0].fetch(*_row(machine))
        finally:
            self._statements.put_nowait(statements)

    async def get(self, machine: str) -> Mapping[str, Any] | None:
        statements = await self._statements.get()
        try:
            return _decoded(await statements[1].fetchval(machine))
        finally:
            self._statements.put_nowait(statements)


class AsyncpgTogether(_Plain):
    """All that wait in one statement of arrays, on four connections."""

    def __init__(self, place: Place, connection: Any) -> None:
        super().__init__(place, connection)
        self._held: asyncio.Queue[Any] = asyncio.Queue()
        self._saves = Together(self._save_all, size=64, lanes=4)
        self._gets = Together(self._get_all, size=64, lanes=4)

    @classmethod
    async def open(cls, place: Place) -> Self:
        target = cls(place, await cls.connect(place))
        for _ in range(4):
            target._held.put_nowait(await cls.connect(place))
        return target

    async def close(self) -> None:
        while not self._held.empty():
            await self._held.get_nowait().close()
        await super().close()

    async def save(self, machine: Entity) -> None:
        await self._saves(machine)

    async def get(self, machine: str) -> Mapping[str, Any] | None:
        return await self._gets(machine)

    async def create_many(self, machines: Sequence[Entity]) -> None:
        await self._write(_INSERT_ALL, machines)

    async def save_many(self, machines: Sequence[Entity]) -> None:
        await self._write(_UPSERT_ALL, machines)

    async def acquire(self, request: Entity, machines: Sequence[Entity]) -> None:
        await self.create_many([{"machine_id": request["request_id"]}, *machines])

    async def _save_all(self, machines: Sequence[Entity]) -> Sequence[None]:
        await self._write(_UPSERT_ALL, machines)
        return [None] * len(machines)

    async def _write(self, statement: str, machines: Sequence[Entity]) -> None:
        connection = await self._held.get()
        try:
            await connection.execute(statement, *_columns(machines))
        finally:
            self._held.put_nowait(connection)

    async def _get_all(self, ids: Sequence[str]) -> Sequence[Mapping[str, Any] | None]:
        connection = await self._held.get()
        try:
            found = await _select_all(connection, ids)
        finally:
            self._held.put_nowait(connection)
        return [found.get(each) for each in ids]


class MultiRow:
    """One multi-row INSERT of whole machines in one transaction."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    @classmethod
    async def open(cls, place: Place) -> Self:
        connection = await asyncpg.connect(place.server)
        await rows.make_postgres(connection)
        return cls(connection)

    async def close(self) -> None:
        await self._connection.close()

    async def fill(self, machines: Sequence[Entity]) -> None:
        templates, requests = rows.parents_of(machines)
        await rows.add_parents_postgres(self._connection, templates, requests)
        await rows.insert_postgres(self._connection, machines)

    async def read_back(self, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
        found = await self._connection.fetch(rows.SELECT_POSTGRESQL, list(ids))
        stored = {each[0]: rows.entity_of(each) for each in found}
        return [stored.get(each) for each in ids]

    async def create_many(self, machines: Sequence[Entity]) -> None:
        await rows.insert_postgres(self._connection, machines)

    async def acquire(self, request: Entity, machines: Sequence[Entity]) -> None:
        await rows.insert_postgres(self._connection, machines, request)


class Core(_Plain):
    """SQLAlchemy Core async on asyncpg in autocommit: a statement each."""

    _engine: AsyncEngine
    _table: Table

    @classmethod
    async def open(cls, place: Place) -> Self:
        from hf_async_store.bench.floors.sqlite import TABLE

        target = cls(place, await cls.connect(place))
        url = place.server.replace("postgresql://", "postgresql+asyncpg://", 1)
        target._engine = create_async_engine(
            url, isolation_level="AUTOCOMMIT", pool_size=_CONNECTIONS
        )
        target._table = TABLE
        return target

    async def close(self) -> None:
        await self._engine.dispose()
        await super().close()

    async def save(self, machine: Entity) -> None:
        name, doc = _row(machine)
        statement = insert(self._table).values(id=name, doc=doc)
        async with self._engine.connect() as connection:
            await connection.execute(
                statement.on_conflict_do_update(
                    index_elements=["id"], set_={"doc": statement.excluded.doc}
                )
            )

    async def get(self, machine: str) -> Mapping[str, Any] | None:
        async with self._engine.connect() as connection:
            statement = select(self._table.c.doc).where(self._table.c.id == machine)
            return _decoded((await connection.execute(statement)).scalar())


async def _select_all(connection: Any, ids: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    return {row[0]: _decode(row[1]) for row in await connection.fetch(_SELECT_ALL, list(ids))}


def _decoded(doc: str | None) -> Mapping[str, Any] | None:
    if doc is None:
        return None
    entity: Mapping[str, Any] = _decode(doc)
    return entity
