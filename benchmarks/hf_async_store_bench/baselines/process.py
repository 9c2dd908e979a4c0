"""The baseline of a whole process: what any program pays that uses asyncio."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

from hf_async_store_bench.data import Entity
from hf_async_store_bench.messages import Environment

_NOTHING: Final = "import asyncio; asyncio.run(asyncio.sleep(0))"


class StartOfPython:
    """A process that runs asyncio.run of nothing."""

    @classmethod
    async def open(cls, environment: Environment) -> Self:
        return cls()

    async def close(self) -> None:
        """There is nothing to close."""

    async def fill(self, machines: Sequence[Entity]) -> None:
        """It stores nothing."""

    async def read_back(self, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
        return []

    async def run_process(self, machine: str) -> None:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", _NOTHING)
        if await process.wait():
            raise RuntimeError(f"exit code {process.returncode}")
