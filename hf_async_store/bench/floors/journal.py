"""Beneath the JSON store: lines appended to a file and synced."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec

if TYPE_CHECKING:
    from hf_async_store.bench.data import Entity
    from hf_async_store.bench.plan import Place

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
            try:
                await self.append(b"".join([line for line, _ in batch]))
            except OSError as exc:
                for _, done in batch:
                    done.set_exception(exc)
            else:
                for _, done in batch:
                    done.set_result(None)
        self._flushing = None


class JournalEach:
    """A file of machines, one line each: one append and one sync for each call."""

    def __init__(self, journal: BareJournal) -> None:
        self._journal = journal

    @classmethod
    async def open(cls, place: Place) -> Self:
        return cls(BareJournal(Path(place.folder) / "floor", durable=place.durable))

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
        await self._journal.append(_encode(machine) + b"\n")

    async def save_many(self, machines: Sequence[Entity]) -> None:
        await self._journal.append(_lines(machines))

    create_many = save_many

    async def acquire(self, request: Entity, machines: Sequence[Entity]) -> None:
        await self._journal.append(_lines([request, *machines]))


class JournalTogether:
    """The same, where all that wait share one append and one sync."""

    def __init__(self, journal: BareGroupCommit) -> None:
        self._journal = journal
        self._each = JournalEach(journal)

    @classmethod
    async def open(cls, place: Place) -> Self:
        return cls(BareGroupCommit(Path(place.folder) / "floor", durable=place.durable))

    async def close(self) -> None:
        await self._each.close()

    async def fill(self, machines: Sequence[Entity]) -> None:
        await self._each.fill(machines)

    async def read_back(self, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
        return await self._each.read_back(ids)

    async def save(self, machine: Entity) -> None:
        await self._journal.save(_encode(machine) + b"\n")


def _lines(machines: Sequence[Entity]) -> bytes:
    return b"".join([_encode(each) + b"\n" for each in machines])


def sync_data(fd: int) -> None:
    """As durable as the store's own sync: macOS needs to be told to pass the drive's cache."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fdatasync(fd)
