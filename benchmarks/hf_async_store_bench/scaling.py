"""How cost grows with one parameter: the smallest value, the largest, then what lies between.

So a sweep that its budget ends still has the exponent over the whole range.
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import msgspec

from hf_async_store_bench.executor import AT_ONCE
from hf_async_store_bench.results import Curve, Point, Sweep, cell_of
from hf_async_store_bench.worker_group import BrokenError, SkippedError
from hf_async_store_bench.workloads import WORKLOADS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hf_async_store_bench.executor import Executor
    from hf_async_store_bench.messages import Load, SystemUnderTest
    from hf_async_store_bench.results import Cell
    from hf_async_store_bench.settings import Series
    from hf_async_store_bench.worker_group import WorkerGroup

_ROUNDS: Final = 2
_SECONDS: Final = 4.0
"""What a point takes beside filling, before any has told."""


class Scaling:
    """One sweep of all strategies; `measured` is the story.

    Args:
        seconds: the sweep's budget. The first value is measured in any case.
    """

    def __init__(
        self,
        series: Series,
        strategies: Sequence[SystemUnderTest],
        executor: Executor,
        seconds: float,
    ) -> None:
        self._series = series
        self._strategies = strategies
        self._executor = executor
        self._budget = seconds
        self._began = time.monotonic()
        self._took: dict[str, float] = {}
        self._skipped: dict[str, dict[str, list[str]]] = {}
        self._sweeps = {
            each: Sweep(parameter=series.parameter, workload=each, unit=WORKLOADS[each].unit)
            for each in series.workloads
        }

    async def measured(self, tell: Callable[[str], None]) -> list[Sweep]:
        """A sweep for each workload. What was left out is told once for all of them."""
        for number, value in enumerate(ends_first(self._series.values)):
            load = msgspec.structs.replace(
                self._series.load,
                workload=self._series.workloads[0],
                **{self._series.parameter: value},
            )
            chosen = self._chosen(load, value, first=number == 0)
            if not chosen:
                continue
            tell(f"growth with {self._series.parameter} at {value:,}: {len(chosen)} systems")
            async with self._executor.filled(chosen, load, self._series.workloads) as groups:
                for group in groups:
                    began = time.monotonic()
                    await self._points(group, value)
                    self._took[group.system.name] = time.monotonic() - began
        self._tell_rest()
        for sweep in self._sweeps.values():
            for curve in sweep.curves:
                curve.points.sort(key=lambda each: each.size)
        return list(self._sweeps.values())

    def _chosen(self, load: Load, value: int, *, first: bool) -> list[SystemUnderTest]:
        """As many as there is time for at this value, and what their servers can hold."""
        chosen: list[SystemUnderTest] = []
        left = self._budget - self._spent()
        for system in self._strategies:
            filling = self._executor.datasets.expected(system, load) / AT_ONCE
            seconds = filling + self._took.get(system.name, _SECONDS)
            if load.processes > 1 and system.needs == "nothing":
                self._skip(system, value, "it lives in one process")
            elif system.max_entities is not None and load.entities > system.max_entities[0]:
                self._skip(system, value, system.max_entities[1])
            elif not first and seconds > left:
                self._skip(system, value, f"the sweep's {self._budget:.0f} s were over")
            else:
                left -= seconds
                chosen.append(system)
        return chosen

    async def _points(self, group: WorkerGroup, value: int) -> None:
        if not await self._executor.started([group]):
            return
        for name, sweep in self._sweeps.items():
            load = msgspec.structs.replace(group.load, workload=name)
            cell = cell_of(group.system, load, sweep.unit)
            try:
                await group.turn_to(name)
            except (SkippedError, BrokenError) as exc:
                self._executor.skip(f"{group.system.name}: {load.name}", str(exc))
                continue
            await self._executor.warm_up(group, cell)
            for _ in range(_ROUNDS):
                await self._executor.round(group, cell)
            await self._executor.verify(group, cell)
            self._note_point(sweep, group.system, cell, value)
        await group.end()

    def _note_point(self, sweep: Sweep, system: SystemUnderTest, cell: Cell, value: int) -> None:
        where = f"{system.name}: growth of {cell.load.name} at {sweep.parameter} {value:,}"
        self._executor.results.broken += [f"{where}: {each}" for each in cell.failures]
        if not cell.rate:
            return
        curve = next((each for each in sweep.curves if each.system == system.name), None)
        if curve is None:
            curve = Curve(system=system.name, engine=system.engine)
            sweep.curves.append(curve)
        curve.points.append(
            Point(size=value, cost=1 / cell.rate, rates=cell.rates, checked=cell.checked)
        )

    # -- what it took ------------------------------------------------------------------------

    def _spent(self) -> float:
        return time.monotonic() - self._began

    def _skip(self, system: SystemUnderTest, value: int, why: str) -> None:
        self._skipped.setdefault(why, {}).setdefault(system.name, []).append(f"{value:,}")

    def _tell_rest(self) -> None:
        """One line for each reason."""
        for why, environments in self._skipped.items():
            what = "; ".join(
                f"{name} at {', '.join(values)}" for name, values in environments.items()
            )
            self._executor.skip(f"growth with {self._series.parameter}: {what}", why)
        workloads = ", ".join(self._sweeps)
        self._executor.results.settings[f"growth with {self._series.parameter}"] = (
            f"{workloads}: took {self._spent():.0f} s, of {self._budget:.0f} s that it may take"
        )


def ends_first(values: Sequence[int]) -> list[int]:
    """The smallest, the largest, then always what lies in the middle of the widest gap.

    >>> ends_first([1, 2, 3, 4, 5])
    [1, 5, 3, 2, 4]
    """
    if len(values) < 3:
        return list(values)
    order = [0, len(values) - 1]
    while len(order) < len(values):
        known = sorted(order)
        gaps = [(high - low, low) for low, high in pairwise(known)]
        wide, low = max(gaps, key=lambda each: (each[0], -each[1]))
        order.append(low + wide // 2)
    return [values[each] for each in order]
