"""How often the contract suite repeats a case that depends on timing or on random data, and how many of
many similar cases it runs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import islice
from operator import length_hint
from random import Random
from typing import Final, TypeVar

from hf_async_store.testing.random_choices import FULL_VARIABLE, STRIDE, random_of

Item = TypeVar("Item")

_FRACTION: Final = 10


def repetitions(full: int, short: int = 0) -> int:
    """The number of repetitions of a case in this run.

    Args:
        full: the number that the contract states; it applies if the environment variable
            HF_ASYNC_STORE_TEST_FULL is set, as `pytest --hf-full` does.
        short: the number in other runs; 0: a tenth of `full`, at least 2.
    """
    return full if os.environ.get(FULL_VARIABLE) else short or max(2, full // _FRACTION)


def sampled(items: Iterable[Item], one_in: int = STRIDE) -> Iterable[Item]:
    """All items in a full run (see `repetitions`), otherwise every sixth one, from a random one on; at
    least one of a list.

    Args:
        one_in: the distance of the items instead of 6.
    """
    if os.environ.get(FULL_VARIABLE):
        return items
    first = random_of_test().randrange(max(1, min(one_in, length_hint(items, one_in))))
    return islice(items, first, None, one_in)


def random_of_test() -> Random:
    """The random generator of the running test: the same in runs with the same seed."""
    return random_of(os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0])
