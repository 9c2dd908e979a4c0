"""The results of a run: what is written as JSON, and read again to be compared or shown."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Final

import msgspec

from hf_async_store import ConfigurationError
from hf_async_store_bench.histogram import Histogram
from hf_async_store_bench.messages import Load, Role, RoundStats, SystemUnderTest, decode
from hf_async_store_bench.settings import Parameter
from hf_async_store_bench.statistics import Interval, exponent, ratio_of_pairs

FORMAT: Final = 2


class Cell(msgspec.Struct, kw_only=True):
    """One system under one load: rounds as fast as it answered, next to those of the same number of
    other systems; steady ones at fixed times, at parts of that; how much was verified, and what failed."""

    system: str
    role: Role
    engine: str
    load: Load
    unit: str
    rounds: list[RoundStats] = []
    steady: list[RoundStats] = []
    checked: int = 0
    failures: list[str] = []

    @property
    def rates(self) -> list[float]:
        """Entities a second, round by round."""
        return [each.rate for each in self.rounds]

    @property
    def rate(self) -> float:
        return statistics.median(self.rates) if self.rounds else 0.0

    @property
    def told(self) -> str:
        """The rate in words, with its range."""
        low, high = min(self.rates), max(self.rates)
        return f"{self.system} {self.rate:,.0f} ({low:,.0f} .. {high:,.0f}) a second"

    @property
    def processor(self) -> float:
        """Seconds of computing for each unit, in the measured process."""
        return statistics.median([each.processor / max(each.units, 1) for each in self.rounds])

    @property
    def memory(self) -> float:
        """Bytes, all processes together."""
        return statistics.median([each.memory for each in self.rounds])

    @property
    def written(self) -> float | None:
        """Bytes for each unit, by the measured process; None where the system does not tell."""
        each = [one.written / max(one.units, 1) for one in self.rounds if one.written is not None]
        return statistics.median(each) if each else None

    @property
    def calm(self) -> Histogram:
        """Latencies at about half of that speed, counted from when each operation was due."""
        return RoundStats.together(each for each in self.steady if each.share <= 0.5).latencies


class Point(msgspec.Struct, kw_only=True, frozen=True):
    """One point of a growth curve: `cost` is the seconds of one unit, the median of its rounds."""

    size: float
    cost: float
    rates: list[float]
    checked: int = 0


class Curve(msgspec.Struct, kw_only=True):
    system: str
    engine: str
    points: list[Point] = []

    @property
    def exponent(self) -> float | None:
        return exponent([(each.size, each.cost) for each in self.points])


class Sweep(msgspec.Struct, kw_only=True):
    """How the cost of one workload grows with one parameter."""

    parameter: Parameter
    workload: str
    unit: str
    curves: list[Curve] = []

    def add(self, system: str, engine: str, point: Point) -> None:
        """Note a point of the curve of a system."""
        curve = next((each for each in self.curves if each.system == system), None)
        if curve is None:
            curve = Curve(system=system, engine=engine)
            self.curves.append(curve)
        curve.points = sorted([*curve.points, point], key=lambda each: each.size)


class Figure(msgspec.Struct, kw_only=True, frozen=True):
    """One figure of merit, with its target in words, if any, and the range of its rounds or the
    interval of a ratio, and what it was made of; or a note why there is no value."""

    engine: str
    what: str
    unit: str
    target: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    met: bool | None = None
    note: str = ""
    detail: str = ""


class Skipped(msgspec.Struct, frozen=True):
    what: str
    why: str


class Results(msgspec.Struct, kw_only=True):
    format: int = FORMAT
    made_at: str
    mode: str
    seconds: float = 0.0
    machine: dict[str, str] = {}
    versions: dict[str, str] = {}
    settings: dict[str, str] = {}
    cells: list[Cell] = []
    sweeps: list[Sweep] = []
    figures: list[Figure] = []
    skipped: list[Skipped] = []
    broken: list[str] = []

    @property
    def failures(self) -> list[str]:
        """Everything for which the run fails: lost writes, wrong answers, workers that broke."""
        lost = [(f"{cell.system}: {cell.load.name}", cell.failures) for cell in self.cells]
        return [*self.broken, *(f"{where}: {each}" for where, found in lost for each in found)]

    def add_point(self, what: str, system: str, entities: int, samples: list[float]) -> None:
        """Note the seconds that something takes on a system with so many entities."""
        rates = [1 / each for each in samples]
        point = Point(size=entities, cost=statistics.median(samples), rates=rates)
        sweep = next((each for each in self.sweeps if each.workload == what), None)
        if sweep is None:
            sweep = Sweep(parameter="entities", workload=what, unit="queries")
            self.sweeps.append(sweep)
        sweep.add(system, system, point)

    def cell(self, system: str, load: str) -> Cell | None:
        return next((each for each in self.of(load) if each.system == system), None)

    @property
    def loads(self) -> list[str]:
        return list(dict.fromkeys(each.load.name for each in self.cells))

    def of(self, load: str) -> list[Cell]:
        """The cells of a load that were measured."""
        return [each for each in self.cells if each.load.name == load and each.rounds]

    @classmethod
    def read(cls, path: Path) -> Results:
        """Those in a file; ConfigurationError if there are none."""
        try:
            results = decode(path.read_bytes(), Results)
        except OSError as exc:
            raise ConfigurationError(f"{path}: cannot be read: {exc.strerror}") from exc
        except msgspec.MsgspecError as exc:
            raise ConfigurationError(f"{path}: these are no results of a run: {exc}") from exc
        if results.format != FORMAT:
            raise ConfigurationError(f"{path}: format {results.format}, expected {FORMAT}")
        return results


def ratio(of: Cell, to: Cell) -> Interval | None:
    """How many times as fast `of` is, over the rounds that both have."""
    both = min(len(of.rounds), len(to.rounds))
    return ratio_of_pairs(of.rates[:both], to.rates[:both])


def cell_of(system: SystemUnderTest, load: Load, unit: str) -> Cell:
    return Cell(system=system.name, role=system.role, engine=system.engine, load=load, unit=unit)
