"""Claims on PostgreSQL, by the clock of the server."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from hf_async_store import open_store

if TYPE_CHECKING:
    import pytest

REQUEST = {"request_id": "r-1", "status": "PENDING"}


async def test_104_tokens_increase_by_the_clock_of_the_server(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(database) as store:
        await store.create_entity("requests", REQUEST)
        [first] = await store.claim_entities("requests")
        await first.finish()
        monkeypatch.setattr(time, "time_ns", lambda: 1)
        [second] = await store.claim_entities("requests")
        assert second.token > first.token
