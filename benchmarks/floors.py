"""What the machine can do at all: the least code that does the same work, written by hand."""

from __future__ import annotations

import asyncio
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from measure import sync_data

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


class BareJournal:
    """An append and an fdatasync each, through one worker thread. Neither conditions nor memory."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._thread = ThreadPoolExecutor(1)

    def close(self) -> None:
        self._thread.shutdown()
        os.close(self._fd)

    async def append(self, data: bytes) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._write, data)

    def _write(self, data: bytes) -> None:
        os.write(self._fd, data)
        sync_data(self._fd)


class BareGroupCommit(BareJournal):
    """The same, where all that wait share one append and one fdatasync."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._waiting: list[tuple[bytes, asyncio.Future[None]]] = []
        self._flushing: asyncio.Task[None] | None = None

    async def save(self, line: bytes) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((line, done))
        if self._flushing is None:
            self._flushing = asyncio.create_task(self._flush())
        await done

    async def _flush(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            await self.append(b"".join([line for line, _ in batch]))
            for _, done in batch:
                done.set_result(None)
        self._flushing = None


class RewritingStore:
    """Writes its whole file at every save, as stores on a JSON file usually do."""

    def __init__(self, path: Path, machines: Mapping[str, Mapping[str, Any]]) -> None:
        self._path = path
        self._machines = dict(machines)
        self._thread = ThreadPoolExecutor(1)

    def close(self) -> None:
        self._thread.shutdown()

    async def save(self, entity: Mapping[str, Any]) -> None:
        self._machines[entity["machine_id"]] = entity
        await asyncio.get_running_loop().run_in_executor(self._thread, self._write)

    def _write(self) -> None:
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w") as file:
            file.write(json.dumps({"machines": self._machines}))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
