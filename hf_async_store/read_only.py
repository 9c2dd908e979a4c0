"""The session of a read-only transaction: every read sees the same snapshot, and waits for no writer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from hf_async_store.changes import Change, Outcome, Record
from hf_async_store.driver import Engine, Reader, Session
from hf_async_store.errors import InvalidInputError
from hf_async_store.query import Query
from hf_async_store.values import Entity, Key


@asynccontextmanager
async def read_only_session(engine: Engine) -> AsyncGenerator[Session, None]:
    """A session that reads one snapshot of an engine.

    An engine whose queries are eventually consistent has none: there, what the transaction read by
    key is validated when it ends, as in every transaction.
    """
    is_eventual = engine.capabilities.query_isolation == "eventual"
    context: AbstractAsyncContextManager[Reader] = (
        engine.session(None) if is_eventual else engine.snapshot()
    )
    async with context as reader:
        yield _ReadOnlySession(reader)


class _ReadOnlySession(Session):
    """The reads of a reader, without writes."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        return await self._reader.fetch(keys)

    def select(self, query: Query) -> AsyncGenerator[Record, None]:
        return self._reader.select(query)

    def select_batches(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        return self._reader.select_batches(query)

    async def count(self, query: Query) -> int:
        return await self._reader.count(query)

    async def write(self, changes: Sequence[Change]) -> list[Outcome]:
        del changes
        raise InvalidInputError("a read-only transaction cannot write")

    async def direct(self, method: str) -> Session:
        raise InvalidInputError(f"{method} could write, and this transaction is read-only")
