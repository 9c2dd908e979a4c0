"""The session of a read-only transaction: every read sees the same snapshot, and waits for no writer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from hf_async_store.changes import Change, Outcome, Record
from hf_async_store.driver import Engine, Reader, Session
from hf_async_store.errors import InvalidInputError
from hf_async_store.generators import Owned
from hf_async_store.query import Query
from hf_async_store.values import Entity, Key


class ReadOnlySession(Session):
    """Reads a snapshot of an engine; the context manager of its transaction.

    The first read begins the snapshot. An engine whose queries are eventually consistent has none:
    there, what the transaction read by key is validated when it ends, as in every transaction.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._stack = AsyncExitStack()
        self._reader: Reader | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.__aexit__(kind, exc, traceback)

    async def _begun(self) -> Reader:
        if self._reader is None:
            engine = self._engine
            context = (
                engine.session(None)
                if engine.capabilities.query_isolation == "eventual"
                else engine.snapshot()
            )
            self._reader = await self._stack.enter_async_context(context)
        return self._reader

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        return await (await self._begun()).fetch(keys)

    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        async with Owned((await self._begun()).select(query)) as records:
            async for each in records:
                yield each

    async def select_batches(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        async with Owned((await self._begun()).select_batches(query)) as batches:
            async for each in batches:
                yield each

    async def count(self, query: Query) -> int:
        return await (await self._begun()).count(query)

    async def write(self, changes: Sequence[Change]) -> list[Outcome]:
        del changes
        raise InvalidInputError("a read-only transaction cannot write")

    async def direct(self, method: str) -> Session:
        raise InvalidInputError(f"{method} could write, and this transaction is read-only")
