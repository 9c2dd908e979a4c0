"""Recorded values are reported at most 1/128 too high, and never too low."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from hf_async_store_bench.histogram import ERROR, Histogram

VALUES = st.integers(0, 10**12)


def recorded(values: list[int]) -> Histogram:
    histogram = Histogram()
    for each in values:
        histogram.record(each)
    return histogram


@given(st.lists(VALUES, min_size=1, max_size=200), st.floats(0.01, 1))
def test_percentiles_are_those_of_the_values(values: list[int], share: float) -> None:
    histogram = recorded(values)
    found = histogram.percentile(share) * 1e9
    # Which of two adjacent values a percentile between them returns is up to the library.
    rank = share * len(values)
    low, high = (
        sorted(values)[max(0, min(len(values), each) - 1)]
        for each in (math.floor(rank), math.ceil(rank + 0.5))
    )
    assert low * (1 - 1e-9) <= found <= high * (1 + ERROR) + 1
    assert max(values) <= histogram.highest * 1e9 * (1 + 1e-9) + 1
    assert histogram.highest * 1e9 <= max(values) * (1 + ERROR) + 1


@given(st.lists(VALUES), st.lists(VALUES))
def test_histograms_are_merged(ones: list[int], others: list[int]) -> None:
    first = recorded(ones)
    first.add(Histogram(recorded(others).encoded()))  # sent through another process
    both = recorded([*ones, *others])
    assert first.count == both.count
    for share in (0.5, 0.99, 1.0):
        assert first.percentile(share) == both.percentile(share)


def test_values_outside_the_range_are_counted() -> None:
    assert recorded([-5, 10**18]).count == 2


def test_nothing_recorded() -> None:
    assert Histogram().percentile(0.99) == 0
    assert Histogram().encoded() == ""
