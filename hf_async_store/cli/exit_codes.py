"""Error messages and exit codes of the command line."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Mapping
from typing import Final

from hf_async_store import errors
from hf_async_store.cli.output import PROGRAM, log_line, write_error
from hf_async_store.errors import BatchError, StorageError
from hf_async_store.os_errors import translate_os_error
from hf_async_store.redaction import redact_text

NOT_FOUND: Final = 1
USAGE: Final = 2
CONFLICT: Final = 3
STORAGE: Final = 4
TIMED_OUT: Final = 5
INTERRUPTED: Final = 130
BROKEN_PIPE: Final = 141
"""The exit codes that shells use for programs that a signal ended: 128 + the signal number."""

_MAX_SHOWN: Final = 10
"""Maximum number of errors of a batch that are reported one by one."""

_WRONG_FILE_TYPE: Final = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR)


class BackupNotFoundError(StorageError):
    """The backup given to a command does not exist."""


_CODES: Final[Mapping[int, tuple[type[StorageError], ...]]] = {
    NOT_FOUND: (errors.EntityNotFoundError, errors.StoreNotFoundError, BackupNotFoundError),
    # A wrong password is a wrong setting, as is a database that does not exist.
    USAGE: (errors.InvalidInputError, errors.ConfigurationError, errors.AuthenticationError),
    CONFLICT: (
        errors.ConcurrencyConflictError,
        errors.AlreadyExistsError,
        errors.UniqueViolationError,
        errors.ClaimLostError,
        # Like the others, it depends on the stored data, not on how the command was written.
        errors.ReferenceViolationError,
        errors.TargetNotEmptyError,
        errors.VerificationError,
    ),
}

# Hints that are added to the messages of errors which do not say what to do.
_HINTS: Final[tuple[tuple[type[StorageError], str | None], ...]] = (
    (errors.UnknownCollectionError, "--collections MODULE:NAME declares other collections"),
    (errors.AlreadyExistsError, "`update` changes it; `put` without --create replaces it"),
    (errors.UniqueViolationError, "give it another value, or change the other entity first"),
    (errors.RetriesExhaustedError, None),
    (
        errors.ConcurrencyConflictError,
        "it was changed concurrently: `get` it again before you write",
    ),
    (errors.LockTimeoutError, "try again, or find the process that holds the lock"),
    (errors.ThrottledError, "try again later"),
    (
        errors.FeedExpiredError,
        "`watch` without --since from now on, and `query` for what was before",
    ),
    (errors.OperationTimeoutError, "allow more time with --timeout"),
    (errors.AuthenticationError, None),
    (errors.PermissionDeniedError, "check the owner and mode of the files and of their folder"),
    (errors.ReadOnlyStoreError, "the store can only be read"),
    (errors.DiskFullError, "data stored earlier is intact: free some space, then try again"),
)

_OUTCOME_UNKNOWN: Final = (
    "it is unknown whether the write was committed: read before you write again"
)


def code_of(exc: StorageError) -> int:
    """The exit code of an error; for a batch, the greatest code of its errors."""
    if isinstance(exc, BatchError):
        return max(code_of(each) for each in exc.outcomes if isinstance(each, StorageError))
    if isinstance(exc, errors.PartialChangeError):
        return code_of(exc.cause)
    return code_of_kind(type(exc))


def code_of_kind(kind: type[StorageError]) -> int:
    """The exit code of a class of errors."""
    return next((code for code, kinds in _CODES.items() if issubclass(kind, kinds)), STORAGE)


def is_refusal(exc: StorageError) -> bool:
    """Whether a change was refused because of itself and of the stored data; else the store has failed.

    Not by exit code 2 alone: that of a wrong configuration, such as expired credentials, is the same.
    """
    return isinstance(exc, errors.InvalidInputError) or code_of(exc) == CONFLICT


def sentence(exc: StorageError, exists: str | None = None) -> str:
    """The message of an error as one line, with a hint what to do.

    Args:
        exists: the hint if the entity exists already, instead of that for `put`.
    """
    message = str(exc)
    hint = next((hint for kind, hint in _HINTS if isinstance(exc, kind)), None)
    if exists is not None and isinstance(exc, errors.AlreadyExistsError):
        hint = exists
    if isinstance(exc, errors.ReferenceViolationError):
        hint = (
            "delete the children first"
            if "cannot be deleted" in message
            else "put the parent first"
        )
    if isinstance(exc, errors.InvalidKeyError) and "needs its key field" in message:
        hint = "the key field holds the id"
    if type(exc) is errors.PermissionDeniedError and not isinstance(exc.__cause__, OSError):
        hint = None  # the error comes from a server, not from the permissions of files
    is_advised = isinstance(exc, errors.ConfigurationError)
    if (
        isinstance(exc.__cause__, OSError)
        and exc.__cause__.errno in _WRONG_FILE_TYPE
        and not is_advised
    ):
        hint = (
            "there is a file where a folder is needed, or the reverse: correct the path, or move "
            "the file"
        )
    parts = [message.rstrip("."), _OUTCOME_UNKNOWN if exc.outcome_unknown else None, hint]
    return redact_text("; ".join(each for each in parts if each))


def report(exc: StorageError, *, verbose: bool) -> int:
    """Report an error on stderr; returns its exit code."""
    if isinstance(exc, BatchError):
        _report_batch(exc, verbose=verbose)
    else:
        log_line(sentence(exc))
    if verbose:
        _show_traceback(exc)
    return code_of(exc)


def _report_batch(exc: BatchError, *, verbose: bool) -> None:
    failed = [each for each in exc.outcomes if isinstance(each, StorageError)]
    shown = failed if verbose else failed[:_MAX_SHOWN]
    for each in shown:
        log_line(sentence(each))
    if len(failed) > len(shown):
        log_line(f"and {len(failed) - len(shown):,} more errors (--verbose shows all)")
    if len(exc.outcomes) > 1:
        others = "; the others succeeded" if len(failed) < len(exc.outcomes) else ""
        log_line(f"{len(failed):,} of {len(exc.outcomes):,} failed{others}")


def report_os_error(exc: OSError, *, verbose: bool) -> int:
    """Report an error of the operating system that the command line itself caused."""
    error = translate_os_error(exc, f"use {exc.filename}" if exc.filename else "continue")
    error.__cause__ = exc
    return report(error, verbose=verbose)


def report_defect(exc: Exception, *, verbose: bool) -> int:
    """Report an unexpected error."""
    message = f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
    log_line(
        redact_text(
            f"this is a bug in {PROGRAM}, please report it: {message} (--verbose shows the "
            "traceback)"
        )
    )
    if verbose:
        _show_traceback(exc)
    return STORAGE


def _show_traceback(exc: BaseException) -> None:
    for part in traceback.format_exception(exc):
        write_error("".join(redact_text(each) for each in part.splitlines(keepends=True)))
