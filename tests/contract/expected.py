"""Contract cases that engines of this package do not fulfil yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hf_async_store.testing.contract import StrategyContract

if TYPE_CHECKING:
    from hf_async_store import StorageStrategy
    from hf_async_store.testing.harness import Harness


class OneStatementForAll(StrategyContract):
    """An engine that writes queued changes in one batch, whose outcomes wait for the last of them."""

    @pytest.mark.xfail(strict=True, reason="the outcomes of a batch are delivered together")
    async def test_135_a_blocked_change_does_not_delay_its_neighbours(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        await super().test_135_a_blocked_change_does_not_delay_its_neighbours(harness, store)
