"""The contract on the SQL engine with SQLite."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.contract.expected import ColumnsOfTheDeclaration
from tests.contract.harnesses import SQLiteHarness

if TYPE_CHECKING:
    from pathlib import Path


class TestSQLite(ColumnsOfTheDeclaration):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> SQLiteHarness:
        return SQLiteHarness(tmp_path)
