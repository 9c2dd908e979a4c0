"""`health` lists the shapes of slow queries, without values."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

import pytest

from hf_async_store import (
    Collection,
    Field,
    Index,
    MemoryStorageStrategy,
    OperationTimeoutError,
    between,
    exists,
    gt,
    in_,
    not_,
    or_,
    path,
    slow_queries,
)
from hf_async_store.query import build_query
from hf_async_store.slow_queries import SlowQueries

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

JOBS = Collection(
    "jobs",
    key="job_id",
    fields=["status", "owner", Field("size", "integer"), Field("tags", "json")],
    indexes=[Index("status", "created_at")],
)


@pytest.fixture
def everything_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_queries, "SLOW_SECONDS", 0.0)


async def slow(store: MemoryStorageStrategy) -> list[dict[str, Any]]:
    found = (await store.health())["slow_queries"]
    assert isinstance(found, list)
    return [dict(each) for each in found if isinstance(each, dict)]


@pytest.mark.usefixtures("everything_is_slow")
async def test_health_lists_shapes_without_values() -> None:
    async with MemoryStorageStrategy(collections=[JOBS]) as store:
        await store.create_entities("jobs", [{"job_id": f"j{n}", "size": n} for n in range(10)])
        await store.query_entities("jobs", {"size": gt(4)}, "-created_at")
        await store.query_entities("jobs", {"size": gt(1)}, "-created_at", 2)
        async with store.begin_transaction() as tx:
            await tx.count_entities("jobs", {"owner": "secret"})
        async with store.begin_transaction(read_only=True) as tx:
            await tx.count_by("jobs", "owner")
        await store.query_page("jobs", {"status": "secret"}, "-created_at")
        await store.query_entities("jobs", {"job_id": in_(["secret"])})
        found = await slow(store)
    assert "secret" not in str(found)
    seconds = [each.pop("seconds") for each in found]
    assert seconds == sorted(seconds, reverse=True)
    assert all(each.pop("worst_seconds") <= most for each, most in zip(found, seconds, strict=True))
    assert sorted(found, key=str) == sorted(
        [
            shape("size > ?", ["-created_at"], count=2, rows=7, advice='Index("created_at")'),
            shape("owner = ?", rows=0, advice='Index("owner")'),
            shape("", rows=10),
            shape("status = ?", ["-created_at"], rows=0),
            shape("job_id in ?", rows=0),
        ],
        key=str,
    )


def shape(
    filters: str,
    order_by: list[str] | None = None,
    *,
    rows: int,
    count: int = 1,
    advice: str | None = None,
) -> dict[str, Any]:
    return {
        "collection": "jobs",
        "filter": filters,
        "order_by": order_by or [],
        "count": count,
        "rows": rows,
        "advice": advice,
    }


async def test_fast_queries_are_not_listed() -> None:
    async with MemoryStorageStrategy(collections=[JOBS]) as store:
        await store.query_entities("jobs", {"owner": "a"})
        assert await slow(store) == []


@pytest.mark.usefixtures("everything_is_slow")
def test_filters_are_shown_for_people() -> None:
    queries = SlowQueries()
    filters = or_(
        {"size": between(1, 2), "owner": exists(False)},
        not_({path("tags", "a"): in_([1, 2])}),
        {"status": "a"},
        {"status": "b"},
    )
    queries.note(build_query(JOBS, filters=filters), perf_counter(), 1)
    [found] = queries.slowest()
    assert found.filter_text == (
        "(size between ? and ? and owner exists ?) or not (tags.a in ?) or status = ?"
    )


@pytest.mark.usefixtures("everything_is_slow")
def test_the_number_of_shapes_is_limited() -> None:
    queries = SlowQueries()
    for number in range(1_000):
        query = build_query(JOBS, filters={path(f"f{number}"): 1})
        queries.note(query, perf_counter() - (10 if number == 5 else 0), 1)
    assert len(queries.slowest()) == 100
    assert queries.slowest()[0].filter_text == "f5 = ?"


@pytest.mark.usefixtures("everything_is_slow")
@pytest.mark.parametrize("verb", ["query", "count", "count_by"])
async def test_a_query_that_does_not_end_in_time_is_recorded(verb: str) -> None:
    async with MemoryStorageStrategy(collections=[JOBS]) as store:
        await store.create_entities("jobs", [{"job_id": f"j{n}"} for n in range(2_000)])
        filters = {"owner": "o"}
        ask: dict[str, Callable[[], Awaitable[object]]] = {
            "query": lambda: store.query_entities("jobs", filters, timeout=0),
            "count": lambda: store.count_entities("jobs", filters, timeout=0),
            "count_by": lambda: store.count_by("jobs", "status", filters, timeout=0),
        }
        with pytest.raises(OperationTimeoutError):
            await ask[verb]()
        [found] = await slow(store)
    assert found["filter"] == "owner = ?"
    assert found["rows"] == 0
