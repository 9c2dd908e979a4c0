"""Readers and sessions on one connection. A transaction begins with the first method call."""

from __future__ import annotations

from asyncio import sleep
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, TypeVar

from hf_async_store.changes import Change, Outcome, Record
from hf_async_store.driver import Isolation, Reader, Session
from hf_async_store.errors import ConcurrencyConflictError, PoolTimeoutError, UnavailableError
from hf_async_store.generators import Owned
from hf_async_store.query import Query
from hf_async_store.strategies.sql import reading
from hf_async_store.strategies.sql.parameters import check_statement
from hf_async_store.values import Entity, Key, Value

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.connections import LeasedConnection
    from hf_async_store.strategies.sql.rows import Table

Item = TypeVar("Item")

ReadAtOnce: TypeAlias = "Callable[[LeasedConnection, Table, Query], Awaitable[Item | None]]"
"""`reading.small` or `reading.count_at_once`."""


class SQLReader(Reader):
    """Reads on one connection.

    Args:
        lease: None if the store does not exist.
        tables: by collection, the existing tables.
    """

    def __init__(self, lease: LeasedConnection | None, tables: Mapping[str, Table]) -> None:
        self._lease = lease
        self._tables = tables

    async def _read_lease(self) -> LeasedConnection | None:
        return self._lease

    async def _source(self, query: Query) -> tuple[LeasedConnection, Table] | None:
        """The connection and table to read from; None if the table does not exist."""
        lease = await self._read_lease()
        table = self._tables.get(query.collection)
        return None if lease is None or table is None else (lease, table)

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        lease = await self._read_lease()
        if lease is None:
            return [None] * len(keys)
        return await reading.fetch(lease, self._tables, keys)

    async def at_once(self, query: Query, read: ReadAtOnce[Item], absent: Item) -> Item | None:
        """What `read` returns; `absent` if the table does not exist."""
        source = await self._source(query)
        return absent if source is None else await read(*source, query)

    def select(self, query: Query) -> AsyncGenerator[Record, None]:
        return self._read(reading.records, query)

    def select_batches(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        return self._read(reading.select_batches, query)

    async def _read(
        self,
        read: Callable[[LeasedConnection, Table, Query], AsyncGenerator[Item, None]],
        query: Query,
    ) -> AsyncGenerator[Item, None]:
        source = await self._source(query)
        if source is not None:
            async with Owned(read(*source, query)) as items:
                async for each in items:
                    yield each

    async def count(self, query: Query) -> int:
        source = await self._source(query)
        return 0 if source is None else await reading.count(*source, query)


_LOST_CONNECTIONS: Final = 3

_REPEAT_SECONDS: Final = 1.0
"""After this time, it is repeated only once: for example, the server cannot be reached."""

_NOTICE_SECONDS: Final = 0.01
"""In this time, the event loop notices which other connections the server has closed."""


async def on_live_connection(work: Callable[[], Awaitable[Item]]) -> Item:
    """What some work returns that changes nothing, such as beginning a transaction.

    It is repeated if its connection was lost: the server may have closed the connections that were not in
    use.
    """
    until = monotonic() + _REPEAT_SECONDS
    for attempt in count(1):
        try:
            return await work()
        except PoolTimeoutError:
            raise
        except UnavailableError:
            if attempt > _LOST_CONNECTIONS or (attempt > 1 and monotonic() > until):
                raise
        await sleep(_NOTICE_SECONDS)
    raise AssertionError  # not reached


class Connected(Protocol):
    """What a session needs of its engine."""

    async def is_absent(self) -> bool:
        """Whether the store does not exist yet."""
        ...

    @property
    def known_tables(self) -> Mapping[str, Table]:
        """By collection, the tables, after the store was prepared for writing."""
        ...

    def writing(self) -> AbstractAsyncContextManager[LeasedConnection]:
        """A connection for writes."""
        ...

    def changing(self, lease: LeasedConnection) -> AbstractAsyncContextManager[None]:
        """Surrounds what happens in a transaction, inside it."""
        ...

    async def apply(self, lease: LeasedConnection, changes: Sequence[Change]) -> list[Outcome]:
        """Apply the changes of a session, up to the first that fails."""
        ...

    async def execute(
        self, lease: LeasedConnection, sql: str, params: Sequence[object] | Mapping[str, object]
    ) -> list[dict[str, Value]]:
        """Run a caller's own statement in the open transaction."""
        ...


class SQLSession(SQLReader, Session):
    """A session of the engine; the context manager of its transaction."""

    def __init__(self, engine: Connected, isolation: Isolation | None) -> None:
        super().__init__(None, {})
        self._engine = engine
        self._isolation = isolation
        self._stack = AsyncExitStack()
        self._read_absent = False  # it read while the store did not exist

    async def __aenter__(self) -> SQLSession:
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        await self._stack.__aexit__(*exc_info)

    async def _read_lease(self) -> LeasedConnection | None:
        if self._lease is None and await self._engine.is_absent():
            self._read_absent = True
            return None
        return await self._write_lease()

    async def _write_lease(self) -> LeasedConnection:
        if self._lease is None:
            lease = await on_live_connection(self._begun)
            await self._stack.enter_async_context(self._engine.changing(lease))
            self._tables = self._engine.known_tables
            if self._read_absent and not await self._is_empty(lease):
                raise ConcurrencyConflictError(
                    "another program created the store after this transaction had read that it does "
                    "not exist: try again",
                    retryable=True,
                )
            self._lease = lease
        return self._lease

    async def _begun(self) -> LeasedConnection:
        async with AsyncExitStack() as stack:
            lease = await stack.enter_async_context(self._engine.writing())
            await stack.enter_async_context(lease.transaction(self._isolation))
            self._stack = stack.pop_all()
        return lease

    async def _is_empty(self, lease: LeasedConnection) -> bool:
        """Whether all tables are empty."""
        for table in self._tables.values():
            if await lease.rows(f"SELECT 1 FROM {table.name} LIMIT 1"):
                return False
        return True

    async def begin(self) -> LeasedConnection:
        """Begin the transaction now; returns its connection."""
        return await self._write_lease()

    async def write(self, changes: Sequence[Change]) -> list[Outcome]:
        lease = await self._write_lease()
        return await self._engine.apply(lease, changes)

    async def execute(
        self, sql: str, params: Sequence[object] | Mapping[str, object]
    ) -> list[dict[str, Value]]:
        check_statement(sql, params)
        return await self._engine.execute(await self._write_lease(), sql, params)

    @asynccontextmanager
    async def savepoint(self) -> AsyncIterator[SQLSession]:
        lease = await self._write_lease()
        async with lease.transaction():
            yield self
