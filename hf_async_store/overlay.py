"""The uncommitted changes of a session, for engines that have the stored entities in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import cast

from hf_async_store.changes import Change, Delete, Outcome
from hf_async_store.claim_records import claim_key
from hf_async_store.errors import StorageError
from hf_async_store.preconditions import (
    changed,
    check_children,
    check_parents,
    is_there,
    present,
)
from hf_async_store.schema import Collection, Field, Schema
from hf_async_store.unique import Claims, Fields, claimed, stored_digest
from hf_async_store.values import VERSION, Entity, Key


class Overlay:
    """Uncommitted changes above stored entities, in layers: one, and one more for each savepoint.

    Neither the stored entities nor those of the overlay may be modified; they are replaced.

    Args:
        schema: of the store.
        stored: the committed entities. An engine that loads them when they are needed loads before `apply`
            the entity of the change; of a deletion, and of a change with `lifetimes`, also its
            `claim_key`; with references, the parents, and for a deletion the children; with unique
            indexes, the owners of the values.
        references: whether references are enforced.
        owners: returns the ids of the stored entities that may have the values of a digest in the fields
            of a unique index of a collection (see `unique`). Without it, all entities are read.
    """

    def __init__(
        self,
        schema: Schema,
        stored: Mapping[Key, Entity],
        *,
        references: bool,
        owners: Callable[[str, Fields, bytes], Iterable[str]] | None = None,
    ) -> None:
        self._schema = schema
        self._stored = stored
        self._references = references
        self._layers: list[dict[Key, Entity | None]] = [{}]
        self._claims = Claims(self.get, owners or self._owners) if schema.unique else None

    @property
    def changes(self) -> Mapping[Key, Entity | None]:
        """The changed entities; None for a deleted one. No savepoint may be open."""
        [layer] = self._layers
        return layer

    def get(self, key: Key) -> Entity | None:
        """The current entity; None if there is none."""
        for layer in reversed(self._layers):
            if key in layer:
                return layer[key]
        return self._stored.get(key)

    def entities(self, collection: str) -> Iterator[tuple[str, Entity]]:
        """The ids and entities of a collection, in no particular order; reads all collections."""
        written: dict[Key, Entity | None] = {}
        for layer in self._layers:
            written.update(layer)
        for key, entity in self._stored.items():
            if key.collection == collection and key not in written:
                yield key.id, entity
        for key, changed_entity in written.items():
            if key.collection == collection and changed_entity is not None:
                yield key.id, changed_entity

    def written(self, collection: str) -> dict[str, Entity | None]:
        """The changed entities of a collection by id; None for a deleted one."""
        return {
            key.id: entity
            for layer in self._layers
            for key, entity in layer.items()
            if key.collection == collection
        }

    def apply(self, change: Change) -> Outcome:
        """Apply one change, with its change marker, to the top layer; a deletion, or the replacement
        of an entity that has expired, also ends a claim.

        Returns the new version, for a deletion the version that it deleted or None; or its error.
        """
        try:
            stored = self.get(change.key)
            current = present(change, stored)
            entity = changed(change, current)
            if self._references:
                self._check_references(change, current)
            if entity is not None and self._claims is not None:
                name = change.key.collection
                values = claimed(name, self._schema.unique.get(name, ()), current, entity)
                self._claims.check(change.key, list(values), partial(is_there, change))
        except StorageError as exc:
            return exc
        if entity is not None or current is not None:
            self._layers[-1][change.key] = entity
        ended = entity is None or (current is None and stored is not None)
        if ended and self.get(claim := claim_key(change.key)) is not None:
            self._layers[-1][claim] = None
        if change.mark is not None:
            self._layers[-1][change.mark.key] = change.mark.entity
        affected = current if isinstance(change, Delete) else entity
        return None if affected is None else cast("int", affected[VERSION])

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Leaving the context by an exception discards the changes made in it."""
        depth = len(self._layers)
        self._layers.append({})
        try:
            yield
        except BaseException:
            del self._layers[depth:]
            raise
        top = self._layers.pop()
        self._layers[-1].update(top)

    def _check_references(self, change: Change, current: Entity | None) -> None:
        if not isinstance(change, Delete):

            def exists(key: Key) -> bool:
                parent = self.get(key)
                if parent is None or change.lifetimes is None:  # the usual case
                    return parent is not None
                return is_there(change, key, parent)

            check_parents(self._schema, change, current, exists)
        elif current is not None:
            check_children(self._schema, change.key, self._referrers)

    def _referrers(self, child: Collection, field: Field, parent: str) -> Iterator[str]:
        for entity_id, entity in self.entities(child.name):
            if entity.get(field.name) == parent:
                yield entity_id

    def _owners(self, collection: str, fields: Fields, digest: bytes) -> Iterator[str]:
        for entity_id, entity in self.entities(collection):
            if stored_digest(entity, fields) == digest:
                yield entity_id
