"""A command of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

Runner = Callable[[argparse.Namespace], int]


class Command(NamedTuple):
    """One command.

    Attributes:
        usage: its words; None where argparse makes them of its options.
        summary: its line in the manual.
        place: `module:function` of what runs it, imported when it is chosen.
        add_arguments: makes its parser, imported likewise where it is no function of this module.
        manual: what its `--help` says below the options.
    """

    usage: str | None
    summary: str
    place: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    manual: str = ""

    def load(self) -> Runner:
        module, _, name = self.place.partition(":")
        runner: Runner = getattr(import_module(module), name)
        return runner
