"""The layouts as parameters of tests; apart from `support`, which processes import that need no pytest."""

from __future__ import annotations

import pytest

from tests.json.support import LAYOUTS

both_layouts = pytest.mark.parametrize("layout", LAYOUTS)

one_layout = pytest.mark.parametrize(
    "layout", ["split_files", pytest.param("single_file", marks=pytest.mark.long)]
)
"""For slow tests: split files in every run, the single file in the long sweeps."""
