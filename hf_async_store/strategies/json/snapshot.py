"""The store as it was at one moment, while others go on writing.

Nothing is copied: each section notes what an entity was before it changes, for as long as the
snapshot is open. So it costs what changes meanwhile, not what is stored.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from hf_async_store.entities import Entity, Key, Record
from hf_async_store.query import EVERYTHING, Query, compile_filter, ordered

if TYPE_CHECKING:
    from hf_async_store.strategies.json.loading import State
    from hf_async_store.strategies.json.section import Before, Section
    from hf_async_store.strategies.json.serializer import JSONSerializer

_PIECE: Final = 512


class Snapshot:
    """Reads of one moment; a context manager that ends them.

    Args:
        state: current at the moment that is kept.
    """

    def __init__(self, state: State, serializer: JSONSerializer) -> None:
        self._serializer = serializer
        self._sections: dict[str, tuple[Section, Before]] = {
            name: (section, {}) for name, section in state.sections.items() if section.declared
        }

    def __enter__(self) -> Self:
        for section, before in self._sections.values():
            section.keep(before)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for section, before in self._sections.values():
            section.release(before)

    def _raw(self, collection: str, entity_id: str) -> bytes | None:
        section, before = self._sections[collection]
        if entity_id not in before:
            return section.canonical(entity_id)
        was = before[entity_id]
        return None if was is None else section.adopted(entity_id, was)

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        found: list[Record | None] = []
        for number, key in enumerate(keys, 1):
            raw = self._raw(key.collection, key.id)
            found.append(None if raw is None else Record(key, self._serializer.decode(raw)))
            if not number % _PIECE:
                await asyncio.sleep(0)
        return found

    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        pieces = self._pieces(query)
        async with aclosing(pieces):
            if query.order:
                async for entity_id, entity in ordered(pieces, query):
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

    async def count(self, query: Query) -> int:
        if query.where == EVERYTHING:
            section, before = self._sections[query.collection]
            return len(await section.ids_before(before))
        pieces = self._pieces(query)
        async with aclosing(pieces):
            return sum([len(piece) async for piece in pieces])

    async def _pieces(self, query: Query) -> AsyncGenerator[list[tuple[str, Entity]], None]:
        """What matches, by id."""
        section, before = self._sections[query.collection]
        ids: Sequence[str] = await section.ids_before(before)
        first = 0
        if query.after is not None and not query.order:
            first = bisect_right(ids, query.after.id)
        matches = compile_filter(query.where)
        decode = self._serializer.decode
        for start in range(first, len(ids), _PIECE):
            raws = (
                (each, self._raw(query.collection, each)) for each in ids[start : start + _PIECE]
            )
            found = [(each, decode(raw)) for each, raw in raws if raw is not None]
            yield found if query.where == EVERYTHING else [row for row in found if matches(row[1])]
            await asyncio.sleep(0)
