"""Creates the tables of the collections at the first use, and checks them later.

The check reads the catalog twice. Only if something is missing, a transaction begins that excludes
every other transaction for DDL; it reads the catalog again, and creates what is still missing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Column, ForeignKey, Index, MetaData
from sqlalchemy import Table as SQLTable
from sqlalchemy.schema import CreateColumn, CreateIndex, CreateTable

from hf_async_store.driver import run_to_completion
from hf_async_store.errors import PermissionDeniedError, SchemaMismatchError
from hf_async_store.schema import SYSTEM_COLLECTIONS, Collection, Schema
from hf_async_store.strategies.sql.row_mapping import DOC, SIDE, Kind, limited, sql_name
from hf_async_store.values import VERSION

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect as SQLDialect

    from hf_async_store.schema import Index as DeclaredIndex
    from hf_async_store.strategies.sql.connections import LeasedConnection
    from hf_async_store.strategies.sql.dialect import Dialect

PROBES: Final = "_hf_async_store"
"""The table without entities, in which `test_connection` writes and deletes a row."""

_SYSTEM_TABLES: Final = frozenset(sql_name(each.name) for each in SYSTEM_COLLECTIONS)


class SchemaSync:
    """The tables of a store.

    Attributes:
        indexes: by collection, its declared indexes by their names in SQL.
        names: of all tables.
    """

    def __init__(self, schema: Schema, dialect: Dialect, sql_dialect: SQLDialect) -> None:
        self._schema = schema
        self._dialect = dialect
        self._sql_dialect = sql_dialect
        self._metadata = MetaData()
        self.indexes: dict[str, dict[str, DeclaredIndex]] = {}
        self._kinds: dict[str, dict[str, Kind]] = {}
        for each in schema.values():
            self._declare(each)
        SQLTable(
            PROBES,
            self._metadata,
            Column("name", dialect.column_type("text"), primary_key=True),
            Column("value", dialect.column_type("text")),
        )
        self._kinds[PROBES] = {"name": "text", "value": "text"}
        self.names = tuple(self._metadata.tables)

    def _declare(self, collection: Collection) -> None:
        name = sql_name(collection.name)
        kinds: dict[str, Kind] = {
            sql_name(field.name): field.type for field in collection.fields.values()
        }
        kinds |= {DOC: "json", SIDE: "json", VERSION: "bigint"}
        parents = {
            sql_name(field.name): self._schema[str(field.references)]
            for field in collection.references
        }
        columns = []
        for column, kind in kinds.items():
            parent = parents.get(column)
            type_ = self._dialect.column_type(kind)
            key = column == sql_name(collection.key)
            if parent is None or not self._dialect.inline_references:
                columns.append(Column(column, type_, primary_key=key, nullable=column != VERSION))
            else:
                target = f"{sql_name(parent.name)}.{sql_name(parent.key)}"
                columns.append(Column(column, type_, ForeignKey(target), primary_key=key))
        table = SQLTable(name, self._metadata, *columns)
        self._kinds[name] = kinds
        self.indexes[collection.name] = {}
        for index in collection.indexes:
            expressions = [
                self._dialect.index_expression(table.c[sql_name(field)], collection.fields[field])
                for field in filter(None, (index.field, index.sort))
            ]
            sql_index = limited(f"{name}-{index.name}")
            Index(sql_index, *expressions)  # SQLAlchemy adds it to the table of the columns
            self.indexes[collection.name][sql_index] = index

    async def ensure(self, lease: LeasedConnection) -> None:
        """Create the tables, columns and indexes that are missing.

        Raises:
            SchemaMismatchError: the existing tables differ from the declaration; the message lists
                the differences.
            PermissionDeniedError: see `refuse_untrusted_owners`.
        """
        try:
            self._dialect.check_file(lease.driver)
            await self._dialect.prepare_writing(lease.driver)
            if await self.missing_ddl(lease.driver):
                await self._create_missing(lease)
        except self._dialect.driver_errors as exc:
            raise self._dialect.translate(exc, doing="create the tables", writes=False) from exc

    async def existing_columns(self, lease: LeasedConnection) -> dict[str, dict[str, str]]:
        """By table of this store that exists, the types of its columns.

        Raises:
            SchemaMismatchError: the existing tables differ from the declaration.
            PermissionDeniedError: see `refuse_untrusted_owners`.
        """
        try:
            self._dialect.check_file(lease.driver)
            columns = await self._dialect.reflect_columns(lease.driver, self.names)
            if _SYSTEM_TABLES & set(columns):
                await refuse_untrusted_owners(self._dialect, lease.driver, self.names)
        except self._dialect.driver_errors as exc:
            raise self._dialect.translate(exc, doing="read the catalog", writes=False) from exc
        self._compare(columns, {})
        return columns

    def missing_from(self, columns: Mapping[str, Mapping[str, str]]) -> list[str]:
        """The tables and columns of this store that are not among these."""
        missing: list[str] = []
        for table, kinds in self._kinds.items():
            if table in columns:
                missing += [f"{table}.{each}" for each in kinds if each not in columns[table]]
            else:
                missing.append(table)
        return missing

    def is_declared(self, table: str, column: str) -> bool:
        return column in self._kinds.get(table, ())

    async def _create_missing(self, lease: LeasedConnection) -> None:
        handle = await self._dialect.begin_ddl(lease.driver)
        try:
            for statement in await self.missing_ddl(lease.driver):
                await self._dialect.rows(lease.driver, statement, ())
        except BaseException:
            await run_to_completion(self._dialect.roll_back(handle))
            raise
        await run_to_completion(self._dialect.commit(handle))

    async def missing_ddl(self, driver: Any) -> list[str]:
        """The statements that create what is missing."""
        if _SYSTEM_TABLES & set(self.names):
            await refuse_untrusted_owners(self._dialect, driver, self.names)
        columns = await self._dialect.reflect_columns(driver, self.names)
        indexes = await self._dialect.reflect_indexes(driver, self.names)
        self._compare(columns, indexes)
        statements: list[str] = []
        for table in self._metadata.sorted_tables:
            existing = columns.get(table.name)
            if existing is None:
                statements.append(self._compiled(CreateTable(table)))
            else:
                statements += [
                    f'ALTER TABLE "{table.name}" ADD COLUMN {self._compiled(CreateColumn(each))}'
                    for each in table.columns
                    if each.name not in existing
                ]
            statements += [
                self._compiled(CreateIndex(each))
                for each in sorted(table.indexes, key=lambda each: str(each.name))
                if each.name not in indexes
            ]
        return statements + self._dialect.extra_ddl(self._schema, self._metadata, indexes)

    def _compare(
        self, columns: Mapping[str, Mapping[str, str]], indexes: Mapping[str, str]
    ) -> None:
        differences: list[str] = []
        for table in self._metadata.tables.values():
            existing = columns.get(table.name)
            if existing is None:
                continue
            kinds = self._kinds[table.name]
            keys = {each.name for each in table.primary_key}
            for name, type_ in existing.items():
                if name not in kinds:
                    if type_.endswith((" NOT NULL", " PRIMARY KEY")):
                        differences.append(
                            f"{table.name}.{name} is required in the database, but not declared"
                        )
                elif not self._dialect.same_type(type_, kinds[name]):
                    differences.append(
                        f"{table.name}.{name} is {type_}, but declared as {kinds[name]}"
                    )
                elif type_.endswith(" PRIMARY KEY") != (name in keys):
                    difference = (
                        "is declared as the key, but is not the primary key"
                        if name in keys
                        else "is the primary key, but is not declared as the key"
                    )
                    differences.append(f"{table.name}.{name} {difference}")
            if not keys <= existing.keys():
                differences.append(f"{table.name} has no column for its key {', '.join(keys)}")
            for index in table.indexes:
                definition = indexes.get(str(index.name))
                wanted = [
                    sql_name(field)
                    for field in filter(None, self._fields_of(table.name, str(index.name)))
                ]
                if definition and _columns_in(definition, kinds) != wanted:
                    differences.append(f"the index {index.name} is not on {', '.join(wanted)}")
        if differences:
            raise SchemaMismatchError(
                "the tables in the database differ from the declared collections: "
                + "; ".join(differences)
            )

    def _fields_of(self, table: str, index: str) -> tuple[str | None, ...]:
        for each in self._schema:
            if sql_name(each) == table:
                declared = self.indexes[each][index]
                return declared.field, declared.sort
        raise KeyError(table)

    def _compiled(self, clause: CreateTable | CreateIndex | CreateColumn) -> str:
        return str(clause.compile(dialect=self._sql_dialect)).strip()


async def refuse_untrusted_owners(dialect: Dialect, driver: Any, names: Sequence[str]) -> None:
    """Refuse the tables of a live migration if they belong to an untrusted role.

    These tables do not exist until a live migration creates them, so any role that may create
    tables in the schema can create them first. Its policies, triggers and checks would run with the
    privileges of this role.

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


def _columns_in(definition: str, kinds: Mapping[str, Kind]) -> list[str]:
    """The columns in the definition of an index, in their order."""
    _, _, column_list = definition.partition("(")
    # The function `left` is removed, which could also be the name of a column.
    column_list = re.sub(r'"?left"?\(', "(", column_list)
    return [each for each in re.findall(r"[a-z_][a-z0-9_]*", column_list) if each in kinds]
