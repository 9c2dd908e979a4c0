"""Roles of processes: an old and a new version of a program during a rollout, and `schema apply`."""

from __future__ import annotations

import asyncio
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from hf_async_store.field_operations import increment
from hf_async_store.query import desc, gte, path
from hf_async_store.schema import Collection, Field, Index
from hf_async_store.strategies import open_store
from hf_async_store.testing.concurrency import answer_of

if TYPE_CHECKING:
    from hf_async_store.query import OrderBy
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.transaction import Transaction

OLD: Final = (
    Collection("jobs", key="job_id", fields=["owner", Field("hits", "integer")], indexes=["owner"]),
)
NEW: Final = (
    Collection(
        "jobs",
        key="job_id",
        fields=["owner", Field("size", "integer"), Field("due_at", "timestamp")],
        indexes=["owner", "size", Index("owner", "size"), Index("owner", "due_at")],
    ),
)
SHARED: Final = tuple(f"shared-{number}" for number in range(4))
"""Entities that all programs update, each a field of its own."""

_BATCH: Final = 3


async def program(
    store: StorageStrategy, *, url: str, name: str, is_new: bool, steps: int
) -> dict[str, Any]:
    """Write and query in `steps`; returns the sizes of the entities that this process has left.

    Only this process writes the entities whose owner is its name, so it knows the right answers.
    """
    del store  # it has other collections
    mine: dict[str, int] = {}
    async with open_store(url, collections=NEW if is_new else OLD) as own:
        for step in range(steps):
            await _write(own, name, step, mine)
            await _check(own, name, mine)
    return mine


async def _write(store: StorageStrategy, name: str, step: int, mine: dict[str, int]) -> None:
    jobs = [_job(f"{name}-{step}-{n}", name, step * 10 + n) for n in range(_BATCH)]
    await store.create_entity("jobs", jobs[0])
    await store.save_entities("jobs", jobs[1:])
    mine |= {str(each["job_id"]): each["size"] for each in jobs}
    await store.update_entity("jobs", SHARED[step % len(SHARED)], {f"of-{name}": step})

    async def count_up(tx: Transaction) -> None:
        await tx.update_entity("jobs", f"{name}-{step}-1", {"size": increment(100)})
        await tx.update_entity("jobs", SHARED[0], {f"sum-of-{name}": increment(1)})

    await store.run_transaction(count_up)
    mine[f"{name}-{step}-1"] += 100
    if step % 3 == 2:
        await store.delete_entity("jobs", f"{name}-{step - 1}-0")
        del mine[f"{name}-{step - 1}-0"]


def _job(job_id: str, owner: str, size: int) -> dict[str, Any]:
    return {"job_id": job_id, "owner": owner, "size": size, "due_at": f"2026-01-{size % 28 + 1:02}"}


async def _check(store: StorageStrategy, name: str, mine: dict[str, int]) -> None:
    """Check the answers about the entities of this process."""
    size, can = path("size"), store.capabilities
    least = sorted(mine.values())[len(mine) // 2]
    larger = sorted((each for each in mine if mine[each] >= least), key=lambda each: -mine[each])

    async def found(order: OrderBy, limit: int | None) -> list[str]:
        filters = {"owner": name, size: gte(least)}
        entities = await store.query_entities("jobs", filters, order, limit)
        return [str(each["job_id"]) for each in entities]

    orders: tuple[tuple[OrderBy, list[str]], ...] = (
        ("job_id", sorted(larger)),
        (desc(size), larger[:4]),
    )
    for order, wanted in orders:
        limit = None if order == "job_id" else len(wanted)
        answer = await answer_of(can, partial(found, order, limit), wanted)
        assert answer == wanted, f"{name} by {order}"
    number = len(mine)
    counted = await answer_of(can, lambda: store.count_entities("jobs", {"owner": name}), number)
    assert counted == number


async def apply(store: StorageStrategy, *, url: str, times: int) -> None:
    """Run `schema apply` with the new declaration, several times."""
    del store
    words = ["schema", "apply", "--store", url, "--collections", f"{__name__}:NEW"]
    for _ in range(times):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "hf_async_store", *words),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        _, errors = await process.communicate()
        assert process.returncode == 0, errors.decode()
