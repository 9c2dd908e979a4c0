"""Comparison of two commits: a slowdown is detected, noise is not reported, and git is not changed."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hf_async_store
from hf_async_store_bench.messages import Load
from hf_async_store_bench.statistics import Interval
from hf_async_store_bench.two_commits import Change, as_table

SLOW = """
import asyncio as _asyncio
from hf_async_store.strategies.json import JSONStorageStrategy as _Strategy

_save = _Strategy.save_entity


async def _slow(*given, **more):
    await _asyncio.sleep(0.4)
    return await _save(*given, **more)


_Strategy.save_entity = _slow
"""


def git(repository: Path, *words: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *words]
    return subprocess.run(
        command, cwd=repository, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The product in a separate repository, whose second commit has slower saves."""
    folder = tmp_path / "repository"
    product = Path(str(hf_async_store.__file__)).parent
    shutil.copytree(
        product, folder / "hf_async_store", ignore=shutil.ignore_patterns("__pycache__", "testing")
    )
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "base")
    with (folder / "hf_async_store" / "strategies" / "json" / "__init__.py").open("a") as file:
        file.write(SLOW)
    git(folder, "commit", "--quiet", "--all", "--message", "slow")
    return folder


@pytest.mark.timeout(280)
@pytest.mark.long
def test_a_slowdown_is_found_and_the_repository_is_not_changed(repository: Path) -> None:
    command = [
        sys.executable, "-m", "hf_async_store_bench.two_commits", "HEAD~1", "--only", "json",
        "--workload", "save", "--visits", "3", "--duration", "0.4",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=repository, capture_output=True, text=True, timeout=270, check=False
    )
    assert done.returncode == 3, done.stdout + done.stderr
    (row,) = [line for line in done.stdout.splitlines() if "save, 64 tasks" in line]
    assert row.endswith("SLOWER")
    assert git(repository, "worktree", "list").count("\n") == 1
    assert git(repository, "status", "--short") == ""


def test_an_unknown_commit_is_reported_by_git(repository: Path) -> None:
    command = [sys.executable, "-m", "hf_async_store_bench.two_commits", "no-such-commit"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no-such-commit" in done.stderr
    assert "Traceback" not in done.stderr


def change(first: float, second: float | None, half: float = 0.05) -> Change:
    def around(value: float) -> Interval:
        return Interval(value, value * math.exp(-half), value * math.exp(half))

    again = None if second is None else around(second)
    return Change("json", Load(workload="save"), 100.0, 100.0 * first, around(first), again)


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        (0.8, 0.82, "SLOWER"),
        (1.2, 1.25, "faster"),
        (0.8, 1.0, "same within the noise"),
        (0.8, 1.2, "same within the noise"),
        (0.8, None, "same within the noise"),
    ],
)
def test_a_change_must_be_confirmed_by_a_second_measurement(
    first: float, second: float | None, verdict: str
) -> None:
    assert change(first, second).verdict == verdict


def test_only_apparent_changes_are_measured_again() -> None:
    assert change(0.8, None).is_suspect
    assert not change(0.98, None).is_suspect  # inside of the interval
    assert not change(0.98, None, half=0.001).is_suspect  # significant, but too small


def test_changes_are_listed_first() -> None:
    table = as_table([change(1.0, None), change(1.2, 1.2), change(0.8, 0.8)])
    assert [each[-1] for each in table.rows] == ["SLOWER", "faster", "same within the noise"]
