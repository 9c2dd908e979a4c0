"""Claims in a live migration: they hold until the target becomes the active store, and then end."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from hf_async_store import ClaimLostError, Collection, open_store
from hf_async_store.migration.live import LiveMigration

if TYPE_CHECKING:
    from pathlib import Path

JOBS = [Collection("jobs", key="job_id", fields=["status"])]


@pytest.mark.parametrize(
    ("source", "target"), [("json:a.json", "sqlite:b.db"), ("sqlite:b.db", "json:a.json")]
)
async def test_107_claims_end_when_the_target_becomes_active(
    source: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with (
        open_store(source, collections=JOBS, follow_moves=[target]) as store,
        LiveMigration(source, target, collections=JOBS) as move,
        AsyncExitStack() as stack,
    ):
        await store.create_entities("jobs", [{"job_id": each} for each in "abc"])
        first, second, third = await store.claim_entities("jobs", order_by="job_id", limit=3)
        await move.start(cut_over=False)
        await first.update({"status": "running"})
        await first.finish({"status": "done"})
        await third.delete()
        await second.renew()
        lock = await stack.enter_async_context(store.lock("x"))
        await move.start()
        for use in (
            second.renew,
            second.release,
            second.finish,
            second.delete,
            lock.release,
            lambda: second.update({"status": "late"}),
        ):
            with pytest.raises(ClaimLostError):
                await use()
        async with store.lock("x", timeout=5.0):
            pass
        [again] = await store.claim_entities("jobs", {"job_id": "b"})
        with pytest.raises(ClaimLostError):
            await second.update({"status": "late"})
        await again.finish({"status": "done"})
        found = await store.query_entities("jobs", {"status": "done"}, order_by="job_id")
        assert [(each["job_id"], each["version"]) for each in found] == [("a", 3), ("b", 2)]
        assert await store.count_entities("jobs") == 2
        with pytest.raises(ClaimLostError):
            await stack.aclose()
