"""What the suite drives a store with: rivals in other tasks, seeds, and a bound on hanging.

No case looks at a clock to decide what is right. Time comes in twice: as the bound that tells a
hang from slowness, and as the patience with a rival that may or may not be able to go on.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager, contextmanager
from random import Random, SystemRandom
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator

    from hf_async_store.driver import Capabilities
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.harness import Harness

Result = TypeVar("Result")

HANG_SECONDS: Final = 60.0
"""What is not done by then never will be."""

PATIENCE: Final = 0.3
"""How long a rival gets before it counts as blocked by what the test holds. Too short on a slow
machine only makes a case look at one order of events less; it never makes it fail."""

SEED_VARIABLE: Final = "HF_ASYNC_STORE_TEST_SEED"

_LOOKS: Final = 100
_PAUSE: Final = 0.1


@contextmanager
def seeded() -> Iterator[Random]:
    """A random generator; a failure tells its seed, and how to run with it again."""
    seed = int(os.environ.get(SEED_VARIABLE) or SystemRandom().randrange(2**32))
    try:
        yield Random(seed)
    except BaseException as exc:
        exc.add_note(f"to run with the same random choices: {SEED_VARIABLE}={seed}")
        raise


async def elsewhere(work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work` in a task of its own: one inside a transaction may not use the store."""
    return await asyncio.create_task(work)


async def has_ended(*rivals: asyncio.Task[Any]) -> bool:
    """Whether rivals get to their end, though they may have to wait for what the caller holds."""
    _, waiting = await asyncio.wait(rivals, timeout=PATIENCE)
    return not waiting


async def failure_of(work: Awaitable[object]) -> Exception | None:
    """The exception that `work` ends by, or None."""
    try:
        await work
    except Exception as exc:  # noqa: BLE001 - the caller judges every kind
        return exc
    return None


async def answer_of(
    capabilities: Capabilities, ask: Callable[[], Awaitable[Result]], expected: object
) -> Result:
    """The answer to a query; where queries may be behind, the last of several looks."""
    answer = await ask()
    if capabilities.query_isolation == "eventual":
        for _ in range(_LOOKS):
            if answer == expected:
                break
            await asyncio.sleep(_PAUSE)
            answer = await ask()
    return answer


def is_shared(capabilities: Capabilities) -> bool:
    """Whether two stores of one harness see the same data."""
    return capabilities.durable or capabilities.multi_process


@asynccontextmanager
async def second_store(
    harness: Harness, store: StorageStrategy
) -> AsyncGenerator[StorageStrategy, None]:
    """Another store on the same data; `store` itself where there can be no other."""
    if not is_shared(harness.capabilities):
        yield store
        return
    async with harness.store() as other:
        yield other
