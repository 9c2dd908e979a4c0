"""Claims as records, and the decisions about them: for every engine that has no better way.

A claim is a record of the collection `hf_claims`, which no verb shows. It stays when the claim is released,
with the number of claims so far; it is deleted when a claim is finished, and with its entity. An engine
that deletes an entity therefore deletes the record `claim_key` with it, in the same commit: `Overlay`
does.

A claim is identified by its token, which increases with every claim of an entity. What a holder does is
accepted if the record still has its token and the lease has not ended; both are decided by the engine,
in the commit that does it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from hashlib import blake2b
from math import inf
from typing import Final, Literal, Protocol, cast

import msgspec

from hf_async_store.changes import ABSENT, Change, Delete, Outcome, Put, Record
from hf_async_store.claim_clock import ClaimClock, Moment
from hf_async_store.errors import ClaimLostError, CorruptionError, StorageError
from hf_async_store.event_loop import Chunks
from hf_async_store.generators import Owned
from hf_async_store.passed_over import PassedOver
from hf_async_store.query import Comparison, CursorPosition, Query, position_of
from hf_async_store.schema import CLAIM_COLLECTION
from hf_async_store.values import VERSION, Entity, Key, utc_now

LEASE_SECONDS: Final = 30.0
"""The default of the lease of a claim."""

_MAX_KEY: Final = 1024
_FIRST_PAGE: Final = 16
_LAST_PAGE: Final = 1024
"""How many candidates are read at once, beyond the number wanted; claimed ones among them are skipped."""


class ClaimTerms(msgspec.Struct, frozen=True):
    """What a claimer asks for.

    Attributes:
        lease: after how many seconds the claim ends, unless it is renewed.
        owner: the claimer, for people.
        max_attempts: entities that were claimed this often are left alone; None: none are.
    """

    lease: float
    owner: str
    max_attempts: int | None = None


class Claimed(msgspec.Struct, frozen=True):
    """An entity that was claimed.

    Attributes:
        record: the entity; of a lock, one without fields.
        attempts: how often it was claimed, this time included.
        skew: by how many seconds the holder must stop before its lease ends, because clocks differ.
    """

    record: Record
    token: int
    attempts: int
    skew: float = 0.0


class ClaimInfo(msgspec.Struct, frozen=True):
    """A claim, as `StorageStrategy.claims` lists it.

    Attributes:
        state: "held"; "delayed": released, but not to be claimed yet; "free": nobody holds the entity, and
            only the number of attempts is kept.
        seconds: until the state ends; 0 if it is free.
        attempts: how often the entity was claimed since a claim of it was last finished.
    """

    collection: str
    id: str
    owner: str
    state: Literal["held", "delayed", "free"]
    seconds: float
    token: int
    attempts: int


class ClaimState(msgspec.Struct, frozen=True):
    """The stored record of a claim.

    Attributes:
        era, ends: the moment at which the lease, or the delay, ends.
        held: somebody holds it until then; otherwise nobody may claim it until then.
    """

    collection: str
    id: str
    owner: str
    token: int
    era: str
    ends: float
    held: bool
    attempts: int

    def remaining(self, now: Moment) -> float:
        """The seconds until the lease or the delay ends; 0 if it has ended."""
        assert now.seconds is not None, "the store has no clock of its own"
        return max(0.0, self.ends - now.seconds) if self.era == now.era else 0.0

    def info(self, now: Moment) -> ClaimInfo:
        seconds = self.remaining(now)
        state: Literal["held", "delayed", "free"] = (
            "free" if not seconds else "held" if self.held else "delayed"
        )
        return ClaimInfo(
            self.collection, self.id, self.owner, state, seconds, self.token, self.attempts
        )


class Records(Protocol):
    """What the functions below need of a session."""

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]: ...

    def select(self, query: Query) -> AsyncGenerator[Record, None]: ...

    async def write(self, changes: Sequence[Change]) -> list[Outcome]: ...

    async def passed_over(
        self, query: Query, most_attempts: int | None
    ) -> tuple[PassedOver, list[str]] | None: ...


def claim_key(key: Key) -> Key:
    """The key of the record of a claim of an entity."""
    name = f"{key.collection}/{key.id}"
    if len(name) > _MAX_KEY:
        name = f"{key.collection}//{blake2b(key.id.encode(), digest_size=32).hexdigest()}"
    return Key(CLAIM_COLLECTION.name, name)


def next_token(previous: int) -> int:
    """A token that is greater than the previous one, and than those of an entity that was deleted."""
    return max(previous + 1, time.time_ns())


def lost(key: Key, why: str = "another may hold it now") -> ClaimLostError:
    return ClaimLostError(
        f"the claim of {key.collection} {key.id!r} was lost: {why}", key.collection, key.id
    )


def absent(key: Key) -> ClaimLostError:
    return lost(key, "the entity has expired, or was deleted")


def state_in(record: Record | None) -> ClaimState | None:
    """The claim in a stored record.

    Raises:
        CorruptionError: the record is invalid.
    """
    if record is None:
        return None
    try:
        return msgspec.convert(record.entity, ClaimState)
    except msgspec.ValidationError as exc:
        raise CorruptionError(
            f"the record {record.key.id!r} of {CLAIM_COLLECTION.name} is not a valid claim: {exc}. "
            "Delete it: the entity is then free"
        ) from exc


def held_until(state: ClaimState | None, terms: ClaimTerms, now: Moment) -> float | None:
    """When an entity can be claimed, unless its claim changes; None: now."""
    if state is None:
        return None
    if terms.max_attempts is not None and state.attempts >= terms.max_attempts:
        return inf
    return state.ends if state.remaining(now) else None


def is_free(state: ClaimState | None, terms: ClaimTerms, now: Moment) -> bool:
    """Whether an entity can be claimed."""
    return held_until(state, terms, now) is None


def taken(state: ClaimState | None, key: Key, terms: ClaimTerms, now: Moment) -> ClaimState:
    """The claim of a free entity."""
    assert now.seconds is not None, "the store has no clock of its own"
    token, attempts = (0, 0) if state is None else (state.token, state.attempts)
    return ClaimState(
        key.collection,
        key.id,
        terms.owner,
        next_token(token),
        now.era,
        now.seconds + terms.lease,
        True,
        attempts + 1,
    )


def check_held(state: ClaimState | None, key: Key, token: int, now: Moment) -> ClaimState:
    """The claim, which the holder of this token still holds.

    Raises:
        ClaimLostError.
    """
    if state is None:
        raise lost(key, "it was finished or broken, or the entity was deleted")
    if state.token != token:
        raise lost(key, f"{state.owner} claimed it after the lease had ended")
    if not state.held:
        raise lost(key, "it was released")
    if not state.remaining(now):
        raise lost(key, "its lease has ended")
    return state


# -- in a session ---------------------------------------------------------------------------
#
# The clock is read after the first call of the session, which may have waited for a lock.


async def take(
    session: Records, query: Query, terms: ClaimTerms, clock: ClaimClock
) -> list[Claimed]:
    """Claim the first free entities that match a query, up to its limit."""
    known = None if query.has_many_values else await session.passed_over(query, terms.max_attempts)
    if known is None:
        taking = _Taking(session, query, terms, clock, None)
        await taking.take_after(None)
        return taking.claimed
    over, times = known
    taking = _Taking(session, query, terms, clock, over)
    await taking.take_again(over, over.begin(clock.now(), times))
    await taking.take_after(over.position)
    over.complete()
    return taking.claimed


class _Taking:
    """Claims the first free entities that match a query, up to its limit.

    Args:
        over: is told of all entities that were read.

    Attributes:
        claimed: the entities that were claimed.
    """

    def __init__(
        self,
        session: Records,
        query: Query,
        terms: ClaimTerms,
        clock: ClaimClock,
        over: PassedOver | None,
    ) -> None:
        self._session = session
        self._query = query
        self._terms = terms
        self._clock = clock
        self._over = over
        self.claimed: list[Claimed] = []

    @property
    def _left(self) -> int:
        assert self._query.limit is not None, "claims are limited"
        return self._query.limit - len(self.claimed)

    async def take_again(self, over: PassedOver, changed: Iterable[str]) -> None:
        """Claim the first free ones of what was passed over, of which some may have changed."""
        found = over.before(self._query, await self._fetched(changed))
        free: list[Record] = []
        while ids := over.next_free(self._left - len(free)):
            free += over.before(self._query, await self._fetched(ids))
        await self._take_free(over.before(self._query, found + free))

    async def _fetched(self, ids: Iterable[str]) -> list[Record]:
        found: list[Record | None] = []
        async for chunk in Chunks([Key(self._query.collection, each) for each in ids], _LAST_PAGE):
            found += await self._session.fetch(chunk)
        return [each for each in found if each is not None]

    async def take_after(self, position: CursorPosition | None) -> None:
        """Claim the free ones of the entities after a position."""
        size = self._left + _FIRST_PAGE
        while self._left:
            page_query = msgspec.structs.replace(
                self._query, limit=size, paged=True, after=position
            )
            async with Owned(self._session.select(page_query)) as records:
                page = [each async for each in records]
            await self._take_free(page)
            if len(page) < size:
                return
            size = min(4 * size, _LAST_PAGE)
            position = position_of(self._query, page[-1].key.id, page[-1].entity)

    async def _take_free(self, page: Sequence[Record]) -> None:
        stored = await self._session.fetch([claim_key(each.key) for each in page])
        now = self._clock.now()
        changes: list[Change] = []
        for record, found in zip(page, stored, strict=True):
            state = state_in(found)
            held = held_until(state, self._terms, now)
            takes = held is None and self._left > 0
            if takes:
                new = taken(state, record.key, self._terms, now)
                changes.append(_put(new, found))
                self.claimed.append(Claimed(record, new.token, new.attempts))
            if self._over is not None:
                self._over.read(record, claim_key(record.key).id, held, taken=takes)
        await _write(self._session, changes)


async def take_name(
    session: Records, keys: Sequence[Key], terms: ClaimTerms, clock: ClaimClock
) -> Claimed | None:
    """Claim the first free name of some."""
    stored = await session.fetch(list(map(claim_key, keys)))
    now = clock.now()
    for key, found in zip(keys, stored, strict=True):
        state = state_in(found)
        if is_free(state, terms, now):
            new = taken(state, key, terms, now)
            await _write(session, [_put(new, found)])
            return Claimed(Record(key, {VERSION: 0}), new.token, new.attempts)
    return None


async def check(session: Records, key: Key, token: int, clock: ClaimClock) -> None:
    """Refuse unless the holder of this token still holds the claim.

    Raises:
        ClaimLostError.
    """
    [found] = await session.fetch([claim_key(key)])
    check_held(state_in(found), key, token, clock.now())


async def renew(session: Records, key: Key, token: int, lease: float, clock: ClaimClock) -> None:
    """See `Engine.renew_claim`."""
    await _replace(session, key, token, lease, clock, held=True)


async def release(
    session: Records, key: Key, token: int, after: float | None, clock: ClaimClock
) -> None:
    """See `Engine.release_claim`."""
    if after is not None:
        await _replace(session, key, token, after, clock, held=False)
        return
    await check(session, key, token, clock)
    await end(session, key)


async def _replace(
    session: Records, key: Key, token: int, seconds: float, clock: ClaimClock, *, held: bool
) -> None:
    [found] = await session.fetch([claim_key(key)])
    now = clock.now()
    state = check_held(state_in(found), key, token, now)
    assert now.seconds is not None, "the store has no clock of its own"
    new = msgspec.structs.replace(state, ends=now.seconds + seconds, held=held)
    await _write(session, [_put(new, found)])


async def end(session: Records, key: Key) -> bool:
    """Delete the record of a claim; returns whether there was one."""
    return await _write(session, [Delete(claim_key(key))]) != [None]


async def listed(session: Records, collection: str, clock: ClaimClock) -> list[ClaimInfo]:
    """The claims of a collection, by id."""
    query = Query(CLAIM_COLLECTION.name, Comparison(("collection",), "eq", collection))
    async with Owned(session.select(query)) as records:
        states = [state_in(each) async for each in records]
    now = clock.now()
    found = [each.info(now) for each in states if each is not None]
    return sorted(found, key=lambda each: each.id)


def _put(state: ClaimState, found: Record | None) -> Put:
    key = claim_key(Key(state.collection, state.id))
    entity = cast("Entity", msgspec.to_builtins(state))
    entity[CLAIM_COLLECTION.key] = key.id
    version = 0 if found is None else found.version
    expect = ABSENT if found is None else version
    return Put(key, entity, utc_now(), expect, version + 1)


async def _write(session: Records, changes: Sequence[Change]) -> list[Outcome]:
    outcomes = await session.write(changes) if changes else []
    for each in outcomes:
        if isinstance(each, StorageError):
            raise each
    return outcomes
