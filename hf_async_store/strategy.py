"""A strategy: the store that users hold. Verbs, transactions and life over one engine.

Single writes, and reads where a read is a round trip, go through the coalescer; what an engine can
do is read from its capabilities, never from its name.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from importlib import import_module
from types import TracebackType
from typing import ClassVar, Final, Self, TypeVar

from hf_async_store.coalescing import Coalescer
from hf_async_store.engine import (
    Capabilities,
    Engine,
    Isolation,
    Plan,
    Reader,
    finish,
    pieces_of,
)
from hf_async_store.entities import (
    HOST_FACTORY,
    Change,
    Collection,
    Entity,
    Key,
    Outcome,
    Record,
    Schema,
    Value,
)
from hf_async_store.errors import (
    InvalidInputError,
    StorageError,
    StoreClosedError,
    WrongLoopError,
)
from hf_async_store.moving import HIDDEN, Moving
from hf_async_store.query import Filters, OrderBy, Query
from hf_async_store.repository import RepositoryInterface, within
from hf_async_store.retrying import RETRY_SECONDS, Turns, retry_conflicts
from hf_async_store.transaction import Transaction, TransactionManager

Result = TypeVar("Result")


class _Forks:
    """Counts the forks of this process: cheaper to compare than to ask for the process id."""

    seen: ClassVar[int] = 0

    @classmethod
    def note(cls) -> None:
        cls.seen += 1


os.register_at_fork(after_in_child=_Forks.note)


class StorageStrategy(RepositoryInterface):
    """A store. Open it with `async with`, or with `open()` and `close()`.

    Opening does no I/O; the first verb does. A store belongs to the event loop that it was opened
    in, and any number of its tasks may use it at once.

    Every verb may raise, beside its own errors:
        StoreClosedError: before opening or after closing.
        WrongLoopError: from another event loop, or in a forked child.
        TransactionReentryError: by a task that is inside a transaction of this store.
    """

    transaction_type: ClassVar[type[Transaction]] = Transaction

    def __init__(self, engine: Engine, schema: Schema) -> None:
        super().__init__(schema)
        self._engine = engine
        self._transactions = TransactionManager()
        self._turns = Turns()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._forks = _Forks.seen
        self._closed = False
        can = engine.capabilities
        # What moves while it is in use is shared by processes: only there is it looked for.
        self._moving = Moving(lambda: self._engine, self._engine_at) if can.processes else None
        if self._moving is not None:
            engine = self._moving
        self._writes: Coalescer[Change, Outcome] = Coalescer(
            engine.write_each, lanes=can.write_lanes, size=can.write_batch, key=_key_of
        )
        self._reads: Coalescer[Key, Record | None] | None = (
            Coalescer(engine.fetch, lanes=can.read_lanes, size=can.read_batch)
            if can.read_batch
            else None
        )

    @property
    def capabilities(self) -> Capabilities:
        """What the engine beneath can do."""
        return self._engine.capabilities

    # -- life --------------------------------------------------------------------------------

    async def open(self) -> Self:
        """Bind the store to the running loop; no I/O."""
        if self._closed:
            raise StoreClosedError("this store was closed; make a new one")
        if self._loop is not None:
            raise StoreClosedError("this store is open already")
        self._loop = asyncio.get_running_loop()
        return self

    async def close(self) -> None:
        """Finish what was submitted, then release everything. A second close does nothing.

        A cancelled close still goes to its end before the cancellation comes out.
        """
        if self._closed or self._loop is None:
            self._closed = True
            return
        if self._loop is not asyncio.get_running_loop():
            # What is to be closed belongs to that loop, and waits for it.
            raise WrongLoopError(
                "this store was opened in another event loop; close it in that one"
            )
        self._closed = True
        await finish(self._release())

    async def _release(self) -> None:
        await self._writes.drain()
        if self._reads is not None:
            await self._reads.drain()
        if self._moving is not None:
            await self._moving.close()
        await self._engine.close()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _usable(self) -> Engine:
        if self._closed:
            raise StoreClosedError("this store was closed")
        if self._forks != _Forks.seen:
            # Before the loop is asked for: in the child there is none.
            raise WrongLoopError("this store was opened before a fork; open one in the child")
        if self._loop is not asyncio.get_running_loop():
            if self._loop is None:
                raise StoreClosedError("this store is not open (use `async with`)")
            raise WrongLoopError("this store was opened in another event loop")
        self._transactions.refuse_reentry()
        return self._engine if self._moving is None else self._moving.for_reading()

    # -- moving ------------------------------------------------------------------------------

    def _twin(self, collections: Iterable[Collection]) -> StorageStrategy:
        """Another store on the same data, with other collections."""
        raise NotImplementedError(f"{type(self).__name__} cannot be moved while it is in use")

    def _engine_at(self, place: str | None) -> Engine:
        """An engine that knows what a move keeps in a store: of this one, or of a URL."""
        collections = [*self._schema.values(), *HIDDEN]
        if place is None:
            return self._twin(collections)._engine
        # Not an import: the strategies stand above, and are found by name as everywhere.
        other: StorageStrategy = import_module("hf_async_store.strategies").open_store(
            place, collections=collections
        )
        return other._engine

    @asynccontextmanager
    async def _around(self, what: str) -> AsyncGenerator[None, None]:
        """A write that only this engine has: see `Moving.around`."""
        if self._moving is None:
            yield
            return
        async with self._moving.around(what):
            yield

    async def _refuse_elsewhere(self, what: str) -> None:
        """Before a read that only this engine has: see `Moving.refuse_elsewhere`."""
        if self._moving is not None:
            await self._moving.refuse_elsewhere(what)

    # -- primitives --------------------------------------------------------------------------

    async def _fetch(self, keys: Sequence[Key], timeout: float | None) -> list[Record | None]:
        engine = self._usable()
        if self._reads is None:
            if timeout is None:
                return await engine.fetch(keys)
            async with within(timeout):
                return await engine.fetch(keys)
        records: list[Record | None] = []
        for each in await self._reads.submit(keys, timeout):
            if isinstance(each, StorageError):
                raise each
            records.append(each)
        return records

    async def _write(self, changes: Sequence[Change], timeout: float | None) -> list[Outcome]:
        self._usable()
        return await self._writes.submit(changes, timeout)

    async def _import(self, changes: Sequence[Change]) -> list[Outcome]:
        # Not through the coalescer, whose batches would cut these in two: while one is written,
        # the next is made ready.
        self._usable()
        engine = self._engine if self._moving is None else self._moving
        return await engine.write_each(changes)

    async def _select(self, query: Query) -> AsyncGenerator[Record, None]:
        records = self._usable().select(query)
        try:
            async for record in records:
                yield record
        finally:
            await records.aclose()

    async def _select_pieces(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        async with aclosing(pieces_of(self._usable(), query)) as pieces:
            async for each in pieces:
                yield each

    async def _count(self, query: Query) -> int:
        return await self._usable().count(query)

    async def _retried(
        self, key: Key, attempt: Callable[[], Awaitable[Result]], seconds: float
    ) -> Result:
        self._usable()  # before it waits for a turn
        return await self._turns.retried(key, attempt, seconds)

    # -- transactions ------------------------------------------------------------------------

    def begin_transaction(self, isolation: Isolation | None = None) -> Transaction:
        """A transaction, to be used with `async with`; see `Transaction`.

        Args:
            isolation: one of `capabilities.isolations`; None is the first of them.

        Raises:
            InvalidInputError: an isolation that the engine does not have.
        """
        known = self.capabilities.isolations
        if isolation is not None and isolation not in known:
            raise InvalidInputError(f"isolation is one of {', '.join(known)}, not {isolation!r}")
        engine = self._engine if self._moving is None else self._moving
        return self.transaction_type(
            self._schema, engine.session(isolation), enter=self._enter_transaction
        )

    def _enter_transaction(self) -> Callable[[], None]:
        self._usable()
        return self._transactions.enter("a transaction")

    async def run_transaction(
        self,
        work: Callable[[Transaction], Awaitable[Result]],
        *,
        isolation: Isolation | None = None,
        retry_seconds: float = RETRY_SECONDS,
    ) -> Result:
        """`await work(tx)` in a transaction, again after each conflict; returns its result.

        Args:
            work: is called once per try, so what it does beside the transaction happens again.

        Raises:
            RetriesExhaustedError: conflicts until `retry_seconds` were over.
            Exception: whatever `work` raises that is no conflict; nothing was written.
        """

        async def attempt() -> Result:
            async with self.begin_transaction(isolation) as tx:
                return await work(tx)

        return await retry_conflicts(attempt, retry_seconds)

    # -- beneath the verbs: for backups and migrations ----------------------------------------

    @asynccontextmanager
    async def snapshot(self) -> AsyncGenerator[Reader, None]:
        """The whole store as it is at one moment, at the level of queries and records.

        For what reads everything, as a backup does: it holds up no writer, and takes no memory
        that grows with what is read. Where `capabilities.query_isolation` is "eventual" it shows
        what queries show.
        """
        async with self._usable().snapshot() as reader:
            yield reader

    # -- health ------------------------------------------------------------------------------

    async def exists(self) -> bool:
        """Whether the store is there: its file, or one of its tables. Nothing is made."""
        return await self._usable().exists()

    async def explain_query(
        self,
        collection: str,
        filters: Filters = None,
        order_by: OrderBy = None,
        limit: int | None = None,
    ) -> Plan:
        """How `query_entities` would run: index or scan, what is filtered and sorted here."""
        query = self._query(collection, filters, order_by, limit, None)
        return await self._usable().explain(query)

    async def test_connection(self) -> float:
        """Write, read back and delete a probe that is no entity; returns the seconds it took.

        Raises:
            StorageError: what stands in the way.
        """
        engine = self._usable()
        started = time.perf_counter()
        await engine.probe()
        return time.perf_counter() - started

    async def health(self) -> dict[str, Value]:
        """What an operator asks first: is it reachable, is there room, is anything wrong.

        `ok` is true when `problems` is empty; an engine that cannot be reached is a problem here,
        not an exception.
        """
        engine = self._usable()
        report: dict[str, Value] = {"engine": self.capabilities.engine}
        problems: list[Value] = []
        try:
            report["latency_ms"] = round(await self.test_connection() * 1000, 3)
        except StorageError as exc:
            problems.append(str(exc))
        try:
            found = dict(await engine.health())
        except StorageError as exc:
            found = {"problems": [str(exc)]}
        more = found.pop("problems", [])
        problems += (
            [each for each in more if each not in problems] if isinstance(more, list) else []
        )
        return {"ok": not problems, **report, **found, "problems": problems}

    def describe(self) -> dict[str, Value]:
        """Capabilities and limits, where the data is, and the declared collections; no secrets."""
        can = self.capabilities
        return {
            "engine": can.engine,
            "capabilities": {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in ((each, getattr(can, each)) for each in can.__struct_fields__)
                if name != "engine"
            },
            "collections": {name: _declared(each) for name, each in self._schema.items()},
            **self._engine.describe(),
        }


def _key_of(change: Change) -> Key:
    return change.key


def _declared(collection: Collection) -> dict[str, Value]:
    return {
        "key": collection.key,
        "fields": {
            name: field.type + (f" -> {field.references}" if field.references else "")
            for name, field in collection.fields.items()
        },
        "indexes": [each.name for each in collection.indexes],
    }


def schema_of(collections: Schema | Iterable[Collection]) -> Schema:
    """The schema of what a caller passes as `collections`."""
    return collections if isinstance(collections, Schema) else Schema(collections)


__all__: Final = ["HOST_FACTORY", "StorageStrategy", "schema_of"]
