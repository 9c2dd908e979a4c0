"""Claims on PostgreSQL, by the clock of the server, and how they are read."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final, cast

import asyncpg
import pytest

from hf_async_store import (
    ClaimLostError,
    Collection,
    Index,
    and_,
    between,
    in_,
    not_,
    open_store,
    or_,
    path,
)
from hf_async_store.claim_records import ClaimTerms
from hf_async_store.query import Filters, OrderBy, build_query
from hf_async_store.schema import LOCK_COLLECTION
from hf_async_store.strategies.sql.catalogue import Catalogue, declared
from hf_async_store.strategies.sql.connections import LeasedConnection
from hf_async_store.strategies.sql.index_order import prefix_of
from hf_async_store.strategies.sql.names import Names
from hf_async_store.strategies.sql.postgres_grammar import PostgresGrammar
from hf_async_store.strategies.sql.rows import Table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

REQUEST = {"request_id": "r-1", "status": "PENDING"}
JOBS: Final = Collection(
    "jobs",
    key="job_id",
    fields=["status", "owner", "size"],
    indexes=["status", Index("status", "size"), "owner", "size"],
)


async def test_104_tokens_increase_by_the_clock_of_the_server(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(database) as store:
        await store.create_entity("requests", REQUEST)
        [first] = await store.claim_entities("requests")
        await first.finish()
        monkeypatch.setattr(time, "time_ns", lambda: 1)
        [second] = await store.claim_entities("requests")
        assert second.token > first.token


async def test_104_a_token_is_that_of_the_moment_at_which_it_is_written(tmp_path: Path) -> None:
    """The statement of a claim may wait while another claims the entity and deletes the claim."""
    async with open_store(f"sqlite:{tmp_path}/store.db") as store:
        async with store.lock("a"):
            pass
        engine = cast("Any", store)._sql
        table = LOCK_COLLECTION.name
        early, late = (engine._statement(table) for _ in range(2))
        written = [
            (each.insert(each.listed(["b"]), ClaimTerms(60, "me")), each.values)
            for each in (early, late)
        ]
        tokens = []
        async with engine.writing() as lease:
            for sql, values in reversed(written):
                [[_, token, _]] = await lease.rows(sql, values, writes=True)
                tokens.append(token)
                await lease.rows(f"DELETE FROM {late.table}", writes=True)
        assert tokens == sorted(set(tokens))


async def test_104_equal_values_of_two_types_are_two_filters(url: str) -> None:
    async with open_store(url) as store:
        await store.create_entity("requests", {"request_id": "r-1", "n": 1, "m": 2})
        assert await store.claim_entities("requests", {path("n"): True}) == []
        [claim] = await store.claim_entities("requests", {path("n"): 1})
        await claim.release()
        both = ({path("n"): 1}, {path("m"): 3})
        assert await store.claim_entities("requests", and_(*both)) == []
        [claim] = await store.claim_entities("requests", or_(*both))


async def test_116_a_queue_is_read_by_its_index_whatever_the_statistics_say(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, Sequence[Any]]] = []
    written = LeasedConnection.written

    async def recorded(lease: Any, sql: str, args: Sequence[Any], doing: str) -> Any:
        sent.append((sql, args))
        return await written(lease, sql, args, doing)

    monkeypatch.setattr(LeasedConnection, "written", recorded)
    connection = await asyncpg.connect(database)
    try:
        async with open_store(database, collections=[JOBS]) as store:
            entities = [{"job_id": f"j-{each:04}", "status": "PENDING"} for each in range(2000)]
            await store.save_entities("jobs", entities)
            await connection.execute("VACUUM ANALYZE")
            for limit in (1, 10):
                await store.claim_entities("jobs", {"status": "PENDING"}, limit=limit)
                await store.claim_entities("jobs", {"status": "PENDING"}, order_by="-size")
        indexes = ["jobs-status-index", "jobs-status-size-index"] * 2
        for (sql, args), index in zip(sent, indexes, strict=True):
            rows = await connection.fetch(f"EXPLAIN {sql}", *args)
            plan = "\n".join(each[0] for each in rows)
            assert f'using "{index}"' in plan, plan
            assert "Sort" not in plan, plan
    finally:
        await connection.close()


async def test_105_a_claim_that_is_lost_while_it_is_finished_changes_nothing(database: str) -> None:
    connection = await asyncpg.connect(database)
    try:
        async with open_store(database) as store:
            await store.create_entity("requests", REQUEST)
            [claim] = await store.claim_entities("requests")
            locked = connection.transaction()
            await locked.start()
            await connection.execute('SELECT FROM "requests-entities" FOR UPDATE')
            finishing = asyncio.create_task(claim.finish({"status": "COMPLETED"}))
            # It has seen the claim, and waits for the entity.
            waiting = (
                "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'"
            )
            while not await connection.fetchval(waiting):
                await asyncio.sleep(0.01)
            other = await asyncpg.connect(database)
            await other.execute('UPDATE "requests-claims" SET token = token + 1')
            await other.close()
            await locked.rollback()
            with pytest.raises(ClaimLostError):
                await finishing
            [entity] = await store.query_entities("requests")
            assert (entity["status"], entity["version"]) == ("PENDING", 1)
            [held] = await store.claims("requests")
            assert held.token == claim.token + 1
    finally:
        await connection.close()


@pytest.mark.parametrize(
    ("filters", "order_by", "prefix"),
    [
        (None, None, ()),
        ({"owner": "a"}, "-job_id", ("owner",)),
        ({"status": "A"}, None, ("status",)),
        ({"status": "A", "size": "1"}, None, ("status", "size")),
        ({"status": "A"}, ["size", "job_id"], ("status",)),
        ({"status": "A", "size": between("1", "2")}, "size", ("status",)),
        (and_({"status": "A"}, {path("note"): "x"}), None, ("status",)),
        (not_({"owner": "a"}), "size", ()),
        ({"status": "A"}, ["-size", "job_id"], None),  # no index is in two directions
        ({"status": "A"}, "owner", None),
        ({"status": "A", "owner": "a"}, None, None),  # by which of them, statistics tell
        ({"status": "A", "size": between("1", "2")}, None, None),
        ({"status": in_(["A", "B"])}, None, None),
        (or_({"status": "A"}, {"owner": "a"}), None, None),
    ],
)
def test_116_the_index_that_has_the_order_of_a_queue(
    filters: Filters, order_by: OrderBy, prefix: tuple[str, ...] | None
) -> None:
    table = Table("jobs", declared(Catalogue(), [JOBS])["jobs"], PostgresGrammar(), Names())
    query = build_query(JOBS, filters=filters, order_by=order_by, limit=1)
    assert prefix_of(table, query) == prefix
