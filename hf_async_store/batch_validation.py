"""Many entities at once, column by column: checked and copied as `Collection.entity` does one.

The entities of a batch mostly have the same fields, with values of the same types. What a whole
column is takes one look, in C, instead of one at each value. Where anything is unusual this way
gives up: one by one tells what is to be done, and words the errors.
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
_MAX_KEY_GROUPS: Final = 8
"""How many entities must have the same fields, on average, for columns to be a gain."""

_NOT_UTF8: Final = re.compile("[\x00\ud800-\udfff]")
_SCALARS: Final = frozenset({str, bool, int, float, NoneType})
_KINDS: Final[Mapping[str, frozenset[type]]] = {
    "text": frozenset({str, NoneType}),
    "timestamp": frozenset({str, NoneType}),
    "integer": frozenset({int, NoneType}),
    "number": frozenset({int, float, NoneType}),
    "boolean": frozenset({bool, NoneType}),
}
_MAX_NUMBER_SIZE: Final = 32  # what a float weighs, by `entities`
_JSON_SIZE_FACTOR: Final = 8  # at most, for each byte


def group_by_keys(items: Sequence[Mapping[str, object]]) -> dict[tuple[str, ...], list[int]] | None:
    """The places of maps by their keys, as they follow one another; None where too few share them."""
    if len(items) < _MAX_KEY_GROUPS:
        return None
    keys = list(map(tuple, items))
    if keys.count(keys[0]) == len(keys):
        return {keys[0]: list(range(len(keys)))}
    places: dict[tuple[str, ...], list[int]] = {}
    for place, each in enumerate(keys):
        places.setdefault(each, []).append(place)
    return places if len(places) * _MAX_KEY_GROUPS <= len(keys) else None


def columns_of(items: Sequence[dict[str, Each]]) -> list[tuple[Each, ...]]:
    """The values of maps that have the same keys, by key."""
    return list(zip(*map(_VALUES, items), strict=True))


def validate_batch(
    collection: Collection, items: Sequence[Mapping[str, object]]
) -> list[tuple[Key, Entity]] | None:
    """The keys of whole entities, and portable, checked copies of them, `version` left out.

    None says nothing about them but that they are to be looked at one by one.
    """
    if _kinds(items) != {dict} or _kinds(list(chain.from_iterable(items))) != {str}:
        return None
    groups = group_by_keys(items)
    if groups is None or not all(_has_required_fields(collection, names) for names in groups):
        return None
    ids: list[Value] = [None] * len(items)
    entities = list(map(dict.copy, cast("Sequence[Entity]", items)))
    weight = 0
    for names, places in groups.items():
        mine = entities if len(groups) == 1 else [entities[place] for place in places]
        weight += len(mine) * (3 + sum(1 + len(name) for name in names))
        for name, given in zip(names, columns_of(mine), strict=True):
            try:
                column, more = _validate_column(given, collection.fields.get(name))
            except (_FallBackToScalar, UnsupportedValueError):
                return None
            weight += more
            if name == collection.key:
                for place, value in zip(places, column, strict=True):
                    ids[place] = value
            if name == VERSION:
                for each in mine:
                    del each[VERSION]
            elif column is not given:
                for each, value in zip(mine, column, strict=True):
                    each[name] = value
    texts = cast("list[str]", ids)
    if not _are_keys(texts) or (weight > MAX_ENTITY_BYTES and not _within_size_limit(entities)):
        return None
    return list(zip(map(Key, repeat(collection.name), texts), entities, strict=True))


class _FallBackToScalar(Exception):  # noqa: N818  # no error: it says which way to go
    pass


def _has_required_fields(collection: Collection, names: Sequence[str]) -> bool:
    """Whether the fields are there that are required, and all have names that can be stored."""
    text = "".join(names)
    required = collection.key in names and all(each in names for each in collection.required)
    return required and text.isascii() and "\x00" not in text


def _kinds(values: Sequence[object]) -> set[type]:
    kinds = list(map(type, values))
    # Mostly there is one, and to count it is quicker than to make a set.
    return {kinds[0]} if kinds and kinds.count(kinds[0]) == len(kinds) else set(kinds)


def _validate_column(column: Column, field: Field | None) -> tuple[Column, int]:
    """A column as it is stored, and a bound of what all of it weighs.

    Raises:
        _FallBackToScalar, UnsupportedValueError: one by one will tell.
    """
    kinds = _kinds(column)
    if kinds <= _SCALARS:
        weight = len(column) * _MAX_NUMBER_SIZE + _size_of_strings(column, kinds)
        _refuse_odd_numbers(column, kinds)
    else:
        column = [normalise(each) for each in column]
        kinds = _kinds(column)
        weight = _JSON_SIZE_FACTOR * len(msgspec.json.encode(column))
    if field is not None and field.type != "json":
        if not kinds <= _KINDS[field.type]:
            raise _FallBackToScalar
        if field.type == "timestamp":
            column = _normalized_timestamps(column)
    if field is not None and field.required and NoneType in kinds:
        raise _FallBackToScalar
    return column, weight


def _size_of_strings(column: Column, kinds: set[type]) -> int:
    if str not in kinds:
        return 0
    texts = cast("Sequence[str]", column)
    if len(kinds) > 1:
        texts = [each for each in column if type(each) is str]
    text = "".join(texts)
    if text.isascii():
        if "\x00" in text:
            raise _FallBackToScalar
        return len(text)
    if _NOT_UTF8.search(text):
        raise _FallBackToScalar
    return len(text.encode())


def _refuse_odd_numbers(column: Column, kinds: set[type]) -> None:
    if int in kinds:
        whole = [each for each in column if type(each) is int]
        if min(whole) < INT_MIN or max(whole) > INT_MAX:
            raise _FallBackToScalar
    if float in kinds and not all(isfinite(each) for each in column if type(each) is float):
        raise _FallBackToScalar


def _normalized_timestamps(column: Column) -> Column:
    """Timestamps in the fixed form; most of a batch are the same few."""
    texts = set(cast("Sequence[str | None]", column))
    moments = {each: None if each is None else parse_timestamp(each) for each in texts}
    if all(moment == each for each, moment in moments.items()):
        return column
    if any(moment is None for each, moment in moments.items() if each is not None):
        raise _FallBackToScalar
    return [moments[cast("str | None", each)] for each in column]


def _are_keys(ids: Sequence[str]) -> bool:
    # Four bytes are the most of a character.
    return min(map(len, ids)) > 0 and max(map(len, ids)) * 4 <= MAX_KEY_BYTES


def _within_size_limit(entities: Sequence[Entity]) -> bool:
    return max(map(len, map(msgspec.json.encode, entities))) <= LIGHT_BYTES
