"""Ordered indexes in memory: the keys and ids of entities, sorted in the total order of values.

An index contains an entry (key, id) for each entity. The key consists of the encoded values of the
indexed fields. No encoded value is a prefix of another, so keys compare like the lists of values; all
entries whose first values are equal are consecutive, sorted by the next value, and at last by id.
The index without fields is that of the ids.
"""

from __future__ import annotations

import asyncio
import gc
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Collection as AbstractCollection
from itertools import chain
from typing import Final, Generic, TypeAlias, TypeVar

import msgspec

from hf_async_store.collector import GatheredObjects
from hf_async_store.errors import StorageError
from hf_async_store.event_loop import Garbage, long_work, pause
from hf_async_store.query import Missing
from hf_async_store.schema import Collection, Index
from hf_async_store.sort_bytes import is_exact, sort_bytes
from hf_async_store.values import Value

# -- keys -----------------------------------------------------------------------------------

_BOOLEAN, _NUMBER, _STRING = 2, 3, 4
_NUMBER_BYTES: Final = 11
_ENCODED_SIZES: Final = {_BOOLEAN: (2,), _NUMBER: (9, 11)}
"""The sizes of the sort bytes of some types; those of strings vary, those of the others are 1."""

AFTER: Final = b"\xff"
"""A key followed by this is greater than all keys that begin with the key."""


def key_part(encoded: bytes) -> bytes:
    """The part of a key for one value, from its sort bytes."""
    rank = encoded[0]
    if rank == _STRING:
        return encoded + b"\x00"  # no string contains U+0000
    return encoded.ljust(_NUMBER_BYTES, b"\x00") if rank == _NUMBER else encoded


def key_bound(bound: bytes) -> bytes:
    """The bound of a range of sort bytes as a bound of key parts."""
    sizes = _ENCODED_SIZES.get(bound[0], (1,)) if bound else ()
    encoded = bound[:-1]
    if bound.endswith(b"\x00") and (len(encoded) in sizes or encoded[:1] == bytes([_STRING])):
        return key_part(encoded) + AFTER  # after the value
    return bound


def split_key(key: bytes, start: int, parts: int) -> tuple[int, bool]:
    """The end of some parts of a key, and whether equal parts mean equal values; otherwise the end of
    the first part of which that is not true."""
    for _ in range(parts):
        rank = key[start]
        if rank == _STRING:
            end = key.index(0, start) + 1
            exact = is_exact(key[start : end - 1])
        else:
            end = start + {_BOOLEAN: 2, _NUMBER: _NUMBER_BYTES}.get(rank, 1)
            exact = rank < _STRING
        start = end
        if not exact:
            return end, False
    return start, True


def index_key(values: Iterable[Value | Missing]) -> bytes:
    """The key of an entity with these values in the indexed fields."""
    return b"".join([key_part(sort_bytes(each)) for each in values])


# -- one index ------------------------------------------------------------------------------

Entry: TypeAlias = "tuple[bytes, str]"
_Block: TypeAlias = "tuple[tuple[bytes, ...], tuple[str, ...]]"

_BLOCK: Final = 128
"""The number of entries in a new block; a block with twice as many is divided."""


class Span(msgspec.Struct, frozen=True, gc=False):
    """The entries from `low` on, and below `high`."""

    low: Entry
    high: Entry


class _Sharing:
    """How many views share the lists of an index, and where the lists go after the last of them."""

    __slots__ = ("garbage", "views")

    def __init__(self) -> None:
        self.views = 0
        self.garbage: list[Garbage] | None = None


class OrderedIndex:
    """Sorted entries, in blocks.

    A block is replaced and never modified, and so is a list of blocks that a view shows. So a view shows
    all entries of one moment. The garbage collector does not traverse blocks, which are tuples of
    strings. A key that several consecutive entries have is stored once.
    """

    __slots__ = ("_blocks", "_lasts", "_sharing")

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._lasts: list[Entry] = []
        self._sharing = _Sharing()

    def __len__(self) -> int:
        return sum([len(ids) for _, ids in self._blocks])

    def view(self) -> OrderedIndex:
        """The index as it is now, for reading until `release`."""
        view = OrderedIndex()
        view._blocks, view._lasts, view._sharing = self._blocks, self._lasts, self._sharing
        self._sharing.views += 1
        return view

    def release(self) -> None:
        """End a view. The index need not be copied for it by the next change."""
        self._sharing.views -= 1
        if self._sharing.garbage is not None:
            self.discard(self._sharing.garbage)

    def discard(self, garbage: list[Garbage]) -> None:
        """Add what contains the entries to `garbage`, as soon as no view shows it."""
        if self._sharing.views:
            self._sharing.garbage = garbage
        else:
            garbage += [self._blocks, self._lasts]

    def _leave_to_views(self) -> None:
        if self._sharing.views:
            self._blocks, self._lasts = self._blocks.copy(), self._lasts.copy()
            self._sharing = _Sharing()

    def append(self, entries: Sequence[Entry]) -> None:
        """Add sorted entries that are greater than all others."""
        for start in range(0, len(entries), _BLOCK):
            part = entries[start : start + _BLOCK]
            keys = [part[0][0]]
            for key, _ in part[1:]:
                keys.append(keys[-1] if key == keys[-1] else key)
            self._blocks.append((tuple(keys), tuple([each for _, each in part])))
            self._lasts.append(part[-1])

    def insert(self, entry: Entry) -> None:
        self._leave_to_views()
        if not self._blocks:
            self.append([entry])
            return
        number = min(bisect_left(self._lasts, entry), len(self._blocks) - 1)
        at = _position(self._blocks[number], entry)
        keys, ids = list(self._blocks[number][0]), list(self._blocks[number][1])
        key, entity_id = entry
        for neighbour in keys[max(0, at - 1) : at + 1]:
            key = neighbour if neighbour == key else key
        keys.insert(at, key)
        ids.insert(at, entity_id)
        self._replace(number, tuple(keys), tuple(ids))

    def remove(self, entry: Entry) -> None:
        self._leave_to_views()
        number = bisect_left(self._lasts, entry)
        keys, ids = self._blocks[number]
        at = _position(self._blocks[number], entry)
        assert (keys[at], ids[at]) == entry, "the index does not contain what was indexed"
        self._replace(number, keys[:at] + keys[at + 1 :], ids[:at] + ids[at + 1 :])

    def _replace(self, number: int, keys: tuple[bytes, ...], ids: tuple[str, ...]) -> None:
        if 0 < len(keys) < 2 * _BLOCK:
            self._blocks[number] = keys, ids
            self._lasts[number] = keys[-1], ids[-1]
            return
        halves = [(keys[:_BLOCK], ids[:_BLOCK]), (keys[_BLOCK:], ids[_BLOCK:])] if keys else []
        self._blocks[number : number + 1] = halves
        self._lasts[number : number + 1] = [(keys[-1], ids[-1]) for keys, ids in halves]

    def pieces(self, span: Span, *, reverse: bool = False) -> Iterator[list[Entry]]:
        """The entries of a span in short lists, which are themselves in order.

        The index may not be changed meanwhile.
        """
        first, last = self._block_numbers(span)
        numbers = range(first, last + 1)
        for number in reversed(numbers) if reverse else numbers:
            keys, ids = self._blocks[number]
            start, stop = self._within(number, span)
            piece = list(zip(keys[start:stop], ids[start:stop], strict=True))
            yield piece[::-1] if reverse else piece

    def ids(self) -> Iterator[str]:
        """All ids of this moment, in the order of the entries."""
        return chain.from_iterable([ids for _, ids in self._blocks])

    def count(self, span: Span) -> int:
        first, last = self._block_numbers(span)
        if first > last:
            return 0
        start, _ = self._within(first, span)
        _, stop = self._within(last, span)
        return sum([len(ids) for _, ids in self._blocks[first:last]]) + stop - start

    def _block_numbers(self, span: Span) -> tuple[int, int]:
        """The first and the last block that may contain entries of a span."""
        last = min(bisect_left(self._lasts, span.high), len(self._blocks) - 1)
        return bisect_left(self._lasts, span.low), last

    def _within(self, number: int, span: Span) -> tuple[int, int]:
        block = self._blocks[number]
        stop = len(block[1])
        if self._lasts[number] >= span.high:
            stop = _position(block, span.high)
        return min(_position(block, span.low), stop), stop


def _position(block: _Block, entry: Entry) -> int:
    """How many entries of a block are less than `entry`."""
    keys, ids = block
    key, entity_id = entry
    first = bisect_left(keys, key)
    if first == len(keys) or keys[first] != key:
        return first
    return bisect_left(ids, entity_id, first, bisect_right(keys, key, first))


# -- the indexes of one collection ----------------------------------------------------------

Stored = TypeVar("Stored")
Fields: TypeAlias = "tuple[str, ...]"
"""The names of the fields of an index, which identify it."""

ReadValues: TypeAlias = "Callable[[str, Stored], Sequence[Value | Missing]]"

_BUILD_CHUNK: Final = 128
"""How many entities are indexed in one piece: up to 1 ms."""

_CHANGE_CHUNK: Final = 64
_RUN: Final = 2048
_SAMPLE: Final = 256
_SAMPLES_PER_PIECE: Final = 16
_MIN_BULK_CHANGES: Final = 4096
"""At least this number of changes is kept for the next update of the indexes. If there are more, and
more than half of the entities changed, the indexes are dropped."""

BY_ID: Final[Fields] = ()
"""The index of the ids."""


_Values: TypeAlias = "Sequence[Value | Missing]"


class Indexes(Generic[Stored]):
    """The ordered indexes of a dict of entities.

    An index is built when a query first needs it. A write only records the previous value of an
    entity; the next query brings the indexes up to date.

    Args:
        collection: its declaration; None: only the ids can be indexed.
        entities: the entities. If the owner replaces the dict, it assigns the attribute, too.
        read: returns the values of `fields` of an entity.

    Attributes:
        fields: the names of all fields that occur in an index.
        declared: the indexes by their fields, that of the ids included.
        garbage: what is no longer used, to be freed by `reclaim`.
    """

    def __init__(
        self,
        collection: Collection | None,
        entities: dict[str, Stored],
        read: ReadValues[Stored],
    ) -> None:
        self.entities = entities
        self.declared = indexes_of(collection)
        self.fields = tuple({name: None for fields in self.declared for name in fields})
        self._read = read
        self._places = {fields: tuple(map(self.fields.index, fields)) for fields in self.declared}
        self._built: dict[Fields, OrderedIndex] = {}
        # The previous values of entities that changed: what the built indexes do not show yet, and
        # what changed since the build of another one began.
        self._before: dict[str, Stored | None] = {}
        self._before_build: dict[str, Stored | None] | None = None
        self._building = asyncio.Lock()
        self.garbage: list[Garbage] = []

    def record(
        self, changed: Mapping[str, object], values: Mapping[str, Stored | None] | None = None
    ) -> None:
        """Note that entities are about to change; the caller changes them without an await.

        Args:
            values: their present values, if the caller has looked them up, which takes long if they are
                many; None: they are looked up here.
        """
        recording = [self._before] if self._built else []
        if self._before_build is not None:
            recording.append(self._before_build)
        if not recording:
            return
        most = max(_MIN_BULK_CHANGES, len(self.entities) // 2) - len(changed)
        for before in recording:
            if len(before) > most:
                self.drop()
                return
            if values is None:
                record_before(before, changed, self.entities)
            else:
                earlier = before.copy()
                before.update(values)
                before.update(earlier)

    async def ready(self, *wanted: Fields) -> None:
        """Bring these indexes up to date. They stay so until the caller's next await."""
        # All indexes may be dropped during any await because of many changes.
        while True:
            await self._catch_up()
            missing = [each for each in wanted if each not in self._built]
            if not missing:
                return
            async with self._building:
                if missing[0] not in self._built:
                    await self._build(missing[0])

    def get(self, fields: Fields) -> OrderedIndex:
        """An index that is `ready`."""
        return self._built[fields]

    async def ready_for(self, name: str) -> None:
        """Bring an index that begins with this field up to date."""
        await self.ready(self._starting_with(name))

    def find(self, name: str, value: str) -> Iterator[str]:
        """The ids of the entities with this string in a field; its index must be `ready`."""
        fields = self._starting_with(name)
        encoded = sort_bytes(value)
        key = key_part(encoded)
        exact, place = is_exact(encoded), self.fields.index(name)
        for piece in self._built[fields].pieces(Span((key, ""), (key + AFTER, ""))):
            for _, entity_id in piece:
                if exact or self._read(entity_id, self.entities[entity_id])[place] == value:
                    yield entity_id

    def _starting_with(self, name: str) -> Fields:
        return next(each for each in self.declared if each[:1] == (name,))

    def entry(self, fields: Fields, entity_id: str, stored: Stored) -> Entry:
        values = self._values(entity_id, stored, read=fields != BY_ID)
        assert values is not None, "the entity exists"
        return self._key(fields, values), entity_id

    def _values(self, entity_id: str, stored: Stored | None, *, read: bool) -> _Values | None:
        """The values of `fields` of an entity, if they are needed; None: it does not exist."""
        if stored is None:
            return None
        return self._read(entity_id, stored) if read else ()

    def _key(self, fields: Fields, values: _Values) -> bytes:
        return index_key([values[place] for place in self._places[fields]])

    async def _build(self, fields: Fields) -> None:
        if fields != BY_ID and BY_ID not in self._built:
            await self._build(BY_ID)
        await self._catch_up()  # the ids are current until the next await
        built = self._built
        before: dict[str, Stored | None] = {}
        self._before_build = before
        try:
            index = OrderedIndex()
            runs = await self._runs(fields, before)
            await pause()  # the last run was sorted now
            for piece in merged_runs(runs):
                index.append(piece)
                # Each new block is traversed once. Otherwise all are, in one step of 50 ms or more:
                # freeing the entries delays the next collection.
                gc.collect(0)
                await pause()
            while max(len(before), len(self._before)) > _CHANGE_CHUNK and built is self._built:
                self._apply(before, {fields: index})
                self._apply(self._before, built)
                await pause()
            if built is self._built:  # the indexes were not dropped meanwhile
                self._apply(before, {fields: index})
                self._apply(self._before, built)
                built[fields] = index
        finally:
            self._before_build = None

    async def _runs(self, fields: Fields, before: dict[str, Stored | None]) -> list[list[Entry]]:
        """The entries of one moment, in sorted runs; incomplete if the indexes are dropped meanwhile.

        Args:
            before: the previous values of entities that changed since that moment.
        """
        if BY_ID in self._built:
            return await self._runs_of(fields, self._built[BY_ID].ids(), before)
        runs = await self._runs_of(fields, self.entities, before)
        if not before:
            return runs
        # The dict changed, so its iterator may have skipped entities.
        before.clear()
        # A copy is one large step, but the garbage collector does not traverse it.
        return await self._runs_of(fields, self.entities.copy(), before)

    async def _runs_of(
        self, fields: Fields, ids: Iterable[str], before: Mapping[str, Stored | None]
    ) -> list[list[Entry]]:
        built = self._built
        live = ids is self.entities
        work, gathered = long_work(), GatheredObjects()
        runs: list[list[Entry]] = [[]]
        for number, entity_id in enumerate(ids, 1):
            stored = before[entity_id] if entity_id in before else self.entities[entity_id]
            assert stored is not None, "it existed when the build began"
            runs[-1].append(self.entry(fields, entity_id, stored))
            if not number % _BUILD_CHUNK:
                if len(runs[-1]) >= _RUN:
                    runs[-1].sort()
                    runs.append([])
                gathered.add(_BUILD_CHUNK)
                await work.pause_if_due()
                if built is not self._built or (live and before):
                    break
        runs[-1].sort()
        return runs

    async def _catch_up(self) -> None:
        """Apply every recorded change to the indexes; the last chunk without an await after it."""
        while len(self._before) > _CHANGE_CHUNK:
            self._apply(self._before, self._built)
            await pause()
        self._apply(self._before, self._built)

    def _apply(
        self, before: dict[str, Stored | None], indexes: Mapping[Fields, OrderedIndex]
    ) -> None:
        """Apply some recorded changes to indexes, and forget them."""
        try:
            for _ in range(min(_CHANGE_CHUNK, len(before))):
                entity_id, previous = before.popitem()
                self._reindex(indexes, entity_id, previous, self.entities.get(entity_id))
        except StorageError:
            self.drop()  # one of them contains a part of this change
            raise

    def _reindex(
        self,
        indexes: Mapping[Fields, OrderedIndex],
        entity_id: str,
        before: Stored | None,
        after: Stored | None,
    ) -> None:
        with_values = any(indexes)  # that of the ids needs no decoding
        old = self._values(entity_id, before, read=with_values)
        new = self._values(entity_id, after, read=with_values)
        affected = indexes if old is None or new is None else self._affected(indexes, old, new)
        for fields in affected:
            old_key = None if old is None else self._key(fields, old)
            new_key = None if new is None else self._key(fields, new)
            if old_key == new_key:
                continue
            if old_key is not None:
                indexes[fields].remove((old_key, entity_id))
            if new_key is not None:
                indexes[fields].insert((new_key, entity_id))

    def _affected(
        self, indexes: Iterable[Fields], old: _Values, new: _Values
    ) -> AbstractCollection[Fields]:
        """The indexes in which the keys of two values of an entity may differ: usually few."""
        places = [
            number
            for number, (one, other) in enumerate(zip(old, new, strict=True))
            if not (one is other or (type(one) is type(other) is str and one == other))
        ]
        if not places:
            return ()
        return [each for each in indexes if any(n in places for n in self._places[each])]

    def drop(self) -> None:
        """Drop all indexes: building them again is cheaper than applying many changes."""
        self.garbage.append(self._before)
        for index in self._built.values():
            index.discard(self.garbage)
        self._built, self._before = {}, {}


def indexes_of(collection: Collection | None) -> dict[Fields, Index | None]:
    """The indexes of a collection by their fields: by id (no fields), the declared ones, and those by
    which children are found."""
    indexes: dict[Fields, Index | None] = {BY_ID: None}
    if collection is not None:
        indexes.update((each.fields, each) for each in collection.indexes)
        for field in collection.references:
            if field.name not in {each[0] for each in indexes if each}:
                indexes[(field.name,)] = Index(field.name)
    return indexes


def record_before(
    before: dict[str, Stored | None], changed: Iterable[str], entities: Mapping[str, Stored]
) -> None:
    """Record the values of entities that are about to change, if they did not change before."""
    new = [each for each in changed if each not in before]
    before.update(zip(new, map(entities.get, new), strict=True))


Sortable = TypeVar("Sortable", Entry, str)


async def sorted_runs(items: Sequence[Sortable]) -> list[list[Sortable]]:
    """The items in sorted runs, for `merged_runs`."""
    runs = []
    for start in range(0, len(items), _RUN):
        if start:
            await pause()
        runs.append(sorted(items[start : start + _RUN]))
    return runs


async def sorted_in_steps(items: list[Sortable]) -> list[Sortable]:
    """The items in order."""
    runs = await sorted_runs(items)
    if len(runs) == 1:
        return runs[0]
    ordered: list[Sortable] = []
    for piece in merged_runs(runs):
        ordered += piece
        await pause()
    return ordered


def merged_runs(runs: list[list[Sortable]]) -> Iterator[list[Sortable]]:
    """The items of sorted runs, merged, in pieces that take a few milliseconds each.

    The runs are emptied. The boundaries of the pieces are taken from a sample. Sorting the parts of
    the runs between two boundaries is a merge in C, and takes a quarter of the time of `heapq.merge`.
    """
    # From another place of each run, because runs are often alike.
    sample: list[Sortable] = sorted(
        [each for number, run in enumerate(runs) for each in run[number % _SAMPLE :: _SAMPLE]]
    )
    for boundary in [*sample[_SAMPLES_PER_PIECE::_SAMPLES_PER_PIECE], None]:
        piece: list[Sortable] = []
        for run in runs:
            stop = len(run) if boundary is None else bisect_left(run, boundary)
            piece += run[:stop]
            del run[:stop]  # so that no large list is freed in one step
        piece.sort()
        yield piece
