"""Named subscriptions to a change feed: a consumer's position is kept in the store.

It is a record of the collection `hf_subscriptions`, which no method shows. A consumer moves it in the
transaction in which it writes what follows from a change, so each change is applied exactly once, whatever
is killed, and even if two consumers use one name: the commit of the second one is refused.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from hashlib import blake2b
from typing import Annotated, Final, TypeVar, cast

import msgspec

from hf_async_store.changes import ABSENT, Precondition, Put, Record
from hf_async_store.errors import (
    AlreadyExistsError,
    ConcurrencyConflictError,
    CorruptionError,
    InvalidInputError,
    StorageError,
    SubscriptionAdvancedError,
)
from hf_async_store.feed import Changes, EntityChange, position_in
from hf_async_store.feed_reading import SharedFeed
from hf_async_store.query import Filter, Query, fingerprint
from hf_async_store.repository import RepositoryInterface
from hf_async_store.schema import SUBSCRIPTION_COLLECTION
from hf_async_store.values import CREATED_AT, UPDATED_AT, VERSION, Entity, Key, utc_now

Struct = TypeVar("Struct", bound=msgspec.Struct)

SUBSCRIPTIONS: Final = SUBSCRIPTION_COLLECTION.name


class SubscriptionInfo(msgspec.Struct, frozen=True, rename={"advanced_at": UPDATED_AT}):
    """A named subscription.

    Attributes:
        collection: that is watched.
        token: of the change up to which it was advanced.
        advanced_at: when that was.
    """

    name: str
    collection: str
    token: str
    advanced_at: str


class _Kept(msgspec.Struct, frozen=True):
    """The record of a subscription.

    Attributes:
        filter: a digest of the filter.
        consumer: who has advanced it last.
    """

    collection: str
    filter: str
    token: str
    consumer: str
    version: Annotated[int, msgspec.Meta(ge=0)] = 0

    def put(self, name: str, expect: Precondition) -> Put:
        """The change that stores this."""
        now = utc_now()
        entity = cast("Entity", msgspec.to_builtins(self))
        del entity[VERSION]
        entity |= {SUBSCRIPTION_COLLECTION.key: name, CREATED_AT: now, UPDATED_AT: now}
        return Put(Key(SUBSCRIPTIONS, name), entity, now, expect)


def _converted(record: Record, kind: type[Struct]) -> Struct:
    try:
        return msgspec.convert(record.entity, kind)
    except (msgspec.ValidationError, UnicodeEncodeError) as exc:
        raise CorruptionError(
            f"the record {record.key.id!r} of {SUBSCRIPTIONS} is not a valid subscription: {exc}"
        ) from exc


async def listed(repository: RepositoryInterface) -> list[SubscriptionInfo]:
    """The subscriptions of a store, by name."""
    records = [each async for each in repository._select(Query(SUBSCRIPTIONS))]
    found = [_converted(each, SubscriptionInfo) for each in records]
    return sorted(found, key=lambda each: each.name)


async def kept(
    store: RepositoryInterface,
    name: str,
    collection: str,
    where: Filter,
    now: Callable[[], Awaitable[str]],
) -> _Kept:
    """The record of a subscription; a new one begins at the token that `now` returns.

    Raises:
        InvalidInputError: it is a subscription to another collection, or with another filter.
    """
    digest = blake2b(fingerprint(where), digest_size=16).hexdigest()
    key = Key(SUBSCRIPTIONS, name)
    while (record := (await store._fetch([key], None))[0]) is None:
        new = _Kept(collection, digest, await now(), secrets.token_hex(8))
        [outcome] = await store._write([new.put(name, ABSENT)], None)
        if isinstance(outcome, StorageError) and not isinstance(outcome, AlreadyExistsError):
            raise outcome
    found = _converted(record, _Kept)
    if found.collection != collection:
        raise InvalidInputError(f"{name!r} is a subscription to {found.collection}")
    if found.filter != digest:
        raise InvalidInputError(f"{name!r} is a subscription to {collection} with another filter")
    return found


class Subscription(Changes):
    """The changes after the position of a named subscription: see `StorageStrategy.subscribe`."""

    def __init__(
        self,
        store: RepositoryInterface,
        name: str,
        kept: _Kept,
        feed: SharedFeed,
        where: Filter,
        check: Callable[[], object],
    ) -> None:
        super().__init__(feed, position_in(kept.token, kept.collection), where, check)
        self.name: Final = name
        self._store = store
        self._kept = kept
        self._consumer = secrets.token_hex(8)

    async def advance(self, change: EntityChange, tx: RepositoryInterface | None = None) -> None:
        """Move the subscription past a change, and past all before it.

        To be called in the order of the changes: an earlier one moves it back.

        Args:
            tx: a transaction of this store: the subscription is moved by its commit, together with what the
                consumer writes in it.

        Raises:
            SubscriptionAdvancedError: another consumer has advanced it, or this one, to this change. A
                transaction is then rolled back: what it would have written is written already.
            EntityNotFoundError: the subscription was dropped.
        """
        if not isinstance(change, EntityChange):
            raise InvalidInputError(f"change must be a change, not {type(change).__name__}")
        position_in(change.token, self.collection)
        repository = self._store if tx is None else tx
        [record] = await repository._fetch([Key(SUBSCRIPTIONS, self.name)], None)
        moved = msgspec.structs.replace(self._kept, token=change.token, consumer=self._consumer)
        # Refused by the write and not here, so that it aborts the transaction.
        put = moved.put(self.name, self._expected(record, change))
        try:
            [outcome] = await repository._write([put], None)
            if isinstance(outcome, StorageError):
                raise outcome
        except ConcurrencyConflictError as exc:
            if exc.retryable:
                raise
            raise SubscriptionAdvancedError(
                f"the subscription {self.name!r} was advanced past this change, by this consumer or "
                "by another one"
            ) from exc

    def _expected(self, record: Record | None, change: EntityChange) -> int:
        """The version that the record of this subscription must have."""
        if record is None:
            return self._kept.version
        stored = _converted(record, _Kept)
        is_as_read = stored == self._kept
        is_own = stored.consumer == self._consumer and stored.token != change.token
        return stored.version if is_as_read or is_own else stored.version + 1
