"""Writing whole entities into a store: unconditionally, or merged with its content by a rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, TypeAlias

import msgspec

from hf_async_store.changes import ABSENT, Expect, check_version
from hf_async_store.errors import (
    AlreadyExistsError,
    BatchError,
    ConcurrencyConflictError,
    EntityNotFoundError,
    InvalidInputError,
    MigrationError,
    ReferenceViolationError,
    StorageError,
)
from hf_async_store.schema import Collection
from hf_async_store.strategy import StorageStrategy
from hf_async_store.values import UPDATED_AT, VERSION, Entity, canonical, version_of

MergeRule: TypeAlias = Literal["keep", "replace", "newest"]
"""How an incoming entity is treated if the store holds a different one with the same id:

* keep: the stored entity is kept.
* replace: the incoming entity replaces the stored one, including its version.
* newest: the entity with the later `updated_at` is stored. Missing and null are the earliest. If
  `updated_at` is equal, the greater version decides; if that is equal, too, the stored entity is
  kept.
"""

RULES: Final[tuple[MergeRule, ...]] = ("keep", "replace", "newest")
_TRIES: Final = 5


class Merged(msgspec.Struct):
    """How many incoming entities were written, equal to the stored ones, or not written because
    the stored entity was kept."""

    written: int = 0
    unchanged: int = 0
    kept: int = 0

    def add(self, other: Merged) -> None:
        self.written += other.written
        self.unchanged += other.unchanged
        self.kept += other.kept


def replaces(incoming: Entity, stored: Entity, rule: MergeRule) -> bool:
    """Whether `incoming` replaces the stored entity, which differs from it."""
    if rule == "newest":
        return _recency(incoming) > _recency(stored)
    return rule == "replace"


def _recency(entity: Entity) -> tuple[str, int]:
    updated_at = entity.get(UPDATED_AT)
    return updated_at if isinstance(updated_at, str) else "", version_of(entity)


async def put(
    store: StorageStrategy,
    collection: str,
    entities: Sequence[Entity],
    rule: MergeRule | None,
    *,
    stored: bool = True,
    sizes: Sequence[int] | None = None,
    waiting: list[Entity] | None = None,
) -> Merged:
    """Write a batch.

    Args:
        rule: None writes all entities and overwrites existing ones.
        stored: the entities were read from a store, so their values are known to be portable.
        sizes: the size of each entity in bytes of JSON, if known, for entities read from a store.
        waiting: a list to which entities are added whose parent does not exist yet; without it
            such an entity is an error.

    Raises:
        BatchError: some entities could not be written, and the first of them is named; all others
            were written.
        InvalidInputError: an entity is not valid; the error names it, and nothing was written.
    """
    writer = _BatchWriter(store, store.collections[collection], stored, waiting)
    if rule is None:
        return Merged(written=len(entities) - len(await writer.write(entities, sizes=sizes)))
    merged = Merged()
    remaining = list(entities)
    for _ in range(_TRIES):
        remaining = await _merge(writer, remaining, rule, merged)
        if not remaining:
            return merged
    raise MigrationError(
        f"{len(remaining):,} entities of {collection} were changed concurrently in each of {_TRIES} "
        "attempts to merge them; merge again when nothing else writes to the target"
    )


async def _merge(
    writer: _BatchWriter, entities: Sequence[Entity], rule: MergeRule, merged: Merged
) -> list[Entity]:
    """Merge a batch; returns the entities that were changed concurrently, which must be retried."""
    ids = writer.ids(entities)
    incoming: list[Entity] = []
    expected: dict[str, int | Expect] = {}
    stored_entities = await writer.store._get_stored(writer.declared.name, ids)
    for entity_id, entity, stored in zip(ids, entities, stored_entities, strict=True):
        if stored is None:
            expected[entity_id] = ABSENT
        elif canonical(stored) == canonical(entity):
            merged.unchanged += 1
            continue
        elif replaces(entity, stored, rule):
            expected[entity_id] = version_of(stored)
        else:
            merged.kept += 1
            continue
        incoming.append(entity)
    if not incoming:
        return []
    refused = await writer.write(incoming, expected, _CONFLICTS)
    merged.written += len(incoming) - len(refused)
    return [each for each, error in refused if isinstance(error, _CONFLICTS)]


_CONFLICTS: Final = (ConcurrencyConflictError, AlreadyExistsError, EntityNotFoundError)


class _BatchWriter(msgspec.Struct):
    """Writes batches of whole entities of one collection into a store."""

    store: StorageStrategy
    declared: Collection
    stored: bool
    waiting: list[Entity] | None

    def ids(self, entities: Sequence[Entity]) -> list[str]:
        return list(map(self.declared.id_of, entities))

    async def write(
        self,
        entities: Sequence[Entity],
        expected: dict[str, int | Expect] | None = None,
        tolerated: tuple[type[StorageError], ...] = (),
        *,
        sizes: Sequence[int] | None = None,
    ) -> list[tuple[Entity, StorageError]]:
        """Write entities; returns those that were refused because their parent is missing, or with
        one of the `tolerated` errors.

        Raises:
            BatchError, InvalidInputError: see `put`.
        """
        name = self.declared.name
        try:
            if self.stored:
                await self.store._import_stored(name, entities, expected, sizes=sizes)
            else:
                await self.store._import_restored(name, entities, expected)
        except BatchError as exc:
            return self._refused(entities, exc, tolerated)
        except InvalidInputError as exc:
            raise self._naming_entity(entities, exc) from exc
        return []

    def _refused(
        self, entities: Sequence[Entity], exc: BatchError, tolerated: tuple[type[StorageError], ...]
    ) -> list[tuple[Entity, StorageError]]:
        refused = [
            (entity, outcome)
            for entity, outcome in zip(entities, exc.outcomes, strict=True)
            if isinstance(outcome, StorageError)
        ]
        if self.waiting is not None:
            tolerated = (*tolerated, ReferenceViolationError)
        errors = [each for each in refused if not isinstance(each[1], tolerated)]
        if errors:
            entity, first = errors[0]
            raise BatchError(
                f"{len(errors):,} of {len(entities):,} entities could not be written; "
                f"{len(entities) - len(refused):,} were written; the first error: "
                f"{_message(self.declared, entity, first)}",
                exc.outcomes,
            ) from first
        if self.waiting is not None:
            self.waiting += [
                each for each, error in refused if isinstance(error, ReferenceViolationError)
            ]
        return refused

    def _naming_entity(
        self, entities: Sequence[Entity], exc: InvalidInputError
    ) -> InvalidInputError:
        """The error of a batch as an error that names the invalid entity."""
        for entity in entities:
            try:
                check_entity(self.declared, entity)
            except InvalidInputError as error:
                return error.at(name_of(self.declared, entity))
        return exc.at(self.declared.name)


def check_entity(declared: Collection, entity: Entity) -> None:
    """Check everything that an import checks: key, values, declared types, size, version.

    Raises:
        InvalidInputError: the entity is not valid.
    """
    check_version(entity.get(VERSION, 0), absent=False)
    declared.entity(entity)


def name_of(declared: Collection, entity: Entity) -> str:
    """The name of an entity in error messages."""
    return f"{declared.name} {entity.get(declared.key)!r}"


def _message(declared: Collection, entity: Entity, error: StorageError) -> str:
    """The message of an error, preceded by the name of the entity if the message lacks it."""
    message = str(error)
    is_named = declared.name in message and repr(entity.get(declared.key)) in message
    return message if is_named else f"{name_of(declared, entity)}: {message}"
