"""On PostgreSQL, what waits for a lock is told so, also where `statement_timeout` ends it first."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import asyncpg  # type: ignore[import-untyped]  # it has no types
import pytest

from hf_async_store import Collection, Field, LockTimeoutError, OperationTimeoutError, open_store
from hf_async_store.strategies.sql.sending import Patience
from tests.contract.harnesses import execute

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


async def test_a_slow_statement_is_not_waited_for_again(postgres_server: PostgresServer) -> None:
    """Sent once more, because it may have waited for a lock, it is ended soon."""
    url = postgres_server.database()
    async with open_store(f"{url}?timeout=0.6", collections=_JOBS) as store:
        await store.save_entity("jobs", {"job_id": "a"})
        await asyncio.to_thread(execute, url, _SLOW)
        with pytest.raises(OperationTimeoutError):
            await store.save_entity("jobs", {"job_id": "a"})
    # A sequence is not rolled back.
    limits = await postgres_server.ask("SELECT last_value FROM limits", url)
    assert limits == 600 + 250


async def test_a_locked_table_is_not_waited_for_again(postgres_server: PostgresServer) -> None:
    """The statement that finds out which row is locked waits for the table, too."""
    url = postgres_server.database()
    async with open_store(f"{url}?timeout=1.5", collections=_JOBS) as store:
        await store.save_entity("jobs", {"job_id": "a"})
        other = await asyncpg.connect(url)
        async with other.transaction():
            await other.execute('LOCK TABLE "jobs-entities"')
            begun = time.monotonic()
            with pytest.raises(OperationTimeoutError):
                await store.save_entity("jobs", {"job_id": "a"})
            assert time.monotonic() - begun < 1.9 * 1.5
        await other.close()


_SLOW = """
CREATE SEQUENCE limits;
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ DECLARE
  seconds interval := current_setting('statement_timeout');
  before bigint := (SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM limits);
BEGIN
  PERFORM setval('limits', before + extract(milliseconds FROM seconds)::bigint);
  PERFORM pg_sleep(60);
  RETURN NULL;
END $$;
CREATE TRIGGER slow BEFORE UPDATE ON "jobs-entities" FOR EACH STATEMENT EXECUTE FUNCTION slow();
"""
"""Each change sleeps; the sum of the limits of the statements, in milliseconds, is the last value."""
