"""The pytest plugin of the contract suite, in a pytest run of another project."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from hf_async_store.testing.random_choices import FULL_VARIABLE
from tests.pytest_process import PYTEST

if TYPE_CHECKING:
    from pathlib import Path

_SUITE = """
import pytest
from hf_async_store.testing.concurrency import seeded
from hf_async_store import Capabilities
from hf_async_store.testing.harness import (
    CutsConnections, DropsResponses, skip_engine, skip_fault
)

@pytest.fixture
def harness():
    skip_engine("wonderdb", "there is no server here")

def test_of_an_engine(harness):
    pass

def test_of_the_same_engine(harness):
    pass

def test_that_passes():
    pass

class Harness:
    capabilities = Capabilities(engine="wonderdb", durable=True, multi_process=True)
    impossible_faults = (CutsConnections,)

@pytest.mark.parametrize("fault", [CutsConnections, DropsResponses])
def test_of_a_fault(fault):
    skip_fault(Harness(), fault)

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
        [*PYTEST, *arguments],
        cwd=tmp_path,
        # A full run of this project must not make this one full.
        env={**os.environ, FULL_VARIABLE: "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def drawn(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [each for each in result.stdout.splitlines() if "drew" in each]


def test_a_fault_that_was_not_tried_is_reported_if_it_can_happen(tmp_path: Path) -> None:
    lines = run(tmp_path, "-k", "fault").stdout.splitlines()
    not_tried = [each for each in lines if each.startswith("fault not tried")]
    assert not_tried == [
        "fault not tried, because the harness does not implement it: DropsResponses"
    ]


def test_a_skipped_engine_is_reported_or_fails_the_run(tmp_path: Path) -> None:
    line = "engine left out: wonderdb (there is no server here)"
    lenient = run(tmp_path, "-s", "--hf-seed=7", HF_ASYNC_STORE_REQUIRE_ENGINES="")
    assert lenient.returncode == pytest.ExitCode.OK, lenient.stdout
    assert lenient.stdout.splitlines().count(line) == 1
    strict = run(tmp_path, "-s", "--hf-seed=7", HF_ASYNC_STORE_REQUIRE_ENGINES="all")
    assert strict.returncode == pytest.ExitCode.TESTS_FAILED, strict.stdout
    assert strict.stdout.splitlines().count(f"FAILED {line}") == 1
    assert drawn(lenient) == drawn(strict) != [], "the same seed makes the same choices"


_VARIANTS = """
import pytest

@pytest.mark.hf_sampled
@pytest.mark.parametrize("number", range(18))
def test_of_variants(number):
    pass

@pytest.mark.hf_sampled(by="engine")
@pytest.mark.parametrize("engine", ["one", "other"])
@pytest.mark.parametrize("number", range(3))
def test_of_engines(engine, number):
    pass

@pytest.mark.hf_sampled(by="module")
def test_of_a_module():
    pass

@pytest.mark.hf_sampled(by="module")
@pytest.mark.parametrize("number", range(2))
def test_of_the_same_module(number):
    pass

@pytest.mark.hf_sampled
class Contract:
    @pytest.mark.parametrize("number", range(18))
    def test_first(self, number):
        pass

    @pytest.mark.parametrize("number", range(6))
    def test_second(self, number):
        pass

@pytest.mark.hf_sampled(by="class")
class TestSixth(Contract):
    pass

@pytest.mark.hf_sampled(by="class", one_in=12)
class TestTwelfth(Contract):
    pass

@pytest.mark.parametrize("number", range(2))
def test_that_is_not_sampled(number):
    pass
"""


def passed(tmp_path: Path, *arguments: str) -> list[str]:
    """The tests that are run, without the name of the file."""
    (tmp_path / "test_variants.py").write_text(_VARIANTS)
    result = run(tmp_path, "-v", "test_variants.py", *arguments)
    assert result.returncode == pytest.ExitCode.OK, result.stdout
    lines = (each.partition("::") for each in result.stdout.splitlines())
    return [test.partition(" PASSED")[0] for _, _, test in lines if " PASSED" in test]


def test_a_sixth_of_the_variants_is_run(tmp_path: Path) -> None:
    found = passed(tmp_path, "--hf-seed=7")
    numbers = [int(each[:-1].rpartition("[")[2]) for each in found if "of_variants" in each]
    assert numbers == list(range(numbers[0], 18, 6))
    assert len([each for each in found if "module" in each]) == 1
    engines = [each.rstrip("]").rpartition("-")[2] for each in found if "of_engines" in each]
    assert sorted(engines) == ["one", "other"]
    assert len([each for each in found if "TestSixth" in each]) == 4
    assert len([each for each in found if "TestTwelfth" in each]) == 2
    assert len([each for each in found if "not_sampled" in each]) == 2
    assert passed(tmp_path, "--hf-seed=7") == found, "the same seed makes the same choice"


@pytest.mark.parametrize("how", [["--hf-full"], ["-k", "test_"]])
def test_all_variants_are_run_if_they_are_named_or_in_a_full_run(
    tmp_path: Path, how: list[str]
) -> None:
    assert len(passed(tmp_path, *how)) == 18 + 6 + 3 + 2 * 24 + 2


def test_nothing_is_reported_if_no_engine_was_skipped(tmp_path: Path) -> None:
    result = run(tmp_path, "-k", "passes or seed", HF_ASYNC_STORE_REQUIRE_ENGINES="all")
    assert result.returncode == pytest.ExitCode.OK, result.stdout
    assert "left out" not in result.stdout


def test_a_run_in_which_a_variant_failed_names_its_seed(tmp_path: Path) -> None:
    (tmp_path / "test_failing.py").write_text(_VARIANTS.replace("pass", "assert not number", 1))
    result = run(tmp_path, "-q", "test_failing.py", "--hf-seed=7")
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout
    assert "--hf-seed 7 repeats the random choices of this run" in result.stdout.splitlines()


def test_a_module_that_cannot_be_imported_is_told_as_ever(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name\n")
    result = run(tmp_path, "-q", "test_broken.py")
    assert result.returncode == pytest.ExitCode.INTERRUPTED, result.stdout + result.stderr
    assert "nothing_of_this_name" in result.stdout
    assert "1 error" in result.stdout.splitlines()[-1]
