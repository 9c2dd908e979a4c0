"""Helpers for concurrent tests: competing tasks, random seeds, time limits.

No case uses a clock to decide whether a result is correct. Time limits have two purposes: to tell
that a task hangs, and to tell whether a competing task ("rival") is blocked by what the test holds.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

from hf_async_store.testing.random_choices import SEED_VARIABLE
from hf_async_store.testing.repetitions import random_of_test

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
    from random import Random

    from hf_async_store.driver import Capabilities
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.harness import Harness

Result = TypeVar("Result")

HANG_SECONDS: Final = 60.0
"""A task that is not done after this time is considered to hang."""

PATIENCE: Final = 0.3
"""How long to wait for a rival before it is considered to be blocked by what the test holds. If this
is too short on a slow machine, a case covers one order of events less, but does not fail."""

_ATTEMPTS: Final = 100
_PAUSE_SECONDS: Final = 0.1


@contextmanager
def seeded() -> Iterator[Random]:
    """The random generator of the test; the seed of the run is added to the exception of a failing test."""
    try:
        yield random_of_test()
    except BaseException as exc:
        exc.add_note(f"to run with the same random choices: --hf-seed {os.environ[SEED_VARIABLE]}")
        raise


async def elsewhere(work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work` in a new task: a task with an open transaction must not use the store."""
    return await asyncio.create_task(work)


async def has_ended(*rivals: asyncio.Task[Any]) -> bool:
    """Whether the rivals end within `PATIENCE`; if not, they are blocked by what the caller holds."""
    _, waiting = await asyncio.wait(rivals, timeout=PATIENCE)
    return not waiting


async def failure_of(work: Awaitable[object]) -> Exception | None:
    """The exception that `work` raises, or None."""
    try:
        await work
    except Exception as exc:  # noqa: BLE001 - the caller checks its class
        return exc
    return None


async def answer_of(
    capabilities: Capabilities, ask: Callable[[], Awaitable[Result]], expected: object
) -> Result:
    """The result of a query; if queries are eventually consistent, asked repeatedly until it is the
    expected one, or for about 10 seconds."""
    answer = await ask()
    if capabilities.query_isolation == "eventual":
        for _ in range(_ATTEMPTS):
            if answer == expected:
                break
            await asyncio.sleep(_PAUSE_SECONDS)
            answer = await ask()
    return answer


def is_shared(capabilities: Capabilities) -> bool:
    """Whether two stores of one harness see the same data."""
    return capabilities.durable or capabilities.multi_process


@asynccontextmanager
async def second_store(
    harness: Harness, store: StorageStrategy
) -> AsyncGenerator[StorageStrategy, None]:
    """Another store on the same data; `store` itself if the engine does not share its data."""
    if not is_shared(harness.capabilities):
        yield store
        return
    async with harness.store() as other:
        yield other
