"""The store as it was at one moment, while others go on writing.

Nothing is copied: each section notes what an entity was before it changes, for as long as the
snapshot is open. So it costs what changes meanwhile, not what is stored. A section that is replaced as
a whole is kept instead.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Final

from hf_async_store.changes import Record
from hf_async_store.driver import batched
from hf_async_store.generators import Owned
from hf_async_store.query import EVERYTHING, Query, compile_filter, ordered
from hf_async_store.values import Entity, Key

if TYPE_CHECKING:
    from hf_async_store.strategies.json.collection_table import CollectionTable, SnapshotDelta
    from hf_async_store.strategies.json.recovery import StoreState

_CHUNK_SIZE: Final = 512


class Snapshot:
    """Reads of one moment; to be closed.

    Args:
        state: current at the moment that is kept.
    """

    def __init__(self, state: StoreState) -> None:
        self._sections: dict[str, tuple[CollectionTable, SnapshotDelta]] = {
            name: (section, section.pin())
            for name, section in state.sections.items()
            if section.declared
        }

    async def close(self) -> None:
        for section, past in self._sections.values():
            await section.unpin(past)

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        found: list[Record | None] = []
        for number, key in enumerate(keys, 1):
            section, past = self._sections[key.collection]
            raw = section.raw_before(past, key.id)
            found.append(None if raw is None else Record(key, section.entity(key.id, raw)))
            if not number % _CHUNK_SIZE:
                await asyncio.sleep(0)
        return found

    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        async with Owned(self._pieces(query)) as pieces:
            if query.order:
                async with Owned(ordered(pieces, query)) as rows:
                    async for entity_id, entity in rows:
                        yield Record(Key(query.collection, entity_id), entity)
                return
            left = query.limit
            async for piece in pieces:
                for entity_id, entity in piece[:left]:
                    yield Record(Key(query.collection, entity_id), entity)
                if left is not None:
                    left -= len(piece)
                    if left <= 0:
                        return

    async def iter_batches(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        """See `SupportsBatches`."""
        if query.order or query.limit is not None:
            async with Owned(batched(self.select(query))) as found:
                async for each in found:
                    yield each
            return
        async with Owned(self._pieces(query)) as pieces:
            async for piece in pieces:
                if piece:
                    yield [entity for _, entity in piece]

    async def count(self, query: Query) -> int:
        if query.where == EVERYTHING:
            section, past = self._sections[query.collection]
            return len(await section.ids_before(past))
        async with Owned(self._pieces(query)) as pieces:
            return sum([len(piece) async for piece in pieces])

    async def _pieces(self, query: Query) -> AsyncGenerator[list[tuple[str, Entity]], None]:
        """What matches, by id."""
        section, past = self._sections[query.collection]
        ids: Sequence[str] = await section.ids_before(past)
        first = 0
        if query.after is not None and not query.order:
            first = bisect_right(ids, query.after.id)
        matches = compile_filter(query.where)
        decode = section.entity
        everything = query.where == EVERYTHING
        for start in range(first, len(ids), _CHUNK_SIZE):
            part = ids[start : start + _CHUNK_SIZE]
            if past.before or past.whole is not None:
                raws = [(each, section.raw_before(past, each)) for each in part]
                found = [(each, decode(each, raw)) for each, raw in raws if raw is not None]
            else:  # nothing has changed since, so all that is held is what was
                held = map(section.held.__getitem__, part)
                found = [
                    (each, decode(each, section.normalized(each, raw)))
                    for each, raw in zip(part, held, strict=True)
                ]
            yield found if everything else [row for row in found if matches(row[1])]
            await asyncio.sleep(0)
