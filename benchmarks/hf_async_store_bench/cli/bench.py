"""`hf-async-store bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hf_async_store_bench.cli.types import at_least_one, percent, positive

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

OUTPUT: Final = "hf-async-store-bench"
"""The folder that a report is written to, unless --output is given."""

USAGE: Final = "bench [compare OLD.json NEW.json] [OPTIONS]"
SUMMARY: Final = "measure every engine on this machine, together with baselines and competitors"
MANUAL: Final = """\
All stores are temporary, and servers that are needed are started. --store URL also measures this
store, such as that of a third-party engine; {folder} in its URL is replaced by a temporary folder.
Baselines are hand-written programs without this package; competitors are other libraries.
The report consists of a web page, Markdown, JSON and PNG files. The exit code is 4 if a write was
lost or a result was wrong.

  hf-async-store bench
  hf-async-store bench --full --output report
  hf-async-store bench --only json --workload save --tasks 1 --processes 4
  hf-async-store bench compare old/report.json new/report.json
"""


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "words",
        metavar="compare OLD.json NEW.json",
        nargs="*",
        help="show which differences between two runs are larger than the noise",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--short", action="store_true", help="within 2 minutes: the main workloads (the default)"
    )
    how.add_argument(
        "--full",
        action="store_true",
        help="within 20 minutes: all workloads, baselines and competitors, growth of cost with data size, "
        "and memory",
    )
    add(
        "--only",
        metavar="NAME",
        action="append",
        default=[],
        help="measure only this: an engine with its baselines and competitors (json), one system "
        "(tinydb), or a role (strategy, baseline, competitor); repeatable",
    )
    add(
        "--workload",
        metavar="NAME",
        action="append",
        default=[],
        help="run only this workload, such as save, poll or 'create batch', or this scenario, such as "
        "memory; repeatable",
    )
    for name, what in (
        ("entities", "number of machine records stored before the measurement"),
        ("size", "size of the JSON of a machine record in bytes"),
        ("tasks", "concurrent tasks in each process"),
        ("processes", "concurrent processes on one store"),
        ("burst", "number of machine records in one `acquire` request and in one batch"),
        (
            "rounds",
            "exactly this number of rounds of each system under each load; no additional rounds for "
            "uncertain results",
        ),
    ):
        add(f"--{name}", metavar="N", type=at_least_one, help=what)
    add(
        "--reads-percent",
        metavar="P",
        type=percent,
        help="percentage of reads in the mixed workload",
    )
    add("--duration", metavar="SECONDS", type=positive, help="duration of one round")
    add(
        "--budget",
        metavar="SECONDS",
        type=positive,
        help="time limit of the whole run (default: 100 for the short, 1140 for the full run); the "
        "measurements that did not fit are listed",
    )
    add(
        "--rate",
        metavar="N",
        type=positive,
        help="rate of the latency measurement, in operations per second (default: half of the maximum "
        "throughput)",
    )
    add("--seed", metavar="N", type=int, default=1, help="seed of random choices (default: 1)")
    add(
        "--no-fsync",
        action="store_true",
        help="acknowledged writes need not survive a power failure",
    )
    add(
        "--folder",
        metavar="DIR",
        help="the folder for the temporary stores, on the disk to be measured",
    )
    add(
        "--output", metavar="DIR", default=OUTPUT, help=f"folder for the report (default: {OUTPUT})"
    )
    add("--page", metavar="FILE", help="also replace the results in this Markdown file")


def run(arguments: Namespace) -> int:
    import asyncio

    from hf_async_store_bench.commands import bench

    return asyncio.run(bench(arguments))
