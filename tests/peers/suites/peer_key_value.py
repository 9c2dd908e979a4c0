"""The store tests of py-key-value-aio; copied into its `tests/stores`."""

from __future__ import annotations

from pathlib import Path

import pytest
from examples.key_value_store import COLLECTIONS, EntityKeyValueStore
from peer_store import empty_url
from tests.stores.base import BaseStoreTests, ContextManagerStoreTestMixin


class TestEntityKeyValueStore(ContextManagerStoreTestMixin, BaseStoreTests):
    @pytest.fixture
    async def store(self, tmp_path: Path) -> EntityKeyValueStore:
        return EntityKeyValueStore(await empty_url(COLLECTIONS, tmp_path))

    @pytest.mark.skip(reason="for stores that drop old entries; those of databases skip it, too")
    async def test_not_unbounded(self) -> None: ...

    async def test_enumerate_and_destroy(self, store: EntityKeyValueStore) -> None:
        for collection in ("a", "b"):
            await store.put_many(["1", "2"], [{"n": 1}, {"n": 2}], collection=collection)
        assert await store.collections() == ["a", "b"]
        assert sorted(await store.keys("a")) == ["1", "2"]
        assert await store.destroy_collection("a")
        assert not await store.destroy_collection("a")
        assert await store.collections() == ["b"]
        assert await store.destroy()
        assert await store.collections() == []
