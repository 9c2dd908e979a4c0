"""`hf-async-store bench`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Final

from hf_async_store_bench.cli.options import Texts, at_least_one, percent, positive

OUTPUT: Final = "hf-async-store-bench"  # the folder of the report, unless --output is given
USAGE: Final = "bench [compare OLD.json NEW.json] [OPTIONS]"
SUMMARY: Final = "measure every engine on this machine, together with baselines and competitors"
_TEXTS: Final = Texts(__file__)
MANUAL: Final = _TEXTS.manual
_COMPARE: Final = "show which differences between two runs are larger than the noise"


def add_arguments(parser: ArgumentParser) -> None:
    add = _TEXTS.add_to(parser)
    parser.add_argument("words", metavar="compare OLD.json NEW.json", nargs="*", help=_COMPARE)
    one = parser.add_mutually_exclusive_group()
    add("short", one, action="store_true")
    add("full", one, action="store_true")
    add("speed", one, action="store_true")
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
    import asyncio

    from hf_async_store_bench.commands import bench
    from hf_async_store_bench.processes import run_to_completion

    return asyncio.run(run_to_completion(bench(arguments)))
