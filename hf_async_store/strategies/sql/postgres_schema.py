"""The tables in PostgreSQL: existing ones are changed only by `apply_schema`, while programs use them.

A key column is added in steps, so that no step holds a lock for long, and each can be interrupted and run
again:

1. One short transaction adds the columns, and increases the generation of the table. From now on, the
   server refuses rows of programs that do not know the columns: the catalogue is read again then.
2. The rows of earlier generations are filled, in batches.
3. The indexes are built CONCURRENTLY. One whose build was interrupted is invalid; it is dropped.
4. The catalogue says that queries may use the columns and indexes.

A session lock excludes other processes that do the same. They poll for it: a wait in the server would be
one for which the build of an index would wait.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Final

import msgspec

from hf_async_store.backoff import Backoff
from hf_async_store.driver import SchemaChange, SchemaProgress, run_to_completion
from hf_async_store.errors import ConfigurationError, LockTimeoutError, SchemaMismatchError
from hf_async_store.schema import Schema
from hf_async_store.strategies.sql.catalogue import Catalogue, DeclaredIndex, Entry
from hf_async_store.strategies.sql.ddl import SchemaSync, foreign
from hf_async_store.strategies.sql.dialect import Dialect, Relation
from hf_async_store.strategies.sql.names import (
    DOC,
    GENERATION,
    generation_constraint,
    key_column,
    quoted,
    unique_column,
)
from hf_async_store.strategies.sql.postgres_feed import FEED_EVENTS, IDENTIFIED_SQL, feed_statements
from hf_async_store.strategies.sql.postgres_jsonb import array_text, optional_bytes_array_text
from hf_async_store.strategies.sql.postgresql import INVALID, PostgreSQL
from hf_async_store.strategies.sql.rows import Table
from hf_async_store.unique import Fields, cannot_be_unique
from hf_async_store.values import VERSION

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.connections import LeasedConnection

_LOCK_SECONDS: Final = 600.0
"""How long to try again for the lock of a table, and for that of another process that applies."""

_TABLE_LOCK_MS: Final = 100
"""How long one attempt waits for the lock of a table: writers wait behind it."""

_BATCH: Final = 256


class PostgresSchema(SchemaSync):
    """The tables of a store in PostgreSQL."""

    feed_events: ClassVar[Sequence[str]] = FEED_EVENTS

    def __init__(self, schema: Schema, dialect: Dialect) -> None:
        assert isinstance(dialect, PostgreSQL)
        super().__init__(schema, dialect)
        self._server = dialect

    def create_table(self, table: Table) -> str:
        generation = quoted(GENERATION)
        columns = [
            f"{table.key} {self.grammar.text_type} PRIMARY KEY",
            f"{VERSION} bigint NOT NULL",
            f"{DOC} jsonb NOT NULL",
            f"{generation} int NOT NULL",
            *(f"{each} bytea NOT NULL" for each in table.key_columns),
            *(f"{each} bytea" for each in table.columns[len(table.key_columns) :]),
            f"CONSTRAINT {quoted(generation_constraint(table.collection))} "
            f"CHECK ({generation} >= {table.generation})",
        ]
        # A row that is written again then mostly stays in its page, and in its entries of the indexes.
        return f"CREATE TABLE {table.name} ({', '.join(columns)}) WITH (fillfactor = 90)"

    def extension(
        self, name: str, entry: Entry, relations: Mapping[str, Relation]
    ) -> tuple[Entry, list[str]]:
        """See `SchemaSync`: only the declaration is recorded."""
        del name, relations
        return entry, []

    async def feed_ddl(self, driver: Any, name: str, entry: Entry) -> list[str]:
        """See `SchemaSync`."""
        table = Table(name, entry, self.grammar, self.names)
        [[identified]] = await self.dialect.rows(driver, IDENTIFIED_SQL, ())
        schema = await self._server.schema_name(driver)
        return feed_statements(self.names, table, schema, identified=identified)

    async def ensure(self, lease: LeasedConnection, *, latest: bool) -> Catalogue:
        """See `SchemaSync`. Others may read a view for long; nothing waits behind this for longer than
        an attempt."""
        backoff = Backoff(self._server.timeout, first=0.02, longest=1.0)
        while True:
            try:
                return await super().ensure(lease, latest=latest)
            except LockTimeoutError:
                if not await backoff.pause():
                    raise

    async def enforce(
        self, driver: Any, name: str, entry: Entry, unique: Sequence[Fields]
    ) -> Entry:
        """See `SchemaSync`. Another program may have inserted a row meanwhile: then the constraint is
        violated, and the catalogue is read again."""
        changed = entry.enforcing(unique)
        await self._run(driver, self._extended(name, entry, changed, is_empty=True))
        for fields in unique:
            index = self.names.unique_index(name, fields)
            if (
                await self._existing_index(driver, name, index) is not None
            ):  # of an interrupted apply
                await self._run(driver, f"DROP INDEX {quoted(index)}")
            await self._run(driver, self.unique_index_ddl(name, fields))
        return changed

    async def replace_view(self, driver: Any, name: str, entry: Entry) -> None:
        """See `SchemaSync`. If only columns are added, the view keeps its privileges, and views of other
        programs may depend on it."""
        await self._run(driver, f"SET LOCAL lock_timeout = {_TABLE_LOCK_MS}")
        sql = f"CREATE OR REPLACE VIEW {self.view_definition(name, entry)}"
        with self.dialect.translating(f"run {sql}"):
            handle = await self._server.begin(driver, None)  # a savepoint
            try:
                await self.dialect.rows(driver, sql, ())
            except BaseException as exc:
                await run_to_completion(self.dialect.roll_back(handle))
                if not isinstance(exc, self._server.other_columns):
                    raise
                await self._recreate_view(driver, name, entry)
            else:
                await run_to_completion(self.dialect.commit(handle))

    async def _recreate_view(self, driver: Any, name: str, entry: Entry) -> None:
        view = self.names.view(name)
        sql = f"DROP VIEW {quoted(view)}"
        with self.dialect.translating(f"run {sql}"):
            try:
                await self.dialect.rows(driver, sql, ())
            except self._server.has_dependents as exc:
                raise SchemaMismatchError(
                    f"the view {view} must be created again, because the type of a field of {name} "
                    f"was changed, but others depend on it ({exc.detail}): drop them, and create them "
                    "again after the next write. Nothing was changed"
                ) from exc
        await self._run(driver, f"CREATE VIEW {self.view_definition(name, entry)}")

    def changes_of(
        self, name: str, known: Entry | None, entry: Entry, relations: Mapping[str, Relation]
    ) -> list[SchemaChange]:
        """See `SchemaSync`; also invalid indexes."""
        unrecorded = [
            self.names.index(name, entry.indexed(each.fields))
            for each in entry.indexes
            if not each.ready
        ]
        valid = {
            index: relation
            for index, relation in relations.items()
            if relation.kind != INVALID and index not in unrecorded
        }
        invalid = {
            "-".join([*fields, "index"])
            for fields in entry.wanted_indexes()
            if self.index_kind(name, fields, relations) == INVALID
        }
        return [
            msgspec.structs.replace(
                change,
                kind="rebuild invalid index",
                detail="the index is invalid: its build was interrupted, or is in progress",
            )
            if change.kind == "create index" and change.name in invalid
            else change
            for change in super().changes_of(name, known, entry, valid)
        ]

    async def apply(
        self, lease: LeasedConnection, progress: SchemaProgress, *, complete: bool
    ) -> Catalogue:
        """See `SchemaSync`."""
        del complete  # a program with an older declaration reads the catalogue again when it writes
        driver = lease.driver
        changes = [*await self.changes(lease), *await self.unenforced(lease)]
        try:
            with self.dialect.translating("change the tables"):
                if changes:
                    async with self._exclusively(driver):
                        for name in self.schema:
                            await self._apply(driver, name, progress)
                return await self._catalogue(driver)
        except BaseException:
            lease.state_unknown = True  # its settings and its lock end with the session
            raise

    @asynccontextmanager
    async def _exclusively(self, driver: Any) -> AsyncIterator[None]:
        """Exclude other processes that do the same, and lift the time limits of the session."""
        if self._server.needs_transactions:
            raise ConfigurationError(
                "apply_schema needs a connection to the server itself, without pgbouncer, because it "
                "holds a lock of the session"
            )
        backoff = Backoff(_LOCK_SECONDS, first=0.05, longest=1.0)
        key = await self._server.lock_key(driver, "apply")
        sql = "SELECT pg_catalog.pg_try_advisory_lock($1::bigint)"
        while not (await self.dialect.rows(driver, sql, (key,)))[0][0]:
            if not await backoff.pause():
                raise LockTimeoutError("another process is changing the tables (apply_schema)")
        await self._server.run_unlimited(driver, "SET statement_timeout = 0; SET lock_timeout = 0")
        yield
        await self._server.run_unlimited(
            driver,
            "RESET statement_timeout; RESET lock_timeout; "
            f"SELECT pg_catalog.pg_advisory_unlock({key}::bigint)",
        )

    async def _catalogue(self, driver: Any) -> Catalogue:
        catalogue, _ = await self._read(driver)
        assert catalogue is not None, "this store has recorded its declaration"
        return catalogue

    # -- one table ---------------------------------------------------------------------------

    async def _apply(self, driver: Any, name: str, progress: SchemaProgress) -> None:
        catalogue = await self._catalogue(driver)
        relations = await self.dialect.relations(driver)
        entry = catalogue.entries[name]
        changes = self.changes_of(name, entry, entry, relations)
        unique = self.to_enforce(name, entry)
        changes += [_unique_change(name, fields) for fields in unique]
        if not changes:
            return
        for each in changes:
            progress(each, 0, None)
        if self.lacks_feed(name, entry, relations):
            self.refuse_foreign_feed(name, entry, relations)
            await self._add_feed(driver, name, entry)
        columns = [each for each in changes if each.kind in ("add key column", "unique index")]
        if columns:
            await self._add_columns(driver, name, unique)
            entry = (await self._catalogue(driver)).entries[name]
            await self._fill(
                driver, Table(name, entry, self.grammar, self.names), columns, progress
            )
            await self._change(driver, name, lambda old: (_filled(old, entry), []))
        for fields in entry.wanted_indexes():
            index = self.names.index(name, fields)
            await self._build(driver, name, index, self.index_ddl(name, entry, fields))
        for fields in unique:
            await self._build_unique(driver, name, fields)
        await self._change(driver, name, lambda old: (_ready(old, entry).enforcing(unique), []))
        await self._server.run_unlimited(driver, f"ANALYZE {quoted(self.names.table(name))}")
        for each in changes:
            progress(each, 1, 1)

    async def _add_columns(self, driver: Any, name: str, unique: Sequence[Fields]) -> None:
        """Add the missing columns, and refuse rows of programs that do not know them."""

        def change(entry: Entry) -> tuple[Entry, list[str]]:
            changed = entry.with_unique_columns(unique)
            new = [each for each in entry.wanted_columns() if each not in entry.columns]
            if not new and changed == entry:
                return entry, []
            changed = msgspec.structs.replace(
                changed,
                columns={**entry.columns, **dict.fromkeys(new, False)},
                generation=entry.generation + 1,
            )
            return changed, [self._extended(name, entry, changed, is_empty=False)]

        await self._change_patiently(driver, name, change)

    async def _add_feed(self, driver: Any, name: str, entry: Entry) -> None:
        """Create the change feed: every transaction that commits from then on is in it."""
        statements = await self.feed_ddl(driver, name, entry)
        await self._change_patiently(driver, name, lambda old: (old.feeding(), statements))

    async def _change_patiently(
        self, driver: Any, name: str, change: Callable[[Entry], tuple[Entry, list[str]]]
    ) -> None:
        """As `_change`, repeated while others have locked the table."""
        backoff = Backoff(_LOCK_SECONDS, first=0.02, longest=1.0)
        while True:
            try:
                return await self._change(driver, name, change)
            except LockTimeoutError:
                if not await backoff.pause():
                    raise

    async def _change(
        self, driver: Any, name: str, change: Callable[[Entry], tuple[Entry, list[str]]]
    ) -> None:
        """Change a table and its entry in the catalogue in one short transaction.

        Args:
            change: returns the new entry, and the statements that change the table.
        """
        async with self.dialect.changing_tables(driver):
            await self._run(driver, f"SET LOCAL lock_timeout = {_TABLE_LOCK_MS}")
            catalogue = await self._catalogue(driver)
            entry, statements = change(catalogue.entries[name])
            for each in statements:
                await self._run(driver, each)
            changed = catalogue.with_entries({name: entry})
            if changed is not catalogue:
                await self.record(driver, changed, {name: entry})

    async def _fill(
        self, driver: Any, table: Table, changes: Sequence[SchemaChange], progress: SchemaProgress
    ) -> None:
        """Write the key columns of the rows of earlier generations. Rows that others have locked are left
        for later."""
        old = f"t.{quoted(GENERATION)} < {table.generation}"
        source = f"FROM {table.name} AS t WHERE {old}"
        [[total]] = await self._server.read_committed(driver, f"SELECT count(*) {source}", ())
        done, last = 0, ""
        backoff = Backoff(_LOCK_SECONDS, first=0.02, longest=1.0)
        while True:
            keys = await self._fill_batch(driver, table, source, last)
            done += len(keys)
            for each in changes:
                progress(each, min(done, total), total)
            if keys:
                last = keys[-1]
                continue
            if not await self._server.read_committed(driver, f"SELECT 1 {source} LIMIT 1", ()):
                return
            last = ""
            if not await backoff.pause():
                raise LockTimeoutError(f"rows of {table.name} are locked by other transactions")

    async def _fill_batch(self, driver: Any, table: Table, source: str, last: str) -> list[str]:
        """Fill the next rows after an id; returns their ids."""
        # Of an enforced index, each row has what its last writer gave it: nothing, if its entity expired.
        enforced = {unique_column(each.fields) for each in table.entry.unique if each.enforced}
        kept = set(map(quoted, enforced))
        columns = ", ".join(
            f"{column} = i.c{number}"
            for number, column in enumerate(table.columns, 1)
            if column not in kept
        )
        names = ", ".join(f"c{number}" for number in range(len(table.columns) + 1))
        arrays = ", ".join(
            f"${number}::text::bytea[]" for number in range(2, len(table.columns) + 2)
        )
        handle = await self._server.begin(driver, "read_committed")
        try:
            rows = await self.dialect.rows(
                driver,
                f"SELECT {table.selected} {source} AND t.{table.key} > $1::text "
                f"ORDER BY t.{table.key} LIMIT {_BATCH} FOR NO KEY UPDATE SKIP LOCKED",
                (last,),
            )
            if rows:
                keys = [table.stored_keys(table.entity(row)) for row in rows]
                args = map(optional_bytes_array_text, zip(*keys, strict=True))
                await self.dialect.rows(
                    driver,
                    f"UPDATE {table.name} AS t SET {columns}, "
                    f"{quoted(GENERATION)} = {table.generation} "
                    f"FROM ROWS FROM (unnest($1::text::text[], {arrays})) AS i ({names}) "
                    f"WHERE t.{table.key} = i.c0",
                    (array_text([row[0] for row in rows]), *args),
                )
        except BaseException:
            await run_to_completion(self.dialect.roll_back(handle))
            raise
        await run_to_completion(self.dialect.commit(handle))
        return [row[0] for row in rows]

    async def _existing_index(self, driver: Any, name: str, index: str) -> str | None:
        """The kind of an index of a collection; None if it does not exist.

        Raises:
            SchemaMismatchError: something else has its name.
        """
        found = (await self.dialect.relations(driver)).get(index)
        if found is not None and found.table != self.names.table(name):
            raise foreign(found.kind, index, name)
        return None if found is None else found.kind

    async def _build(self, driver: Any, name: str, index: str, statement: str) -> None:
        """Build an index of a collection without blocking writers, unless it exists and is valid."""
        kind = await self._existing_index(driver, name, index)
        if kind == INVALID:
            await self._server.run_unlimited(driver, f"DROP INDEX CONCURRENTLY {quoted(index)}")
        elif kind is not None:
            return
        concurrently = statement.replace("INDEX", "INDEX CONCURRENTLY", 1)
        await self._server.run_unlimited(driver, concurrently)

    def _extended(self, name: str, entry: Entry, changed: Entry, *, is_empty: bool) -> str:
        """The statement that adds columns to a table, and refuses rows of programs that do not know them.

        Args:
            changed: the entry with the new columns.
            is_empty: the table has no rows, which the statement verifies.
        """
        new = [key_column(each) for each in changed.columns if each not in entry.columns]
        new += [
            unique_column(each)
            for each in changed.unique_columns
            if each not in entry.unique_columns
        ]
        constraint = quoted(generation_constraint(name))
        actions = [f"ADD COLUMN {quoted(each)} bytea" for each in new]
        actions += [
            f"DROP CONSTRAINT IF EXISTS {constraint}",
            f"ADD CONSTRAINT {constraint} CHECK ({quoted(GENERATION)} >= {changed.generation})"
            + ("" if is_empty else " NOT VALID"),
        ]
        return f"ALTER TABLE {quoted(self.names.table(name))} {', '.join(actions)}"

    async def _build_unique(self, driver: Any, name: str, fields: tuple[str, ...]) -> None:
        """Build the index of a unique column.

        Raises:
            SchemaMismatchError: other programs have written the same values meanwhile. The index is
                dropped, because the server would enforce it even though it is invalid.
        """
        index = self.names.unique_index(name, fields)
        try:
            await self._build(driver, name, index, self.unique_index_ddl(name, fields))
        except self._server.duplicates as exc:
            await self._server.run_unlimited(driver, f"DROP INDEX CONCURRENTLY {quoted(index)}")
            raise cannot_be_unique(fields, "two entities have the same values") from exc


def _unique_change(collection: str, fields: tuple[str, ...]) -> SchemaChange:
    index = "-".join([*fields, "index"])
    return SchemaChange("unique index", collection, index, "the values are compared, and enforced")


def _filled(entry: Entry, known: Entry) -> Entry:
    """With the key columns ready that were filled."""
    columns = {each: done or each in known.columns for each, done in entry.columns.items()}
    return msgspec.structs.replace(entry, columns=columns)


def _ready(entry: Entry, known: Entry) -> Entry:
    """With the indexes ready that were built."""
    built = [each.fields for each in known.indexes]
    indexes = tuple(
        DeclaredIndex(each.fields, each.ready or each.fields in built) for each in entry.indexes
    )
    return msgspec.structs.replace(entry, indexes=indexes)
