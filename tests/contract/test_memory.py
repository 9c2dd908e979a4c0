"""The contract on the memory engine."""

from __future__ import annotations

import pytest

from hf_async_store import open_store
from hf_async_store.testing.contract import StrategyContract
from tests.contract.harnesses import MemoryHarness


class TestMemory(StrategyContract):
    @pytest.fixture
    def harness(self) -> MemoryHarness:
        return MemoryHarness()


async def test_a_snapshot_is_open_during_the_first_write() -> None:
    # The first write creates the table of the recorded declarations.
    async with open_store("memory:") as store:
        async with store.begin_transaction(read_only=True) as reading:
            assert await reading.count_entities("templates") == 0
            await store.create_entity("templates", {"template_id": "t"})
            assert await reading.count_entities("templates") == 0
        assert await store.count_entities("templates") == 1
