"""What each engine promised to reach: ratios to a baseline beside it, and figures of scenarios."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Final, Literal, NamedTuple, TypeAlias

from hf_async_store_bench.messages import Load, Measurement
from hf_async_store_bench.results import Figure, Results, ratio
from hf_async_store_bench.scenarios import SCENARIOS, ratios

_NOT_RUN: Final = "not in this run"


class PerformanceTarget(NamedTuple):
    """A figure of one load, as its ratio to a baseline, if any: of rates, of the times of one operation,
    or of processor time."""

    engine: str
    load: Load
    to: str | None
    at_least: float | None = None
    at_most: float | None = None
    of: Literal["rate", "time", "processor"] = "rate"

    @property
    def what(self) -> str:
        """As the report calls it."""
        of = {"rate": "", "time": ", time of one operation", "processor": ", processor time"}
        return self.load.name + of[self.of] + (f", against {self.to}" if self.to else "")


def _targets() -> Iterator[PerformanceTarget]:
    target = PerformanceTarget

    def load(workload: str, tasks: int = 64) -> Load:
        return Load(workload=workload, tasks=tasks)

    yield target("json", load("save"), "group commit by hand", at_least=0.25)
    yield target("json", load("save", 1), "append and sync each", at_least=0.6)
    yield target("json", load("get", 1), None, at_least=100_000)
    yield target("json", load("one-shot", 1), "start of Python", at_most=2.5, of="time")

    core = "SQLAlchemy Core on aiosqlite each"
    yield target("sqlite", load("save"), core, at_least=15)
    yield target("sqlite", load("get"), core, at_least=20)
    yield target("sqlite", load("save", 1), core, at_least=1)
    yield target("sqlite", load("get", 1), core, at_least=1)
    rows = "aiosqlite, a multi-row insert"
    yield target("sqlite", load("acquire", 1), rows, at_most=1.5, of="time")
    yield target("sqlite", load("import batch", 1), "sqlite3 batched by hand", at_least=0.3)

    core, rows = "SQLAlchemy Core on asyncpg each", "asyncpg, a multi-row insert"
    yield target("postgresql", load("save"), "asyncpg pool each", at_least=2)
    yield target("postgresql", load("get"), "asyncpg pool each", at_least=2)
    yield target("postgresql", load("save"), "asyncpg held connections each", at_least=1)
    yield target("postgresql", load("save", 1), core, at_most=1.3, of="time")
    yield target("postgresql", load("get", 1), core, at_most=1.3, of="time")
    yield target("postgresql", load("acquire", 1), rows, at_most=1.5, of="time")
    yield target("postgresql", load("import batch", 1), "asyncpg batched by hand", at_least=0.3)

    each, batched = "aiobotocore each", "aiobotocore batched by hand"
    for workload, least in (("get", 4), ("create", 3), ("update", 2), ("save", 1.8)):
        yield target("dynamodb", load(workload), each, at_least=least)
        yield target("dynamodb", load(workload, 1), each, at_most=1.1, of="time")
    for workload in ("create", "update", "save"):
        yield target("dynamodb", load(workload), each, at_most=0.35, of="processor")
    yield target("dynamodb", load("get"), "aiodynamo", at_least=1)
    yield target("dynamodb", load("create batch", 1), batched, at_least=0.35)
    yield target("dynamodb", load("save batch", 1), batched, at_least=0.2)


TARGETS: Final = tuple(_targets())


def figures(results: Results) -> list[Figure]:
    """Every figure with a target, with its value where this run has it; then what scenarios gave."""
    return [
        *(_measured(results, each) for each in TARGETS),
        *_growth(results),
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
    return Figure(
        engine=engine,
        what=what,
        unit=unit,
        target=target,
        value=value,
        low=low,
        high=high,
        met=met,
        note=found if isinstance(found, str) else "",
    )


def _measured(results: Results, target: PerformanceTarget) -> Figure:
    unit, value = "x" if target.to else "a second", _value(results, target)
    bounds = (target.at_least, target.at_most)
    return _figure(target.engine, target.what, unit, *bounds, value)


def _value(results: Results, target: PerformanceTarget) -> _Value | str:
    """The figure with its interval, or why there is none."""
    ours = results.cell(target.engine, target.load.name)
    if ours is None:
        return _NOT_RUN
    if target.to is None:
        return ours.rate, min(ours.rates), max(ours.rates)
    theirs = results.cell(target.to, target.load.name)
    if theirs is None:
        return f"{target.to} is not in this run"
    if target.of == "processor":
        value = ours.processor / max(theirs.processor, 1e-9)
        return value, value, value
    found = ratio(ours, theirs)
    if found is None:
        return "no round in common"
    return found.inverse if target.of == "time" else found


_GROWS_AT_MOST: Final = 1.5
_FIRST: Final = 1000


def _growth(results: Results) -> Iterator[Figure]:
    """What a save costs in a large JSON store, compared with one of a thousand machines."""
    sweeps = [i for i in results.sweeps if (i.parameter, i.workload) == ("entities", "save")]
    curves = [each for sweep in sweeps for each in sweep.curves if each.system == "json"]
    points = {point.size: point.cost for curve in curves for point in curve.points}
    for size in (10_000, 100_000, 1_000_000):
        what = f"save, 1 task, at {size:,} machines, against {_FIRST:,}, time of one operation"
        known = size in points and _FIRST in points
        found = (points[size] / points[_FIRST], None, None) if known else _NOT_RUN
        yield _figure("json", what, "x", None, _GROWS_AT_MOST, found)


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
