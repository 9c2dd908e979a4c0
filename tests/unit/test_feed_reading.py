"""The shared reading of feeds under random schedules, on an engine that has several positions for one
place, answers late, and wakes too early."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from random import Random
from typing import TYPE_CHECKING, Any, cast

import pytest

from hf_async_store import Collection, open_store
from hf_async_store.changes import Record
from hf_async_store.driver import FeedBatch, FeedEntry
from hf_async_store.errors import (
    EntityNotFoundError,
    FeedExpiredError,
    SchemaMismatchError,
    StorageError,
    UnavailableError,
)
from hf_async_store.feed import Changes
from hf_async_store.feed_reading import FeedReader
from hf_async_store.query import EVERYTHING
from hf_async_store.values import Key

if TYPE_CHECKING:
    from hf_async_store.driver import Engine

_NUMBER = 40


class ScriptedEngine:
    """A feed of numbers, whose calls take a random number of steps of the event loop."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.entries: list[FeedEntry] = []
        self.changed = asyncio.Event()
        self.calls = 0
        self.waiting = 0
        self.fails = False

    async def steps(self, most: int = 4) -> None:
        for _ in range(self.random.randrange(most)):
            await asyncio.sleep(0)

    def _position(self, place: int) -> str:
        return f"{place}.{self.random.randrange(3)}"

    def append(self) -> None:
        number = len(self.entries)
        key = Key("jobs", f"{number % 5}")
        after = Record(key, {"job_id": key.id, "version": number})
        self.entries.append(FeedEntry(key, None, after, self._position(number + 1)))
        self.changed.set()

    async def feed_position(self, collection: str) -> str:
        assert collection == "jobs"
        await self.steps()
        place = len(self.entries)
        await self.steps()
        return self._position(place)

    async def read_feed(self, collection: str, since: str, limit: int) -> FeedBatch:
        self.calls += 1
        assert collection == "jobs"
        await self.steps()
        if self.fails:
            raise FeedExpiredError("gone")
        if self.random.random() < 0.02:
            raise UnavailableError("lost")
        place = int(since.partition(".")[0])
        if self.random.random() < 0.3:  # it has found nothing yet
            return FeedBatch([], self._position(place), is_end=False)
        found = self.entries[place : place + self.random.randint(1, min(limit, 7))]
        await self.steps()
        if found:
            return FeedBatch(found, self._position(place + len(found)))
        return FeedBatch([], since if self.random.random() < 0.5 else self._position(place))

    async def feed_changed(self, positions: Mapping[str, str], seconds: float) -> None:
        self.waiting += 1
        assert self.waiting == 1, "one call at a time"
        try:
            place = int(positions["jobs"].partition(".")[0])
            while place >= len(self.entries) and self.random.random() < 0.8:
                self.changed.clear()
                await self.changed.wait()
            await self.steps()
        finally:
            self.waiting -= 1


class Scenario:
    """Watchers of one feed, which is written meanwhile."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.engine = ScriptedEngine(self.random)
        self.reader = FeedReader(cast("Engine", self.engine))
        cast("Any", self.reader)._sleep = lambda seconds: asyncio.sleep(0)

    async def write(self) -> None:
        for _ in range(_NUMBER):
            await self.engine.steps(12)
            self.engine.append()

    async def watch(self) -> None:
        await self.engine.steps(200)
        position = await self.engine.feed_position("jobs")
        await self.engine.steps(20)
        expected = int(position.partition(".")[0])
        async with self.reader.using("jobs", self.engine.feed_position) as feed:
            changes = Changes(feed, position, EVERYTHING, lambda: None)
            while expected < _NUMBER:
                change = await self._next(changes)
                if change is not None:
                    assert change.version == expected
                    expected += 1
                await self.engine.steps(self.random.choice([1, 3, 40]))

    async def _next(self, changes: Changes) -> Any:
        """The next change; None if the wait for it is cancelled."""
        if self.random.random() < 0.8:
            return await anext(changes)
        waiting = asyncio.ensure_future(cast("Any", anext(changes)))
        await self.engine.steps(8)
        waiting.cancel()
        try:
            return await waiting
        except asyncio.CancelledError:
            return None

    async def listen(self) -> None:
        """Everything after the call began, or after a look that follows it, is heard."""
        await self.engine.steps(200)
        heard: list[int] = []

        def listener(entry: FeedEntry | StorageError) -> None:
            assert isinstance(entry, FeedEntry)
            assert entry.after is not None
            heard.append(entry.after.version)

        async with self.reader.using("jobs", self.engine.feed_position) as feed:
            before = len(self.engine.entries)
            async with feed.listening(None, listener):
                looked = len(self.engine.entries)
                while looked < _NUMBER and heard[-1:] != [_NUMBER - 1]:
                    await asyncio.sleep(0)
                assert heard == list(range(min(heard, default=looked), _NUMBER))
                assert min(heard, default=looked) in range(before, looked + 1)


@pytest.mark.parametrize("seed", range(60))
async def test_110_watchers_get_everything_once_and_in_order(seed: int) -> None:
    await _run(seed)


@pytest.mark.long
@pytest.mark.timeout(7200)
async def test_110_a_hundred_thousand_seeded_schedules() -> None:
    first = Random().randrange(2**32)
    for seed in range(first, first + 100_000):
        await _run(seed)


async def _run(seed: int) -> None:
    try:
        await _schedule(seed)
    except BaseException as exc:
        exc.add_note(f"the schedule with the seed {seed}")
        raise


async def _schedule(seed: int) -> None:
    scenario = Scenario(seed)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(scenario.write())
        for _ in range(1 + seed % 4):
            group.create_task(scenario.watch())
        for _ in range(seed % 3):
            group.create_task(scenario.listen())
    assert scenario.engine.waiting == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_110_a_watcher_that_comes_while_the_end_is_looked_up() -> None:
    scenario = Scenario(4)
    engine, reader = scenario.engine, scenario.reader
    asked, answered = asyncio.Event(), asyncio.Event()

    async def slow_position(collection: str) -> str:
        asked.set()
        await answered.wait()
        return f"{len(engine.entries)}.0"

    async with asyncio.timeout(20), reader.using("jobs", slow_position) as feed:
        advancing = asyncio.create_task(feed.advance())
        await asked.wait()
        changes = Changes(feed, "0.0", EVERYTHING, lambda: None)
        waiting = asyncio.ensure_future(cast("Any", anext(changes)))
        while not feed.is_awaited:
            await asyncio.sleep(0)
        engine.append()
        answered.set()
        await advancing
        assert (await waiting).version == 0


async def test_113_all_end_with_an_error_of_their_own() -> None:
    scenario = Scenario(1)
    engine, reader = scenario.engine, scenario.reader

    async def watch() -> None:
        async with reader.using("jobs", engine.feed_position) as feed:
            changes = Changes(feed, "0.0", EVERYTHING, lambda: None)
            while True:
                await anext(changes)

    watchers = [asyncio.create_task(watch()) for _ in range(5)]
    await asyncio.sleep(0.05)
    engine.fails = True
    engine.append()
    ended = await asyncio.gather(*watchers, return_exceptions=True)
    assert [type(each) for each in ended] == 5 * [FeedExpiredError]
    assert len({id(each) for each in ended}) == 5


async def test_113_a_fault_of_an_engine_leaves_nobody_waiting() -> None:
    scenario = Scenario(2)
    engine, reader = scenario.engine, scenario.reader

    async def failing(*given: object) -> None:
        raise KeyError("a fault")

    async def watch() -> None:
        async with reader.using("jobs", engine.feed_position) as feed:
            await anext(Changes(feed, "0.0", EVERYTHING, lambda: None))

    cast("Any", engine).feed_changed = failing
    async with asyncio.timeout(20):
        with pytest.raises(UnavailableError, match="KeyError"):
            await watch()


@pytest.mark.parametrize("how", ["fails", "hangs"])
async def test_113_a_feed_that_cannot_be_read_holds_up_no_other(how: str) -> None:
    jobs, machines = (Collection(each, key="id", feed=60) for each in ("jobs", "machines"))
    async with asyncio.timeout(20), open_store("memory:", collections=[jobs, machines]) as store:
        read_feed, is_broken = store.engine.read_feed, True

        async def reading(collection: str, since: str, limit: int) -> FeedBatch:
            if collection == "jobs" and is_broken:
                if how == "hangs":
                    await asyncio.Event().wait()
                raise UnavailableError("not now")
            return await read_feed(collection, since, limit)

        async with store.watch("jobs") as broken, store.watch("machines") as others:
            waiting = [asyncio.ensure_future(cast("Any", anext(each))) for each in (broken, others)]
            await asyncio.sleep(0.05)  # they wait at the shared ends
            cast("Any", store.engine).read_feed = reading
            await store.create_entity("jobs", {"id": "j"})
            await store.create_entity("machines", {"id": "m1"})
            assert (await waiting[1]).id == "m1"
            await store.create_entity("machines", {"id": "m2"})
            assert (await anext(others)).id == "m2"
            if how == "fails":
                is_broken = False
                assert (await waiting[0]).id == "j"
            waiting[0].cancel()


async def test_113_a_feed_that_was_read_late_puts_off_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hf_async_store.feed_reading._READ_SECONDS", 0.0)
    released, cancelled = asyncio.Event(), asyncio.Event()
    waits: list[list[str]] = []

    class Slow:
        async def feed_changed(self, positions: Mapping[str, str], seconds: float) -> None:
            waits.append(list(positions))
            if len(waits) > 1:
                try:
                    await asyncio.Event().wait()
                finally:
                    cancelled.set()

        async def read_feed(self, collection: str, since: str, limit: int) -> FeedBatch:
            if collection == "late":
                await released.wait()
            return FeedBatch([], since)

    async def position(collection: str) -> str:
        return "0"

    async with asyncio.timeout(20), AsyncExitStack() as stack:
        reader = FeedReader(cast("Engine", Slow()))
        for name in ("late", "other"):
            feed = await stack.enter_async_context(reader.using(name, position))
            await stack.enter_async_context(feed.listening(None, lambda entry: None))
        while len(waits) < 2:
            await asyncio.sleep(0)
        assert waits[1] == ["other"]
        asyncio.get_running_loop().call_soon(released.set)
        await released.wait()  # in the same iteration, the reading has ended
        reader.follow("new")
        for _ in range(5):
            await asyncio.sleep(0)
        assert cancelled.is_set()


async def test_113_a_watcher_of_a_feed_that_cannot_be_read_can_leave() -> None:
    jobs = Collection("jobs", key="id", feed=60)
    async with asyncio.timeout(20), open_store("memory:", collections=[jobs]) as store:

        async def reading(collection: str, since: str, limit: int) -> FeedBatch:
            raise UnavailableError("not now")

        for _ in range(2):
            async with store.watch("jobs") as changes:
                cast("Any", store.engine).read_feed = reading
                waiting = asyncio.ensure_future(cast("Any", anext(changes)))
                await asyncio.sleep(0.05)
                waiting.cancel()
        assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("others", [False, True])
async def test_113_a_watcher_that_is_cancelled_twice_leaves_no_task(others: bool) -> None:
    jobs, machines = (Collection(each, key="id", feed=60) for each in ("jobs", "machines"))
    async with asyncio.timeout(20), open_store("memory:", collections=[jobs, machines]) as store:
        reads = 0

        async def reading(collection: str, since: str, limit: int) -> FeedBatch:
            nonlocal reads
            reads += 1
            try:
                await asyncio.Event().wait()
            finally:
                for _ in range(5):
                    await asyncio.sleep(0)
            raise AssertionError

        async def watch() -> None:
            async with AsyncExitStack() as stack:
                names = ["jobs", "machines"] if others else ["jobs"]
                watches = [await stack.enter_async_context(store.watch(each)) for each in names]
                await asyncio.gather(*map(anext, watches))

        watching = asyncio.create_task(watch())
        await asyncio.sleep(0.05)
        cast("Any", store.engine).read_feed = reading
        await store.create_entity("jobs", {"id": "j"})
        await store.create_entity("machines", {"id": "m"})
        while not reads:
            await asyncio.sleep(0)
        while not watching.done():
            watching.cancel()
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_113_large_changes_are_read_few_at_a_time() -> None:
    scenario = Scenario(3)
    engine, reader = scenario.engine, scenario.reader
    limits: list[int] = []

    async def read_feed(collection: str, since: str, limit: int) -> FeedBatch:
        limits.append(limit)
        place = int(since.partition(".")[0])
        return FeedBatch(engine.entries[place : place + limit], f"{place + limit}.0")

    cast("Any", engine).read_feed = read_feed
    for _ in range(300):
        engine.append()
        cast("Any", engine.entries[-1].after).entity["text"] = "x" * 300_000
    async with reader.using("jobs", engine.feed_position) as feed:
        changes = Changes(feed, "0.0", EVERYTHING, lambda: None)
        for number in range(200):
            change = await anext(changes)
            assert change.version == number
        assert limits[0] == 100
        assert set(limits[1:]) == {3}
        kept = cast("Any", feed)._kept
        assert sum(len(each.entries) for each in kept.values()) * 300_000 <= 2**23


@pytest.mark.parametrize("error", [SchemaMismatchError, FeedExpiredError])
async def test_112_without_its_feed_an_entity_is_waited_for_by_reads(
    error: type[StorageError],
) -> None:
    async def failing(*given: object) -> None:
        raise error("no feed")

    jobs = Collection("jobs", key="job_id", fields=["status"], feed=60)
    async with open_store("memory:", collections=[jobs]) as store:
        await store.create_entity("jobs", {"job_id": "a"})
        for name in ("feed_position", "read_feed"):
            setattr(store.engine, name, failing)
        waiting = asyncio.create_task(store.wait_for("jobs", "a", {"status": "DONE"}, timeout=20))
        claiming = asyncio.create_task(store.claim_entities("jobs", {"status": "DONE"}, wait=20))
        await asyncio.sleep(0.05)
        with pytest.raises(error):
            async with store.watch("jobs"):
                pass
        await store.update_entity("jobs", "a", {"status": "DONE"})
        assert (await waiting)["version"] == 2
        assert [each.id for each in await claiming] == ["a"]


async def test_112_changes_before_the_call_that_come_late_do_not_count() -> None:
    """On DynamoDB, what was just written may be in the stream after its end was looked up."""
    jobs = Collection("jobs", key="job_id", fields=["status"], feed=60)
    async with asyncio.timeout(20), open_store("memory:", collections=[jobs]) as store:
        await store.create_entity("jobs", {"job_id": "beside"})
        early = await store.engine.feed_position("jobs")
        await store.create_entity("jobs", {"job_id": "a", "status": "NEW"})
        for status in ("DONE", "NEW"):
            await store.update_entity("jobs", "a", {"status": status})
        await store.delete_entity("jobs", "a")
        await store.create_entity("jobs", {"job_id": "a", "status": "NEW"})
        position, asked = store.engine.feed_position, 0

        async def late(collection: str) -> str:
            nonlocal asked
            asked += 1
            return early if asked == 1 else await position(collection)

        cast("Any", store.engine).feed_position = late
        waiting = asyncio.create_task(store.wait_for("jobs", "a", {"status": "DONE"}, timeout=20))
        await asyncio.sleep(0.3)
        assert asked
        assert not waiting.done()
        await store.update_entity("jobs", "a", {"status": "DONE"})
        assert (await waiting)["version"] == 2
        waiting = asyncio.create_task(store.wait_for("jobs", "a", {"status": "NEW"}, timeout=20))
        await asyncio.sleep(0.1)
        await store.delete_entity("jobs", "a")
        with pytest.raises(EntityNotFoundError):
            await waiting


async def test_112_changes_that_are_heard_after_a_later_look_count() -> None:
    """An entity is looked at when its changes are followed; what is heard then may be older than that."""
    jobs = Collection("jobs", key="job_id", fields=["status"], feed=60)
    async with asyncio.timeout(20), open_store("memory:", collections=[jobs]) as store:
        await store.create_entity("jobs", {"job_id": "a", "status": "NEW"})
        fetch, read_feed = store.engine.fetch, store.engine.read_feed
        looks, looked = 0, asyncio.Event()

        async def looking(keys: Sequence[Key]) -> list[Record | None]:
            nonlocal looks
            looks += 1
            if looks == 2:
                for status in ("DONE", "NEW"):
                    await store.update_entity("jobs", "a", {"status": status})
                found = await fetch(keys)
                asyncio.get_running_loop().call_later(0.05, looked.set)
                return found
            return await fetch(keys)

        async def reading(*given: Any) -> FeedBatch:
            if looks == 2:
                await looked.wait()
            return await read_feed(*given)

        cast("Any", store.engine).fetch = looking
        cast("Any", store.engine).read_feed = reading
        found = await store.wait_for("jobs", "a", {"status": "DONE"}, timeout=5)
        assert found["version"] == 2
        assert looks == 2
