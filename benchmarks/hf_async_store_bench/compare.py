"""Two runs side by side: which differences are larger than the noise."""

from __future__ import annotations

import statistics
from typing import Final, NamedTuple

from hf_async_store_bench.results import Cell, Results
from hf_async_store_bench.statistics import Interval, ratio_of_runs
from hf_async_store_bench.tables import Table, change_shown, changed

SMALLEST: Final = 0.05  # a change by less is not told: machines differ from one day to the next
_WORDS: Final = ("slower", "faster", "same within the noise")


class Difference(NamedTuple):
    """One system under one load in both runs, and the change of its throughput, new against old."""

    old: Cell
    new: Cell
    change: Interval

    @property
    def word(self) -> str:
        value, low, high = self.change
        if high < 1 and value < 1 / (1 + SMALLEST):
            return _WORDS[0]
        return _WORDS[1] if low > 1 and value > 1 + SMALLEST else _WORDS[2]

    def as_json(self) -> dict[str, object]:
        names = ("system", "load", "old", "new", "change", "low", "high", "word")
        cells = (self.old.system, self.old.load.name, self.old.rate, self.new.rate)
        return dict(zip(names, (*cells, *self.change, self.word), strict=True))


def differences(old: Results, new: Results) -> list[Difference]:
    """Of everything that both runs measured under the same load with the same knobs."""
    known = {(each.system, each.load): each for each in reversed(new.cells)}
    found = []
    for before in old.cells:
        after = known.get((before.system, before.load))
        change = ratio_of_runs(after.rates, before.rates) if after else None
        if after and change:
            found.append(Difference(before, after, change))
    return found


def drift(found: list[Difference]) -> float | None:
    """How much faster the baselines became: they are the same code, so that is the machine."""
    baselines = [each.change.value for each in found if each.old.role == "baseline"]
    return statistics.median(baselines) if baselines else None


def as_table(found: list[Difference]) -> Table:
    """What changed comes first."""
    rows = []
    for each in sorted(found, key=lambda each: _WORDS.index(each.word)):
        of, rates = (each.old.system, each.old.load.name), (each.old.rate, each.new.rate)
        rows.append((*changed(of, *rates, each.change), each.word))
    heads = ("", "load", "old", "new", "change", "95 % interval", "")
    note = ""
    if (moved := drift(found)) is not None:
        by = f"{change_shown(moved)} % (the median)"
        note = f"The baselines, the same code in both, moved by {by}: so much may be the machine."
    return Table("New against old, units a second", heads, rows, note)


def unmatched(old: Results, new: Results) -> list[str]:
    """What only one of the runs has."""
    olds, news = ({f"{each.system}, {each.load.name}" for each in run.cells} for run in (old, new))
    only = (("old", olds - news), ("new", news - olds))
    return [f"only in the {run}: {each}" for run, some in only for each in sorted(some)]
