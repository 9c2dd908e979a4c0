"""The recorder: what the feeds told from the beginning of a run to its end, whoever made the changes."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Set
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import Final, TypeAlias

from hf_async_store import EntityChange, StorageError, StorageStrategy
from hf_async_store_bench.demo.write_log import Answer

EntityKey: TypeAlias = tuple[str, str]  # a collection and an id
WATCHED: Final = ("requests", "machines")
_PART: Final = 500  # changes after which a new watch goes on from the token of the last one
_PATIENCE: Final = 30.0


class Recorder:
    """The changes of each entity in the order in which they came, and when each of them first came."""

    def __init__(self) -> None:
        self.heard: defaultdict[EntityKey, list[EntityChange]] = defaultdict(list)
        self.came: dict[tuple[EntityKey, Answer], float] = {}
        self.errors: list[str] = []
        self._tokens: dict[str, str] = {}
        self._another = asyncio.Event()

    @asynccontextmanager
    async def recording(self, store: StorageStrategy) -> AsyncIterator[None]:
        """Record what is committed from now on; the second time, go on after what was recorded."""
        for name in WATCHED:
            if name not in self._tokens:
                async with store.watch(name) as changes:
                    self._tokens[name] = changes.token
        tasks = [asyncio.create_task(self._follow(store, name)) for name in WATCHED]
        try:
            yield
        finally:
            for each in tasks:
                each.cancel()
            await asyncio.wait(tasks)

    async def _follow(self, store: StorageStrategy, name: str) -> None:
        try:
            while True:
                async with store.watch(name, since=self._tokens[name]) as changes:
                    for _ in range(_PART):
                        self._take(name, await anext(changes))
        except StorageError as exc:
            self.errors.append(f"{name}: {exc!r}")

    def _take(self, name: str, change: EntityChange) -> None:
        place = (name, change.id)
        self.heard[place].append(change)
        self.came.setdefault((place, what_came(change)), monotonic())
        self._tokens[name] = change.token
        self._another.set()

    async def catch_up(self, expected: Set[tuple[EntityKey, Answer]]) -> None:
        """Wait until all of these have come, unless that takes too long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                while not expected <= self.came.keys():
                    self._another.clear()
                    await self._another.wait()


def what_came(change: EntityChange) -> Answer:
    """What the writer got as an answer."""
    return change.version if change.kind == "put" else "deleted"
