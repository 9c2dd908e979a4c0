"""Claims: the block that renews one, and seeded schedules of claimers under a deterministic scheduler."""

from __future__ import annotations

import asyncio
import pickle
import selectors
import time
from collections import deque
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from hf_async_store import (
    Claim,
    ClaimLostError,
    Collection,
    StorageStrategy,
    claim_clock,
    increment,
    open_store,
    strategy,
)
from hf_async_store import claims as claims_module
from hf_async_store.backoff import Backoff
from hf_async_store.claim_clock import BootClock, Moment, boot_seconds
from hf_async_store.claim_records import claim_key
from hf_async_store.driver import run_to_completion
from hf_async_store.errors import InvalidInputError, UnavailableError
from hf_async_store.values import Key

if TYPE_CHECKING:
    from pathlib import Path

JOBS = [Collection("jobs", key="job_id", fields=["status"])]


class _Selector(selectors.DefaultSelector):
    """Never waits: time passes when nothing else can happen."""

    def select(self, timeout: float | None = None) -> list[Any]:
        del timeout
        return super().select(0)


class SeededLoop(asyncio.SelectorEventLoop):
    """An event loop that runs what is ready in a random order, and whose time is virtual."""

    def __init__(self, seed: int) -> None:
        super().__init__(_Selector())
        self.random = Random(seed)
        self.now = 1000.0
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        ready: deque[Any] = self._ready  # type: ignore[attr-defined]
        if ready:
            shuffled = list(ready)
            self.random.shuffle(shuffled)
            ready.clear()
            ready.extend(shuffled)
        elif self._scheduled:  # type: ignore[attr-defined]
            self.now = max(self.now, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


class Schedule:
    """Workers that claim jobs, fail in every way, and record when they work on what."""

    def __init__(self, seed: int) -> None:
        self.loop = SeededLoop(seed)
        self.random = self.loop.random
        self.jobs = self.random.randint(1, 3)
        self.workers = self.random.randint(2, 3)
        self.work: list[tuple[str, float, float]] = []

    def now(self) -> Moment:
        return Moment("virtual", self.loop.now)

    def run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._main())
        last: dict[str, float] = {}
        for job, began, ended in sorted(self.work, key=lambda each: each[1]):
            assert began >= last.get(job, 0.0), f"two worked on {job} at {began}"
            last[job] = ended

    async def _main(self) -> None:
        async with open_store("memory:", collections=JOBS) as store:
            store.engine.claim_clock = self
            for number in range(self.jobs):
                await store.create_entity("jobs", {"job_id": f"{number}", "status": "new"})
            await asyncio.gather(*(self._worker(store) for _ in range(self.workers)))
            done = await store.query_entities("jobs", {"status": "done"})
            assert [each["times"] for each in done] == [1] * self.jobs

    async def _worker(self, store: StorageStrategy) -> None:
        while found := await store.claim_entities(
            "jobs", {"status": "new"}, lease=1.0, limit=self.random.choice([1, 1, 2]), wait=2.5
        ):
            for claim in found:
                try:
                    await self._work(claim)
                except (ClaimLostError, ZeroDivisionError):
                    pass

    async def _work(self, claim: Claim) -> None:
        began = self.loop.now

        def record() -> None:
            self.work.append((claim.id, began, min(self.loop.now, claim.deadline)))

        how = self.random.choice(["done", "done", "fails", "dies", "blocks", "long", "gives back"])
        if claim.deadline <= began:
            return  # it was not begun in time
        if how == "dies":
            record()
            return
        async with claim:
            await asyncio.sleep(self.random.random() * (3.0 if how == "long" else 0.5))
            record()
            if how == "fails":
                raise ZeroDivisionError
            if how == "blocks":
                self.loop.now += self.random.random() * 2
            if how == "gives back":
                await claim.release(after=self.random.random())
                return
            await claim.update({"seen": increment(1)})
            await claim.finish({"status": "done", "times": increment(1)})


@pytest.fixture
def virtual_boot_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The holders' own clock, and that of pauses, is the time of the event loop.

    The first pause is not so short that most of a schedule would be attempts that find nothing.
    """

    def backoff(seconds: float, **limits: float) -> Backoff:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SeededLoop)
        limits["first"] = 0.3
        return Backoff(seconds, **limits, clock=loop.time, jitter=loop.random.uniform)

    monkeypatch.setattr(claims_module, "Backoff", backoff)
    for module in (claims_module, strategy):
        monkeypatch.setattr(module, "boot_seconds", lambda: asyncio.get_running_loop().time())


@pytest.mark.usefixtures("virtual_boot_clock")
def test_105_seeded_schedules() -> None:
    seed = Random().randrange(2**32)
    for number in range(60):
        _run(seed + number)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.usefixtures("virtual_boot_clock")
def test_105_a_hundred_thousand_seeded_schedules() -> None:
    seed = Random().randrange(2**32)
    for number in range(100_000):
        _run(seed + number)


def _run(seed: int) -> None:
    try:
        Schedule(seed).run()
    except BaseException as exc:
        exc.add_note(f"the schedule with the seed {seed}")
        raise


# -- the block ------------------------------------------------------------------------------


async def _claimed(store: StorageStrategy, lease: float) -> Claim:
    await store.create_entity("jobs", {"job_id": "a"})
    [claim] = await store.claim_entities("jobs", {"job_id": "a"}, lease=lease)
    return claim


async def test_105_a_block_ends_when_the_store_cannot_be_reached() -> None:
    async with open_store("memory:", collections=JOBS) as store:
        claim = await _claimed(store, 0.3)

        async def unreachable(*args: object) -> None:
            raise UnavailableError("it cannot be reached")

        store.engine.renew_claim = unreachable  # type: ignore[method-assign]
        began = boot_seconds()
        with pytest.raises(ClaimLostError, match="could not be renewed") as lost:
            async with claim:
                await asyncio.sleep(30)
        assert boot_seconds() - began < 5
        assert isinstance(lost.value.__cause__, asyncio.CancelledError)


async def test_105_a_block_is_cancelled_in_time_when_the_store_does_not_respond() -> None:
    async with open_store("memory:", collections=JOBS) as store:
        claim = await _claimed(store, 0.3)

        async def hangs(*args: object) -> None:
            await run_to_completion(asyncio.sleep(2))  # a statement cannot be taken back

        store.engine.renew_claim = hangs  # type: ignore[method-assign]
        began = boot_seconds()
        worked = 0.0

        async def work() -> None:
            nonlocal worked
            try:
                await asyncio.sleep(30)
            finally:
                worked = boot_seconds() - began

        with pytest.raises(ClaimLostError, match="could not be renewed"):
            async with claim:
                await work()
        assert worked < 1.5


async def test_105_a_block_is_renewed_in_time_after_its_lease_was_shortened() -> None:
    async with open_store("memory:", collections=JOBS) as store:
        claim = await _claimed(store, 30.0)
        async with claim:
            await asyncio.sleep(0.01)  # the background task waits for ten seconds
            await claim.renew(0.3)
            await asyncio.sleep(0.5)
            await claim.update({"status": "running"})


async def test_105_another_cancellation_is_not_swallowed() -> None:
    async with open_store("memory:", collections=JOBS) as store:
        claim = await _claimed(store, 0.3)

        async def hold() -> None:
            async with claim:
                await asyncio.sleep(30)

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(hold(), 0.05)


async def test_105_a_claim_is_entered_once() -> None:
    async with open_store("memory:", collections=JOBS) as store:
        claim = await _claimed(store, 5.0)
        async with claim:
            with pytest.raises(InvalidInputError):
                async with claim:
                    pass


async def test_106_an_error_of_finish_leaves_the_block_renewed() -> None:
    async with open_store("memory:", collections=JOBS) as store:
        claim = await _claimed(store, 0.3)
        async with claim:
            with pytest.raises(InvalidInputError):
                await claim.finish({"status": object()})
            await asyncio.sleep(0.5)
            await claim.finish({"status": "done"})
        assert await store.claims("jobs") == []


@pytest.mark.parametrize("url", ["memory:", "json:store.json", "sqlite:store.db"])
async def test_105_a_lease_that_ends_while_its_holder_waits_for_the_lock(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with open_store(url, collections=JOBS) as store:
        await store.create_entity("jobs", {"job_id": "b"})
        claim = await _claimed(store, 0.2)

        async def transact() -> None:
            async with claim.transaction() as tx:
                await tx.create_entity("jobs", {"job_id": "c"})

        async with store.begin_transaction() as tx:
            await tx.update_entity("jobs", "b", {"status": "new"})
            await tx.query_entities("jobs")  # the transaction has the lock now
            late = asyncio.gather(
                transact(),
                *(use() for use in (claim.renew, claim.release, claim.finish, claim.delete)),
                claim.update({"status": "late"}),
                return_exceptions=True,
            )
            await asyncio.sleep(0.3)
        assert [type(each) for each in await late] == [ClaimLostError] * 6
        assert await store.count_entities("jobs") == 2


def test_the_error_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(ClaimLostError("lost", "jobs", "a")))
    assert (error.collection, error.entity_id, str(error)) == ("jobs", "a", "lost")


def test_keys_of_records_are_distinct_and_short() -> None:
    keys = [Key("a", "b/c"), Key("a", "x" * 1024), Key("a", "x" * 1023 + "y"), Key("a", "é" * 512)]
    names = {claim_key(each).id for each in keys}
    assert len(names) == len(keys)
    assert all(len(each.encode()) <= 1100 for each in names)


def test_the_clock_of_the_machine() -> None:
    first, second = BootClock().now(), BootClock().now()
    assert first.era == second.era != ""
    assert first.seconds is not None
    assert second.seconds is not None
    assert second.seconds >= first.seconds


def test_105_a_machine_whose_starts_have_no_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim_clock, "_boot_id", lambda: "")
    monkeypatch.setattr(claim_clock, "boot_seconds", lambda: 1e6)
    before = BootClock().now()
    monkeypatch.setattr(claim_clock, "boot_seconds", lambda: 5.0)  # after a restart
    after = BootClock().now()
    assert before.seconds is not None
    assert after.seconds is not None
    assert before.seconds <= after.seconds


def test_the_wall_clock_never_runs_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim_clock.WallClock, "_latest", 0.0)
    shown = iter([100.0, 90.0, 99.0, 101.0])
    monkeypatch.setattr(time, "time", lambda: next(shown))
    read = [claim_clock.WallClock().now().seconds for _ in range(4)]
    assert read == [100.0, 100.0, 100.0, 101.0]
