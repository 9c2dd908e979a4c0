"""Async generators that read from one another."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")


class Owned(AsyncIterator[Item], Generic[Item]):
    """An async generator that the code around an `async with` block reads and closes.

    In contrast to `contextlib.aclosing`, the event loop does not know of the generator. A loop that
    shuts down closes all generators that it knows of at the same time, and that fails for one whose
    owner, a generator itself, is closing it already. The outermost generator remains known to the
    loop, and closes the others.
    """

    __slots__ = ("_begun", "_source")

    def __init__(self, source: AsyncGenerator[Item, None]) -> None:
        self._source = source
        self._begun = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._source.aclose()

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Awaitable[Item]:
        if self._begun:
            return self._source.__anext__()
        # A generator takes over the hooks of the thread when its first step is asked for.
        self._begun = True
        hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(None, None)
        try:
            return self._source.__anext__()
        finally:
            sys.set_asyncgen_hooks(*hooks)
