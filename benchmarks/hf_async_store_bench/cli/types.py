"""Types of options. argparse names a type in its own refusal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

_Number = TypeVar("_Number", int, float)


def _number(
    kind: Callable[[str], _Number], above: float, most: float, name: str
) -> Callable[[str], _Number]:
    def parse(text: str) -> _Number:
        value = kind(text)
        if not above < value <= most:
            raise ValueError(text)
        return value

    parse.__name__ = name
    return parse


at_least_one = _number(int, 0, sys.maxsize, "number >= 1")
positive = _number(float, 0, sys.float_info.max, "number > 0")
percent = _number(int, -1, 100, "number from 0 to 100")
