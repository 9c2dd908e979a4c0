"""Two commits side by side: `make bench-compare BASE=commit`.

Both are measured by this one harness, in worker processes that take turns, each with the product of its
own commit. What looks like a change is measured again, with new processes; only what both agree upon is
called one. Exit code 0: nothing is slower; 3: something is; 4: an invariant broke.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import geometric_mean
from typing import Final, NamedTuple

import msgspec

from hf_async_store_bench import tables
from hf_async_store_bench.cli.options import at_least_one, positive
from hf_async_store_bench.environments import Environments
from hf_async_store_bench.messages import Load, SystemUnderTest
from hf_async_store_bench.processes import run_to_completion
from hf_async_store_bench.results import Results
from hf_async_store_bench.run import Run, tell
from hf_async_store_bench.settings import FULL, Settings, chosen_loads
from hf_async_store_bench.statistics import Interval, ratio_of_pairs
from hf_async_store_bench.systems import named
from hf_async_store_bench.tables import Table, changed

NOTHING_SLOWER, SLOWER, BROKEN = 0, 3, 4
ENGINES: Final = ("json", "sqlite", "postgresql", "dynamodb")
WORKLOADS: Final = ("save", "get", "acquire", "poll", "query")
SIDES: Final = ("base", "head")
VERDICTS: Final = ("SLOWER", "faster", "same within the noise")
SMALLEST: Final = 0.03  # a change by less than this part is not told, however sure it is


class Change(NamedTuple):
    """One engine under one load: the head's throughput in parts of the base's, at most measured twice."""

    engine: str
    load: Load
    base: float
    head: float
    first: Interval
    second: Interval | None = None

    @property
    def verdict(self) -> str:
        """What both agree upon."""
        both = [self.first, self.second or Interval(1, 1, 1)]
        if all(each.high < 1 for each in both):
            return VERDICTS[0]
        return VERDICTS[1] if all(each.low > 1 for each in both) else VERDICTS[2]

    @property
    def is_suspect(self) -> bool:
        """It looks like a change."""
        beyond = abs(math.log(self.first.value)) > math.log(1 + SMALLEST)
        return beyond and not self.first.low <= 1 <= self.first.high


@contextmanager
def checkout(commit: str) -> Iterator[str]:
    """The folder of a commit, in a temporary worktree."""
    with tempfile.TemporaryDirectory(prefix="hf-async-store-commit-") as folder:
        place = str(Path(folder) / "tree")
        _git("worktree", "add", "--detach", "--quiet", place, commit)
        try:
            yield place
        finally:
            _git("worktree", "remove", "--force", place)


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


async def measured(
    systems: Sequence[SystemUnderTest], loads: tuple[Load, ...], visits: int, duration: float
) -> list[Results]:
    """So many visits, each with new processes and stores."""
    settings = Settings(mode="two commits", loads=loads, rounds=4, duration=duration, steady=0.0)
    found = []
    with Environments() as environments:
        for number in range(visits):
            tell(f"visit {number + 1} of {visits}")
            turns = systems if number % 2 else systems[::-1]  # who begins does not stay the same
            found.append(await Run(settings, turns, environments, tell).whole())
    return found


def compared(found: Sequence[Results]) -> list[Change]:
    """Visit by visit: rounds of one pair of processes are not independent of one another."""
    changes = []
    for load in dict.fromkeys(each.load for results in found for each in results.cells):
        for engine in ENGINES:
            bases, heads = [], []
            for results in found:
                base, head = (results.cell(f"{engine}, {each}", load.name) for each in SIDES)
                if base and head:
                    bases.append(geometric_mean(base.rates))
                    heads.append(geometric_mean(head.rates))
            if change := ratio_of_pairs(heads, bases):
                means = geometric_mean(bases), geometric_mean(heads)
                changes.append(Change(engine, load, *means, change))
    return changes


async def compare(options: argparse.Namespace, sources: dict[str, str]) -> int:
    """Measure, measure again what looks like a change, and print; returns the exit code."""
    loads = chosen_loads(options.workload or WORKLOADS)

    def measure(engines: Sequence[str], loads: tuple[Load, ...]) -> Awaitable[list[Results]]:
        both = [
            msgspec.structs.replace(named(each), name=f"{each}, {side}", source=sources[side])
            for each in engines
            for side in SIDES
        ]
        return measured(both, loads, options.visits, options.duration)

    found = await measure(options.only or ENGINES, loads)
    changes = compared(found)
    for load in loads:
        suspects = [each.engine for each in changes if each.is_suspect and each.load == load]
        if suspects:
            tell(f"once more: {load.name}: {', '.join(suspects)}")
            again = await measure(suspects, (load,))
            found += again
            second = {(i.engine, i.load): i.first for i in compared(again)}
            changes = [i._replace(second=second.get((i.engine, i.load), i.second)) for i in changes]
    skipped = [f"  not measured: {each.what}: {each.why}" for one in found for each in one.skipped]
    failures = [f"  BROKEN {each}" for one in found for each in one.failures]
    lines = [tables.as_text(as_table(changes)), *dict.fromkeys(skipped), *dict.fromkeys(failures)]
    sys.stdout.write("\n".join([*lines, ""]))
    if failures:
        return BROKEN
    return SLOWER if any(each.verdict == "SLOWER" for each in changes) else NOTHING_SLOWER


def as_table(changes: Sequence[Change]) -> Table:
    """What changed comes first."""
    rows = []
    for each in sorted(changes, key=lambda each: VERDICTS.index(each.verdict)):
        of, again = (each.engine, each.load.name), ""
        if each.second is not None:
            *_, again = changed(of, each.base, each.head, each.second, 1)
        row = changed(of, each.base, each.head, each.first, 1)
        rows.append((*row, again, each.verdict))
    heads = ("", "load", "base", "head", "change", "95 % interval", "once more", "")
    return Table("The head against the base, units a second", heads, rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make bench-compare BASE=commit OPTIONS='...'",
        description="Is this checkout slower or faster than that commit?",
    )
    add = parser.add_argument
    known = [each.workload for each in FULL.loads]
    add("base", metavar="BASE", help="a commit, as git names it")
    add("--head", metavar="COMMIT", help="another commit (default: this checkout as it is)")
    add("--only", metavar="ENGINE", action="append", choices=ENGINES, help="repeatable")
    add("--workload", metavar="NAME", action="append", choices=known, help="repeatable")
    add("--visits", metavar="N", type=at_least_one, default=5, help="default: 5")
    add("--duration", metavar="SECONDS", type=positive, default=0.3, help="of a round (0.3)")
    return parser.parse_args()


def main() -> int:
    options = _options()
    with ExitStack() as stack:
        here = _git("rev-parse", "--show-toplevel")
        base = stack.enter_context(checkout(options.base))
        head = stack.enter_context(checkout(options.head)) if options.head else here
        work = compare(options, {"base": base, "head": head})
        return asyncio.run(run_to_completion(work))


if __name__ == "__main__":
    raise SystemExit(main())
