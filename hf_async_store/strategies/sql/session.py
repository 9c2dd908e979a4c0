"""A transaction on one connection; it begins with its first verb."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from hf_async_store.engine import Isolation
from hf_async_store.entities import Change, Entity, Key, Outcome, Record, Value
from hf_async_store.query import Query
from hf_async_store.strategies.sql import reading

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.connections import Lease
    from hf_async_store.strategies.sql.engine import SQLEngine


class SQLReader:
    """Reads on one connection."""

    def __init__(self, engine: SQLEngine, lease: Lease | None) -> None:
        self._engine = engine
        self._lease = lease

    async def _begun(self) -> Lease:
        assert self._lease is not None, "a session begins it; all others have it"
        return self._lease

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        return await self._engine.writer.fetch(await self._begun(), keys)

    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        lease = await self._begun()
        table = self._engine.tables[query.collection]
        async with aclosing(reading.records(lease, table, query)) as records:
            async for each in records:
                yield each

    async def pieces(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        """See `ReadsInPieces`."""
        lease = await self._begun()
        table = self._engine.tables[query.collection]
        async with aclosing(reading.pieces(lease, table, query)) as pieces:
            async for each in pieces:
                yield each

    async def texts(self, query: Query) -> AsyncGenerator[list[bytes], None]:
        """See `ReadsTexts`."""
        lease = await self._begun()
        table = self._engine.tables[query.collection]
        async with aclosing(reading.texts(lease, table, query)) as texts:
            async for each in texts:
                yield each

    async def count(self, query: Query) -> int:
        return await reading.count(
            await self._begun(), self._engine.tables[query.collection], query
        )


class SQLSession(SQLReader):
    """A session of the engine, and its context."""

    def __init__(self, engine: SQLEngine, isolation: Isolation | None) -> None:
        super().__init__(engine, None)
        self._isolation = isolation
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> SQLSession:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.__aexit__(kind, exc, traceback)

    async def _begun(self) -> Lease:
        if self._lease is None:
            lease = await self._stack.enter_async_context(self._engine.writing())
            await self._stack.enter_async_context(lease.transaction(self._isolation))
            self._lease = lease
        return self._lease

    async def write(self, changes: Sequence[Change]) -> list[Outcome]:
        lease = await self._begun()
        return await self._engine.apply(lease, changes)

    async def execute(
        self, sql: str, params: Sequence[object] | Mapping[str, object]
    ) -> list[dict[str, Value]]:
        return await self._engine.execute(await self._begun(), sql, params)

    @asynccontextmanager
    async def savepoint(self) -> AsyncIterator[SQLSession]:
        lease = await self._begun()
        async with lease.transaction():
            yield self
