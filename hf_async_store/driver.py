"""The seam: what an engine implements. Everything else is written once above it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Final, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

import msgspec

from hf_async_store.changes import Change, Outcome, Record
from hf_async_store.query import Query
from hf_async_store.schema import Collection
from hf_async_store.values import Entity, Key, Value, canonical

Isolation: TypeAlias = Literal["serializable", "repeatable_read", "read_committed"]
Result = TypeVar("Result")


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine can do; the contract suite tests both presence and absence.

    Attributes:
        engine: its name, for people; shared code never asks it.
        durable: an acknowledged write outlives the process and a loss of power.
        processes: several processes may use one store at once.
        isolations: what `begin_transaction(isolation=...)` takes; the first is the default.
        query_isolation: what a query or stream outside a transaction sees: one "snapshot", or
            "eventual" (it may be behind, and may show half a transaction).
        queries_in_transaction: how a query inside a transaction relates to it: "serializable"
            (sees its own writes, and what it saw is part of the transaction), "own_writes" (sees
            them, is not part of it) or "outside" (sees neither).
        read_conflict_policy: what becomes of a transaction that read by key what another has changed
            before its commit: "conflict", or "ordered", where it may commit as long as some order
            of the two explains what both saw and wrote.
        savepoints: nested transactions.
        indexes: declared indexes and keys narrow a query; else every query is a scan.
        references: declared references are enforced.
        marks: a change may carry a mark.
        lives: a stale writer of an earlier life of an id is refused even if versions agree.
        default_order: "id" where a query without order_by comes by id, else "none".
        conflict_entity: a version conflict carries the stored entity.
        max_transaction_changes, max_transaction_bytes: limits of one transaction; None: memory.
        write_concurrency: how many coalesced batches of writes may be under way at once.
        write_batch: how many waiting changes one batch takes.
        read_batch: how many waiting reads share a round trip; 0 where a read is no round trip.
        read_concurrency: how many of those round trips may be under way at once.
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
    """How a query would run, as `explain_query` tells it.

    Attributes:
        access: "index", "key" or "scan" (every entity of the collection is looked at).
        index: the name of the index used, or None.
        residual: whether rows that the access brings are still filtered one by one.
        sorted_here: whether the order is made by sorting, not read off an index.
        consistent: whether the answer is current, or may be behind.
        detail: the engine's own words.
    """

    access: Literal["index", "key", "scan"]
    index: str | None = None
    residual: bool = False
    sorted_here: bool = False
    consistent: bool = True
    detail: str = ""


class Reader(Protocol):
    """What engines and sessions have in common."""

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        """The records of `keys`, in their order; None for what is not there. Keys may repeat."""
        ...

    def select(self, query: Query) -> AsyncGenerator[Record, None]:
        """The records that match, in the query's order, at most its limit.

        Closing the iterator early releases what it holds. `query.fields` is a hint to read less;
        the records may hold more fields.
        """
        ...

    async def count(self, query: Query) -> int:
        """How many records `select` would give."""
        ...


@runtime_checkable
class SupportsBatches(Protocol):
    """A reader that can give many entities at once, which costs less than one by one.

    Not every engine needs it: where each piece is a round trip, it is no gain.
    """

    def iter_batches(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        """As `select`, the entities of the records in pieces of whatever size; none is empty."""
        ...


@runtime_checkable
class SupportsCanonicalJSON(Protocol):
    """A reader that makes the canonical texts of entities with less work than the entities."""

    def iter_json(self, query: Query) -> AsyncGenerator[list[bytes], None]:
        """As `SupportsBatches.pieces`, `entities.canonical` of each."""
        ...


class Session(Reader, Protocol):
    """Everything written in it lands, or nothing does. Reads see its writes.

    One verb at a time; the transaction above sees to that.
    """

    async def write(self, changes: Sequence[Change]) -> list[Outcome]:
        """Apply in order, up to the first that fails; its error is the last outcome of the list.

        After an error the session (or its innermost savepoint) must be rolled back.
        """
        ...

    def savepoint(self) -> AbstractAsyncContextManager[Session]:
        """A part that can be rolled back alone: leaving it by an exception undoes it."""
        ...


class Engine(Reader, Protocol):
    """What a strategy implements: independent work, and a session.

    No verb touches network or disk before the first use. Conditions are decided in the same step
    as the write. Any await may be cancelled: the store is then all-or-nothing and nothing leaks.
    Foreign errors come out as `StorageError`s, chained; absence never does.
    """

    @property
    def capabilities(self) -> Capabilities: ...

    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        """Independent changes: each lands or fails alone. One outcome each, in input order.

        A key that comes twice is applied in input order. A failure of the whole (disk full, link
        lost) is raised.
        """
        ...

    def session(self, isolation: Isolation | None) -> AbstractAsyncContextManager[Session]:
        """A transaction. Leaving the context commits it; leaving by an exception rolls it back.

        Without a verb in it, no I/O happens.

        Raises:
            ConcurrencyConflictError: at a verb or at the end, retryable, when it lost a race.
            TransactionTooLargeError: beyond the declared limits; nothing was written.
        """
        ...

    def snapshot(self) -> AbstractAsyncContextManager[Reader]:
        """Reads of one moment for as long as it is open, for backups and comparisons.

        It holds up no writer. Where `query_isolation` is "eventual" it shows what queries show.
        """
        ...

    async def fetch_undeclared(self, collection: Collection, entity_id: str) -> Record | None:
        """An entity of a collection that need not be declared, nor be there: nothing is made.

        As current as `fetch`. By this a store finds out that it is being moved.
        """
        ...

    async def exists(self) -> bool:
        """Whether the store is there: its file, or one of its tables. Nothing is made.

        A store that is absent answers every read as an empty one, and is made by its first write.
        """
        ...

    async def is_same_store(self, other: Engine) -> bool:
        """Whether `other` reaches the same data, whatever either is called by. Nothing is made.

        Decided by what the place itself says (device and inode, a lock taken through one and seen
        through the other, a table's identifier), never by comparing spellings. A physical copy is
        another store. An engine of another kind is never the same.

        Raises:
            StorageError: it cannot be found out.
        """
        ...

    async def undeclared(self) -> list[str]:
        """What is stored and the declarations do not cover, so that a full read would leave it out.

        `"jobs"` is a collection, `"machines.owner"` a field; sorted. Nothing is made.
        """
        ...

    async def explain(self, query: Query) -> QueryPlan:
        """How `select` would run."""
        ...

    async def probe(self) -> None:
        """Write, read back and delete something that is no entity; raise if that fails."""
        ...

    async def health(self) -> Mapping[str, Value]:
        """The engine's own part of `health()`; a finding that needs action is in `problems`."""
        ...

    def describe(self) -> Mapping[str, Value]:
        """Where the data is and how it is configured, without secrets."""
        ...

    async def close(self) -> None:
        """Release everything; nothing acknowledged is lost. Called once."""
        ...


_BATCH_SIZE: Final = 512


async def iter_batches(reader: Reader, query: Query) -> AsyncGenerator[list[Entity], None]:
    """The entities that `select` gives, in pieces, of any reader."""
    if isinstance(reader, SupportsBatches):
        async with aclosing(reader.iter_batches(query)) as pieces:
            async for each in pieces:
                yield each
        return
    async with aclosing(batched(reader.select(query))) as pieces:
        async for each in pieces:
            yield each


async def iter_json(reader: Reader, query: Query) -> AsyncGenerator[list[bytes], None]:
    """The canonical texts of the entities that `select` gives, in pieces, of any reader."""
    if isinstance(reader, SupportsCanonicalJSON):
        async with aclosing(reader.iter_json(query)) as texts:
            async for each in texts:
                yield each
        return
    async with aclosing(iter_batches(reader, query)) as pieces:
        async for piece in pieces:
            yield list(map(canonical, piece))


async def batched(records: AsyncGenerator[Record, None]) -> AsyncGenerator[list[Entity], None]:
    """The entities of records, in pieces."""
    piece: list[Entity] = []
    async with aclosing(records):
        async for record in records:
            piece.append(record.entity)
            if len(piece) == _BATCH_SIZE:
                yield piece
                piece = []
    if piece:
        yield piece


async def run_to_completion(work: Awaitable[Result]) -> Result:
    """Await `work` to its end even when the caller is cancelled meanwhile; then be cancelled.

    `asyncio.shield` alone would leave the work behind, running beside a caller that has already
    released its locks; anyio's shielded scope does not hold off a native `Task.cancel()`.
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
            task.exception()  # seen here, so that the loop does not report it as lost
        raise cancelled
    return task.result()
