"""Output of the commands: results on stdout, messages on stderr.

On a terminal, results are tables, indented JSON or sentences. Otherwise, or with `--json`, they are
one JSON value per line.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TextIO

import msgspec

from hf_async_store.errors import StorageError

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Mapping

PROGRAM: Final = "hf-async-store"


class OutputError(StorageError):
    """The output could not be written; the operation on the store is complete."""


def for_people(arguments: Namespace) -> bool:
    """Whether the output is meant for a person: stdout is a terminal, and --json is not given."""
    return not arguments.json and is_terminal(sys.stdout)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether the stream is open and a terminal."""
    return stream is not None and stream.isatty()


# -- stdout ---------------------------------------------------------------------------------


def json_line(value: object) -> None:
    """Write a value as one line of JSON, in UTF-8 regardless of the locale, as JSON requires."""
    write(msgspec.json.encode(value) + b"\n")


def line(text: str) -> None:
    """Write one line of text."""
    write(f"{printable(text)}\n".encode(errors="backslashreplace"))


def value(arguments: Namespace, shown: object) -> None:
    """Write a value as JSON: indented for a person, one line for a program."""
    if for_people(arguments):
        shown = msgspec.Raw(msgspec.json.format(msgspec.json.encode(shown), indent=2))
    json_line(shown)


def result(arguments: Namespace, values: Mapping[str, Any], sentence: str) -> None:
    """Write the result of a command: the sentence for a person, the values as JSON for a program."""
    if for_people(arguments):
        line(sentence)
    else:
        json_line(values)


def write(data: bytes) -> None:
    """Write bytes."""
    if sys.stdout is None:  # the program was started with stdout closed
        return
    try:
        sys.stdout.buffer.write(data)
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise _not_written(exc) from exc


def flush() -> int:
    """Flush stdout; returns 0. At the exit of the interpreter, an error would not be reported."""
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
    """Redirect stdout to the null device, so that the interpreter's flush at exit does not fail."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


# -- stderr ---------------------------------------------------------------------------------


def log_line(text: str) -> None:
    """Write one line to stderr."""
    write_error(f"{PROGRAM}: {printable(text)}\n")


def write_error(text: str) -> None:
    if sys.stderr is None:
        return
    with suppress(OSError):  # stderr is closed, so the error cannot be reported anywhere
        sys.stderr.write(text)
        sys.stderr.flush()


def printable(text: str) -> str:
    """Escape everything in a text that is not printable, such as newlines and control sequences."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )
