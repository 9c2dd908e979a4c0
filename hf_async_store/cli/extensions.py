"""Commands of other packages: modules named by the entry-point group `hf_async_store.commands`.

The name of an entry point is the name of the command. Its value is a module with:

    SUMMARY: str                                    the line in `hf-async-store --help`
    def add_arguments(parser: ArgumentParser)       adds options; common ones exist already
    def run(arguments: Namespace) -> int            runs the command; returns the exit code
    MANUAL: str                                     optional: the text below the options in `--help`
    USAGE: str                                      optional: the usage, such as `bench [OPTIONS]`
    REFUSED: dict[str, str]                         optional: common options that it does not take

The module is imported for `--help`, so import expensive modules inside `run`. Built-in commands
cannot be replaced.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from hf_async_store.cli.commands import Command

GROUP: Final = "hf_async_store.commands"


def find(name: str) -> Command | None:
    """The command with this name of another package, if there is one."""
    for each in entry_points(group=GROUP, name=name):
        return _command(each)
    return None


def names() -> list[str]:
    """The names of the commands of other packages."""
    return sorted(entry_points(group=GROUP).names)


def summaries() -> dict[str, str]:
    """The commands of other packages and their summaries."""
    return {each.name: import_module(each.value).SUMMARY for each in entry_points(group=GROUP)}


def _command(entry: EntryPoint) -> Command:
    module = import_module(entry.value)
    return Command(
        getattr(module, "USAGE", None),
        module.SUMMARY,
        f"{entry.value}:run",
        (module.add_arguments,),
        getattr(module, "MANUAL", ""),
        getattr(module, "REFUSED", {}),
    )
