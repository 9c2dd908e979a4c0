"""How a baseline is opened in an environment, and closed."""

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
