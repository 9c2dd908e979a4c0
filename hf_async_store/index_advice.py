"""Which declared index would serve a query that scans a collection or sorts its rows."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING, Final

from hf_async_store.driver import QueryPlan
from hf_async_store.query import And, Comparison

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hf_async_store.query import Query, Steps
    from hf_async_store.schema import Collection

_EQUALITIES: Final = ("eq", "in")
_RANGES: Final = ("lt", "lte", "gt", "gte", "between", "begins_with")
_MAX_FIELDS: Final = 4


def advice(collection: Collection, query: Query, plan: QueryPlan) -> str | None:
    """The declaration of an index that would serve a query: `Index("status", "created_at")`.

    None if the query neither scans nor sorts, if no index would help, or if one that would is declared.
    """
    if plan.access == "key" or (plan.access == "index" and not plan.sorted_here):
        return None
    fields = _fields_to_index(collection, query)
    if not fields or any(each.fields[: len(fields)] == fields for each in collection.indexes):
        return None
    quoted = ", ".join(f'"{each}"' for each in fields)
    return f"Index({quoted})"


def advice_by_declaration(collection: Collection, query: Query) -> str | None:
    """As `advice`, if the plan is not known: for a query that no declared index can serve."""
    parts = query.where.parts if isinstance(query.where, And) else (query.where,)
    by_key = any(
        isinstance(each, Comparison) and each.path == (collection.key,) and each.op in _EQUALITIES
        for each in parts
    )
    return advice(collection, query, QueryPlan(access="key" if by_key else "scan"))


def _fields_to_index(collection: Collection, query: Query) -> tuple[str, ...]:
    """The fields of equality, then those of the order; without an order, one with a range."""
    parts = query.where.parts if isinstance(query.where, And) else (query.where,)
    compared = [each for each in parts if isinstance(each, Comparison)]
    equal = _indexable(collection, (each.path for each in compared if each.op in _EQUALITIES))
    ranges = _indexable(collection, (each.path for each in compared if each.op in _RANGES))
    # An index is read in one direction; what follows in the other one is sorted within equal values.
    one_direction = takewhile(
        lambda each: each.descending is query.order[0].descending, query.order
    )
    ordered = _indexable(collection, (each.path for each in one_direction), stop=True)
    return tuple(dict.fromkeys([*equal, *(ordered or ranges[:1])]))[:_MAX_FIELDS]


def _indexable(collection: Collection, paths: Iterable[Steps], *, stop: bool = False) -> list[str]:
    """The fields among these paths that an index can have, without the key, by which rows are found
    anyway; with `stop`, those before the first other path."""
    names: list[str] = []
    for path in paths:
        field = collection.field_at(path)
        if field is not None and field.type != "json" and field.name != collection.key:
            names.append(field.name)
        elif stop:
            break
    return names
