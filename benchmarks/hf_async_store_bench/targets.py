"""What each engine promised to reach: ratios to a baseline beside it, and figures of scenarios."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Final, TypeAlias

import msgspec

from hf_async_store_bench.csv_rows import rows_beside
from hf_async_store_bench.messages import Load, Measurement
from hf_async_store_bench.results import Cell, Figure, Results, ratio
from hf_async_store_bench.scenarios import SCENARIOS
from hf_async_store_bench.settings import SPEED, Settings
from hf_async_store_bench.statistics import ratio_of_runs, ratios
from hf_async_store_bench.tables import shown

_NOT_RUN: Final = "not in this run"


class PerformanceTarget(msgspec.Struct, frozen=True, kw_only=True):
    """A figure of one load, as its ratio to a system, if any, under the same load or another workload: of
    rates, of the times of one operation, or of processor time. `table`: that of a shorter run."""

    engine: str
    workload: str
    tasks: int
    processes: int = 1
    burst: int = 1000
    against: str | None = None
    other: str | None = None
    other_tasks: int | None = None
    of: str
    at_least: float | None = None
    at_most: float | None = None
    table: str = ""

    @property
    def load(self) -> Load:
        how = {"tasks": self.tasks, "processes": self.processes, "burst": self.burst}
        return Load(workload=self.workload, **how)

    @property
    def other_load(self) -> Load:
        other = {"workload": self.other or self.workload, "tasks": self.other_tasks or self.tasks}
        return msgspec.structs.replace(self.load, **other)

    @property
    def what(self) -> str:
        of = {"rate": "", "time": ", time of one operation", "processor": ", processor time"}
        against = f", against {self.against}" if self.against else ""
        against += f": {self.other_load.name}" if self.other else ""
        return self.load.name + of[self.of] + against


TARGETS: Final = rows_beside(__file__, PerformanceTarget)


def figures(results: Results) -> list[Figure]:
    """Every figure with a target, with its value where this run has it; then what scenarios gave."""
    return [
        *(_measured(results, each) for each in TARGETS),
        *_lost_writes(results),
        *results.figures,
        *_not_run(results),
    ]


_Value: TypeAlias = tuple[float, float | None, float | None]  # A value with its range


def _figure(
    engine: str, what: str, unit: str, least: float | None, most: float | None, found: _Value | str
) -> Figure:
    """A figure with its bound, and its value or why there is none."""
    target, met = "", None
    value, low, high = (None, None, None) if isinstance(found, str) else found
    if least is not None:
        target, met = f"at least {least:,g}", None if value is None else value >= least
    elif most is not None:
        target, met = f"at most {most:,g}", None if value is None else value <= most
    note = found if isinstance(found, str) else ""
    named = {"engine": engine, "what": what, "unit": unit, "target": target, "note": note}
    return Figure(**named, value=value, low=low, high=high, met=met)


def _measured(results: Results, target: PerformanceTarget) -> Figure:
    ours = results.cell(target.engine, target.load.name)
    theirs = results.cell(target.against or "", target.other_load.name)
    bounds = (target.at_least, target.at_most)
    unit, value = "x" if target.against else "a second", _value(target, ours, theirs)
    figure = _figure(target.engine, target.what, unit, *bounds, value)
    found = [each.told for each in (ours, theirs) if each]
    if ours and theirs:
        found.append(f"{shown(theirs.processor / max(ours.processor, 1e-9))} x by processor time")
    return msgspec.structs.replace(figure, detail="; ".join(found))


def _value(target: PerformanceTarget, ours: Cell | None, theirs: Cell | None) -> _Value | str:
    """The figure with its interval, or why there is none."""
    if ours is None:
        return _NOT_RUN
    if target.against is None:
        return ours.rate, min(ours.rates), max(ours.rates)
    if theirs is None:
        return f"{target.against} is not in this run"
    if target.of == "processor":
        value = ours.processor / max(theirs.processor, 1e-9)
        return value, value, value
    found = ratio_of_runs(ours.rates, theirs.rates) if target.other else ratio(ours, theirs)
    if found is None:
        return "no round in common"
    return found.inverse if target.of == "time" else found


def speed() -> Settings:
    """The loads and the scenarios of the table of speed, each on the systems that it names."""
    pairs: dict[str, set[str]] = {}
    loads: dict[Load, None] = {}
    for each in TARGETS:
        if each.table:
            for load, name in ((each.load, each.engine), (each.other_load, each.against)):
                loads[load] = None
                pairs.setdefault(load.name, set()).add(name or each.engine)
    return msgspec.structs.replace(SPEED, loads=tuple(loads), pairs=pairs)


def _lost_writes(results: Results) -> Iterator[Figure]:
    """Acknowledged writes have to be there: of each engine, and where processes share a store."""
    for engine in dict.fromkeys(each.system for each in results.cells if each.role == "strategy"):
        cells = [each for each in results.cells if each.system == engine]
        shared = [each for each in cells if each.load.processes > 1]
        for what, some in (("all workloads", cells), ("several processes at once", shared)):
            checked = sum(each.checked for each in some)
            if checked:
                lost = sum(len(each.failures) for each in some)
                what = f"{what}: acknowledged writes missing, of {checked:,} entities compared"
                yield _figure(engine, what, "entities", None, 0, (float(lost), None, None))


def scenario_figures(name: str, sizes: Mapping[int, Mapping[str, Measurement]]) -> list[Figure]:
    """The figures of a scenario, by the number of stored machines; of two numbers, their ratio."""
    scenario = SCENARIOS[name]
    first, *more = sizes.values()
    figures = []
    for what, each in first.items():
        samples, unit, what = each.samples, each.unit, f"{name}: {what}"
        if more:
            small, large = sizes
            samples = ratios(more[0][each.what].samples, samples)
            unit, what = "x", f"{what}, {large:,} against {small:,} machines"
        found = (statistics.median(samples), min(samples), max(samples))
        bounds = (each.at_least, each.at_most)
        figures.append(_figure(scenario.system, what, unit, *bounds, found))
    return figures


def _not_run(results: Results) -> Iterator[Figure]:
    """A row for each scenario that gave nothing."""
    for name, each in SCENARIOS.items():
        if not any(figure.what.startswith(f"{name}: ") for figure in results.figures):
            yield _figure(each.system, f"{name}: {each.summary}", "", None, None, _NOT_RUN)
