"""Entities into a store: as they are into an empty one, or by a rule beside what is there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Literal, TypeAlias, cast

import msgspec

from hf_async_store.entities import ABSENT, UPDATED_AT, VERSION, Entity, Expect, canonical
from hf_async_store.errors import (
    AlreadyExistsError,
    BatchError,
    ConcurrencyConflictError,
    EntityNotFoundError,
    MigrationError,
    StorageError,
)
from hf_async_store.repository import RepositoryInterface

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


def wins(arriving: Entity, there: Entity, rule: MergeRule) -> bool:
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
) -> Merged:
    """Write a batch.

    Args:
        rule: None writes all of it, over whatever is there.
        stored: the entities come out of a store, so their values are portable for certain.
        sizes: of the JSON of each in bytes, where that is known of what comes out of a store.

    Raises:
        BatchError: some could not be written; the others were.
    """
    write = store._import_stored if stored else store.import_entities
    if rule is None:
        if stored:
            await store._import_stored(collection, entities, sizes=sizes)
        else:
            await store.import_entities(collection, entities)
        return Merged(written=len(entities))
    done = Merged()
    left = list(entities)
    for _ in range(_TRIES):
        left = await _merge(store, collection, left, rule, done, write)
        if not left:
            return done
    raise MigrationError(
        f"others keep changing {len(left)} entities of {collection} while they are merged; "
        "merge again when nobody writes to the target"
    )


async def _merge(
    store: RepositoryInterface,
    collection: str,
    entities: Sequence[Entity],
    rule: MergeRule,
    done: Merged,
    write: Callable[..., Awaitable[list[int]]],
) -> list[Entity]:
    """Merge a batch; returns what others changed meanwhile, to be looked at again."""
    key = store.collections[collection].key
    ids = [cast("str", each[key]) for each in entities]
    arriving: list[Entity] = []
    expected: dict[str, int | Expect] = {}
    for entity_id, entity, there in zip(
        ids, entities, await store.get_entities(collection, ids), strict=True
    ):
        if there is None:
            expected[entity_id] = ABSENT
        elif canonical(there) == canonical(entity):
            done.unchanged += 1
            continue
        elif wins(entity, there, rule):
            expected[entity_id] = cast("int", there[VERSION])
        else:
            done.kept += 1
            continue
        arriving.append(entity)
    if not arriving:
        return []
    try:
        await write(collection, arriving, expected)
    except BatchError as exc:
        lost = [isinstance(each, _LOST) for each in exc.outcomes]
        if any(
            isinstance(each, StorageError) and not isinstance(each, _LOST) for each in exc.outcomes
        ):
            raise
        done.written += len(arriving) - sum(lost)
        return [each for each, again in zip(arriving, lost, strict=True) if again]
    done.written += len(arriving)
    return []


_LOST: Final = (ConcurrencyConflictError, AlreadyExistsError, EntityNotFoundError)
