"""The same work for many items at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


async def side_by_side(
    work: Callable[[Item], Awaitable[Result]], items: Iterable[Item], at_once: int | None = None
) -> list[Result]:
    """What the work gives for each item, in order. The first error cancels the others."""
    gate = asyncio.Semaphore(at_once) if at_once else None

    async def one(item: Item) -> Result:
        if gate is None:
            return await work(item)
        async with gate:
            return await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(each)) for each in items]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [each.result() for each in tasks]
