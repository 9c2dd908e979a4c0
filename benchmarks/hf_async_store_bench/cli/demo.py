"""`hf-async-store demo`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Final

from hf_async_store_bench.cli.types import at_least_one, positive

SUMMARY: Final = "run a demonstration: several processes share work, and one of them is killed"
MANUAL: Final = """\
With --store URL or --config FILE (not HF_ASYNC_STORE) the demo runs on that store, otherwise on
a temporary one. Of its records (demo-... and --data), completed returns expire; it changes no others.
From then on the store keeps the changes of requests and machines for an hour.
"""
_DATA: Final = (
    "start from a copy of this JSON store, in any layout "
    "(default: $HF_ASYNC_STORE_REAL_DATA, else generated templates)"
)
_SECONDS: Final = "stop requesting machines after this number of seconds (default: 10)"
_REQUESTS: Final = "stop after this number of requests for machines (default: 240)"
_SEED: Final = "seed of the generated requests, not of their interleaving (default: 1)"


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", metavar="DIR", help=_DATA)
    add("--seconds", metavar="N", type=positive, default=10.0, help=_SECONDS)
    add("--requests", metavar="N", type=at_least_one, default=240, help=_REQUESTS)
    add("--seed", metavar="N", type=int, default=1, help=_SEED)
    add("--keep", action="store_true", help="keep the temporary store and the write logs")


def run(arguments: Namespace) -> int:
    """0 if every invariant held, 4 if not. Without `store` (a URL) and `config` (a file) in the
    arguments the store is temporary."""
    import asyncio

    from hf_async_store_bench.demo.plan import Settings
    from hf_async_store_bench.demo.runner import run_demo, served

    with served(Settings.of(arguments)) as settings:
        return asyncio.run(run_demo(settings))
