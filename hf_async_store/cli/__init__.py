"""`hf-async-store`: the store from a shell. `hf-async-store --help` is its manual.

Only what every command needs is imported here, and the rest by the command that was chosen: half of
what a one-shot process costs is imports.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from hf_async_store.cli import output
from hf_async_store.cli.arguments import parse
from hf_async_store.cli.exit_codes import report, report_defect, report_os_error
from hf_async_store.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

INTERRUPTED: Final = 130
BROKEN_PIPE: Final = 141
"""What a shell shows for a program that a signal ended: 128 and its number."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Every error is one line on stderr."""
    given = list(sys.argv[1:] if argv is None else argv)
    verbose = "--verbose" in given
    status = _guarded(lambda: _run(given), verbose=verbose)
    # Also after a failure: what was done by then was written, and must not be lost unseen.
    return _guarded(output.flush, verbose=verbose) or status


def _run(given: Sequence[str]) -> int:
    command, arguments = parse(given)
    return command.load()(arguments)


def _guarded(work: Callable[[], int], *, verbose: bool) -> int:
    """The exit code of `work`, however it ends."""
    try:
        return work()
    except SystemExit as exc:  # --help and --version
        return exc.code if isinstance(exc.code, int) else 0
    except KeyboardInterrupt:
        output.log_line("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        output.close_broken_pipe()
        return BROKEN_PIPE
    except StorageError as exc:
        return report(exc, verbose=verbose)
    except OSError as exc:  # of what a command itself does with files
        return report_os_error(exc, verbose=verbose)
    except Exception as exc:  # noqa: BLE001  # a defect is reported in one line, too
        return report_defect(exc, verbose=verbose)
