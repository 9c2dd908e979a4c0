"""Sort bytes compare as the values do, and the ranges of an operator contain what matches."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_async_store.query import (
    MISSING,
    Comparison,
    Missing,
    OpName,
    compile_filter,
    order_key,
)
from hf_async_store.sort_bytes import EVERYTHING, MAX_SORT_BYTES, is_exact, ranges, sort_bytes
from hf_async_store.values import Value

_EDGES = [
    0,
    1,
    -1,
    *(s * (2**p + d) for p in (52, 53, 54, 62) for d in (-1, 0, 1) for s in (1, -1)),
]
_NUMBERS = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([*_EDGES, 2**63 - 1, -(2**63), 5e-324, -5e-324, 1.7e308, float(2**63)]),
    st.sampled_from(_EDGES).map(float),
)
_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=4)
_STRINGS = st.one_of(
    _TEXT,
    st.builds(
        lambda head, fill, n, tail: head + fill * n + tail,
        _TEXT,
        _TEXT,
        st.integers(80, 300),
        _TEXT,
    ),
    st.sampled_from(
        ["a" * n + tail for n in (254, 255, 256) for tail in ("", "b", "é", "\U0001f600")]
    ),
)
_SCALARS: st.SearchStrategy[Value] = st.one_of(st.none(), st.booleans(), _NUMBERS, _STRINGS)
_VALUES: st.SearchStrategy[Any] = st.one_of(
    _SCALARS,
    st.just(MISSING),
    st.lists(_SCALARS, max_size=2),
    st.dictionaries(_TEXT, _SCALARS, max_size=2),
)


@given(_VALUES, _VALUES)
def test_bytes_compare_as_values(one: Value | Missing, other: Value | Missing) -> None:
    first, second = sort_bytes(one), sort_bytes(other)
    if is_exact(first) or is_exact(second):
        assert (first < second) == (order_key(one) < order_key(other))
        assert (first == second) == (order_key(one) == order_key(other))
    elif order_key(one) < order_key(other):
        assert first <= second
    assert EVERYTHING.low <= first < EVERYTHING.high
    assert len(first) <= MAX_SORT_BYTES


_OPERANDS: dict[OpName, st.SearchStrategy[Any]] = {
    "eq": _VALUES.filter(lambda each: each is not MISSING),
    "lt": _SCALARS,
    "lte": _SCALARS,
    "gt": _SCALARS,
    "gte": st.one_of(_SCALARS, st.lists(_SCALARS, max_size=2)),
    "between": st.lists(_SCALARS, min_size=2, max_size=2),
    "in": st.lists(_SCALARS, max_size=4),
    "exists": st.booleans(),
    "begins_with": _STRINGS,
}


@pytest.mark.parametrize("op", _OPERANDS)
def test_ranges_contain_what_matches(op: OpName) -> None:
    @given(_OPERANDS[op], st.lists(_VALUES, max_size=6), st.data())
    def check(operand: Value, actuals: list[Value | Missing], data: st.DataObject) -> None:
        if isinstance(operand, list) and op != "eq":
            actuals = [*actuals, *operand]
            operand = sorted(operand, key=order_key)
        elif op != "exists":
            actuals = [*actuals, operand]
        if isinstance(operand, str):
            actuals = [*actuals, operand + "x", operand[:-1]]
        found = ranges(op, operand)
        assert found is not None
        assert all(one.high <= other.low for one, other in pairwise(found))
        matches = compile_filter(Comparison(("f",), op, operand))
        for actual in actuals:
            entity = {} if isinstance(actual, Missing) else {"f": actual}
            inside = [each for each in found if each.low <= sort_bytes(actual) < each.high]
            assert len(inside) <= 1
            assert inside or not matches(entity)
            if inside and inside[0].exact:
                assert matches(entity)

    check()


def test_operators_without_ranges() -> None:
    assert ranges("ne", 1) is None
    assert ranges("not_in", [1]) is None
    assert ranges("contains", "a") is None


def test_numbers_in_order() -> None:
    numbers: list[float] = [
        -1.7e308,
        -(2**63),
        -(2**63) + 1,
        -1.5,
        -1,
        -5e-324,
        0,
        5e-324,
        0.5,
        1,
        2**53,
    ]
    numbers += [2**53 + 1, 2**53 + 2, 2**63 - 2, 2**63 - 1, float(2**63), 1.7e308]
    assert sorted(numbers, key=sort_bytes) == numbers
    assert sort_bytes(-0.0) == sort_bytes(0) == sort_bytes(0.0)
