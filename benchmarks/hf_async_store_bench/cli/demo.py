"""`hf-async-store demo`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hf_async_store_bench.cli.types import at_least_one, positive

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

SUMMARY: Final = "run a demonstration: several processes use one store, and one of them is killed"
MANUAL: Final = """\
With --store URL or --config FILE the demo runs on that store, otherwise on a temporary one.
"""
SECONDS: Final = 10.0
REQUESTS: Final = 240


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--data",
        metavar="DIR",
        help="start from a copy of this JSON store, in any layout "
        "(default: $HF_ASYNC_STORE_REAL_DATA, else generated templates)",
    )
    add(
        "--seconds",
        metavar="N",
        type=positive,
        default=SECONDS,
        help=f"stop requesting machines after this number of seconds (default: {SECONDS:g})",
    )
    add(
        "--requests",
        metavar="N",
        type=at_least_one,
        default=REQUESTS,
        help=f"stop after this number of requests for machines (default: {REQUESTS})",
    )
    add(
        "--seed",
        metavar="N",
        type=int,
        default=1,
        help="seed of the generated requests; their interleaving differs in every run (default: 1)",
    )
    add("--keep", action="store_true", help="keep the temporary store and the write logs")


def run(arguments: Namespace) -> int:
    """0 if every invariant held, 4 if not.

    Args:
        arguments: with `store` (a URL) and `config` (a file), either or both None: then the store is
            temporary. For a DynamoDB URL without an endpoint the test server is started.

    Raises:
        ConfigurationError: a store or data folder that cannot be used.
        StorageError: the store cannot be reached at all.
    """
    import asyncio

    from hf_async_store_bench.demo.plan import Settings
    from hf_async_store_bench.demo.runner import run_demo
    from hf_async_store_bench.demo.servers import served

    with served(Settings.of(arguments)) as settings:
        return asyncio.run(run_demo(settings))
