"""Access that bypasses the verbs and does not follow a migration: refused during a migration."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from live_applications import COLLECTIONS
from support import place_of
from test_live import prepared, short_leases

from hf_async_store import (
    StorageError,
    StorageStrategy,
    StoreRelocatedError,
    migration_routing,
    open_store,
)
from hf_async_store.driver import run_to_completion
from hf_async_store.migration.live import LiveMigration

if TYPE_CHECKING:
    from conftest import Place

__all__ = ["short_leases"]

UPDATE = {
    "sqlite": (
        "UPDATE \"accounts-entities\" SET doc = json_set(doc, '$.balance', 7) "
        "WHERE account_id = 'a-0'"
    ),
    "postgresql": (
        "UPDATE \"accounts-entities\" SET doc = jsonb_set(doc, '{balance}', '7') WHERE account_id = 'a-0'"
    ),
}


def opened(url: str, target: str) -> Any:
    return open_store(url, collections=COLLECTIONS, follow_moves=[target])


async def begun(source: str, target: str, *, cut_over: bool = False) -> None:
    async with LiveMigration(source, target, collections=COLLECTIONS) as move:
        await move.start(cut_over=cut_over)


async def stopped(source: str, target: str) -> None:
    async with LiveMigration(source, target, collections=COLLECTIONS) as move:
        await move.abort()


async def balance(store: StorageStrategy) -> object:
    account = await store.get_entity("accounts", "a-0")
    assert account is not None
    return account["balance"]


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_sql_is_refused_during_a_migration(kind: str, place: Place) -> None:
    source, target = place(kind, "a"), place("json-single", "b")
    await prepared(source)
    async with opened(source, target) as store:
        await store.execute_with_lock(UPDATE[kind])
        await begun(source, target)
        with pytest.raises(StoreRelocatedError, match="execute_with_lock"):
            await store.execute_with_lock(UPDATE[kind])
        with pytest.raises(StoreRelocatedError, match="execute_with_lock"):
            async with store.begin_transaction() as tx:
                await tx.execute_with_lock(UPDATE[kind])
        await begun(source, target, cut_over=True)
        with pytest.raises(StoreRelocatedError) as caught:
            await store.execute_with_lock("SELECT balance FROM accounts")
        assert caught.value.new_url == place_of(target)
        assert await balance(store) == 7


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_sql_is_not_acknowledged_if_a_migration_starts_meanwhile(
    kind: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = place(kind, "a"), place("json-single", "b")
    await prepared(source)
    async with opened(source, target) as store:
        execute = store._sql.execute_with_lock

        async def slow(*arguments: object) -> object:
            await begun(source, target)
            return await execute(*arguments)

        monkeypatch.setattr(store._sql, "execute_with_lock", slow)
        with pytest.raises(StorageError, match="a live migration of this store began") as caught:
            await store.execute_with_lock(UPDATE[kind])
        assert caught.value.outcome_unknown
        assert not caught.value.retryable


async def test_sql_in_a_transaction_is_not_acknowledged_if_a_migration_starts(
    place: Place,
) -> None:
    source, target = place("postgresql", "a"), place("json-single", "b")
    await prepared(source)
    async with opened(source, target) as store:

        async def late() -> None:
            async with store.begin_transaction() as tx:
                await tx.execute_with_lock(UPDATE["postgresql"])
                await begun(source, target)

        with pytest.raises(StorageError, match="a live migration of this store began") as caught:
            await late()
        assert caught.value.outcome_unknown


async def test_sql_is_accepted_without_a_migration(place: Place) -> None:
    source, target = place("sqlite", "a"), place("json-single", "b")
    await prepared(source)
    async with opened(source, target) as store:
        async with store.begin_transaction() as tx:
            await tx.execute_with_lock(UPDATE["sqlite"])
            await asyncio.sleep(migration_routing.LEASE_SECONDS + 0.1)
        await begun(source, target)
        await stopped(source, target)
        await asyncio.sleep(migration_routing.LEASE_SECONDS + 0.1)
        await store.execute_with_lock(UPDATE["sqlite"].replace("7", "8"))
        assert await balance(store) == 8


async def test_dynamodb_verbs_are_refused_on_an_inactive_side(place: Place) -> None:
    source, target = place("dynamodb", "a"), place("json-single", "b")
    await prepared(source)
    async with opened(source, target) as store:

        async def ask() -> list[Any]:
            found: list[Any] = await store.query_by_gsi(
                "machines", "request_id-created_at-index", "request_id = :r", {":r": "r-1"}, limit=1
            )
            return found

        async def update() -> int:
            version: int = await store.update_entity(
                "accounts",
                "a-0",
                {"balance": 7},
                condition_expression="attribute_exists(balance)",
                expression_values={},
            )
            return version

        assert await ask()
        assert await update() == 2
        await begun(source, target)
        assert await ask()  # the source is still active
        with pytest.raises(StoreRelocatedError, match="condition_expression"):
            await update()
        await begun(source, target, cut_over=True)
        with pytest.raises(StoreRelocatedError, match="query_by_gsi") as caught:
            await ask()
        assert caught.value.new_url == place_of(target)
        with pytest.raises(StoreRelocatedError, match="condition_expression"):
            await update()
        assert await balance(store) == 7


async def test_a_conditional_update_is_not_acknowledged_if_a_migration_starts(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = place("dynamodb", "a"), place("json-single", "b")
    await prepared(source)
    async with opened(source, target) as store:
        update_where = store._dynamodb.writes.update_where

        async def slow(*arguments: object) -> object:
            await begun(source, target)
            return await update_where(*arguments)

        monkeypatch.setattr(store._dynamodb.writes, "update_where", slow)
        with pytest.raises(StorageError, match="a live migration of this store began") as caught:
            await store.update_entity(
                "accounts",
                "a-0",
                {"balance": 7},
                condition_expression="attribute_exists(balance)",
                expression_values={},
            )
        assert caught.value.outcome_unknown


async def test_a_cancelled_update_of_matches_is_copied_if_a_migration_starts(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entities that one statement changed get their markers also if the caller is cancelled."""
    source, target = place("sqlite", "a"), place("json-single", "b")
    await prepared(source)
    await begun(source, target)  # then the next one need not create tables, which would be noticed
    await stopped(source, target)
    async with opened(source, target) as store:
        await store.update_entity("accounts", "a-0", {"balance": 8})  # the store is ready to write
        change_matches = store._sql.change_matches
        called, copied, changed, ends = (asyncio.Event() for _ in range(4))

        async def slow(*arguments: object) -> object:
            called.set()
            await copied.wait()
            found = await change_matches(*arguments)
            changed.set()
            assert found is not None, "one statement changes them"
            # As each statement that writes, it ends before a cancellation is raised.
            await run_to_completion(ends.wait())
            return found

        monkeypatch.setattr(store._sql, "change_matches", slow)
        update = store.update_where("accounts", {}, {"balance": 7}, limit=3)
        updating = asyncio.create_task(update)
        await called.wait()
        await begun(source, target)
        copied.set()
        await changed.wait()
        updating.cancel()
        ends.set()
        with pytest.raises(asyncio.CancelledError):
            await updating
        async with LiveMigration(source, target, collections=COLLECTIONS) as move:
            assert (await move.status()).waiting == (3, 0)


async def test_files_are_not_written_by_a_store_unaware_of_the_migration(place: Place) -> None:
    """Its lease is still valid, but it reads the migration record once it holds the lock."""
    source, target = place("json-single", "a"), place("json-split", "b")
    await prepared(source)
    async with opened(source, target) as store:
        assert await balance(store) == 100
        # The migration starts during the lease, and does not wait for its end yet.
        async with LiveMigration(source, target, collections=COLLECTIONS) as move:
            beginning = asyncio.create_task(move.start(cut_over=False))
            while await move._read_state(move._source) is None:
                await asyncio.sleep(0.01)
            with pytest.raises(StoreRelocatedError, match="write lock"):
                await store.write_file({})
            await beginning
        assert await store.read_file()
        await begun(source, target, cut_over=True)
        with pytest.raises(StoreRelocatedError, match="read lock") as caught:
            await store.read_file()
        assert caught.value.new_url == place_of(target)
