"""The candidates of claims: what a query finds and nobody holds, read page by page.

The claimers of one store share what was read: each takes other candidates, and none reads again what
others have skipped, as those that are held. So one of them costs a request or two, however many
entities are held in front. A candidate may be claimed or changed meanwhile, which the conditional update
of the claim notices. What became free in front of the position is found when the reading begins anew:
after a while, when it finds nothing, and after every change by the same store that may have freed one.

Stores that claim at the same time read the same candidates, and would all try the first one. A claim tells
which store made it, so each knows which others claim by the same query. While they compete, a hash of a
store and an id assigns each candidate to one of them. A store takes those that are its own first, in their
order, and then from a random one on what the others have left. Stores that do not know the same others try
some candidates twice, and learn from what they find there.
"""

from __future__ import annotations

import asyncio
import random
import time
from hashlib import blake2b
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

from hf_async_store.changes import Delete, Patch, Record
from hf_async_store.claim_records import is_free
from hf_async_store.generators import Owned
from hf_async_store.query import And, Comparison, Query, position_of
from hf_async_store.strategies.dynamodb.claim_items import claim_in, request_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from hf_async_store.changes import Change
    from hf_async_store.claim_clock import Moment
    from hf_async_store.claim_records import ClaimTerms
    from hf_async_store.query import Filter
    from hf_async_store.strategies.dynamodb.codec import Attributes
    from hf_async_store.strategies.dynamodb.reading import Reading
    from hf_async_store.values import Key

Candidate: TypeAlias = "tuple[Record, Attributes]"

_FIRST_PAGE: Final = 16
_PER_STORE: Final = 32
_LAST_PAGE: Final = 1024
"""How many candidates are read at once, beyond the number wanted: for each store, if there are several,
and at most."""

_SECONDS: Final = 1.0
_LONGEST: Final = 5.0
_PER_READING: Final = 8
"""How long candidates are shared: this time, or this many times as long as it took to read them."""

_KNOWN_SECONDS: Final = 5.0
"""For how long a store knows what it has claimed, that another one claims, and that they compete."""

_PERIOD_SECONDS: Final = 10.0
"""For how long an entity is left to the same store."""

_MAX_QUERIES: Final = 16
_MAX_OTHERS: Final = 31


class Claimers:
    """The stores that claim by a query.

    They compete for a while after this store has wanted an entity that another one had just claimed. Stores
    that claim now and then do not, and each takes the first entity that is free.

    Args:
        own: the name of this store, which begins the name of each of its claims.

    Attributes:
        passed: how many entities in front were not free when they were last read.
    """

    def __init__(self, own: str) -> None:
        self._own = own
        self.passed = 0
        self._others: dict[str, float] = {}  # when they were seen last
        self._compete_until = 0.0

    def note(self, request: str | None) -> None:
        """This request has claimed an entity, or finished it."""
        name, _, rest = (request or "").partition(".")
        if not rest or name == self._own:  # ordinary writes, and older programs, do not tell
            return
        self._others.pop(name, None)
        self._others[name] = monotonic()
        if len(self._others) > _MAX_OTHERS:
            del self._others[next(iter(self._others))]

    def note_faster(self, request: str | None) -> bool:
        """As `note`, and this store wanted the entity; returns whether the shares are others now."""
        before = set(self.others)
        self.note(request)
        self._compete_until = monotonic() + _KNOWN_SECONDS
        return set(self.others) != before

    @property
    def others(self) -> list[str]:
        """The names of the other stores that compete with this one."""
        now = monotonic()
        if now >= self._compete_until:
            return []
        since = now - _KNOWN_SECONDS
        self._others = {name: seen for name, seen in self._others.items() if seen > since}
        return list(self._others)

    def share_of(self, candidates: Sequence[Candidate], period: int) -> list[bool]:
        """Whether each candidate is assigned to this store, in a period, among those that it knows."""
        own, others = _number(self._own), [_number(each) for each in self.others]
        shares = []
        for record, _ in candidates:
            number = _number(f"{period} {record.key.id}")
            rank = _mixed(number ^ own)
            shares.append(all(rank > _mixed(number ^ each) for each in others))
        return shares


def _number(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())


def _mixed(number: int) -> int:
    """64 bits, of which the first ones depend on all of a number; ten times as fast as a hash."""
    return number * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF


class Candidates:
    """The free entities that a query finds, from the first one on.

    Args:
        query: without a limit.
        max_attempts: see `ClaimTerms`.

    Attributes:
        is_used_up: the others have probably claimed what is left.
    """

    def __init__(
        self, reading: Reading, query: Query, max_attempts: int | None, claimers: Claimers
    ) -> None:
        self.query = query
        self.kind = _kind(query, max_attempts)
        self.claimers = claimers
        self._reading = reading
        self._page = query
        self._size = 0
        self._has_more = True
        self._missed = self._claimed = 0
        self._unused: list[Candidate] = []  # in their order
        self._left: list[Candidate] = []  # those that are assigned to other stores
        self._was_alone = not claimers.others
        self._passed = 0
        self._found = False
        self._period = int(time.time() / _PERIOD_SECONDS)
        self._takes_left = False
        self.is_used_up = False
        self._end_of_read: asyncio.Event | None = None
        self.began = monotonic()
        self._seconds = 0.0  # of reading

    @property
    def is_recent(self) -> bool:
        if self.is_used_up or self._missed > self._claimed + _FIRST_PAGE:
            return False
        shared = min(max(_SECONDS, _PER_READING * self._seconds), _LONGEST)
        return monotonic() < self.began + self._seconds + shared

    async def take(
        self, number: int, terms: ClaimTerms, now: Moment, *, until_used_up: bool
    ) -> list[Candidate]:
        """The next ones, up to a number, which no other caller gets; [] after the last one.

        Args:
            until_used_up: not those that are assigned to other stores.
        """
        while not self._unused and (self._has_more or self._left):
            if self._end_of_read is not None:
                # All who wait go on in one iteration of the event loop, and so share a request.
                await self._end_of_read.wait()
                continue
            has_met = self._was_alone and bool(self.claimers.others)
            if until_used_up and (has_met or not self._has_more):
                self.is_used_up = True
                break
            if self._has_more:
                await self._read_for_all(number, terms, now)
            else:
                self._take_left()
        taken, self._unused = self._unused[:number], self._unused[number:]
        return taken

    async def _read_for_all(self, number: int, terms: ClaimTerms, now: Moment) -> None:
        self._end_of_read = end = asyncio.Event()
        try:
            await self._read(number, terms, now)
        finally:
            self._end_of_read = None
            end.set()

    def _take_left(self) -> None:
        """Take what other stores have left, from a random one on."""
        self._unused, self._left = self._left, []
        self._takes_left = True
        self._go_elsewhere()

    def _go_elsewhere(self) -> None:
        place = random.randrange(len(self._unused)) if self._unused else 0
        self._unused = self._unused[place:] + self._unused[:place]

    async def _read(self, number: int, terms: ClaimTerms, now: Moment) -> None:
        began = monotonic()
        size = await self._next_size(number)
        query = msgspec.structs.replace(self._page, limit=size, paged=True)
        items: dict[str, Attributes] = {}
        async with Owned(self._reading.select(query, items)) as records:
            page = [each async for each in records]
        self._has_more = len(page) == size
        if self._has_more:
            position = position_of(query, page[-1].key.id, page[-1].entity)
            self._page = msgspec.structs.replace(query, after=position)
        since = (time.time() - _KNOWN_SECONDS) * 1e9
        found = False
        for each in page:
            item = items[each.key.id]
            state = claim_in(item, each.key)
            if is_free(state, terms, now):
                self._unused.append((each, item))
                found = True
                continue
            if not found:
                self._passed += 1
            if state is not None and state.token > since:  # a token is the time of the claim
                self.claimers.note(request_in(item))
        if not self._found:
            self.claimers.passed = self._passed
        self._found = self._found or found
        self._size = size
        self._assign()
        self._seconds += monotonic() - began

    async def _next_size(self, number: int) -> int:
        """How many entities are read next."""
        others = len(self.claimers.others)
        if self._size and not (others and self._found):
            return min(4 * self._size, _LAST_PAGE)
        access = await self._reading.access(self.query)
        if access is not None and self.query.order and not access.is_ordered:
            return _LAST_PAGE  # all are read in any case, to find the first ones
        wanted = number + (_PER_STORE * (1 + others) if others else _FIRST_PAGE)
        return min(wanted if self._size else wanted + self.claimers.passed, _LAST_PAGE)

    def _assign(self) -> None:
        """Put those that are assigned to other stores aside."""
        shares = self.claimers.share_of(self._unused, self._period)
        self._left += [each for each, own in zip(self._unused, shares, strict=True) if not own]
        self._unused = [each for each, own in zip(self._unused, shares, strict=True) if own]

    def note(self, claimed: int, missed: int) -> None:
        """So many candidates were claimed, or not, because they had changed."""
        self._claimed += claimed
        self._missed += missed

    def note_other(self, request: str | None) -> None:
        """Another one was faster, by this request; None: it is not known by which."""
        if request is not None and "." not in request and not self.claimers.others:
            return  # an ordinary write, and no reason not to go on with the next one
        if self.claimers.note_faster(request) and not self._takes_left:
            self._assign()
        self.is_used_up = self.is_used_up or self._takes_left
        # Stores that do not know of each other would all try the next one.
        self._go_elsewhere()


class SharedCandidates:
    """The candidates that the claimers of a store share, by query.

    Args:
        own: see `Claimers`.
    """

    def __init__(self, reading: Reading, own: str) -> None:
        self._reading = reading
        self._name = own
        self._shared: list[Candidates] = []
        self._claimers: dict[str, Claimers] = {}  # by query
        self._own: dict[Key, float] = {}  # what this store has claimed, and when

    def recent(self, query: Query, max_attempts: int | None) -> Candidates | None:
        """What other claimers have begun to read."""
        kind = _kind(query, max_attempts)
        self._shared = [each for each in self._shared if each.is_recent]
        for each in self._shared:
            if each.kind == kind:
                return each
        return None

    def begun(self, query: Query, max_attempts: int | None, since: float) -> Candidates:
        """What was read from the first candidate on since a time, by another claimer if there is one."""
        recent = self.recent(query, max_attempts)
        if recent is not None and recent.began >= since:
            return recent
        kind = _kind(query, max_attempts)
        claimers = self._claimers.pop(kind, None) or Claimers(self._name)
        self._claimers[kind] = claimers
        if len(self._claimers) > _MAX_QUERIES:
            del self._claimers[next(iter(self._claimers))]
        new = Candidates(self._reading, query, max_attempts, claimers)
        others = [each for each in self._shared if each.kind != kind]
        self._shared = [*others[1 - _MAX_QUERIES :], new]
        return new

    def note_own(self, key: Key) -> None:
        """This store has claimed an entity, which an index may show as free for a while."""
        now = monotonic()
        self._own.pop(key, None)
        self._own[key] = now
        while now - self._own[first := next(iter(self._own))] > _KNOWN_SECONDS:
            del self._own[first]

    def is_own(self, key: Key) -> bool:
        """Whether this store has claimed an entity lately."""
        return monotonic() - self._own.get(key, -inf) <= _KNOWN_SECONDS

    def forget(self) -> None:
        """The store may have been changed: an entity may be the first candidate now."""
        self._shared.clear()

    def forget_after(self, changes: Iterable[Change]) -> None:
        """The store has made these changes: is one of the entities a candidate now?"""
        if self._shared:
            self._shared = [each for each in self._shared if _excludes_all(each.query, changes)]


def _kind(query: Query, max_attempts: int | None) -> str:
    # Not the query itself: one for 1 equals one for True.
    return f"{query!r} {max_attempts}"


def _excludes_all(query: Query, changes: Iterable[Change]) -> bool:
    """Whether a query certainly does not find any of the entities that were changed."""
    return all(
        change.key.collection != query.collection
        or isinstance(change, Delete)
        or _excludes(query.where, change.fields if isinstance(change, Patch) else change.entity)
        for change in changes
    )


def _excludes(where: Filter, fields: Mapping[str, object]) -> bool:
    """Whether an entity with these fields certainly does not satisfy a condition."""
    if isinstance(where, And):
        return any(_excludes(each, fields) for each in where.parts)
    if not isinstance(where, Comparison) or where.op != "eq" or len(where.path) != 1:
        return False
    [name] = where.path
    value = fields.get(name, where.value) if isinstance(name, str) else where.value
    return type(value) is str and type(where.value) is str and value != where.value
