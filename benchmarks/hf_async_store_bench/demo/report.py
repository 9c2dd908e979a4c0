"""What people see: the steps as they happen, and the tables at the end."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeAlias

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from hf_async_store_bench.demo.verify import Invariant, Verifier
    from hf_async_store_bench.demo.write_log import ProcessLog

Row: TypeAlias = Sequence[str]

SHOWN: Final = 10
"""How many failures of one invariant are printed."""


class Screen:
    """Where the run tells what it does: with colours on a terminal, plain elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def stage(self, text: str) -> None:
        """One line about what happens now."""
        self.line(text, style="dim")

    def line(self, text: str, style: str = "") -> None:
        """One line as it is."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True, style=style)

    @contextmanager
    def progress(self, total: int) -> Iterator[Callable[[int], None]]:
        """A bar where there is a terminal; the function takes how many are done."""
        columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        hidden = not self._console.is_terminal
        with Progress(*columns, console=self._console, transient=True, disable=hidden) as bar:
            task = bar.add_task("requests", total=total)
            yield lambda done: bar.update(task, completed=min(done, total))

    def table(self, title: str, headers: Row, rows: Sequence[Row]) -> None:
        """A table; all but its first column are numbers or short words."""
        table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        for place, header in enumerate(headers):
            table.add_column(header, justify="right" if place else "left")
        for row in rows:
            table.add_row(*(Text(each, style=_STYLES.get(each, "")) for each in row))
        self._console.print()
        self._console.print(table)

    def verdict(self, passed: bool, text: str) -> None:
        """The last line."""
        word = "PASSED" if passed else "FAILED"
        self._console.print(Text.assemble("\n", (word, _STYLES[word]), f": {text}"), soft_wrap=True)


_STYLES: Final = {
    "holds": "green",
    "BROKEN": "bold red",
    "PASSED": "bold green",
    "FAILED": "bold red",
}
_WIDTH: Final = 120


def screen() -> Screen:
    """The one that fits where the output goes."""
    return Screen(Console(width=None if sys.stdout.isatty() else _WIDTH))


def print_work(screen: Screen, notes: Sequence[ProcessLog], names: Sequence[str]) -> None:
    """What was done, by process."""
    columns = [_counted(each) for each in notes]
    kinds = list(dict.fromkeys(kind for kind, _, _ in _COUNTED))
    rows = [
        [kind, *(f"{each.get(kind, 0):,}" for each in columns), f"{_total(columns, kind):,}"]
        for kind in (*kinds, *_ALSO)
    ]
    screen.table("What was done", ["", *names, "together"], rows)


def print_speed(screen: Screen, notes: Sequence[ProcessLog], seconds: float) -> None:
    """Latencies by kind of operation, and throughput."""
    taken: defaultdict[str, list[float]] = defaultdict(list)
    for each in notes:
        for operation in each.operations:
            if operation.answers is not None:
                taken[operation.intent.work].append(operation.seconds)
        for read in each.reads:
            taken[read.work].append(read.seconds)
    rows = [
        [work, f"{len(each):,}", *(f"{_percentile(each, share):.1f}" for share in _SHARES)]
        for work, each in sorted(taken.items())
    ]
    headers = ["milliseconds", "calls", "p50", "p95", "p99", "max"]
    screen.table("How long it took, conflicts and retries included", headers, rows)
    written = sum(_counted(each)["entity writes"] for each in notes)
    calls = sum(len(each) for each in taken.values())
    screen.line(
        f"\n{written:,} acknowledged entity writes in {seconds:.1f} s of work: "
        f"{written / seconds:,.0f} a second; {calls / seconds:,.0f} calls a second"
    )


def print_verdict(screen: Screen, invariants: Sequence[Invariant], kept: str | None) -> bool:
    """Each invariant, what broke it, and the verdict; True if all hold."""
    rows = [
        [each.text, f"{each.checked:,}", "BROKEN" if each.failures else "holds"]
        for each in invariants
    ]
    screen.table("What a freshly opened store has to agree with", ["", "checks", "verdict"], rows)
    for each in invariants:
        _print_failures(screen, each)
    broken = [each.name for each in invariants if each.failures]
    text = f"broken: {', '.join(broken)}" if broken else f"all {len(invariants)} invariants hold"
    screen.verdict(not broken, text + (f" (kept in {kept})" if kept else ""))
    return not broken


def print_unanswered(
    screen: Screen, examination: Verifier, notes: Sequence[ProcessLog], names: Sequence[str]
) -> None:
    """The writes of which nobody knew: what became of them."""
    for each, name in zip(notes, names, strict=True):
        lost = each.unanswered
        if lost:
            landed = examination.landed(lost)
            kinds = ", ".join(sorted({operation.intent.work for operation in lost}))
            screen.line(
                f"\n{name}: {len(lost)} writes under way at its end ({kinds}); "
                f"{landed} of them had landed"
            )


# -- inside ---------------------------------------------------------------------------------

_COUNTED: Final = (
    ("requests for machines", "requests", "acquire"),
    ("requests for machines", "requests", "create"),
    ("machines created", "machines", "acquire"),
    ("machines created", "machines", "create batch"),
    ("machine status writes", "machines", "status write"),
    ("request status writes", "requests", "request write"),
    ("returns", "requests", "return"),
    ("machines given back", "machines", "terminate"),
    ("counter steps", "templates", "count up"),
)
"""What is counted: acknowledged writes to a collection, by the operation that made them."""

_ALSO: Final = ("polls", "conflicts met and retried", "entity writes")
_SHARES: Final = (0.5, 0.95, 0.99, 1.0)


def _counted(notes: ProcessLog) -> dict[str, int]:
    names = {(collection, work): kind for kind, collection, work in _COUNTED}
    counted: defaultdict[str, int] = defaultdict(int)
    for operation in notes.operations:
        for write, _, answer in operation.each():
            if isinstance(answer, int) or answer == "deleted":
                counted["entity writes"] += 1
                kind = names.get((write.collection, operation.intent.work))
                if kind is not None:
                    counted[kind] += 1
    counted["polls"] = len(notes.reads)
    counted["conflicts met and retried"] = notes.conflicts
    return counted


def _total(columns: Iterable[dict[str, int]], kind: str) -> int:
    return sum(each.get(kind, 0) for each in columns)


def _percentile(seconds: Sequence[float], share: float) -> float:
    """In milliseconds."""
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000


def _print_failures(screen: Screen, invariant: Invariant) -> None:
    for each in invariant.failures[:SHOWN]:
        screen.line(f"  {invariant.name}: {each}")
    more = len(invariant.failures) - SHOWN
    if more > 0:
        screen.line(f"  {invariant.name}: and {more:,} more")
