"""`hf-async-store bench`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any, Final

from hf_async_store_bench.cli.types import at_least_one, percent, positive

OUTPUT: Final = "hf-async-store-bench"  # the folder of the report, unless --output is given
USAGE: Final = "bench [compare OLD.json NEW.json] [OPTIONS]"
SUMMARY: Final = "measure every engine on this machine, together with baselines and competitors"
MANUAL: Final = """\
All stores are temporary, and servers that are needed are started. --store URL also measures a store
of your own. Its URL must contain {folder} as the path of the data: a temporary folder is inserted.
Baselines are hand-written programs without this package; competitors are other libraries.
The report is a web page, Markdown, JSON and PNG. Exit code 4: a write was lost or a result wrong.

  hf-async-store bench
  hf-async-store bench --full --output report
  hf-async-store bench --only json --workload save --tasks 1 --processes 4
  hf-async-store bench compare old/report.json new/report.json
"""
_COMPARE: Final = "show which differences between two runs are larger than the noise"


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    lines = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    helped = dict(each.split(": ", 1) for each in lines)

    def add(name: str, to: Any = parser, **how: Any) -> None:
        to.add_argument(f"--{name}", help=helped[name].replace("%", "%%"), **how)

    parser.add_argument("words", metavar="compare OLD.json NEW.json", nargs="*", help=_COMPARE)
    one = parser.add_mutually_exclusive_group()
    add("short", one, action="store_true")
    add("full", one, action="store_true")
    for name in ("only", "workload"):
        add(name, metavar="NAME", action="append", default=[])
    for name in ("entities", "size", "tasks", "processes", "burst", "rounds"):
        add(name, metavar="N", type=at_least_one)
    add("reads-percent", metavar="P", type=percent)
    for name in ("duration", "budget"):
        add(name, metavar="SECONDS", type=positive)
    add("rate", metavar="N", type=positive)
    add("seed", metavar="N", type=int, default=1)
    add("no-fsync", action="store_true")
    add("folder", metavar="DIR")
    output = f"folder for the report (default: {OUTPUT})"
    parser.add_argument("--output", metavar="DIR", default=OUTPUT, help=output)
    add("page", metavar="FILE")


def run(arguments: Namespace) -> int:
    """The exit code."""
    import asyncio

    from hf_async_store_bench.commands import bench
    from hf_async_store_bench.processes import run_to_completion

    return asyncio.run(run_to_completion(bench(arguments)))
