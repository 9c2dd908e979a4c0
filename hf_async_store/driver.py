"""The driver interface: the base classes of engines, their capabilities, and the decisions they share.

An engine implements the abstract methods of `Engine` and `Session`, and declares its `capabilities`.
Everything else has a default, whose docstring states for which engines it is right. All other code of
the package is shared by the engines.

An engine that has the current entity in memory decides with `changed`, `check_parents` and
`check_children`, and keeps the changes of a session in an `Overlay`; `strategies/memory.py` shows
how. An engine that checks conditions elsewhere uses `check`, `patched` and `next_version`; an update for
which `plain_fields` is None contains field operations, and needs the stored entity. If a change has
`lifetimes`, the stored entity and the parents may have expired: `changed` and `Overlay` take that into
account, other engines decide with `present` and `is_there`. A strategy
that other packages can install is a subclass of `StorageStrategy`, registered in the entry-point
group `hf_async_store.strategies`.

This module also exports the types and functions of other modules that an engine needs.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, ClassVar, Final, Literal, TypeAlias, TypeVar

import msgspec

from hf_async_store import claim_records
from hf_async_store.backoff import Backoff
from hf_async_store.changes import (
    ABSENT,
    ANY,
    PRESENT,
    Change,
    ChangedMatches,
    ChangeMarker,
    Delete,
    EncodedPut,
    Outcome,
    Patch,
    Put,
    PutForm,
    Record,
    TakeChanges,
)
from hf_async_store.claim_clock import BootClock, ClaimClock, Moment, WallClock
from hf_async_store.claim_records import Claimed, ClaimInfo, ClaimTerms, claim_key
from hf_async_store.config import Secret, StrategyOptions, options_of
from hf_async_store.declarations import are_equal, decoded, encoded, merged
from hf_async_store.errors import (
    AlreadyExistsError,
    ConcurrencyConflictError,
    EntityNotFoundError,
    InvalidInputError,
    StorageError,
    UnavailableError,
)
from hf_async_store.field_operations import FieldChange, plain_fields
from hf_async_store.generators import Owned
from hf_async_store.interface_version import INTERFACE_VERSION
from hf_async_store.overlay import Overlay
from hf_async_store.passed_over import PassedOver
from hf_async_store.preconditions import (
    changed,
    check,
    check_children,
    check_parents,
    is_there,
    next_version,
    patched,
    present,
)
from hf_async_store.query import Query, compile_filter, ordered
from hf_async_store.schema import (
    CATALOGUE_COLLECTION,
    LOCK_COLLECTION,
    SYSTEM_COLLECTIONS,
    Collection,
    Index,
    Schema,
)
from hf_async_store.values import (
    CREATED_AT,
    UPDATED_AT,
    Entity,
    Key,
    Value,
    canonical,
    copy_entity,
    utc_now,
)

__all__ = [
    "ABSENT",
    "ANY",
    "INTERFACE_VERSION",
    "PRESENT",
    "SYSTEM_COLLECTIONS",
    "BootClock",
    "Capabilities",
    "Change",
    "ChangeMarker",
    "ChangedMatches",
    "ClaimClock",
    "ClaimInfo",
    "ClaimTerms",
    "Claimed",
    "Collection",
    "Delete",
    "EncodedPut",
    "Engine",
    "Entity",
    "FeedBatch",
    "FeedEntry",
    "FieldChange",
    "Isolation",
    "Key",
    "Moment",
    "Outcome",
    "Overlay",
    "Owned",
    "Patch",
    "Put",
    "PutForm",
    "Query",
    "QueryPlan",
    "Reader",
    "Record",
    "Schema",
    "SchemaChange",
    "SchemaProgress",
    "Secret",
    "Session",
    "StrategyOptions",
    "TakeChanges",
    "Value",
    "WallClock",
    "batched",
    "canonical",
    "changed",
    "check",
    "check_children",
    "check_parents",
    "claim_key",
    "compile_filter",
    "copy_entity",
    "giving_back",
    "is_there",
    "next_version",
    "options_of",
    "ordered",
    "patched",
    "plain_fields",
    "present",
    "remember_in",
    "run_to_completion",
]

Isolation: TypeAlias = Literal["serializable", "repeatable_read", "read_committed"]
Result = TypeVar("Result")


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine can do; the contract suite tests both presence and absence.

    Attributes:
        engine: its name, for display; shared code never branches on it.
        durable: an acknowledged write survives the end of the process and a loss of power.
        multi_process: several processes may use one store at once.
        isolations: what `begin_transaction(isolation=...)` takes; the first is the default.
        query_isolation: what a query or stream outside a transaction sees: one "snapshot", or
            "eventual" (it may lag behind writes, and may show part of a transaction).
        queries_in_transaction: how a query inside a transaction relates to it: "serializable"
            (sees its own writes, and what it saw is part of the transaction), "own_writes" (sees
            them, is not part of it) or "outside" (sees neither).
        read_conflict_policy: what happens to a transaction that read an entity by key which another
            transaction changed before this one committed: "conflict", or "ordered", where it may
            commit if the two are serializable in some order.
        savepoints: nested transactions.
        indexes: declared indexes and keys narrow a query; else every query is a scan.
        references: declared references are enforced.
        unique_indexes: unique indexes are enforced. A store of another engine refuses their declaration.
        claims: entities can be claimed (`Engine.claim`): a deletion ends the claim of its entity.
        change_markers: a change may carry a change marker, written in the same commit; they show a
            live migration which entities it still has to copy.
        detects_recreation: after an entity was deleted and created again, a writer that read it
            before the deletion is refused even if the versions are equal.
        removes_expired: it removes the entities of a declaration with `expires` itself, some time after
            they have expired.
        feed: it keeps the changes of collections declared with `feed` (`Engine.read_feed`). A store of
            another engine refuses their declaration.
        feed_order: the feed of a collection is in the order of the commits; else the changes of each
            entity are in the order of its versions, and those of different entities in any order.
        max_feed_retention: the longest `feed` that a collection may declare; None: any.
        default_order: "id" where a query without order_by returns entities sorted by id, else "none".
        conflict_entity: a version conflict carries the stored entity.
        max_transaction_changes, max_transaction_bytes: limits of one transaction; None: limited only
            by memory.
        write_concurrency: the maximum number of coalesced write batches in progress at once.
        write_batch: the maximum number of changes in one of these batches.
        read_batch: the maximum number of reads that share a round trip; 0 where a read is no round
            trip.
        read_concurrency: the maximum number of these round trips in progress at once.
    """

    engine: str
    durable: bool
    multi_process: bool
    isolations: tuple[Isolation, ...] = ("serializable",)
    query_isolation: Literal["snapshot", "eventual"] = "snapshot"
    queries_in_transaction: Literal["serializable", "own_writes", "outside"] = "serializable"
    read_conflict_policy: Literal["conflict", "ordered"] = "conflict"
    savepoints: bool = True
    indexes: bool = True
    references: bool = True
    unique_indexes: bool = False
    claims: bool = False
    change_markers: bool = False
    detects_recreation: bool = False
    removes_expired: bool = False
    feed: bool = False
    feed_order: bool = False
    max_feed_retention: timedelta | None = None
    default_order: Literal["id", "none"] = "id"
    conflict_entity: bool = True
    max_transaction_changes: int | None = None
    max_transaction_bytes: int | None = None
    write_concurrency: int = 1
    write_batch: int = 1024
    read_batch: int = 0
    read_concurrency: int = 1


class QueryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How a query would run, as returned by `explain_query`.

    Attributes:
        access: "index", "key" or "scan" (every entity of the collection is read).
        index: the name of the index used, or None.
        residual: whether the rows read are filtered further, one by one.
        sorted_here: whether the rows are sorted after reading, instead of being read in index order.
        consistent: whether the result is current (strongly consistent), or may lag behind writes.
        detail: what the engine itself reports.
        advice: if the query scans or sorts: the index that would serve it, as a declaration, for example
            `Index("status", "created_at")`. Set by the store, not by engines.
    """

    access: Literal["index", "key", "scan"]
    index: str | None = None
    residual: bool = False
    sorted_here: bool = False
    consistent: bool = True
    detail: str = ""
    advice: str | None = None


class FeedEntry(msgspec.Struct, frozen=True, gc=False):
    """One committed change of one entity, as `Engine.read_feed` returns it.

    Its receiver does not modify the entities.

    Attributes:
        key: the key of the entity.
        before: the entity as it was; None if the change created it.
        after: the entity as it is since then; None if the change deleted it.
        position: where the feed goes on after this change.
    """

    key: Key
    before: Record | None
    after: Record | None
    position: str


class FeedBatch(msgspec.Struct, frozen=True):
    """A part of a change feed.

    Attributes:
        entries: the changes, in the order of the feed.
        position: where the feed goes on after them. If nothing was committed since, it is the position that
            was given, so that readers at the same place have the same position.
        is_end: without entries, nothing was committed after the position that was given. False if there
            may be more, which is found only by further reads.
    """

    entries: list[FeedEntry]
    position: str
    is_end: bool = True


class SchemaChange(msgspec.Struct, frozen=True):
    """One thing that a declaration and its store disagree about, as returned by `schema_changes`.

    Attributes:
        kind: what it is about: of every engine "collection", "key", "field", "index", "values", "form",
            "reference", "required", "unique" or "unique index" (see `schema_changes.py`); others are those
            of an engine.
        collection: the name of the collection.
        name: the name of the field or index; "" if it is about the collection.
        detail: what is missing or differs, and what `apply_schema` does about it, for people.
        blocking: whether writers wait while `apply_schema` does it; of "unique", that the data must be
            corrected before.
    """

    kind: str
    collection: str
    name: str
    detail: str
    blocking: bool = False


SchemaProgress: TypeAlias = Callable[[SchemaChange, int, int | None], None]
"""Called with a change, how much of it is done, and how much there is, if that is known."""


class Reader(ABC):
    """The reads that engines, sessions and snapshots share.

    Required are `fetch` and `select`; override the other methods where the engine can do better.
    """

    @abstractmethod
    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        """The records of `keys`, in their order; None for a missing one. Keys may repeat."""

    @abstractmethod
    def select(self, query: Query) -> AsyncGenerator[Record, None]:
        """The matching records, in the query's order, up to its limit.

        Closing the iterator early, in any task, releases its resources; a generator that reads from
        another one closes it (`Owned`). `query.fields` is a hint that allows the
        engine to read less; the records may contain more fields.
        """

    async def first_page(self, query: Query) -> Query:
        """A query without a cursor as it is read page by page; without an order, `by_id` if by id.

        Cursors remember it, so that later pages are in the same order even if the access path of the
        query changes meanwhile. The default is for an engine whose `default_order` is "id".
        """
        return query if query.order else msgspec.structs.replace(query, by_id=True)

    async def count(self, query: Query) -> int:
        """How many records `select` would return."""
        number = 0
        async with Owned(self.select(query)) as records:
            async for _ in records:
                number += 1
        return number

    def select_batches(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        """As `select`, but yields only the entities, in non-empty batches of any size."""
        return batched(self.select(query))


class Session(Reader):
    """A transaction: all of its writes are committed, or none. Reads see its own writes.

    Its methods are called one at a time, but not always by the task that began it.
    """

    @abstractmethod
    async def write(self, changes: Sequence[Change]) -> list[Outcome]:
        """Apply in order, up to the first failure, whose error is the last outcome in the list.

        Entities and markers are as in `Engine.write_each`.

        After an error the session (or its innermost savepoint) must be rolled back.
        """

    def savepoint(self) -> AbstractAsyncContextManager[Session]:
        """A nested transaction: leaving the context by an exception rolls back only its changes.

        The default is for an engine without the capability `savepoints`.

        Raises:
            InvalidInputError: the engine has no savepoints.
        """
        raise InvalidInputError("this engine has no nested transactions (savepoints)")

    async def passed_over(
        self, query: Query, most_attempts: int | None
    ) -> tuple[PassedOver, list[str]] | None:
        """What claims have passed over, of an engine with tables in memory (`hf_async_store.passed_over`);
        None: it is not remembered."""
        del query, most_attempts
        return None

    async def direct(self, method: str) -> Session:
        """The session of the engine itself, for a method that only this engine has, and that may write.

        See `Engine.direct`.
        """
        del method
        return self


class Engine(Reader):
    """What a storage engine implements: single reads and writes, and sessions.

    There is no network or disk I/O before the first call. Preconditions are checked atomically with
    the write. Any await may be cancelled: a write is then applied completely or not at all, and
    no resource leaks (see `run_to_completion`). Errors of drivers are raised as `StorageError`s with
    the original chained; a missing entity is never an error. Tasks call the methods concurrently.

    Attributes:
        interface_version: required: the number of the version of this interface for which the engine was
            written (`INTERFACE_VERSION`). A store refuses an engine of another version.
        capabilities: required.
        claim_clock: by which the leases of claims end; tests replace it.
    """

    interface_version: ClassVar[int]
    capabilities: Capabilities
    claim_clock: ClaimClock = BootClock()

    # -- required ----------------------------------------------------------------------------

    @abstractmethod
    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        """Apply independent changes: each succeeds or fails alone. One outcome each, in input order.

        Changes of the same key are applied in input order. A failure that concerns all of them (disk
        full, connection lost) is raised. Calls are not limited to `write_concurrency` and
        `write_batch`, which are those of coalesced writes.

        The entities and fields are validated, and contain `updated_at`; `created_at` is added from
        `written_at` or kept (see `changed`). With the capability `change_markers`, the marker of a
        change, if any, is written in the same commit: without it, a live migration loses the change.
        """

    @abstractmethod
    def session(self, isolation: Isolation | None) -> AbstractAsyncContextManager[Session]:
        """A transaction. Leaving the context commits it; leaving by an exception rolls it back.

        Args:
            isolation: one of `capabilities.isolations`; None means the first of them.

        A transaction in which no method is called does no I/O.

        Raises:
            ConcurrencyConflictError: by any method or by the commit, retryable: the transaction was
                rolled back because of a concurrent one.
            TransactionTooLargeError: the declared limits were exceeded; nothing was written.
        """

    def retried_session(self, isolation: Isolation | None) -> AbstractAsyncContextManager[Session]:
        """As `session`, of a transaction that the store runs again after a conflict: it may end in one for
        which there was no need, if others are then faster."""
        return self.session(isolation)

    @abstractmethod
    async def close(self) -> None:
        """Release all resources; no acknowledged write is lost. Called once.

        Sessions, snapshots and reads may still be open: the next call of each, and a commit, then raise
        StoreClosedError, and so does every method of the engine that reaches what is stored. A read that
        has begun, such as a stream, may also end as ever, and a session that wrote nothing without an
        error.
        """

    # -- defaults ----------------------------------------------------------------------------

    async def write_unblocked(self, take: TakeChanges) -> list[Outcome]:
        """As `write_each`, without waiting long for changes whose entity another transaction has locked.

        The outcome of such a change is a `LockTimeoutError`; it had no effect, and neither did later
        ones of its key. The store passes it to `write_each`, and other changes to this method, in the
        meantime.

        The default is for an engine that locks no single entities, and waits for no lock that another
        program may have on the store.

        Args:
            take: returns the changes, always the same ones, perhaps none. Until it is called, a change
                whose caller is cancelled or whose timeout expires is withdrawn; after that, it may be
                applied. So an engine calls it when it need not wait any longer for a lock of the store;
                it may do so in another thread.
        """
        changes = take()
        return await self.write_each(changes) if changes else []

    def write_cancellable(
        self, changes: Sequence[Change]
    ) -> Coroutine[Any, Any, list[Outcome]] | None:
        """As `write_each`, in a task that may be cancelled: then it ends when nothing is written any more.

        By it, the only caller who writes does so in his own task, without two switches to another one. What
        it returns is awaited at once. It returns control to the event loop at least once, even if every
        change is refused. None, the default, which is right for every engine: the store calls
        `write_unblocked` in a task of its own, which is cancelled only if the event loop ends.
        """
        del changes
        return None

    async def select_at_once(self, query: Query) -> list[Entity] | None:
        """All that `select_batches` yields, if few entities match, and they can be read in one step.

        None, the default: the caller must use `select_batches`.
        """
        del query
        return None

    async def change_matches(self, query: Query, change: Change) -> ChangedMatches | None:
        """Change the entities that match a query with a limit, in one atomic step.

        None, the default, which is right for every engine: nothing was done, for whatever reason, and the
        store reads the entities and changes each of them.

        Args:
            change: what is done with each entity, if it still has the version that was read. Of its key,
                only the collection counts, and its `expect` does not.
        """
        del query, change
        return None

    def shares_changes(self, key: Key) -> bool:
        """Whether several changes of an entity may be written as one, with the version of the last.

        It is asked for `modify_entity`, when several tasks wait for the same entity. False is the default.
        The answer may have changed before the `Put` that is `shared` is written: it must then be refused by
        a conflict.
        """
        del key
        return False

    def takes_encoded(self, collection: str) -> bool:
        """Whether `write_each` stores the entities of a collection as JSON, by the `text` of `EncodedPut`s.

        If so, the batch methods of the store pass these where they can. False is the default: for an engine
        that needs the values, they would be decoded again.
        """
        del collection
        return False

    def snapshot(self) -> AbstractAsyncContextManager[Reader]:
        """A consistent snapshot that can be read until the context is left, for backups and comparisons.

        It does not block writers, and may cost memory or disk space for what they change meanwhile.
        It contains the collections of the schema; others need not be in it. If `query_isolation` is
        "eventual", it is not more consistent than queries; the default, the engine itself, is for such
        engines alone.
        """
        if self.capabilities.query_isolation != "eventual":
            raise NotImplementedError("an engine with query_isolation 'snapshot' needs `snapshot`")
        return nullcontext(self)

    async def fetch_undeclared(self, collection: Collection, entity_id: str) -> Record | None:
        """Like `fetch` of one key, of a collection that need not be declared or exist.

        Nothing is created. It does not wait for a lock that the calling task itself holds. By this, a
        store that takes part in live migrations detects one, every two seconds. The default is for
        an engine whose `fetch` needs no declaration.
        """
        return (await self.fetch([Key(collection.name, entity_id)]))[0]

    async def exists(self) -> bool:
        """Whether the store exists: its file, or one of its tables. Nothing is created.

        Reading a store that does not exist is like reading an empty one; its first write creates it.
        The default is for an engine whose stores always exist, like one in memory: else a migration
        would take a mistyped name for an empty store.
        """
        return True

    async def is_same_store(self, other: Engine) -> bool:
        """Whether `other` reaches the same data, however the two are addressed. Nothing is created.

        Decided by the identity of the data itself (device and inode, a lock taken through one and
        seen through the other, a table's identifier), never by comparing URLs. A physical copy is
        another store. Engines of different kinds are never the same; `other` may be of any class. The
        default is for an engine without the capability `multi_process`.

        Raises:
            StorageError: it cannot be determined.
        """
        if self.capabilities.multi_process:
            raise NotImplementedError(
                "an engine with the capability 'multi_process' needs `is_same_store`"
            )
        return other is self

    async def undeclared(self) -> list[str]:
        """The stored collections and fields that are not declared, which queries would therefore miss.

        Sorted; `"jobs"` is a collection, `"machines.owner"` a field, of an engine whose queries miss
        undeclared fields. Those of `SYSTEM_COLLECTIONS` are left out. Nothing is created. The default is
        for an engine without the capabilities `durable` and `multi_process`.
        """
        return []

    async def declarations(self) -> list[Collection]:
        """The declarations that `remember` has recorded. Nothing is created.

        Raises:
            CorruptionError: what is recorded is invalid.
            NewerFormatError: a newer version of this package has recorded it.
        """
        return _declared_in(await self._catalogue_record())

    async def remember(self, collections: Iterable[Collection]) -> None:
        """Record these declarations, merged with the recorded ones (`declarations.merged`), atomically.

        Called with the schema of the engine, after the first write of a store, and outside of
        transactions. The default reads, and
        if something is new writes, one entity of a collection of its own, `hf_catalogue`. It is for
        an engine that can store entities of any collection that its schema (`schema_of`) can look
        up. An engine that cannot calls `remember_in` with an engine whose only collection is that one.
        """
        await remember_in(self, collections)

    async def _catalogue_record(self) -> Record | None:
        return await self.fetch_undeclared(CATALOGUE_COLLECTION, _CATALOGUE_KEY.id)

    # -- claims ------------------------------------------------------------------------------
    #
    # The defaults keep a claim as an entity of the collection `hf_claims`, and decide in a session. They
    # are for an engine whose sessions are serializable for reads by key, that can store entities of any
    # collection that its schema (`schema_of`) can look up, and that deletes `claim_key` of an entity
    # together with the entity (`Overlay` does). They try again after a conflict of their session; one of
    # `claimed_session` comes out, because its body cannot be repeated. All processes must read the same
    # `claim_clock`. The default, `BootClock`, is that of one machine: a store that several machines share
    # needs the time of its server, or `WallClock`; moments of another `era` are never compared, and claims
    # of it have ended.

    async def claim(self, query: Query, terms: ClaimTerms) -> list[Claimed]:
        """Claim the first entities that match and that nobody holds, up to the limit of the query, in
        its order. In one atomic step, which changes neither the entities nor their versions.

        If it fails or is cancelled, nothing stays claimed: see `giving_back`."""
        async with giving_back(self) as claimed:

            async def take(session: Session) -> None:
                claimed[:] = await claim_records.take(session, query, terms, self.claim_clock)

            await self._decided(take)
            return claimed

    async def claim_name(self, keys: Sequence[Key], terms: ClaimTerms) -> Claimed | None:
        """Claim the first of some keys that nobody holds; None if all are held. There is no entity with
        these keys, and their collection is not declared."""
        async with giving_back(self) as claimed:

            async def take(session: Session) -> None:
                found = await claim_records.take_name(session, keys, terms, self.claim_clock)
                claimed[:] = [] if found is None else [found]

            await self._decided(take)
            return claimed[0] if claimed else None

    async def renew_claim(self, key: Key, token: int, lease: float) -> None:
        """Let a claim end `lease` seconds from now.

        Raises:
            ClaimLostError: it is not held with this token any more.
        """
        await self._decided(lambda s: claim_records.renew(s, key, token, lease, self.claim_clock))

    async def release_claim(self, key: Key, token: int, after: float | None) -> None:
        """End a claim.

        Args:
            after: when the entity can be claimed again, in seconds from now. None: at once, and how often
                it was claimed is forgotten.

        Raises:
            ClaimLostError: it is not held with this token any more.
        """
        await self._decided(lambda s: claim_records.release(s, key, token, after, self.claim_clock))

    def claimed_session(
        self, key: Key, token: int, *, ends: bool = False
    ) -> AbstractAsyncContextManager[Session]:
        """A session that commits only if a claim is held with this token, atomically with the commit.

        It may do I/O, and raise, when the context is entered.

        Args:
            ends: the commit ends the claim, and forgets how often the entity was claimed.

        Raises:
            ClaimLostError: it is not held with this token any more.
        """
        return self._claimed_session(key, token, ends=ends)

    @asynccontextmanager
    async def _claimed_session(
        self, key: Key, token: int, *, ends: bool
    ) -> AsyncGenerator[Session, None]:
        async with self.session(None) as session:
            await claim_records.check(session, key, token, self.claim_clock)
            yield session
            if ends:
                await claim_records.end(session, key)

    async def write_claimed(self, token: int, change: Change, *, ends: bool) -> int:
        """Change an entity if the claim of it is held with this token, in one commit.

        Returns the version, as `Session.write`.

        Args:
            ends: as in `claimed_session`.

        Raises:
            ClaimLostError: the claim is not held with this token any more, or the entity has expired.
            StorageError: the change is refused.
        """
        async with self.claimed_session(change.key, token, ends=ends) as session:
            [outcome] = await session.write([change])
            return written(change.key, outcome)

    async def break_claim(self, key: Key) -> bool:
        """End a claim whoever holds it, and forget how often the entity was claimed; returns whether
        there was anything to forget."""
        return await self._decided(lambda session: claim_records.end(session, key))

    async def claims(self, collection: str) -> list[ClaimInfo]:
        """The claims of a collection, by id. Nothing is created."""
        return await self._decided(
            lambda session: claim_records.listed(session, collection, self.claim_clock)
        )

    async def _decided(self, decide: Callable[[Session], Awaitable[Result]]) -> Result:
        """The result of `decide` in a session of its own, again after each conflict with another one.

        Raises:
            ConcurrencyConflictError: there were conflicts for too long.
        """
        backoff = Backoff(_CONFLICT_SECONDS, first=0.01, longest=0.5)
        while True:
            try:
                async with self.session(None) as session:
                    return await decide(session)
            except ConcurrencyConflictError as exc:
                if exc.outcome_unknown or not exc.retryable or not await backoff.pause():
                    raise

    # -- feed ----------------------------------------------------------------------------------
    #
    # Only with the capability `feed`. The feed of a collection contains every commit that changed one of
    # its entities since the store recorded a declaration with `feed` (`remember`), by whichever program
    # and verb, imports, expiry and migrations included, for at least the time of the retention. A position
    # is a text that only the engine understands; it is valid in every process, and in no other store.

    async def feed_position(self, collection: str) -> str:
        """The end of the feed: from there, `read_feed` returns what is committed after this call.

        Raises:
            SchemaMismatchError: the store does not record the changes of this collection yet; the message
                tells what to do.
        """
        raise self._no_feed()

    async def read_feed(self, collection: str, since: str, limit: int) -> FeedBatch:
        """What was committed after a position. Returns at once, also when there is nothing.

        Nothing that is committed later is ever put before the returned position.

        Args:
            since: a position of this collection.
            limit: return about this many changes at most. All changes of one entity in one commit are one.

        Raises:
            FeedExpiredError: not all of it is kept any more.
            InvalidCursorError: it is not a position of this feed: malformed, or of another store or
                collection.
            SchemaMismatchError: as for `feed_position`.
        """
        raise self._no_feed()

    async def feed_changed(self, positions: Mapping[str, str], seconds: float) -> None:
        """Wait until the feed of a collection may go on after its position, at most `seconds`.

        It may return early; it is only a hint for when to call `read_feed`. Changes of other processes end
        the wait as well, as soon as the engine can notice them. One call is made at a time, for all
        watchers of a store. After each, all feeds are read before they are waited for again, so it need
        not end because of changes that were committed before an earlier call has ended.
        """
        raise self._no_feed()

    def _no_feed(self) -> InvalidInputError:
        return InvalidInputError(f"the engine {self.capabilities.engine} has no change feed")

    # -- schema and health -------------------------------------------------------------------

    async def schema_changes(self) -> list[SchemaChange]:
        """What the store lacks for its declaration, in terms of this engine: tables, columns, indexes.

        Nothing is changed. What every engine has in common, such as stored values that do not fit a
        type, is added by the store. The default is for an engine that needs nothing but the entities.
        """
        return []

    async def apply_schema(
        self, *, progress: SchemaProgress | None = None, complete: bool = False
    ) -> None:
        """Make the changes that `schema_changes` returns, while other programs read and write.

        It can be interrupted at any await, run again, and run by several processes at once.

        Args:
            progress: called for each change as it proceeds.
            complete: whether all programs with an older declaration have ended.
        """
        del progress, complete

    async def unenforced(self) -> list[tuple[str, Index]]:
        """The declared unique indexes that are not enforced, each with its collection.

        Those are indexes that were declared when the collection had entities already. `apply_schema`
        lets the store enforce them, or raises SchemaMismatchError if two entities have the same values.
        The default is for an engine whose stores are empty when they are opened, or without the
        capability `unique_indexes`.
        """
        return []

    async def explain(self, query: Query) -> QueryPlan:
        """How `select` would run."""
        del query
        return QueryPlan(access="scan", residual=True, sorted_here=True)

    async def probe(self) -> None:
        """Write, read back and delete a value that is not an entity; raise if that fails.

        The default does nothing: it is for an engine without the capability `durable`.

        Raises:
            StoreClosedError: the engine was closed.
        """
        if self.capabilities.durable:
            raise NotImplementedError("an engine with the capability 'durable' needs `probe`")

    async def health(self) -> Mapping[str, Value]:
        """The engine's part of `health()`, with keys of its own choice.

        `problems` is a list of texts, one for each condition that requires action, which `health()` adds to
        its own. What `probe` raises is one already, so it does not belong in this list.
        """
        return {}

    def describe(self) -> Mapping[str, Value]:
        """Where the data is stored and how it is configured, without secrets.

        Every key is optional. Messages name the store by `folder` and `files`, or by those that there are
        of `path`, `server`, `database`, `schema`, `region`, `endpoint_url` and `table_prefix`; the store
        of a third-party strategy that was opened by a URL, by its location. The progress file of a
        migration belongs to stores with the same description, apart from `configuration`, the settings.
        """
        return {}

    def direct(self, method: str, *, writes: bool) -> AbstractAsyncContextManager[Engine]:
        """This engine, for a method of a strategy that is not part of this interface.

        The strategy runs each such method in this context. During a live migration, the engine that
        wraps this one refuses it, because it would not see what the method reads or writes.

        Args:
            method: its name, for errors.
            writes: it may change stored entities.

        Raises:
            StoreRelocatedError: refused.
        """
        del method, writes
        return nullcontext(self)

    async def check_direct(self, method: str) -> None:
        """As `direct`, for a method that already holds the write lock of the engine, and so must not wait.

        Raises:
            StoreRelocatedError: refused.
        """
        del method

    def abandon(self) -> None:
        """See `StorageStrategy.abandon`. The default is for an engine whose finalizers do not warn.

        The finalizer of `asyncio.StreamWriter` does: an engine on streams of asyncio closes them here,
        without waiting.
        """


_CATALOGUE_KEY: Final = Key(CATALOGUE_COLLECTION.name, "declarations")
_MAX_TRIES: Final = 10
_CONFLICT_SECONDS: Final = 30.0
"""How long the defaults for claims are tried again while their sessions are in conflict with others."""


async def remember_in(engine: Engine, collections: Iterable[Collection]) -> None:
    """Record declarations in the collection `hf_catalogue` of an engine; see `Engine.remember`."""
    declared = list(collections)
    for _ in range(_MAX_TRIES):
        record = await engine._catalogue_record()
        recorded = _declared_in(record)
        wanted = merged(recorded, declared)
        if record is not None and are_equal(wanted, recorded):
            return
        now = utc_now()
        entity = {CATALOGUE_COLLECTION.key: _CATALOGUE_KEY.id, CREATED_AT: now, UPDATED_AT: now}
        expect = ABSENT if record is None else record.version
        [outcome] = await engine.write_each(
            [Put(_CATALOGUE_KEY, {**entity, **encoded(wanted)}, now, expect)]
        )
        if not isinstance(outcome, StorageError):
            return
        if not isinstance(outcome, AlreadyExistsError | ConcurrencyConflictError):
            raise outcome
    raise UnavailableError("other programs record their declarations in the store at the same time")


def _declared_in(record: Record | None) -> list[Collection]:
    where = f"the entity {_CATALOGUE_KEY.id!r} of {_CATALOGUE_KEY.collection}"
    return [] if record is None else decoded(record.entity, where)


_BATCH_SIZE: Final = 512


async def batched(records: AsyncGenerator[Record, None]) -> AsyncGenerator[list[Entity], None]:
    """The entities of records, in batches."""
    batch: list[Entity] = []
    async with Owned(records) as owned:
        async for record in owned:
            batch.append(record.entity)
            if len(batch) == _BATCH_SIZE:
                yield batch
                batch = []
    if batch:
        yield batch


@asynccontextmanager
async def giving_back(engine: Engine) -> AsyncGenerator[list[Claimed], None]:
    """A list for what a block claims, which is released again if the block fails or is cancelled.

    Without it, a caller that is cancelled while its claim is committed would hold, until the lease ends,
    what it has never heard of.
    """
    claimed: list[Claimed] = []
    try:
        yield claimed
    except BaseException:
        if claimed:
            await run_to_completion(_give_back(engine, claimed))
        raise


def written(key: Key, outcome: Outcome) -> int:
    """The version that a change under a claim wrote.

    Raises:
        ClaimLostError: there is no entity.
        StorageError: the change was refused.
    """
    if outcome is None or isinstance(outcome, EntityNotFoundError):
        raise claim_records.absent(key) from outcome
    if isinstance(outcome, StorageError):
        raise outcome
    return outcome


async def _give_back(engine: Engine, claimed: Sequence[Claimed]) -> None:
    for each in claimed:
        key = each.record.key
        after = None if key.collection == LOCK_COLLECTION.name else 0.0
        with suppress(StorageError):  # if it was not committed, it is not held
            await engine.release_claim(key, each.token, after)


async def end_task(task: asyncio.Task[None] | None) -> None:
    """Cancel a task, if there is one, and wait until it has ended, also if the caller is cancelled."""
    if task is not None:
        task.cancel()
        await run_to_completion(asyncio.wait([task]))


async def run_to_completion(work: Awaitable[Result]) -> Result:
    """Await `work` until it is done even if the caller is cancelled; then raise the cancellation.

    With `asyncio.shield` alone, the work would continue after the caller has released its locks;
    the shielded scope of anyio does not protect from a native `Task.cancel()`.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as exc:
            if task.cancelled():
                raise
            cancelled = exc
        except BaseException:
            if cancelled is None:
                raise
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # marks it as retrieved, so that the event loop does not log it
        raise cancelled
    return task.result()
