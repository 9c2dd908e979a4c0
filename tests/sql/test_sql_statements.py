"""SQL of the caller, query plans on realistic numbers of rows, and memory usage of streams."""

from __future__ import annotations

import asyncio
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest

from hf_async_store import (
    Collection,
    Field,
    Index,
    InvalidInputError,
    SQLStorageStrategy,
    desc,
    gt,
    open_store,
    path,
)
from hf_async_store.schema import SUBSCRIPTION_COLLECTION
from hf_async_store.strategies.sql import engine
from hf_async_store.strategies.sql.parameters import bind
from hf_async_store.strategies.sql.sending import IndependentBatch
from hf_async_store.testing.concurrency import HANG_SECONDS, elsewhere, has_ended
from hf_async_store.values import Key
from tests.contract.harnesses import execute

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from hf_async_store.transaction import Transaction

EVIL = "'; DROP TABLE requests; --"


@pytest.mark.parametrize(
    ("sql", "params", "text", "args"),
    [
        ("SELECT ?, ?", [1, 2], "SELECT $1, $2", [1, 2]),
        ("SELECT :a, :b, :a", {"a": 1, "b": 2}, "SELECT $1, $2, $1", [1, 2]),
        ("SELECT '?', \"?\", ? -- ?", [1], "SELECT '?', \"?\", $1 -- ?", [1]),
        (
            "SELECT ':a''?', :a::text /* :b ? */",
            {"a": 1},
            "SELECT ':a''?', $1::text /* :b ? */",
            [1],
        ),
        ("SELECT $$ ? :a $$, $x$ ? $x$, ?", [1], "SELECT $$ ? :a $$, $x$ ? $x$, $1", [1]),
        ("SELECT a[1:2], ?", [1], "SELECT a[1:2], $1", [1]),
    ],
)
def test_both_forms_of_parameters(
    sql: str, params: Sequence[object] | Mapping[str, object], text: str, args: list[object]
) -> None:
    assert bind(sql, params, "$") == (text, args)


@pytest.mark.parametrize(
    ("sql", "params"),
    [("SELECT ?", []), ("SELECT ?", [1, 2]), ("SELECT :a", {}), ("SELECT :a", {"a": 1, "b": 2})],
)
def test_mismatched_parameters_are_refused(
    sql: str, params: Sequence[object] | Mapping[str, object]
) -> None:
    with pytest.raises(InvalidInputError):
        bind(sql, params, "$")


async def test_execute_with_lock(url: str) -> None:
    async with SQLStorageStrategy(url) as store:
        await store.save_entity("requests", {"request_id": "r", "status": EVIL})
        query = "SELECT request_id, status, version FROM requests WHERE request_id = {} FOR UPDATE"
        expected = [{"request_id": "r", "status": EVIL, "version": 1}]
        assert await store.execute_with_lock(query.format("?"), ["r"]) == expected
        assert await store.execute_with_lock(query.format(":id"), {"id": "r"}) == expected
        assert await store.execute_with_lock(query.format("?"), [EVIL]) == []
        async with store.begin_transaction() as tx:
            found = await tx.execute_with_lock(query.format("?"), ["r"])  # type: ignore[attr-defined]
            assert found == expected
            await tx.update_entity("requests", "r", {"status": "locked"})
        changed = (
            "json_set(doc, '$.status', ?)"
            if url.startswith("sqlite")
            else "jsonb_set(doc, '{status}', to_jsonb(?::text))"
        )
        # A key column is what `sort_bytes` returns: of a string, the byte 4 and the UTF-8 of it.
        await store.execute_with_lock(
            f'UPDATE "requests-entities" SET doc = {changed}, "status-key" = ?, '
            "version = version + 1 WHERE request_id = ?",
            ["x", b"\4x", "r"],
        )
        assert await store.count_entities("requests", {"status": "x"}) == 1
        found = await store.get_entity("requests", "r")
        assert found is not None
        assert (found["status"], found["version"]) == ("x", 3)


@pytest.fixture
async def filled(url: str) -> Any:
    """10,000 requests with 100 different statuses, and up-to-date statistics of the server."""
    async with open_store(url) as store:
        for start in range(0, 10_000, 1000):
            await store.create_entities(
                "requests",
                [
                    {"request_id": f"r{n:05}", "status": f"s{n % 100}", "machine_count": n, "x": n}
                    for n in range(start, start + 1000)
                ],
            )
        if url.startswith("postgresql"):
            execute(url, "ANALYZE")
        yield store


async def test_plans_on_many_rows(filled: Any) -> None:
    store = filled
    plan = await store.explain_query("requests", {"status": "s5"})
    assert (plan.access, plan.index) == ("index", "status-created_at-index"), plan
    plan = await store.explain_query("requests", {"request_id": "r00005"})
    assert plan.access == "key", plan
    # A page ordered by id starts at its cursor, and needs no sort.
    page = await store.query_page("requests", limit=10)
    rest = await store.query_page("requests", limit=10, cursor=page.cursor)
    assert rest.items[0]["request_id"] == "r00010"
    plan = await store.explain_query("requests", None, None, 10)
    assert not plan.sorted_here, plan
    plan = await store.explain_query("requests", {path("x"): gt(5)}, desc(path("x")))
    assert plan.access == "scan"


async def test_a_stream_uses_little_memory(filled: Any) -> None:
    store = filled
    tracemalloc.start()
    try:
        seen = 0
        async for _ in store.stream_entities("requests", order_by="-machine_count"):
            seen += 1
            if seen == 1:
                tracemalloc.reset_peak()
                before, _ = tracemalloc.get_traced_memory()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seen == 10_000
    assert peak - before < 2_000_000, "all rows at once take more than 10 MB"


async def test_an_update_overtaken_twice_succeeds(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update finds no row; the entity is created before the store reads it, and changed right after."""
    async with open_store(database) as store, open_store(database) as other:
        await other.create_entity("machines", {"machine_id": "other"})
        look = IndependentBatch.read_stored
        looks = 0

        async def overtaken(self: IndependentBatch, keys: Any) -> Any:
            nonlocal looks
            looks += 1
            if looks > 1:
                return await look(self, keys)
            await elsewhere(other.create_entity("machines", {"machine_id": "m", "name": "a"}))
            found = await look(self, keys)
            await elsewhere(other.update_entity("machines", "m", {"name": "b"}))
            return found

        monkeypatch.setattr(IndependentBatch, "read_stored", overtaken)
        assert await store.update_entity("machines", "m", {"status": "x"}) == 3
        found = await store.get_entity("machines", "m")
        assert found is not None
        assert (found["name"], found["status"]) == ("b", "x")


async def test_small_queries_take_one_round_trip(database: str) -> None:
    async with SQLStorageStrategy(database) as store:
        await store.save_entity("requests", {"request_id": "r"})
        machines = [{"machine_id": f"m{n:03}", "request_id": "r", "name": "n"} for n in range(20)]
        await store.create_entities("machines", machines)
        async with store._sql._queries.lease() as lease:
            [[isolation, read_only]] = await lease.rows(
                "SELECT current_setting('transaction_isolation'),"
                " current_setting('transaction_read_only')"
            )
            driver = lease.driver
        assert (isolation, read_only) == ("repeatable read", "on")
        sent: list[str] = []
        with driver.query_logger(lambda record: sent.append(record.query)):
            whole = await store.query_entities("machines", {"request_id": "r"})
            first = await store.query_entities("machines", None, "name", 10)
            page = await store.query_page("machines", {"name": "n"}, "created_at", 10)
            assert await store.count_entities("machines", {"request_id": "r"}) == 20
            await asyncio.sleep(0)  # the driver logs a query by a callback
        assert [len(each) for each in (whole, first, page.items)] == [20, 10, 10]
        assert len(sent) == 4
        assert all(each.startswith("SELECT") for each in sent)


async def test_a_transaction_that_reads_one_entity_and_changes_it_takes_two_round_trips(
    database: str,
) -> None:
    async with SQLStorageStrategy(database) as store:
        await store.save_entity("requests", {"request_id": "r", "machine_count": 1})

        async def change(tx: Transaction) -> None:
            entity = await tx.get_entity("requests", "r")
            assert entity is not None
            await tx.update_entity("requests", "r", {"machine_count": entity["machine_count"] + 1})

        async def change_and_read(tx: Transaction) -> None:
            await change(tx)
            assert await tx.get_entity("templates", "none") is None

        async def sent_by(work: Callable[[Transaction], Awaitable[None]]) -> list[str]:
            sent: list[str] = []
            with driver.query_logger(
                lambda record: sent.append(record.query.split()[0].strip(";"))
            ):
                await store.run_transaction(work)
                await asyncio.sleep(0)  # the driver logs a query by a callback
            return sent

        await store.run_transaction(change)  # prepares what follows
        async with store._sql._main.lease() as lease:
            driver = lease.driver
        assert await sent_by(change) == ["SELECT", "UPDATE"]
        again = ["SELECT", "BEGIN", "SELECT", "UPDATE", "SELECT", "COMMIT"]
        assert await sent_by(change_and_read) == again
        # The next ones are taken to do as much.
        assert await sent_by(change_and_read) == ["BEGIN", "SELECT", "UPDATE", "SELECT", "COMMIT"]
        found = await store.get_entity("requests", "r")
        assert found is not None
        assert (found["machine_count"], found["version"]) == (5, 5)

        # A long entity would be sent twice, to be compared and replaced.
        long = {"template_id": "t", "name": "x" * 20_000}
        await store.save_entity("templates", long)

        async def rename(tx: Transaction) -> None:
            assert await tx.get_entity("templates", "t") is not None
            await tx.update_entity("templates", "t", {"image_id": "i"})

        assert await sent_by(rename) == ["SELECT", "BEGIN", "SELECT", "UPDATE", "COMMIT"]


async def test_a_transaction_first_reads_an_entity_whose_table_does_not_exist(
    database: str,
) -> None:
    async with SQLStorageStrategy(database) as store:
        await store.save_entity("requests", {"request_id": "r"})
        key = Key(SUBSCRIPTION_COLLECTION.name, "none")
        assert await store.run_transaction(lambda tx: tx._fetch([key], None)) == [None]


@pytest.mark.parametrize("waits", [False, True], ids=["behind long ones", "behind short ones"])
async def test_a_query_that_finds_no_free_connection_for_queries(
    database: str, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    """Behind queries that take long, it uses another connection."""
    async with SQLStorageStrategy(database) as store:
        await store.save_entity("requests", {"request_id": "r", "status": "x"})
        if waits:
            monkeypatch.setattr(engine, "_LONG_USE", HANG_SECONDS)
            monkeypatch.setattr(engine, "_PATIENCE", HANG_SECONDS)
        pool = store._sql._queries
        leases = [await pool.acquire() for _ in range(pool._most)]
        counting = asyncio.create_task(store.count_entities("requests", {"status": "x"}))
        try:
            assert await has_ended(counting) is not waits
            if not waits:
                assert len(await store.query_entities("requests", {"status": "x"})) == 1
        finally:
            for each in leases:
                await pool.release(each, check=False)
        assert await counting == 1


@pytest.mark.parametrize("count", [511, 512, 513, 700])
async def test_all_rows_of_an_indexed_value_are_found(url: str, count: int) -> None:
    async with SQLStorageStrategy(url) as store:
        await store.save_entity("requests", {"request_id": "r"})
        ids = [f"m{number:03}" for number in range(count)]
        machines = [{"machine_id": each, "request_id": "r", "name": "x" * 300} for each in ids]
        await store.create_entities("machines", machines)
        for order in (None, "name", "-created_at"):
            found = await store.query_entities("machines", {"request_id": "r"}, order)
            assert sorted([each["machine_id"] for each in found]) == ids
        streamed = [each async for each in store.stream_entities("machines", {"request_id": "r"})]
        assert [each["machine_id"] for each in streamed] == ids


async def test_95_a_change_that_was_decided_before_another_program_added_an_index(
    database: str,
) -> None:
    """A change of `run_transaction` is kept until its end; meanwhile another task finds the new index."""
    fields = ["status", Field("size", "integer")]
    jobs = [
        Collection("jobs", key="job_id", fields=fields, indexes=[Index("status"), *more])
        for more in ([], [Index("size")])
    ]
    before, after = jobs
    async with open_store(database, collections=[before]) as store:
        await store.create_entities("jobs", [{"job_id": each, "size": 1} for each in "ab"])
        tries: list[Transaction] = []

        async def add_index() -> None:
            async with open_store(database, collections=[after]) as newer:
                await newer.apply_schema()
            await store.update_entity("jobs", "b", {"size": 2})

        async def work(tx: Transaction) -> None:
            tries.append(tx)
            await tx.get_entity("jobs", "a")
            await tx.update_entity("jobs", "a", {"size": 3})
            if len(tries) == 1:
                await asyncio.create_task(add_index())

        await store.run_transaction(work)
        async with open_store(database, collections=[after]) as newer:
            for each in (store, newer):
                found = await each.query_entities("jobs", {"size": 3})
                assert [entity["job_id"] for entity in found] == ["a"]
