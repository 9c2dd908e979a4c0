"""The code that one would write by hand on the same drivers: what the SQL store is measured by.

The tables have the columns, indexes and foreign keys of the store's own, and every write is as durable.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import aiosqlite
from sqlalchemy import Column, ForeignKey, Index, MetaData, String, Table, bindparam, event, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from hf_async_store.entities import utc_now

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from stores import Entity

COLUMNS: Final = (
    "machine_id",
    "request_id",
    "template_id",
    "return_request_id",
    "name",
    "status",
    "instance_type",
    "private_ip",
    "created_at",
    "updated_at",
)

_METADATA: Final = MetaData()
PARENTS: Final = (
    Table("bare_templates", _METADATA, Column("template_id", String, primary_key=True)),
    Table("bare_requests", _METADATA, Column("request_id", String, primary_key=True)),
)
BARE: Final = Table(
    "bare",
    _METADATA,
    Column("machine_id", String, primary_key=True),
    Column("request_id", String, ForeignKey("bare_requests.request_id")),
    Column("template_id", String, ForeignKey("bare_templates.template_id")),
    *(Column(each, String) for each in COLUMNS[3:]),
    Index("bare_request", "request_id", "created_at"),
    Index("bare_return", "return_request_id"),
    Index("bare_status", "status"),
    Index("bare_name", "name"),
)


def row_of(machine: Entity) -> dict[str, Any]:
    return {each: machine[each] for each in COLUMNS}


def values_of(machine: Entity) -> list[Any]:
    return [machine[each] for each in COLUMNS]


class Core:
    """SQLAlchemy Core, async, one operation at a time on each task.

    Args:
        autocommit: without BEGIN and COMMIT around each.
    """

    def __init__(self, engine: AsyncEngine, *, autocommit: bool) -> None:
        self.engine = engine
        self._run = engine.execution_options(isolation_level="AUTOCOMMIT") if autocommit else engine
        insert = (sqlite if engine.dialect.name == "sqlite" else postgresql).insert(BARE)
        self._save = insert.on_conflict_do_update(
            index_elements=["machine_id"],
            set_={each: insert.excluded[each] for each in COLUMNS[1:]},
        )
        self._get = select(BARE).where(BARE.c.machine_id == bindparam("wanted"))

    async def make(self) -> None:
        async with self.engine.begin() as connection:
            await connection.run_sync(_METADATA.create_all)

    async def save(self, machine: Entity) -> None:
        # As every save of the store does; SQLite would not even write what is the same.
        row = {**row_of(machine), "updated_at": utc_now()}
        async with self._run.begin() as connection:
            await connection.execute(self._save, row)

    async def get(self, machine_id: str) -> Entity:
        async with self._run.connect() as connection:
            found = await connection.execute(self._get, {"wanted": machine_id})
            return dict(found.mappings().one())

    async def close(self) -> None:
        await self.engine.dispose()


def sqlite_core(path: Path, *, pool: int = 15) -> Core:
    engine = create_async_engine(
        f"sqlite+aiosqlite:///{path}", poolclass=AsyncAdaptedQueuePool, pool_size=pool
    )

    @event.listens_for(engine.sync_engine, "connect")
    def prepare(connection: Any, _: object) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA busy_timeout = 30000")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    return Core(engine, autocommit=False)


def postgresql_core(url: str, *, pool: int = 15) -> Core:
    engine = create_async_engine(
        url.replace("postgresql:", "postgresql+asyncpg:"), pool_size=pool, max_overflow=0
    )
    return Core(engine, autocommit=True)


_INSERT: Final = (
    f"INSERT INTO bare ({', '.join(COLUMNS)}) "
    f"VALUES ({', '.join(f'${n}' for n in range(1, len(COLUMNS) + 1))}) "
    "ON CONFLICT (machine_id) DO UPDATE SET "
    + ", ".join(f"{each} = excluded.{each}" for each in COLUMNS[1:])
)
_SELECT: Final = "SELECT * FROM bare WHERE machine_id = $1"


class AsyncpgPool:
    """asyncpg's own pool, as it comes."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool

    async def save(self, machine: Entity) -> None:
        async with self.pool.acquire() as connection:
            await connection.execute(_INSERT, *values_of(machine))

    async def get(self, machine_id: str) -> Entity:
        async with self.pool.acquire() as connection:
            return dict(await connection.fetchrow(_SELECT, machine_id))


async def held_saves(pool: Any, machines: Sequence[Sequence[Entity]]) -> None:
    """Each task holds a connection and a prepared statement."""

    async def work(mine: Sequence[Entity]) -> None:
        async with pool.acquire() as connection:
            statement = await connection.prepare(_INSERT)
            for each in mine:
                await statement.fetch(*values_of(each))

    await asyncio.gather(*(work(each) for each in machines))


async def prepare(connection: aiosqlite.Connection) -> None:
    await connection.execute_fetchall("PRAGMA journal_mode = WAL")
    await connection.execute_fetchall("PRAGMA synchronous = FULL")
    await connection.execute_fetchall("PRAGMA foreign_keys = ON")


async def sqlite_load(path: Path, machines: Sequence[Entity]) -> None:
    """A hand-written bulk load: executemany in one transaction."""
    async with aiosqlite.connect(path, isolation_level=None) as connection:
        await prepare(connection)
        await connection.execute_fetchall("BEGIN IMMEDIATE")
        sql = f"INSERT INTO bare ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"
        await connection.executemany(sql, [values_of(each) for each in machines])
        await connection.execute_fetchall("COMMIT")


async def postgresql_load(pool: Any, machines: Sequence[Entity]) -> None:
    """A hand-written bulk load: COPY."""
    async with pool.acquire() as connection:
        await connection.copy_records_to_table(
            "bare", columns=COLUMNS, records=[values_of(each) for each in machines]
        )
