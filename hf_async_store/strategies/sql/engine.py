"""The SQL engine: reads, independent writes and sessions on leased connections."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    nullcontext,
)
from itertools import chain, islice
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeVar

import msgspec

from hf_async_store.changes import Change, ChangedMatches, Outcome, Record, TakeChanges
from hf_async_store.coalescing import Coalescer, taking_at_once
from hf_async_store.config import SQLConfig, redacted
from hf_async_store.driver import (
    INTERFACE_VERSION,
    Engine,
    Isolation,
    QueryPlan,
    Reader,
    SchemaChange,
    SchemaProgress,
)
from hf_async_store.errors import (
    ConcurrencyConflictError,
    LockTimeoutError,
    PermissionDeniedError,
    PoolTimeoutError,
    ReadOnlyStoreError,
    SchemaMismatchError,
    StorageError,
    UnavailableError,
)
from hf_async_store.generators import Owned
from hf_async_store.query import Query
from hf_async_store.schema import (
    SYSTEM_NAMES,
    Collection,
    Index,
    Schema,
)
from hf_async_store.strategies.sql import reading
from hf_async_store.strategies.sql.catalogue import (
    Catalogue,
    CatalogueChangedError,
    Entry,
    declared,
)
from hf_async_store.strategies.sql.compiler import paths_in
from hf_async_store.strategies.sql.connections import Connections, LeasedConnection
from hf_async_store.strategies.sql.ddl import SchemaSync
from hf_async_store.strategies.sql.dialect import SessionEndedError
from hf_async_store.strategies.sql.names import DOC, quoted
from hf_async_store.strategies.sql.parameters import bind, check_statement
from hf_async_store.strategies.sql.retried_session import RetriedSession
from hf_async_store.strategies.sql.retries import conflict_backoff
from hf_async_store.strategies.sql.rows import Table, Tables
from hf_async_store.strategies.sql.session import (
    ReadAtOnce,
    SQLReader,
    SQLSession,
    on_live_connection,
)
from hf_async_store.strategies.sql.writer import Replacement
from hf_async_store.values import VERSION, Entity, Key, Value

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.decisions import Stored
    from hf_async_store.strategies.sql.dialect import Dialect
    from hf_async_store.strategies.sql.writer import Writer

Result = TypeVar("Result")

_NO_TABLE: Final = QueryPlan(access="scan", detail="the table does not exist yet")
_CLOCK_TOLERANCE: Final = 1.0
_CALLS_OF_A_COMMIT: Final = 8
"""The maximum number of calls of `write_each` that share a commit."""

_REREAD_SECONDS: Final = 10.0
"""While a declared index is missing, a program that only reads looks this often whether it exists."""


_PATIENCE: Final = 0.1
_LONG_USE: Final = 0.02
"""See `SQLEngine._patience`."""


class _State(NamedTuple):
    """The tables, and what writes to them; replaced together.

    Attributes:
        lacks_table: a declared collection has no table yet.
        read_again_at: by the monotonic clock, when to read the catalogue again.
    """

    tables: Tables
    writer: Writer
    lacks_table: bool
    read_again_at: float


class SQLEngine(Engine):
    """One database.

    Args:
        sync: the tables of the store.
        writer: its class; a new writer is made whenever the tables change.
    """

    interface_version = INTERFACE_VERSION

    def __init__(
        self,
        config: SQLConfig,
        schema: Schema,
        dialect: Dialect,
        sync: type[SchemaSync],
        writer: type[Writer],
    ) -> None:
        self.capabilities = dialect.capabilities
        self.schema = schema
        self._config = config
        self._dialect = dialect
        self._make_writer = writer
        self._main, self._readers, self._queries, self._streams = _pools(config, dialect)
        self._sync = sync(schema, dialect)
        self._state: _State | None = None  # None: the catalogue was not read yet
        self._ready = False  # everything that is declared was created, or recorded
        self._recorded = False  # the latest types of fields were recorded
        # Batches that wait for the only writer share a commit, so that a page of an index is written once.
        self._shared_commits = Coalescer[Sequence[Change], list[Outcome]](
            taking_at_once(self._write_together), lanes=1, size=_CALLS_OF_A_COMMIT, writes=True
        )
        self._prepare_lock = asyncio.Lock()
        self.begin_at_once: dict[str, int] = {}  # see `Replaces`
        self._write_lock = asyncio.Lock()  # used if only one connection can write at a time

    # -- the tables --------------------------------------------------------------------------

    async def _prepare(self) -> None:
        """Create and record what is missing, before the first write."""
        if self._ready:
            return
        async with self._prepare_lock:
            if not self._ready:
                self._dialect.create_file()
                async with self._main.lease() as lease:
                    self._use(await self._sync.ensure(lease, latest=not self._recorded))
                self._ready = self._recorded = True

    def _table(self, collection: str, entry: Entry) -> Table:
        return Table(collection, entry, self._dialect.grammar, self._dialect.names)

    def _tables_of(self, catalogue: Catalogue) -> Tables:
        return Tables(catalogue, self._dialect.grammar, self._dialect.names)

    def _use(self, catalogue: Catalogue) -> Tables:
        """Replace the tables, and the writer."""
        tables = self._tables_of(catalogue)
        wanted = declared(catalogue, self.schema.values())
        is_complete = all(catalogue.entries.get(name) == each for name, each in wanted.items())
        self._state = _State(
            tables,
            self._make_writer(tables, self._config),
            lacks_table=not wanted.keys() <= catalogue.entries.keys(),
            read_again_at=inf if is_complete else monotonic() + _REREAD_SECONDS,
        )
        return tables

    async def tables(self, lease: LeasedConnection) -> Tables:
        """The tables that can be read, from the catalogue if necessary. Nothing is created."""
        tables = self._tables_as_read()
        if tables is not None:
            return tables
        catalogue = await self._sync.read(lease)
        if catalogue is None:
            return self._tables_of(Catalogue())
        return self._use(catalogue)

    def _tables_as_read(self) -> Tables | None:
        """The tables, unless the catalogue must be read for them."""
        state = self._state
        if state is not None and (
            self._ready or (not state.lacks_table and monotonic() < state.read_again_at)
        ):
            return state.tables
        return None

    @property
    def known_tables(self) -> Tables:
        """The tables, after the store was prepared for writing."""
        assert self._state is not None, "the store was prepared"
        return self._state.tables

    async def is_absent(self) -> bool:
        """Whether the store does not exist yet."""
        if self._state is not None:
            return False
        if not self._dialect.exists():
            return True
        return await self._reading_catalogue(self._sync.read) is None

    # -- connections -------------------------------------------------------------------------

    def writing(self) -> AbstractAsyncContextManager[LeasedConnection]:
        """A connection for writes."""
        if self._ready and not self._dialect.single_writer:
            return self._main.lease()
        return _Writing(self, self._main.lease())

    async def begin_writing(self) -> None:
        """Prepare the store, and wait until no other connection of this store writes."""
        if not self._ready:
            await self._prepare()
        if self._dialect.single_writer:
            await self._acquire_write_lock()

    def end_writing(self) -> None:
        if self._dialect.single_writer:
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
        if self._state is None and not self._dialect.exists():
            yield SQLReader(None, {})
            return

        async def begun() -> tuple[SQLReader, AsyncExitStack]:
            async with AsyncExitStack() as stack:
                lease = await stack.enter_async_context(pool.lease())
                tables = await self.tables(lease)
                await stack.enter_async_context(lease.reading(statements=statements))
                return SQLReader(lease, tables), stack.pop_all()

        reader, stack = await on_live_connection(begun)
        async with stack:
            yield reader

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Reader]:
        async with self._reading(self._streams, "many") as reader:
            yield reader

    # -- reads -------------------------------------------------------------------------------

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        if self._state is None and not self._dialect.exists():
            return [None] * len(keys)
        backoff = conflict_backoff(self._config.timeout)

        async def once() -> list[Record | None]:
            async with self._readers.lease() as lease:
                tables = await self.tables(lease)
                if not self._dialect.needs_transactions:
                    return await reading.fetch(lease, tables, keys)
                async with lease.transaction():
                    return await reading.fetch(lease, tables, keys)

        while True:
            try:
                return await on_live_connection(once)
            except ConcurrencyConflictError:
                if not await backoff.pause():
                    raise

    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        few = None if query.limit is None else await self.select_at_once(query)
        if few is not None:
            id_of = self.schema[query.collection].id_of
            for entity in few:
                yield Record(Key(query.collection, id_of(entity)), entity)
            return
        # The caller may take long for each record, and need another connection for it, so the
        # stream uses a pool of its own.
        async with (
            self._reading(self._streams, reading.statements(query)) as reader,
            Owned(reader.select(query)) as stream,
        ):
            async for record in stream:
                yield record

    async def select_batches(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        # On a connection of the main pool: the caller must not use the store meanwhile.
        async with (
            self._reading(self._main, reading.statements(query)) as reader,
            Owned(reader.select_batches(query)) as batches,
        ):
            async for batch in batches:
                yield batch

    async def select_at_once(self, query: Query) -> list[Entity] | None:
        if not reading.may_be_small(query):
            return None
        return await on_live_connection(lambda: self._at_once(query, reading.small, []))

    async def count(self, query: Query) -> int:
        read = reading.count_at_once
        number = await on_live_connection(lambda: self._at_once(query, read, 0))
        if number is not None:
            return number
        async with self._reading(self._main) as reader:
            return await reader.count(query)

    async def _at_once(
        self, query: Query, read: ReadAtOnce[Result], absent: Result
    ) -> Result | None:
        """What one statement without a cursor reads; `absent` if there is no table.

        Where such a statement needs no transaction, it takes one round trip instead of three.
        """
        if self._state is None and not self._dialect.exists():
            return absent
        is_main = self._queries is self._main
        if self._dialect.reads_alone or not is_main:
            try:
                async with self._queries.lease(None if is_main else self._patience()) as lease:
                    tables = self._tables_as_read() or await self.tables(lease)
                    table = tables.by_name.get(query.collection)
                    return absent if table is None else await read(lease, table, query)
            except PoolTimeoutError:
                if is_main:
                    raise
        async with self._reading(self._main) as reader:
            return await reader.at_once(query, read, absent)

    def _patience(self) -> float:
        """How many seconds a query waits for a connection on which it takes one round trip, not three.

        Not at all behind queries that take long.
        """
        return _PATIENCE if self._queries.longest_use < _LONG_USE else 0.0

    async def fetch_undeclared(self, collection: Collection, entity_id: str) -> Record | None:
        if not self._dialect.exists():
            return None

        async def read(lease: LeasedConnection) -> Record | None:
            catalogue = await self._sync.read(lease)
            entry = catalogue.entries.get(collection.name) if catalogue is not None else None
            if entry is None:
                return None
            table = self._table(collection.name, entry)
            for row in await lease.rows(table.fetch_one, [entity_id]):
                return Record(Key(collection.name, entity_id), table.entity(row))
            return None

        return await self._retried(lambda: self._reading_catalogue(read))

    # -- the existing store ------------------------------------------------------------------

    async def exists(self) -> bool:
        return await self._catalogue() is not None

    async def _catalogue(self) -> Catalogue | None:
        """The catalogue, read now; None if the store does not exist."""
        if not self._dialect.exists():
            return None
        return await self._reading_catalogue(self._sync.read)

    async def _reading_catalogue(
        self, read: Callable[[LeasedConnection], Awaitable[Result]]
    ) -> Result:
        """What a function reads on a connection of the main pool."""

        async def once() -> Result:
            async with self._main.lease() as lease:
                return await read(lease)

        return await on_live_connection(once)

    async def is_same_store(self, other: Engine) -> bool:
        if not isinstance(other, SQLEngine) or type(other._dialect) is not type(self._dialect):
            return False
        if not (self._dialect.exists() and other._dialect.exists()):
            return False
        if other is self:
            return True
        if other._dialect.names != self._dialect.names:
            return False
        async with self._main.lease() as mine, other._main.lease() as theirs:
            with self._dialect.translating("compare the stores"):
                return await self._dialect.is_same_store(mine.driver, theirs.driver)

    async def undeclared(self) -> list[str]:
        if not self._dialect.exists():
            return []

        async def read(lease: LeasedConnection) -> list[str]:
            tables = self._tables_of(await self._sync.read(lease) or Catalogue())
            return [
                name
                for name in sorted(tables)
                if name not in self.schema
                and name not in SYSTEM_NAMES
                and await lease.rows(f"SELECT 1 FROM {tables[name].name} LIMIT 1")
            ]

        return await self._reading_catalogue(read)

    async def declarations(self) -> list[Collection]:
        catalogue = await self._catalogue() or Catalogue()
        return [each for each in catalogue.schema().values() if each.name not in SYSTEM_NAMES]

    async def remember(self, collections: Iterable[Collection]) -> None:
        # Everything that is declared was recorded before the first write.
        del collections
        self._main.check_open()
        await self._prepare()

    async def schema_changes(self) -> list[SchemaChange]:
        if not self._dialect.exists():
            return self._sync.changes_from(Catalogue(), {})
        return await self._reading_catalogue(self._sync.changes)

    async def unenforced(self) -> list[tuple[str, Index]]:
        if not self.schema.unique or not self._dialect.exists():
            return []
        return await self._reading_catalogue(self._sync.unenforced)

    async def apply_schema(
        self, *, progress: SchemaProgress | None = None, complete: bool = False
    ) -> None:
        report = progress or (lambda change, done, total: None)
        planned = await self.schema_changes()
        await self._retried(self._prepare)
        async with self.writing() as lease:
            remaining = await self._sync.changes(lease)
            for each in planned:
                if each not in remaining:  # it was made before the lease, as before any write
                    report(each, 1, 1)
            self._use(await self._sync.apply(lease, report, complete=complete))

    # -- independent writes ------------------------------------------------------------------

    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        if not self._dialect.single_writer:
            return await self._write(lambda: changes, patient=True)
        [outcomes] = await self._shared_commits.submit([changes], None)
        if isinstance(outcomes, StorageError):
            raise outcomes
        return outcomes

    async def _write_together(self, calls: Sequence[Sequence[Change]]) -> list[list[Outcome]]:
        """The outcomes of several calls of `write_each`, which share one commit."""
        changes = calls[0] if len(calls) == 1 else list(chain.from_iterable(calls))
        outcomes = iter(await self._write(lambda: changes, patient=True))
        return [list(islice(outcomes, len(each))) for each in calls]

    async def change_matches(self, query: Query, change: Change) -> ChangedMatches | None:
        # Changes that wait for the only writer share a commit, and these would have one of their own.
        # Before the first write, something may have to be created, which is only done for what matches.
        if self._write_lock.locked() or not self._ready:
            return None
        if query.has_many_values or not reading.may_be_small(query):
            return None

        async def once() -> ChangedMatches | None:
            async with self.writing() as lease:
                return await self._writer.change_matches(lease, query, change)

        return await self._retried(once)

    def shares_changes(self, key: Key) -> bool:
        return self._state is not None and self._writer.shares_changes(key.collection)

    async def write_unblocked(self, take: TakeChanges) -> list[Outcome]:
        return await self._write(take, patient=False)

    async def _write(self, take: TakeChanges, *, patient: bool) -> list[Outcome]:
        outcomes = await self._retried(lambda: self._write_each(take, patient=patient))
        again = [n for n, each in enumerate(outcomes) if isinstance(each, CatalogueChangedError)]
        if again:
            # Other changes were applied before, and must not be reported as failed.
            self._ready = False
            changes = take()
            remaining = [changes[each] for each in again]
            found: list[Outcome]
            try:
                found = await self._write(lambda: remaining, patient=patient)
            except StorageError as exc:
                found = [exc.copy() for _ in again]
            for place, outcome in zip(again, found, strict=True):
                outcomes[place] = outcome
        return outcomes

    async def _write_each(self, take: TakeChanges, *, patient: bool) -> list[Outcome]:
        async with self.writing() as lease:
            return await self._writer.write_each(lease, take, patient=patient)

    @property
    def _writer(self) -> Writer:
        assert self._state is not None, "the store was prepared"
        return self._state.writer

    # -- sessions ----------------------------------------------------------------------------

    def session(self, isolation: Isolation | None) -> SQLSession:
        return SQLSession(self, isolation)

    def retried_session(self, isolation: Isolation | None) -> SQLSession:
        begins_at_once = self._dialect.single_writer or self._dialect.needs_transactions
        if begins_at_once or isolation not in (None, self._config.isolation):
            return self.session(isolation)
        return RetriedSession(self, isolation)

    def changing(self, lease: LeasedConnection) -> AbstractAsyncContextManager[None]:
        """See `Connected`."""
        del lease
        return nullcontext()

    async def apply(self, lease: LeasedConnection, changes: Sequence[Change]) -> list[Outcome]:
        """Apply the changes of a session, up to the first that fails."""
        try:
            return await self._writer.apply(lease, changes)
        except CatalogueChangedError:
            if not self._dialect.single_writer:
                self._ready = False
                raise
        # The transaction has the write lock of the store, so the catalogue does not change again.
        self._use(await self._sync.read(lease) or Catalogue())
        return await self._writer.apply(lease, changes)

    def replacement(self, change: Change, stored: Stored) -> Replacement | None:
        """See `Writer.replacement`."""
        pending = self._writer.replacement(change, stored)
        return None if pending is None else Replacement(self._writer, pending)

    async def replace(self, lease: LeasedConnection, replacement: Replacement) -> None:
        """See `Writer.replace`."""
        try:
            await replacement.writer.replace(lease, replacement.pending)
        except CatalogueChangedError:
            self._ready = False
            raise

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
        backoff = conflict_backoff(self._config.timeout)
        while True:
            try:
                return await work()
            except CatalogueChangedError:
                self._ready = False
                if not await backoff.pause():
                    raise
            except (ConcurrencyConflictError, ReadOnlyStoreError) as exc:
                if not exc.retryable or exc.outcome_unknown or not await backoff.pause():
                    raise
            except UnavailableError as exc:
                # The server had ended the session of a pooled connection before this statement.
                ended = isinstance(exc.__cause__, SessionEndedError)
                if not ended or not await backoff.pause():
                    raise

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
        if self._state is None and not self._dialect.exists():
            return await self._explain_absent(None, query)

        async def read(lease: LeasedConnection) -> QueryPlan:
            table = (await self.tables(lease)).get(query.collection)
            if table is None:
                return await self._explain_absent(lease.driver, query)
            return await self._explain(lease.driver, table, query)

        return await self._reading_catalogue(read)

    async def _explain(self, driver: Any, table: Table, query: Query) -> QueryPlan:
        compiled = await reading.compiled_query(table, query)
        names = self._dialect.names
        indexes = {
            names.index(table.collection, table.entry.indexed(each.fields)): each
            for each in self.schema[query.collection].indexes
        }
        with self._dialect.translating("explain the query"):
            plan = await self._dialect.explain(
                driver, compiled.sql, compiled.args, indexes, len(paths_in(query.where))
            )
        ready = [each.fields for each in table.entry.indexes if each.ready]
        missing = [each.name for each in indexes.values() if each.fields not in ready]
        detail = plan.detail
        if missing:
            detail += f" (not ready, see schema_changes: {', '.join(missing)})"
        residual = plan.residual or compiled.residual is not None
        return msgspec.structs.replace(plan, residual=residual, detail=detail)

    async def _explain_absent(self, driver: Any, query: Query) -> QueryPlan:
        """The plan of a query whose table does not exist, made on a temporary table."""
        name = query.collection
        entry = declared(Catalogue(), [self.schema[name]])[name]
        try:
            with self._dialect.translating("explain the query"):
                async with self._dialect.scratch(driver) as scratch:
                    await self._sync.create(scratch, name, entry)
                    return await self._explain(scratch, self._table(name, entry), query)
        except (ReadOnlyStoreError, PermissionDeniedError):
            return _NO_TABLE  # temporary tables cannot be created

    async def probe(self) -> None:
        parameters = [self._dialect.grammar.parameter(n, "text") for n in (1, 2)]
        name = f"probe-{secrets.token_hex(8)}"
        await self._retried(lambda: self._probe(name, parameters))

    async def _probe(self, name: str, parameters: Sequence[str]) -> None:
        catalogue = quoted(self._dialect.names.catalogue)
        async with self.writing() as lease:
            await lease.rows(
                f"INSERT INTO {catalogue} (name, value) VALUES ({parameters[0]}, {parameters[1]})",
                (name, "probe"),
                doing="write",
                writes=True,
            )
            deleted = await lease.rows(
                f"DELETE FROM {catalogue} WHERE name = {parameters[0]} RETURNING value",
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
        changes: list[Value] = []
        async with self._main.lease() as lease:
            if self._state is not None:
                problems += await self._damaged_tables(lease, self._state.tables)
            with self._dialect.translating("check the health"):
                names = {self._dialect.names.table(each): each for each in self.schema}
                report = await self._dialect.health(lease.driver, names)
            if not problems:
                found = await self._sync.changes(lease)
                changes += [f"{each.kind}: {each.detail}" for each in found]
        more = report.pop("problems", [])
        problems += more if isinstance(more, list) else []
        ahead = report.get("server_clock_ahead_seconds", 0)
        expiring = any(each.expires is not None for each in self.schema.values())
        if expiring and isinstance(ahead, float) and abs(ahead) > _CLOCK_TOLERANCE:
            problems.append(
                f"the clock of the server is {ahead:+.1f} s ahead of the one here, by which entities expire"
            )
        figures = self._main.figures()
        for pool in self._pools_for_reads():
            figures = {name: n + pool.figures()[name] for name, n in figures.items()}
        return {
            **report,
            "schema_changes": changes,
            "pool": {**figures},
            "streams": {**self._streams.figures()},
            "problems": problems,
        }

    async def _damaged_tables(self, lease: LeasedConnection, tables: Tables) -> list[str]:
        """The tables that another program dropped or changed while this store was open."""
        problems = []
        for table in tables.values():
            columns = ", ".join(f"t.{each}" for each in (table.key, VERSION, DOC, *table.columns))
            try:
                await lease.rows(f"SELECT {columns} FROM {table.name} AS t WHERE FALSE")
            except SchemaMismatchError as exc:
                problems.append(f"the table {table.name} was dropped or changed: {exc}")
        return problems

    def describe(self) -> Mapping[str, Value]:
        return {**self._dialect.describe(), "configuration": redacted(self._config)}

    def abandon(self) -> None:
        """See `StorageStrategy.abandon`."""
        for each in (self._streams, *self._pools_for_reads(), self._main):
            each.abandon()

    async def close(self) -> None:
        async with AsyncExitStack() as stack:
            for each in (self._main, *self._pools_for_reads(), self._streams):
                stack.push_async_callback(each.close)

    def _pools_for_reads(self) -> list[Connections]:
        return [each for each in (self._readers, self._queries) if each is not self._main]


class _Writing(AbstractAsyncContextManager[LeasedConnection]):
    """See `SQLEngine.writing`. A generator would take twice as long."""

    __slots__ = ("_engine", "_leasing")

    def __init__(
        self, engine: SQLEngine, leasing: AbstractAsyncContextManager[LeasedConnection]
    ) -> None:
        self._engine = engine
        self._leasing = leasing

    async def __aenter__(self) -> LeasedConnection:
        await self._engine.begin_writing()
        try:
            return await self._leasing.__aenter__()
        except BaseException:
            self._engine.end_writing()
            raise

    async def __aexit__(self, *exc_info: Any) -> None:
        try:
            await self._leasing.__aexit__(*exc_info)
        finally:
            self._engine.end_writing()


def _pools(config: SQLConfig, dialect: Dialect) -> tuple[Connections, ...]:
    """The main pool, the pools for reads by key and for small queries, and the pool for streams.

    The pools for reads are the main pool if the dialect needs no separate ones, or if there are too few
    connections.
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
        streams=True,
    )
    levels: list[Isolation | None] = []
    for_reads: list[Connections] = []
    each = dialect.capabilities.read_concurrency
    if dialect.separate_read_pool and most >= 2 * each:
        levels.append(config.isolation)
        # Not serializable: the predicate locks of a query, unlike those of reads by key, would be promoted
        # from rows to the whole table, and abort concurrent transactions.
        if most >= 4 * each:
            levels.append("repeatable_read")
    for isolation in levels:
        kept, most = max(kept - each, 1), most - each
        for_reads.append(
            Connections(
                dialect, config, kept=each, most=each, exhausted=exhausted, isolation=isolation
            )
        )
    main = Connections(dialect, config, kept=kept, most=most, exhausted=exhausted)
    readers, queries = [*for_reads, main, main][:2]
    return main, readers, queries, streams
