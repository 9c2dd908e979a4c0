"""One collection in memory: its entities as bytes, and the indexes over them.

A write costs a dict entry and nothing more. An index is built when a query first wants it, and brought
up to date when the next one does, from the bytes that each changed entity had before.
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
    Held,
    JSONSerializer,
)
from hf_async_store.values import Entity, Value

_CHUNK_SIZE: Final = 512
"""How many entities are indexed before the loop gets a turn: 1 to 5 ms."""

_FEW: Final = 8
"""Up to this many ids are put into the sorted list one by one."""

_SORT_CHUNK: Final = 16_384
_MUCH: Final = 4096
"""So many changes may wait for the next query at least, before the indexes are given up instead."""

_SHARE: Final = 8
"""Changes to more than this part of a section are made to a copy of it, in pieces."""

_FREE_CHUNK: Final = 2048
_MERGE_CHUNK: Final = 1024

Before: TypeAlias = "dict[str, Held | None]"
"""What entities were before they changed; None: not there."""

_Scalar: TypeAlias = "str | int | float | None | tuple[bool]"
_Index: TypeAlias = "dict[_Scalar, str | set[str]]"


class SnapshotDelta:
    """What a section was at one moment, as far as it differs from what it is now.

    Attributes:
        before: what changed since, one by one.
        whole: all the rest, once the section itself was replaced; None: it is there still.
    """

    __slots__ = ("before", "whole")

    def __init__(self) -> None:
        self.before: Before = {}
        self.whole: dict[str, Held] | None = None


class CollectionTable:
    """The entities of one collection.

    Args:
        collection: its declaration; None for one that only others declare: it is kept, not read.
        cache_size: how many decoded entities queries may keep.
    """

    def __init__(
        self, collection: Collection | None, serializer: JSONSerializer, cache_size: int
    ) -> None:
        self.held: dict[str, Held] = {}
        self._collection = collection
        self._serializer = serializer
        self._cache_size = cache_size
        self._cache: dict[str, tuple[bytes, Entity]] = {}
        self._indexable = _indexable(collection)
        self._peek = _peeker(self._indexable)
        self._indexes: dict[str, _Index] = {}
        # A tuple of texts is nothing to the collector; a list of them it would walk again and again.
        self._ids: tuple[str, ...] | None = None
        # What each entity that changed was before, as the indexes still have it. None: not there.
        self._before: Before = {}
        self._tracking = False
        self._indexing = asyncio.Lock()
        self._past: list[SnapshotDelta] = []
        self._garbage: list[dict[Any, Any]] = []

    @property
    def declared(self) -> bool:
        return self._collection is not None

    def canonical(self, entity_id: str) -> bytes | None:
        """The stored bytes of an entity, adopted now if they came from elsewhere.

        Raises:
            CorruptionError: they cannot be adopted.
        """
        held = self.held.get(entity_id)
        if held is None or type(held) is bytes:
            return held
        adopted = self._normalize(entity_id, held)
        self.held[entity_id] = adopted
        return adopted

    def normalized(self, entity_id: str, held: Held) -> bytes:
        """The canonical bytes of what an entity was at some moment.

        Raises:
            CorruptionError: they cannot be adopted.
        """
        if type(held) is bytes:
            return held
        if self.held.get(entity_id) is held:
            return self.canonical(entity_id) or b""
        return self._normalize(entity_id, held)

    def _normalize(self, entity_id: str, held: Held) -> bytes:
        assert self._collection is not None, "nobody can name what is not declared"
        return self._serializer.normalize(self._collection, entity_id, held)

    async def merged(self, images: Mapping[str, bytes | None]) -> dict[str, Held] | None:
        """The section with many images in it, for `apply`; None where those are few.

        Made in pieces, so nothing else may be applied until it is.
        """
        if len(images) <= max(_MUCH, len(self.held) // _SHARE):
            return None
        await asyncio.sleep(0)
        merged = self.held.copy()  # one step, and a large one
        await asyncio.sleep(0)
        left = iter(images.items())
        while part := dict(islice(left, _MERGE_CHUNK)):
            self._put(merged, part)
            await asyncio.sleep(0)
        return merged

    def apply(
        self, images: Mapping[str, bytes | None], merged: dict[str, Held] | None = None
    ) -> None:
        """Take over the images of a commit.

        Args:
            merged: what the section is with them, if it was made before.
        """
        held = self.held
        if self._tracking:
            if len(self._before) + len(images) > max(_MUCH, len(held) // 2):
                self._drop_indexes()
            else:
                _note(self._before, images, held)
        if merged is None:
            for past in self._past:
                if past.whole is None:
                    _note(past.before, images, held)
            self._put(held, images)
            return
        for past in self._past:
            if past.whole is None:
                past.whole = held
        self.held = merged
        self._discard_whole(held)

    def _put(self, held: dict[str, Held], images: Mapping[str, bytes | None]) -> None:
        if None not in images.values():
            held.update(cast("Mapping[str, bytes]", images))
            return
        for entity_id, raw in images.items():
            if raw is None:
                held.pop(entity_id, None)
                self._cache.pop(entity_id, None)
            else:
                held[entity_id] = raw

    def _discard_whole(self, whole: dict[str, Held]) -> None:
        if not any(each.whole is whole for each in self._past):
            self._garbage.append(whole)

    async def reclaim(self) -> None:
        """Free what changes left behind, in pieces: at once it would hold the loop."""
        while self._garbage:
            await reclaim(self._garbage.pop())

    def entity(self, entity_id: str, raw: bytes) -> Entity:
        """The entity decoded and checked: the caller's own copy.

        Raises:
            CorruptionError: it is not what this package writes.
        """
        assert self._collection is not None, "nobody can name what is not declared"
        return self._serializer.entity(self._collection, entity_id, raw)

    def look(self, entity_id: str, raw: bytes) -> Entity:
        """The entity decoded, to be looked at and not to be given away: it may be cached."""
        cached = self._cache.get(entity_id)
        if cached is not None and cached[0] is raw:
            return cached[1]
        entity = self.entity(entity_id, raw)
        if cached is not None or len(self._cache) < self._cache_size:
            self._cache[entity_id] = (raw, entity)
        return entity

    # -- snapshots ---------------------------------------------------------------------------

    def pin(self) -> SnapshotDelta:
        """From now on note what each entity was that changes."""
        past = SnapshotDelta()
        self._past.append(past)
        return past

    async def unpin(self, past: SnapshotDelta) -> None:
        """It is no longer wanted."""
        self._past = [each for each in self._past if each is not past]
        self._garbage.append(past.before)
        if past.whole is not None:
            self._discard_whole(past.whole)
        await self.reclaim()

    def raw_before(self, past: SnapshotDelta, entity_id: str) -> bytes | None:
        """`canonical` as it was then."""
        if entity_id in past.before:
            was = past.before[entity_id]
        elif past.whole is not None:
            was = past.whole.get(entity_id)
        else:
            return self.canonical(entity_id)
        return None if was is None else self.normalized(entity_id, was)

    async def ids_before(self, past: SnapshotDelta) -> tuple[str, ...]:
        """All ids in order as they were then."""
        if past.whole is None:
            ids = await self.sorted_ids()
        held = self.held
        if past.whole is not None:  # perhaps only now
            held = past.whole
            ids = await _sorted(held)
        came = [each for each, was in past.before.items() if was is None and each in held]
        went = [each for each, was in past.before.items() if was is not None and each not in held]
        return _resorted(ids, went, came) if came or went else ids

    # -- indexes -----------------------------------------------------------------------------

    def can_index(self, field: str) -> bool:
        return field in self._indexable

    async def index(self, *fields: str) -> None:
        """Have the indexes of these fields current when this returns, up to the next await."""
        async with self._indexing:
            await self._catch_up()
            # Many changes may have made all indexes be given up meanwhile.
            while lacking := [each for each in fields if each not in self._indexes]:
                await self._build(lacking[0])
                await self._catch_up()

    async def sorted_ids(self) -> tuple[str, ...]:
        """All ids in order, current up to the next await."""
        async with self._indexing:
            await self._catch_up()
            while self._ids is None:
                await self._sort_ids()
                await self._catch_up()
            return self._ids

    def find(self, field: str, values: Iterable[Value]) -> set[str]:
        """The ids whose field equals one of `values`; `index` must have been awaited just before.

        All lists and maps count as equal here: the caller looks closer.
        """
        index = self._indexes[field]
        found: set[str] = set()
        for value in values:
            ids = index.get(_scalar(value))
            if isinstance(ids, str):
                found.add(ids)
            elif ids is not None:
                found |= ids
        return found

    async def _build(self, field: str) -> None:
        # What changes from here on waits in `_before`, and is then settled in this index, too.
        self._tracking = True
        indexes = self._indexes
        index: _Index = {}
        value_of = attrgetter(field)
        ids, texts = tuple(self.held), tuple(self.held.values())  # the collector leaves them alone
        for number, (entity_id, held) in enumerate(zip(ids, texts, strict=True)):
            if number and not number % _CHUNK_SIZE:
                await asyncio.sleep(0)
            value = value_of(self._indexed(entity_id, held))
            if value is not msgspec.UNSET:
                _add(index, _scalar(value), entity_id)
        if indexes is self._indexes:  # not given up meanwhile
            indexes[field] = index

    async def _sort_ids(self) -> None:
        self._tracking = True
        indexes = self._indexes
        ids = await _sorted(self.held)
        if indexes is self._indexes:
            self._ids = ids

    async def _catch_up(self) -> None:
        """Settle every change that waits; the last piece is settled without an await."""
        while len(self._before) > _CHUNK_SIZE:
            self._settle(list(islice(self._before, _CHUNK_SIZE)))
            await asyncio.sleep(0)
        self._settle(list(self._before))

    def _settle(self, changed: list[str]) -> None:
        came: list[str] = []
        went: list[str] = []
        for entity_id in changed:
            before = self._before.pop(entity_id)
            after = self.held.get(entity_id)
            if before is None and after is not None:
                came.append(entity_id)
            elif before is not None and after is None:
                went.append(entity_id)
            if self._indexes:
                try:
                    self._reindex(entity_id, before, after)
                except CorruptionError:
                    self._drop_indexes()  # which lack this change now
                    raise
        if self._ids is not None and (came or went):
            self._ids = _resorted(self._ids, came, went)

    def _reindex(self, entity_id: str, before: Held | None, after: Held | None) -> None:
        old = None if before is None else self._indexed(entity_id, before)
        new = None if after is None else self._indexed(entity_id, after)
        for field, index in self._indexes.items():
            was = getattr(old, field, msgspec.UNSET)
            now = getattr(new, field, msgspec.UNSET)
            if was is not msgspec.UNSET and (was is not now):
                _discard(index, _scalar(was), entity_id)
            if now is not msgspec.UNSET:
                _add(index, _scalar(now), entity_id)

    def _indexed(self, entity_id: str, held: Held) -> Any:
        """The fields of an entity that have an index."""
        canonical = self.normalized(entity_id, held)
        try:
            return self._peek(canonical)
        except UNREADABLE as exc:
            assert self._collection is not None, "what is not declared has no index"
            raise self._serializer.not_as_written(self._collection, entity_id, str(exc)) from exc

    def _drop_indexes(self) -> None:
        """Give the indexes up: building them again costs less than settling so many changes."""
        self._garbage += [*self._indexes.values(), self._before]
        self._indexes = {}
        self._ids = None
        self._before = {}
        self._tracking = False


async def reclaim(garbage: dict[Any, Any]) -> None:
    """Empty it in pieces."""
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
    ids.sort()  # merges sorted runs, which takes a fraction of sorting
    return tuple(ids)


def _note(before: Before, changed: Iterable[str], held: Mapping[str, Held]) -> None:
    for entity_id in changed:
        if entity_id not in before:
            before[entity_id] = held.get(entity_id)


def _indexable(collection: Collection | None) -> frozenset[str]:
    """The fields worth an index: declared so, and references, by which children are found."""
    if collection is None:
        return frozenset()
    declared = {each.field for each in collection.indexes}
    return frozenset(declared | {each.name for each in collection.references})


def _peeker(fields: Iterable[str]) -> Any:
    """A decoder of just these fields, which skips over all others."""
    struct = msgspec.defstruct("Peek", [(each, Any, msgspec.UNSET) for each in sorted(fields)])
    return msgspec.json.Decoder(struct).decode


def _scalar(value: Value) -> _Scalar:
    """The value as an index holds it: numbers are one type, booleans are apart from them."""
    if isinstance(value, bool):
        return (value,)
    if isinstance(value, list | dict):
        return (False, False)  # type: ignore[return-value]  # equals nothing else
    return value


def _add(index: _Index, value: _Scalar, entity_id: str) -> None:
    # Most values of a unique field have one id: a set for each would be most of the memory.
    ids = index.get(value)
    if ids is None:
        index[value] = entity_id
    elif isinstance(ids, set):
        ids.add(entity_id)
    elif ids != entity_id:
        index[value] = {ids, entity_id}


def _discard(index: _Index, value: _Scalar, entity_id: str) -> None:
    ids = index.get(value)
    if isinstance(ids, set):
        ids.discard(entity_id)
        if not ids:
            del index[value]
    elif ids == entity_id:
        del index[value]


def _resorted(ids: tuple[str, ...], came: list[str], went: list[str]) -> tuple[str, ...]:
    """`ids` with some more and some less."""
    if len(came) + len(went) > _FEW:
        gone = set(went)
        return tuple(sorted([each for each in ids if each not in gone] + came))
    changed = list(ids)
    for each in came:
        insort(changed, each)
    for each in went:
        del changed[bisect_left(changed, each)]
    return tuple(changed)
