"""Runs pytest in a process of its own."""

from __future__ import annotations

import sys
from typing import Final

PYTEST: Final = [
    *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider"),
    *("-p", "no:hypothesispytest"),  # it imports Hypothesis, which takes a third of the start
]
