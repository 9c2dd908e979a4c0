"""Claims on DynamoDB: an attribute of the item itself, changed by conditional updates.

A claimer reads the first candidates, by an index if there is one, and updates those that are free, each on
condition that the item and its claim are as they were read. If another claimer was faster, it goes on
with candidates in random order, so that claimers spread. The tasks of one store share the candidates that
they read.

Named locks are items without an entity, in a table of their own, which the first lock creates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hf_async_store.changes import Record
from hf_async_store.claim_records import (
    Claimed,
    ClaimInfo,
    ClaimTerms,
    check_held,
    is_free,
    lost,
    taken,
)
from hf_async_store.errors import ConcurrencyConflictError, EntityNotFoundError
from hf_async_store.field_operations import plain_fields
from hf_async_store.generators import Owned
from hf_async_store.query import Query, compile_order
from hf_async_store.strategies.dynamodb.candidates import Candidates, SharedCandidates
from hf_async_store.strategies.dynamodb.claim_items import (
    add_expression,
    also_if,
    claim_attribute,
    claim_in,
    held_claim,
    same_claim,
    set_end,
)
from hf_async_store.strategies.dynamodb.errors import ConditionFailed
from hf_async_store.strategies.dynamodb.expressions import Names
from hf_async_store.strategies.dynamodb.items import CLAIM
from hf_async_store.strategies.dynamodb.partitions import gather
from hf_async_store.strategies.dynamodb.unique_markers import may_touch
from hf_async_store.strategies.dynamodb.write_requests import unchanged
from hf_async_store.values import VERSION, Key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_async_store.changes import Patch
    from hf_async_store.claim_clock import ClaimClock, Moment
    from hf_async_store.claim_records import ClaimState
    from hf_async_store.strategies.dynamodb.client import Client
    from hf_async_store.strategies.dynamodb.codec import Attributes
    from hf_async_store.strategies.dynamodb.independent_writes import Writes
    from hf_async_store.strategies.dynamodb.reading import Reading
    from hf_async_store.strategies.dynamodb.tables import Tables

_PARALLEL: Final = 16
"""How many candidates are claimed at once."""


class Claiming:
    """The claims of an engine."""

    def __init__(self, client: Client, tables: Tables, reading: Reading, writes: Writes) -> None:
        self._client = client
        self._writes = writes
        self._tables = tables
        self._reading = reading
        self.candidates = SharedCandidates(reading)

    # -- claiming ----------------------------------------------------------------------------

    async def claim(self, query: Query, terms: ClaimTerms, now: Moment) -> list[Claimed]:
        """As `Engine.claim`."""
        assert query.limit is not None, "claims are limited"
        shape, max_attempts = query.with_limit(None), terms.max_attempts
        claimed: list[Claimed] = []
        recent = self.candidates.recent(shape, max_attempts)
        if recent is not None:
            claimed = await self._take_some(recent, query.limit, terms, now)
        if len(claimed) < query.limit:
            first = self.candidates.begin(shape, max_attempts)
            claimed += await self._take_some(first, query.limit - len(claimed), terms, now)
        sort_key = compile_order(query)
        return sorted(claimed, key=lambda each: sort_key(each.record.key.id, each.record.entity))

    async def _take_some(
        self, candidates: Candidates, limit: int, terms: ClaimTerms, now: Moment
    ) -> list[Claimed]:
        """Claim up to this number of candidates, the first of them if no other claimer is faster."""
        claimed: list[Claimed] = []
        while len(claimed) < limit:
            number = min(limit - len(claimed), _PARALLEL)
            tried = await candidates.take(number, terms, now)
            if not tried:
                break
            found = await gather([self._take(*each, terms, now) for each in tried])
            claimed += [each for each in found if each is not None]
            if None in found:
                candidates.spread()
        return claimed

    async def _take(
        self, record: Record, item: Attributes, terms: ClaimTerms, now: Moment
    ) -> Claimed | None:
        """Claim an item that is as it was read; None if it is not."""
        key = record.key
        mapping = self._tables.mappings[key.collection]
        new = taken(claim_in(item, key), key, terms, now)
        request = {**self._at(key), **unchanged(mapping, item)}
        also_if(request, lambda names: same_claim(item, names))
        add_expression(request, "UpdateExpression", lambda names: _set(names, new))
        if await self._update(request, new):
            return Claimed(record, new.token, new.attempts)
        return None

    async def claim_name(
        self, keys: Sequence[Key], terms: ClaimTerms, now: Moment
    ) -> Claimed | None:
        """As `Engine.claim_name`."""
        await self._tables.ensure(keys[0].collection)
        for key in keys:
            item = await self._reading.item(key)
            state = claim_in(item, key)
            if not is_free(state, terms, now):
                continue
            names = Names()
            new = taken(state, key, terms, now)
            update, condition = _set(names, new), same_claim(item or {}, names)
            expressions = names.request(UpdateExpression=update, ConditionExpression=condition)
            request = {**self._at(key), **expressions}
            if await self._update(request, new):
                return Claimed(Record(key, {VERSION: 0}), new.token, new.attempts)
        return None

    async def _update(self, request: dict[str, Any], new: ClaimState) -> bool:
        """Write a claim; returns whether its condition held."""
        try:
            await self._client.read("UpdateItem", request)
        except ConditionFailed as exc:
            # An earlier attempt, whose response was lost, may have written it.
            written = claim_in(exc.item, Key(new.collection, new.id))
            return written is not None and (written.token, written.owner) == (new.token, new.owner)
        return True

    def _at(self, key: Key) -> dict[str, Any]:
        return {
            "TableName": self._tables.name(key.collection),
            "Key": {self._tables.mappings[key.collection].key: {"S": key.id}},
            "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
        }

    # -- what a holder does ------------------------------------------------------------------

    async def update(
        self, token: int, change: Patch, clock: ClaimClock, *, ends: bool
    ) -> int | None:
        """As `Engine.write_claimed`; None if no single request can express the update."""
        key, skew = change.key, self._client.config.max_clock_skew
        unique = self._tables.unique(key.collection)
        if plain_fields(change.fields) is None or may_touch(change, unique):
            return None
        try:
            version = await self._writes.update_where(
                change,
                lambda _, names: held_claim(names, token, clock.now(), skew),
                ends_claim=ends,
            )
        except (ConcurrencyConflictError, EntityNotFoundError) as exc:
            if exc.outcome_unknown or exc.retryable:
                raise
            item = await self._reading.item(key)
            check_held(claim_in(item, key), key, token, clock.now())  # raises, and says why
            raise lost(key, "its lease is about to end") from exc
        if ends:
            self.candidates.forget_if_free(change.fields)
        return version

    async def renew(self, key: Key, token: int, lease: float, now: Moment) -> None:
        """As `Engine.renew_claim`."""
        names = Names()
        assert now.seconds is not None, "by the wall clock"
        update = set_end(names, now.seconds + lease, held=True)
        await self._change(key, token, now, names, update)

    async def release(self, key: Key, token: int, after: float | None, now: Moment) -> None:
        """As `Engine.release_claim`."""
        names = Names()
        assert now.seconds is not None, "by the wall clock"
        if after is None:
            update = f"REMOVE {names.name(CLAIM)}"
        else:
            update = set_end(names, now.seconds + after, held=False)
        await self._change(key, token, now, names, update)
        self.candidates.forget()

    async def _change(self, key: Key, token: int, now: Moment, names: Names, update: str) -> None:
        ready = self._tables.is_ready(key.collection)
        if not ready and await self._tables.find(key.collection) is None:
            raise lost(key)  # it was made before a live migration to this store
        condition = held_claim(names, token, now, self._client.config.max_clock_skew)
        expressions = names.request(UpdateExpression=update, ConditionExpression=condition)
        try:
            await self._client.read("UpdateItem", {**self._at(key), **expressions})
        except ConditionFailed as exc:
            check_held(claim_in(exc.item, key), key, token, now)  # raises, and says why
            raise lost(key, "its lease is about to end") from exc

    # -- for operators -----------------------------------------------------------------------

    async def break_claim(self, key: Key) -> bool:
        """As `Engine.break_claim`."""
        if await self._tables.find(key.collection) is None:
            return False
        names = Names()
        name = names.name(CLAIM)
        expressions = names.request(
            UpdateExpression=f"REMOVE {name}", ConditionExpression=f"attribute_exists({name})"
        )
        try:
            await self._client.read("UpdateItem", {**self._at(key), **expressions})
        except ConditionFailed:
            return False
        self.candidates.forget()
        return True

    async def listed(self, collection: str, now: Moment) -> list[ClaimInfo]:
        """As `Engine.claims`; reads the whole table."""
        if await self._tables.find(collection) is None:
            return []
        mapping, names = self._tables.mappings[collection], Names()
        params = {
            "TableName": self._tables.name(collection),
            "ConsistentRead": True,
            **names.request(FilterExpression=f"attribute_exists({names.name(CLAIM)})"),
        }
        found: list[ClaimInfo] = []
        async with Owned(self._reading.pages("Scan", params)) as pages:
            async for page in pages:
                for item in page["Items"]:
                    state = claim_in(item, Key(collection, mapping.id_of(item)))
                    if state is not None:
                        found.append(state.info(now))
        return sorted(found, key=lambda each: each.id)


def _set(names: Names, state: ClaimState) -> str:
    """The UpdateExpression that writes a claim."""
    return f"SET {names.name(CLAIM)} = {names.value(claim_attribute(state))}"
