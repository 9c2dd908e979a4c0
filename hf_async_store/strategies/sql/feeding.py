"""The SQL engine with change feeds: `Engine.read_feed` and its companions, and the retention."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

from hf_async_store.changes import Outcome, Record, TakeChanges
from hf_async_store.driver import FeedBatch
from hf_async_store.errors import SchemaMismatchError, StorageError
from hf_async_store.generators import Owned
from hf_async_store.query import Query
from hf_async_store.schema import SUBSCRIPTION_COLLECTION, EngineSchema
from hf_async_store.strategies.sql.catalogue import Catalogue, TableMissingError
from hf_async_store.strategies.sql.claiming import ClaimingSQLEngine
from hf_async_store.strategies.sql.feed import Feed, Source
from hf_async_store.strategies.sql.feed_state import STEPS
from hf_async_store.strategies.sql.rows import Tables
from hf_async_store.strategies.sql.session import on_live_connection
from hf_async_store.values import Key, Value

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.connections import LeasedConnection
    from hf_async_store.strategies.sql.rows import Table

log: Final = logging.getLogger("hf_async_store.feed")

_SUBSCRIPTIONS: Final = SUBSCRIPTION_COLLECTION.name
_LONGEST_PAUSE: Final = 60.0
"""The longest time, in seconds, between two runs that delete old changes."""

_STOP_SECONDS: Final = 1.0
"""How long closing a store waits until a batch of old changes was deleted."""


class FeedingSQLEngine(ClaimingSQLEngine):
    """One database that keeps the changes of collections.

    Args:
        feed: its class.
        others: those of `ClaimingSQLEngine`.
    """

    def __init__(self, feed: type[Feed], *others: Any) -> None:
        super().__init__(*others)
        self._feed = feed(self._dialect)
        self._retention = Retention(self)

    async def feed_position(self, collection: str) -> str:
        return await on_live_connection(lambda: self._feed_position(collection))

    async def _feed_position(self, collection: str) -> str:
        self._check_exists(collection)
        async with self._main.lease() as lease:
            return await self._feed.position(await self._source(lease, collection))

    async def read_feed(self, collection: str, since: str, limit: int) -> FeedBatch:
        return await on_live_connection(lambda: self._read_feed(collection, since, limit))

    async def _read_feed(self, collection: str, since: str, limit: int) -> FeedBatch:
        self._check_exists(collection)
        async with self._queries.lease() as lease:
            return await self._feed.read(await self._source(lease, collection), since, limit)

    async def feed_changed(self, positions: Mapping[str, str], seconds: float) -> None:
        self._main.check_open()
        tables = {} if self._state is None else self._state.tables
        watched = {each: tables[each] for each in positions if each in tables}
        await self._feed.changed(watched, seconds)

    async def health(self) -> Mapping[str, Value]:
        report = dict(await super().health())
        if not self._dialect.exists():
            return report
        async with self._main.lease() as lease:
            unrecorded = await self._sync.unrecorded(lease)
        problems = report["problems"]
        assert isinstance(problems, list)
        lost = [
            f"changes of {name} are not recorded, because triggers were dropped or disabled: "
            f"{', '.join(triggers)}. Run `hf-async-store schema apply` with its declaration; watchers then "
            "get FeedExpiredError"
            for name, triggers in unrecorded.items()
        ]
        return {**report, "problems": [*problems, *lost]}

    def _check_exists(self, collection: str) -> None:
        if self._state is None and not self._dialect.exists():
            raise _no_feed(collection)

    async def _source(self, lease: LeasedConnection, collection: str) -> Source:
        """The feed of a collection.

        Raises:
            SchemaMismatchError: its changes are not recorded.
        """
        tables = await self.tables(lease)
        if not _has_feed(tables, collection):
            # Another program may have created it since the catalogue was read.
            tables = await self._read_again(lease)
        if not _has_feed(tables, collection):
            raise _no_feed(collection)
        store = tables.catalogue.store_id
        return Source(lease, store, tables[collection], self._dialect.names)

    async def _read_again(self, lease: LeasedConnection) -> Tables:
        """The tables from the catalogue as it is now, or as another task has read it since."""
        found = await self._sync.read(lease) or Catalogue()
        if self._state is None or found.generation > self._state.tables.catalogue.generation:
            return self._use(found)
        return self._state.tables

    def changing(self, lease: LeasedConnection) -> AbstractAsyncContextManager[None]:
        names = self._dialect.names
        return self._feed.merging(lease, [names.feed(each.collection) for each in self._fed()])

    # -- named subscriptions -----------------------------------------------------------------
    #
    # Their table is made when the first of them is written.

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        if any(each.collection == _SUBSCRIPTIONS for each in keys):
            await self._look_for_subscriptions()
        return await super().fetch(keys)

    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        if query.collection == _SUBSCRIPTIONS:
            await self._look_for_subscriptions()
        async with Owned(super().select(query)) as records:
            async for each in records:
                yield each

    async def _write_each(self, take: TakeChanges, *, patient: bool) -> list[Outcome]:
        try:
            return await super()._write_each(take, patient=patient)
        except TableMissingError:
            await self._prepare_subscriptions()
        return await super()._write_each(take, patient=patient)

    async def _look_for_subscriptions(self) -> None:
        """Read the catalogue again if another program may have made the table since."""
        if self._state is not None and _SUBSCRIPTIONS not in self._state.tables:
            async with self._main.lease() as lease:
                await self._read_again(lease)

    async def _prepare_subscriptions(self) -> None:
        await self._prepare()
        if _SUBSCRIPTIONS not in self.known_tables:
            names = [each for each in self._sync.schema if each != _SUBSCRIPTIONS]
            declared = [self._sync.schema[each] for each in names]
            self._sync.schema = EngineSchema([*declared, SUBSCRIPTION_COLLECTION])
            self._ready = False
            await self._prepare()

    # -- retention ---------------------------------------------------------------------------

    def _use(self, catalogue: Catalogue) -> Tables:
        tables = super()._use(catalogue)
        self._retention.schedule()
        return tables

    async def _prepare(self) -> None:
        if not self._ready:
            await super()._prepare()
            await self._retention.start()

    def shortest_retention(self) -> float | None:
        """The shortest time, in seconds, for which changes are kept, or will be according to the
        declarations of this program; None if there are no feeds."""
        kept = [each.entry.feed.seconds for each in self._fed() if each.entry.feed]
        declared = [each.feed.total_seconds() for each in self.schema.values() if each.feed]
        return min((*kept, *declared), default=None)

    def _fed(self) -> list[Table]:
        tables = {} if self._state is None else self._state.tables
        return [each for each in tables.values() if each.entry.has_feed]

    async def prune_feeds(self, may_continue: Callable[[], bool]) -> None:
        """Delete the changes that were kept long enough."""
        known = {each.collection for each in self._fed()}
        if any(each.feed and each.name not in known for each in self.schema.values()):
            async with self._main.lease() as lease:  # `schema apply` may have run since
                await self._read_again(lease)
        for each in self._fed():
            more = True
            while more and may_continue():
                async with self.writing() as lease:
                    more = await self._feed.prune(await self._source(lease, each.collection))
                await asyncio.sleep(0)

    async def close(self) -> None:
        try:
            await self._retention.stop()
            await self._feed.close()
        finally:
            await super().close()


class Retention:
    """Deletes old changes: some before the first write of a process, and then more in the background.

    A timer of the event loop starts each run. It references the engine weakly.
    """

    def __init__(self, engine: FeedingSQLEngine) -> None:
        self._engine = ref(engine)
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._started = self._stopped = False
        self._is_scheduled = False  # until the run has ended

    async def start(self) -> None:
        """Begin, unless it has begun already."""
        engine = self._engine()
        if not self._started and engine is not None:
            self._started = True
            batches = iter([True])
            try:
                await self._prune(engine, lambda: next(batches, False))
            finally:
                self.schedule()

    def schedule(self) -> None:
        """Let the next run begin after some time, if it has begun and there are feeds."""
        engine = self._engine()
        if engine is None or not self._started or self._stopped or self._is_scheduled:
            return
        seconds = engine.shortest_retention()
        if seconds is not None:
            self._is_scheduled = True
            pause = min(seconds / STEPS, _LONGEST_PAUSE)
            self._timer = asyncio.get_running_loop().call_later(pause, self._begin)

    def _begin(self) -> None:
        engine = self._engine()
        if engine is not None:
            self._task = asyncio.get_running_loop().create_task(self._run(engine))

    async def _run(self, engine: FeedingSQLEngine) -> None:
        try:
            await self._prune(engine, lambda: not self._stopped)
        finally:
            self._task = None
            self._is_scheduled = False
            self.schedule()

    async def _prune(self, engine: FeedingSQLEngine, may_continue: Callable[[], bool]) -> None:
        try:
            await engine.prune_feeds(may_continue)
        except StorageError as exc:
            log.debug("old changes were not deleted: %s", exc)

    async def stop(self) -> None:
        """End the runs; one in progress ends after its batch."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            _, running = await asyncio.wait([self._task], timeout=_STOP_SECONDS)
            for each in running:
                each.cancel()
                with suppress(asyncio.CancelledError):
                    await each


def _has_feed(tables: Tables, collection: str) -> bool:
    return collection in tables and tables[collection].entry.has_feed


def _no_feed(collection: str) -> SchemaMismatchError:
    return SchemaMismatchError(
        f"the changes of {collection} are not recorded yet: run `hf-async-store schema apply` with its "
        "declaration"
    )
