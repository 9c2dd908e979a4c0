"""A run: every subject under every load, in rounds that take turns; then how cost grows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import msgspec

from hf_async_store.bench import meter
from hf_async_store.bench.crew import BrokenError, Crew, LeftOutError
from hf_async_store.bench.plan import Load, Subject, Tally
from hf_async_store.bench.results import Cell, Curve, LeftOut, Point, Results, Sweep, cell_of
from hf_async_store.bench.subjects import missing
from hf_async_store.bench.workloads import WORKLOADS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hf_async_store.bench.places import Places

_WARM_UP: Final = 0.3
"""The part of a round that goes before the first and does not count."""

_STEADY_SHARE: Final = 0.5
_STEADY_MOST: Final = 5000.0
"""Operations a second: beyond that, the latencies would be those of the harness."""

_AT_ONCE: Final = 2
"""Crews that are started side by side: it is computing, not waiting."""


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """One sweep: a knob, its values, and what is measured at each of them.

    Attributes:
        workloads: on one filled target, one after the other; what writes comes last.
        budget: seconds; what does not fit is listed.
    """

    knob: str
    values: tuple[int, ...]
    workloads: tuple[str, ...]
    load: Load
    budget: float


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a run does.

    Attributes:
        loads: what matters less comes last: `budget` is for all of them together, and what does
            not fit is listed.
        compared: the workloads under which floors and peers run, too; None: wherever they can.
        duration: seconds of one round of one subject.
        steady: seconds of the round at fixed times; 0: none.
        rate: its operations a second; None: half as many as the side can do, 5,000 at most.
    """

    mode: str
    loads: tuple[Load, ...]
    rounds: int
    duration: float
    steady: float
    budget: float
    rate: float | None = None
    compared: tuple[str, ...] | None = None
    series: tuple[Series, ...] = ()
    seed: int = 1


Told = Callable[[str], None]


class _Expected:
    """How long the next point of a sweep will take: what does not grow, and what grows evenly."""

    def __init__(self) -> None:
        self._least = 0.0
        self._last = 0.0

    def took(self, seconds: float) -> None:
        self._least = min(self._least or seconds, seconds)
        self._last = seconds

    def next(self, growth: float) -> float:
        return self._least + (self._last - self._least) * growth


class Run:
    """One run; `whole` is the story.

    Args:
        tell: is given one line about each step.
    """

    def __init__(
        self, settings: Settings, subjects: Sequence[Subject], places: Places, tell: Told
    ) -> None:
        self._settings = settings
        self._places = places
        self._tell = tell
        self._started = time.monotonic()
        self.results = Results(
            made_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), mode=settings.mode
        )
        self._subjects = [each for each in subjects if self._is_here(each)]

    async def whole(self) -> Results:
        results = self.results
        before = meter.load_average()
        results.machine = await asyncio.to_thread(meter.machine)
        results.versions = meter.versions()
        last = 0.0
        for number, load in enumerate(self._settings.loads):
            began = self._spent()
            if began + last / 2 > self._settings.budget:
                rest = ", ".join(each.name for each in self._settings.loads[number:])
                self._leave_out(rest, f"the {self._settings.budget:.0f} s for workloads were over")
                break
            await self._measure(load)
            last = self._spent() - began
        for series in self._settings.series:
            results.sweeps += await self._sweep(series)
        results.seconds = round(self._spent(), 1)
        results.machine["load"] = f"{before} before, {meter.load_average()} after"
        return results

    def _is_here(self, subject: Subject) -> bool:
        why = missing(subject)
        if why is not None:
            self._leave_out(subject.name, why)
        return why is None

    def _leave_out(self, what: str, why: str) -> None:
        left_out = LeftOut(what, why)
        if left_out not in self.results.left_out:
            self.results.left_out.append(left_out)

    def _spent(self) -> float:
        return time.monotonic() - self._started

    # -- one load ----------------------------------------------------------------------------

    async def _measure(self, load: Load) -> None:
        """All subjects under one load, A B C A B C: the noise of the machine hits all alike."""
        workload = WORKLOADS[load.workload]
        compared = self._settings.compared
        subjects = [
            each
            for each in self._subjects
            if issubclass(each.load(), workload.needs)
            and (each.kind == "strategy" or compared is None or load.workload in compared)
        ]
        self._tell(f"{load.name}: {len(subjects)} subjects")
        async with self._crews(subjects, load) as crews:
            cells = [cell_of(each.subject, load, workload.unit) for each in crews]
            turns = list(zip(crews, cells, strict=True))
            for number in range(self._settings.rounds + 1):
                if number > 1 and self._spent() > self._settings.budget:
                    self._leave_out(f"{load.name}: rounds from {number} on", "no time was left")
                    break
                first = number % max(len(turns), 1)  # who begins does not stay the same
                for crew, cell in turns[first:] + turns[:first]:
                    await self._round(crew, cell, warm_up=number == 0)
            for crew, cell in turns:
                if self._spent() > self._settings.budget:
                    self._leave_out(f"{load.name}: latencies", "no time was left")
                    break
                await self._steady_round(crew, cell)
            for crew, cell in turns:
                await self._verify(crew, cell)
        self.results.cells += [each for each in cells if each.rounds or each.failures]

    async def _round(self, crew: Crew, cell: Cell, *, warm_up: bool) -> None:
        if cell.failures:
            return
        seconds = self._settings.duration * (_WARM_UP if warm_up else 1)
        try:
            tally = await crew.run(seconds)
        except BrokenError as exc:
            self._broken(crew.subject, cell, exc)
            return
        if not warm_up:
            cell.rounds.append(tally)
        self._look_at(cell, tally)

    async def _steady_round(self, crew: Crew, cell: Cell) -> None:
        """At fixed times, about half as many as it can: how long does one wait then?"""
        operations = sum(each.operations for each in cell.rounds)
        seconds = sum(each.seconds for each in cell.rounds)
        if not self._settings.steady or not operations or cell.failures:
            return
        half = min(operations / seconds * _STEADY_SHARE, _STEADY_MOST * crew.load.processes)
        rate = self._settings.rate or half
        # Of what is slow, enough to say something, within reason.
        length = min(max(self._settings.steady, 10 / rate), self._settings.steady * 4)
        try:
            tally = await crew.run(length, rate)
        except BrokenError as exc:
            self._broken(crew.subject, cell, exc)
            return
        cell.steady.append(tally)
        self._look_at(cell, tally)

    async def _verify(self, crew: Crew, cell: Cell) -> None:
        if cell.failures:
            return
        try:
            verdict = await crew.verify()
        except BrokenError as exc:
            self._broken(crew.subject, cell, exc)
            return
        cell.checked = verdict.checked
        cell.failures += verdict.failures[:10]
        more = len(verdict.failures) - 10
        if more > 0:
            cell.failures.append(f"and {more:,} more like these")

    def _look_at(self, cell: Cell, tally: Tally) -> None:
        """Nothing here makes an operation fail but a conflict, and those are counted apart."""
        cell.failures += [f"wrong answer: {each}" for each in tally.wrong[:3]]
        if cell.kind == "strategy":
            cell.failures += [
                f"{count:,} operations ended in {name}" for name, count in tally.errors.items()
            ]

    def _broken(self, subject: Subject, cell: Cell, exc: BrokenError) -> None:
        """A strategy must not break; a floor or a peer that does is left out."""
        if subject.kind == "strategy":
            cell.failures.append(str(exc))
        else:
            cell.rounds, cell.steady = [], []
            self._leave_out(f"{subject.name}: {cell.load.name}", str(exc))

    # -- crews -------------------------------------------------------------------------------

    @asynccontextmanager
    async def _crews(self, subjects: Sequence[Subject], load: Load) -> AsyncIterator[list[Crew]]:
        """Those that could be started; all are gone afterwards, with their data."""
        gate = asyncio.Semaphore(_AT_ONCE)

        async def start(subject: Subject) -> Crew | None:
            async with gate:
                return await self._crew(stack, subject, load)

        async with AsyncExitStack() as stack:
            started = await asyncio.gather(*map(start, subjects))
            crews = [each for each in started if each is not None]
            if not crews:
                self._leave_out(load.name, "there is nothing here to measure it on")
            yield crews

    async def _crew(self, stack: AsyncExitStack, subject: Subject, load: Load) -> Crew | None:
        try:
            place = self._places.make(subject)
            stack.callback(self._places.remove, subject, place)
            crew = Crew(subject, place, load, self._settings.seed)
            stack.push_async_callback(crew.end)
            await crew.start()
        except LeftOutError as exc:
            self._leave_out(f"{subject.name}: {load.name}", str(exc))
        except BrokenError as exc:
            if subject.kind == "strategy":
                self.results.broken.append(f"{subject.name}: {load.name}: {exc}")
            else:
                self._leave_out(f"{subject.name}: {load.name}", str(exc))
        else:
            return crew
        return None

    # -- growth ------------------------------------------------------------------------------

    async def _sweep(self, series: Series) -> list[Sweep]:
        """From small to large, all strategies at each value, as far as the budget goes."""
        started = time.monotonic()
        sweeps = {
            name: Sweep(
                knob=series.knob,  # type: ignore[arg-type]  # the settings name only those there are
                workload=name,
                unit=WORKLOADS[name].unit,
                budget=series.budget,
            )
            for name in series.workloads
        }
        expected: dict[str, _Expected] = {}
        strategies = [each for each in self._subjects if each.kind == "strategy"]
        for place, value in enumerate(series.values):
            growth = value / series.values[place - 1] if place else 1.0
            for subject in strategies:
                left = series.budget - (time.monotonic() - started)
                guess = expected.setdefault(subject.name, _Expected())
                if guess.next(growth) > left:
                    for each in sweeps.values():
                        each.left_out.append(f"{subject.name} at {value:,}")
                    continue
                self._tell(f"growth with {series.knob}: {subject.name} at {value:,}")
                began = time.monotonic()
                await self._points(subject, series, value, sweeps)
                guess.took(time.monotonic() - began)
        for each in sweeps.values():
            each.seconds = round(time.monotonic() - started, 1)
        return list(sweeps.values())

    async def _points(
        self, subject: Subject, series: Series, value: int, sweeps: dict[str, Sweep]
    ) -> None:
        load = msgspec.structs.replace(
            series.load, workload=series.workloads[0], **{series.knob: value}
        )
        async with AsyncExitStack() as stack:
            crew = await self._crew(stack, subject, load)
            if crew is None:
                return
            for name, sweep in sweeps.items():
                cell = cell_of(subject, msgspec.structs.replace(load, workload=name), sweep.unit)
                try:
                    await crew.turn_to(name)
                except (LeftOutError, BrokenError) as exc:
                    self._leave_out(f"{subject.name}: {cell.load.name}", str(exc))
                    continue
                for number in range(min(self._settings.rounds, 3) + 1):
                    await self._round(crew, cell, warm_up=number == 0)
                await self._verify(crew, cell)
                self._note_point(sweep, subject, cell, value)

    def _note_point(self, sweep: Sweep, subject: Subject, cell: Cell, value: int) -> None:
        where = f"{subject.name}: growth of {cell.load.name} at {sweep.knob} {value:,}"
        self.results.broken += [f"{where}: {each}" for each in cell.failures]
        if not cell.rate:
            return
        curve = next((each for each in sweep.curves if each.subject == subject.name), None)
        if curve is None:
            curve = Curve(subject=subject.name, family=subject.family)
            sweep.curves.append(curve)
        curve.points.append(Point(size=value, cost=1 / cell.rate, rates=cell.rates))
