"""How cost grows with one parameter: the smallest value, the largest, then what lies between."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import msgspec

from hf_async_store_bench.executor import Executor
from hf_async_store_bench.messages import Load, SystemUnderTest
from hf_async_store_bench.results import Cell, Point, Sweep, cell_of
from hf_async_store_bench.settings import Series
from hf_async_store_bench.worker_group import WorkerGroup
from hf_async_store_bench.workloads import WORKLOADS

_ROUNDS: Final = 2


@dataclass
class Scaling:
    """One sweep of all strategies; `measured` is the story. Of the budget in seconds the first value is
    measured in any case."""

    series: Series
    strategies: Sequence[SystemUnderTest]
    executor: Executor
    budget: float

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self._skipped: dict[str, dict[str, list[str]]] = {}
        self._sweeps = {
            each: Sweep(parameter=self.series.parameter, workload=each, unit=WORKLOADS[each].unit)
            for each in self.series.workloads
        }

    async def measured(self, tell: Callable[[str], None]) -> list[Sweep]:
        """A sweep for each workload. What was left out is told once for all of them."""
        parameter, workloads = self.series.parameter, self.series.workloads
        for number, value in enumerate(ends_first(self.series.values)):
            changed = {parameter: value, "workload": workloads[0]}
            load = msgspec.structs.replace(self.series.load, **changed)
            chosen = self._chosen(load, value, first=number == 0)
            if not chosen:
                continue
            tell(f"growth with {parameter} at {value:,}: {len(chosen)} systems")
            async with self.executor.filled(chosen, load, workloads) as groups:
                for group in groups:
                    await self._points(group, value)
        self._tell_rest()
        return list(self._sweeps.values())

    def _chosen(self, load: Load, value: int, *, first: bool) -> list[SystemUnderTest]:
        """As many as there is time for at this value."""
        chosen: list[SystemUnderTest] = []
        for system in self.strategies:
            why = ""
            if load.processes > 1 and system.needs == "nothing":
                why = "it lives in one process"
            elif not first and self._spent() > self.budget:
                why = f"the sweep's {self.budget:.0f} s were over"
            else:
                chosen.append(system)
            if why:
                self._skipped.setdefault(why, {}).setdefault(system.name, []).append(f"{value:,}")
        return chosen

    async def _points(self, group: WorkerGroup, value: int) -> None:
        executor = self.executor
        if not await executor.started([group]):
            return
        for name, sweep in self._sweeps.items():
            load = msgspec.structs.replace(group.load, workload=name)
            if await executor.attempt(group.system, load, group.turn_to(name)):
                cell = cell_of(group.system, load, sweep.unit)
                await executor.warm_up(group, cell)
                for _ in range(_ROUNDS):
                    await executor.round(group, cell)
                await executor.verify(group, cell)
                self._note_point(sweep, cell, value)
        await group.end()

    def _note_point(self, sweep: Sweep, cell: Cell, value: int) -> None:
        where = f"{cell.system}: growth of {cell.load.name} at {sweep.parameter} {value:,}"
        self.executor.results.broken += [f"{where}: {each}" for each in cell.failures]
        if not cell.rate:
            return
        point = Point(size=value, cost=1 / cell.rate, rates=cell.rates, checked=cell.checked)
        sweep.add(cell.system, cell.engine, point)

    def _spent(self) -> float:
        return time.monotonic() - self._began

    def _tell_rest(self) -> None:
        """One line for each reason."""
        growth = f"growth with {self.series.parameter}"
        for why, systems in self._skipped.items():
            what = "; ".join(f"{name} at {', '.join(each)}" for name, each in systems.items())
            self.executor.skip(f"{growth}: {what}", why)
        self.executor.results.settings[growth] = (
            f"{', '.join(self._sweeps)}: took {self._spent():.0f} s, "
            f"of {self.budget:.0f} s that it may take"
        )


def ends_first(values: Sequence[int]) -> list[int]:
    """The smallest, the largest, then always what lies in the middle of the widest gap."""
    order = sorted({0, len(values) - 1})
    while len(order) < len(values):
        gaps = pairwise(sorted(order))
        low, high = max(gaps, key=lambda gap: (gap[1] - gap[0], -gap[0]))
        order.append((low + high) // 2)
    return [values[each] for each in order]
