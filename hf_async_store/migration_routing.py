"""Routing during a live migration: which engine is active, and a change marker with each change.

During a live migration, one record in the source holds its phase (`MigrationState`). A process reads it
when its lease on the last answer has expired, and then relies on it for the length of the lease: so it
costs no round trip per operation. Whoever changes the phase waits until every lease on the previous one
must have expired. docs/live-migration.md describes the whole protocol.

What the record says is data: whoever can write to the store can write it. It chooses among the stores
that the configuration of this process names (`follow_moves`); a recorded location is never opened.

`MigrationRouter` stands between a store and its engine, and looks like an engine itself.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    suppress,
)
from hashlib import blake2b
from types import TracebackType
from typing import Annotated, Final, Literal, TypeAlias, cast

import msgspec

from hf_async_store.changes import Change, ChangeMarker, Outcome, Put, Record
from hf_async_store.driver import (
    Capabilities,
    Engine,
    Isolation,
    QueryPlan,
    Reader,
    Session,
    iter_batches,
)
from hf_async_store.errors import (
    ConcurrencyConflictError,
    CorruptionError,
    StorageError,
    StoreRelocatedError,
    UnavailableError,
)
from hf_async_store.generators import Owned
from hf_async_store.query import Query
from hf_async_store.schema import Collection
from hf_async_store.values import VERSION, Entity, Key, Value, utc_now

LEASE_SECONDS: Final = 2.0
"""How long a process relies on what it read of the phase. All processes of a store have the same."""

SWITCH_SECONDS: Final = 10.0
"""How long a switch may take; then the coordinator aborts it, and retries later."""

ABANDONED_SWITCH_SECONDS: Final = 12.0
"""How long an operation waits for a switch; then its process ends it: the coordinator must be dead."""

_LEASE_MARGIN_SECONDS: Final = 0.25
"""An operation begins only if so much of the lease is left: then a quick one ends within it."""

_POLL_SECONDS: Final = 0.05
_RENEW_TIMEOUT_SECONDS: Final = 1.0

MIGRATION_COLLECTION: Final = Collection("hf_move", key="move_id")
MARKER_COLLECTION: Final = Collection("hf_marks", key="mark_id")
SYSTEM_COLLECTIONS: Final = (MIGRATION_COLLECTION, MARKER_COLLECTION)
"""The collections of a live migration, in addition to those that users declare."""

MIGRATION_KEY: Final = Key(MIGRATION_COLLECTION.name, "move")

Phase: TypeAlias = Literal["COPYING", "CUTTING_OVER", "SWITCHED", "ROLLING_BACK", "FINALIZED"]
"""The phase of a live migration:

* COPYING: the source is active, its changes carry markers.
* CUTTING_OVER: operations wait; ends in SWITCHED, or back in COPYING.
* SWITCHED: the target is active, its changes carry markers, if its engine supports them.
* ROLLING_BACK: operations wait; ends in COPYING, or back in SWITCHED.
* FINALIZED: this store is decommissioned.
"""


_PLACE: Final = r"[a-z][a-z0-9+._-]*:[!-~]{1,4096}"
"""The form of a place: see `StorageConfig.place`."""

_MAX_COUNT: Final = 2**62
"""What is counted on from here stays within the integers that every engine stores."""

_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=_MAX_COUNT)]


class MigrationState(msgspec.Struct, frozen=True):
    """The record of a move. That of the source says the phase; that of the target, only where the
    source is.

    Attributes:
        role: of the place that holds the record. None: it is given up.
        other: the other place, as `StorageConfig.place` names it; compared, never opened.
        epoch: of the coordinator; a newer one fences off the older.
        term: counts the switches.
        version: of the record itself.
    """

    role: Literal["source", "target"]
    phase: Phase
    other: str
    epoch: _Count
    term: _Count
    version: _Count = 0

    def put(self, **changed: object) -> Put:
        """The change that replaces this record, if nobody else has, by one that differs so."""
        new = msgspec.structs.replace(self, **changed)
        entity = cast("Entity", msgspec.to_builtins(new))
        del entity[VERSION]
        entity[MIGRATION_COLLECTION.key] = MIGRATION_KEY.id
        return Put(MIGRATION_KEY, entity, utc_now(), self.version, self.version + 1)


def migration_state_in(record: Record | None) -> MigrationState | None:
    """The move that a record is of.

    Raises:
        CorruptionError: it is none.
    """
    if record is None:
        return None
    try:
        move = msgspec.convert(record.entity, MigrationState)
    except (msgspec.ValidationError, UnicodeEncodeError) as exc:  # a lone surrogate is the latter
        raise _no_move(str(exc)) from exc
    if not re.fullmatch(_PLACE, move.other):
        raise _no_move("`$.other` is no place")
    return move


def _no_move(problem: str) -> CorruptionError:
    return CorruptionError(
        f"the record {MIGRATION_KEY.id!r} of {MIGRATION_COLLECTION.name} is not that of a live move: "
        f"{problem}. "
        "If no move is going on, take it out of the store"
    )


def marker_of(key: Key) -> ChangeMarker:
    """A mark for a change of `key`: there is one for each entity that changed, with a version that is
    new each time, so that whoever brought the change over takes away no newer mark."""
    digest = blake2b(f"{key.collection}\0{key.id}".encode(), digest_size=20).hexdigest()
    entity: Entity = {
        MARKER_COLLECTION.key: digest,
        "collection": key.collection,
        "id": key.id,
        VERSION: secrets.randbits(62) + 1,
    }
    return ChangeMarker(Key(MARKER_COLLECTION.name, digest), entity)


class Route(msgspec.Struct):
    """Where operations go for the length of a lease.

    Attributes:
        place: which it is; None is the store itself.
        engine: None is the engine that the store was opened with.
        marks: changes carry marks.
        term: of the move; 0 without one.
    """

    place: str | None
    engine: Engine | None
    marks: bool
    term: int

    def is_as(self, other: Route) -> bool:
        return (
            self.place == other.place
            and self.engine is other.engine
            and self.marks == other.marks
            and self.term == other.term
        )


_UNMOVED: Final = Route(None, None, marks=False, term=0)

Opening: TypeAlias = "Callable[[str | None], Engine | None]"
"""An engine that knows the hidden collections: of the store itself (None), or of a place, if the
configuration permits that."""


class MigrationRouter:
    """The engine of a store that may move: each operation goes to the authoritative side.

    Args:
        home: the engine that the store was opened with.
        opening: makes the engines that a move needs, when there is one.
        here: the place of the store itself, None if it has none that others could name.
    """

    def __init__(
        self, home: Callable[[], Engine], opening: Opening, here: Callable[[], str | None]
    ) -> None:
        self._home = home
        self._opening = opening
        self._here = here
        self._side = _UNMOVED
        self._until = 0.0  # operations begin
        self._valid_until = 0.0  # what has begun counts
        self._renewing = asyncio.Lock()
        self._engines: dict[str | None, Engine] = {}
        self._waiting: tuple[int, float] | None = None
        self._followed = False
        self._place: str | None = None

    @property
    def capabilities(self) -> Capabilities:
        return self._home().capabilities

    # -- the lease ---------------------------------------------------------------------------

    @property
    def last(self) -> Route:
        """What is known, be the lease on it over."""
        return self._side

    def for_reading(self) -> Engine:
        """What reads go to: the engine itself while the lease goes on, for they need nothing more."""
        side = self._side
        if time.monotonic() >= self._until:
            return self
        return self._home() if side.engine is None else side.engine

    def relies_on(self, side: Route) -> bool:
        """Whether the lease on `side` goes on."""
        return self._side is side and time.monotonic() < self._valid_until

    async def current(self) -> Route:
        """Where an operation that begins now goes; waits while nobody can know."""
        while True:
            if time.monotonic() < self._until:
                return self._side
            if await self.renewed() is not None:
                return self._side
            await asyncio.sleep(_POLL_SECONDS)

    async def renewed(self) -> Route | None:
        """Read the phase; None while it is that of a cut-over.

        Raises:
            StoreRelocatedError: the store was moved before it was opened here, or to where this process
                may not follow.
            CorruptionError: the record is not that of a move.
        """
        async with self._renewing:
            begun = time.monotonic()
            if begun < self._until:
                return self._side
            side = await self._read()
            if side is None:
                return None
            if not side.is_as(self._side):
                self._side = side
            self._until = begun + LEASE_SECONDS - _LEASE_MARGIN_SECONDS
            self._valid_until = begun + LEASE_SECONDS
            return self._side

    async def _read(self) -> Route | None:
        own = self._place
        move = await self._move_at(own)
        while move is not None and move.phase == "FINALIZED":
            if not self._followed:
                raise StoreRelocatedError(
                    f"this store was moved to {move.other}; open that", move.other
                )
            # It was moved while it was open here: from now on this is a store at the new place.
            self._place = own = move.other
            move = await self._move_at(own)
        if move is None:
            return _UNMOVED if own is None else Route(own, self._engine(own), marks=False, term=0)
        self._followed = True  # whatever becomes of the move, this process comes along
        source, target = (own, move.other) if move.role == "source" else (move.other, own)
        if move.role == "target":
            found = await self._move_at(source)
            here = self._here() if own is None else own
            if found is None or found.role != "source" or here not in (None, found.other):
                # The source ended it, and this place was not told yet.
                raise StoreRelocatedError(
                    f"the move to this store was called off; use {source}", f"{source}"
                )
            move = found
        if move.phase in ("CUTTING_OVER", "ROLLING_BACK"):
            await self._end_dead(move, source)
            return None
        self._waiting = None
        place = source if move.phase == "COPYING" else target
        engine = self._engine(place)
        marks = move.phase != "FINALIZED" and engine.capabilities.change_markers
        return Route(place, engine, marks=marks, term=move.term)

    async def _move_at(self, place: str | None) -> MigrationState | None:
        if place is None and None not in self._engines:
            return migration_state_in(
                await self._home().fetch_undeclared(MIGRATION_COLLECTION, MIGRATION_KEY.id)
            )
        return migration_state_in((await self._engine(place).fetch([MIGRATION_KEY]))[0])

    def _engine(self, place: str | None) -> Engine:
        if place not in self._engines:
            engine = self._opening(place)
            if engine is None:
                raise _not_supported() if place is None else _not_permitted(place)
            self._engines[place] = engine
        return self._engines[place]

    async def _end_dead(self, move: MigrationState, source: str | None) -> None:
        """End a cut-over that nobody seems to make any more, and stay on the side before it."""
        now = time.monotonic()
        if self._waiting is None or self._waiting[0] != move.version:
            self._waiting = (move.version, now)
        elif now - self._waiting[1] > ABANDONED_SWITCH_SECONDS:
            before: Phase = "COPYING" if move.phase == "CUTTING_OVER" else "SWITCHED"
            # If another was faster, that is as well.
            await self._engine(source).write_each([move.put(phase=before)])

    async def confirm(self, side: Route, changes: Sequence[Change]) -> None:
        """Make sure that a write that is done counts: that its side was not given up meanwhile.

        Raises:
            StorageError: `outcome_unknown`.
        """
        try:
            await self._confirm(side, changes)
        except StorageError as exc:
            # Whatever stands in the way, it was written already.
            exc.outcome_unknown = True
            raise

    async def _confirm(self, side: Route, changes: Sequence[Change]) -> None:
        while not self.relies_on(side):
            now = await self.current()
            if now.place != side.place or now.term != side.term:
                raise UnavailableError(
                    "the store moved while this was written: nobody knows whether it came along",
                    retryable=False,
                )
            if now.marks and not side.marks:
                # A move began meanwhile, and this side stays the one that counts: mark it now.
                await _write_marks(now, changes)
            side = now

    def engine_of(self, side: Route) -> Engine:
        return self._home() if side.engine is None else side.engine

    async def in_use(self) -> Engine:
        """The engine of the authoritative side."""
        return self.engine_of(await self.current())

    # -- an engine ---------------------------------------------------------------------------

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        if time.monotonic() >= self._until:
            await self.current()
        return await self.engine_of(self._side).fetch(keys)

    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        side = await self.current()
        async with Owned(self.engine_of(side).select(query)) as records:
            async for each in records:
                yield each

    async def iter_batches(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        side = await self.current()
        async with Owned(iter_batches(self.engine_of(side), query)) as pieces:
            async for each in pieces:
                yield each

    async def count(self, query: Query) -> int:
        return await self.engine_of(await self.current()).count(query)

    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        side = await self.current()
        given = _marked(changes) if side.marks else changes
        outcomes = await self.engine_of(side).write_each(given)
        # What was refused needs no confirmation, and its outcome stays known.
        written = [
            change
            for change, outcome in zip(changes, outcomes, strict=True)
            if not isinstance(outcome, StorageError) or outcome.outcome_unknown
        ]
        if written and not self.relies_on(side):
            await self.confirm(side, written)
        return outcomes

    def session(self, isolation: Isolation | None) -> AbstractAsyncContextManager[Session]:
        return _RoutedSession(self, isolation)

    @asynccontextmanager
    async def snapshot(self) -> AsyncGenerator[Reader, None]:
        async with self.engine_of(await self.current()).snapshot() as reader:
            yield reader

    async def fetch_undeclared(self, collection: Collection, entity_id: str) -> Record | None:
        return await self._home().fetch_undeclared(collection, entity_id)

    async def exists(self) -> bool:
        return await self._home().exists()

    async def is_same_store(self, other: Engine) -> bool:
        return await (await self.in_use()).is_same_store(other)

    async def undeclared(self) -> list[str]:
        return await (await self.in_use()).undeclared()

    async def explain(self, query: Query) -> QueryPlan:
        return await self.engine_of(await self.current()).explain(query)

    async def probe(self) -> None:
        await self.engine_of(await self.current()).probe()

    async def health(self) -> Mapping[str, Value]:
        return await self.engine_of(await self.current()).health()

    def describe(self) -> Mapping[str, Value]:
        return self._home().describe()

    # -- what goes around the engine ----------------------------------------------------------

    async def require_source_active(self, what: str) -> None:
        """Refuse a verb that only this engine has, and that reads what does not count.

        Raises:
            StoreRelocatedError: another side counts.
        """
        side = await self.current()
        if side.place is not None:
            raise not_followed(what, side.place)

    @asynccontextmanager
    async def guard_untracked_write(self, what: str) -> AsyncGenerator[None, None]:
        """Write what gets no mark, because it does not say what it writes.

        Raises:
            StoreRelocatedError: a move is going on.
            StorageError: `outcome_unknown`: one began meanwhile, or nobody can tell.
        """
        side = await self.current()
        if side.engine is not None:
            raise not_followed(what, side.place)
        yield
        await self.confirm_around(side, what)

    async def confirm_around(self, side: Route, what: str) -> None:
        """Make sure that no move began while something was written around us.

        Raises:
            StorageError: `outcome_unknown`.
        """
        try:
            while not self.relies_on(side):
                side = await self.current()
                if side.engine is not None:
                    raise UnavailableError(
                        f"a move of this store began while {what} ran: nobody knows whether what it "
                        "wrote came along",
                        retryable=False,
                    )
        except StorageError as exc:
            exc.outcome_unknown = True
            raise

    async def close(self) -> None:
        """Close the engines that a move needed; not that of the store itself."""
        async with AsyncExitStack() as stack:
            for each in self._engines.values():
                stack.push_async_callback(each.close)
            self._engines.clear()


class _RoutedSession:
    """A transaction on the side that was authoritative at its first verb.

    It never waits for a cut-over, for that might wait for what it holds: it loses the race instead,
    and may run again.
    """

    def __init__(self, moving: MigrationRouter, isolation: Isolation | None) -> None:
        self._moving = moving
        self._isolation = isolation
        self._side: Route | None = None
        self._context: AbstractAsyncContextManager[Session] | None = None
        self._session: Session | None = None
        self._entered = _UNMOVED
        self._changes: list[Change] = []
        self._around: str | None = None  # what wrote around us

    async def __aenter__(self) -> Session:
        # No I/O without a verb: it begins on the side that is known, to be looked at again.
        await self._enter(self._moving.last)
        return self

    async def _enter(self, side: Route) -> None:
        engine = self._moving.engine_of(side)
        isolation = self._isolation
        if isolation not in engine.capabilities.isolations:
            isolation = None
        self._context = engine.session(isolation)
        self._session = await self._context.__aenter__()
        self._entered = side

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._context is not None, "entered"
        late: StorageError | None = None
        if exc is None and self._changes:
            try:
                await self._still()
            except StorageError as problem:
                late = problem
        if late is not None:
            await self._context.__aexit__(type(late), late, None)
            raise late
        await self._context.__aexit__(kind, exc, traceback)
        if exc is None and self._side is not None:
            if self._changes:
                await self._moving.confirm(self._side, self._changes)
            if self._around is not None:
                await self._moving.confirm_around(self._side, self._around)

    async def _still(self) -> None:
        """Whether the side of this transaction is the authoritative one still.

        Asked only while a move goes on: it takes a connection beside the one that is held. Without
        a move the question waits until that is free again.
        """
        side = self._side
        if side is None or side.engine is None or self._moving.relies_on(side):
            return
        now: Route | None = None
        with suppress(TimeoutError):
            async with asyncio.timeout(_RENEW_TIMEOUT_SECONDS):
                now = await self._moving.renewed()
        if now is None or now.term != side.term:
            raise ConcurrencyConflictError(
                "the store is being moved; nothing was written, run the transaction again",
                retryable=True,
            )
        self._side = now

    async def _begun(self) -> Session:
        if self._side is None:
            side = await self._moving.current()
            if side is not self._entered:
                assert self._context is not None, "entered"
                await self._context.__aexit__(None, None, None)
                await self._enter(side)
            self._side = side
        else:
            await self._still()
        assert self._session is not None, "entered"
        return self._session

    async def own(self, what: str) -> Session:
        """See `own_session`."""
        session = await self._begun()
        assert self._side is not None, "begun"
        if self._side.engine is not None:
            raise not_followed(what, self._side.place)
        self._around = what
        return session

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        return await (await self._begun()).fetch(keys)

    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        async with Owned((await self._begun()).select(query)) as records:
            async for each in records:
                yield each

    async def count(self, query: Query) -> int:
        return await (await self._begun()).count(query)

    async def write(self, changes: Sequence[Change]) -> list[Outcome]:
        session = await self._begun()
        assert self._side is not None, "begun"
        self._changes += changes
        return await session.write(_marked(changes) if self._side.marks else changes)

    @asynccontextmanager
    async def savepoint(self) -> AsyncGenerator[Session, None]:
        outer = await self._begun()
        async with outer.savepoint() as inner:
            self._session = inner
            try:
                yield self
            finally:
                self._session = outer


async def own_session(session: Session, what: str) -> Session:
    """The session of the engine itself, for a verb that only that engine has.

    Raises:
        StoreRelocatedError: a move is going on, and what goes around us would get no mark.
    """
    return await session.own(what) if isinstance(session, _RoutedSession) else session


def not_followed(what: str, place: str | None) -> StoreRelocatedError:
    """The error of a verb that only one engine has, while the store moves; `place` is what counts,
    None if that is where it was called."""
    where = "" if place is None else f"; what counts now is {place}"
    return StoreRelocatedError(
        f"{what} belongs to one engine and does not follow a move, so it is refused while there is "
        f"one{where}",
        place or "",
    )


def _not_supported() -> StoreRelocatedError:
    return StoreRelocatedError(
        "this store takes part in a live migration, which its strategy does not support: it does not "
        "implement `_reopen_with_collections`. If no live migration is running, delete the record "
        f"{MIGRATION_KEY.id!r} of {MIGRATION_COLLECTION.name} from the store",
        "",
    )


def _not_permitted(place: str) -> StoreRelocatedError:
    return StoreRelocatedError(
        f"this store takes part in a live move with {place}, and which of the two counts is known "
        "there; this program may not follow it, because `follow_moves` of its storage "
        "configuration does not name that store: name it, or open that store instead",
        place,
    )


def _marked(changes: Sequence[Change]) -> list[Change]:
    return [
        msgspec.structs.replace(each, mark=marker_of(each.key)) if each.mark is None else each
        for each in changes
    ]


async def _write_marks(side: Route, changes: Sequence[Change]) -> None:
    """Marks for what was written without them."""
    assert side.engine is not None, "a move is going on"
    puts: list[Change] = []
    for key in {each.key for each in changes}:
        mark = marker_of(key)
        entity = {name: value for name, value in mark.entity.items() if name != VERSION}
        puts.append(
            Put(mark.key, entity, utc_now(), import_version=cast("int", mark.entity[VERSION]))
        )
    for outcome in await side.engine.write_each(puts):
        if isinstance(outcome, StorageError):
            raise outcome
