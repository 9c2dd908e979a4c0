"""A write that waits for the lock of the store: on JSON and SQLite, one process writes at a time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from hf_async_store import OperationTimeoutError, open_store
from hf_async_store.schema import Collection
from hf_async_store.testing.concurrency import has_ended

if TYPE_CHECKING:
    from pathlib import Path

_ITEMS = Collection("items", key="item_id", feed=3600)


@pytest.mark.parametrize("url", ["json:{}/data", "sqlite:{}/store.db"])
async def test_it_is_withdrawn_as_long_as_it_waits(tmp_path: Path, url: str) -> None:
    location = url.format(tmp_path)
    async with (
        open_store(location, collections=[_ITEMS]) as holding,
        open_store(location, collections=[_ITEMS]) as store,
    ):
        for each in (holding, store):
            await each.save_entity("items", {"item_id": "a", "label": "before"})
        async with holding.begin_transaction() as tx:
            await tx.update_entity("items", "a", {"count": 1})
            cancelled = asyncio.create_task(store.delete_entity("items", "a"))
            kept = asyncio.create_task(store.save_entity("items", {"item_id": "b"}))
            with pytest.raises(OperationTimeoutError) as caught:
                await store.update_entity("items", "a", {"label": "after"}, timeout=0.05)
            assert (caught.value.outcome_unknown, caught.value.retryable) == (False, True)
            cancelled.cancel()
            assert await has_ended(cancelled), "it waits for the lock"
        assert await kept == 1
        entity = await store.get_entity("items", "a")
        assert entity is not None
        assert (entity["label"], entity["count"]) == ("before", 1)
