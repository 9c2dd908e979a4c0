"""The SQL of writes on PostgreSQL: one statement checks the preconditions of many rows, and returns those
it wrote.

A statement takes rows of arguments as `i`, one array for each column, and the documents `d` in one JSON
array. A row that it does not return did not meet its precondition; `statement_writer` finds out why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias, cast

from hf_async_store.strategies.sql.names import DOC
from hf_async_store.values import CREATED_AT, INT_MAX, LIGHT_BYTES, VERSION

if TYPE_CHECKING:
    from hf_async_store.schema import Schema
    from hf_async_store.strategies.sql.rows import Table

Verb: TypeAlias = Literal["save", "create", "replace", "patch", "delete"]

_PATIENCE_MS: Final = 100
"""How long a statement of several changes waits for the lock of a row."""

_COLUMNS: Final[Mapping[Verb, tuple[str, ...]]] = {
    "save": ("text",),
    "create": ("text",),
    "replace": ("text", "bigint"),
    "patch": ("text", "bigint", "text", "bigint"),
    "delete": ("text", "bigint"),
}
"""The types of the columns of arguments: the id; the expected version, NULL if any; of a patch, the names
that it removes, and the size of what it sets, which is its document."""


class StatementKey(NamedTuple):
    """Changes with the same key can share one statement.

    Attributes:
        created: for a whole entity: its document contains `created_at`, or is stored without it.
        imported: the last argument before the references is the version to store.
    """

    collection: str
    verb: Verb
    created: bool = False
    imported: bool = False


class WriteStatements:
    """Generates the statements of a store, and caches them."""

    def __init__(self, schema: Schema, tables: Mapping[str, Table], *, references: bool) -> None:
        self._schema = schema
        self._tables = tables
        self._references = references
        self._cache: dict[tuple[StatementKey, bool], str] = {}

    def of(self, shape: StatementKey, *, patient: bool) -> str:
        """The statement.

        Args:
            patient: it waits for locks as long as the settings of the session allow.
        """
        cached = self._cache.get((shape, patient))
        if cached is None:
            cached = self._cache[shape, patient] = self._generate(shape, patient=patient)
        return cached

    def _generate(self, shape: StatementKey, *, patient: bool) -> str:
        table = self._tables[shape.collection]
        kinds = [*_COLUMNS[shape.verb], *(["bigint"] if shape.imported else [])]
        first = len(kinds)  # the number of the column of the first reference
        parents = ""
        if self._references and shape.verb != "delete":
            kinds += ["text"] * len(table.collection.references)
            parents = self._parents(table, first)
        source = _source(kinds, documents=shape.verb != "delete", patient=patient)
        if shape.verb in ("save", "create"):
            sql = self._insert(table, shape, source, parents)
        elif shape.verb == "delete":
            sql = (
                f"DELETE FROM {table.name} AS t USING {source} WHERE t.{table.key} = i.c0 "
                f"AND (i.c1 IS NULL OR t.{VERSION} = i.c1){self._no_children(shape.collection)}"
            )
        else:
            sql = self._update(table, shape, source, parents)
        return f"{sql} RETURNING t.{table.key}, t.{VERSION}"

    def _insert(self, table: Table, shape: StatementKey, source: str, parents: str) -> str:
        version = "i.c1" if shape.imported else "1::bigint"
        conflict = "NOTHING"
        if shape.verb == "save":
            doc = f"excluded.{DOC}"
            stored = "" if shape.imported else f" WHERE {_below_maximum()}"
            new = f"excluded.{VERSION}" if shape.imported else f"t.{VERSION} + 1::bigint"
            kept = doc if shape.created else _with_stored_creation(doc)
            conflict = f"UPDATE SET {VERSION} = {new}, {DOC} = {kept}{stored}"
        return (
            f"INSERT INTO {table.name} AS t ({table.key}, {VERSION}, {DOC}) "
            f"SELECT i.c0, {version}, i.d FROM {source} WHERE TRUE{parents} "
            f"ON CONFLICT ({table.key}) DO {conflict}"
        )

    def _update(self, table: Table, shape: StatementKey, source: str, parents: str) -> str:
        version = "i.c2" if shape.imported else f"t.{VERSION} + 1::bigint"
        condition = f" AND (i.c1 IS NULL OR t.{VERSION} = i.c1)"
        if not shape.imported:
            condition += f" AND {_below_maximum()}"
        if shape.verb == "patch":
            doc = f"(t.{DOC} - coalesce(i.c2::text[], '{{}}'::text[])) || i.d"
            # An entity of this size is never too large. Others are measured by the store.
            size = f"pg_catalog.octet_length(t.{DOC}::text)::bigint + i.c3"
            condition += f" AND {size} <= {LIGHT_BYTES}::bigint"
        else:
            doc = "i.d" if shape.created else _with_stored_creation("i.d")
        return (
            f"UPDATE {table.name} AS t SET {VERSION} = {version}, {DOC} = {doc} "
            f"FROM {source} WHERE t.{table.key} = i.c0{condition}{parents}"
        )

    def _parents(self, table: Table, first: int) -> str:
        """The conditions that the parent of every reference exists."""
        conditions = []
        for n, field in enumerate(table.collection.references, first):
            parent = self._tables[cast("str", field.references)]
            itself = f" OR i.c{n} = i.c0" if parent is table else ""
            conditions.append(
                f" AND (i.c{n} IS NULL{itself} OR EXISTS "
                f"(SELECT 1 FROM {parent.name} AS p WHERE p.{parent.key} = i.c{n}))"
            )
        return "".join(conditions)

    def _no_children(self, collection: str) -> str:
        """The conditions that no entity refers to the deleted one."""
        if not self._references:
            return ""
        key = f"t.{self._tables[collection].key}"
        conditions = ""
        for child, field in self._schema.children[collection]:
            table = self._tables[child.name]
            others = f" AND c.{table.key} <> {key}" if child.name == collection else ""
            refers = table.grammar.refers("c", field, key)
            conditions += (
                f" AND NOT EXISTS (SELECT 1 FROM {table.name} AS c WHERE {refers}{others})"
            )
        return conditions


def _source(kinds: Sequence[str], *, documents: bool, patient: bool) -> str:
    """The items of a FROM clause that provide rows of arguments as `i (c0, c1, ..., d)`."""
    arrays = [f"${n}::text::{kind}[]" for n, kind in enumerate(kinds, 1)]
    columns = [f"c{n}" for n in range(len(kinds))]
    # The unqualified name with one argument would be looked up along the search_path.
    functions = f"{'pg_catalog.' if len(arrays) == 1 else ''}unnest({', '.join(arrays)})"
    if documents:
        columns.append("d")
        functions += f", pg_catalog.jsonb_array_elements(${len(kinds) + 1}::text::jsonb)"
    rows = f"ROWS FROM ({functions}) AS i ({', '.join(columns)})"
    if patient:
        return rows
    # In effect before the first row is locked, and until the transaction ends.
    timeout = f"pg_catalog.set_config('lock_timeout'::text, '{_PATIENCE_MS}'::text, true)"
    return f"{timeout} AS s (c), {rows}"


def _below_maximum() -> str:
    """The condition that the stored version is not the greatest possible one."""
    return f"t.{VERSION} < {INT_MAX}::bigint"


def _with_stored_creation(doc: str) -> str:
    """A document with the `created_at` of the stored one, or without it as well."""
    stored = f"t.{DOC} -> '{CREATED_AT}'::text"
    return (
        f"CASE WHEN t.{DOC} ? '{CREATED_AT}'::text THEN {doc} || "
        f"pg_catalog.jsonb_build_object('{CREATED_AT}'::text, {stored}) "
        f"ELSE {doc} - '{CREATED_AT}'::text END"
    )
