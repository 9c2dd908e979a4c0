"""The change feeds of a store: tables of changes that triggers write, in the same commit.

The triggers belong to the tables of entities, so what other programs write is in the feed as well.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

import msgspec

from hf_async_store.changes import Record
from hf_async_store.driver import FeedBatch, run_to_completion
from hf_async_store.errors import StoreClosedError
from hf_async_store.strategies.sql.feed_state import (
    FeedState,
    Horizon,
    decoded_state,
    encoded_state,
    state_name,
    state_sql,
)
from hf_async_store.strategies.sql.names import Names, quoted
from hf_async_store.values import Key

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.connections import LeasedConnection
    from hf_async_store.strategies.sql.dialect import Dialect
    from hf_async_store.strategies.sql.rows import Table

_IDLE_SECONDS: Final = 2.0
"""For how long a connection that waits for changes stays open while nobody waits."""

_BATCH: Final = 500


class Source(NamedTuple):
    """The feed of one collection.

    Attributes:
        lease: the connection on which it is used.
        store: the identity of the store.
        table: of the entities.
        names: of the tables of the store.
    """

    lease: LeasedConnection
    store: str
    table: Table
    names: Names

    @property
    def collection(self) -> str:
        return self.table.collection

    @property
    def feed(self) -> str:
        """The name of the table of changes, quoted."""
        return quoted(self.names.feed(self.collection))

    @property
    def state(self) -> str:
        """The expression that reads the row of its state."""
        return state_sql(self.names, self.collection)

    def record(self, entity_id: object, doc: object, version: object) -> Record | None:
        """The entity as it was before or after a change; None if there was none."""
        if version is None:
            return None
        entity = self.table.entity((entity_id, doc, version))
        return Record(Key(self.collection, str(entity_id)), entity)


class Feed(ABC):
    """The change feeds of a store."""

    now_sql: ClassVar[str]
    """The expressions for the time in seconds, and for a place before which every transaction has ended,
    with `{feed}` for the table of changes."""

    old_sql: ClassVar[str]
    """The SELECT of the numbers of the changes before a place, which is its argument, the oldest first."""

    mark_sql: ClassVar[str]
    """The expressions for the place of a change, and for its mark."""

    lock: ClassVar[str]
    """The end of a SELECT that locks a row, unless another process has locked it."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._waiting = SeparateConnection(dialect)

    @abstractmethod
    async def position(self, source: Source) -> str:
        """See `Engine.feed_position`."""

    @abstractmethod
    async def read(self, source: Source, since: str, limit: int) -> FeedBatch:
        """See `Engine.read_feed`."""

    @abstractmethod
    async def changed(self, tables: Mapping[str, Table], seconds: float) -> None:
        """See `Engine.feed_changed`; `tables`: of the collections that are watched."""

    def merging(
        self, lease: LeasedConnection, feeds: Sequence[str]
    ) -> AbstractAsyncContextManager[None]:
        """Surrounds a transaction: what changes one entity several times inside is one change.

        Not needed if triggers see to it.

        Args:
            feeds: the names of the tables of changes.
        """
        del lease, feeds
        return nullcontext()

    async def close(self) -> None:
        """Close the connection on which changes are waited for; there is no other afterwards."""
        await self._waiting.end()

    # -- retention ---------------------------------------------------------------------------

    async def prune(self, source: Source) -> bool:
        """Delete some of the changes that were kept long enough; return whether there may be more."""
        assert source.table.entry.feed is not None, "the table has a feed"
        seconds = source.table.entry.feed.seconds
        async with source.lease.transaction("read_committed"):
            found = await source.lease.rows(
                f"SELECT c.value, {self.now_sql.format(feed=source.feed)} "
                f"FROM {quoted(source.names.catalogue)} AS c "
                f"WHERE c.name = '{state_name(source.collection)}'{self.lock}"
            )
            if not found:
                return False  # another process does it
            [[value, now, place]] = found
            state = decoded_state(value, source.collection)
            new = state.marked(now, place, seconds)
            deleted = await self._delete_before(source, new.expired_before(now, seconds))
            if deleted:
                last, mark = max((place, mark) for _, place, mark in deleted)
                number = max(state.horizon.number, *(number for number, _, _ in deleted))
                horizon = Horizon(last, number, mark)
                new = msgspec.structs.replace(new, horizon=horizon)
            if new != state:
                await self.store_state(source, new)
        return len(deleted) == _BATCH

    async def _delete_before(self, source: Source, place: int) -> Sequence[Sequence[Any]]:
        if not place:
            return []
        old = self.old_sql.format(feed=source.feed)
        return await source.lease.rows(
            f"DELETE FROM {source.feed} WHERE seq IN ({old} LIMIT {_BATCH}) "
            f"RETURNING seq, {self.mark_sql}",
            (place,),
            writes=True,
        )

    async def store_state(self, source: Source, state: FeedState) -> None:
        """Write the row of a state, in the open transaction."""
        parameter = self._dialect.grammar.parameter(1, "text")
        await source.lease.rows(
            f"UPDATE {quoted(source.names.catalogue)} SET value = {parameter} "
            f"WHERE name = '{state_name(source.collection)}'",
            (encoded_state(state),),
            writes=True,
        )


class SeparateConnection:
    """A connection that belongs to no pool, and is closed soon after it was used last."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._driver: Any = None
        self._timer: asyncio.TimerHandle | None = None
        self._closing: asyncio.Task[None] | None = None
        self._has_ended = False

    async def use(self) -> tuple[Any, bool]:
        """The connection, and whether it is new. `unused` must be called afterwards."""
        self._stop_timer()
        if self._driver is not None and not self._dialect.is_lost(self._driver):
            return self._driver, False
        await self.close()
        self._driver = await self._dialect.connect()
        if self._has_ended:
            await self.close()
            raise StoreClosedError("this store was closed")
        return self._driver, True

    def unused(self) -> None:
        """Let it be closed, if it is not used again."""
        if self._driver is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(_IDLE_SECONDS, self._begin_to_close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _begin_to_close(self) -> None:
        self._closing = asyncio.get_running_loop().create_task(self._close_driver())

    async def _close_driver(self) -> None:
        driver, self._driver = self._driver, None
        if driver is not None:
            with suppress(*self._dialect.driver_errors):
                await driver.close()

    async def end(self) -> None:
        """Close it, also if it is being opened."""
        self._has_ended = True
        await self.close()

    async def close(self) -> None:
        self._stop_timer()
        if self._closing is not None:
            await run_to_completion(self._closing)
        await run_to_completion(self._close_driver())
