"""Case 95: old and new programs as processes on one store, while another process applies the schema."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from hf_async_store.testing.assertions import get_existing
from hf_async_store.testing.declarations import check_answers
from hf_async_store.testing.process_workers import run_workers
from hf_async_store.testing.repetitions import repetitions
from hf_async_store.testing.rollout_programs import NEW, OLD, SHARED

if TYPE_CHECKING:
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.harness import Harness

_FULL_STEPS: Final = 60
_PROGRAMS: Final = {"old-0": False, "old-1": False, "new-0": True, "new-1": True}


class RolloutContract:
    """Case 95, with processes."""

    async def test_95_old_and_new_processes_under_load_while_the_schema_is_applied(
        self, harness: Harness
    ) -> None:
        url = harness.url()
        if url is None:
            pytest.skip("the stores of this engine belong to one process")
        steps = repetitions(_FULL_STEPS)
        async with harness.store(OLD) as store:
            await store.save_entities("jobs", [{"job_id": each} for each in SHARED])
        works = [
            ("program", {"url": url, "name": name, "is_new": is_new, "steps": steps})
            for name, is_new in _PROGRAMS.items()
        ]
        *written, _ = await run_workers(url, *works, ("apply", {"url": url, "times": 2}))
        left = {job_id: size for each in written for job_id, size in each.items()}
        async with harness.store(NEW) as new, harness.store(OLD) as old:
            await new.apply_schema(complete=True)
            assert await new.schema_changes() == []
            for store in (old, new):
                await _nothing_is_lost(store, left, steps)
            await check_answers(new, NEW[0])


async def _nothing_is_lost(store: StorageStrategy, left: dict[str, int], steps: int) -> None:
    entities = await store.query_entities("jobs")
    sizes = {each["job_id"]: each["size"] for each in entities if each["job_id"] not in SHARED}
    assert sizes == left
    assert {str(each.get("due_at"))[10:] for each in entities} == {"", "T00:00:00.000000Z"}
    for number, each in enumerate(SHARED):
        shared = await get_existing(store, "jobs", each)
        last = max(step for step in range(steps) if step % len(SHARED) == number)
        assert [shared[f"of-{name}"] for name in _PROGRAMS] == [last] * len(_PROGRAMS)
    first = await get_existing(store, "jobs", SHARED[0])
    assert [first[f"sum-of-{name}"] for name in _PROGRAMS] == [steps] * len(_PROGRAMS)
