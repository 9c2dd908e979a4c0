"""Baselines and competitors do the same work as a store, and lose no write."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from hf_async_store_bench.data import machine, machine_id, request
from hf_async_store_bench.environments import Environments
from hf_async_store_bench.systems import BASELINES, COMPETITORS, missing, named
from hf_async_store_bench.worker_group import SkippedError

COUNT = 40


@pytest.mark.hf_sampled
# Competitors emit warnings of their own.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [each.name for each in (*BASELINES, *COMPETITORS)])
async def test_a_baseline_stores_its_writes(tmp_path: Path, name: str) -> None:
    system = named(name)
    if why := missing(system):
        pytest.skip(why)
    with Environments(folder=str(tmp_path)) as environments:
        try:
            environment = environments.make(system)
        except SkippedError as exc:
            pytest.skip(str(exc))
        one = await system.load().open(environment)
        await one.fill([machine(each) for each in range(COUNT)])
        expected = dict.fromkeys(range(COUNT), 0) | await _worked(one)
        await one.close()
        again = await system.load().open(environment)
        found = await again.read_back([machine_id(each) for each in expected])
        await again.close()
    if hasattr(one, "run_process"):
        return  # it stores nothing
    for (number, count), stored in zip(expected.items(), found, strict=True):
        assert stored is not None, number
        assert stored["count"] == count, number


async def _worked(one: Any) -> dict[int, int]:
    """Run all operations with several concurrent tasks; returns the expected counts."""
    expected: dict[int, int] = {}
    if hasattr(one, "get"):
        for found in await asyncio.gather(*(one.get(machine_id(each)) for each in range(COUNT))):
            assert found is not None
            assert found["status"] in ("RUNNING", "PENDING", "STOPPED")
        assert await one.get("i-nobody") is None
    if hasattr(one, "save"):
        await asyncio.gather(*(one.save(machine(each, count=1)) for each in range(20)))
        expected |= dict.fromkeys(range(20), 1)
    if hasattr(one, "update"):
        await one.update(machine_id(20), {"count": 5})
        expected[20] = 5
    if hasattr(one, "create"):
        await one.create({**machine(1000, count=2), "request_id": "req-00000000"})
        expected[1000] = 2
    if hasattr(one, "save_many"):
        await one.save_many([machine(each, count=3) for each in range(30, 35)])
        expected |= dict.fromkeys(range(30, 35), 3)
    for start, method in ((2000, "create_many"), (3000, "import_many")):
        if hasattr(one, method):
            numbers = range(start, start + 30)
            await getattr(one, method)(
                [{**machine(each, count=4), "request_id": "req-00000000"} for each in numbers]
            )
            expected |= dict.fromkeys(numbers, 4)
    if hasattr(one, "acquire"):
        calls = []
        for start in (4000, 5000):
            asked = request(start, 24)
            some = [
                {**machine(each, count=6), "request_id": asked["request_id"]}
                for each in range(start, start + 24)
            ]
            expected |= dict.fromkeys(range(start, start + 24), 6)
            calls.append(one.acquire(asked, some))
        await asyncio.gather(*calls)
    if hasattr(one, "run_process"):
        await one.run_process(machine_id(0))
    return expected


def test_every_baseline_has_a_description() -> None:
    for each in BASELINES:
        made = each.load().__dict__["__doc__"]
        assert made, each.name
        assert made.endswith("."), each.name
    core = named("SQLAlchemy Core on aiosqlite each").load()
    assert core.__doc__.startswith("create_async_engine")
