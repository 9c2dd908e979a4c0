"""How sure a figure is: Student's intervals around ratios (by their logarithms), fitted exponents."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Final, NamedTuple

_CONFIDENCE: Final = 0.95


class Interval(NamedTuple):
    """A value and the range in which it lies with 95 % confidence."""

    value: float
    low: float
    high: float

    @property
    def inverse(self) -> Interval:
        low = 1 / self.high if self.high else math.inf
        return Interval(1 / self.value, low, 1 / self.low if self.low else math.inf)


def uncertainty(values: Sequence[float]) -> float:
    """The part of itself by which the mean may be wrong; infinite for one value."""
    return _half_width([math.log(each) for each in values if each > 0])


def ratio_of_pairs(of: Sequence[float], to: Sequence[float]) -> Interval | None:
    """The ratio of two systems that took turns, so that what slowed both in a round cancels out; None
    without a round."""
    logs = [math.log(one / other) for one, other in zip(of, to, strict=True) if one > 0 < other]
    return _around(statistics.fmean(logs), _half_width(logs)) if logs else None


def ratio_of_runs(of: Sequence[float], to: Sequence[float]) -> Interval | None:
    """The ratio of two systems that were measured apart (Welch's interval); None without rounds."""
    ones, others = ([math.log(each) for each in one if each > 0] for one in (of, to))
    if not ones or not others:
        return None
    half = math.inf
    if len(ones) > 1 < len(others):
        parts = [statistics.variance(each) / len(each) for each in (ones, others)]
        smaller = parts[0] ** 2 / (len(ones) - 1) + parts[1] ** 2 / (len(others) - 1)
        freedom = sum(parts) ** 2 / smaller if smaller else 1.0
        half = _quantile(freedom) * math.sqrt(sum(parts))
    return _around(statistics.fmean(ones) - statistics.fmean(others), half)


def ratios(of: Sequence[float], to: Sequence[float]) -> list[float]:
    """Round by round."""
    return [one / other for one, other in zip(of, to, strict=True)]


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The k of `cost ~ size ** k`, by least squares on logarithms; None for one size."""
    logs = [(math.log(size), math.log(cost)) for size, cost in points if size > 0 < cost]
    if len({size for size, _ in logs}) < 2:
        return None
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def _half_width(logs: Sequence[float]) -> float:
    if len(logs) < 2:
        return math.inf
    return _quantile(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))


def _around(middle: float, half: float) -> Interval:
    return Interval(*(math.exp(each) for each in (middle, middle - half, middle + half)))


def _quantile(freedom: float) -> float:
    """Of Student's distribution, two-sided."""
    from scipy import special  # it takes as long as all others that a command imports

    return float(special.stdtrit(freedom, 0.5 + _CONFIDENCE / 2))
