"""The driver interface, which each engine implements. All other code is shared by the engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Final, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

import msgspec

from hf_async_store.changes import Change, Outcome, Record
from hf_async_store.generators import Owned
from hf_async_store.query import Query
from hf_async_store.schema import Collection
from hf_async_store.values import Entity, Key, Value, canonical

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


class Reader(Protocol):
    """The reads that engines, sessions and snapshots share."""

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        """The records of `keys`, in their order; None for a missing one. Keys may repeat."""
        ...

    def select(self, query: Query) -> AsyncGenerator[Record, None]:
        """The matching records, in the query's order, up to its limit.

        Closing the iterator early releases its resources. `query.fields` is a hint that allows the
        engine to read less; the records may contain more fields.
        """
        ...

    async def count(self, query: Query) -> int:
        """How many records `select` would return."""
        ...


@runtime_checkable
class SupportsBatches(Protocol):
    """A reader that returns entities in batches, which costs less than one by one.

    Optional: where each batch is a round trip anyway, nothing is gained.
    """

    def iter_batches(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        """Like `select`, but yields only the entities, in non-empty batches of any size."""
        ...


@runtime_checkable
class SupportsCanonicalJSON(Protocol):
    """A reader that produces the canonical JSON of entities at less cost than the entities."""

    def iter_json(self, query: Query) -> AsyncGenerator[list[bytes], None]:
        """Like `SupportsBatches.iter_batches`, with `values.canonical` applied to each entity."""
        ...


class Session(Reader, Protocol):
    """A transaction: all of its writes are committed, or none. Reads see its own writes.

    Its methods are called one at a time; `Transaction` ensures that.
    """

    async def write(self, changes: Sequence[Change]) -> list[Outcome]:
        """Apply in order, up to the first failure, whose error is the last outcome in the list.

        After an error the session (or its innermost savepoint) must be rolled back.
        """
        ...

    def savepoint(self) -> AbstractAsyncContextManager[Session]:
        """A nested transaction: leaving the context by an exception rolls back only its changes."""
        ...


class Engine(Reader, Protocol):
    """What a storage engine implements: single reads and writes, and sessions.

    There is no network or disk I/O before the first call. Preconditions are checked atomically with
    the write. Any await may be cancelled: a write is then applied completely or not at all, and
    no resource leaks. Errors of drivers are raised as `StorageError`s with the original chained; a
    missing entity is never an error.
    """

    @property
    def capabilities(self) -> Capabilities: ...

    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        """Apply independent changes: each succeeds or fails alone. One outcome each, in input order.

        Changes of the same key are applied in input order. A failure that concerns all of them (disk
        full, connection lost) is raised.
        """
        ...

    def session(self, isolation: Isolation | None) -> AbstractAsyncContextManager[Session]:
        """A transaction. Leaving the context commits it; leaving by an exception rolls it back.

        A transaction in which no method is called does no I/O.

        Raises:
            ConcurrencyConflictError: by any method or by the commit, retryable: the transaction was
                rolled back because of a concurrent one.
            TransactionTooLargeError: the declared limits were exceeded; nothing was written.
        """
        ...

    def snapshot(self) -> AbstractAsyncContextManager[Reader]:
        """A consistent snapshot that can be read until the context is left, for backups and comparisons.

        It does not block writers. If `query_isolation` is "eventual", it is not more consistent than
        queries.
        """
        ...

    async def fetch_undeclared(self, collection: Collection, entity_id: str) -> Record | None:
        """Like `fetch` of one key, of a collection that need not be declared or exist.

        Nothing is created. A store detects by this that a live migration is running.
        """
        ...

    async def exists(self) -> bool:
        """Whether the store exists: its file, or one of its tables. Nothing is created.

        Reading a store that does not exist is like reading an empty one; its first write creates it.
        """
        ...

    async def is_same_store(self, other: Engine) -> bool:
        """Whether `other` reaches the same data, however the two are addressed. Nothing is created.

        Decided by the identity of the data itself (device and inode, a lock taken through one and
        seen through the other, a table's identifier), never by comparing URLs. A physical copy is
        another store. Engines of different kinds are never the same.

        Raises:
            StorageError: it cannot be determined.
        """
        ...

    async def undeclared(self) -> list[str]:
        """The stored collections and fields that are not declared, which queries would therefore miss.

        Sorted; `"jobs"` is a collection, `"machines.owner"` a field. Nothing is created.
        """
        ...

    async def explain(self, query: Query) -> QueryPlan:
        """How `select` would run."""
        ...

    async def probe(self) -> None:
        """Write, read back and delete a value that is not an entity; raise if that fails."""
        ...

    async def health(self) -> Mapping[str, Value]:
        """The engine's part of `health()`; its `problems` lists the conditions that require action."""
        ...

    def describe(self) -> Mapping[str, Value]:
        """Where the data is stored and how it is configured, without secrets."""
        ...

    async def close(self) -> None:
        """Release all resources; no acknowledged write is lost. Called once."""
        ...


_BATCH_SIZE: Final = 512


async def iter_batches(reader: Reader, query: Query) -> AsyncGenerator[list[Entity], None]:
    """The entities that match a query, in batches; works with every reader."""
    if isinstance(reader, SupportsBatches):
        async with Owned(reader.iter_batches(query)) as batches:
            async for each in batches:
                yield each
        return
    async with Owned(batched(reader.select(query))) as batches:
        async for each in batches:
            yield each


async def iter_json(reader: Reader, query: Query) -> AsyncGenerator[list[bytes], None]:
    """The canonical JSON of the entities that match a query, in batches; works with every reader."""
    if isinstance(reader, SupportsCanonicalJSON):
        async with Owned(reader.iter_json(query)) as batches:
            async for each in batches:
                yield each
        return
    async with Owned(iter_batches(reader, query)) as entities:
        async for batch in entities:
            yield list(map(canonical, batch))


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
