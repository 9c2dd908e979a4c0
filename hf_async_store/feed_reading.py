"""The reading of change feeds, which all watchers of a store share.

Watchers that have read everything wait at the shared end of a feed. One task per store waits for changes
(`Engine.feed_changed`), after which a task for each feed reads what follows its shared end. A feed that
cannot be read, or takes long, does not hold up the others. A watcher that is behind reads from its own
position, and what it reads is kept for a while for others that come to the same position.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Final, TypeAlias, TypeVar

import msgspec

from hf_async_store.backoff import Backoff
from hf_async_store.driver import Engine, FeedBatch, FeedEntry, end_task, run_to_completion
from hf_async_store.errors import ProtocolError, StorageError, StoreClosedError, UnavailableError

Result = TypeVar("Result")

log: Final = logging.getLogger("hf_async_store.feed")

_BATCH_SIZE: Final = 100
"""How many changes are read at once."""

_BATCH_BYTES: Final = 2**20
_KEPT_BATCHES: Final = 16
_KEPT_BYTES: Final = 2**23
"""Limits of the memory for what was read; a single batch may exceed them once, if its changes are large."""

_IDLE_SECONDS: Final = 5.0
"""The longest wait for changes before the feed is read anyway."""

_READ_SECONDS: Final = 0.5
"""How long the wait for changes of the other feeds is put off for feeds that are being read."""

_LATE_SECONDS: Final = 1.0
"""The longest wait for changes of the other feeds after a feed was read that took longer."""

_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 5.0
"""Pauses after errors."""

Listener: TypeAlias = Callable[[FeedEntry | StorageError], None]
"""Called for each change of an entity, and if the feed cannot be read any more."""


PositionOf: TypeAlias = Callable[[str], Awaitable[str]]


class SharedFeed:
    """The feed of one collection.

    Attributes:
        end: where the shared reading is. If no watcher waits there, it is not read.
        generation: how often the shared reading has moved past changes.
        read_after: of how many waits for changes it is known whether they ended because of this feed.
    """

    def __init__(self, reader: FeedReader, collection: str, position: PositionOf) -> None:
        self._reader = reader
        self._position = position
        self.collection: Final = collection
        self.users = 0
        self.end = ""
        self.generation = 0
        self.read_after = reader.waits
        self._waiting: set[asyncio.Future[str | StorageError]] = set()
        self._listeners: dict[str | None, set[Listener]] = {}  # by id; None: of all entities
        self._advancing = asyncio.Lock()
        self._begun = self._completed = 0  # the number of the last call of `advance`
        self._reading: dict[str, asyncio.Future[tuple[FeedBatch, int]]] = {}
        self._batch_size = _BATCH_SIZE
        self._kept: OrderedDict[str, FeedBatch] = OrderedDict()
        self._sizes: dict[str, int] = {}  # of those that are kept
        self._kept_bytes = 0

    @property
    def is_awaited(self) -> bool:
        """Whether anybody waits for changes after the shared end."""
        return bool(self._waiting or self._listeners)

    # -- from any position -------------------------------------------------------------------

    async def read(self, position: str) -> tuple[FeedBatch, int]:
        """What follows a position, and the generation when it was read."""
        while True:
            if position in self._kept:
                return self._kept[position], self.generation
            reading = self._reading.get(position)
            if reading is None:
                return await self._read_for_all(position)
            await asyncio.wait([reading])
            if not reading.cancelled():  # its reader was
                error = reading.exception()
                if isinstance(error, StorageError):
                    raise error.copy()
                return reading.result()

    async def _read_for_all(self, position: str) -> tuple[FeedBatch, int]:
        """Read, also for those who call `read` with this position meanwhile."""
        reading: asyncio.Future[tuple[FeedBatch, int]] = asyncio.Future()
        self._reading[position] = reading
        try:
            generation = self.generation
            found = await self._read(position), generation
        except BaseException as exc:
            if isinstance(exc, StorageError):
                reading.set_exception(exc)
                reading.exception()  # marks it as retrieved
            else:
                reading.cancel()
            raise
        else:
            reading.set_result(found)
            return found
        finally:
            del self._reading[position]

    async def _read(self, position: str) -> FeedBatch:
        engine = self._reader.engine
        batch = await self._reader.retried(
            lambda: engine.read_feed(self.collection, position, self._batch_size)
        )
        if batch.entries:
            self._keep(position, batch)
        return batch

    def _keep(self, position: str, batch: FeedBatch) -> None:
        """Keep a batch for others, within the limits of memory, which also decide about the next size."""
        self._kept_bytes -= self._sizes.pop(position, 0)
        self._kept.pop(position, None)
        sizes = [*map(_size_of, batch.entries)]
        if not all(sizes):
            raise ProtocolError(f"a change in the feed of {self.collection} contains no entity")
        size = sum(sizes)
        self._batch_size = max(1, min(_BATCH_SIZE, _BATCH_BYTES * len(batch.entries) // size))
        self._kept[position], self._sizes[position] = batch, size
        self._kept_bytes += size
        while len(self._kept) > _KEPT_BATCHES or self._kept_bytes > _KEPT_BYTES:
            oldest, _ = self._kept.popitem(last=False)
            self._kept_bytes -= self._sizes.pop(oldest)

    # -- at the shared end -------------------------------------------------------------------

    async def advance(self) -> None:
        """Move the shared end to the end of the feed, as it is after this call has begun.

        What is between is read for those who wait there.
        """
        begun = self._begun
        async with self._advancing:
            if self._completed > begun:  # another call, which began after this one
                return
            self._begun += 1
            await self._read_on()
            while not self.is_awaited and not await self._skip():
                await self._read_on()
            self._completed = self._begun

    async def _skip(self) -> bool:
        """Move the shared end without reading; False if somebody has begun to wait there meanwhile."""
        position = await self._position(self.collection)
        if self.is_awaited:
            return False
        self.end = position
        self.generation += 1
        return True

    async def follow(self) -> None:
        """Read what follows the shared end, for those who wait there."""
        async with self._advancing:
            await self._read_on()

    async def _read_on(self) -> None:
        """Read until nothing follows, or nobody waits any more."""
        while self.is_awaited:
            start, waits = self.end, self._reader.waits
            batch = await self._read(start)
            if self.end != start:  # moved by `may_wait`
                continue
            self.end = batch.position
            if not batch.entries:
                if not batch.is_end:
                    continue
                self.read_after = waits
                return
            self.generation += 1
            for entry in batch.entries:
                for entity_id in (entry.key.id, None):
                    for listener in tuple(self._listeners.get(entity_id, ())):
                        listener(entry)
            self._wake(start)
            await asyncio.sleep(0)  # they take it, and may wait again

    def _wake(self, found: str | StorageError) -> None:
        for each in self._waiting:
            if not each.done():
                each.set_result(found)
        self._waiting.clear()

    async def may_wait(self, position: str, generation: int) -> bool:
        """Whether nothing is between a position and the shared end, so that a watcher may wait there.

        Args:
            position: from here, nothing was found.
            generation: when that was read.
        """
        if not self.is_awaited:
            self.end = position
            return True
        if self.end != position:
            await self.advance()
        return self.generation == generation

    async def changed(self) -> str:
        """Wait for a change after the shared end; returns the position that it follows."""
        self._reader.follow(self.collection)
        future: asyncio.Future[str | StorageError] = asyncio.Future()
        self._waiting.add(future)
        try:
            found = await future
        finally:
            self._waiting.discard(future)
        if isinstance(found, StorageError):
            raise found.copy()
        return found

    def fail(self, error: StorageError) -> None:
        """Let all that wait at the shared end fail."""
        self._wake(error)
        for listeners in self._listeners.values():
            for listener in listeners:
                listener(error.copy())
        self._listeners.clear()

    @asynccontextmanager
    async def listening(
        self, entity_id: str | None, listener: Listener
    ) -> AsyncGenerator[None, None]:
        """Call a function for each change of an entity, or of all, until the context is left."""
        await self.advance()
        self._reader.follow(self.collection)
        listeners = self._listeners.setdefault(entity_id, set())
        listeners.add(listener)
        try:
            yield
        finally:
            listeners.discard(listener)
            if not listeners and self._listeners.get(entity_id) is listeners:
                del self._listeners[entity_id]


class FeedReader:
    """The feeds that the watchers of a store read."""

    def __init__(self, engine: Engine) -> None:
        self.engine: Final = engine
        self.waits = 0  # how often a wait for changes has ended
        self._feeds: dict[str, SharedFeed] = {}
        self._task: asyncio.Task[None] | None = None
        self._readings: dict[SharedFeed, asyncio.Task[None]] = {}
        self._one_call = asyncio.Lock()  # of `feed_changed` at a time
        self._awaited = asyncio.Event()
        self._followed: dict[str, str] = {}
        self._scope: asyncio.Timeout | None = None
        self._closed = asyncio.Event()

    @asynccontextmanager
    async def using(
        self, collection: str, position: PositionOf
    ) -> AsyncGenerator[SharedFeed, None]:
        """The feed of a collection, for one watcher.

        Args:
            position: returns the end of the feed of a collection.
        """
        feed = self._feeds.setdefault(collection, SharedFeed(self, collection, position))
        feed.users += 1
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._follow())
        try:
            yield feed
        finally:
            feed.users -= 1
            if not feed.users:
                del self._feeds[collection]
            if not self._feeds:
                await self._stop()
            elif not feed.users:
                await end_task(self._readings.get(feed))

    async def _stop(self) -> None:
        # All at once: the caller may be cancelled at each `await`.
        tasks = [each for each in (self._task, *self._readings.values()) if each is not None]
        self._task = None
        for each in tasks:
            each.cancel()
        if tasks:
            await run_to_completion(asyncio.wait(tasks))

    async def close(self) -> None:
        """Let all watchers end with StoreClosedError."""
        self._closed.set()
        for each in self._feeds.values():
            each.fail(closed())
        await self._stop()

    # -- the task ----------------------------------------------------------------------------

    def follow(self, collection: str) -> None:
        """Let the task wait for changes of this collection, too."""
        if self._closed.is_set():
            raise closed()
        self._awaited.set()
        scope = self._scope
        if scope is not None and collection not in self._followed and not scope.expired():
            scope.reschedule(0.0)

    async def _follow(self) -> None:
        async with self._one_call:
            while True:
                feeds = [each for each in self._feeds.values() if each.is_awaited]
                self._awaited.clear()
                if not feeds:
                    await self._awaited.wait()
                    continue
                idle = [each for each in feeds if each not in self._readings]
                # Also a feed that nobody awaited when a wait ended: the next one need not end because of
                # the same changes.
                unread = [each for each in idle if each.read_after < self.waits]
                if unread:
                    begun = [self._begin_to_read(each) for each in unread]
                    await asyncio.wait(begun, timeout=_READ_SECONDS)
                elif idle:
                    await self._wait(idle)
                else:
                    await self._awaited.wait()

    def _begin_to_read(self, feed: SharedFeed) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(self._read(feed))
        self._readings[feed] = task
        task.add_done_callback(partial(self._end_reading, feed))
        return task

    def _end_reading(self, feed: SharedFeed, task: asyncio.Task[None]) -> None:
        """Let the next wait include a feed again, which begins soon if there is one without it."""
        del task, self._readings[feed]
        self._awaited.set()
        scope = self._scope
        if scope is not None and not scope.expired():
            soon, end = asyncio.get_running_loop().time() + _LATE_SECONDS, scope.when()
            if end is None or soon < end:
                scope.reschedule(soon)

    async def _wait(self, feeds: Sequence[SharedFeed]) -> None:
        self._followed = {each.collection: each.end for each in feeds}
        try:
            await self.retried(self._changed)
        except Exception as exc:  # noqa: BLE001  # its watchers must not hang
            for each in feeds:
                each.fail(as_storage_error(exc))
        self.waits += 1

    async def _changed(self) -> None:
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(_IDLE_SECONDS) as self._scope:
                    await self.engine.feed_changed(self._followed, _IDLE_SECONDS)
        finally:
            self._scope = None

    async def _read(self, feed: SharedFeed) -> None:
        try:
            await feed.follow()
        except Exception as exc:  # noqa: BLE001  # its watchers must not hang
            feed.fail(as_storage_error(exc))

    # -- errors ------------------------------------------------------------------------------

    async def retried(self, read: Callable[[], Awaitable[Result]]) -> Result:
        """The result of `read`, again after each retryable error until the store is closed."""
        backoff = Backoff(
            float("inf"), first=_FIRST_PAUSE, longest=_LONGEST_PAUSE, sleep=self._sleep
        )
        while True:
            try:
                return await read()
            except StorageError as exc:
                if not exc.retryable:
                    raise
                log.info("a change feed could not be read, which is tried again: %s", exc)
            await backoff.pause()
            if self._closed.is_set():
                raise closed()

    async def _sleep(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closed.wait()


def _size_of(entry: FeedEntry) -> int:
    """About the bytes of a change."""
    records = (each for each in (entry.before, entry.after) if each is not None)
    return sum(len(msgspec.json.encode(each.entity)) for each in records)


def closed() -> StoreClosedError:
    """The error for those who wait when their store is closed."""
    return StoreClosedError("this store was closed")


def as_storage_error(exc: Exception) -> StorageError:
    """The error for those who wait, of which a fault of an engine is the cause."""
    if isinstance(exc, StorageError):
        return exc
    error = UnavailableError(f"the change feed could not be read: {exc!r}", retryable=False)
    error.__cause__ = exc
    return error
