"""Cases 54 to 65: filters, orders, limits, pages, counts, query plans."""

from __future__ import annotations

import operator
from contextlib import aclosing
from random import Random
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_async_store.errors import InvalidCursorError, InvalidQueryError, UnknownCollectionError
from hf_async_store.query import (
    Combined,
    Filters,
    Op,
    Page,
    Path,
    SortKeyInput,
    and_,
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
    not_,
    not_in,
    or_,
    path,
    sort_key,
)
from hf_async_store.schema import Collection, Index
from hf_async_store.testing import hypothesis_strategies
from hf_async_store.testing.assertions import typed
from hf_async_store.testing.concurrency import answer_of, elsewhere
from hf_async_store.testing.harness import CONTRACT_COLLECTIONS
from hf_async_store.testing.repetitions import repetitions, sampled

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence

    from hf_async_store.query import OrderBy
    from hf_async_store.repository import RepositoryInterface
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.harness import Harness
    from hf_async_store.values import Entity

ITEMS: Final = next(each for each in CONTRACT_COLLECTIONS if each.name == "items")
DECLARED: Final = ("label", "count", "ratio", "active", "due_at", "data", "item_id", "created_at")
PLACES: Final[tuple[str | Path, ...]] = (
    *(*DECLARED, "extra", "a.b") * 2,
    "no such field",
    *hypothesis_strategies.paths_in("data", "extra"),
)

# The property test is a method that several test classes inherit, and its function-scoped fixtures
# are shared by all examples. Both are safe, because each example first deletes the items.
PROPERTY: Final = settings(
    max_examples=repetitions(40),
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.differing_executors,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
    print_blob=True,
)


class Load(NamedTuple):
    """The entities and the queries of one example of the property test."""

    entities: list[dict[str, object]]
    queries: list[tuple[Filters, list[SortKeyInput]]]


_COLUMNS: Final[Mapping[str, st.SearchStrategy[Any]]] = {
    "label": st.sampled_from((None, *hypothesis_strategies.WORDS, *hypothesis_strategies.SIGNS)),
    "count": st.sampled_from((None, 0, 1, -1, 2**53, 2**53 + 1, 2**63 - 1, -(2**63))),
    "ratio": st.sampled_from(
        (None, *hypothesis_strategies.NUMBERS, *hypothesis_strategies.LARGE_NUMBERS)
    ),
    "active": st.sampled_from((None, True, False)),
    "due_at": st.none() | hypothesis_strategies.timestamps,
    "data": hypothesis_strategies.pooled,
    "extra": hypothesis_strategies.pooled,
    "a.b": hypothesis_strategies.pooled,
}


@st.composite
def loads(draw: st.DrawFn) -> Load:
    """Entities with values of the pool, and filters whose operands mostly occur in the entities."""
    number = draw(st.integers(5, 30))
    entities: list[dict[str, object]] = [{"item_id": f"i{n}"} for n in range(number)]
    operands: dict[str | Path, st.SearchStrategy[Any]] = {}
    for name, column in _COLUMNS.items():
        values = draw(st.lists(column, min_size=1, max_size=5))
        operands[name] = st.sampled_from(values) | column
        for each, which in zip(entities, _random_indexes(draw, number, len(values)), strict=True):
            if which < len(values):
                each[name] = values[which]

    def random_query() -> tuple[Filters, list[SortKeyInput]]:
        filters = hypothesis_strategies.draw_filters(
            draw, PLACES, lambda at: operands.get(at, hypothesis_strategies.pooled)
        )
        return filters, hypothesis_strategies.draw_order(draw, PLACES)

    return Load(entities, [random_query() for _ in range(draw(st.integers(3, 12)))])


def _random_indexes(draw: st.DrawFn, number: int, values: int) -> list[int]:
    """For each row, the index of its value; an index beyond the last value stands for no value."""
    seed = draw(st.integers(0, 2**32 - 1))
    return Random(seed).choices(range(values + 1), k=number)


@st.composite
def index_lists(draw: st.DrawFn) -> list[Index]:
    """One to four indexes, each of one to four fields."""
    names = ("label", "count", "ratio", "active", "due_at", "created_at")
    shapes = st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True).map(tuple)
    return [Index.of(each) for each in draw(st.lists(shapes, min_size=1, max_size=4, unique=True))]


async def ids_of(
    repository: RepositoryInterface,
    filters: Filters = None,
    order_by: OrderBy = None,
    limit: int | None = None,
) -> list[object]:
    """The ids of the items that a query returns, in its order."""
    found = await repository.query_entities("items", filters, order_by, limit)
    return [each["item_id"] for each in found]


async def finds(store: StorageStrategy, filters: Filters, expected: Iterable[object]) -> None:
    """Assert that a query and a count with this filter match exactly these ids."""
    wanted = sorted(map(str, expected))
    can = store.capabilities
    assert await answer_of(can, lambda: ids_of(store, filters, "item_id"), wanted) == wanted, (
        filters
    )
    counted = await answer_of(can, lambda: store.count_entities("items", filters), len(wanted))
    assert counted == len(wanted), filters


async def walk(
    repository: RepositoryInterface,
    filters: Filters,
    order_by: OrderBy,
    limit: int,
    **more: Any,
) -> list[Page]:
    """All pages of a query."""
    pages = [await repository.query_page("items", filters, order_by, limit, **more)]
    while pages[-1].cursor is not None:
        cursor = pages[-1].cursor
        pages.append(
            await repository.query_page("items", filters, order_by, limit, cursor=cursor, **more)
        )
    return pages


async def comes_as(
    store: StorageStrategy, order: OrderBy, expected: Sequence[object], *, page: int
) -> None:
    """Assert the order of all items, in one query and page by page."""
    wanted = list(expected)
    can = store.capabilities
    assert await answer_of(can, lambda: ids_of(store, None, order), wanted) == wanted, order
    assert ids_in(await walk(store, None, order, page)) == wanted, order


def ids_in(pages: Iterable[Page]) -> list[object]:
    return [each["item_id"] for page in pages for each in page.items]


async def _check_against_reference(
    store: StorageStrategy,
    rows: Mapping[str, Entity],
    filters: Filters,
    order_by: list[SortKeyInput],
) -> None:
    """Assert that a query, its count and its pages agree with the reference implementation."""
    query = build_query(ITEMS, filters=filters, order_by=order_by)
    found = sorted(
        (each for each, row in rows.items() if matches(query.where, row)),
        key=lambda each: sort_key(query, each, rows[each]),
    )
    can = store.capabilities
    in_order = bool(order_by) or can.default_order == "id"
    expected = [typed(rows[each]) for each in (found if in_order else sorted(found))]

    async def at_once() -> list[object]:
        return _typed_rows(await store.query_entities("items", filters, order_by), in_order)

    async def by_pages() -> list[object]:
        pages = await walk(store, filters, order_by, 1 + len(found) // 3)
        return _typed_rows([each for page in pages for each in page.items], in_order)

    async def counted() -> int:
        return await store.count_entities("items", filters)

    assert await answer_of(can, at_once, expected) == expected
    assert await answer_of(can, by_pages, expected) == expected
    assert await answer_of(can, counted, len(expected)) == len(expected)


def _typed_rows(entities: list[Entity], in_order: bool) -> list[object]:
    if not in_order:
        entities = sorted(entities, key=lambda each: str(each["item_id"]))
    return [typed(each) for each in entities]


def _rows_for_null_tests(place: str | Path) -> dict[str, dict[str, object]]:
    """Rows with null and "x" in a field or at a path, and rows in which it is missing."""
    if isinstance(place, str):
        return {"null": {place: None}, "value": {place: "x"}, "missing": {}}
    name, step = place.parts
    field = str(name)
    around: Callable[[object], object] = (
        (lambda value: {"k": value}) if step == "k" else (lambda value: ["first", value])
    )
    return {
        "null": {field: around(None)},
        "value": {field: around("x")},
        "no field": {},
        "null field": {field: None},
        "empty map": {field: {}},
        "empty list": {field: []},
        "short list": {field: ["x"]},
        "other map": {field: {"kk": "x", "1": "x"}},
        "text": {field: "x"},
        "number": {field: 1},
    }


async def _check_cursor_refused(store: StorageStrategy, cursor: object) -> None:
    with pytest.raises(InvalidCursorError):
        await store.query_page("items", {"label": "x"}, "count", 2, cursor=cast("str", cursor))


async def _counted(store: StorageStrategy, filters: Filters, expected: int) -> int:
    return await answer_of(
        store.capabilities, lambda: store.count_entities("items", filters), expected
    )


async def _streamed(repository: RepositoryInterface, filters: Filters) -> int:
    async with aclosing(repository.stream_entities("items", filters)) as rows:
        return len([each async for each in rows])


async def _all_refuse(store: StorageStrategy, filters: Filters, order: OrderBy) -> None:
    verbs: Sequence[Coroutine[Any, Any, object]] = (
        store.query_entities("items", filters, order),
        _first(store, filters, order),
        store.query_page("items", filters, order),
        store.explain_query("items", filters, order),
    )
    for verb in verbs:
        with pytest.raises(InvalidQueryError):
            await verb


def _numbered(number: int, *, shift: int = 0) -> Entity:
    return {
        "item_id": f"i{number:02}",
        "label": f"l{(number + shift) % 3}",
        "count": (number + shift) % 4,
        "due_at": f"2001-01-01T00:00:{number % 5:02}.000000Z",
    }


OTHER_INDEXES: Final[Mapping[str, Sequence[Index]]] = {
    "none": [],
    "of one field": [Index(each) for each in ("label", "count", "active", "due_at", "created_at")],
    "of two": [Index("active", "due_at"), Index("label", "count"), Index("count", "label")],
    "of three": [Index("active", "label", "count"), Index("ratio", "due_at", "label")],
    "of four": [
        Index("active", "count", "label", "due_at"),
        Index("label", "ratio", "count", "active"),
    ],
}

ONE_OF_EACH: Final[Mapping[str, object]] = {
    "null": None,
    "false": False,
    "true": True,
    "zero": 0,
    "one": 1,
    "one point": 1.0,
    "half": 0.5,
    "text one": "1",
    "text": "a",
    "empty": "",
    "list": [],
    "list one": [1],
    "map": {},
    "map one": {"a": 1},
}

IN_ORDER: Final[tuple[tuple[str, dict[str, object]], ...]] = (
    ("missing", {}),
    ("null", {"v": None}),
    ("false", {"v": False}),
    ("true", {"v": True}),
    ("-inf", {"v": -1.7e308}),
    ("minus", {"v": -1}),
    ("half", {"v": 0.5}),
    ("one", {"v": 1}),
    ("2^53", {"v": float(2**53)}),
    ("2^53+1", {"v": 2**53 + 1}),
    ("max", {"v": 2**63 - 1}),
    ("empty", {"v": ""}),
    ("A", {"v": "A"}),
    ("a", {"v": "a"}),
    ("aa", {"v": "aa"}),
    ("é", {"v": "é"}),
    ("ffff", {"v": "\uffff"}),
    ("10000", {"v": "\U00010000"}),
    ("[]", {"v": []}),
    ("[null]", {"v": [None]}),
    ("[1]", {"v": [1]}),
    ("[1,1]", {"v": [1, 1]}),
    ("[a]", {"v": ["a"]}),
    ("{}", {"v": {}}),
    ("{a:1}", {"v": {"a": 1}}),
    ("{a:1,b:0}", {"v": {"a": 1, "b": 0}}),
    ("{a:2}", {"v": {"a": 2}}),
    ("{b:0}", {"v": {"b": 0}}),
)

INDEXED: Final[tuple[tuple[str, dict[str, object], str], ...]] = (
    ("requests", {"status": "x"}, "status-created_at-index"),
    ("requests", {"request_type": "x"}, "request_type-index"),
    ("requests", {"template_id": "x"}, "template_id-created_at-index"),
    (
        "machines",
        {"request_id": "x", "created_at": gt("2001-01-01")},
        "request_id-created_at-index",
    ),
    ("machines", {"name": "x"}, "name-index"),
    ("items", {"label": "x"}, "label-index"),
    ("items", {"count": 1}, "count-due_at-index"),
    ("items", {"count": 1, "due_at": gt("2001-01-01")}, "count-due_at-index"),
)

MALFORMED_FILTERS: Final[Mapping[str, object]] = {
    "a number": 5,
    "a text": "label=x",
    "a list": [{"label": "x"}],
    "a pair": ("label", "x"),
    "true": True,
    "an operator": eq("x"),
    "a path": path("label"),
    "no operator": {"label": Op(cast("Any", "like"), "x")},
    "an operator in an operator": {"label": eq(eq("x"))},
    "a combination as a value": {"label": or_({"label": "x"})},
    "a path as a value": {"label": path("x")},
    "in of a text": {"label": in_("abc")},
    "in of a number": {"label": in_(cast("Any", 5))},
    "in of a map": {"label": in_({"a": 1})},
    "between of one": {"label": Op("between", ("a",))},
    "between of a text": {"label": Op("between", "ab")},
    "exists of a text": {"label": exists(cast("Any", "yes"))},
    "begins_with a number": {"label": begins_with(cast("Any", 5))},
    "begins_with null": {"label": begins_with(cast("Any", None))},
    "a number as a field": {5: "x"},
    "null as a field": {None: "x"},
    "an empty path": {path(): "x"},
    "a path of an index": {path(0): "x"},
    "a path of a negative index": {path("data", -1): "x"},
    "a path of a float": {Path(("data", cast("Any", 1.0))): "x"},
    "an empty field": {"": "x"},
    "and of a text": and_(cast("Any", "label")),
    "or of null": or_({"label": "x"}, cast("Any", None)),
    "not of a list": not_(cast("Any", [])),
    "no combination": Combined(cast("Any", "xor"), ({"label": "x"},)),
    "a malformed part": and_({"label": "x"}, or_({"label": in_("abc")})),
}


class QueryContract:
    """Cases 54 to 65."""

    # -- 54: every operator ------------------------------------------------------------------

    @PROPERTY
    @given(load=loads())
    async def test_54_every_operator_against_the_reference(
        self, store: StorageStrategy, load: Load
    ) -> None:
        ids = [f"i{n}" for n in range(30)]
        await store.delete_entities("items", ids)
        await store.save_entities("items", load.entities)
        rows = {
            str(each["item_id"]): each
            for each in await store.get_entities("items", ids[: len(load.entities)])
            if each is not None
        }
        for filters, order_by in load.queries:
            await _check_against_reference(store, rows, filters, order_by)

    @pytest.mark.parametrize("shape", OTHER_INDEXES)
    @settings(PROPERTY, max_examples=repetitions(8))
    @given(load=loads())
    async def test_54_every_operator_with_other_indexes(
        self, harness: Harness, shape: str, load: Load
    ) -> None:
        fields = [each for each in ITEMS.fields.values() if each.name != ITEMS.key]
        items = Collection("items", key=ITEMS.key, fields=fields, indexes=OTHER_INDEXES[shape])
        ids = [f"i{n}" for n in range(30)]
        async with harness.store([items]) as store:
            await store.delete_entities("items", ids)
            await store.save_entities("items", load.entities)
            found = await store.get_entities("items", ids)
            rows = {str(each["item_id"]): each for each in found if each is not None}
            for filters, order_by in load.queries:
                await _check_against_reference(store, rows, filters, order_by)

    @settings(PROPERTY, max_examples=repetitions(8))
    @given(load=loads(), indexes=index_lists())
    async def test_54_every_operator_with_random_indexes(
        self, harness: Harness, load: Load, indexes: list[Index]
    ) -> None:
        """Several indexes at once, of one to four fields of any types; also in a transaction."""
        fields = [each for each in ITEMS.fields.values() if each.name != ITEMS.key]
        items = Collection("items", key=ITEMS.key, fields=fields, indexes=indexes)
        ids = [f"i{n}" for n in range(30)]
        async with harness.store([items]) as store:
            await store.delete_entities("items", ids)
            await store.save_entities("items", load.entities)
            found = await store.get_entities("items", ids)
            rows = {str(each["item_id"]): each for each in found if each is not None}
            for filters, order_by in load.queries:
                await _check_against_reference(store, rows, filters, order_by)
            if store.capabilities.queries_in_transaction == "outside":
                return
            async with store.begin_transaction() as tx:
                await tx.delete_entities("items", list(rows)[:3])
                await tx.update_entities("items", {each: {"count": 1} for each in list(rows)[3:6]})
                found = await tx.get_entities("items", ids)
                rows = {str(each["item_id"]): each for each in found if each is not None}
                for filters, order_by in load.queries:
                    query = build_query(ITEMS, filters=filters, order_by=[*order_by, "item_id"])
                    expected = sorted(
                        (each for each, row in rows.items() if matches(query.where, row)),
                        key=lambda each: sort_key(query, each, rows[each]),  # called here
                    )
                    assert await ids_of(tx, filters, [*order_by, "item_id"]) == expected

    # -- 55: null, missing, absent in a map --------------------------------------------------

    @pytest.mark.parametrize(
        "place",
        ["label", "data", "extra", path("data", "k"), path("extra", "k"), path("data", 1)],
        ids=str,
    )
    async def test_55_null_and_missing_under_each_operator(
        self, store: StorageStrategy, place: str | Path
    ) -> None:
        rows = _rows_for_null_tests(place)
        at = path(place) if isinstance(place, str) else place  # comparisons with null need a path
        await store.save_entities("items", [{"item_id": each, **row} for each, row in rows.items()])
        null, value = ["null"], ["value"]
        missing = [each for each in rows if each not in ("null", "value")]
        for op, expected in (
            (eq(None), null),
            (eq("x"), value),
            (ne(None), missing + value),
            (ne("x"), null + missing),
            (ne("y"), null + missing + value),
            *((make(operand), []) for make in (lt, gt) for operand in (None, "x")),
            *((make(None), []) for make in (lte, gte, contains)),
            *((make("x"), value) for make in (lte, gte, contains, begins_with)),
            (between(None, None), []),
            (between(None, "z"), []),
            (between("a", "z"), value),
            (in_([None]), null),
            (in_([None, "x"]), null + value),
            (in_([]), []),
            (not_in([None]), missing + value),
            (not_in([None, "x"]), missing),
            (not_in([]), null + missing + value),
            (exists(), null + value),
            (exists(False), missing),
            (begins_with(""), value),
            (contains(""), value),
        ):
            everything = null + missing + value
            await finds(store, {at: op}, expected)
            opposite = [each for each in everything if each not in expected]
            await finds(store, not_({at: op}), opposite)

    # -- 56: across types --------------------------------------------------------------------

    @pytest.mark.parametrize("field", ["data", "extra"])
    async def test_56_comparisons_do_not_match_across_types(
        self, store: StorageStrategy, field: str
    ) -> None:
        rows = [{"item_id": each, field: value} for each, value in ONE_OF_EACH.items()]
        await store.save_entities("items", [*rows, {"item_id": "missing"}])
        groups: dict[str, tuple[object, object, list[str]]] = {
            "null": (None, None, []),
            "boolean": (False, True, ["false", "true"]),
            "number": (-1, 2.5, ["zero", "one", "one point", "half"]),
            "text": ("", "b", ["text one", "text", "empty"]),
            "list": ([], [2], ["list", "list one"]),
            "map": ({}, {"b": 1}, ["map", "map one"]),
        }
        at = path(field)
        for name, (low, high, ids) in groups.items():
            await finds(store, {at: gte(low)}, ids)
            await finds(store, {at: lte(high)}, ids)
            await finds(store, {at: between(low, high)}, ids)
            low_exact = [each for each in ids if ONE_OF_EACH[each] == low]
            await finds(store, {at: gt(low)}, [each for each in ids if each not in low_exact])
            for other, (_, top, _) in groups.items():
                if other != name:
                    await finds(store, {at: between(low, top)}, [])

    @pytest.mark.parametrize("field", ["data", "extra"])
    async def test_56_equality_across_types(self, store: StorageStrategy, field: str) -> None:
        rows = [{"item_id": each, field: value} for each, value in ONE_OF_EACH.items()]
        await store.save_entities("items", [*rows, {"item_id": "missing"}])
        everything = [*ONE_OF_EACH, "missing"]
        for value, equal in (
            (1, ["one", "one point"]),
            (1.0, ["one", "one point"]),
            (0, ["zero"]),
            (-0.0, ["zero"]),
            (True, ["true"]),
            (False, ["false"]),
            ("1", ["text one"]),
            ("true", []),
            ("", ["empty"]),
            (None, ["null"]),
            ([], ["list"]),
            ([1.0], ["list one"]),
            ([True], []),
            ({}, ["map"]),
            ({"a": 1.0}, ["map one"]),
            ({"a": True}, []),
        ):
            unequal = [each for each in everything if each not in equal]
            await finds(store, {field: value}, equal)
            await finds(store, {field: in_([value, "no such value"])}, equal)
            await finds(store, {field: ne(value)}, unequal)
            await finds(store, {field: not_in([value])}, unequal)

    async def test_56_operands_that_differ_from_the_declared_type(
        self, store: StorageStrategy
    ) -> None:
        due = "2001-02-03T04:05:06.000007Z"
        await store.create_entity(
            "items",
            {"item_id": "a", "label": "1", "count": 1, "ratio": 1.5, "active": True, "due_at": due},
        )
        others: dict[str, list[object]] = {
            "label": [1, 1.0, True, None, ["1"], {"1": 1}],
            "count": ["1", True, None, [1], 1.5, 10**18, 1e300],
            "ratio": ["1.5", True, None, [1.5], 1],
            "active": ["true", 1, 1.0, None, [True]],
            "due_at": [981173106, True, None, [due], "2001", "not a time"],
        }
        for field, operands in others.items():
            at = path(field)
            for operand in operands:
                await finds(store, {at: operand}, [])
                await finds(store, {at: ne(operand)}, ["a"])
                await finds(store, {at: not_in([operand])}, ["a"])
                if not isinstance(operand, int | float | str) or field in ("label", "active"):
                    for make in (lt, lte, gt, gte):
                        await finds(store, {at: make(operand)}, [])
        for filters, expected in (
            ({"count": lt(1.5)}, ["a"]),
            ({"count": gt(0.5)}, ["a"]),
            ({"count": lt(1e300)}, ["a"]),
            ({"count": between(0.99, 1.01)}, ["a"]),
            ({"ratio": gt(1)}, ["a"]),
            ({"ratio": gt(2)}, []),
            ({path("label"): lt(2)}, []),
            ({path("due_at"): gt("not a time")}, []),
            ({path("due_at"): gt("2000")}, ["a"]),
            ({"due_at": gt("2001-02-03T04:05:06+01:00")}, ["a"]),
            ({"due_at": "2001-02-03T05:05:06.000007+01:00"}, ["a"]),
        ):
            await finds(store, cast("Filters", filters), expected)

    async def test_56_large_numbers_compare_exactly(self, store: StorageStrategy) -> None:
        numbers: dict[str, int | float] = {
            "2^53-1": 2**53 - 1,
            "2^53": 2**53,
            "2^53 float": float(2**53),
            "2^53+1": 2**53 + 1,
            "2^63-1": 2**63 - 1,
            "2^63 float": float(2**63),
            "-2^63": -(2**63),
            "-2^63 float": -float(2**63),
        }
        for field in ("ratio", "data", "extra"):
            await store.save_entities(
                "items", [{"item_id": each, field: number} for each, number in numbers.items()]
            )
            for number in numbers.values():
                for make, holds in ((eq, operator.eq), (lt, operator.lt), (gte, operator.ge)):
                    expected = [each for each, value in numbers.items() if holds(value, number)]
                    await finds(store, {field: make(number)}, expected)

    # -- 57: in ------------------------------------------------------------------------------

    @pytest.mark.parametrize("field", ["label", "extra", "item_id"])
    async def test_57_in_with_no_values_and_with_1000(
        self, store: StorageStrategy, field: str
    ) -> None:
        ids = [f"i{n:04}" for n in range(0, 1200, 50)]
        await store.save_entities("items", [{"item_id": each, field: each} for each in ids])
        thousand = [f"i{n:04}" for n in range(1000)]
        found = [each for each in ids if each in thousand]
        await finds(store, {field: in_([])}, [])
        await finds(store, {field: not_in([])}, ids)
        await finds(store, {field: in_(thousand)}, found)
        await finds(store, {field: in_(iter(thousand))}, found)
        await finds(store, {field: in_(set(thousand))}, found)
        await finds(store, {field: not_in(thousand)}, [each for each in ids if each not in found])
        await finds(store, {path(field): in_([*thousand, 1, None, True])}, found)
        await finds(
            store, and_({field: in_(thousand)}, {"item_id": in_(thousand[:100])}), found[:2]
        )

    async def test_57_repeated_values_of_in_do_not_repeat_rows(
        self, store: StorageStrategy
    ) -> None:
        await store.save_entities(
            "items", [{"item_id": each, "label": "x", "count": 1} for each in "abc"]
        )
        await finds(store, {"label": in_(["x", "x", "y"])}, "abc")
        await finds(store, {"count": in_([1, 1.0, 2])}, "abc")
        await finds(store, or_({"label": "x"}, {"count": 1}, {"label": in_(["x"])}), "abc")
        assert await ids_of(store, {"label": in_(["x", "x"])}, "item_id", 2) == ["a", "b"]

    # -- 58: strings -------------------------------------------------------------------------

    @pytest.mark.parametrize("field", ["label", "data", "extra"])
    async def test_58_strings_compare_by_code_point(
        self, store: StorageStrategy, field: str
    ) -> None:
        texts = sorted(
            {
                *hypothesis_strategies.WORDS,
                *hypothesis_strategies.SIGNS,
                "Z",
                "aa",
                "a\u0300",
                "\ud7ff",
            }
        )
        rows = {f"i{n:02}": text for n, text in enumerate(texts)}
        await store.save_entities(
            "items", [{"item_id": i, field: text} for i, text in rows.items()]
        )
        for text in sampled(texts):
            for make, holds in (
                (eq, operator.eq),
                (lt, operator.lt),
                (lte, operator.le),
                (gt, operator.gt),
                (begins_with, str.startswith),
                (contains, operator.contains),
            ):
                expected = [each for each, other in rows.items() if holds(other, text)]
                await finds(store, {field: make(text)}, expected)
        assert await ids_of(store, None, field) == sorted(rows)
        assert await ids_of(store, None, f"-{field}") == sorted(rows, reverse=True)

    @pytest.mark.parametrize("field", ["label", "extra"])
    async def test_58_pattern_characters_are_literal(
        self, store: StorageStrategy, field: str
    ) -> None:
        texts = (
            "100%",
            "100x",
            "a_b",
            "axb",
            "a\\b",
            "a*b",
            "[ab]",
            "a'b",
            'a"b',
            "A_B",
            "^a",
            "a.b",
        )
        await store.save_entities("items", [{"item_id": each, field: each} for each in texts])
        for make, operand, expected in (
            (contains, "%", ["100%"]),
            (begins_with, "100%", ["100%"]),
            (begins_with, "%", []),
            (contains, "_", ["a_b", "A_B"]),
            (begins_with, "a_", ["a_b"]),
            (contains, "\\", ["a\\b"]),
            (contains, "*", ["a*b"]),
            (begins_with, "[a", ["[ab]"]),
            (contains, "'", ["a'b"]),
            (contains, '"', ['a"b']),
            (contains, ".", ["a.b"]),
            (begins_with, "^", ["^a"]),
            (eq, "A_b", []),
            (contains, "a_B", []),
        ):
            await finds(store, {field: make(operand)}, expected)

    async def test_58_long_strings_are_distinguished(self, store: StorageStrategy) -> None:
        # Longer than the prefix that an index stores.
        long = "x" * 3000
        rows = {"a": long + "a", "b": long + "b", "c": long}
        await store.save_entities(
            "items", [{"item_id": i, "label": text} for i, text in rows.items()]
        )
        await finds(store, {"label": long + "a"}, ["a"])
        await finds(store, {"label": ne(long + "a")}, ["b", "c"])
        await finds(store, {"label": gt(long)}, ["a", "b"])
        await finds(store, {"label": between(long, long + "a")}, ["a", "c"])
        await finds(store, {"label": begins_with(long)}, "abc")
        await finds(store, {"label": in_([long, long + "b"])}, ["b", "c"])
        assert await ids_of(store, None, "label") == ["c", "a", "b"]
        assert await ids_of(store, None, "-label") == ["b", "a", "c"]

    # -- 59: paths and lists -----------------------------------------------------------------

    async def test_59_paths_into_dicts_and_lists(self, store: StorageStrategy) -> None:
        for field in ("data", "extra"):
            await store.save_entities(
                "items",
                [
                    {"item_id": "map", field: {"a": {"b": "x"}, "list": [{"c": 1}, "y"]}},
                    {"item_id": "dotted", field: {"a.b": "x", "0": "y", "": {"": "x"}}},
                    {"item_id": "list", field: ["y", {"a": "x"}, ["x"]]},
                    {"item_id": "odd", field: {"$a[0]": "x", "'": "x", '"': "x", "a b": "x"}},
                ],
            )
            for steps, value, expected in (
                (("a", "b"), "x", ["map"]),
                (("a.b",), "x", ["dotted"]),
                (("list", 0, "c"), 1, ["map"]),
                (("list", 1), "y", ["map"]),
                (("list", "1"), "y", []),
                ((0,), "y", ["list"]),
                (("0",), "y", ["dotted"]),
                ((1, "a"), "x", ["list"]),
                ((2, 0), "x", ["list"]),
                ((3,), "x", []),
                (("", ""), "x", ["dotted"]),
                (("$a[0]",), "x", ["odd"]),
                (("'",), "x", ["odd"]),
                (('"',), "x", ["odd"]),
                (("a b",), "x", ["odd"]),
                (("a", "b", "c"), "x", []),
            ):
                await finds(store, {path(field, *steps): value}, expected)
                await finds(store, {path(field, *steps): exists()}, expected)

    async def test_59_a_name_with_dots_is_one_field(self, store: StorageStrategy) -> None:
        await store.save_entities(
            "items",
            [
                {"item_id": "dotted", "data.a": "x", "data": {"b": "x"}},
                {"item_id": "nested", "data": {"a": "x"}},
            ],
        )
        await finds(store, {"data.a": "x"}, ["dotted"])
        await finds(store, {path("data", "a"): "x"}, ["nested"])
        await finds(store, {path("data.a"): "x"}, ["dotted"])

    @pytest.mark.parametrize("field", ["data", "extra"])
    async def test_59_membership_in_lists(self, store: StorageStrategy, field: str) -> None:
        rows: dict[str, object] = {
            "words": ["red", "green"],
            "text": "red and green",
            "numbers": [1, 2.0],
            "truths": [True, None],
            "lists": [["red"], [1]],
            "maps": [{"a": 1}],
            "map": {"red": 1},
            "empty": [],
        }
        await store.save_entities(
            "items", [{"item_id": i, field: each} for i, each in rows.items()]
        )
        for operand, expected in (
            ("red", ["words", "text"]),
            ("re", ["text"]),
            ("Red", []),
            (1, ["numbers"]),
            (1.0, ["numbers"]),
            (2, ["numbers"]),
            (True, ["truths"]),
            (None, ["truths"]),
            (["red"], ["lists"]),
            ([1.0], ["lists"]),
            ([True], []),
            ({"a": 1.0}, ["maps"]),
            ({}, []),
            ("", ["text"]),
        ):
            await finds(store, {field: contains(operand)}, expected)
        await finds(store, {path(field, 0): contains("red")}, ["words", "lists"])

    # -- 60: order ---------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("around", "place"),
        [("extra", "extra"), ("data", "data"), (None, path("data", "v"))],
        ids=["undeclared", "json", "nested"],
    )
    async def test_60_the_order_is_total(
        self, store: StorageStrategy, around: str | None, place: str | Path
    ) -> None:
        entities: list[dict[str, object]] = []
        for name, row in reversed(IN_ORDER):
            fields = {"data": row} if around is None else {around: row["v"]} if row else {}
            entities.append({"item_id": name, **fields})
        await store.save_entities("items", entities)
        expected = [name for name, _ in IN_ORDER]
        for order, wanted in ((asc(place), expected), (desc(place), expected[::-1])):
            await comes_as(store, order, wanted, page=7)
            for limit in (1, 5, len(wanted) - 1):
                assert await ids_of(store, None, order, limit) == wanted[:limit]

    @pytest.mark.parametrize("field", ["label", "count", "ratio", "active", "due_at"])
    async def test_60_missing_and_null_come_before_declared_values(
        self, store: StorageStrategy, field: str
    ) -> None:
        low, high = {
            "label": ("", "a"),
            "count": (-(2**63), 2**63 - 1),
            "ratio": (-1.7e308, 2**63 - 1),
            "active": (False, True),
            "due_at": ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z"),
        }[field]
        await store.save_entities(
            "items",
            [
                {"item_id": "high", field: high},
                {"item_id": "missing"},
                {"item_id": "null", field: None},
                {"item_id": "low", field: low},
            ],
        )
        expected = ["missing", "null", "low", "high"]
        await comes_as(store, field, expected, page=1)
        await comes_as(store, f"-{field}", expected[::-1], page=1)

    async def test_60_several_keys_and_ties_by_id(self, store: StorageStrategy) -> None:
        entities = [
            {"item_id": f"i{n}", "label": "xyz"[n % 3], "count": n % 2, "extra": (n // 2) % 2}
            for n in range(12)
        ]
        await store.save_entities("items", entities)
        rows: dict[str, Any] = {str(each["item_id"]): each for each in entities}

        def by(key: Callable[[Any], Any]) -> list[str]:
            return sorted(rows, key=lambda each: (key(rows[each]), each))

        backwards = sorted(rows, reverse=True)
        orders: tuple[tuple[OrderBy, list[str]], ...] = (
            ("label", by(lambda e: e["label"])),
            ("-count", by(lambda e: e["count"])[::-1]),
            (["-count", "label"], by(lambda e: (-e["count"], e["label"]))),
            (
                [asc("extra"), desc("count"), asc("label")],
                by(lambda e: (e["extra"], -e["count"], e["label"])),
            ),
            (["count", "-item_id"], sorted(backwards, key=lambda each: rows[each]["count"])),
            ("item_id", sorted(rows)),
            ("-item_id", backwards),
            (["no such field"], sorted(rows)),
            (["-no such field"], backwards),
        )
        for order, expected in orders:
            await comes_as(store, order, expected, page=5)

    async def test_60_the_order_inside_a_transaction(self, store: StorageStrategy) -> None:
        if store.capabilities.queries_in_transaction == "outside":
            pytest.skip("queries do not see the changes of their transaction")
        await store.save_entities("items", [_numbered(n) for n in range(40)])
        async with store.begin_transaction() as transaction:
            await transaction.save_entities("items", [_numbered(n, shift=1) for n in range(30, 50)])
            await transaction.delete_entities("items", ["i07", "i39"])
            rows = {
                **{f"i{n:02}": _numbered(n) for n in range(30)},
                **{f"i{n:02}": _numbered(n, shift=1) for n in range(30, 50)},
            }
            del rows["i07"], rows["i39"]
            by_default = [None] if store.capabilities.default_order == "id" else []
            orders = [*by_default, "-item_id", "-count", ["count", "due_at"], "label"]
            for filters in (None, {"label": "l1"}, {"count": in_([1, 2])}, {"count": gte(2)}):
                for order_by in orders:
                    query = build_query(ITEMS, filters=filters, order_by=order_by)
                    expected = sorted(
                        (each for each, row in rows.items() if matches(query.where, row)),
                        key=lambda each: sort_key(query, each, rows[each]),  # called here
                    )
                    assert await ids_of(transaction, filters, order_by) == expected
                    assert await ids_of(transaction, filters, order_by, 4) == expected[:4]
                    pages = await walk(transaction, filters, order_by, 7)
                    assert ids_in(pages) == expected
                    assert await transaction.count_entities("items", filters) == len(expected)

    async def test_60_ids_are_ordered_by_code_point(self, store: StorageStrategy) -> None:
        ids = sorted(
            ["a", "B", "b", "Z", "é", "e\u0301", "\uffff", "\U00010000", " ", "10", "9", "%"]
        )
        await store.save_entities("items", [{"item_id": each} for each in reversed(ids)])
        await comes_as(store, "item_id", ids, page=5)
        await comes_as(store, "-item_id", ids[::-1], page=5)
        await comes_as(store, "label", ids, page=5)  # no item has a label, so that all are tied
        if store.capabilities.default_order == "id":
            await comes_as(store, None, ids, page=5)
            assert await ids_of(store, limit=3) == ids[:3]

    # -- 61: limit ---------------------------------------------------------------------------

    async def test_61_limit_counts_matches(self, store: StorageStrategy) -> None:
        rows = [
            {"item_id": f"i{n:03}", "label": "few" if n >= 290 else "many", "extra": n % 100}
            for n in range(300)
        ]
        await store.save_entities("items", rows)
        few = [f"i{n:03}" for n in range(290, 300)]
        await finds(store, {"label": "few"}, few)
        for filters in ({"label": "few"}, {"extra": gte(90), "label": "few"}):
            for limit in (1, 3, 9, 10, 11, 10**6, 2**63):
                assert await ids_of(store, filters, "item_id", limit) == few[:limit]
            assert len(await ids_of(store, filters, limit=3)) == 3
            assert len(await ids_of(store, filters, "-extra", 3)) == 3
            page = await store.query_page("items", filters, "item_id", 4)
            assert ids_in([page]) == few[:4]
            page = await store.query_page("items", filters, "item_id", 2**63)
            assert ids_in([page]) == few
            assert await store.query_entities("items", filters, "item_id", 3, offset=2**63) == []

    async def test_61_zero_none_and_invalid_limits(self, store: StorageStrategy) -> None:
        await store.save_entities("items", [{"item_id": each} for each in "abc"])
        assert await ids_of(store, None, "item_id", None) == ["a", "b", "c"]
        assert await ids_of(store, None, "item_id", 0) == []
        assert [each async for each in store.stream_entities("items", limit=0)] == []
        async with store.begin_transaction() as tx:
            assert await ids_of(tx, None, "item_id", 0) == []
            assert await ids_of(tx, None, "item_id", 2) == ["a", "b"]
        for wrong in cast("tuple[int, ...]", (-1, True, 1.0, "1", [1])):
            for verb in (
                store.query_entities("items", limit=wrong),
                anext(store.stream_entities("items", limit=wrong)),
                store.query_page("items", limit=wrong),
                store.explain_query("items", limit=wrong),
            ):
                with pytest.raises(InvalidQueryError):
                    await verb
        for no_page in cast("tuple[int, ...]", (0, None)):
            with pytest.raises(InvalidQueryError):
                await store.query_page("items", limit=no_page)

    # -- 62: pages ---------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "order",
        [
            "item_id",
            "-item_id",
            "label",
            "-label",
            "extra",
            ["-extra", "count"],
            "updated_at",
            path("data", "v"),
            None,
        ],
        ids=str,
    )
    async def test_62_pages_show_every_unchanged_row_once(
        self, store: StorageStrategy, order: OrderBy
    ) -> None:
        def row(item_id: str, n: int) -> dict[str, object]:
            mixed = (None, n, str(n), [n], True)[n % 5]
            return {
                "item_id": item_id,
                "label": f"l{n * 7 % 11}",
                "count": n % 4,
                "data": {"v": mixed},
                **({"extra": mixed} if n % 3 else {}),
            }

        untouched = [row(f"{n:02} untouched", n) for n in range(40)]
        await store.save_entities("items", [row(f"{n:02} deleted", n) for n in range(20)])
        await store.save_entities("items", [row(f"{n:02} moved", n) for n in range(20)])
        await store.save_entities("items", untouched)
        seen: list[object] = []
        cursor: str | None = None
        for step in range(100):
            page = await store.query_page("items", None, order, 7, cursor=cursor)
            assert len(page.items) <= 7
            seen += ids_in([page])
            cursor = page.cursor
            if cursor is None:
                break
            await store.create_entities(
                "items", [row(f"{n * 5 + step % 5:02} new {step}", step + n) for n in range(3)]
            )
            await store.delete_entity("items", f"{step % 20:02} deleted")
            await store.save_entity("items", row(f"{step * 3 % 20:02} moved", step * 13 % 29))
        assert cursor is None, "there is no last page after 100 pages"
        ids = [each["item_id"] for each in untouched]
        assert sorted(str(each) for each in seen if each in ids) == sorted(map(str, ids))

    async def test_62_a_full_last_page_has_no_cursor(self, store: StorageStrategy) -> None:
        await store.save_entities(
            "items", [{"item_id": f"i{n}", "label": "x"} for n in range(6)] + [{"item_id": "other"}]
        )
        ids = [f"i{n}" for n in range(6)]
        await finds(store, {"label": "x"}, ids)
        for limit, sizes in (
            (3, [3, 3]),
            (2, [2, 2, 2]),
            (6, [6]),
            (7, [6]),
            (4, [4, 2]),
            (1, [1] * 6),
            (2**62, [6]),
        ):
            pages = await walk(store, {"label": "x"}, "item_id", limit)
            assert [len(each.items) for each in pages] == sizes
            assert ids_in(pages) == ids
        empty = await store.query_page("items", {"label": "none"}, limit=3)
        assert (empty.items, empty.cursor) == ([], None)

    async def test_62_limit_and_fields_may_change_between_pages(
        self, store: StorageStrategy
    ) -> None:
        await store.save_entities(
            "items", [{"item_id": f"i{n}", "label": f"l{9 - n}", "count": n} for n in range(9)]
        )
        first = await store.query_page("items", None, "label", 2, fields=["count"])
        # The order needs a field that the page does not show.
        assert [set(each) for each in first.items] == [{"item_id", "count", "version"}] * 2
        rest = await store.query_page("items", None, "label", 50, cursor=first.cursor)
        assert ids_in([first, rest]) == [f"i{n}" for n in reversed(range(9))]
        assert rest.cursor is None

    async def test_62_a_cursor_is_valid_after_its_row_is_deleted(
        self, store: StorageStrategy
    ) -> None:
        await store.save_entities("items", [{"item_id": each, "label": each} for each in "abcd"])
        for order in ("item_id", "label", "-label"):
            page = await store.query_page("items", None, order, 2)
            last = str(page.items[-1]["item_id"])
            await store.delete_entity("items", last)
            rest = await store.query_page("items", None, order, 9, cursor=page.cursor)
            assert ids_in([page, rest]) == sorted("abcd", reverse=order == "-label")
            await store.create_entity("items", {"item_id": last, "label": last})

    async def test_62_pages_inside_a_transaction(self, store: StorageStrategy) -> None:
        await store.save_entities("items", [{"item_id": f"i{n}"} for n in range(5)])
        inside = store.capabilities.queries_in_transaction != "outside"
        async with store.begin_transaction() as tx:
            await tx.create_entity("items", {"item_id": "i5"})
            first = await tx.query_page("items", None, "item_id", 2)
            await tx.delete_entity("items", "i3")
            rest = await tx.query_page("items", None, "item_id", 9, cursor=first.cursor)
            expected = "01245" if inside else "01234"
            assert ids_in([first, rest]) == [f"i{n}" for n in expected]

    async def test_62_altered_and_foreign_cursors_are_refused(self, store: StorageStrategy) -> None:
        await store.save_entities("items", [{"item_id": f"i{n}", "label": "x"} for n in range(4)])
        await store.save_entities("counters", [{"counter_id": f"i{n}"} for n in range(4)])
        cursor = (await store.query_page("items", {"label": "x"}, "count", 2)).cursor
        assert cursor is not None
        for n in range(len(cursor)):
            other = "A" if cursor[n] != "A" else "B"
            await _check_cursor_refused(store, cursor[:n] + other + cursor[n + 1 :])
        for altered in (
            cursor[:-1],
            cursor + "A",
            cursor + "=",
            cursor.lower(),
            "",
            "x",
            "é",
            5,
            b"x",
        ):
            await _check_cursor_refused(store, altered)
        for verb in (
            store.query_page("items", {"label": "y"}, "count", 2, cursor=cursor),
            store.query_page("items", None, "count", 2, cursor=cursor),
            store.query_page("items", {"label": "x"}, "-count", 2, cursor=cursor),
            store.query_page("items", {"label": "x"}, None, 2, cursor=cursor),
            store.query_page("items", {"label": "x"}, ["count", "label"], 2, cursor=cursor),
            store.query_page("counters", {path("label"): "x"}, path("count"), 2, cursor=cursor),
        ):
            with pytest.raises(InvalidCursorError):
                await verb
        page = await store.query_page("items", {"label": eq("x")}, ["count"], 9, cursor=cursor)
        assert ids_in([page]) == ["i2", "i3"]

    # -- 63: count ---------------------------------------------------------------------------

    async def test_63_count_equals_the_streamed_length(self, store: StorageStrategy) -> None:
        await store.save_entities(
            "items",
            [
                {"item_id": f"i{n:03}", "label": f"l{n % 3}", "count": n, "extra": [None, n][n % 2]}
                for n in range(250)
            ],
        )
        await store.save_entities("counters", [{"counter_id": f"i{n}"} for n in range(7)])
        asked: tuple[tuple[Filters, int], ...] = (
            (None, 250),
            ({}, 250),
            ({"label": "l0"}, 84),
            ({"label": "none"}, 0),
            ({"count": gte(200)}, 50),
            ({"extra": None}, 125),
            ({"label": "l0", "extra": None}, 42),
            (or_({"label": "l1"}, {"count": lt(3)}), 85),
            (not_({"label": "l0"}), 166),
            (and_(), 250),
            (or_(), 0),
        )
        for filters, expected in asked:
            assert await _counted(store, filters, expected) == expected, filters
            assert await _streamed(store, filters) == expected
            async with store.begin_transaction() as tx:
                assert await tx.count_entities("items", filters) == expected
                assert await _streamed(tx, filters) == expected
        assert await store.count_entities("counters") == 7
        assert await store.count_entities("accounts") == 0

    # -- 64: query plans ---------------------------------------------------------------------------

    async def test_64_a_declared_index_is_used_and_named(self, store: StorageStrategy) -> None:
        for collection, filters, index in INDEXED:
            plan = await store.explain_query(collection, cast("Filters", filters))
            if store.capabilities.indexes:
                # Without entities, an engine may prefer an index on the second condition alone.
                fitting = {index, "created_at-index"} if "created_at" in filters else {index}
                assert plan.access == "index", plan
                assert plan.index in fitting, plan
            else:
                assert (plan.access, plan.index) == ("scan", None), plan
            if store.capabilities.query_isolation == "snapshot":
                assert plan.consistent

    async def test_64_a_query_that_scans_or_sorts_has_advice(self, store: StorageStrategy) -> None:
        for filters, order, advised in (
            ({"due_at": "2001-01-01"}, None, 'Index("due_at")'),
            ({"label": "x"}, "-due_at", 'Index("label", "due_at")'),
            ({"item_id": "a"}, None, None),
            (None, "item_id", None),
        ):
            plan = await store.explain_query("items", filters, order)
            assert plan.advice == (advised if store.capabilities.indexes else None), plan

    async def test_64_conditions_outside_the_index_are_residual(
        self, store: StorageStrategy
    ) -> None:
        plan = await store.explain_query("requests", {"status": "x", path("extra"): contains("y")})
        assert plan.residual, plan
        if store.capabilities.indexes:
            assert (plan.access, plan.index) == ("index", "status-created_at-index"), plan

    @pytest.mark.parametrize(
        "filters",
        [
            None,
            {"extra": "x"},
            {"data": "x"},
            {path("data", "a"): "x"},
            not_({"label": "x"}),
            or_({"label": "x"}, {"extra": "x"}),
            {"label": contains("x")},
        ],
        ids=str,
    )
    async def test_64_a_scan_is_reported_as_one(
        self, store: StorageStrategy, filters: Filters
    ) -> None:
        plan = await store.explain_query("items", filters)
        assert (plan.access, plan.index) == ("scan", None), plan

    async def test_64_a_query_by_key_uses_no_index(self, store: StorageStrategy) -> None:
        plan = await store.explain_query("items", {"item_id": "x"})
        assert plan.access in ("key", "scan")
        assert plan.index is None
        if store.capabilities.indexes:
            assert plan.access == "key"

    async def test_64_explain_validates_like_a_query(self, store: StorageStrategy) -> None:
        with pytest.raises(InvalidQueryError):
            await store.explain_query("items", cast("Filters", 5))
        with pytest.raises(UnknownCollectionError):
            await store.explain_query("nowhere")
        await store.explain_query("items", {"label": "x"}, "-count", 5)
        assert await store.count_entities("items") == 0

    async def test_64_queries_by_index_return_the_correct_rows(
        self, store: StorageStrategy
    ) -> None:
        await store.save_entities(
            "items",
            [
                {"item_id": f"i{n:02}", "label": f"l{n % 4}", "count": n % 3, "extra": n % 2}
                for n in range(60)
            ],
        )
        hits = [f"i{n:02}" for n in range(60) if n % 4 == 1 and n % 2 == 1]
        await finds(store, {"label": "l1", "extra": 1}, hits)
        await finds(
            store, {"count": 2, "due_at": exists(False)}, [f"i{n:02}" for n in range(2, 60, 3)]
        )
        found = await ids_of(store, {"label": "l1"}, "-count", 4)
        assert found == ["i53", "i41", "i29", "i17"]

    # -- 65: malformed queries ---------------------------------------------------------------

    @pytest.mark.parametrize("name", MALFORMED_FILTERS)
    async def test_65_a_malformed_filter_is_refused(
        self, store: StorageStrategy, name: str
    ) -> None:
        await store.create_entity("items", {"item_id": "a", "label": "x"})
        filters = cast("Filters", MALFORMED_FILTERS[name])
        await _all_refuse(store, filters, None)
        async with store.begin_transaction() as tx:
            with pytest.raises(InvalidQueryError):
                await tx.query_entities("items", filters)
            await tx.create_entity("items", {"item_id": "b"})  # the transaction is still usable
        with pytest.raises(InvalidQueryError):
            await elsewhere(store.count_entities("items", filters))

    @pytest.mark.parametrize(
        "order",
        [
            5,
            True,
            {"label": "asc"},
            {"label"},
            [5],
            [None],
            [["label"]],
            "",
            "-",
            [""],
            path(),
            path(0),
        ],
        ids=str,
    )
    async def test_65_a_malformed_order_is_refused(
        self, store: StorageStrategy, order: object
    ) -> None:
        await store.create_entity("items", {"item_id": "a"})
        await _all_refuse(store, None, cast("OrderBy", order))

    @pytest.mark.parametrize("fields", ["label", 5, {"label": 1}, [5], [""], [None]], ids=str)
    async def test_65_malformed_fields_are_refused(
        self, store: StorageStrategy, fields: object
    ) -> None:
        wrong = cast("Sequence[str]", fields)
        for verb in (
            store.query_entities("items", fields=wrong),
            store.query_page("items", fields=wrong),
            anext(store.stream_entities("items", fields=wrong)),
        ):
            with pytest.raises(InvalidQueryError):
                await verb

    async def test_65_an_unknown_collection_is_refused(self, store: StorageStrategy) -> None:
        for name in ("nowhere", "", "ITEMS", "items "):
            for verb in (
                store.query_entities(name),
                store.query_page(name),
                store.count_entities(name),
                anext(store.stream_entities(name)),
            ):
                with pytest.raises(UnknownCollectionError):
                    await verb


async def _first(store: StorageStrategy, filters: Filters, order: OrderBy) -> object:
    async with aclosing(store.stream_entities("items", filters, order)) as rows:
        return await anext(rows)
