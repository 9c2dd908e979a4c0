"""Commands of other packages: modules named by the entry-point group `hf_async_store.commands`.

An entry point's name is the command, its value a module with:

    SUMMARY: str                                    the line in `hf-async-store --help`
    def add_arguments(parser: ArgumentParser)       its options; `--store` and `--json` are there
    def run(arguments: Namespace) -> int            does it; returns the exit code
    MANUAL: str                                     optional: what its `--help` says at the end
    USAGE: str                                      optional: its words, as in `bench [OPTIONS]`

The module is imported for `--help`, so what is expensive to import belongs into `run`. A command of
the product cannot be replaced.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from hf_async_store.cli.commands import Command

GROUP: Final = "hf_async_store.commands"


def find(name: str) -> Command | None:
    """The command that another package adds under this name, if one does."""
    for each in entry_points(group=GROUP, name=name):
        return _command(each)
    return None


def summaries() -> dict[str, str]:
    """The commands of other packages, with their lines in the manual."""
    return {each.name: import_module(each.value).SUMMARY for each in entry_points(group=GROUP)}


def _command(entry: EntryPoint) -> Command:
    module = import_module(entry.value)
    return Command(
        getattr(module, "USAGE", None),
        module.SUMMARY,
        f"{entry.value}:run",
        module.add_arguments,
        getattr(module, "MANUAL", ""),
    )
