"""What is written where: results to stdout, everything about them to stderr.

On a terminal a person reads: tables, indented JSON, sentences. Anywhere else a program does, and
gets one JSON value a line; `--json` says so on a terminal, too.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, TextIO

import msgspec

from hf_async_store.errors import StorageError

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Iterator, Mapping

PROGRAM: Final = "hf-async-store"


class OutputError(StorageError):
    """What was to be shown could not be written; the store has done what it was asked."""


def for_people(arguments: Namespace) -> bool:
    """Whether a person reads stdout."""
    return not arguments.json and is_terminal(sys.stdout)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person is at the other end."""
    return stream is not None and stream.isatty()


# -- stdout ---------------------------------------------------------------------------------


def json_line(value: object) -> None:
    """A value as one line. UTF-8 whatever the locale, because that is what JSON is."""
    _write(msgspec.json.encode(value) + b"\n")


def indented(value: object) -> None:
    """A value as indented JSON."""
    _write(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def line(text: str) -> None:
    """A sentence for a person."""
    _write(f"{printable(text)}\n".encode(errors="backslashreplace"))


def result(arguments: Namespace, values: Mapping[str, Any], sentence: str) -> None:
    """What a command did: a sentence for a person, a JSON line for a program."""
    if for_people(arguments):
        line(sentence)
    else:
        json_line(values)


def _write(data: bytes) -> None:
    if sys.stdout is None:  # closed by the caller, who wants none
        return
    try:
        sys.stdout.buffer.write(data)
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise _not_written(exc) from exc


def flush() -> int:
    """Everything out. Not left to the interpreter's end, where an error would pass unseen."""
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as exc:
            raise _not_written(exc) from exc
    return 0


def _not_written(exc: OSError) -> OutputError:
    close_broken_pipe()
    return OutputError(f"cannot write the output: {exc.strerror}")


def close_broken_pipe() -> None:
    """Nobody can be written to any more: the interpreter's own last flush goes nowhere."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


# -- stderr ---------------------------------------------------------------------------------


def log_line(text: str) -> None:
    """One line about what happens."""
    write_error(f"{PROGRAM}: {printable(text)}\n")


def write_error(text: str) -> None:
    if sys.stderr is None:
        return
    with suppress(OSError):  # nobody listens
        sys.stderr.write(text)
        sys.stderr.flush()


@contextmanager
def progress(
    what: str, total: int | None = None, *, is_long: bool
) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, where a person watches; what is given advances it.

    Args:
        total: how many steps there are; None if nobody knows.
        is_long: the work takes longer than the start of the bar.
    """
    if not is_long or not is_terminal(sys.stderr):
        yield lambda steps: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = [TextColumn("{task.description}", markup=False), BarColumn()]
    columns += [] if total is None else [MofNCompleteColumn()]
    with Progress(
        *columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda steps: bar.advance(task, steps)


def printable(text: str) -> str:
    """The text on one line, without anything that a terminal would obey."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )
