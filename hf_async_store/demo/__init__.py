"""The product's main job on real input, checked to the last write: `hf-async-store demo`.

An async orchestrator and two more processes work on one store at once; one of them is killed in
the middle. Every process notes each write before and after, and at the end a freshly opened store
has to agree with those notes. Only the public interface is used, and no engine's name is asked.

Importing this package is cheap, because every command of the command line does it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import argparse

SECONDS: Final = 10.0
REQUESTS: Final = 240


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the demo; `--store` and `--config` belong to every command."""
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="start from a copy of this JSON store, in any layout "
        "(default: $HF_ASYNC_STORE_REAL_DATA, else generated templates)",
    )
    parser.add_argument(
        "--seconds",
        metavar="N",
        type=_positive(float),
        default=SECONDS,
        help=f"stop asking for machines after this time (default: {SECONDS:g})",
    )
    parser.add_argument(
        "--requests",
        metavar="N",
        type=_positive(int),
        default=REQUESTS,
        help=f"or after this many requests for machines (default: {REQUESTS})",
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=int,
        default=1,
        help="of what is asked for; the interleaving is never the same (default: 1)",
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the temporary store and the notes of all writes"
    )


async def run(arguments: argparse.Namespace) -> int:
    """Run the demo; returns 0 if every invariant held, 4 if not.

    Args:
        arguments: of `add_arguments`, with `store` (a URL) and `config` (a file), either or both
            None: then the store is a temporary one, removed at the end. For a DynamoDB URL that
            names no endpoint the test server is started, where it is installed.

    Raises:
        ConfigurationError: a store or data folder that cannot be used.
        StorageError: the store cannot be reached at all.
    """
    from hf_async_store.demo.plan import Settings
    from hf_async_store.demo.play import play
    from hf_async_store.demo.serving import served

    with served(Settings.of(arguments)) as settings:
        return await play(settings)


def _positive(kind: type[float]) -> type[float]:
    """A type for argparse, which names it in its own refusal."""

    def positive(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError(text)
        return value

    positive.__name__ = f"positive {kind.__name__}"
    return positive  # type: ignore[return-value]  # argparse takes any callable
