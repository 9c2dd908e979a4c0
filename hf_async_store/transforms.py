"""Transforms: functions that change the stored entities of a collection together with its declaration.

A transform is called with each entity, and returns the fields to change, as for `update_entity`. What was
transformed is recognised by calling it again: it must then change nothing. So no position is stored, an
interrupted run is completed by another one, and entities that old programs write later are transformed
by the next run. For each entity that it changes, this is checked before the entity is written.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

from hf_async_store.arguments import check_callable, check_mapping
from hf_async_store.driver import Engine, SchemaChange, SchemaProgress
from hf_async_store.entity_rewriting import NewFields, reporting, rewrite
from hf_async_store.errors import InvalidInputError
from hf_async_store.schema import Collection, Schema
from hf_async_store.values import UPDATED_AT, VERSION, Entity, Removed, canonical, copy_entity

Transform: TypeAlias = Callable[
    [Entity], "Mapping[str, object] | None | Awaitable[Mapping[str, object] | None]"
]
Transforms: TypeAlias = Mapping[str, Transform]
"""By the name of a collection."""


def check_transforms(transforms: Transforms, schema: Schema) -> None:
    """Check the argument of a caller.

    Raises:
        InvalidInputError: it is not a dict of functions.
        UnknownCollectionError: a collection is not declared.
    """
    check_mapping(transforms, "transform")
    for name, each in transforms.items():
        check_callable(each, f"the transform of {schema[name].name}")


async def transform(
    engine: Engine, collection: Collection, function: Transform, progress: SchemaProgress
) -> int:
    """Apply a transform to all entities of a collection; returns how many it has changed.

    Raises:
        InvalidInputError: the transform changes an entity that it has transformed again.
        InvalidFieldError, UnsupportedValueError: it returned something that cannot be stored.
        StorageError: as `rewrite`.
        Exception: the transform raised it; a note names the entity.
    """
    described = SchemaChange("transform", collection.name, "", "transform the entities")

    async def change(entity: Entity) -> NewFields:
        try:
            return await _new_fields(collection, entity, function)
        except Exception as exc:
            exc.add_note(f"in the transform of {collection.name} {collection.id_of(entity)!r}")
            raise

    return await rewrite(engine, collection, change, reporting(progress, described))


async def _new_fields(collection: Collection, entity: Entity, function: Transform) -> NewFields:
    """The fields that a transform changes in an entity."""
    fields = await _changed_fields(collection, entity, function)
    if fields:
        changed = {**entity, **fields}
        transformed = {
            name: each for name, each in changed.items() if not isinstance(each, Removed)
        }
        if again := await _changed_fields(collection, transformed, function):
            raise InvalidInputError(
                f"the transform of {collection.name} would change {collection.id_of(entity)!r} each "
                f"time it is run, in {', '.join(again)}: it must return nothing for an entity that it "
                "has transformed already"
            )
    return fields


async def _changed_fields(collection: Collection, entity: Entity, function: Transform) -> NewFields:
    """The validated fields that a function returns, without those that are so already."""
    result = function(copy_entity(entity))
    returned = await result if inspect.isawaitable(result) else result
    if returned is None:
        return {}
    fields = collection.changes(collection.id_of(entity), returned)
    return {
        name: each
        for name, each in fields.items()
        if name not in (UPDATED_AT, VERSION) and not _is_stored(entity, name, each)
    }


def _is_stored(entity: Entity, name: str, value: object) -> bool:
    if isinstance(value, Removed) or name not in entity:
        return isinstance(value, Removed) and name not in entity
    return canonical(entity[name]) == canonical(value)
