"""The seed of a run, and what is drawn from it; apart from the plugin, as processes of the contract suite
import it without pytest."""

from __future__ import annotations

import os
from random import Random
from typing import Final

SEED_VARIABLE: Final = "HF_ASYNC_STORE_TEST_SEED"
FULL_VARIABLE: Final = "HF_ASYNC_STORE_TEST_FULL"

STRIDE: Final = 6
"""Of so many variants, a plain run draws one."""


def random_of(name: str) -> Random:
    """The random generator of one test or group of tests: the same in runs with the same seed."""
    return Random(f"{os.environ[SEED_VARIABLE]} {name}")
