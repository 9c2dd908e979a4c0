"""Cases 92, 93 and 95: what a declaration answers about entities that another declaration has written."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, cast, get_args

import pytest

from hf_async_store.query import (
    MISSING,
    Op,
    asc,
    begins_with,
    between,
    build_query,
    contains,
    desc,
    eq,
    exists,
    gt,
    gte,
    in_,
    lt,
    lte,
    matches,
    ne,
    not_in,
    order_key,
    path,
    sort_key,
)
from hf_async_store.schema import Collection, Field, Index
from hf_async_store.testing.assertions import typed
from hf_async_store.testing.concurrency import answer_of, is_shared
from hf_async_store.testing.repetitions import sampled
from hf_async_store.values import REMOVE, FieldType

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from hf_async_store.query import FilterMap
    from hf_async_store.repository import RepositoryInterface
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.harness import Harness
    from hf_async_store.values import Entity

Rows = dict[str, "Entity"]

TYPES: Final[tuple[FieldType, ...]] = get_args(FieldType)
VALUES: Final[Mapping[FieldType, tuple[object, ...]]] = {
    "text": ("", "a", "b" * 300, "b" * 300 + "c", "2026-01-01T00:00:00Z"),
    "integer": (0, -1, 7, 2**53 + 1, -(2**63)),
    "number": (0.5, 2.0, 7, -1e300, 5e-324),
    "boolean": (True, False),
    "timestamp": ("2026-01-01T00:00:00.000000Z", "2026-02-01T00:00:00.000000Z"),
    "json": ([1, "a"], {"a": 1}, "a", 7, True),
}
EVERYTHING: Final = tuple({repr(v): v for each in VALUES.values() for v in each}.values())


_THOROUGH: Final = 7
"""Of this many questions, one is also asked in pages, with a limit, and in a transaction."""


def declared(field_type: FieldType | None) -> Collection:
    """The collection with a field `value` of this type, and indexes on it; or without the field."""
    if field_type is None:
        return Collection("things", key="thing_id", fields=["label"], indexes=["label"])
    indexes: list[Index | str] = ["label"]
    if field_type != "json":
        indexes += ["value", Index("label", "value"), Index("label", "value", "created_at")]
    fields: list[Field | str] = ["label", Field("value", field_type), Field("more", field_type)]
    return Collection("things", key="thing_id", fields=fields, indexes=indexes)


def things(values: tuple[object, ...]) -> list[dict[str, object]]:
    """Entities with these values, with null, and without the field."""
    found: list[dict[str, object]] = [
        {"thing_id": f"t{n:02}", "label": "xy"[n % 2], "value": value}
        for n, value in enumerate((*values, None))
    ]
    return [*found, {"thing_id": "t98", "label": "x"}, {"thing_id": "t99", "label": "y"}]


@asynccontextmanager
async def opened(
    harness: Harness, field_type: FieldType | None
) -> AsyncGenerator[StorageStrategy, None]:
    async with harness.store([declared(field_type)]) as store:
        yield store


def require_shared(harness: Harness) -> None:
    if not is_shared(harness.capabilities):
        pytest.skip("each store of this engine is empty at first, so no other declaration wrote it")


def _operators(operand: object) -> list[Op]:
    found: list[Op] = [make(operand) for make in (eq, ne, lt, lte, gt, gte, contains)]
    found += [in_([operand, "a", None]), not_in([operand, 7]), between(operand, operand)]
    return [*found, begins_with(operand)] if isinstance(operand, str) else found


def questions(operands: tuple[object, ...]) -> list[tuple[FilterMap, list[Any]]]:
    """Filters by every operator with these operands, and orders."""
    place = path("value")
    orders = [[asc(place)], [desc(place)], [asc(path("label")), asc(place)], []]
    asked: list[tuple[FilterMap, list[Any]]] = [({}, order) for order in orders]
    for number, operand in enumerate((*operands, None)):
        asked += [({place: op}, orders[number % len(orders)]) for op in _operators(operand)]
    asked += [({place: op}, []) for op in (exists(), exists(False))]
    for operand in operands[:3]:
        asked.append(({path("label"): "x", place: operand}, []))
        asked.append(({path("label"): in_(["x", "y"]), place: gte(operand)}, orders[1]))
    asked.append(({path("label"): "x"}, orders[0]))
    asked.append(({path("label"): "y"}, orders[1]))
    return asked


async def check(
    store: StorageStrategy, collection: Collection, rows: Rows, operands: tuple[object, ...]
) -> None:
    """Assert that the store answers like the reference implementation about these entities."""
    for entity_id, entity in rows.items():
        assert typed(await store.get_entity("things", entity_id)) == typed(entity)
    for number, (filters, order) in enumerate(sampled(questions(operands))):
        thorough = not number % _THOROUGH
        await _check_query(store, collection, rows, filters, order, thorough=thorough)


async def _check_query(
    store: StorageStrategy,
    collection: Collection,
    rows: Rows,
    filters: FilterMap,
    order: list[Any],
    *,
    thorough: bool,
) -> None:
    query = build_query(collection, filters=filters, order_by=order)
    found = [each for each, row in rows.items() if matches(query.where, row)]
    wanted = sorted(found, key=lambda each: sort_key(query, each, rows[each]))
    can, what = store.capabilities, f"{filters} by {order}"

    def listed(entities: list[Entity]) -> list[str]:
        got = [str(each["thing_id"]) for each in entities]
        return got if order or can.default_order == "id" else sorted(got)

    async def ids(repository: RepositoryInterface, limit: int | None = None) -> list[str]:
        return listed(await repository.query_entities("things", filters, order, limit))

    async def pages() -> list[str]:
        page = await store.query_page("things", filters, order, 4)
        got = page.items
        while page.cursor is not None:
            page = await store.query_page("things", filters, order, 4, cursor=page.cursor)
            got += page.items
        return listed(got)

    async def inside() -> list[str]:
        async with store.begin_transaction() as tx:
            return await ids(tx)

    async def count() -> int:
        return await store.count_entities("things", filters)

    assert await answer_of(can, lambda: ids(store), wanted) == wanted, what
    assert await answer_of(can, count, len(wanted)) == len(wanted), what
    if not thorough:
        return
    assert await answer_of(can, pages, wanted) == wanted, what
    assert await answer_of(can, inside, wanted) == wanted, what
    if order:
        first = wanted[:3]
        assert await answer_of(can, lambda: ids(store, 3), first) == first, what


async def stored(store: StorageStrategy) -> Rows:
    """The entities, read by key."""
    ids = [f"t{n:02}" for n in range(100)]
    found = await store.get_entities("things", ids)
    return {str(each["thing_id"]): each for each in found if each is not None}


def _values_in(rows: Rows) -> list[object]:
    return [order_key(rows[each].get("value", MISSING)) for each in sorted(rows)]


class ChangedDeclarationContract:
    """Cases 92, 93 and 95."""

    @pytest.mark.parametrize("field_type", TYPES)
    async def test_92_a_field_declared_later_answers_as_if_always_declared(
        self, harness: Harness, field_type: FieldType
    ) -> None:
        require_shared(harness)
        values = (*VALUES[field_type], *EVERYTHING[::5])
        async with opened(harness, None) as store:
            await store.save_entities("things", things(values))
            before = await stored(store)
        async with opened(harness, field_type) as store:
            rows = await stored(store)
            assert _values_in(rows) == _values_in(before), "what a program reads was rewritten"
            await check(store, declared(field_type), rows, (*VALUES[field_type][:2], 7))
            [one, *_, last] = [each for each in rows if each < "t90"]
            value = VALUES[field_type][0]
            await store.update_entity("things", one, {"value": value})
            await store.update_entity("things", last, {"value": REMOVE, "more": value})
            await store.update_entity("things", "t98", {"label": "y"})
            await store.save_entity("things", {"thing_id": "t99", "label": "x", "value": value})
            rows = await stored(store)
            assert "value" not in rows[last]
            assert typed(rows[one]["value"]) == typed(rows["t99"]["value"])
            await check(store, declared(field_type), rows, VALUES[field_type][:1])

    @pytest.mark.parametrize("field_type", TYPES)
    async def test_93_a_field_no_longer_declared_stays_and_is_found(
        self, harness: Harness, field_type: FieldType
    ) -> None:
        require_shared(harness)
        values = VALUES[field_type]
        async with opened(harness, field_type) as store:
            await store.save_entities("things", things(values))
            before = await stored(store)
        async with opened(harness, None) as store:
            assert typed(await stored(store)) == typed(before)
            await check(store, declared(None), before, values[:2])
            await store.update_entity("things", "t00", {"label": "y"})
            await store.update_entity("things", "t01", {"value": [1]})
            await store.update_entity("things", "t98", {"value": 7})
            rows = await stored(store)
            assert typed(rows["t00"]["value"]) == typed(before["t00"]["value"])
            await check(store, declared(None), rows, (values[0], 7))

    @pytest.mark.parametrize("field_type", TYPES)
    async def test_95_two_declarations_at_once(
        self, harness: Harness, field_type: FieldType
    ) -> None:
        require_shared(harness)
        values = VALUES[field_type]
        async with opened(harness, None) as old, opened(harness, field_type) as new:
            for number, entity in enumerate(things((*values, *values))):
                await (old, new)[number % 2].save_entity("things", entity)
            for store, collection in ((old, declared(None)), (new, declared(field_type))):
                await check(store, collection, await stored(store), values[:1])
            await old.update_entity("things", "t01", {"label": "z"})
            await new.update_entity("things", "t00", {"more": values[0]})
            await new.update_entity("things", "t02", {"value": REMOVE})
            await old.update_entity("things", "t02", {"value": "of the old program"})
            await old.update_entities(
                "things", {"t00": {"label": "z"}, "t03": {"value": {"a": [1]}}}
            )
            async with new.begin_transaction() as tx:
                await tx.update_entity("things", "t03", {"label": "z"})
            rows = await stored(new)
            assert typed(rows) == typed(await stored(old))
            assert typed(rows["t00"]["more"]) == typed(
                cast("Any", await stored(old))["t00"]["more"]
            )
            assert typed(rows["t03"]["value"]) == typed({"a": [1]})
            for store, collection in ((old, declared(None)), (new, declared(field_type))):
                await check(store, collection, rows, ("of the old program",))
