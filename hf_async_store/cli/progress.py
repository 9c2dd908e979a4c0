"""Progress of long work: bars with rate and remaining time on a terminal, otherwise plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Self

from hf_async_store.cli import output

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_LINE_SECONDS: Final = 5.0
_MIN_SECONDS_FOR_RATE: Final = 0.1
"""A rate is shown from this duration of the work on."""
_MIN_ENTITIES_FOR_BARS: Final = 20_000
"""Progress bars are shown from this number of entities on, or if the number is unknown."""


class Bars:
    """Shows the progress of several kinds of work.

    Args:
        totals: the number of entities of each kind of work, if known.
        is_long: whether to show bars; None decides by the totals.
    """

    def __init__(self, totals: Mapping[str, int], *, is_long: bool | None = None) -> None:
        self._totals = totals
        many = sum(totals.values()) > _MIN_ENTITIES_FOR_BARS or not totals
        self._is_long = many if is_long is None else is_long
        self._done: dict[str, int] = {}
        self._began: dict[str, tuple[float, int]] = {}  # the time and the count of the first report
        self._last_line = time.monotonic()
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        if self._is_long and output.is_terminal(sys.stderr):
            self._bars = _bars()
            self._bars.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def advance(self, what: str, count: int = 0, note: str = "") -> None:
        """Report that `count` more entities of the work `what` are done; the note is shown with it.

        The rate counts from the first report: what that one includes was done before, maybe by an earlier
        run that is resumed.
        """
        now = time.monotonic()
        self._done[what] = self._done.get(what, 0) + count
        self._began.setdefault(what, (now, count))
        if self._bars is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(what, total=self._totals.get(what))
            shown = f"{what} ({note})" if note else what
            self._bars.update(self._tasks[what], advance=count, description=shown)
        elif now - self._last_line >= _LINE_SECONDS:
            self._last_line = now
            output.log_line(self._line(what, now) + (f", {note}" if note else ""))

    def _line(self, what: str, now: float) -> str:
        done, total = self._done[what], self._totals.get(what)
        began, before = self._began[what]
        shown = f"{what}: {done:,}" if total is None else f"{what}: {done:,} of {total:,}"
        if done == before or now - began < _MIN_SECONDS_FOR_RATE:
            return shown
        rate = (done - before) / (now - began)
        remaining = "" if total is None else f", {max(total - done, 0) / rate:,.0f} s remaining"
        per_second = f"{rate:,.0f}/s" if rate >= 1 else f"{rate:.1g}/s"
        return f"{shown} ({per_second}{remaining})"


def _bars() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:,.0f}/s")

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
