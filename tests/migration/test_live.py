"""Live migration: applications in several processes, and killed migration processes and applications."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from live_applications import (
    ACCOUNTS,
    BALANCE,
    COLLECTIONS,
    COUNTERS,
    STEPS,
    are_equal,
    fill,
    hurry,
)
from support import KINDS, place_of

from hf_async_store import (
    ClaimLostError,
    Collection,
    CorruptionError,
    Index,
    MigrationError,
    StorageStrategy,
    StoreRelocatedError,
    TargetNotEmptyError,
    UnavailableError,
    migration_routing,
    open_store,
)
from hf_async_store.changes import EncodedPut, PutForm
from hf_async_store.migration import live
from hf_async_store.migration.live import LiveMigration
from hf_async_store.values import Key
from hf_async_store_bench.acked_writes import AckedWrites

if TYPE_CHECKING:
    from conftest import Place

    from hf_async_store.driver import Engine
    from hf_async_store.migration_routing import MigrationState

CREW = [sys.executable, str(Path(__file__).with_name("live_applications.py"))]
_MOST_RUNS = 5
_SHORT = {("json-single", "postgresql")}
PAIRS = [
    each if each in _SHORT else pytest.param(*each, marks=pytest.mark.long)
    for each in itertools.permutations(KINDS, 2)
]


@pytest.fixture(autouse=True)
def short_leases(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use short leases in this process and in those that it starts."""
    kept = (
        migration_routing.LEASE_SECONDS,
        migration_routing.ABANDONED_SWITCH_SECONDS,
        live.SWITCH_SECONDS,
    )
    hurry()
    yield
    migration_routing.LEASE_SECONDS = live.LEASE_SECONDS = kept[0]  # type: ignore[misc]
    migration_routing.ABANDONED_SWITCH_SECONDS, live.SWITCH_SECONDS = kept[1:]  # type: ignore[misc]


class Crew:
    """The application processes of one test, and their records of acknowledged writes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: list[subprocess.Popen[str]] = []
        self._notes: list[Path] = []

    def begin(self, url: str, seed: int, *follow_moves: str) -> subprocess.Popen[str]:
        notes = self._folder / f"notes-{seed}"
        process = subprocess.Popen(
            [*CREW, "work", url, str(notes), str(seed), *follow_moves],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        self._running.append(process)
        self._notes.append(notes)
        return process

    def kill(self, process: subprocess.Popen[str]) -> None:
        process.send_signal(signal.SIGKILL)
        process.wait()
        self._close(process)

    def end(self, **least: int) -> None:
        """End the processes, as soon as they have recorded more than so many writes of each kind."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            done = Counter(each["what"] for each in self.notes())
            if all(done[what] > number for what, number in least.items()):
                break
            time.sleep(0.2)
        for each in self._running:
            if each.poll() is None:
                assert each.stdin is not None
                each.stdin.close()
        for each in self._running:
            code = each.wait(30)
            assert code in (0, -signal.SIGKILL)
            self._close(each)

    def abandon(self) -> None:
        for each in self._running:
            if each.poll() is None:
                each.kill()
                each.wait()
            self._close(each)

    def _close(self, process: subprocess.Popen[str]) -> None:
        for pipe in (process.stdin, process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()

    def notes(self) -> list[dict[str, Any]]:
        found = []
        for path in self._notes:
            for line in path.read_text().splitlines():
                try:
                    found.append(json.loads(line))
                except ValueError:
                    continue  # the incomplete last line of a killed process
        return found


@pytest.fixture
def crew(tmp_path: Path) -> Iterator[Crew]:
    made = Crew(tmp_path)
    yield made
    made.abandon()


def mover(action: str, source: str, target: str, *kill: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CREW, "move", action, source, target, *kill],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def moved(action: str, source: str, target: str) -> None:
    """Run an action, as an operator would: again, if the error says so, on a machine that is too busy for
    the switch."""
    for _ in range(_MOST_RUNS):
        done = mover(action, source, target)
        if "Try again when there are fewer writes" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr


async def prepared(url: str) -> None:
    async with open_store(url, collections=COLLECTIONS) as store:
        await fill(store)


async def audit(
    store: StorageStrategy, notes: list[dict[str, Any]], *, killed: int = 0
) -> Counter[str]:
    """Check that no acknowledged write is lost, and that nothing else is stored.

    Args:
        killed: applications that may have made one more write of each kind than they recorded.
    """
    done = Counter(each["what"] for each in notes)
    assert not done["wrong"], [each for each in notes if each["what"] == "wrong"]
    for number in range(COUNTERS):
        name = f"counter-{number}"
        counter = await store.get_entity("templates", name)
        assert counter is not None
        acknowledged = sum(each["what"] == "count" and each["name"] == name for each in notes)
        maybe = sum(each["what"] == "maybe count" and each["name"] == name for each in notes)
        writes = AckedWrites(acknowledged, maybe + killed)
        assert writes.wrong_count(counter["uses"]) is None
        assert counter["version"] == counter["uses"] + 1  # type: ignore[operator]
    accounts = await store.query_entities("accounts")
    assert sum(each["balance"] for each in accounts) == ACCOUNTS * BALANCE  # type: ignore[misc]
    lives: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for each in notes:
        if "name" in each and each["name"].startswith("m-"):
            lives[each["name"]].append(each)
    found = {each["machine_id"]: each for each in await store.query_entities("machines")}
    unsure = 0
    for name, life in lives.items():
        last = life[-1]["what"]
        if last.startswith("maybe"):
            continue
        entity = found.get(name)
        if last == "delete":
            assert entity is None, name
            continue
        n = life[-1].get("n", 0)
        if entity is None or entity["n"] != n:
            unsure += 1  # the killed application was changing or deleting it
            continue
        assert entity["version"] == n + 1
    assert unsure <= 2 * killed
    strangers = [each for each in found if str(each).startswith("m-") and each not in lives]
    assert len(strangers) <= 2 * killed
    assert sum(str(each).startswith("old-") for each in found) == 400
    return done


def bound(notes: list[dict[str, Any]]) -> None:
    """Check that no operation waited longer than docs/live-migration.md says.

    The test processes time out earlier than applications do; the difference is tolerance for a busy
    machine.
    """
    assert max(each["seconds"] for each in notes if each["what"] == "took") < 17


# -- a complete migration -------------------------------------------------------------------


@pytest.mark.parametrize(("source_kind", "target_kind"), PAIRS)
async def test_nothing_acknowledged_is_lost_through_switch_rollback_and_finalize(
    source_kind: str, target_kind: str, place: Place, crew: Crew
) -> None:
    source, target = place(source_kind, "a"), place(target_kind, "b")
    await prepared(source)
    for seed, url in enumerate((source, source, source)):
        crew.begin(url, seed, target)
    time.sleep(0.3)
    moved("start", source, target)
    crew.begin(target, 3, source)  # with either URL
    time.sleep(0.5)
    moved("rollback", source, target)
    time.sleep(0.5)
    moved("start", source, target)
    time.sleep(0.3)
    moved("finalize", source, target)
    time.sleep(0.5)
    crew.end(count=200, transfer=100)
    notes = crew.notes()
    async with open_store(target, collections=COLLECTIONS, follow_moves=[source]) as store:
        done = await audit(store, notes)
    assert done["count"] > 200
    assert done["transfer"] > 100
    assert done["maybe count"] + done["maybe transfer"] + done["maybe create"] < 20
    bound(notes)
    async with open_store(source, collections=COLLECTIONS, follow_moves=[target]) as store:
        with pytest.raises(StoreRelocatedError) as caught:
            await store.get_entity("templates", "t-1")
        assert caught.value.new_url == place_of(target)


async def test_a_program_returns_to_the_store_that_it_opened(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That store needs no entry in its own `follow_moves`, in any step of several migrations."""
    source, target = place("json-single", "a"), place("sqlite", "b")
    await prepared(source)
    wait, programs, writes = live._wait_for_leases, list[StorageStrategy](), 0

    async def write() -> None:
        nonlocal writes
        for each in programs:
            await each.modify_entity(
                "accounts", "a-0", lambda e: {**e, "balance": e["balance"] + 1}
            )  # type: ignore[operator]
            writes += 1

    async with AsyncExitStack() as stack:

        async def program(url: str, other: str) -> None:
            store = open_store(url, collections=COLLECTIONS, follow_moves=[other])
            programs.append(await stack.enter_async_context(store))

        async def moved_to(one: str, other: str, *actions: str) -> None:
            async with LiveMigration(one, other, collections=COLLECTIONS) as move:

                async def wait_and_write() -> None:
                    await wait()
                    if move._current().phase not in ("CUTTING_OVER", "ROLLING_BACK"):
                        await write()

                monkeypatch.setattr(live, "_wait_for_leases", wait_and_write)
                for action in actions:
                    await getattr(move, action)()
                    await write()

        await program(source, target)
        await moved_to(source, target, "start")
        await program(target, source)
        await moved_to(source, target, "rollback", "start", "finalize")
        await moved_to(target, source, "start", "finalize")
        found = await programs[0].get_entity("accounts", "a-0")
        assert found is not None
        assert found["balance"] == BALANCE + writes


async def test_records_that_name_each_other_are_not_followed_without_end(place: Place) -> None:
    source, target = place("json-single", "a"), place("sqlite", "b")
    await prepared(source)
    async with (
        open_store(source, collections=COLLECTIONS, follow_moves=[source, target]) as store,
        LiveMigration(source, target, collections=COLLECTIONS) as move,
    ):
        await move.start()
        assert await store.get_entity("accounts", "a-0")
        await move._change_state(phase="FINALIZED", other_location=move.source_location)
        await live._wait_for_leases()
        with pytest.raises(CorruptionError, match="name each other"):
            await store.get_entity("accounts", "a-0", timeout=20.0)


async def test_what_a_program_that_may_not_follow_is_told(place: Place) -> None:
    source, target = place("json-single", "a"), place("json-split", "b")
    await prepared(source)
    async with (
        open_store(source, collections=COLLECTIONS) as old,
        open_store(target, collections=COLLECTIONS) as new,
        LiveMigration(source, target, collections=COLLECTIONS) as move,
    ):
        await move.start(cut_over=False)
        assert await old.get_entity("accounts", "a-0")
        await move.start()
        for store in (old, new):  # either would raise the error in the place of the other
            with pytest.raises(StoreRelocatedError, match="follow_moves=OTHER") as caught:
                await store.get_entity("accounts", "a-0")
            assert "open that store" not in str(caught.value)
        await move.finalize()
        with pytest.raises(StoreRelocatedError, match="was migrated to .*; open that store"):
            await old.get_entity("accounts", "a-0")
        assert await new.get_entity("accounts", "a-0")


# -- crashes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step",
    [each if each == "copying" else pytest.param(each, marks=pytest.mark.long) for each in STEPS],
)
async def test_a_migration_process_killed_at_each_step_to_the_target(
    step: str, place: Place, crew: Crew
) -> None:
    source, target = place("json-single", "a"), place("json-split", "b")
    await prepared(source)
    for seed in range(2):
        crew.begin(source, seed, target)
    done = mover("start", source, target, step)
    assert done.returncode == -signal.SIGKILL, done.stderr
    time.sleep(0.3)
    moved("start", source, target)
    time.sleep(0.3)
    crew.end()
    async with open_store(source, collections=COLLECTIONS, follow_moves=[target]) as store:
        await audit(store, crew.notes())
    moved("finalize", source, target)
    async with open_store(target, collections=COLLECTIONS, follow_moves=[source]) as store:
        await audit(store, crew.notes())


@pytest.mark.parametrize(
    "step",
    [
        "cut",
        *(
            pytest.param(each, marks=pytest.mark.long)
            for each in ("copying", "repaired", "drained", "flipped")
        ),
    ],
)
async def test_a_migration_process_killed_at_each_step_of_a_rollback(
    step: str, place: Place, crew: Crew
) -> None:
    source, target = place("json-single", "a"), place("json-split", "b")
    await prepared(source)
    for seed in range(2):
        crew.begin(source, seed, target)
    moved("start", source, target)
    time.sleep(0.4)
    done = mover("rollback", source, target, step)
    assert done.returncode == -signal.SIGKILL, done.stderr
    time.sleep(0.3)
    moved("rollback", source, target)
    time.sleep(0.3)
    crew.end()
    async with open_store(source, collections=COLLECTIONS, follow_moves=[target]) as store:
        await audit(store, crew.notes())
    async with open_store(target, collections=COLLECTIONS, follow_moves=[source]) as store:
        with pytest.raises(StoreRelocatedError):
            await store.get_entity("templates", "t-1")


async def test_applications_end_a_cut_over_after_its_process_was_killed(
    place: Place, crew: Crew
) -> None:
    source, target = place("json-single", "a"), place("json-split", "b")
    await prepared(source)
    crew.begin(source, 0, target)
    done = mover("start", source, target, "cut")
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = Counter(each["what"] for each in crew.notes())["count"]
    time.sleep(migration_routing.ABANDONED_SWITCH_SECONDS + 1.5)
    assert Counter(each["what"] for each in crew.notes())["count"] > before
    crew.end()
    bound(crew.notes())
    async with open_store(source, collections=COLLECTIONS, follow_moves=[target]) as store:
        await audit(store, crew.notes())
    moved("abort", source, target)


@pytest.mark.parametrize(
    "seconds", [0.9, *(pytest.param(each, marks=pytest.mark.long) for each in (0.2, 1.5, 2.5))]
)
async def test_an_application_killed_during_a_migration_does_not_affect_others(
    seconds: float, place: Place, crew: Crew
) -> None:
    source, target = place("json-split", "a"), place("json-single", "b")
    await prepared(source)
    victim = crew.begin(source, 0, target)
    crew.begin(source, 1, target)
    moving_on = subprocess.Popen(
        [*CREW, "move", "start", source, target], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    time.sleep(seconds)
    crew.kill(victim)
    _, said = moving_on.communicate(timeout=60)
    assert moving_on.returncode == 0, said
    time.sleep(0.3)
    crew.end()
    moved("finalize", source, target)
    async with open_store(target, collections=COLLECTIONS, follow_moves=[source]) as store:
        await audit(store, crew.notes(), killed=1)


async def test_an_application_suspended_during_the_cut_over_loses_nothing(
    place: Place, crew: Crew
) -> None:
    """It resumes during its writes, with an expired lease."""
    source, target = place("json-single", "a"), place("json-split", "b")
    await prepared(source)
    sleeper = crew.begin(source, 0, target)
    crew.begin(source, 1, target)
    mover_process = subprocess.Popen([*CREW, "move", "start", source, target])
    time.sleep(0.9)
    os.kill(sleeper.pid, signal.SIGSTOP)
    time.sleep(2.5)
    os.kill(sleeper.pid, signal.SIGCONT)
    mover_process.wait(60)
    time.sleep(0.5)
    if mover_process.returncode != 0:  # it was suspended while it held the lock of the store
        moved("start", source, target)
    crew.end()
    moved("finalize", source, target)
    async with open_store(target, collections=COLLECTIONS, follow_moves=[source]) as store:
        await audit(store, crew.notes())


async def test_a_superseded_migration_process_writes_nothing(place: Place) -> None:
    source, target = place("json-single", "a"), place("json-split", "b")
    await prepared(source)
    async with (
        LiveMigration(source, target, collections=COLLECTIONS) as old,
        LiveMigration(source, target, collections=COLLECTIONS) as new,
    ):
        await old.start(cut_over=False)
        await new.start(cut_over=False)
        async with open_store(source, collections=COLLECTIONS, follow_moves=[target]) as store:
            await store.update_entity("accounts", "a-0", {"balance": 1})
        with pytest.raises(MigrationError, match="another coordinator"):
            await old._catch_up_once(old._source, old._target)
        with pytest.raises(MigrationError, match="another coordinator"):
            await old._switch(old._source, old._target, "CUTTING_OVER", "SWITCHED")
        await new.start()
        assert (await new.status()).phase == "SWITCHED"
        assert await are_equal(new)


async def test_an_outage_of_the_target_is_not_another_coordinator(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = place("json-single", "a"), place("json-split", "b")
    await prepared(source)
    async with LiveMigration(source, target, collections=COLLECTIONS) as move:
        await move.start(cut_over=False)

        async def unavailable(changes: object) -> None:
            raise UnavailableError("the target is down")

        monkeypatch.setattr(move._target, "write_each", unavailable)
        with pytest.raises(UnavailableError, match="the target is down"):
            await move.start(cut_over=False)
        monkeypatch.undo()
        read = move._read_state

        async def read_too_early(engine: Engine) -> MigrationState | None:
            state = await read(engine)
            if engine is move._target and state is not None:
                await live._write(engine, state.put(epoch=state.epoch + 1))
            return state

        monkeypatch.setattr(move, "_read_state", read_too_early)
        with pytest.raises(MigrationError, match="another coordinator is taking"):
            await move.start(cut_over=False)


# -- refusals -------------------------------------------------------------------------------


async def test_invalid_sources_and_targets_are_refused(place: Place) -> None:
    source, target = place("json-single", "a"), place("json-split", "b")
    with pytest.raises(MigrationError, match="cannot be the source"):
        async with LiveMigration("memory:", target):
            pass
    await prepared(source)
    async with open_store(target) as store:
        await store.create_entity("templates", {"template_id": "own"})
    async with LiveMigration(source, target, collections=COLLECTIONS) as move:
        with pytest.raises(TargetNotEmptyError, match="templates 'own'"):
            await move.start()
        with pytest.raises(MigrationError, match="no live migration between"):
            await move.finalize()
        assert (await move.status()).phase is None


async def test_write_file_is_refused_during_a_migration(place: Place) -> None:
    from hf_async_store import JSONStorageStrategy

    source, target = place("json-single", "a"), place("json-split", "b")
    await prepared(source)
    async with LiveMigration(source, target, collections=COLLECTIONS) as move:
        await move.start(cut_over=False)
        async with JSONStorageStrategy(source, collections=COLLECTIONS) as store:
            with pytest.raises(StoreRelocatedError, match="does not follow a live migration"):
                await store.write_file({})
        await move.abort()
        async with JSONStorageStrategy(source, collections=COLLECTIONS) as store:
            await store.write_file(await store.read_file())


async def test_unique_values_that_move_during_a_migration(place: Place) -> None:
    fields, unique = ["name"], [Index("name", unique=True)]
    hosts = [Collection("hosts", key="host_id", fields=fields, indexes=unique)]
    source, target = place("json-single", "a"), place("sqlite", "b")
    async with open_store(source, collections=hosts) as store:
        new = [{"host_id": f"h-{n}", "name": f"web-{n}"} for n in range(6)]
        await store.create_entities("hosts", new)
    async with LiveMigration(source, target, collections=hosts) as move:
        await move.start(cut_over=False)
        async with open_store(source, collections=hosts) as store:
            await store.delete_entity("hosts", "h-5")
            await store.create_entity("hosts", {"host_id": "a", "name": "web-5"})
            for entity_id, name in (("h-0", None), ("h-1", "web-0"), ("h-0", "web-1")):
                await store.update_entity("hosts", entity_id, {"name": name})
            for entity_id, name in (("h-4", "other"), ("h-3", "web-4"), ("h-2", "web-3")):
                await store.update_entity("hosts", entity_id, {"name": name})
            expected = await store.query_entities("hosts", order_by="host_id")
        await move.start()
        await move.finalize()
    async with open_store(target, collections=hosts) as store:
        assert await store.query_entities("hosts", order_by="host_id") == expected


@pytest.mark.parametrize("kind", ["sqlite", "dynamodb"])
async def test_many_unique_values_move_during_a_migration(place: Place, kind: str) -> None:
    unique = [Index("name", unique=True), Index("address", unique=True)]
    hosts = [Collection("hosts", key="host_id", fields=["name", "address"], indexes=unique)]

    def host(entity_id: str, number: int) -> dict[str, object]:
        return {"host_id": entity_id, "name": f"web-{number}", "address": f"::{number}"}

    source, target = place("json-single", "a"), place(kind, "b")
    async with open_store(source, collections=hosts) as store:
        await store.create_entities("hosts", [host(f"h-{n}", n) for n in range(150)])
    async with LiveMigration(source, target, collections=hosts) as move:
        await move.start(cut_over=False)
        async with open_store(source, collections=hosts) as store:
            # A rotation, and new entities with the values of others.
            await store.delete_entity("hosts", "h-0")
            for number in range(1, 40):
                await store.save_entity("hosts", host(f"h-{number}", number - 1))
            await store.delete_entities("hosts", [f"h-{n}" for n in range(40, 150)])
            await store.create_entities("hosts", [host(f"a-{n}", n) for n in range(39, 150)])
            expected = await store.query_entities("hosts", order_by="host_id")
        await move.start()
        await move.finalize()
    async with open_store(target, collections=hosts) as store:
        assert await store.query_entities("hosts", order_by="host_id") == expected


@pytest.mark.parametrize("target_kind", ["json-split", "sqlite"])
async def test_a_migration_ends_claims(target_kind: str, place: Place) -> None:
    jobs = [Collection("jobs", key="job_id", fields=["status"])]
    source, target = place("json-single", "a"), place(target_kind, "b")
    async with open_store(source, collections=jobs, follow_moves=[target]) as store:
        await store.create_entities("jobs", [{"job_id": each, "status": "new"} for each in "ab"])
        first, second = await store.claim_entities("jobs", order_by="job_id", limit=2, lease=600.0)
        async with LiveMigration(source, target, collections=jobs) as move:
            await move.start(cut_over=False)
            await first.update({"status": "running"})
            await second.renew()
            assert await store.claim_entities("jobs") == []
            await move.start()
            for late in (first.update({"status": "late"}), first.finish(), second.renew()):
                with pytest.raises(ClaimLostError):
                    await late
            again = await store.claim_entities("jobs", order_by="job_id", limit=2)
            assert [each.entity["status"] for each in again] == ["running", "new"]
            assert all(
                new.token > old.token for new, old in zip(again, (first, second), strict=True)
            )
            await again[0].finish({"status": "done"})
            await move.finalize()
    async with open_store(target, collections=jobs) as store:
        assert await store.count_by("jobs", "status") == [("done", 1), ("new", 1)]


async def test_a_cancelled_write_during_which_a_migration_begins_is_copied(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [Collection("jobs", key="job_id", fields=["status"])]
    source, target = place("json-single", "a"), place("sqlite", "b")
    async with open_store(source, collections=jobs, follow_moves=[target]) as store:
        router: Any = store.engine
        write = router.original.write_cancellable

        async def cancelled_late(changes: Any) -> None:
            await write(changes)
            async with LiveMigration(source, target, collections=jobs) as move:
                await move.start(cut_over=False)
            await asyncio.sleep(migration_routing.LEASE_SECONDS + 0.1)
            raise asyncio.CancelledError

        await store.save_entity("jobs", {"job_id": "a", "status": "new"})
        monkeypatch.setattr(router.original, "write_cancellable", cancelled_late)
        with pytest.raises(asyncio.CancelledError):
            await store.save_entity("jobs", {"job_id": "a", "status": "done"})
        marker = migration_routing.marker_of(Key("jobs", "a")).key
        [marked] = await router.engine_of(router.last_route).fetch([marker])
        assert marked is not None


async def test_a_batch_that_was_encoded_before_a_switch_is_written_after_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was encoded for a JSON store, and waited in the queue until another store was the active one."""
    jobs = [Collection("jobs", key="job_id", fields=["status"])]
    async with open_store(place("sqlite", "a"), collections=jobs) as store:
        await store.save_entity("jobs", {"job_id": "0", "status": "old"})
        monkeypatch.setattr(store, "_takes_encoded", lambda collection: True)
        batch = [{"job_id": str(each), "status": "new"} for each in range(9)]
        assert await store.save_entities("jobs", batch) == [2, *[1] * 8]
        assert await store.count_by("jobs", "status") == [("new", 9)]


@pytest.mark.long  # the next test is the short form
async def test_a_batch_that_waits_during_a_switch_is_written_to_the_other_store(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON takes the entities of a batch as text, and a batch that waits was validated for it."""
    jobs = [Collection("jobs", key="job_id", fields=["status"])]
    source, target = place("json-single", "a"), place("sqlite", "b")
    batch = [{"job_id": f"j-{n}", "status": "new"} for n in range(20)]
    async with open_store(source, collections=jobs, follow_moves=[target]) as store:
        router: Any = store.engine
        write, waiting = router.original.write_each, asyncio.Event()

        async def late(changes: Any) -> Any:
            waiting.set()
            async with LiveMigration(source, target, collections=jobs) as move:
                await move.start()
            await asyncio.sleep(migration_routing.LEASE_SECONDS + 0.1)
            return await write(changes)

        await store.save_entity("jobs", {"job_id": "a", "status": "new"})
        monkeypatch.setattr(router.original, "write_each", late)
        first = asyncio.create_task(store.save_entity("jobs", {"job_id": "a", "status": "late"}))
        await waiting.wait()
        written = asyncio.create_task(store.save_entities("jobs", batch))
        with pytest.raises(UnavailableError, match="switched to another store"):
            await first
        assert await written == [1] * 20
        assert await store.count_entities("jobs") == 21
        async with LiveMigration(source, target, collections=jobs) as move:
            await move.finalize()
    async with open_store(target, collections=jobs) as store:
        assert await store.count_entities("jobs") == 21


@pytest.mark.parametrize("kind", ["json-single", "sqlite"])
async def test_a_batch_that_was_encoded_for_another_store_is_decoded(
    kind: str, place: Place
) -> None:
    jobs = [Collection("jobs", key="job_id", fields=["status"])]
    at = "2026-01-01T00:00:00.000000Z"
    form = PutForm(f',"updated_at":"{at}"}}'.encode(), has_created_at=False, parents={})
    puts = [
        EncodedPut(
            Key("jobs", f"j-{n}"), {}, at, text=b'{"job_id":"j-%d","status":"x"}' % n, form=form
        )
        for n in range(10)
    ]
    async with open_store(place(kind, "a"), collections=jobs) as store:
        assert await store.engine.write_each(puts) == [1] * 10
        assert await store.engine.write_unblocked(lambda: puts) == [2] * 10
        stored = {"job_id": "j-0", "status": "x", "version": 2, "created_at": at, "updated_at": at}
        assert await store.get_entity("jobs", "j-0") == stored
