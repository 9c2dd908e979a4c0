"""How often the contract suite repeats a case that depends on timing or on random data."""

from __future__ import annotations

import os
from typing import Final

from hf_async_store.testing.plugin import FULL_VARIABLE

_FRACTION: Final = 5


def repetitions(full: int) -> int:
    """The number of repetitions of a case in this run.

    Args:
        full: the number that the contract states; it applies if the environment variable
            HF_ASYNC_STORE_TEST_FULL is set, as `pytest --hf-full` does; otherwise a fifth of it.
    """
    return full if os.environ.get(FULL_VARIABLE) else max(2, full // _FRACTION)
