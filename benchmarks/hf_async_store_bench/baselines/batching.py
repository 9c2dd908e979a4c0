"""Waiting operations that go out together, as one would write it by hand."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import repeat
from typing import Any, Generic, TypeVar

from hf_async_store_bench.data import Entity

Item = TypeVar("Item")


class Batching(Generic[Item]):
    """Everything that waits when a batch ends is the next one, of a bounded size; so many batches at
    once. `send` carries out one, and gives a result each, in order, or nothing."""

    def __init__(
        self,
        send: Callable[[Sequence[Item]], Awaitable[Sequence[Any] | None]],
        size: int,
        at_once: int = 1,
    ) -> None:
        self._send = send
        self._size = size
        self._idle = at_once
        self._waiting: deque[tuple[Item, asyncio.Future[Any]]] = deque()
        self._senders: set[asyncio.Task[None]] = set()

    async def __call__(self, item: Item) -> Any:
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, done))
        if self._idle:
            self._idle -= 1
            sender = asyncio.create_task(self._run())
            self._senders.add(sender)
            sender.add_done_callback(self._senders.discard)
        return await done

    async def _run(self) -> None:
        while self._waiting:
            count = min(self._size, len(self._waiting))
            batch = [self._waiting.popleft() for _ in range(count)]
            try:
                results = await self._send([item for item, _ in batch])
            except Exception as exc:  # noqa: BLE001  # it belongs to those who wait
                for _, done in batch:
                    done.set_exception(exc)
            else:
                for (_, done), result in zip(batch, results or repeat(None), strict=False):
                    done.set_result(result)
        self._idle += 1


class BatchedOperations:
    """A baseline whose saves and gets wait for one another."""

    _saves: Batching[Entity]
    _gets: Batching[str]

    async def save(self, machine: Entity) -> None:
        await self._saves(machine)

    async def get(self, machine: str) -> Any:
        return await self._gets(machine)
