"""The contract on the JSON engine with one file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hf_async_store.testing.contract import StrategyContract
from tests.contract.harnesses import JSONHarness

if TYPE_CHECKING:
    from pathlib import Path


class TestJSONSingle(StrategyContract):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> JSONHarness:
        return JSONHarness(tmp_path, "db.json")
