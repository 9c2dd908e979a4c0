"""The streams of a store that are open: whoever left one, and however, `close()` ends it first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, TypeVar

from hf_async_store.driver import run_to_completion
from hf_async_store.errors import StoreClosedError
from hf_async_store.generators import Owned

Item = TypeVar("Item")


class OpenStreams:
    """The generators of an engine that have begun and not ended.

    A task that leaves a loop by `break` leaves its generator to the garbage collector and the event
    loop, which end it in a task of its own, some turns later. Until then the generator holds a
    connection, a lock or a snapshot, which must not outlive the store.
    """

    def __init__(self) -> None:
        self._idle: set[AsyncGenerator[Any, None]] = set()  # between two steps
        self._ending: dict[AsyncGenerator[Any, None], asyncio.Task[None]] = {}

    async def read(self, source: AsyncGenerator[Item, None]) -> AsyncGenerator[Item, None]:
        """What `source` gives.

        Raises:
            StoreClosedError: the store was closed before the end.
        """
        try:
            async for each in Owned(source):
                self._idle.add(source)
                yield each
                if source not in self._idle:
                    raise StoreClosedError("this store was closed while the stream was read")
                self._idle.discard(source)
        finally:
            if source in self._idle:
                self._end(source)
            ending = self._ending.get(source)
            if ending is not None:
                await run_to_completion(ending)
                self._ending.pop(source, None)

    def _end(self, source: AsyncGenerator[Any, None]) -> None:
        self._idle.discard(source)
        self._ending[source] = asyncio.ensure_future(_closed(source))

    async def close(self) -> None:
        """End those that nobody is reading at this moment, and wait for those that are ending.

        What a step that is under way holds is the engine's to release.
        """
        for each in list(self._idle):
            self._end(each)
        while self._ending:
            ending = list(self._ending.items())
            # What stood in the way of one of them must not keep the store open.
            await asyncio.gather(*(task for _, task in ending), return_exceptions=True)
            for source, _ in ending:
                self._ending.pop(source, None)


async def _closed(source: AsyncGenerator[Any, None]) -> None:
    await source.aclose()
