"""Baselines of the SQLite engine."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import aiosqlite
from sqlalchemy import event, insert
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from hf_async_store_bench.baselines import Baseline, tables
from hf_async_store_bench.baselines.batching import BatchedOperations, Batching
from hf_async_store_bench.data import Entity, batches, utc_now
from hf_async_store_bench.messages import Environment

_ROW = f"({tables.marks('sqlite', len(tables.COLUMNS))})"
_INSERT = f"{tables.INTO_MACHINES} VALUES {_ROW}"
_UPSERT = f"{_INSERT} {tables.ON_CONFLICT}"
_SELECT = f"{tables.SELECT} = ?"
_INSERT_REQUEST = f"{tables.INTO_REQUESTS} VALUES ({tables.marks('sqlite', 8)})"
_ADD_REQUEST = _INSERT_REQUEST.replace("INSERT", "INSERT OR IGNORE", 1)
_ROWS_A_STATEMENT = 1500  # SQLite takes 32,766 values


def pragmas(environment: Environment) -> list[str]:
    level = "FULL" if environment.durable else "NORMAL"
    settings = ("journal_mode = WAL", f"synchronous = {level}", "busy_timeout = 30000")
    return [f"PRAGMA {each}" for each in (*settings, "foreign_keys = ON")]


def on_connect(engine: AsyncEngine, environment: Environment) -> AsyncEngine:
    """Have each of its connections begin with the pragmas."""

    @event.listens_for(engine.sync_engine, "connect")
    def connected(connection: Any, record: object) -> None:
        for each in pragmas(environment):
            connection.execute(each)

    return engine


class _Baseline(Baseline):
    """The parts that are not measured, on connections of their own."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.file = str(Path(environment.folder) / "baseline.sqlite")
        with closing(self.connect()) as connection:
            for each in tables.ddl("sqlite"):
                connection.execute(each)

    def connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.file, isolation_level=None, check_same_thread=False)
        for each in pragmas(self.environment):
            connection.execute(each)
        return connection

    async def fill(self, machines: Sequence[Entity]) -> None:
        templates, requests = tables.parents_of(machines)
        add_template = "INSERT OR IGNORE INTO hand_templates VALUES (?)"
        with closing(self.connect()) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(add_template, [(each,) for each in templates])
            connection.executemany(_ADD_REQUEST, map(tables.request_of, requests))
            connection.executemany(_INSERT, tables.rows_of(machines))
            connection.execute("COMMIT")

    async def read_back(self, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
        with closing(self.connect()) as connection:
            return _select(connection, ids)


class _Connection(_Baseline):
    """One aiosqlite connection."""

    async def start(self) -> None:
        self._turn = asyncio.Lock()
        connection = aiosqlite.connect(self.file, isolation_level=None)
        self._connection = await self.stack.enter_async_context(connection)
        for each in pragmas(self.environment):
            await self._connection.execute(each)


class Aiosqlite(_Connection):
    """One aiosqlite connection; a statement and its commit for each operation; WAL,
    synchronous=FULL."""

    async def save(self, machine: Entity) -> None:
        await self._connection.execute_insert(_UPSERT, tables.row_of(machine, utc_now()))

    async def get(self, machine: str) -> Mapping[str, Any] | None:
        rows = list(await self._connection.execute_fetchall(_SELECT, (machine,)))
        return tables.entity_of(rows[0] if rows else None)


class MultiRow(_Connection):
    """One INSERT of 1,500 rows at most, in one transaction; WAL, synchronous=FULL."""

    async def create_many(self, machines: Sequence[Entity]) -> None:
        await self.acquire(None, machines)

    async def acquire(self, request: Entity | None, machines: Sequence[Entity]) -> None:
        rows = tables.rows_of(machines)
        execute = self._connection.execute_fetchall
        async with self._turn:
            await execute("BEGIN IMMEDIATE")
            if request is not None:
                await execute(_INSERT_REQUEST, tables.request_of(request))
            for some in batches(rows, _ROWS_A_STATEMENT):
                statement = f"{tables.INTO_MACHINES} VALUES {', '.join([_ROW] * len(some))}"
                await execute(statement, [value for row in some for value in row])
            await execute("COMMIT")


class Sqlite3Batched(BatchedOperations, _Baseline):
    """sqlite3 in one thread; everything that waits in one transaction (executemany); WAL,
    synchronous=FULL."""

    async def start(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._connection = self.connect()
        self.stack.callback(self._thread.shutdown)
        self.stack.push_async_callback(self._hop, self._connection.close)
        self._saves = Batching(self.save_many, size=1024)
        self._gets = Batching(self._get_all, size=1024)

    async def save_many(self, machines: Sequence[Entity]) -> None:
        await self._hop(self._write, _UPSERT, machines)

    async def create_many(self, machines: Sequence[Entity]) -> None:
        await self._hop(self._write, _INSERT, machines)

    import_many = create_many

    async def acquire(self, request: Entity, machines: Sequence[Entity]) -> None:
        await self._hop(self._write, _INSERT, machines, request)

    async def rows(self, statement: str, arguments: Sequence[str]) -> Any:
        asked = (statement.replace("$", "?"), arguments)
        return await self._hop(lambda: self._connection.execute(*asked).fetchall())

    async def _get_all(self, ids: Sequence[str]) -> Any:
        return await self._hop(_select, self._connection, ids)

    def _write(
        self, statement: str, machines: Sequence[Entity], request: Entity | None = None
    ) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        if request is not None:
            self._connection.execute(_INSERT_REQUEST, tables.request_of(request))
        self._connection.executemany(statement, tables.rows_of(machines))
        self._connection.execute("COMMIT")

    async def _hop(self, work: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)


class Core(tables.CoreOperations, _Baseline):
    """create_async_engine with its own pool (5 connections and 10 more); begin, an upsert or a select,
    commit for each operation; WAL, synchronous=FULL. With many tasks its connections wait for one
    another's write lock."""

    upsert = tables.upsert("sqlite")

    async def start(self) -> None:
        engine = create_async_engine(f"sqlite+aiosqlite:///{self.file}")
        self.engine = on_connect(engine, self.environment)
        self.stack.push_async_callback(self.engine.dispose)
        async with self.engine.connect():
            pass

    async def create(self, machine: Entity) -> None:
        await self.execute(insert(tables.MACHINES), machine)


def _select(connection: sqlite3.Connection, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
    rows = [connection.execute(_SELECT, (each,)).fetchone() for each in ids]
    return [tables.entity_of(each) for each in rows]
