"""The access path of a query: by key, by a global secondary index, or by a scan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

import msgspec

from hf_async_store.query import And, Comparison, Filter, Or, Query, equality_candidates
from hf_async_store.schema import Index
from hf_async_store.strategies.dynamodb.items import (
    MAX_SORT_BYTES,
    MIN_SHORTENED_BYTES,
    IndexedField,
    ItemMapping,
    number_key,
    shortened,
)
from hf_async_store.values import Value

if TYPE_CHECKING:
    from collections.abc import Sequence
    from collections.abc import Set as AbstractSet

    from hf_async_store.query import Missing
    from hf_async_store.strategies.dynamodb.codec import Attribute

_MAX_PARTITIONS: Final = 100
"""Up to this many partitions are queried one after the other; for more, a scan is cheaper."""

_TYPES_SORTED_BY_VALUE: Final = ("text", "timestamp", "integer")
"""Types whose attributes sort like their values. A `number` may be outside of DynamoDB's range."""


class SortRange(msgspec.Struct, frozen=True):
    """A range of sort keys within a partition: from `low` to `high`, both included, or a prefix.

    It may contain more rows than those that match, never fewer.
    """

    low: str | None = None
    high: str | None = None
    prefix: str | None = None
    kind: str = "S"

    @property
    def is_empty(self) -> bool:
        if self.low is None or self.high is None:
            return False
        if self.kind == "N":
            return float(self.low) > float(self.high)
        return self.low > self.high

    def attribute(self, value: str) -> Attribute:
        return {self.kind: value}


class Access(msgspec.Struct, frozen=True):
    """The access path of a query.

    Attributes:
        ids: the ids to read by key; None for an index query or a scan.
        index: the index to query.
        partitions: the partition keys to query in the index.
        sort: the range of sort keys within each partition.
        is_ordered: the index returns the rows in the order of the query.
        exact: the partitions contain exactly the rows that match the filter on the index's field.
    """

    ids: tuple[str, ...] | None = None
    index: Index | None = None
    partitions: tuple[Attribute, ...] = ()
    sort: SortRange = SortRange()
    is_ordered: bool = False
    exact: bool = False

    @property
    def is_scan(self) -> bool:
        return self.ids is None and self.index is None


def plan_access(query: Query, mapping: ItemMapping, active: AbstractSet[str]) -> Access:
    """The best access path of a query.

    Args:
        active: the indexes that can be used.
    """
    if query.where == Or(()):
        return Access(ids=())  # matches nothing
    candidates = equality_candidates(query.where)
    ids = candidates.get((mapping.key,))
    if ids is not None:
        # Ids are non-empty strings; no other value can match.
        strings = [each for each in ids if isinstance(each, str) and 0 < len(each.encode()) <= 1024]
        return Access(ids=tuple(strings))
    paths = [
        path
        for index in mapping.collection.indexes
        if index.name in active
        and (values := candidates.get((index.field,))) is not None
        and (path := _by_index(query, mapping, index, values)) is not None
    ]
    return max(paths, key=_rank, default=Access())


def _rank(path: Access) -> tuple[bool, bool, int]:
    has_range = (
        path.sort.low is not None or path.sort.high is not None or path.sort.prefix is not None
    )
    return path.is_ordered, has_range, -len(path.partitions)


def _by_index(
    query: Query, mapping: ItemMapping, index: Index, values: Sequence[Value]
) -> Access | None:
    if index.field == mapping.key:
        return None  # reading by key is cheaper
    field = mapping.indexed[index.field]
    partitions: list[Attribute] = []
    for value in values:
        key = field.key_of(value)
        if key is not None:
            partitions.append(key)
        elif _may_contain(field, value):
            return None  # the index does not contain entities with this value
    if len(partitions) > _MAX_PARTITIONS:
        return None
    sort = SortRange()
    ordered = False
    if index.sort is not None and index.sort != mapping.key:
        sort_field = mapping.indexed[index.sort]
        sort = _range(query.where, sort_field)
        ordered = (
            len(partitions) == 1
            and sort_field.type in _TYPES_SORTED_BY_VALUE
            and bool(query.order)
            and query.order[0].path == (index.sort,)
        )
        if ordered and query.after is not None:
            sort = _after_cursor(sort, sort_field, query.after.values[0], query.order[0].descending)
    return Access(
        index=index,
        partitions=tuple(partitions),
        sort=sort,
        is_ordered=ordered,
        exact=not field.is_sort,
    )


def _may_contain(field: IndexedField, value: Value) -> bool:
    """Whether a field of this type may have a value that is equal to this one."""
    if value is None:
        return True
    if field.type in ("text", "timestamp"):
        return isinstance(value, str)
    if field.type == "boolean":
        return type(value) is bool
    return isinstance(value, int | float) and type(value) is not bool


# -- ranges within a partition ---------------------------------------------------------------


def _range(where: Filter, field: IndexedField) -> SortRange:
    """The range of an index's sort key that a filter implies."""
    if field.type not in _TYPES_SORTED_BY_VALUE:
        return SortRange()
    lows: list[str] = []
    highs: list[str] = []
    prefix: str | None = None
    for part in where.parts if isinstance(where, And) else (where,):
        if not isinstance(part, Comparison) or part.path != (field.name,):
            continue
        if part.op == "begins_with" and field.type != "integer":
            prefix = shortened(cast("str", part.value), MIN_SHORTENED_BYTES) or None
            continue
        low, high = _bounds(part)
        lows += _bound(field, low, MIN_SHORTENED_BYTES)
        highs += _bound(field, high, MAX_SORT_BYTES)
    kind = "N" if field.type == "integer" else "S"
    convert = float if kind == "N" else str
    if prefix is not None and not lows and not highs:
        return SortRange(prefix=prefix, kind=kind)
    return SortRange(
        low=max(lows, key=convert, default=None),
        high=min(highs, key=convert, default=None),
        kind=kind,
    )


def _bounds(part: Comparison) -> tuple[Value, Value]:
    """The lower and upper bound of the values that satisfy a comparison; None for no bound."""
    value = part.value
    if part.op == "eq":
        return value, value
    if part.op in ("gt", "gte"):
        return value, None
    if part.op in ("lt", "lte"):
        return None, value
    if part.op == "between":
        low, high = cast("list[Value]", value)
        return low, high
    return None, None


def _bound(field: IndexedField, value: Value, max_bytes: int) -> list[str]:
    """The sort key for a bound, shortened to `max_bytes`; none if there is no such key."""
    if field.type == "integer":
        return _number_bound(value)
    return [shortened(value, max_bytes)] if isinstance(value, str) and value else []


def _number_bound(value: Value) -> list[str]:
    if type(value) not in (int, float):
        return []
    number = cast("float", value)
    # A bound beyond 64 bits matches everything or nothing; it is omitted, because the filter is
    # applied to the rows in any case.
    key = number_key(number) if abs(number) < 2**64 else None
    return [] if key is None else [key]


def _after_cursor(
    sort: SortRange, field: IndexedField, after: Value | Missing, descending: bool
) -> SortRange:
    """The part of a range after a cursor position."""
    kind = "N" if field.type == "integer" else "S"
    convert = float if kind == "N" else str
    if isinstance(after, int | str) and type(after) is not bool and after != "":
        bound = _bound(field, after, MAX_SORT_BYTES if descending else MIN_SHORTENED_BYTES)
    elif descending:
        assert field.placeholder is not None
        bound = list(field.placeholder.values())  # missing and null values sort last
    else:
        bound = []
    if not bound:
        return sort
    low, high = sort.low, sort.high
    if descending:
        high = min([*bound, *([] if high is None else [high])], key=convert)
    else:
        low = max([*bound, *([] if low is None else [low])], key=convert)
    return SortRange(low=low, high=high, kind=kind)
