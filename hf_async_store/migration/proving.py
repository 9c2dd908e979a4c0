"""Proving a backup: that it is as it was written, and that all of it can be restored.

The digests say that nobody altered the file. They do not say that what was written can be stored, so
each entity is looked at as an import does: before the first of them is written anywhere.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from hf_async_store import batch_validation as columns
from hf_async_store.changes import check_version
from hf_async_store.errors import (
    ConfigurationError,
    InvalidFieldError,
    InvalidInputError,
    ReferenceViolationError,
)
from hf_async_store.migration.backup_format import Reading, damaged
from hf_async_store.migration.merge import name_of
from hf_async_store.schema import Collection
from hf_async_store.values import VERSION, Entity, Key

if TYPE_CHECKING:
    from hf_async_store.migration.digest import Digest
    from hf_async_store.schema import Field
    from hf_async_store.strategy import StorageStrategy

_MANY: Final = 50_000
_LOOKED_UP: Final = 500


async def check_portable(
    path: Path, schema: Mapping[str, Collection] | None = None, parents: Parents | None = None
) -> dict[str, Digest]:
    """Read a backup through and prove that it is whole, as it was written, and can be restored.

    Args:
        schema: declarations that its entities must fit, too.
        parents: is told of all entities.

    Returns:
        Its digests.

    Raises:
        CorruptionError: it is truncated or was altered, or an entity of it can be stored nowhere.
        InvalidFieldError: an entity does not fit its declaration.
        InvalidInputError: it is no portable backup.
    """
    reading = Reading(path)
    proof = _Proof(reading, path, schema)
    async with aclosing(reading.sections()) as sections:
        async for name, texts in sections:
            reading.digests[name].add_all(texts)
            entities = reading.entities(name, texts)
            declared = proof.take(name, entities)
            if parents is not None and schema is not None and name in schema:
                parents.take(declared, entities)
    reading.prove()
    return reading.digests


class _Proof:
    """Looks at entities, in the order in which they are in the file."""

    def __init__(
        self, reading: Reading, path: Path, schema: Mapping[str, Collection] | None
    ) -> None:
        self._reading = reading
        self._path = path
        self._schema = schema
        self._collections = dict(schema or {})
        self._last: dict[str, str] = {}

    def take(self, name: str, entities: list[Entity]) -> Collection:
        """Look at the next entities of a collection; returns what they were held against."""
        declared = self._declared(name)
        if columns.validate_batch(declared, entities) is None:
            for each in entities:
                self._check(declared, each)
        for each in entities:
            self._check_version(declared, each)
            self._check_order(declared, each)
        return declared

    def _declared(self, name: str) -> Collection:
        if name not in self._collections:
            header = self._reading.header
            assert header is not None, "read before any entity"
            key = next(each.key for each in header.collections if each.name == name)
            try:
                self._collections[name] = Collection(name, key=key)
            except ConfigurationError as exc:
                raise damaged(self._path, f"no store has such a collection: {exc}") from exc
        return self._collections[name]

    def _check(self, declared: Collection, entity: Entity) -> None:
        try:
            declared.entity(entity)
        except InvalidFieldError as exc:
            if self._schema is not None:  # else nothing is known of types
                raise exc.at(f"{self._path}, {name_of(declared, entity)}") from exc
        except InvalidInputError as exc:
            raise self._damaged(declared, entity, exc) from exc

    def _check_version(self, declared: Collection, entity: Entity) -> None:
        try:
            check_version(entity.get(VERSION, 0), absent=False)
        except InvalidInputError as exc:
            raise self._damaged(declared, entity, exc) from exc

    def _check_order(self, declared: Collection, entity: Entity) -> None:
        """By id: so no entity comes twice."""
        entity_id = cast("str", entity[declared.key])
        if entity_id <= self._last.get(declared.name, ""):
            raise damaged(
                self._path, f"{name_of(declared, entity)} comes twice, or not in the order of ids"
            )
        self._last[declared.name] = entity_id

    def _damaged(self, declared: Collection, entity: Entity, exc: InvalidInputError) -> Exception:
        return damaged(self._path, f"{name_of(declared, entity)} can be stored nowhere: {exc}")


class Parents:
    """Which parents the entities of a backup name that are not in it.

    It remembers eight bytes of each entity that can be a parent. Two that are taken for one would be
    a missing parent that is found out only when its child is written.
    """

    def __init__(self, schema: Mapping[str, Collection]) -> None:
        referred = {
            cast("str", field.references) for each in schema.values() for field in each.references
        }
        self._there = {name: array("q") for name in referred}
        self._is_sorted = dict.fromkeys(referred, True)
        self._wanted: dict[Key, str] = {}
        self._last: str | None = None

    def take(self, declared: Collection, entities: list[Entity]) -> None:
        """Look at the next entities of the file."""
        if declared.name != self._last or len(self._wanted) > _MANY:
            self._settle()  # parents mostly come as a whole before their children
            self._last = declared.name
        if declared.name in self._there:
            self._there[declared.name].extend(hash(each[declared.key]) for each in entities)
            self._is_sorted[declared.name] = False
        for field in declared.references:
            self._want(declared, field, entities)

    def _want(self, declared: Collection, field: Field, entities: list[Entity]) -> None:
        parent = cast("str", field.references)
        for entity in entities:
            value = entity.get(field.name)
            if isinstance(value, str):
                self._wanted.setdefault(
                    Key(parent, value), f"{name_of(declared, entity)}: {field.name}"
                )

    def _settle(self) -> None:
        for name in {each.collection for each in self._wanted}:
            if not self._is_sorted[name]:
                self._there[name] = array("q", sorted(self._there[name]))
                self._is_sorted[name] = True
        self._wanted = {key: who for key, who in self._wanted.items() if not self._has(key)}

    def _has(self, key: Key) -> bool:
        there, wanted = self._there[key.collection], hash(key.id)
        place = bisect_left(there, wanted)
        return place < len(there) and there[place] == wanted

    async def refuse_missing(self, store: StorageStrategy) -> None:
        """Refuse what names a parent that is neither in the file nor in the store.

        Raises:
            ReferenceViolationError: naming the first.
        """
        self._settle()
        wanted = list(self._wanted)
        for start in range(0, len(wanted), _LOOKED_UP):
            for name in {each.collection for each in wanted[start : start + _LOOKED_UP]}:
                keys = [k for k in wanted[start : start + _LOOKED_UP] if k.collection == name]
                found = await store.get_entities(name, [each.id for each in keys])
                for key, there in zip(keys, found, strict=True):
                    if there is None:
                        raise ReferenceViolationError(
                            f"{self._wanted[key]} names {key.id!r}, which {name} has neither in the "
                            "backup nor in the store"
                        )
