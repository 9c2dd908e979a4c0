"""The methods of a store that watch its changes, or wait for one."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

from hf_async_store.arguments import check_seconds
from hf_async_store.changes import Delete, Record
from hf_async_store.deferred import deferred
from hf_async_store.driver import Engine, FeedEntry
from hf_async_store.errors import (
    FeedExpiredError,
    InvalidCursorError,
    InvalidInputError,
    OperationTimeoutError,
    SchemaMismatchError,
    StorageError,
)
from hf_async_store.feed_reading import FeedReader
from hf_async_store.query import Filter, Filters, compile_filter
from hf_async_store.repository import RepositoryInterface, operation_timeout
from hf_async_store.schema import SUBSCRIPTION_COLLECTION, Schema
from hf_async_store.slow_queries import SlowQueries
from hf_async_store.values import Entity, Key
from hf_async_store.waiting import Polling, Waiter

if TYPE_CHECKING:
    from hf_async_store import claims, feed, subscriptions
    from hf_async_store.feed import Changes
    from hf_async_store.subscriptions import Subscription, SubscriptionInfo
else:
    claims = deferred("claims")
    feed = deferred("feed")
    subscriptions = deferred("subscriptions")


class WatchedStore(RepositoryInterface):
    """A store whose changes can be watched."""

    def __init__(self, engine: Engine, schema: Schema, slow_queries: SlowQueries) -> None:
        super().__init__(schema, slow_queries)
        self._feeds = FeedReader(engine)
        self._polling = Polling()

    @abstractmethod
    def _usable(self) -> Engine:
        """The engine; raises if the caller may not use the store."""

    @abstractmethod
    async def _record_feeds(self) -> None:
        """Let the store record the declarations of this program."""

    # -- watching ----------------------------------------------------------------------------

    def watch(
        self, collection: str, filters: Filters = None, *, since: str | None = None
    ) -> AbstractAsyncContextManager[Changes]:
        """The committed changes of a collection that was declared with `feed`, for use with `async with`.

            async with store.watch("machines", {"request_id": "r-1"}) as changes:
                async for change in changes:
                    print(change.kind, change.id, change.version)

        Every committed change of an entity that matched before or after it comes at least once, whichever
        program made it, in the order of the versions of each entity; across entities in the order of
        the commits where `capabilities.feed_order` is true. Several changes of one entity in one commit
        are one change. An entity that expires is deleted when it is removed.

        A slow watcher takes little memory and holds up nobody. Errors that are retryable are retried
        without end; another one ends the watch.

        Args:
            filters: as in `query_entities`.
            since: the token of a change, also from another process: go on after it. None: begin with
                what is committed from now on.

        Raises:
            InvalidInputError: the collection is declared without `feed`.
            InvalidCursorError: `since` is not a token of this collection and store.
            FeedExpiredError: what followed the token is not kept any more.
            SchemaMismatchError: the store does not record these changes yet; the message tells what to do.
        """
        self._refuse_without_feed(collection)
        where = self._query(collection, filters, None, None, None).where
        position = None if since is None else feed.position_in(since, collection)
        return self._watched(collection, where, position)

    @asynccontextmanager
    async def _watched(
        self, collection: str, where: Filter, position: str | None
    ) -> AsyncGenerator[Changes, None]:
        self._usable()
        if position is None:
            position = await self._feed_position(collection)
        else:
            await self._check_kept(collection, position)
        async with self._feeds.using(collection, self._feed_position) as shared:
            changes = feed.Changes(shared, position, where, self._usable)
            try:
                yield changes
            finally:
                changes.end()

    async def _check_kept(self, collection: str, position: str) -> None:
        """Raise at once the error that would end a watch from a position."""
        try:
            await self._feeds.engine.read_feed(collection, position, 1)
        except StorageError as exc:
            if not exc.retryable:
                raise

    def _refuse_without_feed(self, collection: str) -> None:
        if self._schema[collection].feed is None:
            raise InvalidInputError(
                f"{collection} is declared without feed=, so its changes are not kept"
            )

    async def _feed_position(self, collection: str) -> str:
        """The end of a feed, which the store begins to record if it does not yet."""
        engine = self._feeds.engine
        try:
            return await engine.feed_position(collection)
        except SchemaMismatchError:
            await self._record_feeds()
            return await engine.feed_position(collection)

    # -- waiting -----------------------------------------------------------------------------

    async def wait_for(
        self,
        collection: str,
        entity_id: str,
        filters: Filters = None,
        *,
        timeout: float | None,  # as everywhere
    ) -> Entity:
        """Wait until an entity matches; returns it as it was then.

        It is looked at, its changes are followed, and it is looked at again, so no change is missed. Of
        a collection without a feed, the waiters of a store read at the same moments, at first every
        10 ms, after some time every second: a state that lasts less than that may be missed.

        Args:
            filters: as in `query_entities`; None: that it exists.
            timeout: in seconds; None: without limit.

        Raises:
            EntityNotFoundError: it does not exist, was deleted meanwhile, or has expired.
            OperationTimeoutError: it did not match in time.
        """
        key = self._schema[collection].key_of(entity_id)
        if timeout is not None:
            check_seconds(timeout, "timeout")
        query = await self._built_query(collection, filters, None, None, None)
        self._usable()
        try:
            async with operation_timeout(timeout):
                return await self._awaited(key, query.where)
        except OperationTimeoutError as exc:
            raise OperationTimeoutError(
                f"{collection} {entity_id!r}: {exc}",
                retryable=exc.retryable,
                outcome_unknown=exc.outcome_unknown,
            ) from exc

    async def _awaited(self, key: Key, where: Filter) -> Entity:
        waiter = Waiter(key, where, self._lifetimes)
        waiter.see((await self._fetch([key], None))[0])
        if waiter.has_ended:
            return await waiter.result()
        if self._schema[key.collection].feed is not None:
            try:
                return await self._awaited_by_feed(waiter)
            except (FeedExpiredError, InvalidCursorError, SchemaMismatchError):
                waiter = Waiter(key, where, self._lifetimes)  # without the feed, then
        return await self._polling.wait(waiter, partial(self._fetch, timeout=None))

    async def _awaited_by_feed(self, waiter: Waiter) -> Entity:
        key = waiter.key

        async def look() -> Record | None:
            [record] = await self._fetch([key], None)
            return record

        async with (
            self._feeds.using(key.collection, self._feed_position) as shared,
            shared.listening(key.id, waiter.hear),
        ):
            waiter.see(await look())
            return await waiter.result(partial(self._feeds.retried, look))

    @asynccontextmanager
    async def _woken_by_changes(
        self, collection: str, where: Filter, seconds: float
    ) -> AsyncGenerator[Callable[[float], Awaitable[object]], None]:
        """A function that sleeps for some seconds, or until an entity that matches has been written.

        Of a collection without a feed, or whose feed cannot be read within `seconds`, it just sleeps.
        """
        if self._schema[collection].feed is None:
            yield asyncio.sleep
            return
        written = asyncio.Event()
        matches = compile_filter(where)

        def listen(entry: FeedEntry | StorageError) -> None:
            if isinstance(entry, FeedEntry) and entry.after and matches(entry.after.entity):
                written.set()

        async def sleep(seconds: float) -> None:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await written.wait()
            written.clear()

        async with AsyncExitStack() as stack:
            with suppress(StorageError, TimeoutError):
                async with asyncio.timeout(seconds):
                    shared = await stack.enter_async_context(
                        self._feeds.using(collection, self._feed_position)
                    )
                    await stack.enter_async_context(shared.listening(None, listen))
            yield sleep

    # -- named subscriptions -----------------------------------------------------------------

    def subscribe(
        self, name: str, collection: str, filters: Filters = None
    ) -> AbstractAsyncContextManager[Subscription]:
        """As `watch`, after the position that is kept in the store under a name; a new name begins now.

            async with store.subscribe("billing", "requests") as changes:
                async for change in changes:
                    async with store.begin_transaction() as tx:
                        await tx.save_entity("invoices", invoice_of(change))
                        await changes.advance(change, tx)

        What the consumer writes is committed together with its position, so each change is applied exactly
        once, even if the consumer is killed at any moment, or two of them use the same name.

        Args:
            name: 1 to 1,000 bytes of UTF-8.
            filters: as in `query_entities`.

        Raises:
            InvalidInputError: the name belongs to a subscription to another collection, or with another
                filter; or the collection is declared without `feed`.
            FeedExpiredError: what follows the position is not kept any more; see `drop_subscription`.
        """
        claims.check_name(name, "name")
        self._refuse_without_feed(collection)
        where = self._query(collection, filters, None, None, None).where
        return self._subscribed(name, collection, where)

    @asynccontextmanager
    async def _subscribed(
        self, name: str, collection: str, where: Filter
    ) -> AsyncGenerator[Subscription, None]:
        async def now() -> str:
            return feed.token_of(collection, await self._feed_position(collection))

        self._usable()
        record = await subscriptions.kept(self, name, collection, where, now)
        async with self._feeds.using(collection, self._feed_position) as shared:
            changes = subscriptions.Subscription(self, name, record, shared, where, self._usable)
            try:
                yield changes
            finally:
                changes.end()

    async def subscriptions(self) -> list[SubscriptionInfo]:
        """The named subscriptions of the store, by name."""
        self._usable()
        return await subscriptions.listed(self)

    async def drop_subscription(self, name: str) -> bool:
        """Forget the position of a subscription, which then begins anew; returns whether there was one."""
        key = Key(SUBSCRIPTION_COLLECTION.name, claims.check_name(name, "name"))
        [outcome] = await self._write([Delete(key)], None)
        if isinstance(outcome, StorageError):
            raise outcome
        return outcome is not None

    async def _stop_watching(self) -> None:
        """Let all watchers and waiters end with StoreClosedError."""
        await self._feeds.close()
        await self._polling.close()
