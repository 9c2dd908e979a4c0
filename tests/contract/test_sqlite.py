"""The contract on the SQL engine with SQLite."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hf_async_store.testing.contract import StrategyContract
from tests.contract.harnesses import SQLiteHarness

if TYPE_CHECKING:
    from pathlib import Path

    from hf_async_store import StorageStrategy
    from hf_async_store.testing.harness import Harness


class TestSQLite(StrategyContract):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> SQLiteHarness:
        return SQLiteHarness(tmp_path)

    @pytest.mark.xfail(strict=True, reason="what SQLite refuses fails the whole commit")
    async def test_135_a_change_that_the_engine_itself_refuses(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        await super().test_135_a_change_that_the_engine_itself_refuses(harness, store)
