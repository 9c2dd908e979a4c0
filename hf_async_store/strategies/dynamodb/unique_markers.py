"""Unique indexes: a marker for each value, written in the same transaction as the entity.

A marker is an item of the table `PREFIX_hf_unique`. Its key contains the collection, the index and the
digest of the values, and it names the entity that has them. A change that may touch such values is a
transaction of its own: it reads the entity and the markers, whose state is then a condition.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from hf_async_store.changes import Change, Delete, Outcome, Put
from hf_async_store.schema import UNIQUE_COLLECTION
from hf_async_store.unique import digest, stored_digest
from hf_async_store.values import CREATED_AT, UPDATED_AT, VERSION, Entity, Key, utc_now

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from hf_async_store.unique import Fields

_CONCURRENCY: Final = 8


class UniqueChange:
    """What a change does with unique values.

    Attributes:
        claimed: by key of the marker, the values that the entity gets.
        freed: the keys of the markers of those that it had.

    Raises:
        InvalidFieldError: a unique index cannot contain a value.
    """

    def __init__(
        self, key: Key, unique: Sequence[Fields], before: Entity | None, after: Entity | None
    ) -> None:
        self.key = key
        self.claimed: dict[Key, tuple[Fields, bytes]] = {}
        self.freed: list[Key] = []
        for fields in unique:
            if before is not None and after is not None and _are_same(before, after, fields):
                continue
            old = None if before is None else stored_digest(before, fields)
            new = None if after is None else digest(after, fields, key.collection)
            if old == new:
                continue
            if old is not None:
                self.freed.append(marker_key(key.collection, fields, old))
            if new is not None:
                self.claimed[marker_key(key.collection, fields, new)] = fields, new

    @property
    def markers(self) -> list[Key]:
        return [*self.freed, *self.claimed]


def _are_same(before: Entity, after: Entity, fields: Fields) -> bool:
    """Whether a change leaves the fields as they are; they may have values that no index can contain."""
    return all(before.get(each) is after.get(each) for each in fields)


def marker_key(collection: str, fields: Fields, value: bytes) -> Key:
    return Key(UNIQUE_COLLECTION.name, f"{collection}/{'-'.join(fields)}/{value.hex()}")


def marker_entity(key: Key, owner: str) -> Entity:
    now = utc_now()
    return {
        UNIQUE_COLLECTION.key: key.id,
        "owner": owner,
        CREATED_AT: now,
        UPDATED_AT: now,
        VERSION: 1,
    }


def may_touch(change: Change, unique: Iterable[Fields]) -> bool:
    """Whether a change may give an entity unique values, or take them from it."""
    if isinstance(change, Put | Delete):
        return bool(unique)
    return any(not change.fields.keys().isdisjoint(each) for each in unique)


def in_transactions(
    changes: Sequence[Change], unique: Mapping[str, Sequence[Fields]]
) -> dict[Key, list[int]]:
    """The positions of the changes that need transactions, by key. If one change of an entity does, all of
    them do, so that they stay in order."""
    keys = {each.key for each in changes if may_touch(each, unique[each.key.collection])}
    found: dict[Key, list[int]] = {}
    for place, change in enumerate(changes):
        if change.key in keys:
            found.setdefault(change.key, []).append(place)
    return found


async def each_in_order(
    changes: Sequence[Change],
    places: Mapping[Key, Sequence[int]],
    write: Callable[[Change], Awaitable[Outcome]],
    outcomes: list[Outcome],
) -> None:
    """Write the changes of each key one after another, and store their outcomes; several keys at once."""
    slots = asyncio.Semaphore(_CONCURRENCY)

    async def write_all(own: Sequence[int]) -> None:
        async with slots:
            for place in own:
                outcomes[place] = await write(changes[place])

    await asyncio.gather(*map(write_all, places.values()))
