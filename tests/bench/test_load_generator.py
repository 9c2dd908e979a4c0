"""The open loop measures from the scheduled time of an operation; the closed loop runs at full speed."""

from __future__ import annotations

import asyncio
import time

from hf_async_store_bench.load_generator import closed_loop, open_loop


class Work:
    """An operation with a fixed duration, and a single stall of the event loop."""

    def __init__(self, seconds: float = 0.0, stall: float = 0.0) -> None:
        self.seconds = seconds
        self.stall = stall
        self.done = 0
        self.slots: set[int] = set()

    async def one(self, slot: int) -> int:
        assert slot not in self.slots, "two in one slot"
        self.slots.add(slot)
        self.done += 1
        if self.stall and self.done == 50:
            time.sleep(self.stall)  # blocks the event loop, like a blocking engine
        await asyncio.sleep(self.seconds)
        self.slots.remove(slot)
        return 3


async def test_the_open_loop_runs_all_scheduled_operations() -> None:
    work = Work(0.001)
    stats = await open_loop(work.one, slots=16, seconds=2.0, rate=50)
    assert work.done == stats.operations == stats.latencies.count == 100
    assert stats.units == 300
    assert stats.unserved == 0
    assert 1.9 < stats.seconds < 4.0
    assert stats.latencies.percentile(0.5) < 0.5


async def test_the_open_loop_measures_operations_delayed_by_a_stall() -> None:
    work = Work(stall=0.3)
    stats = await open_loop(work.one, slots=16, seconds=1.0, rate=200)
    assert stats.operations == 200
    # 60 operations were due in those 0.3 s: they waited 0.15 s in the middle.
    assert stats.latencies.percentile(0.80) > 0.05
    assert stats.latencies.highest > 0.28


async def test_a_store_that_cannot_keep_up_is_reported() -> None:
    stats = await open_loop(Work(0.05).one, slots=1, seconds=0.5, rate=100)
    # 20 of 100 operations per second are done: the round is aborted, and waiting operations are counted.
    assert stats.unserved > 5
    assert stats.operations + stats.unserved == stats.latencies.count == 50
    assert stats.latencies.percentile(0.9) > 0.5


async def test_the_closed_loop_counts_failures_separately() -> None:
    class Failing(Work):
        async def one(self, slot: int) -> int:
            await super().one(slot)
            if self.done % 2:
                raise OSError("no")
            return 1

    stats = await closed_loop(Failing(0.001).one, slots=4, seconds=0.2)
    assert stats.operations > 10
    assert stats.errors["OSError"] >= stats.operations - 4
    assert stats.latencies.count == stats.operations
