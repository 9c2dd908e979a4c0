"""Groups of workers: filled, started, run and verified; what breaks is reported, not raised."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final, TypeVar

from hf_async_store_bench.concurrency import side_by_side
from hf_async_store_bench.dataset_cache import DatasetCache, settled
from hf_async_store_bench.environments import Environments
from hf_async_store_bench.messages import Load, Measurement, RoundStats, SystemUnderTest
from hf_async_store_bench.results import Cell, Results, Skipped
from hf_async_store_bench.scenarios import SCENARIOS
from hf_async_store_bench.settings import Settings
from hf_async_store_bench.targets import scenario_figures
from hf_async_store_bench.worker_group import BrokenError, SkippedError, WorkerGroup
from hf_async_store_bench.workloads import WORKLOADS

_WARM_UP: Final = 0.25  # seconds that do not count; a round's length if that is less
_STEADY_MOST: Final = 5000.0  # operations a second: beyond that, the harness would be measured
_STEADY_LEAST: Final = 4  # operations: of fewer, no percentile says anything
_FAILURES_SHOWN: Final = 10
AT_ONCE: Final = 2  # groups that are filled and started side by side: it is computing, not waiting
_Result = TypeVar("_Result")


class Executor:
    """What every part of a run measures on, and where the results are kept."""

    def __init__(self, settings: Settings, environments: Environments, results: Results) -> None:
        self.results = results
        self.datasets = DatasetCache(environments, settings.seed)
        self._settings = settings
        self._environments = environments

    def skip(self, what: str, why: str) -> None:
        skipped = Skipped(what, why)
        if skipped not in self.results.skipped:
            self.results.skipped.append(skipped)

    async def attempt(
        self, system: SystemUnderTest, load: Load, work: Awaitable[_Result]
    ) -> _Result | None:
        """What the work of a group gives; None if it cannot be done, and the reason is noted."""
        try:
            return await work
        except (SkippedError, BrokenError) as exc:
            where = f"{system.name}: {load.name}"
            if isinstance(exc, BrokenError) and system.role == "strategy":
                self.results.broken.append(f"{where}: {exc}")
            else:
                self.skip(where, str(exc))
            return None

    @asynccontextmanager
    async def filled(
        self, systems: Sequence[SystemUnderTest], load: Load, workloads: Sequence[str]
    ) -> AsyncIterator[list[WorkerGroup]]:
        """Groups with the data for these workloads, to be started; all of it is gone afterwards."""
        writes = any(WORKLOADS[each].writes for each in workloads)

        async def fill(system: SystemUnderTest) -> WorkerGroup | None:
            filling = self.datasets.group(system, load, writes=writes)
            group = await self.attempt(system, load, filling)
            if group is not None:
                stack.callback(self.datasets.give_back, group)
                stack.push_async_callback(group.end)
            return group

        async with AsyncExitStack() as stack:
            groups = await side_by_side(fill, systems, AT_ONCE)
            await settled()
            yield [each for each in groups if each is not None]

    async def started(self, groups: Sequence[WorkerGroup]) -> list[WorkerGroup]:
        started = await side_by_side(
            lambda group: self.attempt(group.system, group.load, group.start()), groups, AT_ONCE
        )
        return [each for each in started if each is not None]

    async def scenario(self, name: str, system: SystemUnderTest) -> None:
        """Measure it at each of its sizes, each run in a new process."""
        found: dict[int, dict[str, Measurement]] = {}
        for entities in self._settings.scenario_sizes or SCENARIOS[name].sizes:
            load = Load(workload=name, entities=entities)
            figures = found.setdefault(entities, {})
            for _ in range(SCENARIOS[name].runs):
                once = await self.attempt(system, load, self._scenario_once(name, system, load))
                if once is None:
                    return
                for each in once:
                    if each.system:
                        self.results.add_point(each.what, each.system, each.entities, each.samples)
                    elif figures.setdefault(each.what, each) is not each:
                        figures[each.what].samples.extend(each.samples)
        self.results.figures += scenario_figures(name, found)

    async def _scenario_once(
        self, name: str, system: SystemUnderTest, load: Load
    ) -> list[Measurement]:
        group = await self.datasets.group(system, load, writes=SCENARIOS[name].writes)
        try:
            await group.end()  # whoever filled it
            await settled()
            return await group.measure(name, self._settings.scenario_seconds)
        finally:
            await group.end()
            self.datasets.give_back(group)

    async def warm_up(self, group: WorkerGroup, cell: Cell) -> None:
        """What is slower the first time does not count."""
        await self._round(group, cell, min(_WARM_UP, self._settings.duration))

    async def round(self, group: WorkerGroup, cell: Cell) -> None:
        """As fast as it is answered."""
        cell.rounds += await self._round(group, cell, self._settings.duration)

    async def steady_rounds(self, group: WorkerGroup, cell: Cell, most: float = math.inf) -> float:
        """At fixed times, at parts of what it can do, or of `most` operations a second if that is less:
        how long does one wait then? Returns what it can do."""
        settings, done = self._settings, RoundStats.together(cell.rounds).operations
        can = done / (sum(each.seconds for each in cell.rounds) or 1)
        several = len(settings.shares) > 1
        if not settings.steady or not can or (several and group.load.workload != "save"):
            return most
        if several:  # at fixed times: the harness has more to do than without
            for each in await self._round(group, cell, settings.steady, 2 * can):
                can = each.operations / each.seconds
        for share in settings.shares:
            highest = math.inf if several else _STEADY_MOST * group.load.processes
            rate = settings.rate or min(min(can, most) * share, highest)
            # Of what is slow, enough to say something, within reason.
            length = min(max(settings.steady, 10 / rate), settings.steady * 2)
            if length * rate >= _STEADY_LEAST:
                for each in await self._round(group, cell, length, rate):
                    each.share = share
                    cell.steady.append(each)
        return can

    async def verify(self, group: WorkerGroup, cell: Cell) -> None:
        """Everything that was acknowledged is there."""
        if cell.failures:
            return
        try:
            verification = await group.verify()
            failures = verification.failures
            if failures and cell.role == "competitor":
                raise BrokenError(failures[0])  # its figures are no measure of anything
        except BrokenError as exc:
            self._broken(cell, str(exc))
            return
        cell.checked += verification.checked
        cell.failures += failures[:_FAILURES_SHOWN]
        if len(failures) > _FAILURES_SHOWN:
            cell.failures.append(f"and {len(failures) - _FAILURES_SHOWN:,} more like these")

    async def _round(
        self, group: WorkerGroup, cell: Cell, seconds: float, rate: float | None = None
    ) -> list[RoundStats]:
        """With what the server logged for it: nobody else is at work. None if it broke."""
        if cell.failures:
            return []
        before = await self._environments.logged_bytes(group.system)
        try:
            stats = await group.run(seconds, rate)
        except BrokenError as exc:
            self._broken(cell, str(exc))
            return []
        if stats.written is not None:
            stats.written += await self._environments.logged_bytes(group.system) - before
        # Nothing here makes an operation fail but a conflict, and those are counted apart.
        cell.failures += [f"wrong answer: {each}" for each in stats.wrong[:3]]
        if cell.role == "strategy":
            errors = stats.errors.items()
            cell.failures += [f"{count:,} operations ended in {name}" for name, count in errors]
        return [stats]

    def _broken(self, cell: Cell, why: str) -> None:
        """A strategy must not break; a baseline or a competitor that does is skipped."""
        if cell.role == "strategy":
            cell.failures.append(why)
        else:
            cell.rounds, cell.steady = [], []
            self.skip(f"{cell.system}: {cell.load.name}", why)
