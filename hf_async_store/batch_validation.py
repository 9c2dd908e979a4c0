"""Validates and copies a batch of entities column by column, with the results of `Collection.entity`.

The entities of a batch mostly have the same fields, with values of the same types. All values of one
field, a column, are checked by a few calls of C code instead of by Python code for each value. If
anything is unusual, `validate_batch` returns None. The caller then validates the entities one by
one, which also produces the error messages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import datetime
from itertools import chain, repeat
from math import isfinite
from types import NoneType
from typing import Any, Final, TypeAlias, TypeVar, cast

import msgspec

from hf_async_store.errors import UnsupportedValueError
from hf_async_store.schema import Collection, Field
from hf_async_store.values import (
    FLOAT_SIZE,
    INT_MAX,
    INT_MIN,
    LIGHT_BYTES,
    MAX_DEPTH,
    MAX_ENTITY_BYTES,
    MAX_KEY_BYTES,
    NOT_UTF8,
    VERSION,
    Entity,
    Key,
    normalise,
    parse_timestamp,
)

Each = TypeVar("Each")
Column: TypeAlias = Sequence[Any]
"""The values of one field; `_types_of` tells their types."""

_VALUES: Final[Callable[[dict[str, Any]], Iterable[Any]]] = dict.values
_MIN_GROUP_SIZE: Final = 8
"""The average number of entities with the same fields from which on columns are faster."""

_SCALARS: Final = frozenset({str, bool, int, float, NoneType})
_ALLOWED_TYPES: Final[Mapping[str, frozenset[type]]] = {
    "text": frozenset({str, NoneType}),
    "timestamp": frozenset({str, NoneType}),
    "integer": frozenset({int, NoneType}),
    "number": frozenset({int, float, NoneType}),
    "boolean": frozenset({bool, NoneType}),
}
_CANONICAL_FORM: Final = b"0000-00-00T00:00:00.000000Z"
_DIGITS_TO_ZEROS: Final = bytes.maketrans(b"123456789", b"000000000")
_JSON_SIZE_FACTOR: Final = 8  # a value has at most 8 times the size of its JSON: `LIGHT_BYTES`


def group_by_keys(items: Sequence[Mapping[str, object]]) -> dict[tuple[str, ...], list[int]] | None:
    """The indexes of dicts, grouped by the sequence of their keys.

    None if the groups are small, or a key is unusual: not ASCII, with U+0000, or no plain `str`.
    """
    if len(items) < _MIN_GROUP_SIZE:
        return None
    names = list(chain.from_iterable(items))
    if names and _types_of(names) != {str}:
        return None
    # If the concatenated keys repeat those of the first dict, so do the keys of each: those of one are
    # distinct, so none has more.
    first = tuple(items[0])
    if names == [*first] * len(items):
        groups = {first: list(range(len(items)))}
    else:
        groups = {}
        for index, each in enumerate(map(tuple, items)):
            groups.setdefault(each, []).append(index)
    is_worthwhile = len(groups) * _MIN_GROUP_SIZE <= len(items)
    return groups if is_worthwhile and all(map(_are_usual_names, groups)) else None


def columns_of(items: Sequence[dict[str, Each]]) -> list[list[Each]]:
    """The values of dicts with the same keys in the same order: one list for each key."""
    values = list(chain.from_iterable(map(_VALUES, items)))
    width = len(items[0])
    return [values[place::width] for place in range(width)]


def validate_batch(
    collection: Collection, items: Sequence[Mapping[str, object]]
) -> tuple[list[Key], list[Entity]] | None:
    """The keys of whole entities, and portable, validated copies of them without `version`.

    None means that the entities must be validated one by one; they may be valid or not.
    """
    if _types_of(items) != {dict}:
        return None
    groups = group_by_keys(items)
    if groups is None or not all(_has_required_fields(collection, names) for names in groups):
        return None
    try:
        # `size` is an upper bound of the size of all entities together.
        entities, size = _validated(cast("Sequence[Entity]", items), groups, collection.fields)
    except (_UnusualValueError, UnsupportedValueError):
        return None
    for names, indexes in groups.items():
        if VERSION in names:
            for index in indexes:
                del entities[index][VERSION]
    ids: Column = [each[collection.key] for each in entities]
    if not _are_ids(ids) or (size > MAX_ENTITY_BYTES and not _within_size_limit(entities)):
        return None
    return list(map(Key, repeat(collection.name), ids)), entities


def _validated(
    items: Sequence[dict[str, Any]],
    groups: Mapping[tuple[str, ...], list[int]],
    fields: Mapping[str, Field],
    depth: int = 0,
) -> tuple[list[dict[str, Any]], int]:
    """Copies of dicts in their stored form, and an upper bound of their size together.

    Args:
        groups: the indexes of the dicts by their keys, which are ASCII strings.
        fields: those of their keys that are declared.
        depth: the nesting depth of the dicts.

    Raises:
        _UnusualValueError, UnsupportedValueError: the entities must be validated one by one.
    """
    copies = list(map(dict.copy, items))
    size = 0
    for names, indexes in groups.items():
        members = copies if len(groups) == 1 else [copies[index] for index in indexes]
        size += len(members) * (3 + sum(1 + len(name) for name in names))
        for name, original in zip(names, columns_of(members), strict=True):
            column, column_size = _validate_column(original, fields.get(name), depth + 1)
            size += column_size
            if column is not original:
                for each, value in zip(members, column, strict=True):
                    each[name] = value
    return copies, size


class _UnusualValueError(Exception):
    """A value, valid or not, because of which the entities must be validated one by one."""


def _has_required_fields(collection: Collection, names: Sequence[str]) -> bool:
    """Whether the key and the required fields are present."""
    return collection.key in names and all(each in names for each in collection.required)


def _are_usual_names(names: Sequence[str]) -> bool:
    """Whether all names are ASCII without U+0000."""
    joined = "".join(names)
    return joined.isascii() and "\x00" not in joined


def _types_of(values: Sequence[object]) -> set[type]:
    types = list(map(type, values))
    # Usually there is only one type, and `count` is faster than building a set.
    return {types[0]} if types and types.count(types[0]) == len(types) else set(types)


def _validate_column(column: Column, field: Field | None, depth: int) -> tuple[Column, int]:
    """A column in its stored form, and an upper bound of the size of its values together.

    Raises:
        _UnusualValueError, UnsupportedValueError: the entities must be validated one by one.
    """
    types = _types_of(column)
    if types <= _SCALARS:
        size = len(column) * FLOAT_SIZE + _size_of_strings(column, types)
        column = _stored_numbers(column, types)
    else:
        column, size = _stored_containers(column, types, depth)
        types = _types_of(column)
    if field is not None and field.type != "json":
        if not types <= _ALLOWED_TYPES[field.type]:
            raise _UnusualValueError
        if field.type == "timestamp":
            column = _stored_timestamps(column)
    if field is not None and field.required and NoneType in types:
        raise _UnusualValueError
    return column, size


def _stored_containers(column: Column, types: set[type], depth: int) -> tuple[Column, int]:
    """A column of dicts, lists or values of several types in its stored form, and a bound of its size."""
    if types == {dict} and depth <= MAX_DEPTH:
        groups = group_by_keys(column)
        if groups is not None:
            return _validated(column, groups, {}, depth)
    column = [normalise(each, depth=depth) for each in column]
    return column, _JSON_SIZE_FACTOR * len(msgspec.json.encode(column))


def _size_of_strings(column: Column, types: set[type]) -> int:
    if str not in types:
        return 0
    joined = "".join(column if len(types) == 1 else [each for each in column if type(each) is str])
    if joined.isascii() and "\x00" not in joined:
        return len(joined)
    if NOT_UTF8.search(joined):
        raise _UnusualValueError
    return len(joined.encode())


def _stored_numbers(column: Column, types: set[type]) -> Column:
    """The column with 0.0 for -0.0. The integers must have at most 64 bits, the floats be finite."""
    if int in types:
        integers = [each for each in column if type(each) is int]
        if min(integers) < INT_MIN or max(integers) > INT_MAX:
            raise _UnusualValueError
    if float not in types:
        return column
    if not all(isfinite(each) for each in column if type(each) is float):
        raise _UnusualValueError
    if 0.0 not in column:  # -0.0 equals 0.0
        return column
    return [each + 0.0 if type(each) is float else each for each in column]


def _stored_timestamps(column: Column) -> Column:
    """The timestamps in canonical form. A batch usually has few distinct ones, each parsed once."""
    distinct = set(column) - {None}
    if _are_canonical_timestamps(distinct):
        return column
    parsed = {each: parse_timestamp(each) for each in distinct}
    if None in parsed.values():
        raise _UnusualValueError
    return [None if each is None else parsed[each] for each in column]


def _are_canonical_timestamps(texts: AbstractSet[str]) -> bool:
    """Whether all of them are certainly in canonical form."""
    joined = "".join(texts)
    if set(map(len, texts)) - {len(_CANONICAL_FORM)} or not joined.isascii():
        return False
    if joined.encode().translate(_DIGITS_TO_ZEROS) != _CANONICAL_FORM * len(texts):
        return False
    if "T24" in joined:  # from Python 3.14 on, the beginning of the next day
        return False
    try:
        deque(map(datetime.fromisoformat, texts), maxlen=0)
    except ValueError:
        return False
    return True


def _are_ids(ids: Sequence[str]) -> bool:
    # A character has at most four bytes in UTF-8.
    return min(map(len, ids)) > 0 and max(map(len, ids)) * 4 <= MAX_KEY_BYTES


def _within_size_limit(entities: Sequence[Entity]) -> bool:
    return max(map(len, map(msgspec.json.encode, entities))) <= LIGHT_BYTES
