"""The contract on the JSON engine with split files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hf_async_store.testing.contract import StrategyContract
from tests.contract.harnesses import JSONHarness

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.hf_sampled(by="case")  # the other layout of the same engine
class TestJSONSplit(StrategyContract):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> JSONHarness:
        return JSONHarness(tmp_path, "folder")
