"""Reading entities in chunks, and as canonical JSON, gives the same as `select`, on every engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from support import ITEMS, fill, generated_items, odd_items, opened

from hf_async_store import Entity
from hf_async_store.query import Query, build_query, exists
from hf_async_store.testing.repetitions import repetitions
from hf_async_store.values import canonical

if TYPE_CHECKING:
    from conftest import Place

    from hf_async_store.driver import Reader

KINDS = ("json-single", "sqlite", "postgresql", "dynamodb")


async def refuse_other(reader: Reader, query: Query) -> list[Entity]:
    """The result of `select`; asserts that the other methods return the same."""
    expected = [each.entity async for each in reader.select(query)]
    pieces = [piece async for piece in reader.select_batches(query)]
    assert all(pieces)
    entities = [each for piece in pieces for each in piece]
    # Not ==, for which 1, 1.0 and True are one.
    assert list(map(repr, entities)) == list(map(repr, expected))
    return expected


@pytest.mark.parametrize("kind", KINDS)
async def test_chunks_agree_with_select_for_any_query(kind: str, place: Place) -> None:
    async with opened(place(kind, "a")) as store:
        await fill(store, 700)
        machines = store.collections["machines"]
        async with store.snapshot() as reader:
            for name, declared in store.collections.items():
                found = await refuse_other(reader, build_query(declared))
                assert len(found) == await store.count_entities(name)
            for query in (
                build_query(machines, order_by="machine_id"),
                build_query(machines, order_by="-updated_at", limit=9),
                build_query(machines, limit=3),
                build_query(machines, filters={"request_id": "r-1"}),
                build_query(machines, filters={"request_id": "nobody"}),
                build_query(ITEMS, filters={"extra": exists()}),
                build_query(ITEMS, order_by="extra"),
            ):
                await refuse_other(reader, query)
            await refuse_other(reader, build_query(machines, fields=["machine_id"]))
        page = await store.query_page("machines", limit=50)
        rest = await store.query_page("machines", limit=1000, cursor=page.cursor)
        assert len(page.items) == 50
        assert len({str(each["machine_id"]) for each in page.items + rest.items}) == 700


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
@given(items=generated_items())
@hypothesis_settings(
    max_examples=repetitions(40, 15),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
async def test_chunks_agree_with_select_for_any_entities(
    kind: str, place: Place, items: list[dict[str, object]]
) -> None:
    async with opened(_once(place, kind)) as store:
        there = await store.query_entities("items")
        await store.delete_entities("items", [str(each["item_id"]) for each in there])
        await store.import_entities("items", items)
        async with store.snapshot() as reader:
            found = await refuse_other(reader, build_query(ITEMS))
        assert len(found) == len(items)


_MADE: dict[tuple[int, str], str] = {}


def _once(place: Place, kind: str) -> str:
    """A store that is shared by all examples of a test."""
    key = (id(place), kind)
    if key not in _MADE:
        _MADE[key] = place(kind, "a")
    return _MADE[key]


async def test_more_combinations_of_nulls_than_are_cached(place: Place) -> None:
    names = ("label", "count", "ratio", "active", "due_at", "data")
    entities: list[Entity] = []
    for bits in range(1 << len(names)):
        for more in range(6):
            entity: Entity = {"item_id": f"{bits}-{more}", "version": bits}
            entity.update({name: None for n, name in enumerate(names) if bits >> n & 1})
            if more:
                entity[f"other-{more}"] = None
            entities.append(entity)
    async with opened(place("sqlite", "a")) as store:
        await store.import_entities("items", [*entities, *odd_items()])
        async with store.snapshot() as reader:
            found = await refuse_other(reader, build_query(ITEMS))
        nulls = sum(each.count(b":null") for each in map(canonical, found))
        assert nulls > len(entities) * 3
