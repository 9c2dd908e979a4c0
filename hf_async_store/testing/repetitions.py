"""How often the contract suite repeats a case that depends on timing or on random data, and how many of
many similar cases it runs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import islice
from random import Random
from typing import Final, TypeVar

from hf_async_store.testing.plugin import FULL_VARIABLE, random_of

Item = TypeVar("Item")

_FRACTION: Final = 5
_STRIDE: Final = 3


def repetitions(full: int, short: int = 0) -> int:
    """The number of repetitions of a case in this run.

    Args:
        full: the number that the contract states; it applies if the environment variable
            HF_ASYNC_STORE_TEST_FULL is set, as `pytest --hf-full` does.
        short: the number in other runs; 0: a fifth of `full`.
    """
    return full if os.environ.get(FULL_VARIABLE) else short or max(2, full // _FRACTION)


def sampled(items: Iterable[Item], one_in: int = _STRIDE) -> Iterable[Item]:
    """All items in a full run (see `repetitions`), otherwise every third one, from a random one on.

    Args:
        one_in: the distance of the items instead of 3.
    """
    if os.environ.get(FULL_VARIABLE):
        return items
    return islice(items, random_of_test().randrange(one_in), None, one_in)


def random_of_test() -> Random:
    """The random generator of the running test: the same in runs with the same seed."""
    return random_of(os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0])
