"""Groups of values that are equal and not the same."""

from __future__ import annotations

import pytest

from hf_async_store.aggregates import Counts
from hf_async_store.values import Value


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([1.0, 1], "1"),
        ([[1.0, 2], [1, 2]], "[1, 2]"),
        ([{"a": 1.0}, {"a": 1}], "{'a': 1.0}"),
    ],
)
async def test_which_value_is_shown_does_not_depend_on_the_order(
    values: list[Value], shown: str
) -> None:
    for each in (values, values[::-1]):
        counts = Counts()
        counts.add(each)
        [(value, number)] = await counts.sorted()
        assert (repr(value), number) == (shown, 2)
