"""What claims have passed over: remembered, so that a claim does not read again what others hold.

The claims of a query read its first entities, in order, until enough of them are free. `PassedOver`
remembers how far they have read, which of these entities are free, and until when the others are held. The
next claim takes the first free ones, and reads on from there; it reads again what has changed since, and
what is not held any more. So it finds the same entities as if it had read from the start.

It is for engines that have the entities, and the records of their claims, in tables in memory. Its methods
are called while nobody else changes these.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from itertools import islice
from math import inf
from operator import itemgetter
from typing import Any, Final, cast

import msgspec

from hf_async_store.changes import Record
from hf_async_store.claim_clock import Moment
from hf_async_store.query import (
    Comparison,
    CursorPosition,
    Filter,
    Not,
    Query,
    SortKey,
    compile_filter,
    compile_order,
    position_of,
)
from hf_async_store.table import Listener, Table

_MOST_CHANGES: Final = 1024
"""After more changes between two claims, the second one reads from the start: in pages, and only up to the
first entities that are free."""

_MOST_QUERIES: Final = 8
_MOST_OF_ALL: Final = 64
"""For how many queries of a collection, and of all of them, is remembered what was passed over."""


class PassedOver(Listener):
    """What the claims of one query have passed over.

    Attributes:
        position: of the last entity that was read; None: read from the start.
    """

    def __init__(self, query: Query, entities: Table[Any]) -> None:
        self._query = query
        self._entities = entities
        self._sort_key = compile_order(query)
        self._again: set[str] = set()  # the ids of entities that must be read again
        self._changes: set[str] | None = None  # claims that changed; None: nothing is known
        self._forget("", [])

    def _forget(self, era: str, times: list[str]) -> None:
        self._era, self._times = era, times
        self.position: CursorPosition | None = None
        self._end: SortKey = ()
        self._again.clear()
        self._of: dict[
            str, str
        ] = {}  # by the record of its claim, each entity that is held or free
        self._held: set[str] = set()
        self._ends: list[tuple[float, str]] = []  # a heap of when claims end, with outdated times
        self._free: dict[str, SortKey] = {}
        self._first: list[tuple[SortKey, str]] = []  # a heap of these, with outdated ones

    def note(self, table: Table[Any], changed: Iterable[str]) -> None:
        if self._changes is not None:
            noted = self._again if table is self._entities else self._changes
            noted.update(islice(changed, _MOST_CHANGES + 1))
            if len(noted) > _MOST_CHANGES:
                self._changes = None

    def begin(self, now: Moment, times: list[str]) -> list[str]:
        """The ids of the entities up to `position` that must be read again; the caller then calls `read`
        with each entity that it reads, and `complete`, without which nothing is known.

        Args:
            now: by the clock of claims.
            times: up to which entities have expired. If they are earlier than before, some live again.
        """
        era, seconds = now
        assert seconds is not None, "the store has no clock of its own"
        changes, self._changes = self._changes, None
        if changes is None or era != self._era or self._times > times:
            self._forget(era, times)
            return []
        self._times = times
        while self._ends and self._ends[0][0] <= seconds:
            changes.add(heapq.heappop(self._ends)[1])
        self._again.update(self._of.pop(each) for each in changes if each in self._of)
        if len(self._again) > _MOST_CHANGES:
            self._forget(era, times)
        again, self._again = list(self._again), set()
        for each in again:
            self._free.pop(each, None)
        self._held.difference_update(again)
        return again

    def next_free(self, number: int) -> list[str]:
        """The ids of the first entities that are free and were not read again, up to a number; they are
        not returned again."""
        found: list[str] = []
        while self._first and len(found) < number:
            key, entity_id = heapq.heappop(self._first)
            if self._free.get(entity_id) == key:
                del self._free[entity_id]
                found.append(entity_id)
        return found

    def before(self, query: Query, records: Iterable[Record]) -> list[Record]:
        """Those of the entities that match, and are not after `position`, in order."""
        matches, key = compile_filter(query.where), self._sort_key
        found = [each for each in records if matches(each.entity)]
        keyed = [(key(each.key.id, each.entity), each) for each in found]
        keyed.sort(key=itemgetter(0))
        return [each for at, each in keyed if at <= self._end]

    def read(self, record: Record, claim: str, held_until: float | None, *, taken: bool) -> None:
        """Note an entity that was read.

        Args:
            claim: the id of the record of its claim.
            held_until: None: it was free.
            taken: it is being claimed.
        """
        entity_id, entity = record.key.id, record.entity
        key = self._sort_key(entity_id, entity)
        if self.position is None or key > self._end:
            self._end, self.position = key, position_of(self._query, entity_id, entity)
        if taken:
            self._again.add(entity_id)
            return
        self._of[claim] = entity_id
        if held_until is None:
            self._free[entity_id] = key
            heapq.heappush(self._first, (key, entity_id))
            return
        self._held.add(entity_id)
        if held_until < inf:
            heapq.heappush(self._ends, (held_until, claim))

    def complete(self) -> None:
        """What was read is known from now on, unless most of it is outdated."""
        known = len(self._free) + len(self._held)
        if len(self._of) + len(self._first) + len(self._ends) <= 4 * known + _MOST_CHANGES:
            self._changes = set()

    def end(self) -> None:
        """Nothing is known from now on."""
        self._changes = None
        self._forget("", [])


def passed_over(
    query: Query, most_attempts: int | None, entities: Table[Any], claims: Table[Any]
) -> tuple[PassedOver, list[str]]:
    """What claims of a query have passed over, and up to which times entities have expired, for `begin`.

    Args:
        most_attempts: `max_attempts` of these claims.
        entities, claims: the tables of the collection, and of the records of claims.
    """
    times: list[str] = []
    where = _timeless(query.where, times)
    # A text, because 1 == True.
    shape = query.collection, repr((where, query.order, most_attempts))
    found = entities.listeners.get(shape)
    known = found is claims.listeners.get(shape) and isinstance(found, PassedOver)
    over = cast("PassedOver", found) if known else PassedOver(query, entities)
    for table, most in (entities, _MOST_QUERIES), (claims, _MOST_OF_ALL):
        dropped = table.listen(shape, over, most)
        if isinstance(dropped, PassedOver):
            dropped.end()  # the other table may still tell it what changes
    return over, times


def _timeless(where: Filter, times: list[str]) -> Filter:
    """The filter without the times up to which entities have expired, which are added to a list."""
    if isinstance(where, Comparison):
        if where.op != "timestamp_lte":
            return where
        times.append(cast("str", where.value))
        return msgspec.structs.replace(where, value=None)
    if isinstance(where, Not):
        return Not(_timeless(where.part, times))
    return type(where)(tuple(_timeless(each, times) for each in where.parts))
