"""Nested async generators: generators that read from other generators."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")


class Owned(AsyncIterator[Item], Generic[Item]):
    """An async generator that the code around an `async with` block reads and closes.

    In contrast to `contextlib.aclosing`, the generator is not registered with the event loop. An event
    loop that shuts down closes all registered generators concurrently, which fails for one that is
    already being closed by its owner, another generator. The outermost generator remains registered,
    and closes the others.
    """

    __slots__ = ("_source", "_started")

    def __init__(self, source: AsyncGenerator[Item, None]) -> None:
        self._source = source
        self._started = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._source.aclose()

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Awaitable[Item]:
        if self._started:
            return self._source.__anext__()
        # A generator calls the hooks of its thread when `__anext__` is called for the first time.
        self._started = True
        hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(None, None)
        try:
            return self._source.__anext__()
        finally:
            sys.set_asyncgen_hooks(*hooks)
