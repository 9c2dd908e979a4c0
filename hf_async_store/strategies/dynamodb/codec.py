"""Portable values as DynamoDB's attribute values, and back: the hot path of every item.

Most values have a native form. What DynamoDB cannot hold exactly takes a side form, in types that
no portable value has:

* a float that is integral, -0.0 or out of DynamoDB's range is a text set of its one `repr`: a
  number would come back as an integer, or not at all;
* of a map key that is empty or longer than 64 KiB, the name and the value stand under two keys that
  begin with U+0000, which no portable text has. (In a list under one, they would be nested a level
  deeper, and what is as deep as it may be would not fit.)
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from math import isfinite
from typing import Any, Final, TypeAlias, cast

from hf_async_store.values import Value

Attribute: TypeAlias = dict[str, Any]
"""An attribute value as the wire has it: one type letter, and what it holds."""

Attributes: TypeAlias = dict[str, Attribute]

NULL: Final[Attribute] = {"NULL": True}

# Source: DynamoDB Developer Guide, "Supported data types": magnitudes from 1E-130.
_SMALLEST: Final = 1e-130
_LONGEST_NAME: Final = 65_535
_SIDE: Final = "\0"
_NAME: Final = "n"


def encode(value: Value) -> Attribute:
    """The attribute value of a portable value."""
    kind = type(value)
    if kind is str:
        return {"S": value}
    if value is None:
        return NULL
    if kind is bool:
        return {"BOOL": value}
    if kind is int:
        return {"N": str(value)}
    if kind is dict:
        return {"M": encode_map(cast("dict[str, Value]", value))}
    if kind is list:
        return {"L": [encode(each) for each in cast("list[Value]", value)]}
    return encode_float(cast("float", value))


def encode_map(value: dict[str, Value]) -> Attributes:
    """What a map attribute of these values holds."""
    encoded = {name: encode(each) for name, each in value.items()}
    if "" in encoded or any(len(name) > _LONGEST_NAME // 4 for name in encoded):
        return _with_side_names(encoded)
    return encoded


def _with_side_names(encoded: Attributes) -> Attributes:
    moved: Attributes = {}
    for place, (name, each) in enumerate(encoded.items()):
        if is_plain_name(name):
            moved[name] = each
        else:
            moved[f"{_SIDE}{place}"] = each
            moved[f"{_SIDE}{place}{_NAME}"] = {"S": name}
    return moved


def is_plain_name(name: str) -> bool:
    """Whether DynamoDB takes this name of an attribute or map key as it is."""
    return bool(name) and (len(name) <= _LONGEST_NAME // 4 or len(name.encode()) <= _LONGEST_NAME)


def encode_float(value: float) -> Attribute:
    """A number where that is exact and comes back as a float; else the side form."""
    if is_native(value):
        return {"N": repr(value)}
    return {"SS": [repr(value)]}


def is_native(value: float) -> bool:
    return not value.is_integer() and abs(value) >= _SMALLEST


def decode(attribute: Attribute) -> Value:
    """The portable value of an attribute value; sets and binary of others come as lists and text.

    Raises:
        ValueError: it is none.
    """
    [(kind, held)] = attribute.items()
    if kind == "S":
        return cast("str", held)
    if kind == "N":
        return decode_number(held)
    if kind == "BOOL":
        return cast("bool", held)
    if kind == "NULL":
        return None
    if kind == "M":
        return decode_map(held)
    if kind == "L":
        return [decode(each) for each in held]
    if kind == "SS" and len(held) == 1:
        return _side_form(held[0])
    if kind == "NS":
        return [decode_number(each) for each in held]
    if kind == "B":
        return b64encode(held).decode()
    if kind == "BS":
        return [b64encode(each).decode() for each in held]
    return cast("Value", held)


def _side_form(text: str) -> Value:
    """The float that a text set of one is; a text that is none of ours is a set of another program's."""
    try:
        value = float(text)
    except ValueError:
        return [text]
    return value if repr(value) == text and isfinite(value) else [text]


def decode_number(text: str) -> int | float:
    """An integer, unless the text has a fraction or an exponent.

    Raises:
        ValueError: DynamoDB has no such number.
    """
    try:
        return int(text)
    except ValueError:
        value = float(text)
    if not isfinite(value):
        raise ValueError(f"no number: {text[:50]!r}")
    return value


def decode_map(held: Attributes) -> dict[str, Value]:
    decoded = {name: decode(each) for name, each in held.items()}
    if any(name.startswith(_SIDE) for name in decoded):
        return dict(_with_plain_names(decoded))
    return decoded


def _with_plain_names(decoded: dict[str, Value]) -> Iterator[tuple[str, Value]]:
    for name, each in decoded.items():
        if not name.startswith(_SIDE):
            yield name, each
        elif not name.endswith(_NAME):
            plain = decoded.get(f"{name}{_NAME}")
            if not isinstance(plain, str):
                raise ValueError("a map key that is beside its name")
            yield plain, each
