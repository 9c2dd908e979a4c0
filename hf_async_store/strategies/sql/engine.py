"""The engine on SQL: reads, independent writes and sessions over leased connections."""

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
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from hf_async_store.changes import Change, Outcome, Put, Record
from hf_async_store.config import SQLConfig, redacted
from hf_async_store.driver import Engine, Isolation, QueryPlan, Reader
from hf_async_store.errors import (
    ConcurrencyConflictError,
    LockTimeoutError,
    PermissionDeniedError,
    ReadOnlyStoreError,
    StorageError,
    UnavailableError,
)
from hf_async_store.generators import Owned
from hf_async_store.migration_routing import SYSTEM_COLLECTIONS
from hf_async_store.query import Query
from hf_async_store.schema import Collection, Schema
from hf_async_store.strategies.sql import reading
from hf_async_store.strategies.sql.bulk_writer import BulkWriter, StatementGroup, marker_put
from hf_async_store.strategies.sql.compiler import comparisons_in, compile_query
from hf_async_store.strategies.sql.connections import Connections, LeasedConnection
from hf_async_store.strategies.sql.ddl import PROBES, SchemaSync, refuse_others
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
_NOTHING: Final = QueryPlan(access="scan", detail="the table is not there yet")


class SQLEngine:
    """One database.

    Attributes:
        tables: by collection.
        writer: carries out changes.
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
        self._made = SchemaSync(schema, dialect, self._main.sql_dialect)
        self._ready = False  # all is there, for writers too
        self._readable = False  # all tables and columns are there
        self._making = asyncio.Lock()
        self._turn = asyncio.Lock()  # of the one that writes, where there can be one only

    # -- connections -------------------------------------------------------------------------

    async def _prepared(self) -> None:
        """See that the tables are there, once; for whoever is going to write."""
        if self._ready:
            return
        async with self._making:
            if not self._ready:
                self._dialect.make_place()
                async with self._main.lease() as lease:
                    await self._made.ensure(lease)
                self._ready = True

    async def _tables_on(self, lease: LeasedConnection) -> Mapping[str, TableMapping]:
        """The tables that can be read, by collection. Nothing is made.

        What is not there has nothing to be read; of what lacks a column, the document is read.
        """
        if self._ready or self._readable:
            return self.tables
        columns = await self._made.found(lease)
        if not self._made.lacking_in(columns):
            self._readable = True
            return self.tables
        return {
            name: TableMapping(with_columns(each, columns[sql_name(name)]), self._dialect)
            for name, each in self.schema.items()
            if sql_name(name) in columns
        }

    async def is_absent(self) -> bool:
        """Whether there is nothing of ours yet."""
        if self._ready or self._readable:
            return False
        if not self._dialect.exists():
            return True
        async with self._main.lease() as lease:
            return not await self._made.found(lease)

    async def is_empty(self, lease: LeasedConnection) -> bool:
        """Whether all tables are empty."""
        for table in self.tables.values():
            if await lease.rows(f"SELECT 1 FROM {table.name} LIMIT 1"):
                return False
        return True

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[LeasedConnection]:
        """A connection to write on."""
        await self._prepared()
        if not self._dialect.single_writer:
            async with self._main.lease() as lease:
                yield lease
            return
        await self._take_turn()
        try:
            async with self._main.lease() as lease:
                yield lease
        finally:
            self._turn.release()

    async def _take_turn(self) -> None:
        if not self._turn.locked():
            await self._turn.acquire()
            return
        try:
            async with asyncio.timeout(self._config.timeout):
                await self._turn.acquire()
        except TimeoutError as exc:
            raise LockTimeoutError(
                f"another write of this store has lasted {self._config.timeout:g} s"
            ) from exc

    @asynccontextmanager
    async def _reading(
        self, pool: Connections, statements: Literal["one", "many"] = "one"
    ) -> AsyncIterator[SQLReader]:
        """A reader whose statements, or each of them, see one state."""
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
        lost = False
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
                # Nothing was changed, and a connection may just have been an old one.
                if lost:
                    raise
                lost = True
            pause = await _paused(pause)

    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        found = await self._small(query)
        if found is not None:
            for record in found:
                yield record
            return
        # What its caller does with each record may take long, and need a connection itself.
        async with (
            self._reading(self._streams) as reader,
            Owned(reader.select(query)) as records,
        ):
            async for record in records:
                yield record

    async def iter_batches(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        """See `SupportsBatches`. Only for a caller that needs nothing else of the store meanwhile."""
        found = await self._small(query)
        if found is not None:
            if found:
                yield [each.entity for each in found]
            return
        async with (
            self._reading(self._main) as reader,
            Owned(reader.iter_batches(query)) as pieces,
        ):
            async for piece in pieces:
                yield piece

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
        return await self._repeated(lambda: self._peek(collection, entity_id))

    async def _peek(self, collection: Collection, entity_id: str) -> Record | None:
        table = TableMapping(collection, self._dialect)
        async with self._main.lease() as lease:
            try:
                there = await self._dialect.reflect_columns(
                    lease.driver, [sql_name(collection.name)]
                )
            except self._dialect.driver_errors as exc:
                raise self._dialect.translate(exc, doing="look", writes=False) from exc
            if not there:
                return None
            await self._refuse_others(lease)
            for row in await lease.rows(table.fetch_one, [entity_id]):
                return Record(Key(collection.name, entity_id), table.entity(row))
        return None

    async def _refuse_others(self, lease: LeasedConnection) -> None:
        try:
            await refuse_others(self._dialect, lease.driver, self._made.names)
        except self._dialect.driver_errors as exc:
            raise self._dialect.translate(exc, doing="look", writes=False) from exc

    # -- what is there -----------------------------------------------------------------------

    async def exists(self) -> bool:
        if not self._dialect.exists():
            return False
        async with self._main.lease() as lease:
            return bool(await self._made.found(lease))

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
                raise self._dialect.translate(exc, doing="compare", writes=False) from exc

    async def undeclared(self) -> list[str]:
        if not self._dialect.exists():
            return []
        async with self._main.lease() as lease:
            try:
                tables = await self._dialect.found_tables(lease.driver)
                columns = await self._dialect.reflect_columns(lease.driver, tables)
            except self._dialect.driver_errors as exc:
                raise self._dialect.translate(exc, doing="look", writes=False) from exc
            system = {PROBES, *(sql_name(each.name) for each in SYSTEM_COLLECTIONS)}
            found: list[str] = []
            for table, there in columns.items():
                if table in self._made.names:
                    name = declared_name(table)
                    found += [
                        f"{name}.{declared_name(column)}"
                        for column in there
                        if not self._made.is_declared(table, column)
                        and await _holds(lease, f"{_name(table)} WHERE {_name(column)} IS NOT NULL")
                    ]
                elif (
                    table not in system
                    and there.keys() >= {DOC, SIDE, VERSION}
                    and await _holds(lease, _name(table))
                ):
                    found.append(declared_name(table))
        return sorted(found)

    # -- independent writes ------------------------------------------------------------------

    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        return await self._repeated(lambda: self._write_each(changes))

    async def _write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        puts = self.writer.imports_in(changes)
        if puts is not None and await self._import(puts):
            return [each.import_version for each in puts]
        marked = any(each.mark is not None for each in changes)
        async with self.writing() as lease:
            if marked or self._dialect.needs_transactions:
                return await self._write_together(lease, changes)
            return await self._write_apart(lease, changes)

    async def _import(self, puts: Sequence[Put]) -> bool:
        """Write imports the quick way; whether all were applied.

        Which ones were not is found out by the usual way, which writes the others once more as they
        are.
        """
        rows = await self.writer.import_rows(puts)
        try:
            async with self.writing() as lease, lease.bulk():
                return await self.writer.imported(lease, puts[0].key.collection, rows)
        except REFUSALS:
            return False

    async def _write_apart(
        self, lease: LeasedConnection, changes: Sequence[Change]
    ) -> list[Outcome]:
        waves = self.writer.dependency_batches(changes)
        outcomes: list[Outcome] = [None] * len(changes)
        if self._dialect.batches_commit_together and self.writer.statements(waves) > 1:
            try:
                async with lease.transaction():
                    for batch in chain.from_iterable(waves):
                        await self.writer.send(_Plain(lease), lease, batch, outcomes, halves=False)
            except REFUSALS:
                return await self._write_together(lease, changes)
            return outcomes
        run = _Retrying(lease, self._config.timeout)
        failure: StorageError | None = None
        first = True
        for batch in chain.from_iterable(waves):
            if failure is None:
                try:
                    await self.writer.send(run, lease, batch, outcomes, halves=True)
                except StorageError as exc:
                    if first:
                        raise
                    # What landed before must not be told as failed.
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
        """Changes with their marks in one commit; in halves where the database refuses that."""
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
                pause = await _paused(pause)
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
        run = _Plain(lease)
        failed = len(changes)  # the first that did, where only what comes before it counts
        for batch in chain.from_iterable(self.writer.dependency_batches(changes)):
            if min(batch.places) > failed:
                continue
            wanted = batch.before(failed)
            await self.writer.send(run, lease, wanted, outcomes, halves=halves)
            if all_or_none:
                for place in wanted.places:
                    if isinstance(outcomes[place], StorageError):
                        failed = min(failed, place)
        if failed < len(changes):
            return
        marks = [
            marker_put(change.mark, getattr(change, "written_at", ""))
            for change, outcome in zip(changes, outcomes, strict=True)
            if change.mark is not None and not isinstance(outcome, StorageError)
        ]
        if marks:
            noted: list[Outcome] = [None] * len(marks)
            await self._send(lease, marks, noted, all_or_none=False)
            for outcome in noted:
                if isinstance(outcome, StorageError):
                    raise outcome

    # -- sessions ----------------------------------------------------------------------------

    def session(self, isolation: Isolation | None) -> SQLSession:
        return SQLSession(self, isolation)

    async def apply(self, lease: LeasedConnection, changes: Sequence[Change]) -> list[Outcome]:
        """The changes of a session, up to the first that fails."""
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

        return await self._repeated(once)

    async def _repeated(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """Do work again that left nothing behind: it lost a race, its statement was prepared for
        tables of before, its session had ended, or its server takes no writes."""
        deadline = time.monotonic() + self._config.timeout
        pause = _FIRST_PAUSE
        while True:
            try:
                return await work()
            except (ConcurrencyConflictError, ReadOnlyStoreError) as exc:
                if not exc.retryable or exc.outcome_unknown or time.monotonic() > deadline:
                    raise
            except UnavailableError as exc:
                # A connection of the pool whose end was not known yet.
                if not isinstance(exc.__cause__, SessionEndedError) or time.monotonic() > deadline:
                    raise
            pause = await _paused(pause)

    async def execute(
        self, lease: LeasedConnection, sql: str, params: Sequence[object] | Mapping[str, object]
    ) -> list[dict[str, Value]]:
        """A statement of the caller, in the transaction that is open."""
        text, args = bind(
            self._dialect.strip_for_update(sql), params, self._dialect.placeholder_prefix
        )
        return await lease.fetch_dicts(text, args)

    # -- life --------------------------------------------------------------------------------

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
                self._made.indexes[query.collection],
                comparisons_in(query.where),
            )
        except self._dialect.driver_errors as exc:
            raise self._dialect.translate(exc, doing="explain", writes=False) from exc
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
        """How a query would run on tables that are not there: on some that nobody else sees."""
        try:
            async with self._dialect.scratch(driver) as scratch:
                for statement in await self._made.lacking(scratch):
                    await self._dialect.rows(scratch, statement, ())
                return await self._explain(scratch, self.tables[query.collection], query)
        except self._dialect.driver_errors as exc:
            error = self._dialect.translate(exc, doing="explain", writes=False)
            if isinstance(error, ReadOnlyStoreError | PermissionDeniedError):
                return _NOTHING  # not even those can be made
            raise error from exc

    async def probe(self) -> None:
        parameters = [self._dialect.parameter(n, "text") for n in (1, 2)]
        name = f"probe-{secrets.token_hex(8)}"
        await self._repeated(lambda: self._probe(name, parameters))

    async def _probe(self, name: str, parameters: Sequence[str]) -> None:
        async with self.writing() as lease:
            await lease.rows(
                f"INSERT INTO {PROBES} (name, value) VALUES ({parameters[0]}, {parameters[1]})",
                (name, "probe"),
                doing="write",
                writes=True,
            )
            found = await lease.rows(
                f"DELETE FROM {PROBES} WHERE name = {parameters[0]} RETURNING value",
                (name,),
                doing="delete",
                writes=True,
            )
        if [tuple(each) for each in found] != [("probe",)]:
            raise UnavailableError("what was written did not come back")

    async def health(self) -> Mapping[str, Value]:
        if not self._dialect.exists():
            return {"problems": []}
        problems: list[Value] = []
        async with self._main.lease() as lease:
            if self._ready or self._readable:
                # They were there once, and nobody makes them again while this store is open.
                columns = await self._made.found(lease)
                lacking = self._made.lacking_in(columns)
                problems += [f"{each} was dropped while the store was in use" for each in lacking]
            try:
                names = [sql_name(each) for each in self.schema]
                found = await self._dialect.health(lease.driver, names)
            except self._dialect.driver_errors as exc:
                raise self._dialect.translate(exc, doing="look", writes=False) from exc
        more = found.pop("problems", [])
        problems += more if isinstance(more, list) else []
        figures = self._main.figures()
        if self._readers is not self._main:
            figures = {name: n + self._readers.figures()[name] for name, n in figures.items()}
        return {
            **found,
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
    """The pool, the part of it that gets by key use (the same where there is no gain), and that of
    streams."""
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
        exhausted=f"all {config.max_streams} streams are open: raise max_streams, or close some",
        waits=False,
    )
    lanes = dialect.capabilities.read_concurrency
    if not dialect.separate_read_pool or most < 2 * lanes:
        main = Connections(dialect, config, kept=kept, most=most, exhausted=exhausted)
        return main, main, streams
    main = Connections(
        dialect, config, kept=max(kept - lanes, 1), most=most - lanes, exhausted=exhausted
    )
    readers = Connections(
        dialect, config, kept=lanes, most=lanes, exhausted=exhausted, read_only=True
    )
    return main, readers, streams


async def _holds(lease: LeasedConnection, what: str) -> bool:
    return bool(await lease.rows(f"SELECT 1 FROM {what} LIMIT 1"))


def _name(name: str) -> str:
    """A name that somebody else may have given, as an SQL identifier."""
    escaped = name.replace('"', '""')
    return f'"{escaped}"'


class _Plain:
    """Runs a statement in a transaction: whatever fails it ends it."""

    def __init__(self, lease: LeasedConnection) -> None:
        self._lease = lease

    async def __call__(self, sql: str, args: Sequence[object]) -> Sequence[Sequence[object]]:
        return await self._lease.rows(sql, args, doing="write", writes=True)


class _Retrying:
    """Runs a statement that is a transaction by itself, again when it lost a race."""

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
            pause = await _paused(pause)


async def _paused(pause: float) -> float:
    """Wait for a random part of a pause; returns the next one."""
    await asyncio.sleep(random.uniform(0, pause))
    return min(pause * 2, _MAX_PAUSE_SECONDS)


def _fail(batch: StatementGroup, exc: StorageError, outcomes: list[Outcome]) -> None:
    for place in batch.places:
        outcomes[place] = exc.copy()
