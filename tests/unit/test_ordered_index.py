"""Ordered indexes agree with a sorted list, and queries over tables with the reference implementation."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from itertools import permutations
from random import Random
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_async_store import open_store, ordered_index, table_reading
from hf_async_store.access_path import Conditions
from hf_async_store.changes import Record
from hf_async_store.ordered_index import (
    AFTER,
    BY_ID,
    Entry,
    OrderedIndex,
    Span,
    index_key,
    key_bound,
    split_key,
)
from hf_async_store.query import (
    MISSING,
    CursorPosition,
    Missing,
    Op,
    Query,
    SortKeyInput,
    and_,
    begins_with,
    between,
    build_query,
    compile_filter,
    compile_order,
    exists,
    gt,
    gte,
    in_,
    lt,
    lte,
    ne,
    not_,
    not_in,
    or_,
    path,
    position_key,
)
from hf_async_store.schema import Collection, Index
from hf_async_store.sort_bytes import is_exact, ranges, sort_bytes
from hf_async_store.table import Table
from hf_async_store.table_reading import TableReader, _choose
from hf_async_store.testing.repetitions import repetitions
from hf_async_store.values import Entity, Key, Value

LONG: Final = "long" * 80
VALUES: Final[list[Any]] = [
    MISSING,
    None,
    False,
    True,
    -1.7e308,
    -1,
    0,
    0.5,
    1,
    1.0,
    2**53,
    2**53 + 1,
    2**62 + 1,
    -(2**63),
    "",
    "a",
    "a\x01",
    "aa",
    "ab",
    "b",
    "é",
    "\uffff",
    "\U00010000",
    LONG,
    LONG + "a",
    LONG + "b",
    [],
    [1],
    {},
    {"a": 1},
]
FIELDS: Final = ("a", "b", "c", "d")
EVERYTHING: Final = Span((b"", ""), (AFTER, ""))
SHAPES: Final = [Index(*each) for size in range(1, 5) for each in permutations(FIELDS, size)]


def collection(indexes: Sequence[Index]) -> Collection:
    return Collection("things", key="id", fields=FIELDS, indexes=indexes)


def by_path(filters: Mapping[str, object] | None) -> Any:
    """Filters that compare with values of any type."""
    return filters and {path(name): value for name, value in filters.items()}


class Things(Table[Entity]):
    def values(self, entity_id: str, stored: Entity) -> Sequence[Value | Missing]:
        return [stored.get(each, MISSING) for each in self.indexes.fields]

    def entity(self, entity_id: str, stored: Entity) -> Entity:
        return stored


class ThingsReader(TableReader[Entity]):
    def __init__(self, table: Things) -> None:
        self.table = table
        self.own: dict[str, Entity | None] = {}

    def _table(self, collection: str) -> Table[Entity]:
        return self.table

    def _own_changes(self, collection: str) -> Mapping[str, Entity | None]:
        return self.own

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        raise NotImplementedError


# -- keys and blocks ------------------------------------------------------------------------

values = st.sampled_from(VALUES)


@given(st.lists(values, min_size=3, max_size=3), st.lists(values, min_size=3, max_size=3))
def test_keys_compare_as_the_lists_of_sort_bytes(one: list[Any], other: list[Any]) -> None:
    first, second = [sort_bytes(each) for each in one], [sort_bytes(each) for each in other]
    assert (index_key(one) < index_key(other)) is (first < second)
    assert (index_key(one) == index_key(other)) is (first == second)
    inexact = next((n for n, each in enumerate(first) if not is_exact(each)), None)
    expected = len(index_key(one[: 3 if inexact is None else inexact + 1])), inexact is None
    assert split_key(index_key(one), 0, 3) == expected


@pytest.mark.parametrize("op", ["eq", "lt", "lte", "gt", "gte", "begins_with"])
def test_bounds_of_ranges_are_bounds_of_keys(op: Any) -> None:
    for operand in VALUES:
        if operand is MISSING or (op == "begins_with" and not isinstance(operand, str)):
            continue
        for each in ranges(op, operand) or []:
            assert each.only is None or each.only in map(sort_bytes, VALUES)
            for value in VALUES:
                inside = each.low <= sort_bytes(value) < each.high
                key = index_key([value, "x"])
                assert (key_bound(each.low) <= key < key_bound(each.high)) is inside


@given(st.randoms(use_true_random=False), st.integers(1, 400), st.integers(1, 40))
@settings(max_examples=repetitions(30, 15), deadline=None)
def test_an_index_agrees_with_a_sorted_list(random: Random, size: int, keys: int) -> None:
    def entry() -> Entry:
        return b"%03d" % random.randrange(keys), f"i{random.randrange(2 * size)}"

    expected = sorted({entry() for _ in range(size)})
    index = OrderedIndex()
    index.append(expected)
    for _ in range(3 * size):
        each = entry()
        if each in expected:
            expected.remove(each)
            index.remove(each)
        else:
            expected.insert(bisect_left(expected, each), each)
            index.insert(each)
    assert len(index) == len(expected)
    view = index.view()
    for _ in range(20):
        span = Span(*sorted([entry(), entry()]))
        inside = [each for each in expected if span.low <= each < span.high]
        for each in expected[::7]:
            if each in inside and each < span.high:
                index.remove(each)
                index.insert(each)
        assert [e for piece in view.pieces(span) for e in piece] == inside
        backwards = [e for piece in view.pieces(span, reverse=True) for e in piece]
        assert backwards == inside[::-1]
        assert view.count(span) == len(inside)
    view.release()


# -- queries --------------------------------------------------------------------------------


def random_entity(random: Random, entity_id: str, pool: Sequence[Any]) -> Entity:
    drawn = {name: random.choice(pool) for name in (*FIELDS, "e")}
    return {"id": entity_id, **{k: v for k, v in drawn.items() if v is not MISSING}}


def random_filter(random: Random, pool: Sequence[Any]) -> Any:
    operands = [each for each in pool if each is not MISSING] or [None]
    texts = [each for each in operands if isinstance(each, str)] or [""]

    def condition(name: str) -> Op:
        value, other = random.choice(operands), random.choice(operands)
        if name == "id":
            value, other = f"i{random.randrange(30)}", random.choice([f"i{n}" for n in range(30)])
            texts[:] = ["i", "i1", ""]
        made: Op = random.choice(
            [
                Op("eq", value),
                Op("eq", value),
                in_([random.choice(operands) for _ in range(random.randrange(4))] + [value, other]),
                gt(value),
                gte(value),
                lt(value),
                lte(value),
                between(value, other),
                begins_with(random.choice(texts)),
                exists(random.random() < 0.7),
                ne(value),
                not_in([value]),
            ]
        )
        return made

    parts = [
        {path(name): condition(name)}
        for name in random.choices([*FIELDS, *FIELDS, "e", "id"], k=random.randrange(4))
    ]
    if random.random() < 0.15:
        parts.append(random.choice([or_, not_])({path("a"): condition("a")}))
    return and_(*parts) if parts else None


def random_order(random: Random) -> list[SortKeyInput]:
    names = random.sample([*FIELDS, "e", "id"], k=random.randrange(4))
    down = random.random() < 0.5
    return [
        SortKeyInput(path(each), descending=down if random.random() < 0.8 else not down)
        for each in names
    ]


def expected_rows(query: Query, entities: Mapping[str, Entity]) -> list[Entity]:
    matches, key = compile_filter(query.where), compile_order(query)
    found = {each: entity for each, entity in entities.items() if matches(entity)}
    ids = sorted(found, key=lambda each: key(each, found[each]))
    if query.after is not None:
        after = position_key(query, query.after)
        ids = [each for each in ids if key(each, found[each]) > after]
    return [found[each] for each in ids[: query.limit]]


async def read(reader: ThingsReader, query: Query) -> list[Entity]:
    async with aclosing(reader.select(query)) as records:
        return [each.entity async for each in records]


def positions(random: Random, query: Query, rows: Sequence[Entity]) -> CursorPosition | None:
    if not rows or random.random() < 0.5:
        return None
    row = random.choice(rows)
    at = tuple(row.get(str(each.path[0]), MISSING) for each in query.order)
    return CursorPosition(at, str(row["id"]))


@pytest.mark.parametrize("small", [True, False], ids=["small pieces", "usual pieces"])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=repetitions(120, 40), deadline=None)
def test_queries_agree_with_the_reference(small: bool, seed: int) -> None:
    """Over random declarations, with uncommitted changes, and changes before and during the reading."""
    random = Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        if small:
            for name in ("_BLOCK", "_RUN", "_BUILD_CHUNK", "_CHANGE_CHUNK", "_SAMPLE"):
                patch.setattr(ordered_index, name, random.randint(1, 4))
            patch.setattr("hf_async_store.table_reading._BATCH", random.randint(1, 4))
            patch.setattr("hf_async_store.table_reading._UNFILTERED_BATCH", random.randint(1, 4))
            patch.setattr("hf_async_store.table_reading._MIN_BATCH", 1)
            patch.setattr("hf_async_store.event_loop._ITERATION_SECONDS", 0)
        asyncio.run(_compare(random))


async def _compare(random: Random) -> None:
    pool = random.sample(VALUES, k=random.randint(1, 8))
    table = Things(collection(random.sample(SHAPES, k=random.randint(0, 4))))
    reader = ThingsReader(table)
    table.entities.update(
        {each: random_entity(random, each, pool) for each in (f"i{n}" for n in range(30))}
    )

    def change(number: int) -> dict[str, Entity | None]:
        ids = [f"i{random.randrange(40)}" for _ in range(number)]
        return {e: random.choice([None, random_entity(random, e, pool)]) for e in ids}

    for _ in range(8):
        table.apply(change(random.randrange(6)))
        reader.own = change(random.choice([0, 0, 3]))
        entities = {
            each: entity
            for each, entity in {**table.entities, **reader.own}.items()
            if entity is not None
        }
        query = build_query(
            table.collection or collection([]),
            filters=random_filter(random, pool),
            order_by=random_order(random) or None,
            limit=random.choice([None, None, 0, 1, 3, 10]),
        )
        rows = expected_rows(query, entities)
        assert await reader.count(query.with_limit(None)) == len(
            expected_rows(query.with_limit(None), entities)
        )
        query = Query(
            query.collection,
            query.where,
            query.order,
            query.limit,
            positions(random, query, rows),
        )
        rows = expected_rows(query, entities)
        reading = asyncio.create_task(read(reader, query))
        for _ in range(random.randrange(6)):
            await asyncio.sleep(0)
            table.apply(change(2), merged=None)
        if random.random() < 0.2:
            images = change(3)
            table.apply(images, await table.merged(images))
        found = await reading
        if random.random() < 0.2:
            await table.unpin(table.pin())
        assert found == rows
        assert not table._moments
        assert not any(each._sharing.views for each in table.indexes._built.values())


@pytest.mark.parametrize(
    ("indexes", "filters", "order", "fields", "ordered"),
    [
        (["a", "b"], {"a": 1}, None, ("a",), "complete"),
        ([Index("a", "b")], {"a": 1}, "-b", ("a", "b"), "complete"),
        ([Index("a", "b")], {"a": in_([1, 2])}, "b", ("a", "b"), "complete"),
        ([Index("a", "b")], {"a": 1, "b": gt(1)}, ["a", "b"], ("a", "b"), "complete"),
        ([Index("a", "b")], {"a": gt(1)}, ["a", "b"], ("a", "b"), "complete"),
        ([Index("a", "b")], {"a": gt(1)}, "b", ("a", "b"), "none"),
        ([Index("a", "b")], None, ["a", "-b"], ("a", "b"), "groups"),
        ([Index("a", "b")], None, "a", ("a", "b"), "groups"),
        ([Index("a", "b", "c")], {"b": 1}, ["a", "c"], ("a", "b", "c"), "complete"),
        (["a"], None, "-a", ("a",), "complete"),
        (["a"], None, ["-a", "id"], ("a",), "groups"),
        (["a"], None, "b", BY_ID, "none"),
        (["a"], None, "-id", BY_ID, "complete"),
        (["a"], {"id": gt("x")}, None, BY_ID, "complete"),
        (["a", Index("a", "b")], {"a": 1}, "b", ("a", "b"), "complete"),
        ([Index("a", "b"), "a"], {"a": 1}, None, ("a",), "complete"),
        ([Index("a", "b", "c", "d")], {"a": 1, "b": 2, "c": 3}, "-d", tuple("abcd"), "complete"),
        ([Index("a", "b")], {"a": 1, "b": in_(range(5000))}, "b", ("a", "b"), "complete"),
        ([Index("a", "b")], {"a": in_([1, 2]), "b": in_(range(2000))}, "b", ("a", "b"), "complete"),
        ([Index("a", "b")], {"a": in_([1, 2]), "b": in_(range(5000))}, "b", ("a", "b"), "none"),
    ],
)
def test_the_chosen_index(
    indexes: list[Any], filters: Any, order: Any, fields: tuple[str, ...], ordered: str
) -> None:
    table = Things(collection([Index(e) if isinstance(e, str) else e for e in indexes]))
    query = build_query(collection([]), filters=by_path(filters), order_by=order)
    chosen = asyncio.run(_choose(table.indexes, Conditions(query, "id")))
    assert (chosen.fields, chosen.ordered) == (fields, ordered)


async def test_of_two_indexes_the_one_with_fewer_entries() -> None:
    table = Things(collection([Index("a"), Index("b")]))
    table.entities.update({f"i{n}": {"id": f"i{n}", "a": 1, "b": n} for n in range(9)})
    query = build_query(collection([]), filters=by_path({"a": 1, "b": 3}))
    assert (await _choose(table.indexes, Conditions(query, "id"))).fields == ("b",)


async def test_explain_names_the_index_and_whether_it_gives_the_order() -> None:
    async with open_store("memory:", collections=[collection([Index("a", "b")])]) as store:

        async def plan(filters: Any, order_by: Any = None) -> tuple[object, ...]:
            found = await store.explain_query("things", filters, order_by, 5)
            return found.access, found.index, found.residual, found.sorted_here

        assert await plan({"a": "x"}, "-b") == ("index", "a-b-index", False, False)
        assert await plan({"a": "x", path("e"): 1}, "b") == ("index", "a-b-index", True, False)
        assert await plan({"a": "x"}) == ("index", "a-b-index", False, True)
        assert await plan(None, ["a", "b"]) == ("index", "a-b-index", False, False)
        assert await plan(None, "b") == ("scan", None, False, True)
        assert await plan({"b": "x"}) == ("scan", None, True, False)
        assert await plan({"id": gt("x")}) == ("key", None, False, False)


async def test_an_index_can_be_used_while_another_is_built() -> None:
    table = Things(collection([Index("a"), Index("b")]))
    table.entities.update({f"i{n}": {"id": f"i{n}", "a": n, "b": -n} for n in range(5_000)})
    await table.indexes.ready(("a",))
    build = asyncio.create_task(table.indexes.ready(("b",)))
    await asyncio.sleep(0)
    table.apply({"i0": None, "i1": {"id": "i1", "a": 9_000, "b": 9_000}, "new": {"id": "new"}})
    await table.indexes.ready(("a",))
    assert not build.done()
    assert len(table.indexes.get(("a",))) == 5_000
    await build
    assert [
        [entry for piece in table.indexes.get(fields).pieces(EVERYTHING) for entry in piece]
        for fields in (("a",), ("b",), BY_ID)
    ] == [
        sorted(
            (index_key([each.get(name, MISSING) for name in fields]), entity_id)
            for entity_id, each in table.entities.items()
        )
        for fields in (("a",), ("b",), BY_ID)
    ]


async def test_no_id_is_skipped_while_as_many_are_created_as_deleted() -> None:
    table = Things(collection([]))
    table.entities.update({f"i{n}": {"id": f"i{n}"} for n in range(5_000)})
    build = asyncio.create_task(table.indexes.ready(BY_ID))
    number = 0
    while not build.done():
        await asyncio.sleep(0)
        table.apply({f"i{number}": None, f"new{number}": {"id": f"new{number}"}})
        number += 1
    await table.indexes.ready(BY_ID)
    assert number > 5
    assert list(table.indexes.get(BY_ID).ids()) == sorted(table.entities)


async def test_a_view_stays_complete_while_the_index_is_dropped() -> None:
    table = Things(collection([Index("a")]))
    table.entities.update({f"i{n}": {"id": f"i{n}", "a": n} for n in range(9_000)})
    found = []
    async with aclosing(
        ThingsReader(table).select(build_query(table.collection, order_by="a"))
    ) as rows:
        async for row in rows:
            found.append(row.entity["a"])
            if len(found) == 1:
                table.apply({f"i{n}": {"id": f"i{n}", "a": -n} for n in range(4_000)})
                table.apply({f"i{n}": {"id": f"i{n}", "a": -n} for n in range(4_000, 8_000)})
                await table.unpin(table.pin())  # another query ends
                assert not table.indexes._built
    assert found == list(range(9_000))
    assert not table.indexes.garbage


async def test_indexes_are_compared_while_they_are_dropped(monkeypatch: Any) -> None:
    monkeypatch.setattr(table_reading, "_COUNTED_SPANS", 2)
    table = Things(collection([Index("a"), Index("b")]))
    table.entities.update({f"i{n}": {"id": f"i{n}", "a": n, "b": n} for n in range(9)})
    query = build_query(
        collection([]), filters=by_path({"a": in_(list(range(5))), "b": in_(list(range(4)))})
    )
    await table.indexes.ready(("a",), ("b",))
    choice = asyncio.create_task(_choose(table.indexes, Conditions(query, "id")))
    await asyncio.sleep(0)
    assert not choice.done()
    table.indexes.drop()
    await table.reclaim()
    assert (await choice).fields == ("b",)


@pytest.mark.parametrize("order", [None, "name", "-machine_id"])
@pytest.mark.parametrize("at_the_end", [False, True])
async def test_first_rows_in_another_order_than_that_of_the_filter_s_index(
    order: str | None, at_the_end: bool
) -> None:
    async with open_store("memory:") as store:
        await store.save_entity("requests", {"request_id": "r"})
        machines = [
            {
                "machine_id": f"m{number:05}",
                "request_id": "r",
                "name": f"{number:05}",
                "status": "x" if (number >= 4000 if at_the_end else number % 2) else "y",
            }
            for number in range(6000)
        ]
        await store.create_entities("machines", machines)
        wanted = {"status": "x"}
        whole = await store.query_entities("machines", wanted, order)
        assert len(whole) == 2000 if at_the_end else 3000
        for limit in (1, 50, 800):
            assert await store.query_entities("machines", wanted, order, limit) == whole[:limit]
        page = await store.query_page("machines", wanted, order, 700)
        later = await store.query_page("machines", wanted, order, 700, cursor=page.cursor)
        assert page.items + later.items == whole[:1400]
        async with store.begin_transaction() as tx:
            await tx.update_entity("machines", "m04001", {"status": "y"})
            changed = [each for each in whole if each["machine_id"] != "m04001"]
            assert await tx.query_entities("machines", wanted, order, 50) == changed[:50]
