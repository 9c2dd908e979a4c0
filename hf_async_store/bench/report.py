"""The report: one page that needs no network, and the same as Markdown, JSON and PNG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Final

from hf_async_store.bench import charts, tables
from hf_async_store.bench.drawing import Drawing, as_png, as_svg, can_png
from hf_async_store.bench.results import Results
from hf_async_store.bench.tables import Table

TITLE: Final = "hf_async_store: benchmarks"


def write(results: Results, folder: Path) -> list[Path]:
    """Write all of it; returns the files. Without Pillow there is no PNG, and the page says so."""
    folder.mkdir(parents=True, exist_ok=True)
    why = can_png()
    if why is not None:
        from hf_async_store.bench.results import LeftOut

        results.left_out.append(LeftOut("PNG", why))
    written = [folder / f"report.{each}" for each in ("json", "html", "md")]
    results.write(written[0])
    written[1].write_text(as_page(results), encoding="utf-8")
    written[2].write_text(as_markdown(results), encoding="utf-8")
    if why is None:
        for name, drawings in _sheets(results):
            written.append(folder / f"report-{name}.png")
            title = f"{TITLE}, {name} ({results.made_at}, {results.mode} run)"
            written[-1].write_bytes(as_png(title, drawings))
    return written


def _sheets(results: Results) -> Iterator[tuple[str, list[Drawing]]]:
    sheets = {
        "throughput": charts.throughput(results),
        "latency": charts.latency(results),
        "ratios": charts.ratios(results),
        "growth": charts.growth(results),
    }
    return ((name, drawings) for name, drawings in sheets.items() if drawings)


# -- Markdown -------------------------------------------------------------------------------


def as_markdown(results: Results) -> str:
    """The tables; the charts are in the other files."""
    parts = [f"# {TITLE}", "", tables.verdict(results), ""]
    parts += [f"- {each}" for each in results.failures]
    parts += ["", *(f"- {each}" for each in tables.READING), ""]
    parts += [tables.as_markdown(each, 2) for each in _tables(results)]
    return "\n".join(parts)


def _tables(results: Results) -> Iterator[Table]:
    yield tables.merits(results)
    for load in results.loads:
        if results.of(load):
            yield tables.measured(results, load)
    yield tables.floors(results)
    yield from map(tables.grown, results.sweeps)
    yield tables.left_out(results)
    yield tables.conditions(results)


# -- the page -------------------------------------------------------------------------------

_STYLE: Final = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif; color: #1f2430;
       background: #fff; margin: 0 auto; max-width: 1400px; padding: 24px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 20px; margin: 40px 0 8px; }
h3 { font-size: 15px; margin: 24px 0 6px; } p, ul { max-width: 80em; margin: 6px 0; }
.verdict { font-weight: 600; padding: 10px 14px; border-radius: 6px; background: #e8f5ec; }
.verdict.failed { background: #fde8e8; color: #a11; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 20px; }
.charts figure { margin: 0; border: 1px solid #e4e6ec; border-radius: 6px; padding: 8px; }
.charts svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 10px; border-bottom: 1px solid #e4e6ec; text-align: right; white-space: nowrap; }
th { color: #5b6170; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
.words td, .words th { text-align: left; white-space: normal; }
.met { color: #11753a; font-weight: 600; } .MISSED { color: #b42318; font-weight: 700; }
.note { color: #5b6170; font-size: 13px; }
.key span { display: inline-block; margin-right: 18px; }
.key i { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 6px;
         border: 2px solid; box-sizing: border-box; vertical-align: -1px; }
"""


def as_page(results: Results) -> str:
    """One HTML page with nothing outside of it."""
    failed = " failed" if results.failures else ""
    body = [
        f"<h1>{escape(TITLE)}</h1>",
        f"<p class='note'>{escape(_when(results))}</p>",
        f"<p class='verdict{failed}'>{escape(tables.verdict(results))}</p>",
        _list(results.failures),
        _words_table(tables.merits(results)),
        "<h2>Throughput</h2>",
        _key(),
        _figures(charts.throughput(results)),
        "<h2>Latency</h2>",
        _figures(charts.latency(results)),
        "<h2>Against the floors</h2>",
        _figures(charts.ratios(results)),
        "<h2>How cost grows</h2>",
        _figures(charts.growth(results)) if results.sweeps else "<p>Not in this run.</p>",
        *(_table(each) for each in map(tables.grown, results.sweeps)),
        "<h2>Everything in numbers</h2>",
        *(_table(tables.measured(results, each)) for each in results.loads if results.of(each)),
        _table(tables.floors(results)),
        _words_table(tables.left_out(results)),
        "<h2>How to read it</h2>",
        _list(tables.READING),
        _words_table(tables.conditions(results)),
    ]
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{escape(TITLE)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _when(results: Results) -> str:
    machine = results.machine
    return ", ".join(
        [
            results.made_at,
            f"{results.mode} run",
            machine.get("system", ""),
            machine.get("processor", ""),
            f"{machine.get('cores', '?')} cores",
            f"Python {results.versions.get('python', '?')}",
        ]
    )


def _key() -> str:
    kinds = {
        "strategy": "an engine of this package",
        "floor": "a floor: the driver by hand",
        "peer": "a peer",
    }
    marks = [
        f"<span><i style='border-color:{charts.COLOURS[kind]};"
        f"background:{'#fff' if kind == 'floor' else charts.COLOURS[kind]}'></i>{text}</span>"
        for kind, text in kinds.items()
    ]
    return f"<p class='key'>{''.join(marks)} The line through a dot is the range of the rounds.</p>"


def _figures(drawings: Sequence[Drawing]) -> str:
    inner = "\n".join(f"<figure>{as_svg(each)}</figure>" for each in drawings)
    return f"<div class='charts'>\n{inner}\n</div>"


def _list(items: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(each)}</li>" for each in items) + "</ul>" if items else ""


def _table(table: Table, kind: str = "") -> str:
    heads = "".join(f"<th>{escape(each)}</th>" for each in table.heads)
    rows = "\n".join(f"<tr>{''.join(map(_cell, each))}</tr>" for each in table.rows)
    note = f"<p class='note'>{escape(table.note)}</p>" if table.note else ""
    return (
        f"<h3>{escape(table.title)}</h3>\n{note}<div class='scroll'><table class='{kind}'>"
        f"<thead><tr>{heads}</tr></thead>\n<tbody>{rows}</tbody></table></div>"
    )


def _words_table(table: Table) -> str:
    return _table(table, "words") if table.rows else ""


def _cell(text: str) -> str:
    mark = f" class='{text}'" if text in ("met", "MISSED") else ""
    return f"<td{mark}>{escape(text)}</td>"
