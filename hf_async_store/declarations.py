"""The declarations that a store remembers: their JSON form, and how those of several programs are merged.

A declaration that was read from a store is data: names, types, keys, references, indexes, expiry, feeds.
It is checked like a declaration of a program, and nothing in it is run, opened or expanded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from itertools import chain
from typing import Final, cast

import msgspec

from hf_async_store.errors import (
    ConfigurationError,
    CorruptionError,
    NewerFormatError,
    SchemaMismatchError,
)
from hf_async_store.recorded_expiry import RecordedExpire, declared_expire, recorded_expire
from hf_async_store.schema import Collection, Field, Index, Schema
from hf_async_store.values import Entity

FORMAT: Final = 3
"""Format 2 contains unique indexes, format 3 change feeds. Declarations are written in the lowest format
that can express them."""


class _Recorded(msgspec.Struct, frozen=True, omit_defaults=True):
    """One collection in its JSON form. The key is not among the fields."""

    name: str
    key: str
    fields: list[Field]
    indexes: list[Index]
    expires: RecordedExpire | None = None
    feed: timedelta | None = None

    def declared(self) -> Collection:
        declared = Collection(
            self.name,
            key=self.key,
            fields=self.fields,
            indexes=self.indexes,
            expires=declared_expire(self.expires),
            feed=self.feed,
        )
        recorded_expire(declared)  # validates its filter
        return declared


class _Document(msgspec.Struct, frozen=True):
    collections: list[_Recorded]


class _Header(msgspec.Struct, frozen=True):
    format: int


def encoded(collections: Iterable[Collection]) -> Entity:
    """The JSON form of declarations."""
    recorded = [_recorded(each) for each in collections]
    return {
        "format": _format_of(recorded),
        **cast("Entity", msgspec.to_builtins(_Document(recorded))),
    }


def _format_of(recorded: Iterable[_Recorded]) -> int:
    if any(each.feed is not None for each in recorded):
        return 3
    return 2 if any(index.unique for each in recorded for index in each.indexes) else 1


def _recorded(collection: Collection) -> _Recorded:
    fields = [each for each in collection.fields.values() if each.name != collection.key]
    return _Recorded(
        collection.name,
        collection.key,
        fields,
        list(collection.indexes),
        recorded_expire(collection),
        collection.feed,
    )


def decoded(document: object, where: str) -> list[Collection]:
    """The declarations in their JSON form.

    Args:
        where: the place they were read from, for errors.

    Raises:
        CorruptionError: they are invalid.
        NewerFormatError: they were written by a newer version of this package.
    """
    try:
        found = msgspec.convert(document, _Header).format
        if found > FORMAT:
            raise NewerFormatError(
                f"the declarations in {where} have format {found}; this version reads format {FORMAT}"
            )
        collections = [each.declared() for each in msgspec.convert(document, _Document).collections]
    except (msgspec.ValidationError, ConfigurationError, UnicodeEncodeError) as exc:
        raise damaged(where, f"invalid: {exc}") from exc
    if len({each.name for each in collections}) < len(collections):
        raise damaged(where, "invalid: a collection occurs twice")
    return collections


def damaged(where: str, problem: str) -> CorruptionError:
    """The error for recorded declarations that cannot be read."""
    return CorruptionError(
        f"the declarations in {where} are {problem}. The entities are not concerned. Restore the "
        "declarations from a backup"
    )


def other_key(collection: str, stored: str, declared: str) -> SchemaMismatchError:
    """The error for a declaration by which entities would be written that other programs cannot read.

    Args:
        stored: the key of the collection in the store.
    """
    return SchemaMismatchError(
        f"the key of the collection {collection!r} is {stored!r} in this store, but {declared!r} is "
        f"declared: declare the key {stored!r}, or another collection, into which you copy the entities"
    )


def merged(recorded: Iterable[Collection], declared: Iterable[Collection]) -> list[Collection]:
    """The recorded declarations, with those of a program added.

    Collections, fields, indexes, expiry and feeds that only other programs declare stay; of two retentions
    of a feed the longer one counts. If a field or the expiry is declared differently, the program is
    followed; but an index stays unique, and its fields stay of types that can be indexed. A collection that
    it declares with another key stays as it was.
    """
    result = {each.name: each for each in recorded}
    for each in declared:
        known = result.get(each.name)
        if known is None:
            result[each.name] = each
        elif known.key == each.key:
            result[each.name] = _merged(known, each)
    return list(result.values())


def _merged(recorded: Collection, declared: Collection) -> Collection:
    fields = {**recorded.fields, **declared.fields}
    del fields[recorded.key]
    for name in chain.from_iterable(recorded.unique):
        if fields[name].type == "json":
            fields[name] = recorded.fields[name]
    indexes = {each.name: each for each in recorded.indexes}
    for each in declared.indexes:
        if each.name not in indexes or each.unique:
            indexes[each.name] = each
    usable = [
        each
        for each in indexes.values()
        if all(name == recorded.key or fields[name].type != "json" for name in each.fields)
    ]
    expires = declared.expires or recorded.expires
    if expires is not None and fields[expires.field].type != "timestamp":
        expires = None
    return Collection(
        recorded.name,
        key=recorded.key,
        fields=fields.values(),
        indexes=usable,
        expires=expires,
        feed=longest([recorded.feed, declared.feed]),
    )


def longest(retentions: Iterable[timedelta | None]) -> timedelta | None:
    """The longest retention of a feed; None if there is none."""
    return max((each for each in retentions if each is not None), default=None)


def are_equal(first: Iterable[Collection], second: Iterable[Collection]) -> bool:
    """Whether two lists of collections have equal declarations."""
    return encoded(first) == encoded(second)


def schema_of_recorded(collections: Sequence[Collection]) -> Schema:
    """The schema of all recorded collections.

    The references of several programs may contradict one another: they may form a cycle, or refer to a
    collection that was not recorded. Then they are documentation only, as with `enforced=False`.
    """
    try:
        return Schema(collections)
    except ConfigurationError:
        return Schema(
            Collection(
                each.name,
                key=each.key,
                fields=[
                    msgspec.structs.replace(field, enforced=False)
                    for field in each.fields.values()
                    if field.name != each.key
                ],
                indexes=each.indexes,
                expires=each.expires,
                feed=each.feed,
            )
            for each in collections
        )
