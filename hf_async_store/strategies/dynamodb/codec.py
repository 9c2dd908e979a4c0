"""Conversion between portable values and DynamoDB attribute values, used for every item.

Most values have a native encoding. Values that DynamoDB cannot store exactly have a substitute
encoding, with types and names that no portable value uses:

* A float that is integral, -0.0 or outside of DynamoDB's range is stored as a string set that
  contains only its `repr`. Stored as a number, it would be read as an integer or be rejected.
* A map key that is empty or longer than 64 KiB is stored as two entries, one with the value and one
  with the key, whose names begin with U+0000, which no portable string contains. (A list with both
  would add a nesting level, and exceed DynamoDB's limit for values nested to the maximum depth.)
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from math import isfinite
from typing import Any, Final, TypeAlias, cast

from hf_async_store.values import Value

Attribute: TypeAlias = dict[str, Any]
"""An attribute value as in requests and responses: a dict of one type descriptor to its value."""

Attributes: TypeAlias = dict[str, Attribute]

NULL: Final[Attribute] = {"NULL": True}

# Source: DynamoDB Developer Guide, "Supported data types": magnitudes from 1E-130.
_SMALLEST: Final = 1e-130
_LONGEST_NAME: Final = 65_535
_SUBSTITUTE_PREFIX: Final = "\0"
_NAME_SUFFIX: Final = "n"


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
    """The content of a map attribute with these values."""
    encoded = {name: encode(each) for name, each in value.items()}
    if "" in encoded or any(len(name) > _LONGEST_NAME // 4 for name in encoded):
        return _substitute_names(encoded)
    return encoded


def _substitute_names(encoded: Attributes) -> Attributes:
    substituted: Attributes = {}
    for position, (name, each) in enumerate(encoded.items()):
        if is_plain_name(name):
            substituted[name] = each
        else:
            substituted[f"{_SUBSTITUTE_PREFIX}{position}"] = each
            substituted[f"{_SUBSTITUTE_PREFIX}{position}{_NAME_SUFFIX}"] = {"S": name}
    return substituted


def is_plain_name(name: str) -> bool:
    """Whether DynamoDB accepts this name for an attribute or map key."""
    return bool(name) and (len(name) <= _LONGEST_NAME // 4 or len(name.encode()) <= _LONGEST_NAME)


def encode_float(value: float) -> Attribute:
    """A number if it is exact and decoded as a float; otherwise the substitute encoding."""
    if is_native(value):
        return {"N": repr(value)}
    return {"SS": [repr(value)]}


def is_native(value: float) -> bool:
    return not value.is_integer() and abs(value) >= _SMALLEST


def decode(attribute: Attribute) -> Value:
    """The portable value of an attribute value.

    Sets and binary values, which only other programs write, become lists and base64 strings.

    Raises:
        ValueError: the attribute is not a valid attribute value.
    """
    [(kind, content)] = attribute.items()
    if kind in ("S", "BOOL"):
        return cast("str | bool", content)
    if kind == "N":
        return decode_number(content)
    if kind == "NULL":
        return None
    if kind == "M":
        return decode_map(content)
    if kind == "L":
        return [decode(each) for each in content]
    return _decode_foreign(kind, content)


def _decode_foreign(kind: str, content: Any) -> Value:
    """The value of a set, which may be the substitute encoding of a float, or of a binary value."""
    if kind == "SS" and len(content) == 1:
        return _decode_single_string(content[0])
    if kind == "NS":
        return [decode_number(each) for each in content]
    if kind == "B":
        return b64encode(content).decode()
    if kind == "BS":
        return [b64encode(each).decode() for each in content]
    return cast("Value", content)


def _decode_single_string(string: str) -> Value:
    """The float that a string set with one element encodes.

    If the string is not the `repr` of a finite float, another program wrote the set: it is a list.
    """
    try:
        value = float(string)
    except ValueError:
        return [string]
    return value if repr(value) == string and isfinite(value) else [string]


def decode_number(string: str) -> int | float:
    """An integer, or a float if the string has a fraction or an exponent.

    Raises:
        ValueError: the string is not a finite number.
    """
    try:
        return int(string)
    except ValueError:
        value = float(string)
    if not isfinite(value):
        raise ValueError(f"not a finite number: {string[:50]!r}")
    return value


def decode_map(content: Attributes) -> dict[str, Value]:
    decoded = {name: decode(each) for name, each in content.items()}
    if any(name.startswith(_SUBSTITUTE_PREFIX) for name in decoded):
        return dict(_restore_names(decoded))
    return decoded


def _restore_names(decoded: dict[str, Value]) -> Iterator[tuple[str, Value]]:
    for name, each in decoded.items():
        if not name.startswith(_SUBSTITUTE_PREFIX):
            yield name, each
        elif not name.endswith(_NAME_SUFFIX):
            plain = decoded.get(f"{name}{_NAME_SUFFIX}")
            if not isinstance(plain, str):
                raise ValueError("the entry with the name of a map key is missing")
            yield plain, each
