"""Case 84 for every engine that has connections: they break under load."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from hf_async_store.errors import StorageError, UnavailableError
from hf_async_store.field_operations import increment
from hf_async_store.testing.concurrency import HANG_SECONDS, failure_of, has_ended, second_store
from hf_async_store.testing.harness import (
    CutsConnections,
    Harness,
    RestartsServer,
    skip_fault,
)

if TYPE_CHECKING:
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.transaction import Transaction


class LostConnectionContract:
    """Part of case 84."""

    async def test_84_connections_that_break_are_replaced(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        """What was acknowledged is stored, what was refused is not, and the store stays usable."""
        if not isinstance(harness, CutsConnections):
            skip_fault(harness, CutsConnections)
        await store.save_entity("items", {"item_id": "first"})
        acknowledged = {"first"}
        unknown: set[str] = set()

        async def write(name: str) -> None:
            for number in range(15):
                entity_id = f"{name}-{number}"
                try:
                    await store.create_entity("items", {"item_id": entity_id})
                    acknowledged.add(entity_id)
                except UnavailableError as exc:
                    assert exc.retryable or exc.outcome_unknown
                    unknown.update({entity_id} if exc.outcome_unknown else ())

        writing = asyncio.gather(*(write(name) for name in "abcd"))
        for _ in range(5):
            await asyncio.sleep(0.01)
            harness.cut_connections()
        async with asyncio.timeout(HANG_SECONDS):
            await writing
        harness.cut_connections()
        stored = {each["item_id"] for each in await _read(store)}
        assert acknowledged <= stored <= acknowledged | unknown
        await store.save_entity("items", {"item_id": "last"})

    @pytest.mark.parametrize("after", ["read", "write", "savepoint", "commit"])
    async def test_84_a_transaction_ends_with_its_connection(
        self, harness: Harness, store: StorageStrategy, after: str
    ) -> None:
        """The caller catches the error of the first call after the connection broke. Neither that call nor
        a later one may go on with another connection as if the transaction still had its locks."""
        if not isinstance(harness, CutsConnections):
            skip_fault(harness, CutsConnections)
        if after == "savepoint" and not harness.capabilities.savepoints:
            pytest.skip("the engine declares no savepoints")
        await store.save_entity("items", {"item_id": "a", "count": 0})
        await store.delete_entities("items", ["b", "c"])
        written = {"b"}
        possible: list[tuple[object, set[object]]] = []
        async with second_store(harness, store) as other, asyncio.timeout(HANG_SECONDS):
            try:
                async with store.begin_transaction() as tx:
                    await tx.update_entity("items", "a", {"count": increment()})
                    await tx.save_entity("items", {"item_id": "b"})
                    harness.cut_connections()
                    rival = asyncio.create_task(_increment(other))
                    await has_ended(rival)
                    if after == "read":
                        await failure_of(tx.get_entity("items", "c"))
                    elif after == "savepoint":  # its failure alone does not end the transaction
                        await failure_of(_read_in_savepoint(tx))
                    elif after == "write":
                        error = await failure_of(tx.save_entity("items", {"item_id": "c"}))
                        written.update(set() if error else "c")
                possible.append((2, {*written}))
            except StorageError as exc:
                possible.append((1, set()))
                if exc.outcome_unknown:
                    possible.append((2, {*written}))
            await rival
        found = _by_id(await _read(store))
        assert (found.pop("a")["count"], set(found)) in possible

    async def test_84_what_was_acknowledged_outlasts_the_server(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        if not harness.capabilities.durable:
            pytest.skip("the engine is not durable")
        if not isinstance(harness, RestartsServer):
            skip_fault(harness, RestartsServer)
        await store.create_entities("items", [{"item_id": each} for each in "abcd"])
        await store.update_entity("items", "b", {"label": "updated"})
        async with store.begin_transaction() as tx:
            await tx.update_entity("items", "c", {"label": "in a transaction"})
            await tx.delete_entity("items", "d")
        before = await _read(store)
        await harness.restart()
        assert _by_id(await _read(store)) == _by_id(before)
        async with harness.store() as again:
            assert _by_id(await _read(again)) == _by_id(before)
            assert await again.update_entity("items", "a", {"label": "later"}) == 2


async def _read_in_savepoint(tx: Transaction) -> None:
    async with tx.begin_transaction() as inner:
        await inner.get_entity("items", "c")


async def _increment(store: StorageStrategy) -> None:
    await store.update_entity("items", "a", {"count": increment()})


def _by_id(entities: list[dict[str, object]]) -> dict[object, dict[str, object]]:
    return {each["item_id"]: each for each in entities}


async def _read(store: StorageStrategy) -> list[dict[str, object]]:
    """All items; the first attempts may find out that the connections are gone."""
    for _ in range(10):
        try:
            return [dict(each) async for each in store.stream_entities("items")]
        except UnavailableError as exc:
            assert exc.retryable
    return []
