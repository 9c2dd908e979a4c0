"""The SQL of writes: one statement checks the preconditions of many rows, and returns those it wrote.

A statement takes rows of arguments as `i`: the key first, then the columns that its `StatementKey`
determines. A row that it does not return did not meet its precondition; `bulk_writer` finds out why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias

from hf_async_store.schema import Field
from hf_async_store.strategies.sql.row_mapping import DOC, SIDE, Kind, TableMapping, quoted
from hf_async_store.values import CREATED_AT, INT_MAX, MAX_ENTITY_BYTES, VERSION

if TYPE_CHECKING:
    from hf_async_store.schema import Schema

Verb: TypeAlias = Literal["save", "create", "replace", "patch", "delete"]

_CREATED: Final = quoted(CREATED_AT)
_MAX_BULK_STATEMENTS: Final = 64
"""How many bulk statements are cached: each batch may use different columns."""


class StatementKey(NamedTuple):
    """Changes with the same key can share one statement.

    Attributes:
        created: for a whole entity: the arguments include its own `created_at`.
        with_version: for an import: the arguments include its version, which is stored unchanged.
        versions: for a replace, patch or delete: the arguments include the expected version.
        names: for a patch: the declared fields that it changes.
        document: for a patch: it also changes fields that are not declared.
        kept: for a replace: the references that are not changed, even if their parent is missing.
    """

    collection: str
    verb: Verb
    created: bool = False
    with_version: bool = False
    versions: bool = False
    names: tuple[str, ...] = ()
    document: bool = False
    kept: tuple[str, ...] = ()


class Statement(NamedTuple):
    """A statement, and the kinds of the columns of its rows of arguments."""

    sql: str
    kinds: tuple[Kind, ...]


class WriteStatementCache:
    """Generates the statements of a store, and caches them."""

    def __init__(
        self, schema: Schema, tables: dict[str, TableMapping], *, references: bool
    ) -> None:
        self._schema = schema
        self._tables = tables
        self._references = references
        self._statements: dict[tuple[StatementKey, int], Statement] = {}
        self._bulk: dict[tuple[StatementKey, tuple[int, ...], int], str] = {}
        self._imports: dict[tuple[str, int], str] = {}

    def of(self, shape: StatementKey, rows: int) -> Statement:
        """The statement for a number of rows of arguments."""
        variant = self._tables[shape.collection].dialect.statement_variant(rows)
        cached = self._statements.get((shape, variant))
        if cached is None:
            cached = self._statements[shape, variant] = self._generate(shape, rows)
        return cached

    def in_bulk(self, shape: StatementKey, used: tuple[int, ...], rows: int) -> str:
        """The SQL that writes whole entities without preconditions, with a parameter for each value.

        Args:
            used: the numbers of the columns that have arguments; the other columns are NULL.
        """
        cached = self._bulk.get((shape, used, rows))
        if cached is None:
            if len(self._bulk) >= _MAX_BULK_STATEMENTS:
                self._bulk.clear()
            cached = self._bulk[shape, used, rows] = self._generate_bulk(shape, used, rows)
        return cached

    def _generate_bulk(self, shape: StatementKey, used: tuple[int, ...], rows: int) -> str:
        table = self._tables[shape.collection]
        columns = [*table.columns, DOC, SIDE, VERSION]
        row = ", ".join("?" * len(used)) + ("" if shape.with_version else ", 1")
        conflict = ""
        if shape.verb == "save":
            excluded = {each: f"excluded.{each}" for each in columns[:-1]}
            sets = self._sets(table, shape, excluded, f"excluded.{VERSION}")
            conflict = f" ON CONFLICT ({table.key}) DO UPDATE SET {sets}"
        named = [columns[each] for each in used] + ([] if shape.with_version else [VERSION])
        return (
            f"INSERT INTO {table.name} AS t ({', '.join(named)}) "
            f"VALUES {', '.join([f'({row})'] * rows)}{conflict}"
        )

    def _generate(self, shape: StatementKey, rows: int) -> Statement:
        table = self._tables[shape.collection]
        if shape.verb == "patch":
            return self._patch(table, shape, rows)
        if shape.verb == "delete":
            return self._delete(table, shape, rows)
        return self._put(table, shape, rows)

    # -- whole entities. Arguments: key and fields, doc, _side; version and expected version if needed

    def _put(self, table: TableMapping, shape: StatementKey, rows: int) -> Statement:
        kinds: list[Kind] = [*table.kinds, "json", "json"]
        columns = [*table.columns, DOC, SIDE]
        inputs = [table.dialect.cast_input(f"i.c{n}", kind) for n, kind in enumerate(kinds)]
        version = "1"
        if shape.with_version:
            version = f"i.c{len(kinds)}"
            kinds.append("bigint")
        expected = ""
        if shape.versions:
            expected = f" AND t.{VERSION} = i.c{len(kinds)}"
            kinds.append("bigint")
        source = table.dialect.values_source(kinds, rows)
        if shape.verb == "replace":
            sets = self._sets(table, shape, dict(zip(columns, inputs, strict=True)), version)
            parents = self._parents(table, table.fields, kept=shape.kept)
            sql = (
                f"UPDATE {table.name} AS t SET {sets} FROM {source} "
                f"WHERE t.{table.key} = i.c0{expected}{_version_below_maximum(shape)}{parents}"
            )
        else:
            sql = self._save(table, shape, source)
        return Statement(f"{sql} RETURNING {table.key}, {VERSION}", tuple(kinds))

    def imports(self, collection: str, rows: int) -> str:
        """The SQL that writes whole entities with their versions, and returns no rows.

        It has a parameter for each value, so each number of rows has a statement of its own.
        """
        cached = self._imports.get((collection, rows))
        if cached is None:
            shape = StatementKey(collection, "save", created=True, with_version=True)
            table = self._tables[collection]
            bulk = table.dialect.bulk
            assert bulk is not None, "the caller has checked that the dialect has bulk statements"
            source = bulk.values(len(table.columns) + 3, rows)
            cached = self._imports[collection, rows] = self._save(table, shape, source)
        return cached

    def _save(self, table: TableMapping, shape: StatementKey, source: str) -> str:
        kinds: list[Kind] = [*table.kinds, "json", "json"]
        columns = [*table.columns, DOC, SIDE]
        inputs = [table.dialect.cast_input(f"i.c{n}", kind) for n, kind in enumerate(kinds)]
        version = f"i.c{len(kinds)}" if shape.with_version else "1"
        conflict = "NOTHING"
        if shape.verb == "save":
            excluded = {each: f"excluded.{each}" for each in columns}
            sets = self._sets(table, shape, excluded, f"excluded.{VERSION}")
            conflict = f"UPDATE SET {sets} WHERE TRUE{_version_below_maximum(shape)}"
        return (
            f"INSERT INTO {table.name} AS t ({', '.join(columns)}, {VERSION}) "
            f"SELECT {', '.join(inputs)}, {version} FROM {source} "
            f"WHERE TRUE{self._parents(table, table.fields)} "
            f"ON CONFLICT ({table.key}) DO {conflict}"
        )

    def _sets(
        self, table: TableMapping, shape: StatementKey, new: dict[str, str], version: str
    ) -> str:
        """The assignments that replace a row. `created_at` is kept unless the arguments include it."""
        skipped = {table.key, *map(quoted, shape.kept)}
        sets = {column: value for column, value in new.items() if column not in skipped}
        sets[VERSION] = version if shape.with_version else f"t.{VERSION} + 1"
        if not shape.with_version and not shape.created:
            sets[_CREATED] = f"t.{_CREATED}"
            # An explicit null in it is stored in `_side`.
            merged = table.dialect.json_merge(sets[SIDE], f"'{{\"{CREATED_AT}\":null}}'", "NULL")
            sets[SIDE] = (
                f"CASE WHEN t.{SIDE} IS NOT NULL AND {table.dialect.has_overflow(CREATED_AT)} "
                f"THEN {merged} ELSE {sets[SIDE]} END"
            )
        return ", ".join(f"{column} = {value}" for column, value in sets.items())

    # -- patches. Arguments: key, fields, sets, removes, side sets, side removes, weight, version ---

    def _patch(self, table: TableMapping, shape: StatementKey, rows: int) -> Statement:
        fields = [table.collection.fields[each] for each in shape.names]
        kinds: list[Kind] = ["text", *(each.type for each in fields)]
        dialect = table.dialect
        sets = {
            quoted(field.name): dialect.cast_input(f"i.c{n}", field.type)
            for n, field in enumerate(fields, 1)
        }
        if shape.document:
            n = len(kinds)
            sets[DOC] = dialect.json_merge(f"t.{DOC}", f"i.c{n}", f"i.c{n + 1}")
            kinds += ["text", "text"]
        n = len(kinds)
        kinds += ["text", "text", "bigint"]
        merged = dialect.json_merge(f"t.{SIDE}", f"i.c{n}", f"i.c{n + 1}")
        sets[SIDE] = f"CASE WHEN t.{SIDE} IS NULL AND i.c{n} IS NULL THEN NULL ELSE {merged} END"
        sets[VERSION] = f"t.{VERSION} + 1"
        size_limit = f" AND {self._size_bound(table)} + i.c{n + 2} <= {MAX_ENTITY_BYTES}"
        expected = ""
        if shape.versions:
            expected = f" AND t.{VERSION} = i.c{len(kinds)}"
            kinds.append("bigint")
        parents = self._parents(table, fields, first=1)
        sql = (
            f"UPDATE {table.name} AS t "
            f"SET {', '.join(f'{column} = {value}' for column, value in sets.items())} "
            f"FROM {dialect.values_source(kinds, rows)} "
            f"WHERE t.{table.key} = i.c0{expected}{_version_below_maximum(shape)}{size_limit}{parents} "
            f"RETURNING {table.key}, {VERSION}"
        )
        return Statement(sql, tuple(kinds))

    def _size_bound(self, table: TableMapping) -> str:
        """An upper bound for the size of the stored entity: n bytes of JSON count as at most 8.25 n.

        If the bound exceeds the limit, the entity is read, measured and replaced instead.
        """
        fixed = sum(90 + len(each.name) for each in table.fields)
        parts = [str(fixed)]
        for field in table.fields:
            if field.type in ("text", "timestamp"):
                parts.append(f"coalesce({table.dialect.size(f't.{quoted(field.name)}')}, 0)")
            if field.type == "json":
                parts.append(f"9 * coalesce({table.dialect.size(f't.{quoted(field.name)}')}, 0)")
        parts.append(f"9 * coalesce({table.dialect.size(f't.{DOC}')}, 0)")
        return " + ".join(parts)

    # -- deletes. Arguments: key, expected version -------------------------------------------

    def _delete(self, table: TableMapping, shape: StatementKey, rows: int) -> Statement:
        dialect = table.dialect
        deletion = dialect.deletion(table.name, table.key, rows, versions=shape.versions)
        children = ""
        if self._references:
            for child, field in self._schema.children[shape.collection]:
                child_table = self._tables[child.name]
                not_itself = (
                    f" AND c.{child_table.key} <> t.{table.key}"
                    if child.name == shape.collection
                    else ""
                )
                children += (
                    f" AND NOT EXISTS (SELECT 1 FROM {child_table.name} AS c "
                    f"WHERE c.{quoted(field.name)} = t.{table.key}{not_itself})"
                )
        return Statement(
            f"{deletion}{children} RETURNING {table.key}, {VERSION}",
            ("text", "bigint") if shape.versions else ("text",),
        )

    # -- references --------------------------------------------------------------------------

    def _parents(
        self,
        table: TableMapping,
        fields: Sequence[Field],
        *,
        first: int = 0,
        kept: Sequence[str] = (),
    ) -> str:
        """The conditions that the parent of every reference exists.

        Args:
            first: the number of the column of `i` that contains the first of the fields.
            kept: the names of references that are not checked.
        """
        if not self._references:
            return ""
        conditions = []
        for n, field in enumerate(fields, first):
            if field.references is None or not field.enforced or field.name in kept:
                continue
            parent = self._tables[field.references]
            self_reference = (
                f" OR i.c{n} = i.c0" if field.references == table.collection.name else ""
            )
            conditions.append(
                f" AND (i.c{n} IS NULL{self_reference} OR EXISTS "
                f"(SELECT 1 FROM {parent.name} AS p WHERE p.{parent.key} = i.c{n}))"
            )
        return "".join(conditions)


def _version_below_maximum(shape: StatementKey) -> str:
    """The condition that the stored version is not the greatest possible one."""
    return "" if shape.with_version else f" AND t.{VERSION} < {INT_MAX}"
