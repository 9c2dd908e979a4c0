"""Latencies: recorded into a list while it counts, kept as an HdrHistogram of two digits afterwards."""

from __future__ import annotations

from array import array
from typing import Final

from hdrh.histogram import HdrHistogram

_MOST: Final = 24 * 3600 * 10**9
ERROR: Final = 1 / 128  # the part of a value by which it may be read back too large


class Histogram:
    """Latencies in nanoseconds. It travels between processes and into results as text."""

    def __init__(self, encoded: str = "") -> None:
        empty = HdrHistogram(1, _MOST, 2)
        self._histogram = HdrHistogram.decode(encoded) if encoded else empty
        self._recent = array("q")
        self.record = self._recent.append
        """Count one value. No more than an append: it is paid for in each measured operation."""

    def add(self, other: Histogram) -> None:
        self._counted().add(other._counted())

    def percentile(self, share: float) -> float:
        """The seconds within which this share (0 to 1) of all was done; 0 if there are none."""
        value = self._counted().get_value_at_percentile(share * 100) if self.count else 0
        return float(value) / 1e9

    @property
    def count(self) -> int:
        return int(self._counted().get_total_count())

    @property
    def highest(self) -> float:
        """The longest, in seconds."""
        return float(self._counted().get_max_value()) / 1e9

    def encoded(self) -> str:
        """As text; empty if nothing was recorded."""
        return self._counted().encode().decode() if self.count else ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Histogram) and self.encoded() == other.encoded()

    __hash__ = None  # type: ignore[assignment]  # it changes

    def _counted(self) -> HdrHistogram:
        for each in self._recent:
            self._histogram.record_value(min(max(each, 0), _MOST))
        del self._recent[:]
        return self._histogram
