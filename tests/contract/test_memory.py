"""The contract on the memory engine."""

from __future__ import annotations

import pytest

from hf_async_store.testing.contract import StrategyContract
from tests.contract.harnesses import MemoryHarness


class TestMemory(StrategyContract):
    @pytest.fixture
    def harness(self) -> MemoryHarness:
        return MemoryHarness()
