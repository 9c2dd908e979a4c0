"""How cost grows with one knob: the smallest value, the largest, then what lies between.

So a sweep that its budget ends still has the exponent over the whole range.
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import msgspec

from hf_async_store.bench.crew import BrokenError, LeftOutError
from hf_async_store.bench.results import Curve, Point, Sweep, cell_of
from hf_async_store.bench.stage import AT_ONCE
from hf_async_store.bench.workloads import WORKLOADS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hf_async_store.bench.crew import Crew
    from hf_async_store.bench.plan import Load, Subject
    from hf_async_store.bench.results import Cell
    from hf_async_store.bench.settings import Series
    from hf_async_store.bench.stage import Stage

_ROUNDS: Final = 2
_SECONDS: Final = 4.0
"""What a point takes beside filling, before any has told."""


class Growth:
    """One sweep of all strategies; `measured` is the story.

    Args:
        seconds: the sweep's budget. The first value is measured in any case.
    """

    def __init__(
        self, series: Series, strategies: Sequence[Subject], stage: Stage, seconds: float
    ) -> None:
        self._series = series
        self._strategies = strategies
        self._stage = stage
        self._budget = seconds
        self._began = time.monotonic()
        self._took: dict[str, float] = {}
        self._left_out: dict[str, dict[str, list[str]]] = {}
        self._sweeps = {
            each: Sweep(knob=series.knob, workload=each, unit=WORKLOADS[each].unit)
            for each in series.workloads
        }

    async def measured(self, tell: Callable[[str], None]) -> list[Sweep]:
        """A sweep for each workload. What was left out is told once for all of them."""
        for number, value in enumerate(ends_first(self._series.values)):
            load = msgspec.structs.replace(
                self._series.load, workload=self._series.workloads[0], **{self._series.knob: value}
            )
            chosen = self._chosen(load, value, first=number == 0)
            if not chosen:
                continue
            tell(f"growth with {self._series.knob} at {value:,}: {len(chosen)} subjects")
            async with self._stage.filled(chosen, load, self._series.workloads) as crews:
                for crew in crews:
                    began = time.monotonic()
                    await self._points(crew, value)
                    self._took[crew.subject.name] = time.monotonic() - began
        self._tell_rest()
        for sweep in self._sweeps.values():
            for curve in sweep.curves:
                curve.points.sort(key=lambda each: each.size)
        return list(self._sweeps.values())

    def _chosen(self, load: Load, value: int, *, first: bool) -> list[Subject]:
        """As many as there is time for at this value, and what their servers can hold."""
        chosen: list[Subject] = []
        left = self._budget - self._spent()
        for subject in self._strategies:
            filling = self._stage.stock.expected(subject, load) / AT_ONCE
            seconds = filling + self._took.get(subject.name, _SECONDS)
            if load.processes > 1 and subject.place == "nothing":
                self._leave_out(subject, value, "it lives in one process")
            elif subject.most is not None and load.entities > subject.most[0]:
                self._leave_out(subject, value, subject.most[1])
            elif not first and seconds > left:
                self._leave_out(subject, value, f"the sweep's {self._budget:.0f} s were over")
            else:
                left -= seconds
                chosen.append(subject)
        return chosen

    async def _points(self, crew: Crew, value: int) -> None:
        if not await self._stage.started([crew]):
            return
        for name, sweep in self._sweeps.items():
            load = msgspec.structs.replace(crew.load, workload=name)
            cell = cell_of(crew.subject, load, sweep.unit)
            try:
                await crew.turn_to(name)
            except (LeftOutError, BrokenError) as exc:
                self._stage.leave_out(f"{crew.subject.name}: {load.name}", str(exc))
                continue
            await self._stage.warm_up(crew, cell)
            for _ in range(_ROUNDS):
                await self._stage.round(crew, cell)
            await self._stage.verify(crew, cell)
            self._note_point(sweep, crew.subject, cell, value)
        await crew.end()

    def _note_point(self, sweep: Sweep, subject: Subject, cell: Cell, value: int) -> None:
        where = f"{subject.name}: growth of {cell.load.name} at {sweep.knob} {value:,}"
        self._stage.results.broken += [f"{where}: {each}" for each in cell.failures]
        if not cell.rate:
            return
        curve = next((each for each in sweep.curves if each.subject == subject.name), None)
        if curve is None:
            curve = Curve(subject=subject.name, family=subject.family)
            sweep.curves.append(curve)
        curve.points.append(
            Point(size=value, cost=1 / cell.rate, rates=cell.rates, checked=cell.checked)
        )

    # -- what it took ------------------------------------------------------------------------

    def _spent(self) -> float:
        return time.monotonic() - self._began

    def _leave_out(self, subject: Subject, value: int, why: str) -> None:
        self._left_out.setdefault(why, {}).setdefault(subject.name, []).append(f"{value:,}")

    def _tell_rest(self) -> None:
        """One line for each reason."""
        for why, places in self._left_out.items():
            what = "; ".join(f"{name} at {', '.join(values)}" for name, values in places.items())
            self._stage.leave_out(f"growth with {self._series.knob}: {what}", why)
        workloads = ", ".join(self._sweeps)
        self._stage.results.settings[f"growth with {self._series.knob}"] = (
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
