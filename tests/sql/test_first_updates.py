"""On PostgreSQL, `update_where` with a limit is one statement where the server can decide."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import asyncpg  # type: ignore[import-untyped]  # it has no types
import pytest

from hf_async_store import (
    LockTimeoutError,
    PartialChangeError,
    gte,
    increment,
    open_store,
)
from hf_async_store.strategies.sql.postgresql import PostgreSQL
from hf_async_store.testing.assertions import get_existing
from tests.sql.jobs import JOBS, PENDING, RUNNING, filled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_async_store import StorageStrategy
    from hf_async_store_bench.servers import PostgresServer


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    rows = PostgreSQL.rows

    async def noted(self: PostgreSQL, driver: Any, sql: str, args: Sequence[object]) -> Any:
        found.append(sql)
        return await rows(self, driver, sql, args)

    monkeypatch.setattr(PostgreSQL, "rows", noted)
    return found


async def _states(store: StorageStrategy) -> str:
    jobs = await store.query_entities("jobs", order_by="job_id")
    return "".join(str(each["status"])[0] for each in jobs)


async def test_one_statement(postgres_server: PostgresServer, statements: list[str]) -> None:
    async with filled(postgres_server.database()) as store:
        for expected in (2, 2, 2, 0):
            statements.clear()
            done = await store.update_where("jobs", PENDING, RUNNING, order_by="rank", limit=2)
            assert (done, len(statements)) == (expected, 1)
        assert await _states(store) == "RRRRRR"


@pytest.mark.parametrize(
    "changes",
    [{"rank": increment(1)}, {"parent_id": "0"}, {"name": "x"}],
    ids=["computed", "reference", "unique"],
)
async def test_several_where_more_must_be_decided(
    postgres_server: PostgresServer, statements: list[str], changes: dict[str, Any]
) -> None:
    async with filled(postgres_server.database()) as store:
        statements.clear()
        assert await store.update_where("jobs", PENDING, changes, order_by="rank", limit=1) == 1
        assert len(statements) > 1
        assert (await get_existing(store, "jobs", "5"))["version"] == 2


async def test_pages_follow_the_order(postgres_server: PostgresServer) -> None:
    """The position of the next page is the last one of a page, also if the server sorts the rows."""
    async with open_store(postgres_server.database(), collections=[JOBS]) as store:
        ids = [f"{n:04}" for n in range(1100)]
        for start in reversed(range(10)):  # not stored in their order
            await store.save_entities("jobs", [{"job_id": each} for each in ids[start::10]])
        assert await store.update_where("jobs", {}, {"note": "x"}) == 1100
        jobs = await store.query_entities("jobs")
        assert {each["version"] for each in jobs} == {2}


async def test_what_must_be_searched_for_disturbs_no_transaction(
    postgres_server: PostgresServer,
) -> None:
    """A serializable statement that reads all rows would make a transaction fail that changes any."""
    url = postgres_server.database()
    async with filled(url) as store, open_store(url, collections=[JOBS]) as other:
        await other.save_entity("jobs", {"job_id": "x", "rank": 20})
        async with store.begin_transaction() as tx:
            await tx.get_entity("jobs", "x")
            assert await other.update_where("jobs", {"rank": 20}, {"note": "n"}, limit=1) == 1
            await tx.update_entity("jobs", "0", {"note": "n"})


async def test_a_locked_entity_is_not_waited_for_by_the_others(
    postgres_server: PostgresServer,
) -> None:
    """All or none in the statement; then each entity for itself."""
    url = postgres_server.database()
    async with filled(url), open_store(f"{url}?timeout=2", collections=[JOBS]) as store:
        other = await asyncpg.connect(url)
        async with other.transaction():
            await other.fetch("SELECT 1 FROM \"jobs-entities\" WHERE job_id = '4' FOR UPDATE")
            with pytest.raises(PartialChangeError) as caught:
                await store.update_where("jobs", PENDING, RUNNING, order_by="rank", limit=3)
        await other.close()
        assert isinstance(caught.value.cause, LockTimeoutError)
        assert caught.value.done == 2
        assert await _states(store) == "PPPRPR"


async def test_what_was_changed_since_is_judged_again(postgres_server: PostgresServer) -> None:
    """The statement waits for a row that another transaction changes so that it stops matching."""
    url = postgres_server.database()
    async with filled(url) as store:
        other = await asyncpg.connect(url)
        async with other.transaction():
            await other.execute(
                'UPDATE "jobs-entities" SET version = 2, doc = doc || \'{"status": "DONE"}\', '
                "\"status-key\" = '\\x04444f4e45' WHERE job_id = '5'"
            )
            work = asyncio.ensure_future(
                store.update_where("jobs", PENDING, RUNNING, order_by="rank", limit=2)
            )
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            while not await other.fetchval(waiting) and not work.done():
                await asyncio.sleep(0.001)
        await other.close()
        assert await work == 2
        assert await _states(store) == "PPPRRD"


async def test_tasks_share_the_matches(postgres_server: PostgresServer) -> None:
    async with filled(postgres_server.database()) as store:

        async def take() -> int:
            return await store.update_where(
                "jobs", {**PENDING, "rank": gte(0)}, RUNNING, order_by="rank", limit=1
            )

        assert sum(await asyncio.gather(*(take() for _ in range(20)))) == 6
        jobs = await store.query_entities("jobs")
        assert [each["version"] for each in jobs] == [2] * 6
