"""What a command says about itself, in a text file beside its module: each option, then the manual."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Texts:
    """The texts of one command."""

    def __init__(self, module: str) -> None:
        text = Path(module).with_suffix(".txt").read_text(encoding="utf-8")
        options, self.manual = text.split("\n\n", 1)
        self._help = dict(each.split(": ", 1) for each in options.splitlines())

    def add_to(self, parser: ArgumentParser) -> Callable[..., None]:
        """What adds an option of the name to the parser, or to a group of it."""

        def add(name: str, to: Any = parser, **how: Any) -> None:
            to.add_argument(f"--{name}", help=self._help[name].replace("%", "%%"), **how)

        return add
