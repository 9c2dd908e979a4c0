"""The contract on the JSON engine with split files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hf_async_store.testing.contract import StrategyContract
from tests.contract.harnesses import JSONHarness, defaults_of

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.hf_sampled(by="class")  # the other layout of the same engine
class TestJSONSplit(StrategyContract):
    @pytest.fixture
    def harness(self, tmp_path: Path, request: pytest.FixtureRequest) -> JSONHarness:
        return JSONHarness(tmp_path, "folder", **defaults_of(request.node.name))
