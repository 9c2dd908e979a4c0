"""Routing during a live migration: which engine is active, and a change marker with each change.

During a live migration, one record in the source contains its phase (`MigrationState`). A process reads
the record when its lease has expired, and then relies on what it read until the new lease expires, so
operations need no additional round trip. A process that changes the phase then waits until every lease
on the previous phase must have expired. docs/live-migration.md describes the whole protocol.

The record is data, not configuration: anyone who can write to the store can write it. The location in
it only selects one of the stores in `follow_moves` of this process's configuration; it is never opened.

`MigrationRouter` is an engine that wraps the engine of a store. Neither the store nor the engine knows of
it; `strategies/routing.py` creates it where a store is opened.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    suppress,
)
from hashlib import blake2b
from typing import Annotated, Any, Final, Literal, TypeAlias, TypeVar, cast

import msgspec

from hf_async_store.changes import (
    Change,
    ChangedMatches,
    ChangeMarker,
    EncodedPut,
    Outcome,
    Put,
    Record,
    TakeChanges,
    decoded,
)
from hf_async_store.driver import (
    INTERFACE_VERSION,
    Claimed,
    ClaimInfo,
    ClaimTerms,
    Engine,
    FeedBatch,
    FeedEntry,
    Isolation,
    QueryPlan,
    Reader,
    SchemaChange,
    SchemaProgress,
    Session,
    run_to_completion,
)
from hf_async_store.errors import (
    ConcurrencyConflictError,
    CorruptionError,
    FeedExpiredError,
    InvalidCursorError,
    StorageError,
    StoreClosedError,
    StoreRelocatedError,
    UnavailableError,
)
from hf_async_store.generators import Owned
from hf_async_store.interface_version import check_interface_version
from hf_async_store.query import Query
from hf_async_store.schema import (
    MARKER_COLLECTION,
    MIGRATION_COLLECTION,
    SUBSCRIPTION_COLLECTION,
    Collection,
    Index,
)
from hf_async_store.values import VERSION, Entity, Key, Value, utc_now

log: Final = logging.getLogger("hf_async_store.migration")

Item = TypeVar("Item")

LEASE_SECONDS: Final = 2.0
"""How long a process relies on the phase that it read. It must be equal in all processes of a store."""

SWITCH_SECONDS: Final = 10.0
"""The maximum duration of a switch. The coordinator aborts a longer one and retries it later."""

ABANDONED_SWITCH_SECONDS: Final = 12.0
"""How long an operation waits for a switch. Then its process ends the switch, because the coordinator
must have terminated."""

_LEASE_MARGIN_SECONDS: Final = 0.25
"""An operation begins only if the lease is valid for at least this time, so that a short one ends in it."""

_POLL_SECONDS: Final = 0.05
_RENEW_TIMEOUT_SECONDS: Final = 1.0

MIGRATION_KEY: Final = Key(MIGRATION_COLLECTION.name, "move")

Phase: TypeAlias = Literal["COPYING", "CUTTING_OVER", "SWITCHED", "ROLLING_BACK", "FINALIZED"]
"""The phase of a live migration:

* COPYING: the source is active, its changes carry markers.
* CUTTING_OVER: operations wait; ends in SWITCHED, or back in COPYING.
* SWITCHED: the target is active, its changes carry markers, if its engine supports them.
* ROLLING_BACK: operations wait; ends in COPYING, or back in SWITCHED.
* FINALIZED: this store is decommissioned.
"""


_LOCATION: Final = r"[a-z][a-z0-9+._-]*:[!-~]{1,4096}"
"""The form of a location: see `StorageConfig.location`."""

_MAX_COUNT: Final = 2**62
"""The maximum of a recorded count. It can still be incremented within 64 bits."""

_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=_MAX_COUNT)]


class MigrationState(msgspec.Struct, frozen=True):
    """The record of a live migration. Of the record in the target, only the location of the source is
    used; the record in the source contains the current phase.

    Attributes:
        role: the role of the store that contains the record.
        other_location: the location of the other store, in the form of `StorageConfig.location`; it is
            compared and never opened. The stored record has it as `other`.
        epoch: the number of the coordinator; one with a greater number fences off its predecessors.
        term: the number of switches so far.
        version: the version of the record.
    """

    role: Literal["source", "target"]
    phase: Phase
    other_location: str = msgspec.field(name="other")
    epoch: _Count
    term: _Count
    version: _Count = 0

    def put(self, **changed: object) -> Put:
        """The change that replaces this record by a copy with other values, unless it has been changed."""
        new = msgspec.structs.replace(self, **changed)
        entity = cast("Entity", msgspec.to_builtins(new))
        del entity[VERSION]
        entity[MIGRATION_COLLECTION.key] = MIGRATION_KEY.id
        return Put(MIGRATION_KEY, entity, utc_now(), self.version, self.version + 1)


def migration_state_in(record: Record | None) -> MigrationState | None:
    """The state of a live migration in a stored record; None without a record.

    Raises:
        CorruptionError: the record is invalid.
    """
    if record is None:
        return None
    try:
        state = msgspec.convert(record.entity, MigrationState)
    except (msgspec.ValidationError, UnicodeEncodeError) as exc:  # the latter by a lone surrogate
        raise _invalid_record(str(exc)) from exc
    if not re.fullmatch(_LOCATION, state.other_location):
        raise _invalid_record("`$.other` is not the location of a store")
    return state


def _invalid_record(problem: str) -> CorruptionError:
    return CorruptionError(
        f"the record {MIGRATION_KEY.id!r} of {MIGRATION_COLLECTION.name} is not a valid record of a "
        f"live migration: {problem}. If no live migration is running, delete the record from the store"
    )


def marker_of(key: Key) -> ChangeMarker:
    """A change marker for the entity `key`.

    There is one marker for each changed entity, with a new version for each change: so the coordinator,
    which deletes a marker after copying the entity, does not delete the marker of a later change.
    """
    digest = blake2b(f"{key.collection}\0{key.id}".encode(), digest_size=20).hexdigest()
    entity: Entity = {
        MARKER_COLLECTION.key: digest,
        "collection": key.collection,
        "id": key.id,
        VERSION: (int.from_bytes(os.urandom(8)) >> 2) + 1,
    }
    return ChangeMarker(Key(MARKER_COLLECTION.name, digest), entity)


class Route(msgspec.Struct):
    """The engine to which operations are sent until the lease expires.

    Attributes:
        location: of the active store; None: the store of this router.
        engine: None: the engine with which the store was opened.
        add_markers: changes carry change markers.
        term: the term of the live migration; 0 without one.
    """

    location: str | None
    engine: Engine | None
    add_markers: bool
    term: int

    def is_equivalent(self, other: Route) -> bool:
        return (
            self.location == other.location
            and self.engine is other.engine
            and self.add_markers == other.add_markers
            and self.term == other.term
        )


_NO_MIGRATION: Final = Route(None, None, add_markers=False, term=0)

OpenEngine: TypeAlias = "Callable[[str | None], Engine | None]"
"""Opens an engine with `MIGRATION_COLLECTIONS`: of the store itself (None), or of the store at a location;
None if the configuration does not permit that."""


class MigrationRouter(Engine):
    """The engine of a store that can be migrated live: sends each operation to the active engine.

    Its `capabilities` and `describe` are those of the engine with which the store was opened.

    Args:
        original: the engine with which the store was opened.
        open_engine: opens the engines that a live migration requires.
        own_location: returns the location of the store; None if other processes cannot open it.
    """

    interface_version = INTERFACE_VERSION

    def __init__(
        self,
        original: Engine,
        open_engine: OpenEngine,
        own_location: Callable[[], str | None],
    ) -> None:
        check_interface_version(type(original), original.capabilities.engine)
        self.capabilities = original.capabilities
        self.original: Final = original
        self._open_engine = open_engine
        self._own_location = own_location
        self._route = _NO_MIGRATION
        self._active = original  # the engine of the route
        self._begin_until = 0.0  # the time until which operations may begin on the route
        self._valid_until = 0.0  # the time at which the lease expires
        self._renew_lock = asyncio.Lock()
        self._engines: dict[str | None, Engine] = {}  # by location, None for the store itself
        self._closed = False
        # The version of the record of a switch in progress, and when it was first read.
        self._switch_seen: tuple[int, float] | None = None
        self._was_in_migration = False
        self._followed_to: str | None = None  # the location after a finalized migration

    # -- the lease ---------------------------------------------------------------------------

    @property
    def last_route(self) -> Route:
        """The route that was read last, even if its lease has expired."""
        return self._route

    def is_valid(self, route: Route) -> bool:
        """Whether `route` is the current one and its lease has not expired."""
        return self._route is route and time.monotonic() < self._valid_until

    async def current_route(self) -> Route:
        """The route for an operation that begins now. During a switch, waits until it has ended."""
        while True:
            if time.monotonic() < self._begin_until:
                return self._route
            if await self.renew() is not None:
                return self._route
            await asyncio.sleep(_POLL_SECONDS)

    async def renew(self) -> Route | None:
        """Read the phase and begin a new lease; None during a switch.

        Raises:
            StoreRelocatedError: the store was migrated before it was opened here, or to a store to
                which this process may not follow.
            CorruptionError: the record of the migration is invalid.
        """
        async with self._renew_lock:
            started = time.monotonic()
            if started < self._begin_until:
                return self._route
            route = await self._read_route()
            if route is None:
                return None
            if not route.is_equivalent(self._route):
                self._route = route
                self._active = self.engine_of(route)
                log.info(
                    "following a live migration: the active engine is %s",
                    self._active.capabilities.engine,
                )
            self._begin_until = started + LEASE_SECONDS - _LEASE_MARGIN_SECONDS
            self._valid_until = started + LEASE_SECONDS
            return self._route

    async def _read_route(self) -> Route | None:
        own = self._followed_to
        state = await self._state_at(own)
        passed = {own}
        while state is not None and state.phase == "FINALIZED":
            if not self._was_in_migration:
                raise _migrated_to(state.other_location)
            # It was migrated while it was open here: from now on it is the store at the new location.
            own = self._recorded(state.other_location)
            if own in passed:
                raise _invalid_record("stores that were migrated name each other")
            passed.add(own)
            self._followed_to = own
            state = await self._state_at(own)
        if state is None:
            if own is None:
                return _NO_MIGRATION
            return Route(own, self._engine_at(own), add_markers=False, term=0)
        self._was_in_migration = True  # if the migration is finalized, this process follows it
        other = self._recorded(state.other_location)
        source, target = (own, other) if state.role == "source" else (other, own)
        if state.role == "target":
            source_state = await self._state_at(source)
            here = self._own_location() if own is None else own
            if (
                source_state is None
                or source_state.role != "source"
                or here not in (None, source_state.other_location)
            ):
                # The migration was ended at the source, but this record still exists.
                raise StoreRelocatedError(
                    f"the live migration to this store was ended; open {state.other_location} instead",
                    state.other_location,
                )
            state = source_state
        if state.phase in ("CUTTING_OVER", "ROLLING_BACK"):
            await self._end_abandoned_switch(state, source)
            return None
        self._switch_seen = None
        active = source if state.phase == "COPYING" else target
        engine = self._engine_at(active)
        if active not in (own, self._route.location) and not await self._is_other_side(
            active, state
        ):
            return None
        add_markers = state.phase != "FINALIZED" and engine.capabilities.change_markers
        return Route(active, engine, add_markers=add_markers, term=state.term)

    def _recorded(self, location: str) -> str | None:
        """A location in a record; None if it is that of the store that was opened, which is permitted."""
        return None if location == self._own_location() else location

    async def _is_other_side(self, active: str | None, state: MigrationState) -> bool:
        """Check that the store to follow to has a record of the migration, too: two stores may have one
        location, because it does not contain every setting. False if the phase has changed meanwhile.

        Args:
            state: the record of the source, read before.

        Raises:
            StoreRelocatedError: it is another store.
        """
        if await self._state_at(active) is not None:
            return True
        if await self._state_at(self._followed_to) != state:
            return False
        raise StoreRelocatedError(
            f"this store takes part in a live migration with {active}, but the store that "
            "`follow_moves` configures there has no record of this migration, so it is another store: "
            "configure it as for `live-migrate`, with the same settings",
            active or "",
        )

    async def _state_at(self, location: str | None) -> MigrationState | None:
        if location is None and None not in self._engines:
            return migration_state_in(
                await self.original.fetch_undeclared(MIGRATION_COLLECTION, MIGRATION_KEY.id)
            )
        return migration_state_in((await self._engine_at(location).fetch([MIGRATION_KEY]))[0])

    def _engine_at(self, location: str | None) -> Engine:
        if self._closed:
            raise StoreClosedError("this store was closed")
        if location not in self._engines:
            engine = self._open_engine(location)
            if engine is None:
                assert location is not None, "the own store is permitted"
                # Until the end of the migration, the other store may not be opened alone either.
                raise (_migrated_to if location == self._followed_to else _not_permitted)(location)
            self._engines[location] = engine
        return self._engines[location]

    async def _end_abandoned_switch(self, state: MigrationState, source: str | None) -> None:
        """Return to the phase before the switch if the coordinator seems to have terminated."""
        now = time.monotonic()
        if self._switch_seen is None or self._switch_seen[0] != state.version:
            self._switch_seen = (state.version, now)
        elif now - self._switch_seen[1] > ABANDONED_SWITCH_SECONDS:
            previous: Phase = "COPYING" if state.phase == "CUTTING_OVER" else "SWITCHED"
            # A conflict is ignored: then another process has changed the phase.
            await self._engine_at(source).write_each([state.put(phase=previous)])

    async def confirm(self, route: Route, changes: Sequence[Change]) -> None:
        """Ensure that completed writes are effective: that their store was still the active one.

        Raises:
            StorageError: with `outcome_unknown`.
        """
        try:
            await self._confirm(route, changes)
        except StorageError as exc:
            # Whatever the error is, the changes have been written.
            exc.outcome_unknown = True
            raise

    async def _confirm(self, route: Route, changes: Sequence[Change]) -> None:
        while not self.is_valid(route):
            current = await self.current_route()
            if current.location != route.location or current.term != route.term:
                raise UnavailableError(
                    "a live migration of this store switched to another store during this write: it "
                    "is not known whether the write was copied",
                    retryable=False,
                )
            if current.add_markers and not route.add_markers:
                # A migration began during the write, and the store is still active: add the markers.
                await _write_markers(current, changes)
            route = current

    def engine_of(self, route: Route) -> Engine:
        return self.original if route.engine is None else route.engine

    async def in_use(self) -> Engine:
        """The active engine."""
        return self.engine_of(await self.current_route())

    # -- the methods of an engine ------------------------------------------------------------

    # While the lease is valid, `fetch` and the queries cost no additional coroutine or generator. The
    # lease is checked when the method is called, so callers begin what it returns at once.

    def fetch(self, keys: Sequence[Key]) -> Coroutine[Any, Any, list[Record | None]]:
        if time.monotonic() < self._begin_until:
            return self._active.fetch(keys)
        return self._when_renewed(lambda engine: engine.fetch(keys))

    def select_at_once(self, query: Query) -> Coroutine[Any, Any, list[Entity] | None]:
        if time.monotonic() < self._begin_until:
            return self._active.select_at_once(query)
        return self._when_renewed(lambda engine: engine.select_at_once(query))

    def count(self, query: Query) -> Coroutine[Any, Any, int]:
        if time.monotonic() < self._begin_until:
            return self._active.count(query)
        return self._when_renewed(lambda engine: engine.count(query))

    async def _when_renewed(self, read: Callable[[Engine], Awaitable[Item]]) -> Item:
        return await read(await self.in_use())

    def select(self, query: Query) -> AsyncGenerator[Record, None]:
        return self._stream(lambda engine: engine.select(query))

    def select_batches(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        return self._stream(lambda engine: engine.select_batches(query))

    def _stream(
        self, read: Callable[[Engine], AsyncGenerator[Item, None]]
    ) -> AsyncGenerator[Item, None]:
        if time.monotonic() < self._begin_until:
            return read(self._active)
        return self._stream_when_renewed(read)

    async def _stream_when_renewed(
        self, read: Callable[[Engine], AsyncGenerator[Item, None]]
    ) -> AsyncGenerator[Item, None]:
        async with Owned(read(await self.in_use())) as items:
            async for each in items:
                yield each

    async def first_page(self, query: Query) -> Query:
        return await (await self.in_use()).first_page(query)

    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        return await self._write(lambda: changes, lambda engine, take: engine.write_each(take()))

    async def write_unblocked(self, take: TakeChanges) -> list[Outcome]:
        return await self._write(take, lambda engine, take: engine.write_unblocked(take))

    def write_cancellable(
        self, changes: Sequence[Change]
    ) -> Coroutine[Any, Any, list[Outcome]] | None:
        route = self._route
        if route.add_markers or time.monotonic() >= self._begin_until:
            return None
        work = self._active.write_cancellable(_as_taken(self._active, changes))
        return None if work is None else self._confirmed_write(work, route, changes)

    async def _confirmed_write(
        self, work: Awaitable[list[Outcome]], route: Route, changes: Sequence[Change]
    ) -> list[Outcome]:
        try:
            outcomes = await work
        except asyncio.CancelledError:
            if not self.is_valid(route):  # the changes may have been written
                with suppress(StorageError):
                    await run_to_completion(self.confirm(route, changes))
            raise
        if not self.is_valid(route):
            await run_to_completion(self._confirm_written(route, changes, outcomes))
        return outcomes

    async def _write(
        self,
        take: TakeChanges,
        write: Callable[[Engine, TakeChanges], Awaitable[list[Outcome]]],
    ) -> list[Outcome]:
        route = await self.current_route()
        engine = self.engine_of(route)

        def taken() -> Sequence[Change]:
            changes = _as_taken(engine, take())
            return _with_markers(changes) if route.add_markers else changes

        outcomes = await write(engine, taken)
        if not self.is_valid(route):
            await self._confirm_written(route, take(), outcomes)
        return outcomes

    async def change_matches(self, query: Query, change: Change) -> ChangedMatches | None:
        route = await self.current_route()
        if route.add_markers:
            return None
        changed = await self.engine_of(route).change_matches(query, change)
        if changed is not None and not self.is_valid(route):
            changes = [msgspec.structs.replace(change, key=each) for each in changed.keys]
            await self._confirm_written(route, changes, changed.outcomes)
        return changed

    def shares_changes(self, key: Key) -> bool:
        return not self._route.add_markers and self._active.shares_changes(key)

    def takes_encoded(self, collection: str) -> bool:
        return not self._route.add_markers and self._active.takes_encoded(collection)

    async def _confirm_written(
        self, route: Route, changes: Sequence[Change], outcomes: Sequence[Outcome]
    ) -> None:
        # A refused change needs no confirmation, and its outcome is known.
        written = [
            change
            for change, outcome in zip(changes, outcomes, strict=True)
            if not isinstance(outcome, StorageError) or outcome.outcome_unknown
        ]
        if written:
            await self.confirm(route, written)

    def session(self, isolation: Isolation | None) -> AbstractAsyncContextManager[Session]:
        return _RoutedSession(self, lambda engine: engine.session(_known(engine, isolation)))

    def retried_session(self, isolation: Isolation | None) -> AbstractAsyncContextManager[Session]:
        return _RoutedSession(
            self, lambda engine: engine.retried_session(_known(engine, isolation))
        )

    @asynccontextmanager
    async def snapshot(self) -> AsyncGenerator[Reader, None]:
        async with (await self.in_use()).snapshot() as reader:
            yield reader

    # Claims are not copied: each ends when another store becomes the active one, which does not know its
    # token and so refuses its holder.

    async def claim(self, query: Query, terms: ClaimTerms) -> list[Claimed]:
        route = await self.current_route()
        claimed = await self.engine_of(route).claim(query, terms)
        return claimed if await self._is_still_active(route) else []

    async def claim_name(self, keys: Sequence[Key], terms: ClaimTerms) -> Claimed | None:
        route = await self.current_route()
        claimed = await self.engine_of(route).claim_name(keys, terms)
        return claimed if await self._is_still_active(route) else None

    async def _is_still_active(self, route: Route) -> bool:
        """Whether the store of a route was the active one until now."""
        while not self.is_valid(route):
            current = await self.current_route()
            if current.location != route.location or current.term != route.term:
                return False
            route = current
        return True

    async def renew_claim(self, key: Key, token: int, lease: float) -> None:
        await (await self.in_use()).renew_claim(key, token, lease)

    async def release_claim(self, key: Key, token: int, after: float | None) -> None:
        await (await self.in_use()).release_claim(key, token, after)

    def claimed_session(
        self, key: Key, token: int, *, ends: bool = False
    ) -> AbstractAsyncContextManager[Session]:
        return _RoutedSession(self, lambda engine: engine.claimed_session(key, token, ends=ends))

    async def write_claimed(self, token: int, change: Change, *, ends: bool) -> int:
        route = await self.current_route()
        if route.add_markers:
            return await super().write_claimed(token, change, ends=ends)
        version = await self.engine_of(route).write_claimed(token, change, ends=ends)
        if not self.is_valid(route):
            await self.confirm(route, [change])
        return version

    async def break_claim(self, key: Key) -> bool:
        return await (await self.in_use()).break_claim(key)

    async def claims(self, collection: str) -> list[ClaimInfo]:
        return await (await self.in_use()).claims(collection)

    # A position of a feed belongs to one store, and to the time between two switches: what was committed
    # in another time is in the feed of the other store.

    async def feed_position(self, collection: str) -> str:
        route = await self.current_route()
        return _marked(await self.engine_of(route).feed_position(collection), route.term)

    async def read_feed(self, collection: str, since: str, limit: int) -> FeedBatch:
        route = await self.current_route()
        position = _unmarked(since, route.term)
        try:
            batch = await self.engine_of(route).read_feed(collection, position, limit)
        except InvalidCursorError as exc:
            if self._was_in_migration:
                raise _other_feed() from exc
            raise
        if not route.term:
            return batch
        entries = [
            FeedEntry(each.key, each.before, each.after, _marked(each.position, route.term))
            for each in batch.entries
        ]
        return FeedBatch(entries, _marked(batch.position, route.term), batch.is_end)

    async def feed_changed(self, positions: Mapping[str, str], seconds: float) -> None:
        route = await self.current_route()
        try:
            inner = {name: _unmarked(each, route.term) for name, each in positions.items()}
        except FeedExpiredError:
            return  # the next read raises it
        if route.engine is not None:
            seconds = min(seconds, LEASE_SECONDS)
        await self.engine_of(route).feed_changed(inner, seconds)

    async def fetch_undeclared(self, collection: Collection, entity_id: str) -> Record | None:
        return await self.original.fetch_undeclared(collection, entity_id)

    async def exists(self) -> bool:
        # By the engine that was active last: a damaged store, whose record cannot be read, exists, too.
        return await self._active.exists()

    async def is_same_store(self, other: Engine) -> bool:
        if isinstance(other, MigrationRouter):
            other = await other.in_use()
        return await (await self.in_use()).is_same_store(other)

    async def undeclared(self) -> list[str]:
        return await (await self.in_use()).undeclared()

    async def declarations(self) -> list[Collection]:
        return await (await self.in_use()).declarations()

    async def remember(self, collections: Iterable[Collection]) -> None:
        await (await self.in_use()).remember(collections)

    async def unenforced(self) -> list[tuple[str, Index]]:
        return await (await self.in_use()).unenforced()

    async def schema_changes(self) -> list[SchemaChange]:
        return await (await self.in_use()).schema_changes()

    async def apply_schema(
        self, *, progress: SchemaProgress | None = None, complete: bool = False
    ) -> None:
        await (await self.in_use()).apply_schema(progress=progress, complete=complete)

    async def explain(self, query: Query) -> QueryPlan:
        return await (await self.in_use()).explain(query)

    async def probe(self) -> None:
        await (await self.in_use()).probe()

    async def health(self) -> Mapping[str, Value]:
        return await (await self.in_use()).health()

    def describe(self) -> Mapping[str, Value]:
        return self.original.describe()

    # -- methods that only one engine has ----------------------------------------------------

    @asynccontextmanager
    async def direct(self, method: str, *, writes: bool) -> AsyncGenerator[Engine, None]:
        """See `Engine.direct`.

        Raises:
            StoreRelocatedError: for a write method: a live migration is running, so the changes, for
                which no change markers can be written, would be lost; for a read method: another
                store is active.
            StorageError: with `outcome_unknown`: a live migration began during the write, or it could
                not be determined whether one did.
        """
        route = await self.current_route()
        if route.location is not None or (writes and route.engine is not None):
            raise not_followed(method, route.location)
        yield self.original
        if writes:
            await self.confirm_untracked_write(route, method)

    async def check_direct(self, method: str) -> None:
        """See `Engine.check_direct`.

        While the lock is held, no migration can begin or continue, so this does not wait for one.

        Raises:
            StoreRelocatedError: a live migration is running, or was finalized.
        """
        state = migration_state_in(
            await self.original.fetch_undeclared(MIGRATION_COLLECTION, MIGRATION_KEY.id)
        )
        if state is not None:
            moved = state.role == "source" and state.phase not in ("COPYING", "CUTTING_OVER")
            raise not_followed(method, state.other_location if moved else None)

    async def confirm_untracked_write(self, route: Route, method: str) -> None:
        """Ensure that no live migration began while `method` wrote without change markers.

        Raises:
            StorageError: with `outcome_unknown`.
        """
        try:
            while not self.is_valid(route):
                route = await self.current_route()
                if route.engine is not None:
                    raise UnavailableError(
                        f"a live migration of this store began while {method} ran: it is not known "
                        "whether its changes are copied to the target",
                        retryable=False,
                    )
        except StorageError as exc:
            exc.outcome_unknown = True
            raise

    def abandon(self) -> None:
        for each in (self.original, *self._engines.values()):
            each.abandon()

    async def close(self) -> None:
        self._closed = True
        async with AsyncExitStack() as stack:  # if one fails, the others are still closed
            stack.push_async_callback(self.original.close)
            for each in self._engines.values():
                stack.push_async_callback(each.close)
            self._engines.clear()


def unrouted(engine: Engine) -> Engine:
    """The engine with which a store was opened, which does not follow a live migration."""
    return engine.original if isinstance(engine, MigrationRouter) else engine


class _RoutedSession(Session):
    """A transaction on the engine that was active when its first method was called.

    After that it never waits for a switch, because the switch may wait for resources that the
    transaction holds. It raises a retryable conflict instead.
    """

    def __init__(
        self,
        router: MigrationRouter,
        begin: Callable[[Engine], AbstractAsyncContextManager[Session]],
    ) -> None:
        self._router = router
        self._begin = begin
        self._route: Route | None = None  # from the first call of a method on
        self._session: Session | None = None
        # By the task that begins the transaction; another one may enter it.
        self._entered_route = router.last_route
        self._context = self._context_on(router.last_route)
        self._changes: list[Change] = []
        self._untracked_write: str | None = None  # the method that wrote without change markers

    async def __aenter__(self) -> Session:
        # No I/O before the first method is called: begins on the last route, which is checked then.
        if self._router.last_route is self._entered_route:
            self._session = await self._context.__aenter__()
        else:
            await self._enter(self._router.last_route)
        return self

    def _context_on(self, route: Route) -> AbstractAsyncContextManager[Session]:
        return self._begin(self._router.engine_of(route))

    async def _enter(self, route: Route) -> None:
        self._context = self._context_on(route)
        self._session = await self._context.__aenter__()
        self._entered_route = route

    async def __aexit__(self, *exc_info: Any) -> None:
        failed = exc_info[1] is not None
        late_error: StorageError | None = None
        if not failed and self._changes:
            try:
                await self._check_route()
            except StorageError as error:
                late_error = error
        if late_error is not None:
            await self._context.__aexit__(type(late_error), late_error, None)
            raise late_error
        await self._context.__aexit__(*exc_info)
        if not failed and self._route is not None:
            if self._changes:
                await self._router.confirm(self._route, self._changes)
            if self._untracked_write is not None:
                await self._router.confirm_untracked_write(self._route, self._untracked_write)

    async def _check_route(self) -> None:
        """Raise a conflict if the engine of this transaction may no longer be the active one.

        Checked here only during a live migration, because it needs a connection in addition to the one
        that the transaction holds. Otherwise it is checked after the commit, when that one is free.
        """
        route = self._route
        if route is None or route.engine is None or self._router.is_valid(route):
            return
        current: Route | None = None
        with suppress(TimeoutError):
            async with asyncio.timeout(_RENEW_TIMEOUT_SECONDS):
                current = await self._router.renew()
        if current is None or current.term != route.term:
            raise ConcurrencyConflictError(
                "the store is being migrated; nothing was written, run the transaction again",
                retryable=True,
            )
        self._route = current

    async def _checked_session(self) -> Session:
        """The session on the active engine; the first call selects that engine."""
        if self._route is None:
            route = await self._router.current_route()
            if route is not self._entered_route:
                await self._context.__aexit__(None, None, None)
                await self._enter(route)
            self._route = route
        else:
            await self._check_route()
        assert self._session is not None, "entered"
        return self._session

    async def direct(self, method: str) -> Session:
        """See `Session.direct`.

        Raises:
            StoreRelocatedError: a live migration is running, and the changes of `method` would get no
                change markers.
        """
        session = await self._checked_session()
        assert self._route is not None, "a method was called"
        if self._route.engine is not None:
            raise not_followed(method, self._route.location)
        self._untracked_write = method
        return session

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        return await (await self._checked_session()).fetch(keys)

    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        async with Owned((await self._checked_session()).select(query)) as records:
            async for each in records:
                yield each

    async def count(self, query: Query) -> int:
        return await (await self._checked_session()).count(query)

    async def first_page(self, query: Query) -> Query:
        return await (await self._checked_session()).first_page(query)

    async def write(self, changes: Sequence[Change]) -> list[Outcome]:
        session = await self._checked_session()
        assert self._route is not None, "a method was called"
        self._changes += changes
        return await session.write(_with_markers(changes) if self._route.add_markers else changes)

    @asynccontextmanager
    async def savepoint(self) -> AsyncGenerator[Session, None]:
        outer = await self._checked_session()
        async with outer.savepoint() as inner:
            self._session = inner
            try:
                yield self
            finally:
                self._session = outer


def not_followed(method: str, location: str | None) -> StoreRelocatedError:
    """The error of a method that only one engine has, during a live migration.

    Args:
        location: of the active store; None if it is the store on which the method was called.
    """
    active = "" if location is None else f"; the active store is {location}"
    return StoreRelocatedError(
        f"{method} belongs to one engine and does not follow a live migration, so it is refused "
        f"during one{active}",
        location or "",
    )


def _known(engine: Engine, isolation: Isolation | None) -> Isolation | None:
    """An isolation if an engine has it."""
    return isolation if isolation in engine.capabilities.isolations else None


def _not_permitted(location: str) -> StoreRelocatedError:
    return StoreRelocatedError(
        f"this store takes part in a live migration with {location}, which this program may not open, "
        "because `follow_moves` of its storage configuration does not name that store: add it to "
        "`follow_moves` (on the command line: --store 'URL?follow_moves=OTHER')",
        location,
    )


def _migrated_to(location: str) -> StoreRelocatedError:
    return StoreRelocatedError(f"this store was migrated to {location}; open that store", location)


def _as_taken(engine: Engine, changes: Sequence[Change]) -> Sequence[Change]:
    """The changes, decoded if the engine does not take them encoded: another was active when they were."""
    encoded = {each.key.collection for each in changes if type(each) is EncodedPut}
    if all(map(engine.takes_encoded, encoded)):
        return changes
    return list(map(decoded, changes))


def _with_markers(changes: Sequence[Change]) -> list[Change]:
    return [
        msgspec.structs.replace(each, mark=marker_of(each.key))
        if each.mark is None and each.key.collection != SUBSCRIPTION_COLLECTION.name
        else each
        for each in changes
    ]


_MARKED_POSITION: Final = r"switch ([0-9]{1,18}) (.*)"


def _marked(position: str, term: int) -> str:
    """The position of a feed, with the number of switches before it; a plain one before the first."""
    return f"switch {term} {position}" if term else position


def _unmarked(position: str, term: int) -> str:
    """The position as the active engine knows it.

    Raises:
        FeedExpiredError: there was a switch since.
    """
    marked = re.fullmatch(_MARKED_POSITION, position, re.DOTALL)
    number, plain = (0, position) if marked is None else (int(marked[1]), marked[2])
    if term and number != term:
        raise _other_feed()
    # Without a migration, or after the end of one, the engine recognises its own positions.
    return plain


def _other_feed() -> FeedExpiredError:
    return FeedExpiredError(
        "a live migration has switched to another store since: what was committed there first is not in "
        "its feed"
    )


async def _write_markers(route: Route, changes: Sequence[Change]) -> None:
    """Write the change markers of changes that were written without them."""
    assert route.engine is not None, "a live migration is running"
    puts: list[Change] = []
    keys = {each.key for each in changes if each.key.collection != SUBSCRIPTION_COLLECTION.name}
    for key in keys:
        marker = marker_of(key)
        entity = {name: value for name, value in marker.entity.items() if name != VERSION}
        puts.append(
            Put(marker.key, entity, utc_now(), import_version=cast("int", marker.entity[VERSION]))
        )
    for outcome in await route.engine.write_each(puts):
        if isinstance(outcome, StorageError):
            raise outcome
