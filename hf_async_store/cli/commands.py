"""The description of one command of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

Runner = Callable[[argparse.Namespace], int]


class Command(NamedTuple):
    """One command.

    Attributes:
        usage: the usage line; None to have argparse generate it from the arguments.
        summary: the line of the command in `hf-async-store --help`.
        function: `module:function` that runs the command, imported when the command is chosen.
        add_arguments: adds the arguments of the command to a parser.
        manual: the text that the command's `--help` shows below the options.
    """

    usage: str | None
    summary: str
    function: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    manual: str = ""

    def load(self) -> Runner:
        module, _, name = self.function.partition(":")
        runner: Runner = getattr(import_module(module), name)
        return runner
