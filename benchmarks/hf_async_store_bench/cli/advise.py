"""`hf-async-store advise`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hf_async_store_bench.cli.types import at_least_one, percent

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

USAGE: Final = "advise [OPTIONS]"
SUMMARY: Final = "recommend an engine for your load, by measuring it on this machine"
MANUAL: Final = """\
It takes about a minute, with temporary stores. --store, --config and --collections are not used.

  hf-async-store advise --entities 50000 --tasks 32 --processes 4 --reads-percent 90
"""


def add_arguments(parser: ArgumentParser) -> None:
    for name, default, what in (
        ("entities", 10_000, "machines that will be stored"),
        ("tasks", 16, "concurrent tasks in each process"),
        ("processes", 1, "concurrent processes on the store"),
    ):
        parser.add_argument(
            f"--{name}",
            metavar="N",
            type=at_least_one,
            default=default,
            help=f"{what} (default: {default:,})",
        )
    parser.add_argument(
        "--reads-percent",
        metavar="P",
        type=percent,
        default=80,
        help="percentage of operations that are gets (default: 80)",
    )
    parser.add_argument(
        "--folder",
        metavar="DIR",
        help="the folder for the temporary stores, on the disk to be measured",
    )


def run(arguments: Namespace) -> int:
    import asyncio

    from hf_async_store_bench.commands import advice

    return asyncio.run(advice(arguments))
