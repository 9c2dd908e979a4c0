"""Options of the commands: their texts, and their types, which argparse names when it refuses a value."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

_Number = TypeVar("_Number", int, float)


class Texts:
    """The texts of one command, in a file beside its module: each option, then the manual."""

    def __init__(self, module: str) -> None:
        text = Path(module).with_suffix(".txt").read_text(encoding="utf-8")
        options, self.manual = text.split("\n\n", 1)
        self._help = dict(each.split(": ", 1) for each in options.splitlines())

    def add_to(self, parser: ArgumentParser) -> Callable[..., None]:
        """What adds an option of the name to the parser, or to a group of it."""

        def add(name: str, to: Any = parser, **how: Any) -> None:
            to.add_argument(f"--{name}", help=self._help[name].replace("%", "%%"), **how)

        return add


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
