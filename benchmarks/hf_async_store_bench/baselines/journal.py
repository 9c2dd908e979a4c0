"""Baselines of the JSON engine: lines appended to a file and synced."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec

from hf_async_store_bench.baselines.batching import Batching

if TYPE_CHECKING:
    from hf_async_store_bench.data import Entity
    from hf_async_store_bench.messages import Environment

_encode = msgspec.json.Encoder().encode


class BareJournal:
    """An append and a sync each, through one worker thread. Neither conditions nor memory."""

    def __init__(self, path: Path, *, durable: bool = True) -> None:
        self.path = path
        self._durable = durable
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._thread = ThreadPoolExecutor(1)

    def close(self) -> None:
        self._thread.shutdown()
        os.close(self._fd)

    async def save(self, line: bytes) -> None:
        await self.append(line)

    async def append(self, data: bytes) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._write, data)

    def _write(self, data: bytes) -> None:
        os.write(self._fd, data)
        if self._durable:
            sync_data(self._fd)


class BareGroupCommit(BareJournal):
    """The same, where all that wait share one append and one sync."""

    def __init__(self, path: Path, *, durable: bool = True) -> None:
        super().__init__(path, durable=durable)
        self._saves = Batching(self._save_all, size=4096)

    async def save(self, line: bytes) -> None:
        await self._saves(line)

    async def _save_all(self, lines: Sequence[bytes]) -> Sequence[None]:
        await self.append(b"".join(lines))
        return [None] * len(lines)


class JournalEach:
    """A file of machines, one line each: one append and one sync for each call."""

    journal_type: type[BareJournal] = BareJournal

    def __init__(self, environment: Environment) -> None:
        path = Path(environment.folder) / "baseline"
        self._journal = self.journal_type(path, durable=environment.durable)

    @classmethod
    async def open(cls, environment: Environment) -> Self:
        return cls(environment)

    async def close(self) -> None:
        self._journal.close()

    async def fill(self, machines: Sequence[Entity]) -> None:
        await self._journal.append(_lines(machines))

    async def read_back(self, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
        stored: dict[str, Mapping[str, Any]] = {}
        for line in self._journal.path.read_bytes().splitlines():
            machine = msgspec.json.decode(line)
            stored[machine.get("machine_id", "")] = machine
        return [stored.get(each) for each in ids]

    async def save(self, machine: Entity) -> None:
        await self._journal.save(_encode(machine) + b"\n")

    async def save_many(self, machines: Sequence[Entity]) -> None:
        await self._journal.append(_lines(machines))

    create_many = save_many

    async def acquire(self, request: Entity, machines: Sequence[Entity]) -> None:
        await self._journal.append(_lines([request, *machines]))


class JournalTogether(JournalEach):
    """The same, where all saves that wait share one append and one sync."""

    journal_type = BareGroupCommit


def _lines(machines: Sequence[Entity]) -> bytes:
    return b"".join([_encode(each) + b"\n" for each in machines])


def sync_data(fd: int) -> None:
    """As durable as the store's own sync: macOS needs to be told to flush the drive's cache."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fdatasync(fd)
