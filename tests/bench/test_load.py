"""The open loop counts from when an operation was due; the closed loop goes as fast as it can."""

from __future__ import annotations

import asyncio
import time

from hf_async_store.bench.load import closed_loop, open_loop


class Work:
    """Takes so long each time; once, everything stands still."""

    retries = 0

    def __init__(self, seconds: float = 0.0, stall: float = 0.0) -> None:
        self.seconds = seconds
        self.stall = stall
        self.done = 0
        self.lanes: set[int] = set()

    async def one(self, lane: int) -> int:
        assert lane not in self.lanes, "two in one lane"
        self.lanes.add(lane)
        self.done += 1
        if self.stall and self.done == 50:
            time.sleep(self.stall)  # holds the loop, as a blocking engine does
        await asyncio.sleep(self.seconds)
        self.lanes.remove(lane)
        return 3


async def test_the_open_loop_does_all_that_is_due() -> None:
    work = Work(0.001)
    tally = await open_loop(work, lanes=16, seconds=0.5, rate=200)
    assert work.done == tally.operations == tally.latencies.count == 100
    assert tally.units == 300
    assert tally.unserved == 0
    assert 0.45 < tally.seconds < 1.0
    assert tally.latencies.percentile(0.5) < 0.1


async def test_what_a_stall_kept_waiting_shows_in_the_open_loop() -> None:
    work = Work(stall=0.3)
    tally = await open_loop(work, lanes=16, seconds=1.0, rate=200)
    assert tally.operations == 200
    # 60 operations were due in those 0.3 s: they waited 0.15 s in the middle.
    assert tally.latencies.percentile(0.80) > 0.05
    assert tally.latencies.highest > 0.28e9


async def test_a_store_that_falls_behind_cannot_hide_it() -> None:
    tally = await open_loop(Work(0.05), lanes=1, seconds=0.5, rate=100)
    # 20 a second are done of 100: the round is broken off, and what waits is counted.
    assert tally.unserved > 5
    assert tally.operations + tally.unserved == tally.latencies.count == 50
    assert tally.latencies.percentile(0.9) > 0.5


async def test_the_closed_loop_counts_what_failed_apart() -> None:
    class Failing(Work):
        async def one(self, lane: int) -> int:
            await super().one(lane)
            if self.done % 2:
                raise OSError("no")
            return 1

    tally = await closed_loop(Failing(0.001), lanes=4, seconds=0.2)
    assert tally.operations > 10
    assert tally.errors["OSError"] >= tally.operations - 4
    assert tally.latencies.count == tally.operations
