"""A snapshot: the store as it was at one moment, while writes continue.

Nothing is copied: while the snapshot is open, each section records the previous value of an entity
that changes. The cost of a snapshot depends on the number of changes, not on the size of the store.
If the dict of a section is replaced as a whole, the snapshot keeps the old dict.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Final

from hf_async_store.changes import Record
from hf_async_store.driver import Reader
from hf_async_store.generators import Owned
from hf_async_store.query import EVERYTHING, Query, compile_filter, ordered
from hf_async_store.values import Entity, Key

if TYPE_CHECKING:
    from hf_async_store.strategies.json.collection_table import CollectionTable, SnapshotDelta
    from hf_async_store.strategies.json.recovery import StoreState

_CHUNK_SIZE: Final = 512


class SnapshotReader(Reader):
    """Reads the store as it was when the snapshot was created. The user must close it.

    Args:
        state: the current state.
    """

    def __init__(self, state: StoreState) -> None:
        self._sections: dict[str, tuple[CollectionTable, SnapshotDelta]] = {
            name: (section, section.pin())
            for name, section in state.sections.items()
            if section.declared
        }

    async def close(self) -> None:
        for section, delta in self._sections.values():
            await section.unpin(delta)

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        records: list[Record | None] = []
        for number, key in enumerate(keys, 1):
            section, delta = self._sections[key.collection]
            raw = section.raw_before(delta, key.id)
            records.append(None if raw is None else Record(key, section.entity(key.id, raw)))
            if not number % _CHUNK_SIZE:
                await asyncio.sleep(0)
        return records

    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        async with Owned(self._matching(query)) as chunks:
            if query.order:
                async with Owned(ordered(chunks, query)) as rows:
                    async for entity_id, entity in rows:
                        yield Record(Key(query.collection, entity_id), entity)
                return
            remaining = query.limit
            async for chunk in chunks:
                for entity_id, entity in chunk[:remaining]:
                    yield Record(Key(query.collection, entity_id), entity)
                if remaining is not None:
                    remaining -= len(chunk)
                    if remaining <= 0:
                        return

    async def select_batches(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        if query.order or query.limit is not None:
            async with Owned(super().select_batches(query)) as batches:
                async for batch in batches:
                    yield batch
            return
        async with Owned(self._matching(query)) as chunks:
            async for chunk in chunks:
                if chunk:
                    yield [entity for _, entity in chunk]

    async def count(self, query: Query) -> int:
        if query.where == EVERYTHING:
            section, delta = self._sections[query.collection]
            return len(await section.ids_before(delta))
        async with Owned(self._matching(query)) as chunks:
            return sum([len(chunk) async for chunk in chunks])

    async def _matching(self, query: Query) -> AsyncGenerator[list[tuple[str, Entity]], None]:
        """The entities that match, in the order of their ids, in chunks."""
        section, delta = self._sections[query.collection]
        ids: Sequence[str] = await section.ids_before(delta)
        first = 0
        if query.after is not None and not query.order:
            first = bisect_right(ids, query.after.id)
        matches = compile_filter(query.where)
        decode = section.entity
        everything = query.where == EVERYTHING
        for start in range(first, len(ids), _CHUNK_SIZE):
            chunk = ids[start : start + _CHUNK_SIZE]
            if delta.before or delta.base is not None:
                raws = [(each, section.raw_before(delta, each)) for each in chunk]
                rows = [(each, decode(each, raw)) for each, raw in raws if raw is not None]
            else:  # nothing has changed since, so the current entities are those of the snapshot
                stored = map(section.entities.__getitem__, chunk)
                rows = [
                    (each, decode(each, section.normalized(each, raw)))
                    for each, raw in zip(chunk, stored, strict=True)
                ]
            yield rows if everything else [row for row in rows if matches(row[1])]
            await asyncio.sleep(0)
