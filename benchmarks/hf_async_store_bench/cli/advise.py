"""`hf-async-store advise`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Final

from hf_async_store_bench.cli.types import at_least_one, percent

USAGE: Final = "advise [OPTIONS]"
SUMMARY: Final = "recommend an engine for your load, by measuring it on this machine"
MANUAL: Final = """\
It takes about a minute, with temporary stores.

  hf-async-store advise --entities 50000 --tasks 32 --processes 4 --reads-percent 90
"""

REFUSED: Final = dict.fromkeys(
    ("store", "config", "collections"), "it measures temporary stores of each engine"
)


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    for name, default, what in (
        ("entities", 10_000, "machines that will be stored"),
        ("tasks", 16, "concurrent tasks in each process"),
        ("processes", 1, "concurrent processes on the store"),
    ):
        described = f"{what} (default: {default:,})"
        add(f"--{name}", metavar="N", type=at_least_one, default=default, help=described)
    reads = "percentage of operations that are gets (default: 80)"
    add("--reads-percent", metavar="P", type=percent, default=80, help=reads)
    add(
        "--folder",
        metavar="DIR",
        help="the folder for the temporary stores, on the disk to measure",
    )


def run(arguments: Namespace) -> int:
    import asyncio

    from hf_async_store_bench.commands import advice
    from hf_async_store_bench.processes import run_to_completion

    return asyncio.run(run_to_completion(advice(arguments)))
