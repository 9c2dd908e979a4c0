"""The contract on the SQL engine with SQLite."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hf_async_store.testing.contract import StrategyContract
from tests.contract.harnesses import SQLiteHarness

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.hf_sampled(by="class")
class TestSQLite(StrategyContract):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> SQLiteHarness:
        return SQLiteHarness(tmp_path)
