"""Baselines of the JSON engine: lines appended to a file and synced; the start of a process."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from hf_async_store_bench.baselines import Baseline
from hf_async_store_bench.baselines.batching import Batching
from hf_async_store_bench.data import Entity
from hf_async_store_bench.messages import Environment

_encode_lines = msgspec.json.Encoder().encode_lines


class JournalEach(Baseline):
    """Encodes a machine, appends the line to a file, fdatasync, in one worker thread; no indexes,
    no conditions, nothing held in memory."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self._path = Path(environment.folder) / "baseline"
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._thread = ThreadPoolExecutor(1)
        self.stack.callback(os.close, self._fd)
        self.stack.callback(self._thread.shutdown)

    async def read_back(self, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
        stored: dict[str, Mapping[str, Any]] = {}
        for line in self._path.read_bytes().splitlines():
            machine = msgspec.json.decode(line)
            stored[machine.get("machine_id", "")] = machine
        return [stored.get(each) for each in ids]

    async def save_many(self, machines: Sequence[Entity]) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._append, _encode_lines(machines))

    fill = create_many = save_many

    async def save(self, machine: Entity) -> None:
        await self.save_many([machine])

    async def acquire(self, request: Entity, machines: Sequence[Entity]) -> None:
        await self.save_many([request, *machines])

    def _append(self, lines: bytes) -> None:
        os.write(self._fd, lines)
        if self.environment.durable:
            sync_data(self._fd)


class JournalTogether(JournalEach):
    """The same; all lines that wait share one append and one fdatasync."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self._saves = Batching(self.save_many, size=4096)

    async def save(self, machine: Entity) -> None:
        await self._saves(machine)


def sync_data(fd: int) -> None:
    """As durable as the store's own sync: macOS needs to be told to flush the drive's cache."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fdatasync(fd)


class StartOfPython(Baseline):
    """A process that runs asyncio.run of nothing."""

    async def fill(self, machines: Sequence[Entity]) -> None:
        """It stores nothing."""

    async def read_back(self, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
        return []

    async def run_process(self, machine: str) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "import asyncio; asyncio.run(asyncio.sleep(0))"
        )
        if await process.wait():
            raise RuntimeError(f"exit code {process.returncode}")
