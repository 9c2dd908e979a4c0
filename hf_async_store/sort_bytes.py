"""An order-preserving encoding: the bytes of two values compare as the values do in the total order.

Indexes of engines contain these bytes, so that one index serves equality, ranges, prefixes and both
directions of an order for values of every type. Comparing the bytes of long strings, lists and dicts
is not sufficient: for them the values themselves must be compared as well (`is_exact`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, cast

import msgspec

from hf_async_store.query import MISSING, Missing, OpName

if TYPE_CHECKING:
    from hf_async_store.values import Value

MAX_SORT_BYTES: Final = 256
"""The bytes of a longer string are cut. The id, four fields and the row then fit into the 2,704 bytes of
an index entry of PostgreSQL (a third of a page)."""

_SHORT: Final = MAX_SORT_BYTES // 4  # characters; each has at most 4 bytes
_MISSING, _NULL, _BOOLEAN, _NUMBER, _STRING, _LIST, _DICT = (bytes([rank]) for rank in range(7))
_END: Final = b"\x07"
_FLAGS: Final = _BOOLEAN + b"\x00", _BOOLEAN + b"\x01"
INEXACT: Final = _LIST[0]
"""The first byte of the encoding of a list; those from it on do not determine a value."""

_DOUBLE: Final = struct.Struct(">d").pack
_ALL_BITS: Final = (1 << 64) - 1
_SIGN: Final = 1 << 63
_EXACT_INTEGERS: Final = 1 << 53


def sort_bytes(value: Value | Missing) -> bytes:
    """The encoding of a value: a byte for its type, then for

    - a number, the largest float that is not greater, and the difference if it is not 0 (2 bytes);
    - a string, its UTF-8, at most `MAX_SORT_BYTES` in all;
    - a list or dict, nothing.
    """
    if type(value) is str:
        return (_STRING + value.encode())[:MAX_SORT_BYTES]
    if value is None:
        return _NULL
    if type(value) is bool:
        return _FLAGS[value]
    if type(value) is int or type(value) is float:
        return _number(value)
    if isinstance(value, Missing):
        return _MISSING
    return _LIST if isinstance(value, list) else _DICT


def sort_bytes_of(entity: Mapping[str, Value], names: Iterable[str]) -> tuple[bytes, ...]:
    """The encodings of fields of an entity. Most values are short strings, and encoded right here."""
    get = entity.get
    return tuple(
        [
            _STRING + value.encode()
            if type(value := get(name, MISSING)) is str and len(value) < _SHORT
            else sort_bytes(value)
            for name in names
        ]
    )


def _number(value: float) -> bytes:
    whole = float(value)
    rest = b""
    if type(value) is int and not -_EXACT_INTEGERS <= value <= _EXACT_INTEGERS:
        if int(whole) > value:
            whole = math.nextafter(whole, -math.inf)
        difference = value - int(whole)
        rest = difference.to_bytes(2) if difference else b""
    bits = int.from_bytes(_DOUBLE(whole + 0.0))  # -0.0 + 0.0 is 0.0
    return _NUMBER + (bits ^ (_ALL_BITS if bits & _SIGN else _SIGN)).to_bytes(8) + rest


def is_exact(encoded: bytes) -> bool:
    """Whether only values that are `eq` have these bytes."""
    return len(encoded) < MAX_SORT_BYTES and encoded[0] < INEXACT


class ByteRange(msgspec.Struct, frozen=True, gc=False):
    """Encodings from `low` on, and below `high`.

    A filter may have 50,000 of them, which the garbage collector does not traverse.

    Attributes:
        exact: every value in the range matches; otherwise each must be tested.
    """

    low: bytes
    high: bytes
    exact: bool

    @property
    def only(self) -> bytes | None:
        """The single encoding in the range; None if there may be several."""
        return self.low if self.high == self.low + b"\x00" else None


EVERYTHING: Final = ByteRange(b"", _END, exact=True)


def ranges(op: OpName, value: Value) -> list[ByteRange] | None:
    """The ranges of encodings that contain every value for which a comparison is true.

    They are sorted, and do not overlap. None: the operator is not expressible as ranges.
    """
    if op == "eq":
        return [_equal(value)]
    if op == "in":
        # The values are in order; those of different long strings may be the same.
        distinct = dict.fromkeys(map(sort_bytes, cast("Sequence[Value]", value)))
        return list(map(_exactly, distinct))
    if op == "exists":
        return [ByteRange(_NULL, _END, exact=True) if value else _equal(MISSING)]
    if op == "between":
        low, high = cast("Sequence[Value]", value)
        return common(_bound("gte", low), _bound("lte", high))
    if op == "begins_with":
        return [_prefixed(cast("str", value))]
    if op == "timestamp_lte":
        found = common(_bound("gte", "0"), _bound("lte", value))
        return [ByteRange(each.low, each.high, exact=False) for each in found]
    if op in ("lt", "lte", "gt", "gte"):
        return _bound(op, value)
    return None


def _equal(value: Value | Missing) -> ByteRange:
    return _exactly(sort_bytes(value))


def _exactly(encoded: bytes) -> ByteRange:
    return ByteRange(encoded, encoded + b"\x00", is_exact(encoded))


def _bound(op: str, value: Value) -> list[ByteRange]:
    """Comparisons never match values of another type, nor null."""
    if value is None or (value is False and op == "lt"):
        return []
    encoded = sort_bytes(value)
    exact = is_exact(encoded)
    next_type = bytes([encoded[0] + 1])
    if op in ("lt", "lte"):
        inclusive = op == "lte" or not exact
        return [ByteRange(encoded[:1], encoded + b"\x00" if inclusive else encoded, exact)]
    inclusive = op == "gte" or not exact
    return [ByteRange(encoded if inclusive else encoded + b"\x00", next_type, exact)]


class Interval(Protocol):
    """From `low` on, and below `high`."""

    @property
    def low(self) -> Any: ...

    @property
    def high(self) -> Any: ...


Range = TypeVar("Range", bound=Interval)


def overlapping(ones: Sequence[Range], others: Sequence[Range]) -> Iterator[tuple[Range, Range]]:
    """The pairs that overlap, of two lists whose ranges are sorted and disjoint."""
    first = second = 0
    while first < len(ones) and second < len(others):
        one, other = ones[first], others[second]
        if max(one.low, other.low) < min(one.high, other.high):
            yield one, other
        if one.high < other.high:
            first += 1
        else:
            second += 1


def common(ones: Sequence[ByteRange], others: Sequence[ByteRange]) -> list[ByteRange]:
    """What is in both of two sorted lists of disjoint ranges."""
    return [
        ByteRange(max(one.low, other.low), min(one.high, other.high), one.exact and other.exact)
        for one, other in overlapping(ones, others)
    ]


def _prefixed(prefix: str) -> ByteRange:
    encoded = sort_bytes(prefix)
    if not is_exact(encoded):
        return ByteRange(encoded, encoded + b"\x00", exact=False)
    return ByteRange(encoded, encoded + b"\xff", exact=True)  # UTF-8 contains no byte 255
