"""The shapes of the slow queries of one store object, for `health`: what they ask, without any value.

Only a query that takes long is recorded, so that all others cost no more than a look at the clock.
"""

from __future__ import annotations

import logging
from time import perf_counter
from typing import TYPE_CHECKING, Final

import msgspec

from hf_async_store.query import And, Comparison, Filter, Not, Or, Query
from hf_async_store.values import join_path

if TYPE_CHECKING:
    from collections.abc import Mapping

log: Final = logging.getLogger("hf_async_store.slow")

SLOW_SECONDS: Final = 0.020
"""A query that takes at least this time is recorded."""

_MAX_SHAPES: Final = 100
_MAX_TEXT: Final = 500
_SIGNS: Final[Mapping[str, str]] = {
    "eq": "= ?",
    "ne": "!= ?",
    "lt": "< ?",
    "lte": "<= ?",
    "gt": "> ?",
    "gte": ">= ?",
    "between": "between ? and ?",
    "exists": "exists ?",
}
"""How operators are shown; the others by their names."""


class SlowShape(msgspec.Struct):
    """The queries of one shape that were slow.

    Attributes:
        query: one of them, without its values, its limit and its position.
        rows: how many entities they returned, or counted, in all.
    """

    query: Query
    count: int = 0
    seconds: float = 0.0
    worst_seconds: float = 0.0
    rows: int = 0

    @property
    def filter_text(self) -> str:
        """The filter, for people: `status = ? and created_at > ?`."""
        text = _text(self.query.where)
        return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..."

    @property
    def order_by(self) -> list[str]:
        return [f"{'-' if e.descending else ''}{join_path(e.path)}" for e in self.query.order]


class SlowQueries:
    """Slow queries by their shape; of too many shapes, those that took least are forgotten."""

    def __init__(self) -> None:
        self._shapes: dict[Query, SlowShape] = {}

    def note(self, query: Query, started: float, rows: int) -> None:
        """Record a query that has ended, also by an error or its timeout, if it was slow.

        Args:
            started: by `time.perf_counter`.
        """
        seconds = perf_counter() - started
        if seconds >= SLOW_SECONDS:
            self._add(query, seconds, rows)

    def _add(self, query: Query, seconds: float, rows: int) -> None:
        shape = Query(query.collection, _without_values(query.where), query.order)
        if log.isEnabledFor(logging.DEBUG):
            shown = SlowShape(shape)
            log.debug(
                "a query of %s took %.3f s: %s; order %s; %d rows",
                *(query.collection, seconds, shown.filter_text or "all", shown.order_by, rows),
            )
        if shape not in self._shapes and len(self._shapes) == _MAX_SHAPES:
            del self._shapes[self.slowest()[-1].query]
        found = self._shapes.setdefault(shape, SlowShape(shape))
        found.count += 1
        found.seconds += seconds
        found.worst_seconds = max(found.worst_seconds, seconds)
        found.rows += rows

    def slowest(self) -> list[SlowShape]:
        """All shapes, those that took most time in all first."""
        return sorted(self._shapes.values(), key=lambda each: each.seconds, reverse=True)


def _without_values(where: Filter) -> Filter:
    if isinstance(where, Comparison):
        return Comparison(where.path, where.op, None)
    if isinstance(where, Not):
        return Not(_without_values(where.part))
    parts = tuple(dict.fromkeys(map(_without_values, where.parts)))
    return type(where)(parts)


def _text(where: Filter) -> str:
    if isinstance(where, Comparison):
        sign = _SIGNS.get(where.op, f"{where.op.replace('_', ' ')} ?")
        return f"{join_path(where.path)} {sign}"
    if isinstance(where, Not):
        return f"not ({_text(where.part)})"
    if not where.parts:
        return "nothing" if isinstance(where, Or) else ""
    return (" and " if isinstance(where, And) else " or ").join(map(_nested, where.parts))


def _nested(where: Filter) -> str:
    is_joined = isinstance(where, And | Or) and len(where.parts) > 1
    return f"({_text(where)})" if is_joined else _text(where)
