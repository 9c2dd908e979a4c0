"""Validates and copies a batch of entities column by column, with the results of `Collection.entity`.

The entities of a batch mostly have the same fields, with values of the same types. All values of one
field, a column, are checked by a few calls of C code instead of by Python code for each value. If
anything is unusual, `validate_batch` returns None. The caller then validates the entities one by
one, which also produces the error messages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain, repeat
from math import isfinite
from operator import methodcaller
from types import NoneType
from typing import Final, TypeAlias, TypeVar, cast

import msgspec

from hf_async_store.errors import UnsupportedValueError
from hf_async_store.schema import Collection, Field
from hf_async_store.values import (
    INT_MAX,
    INT_MIN,
    LIGHT_BYTES,
    MAX_ENTITY_BYTES,
    MAX_KEY_BYTES,
    VERSION,
    Entity,
    Key,
    Value,
    normalise,
    parse_timestamp,
)

Each = TypeVar("Each")
Column: TypeAlias = "Sequence[Value]"

_VALUES: Final = methodcaller("values")
_MIN_GROUP_SIZE: Final = 8
"""The average number of entities with the same fields from which on columns are faster."""

_NOT_UTF8: Final = re.compile("[\x00\ud800-\udfff]")
_SCALARS: Final = frozenset({str, bool, int, float, NoneType})
_ALLOWED_TYPES: Final[Mapping[str, frozenset[type]]] = {
    "text": frozenset({str, NoneType}),
    "timestamp": frozenset({str, NoneType}),
    "integer": frozenset({int, NoneType}),
    "number": frozenset({int, float, NoneType}),
    "boolean": frozenset({bool, NoneType}),
}
_MAX_NUMBER_SIZE: Final = 32  # the size of a float, as measured by `values.sized`
_JSON_SIZE_FACTOR: Final = 8  # a value has at most 8 times the size of its JSON: `LIGHT_BYTES`


def group_by_keys(items: Sequence[Mapping[str, object]]) -> dict[tuple[str, ...], list[int]] | None:
    """The indexes of dicts, grouped by the sequence of their keys; None if the groups are small."""
    if len(items) < _MIN_GROUP_SIZE:
        return None
    keys = list(map(tuple, items))
    if keys.count(keys[0]) == len(keys):
        return {keys[0]: list(range(len(keys)))}
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, each in enumerate(keys):
        groups.setdefault(each, []).append(index)
    return groups if len(groups) * _MIN_GROUP_SIZE <= len(keys) else None


def columns_of(items: Sequence[dict[str, Each]]) -> list[tuple[Each, ...]]:
    """The values of dicts with the same keys in the same order: one tuple for each key."""
    return list(zip(*map(_VALUES, items), strict=True))


def validate_batch(
    collection: Collection, items: Sequence[Mapping[str, object]]
) -> list[tuple[Key, Entity]] | None:
    """The keys of whole entities, and portable, validated copies of them without `version`.

    None means that the entities must be validated one by one; they may be valid or not.
    """
    if _types_of(items) != {dict} or _types_of(list(chain.from_iterable(items))) != {str}:
        return None
    groups = group_by_keys(items)
    if groups is None or not all(_has_required_fields(collection, names) for names in groups):
        return None
    ids: list[Value] = [None] * len(items)
    entities = list(map(dict.copy, cast("Sequence[Entity]", items)))
    size = 0  # an upper bound of the size of all entities together
    for names, indexes in groups.items():
        members = entities if len(groups) == 1 else [entities[index] for index in indexes]
        size += len(members) * (3 + sum(1 + len(name) for name in names))
        for name, original in zip(names, columns_of(members), strict=True):
            try:
                column, column_size = _validate_column(original, collection.fields.get(name))
            except (_UnusualValueError, UnsupportedValueError):
                return None
            size += column_size
            if name == collection.key:
                for index, value in zip(indexes, column, strict=True):
                    ids[index] = value
            if name == VERSION:
                for each in members:
                    del each[VERSION]
            elif column is not original:
                for each, value in zip(members, column, strict=True):
                    each[name] = value
    strings = cast("list[str]", ids)
    if not _are_ids(strings) or (size > MAX_ENTITY_BYTES and not _within_size_limit(entities)):
        return None
    return list(zip(map(Key, repeat(collection.name), strings), entities, strict=True))


class _UnusualValueError(Exception):
    """A value, valid or not, because of which the entities must be validated one by one."""


def _has_required_fields(collection: Collection, names: Sequence[str]) -> bool:
    """Whether the required fields are present, and all names are ASCII without U+0000."""
    joined = "".join(names)
    complete = collection.key in names and all(each in names for each in collection.required)
    return complete and joined.isascii() and "\x00" not in joined


def _types_of(values: Sequence[object]) -> set[type]:
    types = list(map(type, values))
    # Usually there is only one type, and `count` is faster than building a set.
    return {types[0]} if types and types.count(types[0]) == len(types) else set(types)


def _validate_column(column: Column, field: Field | None) -> tuple[Column, int]:
    """A column in its stored form, and an upper bound of the size of its values together.

    Raises:
        _UnusualValueError, UnsupportedValueError: the entities must be validated one by one.
    """
    types = _types_of(column)
    if types <= _SCALARS:
        size = len(column) * _MAX_NUMBER_SIZE + _size_of_strings(column, types)
        _check_numbers(column, types)
    else:
        column = [normalise(each) for each in column]
        types = _types_of(column)
        size = _JSON_SIZE_FACTOR * len(msgspec.json.encode(column))
    if field is not None and field.type != "json":
        if not types <= _ALLOWED_TYPES[field.type]:
            raise _UnusualValueError
        if field.type == "timestamp":
            column = _normalized_timestamps(column)
    if field is not None and field.required and NoneType in types:
        raise _UnusualValueError
    return column, size


def _size_of_strings(column: Column, types: set[type]) -> int:
    if str not in types:
        return 0
    strings = cast("Sequence[str]", column)
    if len(types) > 1:
        strings = [each for each in column if type(each) is str]
    joined = "".join(strings)
    if joined.isascii():
        if "\x00" in joined:
            raise _UnusualValueError
        return len(joined)
    if _NOT_UTF8.search(joined):
        raise _UnusualValueError
    return len(joined.encode())


def _check_numbers(column: Column, types: set[type]) -> None:
    """Check that the integers have at most 64 bits, and the floats are finite."""
    if int in types:
        integers = [each for each in column if type(each) is int]
        if min(integers) < INT_MIN or max(integers) > INT_MAX:
            raise _UnusualValueError
    if float in types and not all(isfinite(each) for each in column if type(each) is float):
        raise _UnusualValueError


def _normalized_timestamps(column: Column) -> Column:
    """The timestamps in canonical form. A batch usually has few distinct ones, each parsed once."""
    distinct = set(cast("Sequence[str | None]", column))
    parsed = {each: None if each is None else parse_timestamp(each) for each in distinct}
    if all(canonical == each for each, canonical in parsed.items()):
        return column
    if any(canonical is None for each, canonical in parsed.items() if each is not None):
        raise _UnusualValueError
    return [parsed[cast("str | None", each)] for each in column]


def _are_ids(ids: Sequence[str]) -> bool:
    # A character has at most four bytes in UTF-8.
    return min(map(len, ids)) > 0 and max(map(len, ids)) * 4 <= MAX_KEY_BYTES


def _within_size_limit(entities: Sequence[Entity]) -> bool:
    return max(map(len, map(msgspec.json.encode, entities))) <= LIGHT_BYTES
