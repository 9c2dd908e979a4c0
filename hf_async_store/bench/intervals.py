"""How sure a figure is: intervals of ratios, differences beyond the noise, fitted exponents."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from typing import Final, NamedTuple

CONFIDENCE: Final = 0.95
_RESAMPLES: Final = 2000


class Interval(NamedTuple):
    """A value and the range in which it lies with 95 % confidence."""

    value: float
    low: float
    high: float


def uncertainty(values: Sequence[float]) -> float:
    """By how much of itself the mean may be wrong, with 95 % confidence; infinite for one value."""
    logs = [math.log(each) for each in values if each > 0]
    if len(logs) < 2:
        return math.inf
    return _student(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))


def ratio_of_pairs(of: Sequence[float], to: Sequence[float]) -> Interval | None:
    """The ratio of two sides that took turns, round by round; None without a round.

    The geometric mean over the rounds, and its bootstrap interval over them: what slowed both
    sides in one round cancels out.
    """
    logs = [math.log(one / other) for one, other in zip(of, to, strict=True) if one > 0 < other]
    if not logs:
        return None
    means = _bootstrap(logs)
    low, high = _between(means, len(logs))
    return Interval(*(math.exp(each) for each in (statistics.fmean(logs), low, high)))


def ratio_of_runs(of: Sequence[float], to: Sequence[float]) -> Interval | None:
    """The ratio of two sides that were measured apart, as in two runs; None if one has no round."""
    ones, others = ([math.log(each) for each in side if each > 0] for side in (of, to))
    if not ones or not others:
        return None
    pairs = zip(_bootstrap(ones), _bootstrap(others, seed=1), strict=True)
    low, high = _between([one - other for one, other in pairs], min(len(ones), len(others)))
    value = statistics.fmean(ones) - statistics.fmean(others)
    return Interval(*(math.exp(each) for each in (value, low, high)))


def _bootstrap(values: Sequence[float], seed: int = 0) -> list[float]:
    """Means of resamples. Seeded: the same rounds give the same interval."""
    chance = random.Random(seed)
    count = len(values)
    return [statistics.fmean(chance.choices(values, k=count)) for _ in range(_RESAMPLES)]


def _between(means: Sequence[float], count: int) -> tuple[float, float]:
    """The percentiles of the resamples, moved outwards for few rounds.

    Without that, a bootstrap of five rounds is much too narrow: its resamples vary by the factor
    sqrt((n-1)/n) too little, and a normal quantile stands where Student's belongs (T. Hesterberg,
    "What Teachers Should Know about the Bootstrap", 2015: the expanded percentile interval).
    """
    ordered = sorted(means)
    if count < 2:
        return -math.inf, math.inf  # one round tells nothing about the next
    quantile = math.sqrt(count / (count - 1)) * _student(count - 1)
    tail = statistics.NormalDist().cdf(-quantile)
    last = len(ordered) - 1
    return ordered[round(tail * last)], ordered[round((1 - tail) * last)]


def _student(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's distribution."""
    return _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else 2.0


_STUDENT: Final = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.2, 2.18)


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The k of `cost ~ size ** k`, by least squares on logarithms; None for one size.

    Of two, as where a sweep was ended, it is what lies between them.
    """
    logs = [(math.log(size), math.log(cost)) for size, cost in points if size > 0 < cost]
    if len({size for size, _ in logs}) < 2:
        return None
    return statistics.linear_regression(*zip(*logs, strict=True)).slope
