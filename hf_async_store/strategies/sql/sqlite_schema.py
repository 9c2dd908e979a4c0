"""The tables in SQLite: the first write of a process adds what is missing, under the write lock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from hf_async_store.driver import SchemaChange, SchemaProgress
from hf_async_store.errors import InvalidInputError
from hf_async_store.strategies.sql.catalogue import Catalogue, Entry
from hf_async_store.strategies.sql.connections import LeasedConnection
from hf_async_store.strategies.sql.ddl import SchemaSync
from hf_async_store.strategies.sql.dialect import Relation
from hf_async_store.strategies.sql.names import DOC, key_column, quoted, unique_column
from hf_async_store.strategies.sql.rows import Table
from hf_async_store.strategies.sql.sqlite_feed import FEED_EVENTS, feed_statements
from hf_async_store.unique import Fields, cannot_be_unique
from hf_async_store.values import VERSION


class SQLiteSchema(SchemaSync):
    """The tables of a store in SQLite."""

    feed_events: ClassVar[Sequence[str]] = FEED_EVENTS

    def create_table(self, table: Table) -> str:
        columns = [
            f"{table.key} TEXT PRIMARY KEY NOT NULL",
            f"{VERSION} BIGINT NOT NULL",
            f"{DOC} TEXT NOT NULL",
            *(f"{each} BLOB NOT NULL" for each in table.key_columns),
            *(f"{each} BLOB" for each in table.columns[len(table.key_columns) :]),
        ]
        return f"CREATE TABLE {table.name} ({', '.join(columns)})"

    def extension(
        self, name: str, entry: Entry, relations: Mapping[str, Relation]
    ) -> tuple[Entry, list[str]]:
        """See `SchemaSync`: all missing key columns, filled, indexes, and a change feed."""
        table, complete = quoted(self.names.table(name)), entry.completed()
        new = {
            quoted(key_column(each)): f"hf_fill({DOC}, '{each}')"
            for each in complete.columns
            if each not in entry.columns
        }
        # The default, which a new column needs, is the key of a missing value.
        statements = [
            f"ALTER TABLE {table} ADD COLUMN {column} BLOB NOT NULL DEFAULT x'00'" for column in new
        ]
        if new:
            values = ", ".join(f"{column} = {value}" for column, value in new.items())
            statements.append(f"UPDATE {table} SET {values}")
        statements += [
            self.index_ddl(name, complete, fields)
            for fields in complete.wanted_indexes()
            if self.index_kind(name, fields, relations) is None
        ]
        if self.lacks_feed(name, entry, relations):
            self.refuse_foreign_feed(name, entry, relations)
            complete = complete.feeding()
            statements += feed_statements(
                self.names, Table(name, complete, self.grammar, self.names)
            )
        return complete, statements

    async def feed_ddl(self, driver: Any, name: str, entry: Entry) -> list[str]:
        """See `SchemaSync`."""
        return feed_statements(self.names, Table(name, entry, self.grammar, self.names))

    async def enforce(
        self, driver: Any, name: str, entry: Entry, unique: Sequence[Fields]
    ) -> Entry:
        """See `SchemaSync`; also of a table with rows.

        Raises:
            SchemaMismatchError: two rows have the same values.
        """
        table = quoted(self.names.table(name))
        for fields in unique:
            column = quoted(unique_column(fields))
            await self._run(driver, f"ALTER TABLE {table} ADD COLUMN {column} BLOB")
            value = f"hf_digest({DOC}, '{','.join(fields)}')"
            await self._run(driver, f"UPDATE {table} SET {column} = {value}")
            try:
                await self._run(driver, self.unique_index_ddl(name, fields))
            except InvalidInputError as exc:
                raise cannot_be_unique(fields, exc) from exc
        return entry.enforcing(unique)

    async def apply(
        self, lease: LeasedConnection, progress: SchemaProgress, *, complete: bool
    ) -> Catalogue:
        """See `SchemaSync`: the other changes were made by a first write, unless another program has undone
        them since."""
        del complete
        with self.dialect.translating("change the tables"):
            async with self.dialect.changing_tables(lease.driver):
                enforced = await self._make_declared(lease.driver)
        for name, index in enforced:
            progress(SchemaChange("unique index", name, index, "enforced"), 1, 1)
        await lease.rows("ANALYZE", doing="analyze the tables")
        return await self.read(lease) or Catalogue()

    async def _make_declared(self, driver: Any) -> list[tuple[str, str]]:
        """Make what is missing; the collections and names of the unique indexes that are enforced now."""
        catalogue, relations = await self._read(driver)
        assert catalogue is not None, "this store has recorded its declaration"
        entries, enforced = {}, []
        for name in self.schema:
            entry, statements = self.extension(name, catalogue.entries[name], relations)
            for each in statements:
                await self._run(driver, each)
                entries[name] = entry
            if unique := self.to_enforce(name, entry):
                entries[name] = await self.enforce(driver, name, entry, unique)
                enforced += [(name, "-".join([*fields, "index"])) for fields in unique]
        if entries:
            await self.record(driver, catalogue.with_entries(entries), entries)
        return enforced
