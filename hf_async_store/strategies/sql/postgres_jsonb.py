"""JSON as PostgreSQL's JSONB keeps it: numbers become decimals.

A decimal keeps the point of `1.0`, but not the sign of `-0.0`; and what is written with an exponent
is read back as an integer. So floats are written out in full, by their exact value where it is an
integer: then they also compare exactly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Final

from hf_async_store.strategies.sql.row_mapping import encode_json
from hf_async_store.values import Value

# A number with an exponent, or -0.0, where a number may stand. In a text it may look like one,
# too; then the value is only written the long way.
_ODD: Final = re.compile(rb"(?:^|[:,\[])-?(?:0\.0(?:$|[],}])|[0-9]+(?:\.[0-9]+)?e[0-9])")
_ESCAPED: Final = re.compile(r'\\[^"\\]')
_LARGE: Final = 1e15


def json_text(value: Value) -> tuple[str, bool]:
    """The text of a value, and whether JSONB gives the value back as it is."""
    encoded = encode_json(value)
    if _ODD.search(encoded) is None:
        return encoded.decode(), True
    return _written(value), not _has_negative_zero(value)


def decimal_text(value: float) -> tuple[str, bool]:
    """The text of a number for a NUMERIC column, and whether it gives the number back as it is."""
    return _written(value), not _is_negative_zero(value)


def array_text(values: Sequence[object]) -> str:
    """A list of texts, integers, booleans and nulls as PostgreSQL writes an array.

    It writes one as JSON does, but for the brackets, and for what a backslash before a letter is. So
    the encoder does it at once; the driver looks at each element, at five times the cost.
    """
    text = encode_json(values).decode()
    if _ESCAPED.search(text):
        text = f"[{','.join(map(_element, values))}]"
    return f"{{{text[1:-1]}}}"


def _element(value: object) -> str:
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return encode_json(value).decode()


def number_of(text: str) -> int | float:
    """The number of the text of a NUMERIC."""
    return float(text) if "." in text else int(text)


def _written(value: Value) -> str:
    if isinstance(value, float):
        return f"{abs(value) if value == 0 else value:.1f}" if _is_whole(value) else repr(value)
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, dict):
        return (
            f"{{{','.join(f'{_written(name)}:{_written(each)}' for name, each in value.items())}}}"
        )
    return encode_json(value).decode()


def _is_whole(value: float) -> bool:
    return value == 0 or abs(value) >= _LARGE


def _is_negative_zero(value: Value) -> bool:
    return isinstance(value, float) and value == 0 and math.copysign(1, value) < 0


def _has_negative_zero(value: Value) -> bool:
    if isinstance(value, list):
        return any(map(_has_negative_zero, value))
    if isinstance(value, dict):
        return any(map(_has_negative_zero, value.values()))
    return _is_negative_zero(value)
