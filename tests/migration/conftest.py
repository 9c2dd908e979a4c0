"""Places for stores of every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support import json_url

Place = Callable[[str, str], str]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """The URL of a new store: of a kind, by a name."""

    def make(kind: str, name: str) -> str:
        return json_url(kind, tmp_path, name)

    return make
