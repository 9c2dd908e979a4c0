"""Statements that are compiled once for all queries of a shape.

The SQL of most queries depends on their shape alone: on the fields and kinds of their conditions, the
order, the limit, and whether there is a position. For the next query of a shape, only the arguments are
computed; and its statement is the same object, which the drivers find faster in their caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from hf_async_store.query import And, Comparison, Filter
from hf_async_store.sort_bytes import is_exact, ranges, sort_bytes
from hf_async_store.strategies.sql.grammar import Compiled

if TYPE_CHECKING:
    from hf_async_store.query import Query
    from hf_async_store.strategies.sql.rows import Table

_MOST: Final = 256
"""The number of statements that a table keeps: as many as a connection of SQLite keeps prepared."""


def compiled_by_shape(
    compile_shape: Callable[[Table, Query], Compiled], table: Table, query: Query
) -> Compiled:
    """`compile_shape(table, query)`, that is, `compile_query`, or `compile_count` of a query without a
    position."""
    args: list[object] = []
    shape = shape_of(table, query, args)
    if shape is None:
        return compile_shape(table, query)
    kept = table.statements.get((compile_shape, shape))
    if kept is None:
        kept = keep(table, (compile_shape, shape), compile_shape(table, query))
    return Compiled(kept.sql, args, None, kept.limited, kept.step, kept.where)


def keep(table: Table, shape: tuple[object, ...], compiled: Compiled) -> Compiled:
    """Keep a statement for other queries of its shape, without its arguments: one may be a document."""
    if len(table.statements) >= _MOST:
        table.statements.clear()
    kept = table.statements[shape] = compiled._replace(args=[])
    return kept


def shape_of(table: Table, query: Query, args: list[object]) -> tuple[object, ...] | None:
    """The shape of a query, whose arguments are added; None if it does not determine the SQL."""
    conditions = _conditions(table, query.where, args)
    if conditions is None or not _add_position(table, query, args):
        return None
    return (*conditions, query.order, query.limit, query.after is not None)


def _conditions(table: Table, where: Filter, args: list[object]) -> list[object] | None:
    """The shape of a filter, whose arguments are added; None if it does not determine the SQL.

    It does if each part of the filter is one range of a key column, in which all values match.
    """
    shape: list[object] = []
    parts: Iterable[Filter] = where.parts if isinstance(where, And) else (where,)
    for each in parts:
        if not isinstance(each, Comparison) or len(each.path) > 1:
            return None
        if each.path[0] not in table.plain:
            return None
        if each.op == "eq":
            low = sort_bytes(each.value)
            if not is_exact(low):
                return None
            args.append(low)
            shape += each.path[0], "eq"
            continue
        found = ranges(each.op, each.value)
        if found is None or len(found) != 1 or not found[0].exact:
            return None
        [one] = found
        is_single = one.only is not None
        args += (one.low,) if is_single else (one.low, one.high)
        shape += each.path[0], each.op, is_single
    return shape


def _add_position(table: Table, query: Query, args: list[object]) -> bool:
    """Add the arguments of a position; false if they, or the order, do not determine the SQL."""
    for each in query.order:
        if len(each.path) > 1 or each.path[0] not in table.plain:
            return False
    if query.after is None:
        return True
    encoded = list(map(sort_bytes, query.after.values))
    args += encoded
    args.append(query.after.id)
    return all(map(is_exact, encoded))
