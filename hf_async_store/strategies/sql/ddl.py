"""Creates the tables of a store before the first write of a process, and compares them with the catalogue.

What a process declares is added to the catalogue. Only if something is missing, a transaction begins that
excludes every other transaction for DDL; it reads the catalogue again, and creates what is still
missing. A table or view of another program is never changed.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from hf_async_store.driver import SchemaChange, SchemaProgress
from hf_async_store.errors import PermissionDeniedError, SchemaMismatchError
from hf_async_store.schema import SYSTEM_COLLECTIONS, Index, Schema
from hf_async_store.strategies.sql.catalogue import (
    Catalogue,
    Entry,
    declared,
    from_rows,
    read_sql,
    refuse_other_parents,
    to_rows,
)
from hf_async_store.strategies.sql.names import key_column, quoted, sql_name, unique_column
from hf_async_store.strategies.sql.rows import Table
from hf_async_store.unique import Fields
from hf_async_store.values import VERSION

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.connections import LeasedConnection
    from hf_async_store.strategies.sql.dialect import Dialect, Relation


class SchemaSync(ABC):
    """The tables of a store.

    Attributes:
        feed_events: of each, a change feed has a trigger.
    """

    feed_events: ClassVar[Sequence[str]]

    def __init__(self, schema: Schema, dialect: Dialect) -> None:
        self.schema = schema
        self.dialect = dialect
        self.grammar = dialect.grammar
        self.names = dialect.names

    # -- reading -----------------------------------------------------------------------------

    async def read(self, lease: LeasedConnection) -> Catalogue | None:
        """The catalogue; None if the store does not exist. Nothing is created.

        Raises:
            SchemaMismatchError: the tables have the layout of an earlier version.
            NewerFormatError: a later version of this package created the tables.
            PermissionDeniedError: an untrusted role owns a table of the store itself.
        """
        with self.dialect.translating("read the catalogue"):
            return (await self._read(lease.driver))[0]

    async def _read(self, driver: Any) -> tuple[Catalogue | None, dict[str, Relation]]:
        """The catalogue, and the existing relations: see `Dialect.relations`."""
        await self._refuse_untrusted_owners(driver)
        relations = await self.dialect.relations(driver)
        table = self.names.catalogue
        if table in relations:
            return from_rows(await self._catalogue_rows(driver), table), relations
        for name in self.schema:
            self._refuse_foreign(name, relations)
        return None, relations

    async def _catalogue_rows(self, driver: Any) -> Sequence[Sequence[Any]]:
        table = self.names.catalogue
        try:
            with self.dialect.translating(f"read the table {table}"):
                return await self.dialect.rows(driver, read_sql(self.names), ())
        except SchemaMismatchError as exc:
            raise SchemaMismatchError(
                f"{table} is not the catalogue of a store ({exc.__cause__}): rename or drop it, or set "
                "table_prefix; if it was one, restore it from a backup"
            ) from exc.__cause__

    async def _refuse_untrusted_owners(self, driver: Any) -> None:
        """Refuse tables of the store itself if they belong to an untrusted role.

        Such a table may not exist yet, so any role that may create tables in the schema can create it
        first. Its policies, triggers and checks would run with the privileges of this role.
        """
        own = [self.names.catalogue, *(self.names.table(each.name) for each in SYSTEM_COLLECTIONS)]
        own += [
            self.names.feed(name) for name, each in self.schema.items() if each.feed is not None
        ]
        trusted = [table for each in self.schema if (table := self.names.table(each)) not in own]
        for table, owner in (await self.dialect.untrusted_owners(driver, own, trusted)).items():
            raise PermissionDeniedError(
                f"the table {table} belongs to the role {owner!r}, which owns no other table of this "
                "store, so it is not read: if your own live migration created it, change its owner to "
                "that of the other tables (ALTER TABLE ... OWNER TO), else drop it"
            )

    def _refuse_foreign(self, name: str, relations: Mapping[str, Relation]) -> None:
        """Refuse a collection whose names something else has that this store did not create."""
        own = [self.names.view(name), self.names.table(name)]
        if self.schema[name].feed is not None:
            own.append(self.names.feed(name))
        for each in own:
            if each in relations:
                raise foreign(relations[each].kind, each, name)

    async def _refuse_foreign_view(
        self, driver: Any, name: str, relations: Mapping[str, Relation]
    ) -> None:
        """Refuse to replace something that has the name of a view of this store."""
        view = self.names.view(name)
        found = relations.get(view)
        if found is None or (
            found.kind == "view"
            and await self.dialect.view_reads(driver, view, self.names.table(name))
        ):
            return
        raise foreign(found.kind, view, name)

    # -- the first write ---------------------------------------------------------------------

    async def ensure(self, lease: LeasedConnection, *, latest: bool) -> Catalogue:
        """Create what is missing; returns the catalogue.

        Args:
            latest: see `declared`.

        Raises:
            SchemaMismatchError: a collection has another key, a field another parent, or another program
                has a table or view of a name that is needed.
            NewerFormatError, PermissionDeniedError: as `read`.
        """
        driver = lease.driver
        with self.dialect.translating("create the tables"):
            catalogue, relations = await self._read(driver)
            await self.dialect.prepare_writing(driver)
            empty = await self._empty_tables(driver, catalogue, relations)
            if catalogue is None or empty or self._missing(catalogue, relations, latest):
                async with self.dialect.changing_tables(driver):
                    catalogue = await self._create_missing(driver, latest, empty)
        return catalogue

    def _missing(
        self, catalogue: Catalogue, relations: Mapping[str, Relation], latest: bool
    ) -> bool:
        """Whether a write must create or record something first."""
        refuse_other_parents(catalogue, self.schema.values())
        for name, entry in declared(catalogue, self.schema.values(), latest=latest).items():
            if entry != catalogue.entries.get(name) or not (
                self.names.table(name) in relations and self.names.view(name) in relations
            ):
                return True
            if self.extension(name, entry, relations)[1]:
                return True
        return False

    async def _empty_tables(
        self, driver: Any, catalogue: Catalogue | None, relations: Mapping[str, Relation]
    ) -> frozenset[str]:
        """The collections without rows that declare a unique index which is not enforced yet.

        Found before the transaction for DDL, which would conflict with every writer of a table that it
        has read.
        """
        entries = declared(catalogue or Catalogue(), self.schema.values())
        return frozenset(
            [
                name
                for name, each in entries.items()
                if each.unenforced
                and self.names.table(name) in relations
                and await self._is_empty(driver, name)
            ]
        )

    async def _create_missing(self, driver: Any, latest: bool, empty: frozenset[str]) -> Catalogue:
        catalogue, relations = await self._read(driver)
        if catalogue is None:
            catalogue = Catalogue(store_id=secrets.token_hex(16))
            text = self.grammar.text_type
            await self._run(
                driver,
                f"CREATE TABLE {quoted(self.names.catalogue)} "
                f"(name {text} PRIMARY KEY NOT NULL, value {text} NOT NULL)",
            )
        refuse_other_parents(catalogue, self.schema.values())
        entries = declared(catalogue, self.schema.values(), latest=latest)
        for name, entry in entries.items():
            known = catalogue.entries.get(name)
            if known is None:
                self._refuse_foreign(name, relations)
            if known is None or self.names.table(name) not in relations:
                entries[name] = await self.create(driver, name, entry)
            else:
                entries[name], statements = self.extension(name, entry, relations)
                for each in statements:
                    await self._run(driver, each)
                if (
                    name in empty
                    and entries[name].unenforced
                    and await self._is_still_empty(driver, name)
                ):
                    unenforced = entries[name].unenforced
                    entries[name] = await self.enforce(driver, name, entries[name], unenforced)
            if self._lacks_view(name, known, entry, relations):
                if known is not None:
                    await self._refuse_foreign_view(driver, name, relations)
                await self.replace_view(driver, name, entry)
        new = catalogue.with_entries(entries)
        if new is not catalogue:
            await self.record(driver, new, entries)
        return new

    async def create(self, driver: Any, name: str, entry: Entry) -> Entry:
        """Create a table with its indexes."""
        complete = entry.completed().enforcing(entry.unenforced).feeding()
        await self._run(driver, self.create_table(Table(name, complete, self.grammar, self.names)))
        for fields in complete.wanted_indexes():
            await self._run(driver, self.index_ddl(name, complete, fields))
        for fields in complete.unique_columns:
            await self._run(driver, self.unique_index_ddl(name, fields))
        if complete.feed is not None:
            for each in await self.feed_ddl(driver, name, complete):
                await self._run(driver, each)
        return complete

    def refuse_foreign_feed(
        self, name: str, entry: Entry, relations: Mapping[str, Relation]
    ) -> None:
        """Refuse to record changes in something that this store did not create."""
        found = relations.get(self.names.feed(name))
        if entry.lacks_feed and found is not None:
            raise foreign(found.kind, self.names.feed(name), name)

    @abstractmethod
    async def feed_ddl(self, driver: Any, name: str, entry: Entry) -> list[str]:
        """The statements that create the change feed of a collection, whose table exists."""

    async def _is_empty(self, driver: Any, name: str) -> bool:
        sql = f"SELECT 1 FROM {quoted(self.names.table(name))} LIMIT 1"
        return not await self.dialect.rows(driver, sql, ())

    async def _is_still_empty(self, driver: Any, name: str) -> bool:
        """Whether a table that had no rows has none under the lock; where there are several writers,
        `enforce` finds out."""
        return not self.dialect.single_writer or await self._is_empty(driver, name)

    @abstractmethod
    async def enforce(
        self, driver: Any, name: str, entry: Entry, unique: Sequence[Fields]
    ) -> Entry:
        """Let all programs enforce these unique indexes of a table that had no rows; returns its entry."""

    @abstractmethod
    def create_table(self, table: Table) -> str:
        """The statement that creates a table."""

    @abstractmethod
    def extension(
        self, name: str, entry: Entry, relations: Mapping[str, Relation]
    ) -> tuple[Entry, list[str]]:
        """What a first write adds to an existing table: the entry to record, and the statements.

        Args:
            entry: with what this program declares.
            relations: see `Dialect.relations`.
        """

    async def replace_view(self, driver: Any, name: str, entry: Entry) -> None:
        """Create the view of a collection anew, with all declared fields."""
        await self._run(driver, f"DROP VIEW IF EXISTS {quoted(self.names.view(name))}")
        await self._run(driver, f"CREATE VIEW {self.view_definition(name, entry)}")

    def view_definition(self, name: str, entry: Entry) -> str:
        """The name of a view, and its query."""
        columns = [quoted(sql_name(entry.key)), VERSION]
        columns += [
            f"{self.grammar.view_column(field, each.type)} AS {quoted(sql_name(field))}"
            for field, each in entry.fields.items()
        ]
        return (
            f"{quoted(self.names.view(name))} AS SELECT {', '.join(columns)} "
            f"FROM {quoted(self.names.table(name))}"
        )

    async def record(self, driver: Any, catalogue: Catalogue, names: Mapping[str, object]) -> None:
        """Write the catalogue's rows about these collections."""
        one, other = (self.grammar.parameter(number, "text") for number in (1, 2))
        for row in to_rows(catalogue, names):
            await self.dialect.rows(
                driver,
                f"INSERT INTO {quoted(self.names.catalogue)} (name, value) VALUES ({one}, {other}) "
                "ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                row,
            )

    def index_ddl(self, name: str, entry: Entry, fields: tuple[str, ...]) -> str:
        """The statement that creates an index: on the key columns of its fields, and the id."""
        columns = [quoted(key_column(each)) for each in fields]
        columns.append(quoted(sql_name(entry.key)))
        return (
            f"CREATE INDEX {quoted(self.names.index(name, fields))} ON {quoted(self.names.table(name))} "
            f"({', '.join(columns)})"
        )

    def unique_index_ddl(self, name: str, fields: tuple[str, ...]) -> str:
        """The statement that creates the index of a unique column."""
        return (
            f"CREATE UNIQUE INDEX {quoted(self.names.unique_index(name, fields))} "
            f"ON {quoted(self.names.table(name))} ({quoted(unique_column(fields))})"
        )

    async def _run(self, driver: Any, statement: str) -> None:
        with self.dialect.translating(f"run {statement}"):
            await self.dialect.rows(driver, statement, ())

    # -- unique indexes ----------------------------------------------------------------------

    def to_enforce(self, name: str, entry: Entry) -> list[Fields]:
        """The unique indexes of a collection that this program declares, and that are not enforced yet.

        The values of others were not compared: they may be the same.
        """
        return [each for each in entry.unenforced if each in self.schema[name].unique]

    async def unenforced(self, lease: LeasedConnection) -> list[tuple[str, Index]]:
        """See `Engine.unenforced`."""
        with self.dialect.translating("read the catalogue"):
            catalogue, relations = await self._read(lease.driver)
            entries = declared(catalogue or Catalogue(), self.schema.values())
            return [
                (name, index)
                for name, entry in entries.items()
                if (unenforced := self.to_enforce(name, entry))
                and self.names.table(name) in relations
                and not await self._is_empty(lease.driver, name)
                for index in self.schema[name].indexes
                if index.unique and index.fields in unenforced
            ]

    # -- changes of the schema ---------------------------------------------------------------

    async def changes(self, lease: LeasedConnection) -> list[SchemaChange]:
        """What is missing for the declaration: see `Engine.schema_changes`."""
        with self.dialect.translating("read the catalogue"):
            catalogue, relations = await self._read(lease.driver)
        return self.changes_from(catalogue or Catalogue(), relations)

    def changes_from(
        self, catalogue: Catalogue, relations: Mapping[str, Relation]
    ) -> list[SchemaChange]:
        """What a catalogue and the existing tables lack."""
        return [
            change
            for name, entry in declared(catalogue, self.schema.values(), latest=True).items()
            for change in self.changes_of(name, catalogue.entries.get(name), entry, relations)
        ]

    def changes_of(
        self, name: str, known: Entry | None, entry: Entry, relations: Mapping[str, Relation]
    ) -> list[SchemaChange]:
        """What is missing for one collection.

        Args:
            known: as recorded; None if the collection is new.
            entry: as it should be recorded.
        """
        if known is None or self.names.table(name) not in relations:
            detail = f"the first write creates the table {self.names.table(name)}"
            return [SchemaChange("create table", name, "", detail)]
        found = [
            SchemaChange(
                "add key column",
                name,
                field,
                f"queries for {field} read every entity until its key column is filled",
                blocking=self.dialect.single_writer,
            )
            for field in entry.wanted_columns()
            if not entry.columns.get(field)
        ]
        found += [
            SchemaChange(
                "create index",
                name,
                "-".join([*fields, "index"]),
                f"the index {self.names.index(name, fields)} does not exist yet",
                blocking=self.dialect.single_writer,
            )
            for fields in entry.wanted_indexes()
            if self.index_kind(name, fields, relations) is None
        ]
        if self.lacks_feed(name, entry, relations):
            detail = "its changes are not recorded: triggers that do are created"
            found.append(SchemaChange("feed", name, "", detail))
        if self._lacks_view(name, known, entry, relations):
            detail = f"the view {self.names.view(name)} lacks declared fields"
            found.append(SchemaChange("replace view", name, "", detail))
        return found

    def lacks_feed(self, name: str, entry: Entry, relations: Mapping[str, Relation]) -> bool:
        """Whether the declared change feed of a collection is missing."""
        return entry.feed is not None and (
            entry.lacks_feed
            or self.names.feed(name) not in relations
            or bool(self._lost_triggers(name, relations))
        )

    def _lost_triggers(self, name: str, relations: Mapping[str, Relation]) -> list[str]:
        """The triggers of a change feed that do not exist any more, or are disabled."""
        return [
            self.names.feed_trigger(name, each)
            for each in self.feed_events
            if self.names.feed_trigger_place(name, each) not in relations
        ]

    async def unrecorded(self, lease: LeasedConnection) -> dict[str, list[str]]:
        """The collections with a change feed of which changes are not recorded, because triggers were
        dropped or disabled: their names."""
        with self.dialect.translating("read the catalogue"):
            catalogue, relations = await self._read(lease.driver)
        entries = {} if catalogue is None else catalogue.entries
        fed = [name for name, entry in entries.items() if entry.has_feed]
        lost = {each: self._lost_triggers(each, relations) for each in fed}
        return {each: triggers for each, triggers in lost.items() if triggers}

    def _lacks_view(
        self, name: str, known: Entry | None, entry: Entry, relations: Mapping[str, Relation]
    ) -> bool:
        """Whether the view of a collection is missing, or lacks declared fields."""
        return (
            known is None or known.fields != entry.fields or self.names.view(name) not in relations
        )

    def index_kind(
        self, name: str, fields: Sequence[str], relations: Mapping[str, Relation]
    ) -> str | None:
        """The kind of an index of a collection; None if there is none, or only one of another table."""
        found = relations.get(self.names.index(name, fields))
        return found.kind if found is not None and found.table == self.names.table(name) else None

    @abstractmethod
    async def apply(
        self, lease: LeasedConnection, progress: SchemaProgress, *, complete: bool
    ) -> Catalogue:
        """See `Engine.apply_schema`; returns the catalogue afterwards."""


def foreign(kind: str, relation: str, collection: str) -> SchemaMismatchError:
    article = "an" if kind[0] in "aeiou" else "a"
    return SchemaMismatchError(
        f"there is {article} {kind} {relation} that this store did not create, so the collection "
        f"{collection!r} cannot be stored: rename or drop it, or set table_prefix. If an earlier "
        "version of this package created it, back the store up with that version (hf-async-store "
        "backup), drop its tables, and restore with this version (hf-async-store restore)"
    )
