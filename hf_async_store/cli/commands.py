"""The description of one command of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import MappingProxyType

from msgspec import Struct

Runner = Callable[[argparse.Namespace], int]
Add = Callable[[argparse.ArgumentParser], object]
"""Adds one or more arguments to a parser."""


class Command(Struct, frozen=True):
    """One command.

    Attributes:
        usage: the usage line; None to have argparse generate it from the arguments.
        summary: the line of the command in `hf-async-store --help`.
        function: `module:function` that runs the command, imported when the command is chosen.
        arguments: add the arguments of the command to a parser.
        manual: the text that the command's `--help` shows below the options.
        refused: the common options that the command does not take, such as `store`, each with what to
            do instead.
    """

    usage: str | None
    summary: str
    function: str
    arguments: Sequence[Add]
    manual: str = ""
    refused: Mapping[str, str] = MappingProxyType({})

    def load(self) -> Runner:
        module, _, name = self.function.partition(":")
        runner: Runner = getattr(import_module(module), name)
        return runner
