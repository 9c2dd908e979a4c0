"""Tables from collections: made at the first use, checked cheaply at every other.

The check is two reads of the catalogue. Only where something is lacking does a transaction begin
that one process at a time can have; it looks again, and makes what is still lacking.
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
from hf_async_store.migration_routing import SYSTEM_COLLECTIONS
from hf_async_store.schema import Collection, Schema
from hf_async_store.strategies.sql.row_mapping import DOC, SIDE, Kind, limited, sql_name
from hf_async_store.values import VERSION

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect as SQLDialect

    from hf_async_store.schema import Index as DeclaredIndex
    from hf_async_store.strategies.sql.connections import LeasedConnection
    from hf_async_store.strategies.sql.dialect import Dialect

PROBES: Final = "_hf_async_store"
"""A table of ours that holds no entity: what `test_connection` writes and deletes."""


_HIDDEN: Final = frozenset(sql_name(each.name) for each in SYSTEM_COLLECTIONS)


class SchemaSync:
    """The tables of a store.

    Attributes:
        indexes: the declared indexes of each collection, by their names in SQL.
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
            made = self._dialect.column_type(kind)
            key = column == sql_name(collection.key)
            if parent is None or not self._dialect.inline_references:
                columns.append(Column(column, made, primary_key=key, nullable=column != VERSION))
            else:
                target = f"{sql_name(parent.name)}.{sql_name(parent.key)}"
                columns.append(Column(column, made, ForeignKey(target), primary_key=key))
        table = SQLTable(name, self._metadata, *columns)
        self._kinds[name] = kinds
        self.indexes[collection.name] = {}
        for index in collection.indexes:
            parts = [
                self._dialect.index_part(table.c[sql_name(field)], collection.fields[field])
                for field in filter(None, (index.field, index.sort))
            ]
            in_sql = limited(f"{name}-{index.name}")
            Index(in_sql, *parts)  # it finds its table by the columns
            self.indexes[collection.name][in_sql] = index

    async def ensure(self, lease: LeasedConnection) -> None:
        """See that everything is there.

        Raises:
            SchemaMismatchError: what is there differs; lists the differences.
        """
        try:
            self._dialect.check_place(lease.driver)
            await self._dialect.prepare_writing(lease.driver)
            if await self.lacking(lease.driver):
                await self._make(lease)
        except self._dialect.driver_errors as exc:
            raise self._dialect.translate(exc, doing="make the tables", writes=False) from exc

    async def found(self, lease: LeasedConnection) -> dict[str, dict[str, str]]:
        """The columns of the tables of ours that are there, by table.

        Raises:
            SchemaMismatchError: what is there differs.
            PermissionDeniedError: see `refuse_others`.
        """
        try:
            self._dialect.check_place(lease.driver)
            columns = await self._dialect.reflect_columns(lease.driver, self.names)
            if _HIDDEN & set(columns):
                await refuse_others(self._dialect, lease.driver, self.names)
        except self._dialect.driver_errors as exc:
            raise self._dialect.translate(exc, doing="look", writes=False) from exc
        self._compare(columns, {})
        return columns

    def lacking_in(self, columns: Mapping[str, Mapping[str, str]]) -> list[str]:
        """The tables and columns of ours that are not among these."""
        lacking: list[str] = []
        for table, kinds in self._kinds.items():
            if table in columns:
                lacking += [f"{table}.{each}" for each in kinds if each not in columns[table]]
            else:
                lacking.append(table)
        return lacking

    def is_declared(self, table: str, column: str) -> bool:
        return column in self._kinds.get(table, ())

    async def _make(self, lease: LeasedConnection) -> None:
        handle = await self._dialect.begin_ddl(lease.driver)
        try:
            for statement in await self.lacking(lease.driver):
                await self._dialect.rows(lease.driver, statement, ())
        except BaseException:
            await run_to_completion(self._dialect.roll_back(handle))
            raise
        await run_to_completion(self._dialect.commit(handle))

    async def lacking(self, driver: Any) -> list[str]:
        """The statements that make what is not there."""
        if _HIDDEN & set(self.names):
            await refuse_others(self._dialect, driver, self.names)
        columns = await self._dialect.reflect_columns(driver, self.names)
        indexes = await self._dialect.reflect_indexes(driver, self.names)
        self._compare(columns, indexes)
        statements: list[str] = []
        for table in self._metadata.sorted_tables:
            found = columns.get(table.name)
            if found is None:
                statements.append(self._text(CreateTable(table)))
            else:
                statements += [
                    f'ALTER TABLE "{table.name}" ADD COLUMN {self._text(CreateColumn(each))}'
                    for each in table.columns
                    if each.name not in found
                ]
            statements += [
                self._text(CreateIndex(each))
                for each in sorted(table.indexes, key=lambda each: str(each.name))
                if each.name not in indexes
            ]
        return statements + self._dialect.extra_ddl(self._schema, self._metadata, indexes)

    def _compare(
        self, columns: Mapping[str, Mapping[str, str]], indexes: Mapping[str, str]
    ) -> None:
        differences: list[str] = []
        for table in self._metadata.tables.values():
            found = columns.get(table.name)
            if found is None:
                continue
            kinds = self._kinds[table.name]
            keys = {each.name for each in table.primary_key}
            for name, there in found.items():
                if name not in kinds:
                    if there.endswith((" NOT NULL", " PRIMARY KEY")):
                        differences.append(f"{table.name}.{name} is not declared, and needed there")
                elif not self._dialect.same_type(there, kinds[name]):
                    differences.append(
                        f"{table.name}.{name} is {there}, and declared as {kinds[name]}"
                    )
                elif there.endswith(" PRIMARY KEY") != (name in keys):
                    is_key = "the" if name in keys else "no"
                    differences.append(f"{table.name}.{name} is declared as {is_key} key")
            if not keys <= found.keys():
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
                "what is in the database differs from the declaration: " + "; ".join(differences)
            )

    def _fields_of(self, table: str, index: str) -> tuple[str | None, ...]:
        for each in self._schema:
            if sql_name(each) == table:
                declared = self.indexes[each][index]
                return declared.field, declared.sort
        raise KeyError(table)

    def _text(self, clause: CreateTable | CreateIndex | CreateColumn) -> str:
        return str(clause.compile(dialect=self._sql_dialect)).strip()


async def refuse_others(dialect: Dialect, driver: Any, names: Sequence[str]) -> None:
    """Refuse the tables of a live move if a role that is not trusted has made them: those are the ones
    that anybody may make first. Policies, triggers and checks of theirs would run as this role.

    Raises:
        PermissionDeniedError: naming table and role.
    """
    declared = [each for each in names if each not in _HIDDEN]
    for table, owner in (await dialect.owned_by_others(driver, sorted(_HIDDEN), declared)).items():
        raise PermissionDeniedError(
            f"the table {table} belongs to the role {owner!r}, which owns nothing else of this store, so "
            "it is not read; if a live move of yours made it, give it the owner of the other tables, "
            "else drop it"
        )


def _columns_in(definition: str, kinds: Mapping[str, Kind]) -> list[str]:
    """The columns that the definition of an index names, in its order."""
    _, _, listed = definition.partition("(")
    listed = re.sub(r'"?left"?\(', "(", listed)  # the function, which may be the name of a column
    return [each for each in re.findall(r"[a-z_][a-z0-9_]*", listed) if each in kinds]
