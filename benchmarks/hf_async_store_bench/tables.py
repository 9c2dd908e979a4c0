"""What a report says in words and tables, the same on the page, in Markdown and on a terminal."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from hf_async_store_bench.histogram import Histogram
from hf_async_store_bench.messages import RoundStats
from hf_async_store_bench.results import Cell, Figure, Results, Sweep, ratio
from hf_async_store_bench.statistics import Interval
from hf_async_store_bench.systems import BASELINES
from hf_async_store_bench.workloads import WORKLOADS


class Table(NamedTuple):
    title: str
    heads: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


def targets(results: Results) -> Table:
    """Every figure that was measured, with its target if it has one."""
    found = [each for each in results.figures if each.value is not None]
    note = "A ratio is against the system named, in the same run; its range is the 95 % interval."
    heads = ("engine", "what", "value", "range", "target", "", "measured")
    return Table("Figures and their targets", heads, [_target(each) for each in found], note)


def _target(figure: Figure) -> tuple[str, ...]:
    value = "" if figure.value is None else f"{shown(figure.value)} {figure.unit}"
    span = ""
    if figure.low is not None and figure.high is not None and figure.low != figure.high:
        span = range_shown(figure.low, figure.high)
    met = {True: "met", False: "MISSED", None: ""}[figure.met]
    return figure.engine, figure.what, value, span, figure.target, met, figure.detail


def measured(results: Results, load: str) -> Table:
    """One load: everything about every system."""
    cells = sorted(results.of(load), key=lambda each: -each.rate)
    workload = WORKLOADS[cells[0].load.workload]
    heads = ("", f"{workload.unit} a second", *_MEASURED)
    return Table(load, heads, list(map(_row, cells)), inspect.getdoc(workload) or "")


_WAITS: Final = ("p50", "p99", "p99.9", "longest")
_COUNTS: Final = ("conflicts", "retries", "errors", "checked")
_MEASURED: Final = ("range", *_WAITS, "processor", "memory", "written", *_COUNTS)


def _row(cell: Cell) -> tuple[str, ...]:
    written, together = cell.written, RoundStats.together(cell.rounds)
    errors = RoundStats.together([*cell.rounds, *cell.steady]).errors
    rates = (shown(cell.rate), range_shown(min(cell.rates), max(cell.rates)))
    costs = (time_shown(cell.processor), bytes_shown(cell.memory))
    bytes_written = "" if written is None else bytes_shown(written)
    counts = (f"{together.conflicts:,}", f"{together.retries:,}")
    named = ", ".join(f"{count} {name}" for name, count in errors.items())
    found = (*rates, *_waits(cell.calm), *costs, bytes_written, *counts, named)
    return (cell.system, *found, f"{cell.checked:,}")


def latencies(results: Results) -> Table:
    """Throughput against latency: as fast as it is answered, and at fixed times."""
    rows = []
    for cell in (each for each in results.cells if len(each.steady) > 1):
        for each in (RoundStats.together(cell.rounds), *cell.steady):
            name = f"{each.share:.0%} at fixed times" if each.share else "as fast as it is answered"
            rate = shown(each.rate if each.share else cell.rate)
            rows.append((cell.load.name, cell.system, name, rate, *_waits(each.latencies)))
    heads = ("load", "", "", "a second", *_WAITS)
    return Table("Throughput against latency", heads, rows, _FIXED)


_FIXED: Final = (
    "At fixed times, a latency counts from when the operation was due. A baseline has the rates of its "
    "engine, if it can do as much."
)


def _waits(latencies: Histogram) -> list[str]:
    waits = [*map(latencies.percentile, (0.5, 0.99, 0.999)), latencies.highest]
    return [time_shown(each) if latencies.count else "" for each in waits]


def throughput(results: Results, *, engines: bool) -> Table:
    """A row for each load; the columns are the engines, or the baselines and competitors."""
    cells = [each for each in results.cells if each.rounds and engines == (each.role == "strategy")]
    title = "Throughput of the engines: operations per second, by workload"
    title = title if engines else "Baselines and alternatives: a second, by load"
    systems = dict.fromkeys(each.system for each in cells)
    rows = []
    for load in dict.fromkeys(each.load.name for each in cells):
        found = [results.cell(each, load) for each in systems]
        rows.append((load, *("" if each is None else shown(each.rate) for each in found)))
    return Table(title, ("", *systems), rows, "The median of the rounds.")


def baselines(results: Results) -> Table:
    """How each baseline of the run is made."""
    here = {each.system for each in results.cells}
    rows = [
        (each.engine, each.name, " ".join(str(inspect.getdoc(each.load())).split()))
        for each in BASELINES
        if each.name in here
    ]
    heads = ("engine", "baseline", "what it does")
    return Table("How the baselines are made", heads, rows, _MADE)


_MADE: Final = (
    "SQL baselines store rows with a column for each field, the indexes of the store and foreign keys, "
    "what has no column as a document, and a version that each write raises. DynamoDB baselines store "
    "items in a table with indexes on the same fields as the store, and a version."
)


def ratios(results: Results) -> Table:
    """Each engine against each of its baselines and competitors."""
    rows = []
    for cell in results.cells:
        if cell.role != "strategy" or not cell.rounds:
            continue
        for other in results.of(cell.load.name):
            against = ratio(cell, other) if other.engine == cell.engine else None
            if other.role != "strategy" and against is not None:
                times = (shown(against.value), range_shown(against.low, against.high))
                rows.append((cell.load.name, cell.system, other.system, *times))
    heads = ("load", "engine", "against", "times as fast", "95 % interval")
    return Table("Against baselines and alternatives", heads, rows)


def grown(sweep: Sweep) -> Table:
    """A sweep: what one operation costs at each value."""
    sizes = sorted({point.size for curve in sweep.curves for point in curve.points})
    rows = []
    for curve in sweep.curves:
        costs = {point.size: time_shown(point.cost) for point in curve.points}
        power = curve.exponent
        fitted = "" if power is None else f"n^{power:.2f}"
        rows.append((curve.system, *(costs.get(size, "") for size in sizes), fitted))
    return Table(
        f"One of {sweep.workload}, by {sweep.parameter}",
        ("", *(f"{size:,.0f}" for size in sizes), "fitted"),
        rows,
    )


def conditions(results: Results) -> Table:
    rows = [
        *results.machine.items(),
        *(("version", f"{name} {number}") for name, number in results.versions.items()),
        *results.settings.items(),
        ("measured", f"{results.made_at}, {results.mode} run, {shown(results.seconds)} s"),
    ]
    return Table("Conditions", ("", ""), rows)


def skipped(results: Results, *, asked_for: bool = False) -> Table:
    """What was not measured, and why; figures of other runs, too, unless only for what was asked."""
    rows = [(each.what, each.why) for each in results.skipped]
    others = [each for each in results.figures if each.value is None and not asked_for]
    rows += [(f"{each.engine}: {each.what}", each.note) for each in others]
    return Table("Not measured", ("what", "why"), rows)


def verdict(results: Results) -> str:
    """The run in one sentence."""
    if results.failures:
        return f"FAILED: {len(results.failures)} invariants or workers broke"
    missed = sum(each.met is False for each in results.figures)
    met = sum(each.met is True for each in results.figures)
    checked = sum(each.checked for each in results.cells)
    held = f"Every invariant held ({checked:,} entities compared at the end)."
    return f"{held} Targets: {met} met, {missed} missed."


READING: Final = Path(__file__).with_name("reading.txt").read_text(encoding="utf-8").splitlines()


def as_text(table: Table) -> str:
    """Aligned, for a terminal or a log: words to the left, numbers to the right."""
    columns = list(zip(table.heads, *table.rows, strict=True))
    aligned = [_aligned(column, words=not place) for place, column in enumerate(columns)]
    lines = ["  " + "  ".join(cells).rstrip() for cells in zip(*aligned, strict=True)]
    return "\n".join([table.title, *lines, *([f"  {table.note}"] if table.note else [])])


def _aligned(column: Sequence[str], *, words: bool) -> list[str]:
    width = max(map(len, column))
    words = words or any(cell[:1].isalpha() for cell in column[1:])
    return [cell.ljust(width) if words else cell.rjust(width) for cell in column]


def changed(
    cells: Sequence[str], old: float, new: float, change: Interval, digits: int = 0
) -> list[str]:
    """The beginning of a row about a rate that has changed: of what, its values, and the change."""
    value, low, high = (change_shown(each, digits) for each in change)
    return [*cells, shown(old), shown(new), f"{value} %", f"{low} .. {high} %"]


def as_markdown(table: Table, level: int = 3) -> str:
    """A section with its table."""
    lines = [f"{'#' * level} {table.title}", ""]
    if table.rows:
        heads: Sequence[str] = [each or " " for each in table.heads]
        lines += [_line(heads), _line(["---"] * len(heads))]
        lines += [_line(each) for each in table.rows]
    if table.note:
        lines += ["", table.note]
    return "\n".join([*lines, ""])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(each.replace("|", "\\|") for each in cells) + " |"


def shown(value: float) -> str:
    """Three digits that count, and never an exponent."""
    if not math.isfinite(value):
        return "?"
    if value >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    rounded = float(f"{value:.3g}")
    return f"{rounded:g}" if rounded >= 0.0001 or not rounded else f"{rounded:.9f}".rstrip("0")


def range_shown(low: float, high: float) -> str:
    return f"{shown(low)} .. {shown(high)}"


def time_shown(seconds: float) -> str:
    if seconds >= 1:
        return f"{shown(seconds)} s"
    return f"{shown(seconds * 1000)} ms" if seconds >= 0.001 else f"{shown(seconds * 1e6)} us"


def bytes_shown(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{shown(count)} {unit}"
        count /= 1000
    return f"{shown(count)} GB"


def change_shown(ratio: float, digits: int = 0) -> str:
    """A ratio as the percentage by which something changed."""
    return f"{(ratio - 1) * 100:+.{digits}f}" if math.isfinite(ratio) else "?"
