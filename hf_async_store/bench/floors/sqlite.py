"""Beneath the SQLite store: the driver by hand, an operation each and all that wait together."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import aiosqlite
import msgspec
from sqlalchemy import Column, MetaData, Table, Text, event, insert, select
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from hf_async_store.bench.floors import rows
from hf_async_store.bench.floors.together import Together

if TYPE_CHECKING:
    from hf_async_store.bench.data import Entity
    from hf_async_store.bench.plan import Place

_CREATE = "CREATE TABLE IF NOT EXISTS machines (id TEXT PRIMARY KEY, doc TEXT NOT NULL)"
_UPSERT = "INSERT INTO machines VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET doc = excluded.doc"
_SELECT = "SELECT doc FROM machines WHERE id = ?"
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode

TABLE = Table("machines", MetaData(), Column("id", Text, primary_key=True), Column("doc", Text))


def _pragmas(place: Place) -> tuple[str, ...]:
    level = "FULL" if place.durable else "NORMAL"
    return ("PRAGMA journal_mode=WAL", f"PRAGMA synchronous={level}", "PRAGMA busy_timeout=30000")


def _file(place: Place) -> str:
    return str(Path(place.folder) / "floor.sqlite")


def _row(machine: Entity) -> tuple[str, str]:
    return machine["machine_id"], _encode(machine).decode()


def _fill(place: Place, machines: Sequence[Entity]) -> None:
    """By a connection of its own."""
    connection = sqlite3.connect(_file(place))
    with connection:
        connection.executemany(_UPSERT, list(map(_row, machines)))
    connection.close()


def _read_back(place: Place, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
    connection = sqlite3.connect(_file(place))
    rows = [connection.execute(_SELECT, (each,)).fetchone() for each in ids]
    connection.close()
    return [None if row is None else _decode(row[0]) for row in rows]


class Aiosqlite:
    """aiosqlite, one connection, a statement and its commit each."""

    def __init__(self, place: Place, connection: aiosqlite.Connection) -> None:
        self._place = place
        self._connection = connection

    @classmethod
    async def open(cls, place: Place) -> Self:
        connection = await aiosqlite.connect(_file(place), isolation_level=None)
        for each in (*_pragmas(place), _CREATE):
            await connection.execute(each)
        return cls(place, connection)

    async def close(self) -> None:
        await self._connection.close()

    async def fill(self, machines: Sequence[Entity]) -> None:
        _fill(self._place, machines)

    async def read_back(self, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
        return _read_back(self._place, ids)

    async def save(self, machine: Entity) -> None:
        await self._connection.execute_insert(_UPSERT, _row(machine))

    async def get(self, machine: str) -> Mapping[str, Any] | None:
        for row in await self._connection.execute_fetchall(_SELECT, (machine,)):
            return _decoded(row)
        return None


def _decoded(row: Any) -> Mapping[str, Any]:
    entity: Mapping[str, Any] = _decode(row[0])
    return entity


class Sqlite3Together:
    """sqlite3 in one thread: one transaction for all saves that wait, one hop for all gets."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._thread = ThreadPoolExecutor(1)
        self._saves = Together(self._save_all, size=1024)
        self._gets = Together(self._get_all, size=1024)

    @classmethod
    async def open(cls, place: Place) -> Self:
        target = cls(place)
        await target._hop(target._connect)
        return target

    def _connect(self) -> None:
        self._connection = sqlite3.connect(
            _file(self._place), isolation_level=None, check_same_thread=False
        )
        for each in (*_pragmas(self._place), _CREATE):
            self._connection.execute(each)

    async def close(self) -> None:
        await self._hop(self._connection.close)
        self._thread.shutdown()

    async def fill(self, machines: Sequence[Entity]) -> None:
        _fill(self._place, machines)

    async def read_back(self, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
        return _read_back(self._place, ids)

    async def save(self, machine: Entity) -> None:
        await self._saves(machine)

    async def get(self, machine: str) -> Mapping[str, Any] | None:
        return await self._gets(machine)

    async def save_many(self, machines: Sequence[Entity]) -> None:
        await self._save_all(machines)

    async def create_many(self, machines: Sequence[Entity]) -> None:
        await self._save_all(machines)

    async def acquire(self, request: Entity, machines: Sequence[Entity]) -> None:
        await self._save_all([{"machine_id": request["request_id"]}, *machines])

    async def _save_all(self, machines: Sequence[Entity]) -> Sequence[None]:
        await self._hop(self._write, list(map(_row, machines)))
        return [None] * len(machines)

    async def _get_all(self, ids: Sequence[str]) -> Sequence[Mapping[str, Any] | None]:
        rows = await self._hop(self._select, ids)
        return [None if each is None else _decoded(each) for each in rows]

    def _write(self, rows: Sequence[tuple[str, str]]) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.executemany(_UPSERT, rows)
        self._connection.execute("COMMIT")

    def _select(self, ids: Sequence[str]) -> list[Any]:
        return [self._connection.execute(_SELECT, (each,)).fetchone() for each in ids]

    async def _hop(self, work: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)


class _Engine:
    """SQLAlchemy Core async on aiosqlite, and the parts that are not measured."""

    def __init__(self, place: Place, engine: AsyncEngine) -> None:
        self._place = place
        self._engine = engine

    @classmethod
    async def open(cls, place: Place) -> Self:
        engine = create_async_engine(f"sqlite+aiosqlite:///{_file(place)}")

        @event.listens_for(engine.sync_engine, "connect")
        def connected(connection: Any, record: object) -> None:
            for each in _pragmas(place):
                connection.execute(each)

        async with engine.begin() as connection:
            await connection.exec_driver_sql(_CREATE)
        return cls(place, engine)

    async def close(self) -> None:
        await self._engine.dispose()

    async def fill(self, machines: Sequence[Entity]) -> None:
        _fill(self._place, machines)

    async def read_back(self, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
        return _read_back(self._place, ids)

    async def _upsert(self, machines: Sequence[Entity]) -> Sequence[None]:
        statement = sqlite_insert(TABLE).values(_named(machines))
        changed = {"doc": statement.excluded.doc}
        async with self._engine.begin() as connection:
            await connection.execute(
                statement.on_conflict_do_update(index_elements=["id"], set_=changed)
            )
        return [None] * len(machines)


class Core(_Engine):
    """Begin, a statement, commit each."""

    async def save(self, machine: Entity) -> None:
        await self._upsert([machine])

    async def create(self, machine: Entity) -> None:
        async with self._engine.begin() as connection:
            await connection.execute(insert(TABLE), _named([machine])[0])

    async def get(self, machine: str) -> Mapping[str, Any] | None:
        async with self._engine.connect() as connection:
            rows = await connection.execute(select(TABLE.c.doc).where(TABLE.c.id == machine))
            row = rows.first()
        return None if row is None else _decoded(row)


class CoreTogether(_Engine):
    """Up to 64 rows a statement: all that wait."""

    def __init__(self, place: Place, engine: AsyncEngine) -> None:
        super().__init__(place, engine)
        self._saves = Together(self._upsert, size=64)
        self._gets = Together(self._select_all, size=64)

    async def save(self, machine: Entity) -> None:
        await self._saves(machine)

    async def get(self, machine: str) -> Mapping[str, Any] | None:
        return await self._gets(machine)

    async def create_many(self, machines: Sequence[Entity]) -> None:
        await self._insert(machines)

    async def acquire(self, request: Entity, machines: Sequence[Entity]) -> None:
        """One multi-row insert."""
        await self._insert([{"machine_id": request["request_id"]}, *machines])

    async def _insert(self, machines: Sequence[Entity]) -> None:
        async with self._engine.begin() as connection:
            await connection.execute(insert(TABLE), _named(machines))

    async def _select_all(self, ids: Sequence[str]) -> Sequence[Mapping[str, Any] | None]:
        async with self._engine.connect() as connection:
            statement = select(TABLE.c.id, TABLE.c.doc).where(TABLE.c.id.in_(ids))
            found = {row[0]: _decode(row[1]) for row in await connection.execute(statement)}
        return [found.get(each) for each in ids]


class MultiRow:
    """aiosqlite, one multi-row INSERT of whole machines in one transaction."""

    def __init__(self, connection: aiosqlite.Connection) -> None:
        self._connection = connection

    @classmethod
    async def open(cls, place: Place) -> Self:
        connection = await aiosqlite.connect(_file(place), isolation_level=None)
        for each in _pragmas(place):
            await connection.execute(each)
        await rows.make_sqlite(connection)
        return cls(connection)

    async def close(self) -> None:
        await self._connection.close()

    async def fill(self, machines: Sequence[Entity]) -> None:
        templates, requests = rows.parents_of(machines)
        await rows.add_parents_sqlite(self._connection, templates, requests)
        await rows.insert_sqlite(self._connection, machines)

    async def read_back(self, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
        found: list[Mapping[str, Any] | None] = []
        for each in ids:
            one = list(await self._connection.execute_fetchall(rows.SELECT_SQLITE, (each,)))
            found.append(rows.entity_of(one[0]) if one else None)
        return found

    async def create_many(self, machines: Sequence[Entity]) -> None:
        await rows.insert_sqlite(self._connection, machines)

    async def acquire(self, request: Entity, machines: Sequence[Entity]) -> None:
        await rows.insert_sqlite(self._connection, machines, request)


def _named(machines: Sequence[Entity]) -> list[dict[str, str]]:
    return [{"id": each["machine_id"], "doc": _encode(each).decode()} for each in machines]
