"""The charts of a report: dots on logarithmic scales, as two systems may be a thousand times apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from io import BytesIO, StringIO
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from hf_async_store_bench.results import Cell, Results, Sweep, ratio
from hf_async_store_bench.statistics import Interval
from hf_async_store_bench.tables import shown, time_shown

# Okabe and Ito's palette: told apart by people who see colours differently, too.
ENGINES: Final = {
    "memory": "#5f6368",
    "json": "#0072b2",
    "json split": "#56b4e9",
    "sqlite": "#009e73",
    "postgresql": "#cc79a7",
    "dynamodb": "#d55e00",
}
ROLES: Final = {"strategy": "#0b62c4", "baseline": "#8a90a0", "competitor": "#d97706"}
_OTHERS: Final = ("#e69f00", "#000000", "#7a3e9d")
_NAMES: Final = {
    "entities": "stored machines",
    "tasks": "concurrent tasks",
    "size": "bytes of a machine",
    "processes": "processes",
}
_STYLE: Final = Path(__file__).with_suffix(".mplstyle")
_ROW: Final = 0.27
_METADATA: Final = dict.fromkeys(("Creator", "Date", "Format", "Type"))


class Chart(NamedTuple):
    """A picture that can be drawn on a figure, or on a part of one."""

    title: str
    width: float
    height: float
    draw: Callable[[Any], None]


def as_svg(chart: Chart) -> str:
    with matplotlib.rc_context(fname=_STYLE):
        figure = Figure(figsize=(chart.width, chart.height), layout="constrained")
        chart.draw(figure)
        text = StringIO()
        figure.savefig(text, format="svg", metadata=_METADATA, transparent=True)
    named = f'<svg role="img" aria-label="{chart.title}" '
    return named + text.getvalue().partition("<svg ")[2]


def as_png(title: str, charts: Sequence[Chart]) -> bytes:
    """Several charts as one picture, in two columns."""
    rows = [charts[start : start + 2] for start in range(0, len(charts), 2)]
    heights = [max(each.height for each in row) for row in rows]
    width = 2 * max(each.width for each in charts)
    with matplotlib.rc_context(fname=_STYLE):
        figure = Figure(figsize=(width, sum(heights) + 0.5), layout="constrained", dpi=120)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        parts = figure.subfigures(len(rows), 2, height_ratios=heights, squeeze=False)
        for row, row_parts in zip(rows, parts, strict=True):
            for chart, part in zip(row, row_parts, strict=False):
                chart.draw(part)
        picture = BytesIO()
        figure.savefig(picture, format="png")
    return picture.getvalue()


class Row(NamedTuple):
    """A value with its range and its number; hollow dots can be told from others without colour."""

    name: str
    value: float
    low: float
    high: float
    label: str
    colour: str
    hollow: bool = False


def _rate(cell: Cell, colour: str) -> Row:
    ends, hollow = (min(cell.rates), max(cell.rates)), cell.role == "baseline"
    return Row(cell.system, cell.rate, *ends, shown(cell.rate), colour, hollow)


def _colour(cell: Cell) -> str:
    return ENGINES.get(cell.system, _OTHERS[0])


def _draw_rows(
    axes: Any, title: str, rows: Sequence[Row], ends: Sequence[float] = (), right: float = 4.0
) -> None:
    """Dots, with room for their numbers, on a scale over a factor of ten at least, and over all ranges
    or these ends."""
    axes.set_title(title)
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), labels=[each.name for each in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(visible=True, axis="x")
    for place, row in enumerate(rows):
        if row.label:
            _dot(axes, place, row)
    ends = ends or [end for each in rows for end in (each.low, each.high)]
    known = [each for each in ends if each > 0 and math.isfinite(each)] or [1.0]
    low, high = min(known) / 1.5, max(known)
    axes.set_xlim(low, max(high, low * 10) * right)
    axes.xaxis.set_major_locator(LogLocator(numticks=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _dot(axes: Any, place: int, row: Row) -> None:
    colour, face = row.colour, "white" if row.hollow else row.colour
    axes.plot([row.low, row.high], [place] * 2, color=colour, linewidth=1.6, solid_capstyle="round")
    axes.plot([row.value], [place], "o", color=colour, markerfacecolor=face, markersize=5.5)
    where = (max(row.value, row.high), place)
    axes.annotate(row.label, where, (6, 0), textcoords="offset points", va="center", fontsize=8)


def engines(results: Results) -> Iterator[Chart]:
    """By load: what each engine does in a second, and how long one waits at half of that."""
    for load in results.loads:
        cells = [each for each in results.of(load) if each.role == "strategy"]
        if cells:
            cells.sort(key=lambda each: each.rate)
            height = 0.95 + 2 * _ROW * len(cells) + 0.6
            yield Chart(load, 4.3, height, partial(_engines, cells=cells))


def _engines(figure: Any, cells: Sequence[Cell]) -> None:
    waited = any(each.calm.count for each in cells)
    axes = figure.subplots(2 if waited else 1, 1, squeeze=False)[:, 0]
    _draw_rows(axes[0], _rates_title(cells), [_rate(each, _colour(each)) for each in cells])
    if waited:
        title = "milliseconds at half of that: p50 to p99"
        _draw_rows(axes[1], title, list(map(_latency, cells)), right=12.0)


def _rates_title(cells: Sequence[Cell]) -> str:
    return f"{cells[0].load.name}: {cells[0].unit} a second"


def _latency(cell: Cell) -> Row:
    """In milliseconds; without a dot where there is none."""
    p50, p99 = (cell.calm.percentile(share) for share in (0.5, 0.99))
    label = f"{time_shown(p50)}, p99 {time_shown(p99)}" if cell.calm.count else ""
    return Row(cell.system, p50 * 1000, p50 * 1000, p99 * 1000, label, _colour(cell))


def compared(results: Results) -> Iterator[Chart]:
    """By load: every system, next to the engine that it belongs to."""
    for load in results.loads:
        cells = results.of(load)
        if any(each.role != "strategy" for each in cells):
            order = list(dict.fromkeys(each.engine for each in cells))
            cells.sort(key=lambda each: (-order.index(each.engine), each.rate))
            yield Chart(load, 6.4, 0.8 + _ROW * len(cells), partial(_compared, cells=cells))


def _compared(figure: Any, cells: Sequence[Cell]) -> None:
    axes = figure.subplots()
    _draw_rows(axes, _rates_title(cells), [_rate(each, ROLES[each.role]) for each in cells])
    for place, (one, other) in enumerate(pairwise(cells)):
        if one.engine != other.engine:
            axes.axhline(place + 0.5, color="#c9ccd6", linewidth=0.6)
    for label, cell in zip(axes.get_yticklabels(), cells, strict=True):
        label.set_fontweight("bold" if cell.role == "strategy" else "normal")


def ratios(results: Results) -> Iterator[Chart]:
    """By engine: how many times as fast as each of its baselines, with 95 % intervals."""
    for engine in dict.fromkeys(each.system for each in results.cells if each.role == "strategy"):
        rows = []
        for load in results.loads:
            ours = results.cell(engine, load)
            for baseline in results.of(load):
                if ours and baseline.role == "baseline" and baseline.engine == ours.engine:
                    rows += _ratio(f"{load}: {baseline.system}", ratio(ours, baseline))
        if rows:
            title = f"{engine}: times as fast as its baselines"
            draw = partial(_ratios, title=title, rows=rows[::-1])
            yield Chart(title, 7.4, 0.8 + _ROW * len(rows), draw)


def _ratio(name: str, against: Interval | None) -> list[Row]:
    if against is None:
        return []
    value, low, high = against
    if not math.isfinite(high):
        low = high = value  # one round has no interval
    return [Row(name, value, low, high, f"{shown(value)} x", ROLES["strategy"])]


def _ratios(figure: Any, title: str, rows: Sequence[Row]) -> None:
    axes = figure.subplots()
    _draw_rows(axes, title, rows, ends=[1.0, *(each.value for each in rows)])
    axes.axvline(1.0, color="#1f2430", linewidth=0.9)


def growth(results: Results) -> Iterator[Chart]:
    """By sweep: what one operation costs, as a parameter changes."""
    names = dict.fromkeys(curve.system for sweep in results.sweeps for curve in sweep.curves)
    others = cycle(_OTHERS)
    colours = {each: ENGINES.get(each) or next(others) for each in names}
    for sweep in results.sweeps:
        if any(each.points for each in sweep.curves):
            title = f"{sweep.workload}: microseconds of one, by {_NAMES[sweep.parameter]}"
            draw = partial(_growth, sweep=sweep, title=title, colours=colours)
            yield Chart(title, 4.8, 3.2, draw)


def _growth(figure: Any, sweep: Sweep, title: str, colours: Mapping[str, str]) -> None:
    axes = figure.subplots()
    axes.set_title(title)
    sizes = sorted({point.size for each in sweep.curves for point in each.points})
    for curve in sweep.curves:
        power = curve.exponent
        label = curve.system + ("" if power is None else f"  n^{power:.2f}")
        points = zip(*((each.size, each.cost * 1e6) for each in curve.points), strict=True)
        axes.plot(*points, "o-", color=colours[curve.system], label=label, markersize=3.5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sizes, labels=[shown(each) for each in sizes], minor=False)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))
    axes.grid(visible=True)
    axes.set_xlabel(_NAMES[sweep.parameter])
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
