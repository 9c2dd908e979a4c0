"""How a change applies to a stored row: its precondition, its references, and the new row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, cast

import msgspec

from hf_async_store.changes import ABSENT, ANY, PRESENT, Change, ChangeMarker, Delete, Patch, Put
from hf_async_store.errors import ConcurrencyConflictError, CorruptionError
from hf_async_store.field_operations import FieldChange
from hf_async_store.preconditions import (
    check,
    check_parents,
    is_there,
    missing_parents,
    next_version,
    patched,
    present,
)
from hf_async_store.query import MISSING
from hf_async_store.schema import Schema
from hf_async_store.sort_bytes import sort_bytes
from hf_async_store.strategies.sql.grammar import decode_json
from hf_async_store.strategies.sql.rows import Table
from hf_async_store.unique import digest
from hf_async_store.values import (
    CREATED_AT,
    LIGHT_BYTES,
    VERSION,
    Entity,
    Key,
    Removed,
    Value,
    check_size,
)


class Stored(msgspec.Struct, frozen=True, gc=False):
    """A row: its version, its document, and its key columns.

    Attributes:
        keys: those of `Table.columns`; empty if they were not read; of a stored row also None for a key
            column that no change sets.
    """

    version: int
    doc: str
    keys: tuple[bytes | None, ...] = ()


class _Created(msgspec.Struct):
    created_at: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_MAY_CREATE: Final = (ANY, ABSENT)
_decode_created: Final = msgspec.json.Decoder(_Created).decode
decode_members: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
"""The members of a document, which are not decoded."""

_DAMAGED: Final = (ValueError, TypeError)


def new_row(table: Table, change: Change, stored: Stored | None) -> Stored | None:
    """The row after a change; None if it is deleted.

    Raises:
        AlreadyExistsError, EntityNotFoundError, ConcurrencyConflictError: the precondition is not met.
        UnsupportedValueError: the entity is too large, or its version cannot be increased.
        CorruptionError: the stored row cannot be decoded.
    """
    if stored is None and type(change) is Put and change.expect in _MAY_CREATE:
        return _created(table, change)
    actual = None if stored is None else stored.version
    if actual is not None and (type(actual) is not int or actual < 0):
        raise table.damaged(change.key.id, ValueError(f"version is {actual!r}"))
    unmet = change.expect is not ANY and change.expect != actual
    if unmet and (stored is None or change.expect is not PRESENT):
        check(change.key, change.expect, actual, entity_of(table, change.key, stored))
    if isinstance(change, Delete):
        return None
    if isinstance(change, Put) and change.import_version is not None:
        return _row_of(table, change.entity, change.import_version)
    version = next_version(change.key, actual)
    try:
        assert stored is not None, "the change of an absent entity was refused"
        if isinstance(change, Put):
            return _row_of(table, _whole(change, stored), version)
        return _patched(table, change, stored, version)
    except _DAMAGED as exc:
        raise table.damaged(change.key.id, exc) from exc


def expires(change: Change, collection: str) -> bool:
    """Whether the entities of a collection may have expired for a change."""
    return change.lifetimes is not None and collection in change.lifetimes


def present_row(table: Table, change: Change, stored: Stored | None) -> Stored | None:
    """The row to which a change applies; None if its entity has expired: see `preconditions.present`.

    Args:
        stored: with its document, if the entity may have expired.
    """
    if stored is None or not expires(change, change.key.collection):
        return stored
    try:
        entity = entity_of(table, change.key, stored)
    except CorruptionError:
        if isinstance(change, Delete) and change.expect is ANY:
            return stored  # a damaged entity can still be deleted
        raise
    return None if present(change, entity) is None else stored


def row_is_there(table: Table, change: Change, key: Key, doc: str) -> bool:
    """Whether the entity of a row exists for a change: see `preconditions.is_there`.

    Args:
        doc: its document; it is not read if the entity cannot have expired.
    """
    if not expires(change, key.collection):
        return True
    return is_there(change, key, table.entity((key.id, doc, 0)))


def _created(table: Table, change: Put) -> Stored:
    entity, version = change.entity, change.import_version
    if version is None:
        version = 1
        if CREATED_AT not in entity:
            entity = {CREATED_AT: change.written_at, **entity}
    return _row_of(table, entity, version)


def _row_of(table: Table, entity: Entity, version: int) -> Stored:
    return Stored(version, table.grammar.encode(entity), table.keys(entity))


def entity_of(table: Table, key: Key, stored: Stored | None) -> Entity | None:
    """The entity of a row."""
    return None if stored is None else table.entity((key.id, stored.doc, stored.version))


def _whole(change: Put, stored: Stored) -> Entity:
    """A whole entity with its `created_at`."""
    if CREATED_AT not in change.entity:
        kept = _decode_created(stored.doc).created_at
        if kept is not msgspec.UNSET:
            return {CREATED_AT: decode_json(kept), **change.entity}
    return change.entity


def _patched(table: Table, change: Patch, stored: Stored, version: int) -> Stored:
    """The row of an entity of which some fields are changed."""
    members: dict[str, Any] = decode_members(stored.doc)
    for name, value in change.fields.items():
        if type(value) is Removed:
            members.pop(name, None)
        elif type(value) is FieldChange:
            return _computed(table, change, stored, version)
        else:
            members[name] = value
    doc = encoded_document(table, members)
    if len(stored.keys) < len(table.columns):
        return Stored(version, doc, table.keys(decode_json(doc)))
    keys = list(stored.keys)
    for number, name in enumerate(table.key_fields):
        if name in change.fields:
            keys[number] = sort_bytes(members.get(name, MISSING))
    for number, fields in enumerate(table.unique, len(table.key_fields)):
        if not change.fields.keys().isdisjoint(fields):
            keys[number] = digest(_decoded(members, fields), fields, table.collection)
    return Stored(version, doc, tuple(keys))


def encoded_document(table: Table, members: Any) -> str:
    """The document of an entity, some members of which may not be decoded.

    Raises:
        UnsupportedValueError: the entity is too large.
    """
    doc = table.grammar.encode(members)
    if len(doc) > LIGHT_BYTES:
        check_size(decode_json(doc))
    return doc


def _decoded(members: Mapping[str, object], names: Iterable[str]) -> dict[str, Value]:
    """Some members of a document of which the unchanged ones are not decoded."""
    found = {name: members[name] for name in names if name in members}
    return {
        name: decode_json(each) if type(each) is msgspec.Raw else cast("Value", each)
        for name, each in found.items()
    }


def _computed(table: Table, change: Patch, stored: Stored, version: int) -> Stored:
    """As `_patched`, if some value is computed from the stored one."""
    entity = patched(decode_json(stored.doc), change.fields, 0)
    del entity[VERSION]
    check_size(entity)
    return _row_of(table, entity, version)


def parents_of(schema: Schema, change: Change) -> list[Key]:
    """The entities to which a change refers, except itself."""
    if isinstance(change, Delete):
        return []
    fields = change.entity if isinstance(change, Put) else change.fields
    found: list[Key] = []
    for field in schema[change.key.collection].references:
        parent = fields.get(field.name)
        if isinstance(parent, str):
            key = Key(field.parent, parent)
            if key != change.key:
                found.append(key)
    return found


def refuse_missing_parents(
    schema: Schema,
    table: Table,
    change: Change,
    stored: Stored | None,
    exists: Callable[[Key], bool],
) -> None:
    """Refuse a change that refers to a missing parent, unless the stored entity does so already.

    Raises:
        ReferenceViolationError.
    """
    if missing_parents(schema, change, exists):
        check_parents(schema, change, entity_of(table, change.key, stored), exists)


def keys_by_collection(keys: Iterable[Key]) -> dict[str, list[str]]:
    """The distinct ids of keys, sorted, by collection."""
    found: dict[str, set[str]] = {}
    for key in keys:
        found.setdefault(key.collection, set()).add(key.id)
    return {collection: sorted(ids) for collection, ids in found.items()}


def marker_put(mark: ChangeMarker, at: str) -> Put:
    """The change that writes a change marker with its version."""
    entity = dict(mark.entity)
    version = cast("int", entity.pop(VERSION, 0))
    return Put(mark.key, entity, at, import_version=version)


def changed_since_read(key: Key) -> ConcurrencyConflictError:
    """The error of a transaction that relies on an entity that it read."""
    return ConcurrencyConflictError(
        f"{key.collection} {key.id!r} was changed after this transaction had read it: try again",
        collection=key.collection,
        entity_id=key.id,
        retryable=True,
    )
