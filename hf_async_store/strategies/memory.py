"""The memory strategy: the smallest engine that fulfils the contract; a reference for other engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, cast

from hf_async_store.changes import Change, Delete, Outcome, Record
from hf_async_store.config import MemoryConfig, StorageConfig, strategy_config
from hf_async_store.driver import Capabilities, Engine, Isolation, QueryPlan, Reader, Session
from hf_async_store.errors import StorageError
from hf_async_store.locks import ReaderWriterLock
from hf_async_store.preconditions import changed, check_children, check_parents
from hf_async_store.query import Query, compile_filter, ordered
from hf_async_store.schema import HOST_FACTORY, Collection, Field, Schema
from hf_async_store.strategy import StorageStrategy, schema_of
from hf_async_store.values import Entity, Key, Value, copy_entity

if TYPE_CHECKING:
    from pathlib import Path

_LOCK_TIMEOUT: Final = 30.0
_BATCH_SIZE: Final = 256


class MemoryStorageStrategy(StorageStrategy):
    """A store in the memory of one process: for tests, and as a reference for other engines.

    Args:
        config: `memory:`, a dict with the structure of the spec, or a `MemoryConfig`.
        collections: the declared collections.
    """

    def __init__(
        self,
        config: StorageConfig | MemoryConfig | Mapping[str, object] | str | Path = "memory:",
        *,
        collections: Iterable[Collection] = HOST_FACTORY,
    ) -> None:
        schema = schema_of(collections)
        super().__init__(MemoryEngine(schema, strategy_config(config, MemoryConfig)), schema)


class _SessionView:
    """The stored entities, with layers of uncommitted changes above them; None deletes an entity."""

    def __init__(self, stored: dict[Key, Entity]) -> None:
        self.stored = stored
        self.overlays: list[dict[Key, Entity | None]] = [{}]

    def get(self, key: Key) -> Entity | None:
        for layer in reversed(self.overlays):
            if key in layer:
                return layer[key]
        return self.stored.get(key)

    def entities(self, collection: str) -> Iterator[tuple[str, Entity]]:
        overlay: dict[Key, Entity | None] = {}
        for layer in self.overlays:
            overlay.update(layer)
        for key, entity in (self.stored | overlay).items():
            if key.collection == collection and entity is not None:
                yield key.id, entity

    def commit_overlay(self) -> None:
        """Merge the top layer into the one below it; the lowest one into the stored entities."""
        top = self.overlays.pop()
        if self.overlays:
            self.overlays[-1].update(top)
            return
        for key, entity in top.items():
            if entity is None:
                self.stored.pop(key, None)
            else:
                self.stored[key] = entity


class _Reader:
    def __init__(self, view: _SessionView) -> None:
        self._view = view

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        return [
            None if (entity := self._view.get(key)) is None else _record(key, entity)
            for key in keys
        ]

    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        entities = list(self._view.entities(query.collection))

        async def batches() -> AsyncGenerator[list[tuple[str, Entity]], None]:
            matches = compile_filter(query.where)
            for start in range(0, len(entities), _BATCH_SIZE):
                yield [each for each in entities[start : start + _BATCH_SIZE] if matches(each[1])]
                await asyncio.sleep(0)

        async for entity_id, entity in ordered(batches(), query):
            yield _record(Key(query.collection, entity_id), entity)

    async def count(self, query: Query) -> int:
        matches = compile_filter(query.where)
        return sum(matches(each) for _, each in self._view.entities(query.collection))


class _Session(_Reader):
    def __init__(self, engine: MemoryEngine, view: _SessionView) -> None:
        super().__init__(view)
        self._engine = engine

    async def write(self, changes: Sequence[Change]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for change in changes:
            outcomes.append(self._engine.apply(change, self._view))
            if isinstance(outcomes[-1], StorageError):
                break
        return outcomes

    @asynccontextmanager
    async def savepoint(self) -> AsyncGenerator[Session, None]:
        depth = len(self._view.overlays)
        self._view.overlays.append({})
        try:
            yield self
        except BaseException:
            del self._view.overlays[depth:]
            raise
        self._view.commit_overlay()


class MemoryEngine(_Reader):
    """Stores all entities in one dict, with one lock that sessions and single writes acquire."""

    capabilities: Final = Capabilities(
        engine="memory", durable=False, multi_process=False, indexes=False
    )

    def __init__(self, schema: Schema, config: MemoryConfig) -> None:
        self._stored: dict[Key, Entity] = {}
        super().__init__(_SessionView(self._stored))
        self._schema = schema
        self._references = config.enforce_references
        self._lock = ReaderWriterLock()

    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        async with self._lock.writing(_LOCK_TIMEOUT):
            outcomes: list[Outcome] = []
            for change in changes:
                view = _SessionView(self._stored)
                outcomes.append(self.apply(change, view))
                view.commit_overlay()
            return outcomes

    @asynccontextmanager
    async def session(self, isolation: Isolation | None) -> AsyncGenerator[Session, None]:
        async with self._lock.writing(_LOCK_TIMEOUT):
            view = _SessionView(self._stored)
            yield _Session(self, view)
            view.commit_overlay()

    @asynccontextmanager
    async def snapshot(self) -> AsyncGenerator[Reader, None]:
        # Stored entities are replaced and never modified, so a shallow copy of the dict suffices.
        yield _Reader(_SessionView(self._stored.copy()))

    async def fetch_undeclared(self, collection: Collection, entity_id: str) -> Record | None:
        return (await self.fetch([Key(collection.name, entity_id)]))[0]

    async def exists(self) -> bool:
        return True

    async def is_same_store(self, other: Engine) -> bool:
        return other is self

    async def undeclared(self) -> list[str]:
        return []  # only this engine writes to its memory, and only to declared collections

    def apply(self, change: Change, view: _SessionView) -> Outcome:
        """Apply one change, with its change marker, to the top layer; or return its error."""
        current = view.get(change.key)
        try:
            entity = changed(change, current)
            if self._references:
                self._check_references(change, current, view)
        except StorageError as exc:
            return exc
        view.overlays[-1][change.key] = entity
        if change.mark is not None:
            view.overlays[-1][change.mark.key] = change.mark.entity
        stored = current if isinstance(change, Delete) else entity
        return None if stored is None else cast("int", stored["version"])

    def _check_references(self, change: Change, current: Entity | None, view: _SessionView) -> None:
        if not isinstance(change, Delete):
            check_parents(self._schema, change, current, lambda key: view.get(key) is not None)
        elif current is not None:
            check_children(self._schema, change.key, lambda *child: _referrers(view, *child))

    async def explain(self, query: Query) -> QueryPlan:
        return QueryPlan(access="scan", residual=True, sorted_here=True)

    async def probe(self) -> None:
        pass  # memory is always writable

    async def health(self) -> Mapping[str, Value]:
        return {"entities": len(self._stored)}

    def describe(self) -> Mapping[str, Value]:
        return {"configuration": {"enforce_references": self._references}}

    async def close(self) -> None:
        self._stored.clear()


def _referrers(view: _SessionView, child: Collection, field: Field, parent: str) -> Iterator[str]:
    for entity_id, entity in view.entities(child.name):
        if entity.get(field.name) == parent:
            yield entity_id


def _record(key: Key, entity: Entity) -> Record:
    return Record(key, copy_entity(entity))
