"""Indexes that are read in the order of a query: how many requests are sent, and how many items read."""

from __future__ import annotations

from functools import partial
from itertools import groupby
from random import Random
from typing import TYPE_CHECKING, Any, Final

import pytest

from hf_async_store import (
    HOST_FACTORY,
    Collection,
    ConfigurationError,
    Field,
    Index,
    InvalidQueryError,
    MemoryStorageStrategy,
    begins_with,
    between,
    gt,
    gte,
    in_,
    lt,
    lte,
)
from hf_async_store.event_loop import pause
from hf_async_store.strategies.dynamodb import reading
from hf_async_store.testing.assertions import payload
from tests.dynamodb.proxy import Changed
from tests.dynamodb.support import new_prefix, store_at

if TYPE_CHECKING:
    from hf_async_store import DynamoDBStorageStrategy
    from tests.dynamodb.proxy import Fault, Proxy, Request

pytestmark = pytest.mark.hf_sampled

JOBS: Final = Collection(
    "jobs",
    key="job_id",
    fields=["queue", "state", Field("priority", "integer"), Field("due_at", "timestamp")],
    indexes=[
        Index("queue", "priority", "state", "created_at"),
        Index("queue", "job_id"),
        Index("state", "priority"),
        "priority",
    ],
)


def job(number: int, **fields: object) -> dict[str, Any]:
    return {
        "job_id": f"j{number:04}",
        "queue": "abc"[number % 3],
        "state": ("NEW", "DONE")[number % 2],
        "priority": number % 5,
        "created_at": f"2026-01-01T00:{number // 60:02}:{number % 60:02}.000000Z",
        **fields,
    }


class Reads:
    """Counts requests and the items in their responses.

    Args:
        tie: shuffle the items of a response that are equal in this attribute, because DynamoDB
            promises no order among them.
    """

    def __init__(self, proxy: Proxy, *, tie: str | None = None) -> None:
        self.operations: list[str] = []
        self.items = 0
        self._tie = tie
        self._random = Random(5)
        proxy.rule = self._rule

    def _rule(self, request: Request) -> Fault | None:
        if request.is_migration_check:
            return None
        self.operations.append(request.operation)
        return Changed(self._changed)

    def _changed(self, response: dict[str, Any]) -> dict[str, Any]:
        items = response.get("Items", [])
        self.items += len(items)
        if self._tie is not None and "Items" in response:
            groups = [list(group) for _, group in groupby(items, lambda each: each[self._tie])]
            for each in groups:
                self._random.shuffle(each)
            response["Items"] = [each for group in groups for each in group]
        return response

    def taken(self) -> tuple[list[str], int]:
        taken = self.operations, self.items
        self.operations, self.items = [], 0
        return taken


async def _newest(
    store: DynamoDBStorageStrategy, filters: Any, order: Any, limit: int
) -> list[str]:
    found = await store.query_entities("requests", filters, order, limit)
    return [str(each["request_id"]) for each in found]


async def test_fifty_rows_of_a_compound_index_are_one_query_of_51_items(proxy: Proxy) -> None:
    async with store_at(proxy.url, collections=HOST_FACTORY) as store:
        await store.import_entities(
            "requests",
            [
                {
                    "request_id": f"r{n:04}",
                    "status": ("PENDING", "DONE")[n % 2],
                    "created_at": job(n)["created_at"],
                }
                for n in range(400)
            ],
        )
        await store.import_entities(
            "machines",
            [
                {
                    "machine_id": f"m{n:03}",
                    "request_id": "r0000",
                    "status": ("UP", "DOWN")[n % 2],
                    "created_at": job(n)["created_at"],
                }
                for n in range(100)
            ],
        )
        reads = Reads(proxy)
        wanted = [f"r{n:04}" for n in range(398, 298, -2)]
        assert await _newest(store, {"status": "PENDING"}, "-created_at", 50) == wanted
        assert reads.taken() == (["Query"], 51)
        page = await store.query_page("requests", {"status": "PENDING"}, "-created_at", 50)
        assert [each["request_id"] for each in page.items] == wanted
        reads.taken()
        page = await store.query_page(
            "requests", {"status": "PENDING"}, "-created_at", 50, cursor=page.cursor
        )
        assert [each["request_id"] for each in page.items] == [
            f"r{n:04}" for n in range(298, 198, -2)
        ]
        operations, items = reads.taken()
        assert (operations, items <= 54) == (["Query"], True)
        # The newest of all: 8 partitions, read concurrently.
        assert await _newest(store, None, "-created_at", 50) == [
            f"r{n:04}" for n in range(399, 349, -1)
        ]
        operations, items = reads.taken()
        assert set(operations) == {"Query"}
        assert (len(operations) <= 16, items <= 130) == (True, True), (operations, items)
        # Two partitions, merged.
        both = {"status": in_(["PENDING", "DONE"])}
        assert await _newest(store, both, "-created_at", 50) == [
            f"r{n:04}" for n in range(399, 349, -1)
        ]
        operations, items = reads.taken()
        assert (operations, items <= 70) == (["Query"] * 2, True)
        filters = {"request_id": "r0000", "status": "UP"}
        assert await store.count_entities("machines", filters) == 50
        assert reads.taken() == (["Query"], 0)
        machines = await store.query_entities(
            "machines", {"request_id": "r0000"}, order_by="created_at", limit=10
        )
        assert [each["machine_id"] for each in machines] == [f"m{n:03}" for n in range(10)]
        assert reads.taken() == (["Query"], 11)
        assert await store.count_entities("requests", both) == 400
        assert reads.taken() == (["Query"] * 2, 0)


def request(number: int) -> dict[str, Any]:
    return {
        "request_id": f"r{number:04}",
        "request_type": f"t{number // 50}",
        "status": ("PENDING", "DONE")[number % 2],
        "created_at": job(number)["created_at"],
    }


async def _page(store: DynamoDBStorageStrategy, number: int, *arguments: Any) -> list[Any]:
    """A page of 10 rows of a walk; the first has the number 1."""
    cursor = None
    for _ in range(number):
        page = await store.query_page("requests", *arguments, 10, cursor=cursor)
        cursor = page.cursor
    return list(page.items)


_PENDING: Final = {"status": "PENDING"}
_BOTH: Final = {"status": in_(["PENDING", "DONE"])}
_EARLIER: Final = {"created_at": lt(job(30)["created_at"])}
_BETWEEN: Final = {"created_at": between(job(30)["created_at"], job(60)["created_at"])}
_LATER: Final = {"created_at": gte(job(60)["created_at"])}
SHAPES: Final[dict[str, tuple[Any, int, int]]] = {
    # name: the query, how many requests it sends at most, and how many items they read
    "equality and range": (
        lambda each: each.query_entities("requests", {**_PENDING, **_LATER}, "created_at", 20),
        1,
        21,
    ),
    "range": (lambda each: each.query_entities("requests", _LATER, "created_at", 20), 16, 90),
    "first rows": (lambda each: each.query_entities("requests", None, "created_at", 20), 16, 90),
    "two partitions": (
        lambda each: each.query_entities("requests", _BOTH, "-created_at", 20),
        2,
        40,
    ),
    "all of a value": (lambda each: each.query_entities("requests", {"request_type": "t1"}), 1, 50),
    "count of a value": (
        lambda each: each.count_entities("requests", {"request_type": "t1"}),
        1,
        0,
    ),
    "count of two values": (
        lambda each: each.count_entities("requests", {"request_type": in_(["t0", "t1"])}),
        2,
        0,
    ),
    "count of a range": (lambda each: each.count_entities("requests", _BETWEEN), 8, 0),
    "count of an open range": (lambda each: each.count_entities("requests", _EARLIER), 8, 31),
    "four pages": (lambda each: _page(each, 4, _PENDING, "created_at"), 4, 4 * 13),
    "four pages of two partitions": (
        lambda each: _page(each, 4, _BOTH, "-created_at"),
        2 * 4,
        2 * 4 * 13,
    ),
    "four pages of all": (lambda each: _page(each, 4, None, "-created_at"), 4 * 16, 4 * 90),
    "update of the oldest": (
        lambda each: each.update_where(
            "requests", _PENDING, {"count": 1}, order_by="created_at", limit=5
        ),
        4,
        20,
    ),
}


@pytest.mark.parametrize("stored", [200, 800])
async def test_what_a_query_reads_does_not_depend_on_what_is_stored(
    proxy: Proxy, stored: int
) -> None:
    async with (
        store_at(proxy.url, collections=HOST_FACTORY) as store,
        MemoryStorageStrategy(collections=HOST_FACTORY) as memory,
    ):
        for each in (store, memory):
            await each.import_entities("requests", [request(n) for n in range(stored)])
        reads = Reads(proxy)
        for name, (query, requests, items) in SHAPES.items():
            assert _payloads(await query(store)) == _payloads(await query(memory)), name
            operations, read = reads.taken()
            assert (len(operations) <= requests, read <= items) == (True, True), (
                name,
                operations,
                read,
            )
            assert "Scan" not in operations, name


def _payloads(result: Any) -> Any:
    return [payload(each) for each in result] if isinstance(result, list) else result


@pytest.mark.parametrize("order", ["created_at", "-created_at"])
async def test_the_last_group_of_ties_is_read_to_its_end(proxy: Proxy, order: str) -> None:
    same = [
        {"request_id": f"r{n:03}", "status": "x", "created_at": job(n // 40)["created_at"]}
        for n in range(200)
    ]
    async with (
        store_at(proxy.url, collections=HOST_FACTORY) as store,
        MemoryStorageStrategy(collections=HOST_FACTORY) as memory,
    ):
        for each in (store, memory):
            await each.import_entities("requests", same)
        reads = Reads(proxy, tie="created_at")
        for filters in ({"status": "x"}, None):
            reads.taken()
            found = await store.query_entities("requests", filters, order, 50)
            assert found == await memory.query_entities("requests", filters, order, 50)
            assert reads.taken()[1] <= (80 if filters else 8 * 30)
            walked: list[Any] = []
            cursor: str | None = None
            while cursor is not None or not walked:
                page = await store.query_page("requests", filters, order, 30, cursor=cursor)
                walked += page.items
                cursor = page.cursor
            assert walked == await memory.query_entities("requests", filters, order)


QUERIES: Final[list[tuple[Any, Any, str, bool]]] = [
    ({"queue": "a"}, ["priority", "state", "created_at"], "queue-priority-state-created_at", True),
    ({"queue": "a"}, ["-priority", "-state"], "queue-priority-state-created_at", True),
    ({"queue": "a"}, ["priority", "-state"], "queue-priority-state-created_at", True),
    ({"queue": "a", "priority": 2}, "-state", "queue-priority-state-created_at", True),
    (
        {"queue": "a", "priority": 2, "state": "NEW"},
        "created_at",
        "queue-priority-state-created_at",
        True,
    ),
    ({"queue": in_(["a", "c"])}, "priority", "queue-priority-state-created_at", True),
    ({"queue": "a", "priority": gt(2)}, "priority", "queue-priority-state-created_at", True),
    ({"queue": "a", "priority": in_([0, 3])}, None, "queue-priority-state-created_at", False),
    ({"queue": "a"}, "job_id", "queue-job_id", True),
    ({"queue": "a", "job_id": begins_with("j00")}, "-job_id", "queue-job_id", True),
    ({"state": "NEW", "priority": None}, "job_id", "state-priority", False),
    (None, "-priority", "priority", True),
    ({"priority": gte(3)}, ["priority", "queue"], "priority", True),
    ({"priority": lt(1)}, None, "priority", False),
]


@pytest.mark.parametrize(("filters", "order", "index", "in_order"), QUERIES, ids=str)
async def test_the_index_and_the_order_of_a_query(
    proxy: Proxy, filters: Any, order: Any, index: str, in_order: bool
) -> None:
    jobs = [job(n) for n in range(60)]
    jobs += [job(60, priority=None), job(61, state=None), {"job_id": "odd", "queue": "a"}]
    async with (
        store_at(proxy.url, collections=[JOBS]) as store,
        MemoryStorageStrategy(collections=[JOBS]) as memory,
    ):
        for each in (store, memory):
            await each.import_entities("jobs", jobs)
        plan = await store.explain_query("jobs", filters, order, 7)
        assert (plan.access, plan.index) == ("index", f"{index}-index")
        assert plan.sorted_here is (order is not None and not in_order)
        reads = Reads(proxy)
        for limit in (7, None):
            found = await store.query_entities("jobs", filters, order, limit)
            wanted = await memory.query_entities("jobs", filters, order, limit)
            if order is None:
                assert len(found) == len(wanted)
            else:
                assert found == wanted
        assert set(reads.taken()[0]) == {"Query"}
        assert await store.count_entities("jobs", filters) == len(wanted)


async def test_every_write_maintains_the_keys_of_indexes(proxy: Proxy) -> None:
    """An update of a part of a composite sort key needs its other parts."""
    table = "jobs"
    async with store_at(proxy.url, collections=[JOBS]) as store:
        await store.save_entities(table, [job(n) for n in range(12)])
        await store.update_entity(table, "j0000", {"priority": 9})
        await store.update_entity(table, "j0001", {"priority": 8}, expected_version=1)
        await store.update_entity(
            table, "j0002", {"state": "X"}, condition_expression="attribute_exists(queue)"
        )
        await store.update_entity(table, "j0003", {"priority": 1, "state": "Y", "created_at": None})
        kept = {name: value for name, value in job(4).items() if name != "created_at"}
        await store.save_entity(table, {**kept, "priority": 7})
        await store.save_entity(table, {**job(5), "priority": 6}, expected_version=1)
        async with store.begin_transaction() as tx:
            await tx.update_entity(table, "j0006", {"state": "Z"})
        await store.update_entities(table, {"j0007": {"priority": 5}, "j0008": {"state": "W"}})
        mapping = store._dynamodb.tables.mappings[table]
        params = {"TableName": store._dynamodb.tables.name(table)}
        items = (await store._dynamodb.client.call("Scan", params))["Items"]
        items = list(filter(mapping.is_entity, items))
        for item in items:
            entity = mapping.entity(item)
            whole = mapping.item(str(entity["job_id"]), entity, 1, "token")
            keys = {key for shape in mapping.shapes for key, _, _ in shape.keys}
            assert {each: item.get(each) for each in keys} == {
                each: whole.get(each) for each in keys
            }
        assert len(items) == 12


async def test_more_indexes_than_a_table_can_have() -> None:
    names = [f"f{n}" for n in range(21)]
    many = Collection("many", key="id", fields=names, indexes=names)
    with pytest.raises(ConfigurationError, match="at most 20"):
        store_at("http://127.0.0.1:1", collections=[many])


async def test_query_by_gsi_on_ordered_and_composite_indexes(proxy: Proxy) -> None:
    async with store_at(proxy.url, collections=[JOBS]) as store:
        await store.save_entities("jobs", [job(n) for n in range(30)])
        found = await store.query_by_gsi(
            "jobs", "priority-index", "priority > :p", {":p": 2}, limit=7, descending=True
        )
        assert [each["priority"] for each in found] == [4] * 6 + [3]
        name = "queue-priority-state-created_at-index"
        found = await store.query_by_gsi("jobs", name, "queue = :q", {":q": "b"}, limit=3)
        assert [each["priority"] for each in found] == [0, 0, 1]
        condition = "queue = :q AND priority = :p"
        with pytest.raises(InvalidQueryError, match="only these fields"):
            await store.query_by_gsi("jobs", name, condition, {":q": "b", ":p": 1})


async def test_an_index_of_an_earlier_shape_is_not_used(proxy: Proxy) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix, [JOBS]) as store:
        table = f"{prefix}_jobs"
        request = store._dynamodb.tables.request("jobs")
        request["AttributeDefinitions"] = [
            {"AttributeName": "job_id", "AttributeType": "S"},
            {"AttributeName": "priority", "AttributeType": "N"},
        ]
        request["GlobalSecondaryIndexes"] = [
            {
                "IndexName": "priority-index",
                "KeySchema": [{"AttributeName": "priority", "KeyType": "HASH"}],
                "Projection": {"ProjectionType": "ALL"},
            }
        ]
        await store._dynamodb.client.call("CreateTable", request)
        await store.save_entities("jobs", [job(1), job(2, priority=None)])
        assert (await store.explain_query("jobs", None, "priority", 5)).access == "scan"
        assert len(await store.query_entities("jobs", {"priority": 1})) == 1
        told = f"{table}: the index priority-index does not match its declaration"
        assert told in str((await store.health())["problems"])


async def test_long_strings_with_the_same_beginning_are_in_order(proxy: Proxy) -> None:
    # Their sort bytes are equal, so the index has them in the order of the next field.
    jobs = Collection(
        "jobs",
        key="job_id",
        fields=["queue", "title", "note"],
        indexes=[Index("queue", "title", "note")],
    )
    stored = [
        {"job_id": f"j{n}", "queue": "a", "title": f"{'t' * 256}{n}", "note": str(9 - n)}
        for n in range(6)
    ]
    async with store_at(proxy.url, collections=[jobs]) as store:
        await store.create_entities("jobs", stored)
        for order in (["title", "note"], ["-title", "-note"]):
            expected = [f"j{n}" for n in range(6)]
            expected = expected[::-1] if order[0] == "-title" else expected
            plan = await store.explain_query("jobs", {"queue": "a"}, order)
            assert (plan.index, plan.sorted_here) == ("queue-title-note-index", False)
            found = await store.query_entities("jobs", {"queue": "a"}, order)
            assert [each["job_id"] for each in found] == expected
            pages, cursor = [], None
            while cursor is not None or not pages:
                page = await store.query_page(
                    "jobs", {"queue": "a"}, order_by=order, limit=2, cursor=cursor
                )
                pages.append([each["job_id"] for each in page.items])
                cursor = page.cursor
            assert [each for page in pages for each in page] == expected


@pytest.mark.parametrize("comparison", [lt, lte, partial(between, "a")])
async def test_ids_are_compared_with_a_string_longer_than_an_id(
    proxy: Proxy, comparison: Any
) -> None:
    async with store_at(proxy.url, collections=[JOBS]) as store:
        await store.create_entity("jobs", {"job_id": "x" * 300, "queue": "a"})
        filters = {"queue": "a", "job_id": comparison("x" * 1100)}
        assert (await store.explain_query("jobs", filters)).index == "queue-job_id-index"
        assert len(await store.query_entities("jobs", filters)) == 1
        assert await store.count_entities("jobs", filters) == 1


async def test_the_event_loop_gets_turns_while_rows_come_in_the_order_of_an_index(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = 0

    async def counted() -> None:
        nonlocal turns
        turns += 1
        await pause()

    async with store_at(proxy.url, collections=[JOBS]) as store:
        await store.create_entities("jobs", [job(n) for n in range(1_500)])
        monkeypatch.setattr(reading, "pause", counted)
        query = store._query("jobs", {"queue": "a"}, ["priority", "state"], None, None)
        found = [each async for each in store._dynamodb.reading.select(query)]
        assert len(found) == 500
        assert turns >= 2
