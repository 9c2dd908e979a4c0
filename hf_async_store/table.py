"""One collection in memory: its entities, their indexes, and the views of past moments.

Entities are replaced and never modified. A write only sets dict entries: it records the previous
values for the indexes and for each view. So a view costs what changes while it is open.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Final, Generic, TypeVar

from msgspec import Struct

from hf_async_store.event_loop import Garbage, pause, reclaim
from hf_async_store.ordered_index import Indexes, record_before
from hf_async_store.query import Missing
from hf_async_store.schema import Collection
from hf_async_store.unique import Fields, Owners
from hf_async_store.values import Entity, Key, Value

Stored = TypeVar("Stored")

_MIN_BULK_CHANGES: Final = 4096
_BULK_DIVISOR: Final = 8
"""More changes than both are applied to a copy of the dict, in chunks."""

_MERGE_CHUNK: Final = 1024


class Merged(Struct, Generic[Stored], frozen=True):
    """Many changes, applied to a copy of the dict of a table.

    Attributes:
        entities: the copy.
        before: the values of the changed entities before; None: it did not exist.
    """

    entities: dict[str, Stored]
    before: dict[str, Stored | None]


class PastMoment(Generic[Stored]):
    """The difference between a table at one moment and its current content.

    Attributes:
        before: the previous values of the entities that changed since; None: it did not exist.
        indexes: those of the dict with all other entities, which may not be that of the table anymore.
    """

    __slots__ = ("before", "indexes")

    def __init__(self, indexes: Indexes[Stored]) -> None:
        self.before: dict[str, Stored | None] = {}
        self.indexes = indexes

    def get(self, entity_id: str) -> Stored | None:
        """The value of an entity at that moment; None if it did not exist."""
        if entity_id in self.before:
            return self.before[entity_id]
        return self.indexes.entities.get(entity_id)


class Listener(ABC):
    """Is told what changes in tables."""

    @abstractmethod
    def note(self, table: Table[Any], changed: Iterable[str]) -> None:
        """Note that the entities with some ids change, perhaps very many."""


class Table(ABC, Generic[Stored]):
    """The entities of one collection, in the form in which an engine stores them.

    Args:
        collection: its declaration; None: there is none, and only the ids are indexed.

    Attributes:
        listeners: who is told what changes, by what they want it for, the oldest first.
    """

    def __init__(self, collection: Collection | None) -> None:
        self.entities: dict[str, Stored] = {}
        self.collection = collection
        self.indexes = Indexes(collection, self.entities, self.values)
        self._owners: dict[Fields, Owners] = {}
        self._moments: list[PastMoment[Stored]] = []
        self.listeners: dict[object, Listener] = {}
        self.garbage: list[Garbage] = []

    def listen(self, what: object, listener: Listener, most: int) -> Listener | None:
        """Tell a listener what changes, instead of the one that wanted the same, and if there are more than
        `most`, of the oldest one, which is returned."""
        self.listeners.pop(what, None)
        self.listeners[what] = listener
        if len(self.listeners) <= most:
            return None
        return self.listeners.pop(next(iter(self.listeners)))

    @abstractmethod
    def values(self, entity_id: str, stored: Stored) -> Sequence[Value | Missing]:
        """The values of `indexes.fields` of an entity."""

    @abstractmethod
    def entity(self, entity_id: str, stored: Stored) -> Entity:
        """The entity; the caller owns it."""

    def peek(self, entity_id: str, stored: Stored) -> Entity:
        """The entity for reading only; it must not reach a caller."""
        return self.entity(entity_id, stored)

    # -- unique values -----------------------------------------------------------------------

    def unchecked(self, entity_id: str, stored: Stored) -> Entity | None:
        """The entity for reading its values; None if it is damaged."""
        return self.peek(entity_id, stored)

    async def owners(self, fields: Fields) -> Owners:
        """The owners of the values of a unique index; the entities must not change meanwhile.

        From now on, they follow the changes, until there are very many at once.
        """
        found = self._owners.get(fields)
        if found is None:
            found = Owners(fields)
            for number, (entity_id, stored) in enumerate(self.entities.items(), 1):
                found.replace(entity_id, None, self.unchecked(entity_id, stored))
                if not number % _MERGE_CHUNK:
                    await pause()
            self._owners[fields] = found
        return found

    def known_owners(self, fields: Fields) -> Owners:
        """As `owners`, which was called before."""
        return self._owners[fields]

    async def refuse_duplicates(self, fields: Fields) -> None:
        """Refuse to enforce a unique index; the entities must not change meanwhile.

        Raises:
            SchemaMismatchError: two entities have the same values, or one has values that a unique index
                cannot contain.
        """
        assert self.collection is not None, "it is declared"
        name, found = self.collection.name, Owners(fields)
        for number, (entity_id, stored) in enumerate(self.entities.items(), 1):
            entity = self.unchecked(entity_id, stored)
            if entity is not None:
                found.add(Key(name, entity_id), entity)
            if not number % _MERGE_CHUNK:
                await pause()

    def _follow(self, images: Mapping[str, Stored | None]) -> None:
        for entity_id, stored in images.items():
            old = self.entities.get(entity_id)
            before = None if old is None else self.unchecked(entity_id, old)
            after = None if stored is None else self.unchecked(entity_id, stored)
            for each in self._owners.values():
                each.replace(entity_id, before, after)

    # -- changes -----------------------------------------------------------------------------

    def is_bulk(self, images: Mapping[str, Stored | None]) -> bool:
        """Whether there are so many images that they are applied to a copy, by `merged`."""
        number = len(images)
        return number > _MIN_BULK_CHANGES and number > len(self.entities) // _BULK_DIVISOR

    async def merged(self, images: Mapping[str, Stored | None]) -> Merged[Stored]:
        """A copy of the dict with many images applied, for `apply`.

        The copy is made in chunks, so no other images may be applied until it is complete.
        """
        await pause()
        merged = Merged(
            self.entities.copy(), dict[str, Stored | None]()
        )  # one step, and a large one
        await pause()
        remaining = iter(images.items())
        while chunk := dict(islice(remaining, _MERGE_CHUNK)):
            merged.before.update(zip(chunk, map(self.entities.get, chunk), strict=True))
            self._put(merged.entities, chunk)
            await pause()
        return merged

    def apply(
        self, images: Mapping[str, Stored | None], merged: Merged[Stored] | None = None
    ) -> None:
        """Apply the images of a commit: new values by id; None for a deleted entity.

        Args:
            merged: what `merged` returned for these images, if it was called.
        """
        for listener in self.listeners.values():
            listener.note(self, images)
        if self._owners and merged is None:
            self._follow(images)
        elif self._owners:
            self.garbage += [each.ids for each in self._owners.values()]
            self._owners = {}
        moments = self._moments
        current = [each for each in moments if each.indexes is self.indexes] if moments else moments
        if merged is not None and current:
            # The views keep the old dict, and its indexes.
            self.entities = merged.entities
            self.indexes = Indexes(self.collection, merged.entities, self.values)
            return
        if merged is not None:
            self.indexes.record(images, merged.before)
            self.garbage.append(self.entities)
            self.entities = self.indexes.entities = merged.entities
            return
        self.indexes.record(images)
        for each in current:
            record_before(each.before, images, self.entities)
        self._put(self.entities, images)

    def _put(self, entities: dict[str, Stored], images: Mapping[str, Stored | None]) -> None:
        for entity_id, stored in images.items():
            if stored is None:
                entities.pop(entity_id, None)
            else:
                entities[entity_id] = stored

    # -- moments -----------------------------------------------------------------------------

    def pin(self) -> PastMoment[Stored]:
        """Keep the present content readable, until `unpin`."""
        moment = PastMoment(self.indexes)
        self._moments.append(moment)
        return moment

    async def unpin(self, moment: PastMoment[Stored]) -> None:
        """Free what only this moment needs."""
        self._moments = [each for each in self._moments if each is not moment]
        if moment.before:
            self.garbage.append(moment.before)
        indexes = moment.indexes
        if indexes is not self.indexes and all(e.indexes is not indexes for e in self._moments):
            self.garbage.append(indexes.entities)
            indexes.drop()
            self.garbage += indexes.garbage
        await self.reclaim()

    async def reclaim(self) -> None:
        """Free what is no longer used, in small steps: in one it would block the event loop."""
        for garbage in (self.garbage, self.indexes.garbage):
            while garbage:
                await reclaim(garbage.pop())

    async def close(self) -> None:
        """Free everything, unless a moment is still read: the table is used no more.

        Otherwise the garbage collector would, in one step: tables and indexes refer to each other.
        """
        if not self._moments:
            self.indexes.drop()
            self.garbage.append(self.entities)
            await self.reclaim()
