"""Entities into a store: as they are into an empty one, or by a rule beside what is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, TypeAlias, cast

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
from hf_async_store.repository import RepositoryInterface
from hf_async_store.schema import Collection
from hf_async_store.values import UPDATED_AT, VERSION, Entity, canonical

MergeRule: TypeAlias = Literal["keep", "replace", "newest"]
"""What becomes of an entity that is there already, and differs:

* keep: it stays.
* replace: the one that arrives takes its place, with its version.
* newest: the one with the later `updated_at` stays or comes. Missing and null are the earliest; of
  equal ones that with the greater version, and of equal versions the one that is there.
"""

RULES: Final[tuple[MergeRule, ...]] = ("keep", "replace", "newest")
_TRIES: Final = 5


class Merged(msgspec.Struct):
    """What became of entities that arrived."""

    written: int = 0
    unchanged: int = 0
    kept: int = 0

    def add(self, other: Merged) -> None:
        self.written += other.written
        self.unchanged += other.unchanged
        self.kept += other.kept


def resolve(arriving: Entity, there: Entity, rule: MergeRule) -> bool:
    """Whether `arriving` takes the place of an entity that differs from it."""
    if rule == "newest":
        return _age(arriving) > _age(there)
    return rule == "replace"


def _age(entity: Entity) -> tuple[str, int]:
    moment = entity.get(UPDATED_AT)
    return moment if isinstance(moment, str) else "", cast("int", entity[VERSION])


async def put(
    store: RepositoryInterface,
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
        rule: None writes all of it, over whatever is there.
        stored: the entities come out of a store, so their values are portable for certain.
        sizes: of the JSON of each in bytes, where that is known of what comes out of a store.
        waiting: takes the entities whose parent is not there yet; without it they are errors.

    Raises:
        BatchError: some could not be written, the first of them is named; the others were.
        InvalidInputError: naming the entity; nothing was written.
    """
    writing = _Writing(store, collection, stored=stored, waiting=waiting)
    if rule is None:
        return Merged(written=len(entities) - len(await writing.write(entities, sizes=sizes)))
    done = Merged()
    left = list(entities)
    for _ in range(_TRIES):
        left = await _merge(writing, left, rule, done)
        if not left:
            return done
    raise MigrationError(
        f"others keep changing {len(left)} entities of {collection} while they are merged; "
        "merge again when nobody writes to the target"
    )


async def _merge(
    writing: _Writing, entities: Sequence[Entity], rule: MergeRule, done: Merged
) -> list[Entity]:
    """Merge a batch; returns what others changed meanwhile, to be looked at again."""
    ids = writing.ids(entities)
    arriving: list[Entity] = []
    expected: dict[str, int | Expect] = {}
    there_now = await writing.store.get_entities(writing.declared.name, ids)
    for entity_id, entity, there in zip(ids, entities, there_now, strict=True):
        if there is None:
            expected[entity_id] = ABSENT
        elif canonical(there) == canonical(entity):
            done.unchanged += 1
            continue
        elif resolve(entity, there, rule):
            expected[entity_id] = cast("int", there[VERSION])
        else:
            done.kept += 1
            continue
        arriving.append(entity)
    if not arriving:
        return []
    refused = await writing.write(arriving, expected, _LOST)
    done.written += len(arriving) - len(refused)
    return [each for each, error in refused if isinstance(error, _LOST)]


_LOST: Final = (ConcurrencyConflictError, AlreadyExistsError, EntityNotFoundError)


class _Writing:
    """Batches of whole entities of one collection on their way into a store."""

    def __init__(
        self,
        store: RepositoryInterface,
        collection: str,
        *,
        stored: bool,
        waiting: list[Entity] | None,
    ) -> None:
        self.store = store
        self.declared = store.collections[collection]
        self._stored = stored
        self._waiting = waiting

    def ids(self, entities: Sequence[Entity]) -> list[str]:
        return [cast("str", each[self.declared.key]) for each in entities]

    async def write(
        self,
        entities: Sequence[Entity],
        expected: dict[str, int | Expect] | None = None,
        met: tuple[type[StorageError], ...] = (),
        *,
        sizes: Sequence[int] | None = None,
    ) -> list[tuple[Entity, StorageError]]:
        """Write them; returns those that were not, by an error that is `met`, or for their parent.

        Raises:
            BatchError, InvalidInputError: see `put`.
        """
        name = self.declared.name
        try:
            if self._stored:
                await self.store._import_stored(name, entities, expected, sizes=sizes)
            else:
                await self.store.import_entities(name, entities, expected)
        except BatchError as exc:
            return self._refused(entities, exc, met)
        except InvalidInputError as exc:
            raise self._named(entities, exc) from exc
        return []

    def _refused(
        self, entities: Sequence[Entity], exc: BatchError, met: tuple[type[StorageError], ...]
    ) -> list[tuple[Entity, StorageError]]:
        refused = [
            (entity, outcome)
            for entity, outcome in zip(entities, exc.outcomes, strict=True)
            if isinstance(outcome, StorageError)
        ]
        if self._waiting is not None:
            met = (*met, ReferenceViolationError)
        errors = [each for each in refused if not isinstance(each[1], met)]
        if errors:
            entity, first = errors[0]
            raise BatchError(
                f"{len(errors):,} of {len(entities):,} could not be written; the first: "
                f"{_at(self.declared, entity, first)}",
                exc.outcomes,
            ) from first
        if self._waiting is not None:
            self._waiting += [
                each for each, why in refused if isinstance(why, ReferenceViolationError)
            ]
        return refused

    def _named(self, entities: Sequence[Entity], exc: InvalidInputError) -> InvalidInputError:
        """The error of a batch as that of the entity that is wrong."""
        for entity in entities:
            try:
                check_whole(self.declared, entity)
            except InvalidInputError as found:
                return found.at(name_of(self.declared, entity))
        return exc.at(self.declared.name)


def check_whole(declared: Collection, entity: Entity) -> None:
    """Look at what every import looks at: key, values, declared types, size, version.

    Raises:
        InvalidInputError.
    """
    check_version(entity.get(VERSION, 0), absent=False)
    declared.entity(entity)


def name_of(declared: Collection, entity: Entity) -> str:
    """How an error names an entity."""
    return f"{declared.name} {entity.get(declared.key)!r}"


def _at(declared: Collection, entity: Entity, error: StorageError) -> str:
    said = str(error)
    named = declared.name in said and repr(entity.get(declared.key)) in said
    return said if named else f"{name_of(declared, entity)}: {said}"
