"""A histogram of latencies in the manner of HdrHistogram: constant memory, a bounded error.

Values up to 255 ns are kept exactly; above, each power of two is cut into 128 parts, so that what
is read back is at most 1 in 128 above what was recorded. The greatest value is kept exactly.
"""

from __future__ import annotations

from math import ceil
from typing import Final

import msgspec

_BITS: Final = 7
_HALF: Final = 1 << _BITS
_WHOLE_BITS: Final = _BITS + 1
_ROUNDING: Final = 1e-6

ERROR: Final = 1 / _HALF
"""By how much of itself a value that is read back may be too great."""


class Histogram(msgspec.Struct):
    """Latencies in nanoseconds. It travels between processes and into results as it is.

    Attributes:
        counts: how many values fell in each part, by the part's number; only those that hold any.
        total: the sum of all values.
        highest: the greatest, exactly.
    """

    counts: dict[int, int] = {}
    count: int = 0
    total: int = 0
    highest: int = 0

    def record(self, nanoseconds: int) -> None:
        """Count one value; what is below 0 (a clock that was set back) counts as 0."""
        value = max(nanoseconds, 0)
        part = part_of(value)
        self.counts[part] = self.counts.get(part, 0) + 1
        self.count += 1
        self.total += value
        self.highest = max(self.highest, value)

    def add(self, other: Histogram) -> None:
        """Count everything that another one counted."""
        for part, count in other.counts.items():
            self.counts[part] = self.counts.get(part, 0) + count
        self.count += other.count
        self.total += other.total
        self.highest = max(self.highest, other.highest)

    def percentile(self, share: float) -> float:
        """The seconds within which so great a share (0 to 1) of all was done; 0 if there are none.

        Never below the true value, and at most `ERROR` of it above.
        """
        needed = max(1, ceil(share * self.count - _ROUNDING))
        seen = 0
        for part in sorted(self.counts):
            seen += self.counts[part]
            if seen >= needed:
                return min(highest_of(part), self.highest) / 1e9
        return 0.0

    @property
    def mean(self) -> float:
        """In seconds."""
        return self.total / self.count / 1e9 if self.count else 0.0


def part_of(value: int) -> int:
    """The number of the part in which a value falls; parts are numbered in their order."""
    shift = max(value.bit_length() - _WHOLE_BITS, 0)
    return shift * _HALF + (value >> shift)


def highest_of(part: int) -> int:
    """The greatest value that falls in a part."""
    shift = max(part // _HALF - 1, 0)
    return ((part - shift * _HALF + 1) << shift) - 1
