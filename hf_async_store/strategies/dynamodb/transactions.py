"""Transactions: reads are recorded, writes are buffered, and one `TransactWriteItems` commits them.

Each read by key, also of a missing item, becomes a condition of the commit: the write token of the
item must be unchanged. With respect to these reads, the transaction is therefore serializable with
all concurrent writes. (The rows returned by queries are not conditions.) A commit without a response
can be retried, because DynamoDB recognises its client request token.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import msgspec

from hf_async_store.changes import Change, Delete, Outcome, Patch, Put, Record
from hf_async_store.claim_clock import ClaimClock
from hf_async_store.claim_records import check_held
from hf_async_store.driver import Session, run_to_completion
from hf_async_store.errors import (
    ConcurrencyConflictError,
    CorruptionError,
    InvalidCursorError,
    StorageError,
    TransactionTooLargeError,
    UnavailableError,
    UniqueViolationError,
)
from hf_async_store.generators import Owned
from hf_async_store.preconditions import changed, is_there, present
from hf_async_store.query import Query, compile_filter, compile_order, position_key
from hf_async_store.strategies.dynamodb.claim_items import (
    also_if,
    claim_in,
    held_claim,
    keep_claim,
)
from hf_async_store.strategies.dynamodb.errors import (
    TABLE_REMEDY,
    Cancelled,
    StatementRefused,
    TableMissing,
    conflict,
    public_errors,
    short,
    translate,
)
from hf_async_store.strategies.dynamodb.items import (
    CLAIM,
    SIZE,
    TOKEN,
    new_token,
    token_of,
    version_of,
)
from hf_async_store.strategies.dynamodb.unique_markers import UniqueChange, marker_entity
from hf_async_store.strategies.dynamodb.write_cache import WriteReceipt
from hf_async_store.strategies.dynamodb.write_requests import unchanged
from hf_async_store.unique import stored_digest, violation
from hf_async_store.values import VERSION, Entity, Key, copy_entity

if TYPE_CHECKING:
    from hf_async_store.strategies.dynamodb.client import Client
    from hf_async_store.strategies.dynamodb.codec import Attribute, Attributes
    from hf_async_store.strategies.dynamodb.reading import Reading
    from hf_async_store.strategies.dynamodb.tables import Tables
    from hf_async_store.strategies.dynamodb.write_cache import WriteCache
    from hf_async_store.unique import Fields

MAX_ACTIONS: Final = 100
MAX_BYTES: Final = 4 * 1024 * 1024
"""Source: DynamoDB service quotas, "Transactions"."""

_CONFLICT_SECONDS: Final = 2.0
_ENCODE: Final = msgspec.json.Encoder().encode


class HeldClaim(NamedTuple):
    """A claim that a transaction requires to be held.

    Attributes:
        ends: the commit ends it.
        skew: by how many seconds clocks may differ.
    """

    key: Key
    token: int
    clock: ClaimClock
    ends: bool
    skew: float


class DynamoDBSession(Session):
    """One transaction.

    Args:
        claim: is held when it commits.
    """

    def __init__(
        self,
        client: Client,
        tables: Tables,
        reading: Reading,
        write_cache: WriteCache,
        claim: HeldClaim | None = None,
    ) -> None:
        self._claim = claim
        self._deleted: set[Key] = set()  # whose claims have ended: deleted, or expired
        self._client = client
        self._tables = tables
        self._reading = reading
        self._write_cache = write_cache
        self._items_read: dict[Key, Attributes | None] = {}
        self._layers: list[dict[Key, Entity | None]] = [{}]
        self._reads = 0

    # -- reads -------------------------------------------------------------------------------

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        """As `Reader.fetch`; several keys are read in one snapshot."""
        with public_errors():
            await self._load(keys, snapshot=True)
            return [self._record(each) for each in keys]

    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        """As `Reader.select`: the rows of the store, merged with the writes of this transaction."""
        if query.limit == 0:
            return
        if query.paged and not query.order and not query.by_id:
            # Only pages by id, as those of `first_page`, can be merged with the rows written here.
            raise InvalidCursorError("the cursor of a query without an order, outside transactions")
        own_records = self._own_matches(query)
        written = {each.key for each in own_records} | self._written(query.collection)
        limit = None if query.limit is None else query.limit + len(written)
        number = 0
        async with Owned(self._reading.select(query.with_limit(limit))) as stored_records:
            rows = self._merged(query, own_records, written, stored_records)
            async with Owned(rows) as found:
                with public_errors():
                    async for record in found:
                        yield record
                        number += 1
                        if number == query.limit:
                            return

    async def _merged(
        self,
        query: Query,
        own_records: list[Record],
        written: set[Key],
        stored_records: AsyncIterator[Record],
    ) -> AsyncGenerator[Record, None]:
        in_order = bool(query.order or query.by_id)
        sort_key_of = compile_order(query)
        pending = own_records[::-1]
        async for record in stored_records:
            if record.key in written:
                continue
            while pending and (
                not in_order
                or sort_key_of(pending[-1].key.id, pending[-1].entity)
                < sort_key_of(record.key.id, record.entity)
            ):
                yield pending.pop()
            yield record
        while pending:
            yield pending.pop()

    def _written(self, collection: str) -> set[Key]:
        return {key for layer in self._layers for key in layer if key.collection == collection}

    def _own_matches(self, query: Query) -> list[Record]:
        """The entities written by this transaction that match the query, in its order."""
        matches = compile_filter(query.where)
        sort_key_of = compile_order(query)
        after = None if query.after is None else position_key(query, query.after)
        found = []
        for key in self._written(query.collection):
            entity = self._entity(key)
            if entity is not None and matches(entity):
                sort_key = sort_key_of(key.id, entity)
                if after is None or sort_key > after:
                    found.append((sort_key, Record(key, copy_entity(entity))))
        return [record for _, record in sorted(found, key=lambda each: each[0])]

    async def _load(self, keys: Sequence[Key], *, snapshot: bool) -> None:
        """Read the items that were not read before."""
        unread = [each for each in dict.fromkeys(keys) if each not in self._items_read]
        if not unread:
            return
        self._check_action_count(len(self._items_read) + len(unread))
        self._reads += 1
        if snapshot and len(unread) > 1:
            items = await self._read_many(unread)
        else:
            items = await self._reading.items(unread, consistent=True)
        self._items_read.update(zip(unread, items, strict=True))

    async def _read_many(self, keys: Sequence[Key]) -> list[Attributes | None]:
        try:
            found = await self._read_snapshot(keys)
        except StatementRefused:
            # More than 4 MB: read without a snapshot. The extra read makes `commit` validate it.
            self._reads += 1
            return await self._reading.items(keys, consistent=True)
        return [found.get(each) for each in keys]

    async def _read_snapshot(
        self, keys: Sequence[Key], *, only_token: bool = False
    ) -> dict[Key, Attributes | None]:
        """The items of these keys in one snapshot; keys whose table does not exist are omitted."""
        existing = [each for each in keys if await self._tables.find(each.collection) is not None]
        if not existing:
            return {}
        gets = [self._get(each, only_token=only_token) for each in existing]
        response = await self._transact("TransactGetItems", {"TransactItems": gets}, existing)
        return {
            key: each.get("Item") for key, each in zip(existing, response["Responses"], strict=True)
        }

    def _get(self, key: Key, *, only_token: bool) -> dict[str, Any]:
        mapping = self._tables.mappings[key.collection]
        get: dict[str, Any] = {
            "TableName": self._tables.name(key.collection),
            "Key": {mapping.key: {"S": key.id}},
        }
        if only_token:
            get["ProjectionExpression"] = "#k, #w, #v"
            get["ExpressionAttributeNames"] = {"#k": mapping.key, "#w": TOKEN, "#v": VERSION}
        return {"Get": get}

    def _check_action_count(self, number: int) -> None:
        if number > MAX_ACTIONS:
            raise TransactionTooLargeError(
                f"a transaction on DynamoDB can read and write at most {MAX_ACTIONS} entities; use "
                "several transactions"
            )

    def _entity(self, key: Key) -> Entity | None:
        for layer in reversed(self._layers):
            if key in layer:
                return layer[key]
        item = self._items_read[key]
        return None if item is None else self._tables.mappings[key.collection].entity(item)

    def _record(self, key: Key) -> Record | None:
        entity = self._entity(key)
        return None if entity is None else Record(key, copy_entity(entity))

    # -- writes ------------------------------------------------------------------------------

    def changes(self) -> list[Change]:
        """What the transaction writes, one change for each entity."""
        return [
            Delete(key) if entity is None else Put(key, entity, "")
            for key, entity in self._layers[0].items()
        ]

    async def write(self, changes: Sequence[Change]) -> list[Outcome]:
        """As `Session.write`."""
        keys = [each.key for each in changes]
        keys += [each.mark.key for each in changes if each.mark is not None]
        with public_errors():
            for collection in {each.collection for each in keys}:
                await self._tables.ensure_existing(collection)
            await self._load(keys, snapshot=False)
        outcomes: list[Outcome] = []
        for change in changes:
            with public_errors():
                outcomes.append(await self._apply(change))
            if isinstance(outcomes[-1], StorageError):
                break
        return outcomes

    async def _apply(self, change: Change) -> Outcome:
        key = change.key
        try:
            stored = self._entity(key)
            current = present(change, stored)
            self._check_item(change)
            entity = changed(change, current)
            values = UniqueChange(key, self._unique(key.collection), current, entity)
        except StorageError as exc:
            return exc
        if values.markers:
            refused = await self._change_markers(values, partial(is_there, change))
            if refused is not None:
                return refused
        if entity is not None or current is not None:
            self._layers[-1][key] = entity
            if entity is None or (current is None and stored is not None):
                self._deleted.add(key)
        if change.mark is not None:
            self._layers[-1][change.mark.key] = change.mark.entity
        affected = current if isinstance(change, Delete) else entity
        if affected is None:
            return None
        version = affected[VERSION]
        return version if type(version) is int else 0  # deleted; another program set the version

    # -- unique values -----------------------------------------------------------------------

    def _unique(self, collection: str) -> tuple[Fields, ...]:
        return self._tables.unique(collection)

    async def mark(self, key: Key, fields: Sequence[Fields]) -> UniqueViolationError | None:
        """Write the markers of the values that an entity has already; returns the error if one of them
        belongs to another entity."""
        await self._load([key], snapshot=False)
        entity = self._entity(key)
        values = UniqueChange(key, fields, None, entity)
        return await self._change_markers(values, lambda *_: True) if values.markers else None

    async def _change_markers(
        self, change: UniqueChange, is_there: Callable[[Key, Entity], bool]
    ) -> UniqueViolationError | None:
        """Write the markers of the values that an entity gets, and delete those of the ones that it had.

        A marker whose owner does not have the value any more, because another program deleted it, is
        taken over.

        Args:
            is_there: whether an owner exists for the change; one that has expired does not.
        """
        await self._load(change.markers, snapshot=False)
        for marker, (fields, digest) in change.claimed.items():
            owner = self._owner(marker)
            if owner is not None and owner != change.key.id:
                owner_key = Key(change.key.collection, owner)
                await self._load([owner_key], snapshot=False)
                entity = self._entity(owner_key)
                if entity is None or stored_digest(entity, fields) != digest:
                    continue
                if is_there(owner_key, entity):
                    return violation(change.key, fields, owner)
        layer = self._layers[-1]
        for marker in change.freed:
            if self._owner(marker) == change.key.id:
                layer[marker] = None
        for marker in change.claimed:
            if self._owner(marker) != change.key.id:
                layer[marker] = marker_entity(marker, change.key.id)
        return None

    def _owner(self, marker: Key) -> str | None:
        entity = self._entity(marker)
        owner = None if entity is None else entity.get("owner")
        return owner if isinstance(owner, str) else None

    def _check_item(self, change: Change) -> None:
        """Check that the stored item can be changed.

        Raises:
            CorruptionError: another program set an invalid version, or attributes that an update would
                remove.
        """
        item, key = self._items_read[change.key], change.key
        if item is None or isinstance(change, Delete):
            return
        version_of(item, self._tables.name(key.collection), key.id)
        if isinstance(change, Patch) and not any(key in layer for layer in self._layers):
            self._tables.mappings[key.collection].check_attributes(item)

    @asynccontextmanager
    async def savepoint(self) -> AsyncGenerator[Session, None]:
        """As `Session.savepoint`; reads in it remain conditions of the commit after a rollback."""
        depth, deleted = len(self._layers), set(self._deleted)
        self._layers.append({})
        try:
            yield self
        except BaseException:
            del self._layers[depth:]
            self._deleted = deleted
            raise
        top = self._layers.pop()
        self._layers[-1].update(top)

    # -- commit ------------------------------------------------------------------------------

    async def commit(self) -> None:
        """Write all changes or none. Without changes, validate several reads against each other.

        Raises:
            ConcurrencyConflictError: an entity was changed after it was read.
            TransactionTooLargeError: the transaction exceeds a limit of DynamoDB.
        """
        [written] = self._layers
        if written:
            await run_to_completion(self._commit(written))
        elif self._reads > 1:
            await self._validate()

    async def _validate(self) -> None:
        """Check in one snapshot that no item has changed since it was read."""
        keys = list(self._items_read)
        found = await self._read_snapshot(keys, only_token=True)
        for key in keys:
            observed, now = self._items_read[key], found.get(key)
            if _state_of(observed) != _state_of(now):
                raise self._conflict(key, now)

    async def _commit(self, written: Mapping[Key, Entity | None]) -> None:
        keys = list(dict.fromkeys([*written, *self._items_read]))
        self._check_action_count(len(keys))
        for collection in {each.collection for each in keys}:
            # Also for keys that were only read: a condition on a missing item requires the table.
            await self._tables.ensure(collection)
        mappings = [self._tables.mappings[name] for name in {each.collection for each in written}]
        try:
            await self._write(keys, written)
        except StatementRefused as exc:
            changed_tables = [each for each in mappings if await self._tables.have_changed(each)]
            if exc.outcome_unknown or not changed_tables:
                raise
            await self._write(keys, written)

    async def _write(self, keys: Sequence[Key], written: Mapping[Key, Entity | None]) -> None:
        token = new_token()
        actions = [self._action(each, written, token) for each in keys]
        if len(_ENCODE(actions)) > MAX_BYTES:
            raise TransactionTooLargeError(
                "a transaction on DynamoDB can contain at most 4 MiB; use several transactions"
            )
        params = {"TransactItems": actions, "ClientRequestToken": token}
        for key in written:
            self._write_cache.drop(self._tables.name(key.collection), key.id)
        await self._transact("TransactWriteItems", params, keys, token=token)
        for key, action in zip(keys, actions, strict=True):
            if "Put" in action:
                item = action["Put"]["Item"]
                version, size = int(item[VERSION]["N"]), int(item[SIZE]["N"])
                receipt = WriteReceipt(version, token, size, CLAIM in item)
                self._write_cache.put(self._tables.name(key.collection), key.id, receipt)

    def _action(self, key: Key, written: Mapping[Key, Entity | None], token: str) -> dict[str, Any]:
        mapping = self._tables.mappings[key.collection]
        observed = self._items_read[key]
        action: dict[str, Any] = {
            "TableName": self._tables.name(key.collection),
            **unchanged(mapping, observed),
            "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
        }
        entity = written.get(key)
        if entity is not None:
            version = cast("int", entity.get(VERSION, 0))
            item = mapping.item(key.id, entity, version, token)
            if observed is not None:
                mapping.keep_encodings(item, observed)
            self._settle_claim(action, item, key, observed)
            return {"Put": {**action, "Item": item}}
        self._require_claim(action, key)
        action["Key"] = {mapping.key: {"S": key.id}}
        return {"Delete" if key in written and observed is not None else "ConditionCheck": action}

    async def check_claim(self) -> None:
        """Read the claim that must be held.

        Raises:
            ClaimLostError: it is not held.
        """
        claim = self._claim
        assert claim is not None, "a session under a claim"
        with public_errors():
            await self._load([claim.key], snapshot=False)
        state, now = claim_in(self._items_read[claim.key], claim.key), claim.clock.now()
        check_held(state, claim.key, claim.token, now)

    def _settle_claim(
        self, action: dict[str, Any], item: Attributes, key: Key, observed: Attributes | None
    ) -> None:
        """The claim of an item that is written."""
        self._require_claim(action, key)
        ends = key in self._deleted or (
            self._claim is not None and self._claim.key == key and self._claim.ends
        )
        if not ends:
            keep_claim(action, item, observed)

    def _require_claim(self, action: dict[str, Any], key: Key) -> None:
        """Let the action of the claimed entity require that the claim is held."""
        claim = self._claim
        if claim is None or claim.key != key:
            return
        now = claim.clock.now()
        also_if(action, lambda names: held_claim(names, claim.token, now, claim.skew))

    async def _transact(
        self,
        operation: str,
        params: Mapping[str, Any],
        keys: Sequence[Key],
        *,
        token: str | None = None,
    ) -> dict[str, Any]:
        """Send an idempotent transaction request, with retries, and return the response.

        Args:
            token: the write token of the items that it writes; None if it only reads.
        """
        retries = self._client.retries()
        conflicts = self._client.retries(min(_CONFLICT_SECONDS, self._client.config.retry_timeout))
        response_lost = False
        while True:
            try:
                return await self._client.call(operation, params)
            except StorageError as exc:
                if response_lost and isinstance(exc, Cancelled) and _was_applied(exc, token):
                    return {}
                response_lost = response_lost or (token is not None and exc.outcome_unknown)
                error = self._error(exc, keys)
                waits = conflicts if isinstance(error, ConcurrencyConflictError) else retries
                if _has_failed_condition(exc) or not await waits.pause_after(error):
                    # Whatever the last error, an earlier attempt may have been applied.
                    is_unknown = token is not None and error.outcome_unknown
                    error.outcome_unknown = response_lost or is_unknown
                    error.retryable = error.retryable and not error.outcome_unknown
                    raise error from (exc.__cause__ if error is exc else exc)

    def _error(self, exc: StorageError, keys: Sequence[Key]) -> StorageError:
        """The error of the store for that of a request."""
        if isinstance(exc, Cancelled):
            return self._cancellation_error(exc, keys)
        if isinstance(exc, TableMissing):
            return UnavailableError(
                f"a table was deleted while the store was open: {exc}. {TABLE_REMEDY}",
                retryable=False,
            )
        return exc

    def _cancellation_error(self, exc: Cancelled, keys: Sequence[Key]) -> StorageError:
        """The error for the cancellation; a failed condition takes precedence over other reasons."""
        found = [
            (key, reason)
            for key, reason in zip(keys, exc.reasons, strict=False)
            if reason.get("Code") not in (None, "None")
        ]
        if not found:
            return UnavailableError("DynamoDB cancelled the transaction without giving a reason")
        failed = [each for each in found if short(each[1]["Code"]) == "ConditionalCheckFailed"]
        key, reason = (failed or found)[0]
        if failed:
            return self._conflict(key, reason.get("Item"), has_entity=True)
        code = short(reason["Code"])
        if code == "TransactionConflict":
            return conflict(key.collection, key.id)
        return translate(code, reason.get("Message") or "", 400, reason)

    def _conflict(
        self, key: Key, now: Attributes | None, *, has_entity: bool = False
    ) -> ConcurrencyConflictError:
        """The error for an entity that was changed after it was read.

        Args:
            now: the stored item.
            has_entity: it is the whole item.
        """
        mapping = self._tables.mappings[key.collection]
        current: Entity | None = None
        if has_entity and now is not None:
            with suppress(CorruptionError):  # the conflict is what counts
                current = mapping.entity(now)
        return ConcurrencyConflictError(
            f"{key.collection} {key.id!r} was changed after this transaction had read it; run the "
            "transaction again",
            collection=key.collection,
            entity_id=key.id,
            expected=_known_version(self._items_read.get(key)),
            actual=_known_version(now),
            current=current,
            retryable=True,
        )


def _state_of(item: Attributes | None) -> tuple[str | None, Attribute | None] | None:
    return None if item is None else (token_of(item), item.get(VERSION))


def _known_version(item: Attributes | None) -> int | None:
    """The version of an item; None if the item is missing or its version is invalid."""
    if item is None:
        return None
    try:
        return version_of(item, "", "")
    except CorruptionError:
        return None


def _was_applied(exc: Cancelled, token: str | None) -> bool:
    """Whether the conditions failed because an earlier attempt of this transaction was applied."""
    items = [each["Item"] for each in exc.reasons if each.get("Item")]
    return any(token_of(each) == token for each in items)


def _has_failed_condition(exc: StorageError) -> bool:
    """Whether a condition failed, so that a retry cannot succeed, instead of a concurrent write."""
    reasons = exc.reasons if isinstance(exc, Cancelled) else ()
    return any(short(each.get("Code") or "") == "ConditionalCheckFailed" for each in reasons)
