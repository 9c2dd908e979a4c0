"""Encodes values for PostgreSQL: JSONB and NUMERIC, which store numbers as decimals, and arrays.

A decimal keeps the decimal point of `1.0`, and a number that is written with an exponent is read back
as an integer. So large floats, which are integers, are written in full with their exact value and a
decimal point; then they also compare exactly.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from hf_async_store.strategies.sql.grammar import encode_json
from hf_async_store.values import Value

# Find numbers with an exponent; the first is faster, and finds more. A string can contain the same
# characters; then the value is encoded by the slower function, with the same result.
_MAYBE_EXPONENT: Final = re.compile(rb"e[0-9]")
_EXPONENT: Final = re.compile(rb"[:,\[]-?[0-9.]+e[0-9]")
_ESCAPED: Final = re.compile(r'\\[^"\\]')
_LARGE: Final = 1e15


def json_text(value: Value) -> str:
    """The JSON of a value, in a form that JSONB returns unchanged."""
    if isinstance(value, float):
        return decimal_text(value)
    encoded = encode_json(value)
    if _MAYBE_EXPONENT.search(encoded) is None or _EXPONENT.search(encoded) is None:
        return encoded.decode()
    return _in_full(value)


def decimal_text(value: float) -> str:
    """The decimal form of a number."""
    return f"{value:.1f}" if type(value) is float and abs(value) >= _LARGE else repr(value)


def array_text(values: Sequence[object]) -> str:
    """A list of strings, integers, booleans and nulls in the text format of a PostgreSQL array.

    The format differs from JSON only in the brackets and in the meaning of a backslash before a
    letter. So the JSON encoder can encode the whole list at once; the driver encodes each element
    by itself, which takes five times as long.
    """
    encoded = encode_json(values).decode()
    if _ESCAPED.search(encoded):
        encoded = f"[{','.join(map(_element, values))}]"
    return f"{{{encoded[1:-1]}}}"


def bytes_array_text(values: Sequence[bytes]) -> str:
    """A list of byte strings in the text format of a PostgreSQL array."""
    return hex_array_text([each.hex() for each in values])


def hex_array_text(values: Sequence[str]) -> str:
    """As `bytes_array_text`, from hexadecimal digits."""
    listed = '","\\\\x'.join(values)
    return f'{{"\\\\x{listed}"}}'


def optional_bytes_array_text(values: Sequence[bytes | None]) -> str:
    """As `bytes_array_text`, with nulls."""
    elements = ["NULL" if each is None else f'"\\\\x{each.hex()}"' for each in values]
    return f"{{{','.join(elements)}}}"


def _element(value: object) -> str:
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return encode_json(value).decode()


def _in_full(value: Value) -> str:
    if isinstance(value, float):
        return decimal_text(value)
    if isinstance(value, list):
        return f"[{','.join(map(_in_full, value))}]"
    if isinstance(value, dict):
        members = (f"{encode_json(name).decode()}:{_in_full(each)}" for name, each in value.items())
        return f"{{{','.join(members)}}}"
    return encode_json(value).decode()
