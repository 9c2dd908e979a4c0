"""Runs pytest in a process of its own."""

from __future__ import annotations

import sys
from typing import Final

_UNUSED: Final = ("anyio", "hypothesispytest", "timeout", "xdist", "xdist.looponfail")

PYTEST: Final = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
LEAN_PYTEST: Final = [*PYTEST, *(word for each in _UNUSED for word in ("-p", f"no:{each}"))]
"""Without the plugins that have nothing to do with this project: importing them takes half of its start."""
