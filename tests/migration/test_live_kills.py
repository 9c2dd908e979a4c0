"""SIGKILL of the migration process at each step, and of applications in each phase, between engines.

Each test uses one store all the time: the applications write continuously, while a migration process
is killed at one step after another. After each kill exactly one side is active, whichever URL is used.
"""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import pytest
from live_applications import COLLECTIONS
from support import place_of
from test_live import Crew, audit, crew, moved, mover, prepared, short_leases

from hf_async_store import StorageStrategy, StoreRelocatedError, open_store
from hf_async_store.migration.live import LiveMigration
from hf_async_store.values import Key

if TYPE_CHECKING:
    from conftest import Place

__all__ = ["crew", "short_leases"]

pytestmark = pytest.mark.hf_sampled(by="module")

JSON_TO_POSTGRESQL = ("json-single", "postgresql")
SQLITE_TO_DYNAMODB = ("sqlite", "dynamodb")

_START_STEPS = [
    "record-1",  # of the target
    "record-2",  # of the source: from here on the migration exists, and the next process continues it
    "taken-1",
    "taken-2",
    "amid",
    "copying",
    "copied",
    "marked",
    "repaired",
    "cut",
    "drained",
    "flipped",
]
_ROLLBACK_STEPS = [
    "taken-1",
    "taken-2",
    "amid",
    "copying",
    "marked",
    "repaired",
    "cut",
    "drained",
    "flipped",
    "record-3",  # of the target, which is abandoned
    "record-4",  # of the source: the migration has ended
]
_FINALIZE_STEPS = ["taken-1", "taken-2", "record-3", "record-1", "forgetting"]
"""The third record deactivates the source; then the first one is that of the target, which is deleted."""

_ALL_PHASES = ("COPYING", "CUTTING_OVER", "SWITCHED", "ROLLING_BACK", "FINALIZED")


def _short(steps: list[str], chosen: tuple[str, ...]) -> list[str]:
    return [each for each in steps if each in chosen]


async def one_side_counts(source: str, target: str, name: str) -> str:
    """Write with both URLs, without a migration process: all acknowledged writes are on one side, which
    is the one in the record; returns its URL."""
    refused = []
    for url, other in ((source, target), (target, source)):
        try:
            async with open_store(url, collections=COLLECTIONS, follow_moves=[other]) as store:
                await store.save_entity("templates", {"template_id": name, "by": url})
        except StoreRelocatedError as exc:
            assert exc.new_url == place_of(other)
            refused.append(url)
    assert len(refused) < 2
    async with LiveMigration(source, target, collections=COLLECTIONS) as move:
        key = Key("templates", name)
        holds = [
            (await engine.fetch([key]))[0] is not None for engine in (move._source, move._target)
        ]
        assert sum(holds) == 1, f"{name}: {holds}"
        status = await move.status()
        counts = source if holds[0] else target
        assert status.authoritative == place_of(counts)
    return counts


async def phase_of(source: str, target: str) -> str | None:
    async with LiveMigration(source, target, collections=COLLECTIONS) as move:
        record = await move._read_state(move._source)
        return None if record is None else record.phase


class Life:
    """A store that is migrated, its applications, and migration processes that are killed."""

    def __init__(self, source: str, target: str, crew: Crew) -> None:
        self.source, self.target = source, target
        self.crew = crew
        self.killed = 0
        self._seed = 0
        self._probes = 0

    async def begin(self) -> None:
        await prepared(self.source)
        for _ in range(2):
            self.join(self.source)

    def join(self, url: str) -> None:
        self.crew.begin(url, self._seed, self.source, self.target)
        self._seed += 1

    async def die(self, action: str, step: str) -> str:
        """Kill a migration process at a step; returns the URL of the side that is then active."""
        written = step.replace("taken-", "record-")
        done = mover(action, self.source, self.target, written)
        assert done.returncode == -signal.SIGKILL, f"{action}, {step}: {done.stderr}"
        return await self.counts()

    async def counts(self) -> str:
        self._probes += 1
        return await one_side_counts(self.source, self.target, f"probe-{self._probes}")

    async def end(self) -> StorageStrategy:
        """End the applications and check their records; returns the store, which is closed."""
        self.crew.end(count=50, transfer=20)
        store = await open_store(
            self.target, collections=COLLECTIONS, follow_moves=[self.source]
        ).open()
        try:
            done = await audit(store, self.crew.notes(), killed=self.killed)
            assert done["count"] > 50
            assert done["transfer"] > 20
        finally:
            await store.close()
        return store


@pytest.mark.parametrize(
    ("kinds", "start_steps", "rollback_steps", "finalize_steps"),
    [
        pytest.param(
            JSON_TO_POSTGRESQL,
            _short(_START_STEPS, ("copying",)),
            [],
            ["record-3"],
            id="json-postgresql-short",
        ),
        pytest.param(
            SQLITE_TO_DYNAMODB,
            _short(_START_STEPS, ("flipped",)),
            [],
            [],
            id="sqlite-dynamodb-short",
            marks=pytest.mark.long,
        ),
        *(
            pytest.param(
                kinds,
                _START_STEPS,
                _ROLLBACK_STEPS,
                _FINALIZE_STEPS,
                id=f"{'-'.join(kinds)}-every-step",
                marks=[pytest.mark.long, pytest.mark.timeout(900)],
            )
            for kinds in (JSON_TO_POSTGRESQL, SQLITE_TO_DYNAMODB)
        ),
    ],
)
async def test_a_migration_process_killed_at_one_step_after_another(
    kinds: tuple[str, str],
    start_steps: list[str],
    rollback_steps: list[str],
    finalize_steps: list[str],
    place: Place,
    crew: Crew,
) -> None:
    source, target = place(kinds[0], "a"), place(kinds[1], "b")
    life = Life(source, target, crew)
    await life.begin()
    for step in start_steps:
        counts = await life.die("start", step)
        assert counts == (target if step == "flipped" else source), step
    moved("start", source, target)
    assert await life.counts() == target
    life.join(target)
    if rollback_steps:
        for step in rollback_steps:
            counts = await life.die("rollback", step)
            over = step in ("flipped", "record-3", "record-4")
            assert counts == (source if over else target), step
        if rollback_steps[-1] != "record-4":
            moved("rollback", source, target)
        assert await life.counts() == source
        moved("start", source, target)
    for step in finalize_steps:
        assert await life.die("finalize", step) == target, step
    moved("finalize", source, target)
    assert await life.counts() == target
    await life.end()


@pytest.mark.parametrize(
    ("kinds", "phases"),
    [
        pytest.param(JSON_TO_POSTGRESQL, ("FINALIZED",), id="json-postgresql-short"),
        pytest.param(
            SQLITE_TO_DYNAMODB, ("COPYING",), id="sqlite-dynamodb-short", marks=pytest.mark.long
        ),
        *(
            pytest.param(
                kinds,
                _ALL_PHASES,
                id=f"{'-'.join(kinds)}-every-phase",
                marks=[pytest.mark.long, pytest.mark.timeout(900)],
            )
            for kinds in (JSON_TO_POSTGRESQL, SQLITE_TO_DYNAMODB)
        ),
    ],
)
async def test_applications_killed_in_each_phase(
    kinds: tuple[str, str], phases: tuple[str, ...], place: Place, crew: Crew
) -> None:
    source, target = place(kinds[0], "a"), place(kinds[1], "b")
    life = Life(source, target, crew)
    await life.begin()
    for phase in phases:
        victim = crew.begin(source, 1000 + life.killed, target)
        time.sleep(0.4)
        if phase == "COPYING":
            assert mover("start", source, target, "copied").returncode == -signal.SIGKILL
        elif phase == "CUTTING_OVER":
            assert mover("start", source, target, "cut").returncode == -signal.SIGKILL
        elif phase == "ROLLING_BACK":
            assert mover("rollback", source, target, "cut").returncode == -signal.SIGKILL
        else:
            moved("start", source, target)
        if phase == "FINALIZED":
            moved("finalize", source, target)
        crew.kill(victim)
        life.killed += 1
        assert await phase_of(source, target) == phase
        expected = source if phase in ("COPYING", "CUTTING_OVER") else target
        assert await life.counts() == expected, phase
    if phases[-1] != "FINALIZED":
        moved("start", source, target)
        moved("finalize", source, target)
    await life.end()
