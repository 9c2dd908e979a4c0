"""The SQL engine: reads, independent writes and sessions on leased connections."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from hf_async_store.changes import Change, Outcome, Put, Record
from hf_async_store.config import SQLConfig, redacted
from hf_async_store.driver import Engine, Isolation, QueryPlan, Reader, remember_in
from hf_async_store.errors import (
    ConcurrencyConflictError,
    LockTimeoutError,
    PermissionDeniedError,
    ReadOnlyStoreError,
    StorageError,
    UnavailableError,
)
from hf_async_store.generators import Owned
from hf_async_store.query import Query
from hf_async_store.schema import (
    CATALOGUE_COLLECTION,
    SYSTEM_COLLECTIONS,
    Collection,
    Schema,
)
from hf_async_store.strategies.sql import reading
from hf_async_store.strategies.sql.bulk_writer import BulkWriter, StatementGroup, marker_put
from hf_async_store.strategies.sql.compiler import comparisons_in, compile_query
from hf_async_store.strategies.sql.connections import Connections, LeasedConnection
from hf_async_store.strategies.sql.ddl import PROBES, SchemaSync, refuse_untrusted_owners
from hf_async_store.strategies.sql.dialect import SessionEndedError
from hf_async_store.strategies.sql.errors import REFUSALS
from hf_async_store.strategies.sql.parameters import bind, check_statement
from hf_async_store.strategies.sql.row_mapping import (
    DOC,
    SIDE,
    TableMapping,
    declared_name,
    sql_name,
    with_columns,
)
from hf_async_store.strategies.sql.session import SQLReader, SQLSession
from hf_async_store.strategies.sql.write_sql import WriteStatementCache
from hf_async_store.values import VERSION, Entity, Key, Value

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.dialect import Dialect

Result = TypeVar("Result")

_FIRST_PAUSE: Final = 0.002
_MAX_PAUSE_SECONDS: Final = 0.1
_NO_TABLE: Final = QueryPlan(access="scan", detail="the table does not exist yet")


class SQLEngine(Engine):
    """One database.

    Attributes:
        tables: by collection.
        writer: executes changes.
    """

    def __init__(self, config: SQLConfig, schema: Schema, dialect: Dialect) -> None:
        self.capabilities = dialect.capabilities
        self.schema = schema
        self.tables = {name: TableMapping(each, dialect) for name, each in schema.items()}
        statements = WriteStatementCache(schema, self.tables, references=config.enforce_references)
        self.writer = BulkWriter(
            schema, self.tables, statements, references=config.enforce_references
        )
        self._config = config
        self._dialect = dialect
        self._main, self._readers, self._streams = _pools(config, dialect)
        self._schema_sync = SchemaSync(schema, dialect, self._main.sql_dialect)
        self._ready = False  # the schema is complete: tables, columns and indexes exist
        self._readable = False  # all tables and columns exist
        self._prepare_lock = asyncio.Lock()
        self._write_lock = asyncio.Lock()  # used if only one connection can write at a time

    # -- connections -------------------------------------------------------------------------

    async def _prepare(self) -> None:
        """Create missing tables, columns and indexes, before the first write."""
        if self._ready:
            return
        async with self._prepare_lock:
            if not self._ready:
                self._dialect.create_file()
                async with self._main.lease() as lease:
                    await self._schema_sync.ensure(lease)
                self._ready = True

    async def _tables_on(self, lease: LeasedConnection) -> Mapping[str, TableMapping]:
        """By collection, the tables that can be read. Nothing is created.

        A table that does not exist is omitted. If a table lacks the column of a field, the field is
        read from the document.
        """
        if self._ready or self._readable:
            return self.tables
        columns = await self._schema_sync.existing_columns(lease)
        if not self._schema_sync.missing_from(columns):
            self._readable = True
            return self.tables
        return {
            name: TableMapping(with_columns(each, columns[sql_name(name)]), self._dialect)
            for name, each in self.schema.items()
            if sql_name(name) in columns
        }

    async def is_absent(self) -> bool:
        """Whether no table of this store exists yet."""
        if self._ready or self._readable:
            return False
        if not self._dialect.exists():
            return True
        async with self._main.lease() as lease:
            return not await self._schema_sync.existing_columns(lease)

    async def is_empty(self, lease: LeasedConnection) -> bool:
        """Whether all tables are empty."""
        for table in self.tables.values():
            if await lease.rows(f"SELECT 1 FROM {table.name} LIMIT 1"):
                return False
        return True

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[LeasedConnection]:
        """A connection for writes."""
        await self._prepare()
        if not self._dialect.single_writer:
            async with self._main.lease() as lease:
                yield lease
            return
        await self._acquire_write_lock()
        try:
            async with self._main.lease() as lease:
                yield lease
        finally:
            self._write_lock.release()

    async def _acquire_write_lock(self) -> None:
        if not self._write_lock.locked():
            await self._write_lock.acquire()
            return
        try:
            async with asyncio.timeout(self._config.timeout):
                await self._write_lock.acquire()
        except TimeoutError as exc:
            raise LockTimeoutError(
                f"the write lock of this store was not free within {self._config.timeout:g} s "
                "(timeout): another write of the same store object was still running"
            ) from exc

    @asynccontextmanager
    async def _reading(
        self, pool: Connections, statements: Literal["one", "many"] = "one"
    ) -> AsyncIterator[SQLReader]:
        """A reader. With "many", all its statements see one snapshot; with "one", each single one does."""
        if not self._ready and not self._dialect.exists():
            yield SQLReader(None, {})
            return
        async with pool.lease() as lease:
            tables = await self._tables_on(lease)
            async with lease.reading(statements=statements):
                yield SQLReader(lease, tables)

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Reader]:
        async with self._reading(self._streams, "many") as reader:
            yield reader

    # -- reads -------------------------------------------------------------------------------

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        if not self._ready and not self._dialect.exists():
            return [None] * len(keys)
        deadline = time.monotonic() + self._config.timeout
        pause = _FIRST_PAUSE
        reconnected = False
        while True:
            try:
                async with self._readers.lease() as lease:
                    tables = await self._tables_on(lease)
                    if not self._dialect.needs_transactions:
                        return await reading.fetch(lease, tables, keys)
                    async with lease.transaction():
                        return await reading.fetch(lease, tables, keys)
            except ConcurrencyConflictError:
                if time.monotonic() > deadline:
                    raise
            except UnavailableError:
                # A read can be repeated; the pooled connection may have been closed by the server.
                if reconnected:
                    raise
                reconnected = True
            pause = await _sleep(pause)

    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        records = await self._small(query)
        if records is not None:
            for record in records:
                yield record
            return
        # The caller may take long for each record, and need another connection for it, so the
        # stream uses a pool of its own.
        async with (
            self._reading(self._streams) as reader,
            Owned(reader.select(query)) as stream,
        ):
            async for record in stream:
                yield record

    async def select_batches(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        # On a connection of the main pool: the caller must not use the store meanwhile.
        records = await self._small(query)
        if records is not None:
            if records:
                yield [each.entity for each in records]
            return
        async with (
            self._reading(self._main) as reader,
            Owned(reader.select_batches(query)) as batches,
        ):
            async for batch in batches:
                yield batch

    async def _small(self, query: Query) -> list[Record] | None:
        if not reading.may_be_small(query):
            return None
        async with self._reading(self._main) as reader:
            return await reader.small(query)

    async def count(self, query: Query) -> int:
        async with self._reading(self._main) as reader:
            return await reader.count(query)

    async def fetch_undeclared(self, collection: Collection, entity_id: str) -> Record | None:
        if not self._dialect.exists():
            return None
        return await self._retried(lambda: self._fetch_undeclared(collection, entity_id))

    async def _fetch_undeclared(self, collection: Collection, entity_id: str) -> Record | None:
        table = TableMapping(collection, self._dialect)
        async with self._main.lease() as lease:
            try:
                columns = await self._dialect.reflect_columns(
                    lease.driver, [sql_name(collection.name)]
                )
            except self._dialect.driver_errors as exc:
                raise self._dialect.translate(exc, doing="read the catalog", writes=False) from exc
            if not columns:
                return None
            await self._refuse_untrusted_owners(lease)
            for row in await lease.rows(table.fetch_one, [entity_id]):
                return Record(Key(collection.name, entity_id), table.entity(row))
        return None

    async def remember(self, collections: Iterable[Collection]) -> None:
        # The tables of an engine are those of its schema.
        engine = SQLEngine(self._config, Schema([CATALOGUE_COLLECTION]), self._dialect)
        try:
            await remember_in(engine, collections)
        finally:
            await engine.close()

    async def _refuse_untrusted_owners(self, lease: LeasedConnection) -> None:
        try:
            await refuse_untrusted_owners(self._dialect, lease.driver, self._schema_sync.names)
        except self._dialect.driver_errors as exc:
            raise self._dialect.translate(exc, doing="read the catalog", writes=False) from exc

    # -- the existing store ------------------------------------------------------------------

    async def exists(self) -> bool:
        if not self._dialect.exists():
            return False
        async with self._main.lease() as lease:
            return bool(await self._schema_sync.existing_columns(lease))

    async def is_same_store(self, other: Engine) -> bool:
        if not isinstance(other, SQLEngine) or type(other._dialect) is not type(self._dialect):
            return False
        if not (self._dialect.exists() and other._dialect.exists()):
            return False
        if other is self:
            return True
        async with self._main.lease() as mine, other._main.lease() as theirs:
            try:
                return await self._dialect.is_same_store(mine.driver, theirs.driver)
            except self._dialect.driver_errors as exc:
                raise self._dialect.translate(
                    exc, doing="compare the stores", writes=False
                ) from exc

    async def undeclared(self) -> list[str]:
        if not self._dialect.exists():
            return []
        async with self._main.lease() as lease:
            try:
                tables = await self._dialect.reflect_tables(lease.driver)
                columns = await self._dialect.reflect_columns(lease.driver, tables)
            except self._dialect.driver_errors as exc:
                raise self._dialect.translate(exc, doing="read the catalog", writes=False) from exc
            system = {PROBES, *(sql_name(each.name) for each in SYSTEM_COLLECTIONS)}
            undeclared: list[str] = []
            for table, existing in columns.items():
                if table in self._schema_sync.names:
                    name = declared_name(table)
                    undeclared += [
                        f"{name}.{declared_name(column)}"
                        for column in existing
                        if not self._schema_sync.is_declared(table, column)
                        and await _has_rows(
                            lease, f"{_identifier(table)} WHERE {_identifier(column)} IS NOT NULL"
                        )
                    ]
                elif (
                    table not in system
                    and existing.keys() >= {DOC, SIDE, VERSION}
                    and await _has_rows(lease, _identifier(table))
                ):
                    undeclared.append(declared_name(table))
        return sorted(undeclared)

    # -- independent writes ------------------------------------------------------------------

    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        return await self._retried(lambda: self._write_each(changes))

    async def _write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        puts = self.writer.imports_in(changes)
        if puts is not None and await self._import_in_bulk(puts):
            return [each.import_version for each in puts]
        marked = any(each.mark is not None for each in changes)
        async with self.writing() as lease:
            if marked or self._dialect.needs_transactions:
                return await self._write_together(lease, changes)
            return await self._write_independently(lease, changes)

    async def _import_in_bulk(self, puts: Sequence[Put]) -> bool:
        """Write imports in bulk. Returns whether all of them were applied.

        If not, the caller writes all of them again with the statements of other writes, which report
        each change that fails. To write an import twice has the same result as once.
        """
        rows = await self.writer.import_rows(puts)
        try:
            async with self.writing() as lease, lease.bulk():
                return await self.writer.imported(lease, puts[0].key.collection, rows)
        except REFUSALS:
            return False

    async def _write_independently(
        self, lease: LeasedConnection, changes: Sequence[Change]
    ) -> list[Outcome]:
        waves = self.writer.dependency_batches(changes)
        outcomes: list[Outcome] = [None] * len(changes)
        if self._dialect.batches_commit_together and self.writer.statements(waves) > 1:
            try:
                async with lease.transaction():
                    for batch in chain.from_iterable(waves):
                        await self.writer.send(
                            _RunOnce(lease), lease, batch, outcomes, halves=False
                        )
            except REFUSALS:
                return await self._write_together(lease, changes)
            return outcomes
        run = _RunWithRetries(lease, self._config.timeout)
        failure: StorageError | None = None
        first = True
        for batch in chain.from_iterable(waves):
            if failure is None:
                try:
                    await self.writer.send(run, lease, batch, outcomes, halves=True)
                except StorageError as exc:
                    if first:
                        raise
                    # Earlier statements were applied, and must not be reported as failed.
                    failure = exc
                    _fail(batch, exc, outcomes)
            else:
                unsent = failure.copy()
                unsent.outcome_unknown = False
                _fail(batch, unsent, outcomes)
            first = False
        return outcomes

    async def _write_together(
        self, lease: LeasedConnection, changes: Sequence[Change]
    ) -> list[Outcome]:
        """Apply changes and their change markers in one transaction; if the database rejects one of the
        changes, each half in a transaction of its own."""
        deadline = time.monotonic() + self._config.timeout
        pause = _FIRST_PAUSE
        while True:
            outcomes: list[Outcome] = [None] * len(changes)
            try:
                async with lease.transaction():
                    await self._send(lease, changes, outcomes, all_or_none=False)
            except ConcurrencyConflictError:
                if time.monotonic() > deadline:
                    raise
                pause = await _sleep(pause)
            except REFUSALS as exc:
                if len(changes) == 1:
                    return [exc]
                middle = len(changes) // 2
                return [
                    *await self._write_together(lease, changes[:middle]),
                    *await self._write_together(lease, changes[middle:]),
                ]
            else:
                return outcomes

    async def _send(
        self,
        lease: LeasedConnection,
        changes: Sequence[Change],
        outcomes: list[Outcome],
        *,
        all_or_none: bool,
    ) -> None:
        halves = all_or_none and self._dialect.batches_commit_together
        run = _RunOnce(lease)
        failed = len(changes)  # with `all_or_none`: the position of the first change that failed
        for batch in chain.from_iterable(self.writer.dependency_batches(changes)):
            if min(batch.places) > failed:
                continue
            wanted = batch.before(failed)
            await self.writer.send(run, lease, wanted, outcomes, halves=halves)
            if all_or_none:
                for position in wanted.places:
                    if isinstance(outcomes[position], StorageError):
                        failed = min(failed, position)
        if failed < len(changes):
            return
        markers = [
            marker_put(change.mark, getattr(change, "written_at", ""))
            for change, outcome in zip(changes, outcomes, strict=True)
            if change.mark is not None and not isinstance(outcome, StorageError)
        ]
        if markers:
            marker_outcomes: list[Outcome] = [None] * len(markers)
            await self._send(lease, markers, marker_outcomes, all_or_none=False)
            for outcome in marker_outcomes:
                if isinstance(outcome, StorageError):
                    raise outcome

    # -- sessions ----------------------------------------------------------------------------

    def session(self, isolation: Isolation | None) -> SQLSession:
        return SQLSession(self, isolation)

    async def apply(self, lease: LeasedConnection, changes: Sequence[Change]) -> list[Outcome]:
        """Apply the changes of a session, up to the first that fails."""
        outcomes: list[Outcome] = [None] * len(changes)
        await self._send(lease, changes, outcomes, all_or_none=True)
        for index, each in enumerate(outcomes):
            if isinstance(each, StorageError):
                return outcomes[: index + 1]
        return outcomes

    async def execute_with_lock(
        self, sql: str, params: Sequence[object] | Mapping[str, object]
    ) -> list[dict[str, Value]]:
        check_statement(sql, params)

        async def once() -> list[dict[str, Value]]:
            async with self.writing() as lease, lease.transaction():
                return await self.execute(lease, sql, params)

        return await self._retried(once)

    async def _retried(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """Run work, and repeat it until `timeout` while it fails without any effect: because of a
        conflict, a statement that was prepared before the tables were changed, a session that had
        ended, or a server that accepts no writes."""
        deadline = time.monotonic() + self._config.timeout
        pause = _FIRST_PAUSE
        while True:
            try:
                return await work()
            except (ConcurrencyConflictError, ReadOnlyStoreError) as exc:
                if not exc.retryable or exc.outcome_unknown or time.monotonic() > deadline:
                    raise
            except UnavailableError as exc:
                # The server had ended the session of a pooled connection before this statement.
                if not isinstance(exc.__cause__, SessionEndedError) or time.monotonic() > deadline:
                    raise
            pause = await _sleep(pause)

    async def execute(
        self, lease: LeasedConnection, sql: str, params: Sequence[object] | Mapping[str, object]
    ) -> list[dict[str, Value]]:
        """Run a caller's own statement in the open transaction."""
        numbered, args = bind(
            self._dialect.strip_for_update(sql), params, self._dialect.placeholder_prefix
        )
        return await lease.fetch_dicts(numbered, args)

    # -- plans, health and closing -----------------------------------------------------------

    async def explain(self, query: Query) -> QueryPlan:
        if not self._ready and not self._dialect.exists():
            return await self._explain_absent(None, query)
        async with self._main.lease() as lease:
            table = (await self._tables_on(lease)).get(query.collection)
            if table is None:
                return await self._explain_absent(lease.driver, query)
            return await self._explain(lease.driver, table, query)

    async def _explain(self, driver: Any, table: TableMapping, query: Query) -> QueryPlan:
        compiled = compile_query(table, query)
        try:
            plan = await self._dialect.explain(
                driver,
                compiled.sql,
                compiled.args,
                self._schema_sync.indexes[query.collection],
                comparisons_in(query.where),
            )
        except self._dialect.driver_errors as exc:
            raise self._dialect.translate(exc, doing="explain the query", writes=False) from exc
        if compiled.residual is None and not compiled.sorted_here:
            return plan
        return QueryPlan(
            access=plan.access,
            index=plan.index,
            residual=plan.residual or compiled.residual is not None,
            sorted_here=plan.sorted_here or compiled.sorted_here,
            detail=plan.detail,
        )

    async def _explain_absent(self, driver: Any, query: Query) -> QueryPlan:
        """The plan of a query whose table does not exist, made on temporary tables."""
        try:
            async with self._dialect.scratch(driver) as scratch:
                for statement in await self._schema_sync.missing_ddl(scratch):
                    await self._dialect.rows(scratch, statement, ())
                return await self._explain(scratch, self.tables[query.collection], query)
        except self._dialect.driver_errors as exc:
            error = self._dialect.translate(exc, doing="explain the query", writes=False)
            if isinstance(error, ReadOnlyStoreError | PermissionDeniedError):
                return _NO_TABLE  # temporary tables cannot be created
            raise error from exc

    async def probe(self) -> None:
        parameters = [self._dialect.parameter(n, "text") for n in (1, 2)]
        name = f"probe-{secrets.token_hex(8)}"
        await self._retried(lambda: self._probe(name, parameters))

    async def _probe(self, name: str, parameters: Sequence[str]) -> None:
        async with self.writing() as lease:
            await lease.rows(
                f"INSERT INTO {PROBES} (name, value) VALUES ({parameters[0]}, {parameters[1]})",
                (name, "probe"),
                doing="write",
                writes=True,
            )
            deleted = await lease.rows(
                f"DELETE FROM {PROBES} WHERE name = {parameters[0]} RETURNING value",
                (name,),
                doing="delete",
                writes=True,
            )
        if [tuple(each) for each in deleted] != [("probe",)]:
            raise UnavailableError("the probe row was written, but not found when it was read back")

    async def health(self) -> Mapping[str, Value]:
        if not self._dialect.exists():
            return {"problems": []}
        problems: list[Value] = []
        async with self._main.lease() as lease:
            if self._ready or self._readable:
                # The tables existed earlier, and this store does not create them again while open.
                columns = await self._schema_sync.existing_columns(lease)
                missing = self._schema_sync.missing_from(columns)
                problems += [f"{each} was dropped while the store was in use" for each in missing]
            try:
                names = [sql_name(each) for each in self.schema]
                report = await self._dialect.health(lease.driver, names)
            except self._dialect.driver_errors as exc:
                raise self._dialect.translate(exc, doing="check the health", writes=False) from exc
        more = report.pop("problems", [])
        problems += more if isinstance(more, list) else []
        figures = self._main.figures()
        if self._readers is not self._main:
            figures = {name: n + self._readers.figures()[name] for name, n in figures.items()}
        return {
            **report,
            "pool": {**figures},
            "streams": {**self._streams.figures()},
            "problems": problems,
        }

    def describe(self) -> Mapping[str, Value]:
        return {**self._dialect.describe(), "configuration": redacted(self._config)}

    def abandon(self) -> None:
        """See `StorageStrategy.abandon`."""
        for each in (self._streams, self._readers, self._main):
            each.abandon()

    async def close(self) -> None:
        try:
            await self._streams.close()
        finally:
            try:
                if self._readers is not self._main:
                    await self._readers.close()
            finally:
                await self._main.close()


def _pools(config: SQLConfig, dialect: Dialect) -> tuple[Connections, Connections, Connections]:
    """The main pool, the pool for reads by key, and the pool for streams.

    The pool for reads by key is the main pool if the dialect needs no separate one, or if there are
    too few connections.
    """
    kept = max(config.pool_size, 1)
    most = kept + config.max_overflow
    exhausted = (
        f"all {most} connections were in use for {config.pool_timeout:g} s: raise pool_size "
        f"({config.pool_size}) or max_overflow ({config.max_overflow}), or wait longer with "
        "pool_timeout"
    )
    streams = Connections(
        dialect,
        config,
        kept=0,
        most=config.max_streams,
        exhausted=f"all {config.max_streams} streams are open: raise max_streams, or close a stream",
        waits=False,
    )
    read_connections = dialect.capabilities.read_concurrency
    if not dialect.separate_read_pool or most < 2 * read_connections:
        main = Connections(dialect, config, kept=kept, most=most, exhausted=exhausted)
        return main, main, streams
    main = Connections(
        dialect,
        config,
        kept=max(kept - read_connections, 1),
        most=most - read_connections,
        exhausted=exhausted,
    )
    readers = Connections(
        dialect,
        config,
        kept=read_connections,
        most=read_connections,
        exhausted=exhausted,
        read_only=True,
    )
    return main, readers, streams


async def _has_rows(lease: LeasedConnection, source: str) -> bool:
    return bool(await lease.rows(f"SELECT 1 FROM {source} LIMIT 1"))


def _identifier(name: str) -> str:
    """A name that may not come from a declaration, as a quoted SQL identifier."""
    escaped = name.replace('"', '""')
    return f'"{escaped}"'


class _RunOnce:
    """Runs a statement in the open transaction, which an error ends."""

    def __init__(self, lease: LeasedConnection) -> None:
        self._lease = lease

    async def __call__(self, sql: str, args: Sequence[object]) -> Sequence[Sequence[object]]:
        return await self._lease.rows(sql, args, doing="write", writes=True)


class _RunWithRetries:
    """Runs a statement that is a transaction by itself, and repeats it after a conflict."""

    def __init__(self, lease: LeasedConnection, seconds: float) -> None:
        self._lease = lease
        self._deadline = time.monotonic() + seconds

    async def __call__(self, sql: str, args: Sequence[object]) -> Sequence[Sequence[object]]:
        pause = _FIRST_PAUSE
        while True:
            try:
                return await self._lease.rows(sql, args, doing="write", writes=True)
            except ConcurrencyConflictError as exc:
                if exc.outcome_unknown or time.monotonic() > self._deadline:
                    raise
            pause = await _sleep(pause)


async def _sleep(pause: float) -> float:
    """Wait for a random time up to `pause` seconds; returns the next pause."""
    await asyncio.sleep(random.uniform(0, pause))
    return min(pause * 2, _MAX_PAUSE_SECONDS)


def _fail(batch: StatementGroup, exc: StorageError, outcomes: list[Outcome]) -> None:
    for position in batch.places:
        outcomes[position] = exc.copy()
