"""An update of the first entities of a query in one statement on PostgreSQL, instead of a query and writes.

The statement finds them, and changes all or none. Its transaction has one snapshot, so it fails if another
one has changed one of them since. It changes none if the server cannot decide for one of them as the store
would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hf_async_store.changes import ChangedMatches
from hf_async_store.query import And, Comparison
from hf_async_store.sort_bytes import INEXACT, MAX_SORT_BYTES
from hf_async_store.strategies.sql.compiler import compile_query
from hf_async_store.strategies.sql.grammar import Arguments, Compiled, decode_json
from hf_async_store.strategies.sql.names import DOC, key_column, quoted
from hf_async_store.strategies.sql.query_shapes import keep, shape_of
from hf_async_store.strategies.sql.sending import overtaken
from hf_async_store.values import VERSION, Entity, Key

if TYPE_CHECKING:
    from hf_async_store.changes import Patch
    from hf_async_store.query import Query
    from hf_async_store.strategies.sql.pending import Encoder
    from hf_async_store.strategies.sql.rows import Table
    from hf_async_store.strategies.sql.write_sql import StatementKey


_LEADING: Final = ("eq", "lt", "lte", "gt", "gte", "between")


class MatchingUpdate(NamedTuple):
    """The statement, and how its result is read.

    Attributes:
        names: the fields of the order, whose values it returns; the query needs no others.
    """

    table: Table
    names: Sequence[str]
    sql: str
    args: list[object]

    @classmethod
    def of(
        cls, encoder: Encoder, query: Query, change: Patch, seconds: float
    ) -> MatchingUpdate | None:
        """The update of what a query selects; None if one statement is not enough.

        Args:
            seconds: how long it waits for a lock.
        """
        table = encoder.tables.get(query.collection)
        names = None if table is None else _sorted_by(table, query)
        if table is None or names is None or query.fields is None:
            return None
        pending = encoder.pending(0, change)
        shape = pending.shape
        if shape is None or shape.unique or shape.parents:
            return None
        _, _, *columns, document = encoder.arguments(shape, [pending], alone=True)
        first = [str(int(seconds * 1000)), document, *columns]
        args: list[object] = [*first]
        of_query = shape_of(table, query, args)
        kept = None if of_query is None else table.statements.get((shape, of_query))
        if kept is not None:
            return cls(table, names, kept.sql, args)
        compiled = _compiled(encoder, table, query, shape, names, first)
        if compiled is None:
            return None
        if of_query is not None:
            keep(table, (shape, of_query), compiled)
        return cls(table, names, compiled.sql, compiled.args)

    def result(self, rows: Sequence[Sequence[Any]]) -> ChangedMatches | None:
        """What was changed; None: nothing, because one of them must be decided by the store."""
        if rows and all(row[2] is None for row in rows):
            return None
        found = ChangedMatches([], [], [])
        for entity_id, version, written, *values in rows:
            entity: Entity = {self.table.key_field: entity_id, VERSION: version}
            for name, value in zip(self.names, values, strict=True):
                if value is not None:
                    entity[name] = decode_json(value)
            found.entities.append(entity)
            key = Key(self.table.collection, entity_id)
            found.keys.append(key)
            # A trigger that this store did not make may keep a row as it is.
            found.outcomes.append(overtaken(key) if written is None else written)
        return found


def _compiled(
    encoder: Encoder,
    table: Table,
    query: Query,
    shape: StatementKey,
    names: Sequence[str],
    first: Sequence[object],
) -> Compiled | None:
    """The statement; None if its query is not answered by an index alone.

    Args:
        first: the arguments of the change.
    """
    if not _index_leads(table, query):
        return None
    args = Arguments(table.grammar)
    args.values = list(first)
    assignments, condition = encoder.statements.assignments(shape)
    decided = " AND ".join([condition, *(_is_placed(each) for each in names)])
    values = [f"(t.{DOC} -> '{each}'::text)::text" for each in names]
    place = ["t.ctid", f"t.{table.key}", f"t.{VERSION}", f"({decided}) IS TRUE"]
    selected = ", ".join([*place, *values])
    compiled = compile_query(table, query, args=args, selected=selected)
    if not compiled.limited:
        return None
    sql = encoder.statements.of_selected(table, compiled.sql, assignments, len(values))
    return compiled._replace(sql=sql)


def _sorted_by(table: Table, query: Query) -> list[str] | None:
    """The fields of the order, other than the id and the version; None if one has no key column."""
    names = [str(each.path[0]) for each in query.order if len(each.path) == 1]
    names = [each for each in names if each not in (VERSION, table.key_field)]
    is_sorted = all(len(each.path) == 1 for each in query.order) and table.ready >= {*names}
    return names if is_sorted else None


def _index_leads(table: Table, query: Query) -> bool:
    """Whether an index leads to the first matches: it begins with the fields compared for equality, ends
    with those of the order, which the id follows, and only the first of these is in a range.

    Else many rows may be read, and what a serializable statement reads makes other transactions fail.
    """
    parts = query.where.parts if isinstance(query.where, And) else (query.where,)
    compared = [each for each in parts if isinstance(each, Comparison) and each.op in _LEADING]
    if len(compared) < len(parts) or len({each.descending for each in query.order}) > 1:
        return False
    equal = {each.path for each in compared if each.op == "eq"}
    ordered = [each.path for each in query.order if each.path != (table.key_field,)]
    indexes = [(), *(each.fields for each in table.entry.indexes if each.ready)]
    for paths in ([(name,) for name in fields] for fields in indexes):
        leads = {*paths[: len(equal)]} == equal and paths[len(equal) :] == ordered
        if leads and all(each.path in paths[: len(equal) + 1] for each in compared):
            return True
    return False


def _is_placed(name: str) -> str:
    """The condition that the key column of a field determines the place of the row."""
    column = f"t.{quoted(key_column(name))}"
    return (
        f"pg_catalog.octet_length({column}) < {MAX_SORT_BYTES}::int "
        f"AND pg_catalog.get_byte({column}, 0) < {INEXACT}::int"
    )
