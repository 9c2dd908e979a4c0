"""What engines of this package do not show yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hf_async_store.testing.contract import StrategyContract

if TYPE_CHECKING:
    from hf_async_store import StorageStrategy
    from hf_async_store.testing.harness import Harness


class OneStatementForAll(StrategyContract):
    """An engine that writes what waits by one statement, which takes all its locks."""

    @pytest.mark.xfail(strict=True, reason="a row that somebody holds stops the whole statement")
    async def test_135_a_change_that_must_wait_holds_up_no_other(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        await super().test_135_a_change_that_must_wait_holds_up_no_other(harness, store)
