"""The charts of a report, drawn by matplotlib: the engines side by side, baselines, growth.

Dots on logarithmic scales, because two systems may be a thousand times apart; a bar would have to
begin at a zero that such a scale does not have. Every dot has its number beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO, StringIO
from itertools import cycle
from typing import Any, Final, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from hf_async_store_bench.formatting import shown, time_shown
from hf_async_store_bench.results import Cell, Results, Sweep, ratio

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
_STYLE: Final = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "ytick.left": False,
    "grid.color": "#e4e6ec",
    "svg.fonttype": "none",  # words stay words: they can be searched, and read aloud
}
_ROW: Final = 0.27
_SHARES: Final = (0.5, 0.9, 0.99, 0.999)


class Chart(NamedTuple):
    """A picture that can be drawn alone or among others.

    Attributes:
        draw: draws it on a figure, or on a part of one.
    """

    title: str
    width: float
    height: float
    draw: Callable[[Any], None]


def as_svg(chart: Chart) -> str:
    """To be put into a page."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(chart.width, chart.height), layout="constrained")
        chart.draw(figure)
        text = StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(_METADATA), transparent=True)
    svg = text.getvalue()
    named = f'<svg role="img" aria-label="{chart.title}" '
    return svg[svg.index("<svg") :].replace("<svg ", named, 1)


_METADATA: Final = ("Creator", "Date", "Format", "Type")


def as_png(title: str, charts: Sequence[Chart]) -> bytes:
    """Several charts as one picture, in two columns."""
    rows = [charts[start : start + 2] for start in range(0, len(charts), 2)]
    heights = [max(each.height for each in row) for row in rows]
    width = 2 * max(each.width for each in charts)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, sum(heights) + 0.5), layout="constrained", dpi=120)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        parts = figure.subfigures(len(rows), 2, height_ratios=heights, squeeze=False)
        for row, row_parts in zip(rows, parts, strict=True):
            for chart, part in zip(row, row_parts, strict=False):
                chart.draw(part)
        picture = BytesIO()
        figure.savefig(picture, format="png")
    return picture.getvalue()


# -- the charts -----------------------------------------------------------------------------


def engines(results: Results) -> Iterator[Chart]:
    """By load: what each engine does in a second, and how long one waits at half of that."""
    for load in results.loads:
        cells = [each for each in results.of(load) if each.role == "strategy"]
        if cells:
            cells.sort(key=lambda each: each.rate)
            height = 0.95 + 2 * _ROW * len(cells) + 0.6
            yield Chart(load, 4.3, height, lambda on, cells=cells: _engines(on, cells))  # type: ignore[misc]


def _engines(figure: Any, cells: Sequence[Cell]) -> None:
    waited = any(each.calm.count for each in cells)
    axes = figure.subplots(2 if waited else 1, 1, squeeze=False)[:, 0]
    first = cells[0]
    _prepare(axes[0], f"{first.load.name}: {first.unit} a second", [each.system for each in cells])
    for row, cell in enumerate(cells):
        colour = ENGINES.get(cell.system, _OTHERS[0])
        _dot(axes[0], row, cell.rate, min(cell.rates), max(cell.rates), colour, shown(cell.rate))
    _scale(axes[0], [rate for each in cells for rate in each.rates])
    if waited:
        _latencies(axes[1], cells)


def _latencies(axes: Any, cells: Sequence[Cell]) -> None:
    _prepare(axes, "milliseconds at half of that: p50 to p99", [each.system for each in cells])
    for row, cell in enumerate(cells):
        if cell.calm.count:
            p50, _, p99, _ = (cell.calm.percentile(share) * 1000 for share in _SHARES)
            colour = ENGINES.get(cell.system, _OTHERS[0])
            label = f"{time_shown(p50 / 1000)}, p99 {time_shown(p99 / 1000)}"
            _dot(axes, row, p50, p50, p99, colour, label)
    _scale(
        axes,
        [each.calm.percentile(share) * 1000 for each in cells for share in (0.5, 0.99)],
        right=12.0,
    )


def compared(results: Results) -> Iterator[Chart]:
    """By load: every system, next to the engine that it belongs to."""
    for load in results.loads:
        cells = results.of(load)
        if any(each.role != "strategy" for each in cells):
            order = list(dict.fromkeys(each.engine for each in cells))
            cells.sort(key=lambda each: (-order.index(each.engine), each.rate))
            height = 0.8 + _ROW * len(cells)
            yield Chart(load, 6.4, height, lambda on, cells=cells: _compared(on, cells))  # type: ignore[misc]


def _compared(figure: Any, cells: Sequence[Cell]) -> None:
    axes = figure.subplots()
    first = cells[0]
    _prepare(axes, f"{first.load.name}: {first.unit} a second", [each.system for each in cells])
    for row, cell in enumerate(cells):
        hollow = cell.role == "baseline"
        low, high = min(cell.rates), max(cell.rates)
        _dot(axes, row, cell.rate, low, high, ROLES[cell.role], shown(cell.rate), hollow=hollow)
        if row and cells[row - 1].engine != cell.engine:
            axes.axhline(row - 0.5, color="#c9ccd6", linewidth=0.6)
    for label, cell in zip(axes.get_yticklabels(), cells, strict=True):
        label.set_fontweight("bold" if cell.role == "strategy" else "normal")
    _scale(axes, [rate for each in cells for rate in each.rates])


def ratios(results: Results) -> Iterator[Chart]:
    """By engine: how many times as fast as each of its baselines, with 95 % intervals."""
    for engine in dict.fromkeys(each.system for each in results.cells if each.role == "strategy"):
        found = []
        for load in results.loads:
            ours = results.cell(engine, load)
            for baseline in results.of(load):
                if ours and baseline.role == "baseline" and baseline.engine == ours.engine:
                    against = ratio(ours, baseline)
                    found += [] if against is None else [(f"{load}: {baseline.system}", against)]
        if found:
            height = 0.8 + _ROW * len(found)
            title = f"{engine}: times as fast as its baselines"
            yield Chart(title, 7.4, height, lambda on, t=title, rows=found: _ratios(on, t, rows))  # type: ignore[misc]


def _ratios(figure: Any, title: str, found: Sequence[tuple[str, Any]]) -> None:
    axes = figure.subplots()
    rows = list(reversed(found))
    _prepare(axes, title, [name for name, _ in rows])
    axes.axvline(1.0, color="#1f2430", linewidth=0.9)
    for row, (_, against) in enumerate(rows):
        low, high = against.low, against.high
        if not math.isfinite(high):
            low = high = against.value  # one round has no interval
        _dot(axes, row, against.value, low, high, ROLES["strategy"], f"{shown(against.value)} x")
    _scale(axes, [1.0, *(each.value for _, each in rows)])


def growth(results: Results) -> Iterator[Chart]:
    """By sweep: what one operation costs, as a parameter changes."""
    names = dict.fromkeys(curve.system for sweep in results.sweeps for curve in sweep.curves)
    others = cycle(_OTHERS)
    colours = {each: ENGINES.get(each) or next(others) for each in names}
    for sweep in results.sweeps:
        if any(each.points for each in sweep.curves):
            title = f"{sweep.workload}: microseconds of one, by {_NAMES[sweep.parameter]}"
            yield Chart(title, 4.8, 3.2, lambda on, s=sweep, t=title: _growth(on, s, t, colours))  # type: ignore[misc]


def _growth(figure: Any, sweep: Sweep, title: str, colours: Mapping[str, str]) -> None:
    axes = figure.subplots()
    axes.set_title(title)
    sizes = sorted({point.size for each in sweep.curves for point in each.points})
    for curve in sweep.curves:
        power = curve.exponent
        label = curve.system + ("" if power is None else f"  n^{power:.2f}")
        costs = [each.cost * 1e6 for each in curve.points]
        places = [each.size for each in curve.points]
        axes.plot(places, costs, "o-", color=colours[curve.system], label=label, markersize=3.5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sizes, labels=[shown(each) for each in sizes], minor=False)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))
    axes.grid(visible=True)
    axes.set_xlabel(_NAMES[sweep.parameter])
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


# -- what rows have in common ---------------------------------------------------------------


def _prepare(axes: Any, title: str, names: Sequence[str]) -> None:
    axes.set_title(title)
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), labels=names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.grid(visible=True, axis="x")


def _dot(
    axes: Any,
    row: int,
    value: float,
    low: float,
    high: float,
    colour: str,
    label: str,
    *,
    hollow: bool = False,
) -> None:
    """A value with its range and its number; hollow dots can be told from others without colour."""
    axes.plot([low, high], [row, row], color=colour, linewidth=1.6, solid_capstyle="round")
    face = "white" if hollow else colour
    axes.plot([value], [row], "o", color=colour, markerfacecolor=face, markersize=5.5)
    axes.annotate(
        label, (max(value, high), row), (6, 0), textcoords="offset points", va="center", fontsize=8
    )


def _scale(axes: Any, values: Sequence[float], right: float = 4.0) -> None:
    """Room for the numbers, and at least a factor of ten."""
    known = [each for each in values if each > 0 and math.isfinite(each)] or [1.0]
    low, high = min(known) / 1.5, max(known)
    axes.set_xlim(low, max(high, low * 10) * right)
    axes.xaxis.set_major_locator(LogLocator(numticks=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
