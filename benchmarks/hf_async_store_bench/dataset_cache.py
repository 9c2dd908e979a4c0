"""Filled stores, each filled once: a workload that only reads takes it as it is, one that writes a copy.

A file is copied as a file, a PostgreSQL database as the template of another. What neither can be
done with (what lives in one process, the tables of a DynamoDB server) is filled anew.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Final

from hf_async_store_bench.worker_group import WorkerGroup

if TYPE_CHECKING:
    from hf_async_store_bench.environments import Environments
    from hf_async_store_bench.messages import Environment, Load, SystemUnderTest

_KEPT_BYTES: Final = 20_000_000
"""Of machines in a store. What is larger is used once, and not worth the disk."""

_LARGER: Final = 1.5
"""Times as long as a machine of a small store takes one of a store that outgrows its caches."""

_UNKNOWN: Final = 0.1
"""The part of filling that grows with the machines, at least: of one size nothing more is known."""


class DatasetCache:
    """The stores of one run. What was kept goes when its environments do."""

    def __init__(self, environments: Environments, seed: int) -> None:
        self._environments = environments
        self._seed = seed
        self._kept: dict[tuple[SystemUnderTest, int, int], asyncio.Task[Environment]] = {}
        self._filled: dict[str, dict[int, float]] = {}

    def expected(self, system: SystemUnderTest, load: Load) -> float:
        """The seconds that filling it would take, as far as is known: to start, and for each byte."""
        known = self._filled.get(system.name)
        if known is None:
            return 0.0
        start = min(known.values())
        most = max(known)
        each = max(known[most] - start, _UNKNOWN * start) / most
        return start + _LARGER * each * load.entities * load.size

    async def group(self, system: SystemUnderTest, load: Load, *, writes: bool) -> WorkerGroup:
        """A group whose target is filled. Give it back when it has ended.

        Raises:
            SkippedError, BrokenError.
        """
        keeps = system.copied and system.needs != "nothing"
        keeps = keeps and load.entities * load.size <= _KEPT_BYTES
        if not keeps or (writes and not self._environments.can_copy(system)):
            return await self._fill(system, self._environments.make(system), load)
        environment = await self._original(system, load)
        if writes:
            environment = await self._environments.copy(system, environment)
        return WorkerGroup(system, environment, load, self._seed, filled=True)

    def give_back(self, group: WorkerGroup) -> None:
        """Remove what no other group will use."""
        originals = [each.result() for each in self._kept.values() if _is_there(each)]
        if group.environment not in originals:
            self._environments.remove(group.system, group.environment)

    async def _original(self, system: SystemUnderTest, load: Load) -> Environment:
        key = (system, load.entities, load.size)
        if key not in self._kept:
            self._kept[key] = asyncio.create_task(self._made(system, load))
        return await asyncio.shield(self._kept[key])

    async def _made(self, system: SystemUnderTest, load: Load) -> Environment:
        group = await self._fill(system, self._environments.make(system), load)
        await group.end()
        await self._environments.analyze(system, group.environment)
        return group.environment

    async def _fill(
        self, system: SystemUnderTest, environment: Environment, load: Load
    ) -> WorkerGroup:
        group = WorkerGroup(system, environment, load, self._seed)
        began = time.monotonic()
        try:
            await group.fill()
        except BaseException:
            await group.end()
            self._environments.remove(system, environment)
            raise
        known = self._filled.setdefault(system.name, {})
        known[load.entities * load.size] = time.monotonic() - began
        return group


async def settled() -> None:
    """What filling and copying left to write is written: it would disturb what is measured next."""
    await asyncio.to_thread(os.sync)


def _is_there(task: asyncio.Task[Environment]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None
