"""`hf-async-store bench`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Final

from hf_async_store_bench.cli.types import at_least_one, percent, positive

OUTPUT: Final = "hf-async-store-bench"  # the folder of the report, if nothing else is said
USAGE: Final = "bench [compare OLD.json NEW.json] [OPTIONS]"
SUMMARY: Final = "measure every engine here, beside hand-written baselines and alternatives"
MANUAL: Final = """\
All stores are temporary, and servers that are needed are started. --store adds a store with {folder}
in its URL, as of a third-party engine. The report is a page, Markdown, JSON and PNG.
Exit code 4 if a write was lost or an answer was wrong.

  hf-async-store bench
  hf-async-store bench --full --output report
  hf-async-store bench --only json --workload save --tasks 1 --processes 4
  hf-async-store bench compare old/report.json new/report.json
"""
_COMPARE: Final = "tell which differences between two runs are larger than the noise"
_SHORT: Final = "within 2 minutes: the main workloads (the default)"
_FULL: Final = (
    "within 20 minutes: all workloads, baselines and alternatives, how cost grows, memory"
)
_ONLY: Final = (
    "measure only this: an engine with its baselines and alternatives (json), one system (tinydb), or a "
    "role (strategy, baseline, competitor); repeatable"
)
_WORKLOAD: Final = (
    "run only this one, as save, poll, 'create batch', or a scenario, as memory; repeatable"
)
_BUDGET: Final = (
    "of the whole run (default: 100 for the short, 1140 for the full one); what does not fit is "
    "listed"
)
_RATE: Final = "operations a second of the round at fixed times (default: half of what it can do)"


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("words", metavar="compare OLD.json NEW.json", nargs="*", help=_COMPARE)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--short", action="store_true", help=_SHORT)
    how.add_argument("--full", action="store_true", help=_FULL)
    add("--only", metavar="NAME", action="append", default=[], help=_ONLY)
    add("--workload", metavar="NAME", action="append", default=[], help=_WORKLOAD)
    for name, what in (
        ("entities", "machines that are stored before"),
        ("size", "bytes of JSON of a machine"),
        ("tasks", "concurrent tasks in each process"),
        ("processes", "concurrent processes on one store"),
        ("burst", "machines of one acquired request, and of one batch"),
        ("rounds", "rounds of each system under each load, and no more where they are unsure"),
    ):
        add(f"--{name}", metavar="N", type=at_least_one, help=what)
    add("--reads-percent", metavar="P", type=percent, help="reads of the mixed workload")
    add("--duration", metavar="SECONDS", type=positive, help="of one round")
    add("--budget", metavar="SECONDS", type=positive, help=_BUDGET)
    add("--rate", metavar="N", type=positive, help=_RATE)
    add("--seed", metavar="N", type=int, default=1, help="of what is chosen at random")
    durable = "acknowledged writes need not outlive a loss of power"
    add("--no-fsync", action="store_true", help=durable)
    add("--folder", metavar="DIR", help="where stores are made: the disk that is measured")
    add("--output", metavar="DIR", default=OUTPUT, help=f"of the report (default: {OUTPUT})")
    add("--page", metavar="FILE", help="also replace the results in this Markdown file")


def run(arguments: Namespace) -> int:
    """The exit code."""
    import asyncio

    from hf_async_store_bench.commands import bench
    from hf_async_store_bench.processes import run_to_completion

    return asyncio.run(run_to_completion(bench(arguments)))
