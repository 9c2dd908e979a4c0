"""One collection in memory: its entities as bytes, and the indexes over them.

A write only sets a dict entry. An index is built when a query first needs it. The next query that
needs it brings it up to date, from the previous and the current bytes of each changed entity.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping
from itertools import islice
from operator import attrgetter
from typing import Any, Final, TypeAlias, cast

import msgspec

from hf_async_store.errors import CorruptionError
from hf_async_store.schema import Collection
from hf_async_store.strategies.json.serializer import (
    UNREADABLE,
    JSONSerializer,
    StoredEntity,
)
from hf_async_store.values import Entity, Value

_CHUNK_SIZE: Final = 512
"""How many entities are indexed before control returns to the event loop: 1 to 5 ms."""

_MAX_INSERTIONS: Final = 8
"""Up to this number of changed ids, the sorted ids are updated one by one."""

_SORT_CHUNK: Final = 16_384
_MIN_BULK_CHANGES: Final = 4096
"""At least this number of changes is kept for the next update of the indexes. If there are more, and
more than half of the entities changed, the indexes are dropped. It is also the least number of changes
that are applied to a copy."""

_BULK_DIVISOR: Final = 8
"""Changes to more than 1/8 of a section are applied to a copy of it, in chunks."""

_FREE_CHUNK: Final = 2048
_MERGE_CHUNK: Final = 1024

Before: TypeAlias = "dict[str, StoredEntity | None]"
"""The previous values of changed entities, by id; None: the entity did not exist."""

_IndexKey: TypeAlias = "str | int | float | None | tuple[bool]"
_Index: TypeAlias = "dict[_IndexKey, str | set[str]]"


class SnapshotDelta:
    """The difference between a section at one moment and its current content.

    Attributes:
        before: the previous values of the entities that changed since, one by one.
        base: the dict with all other entities, if the table has replaced it since; None: the table
            still uses the same dict.
    """

    __slots__ = ("base", "before")

    def __init__(self) -> None:
        self.before: Before = {}
        self.base: dict[str, StoredEntity] | None = None


class CollectionTable:
    """The entities of one collection.

    Args:
        collection: its declaration; None if only other processes declare it: its entities are kept
            but cannot be read here.
        cache_size: the maximum number of decoded entities that queries cache.
    """

    def __init__(
        self, collection: Collection | None, serializer: JSONSerializer, cache_size: int
    ) -> None:
        self.entities: dict[str, StoredEntity] = {}
        # The canonical bytes of entities of other programs, which stay in `entities` as they were
        # found: a compaction writes them unchanged.
        self._normalized: dict[str, bytes] = {}
        self._collection = collection
        self._serializer = serializer
        self._cache_size = cache_size
        self._cache: dict[str, tuple[bytes, Entity]] = {}
        self._indexable = _indexable(collection)
        self._decode_indexed = _index_decoder(self._indexable)
        self._indexes: dict[str, _Index] = {}
        # The garbage collector does not traverse a tuple of strings; it would traverse a list of
        # them at every collection.
        self._ids: tuple[str, ...] | None = None
        # The previous values of changed entities, which the indexes still contain.
        self._before: Before = {}
        self._tracking = False
        self._indexing = asyncio.Lock()
        self._deltas: list[SnapshotDelta] = []
        self.garbage: list[dict[Any, Any]] = []

    @property
    def declared(self) -> bool:
        return self._collection is not None

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
            assert self._collection is not None, "no caller can name an undeclared collection"
            known = self._serializer.normalize(self._collection, entity_id, stored)
            self._normalized[entity_id] = known
        return known

    def is_bulk(self, images: Mapping[str, bytes | None]) -> bool:
        """Whether there are so many images that they are applied to a copy, by `merged`."""
        return len(images) > max(_MIN_BULK_CHANGES, len(self.entities) // _BULK_DIVISOR)

    async def merged(self, images: Mapping[str, bytes | None]) -> dict[str, StoredEntity]:
        """A copy of the section with many images applied, for `apply`.

        The copy is made in chunks, so no other images may be applied until it is complete.
        """
        await asyncio.sleep(0)
        merged = self.entities.copy()  # one step, and a large one
        await asyncio.sleep(0)
        remaining = iter(images.items())
        while chunk := dict(islice(remaining, _MERGE_CHUNK)):
            self._put(merged, chunk)
            await asyncio.sleep(0)
        return merged

    def apply(
        self, images: Mapping[str, bytes | None], merged: dict[str, StoredEntity] | None = None
    ) -> None:
        """Apply the images of a commit.

        Args:
            merged: the copy of the section that `merged` returned for these images, if any.
        """
        entities = self.entities
        if self._tracking:
            if len(self._before) + len(images) > max(_MIN_BULK_CHANGES, len(entities) // 2):
                self._drop_indexes()
            else:
                _record_before(self._before, images, entities)
        if merged is None:
            for delta in self._deltas:
                if delta.base is None:
                    _record_before(delta.before, images, entities)
            self._put(entities, images)
            return
        for delta in self._deltas:
            if delta.base is None:
                delta.base = entities
        self.entities = merged
        self._discard_whole(entities)

    def _put(self, entities: dict[str, StoredEntity], images: Mapping[str, bytes | None]) -> None:
        if self._normalized:
            for entity_id in images:
                self._normalized.pop(entity_id, None)
        if None not in images.values():
            entities.update(cast("Mapping[str, bytes]", images))
            return
        for entity_id, raw in images.items():
            if raw is None:
                entities.pop(entity_id, None)
                self._cache.pop(entity_id, None)
            else:
                entities[entity_id] = raw

    def _discard_whole(self, base: dict[str, StoredEntity]) -> None:
        if not any(each.base is base for each in self._deltas):
            self.garbage.append(base)

    async def reclaim(self) -> None:
        """Free the dicts that are no longer used, in chunks: in one step it would block the event
        loop."""
        while self.garbage:
            await reclaim(self.garbage.pop())

    def entity(self, entity_id: str, raw: bytes) -> Entity:
        """Decode and check an entity; the caller owns the returned object.

        Raises:
            CorruptionError: the bytes are not in the form that this package writes.
        """
        assert self._collection is not None, "no caller can name an undeclared collection"
        return self._serializer.entity(self._collection, entity_id, raw)

    def decode_cached(self, entity_id: str, raw: bytes) -> Entity:
        """Decode an entity for reading only: it may be cached, so it must not reach a caller."""
        cached = self._cache.get(entity_id)
        if cached is not None and cached[0] is raw:
            return cached[1]
        entity = self.entity(entity_id, raw)
        if cached is not None or len(self._cache) < self._cache_size:
            self._cache[entity_id] = (raw, entity)
        return entity

    # -- snapshots ---------------------------------------------------------------------------

    def pin(self) -> SnapshotDelta:
        """Record the previous value of each entity that changes from now on."""
        delta = SnapshotDelta()
        self._deltas.append(delta)
        return delta

    async def unpin(self, delta: SnapshotDelta) -> None:
        """Stop recording for `delta`, and free it."""
        self._deltas = [each for each in self._deltas if each is not delta]
        self.garbage.append(delta.before)
        if delta.base is not None:
            self._discard_whole(delta.base)
        await self.reclaim()

    def raw_before(self, delta: SnapshotDelta, entity_id: str) -> bytes | None:
        """The result of `canonical` at the moment of `delta`."""
        if entity_id in delta.before:
            previous = delta.before[entity_id]
        elif delta.base is not None:
            previous = delta.base.get(entity_id)
        else:
            return self.canonical(entity_id)
        return None if previous is None else self.normalized(entity_id, previous)

    async def ids_before(self, delta: SnapshotDelta) -> tuple[str, ...]:
        """All ids at the moment of `delta`, sorted."""
        if delta.base is None:
            ids = await self.sorted_ids()
        entities = self.entities
        if delta.base is not None:  # it may have been set during the await
            entities = delta.base
            ids = await _sorted(entities)
        before = delta.before.items()
        created = [each for each, value in before if value is None and each in entities]
        deleted = [each for each, value in before if value is not None and each not in entities]
        return _resorted(ids, deleted, created) if created or deleted else ids

    # -- indexes -----------------------------------------------------------------------------

    def can_index(self, field: str) -> bool:
        return field in self._indexable

    async def index(self, *fields: str) -> None:
        """Bring the indexes of these fields up to date. They stay so until the caller's next await."""
        async with self._indexing:
            await self._catch_up()
            # All indexes may have been dropped meanwhile because of many changes.
            while missing := [each for each in fields if each not in self._indexes]:
                await self._build(missing[0])
                await self._catch_up()

    async def sorted_ids(self) -> tuple[str, ...]:
        """All ids, sorted. They are current until the caller's next await."""
        async with self._indexing:
            await self._catch_up()
            while self._ids is None:
                await self._sort_ids()
                await self._catch_up()
            return self._ids

    def find(self, field: str, values: Iterable[Value]) -> set[str]:
        """The ids whose field equals one of `values`; `index` must have been awaited just before.

        All lists and dicts are equal in an index: the caller has to compare them.
        """
        index = self._indexes[field]
        matching: set[str] = set()
        for value in values:
            ids = index.get(_index_key(value))
            if isinstance(ids, str):
                matching.add(ids)
            elif ids is not None:
                matching |= ids
        return matching

    async def _build(self, field: str) -> None:
        # Changes from here on are recorded in `_before`, and are then applied to this index, too.
        self._tracking = True
        indexes = self._indexes
        index: _Index = {}
        value_of = attrgetter(field)
        # Tuples, which the garbage collector does not traverse.
        ids, values = tuple(self.entities), tuple(self.entities.values())
        for number, (entity_id, stored) in enumerate(zip(ids, values, strict=True)):
            if number and not number % _CHUNK_SIZE:
                await asyncio.sleep(0)
            value = value_of(self._indexed(entity_id, stored))
            if value is not msgspec.UNSET:
                _add(index, _index_key(value), entity_id)
        if indexes is self._indexes:  # the indexes were not dropped meanwhile
            indexes[field] = index

    async def _sort_ids(self) -> None:
        self._tracking = True
        indexes = self._indexes
        ids = await _sorted(self.entities)
        if indexes is self._indexes:
            self._ids = ids

    async def _catch_up(self) -> None:
        """Apply every recorded change to the indexes; the last chunk without an await after it."""
        while len(self._before) > _CHUNK_SIZE:
            self._apply_to_indexes(list(islice(self._before, _CHUNK_SIZE)))
            await asyncio.sleep(0)
        self._apply_to_indexes(list(self._before))

    def _apply_to_indexes(self, changed: list[str]) -> None:
        added: list[str] = []
        removed: list[str] = []
        for entity_id in changed:
            before = self._before.pop(entity_id)
            after = self.entities.get(entity_id)
            if before is None and after is not None:
                added.append(entity_id)
            elif before is not None and after is None:
                removed.append(entity_id)
            if self._indexes:
                try:
                    self._reindex(entity_id, before, after)
                except CorruptionError:
                    self._drop_indexes()  # they miss this change
                    raise
        if self._ids is not None and (added or removed):
            self._ids = _resorted(self._ids, added, removed)

    def _reindex(
        self, entity_id: str, before: StoredEntity | None, after: StoredEntity | None
    ) -> None:
        old = None if before is None else self._indexed(entity_id, before)
        new = None if after is None else self._indexed(entity_id, after)
        for field, index in self._indexes.items():
            old_value = getattr(old, field, msgspec.UNSET)
            new_value = getattr(new, field, msgspec.UNSET)
            if old_value is not msgspec.UNSET and (old_value is not new_value):
                _discard(index, _index_key(old_value), entity_id)
            if new_value is not msgspec.UNSET:
                _add(index, _index_key(new_value), entity_id)

    def _indexed(self, entity_id: str, stored: StoredEntity) -> Any:
        """The fields of an entity that can be indexed."""
        canonical = self.normalized(entity_id, stored)
        try:
            return self._decode_indexed(canonical)
        except UNREADABLE as exc:
            assert self._collection is not None, "an undeclared collection has no index"
            raise self._serializer.not_canonical(self._collection, entity_id, str(exc)) from exc

    def _drop_indexes(self) -> None:
        """Drop the indexes: building them again is cheaper than applying many changes."""
        self.garbage += [*self._indexes.values(), self._before]
        self._indexes = {}
        self._ids = None
        self._before = {}
        self._tracking = False


async def reclaim(garbage: dict[Any, Any]) -> None:
    """Empty a dict in chunks, with control returned to the event loop in between."""
    while garbage:
        for _ in range(min(len(garbage), _FREE_CHUNK)):
            garbage.popitem()
        await asyncio.sleep(0)


async def _sorted(unsorted: Iterable[str]) -> tuple[str, ...]:
    rest = list(unsorted)
    ids: list[str] = []
    for start in range(0, len(rest), _SORT_CHUNK):
        ids += sorted(rest[start : start + _SORT_CHUNK])
        await asyncio.sleep(0)
    ids.sort()  # merges sorted runs, in a fraction of the time of a sort
    return tuple(ids)


def _record_before(
    before: Before, changed: Iterable[str], entities: Mapping[str, StoredEntity]
) -> None:
    for entity_id in changed:
        if entity_id not in before:
            before[entity_id] = entities.get(entity_id)


def _indexable(collection: Collection | None) -> frozenset[str]:
    """The fields that can be indexed: those with a declared index, and references, by which children
    are found."""
    if collection is None:
        return frozenset()
    declared = {each.field for each in collection.indexes}
    return frozenset(declared | {each.name for each in collection.references})


def _index_decoder(fields: Iterable[str]) -> Any:
    """A decoder that reads only these fields and skips all others."""
    struct = msgspec.defstruct("Peek", [(each, Any, msgspec.UNSET) for each in sorted(fields)])
    return msgspec.json.Decoder(struct).decode


def _index_key(value: Value) -> _IndexKey:
    """The key of a value in an index: integers and floats may be equal, booleans equal no number."""
    if isinstance(value, bool):
        return (value,)
    if isinstance(value, list | dict):
        return (False, False)  # type: ignore[return-value]  # equals nothing else
    return value


def _add(index: _Index, value: _IndexKey, entity_id: str) -> None:
    # Most values of a unique field have one id: a set for each would take most of the memory.
    ids = index.get(value)
    if ids is None:
        index[value] = entity_id
    elif isinstance(ids, set):
        ids.add(entity_id)
    elif ids != entity_id:
        index[value] = {ids, entity_id}


def _discard(index: _Index, value: _IndexKey, entity_id: str) -> None:
    ids = index.get(value)
    if isinstance(ids, set):
        ids.discard(entity_id)
        if not ids:
            del index[value]
    elif ids == entity_id:
        del index[value]


def _resorted(ids: tuple[str, ...], added: list[str], removed: list[str]) -> tuple[str, ...]:
    """`ids` with some ids added and some removed."""
    if len(added) + len(removed) > _MAX_INSERTIONS:
        removed_set = set(removed)
        return tuple(sorted([each for each in ids if each not in removed_set] + added))
    changed = list(ids)
    for each in added:
        insort(changed, each)
    for each in removed:
        del changed[bisect_left(changed, each)]
    return tuple(changed)
