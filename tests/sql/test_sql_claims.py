"""Claims on PostgreSQL, by the clock of the server, and how they are read."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final, cast

import asyncpg
import pytest

from hf_async_store import (
    Claim,
    ClaimLostError,
    Collection,
    Index,
    and_,
    begins_with,
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
from hf_async_store.strategies.sql import claim_sql
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


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Sequence[Any]]]:
    """The statements that claim, and those under a claim, with their arguments."""
    found: list[tuple[str, Sequence[Any]]] = []
    autocommit = LeasedConnection.autocommit

    async def recorded(lease: Any, sql: str, args: Sequence[Any], doing: str) -> Any:
        if sql.startswith("WITH"):
            found.append((sql, args))
        return await autocommit(lease, sql, args, doing)

    monkeypatch.setattr(LeasedConnection, "autocommit", recorded)
    return found


async def _plans(connection: Any, sent: Sequence[tuple[str, Sequence[Any]]]) -> list[str]:
    found = []
    for sql, args in sent:
        rows = await connection.fetch(f"EXPLAIN {sql}", *args)
        found.append("\n".join(each[0] for each in rows))
    return found


def _passes_over_many(store: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store claims as if its last claim had passed over many held entities, and reads all claims."""
    monkeypatch.setattr(claim_sql, "_LOOK_UP_UNTIL", "(SELECT pg_catalog.clock_timestamp())")
    monkeypatch.setattr(cast("Any", store)._sql, "_passing_many", _Always())


class _Always(set[str]):
    def __contains__(self, _: object) -> bool:
        return True


@pytest.mark.parametrize("many", [False, True])
async def test_116_a_queue_is_read_by_its_index_whatever_the_statistics_say(
    database: str,
    sent: list[tuple[str, Sequence[Any]]],
    monkeypatch: pytest.MonkeyPatch,
    many: bool,
) -> None:
    connection = await asyncpg.connect(database)
    try:
        async with open_store(database, collections=[JOBS]) as store:
            if many:
                _passes_over_many(store, monkeypatch)
            entities = [{"job_id": f"j-{each:04}", "status": "PENDING"} for each in range(2000)]
            await store.save_entities("jobs", entities)
            await connection.execute("VACUUM ANALYZE")
            sent.clear()
            for limit in (1, 10):
                await store.claim_entities("jobs", {"status": "PENDING"}, limit=limit)
                await store.claim_entities("jobs", {"status": "PENDING"}, order_by="-size")
        indexes = ["jobs-status-index", "jobs-status-size-index"] * 2
        await connection.execute("SET enable_seqscan = off")  # as for claims
        for plan, index in zip(await _plans(connection, sent), indexes, strict=True):
            assert f'using "{index}"' in plan, plan
            assert "Sort" not in plan, plan
            assert ("hashed SubPlan" in plan) == many, plan
            assert ("Index Only Scan" in plan) == many, plan
            assert "Seq Scan" not in plan, plan
    finally:
        await connection.close()


@pytest.mark.parametrize(
    ("filters", "order_by"),
    [
        ({"status": "PENDING"}, "size"),
        ({"status": in_(["PENDING", "RUNNING"])}, ["size", "-owner"]),
        ({path("note"): "a"}, "size"),
        ({"status": begins_with("pend", ignore_case=True)}, "size"),
    ],
)
async def test_108_what_is_free_among_many_held_entities(
    database: str, monkeypatch: pytest.MonkeyPatch, filters: Filters, order_by: OrderBy
) -> None:
    async with open_store(database, collections=[JOBS]) as store:
        _passes_over_many(store, monkeypatch)

        async def create(number: int) -> None:
            job = {"job_id": f"j-{number}", "size": f"{number:03}", "owner": "a", "note": "a"}
            await store.create_entity("jobs", {**job, "status": "PENDING"})

        async def claimed(limit: int, attempts: int | None = None) -> list[Claim]:
            found = await store.claim_entities(
                "jobs", filters, order_by=order_by, limit=limit, max_attempts=attempts
            )
            assert [each.entity["size"] for each in found] == sorted(
                f"{each.id[2:]:0>3}" for each in found
            )
            return found

        for number in range(10, 50):
            await create(number)
        held = await claimed(30)
        assert [each.id for each in held] == [f"j-{each}" for each in range(10, 40)]
        await create(5)
        await held[7].release()
        await held[20].finish({"status": "DONE", "note": "b"})
        await store.delete_entity("jobs", "j-41")
        assert [each.id for each in await claimed(1)] == ["j-5"]
        assert [each.id for each in await claimed(3, attempts=1)] == ["j-40", "j-42", "j-43"]
        assert [each.id for each in await claimed(2)] == ["j-17", "j-44"]
        assert len(await claimed(100)) == 5
        assert await claimed(1) == []


async def test_108_after_a_claim_that_finds_nothing_many_may_be_held(
    database: str, sent: list[tuple[str, Sequence[Any]]]
) -> None:
    async with open_store(database, collections=[JOBS]) as store:
        await store.create_entity("jobs", {"job_id": "a"})
        [claim] = await store.claim_entities("jobs")
        assert await store.claim_entities("jobs") == []
        await claim.release()
        [_] = await store.claim_entities("jobs")
    reads_all = [" NOT IN " in sql for sql, _ in sent if "INSERT" in sql]
    assert reads_all[0] is False
    assert reads_all[-1] is True


async def test_116_those_who_finish_neighbours_at_once_do_not_conflict(
    database: str, sent: list[tuple[str, Sequence[Any]]]
) -> None:
    """Otherwise, of eight processes that finish single entities, every third attempt fails."""
    connection = await asyncpg.connect(database)
    try:
        async with open_store(database, collections=[JOBS]) as store:
            for each in "ab":
                await store.create_entity("jobs", {"job_id": each, "status": "PENDING"})
            claims = await store.claim_entities("jobs", {"status": "PENDING"}, limit=2)
            await claims[0].update({"status": "RUNNING"})
            sent.clear()
            locked = connection.transaction()
            await locked.start()
            await connection.execute(
                """SELECT FROM "jobs-entities" WHERE job_id = 'a' FOR UPDATE"""
            )
            finishing = asyncio.create_task(claims[0].finish({"status": "DONE"}))
            await _until_a_lock_is_waited_for(connection)
            await claims[1].finish({"status": "DONE"})
            await locked.rollback()
            await finishing
            assert await store.count_by("jobs", "status") == [("DONE", 2)]
            assert await store.claims("jobs") == []
        assert len(sent) == 2
        for plan in await _plans(connection, sent):
            assert 'Tid Scan on "jobs-entities"' in plan, plan
    finally:
        await connection.close()


async def test_107_a_row_that_has_moved_is_found_by_its_id(database: str) -> None:
    connection = await asyncpg.connect(database)
    try:
        async with open_store(database, collections=[JOBS]) as store:
            jobs = [{"job_id": each, "status": "PENDING"} for each in "abc"]
            await store.create_entities("jobs", jobs)
            claims = await store.claim_entities("jobs", {"status": "PENDING"}, limit=3)
            for each in "abc":
                await store.update_entity("jobs", each, {"owner": "moved"})
            await connection.execute('VACUUM "jobs-entities"')
            others = [{"job_id": f"other-{each}", "status": "NEW"} for each in range(3)]
            await store.create_entities("jobs", others)  # in the places that are free now
            await claims[0].finish({"status": "DONE"})
            assert await claims[1].update({"status": "DONE"}) == 3
            await claims[2].delete()
            found = await store.query_entities("jobs", order_by="job_id")
            expected = [("a", "DONE", 3), ("b", "DONE", 3)]
            expected += [(each["job_id"], "NEW", 1) for each in others]
            assert [(each["job_id"], each["status"], each["version"]) for each in found] == expected
            assert [each.id for each in await store.claims("jobs")] == ["b"]
            with pytest.raises(ClaimLostError):
                await claims[0].update({"status": "LATE"})
    finally:
        await connection.close()


async def _until_a_lock_is_waited_for(connection: Any) -> None:
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'"
    while not await connection.fetchval(waiting):
        await asyncio.sleep(0.01)


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
            await _until_a_lock_is_waited_for(connection)  # it has seen the claim
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
