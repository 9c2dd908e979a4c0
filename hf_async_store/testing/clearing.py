"""Case 139: the deletion of all entities."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import pytest

from hf_async_store.errors import (
    PartialChangeError,
    ReferenceViolationError,
    TransactionReentryError,
    UnknownCollectionError,
)
from hf_async_store.schema import Collection, Field, Index
from hf_async_store.testing.assertions import counted
from hf_async_store.testing.concurrency import is_shared
from hf_async_store.testing.expiry import Time, store_at, stored

if TYPE_CHECKING:
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.harness import Harness

_MANY: Final = 1200
"""More than two batches."""

_TREE: Final = (
    Collection("nodes", key="node_id", fields=[Field("parent_id", references="nodes")]),
    Collection("leaves", key="leaf_id", fields=[Field("node_id", references="nodes")]),
)


async def _remaining(store: StorageStrategy, *collections: str) -> list[int]:
    return [await counted(store, each, 0) for each in collections]


class ClearingContract:
    """Case 139."""

    async def test_139_all_entities_of_all_collections(self, store: StorageStrategy) -> None:
        assert await store.clear() == 0
        await store.create_entity("templates", {"template_id": "t"})
        await store.create_entity("requests", {"request_id": "r", "template_id": "t"})
        await store.create_entities(
            "machines",
            [
                {"machine_id": f"m-{each}", "request_id": "r", "template_id": "t"}
                for each in range(_MANY)
            ],
        )
        await store.create_entity("items", {"item_id": "i"})
        assert await store.clear() == _MANY + 3
        assert await _remaining(store, *store.collections) == [0] * len(store.collections)
        assert await store.clear() == 0
        assert await store.create_entity("templates", {"template_id": "t"}) == 1

    async def test_139_of_one_collection(self, store: StorageStrategy) -> None:
        await store.create_entity("items", {"item_id": "i"})
        await store.create_entity("accounts", {"account_id": "a", "balance": 1})
        assert await store.clear("items") == 1
        assert await store.get_entity("items", "i") is None
        assert await store.get_entity("accounts", "a") is not None
        with pytest.raises(UnknownCollectionError):
            await store.clear("nobody")

    async def test_139_what_is_referred_to_stays_and_is_reported(self, harness: Harness) -> None:
        async with harness.store(_TREE) as store:
            await store.create_entities("nodes", [{"node_id": "a"}, {"node_id": "b"}])
            await store.create_entity("leaves", {"leaf_id": "l", "node_id": "b"})
            if not store.capabilities.references:
                assert await store.clear("nodes") == 2
                return
            with pytest.raises(PartialChangeError) as caught:
                await store.clear("nodes")
            assert caught.value.done == 1
            assert isinstance(caught.value.cause, ReferenceViolationError)
            assert await store.get_entity("nodes", "b") is not None
            assert await store.clear() == 2

    @pytest.mark.parametrize("step", [1, -1])
    async def test_139_entities_that_refer_to_their_own_collection(
        self, harness: Harness, step: int
    ) -> None:
        ids = [f"n-{each:03}" for each in range(20)][::step]
        async with harness.store(_TREE) as store:
            await store.create_entity("nodes", {"node_id": ids[0]})
            for parent, child in pairwise(ids):
                await store.create_entity("nodes", {"node_id": child, "parent_id": parent})
            assert await store.clear() == len(ids)
            assert await _remaining(store, "nodes") == [0]

    async def test_139_expired_entities(self, harness: Harness) -> None:
        time = Time()
        async with store_at(harness, time) as store:
            await store.create_entity("batches", {"batch_id": "b"})
            steps: list[dict[str, Any]] = [
                {"step_id": "soon", "batch_id": "b", "expires_at": time.after(minutes=1)},
                {"step_id": "late", "batch_id": "b", "expires_at": time.after(days=1)},
            ]
            await store.create_entities("steps", steps)
            time.now += timedelta(hours=1)
            assert await store.clear() == 3
            assert await stored(store, "steps") == []
            assert await stored(store, "batches") == []

    async def test_139_claims_and_unique_values(self, harness: Harness) -> None:
        unique = harness.capabilities.unique_indexes
        labels = Collection(
            "labels", key="label_id", fields=["name"], indexes=[Index("name", unique=unique)]
        )
        async with harness.store([labels]) as store:
            await store.create_entity("labels", {"label_id": "a", "name": "n"})
            if store.capabilities.claims:
                await store.claim_entities("labels", order_by="label_id")
            assert await store.clear() == 1
            await store.create_entity("labels", {"label_id": "b", "name": "n"})
            if store.capabilities.claims:
                assert await store.claims("labels") == []

    async def test_139_nothing_of_other_programs(self, harness: Harness) -> None:
        if not is_shared(harness.capabilities):
            pytest.skip("a store of this engine is used by one program")
        other = Collection("others", key="other_id")
        async with harness.store([other]) as store:
            await store.create_entity("others", {"other_id": "o"})
        async with harness.store() as store:
            await store.create_entity("items", {"item_id": "i"})
            assert await store.clear() == 1
        async with harness.store([other]) as store:
            assert await store.get_entity("others", "o") is not None

    async def test_139_beside_writers_and_in_a_transaction(self, store: StorageStrategy) -> None:
        await store.create_entities("items", [{"item_id": f"i-{each}"} for each in range(50)])

        async def writes() -> None:
            for each in range(20):
                await store.save_entity("items", {"item_id": f"i-{each}"})
                await store.delete_entity("items", f"i-{each + 20}")

        await asyncio.gather(writes(), store.clear())
        await store.clear()
        assert await _remaining(store, "items") == [0]
        async with store.begin_transaction() as tx:
            await tx.create_entity("items", {"item_id": "i"})
            with pytest.raises(TransactionReentryError):
                await store.clear()
