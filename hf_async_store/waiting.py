"""Tasks that wait until an entity matches a filter, woken by a change feed or by reads that they share."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from time import monotonic
from typing import Final, TypeAlias

from hf_async_store.changes import Record
from hf_async_store.driver import FeedEntry, end_task
from hf_async_store.errors import CorruptionError, EntityNotFoundError, StorageError
from hf_async_store.feed_reading import as_storage_error, closed
from hf_async_store.lifetimes import Lifetimes
from hf_async_store.query import Filter, compile_filter
from hf_async_store.values import UPDATED_AT, Entity, Key, copy_entity

_FIRST_PAUSE: Final = 0.01
_LONGEST_PAUSE: Final = 1.0
_PAUSES_PER_AGE: Final = 4
_EXPIRY_SECONDS: Final = 1.0
"""How often a waiter looks whether its entity has expired."""

Fetch: TypeAlias = Callable[[Sequence[Key]], Awaitable[list[Record | None]]]
Look: TypeAlias = Callable[[], Awaitable[Record | None]]


class Waiter:
    """A task that waits until an entity matches a filter.

    A change that is heard may precede the state that was seen at first, even be one of an earlier entity
    with this id, because not every feed knows its end exactly. It decides nothing; the entity is looked at
    again. What was seen later may be newer than changes that are still to be heard, each of which counts.
    """

    def __init__(self, key: Key, where: Filter, lifetimes: Lifetimes | None) -> None:
        self.key: Final = key
        self._matches = compile_filter(where)
        self._lifetimes = lifetimes if lifetimes and key.collection in lifetimes else None
        self._first: Entity | None = None  # the state that was seen at first
        self._seen: Entity | None = None
        self._outcome: asyncio.Future[Entity | StorageError] = asyncio.Future()
        self._is_in_doubt = False
        self._told = asyncio.Event()  # that there is an outcome, or a doubt

    def see(self, record: Record | None) -> None:
        """Tell the state of the entity."""
        entity = None if record is None else record.entity
        if entity is None or self._is_over(entity):
            self._end(EntityNotFoundError(self.key.collection, self.key.id))
        elif self._matches(entity):
            self._end(copy_entity(entity))
        else:
            self._seen = entity
            self._first = self._first or entity

    def hear(self, entry: FeedEntry | StorageError) -> None:
        """Tell a change of the entity, or why no more will be told."""
        if isinstance(entry, StorageError):
            self._end(entry)
        elif self._follows(entry) and not (entry.after and self._is_over(entry.after.entity)):
            self.see(entry.after)
        else:
            self._is_in_doubt = True
            self._told.set()

    def _follows(self, entry: FeedEntry) -> bool:
        """Whether a change was certainly made after the state that was seen at first."""
        first = self._first
        if first is None or (entry.before and entry.before.entity in (first, self._seen)):
            return True
        return entry.after is not None and _time_of(entry.after.entity) > _time_of(first)

    def _is_over(self, entity: Entity) -> bool:
        return self._lifetimes is not None and self._lifetimes.is_over(self.key.collection, entity)

    def _end(self, outcome: Entity | StorageError) -> None:
        if not self._outcome.done():
            self._outcome.set_result(outcome)
            self._told.set()

    @property
    def has_ended(self) -> bool:
        """Whether the entity matches, or never will."""
        return self._outcome.done()

    async def result(self, look: Look | None = None) -> Entity:
        """The entity, as soon as it matches.

        Args:
            look: reads the entity. Required if changes are told.

        Raises:
            EntityNotFoundError: it does not exist, was deleted, or has expired.
        """
        while not self._outcome.done():
            with suppress(TimeoutError):
                async with asyncio.timeout(None if self._lifetimes is None else _EXPIRY_SECONDS):
                    await self._told.wait()
            self._told.clear()
            has_expired = self._seen is not None and self._is_over(self._seen)
            if look is not None and (self._is_in_doubt or has_expired):
                self._is_in_doubt = False
                self.see(await look())
            elif has_expired:
                self.see(None)
        outcome = self._outcome.result()
        if isinstance(outcome, StorageError):
            raise outcome
        return outcome


def _time_of(entity: Entity) -> str:
    """When an entity was written; "" if it is not known."""
    time = entity.get(UPDATED_AT)
    return time if isinstance(time, str) else ""


class Polling:
    """Reads, in rounds, what the waiters of a store wait for.

    A waiter is read the less often the longer it has waited. The moments are multiples of its pause, so
    that all waiters of about the same age are read at once.
    """

    def __init__(self) -> None:
        self._begun: dict[Waiter, float] = {}
        self._due: dict[Waiter, float] = {}
        self._added = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def wait(self, waiter: Waiter, fetch: Fetch) -> Entity:
        """The result of a waiter.

        Args:
            fetch: reads the entities of keys; of the same store in all calls.
        """
        self._begun[waiter] = self._due[waiter] = monotonic()
        self._added.set()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._poll(fetch))
        try:
            return await waiter.result()
        finally:
            self._begun.pop(waiter, None)
            self._due.pop(waiter, None)
            if not self._due:
                await self._stop()

    async def _stop(self) -> None:
        task, self._task = self._task, None
        await end_task(task)

    async def close(self) -> None:
        """Let all waiters end with StoreClosedError."""
        self._fail(list(self._due), closed())
        await self._stop()

    async def _poll(self, fetch: Fetch) -> None:
        while True:
            now = monotonic()
            due = [each for each, time in self._due.items() if time <= now]
            if due:
                await self._round(due, fetch)
                continue
            self._added.clear()
            pause = min(self._due.values()) - now if self._due else None
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._added.wait()

    async def _round(self, waiters: Sequence[Waiter], fetch: Fetch) -> None:
        await self._look(waiters, fetch)
        now = monotonic()
        for each in waiters:
            if each.has_ended:
                self._due.pop(each, None)
            elif each in self._due:
                self._due[each] = _next_moment(now, now - self._begun[each])

    async def _look(self, waiters: Sequence[Waiter], fetch: Fetch) -> None:
        keys = list(dict.fromkeys(each.key for each in waiters))
        try:
            records = dict(zip(keys, await fetch(keys), strict=True))
        except CorruptionError as exc:
            if len(keys) > 1:  # it ends the wait for the damaged entity, but not for the others
                for key in keys:
                    await self._look([each for each in waiters if each.key == key], fetch)
                return
            self._fail(waiters, exc)
        except Exception as exc:  # noqa: BLE001  # the waiters must not hang
            if not isinstance(exc, StorageError) or not exc.retryable:
                self._fail(waiters, as_storage_error(exc))
        else:
            for each in waiters:
                each.see(records[each.key])

    def _fail(self, waiters: Sequence[Waiter], error: StorageError) -> None:
        for each in waiters:
            each.hear(error.copy())


def _next_moment(now: float, age: float) -> float:
    """When a waiter of some age is read again."""
    pause = min(max(age / _PAUSES_PER_AGE, _FIRST_PAUSE), _LONGEST_PAUSE)
    step: float = _FIRST_PAUSE * 2 ** math.floor(math.log2(pause / _FIRST_PAUSE))
    return (math.floor(now / step) + 1) * step
