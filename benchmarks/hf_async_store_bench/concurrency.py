"""The same work for many items at once, and work that takes turns."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import nullcontext
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


async def side_by_side(
    work: Callable[[Item], Awaitable[Result]], items: Iterable[Item], at_once: int | None = None
) -> list[Result]:
    """What the work gives for each item, in order. The first error cancels the others."""
    gate = asyncio.Semaphore(at_once) if at_once else nullcontext()

    async def one(item: Item) -> Result:
        async with gate:
            return await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(each)) for each in items]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [each.result() for each in tasks]


async def alternate(rounds: int, *sides: Callable[[], Awaitable[float]]) -> list[list[float]]:
    """What each side gives in each round, A B A B; a round before the first is not counted."""
    found: list[list[float]] = [[] for _ in sides]
    for number in range(rounds + 1):
        for side, samples in zip(sides, found, strict=True):
            value = await side()
            if number:
                samples.append(value)
    return found
