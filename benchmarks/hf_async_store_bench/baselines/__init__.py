"""Baselines: the least code by hand that stores the same on the same driver: the same columns or indexes,
and a version that each write raises. They decide no conditions, check no values and tell no outcomes.
The docstring of each says in the report how it is made."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Self

from hf_async_store_bench.messages import Environment


class Baseline:
    """Whatever it opens is closed by its stack."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.stack = AsyncExitStack()

    @classmethod
    async def open(cls, environment: Environment) -> Self:
        baseline = cls(environment)
        await baseline.start()
        return baseline

    async def start(self) -> None:
        """Open what needs an event loop."""

    async def close(self) -> None:
        await self.stack.aclose()
