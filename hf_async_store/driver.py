"""The driver interface: the base classes of engines, their capabilities, and the decisions they share.

An engine implements `Engine` and `Session`: `fetch`, `select`, `write_each`, `session` and `close`, and
`write` and `savepoint`. Everything else has a default, which an engine overrides where it can do
better. All other code of the package is shared by the engines.

An engine that has the current entity in memory decides with `changed`, `check_parents` and
`check_children`, and keeps the changes of a session in an `Overlay`; `strategies/memory.py` shows
how. A strategy that other packages can install is a subclass of `StorageStrategy`, registered in the
entry-point group `hf_async_store.strategies`.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Final, Literal, TypeAlias, TypeVar

import msgspec

from hf_async_store.changes import Change, Outcome, Record
from hf_async_store.generators import Owned
from hf_async_store.overlay import Overlay
from hf_async_store.preconditions import changed, check_children, check_parents
from hf_async_store.query import Query
from hf_async_store.schema import Collection
from hf_async_store.values import Entity, Key, Value, canonical

__all__ = [
    "Capabilities",
    "Engine",
    "Isolation",
    "Overlay",
    "QueryPlan",
    "Reader",
    "Session",
    "batched",
    "changed",
    "check_children",
    "check_parents",
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
        change_markers: a change may carry a change marker, written in the same commit; they show a
            live migration which entities it still has to copy.
        detects_recreation: after an entity was deleted and created again, a writer that read it
            before the deletion is refused even if the versions are equal.
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
    change_markers: bool = True
    detects_recreation: bool = False
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
    """

    access: Literal["index", "key", "scan"]
    index: str | None = None
    residual: bool = False
    sorted_here: bool = False
    consistent: bool = True
    detail: str = ""


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

        Closing the iterator early releases its resources. `query.fields` is a hint that allows the
        engine to read less; the records may contain more fields.
        """

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

    async def select_json(self, query: Query) -> AsyncGenerator[list[bytes], None]:
        """As `select_batches`, with `values.canonical` applied to each entity."""
        async with Owned(self.select_batches(query)) as batches:
            async for batch in batches:
                yield list(map(canonical, batch))


class Session(Reader):
    """A transaction: all of its writes are committed, or none. Reads see its own writes.

    Its methods are called one at a time; `Transaction` ensures that.
    """

    @abstractmethod
    async def write(self, changes: Sequence[Change]) -> list[Outcome]:
        """Apply in order, up to the first failure, whose error is the last outcome in the list.

        After an error the session (or its innermost savepoint) must be rolled back.
        """

    @abstractmethod
    def savepoint(self) -> AbstractAsyncContextManager[Session]:
        """A nested transaction: leaving the context by an exception rolls back only its changes."""

    async def untracked(self, method: str) -> Session:
        """The session of the engine itself, for a method that only this engine has.

        See `Engine.untracked`.
        """
        del method
        return self


class Engine(Reader):
    """What a storage engine implements: single reads and writes, and sessions.

    There is no network or disk I/O before the first call. Preconditions are checked atomically with
    the write. Any await may be cancelled: a write is then applied completely or not at all, and
    no resource leaks. Errors of drivers are raised as `StorageError`s with the original chained; a
    missing entity is never an error.
    """

    capabilities: Capabilities

    # -- required ----------------------------------------------------------------------------

    @abstractmethod
    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        """Apply independent changes: each succeeds or fails alone. One outcome each, in input order.

        Changes of the same key are applied in input order. A failure that concerns all of them (disk
        full, connection lost) is raised.
        """

    @abstractmethod
    def session(self, isolation: Isolation | None) -> AbstractAsyncContextManager[Session]:
        """A transaction. Leaving the context commits it; leaving by an exception rolls it back.

        A transaction in which no method is called does no I/O.

        Raises:
            ConcurrencyConflictError: by any method or by the commit, retryable: the transaction was
                rolled back because of a concurrent one.
            TransactionTooLargeError: the declared limits were exceeded; nothing was written.
        """

    @abstractmethod
    async def close(self) -> None:
        """Release all resources; no acknowledged write is lost. Called once, after every other call
        has ended; each later call raises StoreClosedError."""

    # -- defaults ----------------------------------------------------------------------------

    def snapshot(self) -> AbstractAsyncContextManager[Reader]:
        """A consistent snapshot that can be read until the context is left, for backups and comparisons.

        It does not block writers, and may cost memory or disk space for what they change meanwhile.
        If `query_isolation` is "eventual", it is not more consistent than queries; then the default,
        the engine itself, is sufficient.
        """
        return nullcontext(self)

    async def fetch_undeclared(self, collection: Collection, entity_id: str) -> Record | None:
        """Like `fetch` of one key, of a collection that need not be declared or exist.

        Nothing is created. It does not wait for a lock that the calling task itself holds.
        """
        return (await self.fetch([Key(collection.name, entity_id)]))[0]

    async def exists(self) -> bool:
        """Whether the store exists: its file, or one of its tables. Nothing is created.

        Reading a store that does not exist is like reading an empty one; its first write creates it.
        """
        return True

    async def is_same_store(self, other: Engine) -> bool:
        """Whether `other` reaches the same data, however the two are addressed. Nothing is created.

        Decided by the identity of the data itself (device and inode, a lock taken through one and
        seen through the other, a table's identifier), never by comparing URLs. A physical copy is
        another store. Engines of different kinds are never the same.

        Raises:
            StorageError: it cannot be determined.
        """
        return other is self

    async def undeclared(self) -> list[str]:
        """The stored collections and fields that are not declared, which queries would therefore miss.

        Sorted; `"jobs"` is a collection, `"machines.owner"` a field. Nothing is created.
        """
        return []

    async def explain(self, query: Query) -> QueryPlan:
        """How `select` would run."""
        del query
        return QueryPlan(access="scan", residual=True, sorted_here=True)

    async def probe(self) -> None:
        """Write, read back and delete a value that is not an entity; raise if that fails.

        The default does nothing: it is for a store that can always be written.
        """

    async def health(self) -> Mapping[str, Value]:
        """The engine's part of `health()`; its `problems` lists the conditions that require action."""
        return {}

    def describe(self) -> Mapping[str, Value]:
        """Where the data is stored and how it is configured, without secrets."""
        return {}

    def untracked(self, method: str, *, writes: bool) -> AbstractAsyncContextManager[Engine]:
        """This engine, for a method of its own that is not part of this interface.

        A wrapper, which would not see what the method reads or writes, overrides this: it yields the
        engine that it wraps, or refuses the method.

        Args:
            method: its name, for errors.
            writes: it may change stored entities.
        """
        del method, writes
        return nullcontext(self)

    async def check_locked(self, method: str) -> None:
        """Like `untracked`, for a caller that already holds the write lock of the engine, and therefore
        must not wait. Returns if the method is allowed."""
        del method


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
