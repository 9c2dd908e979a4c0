"""The contract on the JSON engine with one file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hf_async_store.testing.contract import StrategyContract
from tests.contract.harnesses import JSONHarness, defaults_of

if TYPE_CHECKING:
    from pathlib import Path


class TestJSONSingle(StrategyContract):
    @pytest.fixture
    def harness(self, tmp_path: Path, request: pytest.FixtureRequest) -> JSONHarness:
        return JSONHarness(tmp_path, "db.json", **defaults_of(request.node.name))
