"""Engines that are wrong, and how a case of the contract is run on one: as pytest would call it."""

from __future__ import annotations

import asyncio
import inspect
from collections import ChainMap
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import product
from typing import Any, Final

import msgspec
import pytest

from hf_async_store import Collection, StorageStrategy
from hf_async_store.config import MemoryConfig
from hf_async_store.driver import Isolation, Key, Query, Reader, Record
from hf_async_store.strategies.memory import MemoryEngine
from hf_async_store.strategy import schema_of
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


async def run_case(case: str, harness: Harness) -> None:
    """Run a case of the contract, with all of its parameters; skipped, it would say nothing."""
    method = getattr(StrategyContract(), case)
    parameters = [list(_values(each)) for each in getattr(method, "pytestmark", ())]
    for values in product(*filter(None, parameters)):
        given: dict[str, object] = dict(ChainMap(*values))
        async with asyncio.timeout(_SECONDS), AsyncExitStack() as stack:
            for name in inspect.signature(method).parameters.keys() - given:
                if name in ("store", "store_with_savepoints"):
                    given[name] = await stack.enter_async_context(harness.store())
                else:
                    assert name in ("harness", "enforcing"), name
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


async def is_refused(case: str, harness: Harness) -> bool:
    """Whether a case of the contract fails."""
    try:
        await run_case(case, harness)
    except RuntimeError as exc:
        return "was skipped" not in str(exc)
    except Exception:
        return True
    except pytest.fail.Exception:
        return True
    finally:
        if isinstance(harness, WrongHarness):
            await harness.close()
    return False
