"""A run: a first visit to every load, where all systems take turns; then every sweep, the scenarios, and
more visits wherever the figures are least sure. So what is short of time has something of everything.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final, TypeAlias, TypeVar

from hf_async_store_bench import resource_usage
from hf_async_store_bench.environments import Environments
from hf_async_store_bench.executor import Executor
from hf_async_store_bench.messages import Load, SystemUnderTest
from hf_async_store_bench.results import Cell, Results, cell_of
from hf_async_store_bench.scaling import scaling
from hf_async_store_bench.scenarios import SCENARIOS
from hf_async_store_bench.settings import Settings
from hf_async_store_bench.statistics import uncertainty
from hf_async_store_bench.systems import missing
from hf_async_store_bench.worker_group import WorkerGroup
from hf_async_store_bench.workloads import WORKLOADS

_SURE: Final = 0.03  # half of an interval, as a part of the figure: narrower it need not become
_VISITS: Final = 4  # to one load: one that is never sure must not have all the time that there is
_LOADS_SHARE: Final = 0.75  # of the budget, at most: on a slow machine, too, sweeps have some
_NO_TIME: Final = "no time was left"

Told: TypeAlias = Callable[[str], None]
_Part = TypeVar("_Part")


def tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


class Run:
    """One run; `whole` is the story. `tell` is given one line about each step."""

    def __init__(
        self,
        settings: Settings,
        systems: Sequence[SystemUnderTest],
        environments: Environments,
        tell: Told,
    ) -> None:
        self._settings = settings
        self._budget = math.inf if settings.budget is None else settings.budget
        self._tell = tell
        self._started = time.monotonic()
        self._cells: dict[Load, dict[str, Cell]] = {}
        self._visits: dict[Load, list[float]] = {}
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.results = Results(made_at=now, mode=settings.mode)
        self._executor = Executor(settings, environments, self.results)
        self._systems = []
        for each in systems:
            if why := missing(each):
                self._executor.skip(each.name, why)
            else:
                self._systems.append(each)

    async def whole(self) -> Results:
        """Measure all that there is time for."""
        results = self.results
        before = resource_usage.load_average()
        results.machine = await asyncio.to_thread(resource_usage.machine)
        results.versions = resource_usage.versions()
        await self._visit_all()
        await self._sweep_all()
        await self._measure_scenarios()
        if self._settings.again:
            await self._visit_again()
        for cells in self._cells.values():
            results.cells += [each for each in cells.values() if each.rounds or each.failures]
        results.seconds = round(self._spent(), 1)
        results.machine["load"] = f"{before} before, {resource_usage.load_average()} after"
        return results

    def _spent(self) -> float:
        return time.monotonic() - self._started

    async def _visit_all(self) -> None:
        first = self._settings.first_share
        weights = {each: len(self._systems_of(each)) for each in self._settings.loads}
        for load, seconds in self._shares(weights, self._budget * first):
            if self._spent() > self._budget * max(first, _LOADS_SHARE):
                self._executor.skip(load.name, _NO_TIME)
            else:
                await self._visit(load, seconds)

    async def _sweep_all(self) -> None:
        strategies = [each for each in self._systems if each.role == "strategy"]
        weights = {each: each.share for each in self._settings.series}
        part = min(self._settings.first_share + sum(weights.values()), 1.0)
        for series, seconds in self._shares(weights, self._budget * part):
            found = await scaling(series, strategies, self._executor, seconds, self._tell)
            self.results.sweeps += found

    def _shares(
        self, weights: Mapping[_Part, float], until: float
    ) -> Iterator[tuple[_Part, float]]:
        """Each part with its seconds; what one does not need of them is for the others."""
        total = sum(weights.values())
        for part, weight in weights.items():
            left = max(until - self._spent(), 0.0)
            yield part, left * weight / total if weight else left
            total -= weight

    async def _measure_scenarios(self) -> None:
        """Each as far as there is time for it."""
        here = {each.name: each for each in self._systems}
        for name in self._settings.scenarios:
            scenario = SCENARIOS[name]
            if scenario.system in here:
                if self._spent() + scenario.seconds > self._budget:
                    self._tell(f"{name}: {_NO_TIME}")
                    self._executor.skip(f"scenario {name}", _NO_TIME)
                else:
                    self._tell(f"{name}: {scenario.summary}")
                    await self._executor.scenario(name, here[scenario.system])

    async def _visit_again(self) -> None:
        """Where the figures are least sure, as long as there is time."""
        while True:
            unsure = {
                load: self._unsure(load)
                for load, took in self._visits.items()
                if self._spent() + max(took) < self._budget and len(took) < _VISITS
            }
            load = max(unsure, key=unsure.__getitem__, default=None)
            if load is None or unsure[load] < _SURE:
                return
            await self._visit(load, self._budget - self._spent())

    def _unsure(self, load: Load) -> float:
        """By how much a typical figure of the load may be wrong, as a part of it."""
        cells = self._cells.get(load, {}).values()
        found = sorted(uncertainty(each.rates) for each in cells if each.rate)
        return found[len(found) // 2] if found else 0.0

    async def _visit(self, load: Load, seconds: float) -> None:
        """All systems under one load, A B C A B C: the noise of the machine hits all alike. One round is
        done in any case."""
        began = time.monotonic()
        systems = self._systems_of(load)
        again = load in self._visits
        self._tell(f"{load.name}: {len(systems)} systems{', again' if again else ''}")
        async with self._executor.filled(systems, load, [load.workload]) as groups:
            turns = [(each, self._cell(each)) for each in await self._executor.started(groups)]
            if not turns:
                self._executor.skip(load.name, "there is nothing here to measure it on")
            for group, cell in turns:
                await self._executor.warm_up(group, cell)
            await self._rounds(turns, began + seconds)
            if not again:
                await self._steady_rounds(load, turns, began + seconds)
            for group, cell in turns:
                await self._executor.verify(group, cell)
        self._visits.setdefault(load, []).append(time.monotonic() - began)

    async def _rounds(self, turns: Sequence[tuple[WorkerGroup, Cell]], until: float) -> None:
        for number in range(self._settings.rounds):
            round_began = time.monotonic()
            first = number % max(len(turns), 1)  # who begins does not stay the same
            for group, cell in (*turns[first:], *turns[:first]):
                await self._executor.round(group, cell)
            now = time.monotonic()
            # What comes after the rounds takes about as long as one of them.
            if now + 2 * (now - round_began) > until:
                return

    async def _steady_rounds(
        self, load: Load, turns: Sequence[tuple[WorkerGroup, Cell]], until: float
    ) -> None:
        """Of the engines in any case, of the others as far as there is time, no faster."""
        most: dict[str, float] = {}
        for group, cell in sorted(turns, key=lambda each: each[1].role != "strategy"):
            if cell.role == "strategy":
                most[cell.engine] = await self._executor.steady_rounds(group, cell)
            elif time.monotonic() < until:
                highest = most.get(cell.engine, math.inf)
                await self._executor.steady_rounds(group, cell, highest)
            else:
                what = f"{load.name}: latencies of baselines and competitors"
                self._executor.skip(what, _NO_TIME)

    def _cell(self, group: WorkerGroup) -> Cell:
        cells = self._cells.setdefault(group.load, {})
        unit = WORKLOADS[group.load.workload].unit
        return cells.setdefault(group.system.name, cell_of(group.system, group.load, unit))

    def _systems_of(self, load: Load) -> list[SystemUnderTest]:
        """Those that can do it, and the competitors only in one process: they promise no more."""
        workload, compared = WORKLOADS[load.workload], self._settings.compared
        pairs = self._settings.pairs
        return [
            each
            for each in self._systems
            if (pairs is None or each.name in pairs[load.name])
            and workload.can_measure(each.load())
            and (each.role == "strategy" or compared is None or load.workload in compared)
            and (each.role != "competitor" or load.processes == 1)
        ]
