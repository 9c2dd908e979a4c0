"""The benchmark harness: `hf-async-store bench` and `hf-async-store advise`.

Every engine, the floor beneath it and the peers beside it, under workloads named for what an
orchestrator does, side by side in one run. Each side runs in processes of its own, and at the end
has to show every write that it acknowledged.

Importing this package is cheap, because every command of the command line may do it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import argparse

OUTPUT: Final = "hf-async-store-bench"
"""The folder that a report is written to, if nothing else is said."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench`; `--store` and `--json` belong to every command."""
    parser.add_argument(
        "words",
        metavar="compare OLD.json NEW.json",
        nargs="*",
        help="tell which differences between two runs are larger than the noise",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--short", action="store_true", help="within 2 minutes: the main workloads (the default)"
    )
    how.add_argument(
        "--full",
        action="store_true",
        help="within 20 minutes: all workloads, floors, peers, and how cost grows",
    )
    parser.add_argument(
        "--only",
        metavar="NAME",
        action="append",
        default=[],
        help="measure only this: an engine with its floors and peers (json), one side (tinydb), "
        "or a kind (strategy, floor, peer); repeatable",
    )
    parser.add_argument(
        "--workload",
        metavar="NAME",
        action="append",
        default=[],
        help="run only this one, as save, poll or 'create batch'; repeatable",
    )
    for name, what in (
        ("entities", "machines that are stored before"),
        ("size", "bytes of JSON of a machine"),
        ("tasks", "tasks at once in each process"),
        ("processes", "processes at once on one store"),
        ("burst", "machines of one acquired request"),
        ("rounds", "rounds of each side under each load, and no more where they are unsure"),
    ):
        parser.add_argument(f"--{name}", metavar="N", type=_at_least_one, help=what)
    parser.add_argument(
        "--reads-percent", metavar="P", type=_percent, help="reads of the mixed workload"
    )
    parser.add_argument("--duration", metavar="SECONDS", type=_above_zero, help="of one round")
    parser.add_argument(
        "--budget",
        metavar="SECONDS",
        type=_above_zero,
        help="of the whole run (default: 100 for the short, 960 for the full one); what does not "
        "fit is listed",
    )
    parser.add_argument(
        "--rate",
        metavar="N",
        type=_above_zero,
        help="operations a second of the round at fixed times (default: half of what it can)",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=1, help="of what is chosen")
    parser.add_argument(
        "--not-durable",
        action="store_true",
        help="acknowledged writes need not outlive a loss of power",
    )
    parser.add_argument(
        "--folder", metavar="DIR", help="where the stores lie: the disk that is measured"
    )
    parser.add_argument(
        "--figures",
        metavar="FILE",
        action="append",
        default=[],
        help="figures that a script in benchmarks/ of the source wrote; repeatable",
    )
    parser.add_argument(
        "--output", metavar="DIR", default=OUTPUT, help=f"of the report (default: {OUTPUT})"
    )


def add_advise_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `advise`."""
    for name, default, what in (
        ("entities", 10_000, "machines that will be stored"),
        ("tasks", 16, "tasks at once in each process"),
        ("processes", 1, "processes at once on the store"),
    ):
        parser.add_argument(
            f"--{name}",
            metavar="N",
            type=_at_least_one,
            default=default,
            help=f"{what} (default: {default:,})",
        )
    parser.add_argument(
        "--reads-percent",
        metavar="P",
        type=_percent,
        default=80,
        help="gets of a hundred operations (default: 80)",
    )
    parser.add_argument(
        "--folder", metavar="DIR", help="where the stores lie: the disk that is measured"
    )


def _at_least_one(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not int(text):
        raise ValueError(text)
    return int(text)


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def _percent(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 100:
        raise ValueError(text)
    return value


# argparse names a type in its own refusal.
_at_least_one.__name__ = "number from 1 on"
_above_zero.__name__ = "number above 0"
_percent.__name__ = "number from 0 to 100"
