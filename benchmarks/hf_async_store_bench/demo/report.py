"""What people see: the steps as they happen, and the tables at the end."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from hf_async_store_bench.demo.recorder import EntityKey
from hf_async_store_bench.demo.verify import Invariant, Verifier
from hf_async_store_bench.demo.write_log import Answer, ProcessLog
from hf_async_store_bench.histogram import Histogram

_SHOWN: Final = 10  # failures of one invariant that are printed
_SHARES: Final = (0.5, 0.95, 0.99, 1.0)
_GOOD, _BAD = "bold green", "bold red"
_STYLES: Final = {"holds": _GOOD, "BROKEN": _BAD, "PASSED": _GOOD, "FAILED": _BAD}


class Screen:
    """Where the run tells what it does: with colours on a terminal, plain elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(width=None if sys.stdout.isatty() else 120)

    def stage(self, text: str) -> None:
        """One line about what happens now."""
        self.line(text, style="dim")

    def line(self, text: str, style: str = "") -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True, style=style)

    @contextmanager
    def progress(self, total: int) -> Iterator[Callable[[int], None]]:
        """A bar where there is a terminal; the function takes how many are done."""
        columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        hidden = not self._console.is_terminal
        with Progress(*columns, console=self._console, transient=True, disable=hidden) as bar:
            task = bar.add_task("requests", total=total)
            yield lambda done: bar.update(task, completed=min(done, total))

    def table(self, title: str, headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table; all but its first column are numbers or short words."""
        table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        for place, header in enumerate(headers):
            table.add_column(header, justify="right" if place else "left")
        for row in rows:
            table.add_row(*(Text(each, style=_STYLES.get(each, "")) for each in row))
        self._console.print()
        self._console.print(table)

    def verdict(self, word: str, text: str) -> None:
        self._console.print(Text.assemble("\n", (word, _STYLES[word]), f": {text}"), soft_wrap=True)


def print_work(screen: Screen, logs: Mapping[str, ProcessLog]) -> None:
    columns = list(map(_counted, logs.values()))
    columns.append(sum(columns, Counter()))
    rows = [[kind, *(f"{each[kind]:,}" for each in columns)] for kind in columns[-1]]
    screen.table("Operations", ["", *logs, "together"], rows)


def _counted(log: ProcessLog) -> Counter[str]:
    done = {"create": "created", "delete": "deleted"}
    counted = Counter(claims=len(log.holds), reads=len(log.reads))
    for operation in log.operations:
        for write, _, answer in operation.each():
            if isinstance(answer, int) or answer == "deleted":
                counted["entity writes"] += 1
                counted[f"{write.collection} {done.get(write.kind, 'updated')}"] += 1
    return counted


def print_speed(
    screen: Screen,
    logs: Collection[ProcessLog],
    came: Mapping[tuple[EntityKey, Answer], float],
    seconds: float,
) -> None:
    """Latencies by kind of operation, also of what came to a watcher, and throughput."""
    taken: defaultdict[str, Histogram] = defaultdict(Histogram)
    watched = Histogram()
    for each in logs:
        for operation in each.operations:
            if operation.answers is not None:
                taken[operation.intent.work].record(int(operation.seconds * 1e9))
            for write, name, answer in operation.each():
                if at := came.get(((write.collection, name), answer)):
                    watched.record(int((at - operation.at) * 1e9))
        for read in each.reads:
            taken[read.work].record(int(read.seconds * 1e9))
    rows = [
        [work, f"{each.count:,}", *(f"{each.percentile(share) * 1000:.1f}" for share in _SHARES)]
        for work, each in (*sorted(taken.items()), ("watcher, after the answer", watched))
    ]
    headers = ["milliseconds", "calls", "p50", "p95", "p99", "max"]
    screen.table("Latency, including conflicts and retries", headers, rows)
    written = sum(_counted(each)["entity writes"] for each in logs)
    calls = sum(each.count for each in taken.values())
    screen.line(
        f"\n{written:,} acknowledged entity writes in {seconds:.1f} s of work: "
        f"{written / seconds:,.0f} a second; {calls / seconds:,.0f} calls a second"
    )


def print_unanswered(screen: Screen, verifier: Verifier, logs: Mapping[str, ProcessLog]) -> None:
    """What a kill left: writes without an acknowledgement, some of them applied, and claims."""
    for name, log in logs.items():
        if lost := log.unanswered:
            kinds = ", ".join(sorted({operation.intent.work for operation in lost}))
            applied = f"{verifier.applied(lost)} of them were applied"
            screen.line(f"\n{name}: {len(lost)} unacknowledged writes ({kinds}); {applied}")
        if log.killed:
            taken = verifier.taken_over(log)
            screen.line(f"{name}: {taken} of its claims were taken over after their leases")


def print_verdict(screen: Screen, invariants: Sequence[Invariant], kept: str | None) -> None:
    """Each invariant, what broke it, and the verdict."""
    words = ["BROKEN" if i.failures else "holds" if i.checked else "unchecked" for i in invariants]
    rows = [[i.text, f"{i.checked:,}", word] for i, word in zip(invariants, words, strict=True)]
    screen.table("Invariants, checked with a newly opened store", ["", "checks", "verdict"], rows)
    for each in invariants:
        for failure in each.failures[:_SHOWN]:
            screen.line(f"  {each.name}: {failure}")
        more = len(each.failures) - _SHOWN
        if more > 0:
            screen.line(f"  {each.name}: and {more:,} more")
    broken = [each.name for each in invariants if each.failures]
    text = f"broken: {', '.join(broken)}" if broken else f"{len(words)} invariants, none broken"
    screen.verdict("FAILED" if broken else "PASSED", text + (f" (kept in {kept})" if kept else ""))
