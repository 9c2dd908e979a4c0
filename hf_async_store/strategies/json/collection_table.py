"""One collection in memory: its entities as bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Final, cast

import msgspec

from hf_async_store.errors import CorruptionError
from hf_async_store.event_loop import pause
from hf_async_store.query import MISSING, Missing
from hf_async_store.schema import Collection
from hf_async_store.strategies.json.serializer import (
    UNREADABLE,
    JSONSerializer,
    StoredEntity,
)
from hf_async_store.table import Table
from hf_async_store.values import Entity, Value

_CHUNK_SIZE: Final = 1024


class CollectionTable(Table[StoredEntity]):
    """The entities of one collection.

    Args:
        collection: its declaration; None if only other processes declare it: its entities are kept
            but cannot be read here.
        cache_size: the maximum number of decoded entities that queries cache.
    """

    def __init__(
        self, collection: Collection | None, serializer: JSONSerializer, cache_size: int
    ) -> None:
        super().__init__(collection)
        # The canonical bytes of entities of other programs, which stay in `entities` as they were
        # found: a compaction writes them unchanged.
        self._normalized: dict[str, bytes] = {}
        self._serializer = serializer
        self._cache_size = cache_size
        self._cache: dict[str, tuple[bytes, Entity]] = {}
        self._decode_indexed = _decoder(self.indexes.fields)

    @property
    def declared(self) -> bool:
        return self.collection is not None

    def canonical(self, entity_id: str) -> bytes | None:
        """The canonical bytes of an entity, normalized now if another program wrote it.

        Raises:
            CorruptionError: it cannot be normalized.
        """
        stored = self.entities.get(entity_id)
        if stored is None or type(stored) is bytes:
            return stored
        return self.normalized(entity_id, stored)

    def normalized(self, entity_id: str, stored: StoredEntity) -> bytes:
        """The canonical bytes of a current or previous value of an entity.

        Raises:
            CorruptionError: it cannot be normalized.
        """
        if type(stored) is bytes:
            return stored
        # Each id has at most one value that another program wrote: that in the data file.
        known = self._normalized.get(entity_id)
        if known is None:
            assert self.collection is not None, "no caller can name an undeclared collection"
            known = self._serializer.normalize(self.collection, entity_id, stored)
            self._normalized[entity_id] = known
        return known

    async def stored(self, entity_ids: Iterable[str]) -> dict[str, bytes | None]:
        """The canonical bytes of those of the entities that are stored, for the change feed.

        One that another program wrote and that is damaged is represented by its id, with version 0.
        """
        found: dict[str, bytes | None] = {}
        for number, entity_id in enumerate(entity_ids, 1):
            if entity_id in self.entities:
                try:
                    found[entity_id] = self.canonical(entity_id)
                except CorruptionError:
                    found[entity_id] = self._identified(entity_id)
            if not number % _CHUNK_SIZE:
                await pause()
        return found

    def _identified(self, entity_id: str) -> bytes:
        assert self.collection is not None, "no caller can name an undeclared collection"
        return self._serializer.encode({self.collection.key: entity_id}, 0)

    def _put(
        self, entities: dict[str, StoredEntity], images: Mapping[str, StoredEntity | None]
    ) -> None:
        if self._normalized:
            for entity_id in images:
                self._normalized.pop(entity_id, None)
        if all(images.values()):  # none is deleted
            entities.update(cast("Mapping[str, bytes]", images))
            return
        super()._put(entities, images)
        for entity_id in images:
            if entity_id not in entities:
                self._cache.pop(entity_id, None)

    def entity(self, entity_id: str, stored: StoredEntity) -> Entity:
        """Decode and check an entity; the caller owns the returned object.

        Raises:
            CorruptionError: the bytes are not in the form that this package writes, or the entity of
                another program cannot be normalized.
        """
        assert self.collection is not None, "no caller can name an undeclared collection"
        canonical = self.normalized(entity_id, stored)
        return self._serializer.entity(self.collection, entity_id, canonical)

    def peek(self, entity_id: str, stored: StoredEntity) -> Entity:
        raw = self.normalized(entity_id, stored)
        cached = self._cache.get(entity_id)
        if cached is not None and cached[0] is raw:
            return cached[1]
        entity = self.entity(entity_id, raw)
        if cached is not None or len(self._cache) < self._cache_size:
            self._cache[entity_id] = (raw, entity)
        return entity

    def unchecked(self, entity_id: str, stored: StoredEntity) -> Entity | None:
        if self.collection is None:
            return None
        try:
            return self._serializer.decode(self.normalized(entity_id, stored))
        except (CorruptionError, *UNREADABLE):
            return None

    def values(self, entity_id: str, stored: StoredEntity) -> Sequence[Value | Missing]:
        assert self.collection is not None, "an undeclared collection has no fields"
        canonical = self.normalized(entity_id, stored)
        try:
            return self._decode_indexed(canonical)
        except UNREADABLE as exc:
            raise self._serializer.not_canonical(self.collection, entity_id, str(exc)) from exc


def _decoder(fields: Sequence[str]) -> Callable[[bytes], Sequence[Value | Missing]]:
    """A function that reads only these fields of an entity, and skips all others."""
    struct = msgspec.defstruct("Indexed", [(each, Any, MISSING) for each in fields])
    decode = msgspec.json.Decoder(struct).decode
    if len(fields) < 2:
        return lambda canonical: [getattr(decode(canonical), each) for each in fields]
    values_of = attrgetter(*fields)
    return lambda canonical: values_of(decode(canonical))
