"""A process is killed at every file call of a commit, compaction, close and adoption (contract 82).

The process is killed before each call that changes a file, and in the middle of each write; a plain
run covers every thirty-sixth of these steps, the long tests all. The work is done by `crash_driver.py`, a
program that forks, in one process per processor.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hf_async_store.testing.repetitions import random_of_test
from tests.json.crash_driver import Spec

_ROOT = Path(__file__).parents[2]
_LANES = 2


async def _swept(workload: str, layout: str, *, at_least: int, every: int = 1, **more: Any) -> None:
    """Kill the workload at one step after another, and assert that no check fails.

    Args:
        at_least: the minimum number of steps; with fewer, the workload does not do what it should.
        every: 1 for every step, 36 for every thirty-sixth, from a random one on.
    """
    lanes = _LANES * every
    chosen = range(random_of_test().randrange(every), lanes, every)
    memory = Path("/dev/shm")
    where = str(memory) if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="hf-crash-", dir=where) as folder:
        specs = [
            Spec(f"{folder}/{lane}", workload, layout, lane=lane, lanes=lanes, **more)
            for lane in chosen
        ]
        reports = await asyncio.gather(*map(_lane, specs))
    problems = [each for report in reports for each in report["problems"]]
    assert not problems, "\n".join(problems)
    killed = sorted(each for report in reports for each in report["killed"])
    if workload == "crowd":  # in which no run makes the calls of another
        assert len(killed) >= at_least // every
    else:
        [steps] = {report["steps"] for report in reports}
        assert steps >= at_least
        assert killed == [each for each in range(steps) if each % lanes in chosen]


async def _lane(spec: Spec) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.json.crash_driver", msgspec.json.encode(spec).decode()]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=_ROOT, stdout=asyncio.subprocess.PIPE
    )
    try:
        out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, "the driver itself failed; see its output above"
    report: dict[str, Any] = json.loads(out)
    return report


_EVERY = [
    pytest.param(36, id="every thirty-sixth"),
    pytest.param(1, id="every", marks=pytest.mark.long),
]


@pytest.mark.parametrize("every", _EVERY)
async def test_82_killed_at_a_step_of_one_file(every: int) -> None:
    await _swept("script", "single_file", at_least=120, every=every, readers=2)


@pytest.mark.parametrize("every", _EVERY)
async def test_82_killed_at_a_step_of_split_files(every: int) -> None:
    await _swept("script", "split_files", at_least=110, every=every, readers=2)


@pytest.mark.parametrize("every", _EVERY)
async def test_82_killed_at_a_step_after_a_failed_sync(every: int) -> None:
    await _swept("failed sync", "split_files", at_least=90, every=every)


@pytest.mark.parametrize("every", _EVERY)
async def test_82_killed_while_compression_is_switched_on(every: int) -> None:
    packed = {"enable_compression": True}
    await _swept("take over", "single_file", at_least=35, every=every, settings=packed)


@pytest.mark.parametrize("every", _EVERY)
async def test_82_killed_during_recovery_from_the_journal(every: int) -> None:
    await _swept("adopt", "split_files", at_least=35, every=every, adopt="journal")


@pytest.mark.parametrize("every", _EVERY)
async def test_82_killed_during_salvage(every: int) -> None:
    await _swept("adopt", "split_files", at_least=35, every=every, adopt="salvage")


@pytest.mark.parametrize("every", _EVERY)
async def test_82_killed_while_each_commit_updates_the_files(every: int) -> None:
    settings = {"update_files": "after each commit"}
    await _swept("script", "split_files", at_least=150, every=every, settings=settings)


@pytest.mark.parametrize("every", _EVERY)
async def test_110_killed_while_the_changes_are_kept(every: int) -> None:
    await _swept("script", "split_files", at_least=120, every=every, readers=2, feed=True)


@pytest.mark.parametrize("every", _EVERY)
async def test_110_killed_while_each_commit_updates_the_files(every: int) -> None:
    settings = {"update_files": "after each commit"}
    await _swept("script", "single_file", at_least=120, every=every, settings=settings, feed=True)


@pytest.mark.parametrize("every", _EVERY)
async def test_110_killed_after_a_failed_sync(every: int) -> None:
    await _swept("failed sync", "single_file", at_least=90, every=every, feed=True)


@pytest.mark.long
async def test_110_killed_with_concurrent_tasks() -> None:
    settings = {"write_buffer_size": 300}
    await _swept("crowd", "split_files", at_least=90, settings=settings, feed=True)


@pytest.mark.long
@pytest.mark.parametrize("layout", ["single_file", "split_files"])
async def test_82_killed_at_every_step_with_compression(layout: str) -> None:
    packed = {"enable_compression": True}
    await _swept("script", layout, at_least=90, readers=1, settings=packed)


@pytest.mark.long
@pytest.mark.parametrize("layout", ["single_file", "split_files"])
async def test_82_killed_with_concurrent_tasks(layout: str) -> None:
    """Tasks whose commits are batched, with concurrent compactions, some triggered by the journal size."""
    await _swept("crowd", layout, at_least=90, settings={"write_buffer_size": 300})


@pytest.mark.long
@pytest.mark.parametrize("layout", ["single_file", "split_files"])
async def test_82_killed_without_backups(layout: str) -> None:
    await _swept("script", layout, at_least=90, settings={"backup_enabled": False})


@pytest.mark.long
@pytest.mark.parametrize("adopt", ["file", "journal", "salvage"])
@pytest.mark.parametrize("layout", ["single_file", "split_files"])
async def test_82_killed_while_the_file_or_the_journal_is_adopted(layout: str, adopt: str) -> None:
    await _swept("adopt", layout, at_least=30, adopt=adopt)


@pytest.mark.long
async def test_82_killed_after_a_failed_sync_of_one_file() -> None:
    await _swept("failed sync", "single_file", at_least=90)


@pytest.mark.long
async def test_82_killed_while_split_files_are_packed() -> None:
    await _swept("take over", "split_files", at_least=35, settings={"enable_compression": True})
