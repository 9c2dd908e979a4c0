"""Filled stores, each filled once: a workload that only reads takes it as it is, one that writes a copy.

What cannot be copied (what lives in one process, the tables of a DynamoDB server) is filled anew.
"""

from __future__ import annotations

import asyncio
import os
from typing import Final

from hf_async_store_bench.environments import Environments
from hf_async_store_bench.messages import Environment, Load, SystemUnderTest
from hf_async_store_bench.worker_group import WorkerGroup

_KEPT_BYTES: Final = 20_000_000  # of machines; what is larger is used once, and not worth the disk


class DatasetCache:
    """The stores of one run. What was kept goes when its environments do."""

    def __init__(self, environments: Environments, seed: int) -> None:
        self._environments = environments
        self._seed = seed
        self._kept: dict[tuple[SystemUnderTest, int, int], Environment] = {}

    async def group(self, system: SystemUnderTest, load: Load, *, writes: bool) -> WorkerGroup:
        """A group whose environment is filled. Give it back when it has ended."""
        keeps = system.copied and load.entities * load.size <= _KEPT_BYTES
        if not keeps or system.needs == "nothing" or (writes and system.needs == "dynamodb"):
            return await self._fill(system, load)
        key = (system, load.entities, load.size)
        if key not in self._kept:
            group = await self._fill(system, load)
            await group.end()
            await self._environments.analyze(system, group.environment)
            self._kept[key] = group.environment
        environment = self._kept[key]
        if writes:
            environment = await self._environments.copy(system, environment)
        return WorkerGroup(system, environment, load, self._seed)

    def give_back(self, group: WorkerGroup) -> None:
        """Remove what no other group will use."""
        if group.environment not in self._kept.values():
            self._environments.remove(group.system, group.environment)

    async def _fill(self, system: SystemUnderTest, load: Load) -> WorkerGroup:
        group = WorkerGroup(system, self._environments.make(system), load, self._seed)
        try:
            await group.fill()
        except BaseException:
            await group.end()
            self._environments.remove(system, group.environment)
            raise
        return group


async def settled() -> None:
    """What filling and copying left to write is written: it would disturb what is measured next."""
    await asyncio.to_thread(os.sync)
