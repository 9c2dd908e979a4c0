"""The memory strategy: the smallest engine that fulfils the contract; an example for other engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from hf_async_store.changes import Change, Outcome, Record
from hf_async_store.config import MemoryConfig, StorageConfig, strategy_config
from hf_async_store.driver import Capabilities, Engine, Isolation, Overlay, Reader, Session
from hf_async_store.errors import StorageError
from hf_async_store.locks import ReaderWriterLock
from hf_async_store.query import Query, compile_filter, ordered
from hf_async_store.schema import HOST_FACTORY, Collection, Schema
from hf_async_store.strategy import StorageStrategy, schema_of
from hf_async_store.values import Entity, Key, Value, copy_entity

if TYPE_CHECKING:
    from pathlib import Path

_LOCK_TIMEOUT: Final = 30.0
_BATCH_SIZE: Final = 256


class MemoryStorageStrategy(StorageStrategy):
    """A store in the memory of one process: for tests, and as an example for other engines.

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


class _OverlayReader(Reader):
    """Reads stored entities with uncommitted changes above them."""

    def __init__(self, overlay: Overlay) -> None:
        self.overlay = overlay

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        return [
            None if (entity := self.overlay.get(key)) is None else _record(key, entity)
            for key in keys
        ]

    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        entities = list(self.overlay.entities(query.collection))

        async def batches() -> AsyncGenerator[list[tuple[str, Entity]], None]:
            matches = compile_filter(query.where)
            for start in range(0, len(entities), _BATCH_SIZE):
                yield [each for each in entities[start : start + _BATCH_SIZE] if matches(each[1])]
                await asyncio.sleep(0)

        async for entity_id, entity in ordered(batches(), query):
            yield _record(Key(query.collection, entity_id), entity)


class _MemorySession(_OverlayReader, Session):
    async def write(self, changes: Sequence[Change]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for change in changes:
            outcomes.append(self.overlay.apply(change))
            if isinstance(outcomes[-1], StorageError):
                break
        return outcomes

    @asynccontextmanager
    async def savepoint(self) -> AsyncGenerator[Session, None]:
        with self.overlay.savepoint():
            yield self


class MemoryEngine(Engine):
    """Stores all entities in one dict, with one lock that sessions and single writes acquire."""

    capabilities: Capabilities = Capabilities(
        engine="memory", durable=False, multi_process=False, indexes=False
    )

    def __init__(self, schema: Schema, config: MemoryConfig) -> None:
        self._stored: dict[Key, Entity] = {}
        self._schema = schema
        self._references = config.enforce_references
        self._lock = ReaderWriterLock()

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        return [
            None if (entity := self._stored.get(key)) is None else _record(key, entity)
            for key in keys
        ]

    def select(self, query: Query) -> AsyncGenerator[Record, None]:
        return _OverlayReader(self._overlay()).select(query)

    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        async with self._lock.writing(_LOCK_TIMEOUT):
            outcomes: list[Outcome] = []
            for change in changes:
                overlay = self._overlay()
                outcomes.append(overlay.apply(change))
                self._commit(overlay)
            return outcomes

    @asynccontextmanager
    async def session(self, isolation: Isolation | None) -> AsyncGenerator[Session, None]:
        async with self._lock.writing(_LOCK_TIMEOUT):
            overlay = self._overlay()
            yield _MemorySession(overlay)
            self._commit(overlay)

    @asynccontextmanager
    async def snapshot(self) -> AsyncGenerator[Reader, None]:
        # Stored entities are replaced and never modified, so a shallow copy of the dict suffices.
        copied = Overlay(self._schema, self._stored.copy(), references=self._references)
        yield _OverlayReader(copied)

    def _overlay(self) -> Overlay:
        return Overlay(self._schema, self._stored, references=self._references)

    def _commit(self, overlay: Overlay) -> None:
        for key, entity in overlay.changes.items():
            if entity is None:
                self._stored.pop(key, None)
            else:
                self._stored[key] = entity

    async def health(self) -> Mapping[str, Value]:
        return {"entities": len(self._stored)}

    def describe(self) -> Mapping[str, Value]:
        return {"configuration": {"enforce_references": self._references}}

    async def close(self) -> None:
        self._stored.clear()


def _record(key: Key, entity: Entity) -> Record:
    return Record(key, copy_entity(entity))
