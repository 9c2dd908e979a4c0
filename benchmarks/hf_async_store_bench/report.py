"""The report: one page that needs no network, and the same as Markdown, JSON and PNG."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Final

from hf_async_store import ConfigurationError
from hf_async_store_bench import charts, tables
from hf_async_store_bench.messages import encode
from hf_async_store_bench.results import Results
from hf_async_store_bench.tables import Table

TITLE: Final = "hf_async_store: benchmarks"
_SHEETS: Final = (charts.engines, charts.compared, charts.ratios, charts.growth)


def write(results: Results, folder: Path) -> list[Path]:
    """Write all of it; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    data, page, markdown = (folder / f"report.{each}" for each in ("json", "html", "md"))
    data.write_bytes(encode(results) + b"\n")
    page.write_text(as_page(results), encoding="utf-8")
    markdown.write_text(as_markdown(results), encoding="utf-8")
    written = [data, page, markdown]
    for sheet in _SHEETS:
        drawn = list(sheet(results))
        if drawn:
            name = sheet.__name__
            title = f"{TITLE}, {name} ({results.made_at}, {results.mode} run)"
            written.append(folder / f"report-{name}.png")
            written[-1].write_bytes(charts.as_png(title, drawn))
    return written


def as_markdown(results: Results) -> str:
    """The tables; the charts are in the other files."""
    shown = [tables.throughput(results, engines=True), *_measured(results)]
    shown += [tables.baselines(results), tables.ratios(results), *map(tables.grown, results.sweeps)]
    shown += [tables.conditions(results), tables.targets(results), tables.latencies(results)]
    shown += [tables.skipped(results)]
    parts = [f"# {TITLE}", "", tables.verdict(results), ""]
    parts += [f"- {each}" for each in results.failures]
    parts += ["", *(f"- {each}" for each in tables.READING), ""]
    return "\n".join([*parts, *(tables.as_markdown(each, 2) for each in shown if each.rows)])


def _measured(results: Results) -> list[Table]:
    return [tables.measured(results, each) for each in results.loads if results.of(each)]


def as_page(results: Results) -> str:
    """One HTML page with nothing outside of it."""
    grown = [_figures(charts.growth(results), 380), *map(_table, map(tables.grown, results.sweeps))]
    every = _folded("Every ratio to a baseline or a competitor", tables.ratios(results))
    numbers = [*map(_table, (*_measured(results), tables.latencies(results))), every]
    engines = tables.throughput(results, engines=True)
    conditions = tables.conditions(results)
    compared = [
        _figures(charts.compared(results), 480),
        _table(tables.baselines(results), "words"),
        _figures(charts.ratios(results), 560),
    ]
    machine, python = results.machine, results.versions.get("python", "?")
    on = [machine.get(each, "") for each in ("system", "processor")]
    cores = f"{machine.get('cores', '?')} cores"
    when = [results.made_at, f"{results.mode} run", *on, cores, f"Python {python}"]
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(TITLE),
        when=escape(", ".join(when)),
        failed=" failed" if results.failures else "",
        verdict=escape(tables.verdict(results)),
        failures=_list(results.failures),
        engines=f"{_figures(charts.engines(results), 320)}\n{_table(engines)}",
        compared="\n".join(compared),
        growth="\n".join(["<h2>How cost grows</h2>", *grown] if results.sweeps else grown),
        numbers="\n".join(numbers),
        reading=_list(tables.READING),
        conditions=_folded("The machine, the versions and the settings", conditions),
        targets=_table(tables.targets(results), "words"),
        skipped=_folded("What was not measured, and why", tables.skipped(results), "words"),
        **charts.ROLES,
    )


def _figures(drawn: Iterable[charts.Chart], least: int) -> str:
    inner = "\n".join(f"<figure>{charts.as_svg(each)}</figure>" for each in drawn)
    return f"<div class='charts' style='--least: {least}px'>\n{inner}\n</div>" if inner else ""


def _folded(title: str, table: Table, kind: str = "") -> str:
    inner = _table(table, kind)
    return f"<details><summary>{escape(title)}</summary>{inner}</details>" if inner else ""


def _list(items: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(each)}</li>" for each in items) + "</ul>" if items else ""


def _table(table: Table, kind: str = "") -> str:
    if not table.rows:
        return ""
    heads = "".join(f"<th>{escape(each)}</th>" for each in table.heads)
    rows = "\n".join(f"<tr>{''.join(map(_cell, each))}</tr>" for each in table.rows)
    note = f"<p class='note'>{escape(table.note)}</p>" if table.note else ""
    return (
        f"<h3>{escape(table.title)}</h3>\n{note}<div class='scroll'><table class='{kind}'>"
        f"<thead><tr>{heads}</tr></thead>\n<tbody>{rows}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    mark = f" class='{text}'" if text in ("met", "MISSED") else ""
    return f"<td{mark}>{escape(text)}</td>"


_BEGIN: Final = "<!-- results: written by `make bench-{}` -->"
_END: Final = "<!-- end of results -->"
_WIDTH: Final = 110


def around_results(page: Path, mode: str) -> tuple[str, str]:
    """What stands before and after the results of such a run in a Markdown file, with the lines that mark
    them; or ConfigurationError."""
    begin = _BEGIN.format(mode)
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigurationError(f"--page {page}: cannot be read: {exc.strerror}") from exc
    before, found, after = text.partition(begin)
    if not found or _END not in after:
        raise ConfigurationError(f"--page {page}: needs the lines {begin!r} and {_END!r}")
    return before + begin, after[after.index(_END) :]


def write_into(page: Path, results: Results) -> None:
    """Replace the results in a page of the documentation."""
    before, after = around_results(page, results.mode)
    found = [tables.targets(results), tables.latencies(results), tables.conditions(results)]
    if results.mode == "full":
        found[:0] = [tables.throughput(results, engines=True), *map(tables.grown, results.sweeps)]
        found += [tables.baselines(results), tables.throughput(results, engines=False)]
        found += [tables.skipped(results)]
    parts = [tables.as_markdown(each) for each in found if each.rows]
    lines = [line for each in (tables.verdict(results), "", *parts) for line in _wrapped(each)]
    page.write_text(before + "\n".join(["", "", *lines, ""]) + after, "utf-8")


def _wrapped(text: str) -> list[str]:
    """Prose of a bounded width, and no path of a machine."""
    lines: list[str] = []
    for line in text.split("\n"):
        if line.startswith("|"):
            lines += [] if line.startswith("| folder |") else [line]
        else:
            lines += textwrap.wrap(line, _WIDTH) or [""]
    return lines
