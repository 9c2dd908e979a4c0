"""The command `hf-async-store`. `hf-async-store --help` shows its manual.

Only modules that every command needs are imported here; the chosen command imports the others.
Imports take half of the run time of a short command.
"""

from __future__ import annotations

import atexit
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from hf_async_store.cli import output
from hf_async_store.cli.arguments import parse
from hf_async_store.cli.exit_codes import (
    BROKEN_PIPE,
    INTERRUPTED,
    report,
    report_defect,
    report_os_error,
)
from hf_async_store.errors import StorageError
from hf_async_store.redaction import redact_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def run() -> NoReturn:
    """Run the command of this process, and end it."""
    status = main()
    atexit.register(_end, status)
    sys.exit(status)


def _end(status: int) -> None:
    """End the process when its threads have ended, and every function that is to be called at the end was.

    Otherwise the interpreter would free every object of every module first, which takes a tenth of the run
    time of a short command. mypy ends its process in this way, too.
    """
    atexit.unregister(_end)
    atexit._run_exitfuncs()
    for each in (sys.stdout, sys.stderr):
        if each is not None:
            each.flush()
    os._exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Every error is one line on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    verbose = "--verbose" in words
    status = _exit_code_of(lambda: _run(words), verbose=verbose)
    # Also after a failure: an error while writing earlier results must be reported.
    return _exit_code_of(output.flush, verbose=verbose) or status


def _run(words: Sequence[str]) -> int:
    command, arguments = parse(words)
    return command.load()(arguments)


def _exit_code_of(work: Callable[[], int], *, verbose: bool) -> int:
    """Call `work` and return an exit code; exceptions are reported on stderr."""
    try:
        return work()
    except SystemExit as exc:  # --help and --version, and statements of `shell`
        if exc.code is None or isinstance(exc.code, int):
            return exc.code or 0
        output.write_error(redact_text(f"{exc.code}\n"))  # a text is an error, as in Python
        return 1
    except KeyboardInterrupt:
        output.log_line("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        output.close_broken_pipe()
        return BROKEN_PIPE
    except StorageError as exc:
        return report(exc, verbose=verbose)
    except OSError as exc:  # raised by the file operations of a command itself
        return report_os_error(exc, verbose=verbose)
    except Exception as exc:  # noqa: BLE001  # an unexpected error is reported in one line, too
        return report_defect(exc, verbose=verbose)
