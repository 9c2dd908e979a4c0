"""Groups and sums of the values of one field, computed from the matching entities."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from hf_async_store.collector import GatheredObjects
from hf_async_store.errors import InvalidQueryError, UnsupportedValueError
from hf_async_store.event_loop import Chunks
from hf_async_store.query import (
    And,
    Comparison,
    Missing,
    Order,
    Path,
    Query,
    Steps,
    named_steps,
    order_key,
)
from hf_async_store.schema import Collection
from hf_async_store.values import Value, canonical

_RUN_SIZE: Final = 1_000
"""The number of values sorted between two iterations of the event loop."""

_SCALE: Final = 1 << 1074
"""Every finite float is a multiple of its reciprocal."""


def aggregated_path(collection: Collection, field: str | Path, *, numeric: bool = False) -> Steps:
    """The path of the values to be grouped or compared.

    Raises:
        InvalidQueryError: the field is declared as json, or, if `numeric`, as another type than a number.
    """
    steps = named_steps(field, collection)
    declared = collection.field_at(steps)
    if declared is not None:
        if declared.type == "json":
            raise InvalidQueryError(
                f"{collection.name}.{declared.name} is declared as json: name a value inside it by `path`"
            )
        if numeric and declared.type not in ("integer", "number"):
            raise InvalidQueryError(
                f"{collection.name}.{declared.name} is declared as {declared.type}, not as a number"
            )
    return steps


class Counts:
    """The number of values that are `eq` to each other, type by type."""

    def __init__(self) -> None:
        self._groups: dict[Any, tuple[Value | Missing, int]] = {}
        self._gathered = GatheredObjects()

    def add(self, values: Iterable[Value | Missing]) -> None:
        before = len(self._groups)
        for value in values:
            key = order_key(value)
            shown, count = self._groups.get(key, (value, 0))
            self._groups[key] = (_shown(shown, value), count + 1)
        self._gathered.add(len(self._groups) - before)

    async def sorted(self) -> list[tuple[Value | Missing, int]]:
        """Each value with its count, in the order of `query.order_key`.

        There may be as many values as entities, so the event loop runs other tasks meanwhile.
        """
        runs = [sorted(keys) async for keys in Chunks(list(self._groups), _RUN_SIZE)]
        merged = Chunks(heapq.merge(*runs), _RUN_SIZE)
        return [self._groups[key] async for keys in merged for key in keys]


def _shown(first: Value | Missing, second: Value | Missing) -> Value | Missing:
    """Which of two equal values, such as 1 and 1.0, is shown: the same one in both orders of the rows."""
    if isinstance(first, list | dict) and isinstance(second, list | dict):
        return min(first, second, key=canonical)
    return second if type(second) is int else first


class Sum:
    """The exact sum of the numbers among values; it does not depend on their order."""

    def __init__(self) -> None:
        self._integers = 0
        self._floats: int | None = None  # in units of 1 / _SCALE; None if there is no float

    def add(self, values: Iterable[Value | Missing]) -> None:
        for value in values:
            if type(value) is int:
                self._integers += value
            elif type(value) is float:
                numerator, denominator = value.as_integer_ratio()
                self._floats = (self._floats or 0) + numerator * (_SCALE // denominator)

    def total(self) -> int | float:
        """An integer if all numbers are integers, else the nearest float.

        Raises:
            UnsupportedValueError: it exceeds the range of floats.
        """
        if self._floats is None:
            return self._integers
        try:
            return (self._floats + self._integers * _SCALE) / _SCALE
        except OverflowError as exc:
            raise UnsupportedValueError("the sum exceeds the range of floats") from exc


def extreme_query(query: Query, steps: Steps, *, greatest: bool) -> Query:
    """The query for the row with the least or greatest value other than null, of those that match."""
    present = [Comparison(steps, "ne", None), Comparison(steps, "exists", value=True)]
    parts = query.where.parts if isinstance(query.where, And) else (query.where,)
    return msgspec.structs.replace(
        query, where=And((*parts, *present)), order=(Order(steps, greatest),), limit=1
    )
