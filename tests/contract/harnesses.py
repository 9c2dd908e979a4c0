"""Harnesses with which the contract suite tests the engines of this package."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sqlite3
import time
from base64 import urlsafe_b64decode
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import quote, urlsplit, urlunsplit

import asyncpg
import msgspec

from hf_async_store import Collection, open_store
from hf_async_store.strategies.sql.feed_state import decoded_state
from hf_async_store.testing.harness import (
    CONTRACT_COLLECTIONS,
    CutsConnections,
    DropsAllResponses,
    DropsResponses,
    HoldsWrites,
    InjectsRowLocks,
    InjectsThrottling,
    RefusesLabels,
    RestartsServer,
    SharesDatabase,
)
from hf_async_store.testing.proxy import HeldRequest
from tests.dynamodb.proxy import WRITES, Answer, Cut, Fault, Held, Partly, Proxy, Request, throttled

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping

    import pytest

    from hf_async_store import Capabilities, JSONStorageStrategy, StorageStrategy
    from hf_async_store.strategies.memory import MemoryEngine
    from hf_async_store.strategies.sql.strategy import SQLStorageStrategy
    from hf_async_store.testing.harness import Harness
    from hf_async_store_bench.servers import PostgresServer

_NO_SERVER: Final[tuple[type, ...]] = (
    CutsConnections,
    DropsAllResponses,
    DropsResponses,
    HoldsWrites,
    InjectsThrottling,
    RestartsServer,
)


class MemoryHarness:
    """Every store is empty at first, and loses its data when it is closed."""

    def __init__(self) -> None:
        self.capabilities = _capabilities_of(self)

    def store(
        self, collections: Iterable[Collection] = CONTRACT_COLLECTIONS, **settings: object
    ) -> StorageStrategy:
        config: dict[str, Any] = {"strategy": "memory", "memory_strategy": settings}
        return open_store(config, collections=collections)

    def url(self) -> None:
        return None

    async def forget_feed(self, store: StorageStrategy, collection: str) -> None:
        feed = cast("MemoryEngine", store.engine).feed(collection)
        feed.remove(len(feed))

    def leaks(self) -> list[str]:
        return []


def defaults_of(test: str) -> dict[str, object]:
    """The settings of JSON stores in a test: `close` waits so long for a session that is never ended."""
    return {"lock_timeout": 1} if "_124_a_session_cannot_commit_after_close" in test else {}


class JSONHarness:
    """A store in a separate folder.

    Args:
        name: the name of the single file, or of the folder of split files.
        defaults: settings of all stores.
    """

    impossible_faults = (*_NO_SERVER, InjectsRowLocks, RefusesLabels, SharesDatabase)

    def __init__(self, tmp_path: Path, name: str, **defaults: object) -> None:
        self._tmp_path = tmp_path
        self._defaults = defaults
        self._path = tmp_path / "data" / name
        self._folder = self._path.parent if name.endswith(".json") else self._path
        self.capabilities = _capabilities_of(self)

    def store(
        self, collections: Iterable[Collection] = CONTRACT_COLLECTIONS, **settings: object
    ) -> StorageStrategy:
        return _opened(self.url(), collections, {**self._defaults, **settings})

    def url(self) -> str:
        return f"json:{self._path}"

    def touched(self) -> bool:
        return self._path.exists() or self._folder.exists()

    def stranger(self, collections: Iterable[Collection]) -> StorageStrategy:
        return JSONHarness(self._tmp_path / "stranger", self._path.name).store(collections)

    async def disturb(self, store: StorageStrategy) -> None:
        await cast("JSONStorageStrategy", store).checkpoint()

    async def forget_feed(self, store: StorageStrategy, collection: str) -> None:
        del collection
        await self.disturb(store)
        for each in self._folder.glob("*.feed.*"):
            os.utime(each, (0, 0))
        await self.disturb(store)

    def leaks(self) -> list[str]:
        return [*self._temporary_files(), *open_files(self._folder)]

    def _temporary_files(self) -> list[str]:
        return [str(each) for each in self._folder.rglob("*") if ".tmp" in each.name]


def open_files(folder: Path) -> list[str]:
    """Files in a folder that this process has open; empty on systems without /proc."""
    found = []
    for each in Path("/proc/self/fd").glob("*"):
        try:
            target = str(each.readlink())
        except OSError:
            continue  # the descriptor by which the folder was listed
        if target.startswith(str(folder)):
            found.append(f"open: {target}")
    return found


async def forget_feed(store: StorageStrategy, collection: str) -> None:
    """Let the retention of a feed in SQL pass: all that is in it now is old."""
    engine = cast("SQLStorageStrategy", store)._sql
    async with engine.writing() as lease, lease.transaction():
        source = await engine._source(lease, collection)
        [[value]] = await lease.rows(f"SELECT {source.state}")
        state = decoded_state(value, collection)
        old = msgspec.structs.replace(state, marks=((0.0, 1 << 62),))
        await engine._feed.store_state(source, old)
    await engine.prune_feeds(lambda: True)


class SQLiteHarness:
    """A database file in a separate folder."""

    impossible_faults = (*_NO_SERVER, InjectsRowLocks)

    def __init__(self, tmp_path: Path) -> None:
        self._path = tmp_path / "data" / "store.db"
        self.capabilities = _capabilities_of(self)

    def store(
        self, collections: Iterable[Collection] = CONTRACT_COLLECTIONS, **settings: object
    ) -> StorageStrategy:
        return _opened(self.url(), collections, settings)

    def url(self) -> str:
        return f"sqlite:{self._path}"

    async def forget_feed(self, store: StorageStrategy, collection: str) -> None:
        await forget_feed(store, collection)

    async def disturb(self, store: StorageStrategy) -> None:
        del store
        with closing(sqlite3.connect(self._path, isolation_level=None)) as connection:
            with suppress(sqlite3.OperationalError):  # locked, while a task writes
                connection.execute("VACUUM")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def refuse_label(self, label: str) -> None:
        stored = "NEW.doc ->> '$.label'"
        refused = f"{stored} = '{label}' BEGIN SELECT RAISE(ABORT, 'no such label'); END"
        with closing(sqlite3.connect(self._path)) as connection:
            for verb in ("INSERT", "UPDATE"):
                name = f"no_{label}_{verb}"
                connection.execute(
                    f'CREATE TRIGGER {name} BEFORE {verb} ON "items-entities" WHEN {refused}'
                )

    def neighbour(self, name: str, collections: Iterable[Collection]) -> StorageStrategy:
        return _opened(self.url(), collections, {"table_prefix": name})

    async def occupy(self, collection: str) -> str:
        self._path.parent.mkdir()
        with closing(sqlite3.connect(self._path)) as connection, connection:
            connection.execute(f'CREATE TABLE "{collection}-entities" (x INT)')
            connection.execute(f'INSERT INTO "{collection}-entities" VALUES (1)')
        return f"{collection}-entities"

    async def occupant(self) -> object:
        with closing(sqlite3.connect(self._path)) as connection:
            made = connection.execute("SELECT sql FROM sqlite_master WHERE sql LIKE '%(x INT)'")
            return made.fetchall(), connection.execute('SELECT * FROM "things-entities"').fetchall()

    def touched(self) -> bool:
        return self._path.exists()

    def leaks(self) -> list[str]:
        return open_files(self._path.parent)


class PostgreSQLHarness:
    """A separate database for each test.

    Args:
        server: the server on which it is created and dropped.
    """

    impossible_faults: tuple[type, ...] = (InjectsThrottling,)

    def __init__(self, server: PostgresServer, *, options: str = "") -> None:
        self._server = server
        self._url = server.database(options)
        self.capabilities = _capabilities_of(self)

    def store(
        self, collections: Iterable[Collection] = CONTRACT_COLLECTIONS, **settings: object
    ) -> StorageStrategy:
        return _opened(self._url, collections, settings)

    def url(self) -> str:
        return self._url

    @asynccontextmanager
    async def hold(self, collection: str, entity_id: str) -> AsyncIterator[None]:
        connection = await asyncpg.connect(self._url)
        try:
            async with connection.transaction():
                key = {"items": "item_id"}[collection]
                await connection.execute(
                    f'SELECT 1 FROM "{collection}-entities" WHERE "{key}" = $1 FOR UPDATE',
                    entity_id,
                )
                yield
        finally:
            await connection.close()

    async def forget_feed(self, store: StorageStrategy, collection: str) -> None:
        await forget_feed(store, collection)

    async def disturb(self, store: StorageStrategy) -> None:
        del store
        connection = await asyncpg.connect(self._url)
        try:
            await connection.execute('VACUUM FULL "notes-feed"')
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND query LIKE '%pg_advisory_lock_shared%'"
                "AND pid <> pg_backend_pid()"
            )
        finally:
            await connection.close()

    def cut_connections(self) -> None:
        name = urlsplit(self._url).path[1:]
        where = f"WHERE datname = '{name}'"
        ask(self._server.url, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity {where}")

    def refuse_label(self, label: str) -> None:
        rule = f"CHECK (doc ->> 'label' <> '{label}')"
        execute(self._url, f'ALTER TABLE "items-entities" ADD CONSTRAINT no_{label} {rule}')

    def neighbour(self, name: str, collections: Iterable[Collection]) -> StorageStrategy:
        return _opened(self.url(), collections, {"table_prefix": name})

    async def occupy(self, collection: str) -> str:
        execute(self._url, f"CREATE VIEW {collection} AS SELECT 1 AS x")
        return collection

    async def occupant(self) -> object:
        return ask(
            self._url, "SELECT row(oid, relowner, relacl) FROM pg_class WHERE relname = 'things'"
        )

    def touched(self) -> bool:
        tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
        # The connection by which the database was emptied may take a moment to end.
        return bool(self.leaks() or ask(self._url, tables))

    def leaks(self) -> list[str]:
        for _ in range(40):  # the server may need a moment to notice that a client has disconnected
            found = self._connections()
            if not found:
                return []
            time.sleep(0.05)
        return [f"connected: {each}" for each in found]

    def close(self) -> None:
        self._server.drop(self._url)

    def _connections(self) -> list[str]:
        name = urlsplit(self._url).path[1:]
        query = f"SELECT pid || ' ' || state FROM pg_stat_activity WHERE datname = '{name}'"
        return ask(self._server.url, query)


class RestartedPostgreSQLHarness(PostgreSQLHarness):
    """A database on a server of its own."""

    async def restart(self) -> None:
        await asyncio.to_thread(self._server.kill)
        await asyncio.to_thread(self._server.start)


class PgbouncerHarness(PostgreSQLHarness):
    """A database behind a pgbouncer, which keeps its own connections to the server open.

    Only `apply_schema` uses the server itself, if there is something to change: it would be refused.

    Args:
        address: host and port of the pgbouncer.
    """

    def __init__(self, server: PostgresServer, address: str) -> None:
        self._behind = address
        super().__init__(server)

    def store(
        self, collections: Iterable[Collection] = CONTRACT_COLLECTIONS, **settings: object
    ) -> StorageStrategy:
        store = _opened(self.url(), collections, settings)
        engine = store.engine
        through_pgbouncer = engine.apply_schema

        async def apply_schema(**options: Any) -> None:
            if await engine.schema_changes() or await engine.unenforced():
                async with super(PgbouncerHarness, self).store(collections, **settings) as direct:
                    await direct.engine.apply_schema(**options)
            else:
                await through_pgbouncer(**options)

        vars(engine)["apply_schema"] = apply_schema
        return store

    def direct_url(self) -> str:
        return self._url

    def url(self) -> str:
        parts = urlsplit(self._url)
        there = parts._replace(netloc=f"{parts.username}@{self._behind}", query="pgbouncer=yes")
        return urlunsplit(there)

    def leaks(self) -> list[str]:
        # pgbouncer stays connected by design, but no connection may be in a transaction.
        for _ in range(40):
            found = [each for each in self._connections() if "transaction" in each]
            if not found:
                return []
            time.sleep(0.05)
        return [f"in a transaction: {each}" for each in found]


def ask(url: str, query: str) -> list[str]:
    """The first column of the result of a query on PostgreSQL, over a separate connection."""

    async def asked(connection: Any) -> list[str]:
        return [str(each[0]) for each in await connection.fetch(query)]

    return _elsewhere(url, asked)


def execute(url: str, statements: str) -> None:
    """Run statements on PostgreSQL over a separate connection."""
    _elsewhere(url, lambda connection: connection.execute(statements))


def _elsewhere(url: str, work: Callable[[Any], Awaitable[Any]]) -> Any:
    async def worked() -> Any:
        connection = await asyncpg.connect(url)
        try:
            return await work(connection)
        finally:
            await connection.close()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(worked())).result()


class DynamoDBHarness:
    """Tables with a separate prefix, accessed through a proxy that can inject faults."""

    hurried: Mapping[str, object] = {"retry_timeout": 0.2}
    impossible_faults = (InjectsRowLocks, RefusesLabels)

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._prefix = f"t{secrets.token_hex(6)}"
        self.capabilities = _capabilities_of(self)
        proxy.requests.clear()
        proxy.looks.clear()

    def store(
        self, collections: Iterable[Collection] = CONTRACT_COLLECTIONS, **settings: object
    ) -> StorageStrategy:
        return _opened(self.url(), collections, settings)

    def url(self) -> str:
        return f"dynamodb://us-east-1/{self._prefix}?endpoint_url={self._proxy.url}"

    def neighbour(self, name: str, collections: Iterable[Collection]) -> StorageStrategy:
        prefix = quote(f"{self._prefix}{name}", safe="")
        endpoint = f"endpoint_url={self._proxy.url}"
        return open_store(f"dynamodb://us-east-1/{prefix}?{endpoint}", collections=collections)

    async def occupy(self, collection: str) -> str:
        async with self.store([Collection(collection, key="other_id")]) as store:
            await store.save_entity(collection, {"other_id": "x", "n": 1})
        return f"{self._prefix}_{collection}"

    async def occupant(self) -> object:
        async with self.store([Collection("things", key="other_id")]) as store:
            return await store.query_entities("things")

    def touched(self) -> bool:
        return bool(self._proxy.requests or self._proxy.looks)

    def leaks(self) -> list[str]:
        return []

    def lose_next_answer(self) -> None:
        def rule(request: Request) -> Fault | None:
            if request.operation not in WRITES:
                return None
            self._proxy.rule = None
            return Cut(applied=True)

        self._proxy.rule = rule

    def hold_next_write(self) -> HeldRequest:
        held = HeldRequest()

        def rule(request: Request) -> Fault | None:
            if request.operation not in WRITES:
                return None
            self._proxy.rule = None
            return Held(held)

        self._proxy.rule = rule
        return held

    @contextmanager
    def lose_answers(self) -> Iterator[None]:
        self._proxy.rule = lambda request: (
            Cut(applied=True) if request.operation in WRITES else None
        )
        try:
            yield
        finally:
            self._proxy.rule = None

    async def forget_feed(self, store: StorageStrategy, collection: str) -> None:
        # An iterator of the test server contains the number of records before it.
        position = await store.engine.feed_position(collection)
        [[*_, end]] = json.loads(position)["shards"].values()
        first = _records_before(end)

        def rule(request: Request) -> Fault | None:
            if request.operation != "GetRecords":
                return None
            if _records_before(request.params["ShardIterator"]) >= first:
                return None
            return Answer(400, {"__type": "TrimmedDataAccessException"})

        self._proxy.rule = rule

    async def disturb(self, store: StorageStrategy) -> None:
        faults = iter(
            [
                Answer(400, {"__type": "ExpiredIteratorException"}),
                throttled(),
                Cut(applied=True),
                Answer(500, {"__type": "InternalServerError"}),
            ]
        )

        def rule(request: Request) -> Fault | None:
            is_read = request.operation in ("GetRecords", "GetShardIterator")
            return next(faults, None) if is_read else None

        self._proxy.rule = rule

    def cut_connections(self) -> None:
        self._proxy.cut_connections()

    def throttle(self, requests: int) -> None:
        left = requests

        def rule(request: Request) -> Fault | None:
            nonlocal left
            if left <= 0 or request.is_migration_check:
                return None
            left -= 1
            return Partly() if left % 2 else throttled()

        self._proxy.rule = rule


@contextmanager
def shared_harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Harness]:
    """The harness that the parameter of a fixture names, of an engine that several processes share."""
    name = str(request.param)
    if name.startswith("json"):
        yield JSONHarness(tmp_path, "store.json" if name == "json" else "store")
    elif name == "sqlite":
        yield SQLiteHarness(tmp_path)
    elif name == "dynamodb":
        yield DynamoDBHarness(request.getfixturevalue("dynamodb_proxy"))
    else:
        made = PostgreSQLHarness(request.getfixturevalue("postgres_server"))
        yield made
        made.close()


def _records_before(iterator: str) -> int:
    number: int = json.loads(urlsafe_b64decode(iterator))["p"]
    return number


def _opened(
    url: str, collections: Iterable[Collection], settings: Mapping[str, object]
) -> StorageStrategy:
    query = "&".join(f"{name}={quote(_text(value), safe='')}" for name, value in settings.items())
    return open_store(f"{url}{'&' if '?' in url else '?'}{query}", collections=collections)


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


_CAPABILITIES: Final[dict[type, Capabilities]] = {}


def _capabilities_of(harness: Harness) -> Capabilities:
    """The capabilities of an engine; a store is made for them once, because that takes 10 to 20 ms."""
    kind = type(harness)
    if kind not in _CAPABILITIES:
        _CAPABILITIES[kind] = harness.store().capabilities
    return _CAPABILITIES[kind]
