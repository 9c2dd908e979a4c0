"""Engines that are wrong, and how a case of the contract is run on one: as pytest would call it."""

from __future__ import annotations

import asyncio
import inspect
import traceback
from collections import ChainMap
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import product
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import pytest

from hf_async_store import Collection, StorageStrategy, testing
from hf_async_store.config import MemoryConfig
from hf_async_store.driver import (
    Change,
    Entity,
    Isolation,
    Key,
    Outcome,
    Query,
    Reader,
    Record,
    Session,
)
from hf_async_store.errors import ConcurrencyConflictError
from hf_async_store.strategies.memory import MemoryEngine, _MemorySession
from hf_async_store.strategy import schema_of
from hf_async_store.table import Table
from hf_async_store.testing.contract import StrategyContract
from hf_async_store.testing.harness import CONTRACT_COLLECTIONS, Harness
from tests.contract.harnesses import MemoryHarness

_SECONDS: Final = 20.0


class Nothing(Reader):
    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        return [None for _ in keys]

    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        for each in ():
            yield each


class Wrapped:
    """A reader or a session that does one thing wrongly."""

    def __init__(self, right: Any) -> None:
        self._right = right

    def __getattr__(self, name: str) -> Any:
        return getattr(self._right, name)


def sessions_of(wrong: type) -> type[MemoryEngine]:
    """An engine whose sessions are wrapped by something wrong."""

    class WrongSessions(MemoryEngine):
        sessions = wrong

        @asynccontextmanager
        async def session(self, isolation: Isolation | None) -> AsyncGenerator[Any, None]:
            async with super().session(isolation) as session:
                yield wrong(session)

    WrongSessions.__name__ = wrong.__name__
    return WrongSessions


class WrongHarness(MemoryHarness):
    def __init__(self, engine: type[MemoryEngine]) -> None:
        self.capabilities = engine.capabilities
        self._engine = engine
        self._stores: list[StorageStrategy] = []

    def store(
        self, collections: Iterable[Collection] = CONTRACT_COLLECTIONS, **settings: object
    ) -> StorageStrategy:
        schema = schema_of(collections)
        config = msgspec.convert(settings, MemoryConfig)
        self._stores.append(StorageStrategy(self._engine(schema, config), schema))
        return self._stores[-1]

    async def close(self) -> None:
        """Close what a case that failed has left open."""
        for each in self._stores:
            with suppress(Exception):
                await each.close()


class Wrong(NamedTuple):
    """A wrong engine, the case that refuses it, and how: see `assert_refused`."""

    engine: type[MemoryEngine]
    case: str
    error: type[BaseException] = AssertionError
    seconds: float = _SECONDS


async def run_case(case: str, harness: Harness, seconds: float = _SECONDS) -> None:
    """Run a case of the contract, with all of its parameters; skipped, it would say nothing."""
    method = getattr(StrategyContract(), case)
    parameters = [list(_values(each)) for each in getattr(method, "pytestmark", ())]
    for values in product(*filter(None, parameters)):
        given: dict[str, object] = dict(ChainMap(*values))
        async with asyncio.timeout(seconds), AsyncExitStack() as stack:
            for name in inspect.signature(method).parameters.keys() - given:
                if name in ("store", "store_with_savepoints"):
                    given[name] = await stack.enter_async_context(harness.store())
                else:
                    assert name in ("harness", "enforcing", "shared"), name
                    given[name] = harness
            try:
                await method(**given)
            except pytest.skip.Exception as exc:
                raise RuntimeError(f"{case} was skipped: {exc}") from exc


def _values(mark: pytest.Mark) -> Iterator[dict[str, object]]:
    """The values of a parameter."""
    if mark.name == "parametrize":
        name, values = mark.args
        for each in values:
            yield {
                name: each.values[0] if hasattr(each, "values") and hasattr(each, "marks") else each
            }


async def assert_refused(
    case: str,
    harness: Harness,
    error: type[BaseException] = AssertionError,
    seconds: float = _SECONDS,
) -> None:
    """Assert that a case of the contract fails.

    Args:
        error: how. AssertionError: by an assertion of the case itself. Another class: by an error of the
            engine or of the store.
        seconds: a case that takes longer fails by a TimeoutError.
    """
    try:
        await run_case(case, harness, seconds)
    except (Exception, pytest.fail.Exception) as exc:
        expected = _is_assertion(exc) if error is AssertionError else type(exc) is error
        if not expected:
            raise AssertionError(f"{case} fails by {exc!r} instead of {error.__name__}") from exc
    else:
        raise AssertionError(f"{case} does not fail")
    finally:
        if isinstance(harness, WrongHarness):
            await harness.close()


_KIT: Final = Path(testing.__file__).parent


def _is_assertion(exc: BaseException) -> bool:
    """Whether a line of the contract suite asserts something, or unpacks another number of items."""
    unpacks = isinstance(exc, ValueError) and "values to unpack" in str(exc)
    frames = [Path(each.filename) for each in traceback.extract_tb(exc.__traceback__)]
    place = next(each for each in reversed(frames) if each.parent.name != "_pytest")
    is_failure = unpacks or isinstance(exc, AssertionError | pytest.fail.Exception)
    return is_failure and place.parent == _KIT


class OptimisticSession(_MemorySession):
    """Reads what is committed at that moment, and remembers it for the commit."""

    def __init__(self, engine: Optimistic) -> None:
        super().__init__(engine._stored, engine._overlay())
        self.read: dict[Key, Entity | None] = {}
        self.queried: dict[str, dict[str, Entity]] = {}

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        for each in keys:
            self.read.setdefault(each, self._stored.get(each))
        return await super().fetch(keys)

    async def write(self, changes: Sequence[Change]) -> list[Outcome]:
        for each in changes:
            self.read.setdefault(each.key, self._stored.get(each.key))
        return await super().write(changes)

    def _table(self, collection: str) -> Table[Entity]:
        """The table of a collection, for every kind of query."""
        table = self._stored.table(collection)
        self.queried.setdefault(collection, dict(table.entities))
        return table

    def is_current(self) -> bool:
        """Whether what was read and queried is as it was."""
        return all(self._stored.get(key) is entity for key, entity in self.read.items()) and all(
            self._stored.table(name).entities == entities for name, entities in self.queried.items()
        )


class Optimistic(MemoryEngine):
    """A right engine whose transactions lock nothing: the commit compares what they have read."""

    session_class = OptimisticSession

    @asynccontextmanager
    async def session(self, isolation: Isolation | None) -> AsyncGenerator[Session, None]:
        session = self.session_class(self)
        yield session
        await self.finish(session)

    async def finish(self, session: OptimisticSession) -> None:
        """Commit, if what was read is as it was."""
        async with self._lock.writing():
            if not session.is_current():
                raise ConcurrencyConflictError("another came first", retryable=True)
            await self._commit(session.overlay)
