"""Types of options. argparse names a type in its own refusal."""

from __future__ import annotations


def at_least_one(text: str) -> int:
    """A whole number."""
    if not text.isascii() or not text.isdecimal() or not int(text):
        raise ValueError(text)
    return int(text)


def positive(text: str) -> float:
    """A finite number."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def percent(text: str) -> int:
    """A whole number."""
    value = int(text)
    if not 0 <= value <= 100:
        raise ValueError(text)
    return value


at_least_one.__name__ = "number >= 1"
positive.__name__ = "number > 0"
percent.__name__ = "number from 0 to 100"
