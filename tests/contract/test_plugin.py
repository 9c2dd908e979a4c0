"""The pytest plugin of the contract suite, in a pytest run of another project."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

_SUITE = """
import pytest
from hf_async_store.testing.concurrency import seeded
from hf_async_store.testing.harness import skip_engine

@pytest.fixture
def harness():
    skip_engine("wonderdb", "there is no server here")

def test_of_an_engine(harness):
    pass

def test_of_the_same_engine(harness):
    pass

def test_that_passes():
    pass

def test_with_a_seed():
    with seeded() as random:
        print("drew", random.randrange(10**9))
"""

_SETTINGS = """
[pytest]
asyncio_default_fixture_loop_scope = function
filterwarnings = error
"""


def run(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "test_suite.py").write_text(_SUITE)
    (tmp_path / "pytest.ini").write_text(_SETTINGS)
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def drawn(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [each for each in result.stdout.splitlines() if "drew" in each]


def test_a_skipped_engine_is_reported_or_fails_the_run(tmp_path: Path) -> None:
    line = "engine left out: wonderdb (there is no server here)"
    lenient = run(tmp_path, "-s", "--hf-seed=7", HF_ASYNC_STORE_REQUIRE_ENGINES="")
    assert lenient.returncode == pytest.ExitCode.OK, lenient.stdout
    assert lenient.stdout.splitlines().count(line) == 1
    strict = run(tmp_path, "-s", "--hf-seed=7", HF_ASYNC_STORE_REQUIRE_ENGINES="all")
    assert strict.returncode == pytest.ExitCode.TESTS_FAILED, strict.stdout
    assert strict.stdout.splitlines().count(f"FAILED {line}") == 1
    assert drawn(lenient) == drawn(strict) != [], "the same seed makes the same choices"


def test_nothing_is_reported_if_no_engine_was_skipped(tmp_path: Path) -> None:
    result = run(tmp_path, "-k", "passes or seed", HF_ASYNC_STORE_REQUIRE_ENGINES="all")
    assert result.returncode == pytest.ExitCode.OK, result.stdout
    assert "left out" not in result.stdout
