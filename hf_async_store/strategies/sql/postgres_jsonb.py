"""Encodes values for PostgreSQL: JSONB and NUMERIC, which store numbers as decimals, and arrays.

A decimal keeps the decimal point of `1.0`, but not the sign of `-0.0`, and a number that is written
with an exponent is read back as an integer. So large floats, which are integers, are written in full
with their exact value and a decimal point; then they also compare exactly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Final

from hf_async_store.strategies.sql.row_mapping import encode_json
from hf_async_store.values import Value

# Finds numbers with an exponent, and -0.0. A string can contain the same characters; then the value
# is encoded by the slower function, with the same result.
_SPECIAL_NUMBER: Final = re.compile(rb"(?:^|[:,\[])-?(?:0\.0(?:$|[],}])|[0-9]+(?:\.[0-9]+)?e[0-9])")
_ESCAPED: Final = re.compile(r'\\[^"\\]')
_LARGE: Final = 1e15


def json_text(value: Value) -> tuple[str, bool]:
    """The JSON of a value, and whether JSONB returns the value unchanged."""
    encoded = encode_json(value)
    if _SPECIAL_NUMBER.search(encoded) is None:
        return encoded.decode(), True
    return _in_full(value), not _has_negative_zero(value)


def decimal_text(value: float) -> tuple[str, bool]:
    """The decimal form of a number, and whether a NUMERIC column returns the number unchanged."""
    return _in_full(value), not _is_negative_zero(value)


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


def _element(value: object) -> str:
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return encode_json(value).decode()


def number_of(decimal: str) -> int | float:
    """The number that a NUMERIC column returned in decimal form."""
    return float(decimal) if "." in decimal else int(decimal)


def _in_full(value: Value) -> str:
    if isinstance(value, float):
        return (
            f"{abs(value) if value == 0 else value:.1f}" if _needs_full_form(value) else repr(value)
        )
    if isinstance(value, list):
        return f"[{','.join(map(_in_full, value))}]"
    if isinstance(value, dict):
        return (
            f"{{{','.join(f'{_in_full(name)}:{_in_full(each)}' for name, each in value.items())}}}"
        )
    return encode_json(value).decode()


def _needs_full_form(value: float) -> bool:
    return value == 0 or abs(value) >= _LARGE


def _is_negative_zero(value: Value) -> bool:
    return isinstance(value, float) and value == 0 and math.copysign(1, value) < 0


def _has_negative_zero(value: Value) -> bool:
    if isinstance(value, list):
        return any(map(_has_negative_zero, value))
    if isinstance(value, dict):
        return any(map(_has_negative_zero, value.values()))
    return _is_negative_zero(value)
