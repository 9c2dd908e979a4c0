"""Cases 104 and 105 with processes that are killed, stopped and blocked: nobody works on what another
one holds."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import TYPE_CHECKING, Final

import pytest

from tests.contract.harnesses import shared_harness
from tests.contract.workers import Workers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hf_async_store.testing.harness import Harness

_WORKERS: Final = 8
_LEASE: Final = 0.8
_EVIL: Final = 0.1
"""The probability that a worker misbehaves with an item."""


@pytest.fixture(params=["json", "sqlite", "postgresql", "dynamodb"])
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Harness]:
    with shared_harness(request, tmp_path) as made:
        yield made


class _Pool(Workers):
    """Worker processes: one that was killed is replaced, one that was stopped continues after its lease."""

    def __init__(self, url: str, log: Path) -> None:
        super().__init__("claim_worker.py")
        self._arguments = url, log
        self._seed = 0
        self._stopped: dict[int, float] = {}  # when they continue
        self.killed = self.stopped = 0
        for _ in range(_WORKERS):
            self._start()

    def _start(self) -> None:
        self._seed += 1
        self.start(*self._arguments, self._seed, _LEASE, _EVIL)

    def run(self) -> None:
        while self.running:
            for pid in list(self.running):
                self._look_at(pid)
            time.sleep(0.02)

    def _look_at(self, pid: int) -> None:
        changed, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        if changed and os.WIFSTOPPED(status):
            self.stopped += 1
            self._stopped[pid] = time.monotonic() + 1.5 * _LEASE
        elif changed:
            self.running.discard(pid)
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                self.killed += 1
                self._start()
            else:
                assert os.waitstatus_to_exitcode(status) == 0
        elif self._stopped.get(pid, float("inf")) < time.monotonic():
            del self._stopped[pid]
            os.kill(pid, signal.SIGCONT)


def _overlaps(log: Path) -> list[str]:
    """The ids that two worked on at once."""
    last: dict[str, float] = {}
    found = []
    rows = [line.split() for line in log.read_text().splitlines()]
    for item, began, ended in sorted(rows, key=lambda row: float(row[1])):
        if float(began) < last.get(item, 0.0):
            found.append(item)
        last[item] = float(ended)
    return found


async def _fill(harness: Harness, number: int) -> None:
    async with harness.store() as store:
        await store.create_entities(
            "items", [{"item_id": f"{each:05}", "label": "new"} for each in range(number)]
        )


async def _done(harness: Harness) -> dict[object, int]:
    async with harness.store() as store:
        return dict(await store.count_by("items", "count"))


def _check(harness: Harness, log: Path, number: int) -> None:
    url = harness.url()
    assert url is not None
    asyncio.run(_fill(harness, number))
    pool = _Pool(url, log)
    try:
        pool.run()
    finally:
        pool.end()
    assert _overlaps(log) == []
    assert asyncio.run(_done(harness)) == {1: number}, "each was finished once"
    assert pool.killed + pool.stopped > 0


@pytest.mark.hf_sampled
def test_105_no_item_is_worked_on_twice_at_once(harness: Harness, tmp_path: Path) -> None:
    _check(harness, tmp_path / "log", 60)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_105_no_item_of_many_is_worked_on_twice_at_once(harness: Harness, tmp_path: Path) -> None:
    _check(harness, tmp_path / "log", 2000)
