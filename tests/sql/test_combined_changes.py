"""Changes of one entity that wait together share statements on PostgreSQL."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from hf_async_store import (
    Collection,
    Expire,
    Field,
    Index,
    LockTimeoutError,
    UnavailableError,
    conflict_retry,
    increment,
    open_store,
)
from hf_async_store.changes import Patch
from hf_async_store.coalescing import taking_at_once
from hf_async_store.strategies.sql import sending, statement_writer
from hf_async_store.strategies.sql.postgresql import PostgreSQL
from hf_async_store.strategies.sql.sending import IndependentBatch
from hf_async_store.testing.assertions import get_existing
from hf_async_store.values import Key

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from hf_async_store import StorageStrategy
    from hf_async_store.strategies.sql.pending import PendingChange
    from hf_async_store.values import Entity
    from hf_async_store_bench.servers import PostgresServer


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The statements that write entities, once there are any."""
    statements: list[str] = []
    rows = PostgreSQL.rows

    async def noted(self: PostgreSQL, driver: Any, sql: str, args: Sequence[object]) -> Any:
        if sql.startswith(("UPDATE", "INSERT")) and "-entities" in sql:
            statements.append(sql)
        return await rows(self, driver, sql, args)

    monkeypatch.setattr(PostgreSQL, "rows", noted)
    return statements


async def test_many_changes_of_one_entity_share_a_row(
    postgres_server: PostgresServer, written: list[str]
) -> None:
    async with open_store(postgres_server.database(), collections=[_counters()]) as store:
        await store.save_entity("counters", {"counter_id": "c", "count": 0})
        written.clear()
        work = [store.update_entity("counters", "c", {"count": increment(1)}) for _ in range(100)]
        assert await asyncio.gather(*work) == list(range(2, 102))
        assert len(written) == 1
        assert (await get_existing(store, "counters", "c"))["count"] == 100


@pytest.mark.parametrize(
    "collection",
    [
        {"feed": timedelta(hours=1)},
        {"indexes": [Index("name", unique=True)]},
        {"expires": Expire("until")},
    ],
)
async def test_each_change_has_a_row_where_that_matters(
    postgres_server: PostgresServer, written: list[str], collection: dict[str, Any]
) -> None:
    counters = [_counters(**collection)]
    async with open_store(postgres_server.database(), collections=counters) as store:
        await store.save_entity("counters", {"counter_id": "c", "count": 0})
        written.clear()
        work = [store.update_entity("counters", "c", {"count": increment(1)}) for _ in range(5)]
        assert await asyncio.gather(*work) == list(range(2, 7))
        assert len(written) == 5


async def test_a_queued_task_gets_the_entity_from_the_one_before(
    postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conflict_retry, "_MAX_TICKET_SECONDS", 3600.0)
    async with open_store(postgres_server.database(), collections=[_counters()]) as store:
        await store.save_entity("counters", {"counter_id": "c", "count": 0})
        reads = 0
        fetch = store.engine.fetch

        async def counted(keys: Any) -> Any:
            nonlocal reads
            reads += 1
            return await fetch(keys)

        reader = store._reads
        assert reader is not None
        reader.use(taking_at_once(counted))

        def one_more(entity: Entity) -> Entity:
            entity["count"] += 1  # type: ignore[operator]  # it is a number
            return entity

        work = [store.modify_entity("counters", "c", one_more) for _ in range(40)]
        assert sorted(await asyncio.gather(*work)) == list(range(2, 42))
        assert (await get_existing(store, "counters", "c"))["count"] == 40
        assert reads < 20  # 2 by all tasks, and 1 for each 4 of those that queue


@pytest.fixture
def between(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], Awaitable[object]]]:
    """What is awaited each time after counters were read, while it is in this list."""
    actions: list[Callable[[], Awaitable[object]]] = []
    rows = PostgreSQL.rows

    async def read(self: PostgreSQL, driver: Any, sql: str, args: Sequence[object]) -> Any:
        found = await rows(self, driver, sql, args)
        if sql.startswith("SELECT") and '"counters-entities"' in sql and actions:
            await actions[-1]()
        return found

    monkeypatch.setattr(PostgreSQL, "rows", read)
    return actions


@asynccontextmanager
async def _two_stores(
    server: PostgresServer,
) -> AsyncIterator[tuple[StorageStrategy, StorageStrategy]]:
    """Two stores on one counter."""
    url = server.database()
    async with (
        open_store(url, collections=[_counters()]) as store,
        open_store(url, collections=[_counters()]) as other,
    ):
        await store.save_entity("counters", {"counter_id": "c", "count": 0})
        yield store, other


async def test_an_entity_that_is_deleted_and_created_again_keeps_its_fields(
    postgres_server: PostgresServer, between: list[Callable[[], Awaitable[object]]]
) -> None:
    """It has the version of the one that was read."""
    async with _two_stores(postgres_server) as (store, other):
        assert await other.count_entities("counters") == 1

        async def recreate() -> None:
            between.clear()
            await other.delete_entity("counters", "c")
            await other.create_entity("counters", {"counter_id": "c", "count": 9})

        between.append(recreate)
        work = [store.update_entity("counters", "c", {"name": each}) for each in "ab"]
        assert await asyncio.gather(*work) == [2, 3]
        found = await get_existing(store, "counters", "c")
        assert (found["count"], found["name"]) == (9, "b")


async def test_changes_without_a_condition_are_never_overtaken(
    postgres_server: PostgresServer, between: list[Callable[[], Awaitable[object]]]
) -> None:
    """Another program writes the entity after each read: alone, they would not read it."""
    async with _two_stores(postgres_server) as (store, other):
        between.append(lambda: other.update_entity("counters", "c", {"name": "x"}))
        work = [store.update_entity("counters", "c", {"count": each}) for each in range(3)]
        versions = await asyncio.gather(*work)
        between.clear()
        assert sorted(set(versions)) == versions
        assert (await get_existing(store, "counters", "c"))["count"] == 2


async def test_combined_changes_that_are_sent_alone_keep_their_order(
    postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the first one meets a locked row, the second one must not be written before it."""
    sent: list[int] = []

    class Locked(IndependentBatch):
        async def send(self, group: Sequence[PendingChange]) -> None:
            if group[0].later:
                await self._send_one_by_one(group[0])
                return
            sent.extend(each.place for each in group)
            self._block(group, LockTimeoutError("another transaction holds the lock"))

    async with open_store(postgres_server.database(), collections=[_counters()]) as store:
        await store.save_entity("counters", {"counter_id": "c", "count": 0})
        monkeypatch.setattr(statement_writer, "IndependentBatch", Locked)
        changes = [Patch(Key("counters", "c"), {"count": each}, "") for each in range(3)]
        outcomes = await store.engine.write_unblocked(lambda: changes)
        assert [type(each) for each in outcomes] == [LockTimeoutError] * 3
        assert sent == [0]


async def test_a_lost_connection_leaves_the_outcomes_before_it(
    postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of changes that are sent alone, only one was in progress."""

    class Alone(IndependentBatch):
        async def _decided_together(self, *args: Any) -> list[PendingChange]:
            await self._send_one_by_one(args[1])
            return []

        async def run_statement(self, *args: Any) -> Any:
            rows = await super().run_statement(*args)
            if args[1][0].place == 1:
                raise UnavailableError("lost", outcome_unknown=True)
            return rows

    async with open_store(postgres_server.database(), collections=[_counters()]) as store:
        await store.save_entity("counters", {"counter_id": "c", "count": 0})
        monkeypatch.setattr(statement_writer, "IndependentBatch", Alone)
        changes = [Patch(Key("counters", "c"), {"count": each}, "") for each in range(3)]
        first, second, third = await store.engine.write_each(changes)
        assert first == 2
        assert isinstance(second, UnavailableError)
        assert second.outcome_unknown
        assert isinstance(third, UnavailableError)
        assert not third.outcome_unknown


async def test_computed_documents_are_divided_by_their_size(
    postgres_server: PostgresServer, written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those that callers give: a statement has a limit."""
    monkeypatch.setattr(sending, "_MAX_SIZE", 5000)
    async with open_store(postgres_server.database(), collections=[_counters()]) as store:
        ids = [f"c{each}" for each in range(10)]
        large = [{"counter_id": each, "count": 0, "name": "x" * 2000} for each in ids]
        await store.save_entities("counters", large)
        written.clear()
        await store.update_entities("counters", {each: {"count": increment(1)} for each in ids})
        assert len(written) == 5


def _counters(**options: Any) -> Collection:
    fields: list[Field | str] = ["name", Field("count", "integer"), Field("until", "timestamp")]
    return Collection("counters", key="counter_id", fields=fields, **options)
