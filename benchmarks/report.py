"""One command for all figures: the engines' own scripts, then the harness, in one report.

    python benchmarks/report.py [--short] [--keep-docs]

Writes the report to benchmarks/results, and its tables to docs/benchmarks.md, where the machine is
named. Best on a machine that does nothing else. A script that fails or runs out of its time is told,
and its figures are then missing in the report by name.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Final

from hf_async_store.bench import tables
from hf_async_store.bench.merits import SCRIPTS
from hf_async_store.bench.results import Results

_HERE: Final = Path(__file__).parent
_RESULTS: Final = _HERE / "results"
_PAGE: Final = _HERE.parent / "docs" / "benchmarks.md"
_BEGIN: Final = "<!-- results: written by benchmarks/report.py -->"
_END: Final = "<!-- end of results -->"
_WIDTH: Final = 110
_SCRIPT_SECONDS: Final = 300.0
"""Beside the harness's own quarter of an hour."""


def run_scripts() -> list[Path]:
    """Each script of an engine, in its quick form; the files of those that came to their end."""
    files = []
    for name in SCRIPTS:
        file = _RESULTS / f"{name}.json"
        file.unlink(missing_ok=True)  # figures of another day are no figures of this run
        script = _HERE / f"{name}.py"
        print(f"benchmarks/{name}.py ...", file=sys.stderr, flush=True)
        why = _ended([sys.executable, str(script), "--quick", "--json", str(file)])
        if why:
            print(f"  left out: {why}", file=sys.stderr)
        if file.exists():
            files.append(file)
    return files


def _ended(command: list[str]) -> str:
    """Run it within its time; why it did not come to its end, if so."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            code = process.wait(_SCRIPT_SECONDS)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it stops the servers that it started
            return f"not done within {_SCRIPT_SECONDS:.0f} s"
    return f"exit code {code}" if code else ""


def write_page(results: Results) -> None:
    """Put the tables between the marks of the page."""
    page = _PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    parts = [tables.verdict(results), "", tables.as_markdown(tables.conditions(results))]
    parts += [tables.as_markdown(tables.merits(results))]
    parts += [tables.as_markdown(tables.rates(results))]
    parts += map(tables.as_markdown, map(tables.grown, results.sweeps))
    parts += [tables.as_markdown(tables.left_out(results))]
    lines = [each for part in parts for each in _for_the_page(part)]
    _PAGE.write_text(before + "\n".join([_BEGIN, "", *lines, _END]) + after, encoding="utf-8")


def _for_the_page(text: str) -> list[str]:
    """The lines of a part, as documentation has them: prose of a bounded width, no path of a machine."""
    lines: list[str] = []
    for line in text.split("\n"):
        if line.startswith("|"):
            lines += [] if line.startswith("| folder |") else [line]
        else:
            lines += textwrap.wrap(line, _WIDTH) or [""]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description="All figures in one report.")
    parser.add_argument("--short", action="store_true", help="no scripts, and the short run")
    parser.add_argument("--keep-docs", action="store_true", help="leave docs/benchmarks.md alone")
    options = parser.parse_args()
    started = time.monotonic()
    _RESULTS.mkdir(exist_ok=True)
    given = [] if options.short else run_scripts()
    command = [sys.executable, "-m", "hf_async_store", "bench", "--output", str(_RESULTS)]
    command += ["--short" if options.short else "--full"]
    code = subprocess.run(
        [*command, *(f"--figures={each}" for each in given)], check=False
    ).returncode
    report = _RESULTS / "report.json"
    if code in (0, 4) and not options.keep_docs:
        write_page(Results.read(report))
    print(f"{time.monotonic() - started:.0f} s in all", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
