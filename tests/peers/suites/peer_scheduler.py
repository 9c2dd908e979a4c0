"""The data store and scheduler tests of APScheduler, with our data store in place of its own; imported at
the end of its `tests/conftest.py`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from examples.scheduler_data_store import COLLECTIONS, EntityDataStore
from peer_store import empty_store


@pytest.fixture
async def raw_datastore(tmp_path: Path) -> AsyncGenerator[EntityDataStore, None]:
    async with empty_store(COLLECTIONS, tmp_path) as store:
        yield EntityDataStore(store)
