"""A store of jobs, for tests of `update_where` with a limit."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from hf_async_store import Collection, Field, Index, open_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hf_async_store import StorageStrategy

JOBS: Final = Collection(
    "jobs",
    key="job_id",
    fields=["status", Field("rank", "integer"), Field("parent_id", references="jobs"), "name"],
    indexes=[Index("status", "rank"), Index("name", unique=True)],
    open=True,
)
PENDING: Final = {"status": "PENDING"}
RUNNING: Final = {"status": "RUNNING"}


@asynccontextmanager
async def filled(url: str) -> AsyncIterator[StorageStrategy]:
    """A store with six pending jobs, whose order by rank is not that by id."""
    async with open_store(url, collections=[JOBS]) as store:
        jobs = [{"job_id": f"{n}", "status": "PENDING", "rank": 9 - n} for n in range(6)]
        await store.save_entities("jobs", jobs)
        yield store
