"""Two runs side by side: which differences are larger than the noise."""

from __future__ import annotations

import statistics
from typing import Final, Literal, NamedTuple, TypeAlias

from hf_async_store_bench.formatting import shown
from hf_async_store_bench.results import Cell, Results
from hf_async_store_bench.statistics import Interval, ratio_of_runs
from hf_async_store_bench.tables import Table

SMALLEST: Final = 0.05
"""A change by less than this part is not told, however sure: machines are not that much the same
from one day to the next."""

Word: TypeAlias = Literal["faster", "slower", "same within the noise"]


class Difference(NamedTuple):
    """One system under one load, in both runs.

    Attributes:
        change: new against old, of the throughput, with its 95 % interval.
    """

    old: Cell
    new: Cell
    change: Interval

    @property
    def word(self) -> Word:
        if self.change.low > 1 and self.change.value > 1 + SMALLEST:
            return "faster"
        if self.change.high < 1 and self.change.value < 1 / (1 + SMALLEST):
            return "slower"
        return "same within the noise"


def differences(old: Results, new: Results) -> list[Difference]:
    """Of everything that both runs measured under the same load with the same knobs."""
    found = []
    for before in old.cells:
        after = next(
            (
                each
                for each in new.cells
                if (each.system, each.load) == (before.system, before.load)
            ),
            None,
        )
        change = ratio_of_runs(after.rates, before.rates) if after is not None else None
        if after is not None and change is not None:
            found.append(Difference(before, after, change))
    return found


def drift(found: list[Difference]) -> float | None:
    """How much faster the baselines became: they are the same code, so that is the machine."""
    baselines = [each.change.value for each in found if each.old.role == "baseline"]
    return statistics.median(baselines) if baselines else None


def as_table(found: list[Difference]) -> Table:
    """What changed comes first."""
    order = {"slower": 0, "faster": 1, "same within the noise": 2}
    rows = [
        (
            each.old.system,
            each.old.load.name,
            shown(each.old.rate),
            shown(each.new.rate),
            f"{(each.change.value - 1) * 100:+.0f} %",
            f"{(each.change.low - 1) * 100:+.0f} .. {(each.change.high - 1) * 100:+.0f} %",
            each.word,
        )
        for each in sorted(found, key=lambda each: order[each.word])
    ]
    heads = ("", "load", "old", "new", "change", "95 % interval", "")
    moved = drift(found)
    note = (
        ""
        if moved is None
        else (
            f"The baselines, which are the same code in both, moved by {(moved - 1) * 100:+.0f} % "
            "(the median): so much may be the machine."
        )
    )
    return Table("New against old, units a second", heads, rows, note)


def unmatched(old: Results, new: Results) -> list[str]:
    """What only one of the runs has."""
    olds, news = ({f"{each.system}, {each.load.name}" for each in run.cells} for run in (old, new))
    return [
        *(f"only in the old: {each}" for each in sorted(olds - news)),
        *(f"only in the new: {each}" for each in sorted(news - olds)),
    ]
