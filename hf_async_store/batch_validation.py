"""Validates a batch of entities column by column; the results are those of `Collection.entity`.

The entities of a batch mostly have the same fields, with values of the same types. All values of one
field, a column, are checked by a few calls of C code instead of by Python code for each value. If
anything is unusual, the result is None. The caller then validates the entities one by one, which also
produces the error messages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from itertools import chain, repeat
from math import isfinite
from types import NoneType
from typing import Any, Final, TypeAlias, TypeVar, cast

import msgspec

from hf_async_store.changes import PutForm
from hf_async_store.errors import UnsupportedValueError
from hf_async_store.schema import Collection, Field
from hf_async_store.values import (
    CREATED_AT,
    FLOAT_SIZE,
    INT_MAX,
    INT_MIN,
    LIGHT_BYTES,
    MAX_DEPTH,
    MAX_ENTITY_BYTES,
    MAX_KEY_BYTES,
    NOT_UTF8,
    STORE_FIELDS,
    VERSION,
    Entity,
    Key,
    normalise,
    parse_timestamp,
    stamp,
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
_encode_lines: Final = msgspec.json.Encoder().encode_lines
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
) -> tuple[list[Key], Sequence[Entity]] | None:
    """The keys of whole entities, and portable, validated copies of them without `version`.

    None means that the entities must be validated one by one; they may be valid or not.
    """
    check = _Check(copies=True)
    if (batch := _checked(collection, items, check)) is None:
        return None
    keys, entities, groups = batch
    for names, indexes in groups.items():
        if VERSION in names:
            for index in indexes:
                del entities[index][VERSION]
    if check.size > MAX_ENTITY_BYTES and not _are_light(map(msgspec.json.encode, entities)):
        return None
    return keys, entities


def encode_batch(
    collection: Collection, items: Sequence[Mapping[str, object]], written_at: str | None
) -> tuple[list[Key], list[bytes], PutForm] | None:
    """The keys of whole entities, with their texts and form as in `EncodedPut`.

    Only entities are copied that contain a field that the store sets, or a value that is stored in another
    form. None means that `validate_batch` must be called.

    Args:
        written_at: the `updated_at` of all of them; None: they are imported, and keep their own.
    """
    check = _Check(copies=False)
    if (batch := _checked(collection, items, check)) is None:
        return None
    keys, entities, groups = batch
    kinds = {STORE_FIELDS.intersection(names) for names in groups}
    if len(kinds) > 1:
        return None
    [store_fields] = kinds
    if VERSION in store_fields and _types_of([each[VERSION] for each in entities]) != {int}:
        return None  # its text would not be encoded, and so not checked
    has_created_at, end = CREATED_AT in store_fields, b"}"
    if store_fields - {CREATED_AT} or CREATED_AT in check.nulls:
        entities = [_without_version(each, written_at) for each in entities]
        having = [each for each in entities if CREATED_AT in each]
        if 0 < len(having) < len(entities):
            return None
        has_created_at = bool(having)
    elif written_at is not None:
        end = b',"updated_at":"%b"}' % written_at.encode()
    try:
        lines = _encode_lines(entities)
    except UnicodeEncodeError:  # a lone surrogate
        return None
    texts = lines.split(b"\n")[:-1]
    if (b"\\" in lines and b"\\u0000" in lines) or not _are_light(texts):
        return None
    return keys, texts, PutForm(end, has_created_at, check.parents)


def _without_version(entity: Entity, written_at: str | None) -> Entity:
    """A copy without `version`, and with `updated_at`."""
    copy = entity.copy()
    copy.pop(VERSION, None)
    if written_at is not None:
        stamp(copy, written_at)
    return copy


def _checked(
    collection: Collection, items: Sequence[Mapping[str, object]], check: _Check
) -> tuple[list[Key], Sequence[Entity], Mapping[tuple[str, ...], list[int]]] | None:
    """The keys of whole entities, the entities in their stored form, but with `version`, and their indexes
    by their names."""
    if _types_of(items) != {dict}:
        return None
    groups = group_by_keys(items)
    if groups is None or not all(_has_required_fields(collection, names) for names in groups):
        return None
    try:
        entities = _validated(cast("Sequence[Entity]", items), groups, collection.fields, check)
    except (_UnusualValueError, UnsupportedValueError):
        return None
    ids: Column = [each[collection.key] for each in entities]
    if not _are_ids(ids):
        return None
    return list(map(Key, repeat(collection.name), ids)), entities, groups


class _Check:
    """What is done with a batch, and found in it.

    Attributes:
        copies: the caller keeps the dicts, so they must be copies. Otherwise those that need no change are
            those of the batch, and the caller checks the characters of all strings, and the sizes.
        size: an upper bound of the size of all entities together, for `copies`.
        nulls: the timestamp fields that contain null.
        parents: by referencing field, the ids that it contains.
    """

    def __init__(self, *, copies: bool) -> None:
        self.copies = copies
        self.size = 0
        self.nulls: set[str] = set()
        self.parents: dict[str, set[str]] = {}

    def is_text_only(self, types: set[type], field: Field | None) -> bool:
        """Whether nothing is left to check in a column with values of these types."""
        if self.copies or types != {str}:
            return False
        return field is None or (field.type == "text" and field.references is None)


def _validated(
    items: Sequence[Entity],
    groups: Mapping[tuple[str, ...], list[int]],
    fields: Mapping[str, Field],
    check: _Check,
    depth: int = 0,
) -> Sequence[Entity]:
    """Dicts in their stored form; the same list if that is their own.

    Args:
        groups: the indexes of the dicts by their keys, which are ASCII strings.
        fields: those of their keys that are declared.
        depth: the nesting depth of the dicts.

    Raises:
        _UnusualValueError, UnsupportedValueError: the entities must be validated one by one.
    """
    stored = list(map(dict.copy, items)) if check.copies else items
    for names, indexes in groups.items():
        members = stored if len(groups) == 1 else [stored[index] for index in indexes]
        check.size += len(members) * (3 + sum(1 + len(name) for name in names))
        values = list(chain.from_iterable(map(_VALUES, members)))
        types, width = list(map(type, values)), len(names)
        are_equal = types == types[:width] * len(members)
        changed = {}
        for place, name in enumerate(names):
            found = {types[place]} if are_equal else set(types[place::width])
            field = fields.get(name)
            if check.is_text_only(found, field):
                continue
            original = values[place::width]
            column = _validate_column(original, found, field, check, depth + 1)
            if column is not original:
                changed[name] = column
        if changed and not check.copies:
            # The dicts are copied that change.
            stored, members = list(stored), [each.copy() for each in members]
            for index, each in zip(indexes, members, strict=True):
                stored[index] = each
        for name, column in changed.items():
            for each, value in zip(members, column, strict=True):
                each[name] = value
    return stored


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


def _validate_column(
    column: Column, types: set[type], field: Field | None, check: _Check, depth: int
) -> Column:
    """A column with values of these types in its stored form; the same object if that is its own.

    Raises:
        _UnusualValueError, UnsupportedValueError: the entities must be validated one by one.
    """
    if types <= _SCALARS:
        if check.copies:
            check.size += len(column) * FLOAT_SIZE + _size_of_strings(column, types)
        column = _stored_numbers(column, types)
    else:
        column = _stored_containers(column, types, check, depth)
        types = _types_of(column)
    if field is not None and field.type != "json":
        if not types <= _ALLOWED_TYPES[field.type]:
            raise _UnusualValueError
        if field.type == "timestamp":
            if NoneType in types:
                check.nulls.add(field.name)
            column = _stored_timestamps(column, types)
    if field is not None and field.required and NoneType in types:
        raise _UnusualValueError
    if field is not None and field.references is not None:
        check.parents.setdefault(field.name, set()).update(set(column) - {None})
    return column


def _stored_containers(column: Column, types: set[type], check: _Check, depth: int) -> Column:
    """A column of dicts, lists or values of several types in its stored form."""
    if types == {dict} and depth <= MAX_DEPTH:
        groups = group_by_keys(column)
        if groups is not None:
            return _validated(column, groups, {}, check, depth)
    column = [normalise(each, depth=depth) for each in column]
    if check.copies:
        check.size += _JSON_SIZE_FACTOR * len(msgspec.json.encode(column))
    return column


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
        integers = column if types == {int} else [each for each in column if type(each) is int]
        if min(integers) < INT_MIN or max(integers) > INT_MAX:
            raise _UnusualValueError
    if float not in types:
        return column
    if not all(isfinite(each) for each in column if type(each) is float):
        raise _UnusualValueError
    if 0.0 not in column:  # -0.0 equals 0.0
        return column
    return [each + 0.0 if type(each) is float else each for each in column]


def _stored_timestamps(column: Column, types: set[type]) -> Column:
    """The timestamps in canonical form. A batch usually has few distinct ones, each parsed once."""
    # To find out that most are distinct would take longer than to parse each.
    are_distinct = column[:1] != column[1:2] and NoneType not in types
    distinct = column if are_distinct else list(set(column) - {None})
    if _are_canonical_timestamps(distinct):
        return column
    parsed = {each: parse_timestamp(each) for each in distinct}
    if None in parsed.values():
        raise _UnusualValueError
    return [None if each is None else parsed[each] for each in column]


def _are_canonical_timestamps(texts: Sequence[str]) -> bool:
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
    lengths = set(map(len, ids))
    # A character has at most four bytes in UTF-8.
    return min(lengths) > 0 and max(lengths) * 4 <= MAX_KEY_BYTES


def _are_light(texts: Iterable[bytes]) -> bool:
    return max(map(len, texts)) <= LIGHT_BYTES
