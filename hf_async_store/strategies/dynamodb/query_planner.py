"""The access path of a query: by key, by a global secondary index, or by a scan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from decimal import Decimal
from itertools import product
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias, cast

import msgspec

from hf_async_store.query import (
    And,
    Comparison,
    Missing,
    Or,
    Order,
    Query,
    Steps,
    equality_candidates,
)
from hf_async_store.sort_bytes import EVERYTHING, common, ranges
from hf_async_store.strategies.dynamodb.index_keys import (
    AFTER_PREFIX,
    ALL_PARTITIONS,
    IndexShape,
    Kind,
    SortKey,
    beginning,
    composite,
    escaped,
    is_exact,
    position,
    prefix_end,
)
from hf_async_store.values import MAX_KEY_BYTES, Value

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from hf_async_store.strategies.dynamodb.codec import Attribute
    from hf_async_store.strategies.dynamodb.items import ItemMapping

_MAX_SPANS: Final = 100
"""For more requests than this, a scan is cheaper."""

_BOUNDING: Final = frozenset(
    {"eq", "in", "gt", "gte", "lt", "lte", "timestamp_lte", "between", "begins_with"}
)

Bounds: TypeAlias = tuple[SortKey | None, SortKey | None]
"""The lowest and the highest sort key, both included; None for no bound."""


class Span(NamedTuple):
    """A range of sort keys within a partition, both included. None of its bounds is required.

    It may contain more rows than those that match, never fewer.
    """

    partition: Attribute
    low: SortKey | None = None
    high: SortKey | None = None


class Access(msgspec.Struct, frozen=True):
    """The access path of a query.

    Attributes:
        ids: the ids to read by key; None for an index query or a scan.
        shape: the index to query.
        spans: the parts of the index to query.
        ordered_parts: the number of parts of the sort key that have the order of the query; rows
            that are equal in them must be sorted. 0: the index does not return the rows in order.
        descending: the index is read from its end.
        equal_parts: the number of parts of a composite sort key before them, which are the same in all
            rows.
        implied: the comparisons of the filter that hold for all rows in the spans.
        bounds: comparisons that hold for most rows in the spans: not for values of other types than the
            declared one, and for those that are equal in their sort keys only.
        equalities: the number of fields of the index that the filter compares for equality.
        has_range: the spans are parts of the partitions.
    """

    ids: tuple[str, ...] | None = None
    shape: IndexShape | None = None
    spans: tuple[Span, ...] = ()
    ordered_parts: int = 0
    descending: bool = False
    equal_parts: int = 0
    implied: tuple[Comparison, ...] = ()
    bounds: tuple[Comparison, ...] = ()
    equalities: int = 0
    has_range: bool = False

    @property
    def is_scan(self) -> bool:
        return self.ids is None and self.shape is None

    @property
    def is_ordered(self) -> bool:
        return self.ordered_parts > 0

    def group_of(self, key: SortKey) -> SortKey:
        """The part of a sort key that has the order of the query."""
        if self.shape is None or not self.shape.is_composite:
            return key
        return beginning(key, self.equal_parts, self.ordered_parts)

    def span_of(self, span: Span, key: SortKey) -> Span:
        """The part of a span with the same order in the query as a sort key."""
        group = self.group_of(key)
        high = group + AFTER_PREFIX if isinstance(group, bytes) else group
        return Span(span.partition, group, high)


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
        strings = [
            each
            for each in ids
            if isinstance(each, str) and 0 < len(each.encode()) <= MAX_KEY_BYTES
        ]
        return Access(ids=tuple(strings))
    usable = [each for each in mapping.shapes if each.index.name in active]
    planned = [_IndexPlanner(query, mapping, each, candidates).access() for each in usable]
    return max(filter(None, planned), key=_rank, default=Access())


def _rank(path: Access) -> tuple[int, bool, bool, int, int]:
    fields = () if path.shape is None else path.shape.index.fields
    return (path.equalities, path.is_ordered, path.has_range, -len(path.spans), -len(fields))


class _IndexPlanner:
    """Plans the access of one query by one index."""

    def __init__(
        self,
        query: Query,
        mapping: ItemMapping,
        shape: IndexShape,
        candidates: dict[Steps, list[Value]],
    ) -> None:
        self._query = query
        self._mapping = mapping
        self._shape = shape
        self._candidates = candidates
        where = query.where
        parts = where.parts if isinstance(where, And) else (where,)
        self._comparisons = [each for each in parts if isinstance(each, Comparison)]
        self._equal = {each.path: each.value for each in self._comparisons if each.op == "eq"}

    def access(self) -> Access | None:
        """The access by this index; None if it cannot contain all matching rows, or does not help."""
        partitions = self._partitions()
        if partitions is None:
            return None
        equal_parts = self._equal_parts() if self._shape.is_composite else 0
        order, after = self._order()
        ordered_parts = self._ordered_parts(order, equal_parts)
        keys = (
            self._composite_keys(equal_parts) if self._shape.is_composite else self._native_keys()
        )
        has_range = any(each != (None, None) for each in keys)
        if self._shape.is_spread and not has_range and not ordered_parts:
            return None
        if ordered_parts and after is not None:
            keys = self._after(keys, after[:ordered_parts], equal_parts, order[0].descending)
        spans = [Span(partition, *bounds) for partition, bounds in product(partitions, keys)]
        if len(spans) > _MAX_SPANS:
            return None
        return Access(
            shape=self._shape,
            spans=tuple(spans),
            ordered_parts=ordered_parts,
            descending=bool(ordered_parts) and order[0].descending,
            equal_parts=equal_parts,
            implied=tuple(self._implied(equal_parts)),
            bounds=tuple(self._bounds(equal_parts)),
            equalities=sum((name,) in self._candidates for name in self._compared(equal_parts)),
            has_range=has_range,
        )

    def _compared(self, equal_parts: int) -> Sequence[str]:
        """The fields that can be counted as equalities."""
        if self._shape.is_spread:
            return self._shape.index.fields
        return self._shape.index.fields[: 1 + max(equal_parts, not self._shape.is_composite)]

    def _partitions(self) -> Sequence[Attribute] | None:
        if self._shape.is_spread:
            return ALL_PARTITIONS
        name = self._shape.index.field
        values = self._candidates.get((name,))
        if values is None or name == self._mapping.key:
            return None  # reading by key is cheaper
        keys = [self._mapping.indexed[name].key_of(each) for each in values]
        found = [each for each in keys if each is not None]
        # The index does not contain entities with a value that is not a key.
        return found if len(found) == len(keys) else None

    def _implied(self, equal_parts: int) -> Iterable[Comparison]:
        """The comparisons that hold for all rows of the spans."""
        if not self._shape.is_composite:
            for name in self._shape.index.fields:
                yield from filter(self._is_exact, self._only_comparison(name))
            return
        yield from filter(self._is_exact, self._only_comparison(self._shape.index.field))
        equal, rest = self._shape.sort_fields[:equal_parts], self._shape.sort_fields[equal_parts:]
        for each in (*equal, *rest[:1]):
            on_field = self._only_comparison(each) if each in equal else self._on(each)
            yield from filter(_has_exact_ranges, on_field)

    def _bounds(self, equal_parts: int) -> Iterable[Comparison]:
        """The comparisons that bound the spans."""
        for name in self._shape.sort_fields[equal_parts : equal_parts + 1]:
            yield from (each for each in self._on(name) if each.op in _BOUNDING)

    def _is_exact(self, comparison: Comparison) -> bool:
        """Whether the keys of an index contain exactly the values for which a comparison is true."""
        name = str(comparison.path[0])
        if comparison.op not in ("eq", "in", "between") or name == self._mapping.key:
            return False
        value, field = comparison.value, self._mapping.indexed[name]
        is_partition = not self._shape.is_spread and name == self._shape.index.field
        if is_partition and (comparison.op == "between" or not field.is_sort):
            return comparison.op != "between"
        values = [value] if comparison.op == "eq" else cast("list[Value]", value)
        return all(is_exact(field.kind, each) for each in values)

    def _on(self, name: str) -> list[Comparison]:
        return [each for each in self._comparisons if each.path == (name,)]

    def _only_comparison(self, name: str) -> list[Comparison]:
        found = self._on(name)
        return found if len(found) == 1 else []

    # -- order -------------------------------------------------------------------------------

    def _order(self) -> tuple[list[Order], list[Value | Missing] | None]:
        """The order without the fields that are equal in all rows, and with the id that breaks ties.

        Also returns the values of the cursor in this order, if there is one.
        """
        query, key = self._query, (self._mapping.key,)
        pairs: list[tuple[Order, Value | Missing]] = []
        values = [None] * len(query.order) if query.after is None else query.after.values
        pairs = [
            (each, value)
            for each, value in zip(query.order, values, strict=True)
            if each.path not in self._equal
        ]
        if (query.order or query.by_id) and key not in [e.path for e in query.order]:
            descending = bool(query.order) and query.order[-1].descending
            last_id = None if query.after is None else query.after.id
            pairs.append((Order(key, descending), last_id))
        order = [each for each, _ in pairs]
        return order, None if query.after is None else [value for _, value in pairs]

    def _ordered_parts(self, order: Sequence[Order], equal_parts: int) -> int:
        """The number of parts of the sort key that have the same order as the query."""
        number = 0
        for name, each in zip(self._shape.sort_fields[equal_parts:], order, strict=False):
            if each.path != (name,) or each.descending != order[0].descending:
                break
            number += 1
        return number

    # -- sort keys of one field --------------------------------------------------------------

    def _native_keys(self) -> list[Bounds]:
        if not self._shape.sort_fields:
            return [(None, None)]
        [name] = self._shape.sort_fields
        keys: list[Bounds] = [(None, None)]
        for each in self._on(name):
            keys = _intersected(keys, self._native_bounds(each))
        return keys

    def _native_bounds(self, comparison: Comparison) -> list[Bounds]:
        op, value = comparison.op, comparison.value
        if self._is_key and not _is_id_size(value):
            return [
                (None, None)
            ]  # a bound cannot be that long, and a shorter one is not equivalent
        if op == "eq":
            return [(self._point(value), self._point(value))]
        if op == "in":
            points = sorted({self._point(each) for each in cast("list[Value]", value)})
            return [(each, each) for each in points]
        if op in ("gt", "gte"):
            return [(self._point(value), None)]
        if op in ("lt", "lte", "timestamp_lte"):
            return [(None, self._point(value))]
        if op == "between":
            low, high = map(self._point, cast("list[Value]", value))
            return [(low, high)] if low <= high else []
        if op == "begins_with" and self._kind == "S":
            prefix = str(value)
            return [(self._point(prefix), None if self._is_key else prefix_end(prefix))]
        return [(None, None)]

    @property
    def _kind(self) -> Kind:
        [name] = self._shape.sort_fields
        return "S" if self._is_key else self._mapping.indexed[name].kind

    @property
    def _is_key(self) -> bool:
        return self._shape.sort_fields == (self._mapping.key,)

    def _point(self, value: Value | Missing) -> SortKey:
        if self._is_key and isinstance(value, str) and 0 < len(value.encode()) <= MAX_KEY_BYTES:
            return value
        found = position(self._kind, value)
        return Decimal(found) if self._kind == "N" else found

    # -- composite sort keys -----------------------------------------------------------------

    def _equal_parts(self) -> int:
        """The number of leading parts of a composite sort key that are the same in all rows."""
        number = 0
        while (self._shape.sort_fields[number],) in self._equal:
            number += 1
            if number == len(self._shape.sort_fields):
                break
        return number

    def _composite_keys(self, equal_parts: int) -> list[Bounds]:
        fields = self._shape.sort_fields
        prefix = composite(self._equal[(each,)] for each in fields[:equal_parts])
        found = [EVERYTHING]
        for each in self._on(fields[equal_parts]) if equal_parts < len(fields) else ():
            comparable = ranges(each.op, each.value)
            found = found if comparable is None else common(found, comparable)
        if found == [EVERYTHING]:
            return [(prefix, prefix + AFTER_PREFIX) if prefix else (None, None)]
        return [(prefix + escaped(each.low), prefix + escaped(each.high)) for each in found]

    def _after(
        self,
        keys: Sequence[Bounds],
        after: Sequence[Value | Missing],
        equal_parts: int,
        descending: bool,
    ) -> list[Bounds]:
        """The parts of the bounds that may contain rows after a position."""
        low: SortKey
        high: SortKey
        if self._shape.is_composite:
            equal = [self._equal[(each,)] for each in self._shape.sort_fields[:equal_parts]]
            low = beginning(composite([*equal, *after]), equal_parts, len(after))
            high = low + AFTER_PREFIX
        else:
            low = high = self._point(after[0])
        return _intersected(keys, [(None, high) if descending else (low, None)])


def _is_id_size(operand: Value) -> bool:
    """Whether no string of an operand is longer than an id."""
    values = operand if isinstance(operand, list) else [operand]
    return all(len(each.encode()) <= MAX_KEY_BYTES for each in values if isinstance(each, str))


def _has_exact_ranges(comparison: Comparison) -> bool:
    """Whether a range of sort bytes contains exactly the values for which a comparison is true."""
    found = ranges(comparison.op, comparison.value)
    return found is not None and all(each.exact for each in found)


def _intersected(ones: Iterable[Bounds], others: Sequence[Bounds]) -> list[Bounds]:
    return [
        (low, high)
        for one in ones
        for other in others
        for low in [max((e[0] for e in (one, other) if e[0] is not None), default=None)]
        for high in [min((e[1] for e in (one, other) if e[1] is not None), default=None)]
        if low is None or high is None or low <= high
    ]
