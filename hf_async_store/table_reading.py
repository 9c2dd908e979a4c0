"""Queries over tables in memory: they read an index in order, and stop at the limit."""

from __future__ import annotations

import heapq
from abc import abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, groupby, islice
from typing import TYPE_CHECKING, Final, Generic, TypeAlias, TypeVar

import msgspec

from hf_async_store.changes import Record
from hf_async_store.deferred import deferred
from hf_async_store.driver import QueryPlan, Reader
from hf_async_store.event_loop import computed, long_work, pause
from hf_async_store.generators import Owned
from hf_async_store.ordered_index import (
    Entry,
    Indexes,
    OrderedIndex,
    Span,
    merged_runs,
    sorted_in_steps,
    sorted_runs,
)
from hf_async_store.passed_over import PassedOver, passed_over
from hf_async_store.query import Query, compile_filter, ordered, rows_per_step
from hf_async_store.schema import CLAIM_COLLECTION
from hf_async_store.table import PastMoment, Table
from hf_async_store.values import Entity, Key

if TYPE_CHECKING:
    from hf_async_store import access_path
    from hf_async_store.access_path import AccessPath, Conditions, Stream
else:
    access_path = deferred("access_path")

Stored = TypeVar("Stored")
Row: TypeAlias = "tuple[str, Stored]"

_BATCH: Final = 256
"""How many entities are decoded before control returns to the event loop: about 1 ms. The garbage
collector counts tuples that contain a dict; so few do not start a collection."""

_UNFILTERED_BATCH: Final = 512
"""The same for entities that are not decoded to be tested."""

_ENTRIES: Final = 64
"""How many entries of an index are made in one piece of long work: about 0.5 ms."""

_MIN_BATCH: Final = 16
_SPANS_PER_BATCH: Final = 64
_COUNTED_SPANS: Final = 512
_IN_VAIN: Final = 4
_RANK: Final = {"none": 0, "groups": 1, "complete": 2}


class TableReader(Reader, Generic[Stored]):
    """The queries of an engine that has its entities in tables."""

    @abstractmethod
    def _table(self, collection: str) -> Table[Stored]: ...

    def _own_changes(self, collection: str) -> Mapping[str, Stored | None]:
        """The uncommitted changes that this reader sees; the reader does not modify them."""
        del collection
        return {}

    def _pin(self, collection: str) -> PastMoment[Stored]:
        """The moment that a query reads."""
        return self._table(collection).pin()

    async def _unpin(self, collection: str, moment: PastMoment[Stored]) -> None:
        await self._table(collection).unpin(moment)

    async def passed_over(
        self, query: Query, most_attempts: int | None
    ) -> tuple[PassedOver, list[str]]:
        """See `Session.passed_over`."""
        claims = self._table(CLAIM_COLLECTION.name)
        return passed_over(query, most_attempts, self._table(query.collection), claims)

    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        entity = self._table(query.collection).entity
        async with Owned(self._rows(query)) as chunks:
            async for chunk in chunks:
                for entity_id, stored in chunk:
                    yield Record(Key(query.collection, entity_id), entity(entity_id, stored))

    async def select_batches(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        entity = self._table(query.collection).entity
        async with Owned(self._rows(query)) as chunks:
            async for chunk in chunks:
                yield [entity(entity_id, stored) for entity_id, stored in chunk]

    async def _rows(self, query: Query) -> AsyncGenerator[list[Row[Stored]], None]:
        """The rows of a query, in non-empty chunks."""
        moment = self._pin(query.collection)
        try:
            reading = await self._reading(query, moment)
            first = await self._first_in_order(query, moment, reading.path)
            if first is not None:
                for start in range(0, len(first), _BATCH):
                    yield first[start : start + _BATCH]
                    await pause()
                return
            left = query.limit
            async with Owned(reading.rows()) as chunks:
                async for chunk in chunks:
                    if chunk[:left]:
                        yield chunk[:left]
                    if left is not None:
                        left -= len(chunk)
                        if left <= 0:
                            return
        finally:
            await self._unpin(query.collection, moment)

    async def _first_in_order(
        self, query: Query, moment: PastMoment[Stored], planned: AccessPath
    ) -> list[Row[Stored]] | None:
        """The rows of a query with a limit, if an index in its order leads to them within few entries.

        None: read as planned. That is, all entries that an index on the filter has, which are then sorted;
        at most a quarter as many are read here in vain.
        """
        table, limit = self._table(query.collection), query.limit
        if limit is None or planned.ordered != "none" or not planned.constrained:
            return None
        if query.has_many_values:
            return None
        assert table.collection is not None, "no caller can name an undeclared collection"
        conditions = access_path.Conditions(query, table.collection.key)
        paths = map(conditions.path, moment.indexes.declared)
        path = next((each for each in paths if each.ordered == "complete"), None)
        if path is None:
            return None
        counting = await self._along(planned, query, moment)
        most = await counting.count_entries() // _IN_VAIN
        if most < limit:
            return None
        other = await self._along(path, query, moment)
        rows: list[Row[Stored]] = []
        async with Owned(other.rows()) as chunks:
            async for chunk in chunks:
                rows += chunk
                if len(rows) >= limit:
                    return rows[:limit]
                if other.entries_read > most:
                    return None
        return rows

    async def count(self, query: Query) -> int:
        if query.limit is not None or query.after is not None:
            async with Owned(self._rows(query)) as chunks:
                return sum([len(chunk) async for chunk in chunks])
        moment = self._pin(query.collection)
        try:
            reading = await self._reading(msgspec.structs.replace(query, order=()), moment)
            return await reading.count()
        finally:
            await self._unpin(query.collection, moment)

    async def explain(self, query: Query) -> QueryPlan:
        table = self._table(query.collection)
        moment = self._pin(query.collection)
        try:
            reading = await self._reading(query, moment)
            path = reading.path
            entries = await reading.count_entries()
        finally:
            await self._unpin(query.collection, moment)
        index = table.indexes.declared[path.fields]
        return QueryPlan(
            access="index" if index else "key" if path.constrained else "scan",
            index=None if index is None else index.name,
            residual=not path.exact,
            sorted_here=path.ordered != "complete",
            detail=f"{entries} of {len(table.entities)} entities"
            + (", until the limit" if path.ordered != "none" and query.limit is not None else ""),
        )

    async def _reading(self, query: Query, moment: PastMoment[Stored]) -> _Reading[Stored]:
        table = self._table(query.collection)
        assert table.collection is not None, "no caller can name an undeclared collection"
        is_long = query.has_many_values
        conditions = await computed(
            partial(access_path.Conditions, query, table.collection.key), long=is_long
        )
        return await self._along(await _choose(moment.indexes, conditions), query, moment)

    async def _along(
        self, path: AccessPath, query: Query, moment: PastMoment[Stored]
    ) -> _Reading[Stored]:
        matches = None
        if not path.exact:
            compiling = partial(compile_filter, query.where)
            matches = await computed(compiling, long=query.has_many_values)
        own = self._own_changes(query.collection)
        return _Reading(self._table(query.collection), query, path, matches, moment, own)


async def _choose(indexes: Indexes[Stored], conditions: Conditions) -> AccessPath:
    """An access path that reads only what the query returns; else the one that excludes most entities;
    else one in the order of the query."""
    find = partial(conditions.paths, indexes.declared)
    paths = await computed(find, long=conditions.has_many_values)
    exact = [each for each in paths if each.exact and each.ordered == "complete"]
    if exact:
        return max(exact, key=lambda each: (each.equalities, each.bounded))
    limited = [each for each in paths if each.constrained]
    if limited and limited[0].ids is not None:
        return limited[0]
    if len(limited) <= 1:
        return limited[0] if limited else max(paths, key=lambda each: _RANK[each.ordered])
    await indexes.ready(*[each.fields for each in limited])
    views = [indexes.get(each.fields).view() for each in limited]
    try:
        costs = [
            (await _count(view, each.spans), -_RANK[each.ordered], number)
            for number, (each, view) in enumerate(zip(limited, views, strict=True))
        ]
    finally:
        for view in views:
            view.release()
    return limited[min(costs)[2]]


async def _count(index: OrderedIndex, spans: list[Span]) -> int:
    """The number of entries in spans of a view."""
    total = 0
    for start in range(0, len(spans), _COUNTED_SPANS):
        if start:
            await pause()
        total += sum(map(index.count, spans[start : start + _COUNTED_SPANS]))
    return total


class _Reading(Generic[Stored]):
    """One query that reads one moment of a table, with uncommitted changes over it."""

    def __init__(
        self,
        table: Table[Stored],
        query: Query,
        path: AccessPath,
        matches: Callable[[Entity], bool] | None,
        moment: PastMoment[Stored],
        own: Mapping[str, Stored | None],
    ) -> None:
        self.path = path
        self._table = table
        self._query = query
        self._moment = moment
        self._own = own
        self._matches = matches
        self._batch = rows_per_step(query.where, _BATCH)
        # The entities that the index does not show as they are at the moment, and their entries.
        self._changed: dict[str, Stored | None] = {}
        self._entries: list[Entry] = []
        self._index = OrderedIndex()
        self.entries_read = 0

    async def _prepare(self) -> None:
        """Take a view of the index; the caller releases it."""
        if self.path.ids is not None:
            self._changed = dict(self._own)
            return
        indexes, fields = self._moment.indexes, self.path.fields
        await self._add_changed(self._own)
        while True:
            await indexes.ready(fields)
            before, known = self._moment.before, self._changed
            later = {each: before[each] for each in before if each not in known}
            if not later:
                break
            await self._add_changed(later)
        self._index = indexes.get(fields).view()

    async def _add_changed(self, changed: Mapping[str, Stored | None]) -> None:
        work = long_work()
        for number, (entity_id, stored) in enumerate(changed.items(), 1):
            self._changed[entity_id] = stored
            if stored is not None:
                entry = self._moment.indexes.entry(self.path.fields, entity_id, stored)
                self._entries.append(entry)
            if not number % _ENTRIES:
                await work.pause_if_due()
        self._entries = await sorted_in_steps(self._entries)

    def _get(self, entity_id: str) -> Stored | None:
        if entity_id in self._changed:
            return self._changed[entity_id]
        return self._moment.get(entity_id)

    # -- rows --------------------------------------------------------------------------------

    async def rows(self) -> AsyncGenerator[list[Row[Stored]], None]:
        """The rows in the order of the query, perhaps more than its limit, in chunks."""
        await self._prepare()
        try:
            for ids, in_order in self._groups():
                if in_order:
                    yield self._matching(ids)
                    await pause()
                    continue
                group = self._sorted(ids) if self._query.order else self._sorted_by_id(ids)
                async with Owned(group) as chunks:
                    async for chunk in chunks:
                        yield chunk
        finally:
            self._index.release()

    async def _sorted_by_id(self, ids: list[str]) -> AsyncGenerator[list[Row[Stored]], None]:
        after = self._query.after
        for piece in merged_runs(await sorted_runs(ids)):
            later = piece if after is None else piece[bisect_right(piece, after.id) :]
            for start in range(0, len(later), self._batch):
                yield self._matching(later[start : start + self._batch])
                await pause()

    async def _sorted(self, ids: list[str]) -> AsyncGenerator[list[Row[Stored]], None]:
        # Only sort keys are kept in memory; an entity is decoded again when it is yielded.
        async with (
            Owned(self._peeked(ids)) as batches,
            Owned(ordered(batches, self._query, keep=False)) as rows,
        ):
            chunk: list[Row[Stored]] = []
            async for entity_id, _ in rows:
                chunk += self._existing([entity_id])
                if len(chunk) == _BATCH:
                    yield chunk
                    chunk = []
            yield chunk

    async def _peeked(self, ids: list[str]) -> AsyncGenerator[list[tuple[str, Entity]], None]:
        peek = self._table.peek
        for start in range(0, len(ids), self._batch):
            rows = self._matching(ids[start : start + self._batch])
            yield [(entity_id, peek(entity_id, stored)) for entity_id, stored in rows]
            await pause()

    def _matching(self, ids: Iterable[str]) -> list[Row[Stored]]:
        rows = self._existing(ids)
        if self._matches is None:
            return rows
        matches, peek = self._matches, self._table.peek
        return [row for row in rows if matches(peek(*row))]

    def _existing(self, ids: Iterable[str]) -> list[Row[Stored]]:
        get = self._get
        return [(each, stored) for each in ids if (stored := get(each)) is not None]

    def _groups(self) -> Iterator[tuple[list[str], bool]]:
        """Ids in order (True), or of a whole group that is to be sorted (False)."""
        group_of = self.path.group
        pending: list[str] = []
        common: bytes | None = None
        for batch in self._batches():
            self.entries_read += len(batch)
            for group, entries in groupby(batch, key=lambda entry: group_of(entry[0])):
                if pending and group != common:
                    yield pending, False
                    pending = []
                ids = [entity_id for _, entity_id in entries]
                if group is None:
                    yield ids, True
                else:
                    pending += ids
                common = group
            yield [], True
        if pending:
            yield pending, False

    def _batches(self) -> Iterator[list[Entry]]:
        """The entries, each with what follows the head in its key. Each batch takes limited time; some
        are empty."""
        size = _UNFILTERED_BATCH if self._matches is None else self._batch
        if self._query.limit is not None and self.path.ordered != "none":
            size = max(_MIN_BATCH, min(size, self._query.limit))
        batch: list[Entry] = []
        for number, piece in enumerate(self._pieces(), 1):
            batch += piece
            if len(batch) >= size or not number % _SPANS_PER_BATCH:
                for start in range(0, len(batch), size) if batch else [0]:
                    yield batch[start : start + size]
                batch = []
        yield batch

    def _pieces(self) -> Iterator[list[Entry]]:
        path, ids = self.path, self.path.ids
        if ids is not None:
            for start in range(0, len(ids), _BATCH):
                yield [(b"", each) for each in ids[start : start + _BATCH]]
        elif path.ordered == "none" or len(path.streams) == 1:
            for stream in path.streams:
                yield from self._stream(stream)
        else:
            flat = [chain.from_iterable(self._stream(each)) for each in path.streams]
            merged = heapq.merge(*flat, reverse=path.reverse)
            yield from iter(lambda: list(islice(merged, _BATCH)), [])

    def _stream(self, stream: Stream) -> Iterator[list[Entry]]:
        """The entries of a stream, without the head. A span without entries gives an empty list."""
        size = len(stream.head)
        for span in reversed(stream.spans) if self.path.reverse else stream.spans:
            yield []
            for piece in self._span(span):
                yield [(key[size:], entity_id) for key, entity_id in piece] if size else piece

    def _span(self, span: Span) -> Iterator[list[Entry]]:
        reverse = self.path.reverse
        pieces = self._index.pieces(span, reverse=reverse)
        if not self._changed:
            return pieces
        changed = self._changed
        unchanged = (each for piece in pieces for each in piece if each[1] not in changed)
        entries = self._entries
        own = entries[bisect_left(entries, span.low) : bisect_left(entries, span.high)]
        merged = heapq.merge(unchanged, own[::-1] if reverse else own, reverse=reverse)
        return iter(lambda: list(islice(merged, _BATCH)), [])

    # -- counts ------------------------------------------------------------------------------

    async def count(self) -> int:
        """The number of matching rows."""
        await self._prepare()
        try:
            if self.path.exact and self.path.ids is None and not self._changed:
                return await _count(self._index, self.path.spans)
            total = 0
            for batch in self._batches():
                total += len(self._matching([entity_id for _, entity_id in batch]))
                await pause()
            return total
        finally:
            self._index.release()

    async def count_entries(self) -> int:
        """The number of entries that would be read without a limit."""
        if self.path.ids is not None:
            return len(self.path.ids)
        await self._prepare()
        try:
            return await _count(self._index, self.path.spans)
        finally:
            self._index.release()
