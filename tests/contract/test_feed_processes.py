"""Case 110 with processes: a reader that is killed again and again misses nothing of what eight writers
commit."""

from __future__ import annotations

import asyncio
import os
import time
from random import Random
from typing import TYPE_CHECKING, Final

import pytest

from hf_async_store.testing.feed import by_entity, feed_of
from hf_async_store.testing.harness import FEED_COLLECTIONS, DisturbsFeeds
from tests.contract.feed_worker import SHARED
from tests.contract.harnesses import shared_harness
from tests.contract.workers import Workers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from hf_async_store.testing.harness import Harness

_WRITERS: Final = 8
_LAST: Final = "the-last-one"
_SILENCE: Final = 60.0
"""The seconds without an entry in their logs after which processes are said to hang."""


@pytest.fixture(params=["json", "json split", "sqlite", "postgresql", "dynamodb"])
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Harness]:
    with shared_harness(request, tmp_path) as made:
        yield made


class _Processes(Workers):
    def has_ended(self, pid: int) -> bool:
        changed, status = os.waitpid(pid, os.WNOHANG)
        if changed:
            self.running.discard(pid)
            assert os.waitstatus_to_exitcode(status) == 0
        return bool(changed)


async def _begin(harness: Harness) -> str:
    """The token before everything that the workers write."""
    async with harness.store(FEED_COLLECTIONS) as store, store.watch("notes") as changes:
        return changes.token


async def _create_last(harness: Harness) -> None:
    async with harness.store(FEED_COLLECTIONS) as store:
        await store.create_entity("notes", {"note_id": _LAST})


async def _disturb(harness: Harness) -> None:
    if isinstance(harness, DisturbsFeeds):
        async with harness.store(FEED_COLLECTIONS) as store:
            await store.get_entity("notes", "x")
            await harness.disturb(store)


def _rows(log: Path) -> list[tuple[str, str, int]]:
    rows = [each.split() for each in log.read_text().splitlines()[1:]]
    return [(row[0], row[1], int(row[2])) for row in rows]


def _check(harness: Harness, folder: Path, number: int) -> None:
    url = harness.url()
    assert url is not None
    random = Random(number)
    read, processes = folder / "read", _Processes("feed_worker.py")
    read.write_text(f"{asyncio.run(_begin(harness))}\n")
    logs = {f"w{each}": folder / f"w{each}" for each in range(_WRITERS)}
    for log in logs.values():
        log.write_text("-\n")
    try:
        writers = {
            processes.start("write", url, log, name, number): log for name, log in logs.items()
        }
        _follow(processes, writers, harness, random, read)
    finally:
        processes.end()
    told = by_entity(_rows(read))
    for log in logs.values():
        own = [each for each in _rows(log) if each[1] not in SHARED]
        for entity_id, versions in by_entity(own).items():
            assert told.get(entity_id) == versions
    for each in SHARED:
        versions = sorted(v for log in logs.values() for _, i, v in _rows(log) if i == each)
        assert told.get(each, []) == [("put", v) for v in versions]


class _Progress:
    """Whether logs grow: how long the whole takes depends on the load of the machine."""

    def __init__(self, logs: Iterable[Path]) -> None:
        self._logs = list(logs)
        self._size, self._since = -1, 0.0

    def check(self, message: str) -> None:
        size, now = sum(each.stat().st_size for each in self._logs), time.monotonic()
        if size != self._size:
            self._size, self._since = size, now
        assert now < self._since + _SILENCE, message


def _follow(
    processes: _Processes,
    writers: Mapping[int, Path],
    harness: Harness,
    random: Random,
    read: Path,
) -> None:
    """Let a reader read until the end, and kill it now and then as long as the writers run.

    Args:
        writers: their logs, by the ids of the processes.
    """
    url = harness.url()
    running, written, told = list(writers), _Progress(writers.values()), _Progress([read])
    reader = processes.start("read", url, read, _LAST, 0)
    while running:
        time.sleep(random.uniform(0.5, 1.5))
        written.check("the writers hang")
        processes.kill(reader)
        asyncio.run(_disturb(harness))
        reader = processes.start("read", url, read, _LAST, 0)
        running = [each for each in running if not processes.has_ended(each)]
    asyncio.run(_create_last(harness))
    while not processes.has_ended(reader):
        told.check("the reader hangs")
        time.sleep(0.05)


@pytest.mark.hf_sampled
@pytest.mark.timeout(300)
def test_110_a_killed_reader_misses_nothing(harness: Harness, tmp_path: Path) -> None:
    feed_of(harness)
    _check(harness, tmp_path, 60)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_110_a_killed_reader_misses_nothing_of_much(harness: Harness, tmp_path: Path) -> None:
    feed_of(harness)
    _check(harness, tmp_path, 300)
