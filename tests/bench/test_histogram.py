"""What the report relies on: at most 1 in 128 above what was recorded, and never below."""

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
    # Which of two neighbours a share between them stands for is the library's own choice.
    rank = share * len(values)
    low, high = (
        sorted(values)[max(0, min(len(values), each) - 1)]
        for each in (math.floor(rank), math.ceil(rank + 0.5))
    )
    assert low * (1 - 1e-9) <= found <= high * (1 + ERROR) + 1
    assert max(values) <= histogram.highest * 1e9 * (1 + 1e-9) + 1
    assert histogram.highest * 1e9 <= max(values) * (1 + ERROR) + 1


@given(st.lists(VALUES), st.lists(VALUES))
def test_two_together_are_one_of_both(ones: list[int], others: list[int]) -> None:
    first = recorded(ones)
    first.add(Histogram(recorded(others).encoded()))  # by way of another process
    both = recorded([*ones, *others])
    assert first.count == both.count
    for share in (0.5, 0.99, 1.0):
        assert first.percentile(share) == both.percentile(share)


def test_what_lies_outside_is_counted_at_the_end() -> None:
    assert recorded([-5, 10**18]).count == 2


def test_nothing_recorded() -> None:
    assert Histogram().percentile(0.99) == 0
    assert Histogram().encoded() == ""
