"""Reading several partitions of an index: concurrently, and merged in the order of the index.

A source is a generator of the pages of a Query or Scan.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from hf_async_store.generators import Owned

if TYPE_CHECKING:
    from hf_async_store.strategies.dynamodb.codec import Attributes
    from hf_async_store.strategies.dynamodb.index_keys import SortKey

Result = TypeVar("Result")
Source: TypeAlias = "AsyncGenerator[dict[str, Any], None]"

PARALLEL: Final = 8
"""The maximum number of requests of one query in progress at once."""


async def gather(reads: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Run reads concurrently and return their results; if one fails, the others are cancelled."""
    tasks = [asyncio.create_task(each) for each in reads]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for each in tasks:
            each.cancel()
        await asyncio.wait(tasks)
        raise


async def items_in(source: Source) -> AsyncGenerator[list[Attributes], None]:
    async with Owned(source) as pages:
        async for page in pages:
            yield page["Items"]


async def counted(source: Source) -> int:
    number = 0
    async with Owned(source) as pages:
        async for page in pages:
            number += page["Count"]
    return number


class _Partition:
    """The items of one partition in the order of the index, read as they are needed."""

    def __init__(
        self, pages: Owned[dict[str, Any]], key_of: Callable[[Attributes], SortKey]
    ) -> None:
        self._pages = pages
        self._key_of = key_of
        self._items: list[Attributes] = []  # the next one last
        self.head: SortKey = None

    async def advance(self) -> bool:
        """Read until there is an item, whose key `head` is; return False if there are no more."""
        while not self._items:
            try:
                page = await self._pages.__anext__()
            except StopAsyncIteration:
                return False
            # The list of the page itself, so that its items are freed one by one: all at once would hold
            # the event loop.
            self._items = page["Items"]
            self._items.reverse()
        self.head = self._key_of(self._items[-1])
        return True

    def take(self) -> list[Attributes]:
        """Remove and return the items with the same key as the first that were already read."""
        taken = [self._items.pop()]
        while self._items and self._key_of(self._items[-1]) == self.head:
            taken.append(self._items.pop())
        return taken


async def merged(
    sources: Sequence[Source],
    key_of: Callable[[Attributes], SortKey],
    *,
    descending: bool,
) -> AsyncGenerator[list[Attributes], None]:
    """The items of several partitions, in groups with equal keys, in the order of the keys."""
    async with AsyncExitStack() as stack:
        partitions = [
            _Partition(await stack.enter_async_context(Owned(each)), key_of) for each in sources
        ]
        waiting: list[_Partition] = []
        for start in range(0, len(partitions), PARALLEL):
            part = partitions[start : start + PARALLEL]
            found = await gather([each.advance() for each in part])
            waiting += [each for each, has_items in zip(part, found, strict=True) if has_items]
        first = max if descending else min
        while waiting:
            key = first(each.head for each in waiting)
            group: list[Attributes] = []
            for each in [each for each in waiting if each.head == key]:
                has_items = True
                while has_items and each.head == key:
                    group += each.take()
                    has_items = await each.advance()
                if not has_items:
                    waiting.remove(each)
            yield group
