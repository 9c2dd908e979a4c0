"""The semantics of queries: every operator, the total order, cursors, and invalid queries.

The property tests use `compare` below as the reference; it implements the documented rules case by
case and shares no code with the product.
"""

from __future__ import annotations

import asyncio
import string
from datetime import UTC, date, datetime, timedelta, timezone
from enum import StrEnum
from functools import cmp_to_key
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import patch
from uuid import UUID

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_async_store import query as query_module
from hf_async_store.errors import InvalidCursorError, InvalidQueryError, UnsupportedValueError
from hf_async_store.query import (
    EVERYTHING,
    MISSING,
    And,
    Combined,
    Comparison,
    CursorPosition,
    Missing,
    Not,
    Op,
    Or,
    Order,
    Page,
    Path,
    Query,
    SortKeyInput,
    and_,
    asc,
    begins_with,
    between,
    build_large_query,
    build_query,
    compile_filter,
    contains,
    desc,
    encode_cursor,
    eq,
    equality_candidates,
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
    order_key,
    ordered,
    path,
    position_key,
    project,
    sort_key,
)
from hf_async_store.schema import Collection, Field
from hf_async_store.sealed_text import sealed
from hf_async_store.values import Entity, Value, normalise

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence

THINGS = Collection(
    "things",
    key="id",
    fields=["status", Field("count", "integer"), Field("seen_at", "timestamp")],
    indexes=["status"],
    open=True,
)
OTHERS = Collection("others", key="id", fields=["status"])


def build(**given: Any) -> Query:
    """`build_query` without static types, so that invalid arguments can be passed."""
    return build_query(THINGS, **given)


def asked(order: Iterable[Order]) -> list[SortKeyInput]:
    """An order as callers write it."""
    return [(desc if each.descending else asc)(Path(each.path)) for each in order]


def keeps(filters: Any, entity: Entity) -> bool:
    return matches(build(filters=filters).where, entity)


def shows(operator: Any, value: Value | Missing) -> bool:
    """Whether `operator` matches a field with this value."""
    entity: Entity = {} if value is MISSING else {"f": value}
    return keeps({path("f"): operator}, entity)


# -- the reference -----------------------------------------------------------------------------


def rank(value: Value | Missing) -> int:
    if value is MISSING:
        return 0
    if value is None:
        return 1
    kinds: list[tuple[int, type | tuple[type, ...]]] = [
        (2, bool),
        (3, (int, float)),
        (4, str),
        (5, list),
        (6, dict),
    ]
    return next(number for number, kind in kinds if isinstance(value, kind))


def compare(left: Any, right: Any) -> int:
    """-1, 0 or 1 by the rules of the total order."""
    if rank(left) != rank(right):
        return -1 if rank(left) < rank(right) else 1
    if rank(left) < 2:
        return 0
    if isinstance(left, dict):
        left = [each for name in sorted(left) for each in (name, left[name])]
        right = [each for name in sorted(right) for each in (name, right[name])]
    if isinstance(left, list):
        for one, other in zip(left, right, strict=False):
            if (found := compare(one, other)) != 0:
                return found
        left, right = len(left), len(right)
    if isinstance(left, str):
        left, right = [ord(each) for each in left], [ord(each) for each in right]
    return int(left > right) - int(left < right)


def compare_rows(order: Sequence[Order], left: Entity, right: Entity) -> int:
    for each in order:
        name = cast("str", each.path[0])
        found = compare(left.get(name, MISSING), right.get(name, MISSING))
        if found != 0:
            return -found if each.descending else found
    found = compare(left["id"], right["id"])
    by_path: dict[object, Order] = {}
    for each in order:
        by_path.setdefault(each.path, each)
    return -found if by_path and list(by_path.values())[-1].descending else found


def in_order(rows: Iterable[Entity], order: Sequence[Order]) -> list[Entity]:
    def compared(left: Entity, right: Entity) -> int:
        return compare_rows(order, left, right)

    return sorted(rows, key=cmp_to_key(compared))


# -- generated values ----------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=3)
CLOSE: list[Any] = [
    *[None, False, True, -1, 0, 1, 2, -0.0, 0.0, 1.0, 0.5, "", "1", "a", "A", "ab", "a%", "_"],
    *[2**53, 2**53 + 1, float(2**53), 2**63 - 1, -(2**63), float(2**63), 1.7e308, 5e-324],
    *["\uffff", "\U0001f600", "é", "e\u0301"],
    *[[], {}, [1], [True], [[1.0]], {"a": 1}],
]
"""Values that are often equal or adjacent to one another."""

SCALARS = (
    st.sampled_from(CLOSE)
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS
)
VALUES: st.SearchStrategy[Value] = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from("ab") | TEXTS, inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = st.sampled_from(["a", "b", "a.b"])
ENTITIES: st.SearchStrategy[Entity] = st.dictionaries(NAMES, VALUES)
OPS: st.SearchStrategy[object] = st.one_of(
    VALUES,
    st.builds(lambda make, value: make(value), st.sampled_from([eq, ne, lt, lte, gt, gte]), VALUES),
    st.builds(lambda make, values: make(values), st.sampled_from([in_, not_in]), st.lists(VALUES)),
    st.builds(between, VALUES, VALUES),
    st.builds(exists, st.booleans()),
    st.builds(contains, VALUES),
    st.builds(begins_with, TEXTS),
)
STEPS = st.lists(NAMES | st.integers(0, 2), max_size=2)
# Not bare names, which are compared only with values that the field can hold.
PATHS = st.builds(lambda name, rest: path(name, *rest), NAMES, STEPS)
FILTERS: st.SearchStrategy[Any] = st.recursive(
    st.dictionaries(PATHS, OPS, max_size=3),
    lambda inner: (
        st.builds(lambda parts: and_(*parts), st.lists(inner, max_size=3))
        | st.builds(lambda parts: or_(*parts), st.lists(inner, max_size=3))
        | st.builds(not_, inner)
    ),
    max_leaves=4,
)
ORDERS = st.lists(st.builds(Order, NAMES.map(lambda name: (name,)), st.booleans()), max_size=3)
ROWS = st.lists(ENTITIES, max_size=20).map(
    lambda entities: [each | {"id": f"i{number}"} for number, each in enumerate(entities)]
)


# -- operators ------------------------------------------------------------------------------

ANYTHING: list[Value | Missing] = [
    MISSING,
    None,
    False,
    True,
    0,
    1,
    1.0,
    1.5,
    "",
    "1",
    [1],
    {"a": 1},
]


@pytest.mark.parametrize(
    ("operand", "equal"),
    [
        (None, [None]),
        (True, [True]),
        (False, [False]),
        (0, [0]),
        (1, [1, 1.0]),
        (1.0, [1, 1.0]),
        ("1", ["1"]),
        ("", [""]),
        ([1], [[1]]),
        ([1.0], [[1]]),
        ([True], []),
        ({"a": 1.0}, [{"a": 1}]),
        ({"a": True}, []),
        ({"b": 1}, []),
    ],
)
def test_equality_distinguishes_types_but_not_integers_from_floats(
    operand: Value, equal: list[Value]
) -> None:
    expected = [order_key(each) for each in equal]
    for value in ANYTHING:
        is_equal = order_key(value) in expected
        assert shows(eq(operand), value) is is_equal, value
        assert shows(operand, value) is is_equal, value
        assert shows(in_([operand, "elsewhere"]), value) is is_equal, value
        assert shows(ne(operand), value) is not is_equal, value
        assert shows(not_in([operand]), value) is not is_equal, value
        assert (
            keeps(not_({"f": operand}), {"f": value} if value is not MISSING else {})
            is not is_equal
        )


def test_numbers_compare_exactly() -> None:
    assert shows(eq(2**53), float(2**53))
    assert not shows(eq(2**53 + 1), float(2**53))
    assert not shows(in_([float(2**53)]), 2**53 + 1)
    assert not shows(eq([2**53 + 1]), [float(2**53)])
    assert shows(gt(float(2**53)), 2**53 + 1)
    assert shows(lt(float(2**63)), 2**63 - 1)
    assert shows(eq(0.0), -0.0)
    assert shows(in_([0]), -0.0)
    assert shows(eq([-0.0]), [0])
    assert not shows(lt(0.0), -0.0)


def test_nested_booleans_are_no_numbers() -> None:
    assert not shows(eq([1]), [True])
    assert not shows(eq({"a": [0]}), {"a": [False]})
    assert not shows(in_([[1]]), [True])
    assert not shows(contains(1), [True])
    assert not shows(contains(True), [1])
    assert shows(eq({"a": [0], "b": None}), {"b": None, "a": [0.0]})


def test_null_is_not_missing() -> None:
    assert shows(eq(None), None)
    assert not shows(eq(None), MISSING)
    assert shows(in_([None]), None)
    assert not shows(in_([None]), MISSING)
    assert not shows(not_in([None]), None)
    assert shows(ne(None), MISSING)
    assert shows(ne(1), None)
    assert shows(not_in([1]), None)
    assert shows(exists(), None)
    assert not shows(exists(False), None)
    assert not shows(exists(), MISSING)
    assert shows(exists(False), MISSING)


@pytest.mark.parametrize("make", [lt, lte, gt, gte, lambda value: between(value, value)])
def test_comparisons_never_match_across_types(make: Callable[[Value], Op]) -> None:
    operands: list[Value] = [None, False, 1, 1.5, "1", [1], {"a": 1}]
    for operand, value in product(operands, ANYTHING):
        if rank(operand) != rank(value) or operand is None:
            assert not shows(make(operand), value), (operand, value)


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        (False, True),
        (1, 1.5),
        (-1.5, 0),
        ("A", "a"),
        ("a", "ab"),
        ("e\u0301", "é"),
        ("\uffff", "\U0001f600"),  # by code point; the order of UTF-16 is the opposite
        ([], [None]),
        ([1], [1, None]),
        ([True], [0]),
        ([1, 2], [1, "a"]),
        ({}, {"a": None}),
        ({"a": 2}, {"b": 1}),
        ({"a": 1, "b": 1}, {"a": 2}),
        ({"a": 1}, {"a": 1, "b": 0}),
    ],
)
def test_comparisons_within_a_type(lower: Value, upper: Value) -> None:
    for operator, at_lower, at_upper in [
        (lt(upper), True, False),
        (lte(upper), True, True),
        (gt(lower), False, True),
        (gte(lower), True, True),
        (lte(lower), True, False),
        (gte(upper), False, True),
        (between(lower, upper), True, True),
        (between(lower, lower), True, False),
        (between(upper, lower), False, False),
    ]:
        assert shows(operator, lower) is at_lower, operator
        assert shows(operator, upper) is at_upper, operator


def test_between_with_one_bound_of_null_or_of_another_type_matches_nothing() -> None:
    for value in ANYTHING:
        assert not shows(between(None, 5), value)
        assert not shows(between(0, None), value)
        assert not shows(between(0, "z"), value)


def test_contains_and_begins_with() -> None:
    assert shows(contains("b%"), "ab%c")
    assert not shows(contains("b%"), "abc")
    assert not shows(contains("a_c"), "abc")
    assert not shows(contains("B"), "abc")
    assert shows(contains(""), "")
    assert shows(contains(1), ["1", 1.0])
    assert not shows(contains(1), ["1", [1]])
    assert shows(contains(None), [None])
    assert shows(contains([1]), [[1.0]])
    assert not shows(contains("a"), ["ab"])
    assert not shows(contains("a"), {"a": "a"})
    assert not shows(contains(1), "1")
    assert shows(begins_with("a_"), "a_b")
    assert not shows(begins_with("a_"), "ab")
    assert not shows(begins_with("a"), ["a"])
    assert shows(begins_with(""), "")
    for value in (MISSING, None, True, 1, 1.0):
        assert not shows(contains("1"), value)
        assert not shows(begins_with(""), value)


def test_empty_in_matches_nothing_and_empty_not_in_everything() -> None:
    for value in ANYTHING:
        assert not shows(in_([]), value)
        assert shows(not_in([]), value)


def test_in_accepts_iterables_and_a_thousand_values() -> None:
    for values in (["a", "b"], ("a", "b"), {"a", "b"}, {"a": 1, "b": 2}.keys(), iter("ab")):
        operator = in_(values)
        for _ in "twice":  # also where an iterator was given
            assert shows(operator, "a")
            assert not shows(operator, "c")
    many = in_(range(1_000))
    assert shows(many, 999.0)
    assert not shows(many, 1_000)
    assert not shows(many, [])


async def test_a_part_that_occurs_very_often_is_refused_soon() -> None:
    combined: Any = {"a": in_(range(2_000))}
    for _ in range(query_module.MAX_FILTER_DEPTH):
        combined = and_(combined, combined)
    with pytest.raises(InvalidQueryError, match="more than"):
        await build_large_query(THINGS, filters=combined)


async def test_a_tuple_as_a_value_is_not_several_values() -> None:
    filters = {path("a"): eq(tuple(range(60_000)))}
    assert await build_large_query(THINGS, filters=filters) == build_query(THINGS, filters=filters)


def test_combinations() -> None:
    entity: Entity = {"a": 1, "b": None}
    assert keeps({"a": 1, "b": None}, entity)
    assert not keeps({"a": 1, "b": 1}, entity)
    assert keeps(or_({"a": 2}, {"b": None}), entity)
    assert not keeps(or_({"a": 2}, {"b": 1}), entity)
    assert keeps(and_({"a": gt(0)}, {"a": lt(2)}), entity)
    assert not keeps(and_({"a": gt(0)}, not_({"b": None})), entity)
    assert keeps(not_({"c": gt(0)}), entity)
    everything: list[Any] = [None, {}, and_(), and_({}, {}), not_(or_()), or_({}, {"a": 2})]
    for filters in everything:
        assert keeps(filters, entity)
    for nothing in (or_(), not_({}), and_({}, or_())):
        assert not keeps(nothing, entity)


def test_a_string_key_is_one_field_and_a_path_is_nested() -> None:
    entity: Entity = {"a.b": 1, "a": {"b": 2, "c": [{"d": 3}], "": 4}, "$[0]": 5}
    assert keeps({"a.b": 1, path("a", "b"): 2, path("a", "c", 0, "d"): 3}, entity)
    assert keeps({path("a", ""): 4, "$[0]": 5}, entity)
    for absent in [
        path("a", "x"),
        path("a", 0),
        path("a", "c", 1),
        path("a", "c", "0"),
        path("a", "b", "x"),
        path("a.b", "x"),
        path("x", "y", 0),
    ]:
        assert keeps({absent: exists(False)}, entity), absent
        assert not keeps({absent: None}, entity), absent
        assert keeps({absent: ne(1)}, entity), absent


def test_version_is_a_field_like_others() -> None:
    assert keeps({"version": gte(2)}, {"id": "x", "version": 2})
    assert sort_key(build(order_by="-version"), "x", {"version": 2}) < sort_key(
        build(order_by="-version"), "x", {"version": 1}
    )


class Status(StrEnum):
    UP = "up"


def test_operands_are_made_portable() -> None:
    moment = datetime(2025, 1, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    unique = UUID(int=5)
    assert shows(eq(moment), "2025-01-01T10:00:00.000000Z")
    assert shows(in_([unique]), str(unique))
    assert shows(eq(Status.UP), "up")
    assert shows(begins_with(Status.UP), "upper")
    assert shows(eq((1, 2)), [1, 2])
    assert shows(contains(Status.UP), ["up"])
    assert keeps({Status.UP: 1}, {"up": 1})


def test_operands_of_declared_timestamps_take_the_fixed_form() -> None:
    entity: Entity = {"seen_at": "2025-01-01T10:00:00.000000Z"}
    same = ["2025-01-01T12:00:00+02:00", "2025-01-01 10:00", datetime(2025, 1, 1, 10, tzinfo=UTC)]
    for moment in same:
        for make in (eq, lte, gte, lambda value: in_([value]), lambda value: between(value, value)):
            assert keeps({"seen_at": make(moment)}, entity), moment
        for make in (ne, lt, gt, lambda value: not_in([value])):
            assert not keeps({"seen_at": make(moment)}, entity), moment
    assert keeps({"seen_at": gt(date(2025, 1, 1))}, entity)
    assert keeps({"seen_at": begins_with("2025-01-01")}, entity)
    assert keeps({"seen_at": contains("10:00")}, entity)
    assert keeps({path("seen_at"): same[0]}, entity)
    assert not keeps({path("seen_at"): "soon"}, entity)
    assert keeps(
        {path("seen_at"): ne("0001-01-01T00:00:00+14:00")}, entity
    )  # outside the years of UTC
    # In other fields a string is not converted.
    assert not keeps({"status": "2025-01-01"}, {"status": "2025-01-01T00:00:00.000000Z"})
    assert not keeps(
        {path("seen_at", "x"): "2025-01-01"}, {"seen_at": {"x": "2025-01-01T00:00:00Z"}}
    )


@given(VALUES, VALUES, VALUES)
def test_every_operator_agrees_with_the_rules(value: Value, one: Value, other: Value) -> None:
    against = compare(value, one)
    same = rank(value) == rank(one) and one is not None
    low_first = rank(one) == rank(other) == rank(value) and value is not None
    expected = [
        (eq(one), against == 0),
        (ne(one), against != 0),
        (lt(one), same and against < 0),
        (lte(one), same and against <= 0),
        (gt(one), same and against > 0),
        (gte(one), same and against >= 0),
        (in_([one, other]), against == 0 or compare(value, other) == 0),
        (not_in([one, other]), against != 0 and compare(value, other) != 0),
        (between(one, other), low_first and against >= 0 >= compare(value, other)),
        (exists(), True),
        (contains(one), _contained(value, one)),
    ]
    if isinstance(one, str):
        begins = isinstance(value, str) and value[: len(one)] == one
        expected.append((begins_with(one), begins))
    for operator, matched in expected:
        assert shows(operator, value) is matched, operator


def _contained(value: Value, one: Value) -> bool:
    if isinstance(value, list):
        return any(compare(each, one) == 0 for each in value)
    return isinstance(value, str) and isinstance(one, str) and value.find(one) >= 0


@given(FILTERS, FILTERS, ENTITIES)
def test_filters_never_raise_and_combine_logically(one: Any, other: Any, entity: Entity) -> None:
    first, second = keeps(one, entity), keeps(other, entity)
    assert type(first) is bool
    assert keeps(not_(one), entity) is not first
    assert keeps(not_(not_(one)), entity) is first
    assert keeps(and_(one, other), entity) is (first and second)
    assert keeps(or_(one, other), entity) is (first or second)
    where = build(filters=one).where
    assert compile_filter(where)(entity) is matches(where, entity) is first


@given(PATHS, VALUES, ENTITIES)
def test_negative_operators_are_plain_negation(key: Any, value: Value, entity: Entity) -> None:
    assert keeps({key: ne(value)}, entity) is not keeps({key: eq(value)}, entity)
    assert keeps({key: not_in([value])}, entity) is not keeps({key: in_([value])}, entity)
    assert keeps({key: exists(False)}, entity) is not keeps({key: exists()}, entity)


# -- the total order ------------------------------------------------------------------------


def test_the_order_of_types() -> None:
    rising: list[Any] = [
        *[MISSING, None, False, True, -(2**63), -1.5, 0, 5e-324, 2**53, 2**53 + 1, 1e300],
        *["", "A", "a", "aa", "é", "\uffff", "\U0001f600"],
        *[[], [None], [False], [0], [0, 0], ["a"], [[]], [{}]],
        *[{}, {"a": None}, {"a": 0}, {"a": 0, "b": 0}, {"a": "x"}, {"b": None}],
    ]
    for lower, upper in pairwise(rising):
        assert order_key(lower) < order_key(upper), (lower, upper)
        assert compare(lower, upper) < 0


@given(VALUES, VALUES)
def test_order_keys_agree_with_the_rules(one: Value, other: Value) -> None:
    left, right, found = order_key(one), order_key(other), compare(one, other)
    assert (left < right, left == right, left > right) == (found < 0, found == 0, found > 0)
    if found == 0:
        assert hash(left) == hash(right)
        assert shows(eq(one), other)


@given(st.lists(VALUES, min_size=3, max_size=3))
def test_the_order_is_transitive(values: list[Value]) -> None:
    one, two, three = sorted(map(order_key, values))
    assert one <= two <= three
    assert one <= three
    assert not three < one


@given(ROWS, ORDERS)
def test_sort_key_agrees_with_the_rules(rows: list[Entity], order: list[Order]) -> None:
    query = build(order_by=asked(order))
    found = sorted(rows, key=lambda row: sort_key(query, cast("str", row["id"]), row))
    assert found == in_order(rows, order)


@given(VALUES, VALUES)
def test_descending_is_ascending_reversed(one: Value, other: Value) -> None:
    up, down = build(order_by="a"), build(order_by="-a")
    rising = sort_key(up, "x", {"a": one}) < sort_key(up, "x", {"a": other})
    assert (sort_key(down, "x", {"a": other}) < sort_key(down, "x", {"a": one})) is rising


def test_orders_by_paths() -> None:
    query = build(order_by=[path("a", "b"), desc(path("a", "c", 0))])
    assert len(query.order) == 2
    rows: list[Entity] = [
        {"a": {"c": [1]}},
        {"a": {"b": None}},
        {"a": {"b": 1, "c": ["x", 9]}},
        {"a": {"b": 1, "c": [2]}},
        {"a": {"b": 1, "c": [1]}},
        {"a": {"b": 1, "c": []}},
        {"a": {"b": 2}},
    ]
    keys = [sort_key(query, "x", row) for row in rows]
    assert all(lower < upper for lower, upper in pairwise(keys))


def test_ties_are_broken_by_id_and_without_an_order_rows_come_by_id() -> None:
    for query in (build(), build(order_by="a"), build(order_by=["-b", "a"]), build(order_by=[])):
        assert sort_key(query, "a", {"a": 1}) < sort_key(query, "b", {"a": 1.0})
    for query in (build(order_by="-a"), build(order_by=["b", "-a"])):
        assert sort_key(query, "a", {"a": 1}) > sort_key(query, "b", {"a": 1.0})
        assert sort_key(query, "a", {"a": 1}) > sort_key(query, "aa", {"a": 1.0})
    assert sort_key(build(), "A", {}) < sort_key(build(), "a", {})


def test_orders_as_callers_write_them() -> None:
    assert build(order_by="-status").order == (Order(("status",), descending=True),)
    assert build(order_by="a.b").order == (Order(("a.b",)),)
    assert build(order_by=path("a", 0)).order == (Order(("a", 0)),)
    assert build(order_by=desc("-odd")).order == (Order(("-odd",), descending=True),)
    assert build(order_by=asc(path("a", "b"))).order == (Order(("a", "b")),)
    assert build(order_by=("a", desc(path("b", 1)))).order == (
        Order(("a",)),
        Order(("b", 1), descending=True),
    )


def test_redundant_keys_are_removed_from_an_order() -> None:
    assert build(order_by="id").order == ()
    assert build(order_by=["status", "id", "count"]).order == (Order(("status",)),)
    assert build(order_by=["status", "-status"]).order == (Order(("status",)),)
    assert build(order_by=["-status", "-id"]).order == (Order(("status",), descending=True),)
    assert build(order_by=["-status", "id", "count"]).order == (
        Order(("status",), descending=True),
        Order(("id",)),
    )
    assert build(order_by=["-id", "status"]).order == (Order(("id",), descending=True),)


# -- the compiled tree ----------------------------------------------------------------------


def test_the_tree_is_flat_and_plain() -> None:
    one, two = Comparison(("a",), "eq", 1), Comparison(("b", 0), "gt", "x")
    assert build().where == build(filters={}).where == EVERYTHING == And(())
    assert build(filters={"a": 1}).where == one
    assert build(filters=and_({"a": 1}, {path("b", 0): gt("x")})).where == And((one, two))
    assert build(filters=and_(and_({"a": 1}), and_({"b": 1, "c": 2}))).where == And(
        (one, Comparison(("b",), "eq", 1), Comparison(("c",), "eq", 2))
    )
    assert build(filters=or_(or_({"a": 1}, {path("b", 0): gt("x")}), or_())).where == Or((one, two))
    assert build(filters=not_({})).where == Not(EVERYTHING)
    assert build(filters={"a": between(1, 2)}).where == Comparison(("a",), "between", [1, 2])
    assert build(filters={"a": in_(["b", 2, "a", 2.0])}).where == Comparison(
        ("a",), "in", [2.0, "a", "b"]
    )
    assert build(filters={"a": exists()}).where == Comparison(("a",), "exists", value=True)


def test_operands_are_copies() -> None:
    operand: list[Value] = [1]
    where = build(filters={"a": operand}).where
    operand.append(2)
    assert where == Comparison(("a",), "eq", [1])


def test_equality_candidates() -> None:
    def pinned(filters: Any) -> Mapping[tuple[str | int, ...], list[Value]]:
        return equality_candidates(build(filters=filters).where)

    assert pinned({}) == {}
    assert pinned({"a": 1}) == {("a",): [1]}
    assert pinned({"a": None, "b": in_(["y", "x"]), "c": gt(1), path("d", 0): "z"}) == {
        ("a",): [None],
        ("b",): ["x", "y"],
        ("d", 0): ["z"],
    }
    assert pinned(and_({"a": in_([1, 2])}, {"a": 1}, {"a": in_([1, 2, 3])})) == {("a",): [1]}
    assert pinned({"a": in_([])}) == {("a",): []}
    assert pinned(or_({"a": 1}, {"b": 2})) == pinned(not_({"a": 1})) == pinned({"a": ne(1)}) == {}


@given(FILTERS, ENTITIES)
def test_equality_candidates_contain_every_match(filters: Any, entity: Entity) -> None:
    where = build(filters=filters).where
    if matches(where, entity):
        for steps, values in equality_candidates(where).items():
            assert matches(Comparison(steps, "in", values), entity)


def test_fields_and_projection() -> None:
    entity: Entity = {"id": "x", "a": None, "b": {"c": 1}, "version": 3}
    assert build(fields=["a"]).fields == ("id", "a", "version")
    assert project(entity, build(fields=["a", "gone"]).fields) == {
        "id": "x",
        "a": None,
        "version": 3,
    }
    assert project(entity, build(fields=[]).fields) == {"id": "x", "version": 3}
    assert project(entity, build(fields={"id", "version"}).fields) == {"id": "x", "version": 3}
    assert project(entity, None) == entity


def test_limits() -> None:
    assert build().limit is None
    assert build(limit=0).limit == 0
    assert build(limit=10**30).limit == 2**62
    assert build(limit=5).with_limit(6) == build(limit=6)


# -- what is refused ------------------------------------------------------------------------


def _too_deep() -> Combined:
    filters = not_({"a": 1})
    for _ in range(100):
        filters = not_(filters)
    return filters


@pytest.mark.parametrize(
    "filters",
    [
        "status",
        "",
        [],
        ["status"],
        [{"status": 1}],
        0,
        False,
        (),
        eq(1),
        path("a"),
        asc("a"),
        Comparison(("a",), "eq", 1),
        and_(None),  # type: ignore[arg-type]
        or_([{"a": 1}]),  # type: ignore[arg-type]
        not_(eq(1)),  # type: ignore[arg-type]
        Combined("xor", ()),  # type: ignore[arg-type]
        Combined("not", ()),
        _too_deep(),
        {"": 1},
        {1: 1},
        {None: 1},
        {("a", "b"): 1},
        {b"a": 1},
        {"a\0": 1},
        {"\ud800": 1},
        {path(): 1},
        {path(""): 1},
        {path(0): 1},
        {path("a", -1): 1},
        {path("a", True): 1},
        {path("a", 2**31): 1},
        {Path(("a", 1.0)): 1},  # type: ignore[arg-type]
        {Path(("a", None)): 1},  # type: ignore[arg-type]
        {path("a", "\0"): 1},
        {Path("a"): 1},  # type: ignore[arg-type]
        {"a": in_("abc")},
        {"a": in_(b"abc")},
        {"a": in_({"x": 1})},
        {"a": not_in(5)},  # type: ignore[arg-type]
        {"a": not_in(None)},  # type: ignore[arg-type]
        {"a": begins_with(1)},  # type: ignore[arg-type]
        {"a": begins_with(None)},  # type: ignore[arg-type]
        {"a": begins_with(["a"])},  # type: ignore[arg-type]
        {"a": exists("yes")},  # type: ignore[arg-type]
        {"a": exists(1)},  # type: ignore[arg-type]
        {"a": Op("like", "x")},  # type: ignore[arg-type]
        {"a": Op(["eq"], "x")},  # type: ignore[arg-type]
        {"a": Op("in", "x")},
        {"a": Op("between", 1)},
        {"a": Op("between", (1, 2, 3))},
        {"a": eq(gt(1))},
        {"a": in_([gt(1)])},
        {"a": between(gt(1), 2)},
        {"a": or_({"b": 1})},
        {"a": path("b")},
    ],
)
def test_malformed_filters(filters: Any) -> None:
    with pytest.raises(InvalidQueryError):
        build(filters=filters)


@pytest.mark.parametrize(
    "step", [1.5, b"x", None, [], {}, object()], ids=lambda step: type(step).__name__
)
def test_a_path_step_of_an_invalid_type_is_refused(step: Any) -> None:
    """It might not be hashable."""
    with pytest.raises(InvalidQueryError):
        path("a", step)


@pytest.mark.parametrize(
    ("operand", "place"),
    [
        (float("nan"), "a"),
        (gt(float("inf")), "a"),
        (2**63, "a"),
        (in_([1, 2**64]), "a"),
        (between(0, -(2**70)), "a"),
        (eq([1, {"x": b"bytes"}]), "a[1].x"),
        (contains({1: 2}), "a"),
        (begins_with("\0"), "a"),
        ("\ud800", "a"),
        (datetime(2025, 1, 1), "a"),
        (object(), "a"),
        (gt, "a"),
        ({"x": gt(1)}, "a.x"),
        (MISSING, "a"),
    ],
)
def test_operands_outside_the_domain(operand: Any, place: str) -> None:
    with pytest.raises(UnsupportedValueError, match=f"^{place.replace('[', '.')}"):
        build(filters={"a": operand})


@pytest.mark.parametrize(
    "order_by",
    [
        "",
        "-",
        [""],
        ["a", "-"],
        asc(""),
        desc(""),
        path(),
        path(""),
        path(0),
        path("a", -1),
        5,
        True,
        {"a": 1},
        {"a"},
        [None],
        [["a"]],
        [5],
        [eq(1)],
        "a\0",
        asc(None),  # type: ignore[arg-type]
        desc(["a"]),  # type: ignore[arg-type]
        Order(("a",)),
        SortKeyInput("a", "yes"),  # type: ignore[arg-type]
        ("a", "b", 5),
    ],
)
def test_malformed_orders(order_by: Any) -> None:
    with pytest.raises(InvalidQueryError):
        build(order_by=order_by)


@pytest.mark.parametrize("limit", [-1, True, False, 1.0, "1", []])
def test_malformed_limits(limit: Any) -> None:
    with pytest.raises(InvalidQueryError):
        build(limit=limit)


def test_a_limit_with_more_digits_than_python_prints() -> None:
    with pytest.raises(InvalidQueryError):
        build(limit=-(10**5_000))
    with pytest.raises(InvalidQueryError):
        build(filters={path("a", 10**5_000): 1})


@pytest.mark.parametrize(
    "fields", ["a", 5, {"a": 1}, [1], [""], [None], [path("a", "b")], [path(0)], ["a\0"]]
)
def test_malformed_fields(fields: Any) -> None:
    with pytest.raises(InvalidQueryError):
        build(fields=fields)


# -- cursors --------------------------------------------------------------------------------


def after(query: Query, cursor: object, **given: Any) -> CursorPosition:
    position = build_query(THINGS, cursor=cast("str", cursor), **given).after
    assert position is not None
    return position


def exact(value: object) -> str:
    """A string that distinguishes 1, 1.0, True, -0.0 and "1", also in nested values."""
    return repr(value)


@given(VALUES, VALUES, TEXTS.filter(bool))
def test_a_cursor_brings_the_position_back_type_for_type(
    one: Value, other: Value, entity_id: str
) -> None:
    given = {"order_by": ["a", "-b", "gone"]}
    query = build(**given)
    entity: Entity = {"a": normalise(one), "b": normalise(other)}  # as it is stored
    position = after(query, encode_cursor(query, entity_id, entity), **given)
    assert exact(position) == exact(CursorPosition((entity["a"], entity["b"], MISSING), entity_id))
    assert position_key(query, position) == sort_key(query, entity_id, entity)


def test_the_limit_and_the_fields_may_change_between_pages() -> None:
    query = build(order_by="a", filters={"b": 1}, limit=5)
    cursor = encode_cursor(query, "x", {"a": 1})
    assert build(order_by="a", filters={"b": 1}, limit=9, fields=["a"], cursor=cursor).after


def test_the_same_filter_written_otherwise_continues() -> None:
    written = {"a": in_(["x", "y"]), "b": 1}
    cursor = encode_cursor(build(filters=written), "x", {})
    assert build(filters={"b": 1, "a": in_({"y", "x"})}, cursor=cursor).after
    assert build(filters=and_({"b": 1}, {"a": in_(["y", "x"])}), cursor=cursor).after
    assert build(filters=written, order_by="id", cursor=cursor).after


FOREIGN: list[dict[str, Any]] = [
    {"filters": {"a": 1}, "order_by": "-a"},
    {"filters": {"a": 1}, "order_by": "b"},
    {"filters": {"a": 1}, "order_by": path("a", "b")},
    {"filters": {"a": 1}, "order_by": ["a", "b"]},
    {"filters": {"a": 1}},
    {"filters": {"a": 2}, "order_by": "a"},
    {"filters": {"a": "1"}, "order_by": "a"},
    {"filters": {"a": True}, "order_by": "a"},
    {"filters": {"a": ne(1)}, "order_by": "a"},
    {"filters": not_({"a": 1}), "order_by": "a"},
    {"filters": {"a": 1, "b": 1}, "order_by": "a"},
    {"filters": or_({"a": 1}, {"b": 1}), "order_by": "a"},
    {"filters": {path("a", 0): 1}, "order_by": "a"},
    {"order_by": "a"},
]


@pytest.mark.parametrize("other", FOREIGN)
def test_cursors_of_other_queries_are_refused(other: dict[str, Any]) -> None:
    cursor = encode_cursor(build(filters={"a": 1}, order_by="a"), "x", {"a": 1})
    with pytest.raises(InvalidCursorError):
        build(**other, cursor=cursor)


def test_a_cursor_of_another_collection_is_refused() -> None:
    with pytest.raises(InvalidCursorError):
        build_query(OTHERS, cursor=encode_cursor(build(), "x", {}))


def test_every_altered_character_is_refused() -> None:
    alphabet = string.ascii_letters + string.digits + "-_+/= \n\0é"
    for entity_id in ("x", "xy", "xyz"):  # the three lengths modulo the encoding's group
        query = build(order_by="a")
        cursor = encode_cursor(query, entity_id, {"a": 1})
        altered = {
            cursor[:place] + each + cursor[place + 1 :]
            for place in range(len(cursor))
            for each in ["", *alphabet]
        }
        altered |= {cursor[:place] for place in range(len(cursor))}
        altered |= {each + cursor for each in alphabet} | {cursor + each for each in alphabet}
        for each in altered - {cursor}:
            with pytest.raises(InvalidCursorError):
                build(order_by="a", cursor=each)


@given(st.text() | st.binary() | st.integers() | st.booleans() | st.lists(st.text()))
def test_invalid_cursors_are_refused(garbage: Any) -> None:
    with pytest.raises(InvalidCursorError):
        build(cursor=garbage)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'[[],"x","more"]',
        b'[[],"x"]',
        b'[[[1],[2]],"x"]',
        b"[[[1]],5]",
        b'[[1],"x"]',
        b'[[[1e999]],"x"]',
        b'[[[99999999999999999999]],"x"]',
        b'[[["\\u0000"]],"x"]',
        b'[[[1]],"\\u0000"]',
        b'[[[' + b"[" * 100_000,
        b'[[[' + b"[" * 40 + b"]" * 40 + b']],"x"]',
    ],
)  # fmt: skip
def test_a_forged_cursor_is_refused_too(body: bytes) -> None:
    query = build(order_by="a")
    forged = sealed(body, query_module._seal(query))
    with pytest.raises(InvalidCursorError):
        build(order_by="a", cursor=forged)


# -- sorting in memory ----------------------------------------------------------------------


async def _cut(rows: Sequence[Entity], size: int) -> AsyncGenerator[list[tuple[str, Entity]], None]:
    for start in range(0, len(rows), size):
        yield [(cast("str", row["id"]), row) for row in rows[start : start + size]]


def run_ordered(rows: Sequence[Entity], query: Query, size: int = 4) -> list[Entity]:
    """The rows by way of `ordered`, with steps so small that a few rows take all its branches."""

    async def run() -> list[Entity]:
        return [entity async for _, entity in ordered(_cut(rows, size), query)]

    with patch.object(query_module, "_RUN_SIZE", 3), patch.object(query_module, "_SMALL_LIMIT", 4):
        return asyncio.run(run())


@settings(deadline=None)
@given(ROWS, ORDERS, st.none() | st.integers(0, 12), st.integers(1, 7))
def test_ordered_is_sorted(
    rows: list[Entity], order: list[Order], limit: int | None, size: int
) -> None:
    query = build(order_by=asked(order), limit=limit)
    assert run_ordered(rows, query, size) == in_order(rows, order)[:limit]


@settings(deadline=None, max_examples=50)
@given(ROWS, ORDERS, st.integers(1, 6))
def test_a_walk_over_pages_is_the_whole(rows: list[Entity], order: list[Order], limit: int) -> None:
    walked: list[Entity] = []
    cursor = None
    for _ in range(len(rows) + 1):
        query = build(order_by=asked(order), limit=limit, cursor=cursor)
        page = Page(run_ordered(rows, query), None)
        walked += page.items
        if len(page.items) < limit:
            break
        cursor = encode_cursor(query, cast("str", page.items[-1]["id"]), page.items[-1])
    assert walked == in_order(rows, order)


@settings(deadline=None, max_examples=50)
@given(ROWS, ORDERS, st.integers(1, 4), st.data())
def test_pages_show_unchanged_rows_once_during_other_changes(
    rows: list[Entity], order: list[Order], limit: int, data: st.DataObject
) -> None:
    stored = {cast("str", row["id"]): row for row in rows}
    untouched = set(stored)
    seen: list[str] = []
    cursor = None
    for step in range(len(rows) + 4):
        query = build(order_by=asked(order), limit=limit, cursor=cursor)
        page = run_ordered(list(stored.values()), query)
        seen += [cast("str", row["id"]) for row in page]
        if len(page) < limit:
            break
        cursor = encode_cursor(query, cast("str", page[-1]["id"]), page[-1])
        if step < 3:
            stored[f"new{step}"] = data.draw(ENTITIES) | {"id": f"new{step}"}
            touched = data.draw(st.sampled_from(sorted(stored)))
            untouched.discard(touched)
            if data.draw(st.booleans()):
                del stored[touched]
            else:
                stored[touched] = data.draw(ENTITIES) | {"id": touched}
    final = [row["id"] for row in in_order(stored.values(), order)]
    assert [each for each in seen if each in untouched] == [
        each for each in final if each in untouched
    ]


def test_a_limit_of_nothing_reads_nothing() -> None:
    pieces = _cut([{}], 1)  # a row without an id: reading it fails

    async def run() -> list[tuple[str, Entity]]:
        return [row async for row in ordered(pieces, build(limit=0))]

    assert asyncio.run(run()) == []


@pytest.mark.parametrize(("limit", "expected"), [(None, 35), (10, 10), (6_000, 30)])
def test_sorting_yields_to_the_event_loop(limit: int | None, expected: int) -> None:
    rows: list[Entity] = [{"id": f"{n:05}", "n": -n} for n in range(10_000)]

    async def run() -> int:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        query = build(order_by="n", limit=limit)
        found = [entity async for _, entity in ordered(_cut(rows, 10_000), query)]
        task.cancel()
        assert found == rows[::-1][:limit]
        return turns

    assert asyncio.run(run()) >= expected


def test_queries_are_frozen_values() -> None:
    query = build(filters={"a": 1}, order_by="b", limit=3)
    assert query == build(filters={"a": 1}, order_by="b", limit=3)
    assert hash(path("a", 0)) == hash(path("a", 0))
    for frozen, name in [(query, "limit"), (path("a"), "parts"), (eq(1), "name")]:
        with pytest.raises(AttributeError):
            setattr(frozen, name, None)
    assert isinstance(query, msgspec.Struct)
