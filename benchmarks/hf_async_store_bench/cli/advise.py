"""`hf-async-store advise`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Final

from hf_async_store_bench.cli.options import Texts, at_least_one, percent

USAGE: Final = "advise [OPTIONS]"
SUMMARY: Final = "recommend an engine for your load, by measuring it on this machine"
_TEXTS: Final = Texts(__file__)
MANUAL: Final = _TEXTS.manual
REFUSED: Final = dict.fromkeys(
    ("store", "config", "collections"), "it measures temporary stores of each engine"
)


def add_arguments(parser: ArgumentParser) -> None:
    add = _TEXTS.add_to(parser)
    for name, default in (("entities", 10_000), ("tasks", 16), ("processes", 1)):
        add(name, metavar="N", type=at_least_one, default=default)
    add("reads-percent", metavar="P", type=percent, default=80)
    add("folder", metavar="DIR")


def run(arguments: Namespace) -> int:
    import asyncio

    from hf_async_store_bench.commands import advice
    from hf_async_store_bench.processes import run_to_completion

    return asyncio.run(run_to_completion(advice(arguments)))
