"""`hf-async-store demo`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Final

from hf_async_store_bench.cli.options import Texts, at_least_one, positive

SUMMARY: Final = "run a demonstration: several processes share work, and one of them is killed"
_TEXTS: Final = Texts(__file__)
MANUAL: Final = _TEXTS.manual


def add_arguments(parser: ArgumentParser) -> None:
    add = _TEXTS.add_to(parser)
    add("data", metavar="DIR")
    add("seconds", metavar="N", type=positive, default=10.0)
    add("requests", metavar="N", type=at_least_one, default=240)
    add("seed", metavar="N", type=int, default=1)
    add("keep", action="store_true")


def run(arguments: Namespace) -> int:
    """0 if every invariant held, 4 if not. Without `store` (a URL) and `config` (a file) in the
    arguments the store is temporary."""
    import asyncio

    from hf_async_store_bench.demo.plan import Settings
    from hf_async_store_bench.demo.runner import run_demo, served

    with served(Settings.of(arguments)) as settings:
        return asyncio.run(run_demo(settings))
