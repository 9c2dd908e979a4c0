"""`hf-async-store advise`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Final

from hf_async_store_bench.cli.types import at_least_one, percent

USAGE: Final = "advise [OPTIONS]"
SUMMARY: Final = "recommend an engine for your load, by measuring it here"
MANUAL: Final = """\
It takes about a minute, with temporary stores.

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
        help="gets of a hundred operations (default: 80)",
    )
    parser.add_argument("--folder", metavar="DIR", help="where stores are made: the disk measured")


def run(arguments: Namespace) -> int:
    import asyncio

    from hf_async_store_bench.commands import advice

    return asyncio.run(advice(arguments))
