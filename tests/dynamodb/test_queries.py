"""Queries by indexes of every type, compared with the memory engine: rows, order and pages."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_async_store import (
    MemoryStorageStrategy,
    and_,
    begins_with,
    between,
    eq,
    exists,
    gt,
    gte,
    in_,
    lt,
    lte,
    ne,
    not_,
    or_,
    path,
)
from hf_async_store.testing.assertions import typed
from hf_async_store.testing.repetitions import repetitions
from tests.dynamodb.support import store_at
from tests.dynamodb.test_codec import THINGS

if TYPE_CHECKING:
    from hf_async_store import StorageStrategy
    from tests.dynamodb.proxy import Proxy

LONG: Final = "x" * 1500
POOLS: Final[dict[str, list[Any]]] = {
    "label": [None, "", "a", "ab", "b", "\x01", "\x01a", LONG, f"{LONG}a", "\U0001f600", "é"],
    "count": [None, 0, 1, -1, 2**53 + 1, 2**63 - 1, -(2**63)],
    "ratio": [None, 0, -0.0, 1, 1.0, 1.5, 1e30, 1e37, 1e300, -1e300, 5e-324, 2**53, float(2**53)],
    "active": [None, True, False],
    "due_at": [None, "2024-01-01T00:00:00.000000Z", "2024-01-02T00:00:00.000000Z"],
    "created_at": [None, "2023-01-01T00:00:00.000000Z", "2024-01-01T00:00:00.000000Z"],
}
ODD: Final[list[Any]] = [1e30, "zz", [1], {"a": 1}, True, 7, "2024-01-01"]
RANGES: Final = (eq, ne, lt, lte, gt, gte)


@st.composite
def loads(draw: st.DrawFn) -> list[dict[str, Any]]:
    entities = []
    for number in range(draw(st.integers(8, 24))):
        entity: dict[str, Any] = {"thing_id": f"t{number}"}
        for name, pool in POOLS.items():
            which = draw(st.integers(0, len(pool)))
            if which < len(pool):
                entity[name] = pool[which]
        entities.append(entity)
    return entities


@st.composite
def questions(draw: st.DrawFn) -> tuple[Any, Any, int | None]:
    index = draw(st.sampled_from(THINGS.indexes))
    first, *others = index.fields

    def operand(name: str) -> Any:
        if name == "thing_id":
            return f"t{draw(st.integers(0, 24))}"
        return draw(st.sampled_from([*POOLS[name], *POOLS[name], *ODD]))

    parts: list[Any] = []
    if others or draw(st.booleans()):
        hashed: Any = operand(first)
        if draw(st.booleans()):
            hashed = in_([hashed, operand(first)])
        parts.append({path(first): hashed})
    equal = draw(st.integers(0, len(others)))
    parts += [{path(name): operand(name)} for name in others[:equal]]
    rest = [name for name in (others or [first]) if name != "thing_id"]
    for name in draw(st.lists(st.sampled_from(rest), max_size=2)) if rest else ():
        kind = draw(st.sampled_from((*RANGES, "between", "begins", "in", "exists")))
        condition: Any = {
            "between": lambda name: between(operand(name), operand(name)),
            "begins": lambda name: begins_with(draw(st.sampled_from(["", "x", LONG, "2024"]))),
            "in": lambda name: in_([operand(name), operand(name)]),
            "exists": lambda name: exists(draw(st.booleans())),
        }.get(kind, lambda name, kind=kind: kind(operand(name)))(name)
        parts.append({path(name): condition})
    if draw(st.integers(0, 3)) == 0:
        parts.append(or_({"label": "a"}, {"count": gte(0)}))
    sign = draw(st.sampled_from(("", "-")))
    names = (others or [first])[draw(st.integers(0, equal)) if others else 0 :][
        : draw(st.integers(1, 3))
    ]
    order: Any = [f"{sign}{name}" for name in names] or ["label"]
    if draw(st.booleans()):
        more = draw(st.sampled_from(("-thing_id", "thing_id", "-count", "label")))
        if more.removeprefix("-") not in names and "thing_id" not in names:
            order.append(more)
    return and_(*parts), order, draw(st.sampled_from((None, 1, 3)))


async def _answers(store: StorageStrategy, filters: Any, order: Any, limit: int | None) -> Any:
    found = await store.query_entities("things", filters, order, limit)
    pages, cursor = [], None
    while True:
        page = await store.query_page("things", filters, order, 3, cursor=cursor)
        pages += page.items
        cursor = page.cursor
        if cursor is None:
            break
    async with aclosing(store.stream_entities("things", filters, order)) as rows:
        streamed = [each["thing_id"] async for each in rows]
    unordered = await store.query_entities("things", filters)
    paged, cursor = [], None
    while True:
        page = await store.query_page("things", filters, limit=2, cursor=cursor)
        paged += [each["thing_id"] for each in page.items]
        cursor = page.cursor
        if cursor is None:
            break
    return {
        "found": typed(found),
        "pages": typed(pages),
        "streamed": streamed,
        "unordered": sorted(str(each["thing_id"]) for each in unordered),
        "paged": sorted(map(str, paged)),
        "count": await store.count_entities("things", filters),
        "fields": typed(
            await store.query_entities("things", filters, order, limit, fields=["label", "ratio"])
        ),
    }


@settings(
    max_examples=repetitions(50),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(load=loads(), asked=st.lists(questions(), min_size=4, max_size=10))
@pytest.mark.asyncio
async def test_indexes_of_every_type_agree_with_the_memory_engine(
    proxy: Proxy, load: list[dict[str, Any]], asked: list[tuple[Any, Any, int | None]]
) -> None:
    collections = [THINGS]
    async with (
        store_at(proxy.url, None, collections) as store,
        MemoryStorageStrategy(collections=collections) as memory,
    ):
        imported = [{"version": 1, "updated_at": None, **each} for each in load]
        for each in (store, memory):
            await each.import_entities("things", imported)
        for filters, order, limit in asked:
            found = await _answers(store, filters, order, limit)
            wanted = await _answers(memory, filters, order, limit)
            assert found == wanted, (filters, order, limit)


@pytest.mark.parametrize("consistent", [True, False])
async def test_consistent_reads_applies_to_keys_and_scans(proxy: Proxy, consistent: bool) -> None:
    async with store_at(proxy.url, consistent_reads=consistent) as store:
        await store.create_entity("items", {"item_id": "a", "label": "x"})
        proxy.requests.clear()
        await store.get_entity("items", "a")
        await store.get_entities("items", ["a", "b"])
        await store.query_entities("items", {"extra": 1})
        await store.query_entities("items", {"label": "x"})
        seen = []
        for each in proxy.requests:
            asked = each.params.get("RequestItems") or {"": each.params}
            seen += [(each.operation, part.get("ConsistentRead")) for part in asked.values()]
        assert set(seen) == {
            ("GetItem", consistent),
            ("BatchGetItem", consistent),
            ("Scan", consistent),
            ("Query", None),
        }
        for filters in (None, {"item_id": "a"}):
            assert (await store.explain_query("items", filters)).consistent is consistent
        assert not (await store.explain_query("items", {"label": "x"})).consistent


async def test_an_empty_or_matches_nothing_and_sends_no_request(proxy: Proxy) -> None:
    async with store_at(proxy.url) as store:
        await store.create_entity("items", {"item_id": "a", "label": "x"})
        proxy.requests.clear()
        assert await store.query_entities("items", or_()) == []
        assert await store.query_entities("items", or_(), "-label", 3) == []
        assert await store.count_entities("items", or_()) == 0
        assert (await store.query_page("items", or_(), limit=2)).items == []
        assert proxy.requests == []


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (not_(or_()), 2),
        (not_(and_()), 0),
        (and_({"extra": 1}, or_()), 0),
        (and_({"extra": 1}, not_(or_())), 1),
        (or_({"extra": 1}, or_()), 1),
        (or_({"extra": 1}, and_()), 2),
        (and_({"label": "x"}, or_()), 0),
        (and_({"label": "x"}, or_({"extra": 1}, or_())), 1),
    ],
)
async def test_nested_empty_combinations(proxy: Proxy, filters: Any, expected: int) -> None:
    async with store_at(proxy.url) as store:
        await store.create_entities(
            "items", [{"item_id": f"{n}", "label": "x", "extra": n} for n in (1, 2)]
        )
        assert await store.count_entities("items", filters) == expected
        assert len(await store.query_entities("items", filters)) == expected
