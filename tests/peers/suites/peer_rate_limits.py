"""The storage and strategy tests of `limits`, with our storage in place of its own; imported at the
end of its `tests/conftest.py`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from examples.rate_limit_storage import COLLECTIONS, EntityStorage
from peer_store import empty_store
from pytest_lazy_fixtures import lf

_URL = "async+hf-async-store://"


@pytest.fixture
async def entity_store(tmp_path: Path) -> AsyncGenerator[dict[str, Any], None]:
    async with empty_store(COLLECTIONS, tmp_path) as store:
        storage = EntityStorage(store=store)
        await storage.incr("first", 60)  # makes the tables: the tests measure durations
        await storage.reset()
        yield {"store": store}


def pytest_pycollect_makeitem(obj: object) -> None:
    """Each class that is parametrized by storages is run with ours alone."""
    marks = getattr(obj, "pytestmark", None)
    if not isinstance(obj, type) or not isinstance(marks, list):
        return
    for index, mark in enumerate(marks):
        if mark.name == "parametrize" and str(mark.args[0]).startswith("uri, args"):
            ours: list[object] = [_URL, lf("entity_store"), None]
            if "expected_instance" in mark.args[0]:
                ours.insert(2, EntityStorage)
            marks[index] = pytest.mark.parametrize(mark.args[0], [pytest.param(*ours)]).mark
