"""On PostgreSQL, what waits for a lock is told so, also where `statement_timeout` ends it first."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import asyncpg  # type: ignore[import-untyped]  # it has no types
import pytest

from hf_async_store import Collection, Field, LockTimeoutError, open_store
from hf_async_store.strategies.sql.sending import Patience

if TYPE_CHECKING:
    from hf_async_store_bench.servers import PostgresServer

_JOBS = [
    Collection("jobs", key="job_id"),
    Collection("parts", key="part_id", fields=[Field("job_id", references="jobs")]),
]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the next statements wait for a lock, before the usual times."""
    found: list[float] = []
    wait = Patience.wait
    monkeypatch.setattr(Patience, "wait", lambda self, n: found.pop() if found else wait(self, n))
    return found


@pytest.mark.parametrize("others", [0, 3])
async def test_a_row_that_is_not_committed(
    postgres_server: PostgresServer, waits: list[float], others: int
) -> None:
    url = postgres_server.database()
    async with open_store(url, collections=_JOBS) as store:
        await store.save_entity("jobs", {"job_id": "first"})
    async with open_store(f"{url}?timeout=2", collections=_JOBS) as store:
        other = await asyncpg.connect(url)
        async with other.transaction():
            await other.execute(
                'INSERT INTO "jobs-entities" SELECT (r).* FROM (SELECT jsonb_populate_record(t, '
                '\'{"job_id": "x"}\') AS r FROM "jobs-entities" AS t) AS s'
            )
            waits.append(60.0)
            saves = [store.save_entity("jobs", {"job_id": each}) for each in ["x", *"abc"[:others]]]
            found = await asyncio.gather(*saves, return_exceptions=True)
        await other.close()
        assert [type(each) for each in found] == [LockTimeoutError, *[int] * others]


async def test_a_parent_that_is_locked(postgres_server: PostgresServer, waits: list[float]) -> None:
    url = postgres_server.database()
    async with open_store(url, collections=_JOBS) as store:
        await store.save_entities("jobs", [{"job_id": each} for each in "ab"])
    async with open_store(f"{url}?timeout=2&isolation=read_committed", collections=_JOBS) as store:
        other = await asyncpg.connect(url)
        async with other.transaction():
            await other.fetch("SELECT 1 FROM \"jobs-entities\" WHERE job_id = 'a' FOR UPDATE")
            waits.append(60.0)
            saves = [
                store.save_entity("parts", {"part_id": f"{number}", "job_id": each})
                for number, each in enumerate("abb")
            ]
            found = await asyncio.gather(*saves, return_exceptions=True)
        await other.close()
        assert [type(each) for each in found] == [LockTimeoutError, int, int]
