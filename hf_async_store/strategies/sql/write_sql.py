"""The SQL of writes on PostgreSQL: one statement checks the preconditions of many rows, and returns those
it wrote.

A statement takes rows of arguments as `i`, one array for each column, and the documents `d` in one JSON
array. One for a single row takes the same, and finds that row by its id whatever the size of the table. A
row that it does not return did not meet its precondition; `statement_writer` finds out why.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias

from hf_async_store.schema import Collection, Field
from hf_async_store.strategies.sql.compiler import LivingConditions
from hf_async_store.strategies.sql.names import DOC, GENERATION, key_column, quoted, unique_column
from hf_async_store.unique import Fields
from hf_async_store.values import CREATED_AT, INT_MAX, LIGHT_BYTES, VERSION

if TYPE_CHECKING:
    from hf_async_store.lifetimes import Lifetimes
    from hf_async_store.strategies.sql.rows import Table, Tables

Held: TypeAlias = Literal["id", "place"]
Verb: TypeAlias = Literal["save", "create", "replace", "patch", "delete"]

_LOCK_TIMEOUT: Final = (
    "pg_catalog.set_config('lock_timeout'::text, coalesce($1::text, "
    "pg_catalog.current_setting('lock_timeout'::text)), true) AS s (c)"
)
"""Sets `lock_timeout` until the transaction ends: in a FROM clause, before the first row is locked."""

_NO_LOCK_TIMEOUT: Final = "(SELECT $1::text) AS s (c)"
"""The same argument where it is None: to set what is set costs as much as a look-up by id."""

CHANGED: Final = "the catalogue has generation "
"""A part of the message of the error that a statement causes if the catalogue has changed: a cast to a
number fails, because a condition that is false could also mean that there is no such row."""


_FEW: Final = "pg_catalog.length(i.c0) >= 0::int AND pg_catalog.length(i.c0) <= 2147483647::int"
"""Always true. Because of it, the server, which knows nothing of the arguments, expects few rows of them,
and finds each row of the table by its id; otherwise it would read a table of some thousand rows."""


class StatementKey(NamedTuple):
    """Changes with the same key can share one statement.

    Attributes:
        keys: the fields whose key columns it writes; of a delete, none.
        unique: the fields of the unique columns that it writes, in the same way.
        created: for a whole entity: its document contains `created_at`, or is stored without it.
        imported: a column of arguments contains the version to store.
        lifetimes: by which neither the stored entity nor a parent may have expired.
        same: a column of arguments contains the document that must be stored, expired or not.
        removes: of a patch: a column of arguments contains the names of fields to remove.
        parents: of a patch: the references that it writes.
    """

    collection: str
    verb: Verb
    keys: tuple[str, ...] = ()
    created: bool = False
    imported: bool = False
    unique: tuple[Fields, ...] = ()
    lifetimes: Lifetimes | None = None
    same: bool = False
    removes: bool = False
    parents: tuple[str, ...] = ()


class WriteStatements:
    """Generates the statements for the tables of a store, and caches them.

    Attributes:
        references: they are enforced.
    """

    def __init__(self, tables: Tables, *, references: bool) -> None:
        self._tables = tables
        self.references = references
        self._cache: dict[tuple[StatementKey, bool, Held | None, bool], str] = {}
        self._exact: dict[tuple[Lifetimes, str], bool] = {}

    def of(
        self, shape: StatementKey, *, locks: bool, held: Held | None = None, alone: bool = False
    ) -> str:
        """The statement.

        Its arguments are `lock_timeout` (None: as it is set, as always with `held`), those of `times`, and
        one array for each column of arguments; unless it deletes, then the JSON array of documents, and
        for each reference the JSON array of the distinct ids.

        Args:
            locks: it locks the parents to which rows refer, until its transaction ends. This is needed
                unless the transactions are serializable.
            held: it changes only the row whose id, or place, is in the table `held`, and also returns its
                place; see `ClaimSQL.write`.
            alone: it has one row of arguments, and no lists of ids.
        """
        key = (shape, locks, held, alone)
        cached = self._cache.get(key)
        if cached is None:
            sql = self._generate(shape, locks=locks, held=held, alone=alone)
            cached = self._cache[key] = sql
        return cached

    def of_parents(self, collection: str) -> str:
        """The statement that locks rows, in the order of their ids, so that they get no children.

        Its arguments are `lock_timeout`, as in `of`, and a list of ids.
        """
        table = self._tables[collection]
        return (
            f"SELECT 1 FROM {_LOCK_TIMEOUT}, {table.name} AS t "
            f"WHERE t.{table.key} = ANY($2::text::text[]) ORDER BY t.{table.key} FOR UPDATE OF t"
        )

    def parents_of(self, shape: StatementKey) -> Sequence[Field]:
        """The references that a statement writes, whose values are its last columns of arguments."""
        if not self.references or shape.verb == "delete":
            return ()
        found = self._tables.schema[shape.collection].references
        if shape.verb != "patch":
            return found
        return [each for each in found if each.name in shape.parents]

    def children_of(self, collection: str) -> Sequence[tuple[Collection, Field]]:
        """The references to a collection that prevent deletes; `sort_bytes` of the id is then the last
        column of arguments of a delete."""
        return self._tables.schema.children[collection] if self.references else ()

    def times(self, shape: StatementKey) -> list[object]:
        """The arguments of a statement that tell what has expired now."""
        return [] if shape.lifetimes is None else self._living(shape).arguments

    def decides(self, lifetimes: Lifetimes, collection: str) -> bool:
        """Whether the statements can tell which entities of a collection, and parents, have expired."""
        known = self._exact.get((lifetimes, collection))
        if known is None:
            references = self._tables.schema[collection].references if self.references else ()
            names = [collection, *(each.parent for each in references)]
            found = [(self._tables[name], lifetimes.of(name)) for name in names]
            known = self._exact[lifetimes, collection] = all(
                LivingConditions.are_exact(table, each) for table, each in found if each is not None
            )
        return known

    def _living(self, shape: StatementKey) -> _Living:
        return _Living(self._tables, shape, self.parents_of(shape))

    def _generate(self, shape: StatementKey, *, locks: bool, held: Held | None, alone: bool) -> str:
        table = self._tables[shape.collection]
        living = self._living(shape)
        timeout = _LOCK_TIMEOUT if held is None or locks else _NO_LOCK_TIMEOUT
        columns = _Columns(2 + len(living.arguments), alone=alone, timeout=timeout)
        entity_id = columns.add("text")
        if shape.verb in ("save", "create"):
            sql = self._insert(table, shape, columns, living, locks=locks)
        elif shape.verb == "delete":
            condition = f"t.{table.key} = {entity_id} AND {_FEW} AND {_expected(columns)}"
            condition += _same(shape, columns) + living.own
            condition += "".join(self._no_children(table, columns)) + self._current()
            source = columns.source(documents=False)
            sql = f"DELETE FROM {table.name} AS t USING {source} WHERE {condition}"
        else:
            sql = self._update(table, shape, columns, living, locks=locks)
        returned = f"RETURNING t.{table.key}, t.{VERSION}"
        if held is None:
            return f"{sql} {returned}"
        # By the id of the claim, the row is looked up by the index, whatever the size of the table.
        column = "ctid" if held == "place" else table.key
        return f"{sql} AND t.{column} = (SELECT h.{held} FROM held AS h) {returned}, t.ctid"

    def _insert(
        self,
        table: Table,
        shape: StatementKey,
        columns: _Columns,
        living: _Living,
        *,
        locks: bool,
    ) -> str:
        version = columns.add("bigint") if shape.imported else "1::bigint"
        keys = _key_columns(shape, columns)
        parents = "".join(self._parents(table, shape, columns, living, locks=locks))
        names = [table.key, VERSION, DOC, quoted(GENERATION), *map(quoted, keys)]
        values = ["i.c0", version, "i.d", f"{table.generation}::int", *keys.values()]
        conflict = "NOTHING"
        if shape.verb == "save":
            sets = {each: f"excluded.{quoted(each)}" for each in keys}
            new = f"excluded.{VERSION}" if shape.imported else f"t.{VERSION} + 1::bigint"
            written, condition = _row(table, shape, f"excluded.{DOC}", new, sets)
            conflict = f"UPDATE SET {written} WHERE {condition}{living.own}"
        return (
            f"INSERT INTO {table.name} AS t ({', '.join(names)}) "
            f"SELECT {', '.join(values)} FROM {columns.source(documents=True, locks=locks)} "
            f"WHERE TRUE{parents}{self._current()} "
            f"ON CONFLICT ({table.key}) DO {conflict}"
        )

    def _update(
        self,
        table: Table,
        shape: StatementKey,
        columns: _Columns,
        living: _Living,
        *,
        locks: bool,
    ) -> str:
        expected = _expected(columns) + _same(shape, columns) + living.own
        written, condition = _assignments(table, shape, columns)
        parents = "".join(self._parents(table, shape, columns, living, locks=locks))
        return (
            f"UPDATE {table.name} AS t SET {written} FROM {columns.source(documents=True, locks=locks)} "
            f"WHERE t.{table.key} = i.c0 AND {_FEW} AND {expected} AND {condition}{parents}"
            f"{self._current()}"
        )

    def assignments(self, shape: StatementKey) -> tuple[str, str]:
        """Those of a patch without references, and the condition of a row, for `of_selected`.

        The arguments are `lock_timeout`, the JSON array of the document, and the columns of arguments
        without the ids and versions.
        """
        return _assignments(self._tables[shape.collection], shape, _Scalars(2))

    def of_selected(self, table: Table, selection: str, assignments: str, values: int) -> str:
        """The statement that changes all rows of a SELECT, or none. It returns, for each, the id, the old
        and the new version, or NULL, and further values.

        Args:
            selection: of the place, the id, the version, a condition that must be true for all rows, and
                the values, in the order in which they are returned.
        """
        names = [f"v{number}" for number in range(values)]
        columns = ", ".join(["place", "id", "version", "decided", *names, "number"])
        returned = ", ".join(["c.id", "c.version", "w.version", *(f"c.{each}" for each in names)])
        return (
            # The number is that of the sorted row: in the selection itself, rows are numbered before.
            f"WITH chosen ({columns}) AS MATERIALIZED "
            f"(SELECT f.*, pg_catalog.row_number() OVER () FROM ({selection}) AS f), "
            f"written (id, version) AS (UPDATE {table.name} AS t SET {assignments} "
            f"FROM {_LOCK_TIMEOUT}, chosen AS c WHERE t.ctid = c.place "
            f"AND NOT EXISTS (SELECT 1 FROM chosen AS o WHERE NOT o.decided){self._current()} "
            f"RETURNING t.{table.key}, t.{VERSION}) "
            f"SELECT {returned} FROM chosen AS c LEFT JOIN written AS w ON w.id = c.id ORDER BY c.number"
        )

    def _current(self) -> str:
        """The condition that the catalogue is as these tables were read from it.

        Otherwise other programs may have declared references.
        """
        generation = f"'{self._tables.catalogue.generation}'::text"
        catalogue = quoted(self._tables.names.catalogue)
        return (
            f" AND (SELECT CASE WHEN c.value = {generation} THEN 1 "
            f"ELSE pg_catalog.concat('{CHANGED}'::text, c.value)::int END "
            f"FROM {catalogue} AS c WHERE c.name = 'generation'::text) IS DISTINCT FROM 0"
        )

    # -- references --------------------------------------------------------------------------

    def _parents(
        self,
        table: Table,
        shape: StatementKey,
        columns: _Columns,
        living: _Living,
        *,
        locks: bool,
    ) -> Iterator[str]:
        """The conditions that the parent of every reference exists."""
        lock = " FOR KEY SHARE" if locks else ""
        after = " AND s.c IS NOT NULL" if locks and columns.alone else ""
        fields = self.parents_of(shape)
        values = [columns.add("text") for _ in fields]
        for number, (field, value) in enumerate(zip(fields, values, strict=True)):
            parent = self._tables[field.parent]
            itself = f" OR {value} = i.c0" if parent is table else ""
            # The subquery is independent of the row: each parent is looked up once, by the index, so
            # that a serializable transaction does not conflict with those of all other parents.
            wanted = value if columns.alone else "w.id"
            found = (
                f"SELECT t.{parent.key} FROM {parent.name} AS t "
                f"WHERE t.{parent.key} = {wanted}{living.parents[number]}{after} LIMIT 1{lock}"
            )
            is_there = f"= ({found})"
            if not columns.alone:
                is_there = (
                    f"IN (SELECT f.{parent.key} "
                    f"FROM {columns.list(number)} AS w (id), LATERAL ({found}) AS f)"
                )
            yield f" AND ({value} IS NULL{itself} OR {value} {is_there})"

    def _no_children(self, table: Table, columns: _Columns) -> Iterator[str]:
        """The conditions that no entity refers to the deleted one."""
        children = self.children_of(table.collection)
        encoded = columns.add("bytea") if children else ""
        for child, field in children:
            others = self._tables[child.name]
            itself = f" AND c.{others.key} <> t.{table.key}" if others is table else ""
            refers = refers_to(others, field.name, encoded, f"t.{table.key}")
            yield f" AND NOT EXISTS (SELECT 1 FROM {others.name} AS c WHERE {refers}{itself})"


def _key_columns(shape: StatementKey, columns: _Columns) -> dict[str, str]:
    """The key columns and unique columns that a statement writes, each with its column of arguments."""
    names = [*map(key_column, shape.keys), *map(unique_column, shape.unique)]
    return {each: columns.add("bytea") for each in names}


def refers_to(table: Table, field: str, encoded: str, entity_id: str) -> str:
    """The condition that the row `c` refers to an entity.

    Args:
        encoded: `sort_bytes` of the id.
    """
    member = f"c.{DOC} -> '{field}'::text"
    test = f"({member}) = pg_catalog.to_jsonb({entity_id})"
    if field not in table.ready:
        return test
    return f"c.{quoted(key_column(field))} = {encoded} AND {test}"


def _assignments(table: Table, shape: StatementKey, columns: _Columns) -> tuple[str, str]:
    """The assignments of a row that is replaced or patched, and their condition."""
    version, doc, patched = f"t.{VERSION} + 1::bigint", columns.document, ""
    if shape.imported:
        version = columns.add("bigint")
    if shape.verb == "patch":
        stored = f"t.{DOC}"
        if shape.removes:
            removed = columns.add("text")
            stored = f"(t.{DOC} - coalesce({removed}::text[], '{{}}'::text[]))"
        size = columns.add("bigint")
        doc = f"{stored} || {doc}"
        patched = f" AND {_is_light(size)}"
    keys = _key_columns(shape, columns)
    written, condition = _row(table, shape, doc, version, keys)
    return written, f"{condition}{patched}"


def _row(
    table: Table, shape: StatementKey, doc: str, version: str, keys: dict[str, str]
) -> tuple[str, str]:
    """The assignments of an existing row, and their condition.

    Args:
        doc: the document, or that without `created_at`.
        keys: by column, the new values.
    """
    if shape.verb != "patch" and not shape.created:
        stored = f"t.{DOC} -> '{CREATED_AT}'::text"
        kept = f"pg_catalog.jsonb_set({doc}, '{{{CREATED_AT}}}'::text[], {stored})"
        doc = f"coalesce({kept}, {doc} - '{CREATED_AT}'::text)"  # NULL if nothing is stored
        keys = {name: each for name, each in keys.items() if name != key_column(CREATED_AT)}
    sets = {VERSION: version, DOC: doc, quoted(GENERATION): f"{table.generation}::int"}
    sets.update({quoted(name): each for name, each in keys.items()})
    conditions = [] if shape.imported else [f"t.{VERSION} < {INT_MAX}::bigint"]
    if len(keys) < len(table.columns):
        # The key columns that are kept have their values.
        conditions.append(f"t.{quoted(GENERATION)} >= {table.generation}::int")
    written = ", ".join(f"{name} = {each}" for name, each in sets.items())
    return written, " AND ".join(conditions) or "TRUE"


def _is_light(size: str) -> str:
    """The condition that a patched entity is certainly not too large. Others are measured by the store.

    The JSON of a document is at most 32 times as long as its binary form: a number of 12 bytes can have
    309 digits.
    """
    binary = f"pg_catalog.pg_column_size(t.{DOC} || '{{}}'::jsonb)::bigint"  # not compressed
    text = f"pg_catalog.octet_length(t.{DOC}::text)::bigint"
    return f"({binary} * 32 + {size} <= {LIGHT_BYTES} OR {text} + {size} <= {LIGHT_BYTES})"


class _Living:
    """The conditions that entities have not expired, which are written for the row `t`.

    Attributes:
        own: of the stored entity.
        parents: of the parent of each reference.
        arguments: the arguments in them, which follow the first one of the statement.
    """

    def __init__(self, tables: Tables, shape: StatementKey, references: Sequence[Field]) -> None:
        self._lifetimes = shape.lifetimes
        self._conditions = LivingConditions(first=2)
        own = shape.lifetimes is not None and not shape.same and shape.verb != "create"
        self.own = self._condition(tables[shape.collection]) if own else ""
        self.parents = [self._condition(tables[each.parent]) for each in references]
        self.arguments = self._conditions.arguments

    def _condition(self, table: Table) -> str:
        lifetime = self._lifetimes.of(table.collection) if self._lifetimes is not None else None
        if lifetime is None:
            return ""
        return f" AND {self._conditions.of(table, lifetime)}"


def _same(shape: StatementKey, columns: _Columns) -> str:
    """The condition that the stored document is that of the arguments, if it must be."""
    return f" AND t.{DOC} = {columns.add('text')}::jsonb" if shape.same else ""


def _expected(columns: _Columns) -> str:
    """The condition on the version."""
    expected = columns.add("bigint")
    return f"({expected} IS NULL OR t.{VERSION} = {expected})"


class _Columns:
    """The columns of arguments of a statement, while it is generated.

    Args:
        first: the number of the parameter of the first one.
        alone: there is one row of arguments.
        timeout: the item of the FROM clause that sets `lock_timeout`.

    Attributes:
        document: that of the row.
    """

    document = "i.d"

    def __init__(self, first: int, *, alone: bool, timeout: str = _LOCK_TIMEOUT) -> None:
        self.alone = alone
        self._timeout = timeout
        self._first = first
        self._kinds: list[str] = []

    def add(self, kind: str) -> str:
        """Add a column; returns its name."""
        self._kinds.append(kind)
        return f"i.c{len(self._kinds) - 1}"

    def list(self, number: int) -> str:
        """The values of one of the lists after all columns and the documents, in a FROM clause."""
        # Not an array: its length in each execution would make the server plan each execution.
        place = self._first + len(self._kinds) + 1 + number
        return f"pg_catalog.json_array_elements_text(${place}::text::json)"

    def source(self, *, documents: bool, locks: bool = False) -> str:
        """The items of a FROM clause that provide the rows of arguments.

        Args:
            locks: conditions lock parents, so that `lock_timeout` must be set before the first row: the
                rows depend on the item that sets it, and so does what is independent of the row.
        """
        arrays = [f"${n}::text::{kind}[]" for n, kind in enumerate(self._kinds, self._first)]
        if self.alone:
            values = [f"({each})[1] AS c{n}" for n, each in enumerate(arrays)]
            if documents:
                values.append(f"(${self._first + len(arrays)}::text::jsonb) -> 0 AS d")
            return f"{self._timeout}, (SELECT {', '.join(values)}) AS i"
        names = [*(f"c{n}" for n in range(len(arrays))), "d"]
        # The unqualified name with one argument would be looked up along the search_path.
        unnest = f"{'pg_catalog.' if len(arrays) == 1 else ''}unnest({', '.join(arrays)})"
        # Also without documents: by the number of rows of the arrays alone, the server would plan each
        # execution of the statement.
        docs = f"${self._first + len(arrays)}::text::jsonb" if documents else "'[]'::jsonb"
        if locks:
            docs = f"CASE WHEN s.c IS NOT NULL THEN {docs} END"
        functions = f"{unnest}, pg_catalog.jsonb_array_elements({docs})"
        return f"{self._timeout}, ROWS FROM ({functions}) AS i ({', '.join(names)})"


class _Scalars(_Columns):
    """The arguments of one row where there is no FROM clause. The document is the first one."""

    def __init__(self, first: int) -> None:
        super().__init__(first + 1, alone=True)
        self.document = f"(${first}::text::jsonb -> 0)"

    def add(self, kind: str) -> str:
        super().add(kind)
        return f"(${self._first + len(self._kinds) - 1}::text::{kind}[])[1]"
