"""`hf-async-store bench`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Final

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
_SHORT: Final = "within 2 minutes: the main workloads (the default)"
_FULL: Final = (
    "within 20 minutes: all workloads and systems, growth of cost with data size, and memory"
)
_ONLY: Final = (
    "measure only this: an engine with its baselines and competitors (json), one system (tinydb), or a "
    "role (strategy, baseline, competitor); repeatable"
)
_WORKLOAD: Final = "run only this workload, such as save, or scenario, such as memory; repeatable"
_BUDGET: Final = (
    "time limit of the whole run (default: 100 for the short, 1140 for the full run, none with --workload, "
    "--entities, --size, --tasks, --processes, --burst, --reads-percent); what did not fit is listed"
)
_ROUNDS: Final = (
    "exactly this number of rounds of each system under each load; no additional rounds for "
    "uncertain results"
)
_RATE: Final = "operations per second of the latency measurement (default: half of the maximum)"


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
        ("entities", "number of machine records stored before the measurement"),
        ("size", "size of the JSON of a machine record in bytes"),
        ("tasks", "concurrent tasks in each process"),
        ("processes", "concurrent processes on one store"),
        ("burst", "number of machine records in one `acquire` request and in one batch"),
        ("rounds", _ROUNDS),
    ):
        add(f"--{name}", metavar="N", type=at_least_one, help=what)
    reads = "percentage of reads in the mixed workload"
    add("--reads-percent", metavar="P", type=percent, help=reads)
    add("--duration", metavar="SECONDS", type=positive, help="duration of one round")
    add("--budget", metavar="SECONDS", type=positive, help=_BUDGET)
    add("--rate", metavar="N", type=positive, help=_RATE)
    add("--seed", metavar="N", type=int, default=1, help="seed of random choices (default: 1)")
    durable = "acknowledged writes need not survive a power failure"
    add("--no-fsync", action="store_true", help=durable)
    folder = "the folder for the temporary stores, on the disk to be measured"
    add("--folder", metavar="DIR", help=folder)
    output = f"folder for the report (default: {OUTPUT})"
    add("--output", metavar="DIR", default=OUTPUT, help=output)
    add("--page", metavar="FILE", help="also replace the results in this Markdown file")


def run(arguments: Namespace) -> int:
    """The exit code."""
    import asyncio

    from hf_async_store_bench.commands import bench
    from hf_async_store_bench.processes import run_to_completion

    return asyncio.run(run_to_completion(bench(arguments)))
