"""Claims on DynamoDB: an attribute of the item itself, changed by conditional updates.

A claimer reads the first candidates, by an index if there is one, and updates those that are free, each on
condition that the item and its claim are as they were read. The stores that claim at the same time share
the candidates out among them, as far as they know of each other. The tasks of one store share those that
they read, and the requests that claim them.

Named locks are items without an entity, in a table of their own, which the first lock creates.
"""

from __future__ import annotations

from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from hf_async_store.changes import Record
from hf_async_store.claim_records import (
    Claimed,
    ClaimInfo,
    ClaimTerms,
    absent,
    check_held,
    is_free,
    lost,
    taken,
)
from hf_async_store.errors import (
    ClaimLostError,
    ConcurrencyConflictError,
    EntityNotFoundError,
    InvalidFieldError,
    StorageError,
    UnsupportedValueError,
)
from hf_async_store.generators import Owned
from hf_async_store.query import Query, compile_order
from hf_async_store.strategies.dynamodb.candidates import Candidates, SharedCandidates
from hf_async_store.strategies.dynamodb.claim_items import (
    add_expression,
    also_if,
    claim_attribute,
    claim_in,
    follows_release,
    held_claim,
    request_in,
    same_claim,
    set_end,
)
from hf_async_store.strategies.dynamodb.claim_statements import (
    MAX_STATEMENTS,
    ClaimStatement,
    ClaimStatements,
)
from hf_async_store.strategies.dynamodb.errors import ConditionFailed
from hf_async_store.strategies.dynamodb.expressions import Names
from hf_async_store.strategies.dynamodb.items import CLAIM, new_token
from hf_async_store.strategies.dynamodb.partitions import gather
from hf_async_store.strategies.dynamodb.request_retry import retry
from hf_async_store.strategies.dynamodb.unique_markers import may_touch
from hf_async_store.strategies.dynamodb.write_requests import unchanged
from hf_async_store.values import VERSION, Key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_async_store.changes import Patch
    from hf_async_store.claim_clock import ClaimClock, Moment
    from hf_async_store.claim_records import ClaimState
    from hf_async_store.strategies.dynamodb.client import Client
    from hf_async_store.strategies.dynamodb.codec import Attribute, Attributes
    from hf_async_store.strategies.dynamodb.independent_writes import Writes
    from hf_async_store.strategies.dynamodb.reading import Reading
    from hf_async_store.strategies.dynamodb.tables import Tables

_REFUSED: Final = (
    ConcurrencyConflictError,
    EntityNotFoundError,
    InvalidFieldError,
    UnsupportedValueError,
)
"""Why an update under a claim is refused if the claim is held; otherwise, that is the reason to tell."""

_PARALLEL: Final = 2 * MAX_STATEMENTS
"""How many candidates are claimed at once."""


class Claiming:
    """The claims of an engine."""

    def __init__(self, client: Client, tables: Tables, reading: Reading, writes: Writes) -> None:
        self._client = client
        self._writes = writes
        self._tables = tables
        self._reading = reading
        self._in_progress: set[Key] = set()
        self._statements = ClaimStatements(client)
        self._name = new_token()
        self.candidates = SharedCandidates(reading, self._name)

    # -- claiming ----------------------------------------------------------------------------

    async def claim(
        self, query: Query, terms: ClaimTerms, now: Moment, claimed: list[Claimed]
    ) -> None:
        """As `Engine.claim`; adds each entity to a list as soon as it is claimed."""
        assert query.limit is not None, "claims are limited"
        shape, max_attempts, began = query.with_limit(None), terms.max_attempts, monotonic()
        recent = self.candidates.recent(shape, max_attempts)
        if recent is not None:
            await self._take_some(recent, query.limit, terms, now, claimed, until_used_up=True)
        if len(claimed) < query.limit:
            first = self.candidates.begun(shape, max_attempts, began)
            await self._take_some(first, query.limit, terms, now, claimed)
        sort_key = compile_order(query)
        claimed.sort(key=lambda each: sort_key(each.record.key.id, each.record.entity))

    async def _take_some(
        self,
        candidates: Candidates,
        limit: int,
        terms: ClaimTerms,
        now: Moment,
        claimed: list[Claimed],
        *,
        until_used_up: bool = False,
    ) -> None:
        """Claim candidates up to the limit, the first of them if no other claimer is faster.

        Args:
            until_used_up: end when the others have probably claimed the rest; a new reading follows.
        """
        while len(claimed) < limit and not (until_used_up and candidates.is_used_up):
            number = min(limit - len(claimed), _PARALLEL)
            tried = await candidates.take(number, terms, now, until_used_up=until_used_up)
            if not tried:
                break
            # Queries with other filters find the same entities.
            tried = [each for each in tried if each[0].key not in self._in_progress]
            keys = {record.key for record, _ in tried}
            self._in_progress |= keys
            try:
                found = await gather(
                    [self._take(*each, candidates, terms, now, claimed) for each in tried]
                )
            finally:
                self._in_progress -= keys
            candidates.note(sum(found), len(found) - sum(found))

    async def _take(
        self,
        record: Record,
        item: Attributes,
        candidates: Candidates,
        terms: ClaimTerms,
        now: Moment,
        claimed: list[Claimed],
    ) -> bool:
        """Claim an item that is as it was read; returns whether it was."""
        key = record.key
        before = claim_in(item, key)
        new = taken(before, key, terms, now)
        made = self._new_request()
        attribute = claim_attribute(new, made, before)
        # Listed before the request, because its answer may be lost.
        own = self._claimed(record, new)
        claimed.append(own)
        holder: str | None | StorageError = StorageError("it was not sent")
        if self._statements.can_express(item) and not self._tables.has_stream(key.collection):
            holder = await self._statements.claim(self._statement(key, item, attribute, made))
        if isinstance(holder, StorageError):  # it is not known, but a repetition recognises it
            holder = await self._update(self._request(key, item, attribute), made)
        if holder == made:
            self.candidates.note_own(key)
            return True
        claimed.remove(own)
        if not self.candidates.is_own(key):  # an index may be late
            candidates.note_other(holder)
        return False

    def _new_request(self) -> str:
        """A text that tells the store, for a claim and for what is written under it."""
        return f"{self._name}.{new_token()}"

    def _statement(self, key: Key, item: Attributes, new: Attribute, made: str) -> ClaimStatement:
        name = self._tables.mappings[key.collection].key
        table = self._tables.name(key.collection)
        alone = partial(self._request, key, item, new)
        return ClaimStatement(table, (name, key.id), item, new, made, alone)

    def _request(self, key: Key, item: Attributes, new: Attribute) -> dict[str, Any]:
        mapping = self._tables.mappings[key.collection]
        request = {**self._at(key), **unchanged(mapping, item)}
        also_if(request, lambda names: same_claim(item, names))
        add_expression(request, "UpdateExpression", lambda names: _set(names, new))
        return request

    async def claim_name(
        self, keys: Sequence[Key], terms: ClaimTerms, now: Moment, claimed: list[Claimed]
    ) -> None:
        """As `Engine.claim_name`; adds the name to a list."""
        await self._tables.ensure(keys[0].collection)
        for key in keys:
            item = await self._reading.item(key)
            state = claim_in(item, key)
            if not is_free(state, terms, now):
                continue
            names = Names()
            new = taken(state, key, terms, now)
            made = self._new_request()
            attribute = claim_attribute(new, made, state)
            update, condition = _set(names, attribute), same_claim(item or {}, names)
            expressions = names.request(UpdateExpression=update, ConditionExpression=condition)
            request = {**self._at(key), **expressions}
            own = self._claimed(Record(key, {VERSION: 0}), new)
            claimed.append(own)
            if await self._update(request, made) == made:
                return
            claimed.remove(own)

    def _claimed(self, record: Record, new: ClaimState) -> Claimed:
        skew = self._client.config.max_clock_skew
        return Claimed(record, new.token, new.attempts, skew)

    async def _update(self, request: dict[str, Any], made: str) -> str | None:
        """Write a claim; returns the request whose claim the item has now."""
        try:
            await self._send(request)
        except ConditionFailed as exc:
            # An earlier attempt, whose response was lost, may have written it. Token and owner do not
            # tell: two claimers of one name can choose the same token.
            return request_in(exc.item)
        return made

    async def _send(self, request: dict[str, Any]) -> None:
        """Send an update of a claim, again after failures.

        Raises:
            ConditionFailed: with `outcome_unknown` if an earlier attempt may have been the reason.
        """
        unknown = False

        async def attempt() -> None:
            nonlocal unknown
            try:
                await self._client.call("UpdateItem", request)
            except StorageError as exc:
                unknown = unknown or exc.outcome_unknown
                raise

        try:
            await retry(attempt, self._client.retries())
        except StorageError as exc:
            exc.outcome_unknown = unknown
            raise

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
        await self._refuse_unknown(key)
        if may_touch(change, self._tables.unique(key.collection)):
            return None
        try:
            version = await self._writes.update_where(
                change,
                lambda _, names: held_claim(names, token, clock.now(), skew),
                ends_claim=ends,
                token=self._new_request(),
            )
        except _REFUSED as exc:
            if exc.outcome_unknown or exc.retryable:
                raise
            item = await self._reading.item(key)
            check_held(claim_in(item, key), key, token, clock.now())  # raises, and says why
            if isinstance(exc, EntityNotFoundError):
                raise absent(key) from exc
            if isinstance(exc, ConcurrencyConflictError):
                raise lost(key, "its lease is about to end") from exc
            raise  # by what is stored, which the holder may know
        if ends:
            self.candidates.forget_after([change])
        return version

    async def renew(self, key: Key, token: int, lease: float, now: Moment) -> None:
        """As `Engine.renew_claim`."""
        names = Names()
        assert now.seconds is not None, "by the wall clock"
        update = set_end(names, now.seconds + lease, held=True)
        await self._change(key, token, now, names, update, ends=False)

    async def release(self, key: Key, token: int, after: float | None, now: Moment) -> None:
        """As `Engine.release_claim`."""
        names = Names()
        assert now.seconds is not None, "by the wall clock"
        if after is None:
            update = f"REMOVE {names.name(CLAIM)}"
        else:
            update = set_end(names, now.seconds + after, held=False)
        await self._change(key, token, now, names, update, ends=True)
        self.candidates.forget()

    async def _refuse_unknown(self, key: Key) -> None:
        """Refuse a claim if there is no table: it was made before a live migration to this store."""
        ready = self._tables.is_ready(key.collection)
        if not ready and await self._tables.find(key.collection) is None:
            raise lost(key)

    async def _change(
        self, key: Key, token: int, now: Moment, names: Names, update: str, *, ends: bool
    ) -> None:
        await self._refuse_unknown(key)
        condition = held_claim(names, token, now, self._client.config.max_clock_skew)
        expressions = names.request(UpdateExpression=update, ConditionExpression=condition)
        try:
            await self._send({**self._at(key), **expressions})
        except ConditionFailed as exc:
            state = claim_in(exc.item, key)
            released = state is None or (state.token == token and not state.held)
            released = released or follows_release(exc.item, token)
            is_unknown = ends and exc.outcome_unknown
            if is_unknown and released:
                return  # by an attempt whose response was lost
            try:
                check_held(state, key, token, now)  # raises, and says why
                raise lost(key, "its lease is about to end") from exc
            except ClaimLostError as loss:
                loss.outcome_unknown = is_unknown
                raise

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


def _set(names: Names, claim: Attribute) -> str:
    """The UpdateExpression that writes a claim."""
    return f"SET {names.name(CLAIM)} = {names.value(claim)}"
