"""The removal of expired entities, on request and in the background; and reading without them.

A background run is started by a timer of the event loop, which references the store weakly: it keeps
neither a store nor a process alive.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from typing import Final
from weakref import ref

from msgspec.structs import replace

from hf_async_store.backoff import between
from hf_async_store.changes import Delete, Outcome, Record
from hf_async_store.driver import Reader
from hf_async_store.errors import (
    ConcurrencyConflictError,
    EntityNotFoundError,
    InvalidInputError,
    ReferenceViolationError,
    StorageError,
    StoreClosedError,
)
from hf_async_store.expiry import PURGE_SECONDS
from hf_async_store.generators import Owned
from hf_async_store.lifetimes import Lifetimes
from hf_async_store.query import Order, Query, position_of
from hf_async_store.repository import RepositoryInterface, living, purging
from hf_async_store.schema import Collection
from hf_async_store.values import VERSION, Entity, Key, Value, parse_timestamp

log: Final = logging.getLogger("hf_async_store.purge")

_PAUSE_FACTOR: Final = 20
"""How many times as long as a run in the background the pause after it is."""

_BATCH_SIZE: Final = 200
_LEFT: Final = (ReferenceViolationError, ConcurrencyConflictError, EntityNotFoundError)
"""The outcomes for an entity that stays: others refer to it, or it was written or removed meanwhile."""


class Purging:
    """Removes the expired entities of a store.

    Args:
        alone: the engine does not remove them itself. If it does, what is done in the background is only
            what an index makes cheap.

    Attributes:
        seconds: between two runs in the background, at least; None: there are none.
    """

    def __init__(self, store: RepositoryInterface, *, alone: bool) -> None:
        self._store = ref(store)
        self._alone = alone
        self.seconds: float | None = PURGE_SECONDS
        self._last = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._failure: StorageError | None = None

    # -- on request --------------------------------------------------------------------------

    async def run(self, collection: str | None = None, limit: int | None = None) -> int:
        """See `StorageStrategy.purge_expired`."""
        return await self._remove(collection, limit, gently=False)

    async def _remove(self, collection: str | None, limit: int | None, *, gently: bool) -> int:
        store = self._store()
        assert store is not None, "it is in use"
        lifetimes = store._lifetimes
        if limit is not None and (type(limit) is not int or limit < 0):
            raise InvalidInputError("limit must be a non-negative integer or None")
        expiring = (
            [] if lifetimes is None else [each for each in store._schema if each in lifetimes]
        )
        names = expiring[::-1]  # children before parents
        if collection is not None:
            names = [store._schema[collection].name]
        done = 0
        for name in names:
            if lifetimes is None or name not in lifetimes:
                raise InvalidInputError(
                    f"{name} is declared without expires: its entities never expire"
                )
            left = None if limit is None else limit - done
            removal = _Removal(store, lifetimes, store._schema[name])
            if removal.is_indexed or self._alone or not gently:
                done += await removal.run(left, gently=gently)
        return done

    # -- in the background -------------------------------------------------------------------

    def start(self) -> None:
        """Begin to remove expired entities in the background, if there may be any."""
        store = self._store()
        if self.seconds is not None and store is not None and store._lifetimes is not None:
            # Not all processes at once; and without an index, a run reads everything.
            pause = max(self.seconds * between(0.9, 1.1), self._last * _PAUSE_FACTOR)
            self._timer = asyncio.get_running_loop().call_later(pause, self._begin)

    def _begin(self) -> None:
        if self.seconds is not None and self._store() is not None:
            self._task = asyncio.get_running_loop().create_task(self._run_once())

    async def _run_once(self) -> None:
        began = time.monotonic()
        try:
            removed = await self._remove(None, None, gently=True)
        except StoreClosedError:
            return
        except StorageError as exc:
            self._failure = exc
            log.warning("expired entities were not removed: %s", exc)
        else:
            self._failure = None
            if removed:
                log.debug("removed %d expired entities", removed)
        self._last = time.monotonic() - began
        self.start()

    def problems(self) -> list[Value]:
        """Why the last run in the background failed."""
        if self._failure is None:
            return []
        return [f"expired entities were not removed in the background: {self._failure}"]

    async def stop(self) -> None:
        """End the runs in the background."""
        self.seconds = None
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task


class _Removal:
    """The removal of the expired entities of one collection."""

    def __init__(
        self, store: RepositoryInterface, lifetimes: Lifetimes, collection: Collection
    ) -> None:
        lifetime = lifetimes.of(collection.name)
        assert lifetime is not None
        self._store = store
        self._lifetimes = lifetimes
        self._collection = collection
        self._field = field = lifetime.field
        self.is_indexed = any(each.fields[0] == field for each in collection.indexes)
        self._query = Query(
            collection.name,
            # By an index, only what has expired is read; by id, each entity is read once.
            order=(Order((field,)),) if self.is_indexed else (),
            fields=tuple(dict.fromkeys([collection.key, field, VERSION])),
            paged=True,
        )

    async def run(self, limit: int | None, *, gently: bool) -> int:
        """Remove them, at most `limit`; returns how many.

        Args:
            gently: pause between two batches for as long as a batch takes.
        """
        query, done = self._query, 0
        while limit is None or done < limit:
            began = time.monotonic()
            size = _BATCH_SIZE if limit is None else min(_BATCH_SIZE, limit - done)
            records = await self._read(query.with_limit(size))
            done += _removed(await self._store._write(self._changes(records), None))
            if len(records) < size:
                break
            last = records[-1]
            query = replace(query, after=position_of(query, last.key.id, last.entity))
            await asyncio.sleep(time.monotonic() - began if gently else 0)
        return done

    async def _read(self, query: Query) -> list[Record]:
        async with Owned(self._store._select_stored(self._lifetimes.expired(query))) as records:
            return [each async for each in records]

    def _changes(self, records: Sequence[Record]) -> list[Delete]:
        # Text that has the form of a timestamp, such as that of the 31st of June, is kept.
        return [purging(each) for each in records if _is_time(each.entity.get(self._field))]


def _is_time(value: Value) -> bool:
    return isinstance(value, str) and parse_timestamp(value) is not None


def _removed(outcomes: Sequence[Outcome]) -> int:
    """How many entities were removed.

    Raises:
        StorageError: an outcome is a failure.
    """
    failed = [each for each in outcomes if isinstance(each, StorageError)]
    for each in failed:
        if not isinstance(each, _LEFT) or each.outcome_unknown:
            raise each
    return len(outcomes) - len(failed) - sum(each is None for each in outcomes)


class LivingReader(Reader):
    """Reads what another reader does, without the entities that have expired."""

    def __init__(self, reader: Reader, lifetimes: Lifetimes) -> None:
        self._reader = reader
        self._lifetimes = lifetimes

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        return living(self._lifetimes, await self._reader.fetch(keys))

    async def first_page(self, query: Query) -> Query:
        return await self._reader.first_page(query)

    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        async with Owned(self._reader.select(self._lifetimes.living(query))) as records:
            async for each in records:
                yield each

    async def select_batches(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        async with Owned(self._reader.select_batches(self._lifetimes.living(query))) as batches:
            async for each in batches:
                yield each

    async def count(self, query: Query) -> int:
        return await self._reader.count(self._lifetimes.living(query))
