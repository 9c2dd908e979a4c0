"""Fixtures of the tests of the benchmark harness."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from faulty_systems import Measure

from hf_async_store_bench.environments import Environments
from hf_async_store_bench.messages import Load, SystemUnderTest
from hf_async_store_bench.results import Results
from hf_async_store_bench.run import Run
from hf_async_store_bench.settings import Settings

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def planted_engines_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.syspath_prepend(HERE)


@pytest.fixture
def measure(tmp_path: Path) -> Measure:
    """Runs a small benchmark of the given systems and workloads."""

    async def run(systems: list[SystemUnderTest], *loads: Load, **changed: Any) -> Results:
        settings = {"rounds": 3, "duration": 0.15, "steady": 0.4, **changed}
        with Environments(folder=str(tmp_path)) as environments:
            told: list[str] = []
            chosen = Settings(mode="test", loads=loads, **settings)
            results = await Run(chosen, systems, environments, told.append).whole()
        assert told
        assert list(tmp_path.iterdir()) == []
        return results

    return run
