"""Functions that are registered in SQLite: they compare, sort and merge JSON as the reference does.

SQLite's own JSON functions may read a float with an error in the last bit, compare the text of an
object instead of its names and numbers, and have no order for arrays and objects.
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


def real(number: str | None) -> float | None:
    """The float of a JSON number, exact to the last bit."""
    return None if number is None else float(number)


def test(encoded: str | None, op: str, operand: str) -> bool:
    """Apply an operator of a filter to a JSON value; NULL is a missing value."""
    return _test(op, operand)({} if encoded is None else {"x": decode_json(encoded)})


@lru_cache(maxsize=512)
def _test(op: str, operand: str) -> Callable[[Entity], bool]:
    return compile_filter(Comparison(("x",), cast("OpName", op), decode_json(operand)))


def at(encoded: str | None, steps: str) -> str | None:
    """The JSON at a path that SQLite's own path syntax cannot express; NULL if there is no value."""
    value: Any = None if encoded is None else decode_json(encoded)
    if encoded is None:
        return None
    for step in decode_json(steps):
        kind = dict if isinstance(step, str) else list
        exists = isinstance(value, kind) and (step in value if kind is dict else step < len(value))
        if not exists:
            return None
        value = value[step]
    return encode_json(value).decode()


def merged(encoded: str | None, sets: str | None, removes: str | None) -> str | None:
    """See `Dialect.json_merge`."""
    value = {} if encoded is None else decode_json(encoded)
    if removes is not None:
        for name in decode_json(removes):
            value.pop(name, None)
    if sets is not None:
        value.update(decode_json(sets))
    return encode_json(value).decode() if value else None


def key(encoded: str | None) -> bytes | None:
    """Bytes that sort as a JSON value does in the total order; NULL, which sorts first, if missing."""
    return None if encoded is None else order_bytes(decode_json(encoded))


# One byte for the type. The byte that ends a list or dict sorts before every byte that can continue it.
_NULL: Final = b"\x01"
_FALSE: Final = b"\x02"
_TRUE: Final = b"\x03"
_NUMBER: Final = b"\x04"
_TEXT: Final = b"\x05"
_LIST: Final = b"\x06"
_DICT: Final = b"\x07"
_MEMBER: Final = b"\x01"
_END: Final = b"\x00"

_number: Final = struct.Struct(">QH")
_float: Final = struct.Struct(">d")
_SIGN_BIT: Final = 1 << 63
_ALL_BITS: Final = (1 << 64) - 1
_OFFSET: Final = 1 << 15


def order_bytes(value: Value) -> bytes:
    """Bytes that sort as `query.order_key` does."""
    if isinstance(value, str):
        return _TEXT + value.encode() + _END  # no string contains U+0000
    if value is None:
        return _NULL
    if isinstance(value, bool):
        return _TRUE if value else _FALSE
    if isinstance(value, int | float):
        return _NUMBER + _number_bytes(value)
    if isinstance(value, list):
        return _LIST + b"".join(map(order_bytes, value)) + _END
    pairs = (_MEMBER + name.encode() + _END + order_bytes(value[name]) for name in sorted(value))
    return _DICT + b"".join(pairs) + _END


def _number_bytes(value: float) -> bytes:
    # The nearest float, and the difference of an integer from it: less than 2^10 at 64 bits.
    nearest = float(value) or 0.0  # -0.0 sorts as 0.0
    difference = 0 if isinstance(value, float) else value - int(nearest)
    bits = int.from_bytes(_float.pack(nearest), "big")
    return _number.pack(bits ^ (_ALL_BITS if bits & _SIGN_BIT else _SIGN_BIT), difference + _OFFSET)
