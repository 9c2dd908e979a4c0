"""Creates the tables of the collections at the first use, and checks them later.

The check reads the catalog of the database twice. Only if something is missing, a transaction begins
that excludes every other transaction for DDL; it reads the catalog again, and creates what is still
missing. Then it describes the store in its own catalogue, a table: the layout of the tables, the
identity of the store, the declarations, and the constraints.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from sqlalchemy import BigInteger, Column, Computed, MetaData
from sqlalchemy import Table as SQLTable
from sqlalchemy.schema import CreateColumn, CreateTable

from hf_async_store.driver import run_to_completion
from hf_async_store.errors import NewerFormatError, PermissionDeniedError, SchemaMismatchError
from hf_async_store.schema import SYSTEM_COLLECTIONS, Collection, Schema
from hf_async_store.strategies.sql.grammar import encode_json
from hf_async_store.strategies.sql.names import (
    CATALOGUE,
    DOC,
    OLD_SIDE,
    PROBES,
    declared_name,
    limited,
    quoted,
    sql_name,
)
from hf_async_store.strategies.sql.old_layout import move_over, set_aside
from hf_async_store.strategies.sql.rows import indexed_fields
from hf_async_store.values import VERSION

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect as SQLDialect
    from sqlalchemy.types import TypeEngine

    from hf_async_store.schema import Index as DeclaredIndex
    from hf_async_store.strategies.sql.connections import LeasedConnection
    from hf_async_store.strategies.sql.dialect import Dialect, ExistingColumn

LAYOUT: Final = 2
"""The version of the layout of the tables. The first one had a column for each value."""

_SYSTEM_TABLES: Final = frozenset(
    {CATALOGUE, *(sql_name(each.name) for each in SYSTEM_COLLECTIONS)}
)

_Columns: TypeAlias = "Mapping[str, Mapping[str, ExistingColumn]]"


class SchemaSync:
    """The tables of a store.

    Attributes:
        indexes: by collection, its declared indexes by their names in SQL.
        names: of all tables.
    """

    def __init__(
        self, schema: Schema, dialect: Dialect, sql_dialect: SQLDialect, *, references: bool
    ) -> None:
        self._schema = schema
        self._dialect = dialect
        self._grammar = dialect.grammar
        self._sql_dialect = sql_dialect
        self._references = references
        self._metadata = MetaData()
        self.indexes: dict[str, dict[str, DeclaredIndex]] = {
            each.name: {
                limited(f"{sql_name(each.name)}-{index.name}"): index for index in each.indexes
            }
            for each in schema.values()
        }
        for each in schema.values():
            self._declare(each)
        text = self._grammar.type_of("text")
        for name in (PROBES, CATALOGUE):
            columns = Column("name", text, primary_key=True), Column("value", text)
            SQLTable(name, self._metadata, *columns)
        self.names = tuple(self._metadata.tables)

    def _declare(self, collection: Collection) -> None:
        grammar = self._grammar
        columns: list[Column[Any]] = [
            Column(
                sql_name(collection.key), grammar.type_of("text"), primary_key=True, nullable=True
            ),
            Column(VERSION, BigInteger(), nullable=False),
            Column(DOC, grammar.document_type, nullable=False),
        ]
        for field in collection.fields.values():
            if field.name != collection.key:
                computed = Computed(grammar.generated(field), persisted=grammar.stored)
                columns.append(Column(sql_name(field.name), grammar.type_of(field.type), computed))
        for field in indexed_fields(collection):
            for column, expression in grammar.sort_columns(field).items():
                computed = Computed(expression, persisted=grammar.stored)
                columns.append(Column(column, grammar.type_of("number"), computed))
        SQLTable(sql_name(collection.name), self._metadata, *columns)

    async def ensure(self, lease: LeasedConnection) -> None:
        """Create the tables, columns and indexes that are missing.

        Raises:
            SchemaMismatchError: the existing tables differ from the declaration; the message lists
                the differences.
            NewerFormatError: a later version of this package created the tables.
            PermissionDeniedError: see `refuse_untrusted_owners`.
        """
        try:
            self._dialect.check_file(lease.driver)
            await self._dialect.prepare_writing(lease.driver)
            columns = await self._dialect.reflect_columns(lease.driver, self.names)
            if self._old_tables(columns) or await self.missing_ddl(lease.driver):
                await self._create_missing(lease)
        except self._dialect.driver_errors as exc:
            raise self._dialect.translate(exc, doing="create the tables", writes=False) from exc

    async def existing_columns(self, lease: LeasedConnection) -> _Columns:
        """By table of this store that exists, its columns.

        Raises:
            SchemaMismatchError: the existing tables differ from the declaration.
            NewerFormatError, PermissionDeniedError: as `ensure`.
        """
        try:
            self._dialect.check_file(lease.driver)
            columns = await self._checked_columns(lease.driver)
        except self._dialect.driver_errors as exc:
            raise self._dialect.translate(exc, doing="read the catalog", writes=False) from exc
        if self._old_tables(columns):
            raise self._old_layout()
        self._compare(columns, {})
        return columns

    def _old_tables(self, columns: _Columns) -> list[str]:
        """The tables that have the first layout, children first."""
        names = map(sql_name, reversed(list(self._schema)))
        return [each for each in names if OLD_SIDE in columns.get(each, ())]

    def _old_layout(self) -> SchemaMismatchError:
        advice = (
            "the first write moves them over; `hf-async-store health` is enough"
            if self._dialect.single_writer
            else "back the store up with that version (hf-async-store backup), drop the tables, and "
            "restore with this version (hf-async-store restore)"
        )
        return SchemaMismatchError(
            f"the tables have the layout of an earlier version of this package: {advice}"
        )

    def missing_from(self, columns: _Columns) -> list[str]:
        """The tables and columns of this store that are not among these."""
        missing: list[str] = []
        for name, table in self._metadata.tables.items():
            if name in columns:
                missing += [
                    f"{name}.{each}"
                    for each in map(str, table.c.keys())
                    if each not in columns[name]
                ]
            else:
                missing.append(name)
        return missing

    async def missing_ddl(self, driver: Any) -> list[str]:
        """The statements that create what is missing."""
        columns = await self._checked_columns(driver)
        indexes = await self._dialect.reflect_indexes(driver, self.names)
        self._compare(columns, indexes)
        statements: list[str] = []
        for table in self._metadata.tables.values():
            existing = columns.get(table.name)
            if existing is None:
                statements.append(self._compiled(CreateTable(table)))
            else:
                statements += [
                    f'ALTER TABLE "{table.name}" ADD COLUMN {self._compiled(CreateColumn(each))}'
                    for each in table.columns
                    if each.name not in existing
                ]
        for collection in self._schema.values():
            statements += [
                f'CREATE INDEX "{name}" ON {quoted(collection.name)} ({self._terms(collection, index)})'
                for name, index in self.indexes[collection.name].items()
                if name not in indexes
            ]
        enforced = self._references
        return statements + self._grammar.reference_ddl(self._schema, indexes, enforced=enforced)

    def _terms(self, collection: Collection, index: DeclaredIndex) -> str:
        """The terms of an index: those of its fields, and the id."""
        grammar = self._grammar
        fields = [collection.fields[each] for each in _fields_of(collection, index)]
        terms = [term for each in fields for term in grammar.indexed_terms(each, "").sql]
        if grammar.stored:  # the terms are expressions
            terms = [f"({each})" for each in terms]
        return ", ".join([*terms, quoted(collection.key)])

    async def _checked_columns(self, driver: Any) -> _Columns:
        columns = await self._dialect.reflect_columns(driver, self.names)
        if _SYSTEM_TABLES & set(columns):
            await refuse_untrusted_owners(self._dialect, driver, self.names)
        if CATALOGUE in columns:
            await self._check_layout(driver)
        return columns

    async def _check_layout(self, driver: Any) -> None:
        try:
            rows = await self._dialect.rows(
                driver, f"SELECT value FROM {CATALOGUE} WHERE name = 'layout'", ()
            )
        except self._dialect.driver_errors as exc:
            error = self._dialect.translate(exc, doing="read the catalogue", writes=False)
            if isinstance(error, PermissionDeniedError):
                return  # the role has no rights on the other tables either, and they are named
            raise
        for [layout] in rows:
            if layout != str(LAYOUT):
                raise NewerFormatError(
                    f"the tables have layout {layout}, and this version of the package knows "
                    f"layout {LAYOUT}: use the version that created them, or a later one"
                )

    # -- creation ----------------------------------------------------------------------------

    async def _create_missing(self, lease: LeasedConnection) -> None:
        driver = lease.driver
        handle = await self._dialect.begin_ddl(driver)
        try:
            columns = await self._dialect.reflect_columns(driver, self.names)
            old = self._old_tables(columns)
            if old and not self._dialect.single_writer:
                raise self._old_layout()
            if old:
                await self._dialect.job(driver, partial(set_aside, tables=old))
            for statement in await self.missing_ddl(driver):
                await self._dialect.rows(driver, statement, ())
            if old:
                moved = {
                    table: (self._schema[declared_name(table)], list(columns[table]))
                    for table in reversed(old)
                }
                await self._dialect.job(driver, partial(move_over, tables=moved))
            await self._describe(driver)
        except BaseException:
            await run_to_completion(self._dialect.roll_back(handle))
            raise
        await run_to_completion(self._dialect.commit(handle))

    async def _describe(self, driver: Any) -> None:
        """Write the catalogue."""
        declarations = {each.name: _declaration(each) for each in self._schema.values()}
        values = {
            "layout": (str(LAYOUT), "NOTHING"),
            "store_id": (secrets.token_hex(16), "NOTHING"),
            "declarations": (
                encode_json(declarations).decode(),
                "UPDATE SET value = excluded.value",
            ),
            "constraints": (
                encode_json({"references": self._references}).decode(),
                "UPDATE SET value = excluded.value",
            ),
        }
        value = self._grammar.parameter(1, "text")
        for name, (text, conflict) in values.items():
            await self._dialect.rows(
                driver,
                f"INSERT INTO {CATALOGUE} (name, value) VALUES ('{name}', {value}) "
                f"ON CONFLICT (name) DO {conflict}",
                (text,),
            )

    # -- comparison --------------------------------------------------------------------------

    def _compare(self, columns: _Columns, indexes: Mapping[str, str]) -> None:
        differences: list[str] = []
        for table in self._metadata.tables.values():
            if table.name in columns:
                differences += self._different_columns(table, columns[table.name])
        for collection in self._schema.values():
            for name, index in self.indexes[collection.name].items():
                wanted = [each for each in _fields_of(collection, index) if each != collection.key]
                if indexes.get(name) and self._grammar.index_fields(indexes[name]) != wanted:
                    listed = ", ".join(_fields_of(collection, index))
                    differences.append(f"the index {name} is not on {listed}")
        if differences:
            raise SchemaMismatchError(
                "the tables in the database differ from the declared collections: "
                + "; ".join(differences)
            )

    def _different_columns(
        self, table: SQLTable, existing: Mapping[str, ExistingColumn]
    ) -> list[str]:
        keys = {each.name for each in table.primary_key}
        differences: list[str] = []
        for name, found in existing.items():
            where = f"{table.name}.{name}"
            if name not in table.c:
                if found.required or found.key:
                    differences.append(f"{where} is required in the database, but not declared")
                continue
            type_: TypeEngine[Any] = table.c[name].type
            if found.generated and table.c[name].computed is not None:
                continue  # no query uses it, so it may have the type of an earlier declaration
            if not self._grammar.same_type(found.type, type_):
                wanted = type_.compile(dialect=self._sql_dialect).lower()
                differences.append(f"{where} is {found.type}, but declared as {wanted}")
            elif found.key != (name in keys):
                problem = (
                    "is the primary key, but is not declared as the key"
                    if found.key
                    else "is declared as the key, but is not the primary key"
                )
                differences.append(f"{where} {problem}")
            elif found.generated != (table.c[name].computed is not None):
                differences.append(
                    f"{where} is {'' if found.generated else 'not '}a generated column"
                )
        if not keys <= existing.keys():
            differences.append(f"{table.name} has no column for its key {', '.join(keys)}")
        return differences

    def _compiled(self, clause: CreateTable | CreateColumn) -> str:
        return str(clause.compile(dialect=self._sql_dialect)).strip()


def _fields_of(collection: Collection, index: DeclaredIndex) -> Sequence[str]:
    """The fields of an index before the id, which ends each index."""
    fields = [index.field, *([index.sort] if index.sort else [])]
    return fields[: fields.index(collection.key)] if collection.key in fields else fields


def _declaration(collection: Collection) -> dict[str, Any]:
    return {
        "key": collection.key,
        "fields": {each.name: each.type for each in collection.fields.values()},
        "required": collection.required,
        "references": {each.name: each.references for each in collection.references},
        "indexes": [[each.field, each.sort] for each in collection.indexes],
    }


async def refuse_untrusted_owners(dialect: Dialect, driver: Any, names: Sequence[str]) -> None:
    """Refuse tables of the store itself if they belong to an untrusted role.

    Such a table may not exist yet, so any role that may create tables in the schema can create it
    first. Its policies, triggers and checks would run with the privileges of this role.

    Raises:
        PermissionDeniedError: names the table and the role.
    """
    declared = [each for each in names if each not in _SYSTEM_TABLES]
    for table, owner in (
        await dialect.untrusted_owners(driver, sorted(_SYSTEM_TABLES), declared)
    ).items():
        raise PermissionDeniedError(
            f"the table {table} belongs to the role {owner!r}, which owns no other table of this store, "
            "so it is not read: if your own live migration created it, change its owner to that of the "
            "other tables (ALTER TABLE ... OWNER TO), else drop it"
        )
