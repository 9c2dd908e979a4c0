"""Numbers as people read them."""

from __future__ import annotations

import math


def shown(value: float) -> str:
    """Three digits that count, and never an exponent."""
    if not math.isfinite(value):
        return "?"
    if value >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    rounded = float(f"{value:.3g}")
    return f"{rounded:g}" if rounded >= 0.0001 or not rounded else f"{rounded:.9f}".rstrip("0")


def range_shown(low: float, high: float) -> str:
    """From one to the other."""
    return f"{shown(low)} .. {shown(high)}"


def time_shown(seconds: float) -> str:
    """In the unit that fits."""
    if seconds >= 1:
        return f"{shown(seconds)} s"
    return f"{shown(seconds * 1000)} ms" if seconds >= 0.001 else f"{shown(seconds * 1e6)} us"


def bytes_shown(count: float) -> str:
    """In the unit that fits."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{shown(count)} {unit}"
        count /= 1000
    return f"{shown(count)} GB"


def change_shown(ratio: float, digits: int = 0) -> str:
    """A ratio as the percentage by which something changed."""
    return f"{(ratio - 1) * 100:+.{digits}f}" if math.isfinite(ratio) else "?"
