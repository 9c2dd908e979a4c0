"""The pages of the command line, from the parsers of its commands."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

from hf_async_store.cli.arguments import COMMANDS, parser_of
from hf_async_store.cli.output import PROGRAM


def index() -> str:
    """The page that lists the commands."""
    rows = "\n".join(
        f"| [`{name}`]({name}.md) | {_prose(each.summary)} |" for name, each in COMMANDS.items()
    )
    return (
        f"# The command line\n\n`{PROGRAM} --help` and `{PROGRAM} COMMAND --help` show what is on these "
        "pages. The store is given by `--store URL`, `--config FILE` or the environment variable "
        f"`HF_ASYNC_STORE`.\n\n| command | purpose |\n|---|---|\n{rows}\n"
    )


def pages() -> Iterator[tuple[str, str]]:
    """The name of each command, and its page in Markdown."""
    for name, command in COMMANDS.items():
        parser = parser_of(name, command)
        parts = [f"# {name}", _prose(parser.description or ""), _block(_usage(parser))]
        parts += [_table(title, rows) for title, rows in _arguments(parser)]
        if command.manual:
            parts += ["## Details", _block(command.manual.strip())]
        yield name, "\n\n".join(parts) + "\n"


def _usage(parser: argparse.ArgumentParser) -> str:
    return re.sub(r"^usage: ", "", parser.format_usage().strip())


def _arguments(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """By the title of a group, each argument as it is written, and its help."""
    formatter = parser._get_formatter()
    for group in parser._action_groups:
        rows = [
            (formatter._format_action_invocation(each), formatter._expand_help(each))
            for each in group._group_actions
            if each.help and each.help != argparse.SUPPRESS
        ]
        if rows:
            yield (group.title or "").capitalize(), rows


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    lines = [f"| `{_cell(name)}` | {_prose(_cell(text))} |" for name, text in rows]
    return "\n".join([f"## {title}", "", "| argument | meaning |", "|---|---|", *lines])


def _block(text: str) -> str:
    return f"```text\n{text}\n```"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _prose(text: str) -> str:
    """Text of a help, in which nothing is meant as Markdown."""
    return re.sub(r"([*_<])", r"\\\1", text) if "`" not in text else text
