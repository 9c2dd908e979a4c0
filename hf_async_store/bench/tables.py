"""What a report says in words and tables, the same on the page, in Markdown and on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from hf_async_store.bench.numbers import bytes_shown, shown, time_shown
from hf_async_store.bench.results import Cell, Figure, Results, Sweep, ratio
from hf_async_store.bench.workloads import WORKLOADS

MET: Final = {True: "met", False: "MISSED", None: "not measured"}


class Table(NamedTuple):
    """A title, heads and rows of words."""

    title: str
    heads: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


def merits(results: Results, *, measured_only: bool = False) -> Table:
    """Every figure of merit with its target."""
    figures = [each for each in results.figures if each.value is not None or not measured_only]
    note = "A ratio is against the side named, in the same run; its range is the 95 % interval."
    more = len(results.figures) - len(figures)
    return Table(
        "Figures of merit",
        ("engine", "what", "value", "range", "target", ""),
        [_merit(each) for each in figures],
        note + (f" {more} more are not in this run." if more else ""),
    )


def _merit(figure: Figure) -> tuple[str, ...]:
    value = "" if figure.value is None else f"{shown(figure.value)} {figure.unit}"
    span = ""
    if figure.low is not None and figure.high is not None and figure.low != figure.high:
        span = f"{shown(figure.low)} .. {shown(figure.high)}"
    verdict = MET[figure.met] if figure.met is not None or not figure.note else figure.note
    return figure.engine, figure.what, value, span, figure.target, verdict


def measured(results: Results, load: str) -> Table:
    """One load: everything about every side."""
    cells = sorted(results.of(load), key=lambda each: -each.rate)
    workload = WORKLOADS[cells[0].load.workload]
    heads = (
        "",
        f"{workload.unit} a second",
        "range",
        "p50",
        "p99",
        "p99.9",
        "longest",
        "processor",
        "memory",
        "written",
        "conflicts",
        "retries",
        "errors",
        "checked",
    )
    return Table(load, heads, list(map(_row, cells)), f"{workload.summary}.")


def _row(cell: Cell) -> tuple[str, ...]:
    calm = cell.calm
    waits = [calm.percentile(share) for share in (0.5, 0.99, 0.999)] if calm.count else []
    written = cell.written
    return (
        cell.subject,
        shown(cell.rate),
        f"{shown(min(cell.rates))} .. {shown(max(cell.rates))}",
        *(map(time_shown, waits) if waits else ("", "", "")),
        time_shown(calm.highest / 1e9) if waits else "",
        time_shown(cell.processor),
        bytes_shown(cell.memory),
        "" if written is None else bytes_shown(written),
        f"{cell.conflicts:,}",
        f"{cell.retries:,}",
        ", ".join(f"{count} {name}" for name, count in cell.errors.items()),
        f"{cell.checked:,}",
    )


def rates(results: Results) -> Table:
    """Every side under every load: what it did in a second."""
    loads = [each for each in results.loads if results.of(each)]
    sides = dict.fromkeys(each.subject for load in loads for each in results.of(load))
    rows = []
    for side in sides:
        cells = [results.cell(side, load) for load in loads]
        rows.append((side, *("" if each is None else shown(each.rate) for each in cells)))
    return Table("A second, by load", ("", *loads), rows, "The median of the rounds.")


def floors(results: Results) -> Table:
    """Each strategy against each floor beneath it and each peer beside it."""
    rows = []
    for cell in results.cells:
        if cell.kind != "strategy" or not cell.rounds:
            continue
        for other in results.of(cell.load.name):
            against = ratio(cell, other) if other.family == cell.family else None
            if other.kind != "strategy" and against is not None:
                span = f"{shown(against.low)} .. {shown(against.high)}"
                rows.append(
                    (cell.load.name, cell.subject, other.subject, shown(against.value), span)
                )
    heads = ("load", "engine", "against", "times as fast", "95 % interval")
    return Table("Against floors and peers", heads, rows)


def grown(sweep: Sweep) -> Table:
    """A sweep: what one operation costs at each value."""
    sizes = sorted({point.size for curve in sweep.curves for point in curve.points})
    rows = []
    for curve in sweep.curves:
        costs = {point.size: time_shown(point.cost) for point in curve.points}
        power = curve.exponent
        fitted = "" if power is None else f"n^{power:.2f}"
        rows.append((curve.subject, *(costs.get(size, "") for size in sizes), fitted))
    return Table(
        f"One of {sweep.workload}, by {sweep.knob}",
        ("", *(f"{size:,.0f}" for size in sizes), "fitted"),
        rows,
    )


def conditions(results: Results) -> Table:
    """The machine, the versions and the settings."""
    rows = [
        *results.machine.items(),
        *(("version", f"{name} {number}") for name, number in results.versions.items()),
        *results.settings.items(),
        ("measured", f"{results.made_at}, {results.mode} run, {shown(results.seconds)} s"),
    ]
    return Table("Conditions", ("", ""), rows)


def left_out(results: Results) -> Table:
    """What was not measured, and why."""
    rows = [(each.what, each.why) for each in results.left_out]
    return Table("Left out", ("what", "why"), rows)


def verdict(results: Results) -> str:
    """The run in one sentence."""
    failures = len(results.failures)
    missed = sum(each.met is False for each in results.figures)
    met = sum(each.met is True for each in results.figures)
    checked = sum(each.checked for each in results.cells)
    if failures:
        return f"FAILED: {failures} invariants or workers broke"
    return (
        f"Every invariant held ({checked:,} entities compared at the end). "
        f"Targets: {met} met, {missed} missed, {len(results.figures) - met - missed} not measured."
    )


READING: Final = (
    "Throughput is what all tasks together did as fast as they were answered: the median of the "
    "rounds, and their range. Rounds of all sides take turns, so that the noise of the machine hits "
    "all alike: hold on to the ratios.",
    "Latencies are from operations at fixed times, half as many as the side can do (5,000 a second "
    "at most). They count from the moment at which an operation was due, so that a stall shows in "
    "everything that it kept waiting. What takes so long that only a few fit has none.",
    "Processor and memory are those of the measured process alone; a server's own are not in them.",
    "Written is what the measured process caused to be written to disks, for one unit. For "
    "PostgreSQL, what its server put into its log (WAL) comes to that; for DynamoDB, what was sent "
    "over the connections, heads and bodies of requests, because its server writes nothing here.",
    "Floors are the least code by hand on the same driver: no versions, no checks, no references. "
    "Only the multi-row inserts of a burst store all that a store does. Peers keep fewer promises "
    "than a store, and some do not sync.",
)


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
