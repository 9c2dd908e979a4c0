"""Case 128: read-only transactions."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from hf_async_store.errors import (
    ConcurrencyConflictError,
    InvalidInputError,
    TransactionClosedError,
)
from hf_async_store.testing.concurrency import HANG_SECONDS, elsewhere
from hf_async_store.testing.harness import ObservesIO
from hf_async_store.testing.transactions import item, labels, version_of

if TYPE_CHECKING:
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.harness import Harness
    from hf_async_store.transaction import Transaction


async def _set_labels(store: StorageStrategy, label: str) -> None:
    async with store.begin_transaction() as tx:
        await tx.update_entities("items", {each: {"label": label} for each in ("a", "b")})


async def _all_labels(tx: Transaction) -> list[object]:
    """The labels by key and by query, and the number of entities."""
    found = await tx.query_entities("items", order_by="item_id")
    streamed = [each["label"] async for each in tx.stream_entities("items")]
    count = await tx.count_entities("items", {"label": "old"})
    return [*await labels(tx, "a", "b"), *(each["label"] for each in found), *streamed, count]


class ReadOnlyTransactionContract:
    """Case 128."""

    async def test_128_every_read_sees_one_snapshot(self, store: StorageStrategy) -> None:
        await store.create_entities("items", [item("a", label="old"), item("b", label="old")])
        seen: list[object] = []
        try:
            async with store.begin_transaction(read_only=True) as tx:
                seen += await labels(tx, "a")
                await elsewhere(_set_labels(store, "new"))
                seen += await labels(tx, "b")
                if store.capabilities.query_isolation == "snapshot":
                    assert await _all_labels(tx) == ["old"] * 6 + [2]
        except ConcurrencyConflictError as exc:
            # Without snapshots, what was read by key is validated at the end.
            assert store.capabilities.query_isolation == "eventual"
            assert exc.retryable
        else:
            assert seen == ["old", "old"]
        assert await store.run_transaction(lambda tx: labels(tx, "a", "b"), read_only=True) == [
            "new",
            "new",
        ]

    async def test_128_it_waits_for_no_writer_and_blocks_none(self, store: StorageStrategy) -> None:
        await store.create_entities("items", [item("a", label="old"), item("b", label="old")])

        async def reads() -> list[object]:
            async with store.begin_transaction(read_only=True) as tx:
                return await labels(tx, "a", "b")

        async with asyncio.timeout(HANG_SECONDS):
            async with store.begin_transaction() as writer:
                await writer.update_entity("items", "a", {"label": "new"})
                many = [elsewhere(reads()) for _ in range(5)]
                assert await asyncio.gather(*many) == [["old", "old"]] * 5
            async with store.begin_transaction(read_only=True) as tx:
                await labels(tx, "b")
                await elsewhere(_set_labels(store, "later"))
                await store.update_entity("items", "a", {"label": "last"})  # by this task, too
        assert await labels(store, "a", "b") == ["last", "later"]

    async def test_128_inside_another_transaction_it_sees_the_last_commit(
        self, store: StorageStrategy
    ) -> None:
        await store.create_entities("items", [item("a", label="old"), item("b", label="old")])
        async with asyncio.timeout(HANG_SECONDS), store.begin_transaction() as outer:
            await outer.update_entity("items", "a", {"label": "own"})
            async with store.begin_transaction(read_only=True) as tx:
                assert await labels(tx, "a", "b") == ["old", "old"]
                async with store.begin_transaction(read_only=True) as again:
                    assert await labels(again, "a") == ["old"]
            assert await labels(outer, "a") == ["own"]
        assert await labels(store, "a") == ["own"]

    async def test_128_writes_are_refused(self, store: StorageStrategy) -> None:
        await store.create_entity("items", item("a", label="old"))
        async with store.begin_transaction(read_only=True) as tx:
            for verb in (
                tx.create_entity("items", item("b")),
                tx.save_entity("items", item("a")),
                tx.update_entity("items", "a", {"label": "new"}),
                tx.conditional_update("items", "a", {"label": "new"}),
                tx.delete_entity("items", "a"),
                tx.save_entities("items", [item("a")]),
                tx.modify_entity("items", "a", lambda entity: {**entity, "label": "new"}),
            ):
                with pytest.raises(InvalidInputError, match="read-only"):
                    await verb
            with pytest.raises(InvalidInputError, match="read-only"):
                tx.begin_transaction()
            assert await labels(tx, "a", "b") == ["old", None]
        assert await version_of(store, "a") == 1
        with pytest.raises(InvalidInputError, match="isolation"):
            store.begin_transaction(store.capabilities.isolations[0], read_only=True)

    async def test_128_an_unused_or_ended_one(self, harness: Harness) -> None:
        async with harness.store() as store:
            async with store.begin_transaction(read_only=True) as tx:
                pass
            if isinstance(harness, ObservesIO):
                assert not harness.touched()
            with pytest.raises(TransactionClosedError):
                await tx.get_entity("items", "a")
            async with store.begin_transaction(read_only=True) as tx:
                assert await labels(tx, "a") == [None]  # of a store that does not exist yet
                assert await tx.count_entities("items") == 0
