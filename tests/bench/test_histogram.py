"""The histogram keeps its promise: at most 1 in 128 above what was recorded, and never below."""

from __future__ import annotations

import math

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from hf_async_store.bench.histogram import ERROR, Histogram, highest_of, part_of

VALUES = st.integers(0, 10**12)


@given(VALUES)
def test_a_value_lies_in_its_part(value: int) -> None:
    part = part_of(value)
    assert value <= highest_of(part) <= value * (1 + ERROR)
    assert part == 0 or highest_of(part - 1) < value


@given(st.lists(VALUES, min_size=1, max_size=200), st.floats(0, 1))
def test_percentiles_are_those_of_the_values(values: list[int], share: float) -> None:
    histogram = Histogram()
    for each in values:
        histogram.record(each)
    exact = sorted(values)[max(0, math.ceil(share * len(values) - 1e-6) - 1)] / 1e9
    assert exact <= histogram.percentile(share) * (1 + 1e-12)
    assert histogram.percentile(share) <= exact * (1 + ERROR) + 1e-12
    assert histogram.percentile(1.0) == max(values) / 1e9
    assert math.isclose(histogram.mean, sum(values) / len(values) / 1e9)


@given(st.lists(VALUES), st.lists(VALUES))
def test_two_together_are_one_of_both(ones: list[int], others: list[int]) -> None:
    first, second, both = Histogram(), Histogram(), Histogram()
    for each in ones:
        first.record(each)
        both.record(each)
    for each in others:
        second.record(each)
        both.record(each)
    # By way of another process.
    first.add(msgspec.json.decode(msgspec.json.encode(second), type=Histogram))
    assert first == both


def test_nothing_recorded() -> None:
    assert Histogram().percentile(0.99) == 0
    assert Histogram().mean == 0
