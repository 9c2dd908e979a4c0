"""A session on an `Overlay`, for engines without transactions of their own or with one writer at a time."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from typing import TYPE_CHECKING, Final

from hf_async_store.changes import Change, Outcome, Record
from hf_async_store.claim_records import claim_key
from hf_async_store.driver import Session
from hf_async_store.errors import StorageError
from hf_async_store.event_loop import pause
from hf_async_store.generators import Owned
from hf_async_store.query import Query, compile_filter, ordered
from hf_async_store.values import Entity, Key, copy_entity

if TYPE_CHECKING:
    from hf_async_store.overlay import Overlay

_ROWS_PER_STEP: Final = 200
"""How many entities are filtered between two iterations of the event loop."""


class OverlaySession(Session):
    """A session that reads from an overlay, and writes to it; the engine commits `overlay.changes`.

    As it is, it is for an engine whose entities are all in the mapping that the overlay was given. Another
    engine keeps that mapping, which neither class exposes, and overrides `load` and `load_collection` to
    fill it. Every method calls one of them, which so may begin the transaction. An engine that enforces
    references or unique indexes also loads in `write` what these need.

    Attributes:
        overlay: the uncommitted changes above the stored entities.
    """

    def __init__(self, overlay: Overlay) -> None:
        self.overlay = overlay

    async def load(self, keys: Sequence[Key]) -> None:
        """Put the stored entities of these keys, perhaps none, into the mapping, unless they are there."""

    async def load_collection(self, collection: str) -> None:
        """Put all stored entities of a collection into the mapping, if they are not there yet."""

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        await self.load(keys)
        found = [(key, self.overlay.get(key)) for key in keys]
        return [None if each is None else Record(key, copy_entity(each)) for key, each in found]

    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        await self.load_collection(query.collection)
        matches = compile_filter(query.where)
        entities = iter(list(self.overlay.entities(query.collection)))

        async def batches() -> AsyncGenerator[list[tuple[str, Entity]], None]:
            while some := list(islice(entities, _ROWS_PER_STEP)):
                yield [each for each in some if matches(each[1])]
                await pause()

        async with Owned(batches()) as matching, Owned(ordered(matching, query)) as rows:
            async for entity_id, entity in rows:
                yield Record(Key(query.collection, entity_id), copy_entity(entity))

    async def write(self, changes: Sequence[Change]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for outcome in await self._applied(changes):
            outcomes.append(outcome)
            if isinstance(outcome, StorageError):
                break
        return outcomes

    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        """As `Engine.write_each`: a change that fails does not end the others."""
        return list(await self._applied(changes))

    async def _applied(self, changes: Sequence[Change]) -> Iterable[Outcome]:
        keys = [each.key for each in changes]
        await self.load([*keys, *map(claim_key, keys)])
        return map(self.overlay.apply, changes)

    @asynccontextmanager
    async def savepoint(self) -> AsyncGenerator[Session, None]:
        with self.overlay.savepoint():
            yield self
