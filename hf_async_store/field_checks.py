"""Checks of the field names and operands of queries against the declaration of a collection.

A bare name is a declared field, and an operand is of a type that the field can hold. So a misspelt name,
or the text "5" for an integer field, is an error and not an empty result. `path("name")` is not checked.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from hf_async_store.errors import InvalidQueryError
from hf_async_store.values import VERSION, is_canonical_timestamp, parse_timestamp

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hf_async_store.schema import Collection
    from hf_async_store.values import FieldType, Value

_MAX_NAMES: Final = 20
_MAX_SHOWN_LENGTH: Final = 80

# -- names ----------------------------------------------------------------------------------


def type_of(collection: Collection, name: str) -> FieldType:
    """The type of the field with this name: json for an undeclared field of an open collection.

    Raises:
        InvalidQueryError: the field is not declared; the message shows how to write what is meant.
    """
    if not is_known(collection, name):
        how = next(
            (how for each in _CORRECTIONS if (how := each(collection, name)) is not None),
            f"a field that is not declared is written path({_shown(name)})",
        )
        raise InvalidQueryError(f"{undeclared(collection, name)}; {how}")
    if name == VERSION:
        return "integer"
    return collection.fields[name].type if name in collection.fields else "json"


def is_known(collection: Collection, name: str) -> bool:
    """Whether the name is a declared field, or the collection is open."""
    return name in collection.fields or name == VERSION or collection.open


def undeclared(collection: Collection, name: str) -> str:
    """The message that a field is not declared, with the nearest declared ones, or else with all."""
    known = [*collection.fields, VERSION]
    from difflib import get_close_matches

    near = get_close_matches(name, known)
    listed = f"the nearest are: {', '.join(near)}" if near else f"declared are: {_listed(known)}"
    return f"{collection.name} has no declared field {_shown(name)}; {listed}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def _shown(name: str) -> str:
    quoted = name if len(name) <= _MAX_SHOWN_LENGTH else f"{name[:_MAX_SHOWN_LENGTH]}..."
    return ascii(quoted)


# What a name that is not declared may mean, and how that is written.

_CALLS: Final[Mapping[str, str]] = {
    "eq": "eq(value)",
    "ne": "ne(value)",
    "lt": "lt(value)",
    "lte": "lte(value)",
    "gt": "gt(value)",
    "gte": "gte(value)",
    "in": "in_([...])",
    "not_in": "not_in([...])",
    "between": "between(low, high)",
    "exists": "exists()",
    "contains": "contains(value)",
    "begins_with": "begins_with(prefix)",
}
"""How the operators are written."""

OPERATOR_CALLS: Final = ", ".join(_CALLS.values())

_SIGNS: Final[Mapping[str, str]] = {
    "!=": "ne",
    "<>": "ne",
    "<=": "lte",
    ">=": "gte",
    "==": "eq",
    "=": "eq",
    "<": "lt",
    ">": "gt",
}
_SIGNED: Final = rf"\s*([\w/]+)\s*({'|'.join(_SIGNS)})"
_DIRECTED: Final = r"([\w/]+)[\s:,]+(asc|desc|ascending|descending)\s*\Z"
_COMBINED: Final = ("and", "or", "not", "nor")


def signed(text: str) -> tuple[str, str] | None:
    """The field and the name of the operator, if a text begins like `status!=` or `size >= `."""
    found = re.match(_SIGNED, text)
    return None if found is None else (found[1], _SIGNS[found[2]])


def directed(text: str) -> tuple[str, bool] | None:
    """The field, and whether the order is descending, of a text like `created_at desc`."""
    found = re.match(_DIRECTED, text, re.IGNORECASE)
    return None if found is None else (found[1], found[2].lower().startswith("desc"))


def _as_combination(collection: Collection, name: str) -> str | None:
    if name.strip("$").lower() in _COMBINED and name not in collection.fields:
        return "combine filters with and_(...), or_(...) and not_(...)"
    return None


def _as_comparison(collection: Collection, name: str) -> str | None:
    """`status__ne`, or `status !=`."""
    field, _, operator = name.rpartition("__")
    if operator not in _CALLS or not field:
        field, operator = signed(name) or ("", "")
    return f'write {{"{field}": {_CALLS[operator]}}}' if field in collection.fields else None


def _as_order(collection: Collection, name: str) -> str | None:
    """`created_at desc`, the pair `("created_at", "desc")`, or `status, created_at`."""
    parsed = directed(name)
    if parsed is not None and parsed[0] in collection.fields:
        field, descending = parsed
        return f'write desc("{field}") or "-{field}"' if descending else f'write "{field}"'
    if name.lower() in ("asc", "desc"):
        return 'a descending order is written desc("name") or "-name"'
    names = [each.strip() for each in name.split(",")]
    if len(names) > 1 and all(each.lstrip("-") in collection.fields for each in names):
        return "write [" + ", ".join(f'"{each}"' for each in names) + "]"
    return None


def _as_path(collection: Collection, name: str) -> str | None:
    """`tags.owner`, `tags/owner` or `tags__owner`."""
    first, *inner = re.split(r"\.|/|__", name)
    if first not in collection.fields or not inner:
        return None
    steps = ", ".join(each if each.isdecimal() else _shown(each) for each in inner)
    return f"a value inside a field is written path({_shown(first)}, {steps})"


_CORRECTIONS: Final[tuple[Callable[[Collection, str], str | None], ...]] = (
    _as_combination,
    _as_comparison,
    _as_order,
    _as_path,
)

# -- operands -------------------------------------------------------------------------------

_EXPECTED: Final[Mapping[FieldType, str]] = {
    "text": "a string",
    "integer": "an integer",
    "number": "a number",
    "boolean": "True or False",
    "timestamp": "a timestamp, for example 2025-06-30T12:00:00Z",
}
_RANGE_OPERATORS: Final = ("lt", "lte", "gt", "gte", "between")
_STRING_OPERATORS: Final = ("contains", "begins_with")


_USUAL_TYPES: Final[Mapping[FieldType, frozenset[type]]] = {
    "text": frozenset({str}),
    "integer": frozenset({int}),
    "number": frozenset({int, float}),
    "boolean": frozenset({bool}),
}


def usual_operands(operator: str, field_type: FieldType, values: Sequence[Value]) -> bool:
    """Whether the types alone show that `operand_problem` has nothing to say; for lists of many values."""
    usual = _USUAL_TYPES.get(field_type)
    if usual is None or (operator in _STRING_OPERATORS and field_type != "text"):
        return False
    return usual.issuperset(map(type, values))


def operand_problem(operator: str, field_type: FieldType, value: Value) -> str | None:
    """Why an operator with this operand matches no value of a field of this type; None if it may.

    Null is accepted, except by comparisons, which never match it.
    """
    if isinstance(value, dict) and any(each.startswith("$") for each in value):
        return f"takes a value; the operators are functions: {OPERATOR_CALLS}"
    if value is None and operator in _RANGE_OPERATORS:
        return "never matches null; to find null write eq(None), and to find missing exists(False)"
    if field_type == "json" or (value is None and operator not in _STRING_OPERATORS):
        return None
    if operator in _STRING_OPERATORS and field_type not in ("text", "timestamp"):
        return f"needs a field of type text, timestamp or json, but this is of type {field_type}"
    if _FITS[field_type](operator, value):
        return None
    if operator in _STRING_OPERATORS:
        return f"needs a string, not {_described(value)}"
    return f"needs {_EXPECTED[field_type]}, not {_described(value)}"


def _fits_text(operator: str, value: Value) -> bool:
    return isinstance(value, str)


def _fits_integer(operator: str, value: Value) -> bool:
    # 1.0 equals 1, and 0.5 is between two integers.
    if isinstance(value, float):
        return operator in _RANGE_OPERATORS or value.is_integer()
    return type(value) is int


def _fits_number(operator: str, value: Value) -> bool:
    return type(value) in (int, float)


def _fits_boolean(operator: str, value: Value) -> bool:
    return type(value) is bool


def _fits_timestamp(operator: str, value: Value) -> bool:
    if not isinstance(value, str):
        return False
    return (
        operator in _STRING_OPERATORS
        or is_canonical_timestamp(value)
        or parse_timestamp(value) is not None
    )


_FITS: Final[Mapping[FieldType, Callable[[str, Value], bool]]] = {
    "text": _fits_text,
    "integer": _fits_integer,
    "number": _fits_number,
    "boolean": _fits_boolean,
    "timestamp": _fits_timestamp,
}


def _described(value: Value) -> str:
    # Not the value itself, which may be a secret.
    if value is None:
        return "None"
    kinds = {str: "a string", bool: "a boolean", int: "an integer", float: "a float"}
    return kinds.get(type(value), "a list" if isinstance(value, list) else "a dict")
