"""What SQLite is taught: JSON compared, ordered and merged exactly as the reference does it.

Its own JSON functions read a float to within the last bit, tell neither the names of a map nor the
numbers in it apart from how they are written, and have no order of lists and maps.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, cast

from hf_async_store.query import Comparison, OpName, compile_filter
from hf_async_store.strategies.sql.row_mapping import decode_json, encode_json
from hf_async_store.values import Value

if TYPE_CHECKING:
    from collections.abc import Callable

    from hf_async_store.values import Entity


def real(text: str | None) -> float | None:
    """The float that a JSON text writes, to the last bit."""
    return None if text is None else float(text)


def test(text: str | None, op: str, operand: str) -> bool:
    """An operator of a filter on a JSON value, missing where it is NULL."""
    return _test(op, operand)({} if text is None else {"x": decode_json(text)})


@lru_cache(maxsize=512)
def _test(op: str, operand: str) -> Callable[[Entity], bool]:
    return compile_filter(Comparison(("x",), cast("OpName", op), decode_json(operand)))


def at(text: str | None, steps: str) -> str | None:
    """The JSON text at a place that SQLite's own paths cannot write, NULL where there is none."""
    value: Any = None if text is None else decode_json(text)
    if text is None:
        return None
    for step in decode_json(steps):
        kind = dict if isinstance(step, str) else list
        there = isinstance(value, kind) and (step in value if kind is dict else step < len(value))
        if not there:
            return None
        value = value[step]
    return encode_json(value).decode()


def merged(text: str | None, sets: str | None, removes: str | None) -> str | None:
    """A JSON map with the members of another, and without those of a list; NULL if empty."""
    value = {} if text is None else decode_json(text)
    if removes is not None:
        for name in decode_json(removes):
            value.pop(name, None)
    if sets is not None:
        value.update(decode_json(sets))
    return encode_json(value).decode() if value else None


def key(text: str | None) -> bytes | None:
    """Bytes that sort as the JSON value does in the total order; NULL, which sorts first, if missing."""
    return None if text is None else order_bytes(decode_json(text))


# One byte for the type; what ends a list or map sorts before all that could follow in it.
_NULL: Final = b"\x01"
_FALSE: Final = b"\x02"
_TRUE: Final = b"\x03"
_NUMBER: Final = b"\x04"
_TEXT: Final = b"\x05"
_LIST: Final = b"\x06"
_MAP: Final = b"\x07"
_MORE: Final = b"\x01"
_END: Final = b"\x00"

_number: Final = struct.Struct(">QH")
_float: Final = struct.Struct(">d")
_SIGN: Final = 1 << 63
_ALL: Final = (1 << 64) - 1
_MIDDLE: Final = 1 << 15


def order_bytes(value: Value) -> bytes:
    """`query.order_key` as bytes."""
    if isinstance(value, str):
        return _TEXT + value.encode() + _END  # no text has a NUL in it
    if value is None:
        return _NULL
    if isinstance(value, bool):
        return _TRUE if value else _FALSE
    if isinstance(value, int | float):
        return _NUMBER + _number_bytes(value)
    if isinstance(value, list):
        return _LIST + b"".join(map(order_bytes, value)) + _END
    pairs = (_MORE + name.encode() + _END + order_bytes(value[name]) for name in sorted(value))
    return _MAP + b"".join(pairs) + _END


def _number_bytes(value: float) -> bytes:
    # The nearest float, and how far an integer is from it: under 2^10 at 64 bits.
    near = float(value) or 0.0  # -0.0 is 0.0 in the order
    rest = 0 if isinstance(value, float) else value - int(near)
    bits = int.from_bytes(_float.pack(near), "big")
    return _number.pack(bits ^ (_ALL if bits & _SIGN else _SIGN), rest + _MIDDLE)
