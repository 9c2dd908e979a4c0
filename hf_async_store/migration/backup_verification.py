"""Verifying a backup: that it was not altered, and that all of its entities can be restored.

The digests show that the file was not altered. They do not show that its entities can be stored, so
each entity is also checked like an import checks it, before the first one is written.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from hf_async_store import batch_validation
from hf_async_store.changes import check_version
from hf_async_store.errors import (
    ConfigurationError,
    InvalidFieldError,
    InvalidInputError,
    ReferenceViolationError,
)
from hf_async_store.event_loop import Chunks
from hf_async_store.migration.backup_format import PortableReader, damaged
from hf_async_store.migration.merge import name_of
from hf_async_store.schema import Collection
from hf_async_store.values import VERSION, Entity, Key

if TYPE_CHECKING:
    from hf_async_store.migration.digest import Digest
    from hf_async_store.schema import Field
    from hf_async_store.strategy import StorageStrategy

_MAX_WANTED: Final = 50_000
"""So many references are collected before they are looked up among the known parents."""

_FETCH_SIZE: Final = 500
_CHUNK_SIZE: Final = 500
"""How many entities are checked in one step."""


async def check_portable(
    path: Path, schema: Mapping[str, Collection] | None = None, parents: Parents | None = None
) -> dict[str, Digest]:
    """Read a whole backup, and verify that it is complete, was not altered, and can be restored.

    Args:
        schema: declarations that the entities must fit, too.
        parents: receives the entities, to check their references.

    Returns:
        The digest of each collection.

    Raises:
        CorruptionError: the file is truncated or was altered, or an entity cannot be stored in any
            store.
        InvalidFieldError: an entity does not fit its declaration.
        InvalidInputError: the file is not a portable backup.
    """
    reader = PortableReader(path)
    checker = _EntityChecker(reader, path, schema, dict(schema or {}))
    async with aclosing(reader.sections()) as sections:
        async for name, encoded in sections:
            reader.digests[name].add_all(encoded)
            async for lines in Chunks(encoded, _CHUNK_SIZE):
                entities = reader.entities(name, lines)
                declared = checker.check(name, entities)
                if parents is not None and schema is not None and name in schema:
                    parents.add(declared, entities)
    reader.verify_digests()
    return reader.digests


class _EntityChecker(msgspec.Struct):
    """Checks entities, in the order in which they are in the file."""

    reader: PortableReader
    path: Path
    schema: Mapping[str, Collection] | None
    collections: dict[str, Collection]
    last_ids: dict[str, str] = {}

    def check(self, name: str, entities: list[Entity]) -> Collection:
        """Check the next entities of a collection; returns the declaration that was applied."""
        declared = self._declared(name)
        if batch_validation.validate_batch(declared, entities) is None:
            for each in entities:
                self._check_entity(declared, each)
        for each in entities:
            self._check_version(declared, each)
            self._check_order(declared, each)
        return declared

    def _declared(self, name: str) -> Collection:
        if name not in self.collections:
            header = self.reader.header
            assert header is not None, "the header is read before any entity"
            key = next(each.key for each in header.collections if each.name == name)
            try:
                self.collections[name] = Collection(name, key=key)
            except ConfigurationError as exc:
                raise damaged(self.path, f"it holds an invalid collection: {exc}") from exc
        return self.collections[name]

    def _check_entity(self, declared: Collection, entity: Entity) -> None:
        try:
            declared.entity(entity)
        except InvalidFieldError as exc:
            if self.schema is not None:  # without a schema, the declared types are unknown
                raise exc.at(f"{self.path}, {name_of(declared, entity)}") from exc
        except InvalidInputError as exc:
            raise self._damaged(declared, entity, exc) from exc

    def _check_version(self, declared: Collection, entity: Entity) -> None:
        try:
            check_version(entity.get(VERSION, 0), absent=False)
        except InvalidInputError as exc:
            raise self._damaged(declared, entity, exc) from exc

    def _check_order(self, declared: Collection, entity: Entity) -> None:
        """Entities are sorted by id, so no entity occurs twice."""
        entity_id = declared.id_of(entity)
        if entity_id <= self.last_ids.get(declared.name, ""):
            raise damaged(
                self.path,
                f"{name_of(declared, entity)} occurs twice, or the entities are not sorted by id",
            )
        self.last_ids[declared.name] = entity_id

    def _damaged(self, declared: Collection, entity: Entity, exc: InvalidInputError) -> Exception:
        return damaged(
            self.path, f"{name_of(declared, entity)} cannot be stored in any store: {exc}"
        )


class Parents:
    """Finds the parents that entities of a backup refer to and that are not in the backup.

    It keeps an eight-byte hash of the id of each entity that can be a parent. If two hashes collide,
    a missing parent is found only when its child is written.
    """

    def __init__(self, schema: Mapping[str, Collection]) -> None:
        referenced = {field.parent for each in schema.values() for field in each.references}
        self._hashes = {name: array("q") for name in referenced}
        self._is_sorted = dict.fromkeys(referenced, True)
        self._wanted: dict[Key, str] = {}
        self._last: str | None = None

    def add(self, declared: Collection, entities: list[Entity]) -> None:
        """Add the next entities of the file."""
        if declared.name != self._last or len(self._wanted) > _MAX_WANTED:
            self._drop_known()  # most parents precede all of their children in the file
            self._last = declared.name
        if declared.name in self._hashes:
            self._hashes[declared.name].extend(hash(each[declared.key]) for each in entities)
            self._is_sorted[declared.name] = False
        for field in declared.references:
            self._add_references(declared, field, entities)

    def _add_references(self, declared: Collection, field: Field, entities: list[Entity]) -> None:
        for entity in entities:
            value = entity.get(field.name)
            if isinstance(value, str):
                child = f"{name_of(declared, entity)}: {field.name}"
                self._wanted.setdefault(Key(field.parent, value), child)

    def _drop_known(self) -> None:
        """Drop the references to parents that the file has contained so far."""
        for name in {each.collection for each in self._wanted}:
            if not self._is_sorted[name]:
                self._hashes[name] = array("q", sorted(self._hashes[name]))
                self._is_sorted[name] = True
        self._wanted = {key: child for key, child in self._wanted.items() if not self._has(key)}

    def _has(self, key: Key) -> bool:
        hashes, wanted = self._hashes[key.collection], hash(key.id)
        index = bisect_left(hashes, wanted)
        return index < len(hashes) and hashes[index] == wanted

    async def refuse_missing(self, store: StorageStrategy) -> None:
        """Refuse references to parents that are neither in the file nor in the store.

        Raises:
            ReferenceViolationError: a parent is missing; the error names the first reference.
        """
        self._drop_known()
        wanted = list(self._wanted)
        for start in range(0, len(wanted), _FETCH_SIZE):
            batch = wanted[start : start + _FETCH_SIZE]
            for name in {each.collection for each in batch}:
                keys = [each for each in batch if each.collection == name]
                stored = await store._get_stored(name, [each.id for each in keys])
                for key, parent in zip(keys, stored, strict=True):
                    if parent is None:
                        raise ReferenceViolationError(
                            f"{self._wanted[key]} refers to {name} {key.id!r}, which is neither in "
                            "the backup nor in the store. Create it in the store, or declare the "
                            "field with enforced=False"
                        )
