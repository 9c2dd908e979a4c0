"""The memory strategy: the smallest engine that fulfils the contract; an example for other engines."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from hf_async_store.changes import Change, Outcome, Record
from hf_async_store.collector import GatheredObjects
from hf_async_store.config import MemoryConfig, StorageConfig, strategy_config
from hf_async_store.driver import (
    INTERFACE_VERSION,
    Capabilities,
    Engine,
    FeedBatch,
    FeedEntry,
    Isolation,
    Overlay,
    QueryPlan,
    Reader,
    Session,
)
from hf_async_store.errors import (
    FeedExpiredError,
    InvalidCursorError,
    StorageError,
    StoreClosedError,
)
from hf_async_store.event_loop import Chunks, long_work
from hf_async_store.locks import ReaderWriterLock
from hf_async_store.query import MISSING, Missing, Query
from hf_async_store.schema import HOST_FACTORY, Collection, Schema
from hf_async_store.strategy import StorageStrategy, schema_of
from hf_async_store.table import PastMoment, Table
from hf_async_store.table_reading import TableReader
from hf_async_store.unique import Fields
from hf_async_store.values import Entity, Key, Value, copy_entity

if TYPE_CHECKING:
    from pathlib import Path

_LOCK_TIMEOUT: Final = 30.0
_CHUNK_SIZE: Final = 512
"""How many entities are copied between two iterations of the event loop."""


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


class _MemoryTable(Table[Entity]):
    """The entities of one collection. They are replaced and never modified."""

    def values(self, entity_id: str, stored: Entity) -> Sequence[Value | Missing]:
        del entity_id
        return [stored.get(each, MISSING) for each in self.indexes.fields]

    def entity(self, entity_id: str, stored: Entity) -> Entity:
        del entity_id
        return copy_entity(stored)

    def peek(self, entity_id: str, stored: Entity) -> Entity:
        del entity_id
        return stored


class _Stored(Mapping[Key, Entity]):
    """The committed entities of all collections."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self.tables = {name: _MemoryTable(each) for name, each in schema.items()}

    def table(self, collection: str) -> _MemoryTable:
        """The table of a collection, which need not be listed in the schema."""
        if collection not in self.tables:
            self.tables[collection] = _MemoryTable(self._schema[collection])
        return self.tables[collection]

    def owners(self, collection: str, fields: Fields, digest: bytes) -> list[str]:
        """The ids of the entities that have the values of a digest."""
        return self.table(collection).known_owners(fields).of(digest)

    def get(self, key: Key, default: Any = None) -> Any:  # a third of the time of `Mapping.get`
        table = self.tables.get(key.collection)
        return default if table is None else table.entities.get(key.id, default)

    def __getitem__(self, key: Key) -> Entity:
        return self.table(key.collection).entities[key.id]

    def __iter__(self) -> Iterator[Key]:
        for name, table in self.tables.items():
            for entity_id in table.entities:
                yield Key(name, entity_id)

    def __len__(self) -> int:
        return sum(len(each.entities) for each in self.tables.values())


class _OverlayReader(TableReader[Entity]):
    """Reads stored entities with uncommitted changes above them."""

    def __init__(self, stored: _Stored, overlay: Overlay) -> None:
        self._stored = stored
        self.overlay = overlay

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        return await _records(keys, self.overlay.get)

    def _table(self, collection: str) -> Table[Entity]:
        return self._stored.table(collection)

    def _own_changes(self, collection: str) -> Mapping[str, Entity | None]:
        return self.overlay.written(collection)


class _Snapshot(TableReader[Entity]):
    """Reads the tables as they were when the snapshot was created."""

    def __init__(self, tables: Mapping[str, Table[Entity]]) -> None:
        self._tables = dict(tables)  # a later write may create a table
        self._moments = {name: table.pin() for name, table in tables.items()}

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        return await _records(keys, self._get)

    def _get(self, key: Key) -> Entity | None:
        moment = self._moments.get(key.collection)
        return None if moment is None else moment.get(key.id)

    def _table(self, collection: str) -> Table[Entity]:
        return self._tables[collection]

    def _pin(self, collection: str) -> PastMoment[Entity]:
        return self._moments[collection]

    async def _unpin(self, collection: str, moment: PastMoment[Entity]) -> None:
        pass  # by `close`

    async def close(self) -> None:
        for name, table in self._tables.items():
            await table.unpin(self._moments[name])


class _MemorySession(_OverlayReader, Session):
    async def write(self, changes: Sequence[Change]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        work = long_work()
        for change in changes:
            outcomes.append(self.overlay.apply(change))
            if isinstance(outcomes[-1], StorageError):
                break
            await work.pause_if_due()
        return outcomes

    @asynccontextmanager
    async def savepoint(self) -> AsyncGenerator[Session, None]:
        with self.overlay.savepoint():
            yield self


class _Feed:
    """The changes of one collection, kept for at least its retention.

    A position is the number of changes before it, behind a prefix that only this feed has.
    """

    def __init__(self, collection: str, retention: float) -> None:
        self._retention = retention
        self._prefix = f"{secrets.token_hex(8)}.{collection}."
        self._entries: list[FeedEntry] = []
        self._times: list[float] = []  # of the commits
        self._removed = 0  # the number of changes that are not kept any more

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def _end(self) -> int:
        return self._removed + len(self._entries)

    @property
    def position(self) -> str:
        """The end of the feed."""
        return f"{self._prefix}{self._end}"

    def entry(
        self, offset: int, key: Key, before: Entity | None, after: Entity | None
    ) -> FeedEntry:
        """The entry of a change that is not the next one, but as many later as `offset` says."""
        return FeedEntry(
            key,
            None if before is None else Record(key, before),
            None if after is None else Record(key, after),
            f"{self._prefix}{self._end + offset + 1}",
        )

    def append(self, entries: Sequence[FeedEntry]) -> None:
        """Add the entries of a commit."""
        now = time.monotonic()
        self._entries += entries
        self._times += [now] * len(entries)
        half = len(self._entries) // 2
        if half and self._times[half - 1] < now - self._retention:
            self.remove(half)

    def remove(self, number: int) -> None:
        """Remove the oldest entries."""
        del self._entries[:number], self._times[:number]
        self._removed += number

    def read(self, since: str, limit: int) -> FeedBatch:
        """See `Engine.read_feed`."""
        number = since.removeprefix(self._prefix)
        if not re.fullmatch(r"[0-9]{1,18}", number) or int(number) > self._end:
            raise InvalidCursorError("it is not a position of this feed")
        first = int(number) - self._removed
        if first < 0:
            raise FeedExpiredError("what was committed after this position is not kept any more")
        entries = self._entries[first : first + limit]
        return FeedBatch(entries, entries[-1].position if entries else since)


class MemoryEngine(Engine):
    """Stores the entities in a table for each collection; sessions and single writes acquire one lock."""

    interface_version = INTERFACE_VERSION
    capabilities: Capabilities = Capabilities(
        engine="memory",
        durable=False,
        multi_process=False,
        claims=True,
        change_markers=True,
        unique_indexes=True,
        feed=True,
        feed_order=True,
    )

    def __init__(self, schema: Schema, config: MemoryConfig) -> None:
        self._stored = _Stored(schema)
        self._schema = schema
        self._references = config.enforce_references
        self._lock = ReaderWriterLock()
        self._feeds = {
            name: _Feed(name, each.feed.total_seconds())
            for name, each in schema.items()
            if each.feed is not None
        }
        self._fed = asyncio.Event()  # set by each commit that adds to a feed
        self._gathered = GatheredObjects()  # the entities that are stored
        self._closed = False

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        self._refuse_closed()
        if len(keys) <= _CHUNK_SIZE:
            get = self._stored.get
            return [
                None if (found := get(key)) is None else Record(key, copy_entity(found))
                for key in keys
            ]
        async with self.snapshot() as moment:
            return await moment.fetch(keys)

    async def fetch_undeclared(self, collection: Collection, entity_id: str) -> Record | None:
        self._refuse_closed()
        if collection.name not in self._stored.tables:
            return None
        return await super().fetch_undeclared(collection, entity_id)

    def select(self, query: Query) -> AsyncGenerator[Record, None]:
        return self._reader().select(query)

    def select_batches(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        return self._reader().select_batches(query)

    async def count(self, query: Query) -> int:
        return await self._reader().count(query)

    async def explain(self, query: Query) -> QueryPlan:
        return await self._reader().explain(query)

    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        async with self._lock.writing(_LOCK_TIMEOUT):
            self._refuse_closed()
            await self._find_owners()
            overlay = self._overlay()
            outcomes: list[Outcome] = []
            work = long_work()
            for each in changes:  # a deletion may look at all children
                outcomes.append(overlay.apply(each))
                await work.pause_if_due()
            await self._commit(overlay)
            return outcomes

    def session(self, isolation: Isolation | None) -> AbstractAsyncContextManager[Session]:
        del isolation
        # Another task may enter it, for the first call.
        return self._session(asyncio.current_task())

    @asynccontextmanager
    async def _session(self, owner: asyncio.Task[object] | None) -> AsyncGenerator[Session, None]:
        async with self._lock.writing(_LOCK_TIMEOUT, owner=owner):
            self._refuse_closed()
            await self._find_owners()
            overlay = self._overlay()
            yield _MemorySession(self._stored, overlay)
            await self._commit(overlay)

    @asynccontextmanager
    async def snapshot(self) -> AsyncGenerator[Reader, None]:
        self._refuse_closed()
        snapshot = _Snapshot(self._stored.tables)
        try:
            yield snapshot
        finally:
            await snapshot.close()

    def _reader(self) -> _OverlayReader:
        self._refuse_closed()
        return _OverlayReader(self._stored, self._overlay())

    def _overlay(self) -> Overlay:
        return Overlay(
            self._schema, self._stored, references=self._references, owners=self._stored.owners
        )

    async def _find_owners(self) -> None:
        """Prepare the look-up of unique values, while the lock is held."""
        for name, unique in self._schema.unique.items():
            for fields in unique:
                await self._stored.table(name).owners(fields)

    async def _commit(self, overlay: Overlay) -> None:
        """Apply the changes to the tables. The write lock is held."""
        self._refuse_closed()
        images: dict[str, dict[str, Entity | None]] = {}
        entries: dict[str, list[FeedEntry]] = {name: [] for name in self._feeds}
        async for chunk in Chunks(overlay.changes.items(), _CHUNK_SIZE):
            for key, entity in chunk:
                images.setdefault(key.collection, {})[key.id] = entity
                if key.collection in entries:
                    self._note(entries[key.collection], key, entity)
            self._gathered.add(len(chunk))
        tables = {name: self._stored.table(name) for name in images}
        merged = {
            name: await tables[name].merged(each)
            for name, each in images.items()
            if tables[name].is_bulk(each)
        }
        self._refuse_closed()  # it may have been closed during one of the awaits
        for name, each in images.items():
            tables[name].apply(each, merged.get(name))
        for name, added in entries.items():
            if added:
                self._feeds[name].append(added)
                self._fed.set()
        for table in tables.values():
            await table.reclaim()

    def _note(self, entries: list[FeedEntry], key: Key, after: Entity | None) -> None:
        """Add a change to the entries of a commit, unless it created and deleted the entity."""
        before = self._stored.get(key)
        if before is not None or after is not None:
            entries.append(self._feeds[key.collection].entry(len(entries), key, before, after))

    async def feed_position(self, collection: str) -> str:
        return self.feed(collection).position

    async def read_feed(self, collection: str, since: str, limit: int) -> FeedBatch:
        return self.feed(collection).read(since, limit)

    def feed(self, collection: str) -> _Feed:
        """The feed of a collection."""
        self._refuse_closed()
        return self._feeds[collection]

    async def feed_changed(self, positions: Mapping[str, str], seconds: float) -> None:
        if all(self.feed(name).position == each for name, each in positions.items()):
            self._fed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._fed.wait()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise StoreClosedError("this store was closed")

    async def health(self) -> Mapping[str, Value]:
        self._refuse_closed()
        return {"entities": sum(each.collection in self._schema for each in self._stored)}

    def describe(self) -> Mapping[str, Value]:
        return {"configuration": {"enforce_references": self._references}}

    async def close(self) -> None:
        self._closed = True
        tables = [*self._stored.tables.values()]
        self._stored = _Stored(Schema(()))
        self._feeds.clear()
        self._fed.set()
        if not self._lock.has_writer:  # a transaction that has not ended may still read them
            for each in tables:
                await each.close()


async def _records(keys: Sequence[Key], get: Callable[[Key], Entity | None]) -> list[Record | None]:
    """Copies of entities; what `get` returns may not change between the chunks."""
    records: list[Record | None] = []
    gathered = GatheredObjects()
    async for chunk in Chunks(keys, _CHUNK_SIZE):
        records += [
            None if (entity := get(key)) is None else Record(key, copy_entity(entity))
            for key in chunk
        ]
        gathered.add(len(chunk))
    return records
