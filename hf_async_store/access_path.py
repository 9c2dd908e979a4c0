"""The choice of an index for a query, and of the parts of it that are read.

The comparisons that all rows must fulfil become ranges of values of the indexed fields: equality on
the first fields, a range on the next. The order of the query is read off the index as far as possible:
what is not in order is sorted group by group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from typing import Final, Literal, NamedTuple

from hf_async_store.ordered_index import (
    AFTER,
    BY_ID,
    Entry,
    Fields,
    Span,
    index_key,
    key_bound,
    key_part,
    split_key,
)
from hf_async_store.query import (
    And,
    Comparison,
    CursorPosition,
    Missing,
    Order,
    Query,
)
from hf_async_store.sort_bytes import ByteRange, common, overlapping, ranges
from hf_async_store.values import Value

_MAX_SPANS: Final = 50_000
_MAX_STREAMS: Final = 256
"""The maximum number of streams that are merged; more are sorted instead."""

_MAX_MERGED_SPANS: Final = 4096
"""The same for the spans of several streams: a merge begins by looking for the first entry of each
stream, in one step, and may find all spans empty."""

_FIRST: Final[Entry] = (b"", "")
_LAST: Final[Entry] = (AFTER, "")


class Stream(NamedTuple):
    """Spans of an index that are in order, one after the other.

    Attributes:
        head: the part of the keys before the values of the order; equal in all of them.
    """

    head: bytes
    spans: list[Span]


class AccessPath(NamedTuple):
    """What a query reads of an index.

    Attributes:
        fields: the fields of the index.
        streams: the spans to read, disjoint; entries of several streams are merged by what follows
            the heads.
        equalities: the number of fields compared for equality.
        bounded: whether a further field is limited to ranges.
        exact: whether every entry in the spans matches the filter.
        ordered: "complete": the entries are in the order of the query; "groups": groups of entries
            that are equal in the first `parts` values after the head are in this order; "none".
        reverse: whether the index is read backwards.
        ids: the only ids that can match, in order; None if they are not known without the index.
    """

    fields: Fields
    streams: list[Stream]
    equalities: int
    bounded: bool
    exact: bool
    ordered: Literal["complete", "groups", "none"]
    parts: int
    reverse: bool
    ids: list[str] | None = None

    @property
    def constrained(self) -> bool:
        """Whether the filter excludes entries of the index."""
        return self.equalities > 0 or self.bounded

    @property
    def spans(self) -> list[Span]:
        return [span for stream in self.streams for span in stream.spans]

    def group(self, tail: bytes) -> bytes | None:
        """What the entries of a group have in common, by what follows the head in a key; None: an entry
        that is a group of its own."""
        if self.ordered == "none":
            return b""
        end, exact = split_key(tail, 0, self.parts)
        return None if exact and self.ordered == "complete" else tail[:end]


class Conditions:
    """What a query asks of the fields of a collection.

    Args:
        key: the key field.
    """

    def __init__(self, query: Query, key: str) -> None:
        conjuncts = query.where.parts if isinstance(query.where, And) else (query.where,)
        self._number = len(conjuncts)
        self._key = key
        self._ranges: dict[str, list[ByteRange]] = {}
        self._id_spans: list[Span] | None = None
        self._used: dict[str, int] = {}
        self._constants: dict[str, Value] = {}
        for each in conjuncts:
            if isinstance(each, Comparison) and len(each.path) == 1:
                self._add(str(each.path[0]), each)
        self._read_order(query)
        self._after = query.after
        self.has_many_values = query.has_many_values

    def _add(self, name: str, comparison: Comparison) -> None:
        if comparison.op == "eq":
            self._constants[name] = comparison.value
        if name == self._key:
            spans = _id_spans(comparison)
            if spans is not None:
                self._id_spans = (
                    spans if self._id_spans is None else _both_spans(self._id_spans, spans)
                )
                self._used[name] = self._used.get(name, 0) + 1
            return
        found = ranges(comparison.op, comparison.value)
        if found is not None:
            self._ranges[name] = (
                common(self._ranges[name], found) if name in self._ranges else found
            )
            self._used[name] = self._used.get(name, 0) + 1

    def _read_order(self, query: Query) -> None:
        """Sort keys that are constant or that follow the id have no effect; ties are read by id."""
        self.descending_ids = bool(query.order) and query.order[-1].descending
        self._query_order = query.order
        self._order: list[Order] = []
        for each in query.order:
            if each.path == (self._key,):
                self.descending_ids = each.descending
                break
            if len(each.path) > 1 or each.path[0] not in self._constants:
                self._order.append(each)

    def concern(self, fields: Fields) -> bool:
        """Whether an index with these fields can exclude entities, or give an order."""
        if fields == BY_ID or fields[0] in self._ranges:
            return True
        return bool(self._order) and self._order[0].path == fields[:1]

    def paths(self, indexes: Iterable[Fields]) -> list[AccessPath]:
        """How the query reads each index that concerns it."""
        return [self.path(each) for each in indexes if self.concern(each)]

    def path(self, fields: Fields) -> AccessPath:
        """How the query reads the index with these fields."""
        if fields == BY_ID:
            return self._path_by_id()
        start = self._start_of_order(fields)
        spans = _Spans(start)
        used = 0
        for name in fields:
            if name not in self._ranges or spans.bounded or not spans.add(self._ranges[name]):
                break
            used += self._used[name]
        parts, ordered, reverse = self._ordered(fields, start, spans)
        path = AccessPath(
            fields=fields,
            streams=spans.streams(),
            equalities=spans.equalities,
            bounded=spans.bounded,
            exact=spans.exact and used == self._number,
            ordered=ordered,
            parts=parts,
            reverse=reverse,
        )
        return path if self._after is None else self._continued(path, start, self._after)

    def _path_by_id(self) -> AccessPath:
        spans = [Span(_FIRST, _LAST)] if self._id_spans is None else self._id_spans
        path = AccessPath(
            fields=BY_ID,
            streams=[Stream(b"", spans)],
            equalities=0,
            bounded=self._id_spans is not None,
            exact=self._number == self._used.get(self._key, 0),
            ordered="none" if self._order else "complete",
            parts=0,
            reverse=self.descending_ids and not self._order,
        )
        if self._after is not None:
            path = self._continued(path, 0, self._after)
        return path._replace(ids=_only_ids(path))

    def _start_of_order(self, fields: Fields) -> int:
        """The field of an index at which the order begins; after the last one, the ids."""
        if not self._order:
            return len(fields)
        first = self._order[0].path
        name = first[0] if len(first) == 1 else None
        return next((n for n, each in enumerate(fields) if each == name), len(fields))

    def _ordered(
        self, fields: Fields, start: int, spans: _Spans
    ) -> tuple[int, Literal["complete", "groups", "none"], bool]:
        """How many fields from `start` on give an order, which, and whether read backwards."""
        past_ids = bool(self._order) and start == len(fields)
        if start > spans.equalities or past_ids or not spans.mergeable:
            return 0, "none", False
        if not self._order:
            return 0, "complete", self.descending_ids
        reverse = self._order[0].descending
        remaining = iter(self._order)
        wanted = next(remaining, None)
        parts = 0
        for name in fields[start:]:
            if wanted is not None and wanted == Order((name,), reverse):
                wanted = next(remaining, None)
            elif name not in self._constants:
                break
            parts += 1
        complete = wanted is None and parts == len(fields) - start
        in_order = complete and reverse is self.descending_ids
        return parts, "complete" if in_order else "groups", reverse

    def _continued(self, path: AccessPath, start: int, after: CursorPosition) -> AccessPath:
        """The part of a path after a position; rows of the position's own group are included unless
        the entries are in order."""
        if path.ordered == "none":
            return path
        key = index_key(self._values(path.fields[start : start + path.parts], after))
        end, exact = split_key(key, 0, path.parts)
        in_order = path.ordered == "complete" and exact
        key = key[:end]
        streams = []
        for head, spans in path.streams:
            low, high = _FIRST, _LAST
            if path.reverse:
                high = (head + key, after.id) if in_order else (head + key + AFTER, "")
            else:
                low = (head + key, after.id + "\x00" if in_order else "")
            streams.append(Stream(head, _both_spans(spans, [Span(low, high)])))
        return path._replace(streams=streams)

    def _values(self, fields: Fields, after: CursorPosition) -> Iterator[Value | Missing]:
        """The values of fields at a position."""
        paths = [each.path for each in self._query_order]
        for name in fields:
            if (name,) in paths:
                yield after.values[paths.index((name,))]
            else:
                yield self._constants[name]


class _Spans:
    """The spans of an index, extended field by field.

    Args:
        start: the field at which the order begins.
    """

    def __init__(self, start: int) -> None:
        self._start = start
        # (head, key): the key begins with the head, unless the order begins later.
        self._keys: list[tuple[bytes, bytes]] = [(b"", b"")]
        self._bounds: list[ByteRange] = []
        self._streams = 1
        self.equalities = 0
        self.bounded = False
        self.exact = True
        self.mergeable = True

    def add(self, found: list[ByteRange]) -> bool:
        """Limit the next field to these ranges; False if there would be too many spans."""
        if len(self._keys) * len(found) > _MAX_SPANS:
            return False
        self.exact = self.exact and all(each.exact for each in found)
        points = [each.only for each in found]
        if None in points:
            self.bounded, self._bounds = True, found
            return True
        self.equalities += 1
        parts = [key_part(each) for each in points if each is not None]
        at_start = self.equalities == self._start
        number = len(self._keys) * len(parts)
        if at_start and number > _MAX_STREAMS:
            at_start = self.mergeable = False
        elif at_start:
            self._streams = number
        elif self._streams > 1 and number > _MAX_MERGED_SPANS:
            self.mergeable = False
        self._keys = [
            (key + part if at_start else head, key + part)
            for head, key in self._keys
            for part in parts
        ]
        return True

    def streams(self) -> list[Stream]:
        bounds = [(key_bound(each.low), key_bound(each.high)) for each in self._bounds]
        if not self.bounded:
            bounds = [(b"", AFTER)]
        streams = []
        for head, keys in groupby(self._keys, key=itemgetter(0)):
            spans = [Span((k + low, ""), (k + high, "")) for _, k in keys for low, high in bounds]
            streams.append(Stream(head, spans))
        return streams


def _only_ids(path: AccessPath) -> list[str] | None:
    """The ids that a path by id reads; None if it has spans that may contain several."""
    spans = path.spans
    if any(each.high != (b"", each.low[1] + "\x00") for each in spans):
        return None
    ids = [each.low[1] for each in spans]
    return ids[::-1] if path.reverse else ids


def _id_spans(comparison: Comparison) -> list[Span] | None:
    """The spans of the index of ids in which all ids fulfil a comparison of the key field, and which
    contain all that do; None: the operator is not expressible as spans."""
    op, value = comparison.op, comparison.value
    if op in ("eq", "in"):
        values = value if op == "in" and isinstance(value, list) else [value]
        return [_span(each, each + "\x00") for each in values if isinstance(each, str)]
    if op == "exists":
        return [Span(_FIRST, _LAST)] if value else []
    if op == "between":
        assert isinstance(value, list), "the operator takes a list"
        return _both_spans(_id_bound("gte", value[0]), _id_bound("lte", value[1]))
    if op == "begins_with":
        prefix = str(value)
        return [_span(prefix, _following(prefix))]
    return _id_bound(op, value) if op in ("lt", "lte", "gt", "gte") else None


def _id_bound(op: str, value: Value) -> list[Span]:
    if not isinstance(value, str):
        return []
    bound = value + "\x00" if op in ("lte", "gt") else value
    return [_span("", bound) if op in ("lt", "lte") else _span(bound, None)]


def _span(low: str, high: str | None) -> Span:
    return Span((b"", low), _LAST if high is None else (b"", high))


def _following(prefix: str) -> str | None:
    """The least string that is greater than all with this prefix; None if there is none."""
    prefix = prefix.rstrip("\U0010ffff")
    return prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else None


def _both_spans(ones: list[Span], others: list[Span]) -> list[Span]:
    return [
        Span(max(one.low, other.low), min(one.high, other.high))
        for one, other in overlapping(ones, others)
    ]
