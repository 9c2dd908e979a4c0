"""The open streams of a store: `close()` ends those that were abandoned before their end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, TypeVar

from hf_async_store.driver import run_to_completion
from hf_async_store.errors import StoreClosedError
from hf_async_store.generators import Owned

Item = TypeVar("Item")


class OpenStreams:
    """The generators of an engine that have started and not ended.

    If a task leaves an `async for` loop by `break`, the generator is closed by the garbage collector
    and the event loop, in a separate task and some iterations of the event loop later. Until then it
    holds a connection, a lock or a snapshot, which must be released before the store is closed.
    """

    def __init__(self) -> None:
        self._suspended: set[AsyncGenerator[Any, None]] = set()  # started, suspended at a yield
        self._closing: dict[AsyncGenerator[Any, None], asyncio.Task[None]] = {}

    async def read(self, source: AsyncGenerator[Item, None]) -> AsyncGenerator[Item, None]:
        """Yield the items of `source`.

        Raises:
            StoreClosedError: the store was closed before the stream ended.
        """
        try:
            async for each in Owned(source):
                self._suspended.add(source)
                yield each
                if source not in self._suspended:
                    raise StoreClosedError("this store was closed while the stream was read")
                self._suspended.discard(source)
        finally:
            if source in self._suspended:
                self._start_closing(source)
            closing = self._closing.get(source)
            if closing is not None:
                await run_to_completion(closing)
                self._closing.pop(source, None)

    def _start_closing(self, source: AsyncGenerator[Any, None]) -> None:
        self._suspended.discard(source)
        self._closing[source] = asyncio.ensure_future(_aclose(source))

    async def close(self) -> None:
        """Close the generators that are not running at this moment, and wait until they have ended.

        A generator that is running, because a task awaits its next item, is not closed here: the
        engine releases its resources.
        """
        for each in list(self._suspended):
            self._start_closing(each)
        while self._closing:
            closing = list(self._closing.items())
            # An error in one of the generators must not prevent the store from closing.
            await asyncio.gather(*(task for _, task in closing), return_exceptions=True)
            for source, _ in closing:
                self._closing.pop(source, None)


async def _aclose(source: AsyncGenerator[Any, None]) -> None:
    await source.aclose()
