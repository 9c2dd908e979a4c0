"""The requests that are sent: Query and not Scan, shared requests, none before the first use."""

from __future__ import annotations

import asyncio
import re
from contextlib import aclosing
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from hf_async_store import (
    HOST_FACTORY,
    Index,
    InvalidQueryError,
    SchemaMismatchError,
    and_,
    begins_with,
    between,
    contains,
    event_loop,
    gte,
    in_,
    lt,
    ne,
    or_,
    path,
)
from hf_async_store.strategies.dynamodb import client
from hf_async_store.testing.harness import CONTRACT_COLLECTIONS
from tests.dynamodb.support import new_prefix, store_at

if TYPE_CHECKING:
    from hf_async_store import Collection
    from hf_async_store.strategies.dynamodb.responses import Received
    from tests.dynamodb.proxy import Proxy

pytestmark = pytest.mark.hf_sampled

VALUES = {
    "timestamp": "2024-01-02T00:00:00.000000Z",
    "text": "a",
    "integer": 3,
    "number": 1.5,
    "boolean": True,
}
INDEXES = [
    pytest.param(collection, index, id=f"{collection.name} {index.name}")
    for collection in CONTRACT_COLLECTIONS
    for index in collection.indexes
]


@pytest.mark.parametrize(("collection", "index"), INDEXES)
async def test_every_declared_index_is_queried(
    proxy: Proxy, collection: Collection, index: Index
) -> None:
    values = {each: VALUES[collection.fields[each].type] for each in index.fields}
    async with store_at(proxy.url) as store:
        entities = [
            {collection.key: f"e{n}", **values, **({} if n % 2 else {index.field: None})}
            for n in range(10)
        ]
        await store.create_entities(collection.name, entities)
        filters: list[Any] = [
            values,
            {name: in_([value]) for name, value in values.items()},
            and_(values, {path("extra"): contains("x")}),
            and_(values, or_({path("extra"): 1}, {path("extra", "a"): 2})),
        ]
        proxy.requests.clear()
        for each in filters:
            plan = await store.explain_query(collection.name, each)
            assert (plan.access, plan.index, plan.consistent) == ("index", index.name, False)
            found = await store.query_entities(collection.name, each, "-updated_at")
            assert await store.count_entities(collection.name, each) == len(found)
            async with aclosing(store.stream_entities(collection.name, each)) as rows:
                assert len([row async for row in rows]) == len(found)
            page = await store.query_page(collection.name, each, limit=2)
            assert len(page.items) == min(2, len(found))
        assert len(await store.query_entities(collection.name, filters[0])) == 5
        assert set(proxy.counted()) == {"Query"}
        assert {each.params["IndexName"] for each in proxy.requests} == {index.name}


async def test_the_sort_key_makes_ranges_and_order(proxy: Proxy) -> None:
    async with store_at(proxy.url) as store:
        await store.create_entities(
            "requests",
            [
                {
                    "request_id": f"r{n:03}",
                    "template_id": "t",
                    "created_at": f"2024-01-01T00:{n // 60:02}:{n % 60:02}Z",
                    "tags": {"filler": "x" * 3000},
                }
                for n in range(600)
            ],
        )
        proxy.requests.clear()
        last = await store.query_entities("requests", {"template_id": "t"}, "-created_at", 5)
        assert [each["request_id"] for each in last] == [f"r{n:03}" for n in range(599, 594, -1)]
        [request] = proxy.requests
        assert request.operation == "Query"
        assert request.params["ScanIndexForward"] is False
        assert request.params["Limit"] < 10
        proxy.requests.clear()
        ranged: list[tuple[Any, int]] = [
            (between("2024-01-01T00:01:00Z", "2024-01-01T00:01:59Z"), 60),
            (gte("2024-01-01T00:09:00Z"), 60),
            (lt("2024-01-01T00:00:10Z"), 10),
            (begins_with("2024-01-01T00:02:"), 60),
        ]
        for condition, number in ranged:
            filters = {"template_id": "t", "created_at": condition}
            found = await store.query_entities("requests", filters, "created_at")
            assert len(found) == number
        assert all(
            "created_at" in str(each.params["ExpressionAttributeNames"]) for each in proxy.requests
        )
        assert len(proxy.requests) == len(ranged), "entities outside the range were read"


async def test_pages_in_index_order_read_only_their_items(proxy: Proxy) -> None:
    async with store_at(proxy.url) as store:
        await store.create_entities(
            "requests",
            [{"request_id": f"r{n:03}", "template_id": "t"} for n in range(200)],
        )
        proxy.requests.clear()
        cursor: str | None = None
        seen: list[object] = []
        while True:
            page = await store.query_page(
                "requests", {"template_id": "t"}, "created_at", 20, cursor=cursor
            )
            seen += [each["request_id"] for each in page.items]
            cursor = page.cursor
            if cursor is None:
                break
        assert sorted(map(str, seen)) == [f"r{n:03}" for n in range(200)]
        assert proxy.counted()["Scan"] == 0


async def test_ids_are_read_by_key(proxy: Proxy) -> None:
    async with store_at(proxy.url) as store:
        await store.create_entities("items", [{"item_id": f"i{n}"} for n in range(250)])
        proxy.requests.clear()
        wanted = {"item_id": in_([f"i{n}" for n in range(250)])}
        assert len(await store.query_entities("items", wanted)) == 250
        assert proxy.counted() == {"BatchGetItem": 3}


async def test_waiting_reads_and_writes_share_requests(proxy: Proxy) -> None:
    async with store_at(proxy.url) as store:
        await store.create_entity("items", {"item_id": "first"})
        await store.update_entity("items", "first", {})
        proxy.requests.clear()
        await asyncio.gather(
            *(store.create_entity("items", {"item_id": f"i{n}"}) for n in range(100))
        )
        assert proxy.counted() == {"BatchExecuteStatement": 4}
        proxy.requests.clear()
        await asyncio.gather(*(store.get_entity("items", f"i{n}") for n in range(100)))
        assert proxy.counted() == {"BatchGetItem": 1}
        proxy.requests.clear()
        await asyncio.gather(
            *(store.update_entity("items", f"i{n}", {"count": n}) for n in range(100))
        )
        assert proxy.counted() == {"BatchExecuteStatement": 4}
        proxy.requests.clear()
        await asyncio.gather(
            *(store.save_entity("items", {"item_id": f"i{n}"}) for n in range(100))
        )
        assert proxy.counted() == {"BatchGetItem": 4, "BatchExecuteStatement": 4}
        proxy.requests.clear()
        await store.import_entities("items", [{"item_id": f"m{n}"} for n in range(100)])
        assert proxy.counted() == {"BatchWriteItem": 4}


async def test_a_scan_can_be_forbidden(proxy: Proxy) -> None:
    async with store_at(proxy.url, allow_scan=False) as store:
        await store.create_entity("items", {"item_id": "a", "label": "x"})
        proxy.requests.clear()
        for filters in (None, {"extra": 1}, {"label": None}):
            for work in (
                store.query_entities("items", filters),
                store.count_entities("items", filters),
                store.query_page("items", filters),
            ):
                with pytest.raises(InvalidQueryError, match="allow_scan"):
                    await work
            plan = await store.explain_query("items", filters)
            assert plan.access == "scan"
            assert "rejected" in plan.detail
        assert len(await store.query_entities("items", {"label": "x"})) == 1
        assert "Scan" not in proxy.counted()


async def test_only_the_requested_fields_are_read(proxy: Proxy) -> None:
    async with store_at(proxy.url) as store:
        await store.create_entity(
            "items", {"item_id": "a", "label": None, "extra": {"x": 1}, "big": "x" * 1000}
        )
        proxy.requests.clear()
        found = await store.query_entities(
            "items", {"extra": {"x": 1}}, fields=["label", "odd.name"]
        )
        assert found == [{"item_id": "a", "label": None, "version": 1}]
        [*_, request] = proxy.requests
        assert "ProjectionExpression" in request.params
        assert "big" not in str(request.params)


async def test_a_missing_index_causes_scans_until_it_is_complete(proxy: Proxy) -> None:
    bare = [each for each in HOST_FACTORY if each.name == "templates"]
    from hf_async_store import Collection as Declared

    with_index = [Declared("templates", key="template_id", fields=["name"], indexes=["name"])]
    prefix = new_prefix()
    async with store_at(proxy.url, prefix, bare) as store:
        await store.create_entity("templates", {"template_id": "t", "name": "n"})
    async with store_at(proxy.url, prefix, with_index) as store:
        assert (await store.explain_query("templates", {"name": "n"})).access == "scan"
        assert len(await store.query_entities("templates", {"name": "n"})) == 1
        assert "has no index name-index" in str((await store.health())["problems"])
        assert await store.create_tables() == [f"created name-index of {prefix}_templates"]
        assert (await store.explain_query("templates", {"name": "n"})).access == "scan"
        assert len(await store.query_entities("templates", {"name": "n"})) == 1
        assert "schema apply --complete" in str((await store.health())["problems"])
        with pytest.raises(SchemaMismatchError, match="--complete"):
            await store.query_by_gsi("templates", "name-index", "name = :n", {":n": "n"})
        await store._dynamodb.apply_schema(complete=True)
        assert (await store.explain_query("templates", {"name": "n"})).access == "index"
        assert len(await store.query_entities("templates", {"name": "n"})) == 1
        assert (await store.health())["ok"]
        assert await store.create_tables() == []


OPERATOR = re.compile(r"\b(?:AND|OR|NOT|attribute_\w+|contains|size)\b|[<>]=?|=")


@pytest.mark.parametrize("operator", [begins_with, ne, partial(between, "a")])
async def test_a_filter_expression_has_at_most_300_operators(proxy: Proxy, operator: Any) -> None:
    # Source: DynamoDB service quotas, "Expression parameters"; the test server has no such limit.
    async with store_at(proxy.url) as store:
        await store.create_entity("items", {"item_id": "a", "label": "x"})
        proxy.requests.clear()
        filters = and_(*[{"label": operator(f"z{each}")} for each in range(60)])
        found = await store.query_entities("items", filters)
        assert await store.count_entities("items", filters) == len(found)
        assert len(found) == (operator is not begins_with)
        sent = [each.params["FilterExpression"] for each in proxy.requests]
        assert len(sent) > 1
        assert max(len(OPERATOR.findall(each)) for each in sent) <= 300


async def test_responses_that_arrive_together_are_used_in_several_iterations(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock on which each takes longer than the time that an iteration has for long work."""
    now, iteration, used = 0.0, 0, list[int]()
    read = client.read_in_parts
    arrived = asyncio.Barrier(8)

    async def received(content: bytes) -> bytes:
        await arrived.wait()
        return content

    def timed(operation: str, params: Any, response: Received) -> Any:
        nonlocal now
        now += 0.003
        used.append(iteration)
        return read(operation, params, response)

    async with store_at(proxy.url) as store:
        assert await store.get_entity("templates", "t-1") is None
        engine: Any = store._dynamodb
        connection = await engine.client.connection()
        send = connection._send

        async def sent(request: Any) -> Any:
            response = await send(request)
            content = received(await response.content)
            return SimpleNamespace(
                status_code=response.status_code, headers=response.headers, content=content
            )

        monkeypatch.setattr(connection, "_send", sent)
        monkeypatch.setattr(client, "read_in_parts", timed)
        monkeypatch.setattr(event_loop, "monotonic", lambda: now)
        calls = asyncio.gather(*(engine.client.read("ListTables", {}) for _ in range(8)))
        while not calls.done():
            await asyncio.sleep(0)
            iteration += 1
        monkeypatch.undo()
    assert len(set(used)) == len(used) == 8
