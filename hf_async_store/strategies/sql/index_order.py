"""Queries that PostgreSQL is to answer by one index, whatever its statistics say.

Of a queue, the first rows of a status are wanted. By statistics from before most of them were worked off,
the server may look for them in the order of the primary key instead, and then passes over everything that
is done. If the query asks for a range of the status, and is sorted by it first, only the index that begins
with the status has this order. The result is the same, because the range contains one value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_async_store.query import And, Comparison, Filter, Not, Query
from hf_async_store.strategies.sql.compiler import paths_in

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.rows import Table


def prefix_of(table: Table, query: Query) -> tuple[str, ...] | None:
    """The first fields of an index, which a query compares for equality, and after which the index has its
    order; None if there is no such index, or if another one might serve the query better."""
    conditions = _conditions(table, query.where)
    equal = {name for name, op in conditions if op == "eq"}
    used, order = {name for name, _ in conditions}, _order_before_id(table, query)
    for fields in ((), *table.entry.wanted_indexes()):
        prefix, rest = fields[: len(equal)], fields[len(equal) :]
        if set(prefix) == equal and rest == order and used <= {*fields}:
            return prefix
    return None


def _conditions(table: Table, where: Filter) -> list[tuple[str, str]]:
    """The fields, and operators, for which an index might be used. For a negation, none ever is."""
    found: list[tuple[str, str]] = []
    for each in where.parts if isinstance(where, And) else (where,):
        if isinstance(each, Comparison):
            found += [(str(each.path[0]), each.op)] if len(each.path) == 1 else []
        elif not isinstance(each, Not):
            found += [(str(path[0]), "or") for path in paths_in(each)]
    return [each for each in found if each[0] in table.ready]


def _order_before_id(table: Table, query: Query) -> tuple[str, ...] | None:
    """The fields of the order, without the id; None if it is not that of an index."""
    names = tuple(str(each.path[0]) for each in query.order if len(each.path) == 1)
    if len(names) < len(query.order) or len({each.descending for each in query.order}) > 1:
        return None
    return names[:-1] if names[-1:] == (table.key_field,) else names
