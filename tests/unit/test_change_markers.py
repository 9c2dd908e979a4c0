"""The mark of a change is written in the same commit as the change, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_async_store import HOST_FACTORY, Collection, ConcurrencyConflictError, open_store
from hf_async_store.changes import ChangeMarker, Put
from hf_async_store.values import Key

COLLECTIONS = (*HOST_FACTORY, Collection("marks", key="mark_id"))


@pytest.mark.parametrize(
    "url", ["memory:", "json:{}/db.json", "json:{}/split", "sqlite:{}/store.db"]
)
async def test_a_mark_is_committed_with_its_change(url: str, tmp_path: Path) -> None:
    async with open_store(url.format(tmp_path), collections=COLLECTIONS) as store:
        at = "2026-01-01T00:00:00.000000Z"
        mark = ChangeMarker(Key("marks", "k-1"), {"mark_id": "k-1", "of": "t-1", "version": 1})
        lost = ChangeMarker(Key("marks", "k-2"), {"mark_id": "k-2", "of": "t-1", "version": 1})
        put = Put(Key("templates", "t-1"), {"template_id": "t-1"}, at, mark=mark)
        stale = Put(Key("templates", "t-1"), {"template_id": "t-1"}, at, expect=7, mark=lost)
        landed, refused = await store.engine.write_each([put, stale])
        assert landed == 1
        assert isinstance(refused, ConcurrencyConflictError)
        assert await store.get_entity("marks", "k-1") == mark.entity
        assert await store.get_entity("marks", "k-2") is None
