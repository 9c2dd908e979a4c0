"""One command for all figures: the engines' own scripts, then the harness, in one report.

    python benchmarks/report.py [--short] [--minutes N] [--keep-docs]

Writes the report to benchmarks/results, and its tables to docs/benchmarks.md, where the machine is
named. Best on a machine that does nothing else. A script that fails or runs out of its time is told,
and its figures are then missing in the report by name. The harness has the time that is left.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, Final

from hf_async_store.bench import tables
from hf_async_store.bench.results import Results

_HERE: Final = Path(__file__).parent
_RESULTS: Final = _HERE / "results"
_PAGE: Final = _HERE.parent / "docs" / "benchmarks.md"
_BEGIN: Final = "<!-- results: written by benchmarks/report.py -->"
_END: Final = "<!-- end of results -->"
_WIDTH: Final = 110

_PARTS: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("json_store", ("--quick", "--only", "sizes", "together", "single", "gets", "command")),
    ("json_store", ("--quick", "--only", "opening", "memory", "fold", "rewriting", "processes")),
    ("json_store", ("--quick", "--only", "hold", "burst")),
    ("sql_store", ("--quick",)),
    ("dynamodb_store", ("--quick",)),
    *(
        ("migration", ("--report", "--only", row))
        for row in ("sqlite", "postgresql", "json_backup", "memory", "sqlite_backup")
    ),
)
"""In parts, so that one that runs out of its time does not take the others with it. Moving and
backing up have targets at a size of their own, and each takes a while."""

_SCRIPTS_SHARE: Final = 0.4
_PART_SECONDS: Final = 200.0
_WRITING_SECONDS: Final = 30.0
"""For the report itself, and what a machine does not do as quickly as it was expected."""


def run_scripts(seconds: float) -> list[Path]:
    """The scripts of the engines, as far as there is time; the files of those that gave figures."""
    until = time.monotonic() + seconds
    found: dict[str, dict[str, Any]] = {}
    for name, options in _PARTS:
        measured = _figures(name, options, until)
        if measured is None and "--report" in options:
            measured = _figures(name, ("--quick", *options[1:]), until)
        if measured is not None:
            found.setdefault(name, {**measured, "figures": []})["figures"] += measured["figures"]
    files = []
    for name in dict.fromkeys(name for name, _ in _PARTS):
        file = _RESULTS / f"{name}.json"
        file.unlink(missing_ok=True)  # figures of another day are no figures of this run
        if name in found:
            file.write_text(json.dumps(found[name], indent=2) + "\n")
            files.append(file)
    return files


def _figures(name: str, options: tuple[str, ...], until: float) -> dict[str, Any] | None:
    """What a script measured; None if it did not come to its end."""
    print(f"benchmarks/{name}.py {' '.join(options)} ...", file=sys.stderr, flush=True)
    file = _RESULTS / "part.json"
    file.unlink(missing_ok=True)
    seconds = min(_PART_SECONDS, until - time.monotonic())
    command = [sys.executable, str(_HERE / f"{name}.py"), *options, "--json", str(file)]
    why = _ended(command, seconds) if seconds > 0 else "no time was left"
    if why:
        print(f"  left out: {why}", file=sys.stderr)
        return None
    measured: dict[str, Any] = json.loads(file.read_bytes())
    file.unlink()
    return measured


def _ended(command: list[str], seconds: float) -> str:
    """Run it within its time; why it did not come to its end, if so."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it stops the servers that it started
            return f"not done within {seconds:.0f} s"
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
    parser.add_argument(
        "--minutes", type=float, default=20.0, metavar="N", help="for all of it (default: 20)"
    )
    parser.add_argument("--keep-docs", action="store_true", help="leave docs/benchmarks.md alone")
    options = parser.parse_args()
    started = time.monotonic()
    _RESULTS.mkdir(exist_ok=True)
    whole = options.minutes * 60
    command = [sys.executable, "-m", "hf_async_store", "bench", "--output", str(_RESULTS)]
    if options.short:
        command += ["--short"]
    else:
        command += [f"--figures={each}" for each in run_scripts(whole * _SCRIPTS_SHARE)]
        left = whole - (time.monotonic() - started) - _WRITING_SECONDS
        command += ["--full", f"--budget={left:.0f}"]
    code = subprocess.run(command, check=False).returncode
    report = _RESULTS / "report.json"
    if code in (0, 4) and not options.keep_docs:
        write_page(Results.read(report))
    print(f"{time.monotonic() - started:.0f} s in all", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
