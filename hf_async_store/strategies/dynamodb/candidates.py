"""The candidates of claims: what a query finds and nobody holds, read page by page.

The claimers of one store share what was read: each takes other candidates, and none reads again what
others have skipped, as those that are held. So one of them costs a request or two, however many
entities are held in front. A candidate may be claimed or changed meanwhile, which the conditional update
of the claim notices. What became free in front of the position is found when the reading begins anew:
after a while, when it finds nothing, and after every change by the same store that may have freed one.

Stores that claim at the same time read the same candidates, and would all try the first one. So a store
that another one was faster than reads larger pages for a while, and takes from them in random order. An
index may still show as free what this store has claimed itself a moment ago, which is no reason for that.
"""

from __future__ import annotations

import asyncio
import random
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Final

import msgspec

from hf_async_store.claim_records import is_free
from hf_async_store.generators import Owned
from hf_async_store.query import And, Comparison, Query, position_of
from hf_async_store.strategies.dynamodb.claim_items import claim_in

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hf_async_store.changes import Record
    from hf_async_store.claim_clock import Moment
    from hf_async_store.claim_records import ClaimTerms
    from hf_async_store.query import Filter
    from hf_async_store.strategies.dynamodb.codec import Attributes
    from hf_async_store.strategies.dynamodb.reading import Reading
    from hf_async_store.values import Key

_FIRST_PAGE: Final = 16
_SPREAD_PAGE: Final = 128
_LAST_PAGE: Final = 1024
"""How many candidates are read at once, beyond the number wanted."""

_SECONDS: Final = 0.25
_LONGEST: Final = 5.0
_PER_READING: Final = 4
"""How long candidates are shared: this time, or this many times as long as it took to read them."""

_SPREAD_SECONDS: Final = 5.0
"""For how long a store spreads its claims after another one was faster, and knows what it has claimed."""

_MAX_QUERIES: Final = 16


class Candidates:
    """The free entities that a query finds, from the first one on.

    Args:
        query: without a limit.
        max_attempts: see `ClaimTerms`.
        spread: take them in random order, from larger pages.
    """

    def __init__(
        self, reading: Reading, query: Query, max_attempts: int | None, *, spread: bool
    ) -> None:
        self.query = query
        self.kind = _kind(query, max_attempts)
        self._reading = reading
        self._page = query
        self._size = 0
        self._has_more = True
        self._spread = spread
        self._missed = self._claimed = 0
        self._unused: list[tuple[Record, Attributes]] = []
        self._lock = asyncio.Lock()
        self.began = monotonic()
        self._seconds = 0.0  # of reading

    @property
    def is_recent(self) -> bool:
        if self._missed > self._claimed:
            return False  # others have claimed most of them
        shared = min(max(_SECONDS, _PER_READING * self._seconds), _LONGEST)
        return monotonic() < self.began + self._seconds + shared

    async def take(
        self, number: int, terms: ClaimTerms, now: Moment
    ) -> list[tuple[Record, Attributes]]:
        """The next ones, up to a number, which no other caller gets; [] after the last one."""
        while not self._unused and self._has_more:
            async with self._lock:
                if not self._unused and self._has_more:
                    await self._read(number, terms, now)
        taken, self._unused = self._unused[:number], self._unused[number:]
        return taken

    async def _read(self, number: int, terms: ClaimTerms, now: Moment) -> None:
        began = monotonic()
        first = number + (_SPREAD_PAGE if self._spread else _FIRST_PAGE)
        self._size = min(4 * self._size, _LAST_PAGE) or first
        query = msgspec.structs.replace(self._page, limit=self._size, paged=True)
        items: dict[str, Attributes] = {}
        async with Owned(self._reading.select(query, items)) as records:
            page = [each async for each in records]
        self._has_more = len(page) == self._size
        if self._has_more:
            position = position_of(query, page[-1].key.id, page[-1].entity)
            self._page = msgspec.structs.replace(query, after=position)
        self._unused += [
            (each, items[each.key.id])
            for each in page
            if is_free(claim_in(items[each.key.id], each.key), terms, now)
        ]
        if self._spread:
            random.shuffle(self._unused)
        self._seconds += monotonic() - began

    def note(self, tried: Sequence[bool], *, spread: bool) -> None:
        """Of some candidates, whether each was claimed.

        Args:
            spread: another store was faster: continue in random order.
        """
        self._claimed += sum(tried)
        self._missed += len(tried) - sum(tried)
        if spread:
            self._spread = True
            random.shuffle(self._unused)


class SharedCandidates:
    """The candidates that the claimers of a store share, by query."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._shared: list[Candidates] = []
        self._spread_until = 0.0
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
        spread = monotonic() < self._spread_until
        new = Candidates(self._reading, query, max_attempts, spread=spread)
        others = [each for each in self._shared if each.kind != new.kind]
        self._shared = [*others[1 - _MAX_QUERIES :], new]
        return new

    def note_own(self, key: Key) -> None:
        """This store has claimed an entity, which an index may show as free for a while."""
        now = monotonic()
        self._own.pop(key, None)
        self._own[key] = now
        while now - self._own[first := next(iter(self._own))] > _SPREAD_SECONDS:
            del self._own[first]

    def spread_after(self, missed: Sequence[Key]) -> bool:
        """Spread for a while, if another store was faster to claim one of these entities, and not this
        one; returns whether it was."""
        now = monotonic()
        is_spread = any(now - self._own.get(each, -inf) > _SPREAD_SECONDS for each in missed)
        if is_spread:
            self._spread_until = now + _SPREAD_SECONDS
        return is_spread

    def forget(self) -> None:
        """The store may have been changed: an entity may be the first candidate now."""
        self._shared.clear()

    def forget_if_free(self, fields: Mapping[str, object]) -> None:
        """A claim has ended, and these fields were changed: is the entity a candidate again?"""
        self._shared = [each for each in self._shared if _excludes(each.query.where, fields)]


def _kind(query: Query, max_attempts: int | None) -> str:
    # Not the query itself: one for 1 equals one for True.
    return f"{query!r} {max_attempts}"


def _excludes(where: Filter, fields: Mapping[str, object]) -> bool:
    """Whether an entity with these fields certainly does not satisfy a condition."""
    if isinstance(where, And):
        return any(_excludes(each, fields) for each in where.parts)
    if not isinstance(where, Comparison) or where.op != "eq" or len(where.path) != 1:
        return False
    [name] = where.path
    value = fields.get(name, where.value) if isinstance(name, str) else where.value
    return type(value) is str and type(where.value) is str and value != where.value
