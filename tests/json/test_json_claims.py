"""The data file of claims, which is added to split files by the first claim."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from hf_async_store import Collection, open_store

if TYPE_CHECKING:
    from pathlib import Path

JOBS = [Collection("jobs", key="job_id", fields=["status"])]


async def test_105_the_first_claim_leaves_no_problem(tmp_path: Path) -> None:
    async with open_store(f"json:{tmp_path / 'data'}", collections=JOBS) as store:
        await store.create_entity("jobs", {"job_id": "a"})
        [claim] = await store.claim_entities("jobs")
        assert (await store.health())["problems"] == []
        async with asyncio.timeout(20):
            while len(list((tmp_path / "data").glob("store.journal.*"))) > 1:
                await asyncio.sleep(0.01)
        assert (await store.health())["problems"] == []
        await claim.finish({"status": "done"})
