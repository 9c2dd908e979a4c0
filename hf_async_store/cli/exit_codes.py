"""Errors as a person reads them, and as exit codes."""

from __future__ import annotations

import errno
import traceback
from typing import Final

from hf_async_store.cli.output import PROGRAM, log_line, write_error
from hf_async_store.errors import (
    AlreadyExistsError,
    AuthenticationError,
    BatchError,
    ConcurrencyConflictError,
    ConfigurationError,
    CorruptionError,
    DiskFullError,
    EntityNotFoundError,
    InvalidInputError,
    InvalidKeyError,
    LockTimeoutError,
    OperationTimeoutError,
    PermissionDeniedError,
    ReadOnlyStoreError,
    ReferenceViolationError,
    RetriesExhaustedError,
    StorageError,
    StoreNotFoundError,
    TargetNotEmptyError,
    ThrottledError,
    UnknownCollectionError,
    VerificationError,
)
from hf_async_store.os_errors import translate_os_error
from hf_async_store.redaction import redact_text

NOT_FOUND: Final = 1
USAGE: Final = 2
CONFLICT: Final = 3
STORAGE: Final = 4

_MAX_SHOWN: Final = 10
"""So many failures of a batch are reported one by one."""

_IN_THE_WAY: Final = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR)


class BackupNotFoundError(StorageError):
    """The backup that a command was given is not there."""


_CODES: Final[tuple[tuple[type[StorageError], int], ...]] = (
    (EntityNotFoundError, NOT_FOUND),
    (StoreNotFoundError, NOT_FOUND),
    (BackupNotFoundError, NOT_FOUND),
    (InvalidInputError, USAGE),
    (ConfigurationError, USAGE),
    (ConcurrencyConflictError, CONFLICT),
    (AlreadyExistsError, CONFLICT),
    # What is stored stands in the way, as with the others, and not how the command was written.
    (ReferenceViolationError, CONFLICT),
    (TargetNotEmptyError, CONFLICT),
    (VerificationError, CONFLICT),
)

# The messages of the store say what happened; where they leave open what to do, this does.
_HINTS: Final[tuple[tuple[type[StorageError], str], ...]] = (
    (UnknownCollectionError, "--collections MODULE:NAME declares others"),
    (AlreadyExistsError, "`update` changes it; `put` without --create replaces it"),
    (RetriesExhaustedError, "others keep changing it: try again later"),
    (ConcurrencyConflictError, "somebody else changed it: `get` it again, then decide"),
    (LockTimeoutError, "try again, or find out who holds it"),
    (ThrottledError, "try again later"),
    (OperationTimeoutError, "allow more with --timeout"),
    (AuthenticationError, "correct the user name or the password"),
    (PermissionDeniedError, "look at the owner and mode of the files and of their folder"),
    (ReadOnlyStoreError, "nothing can be written there"),
    (DiskFullError, "what was stored before is intact: make room, then do it again"),
)

_UNKNOWN: Final = "it may have been written or not: read before you write again"


def code_of(exc: StorageError) -> int:
    """The exit code of an error; of a batch, that of its worst."""
    if isinstance(exc, BatchError):
        return max(code_of(each) for each in exc.outcomes if isinstance(each, StorageError))
    return code_of_kind(type(exc))


def code_of_kind(kind: type[StorageError]) -> int:
    """The exit code of a class of errors."""
    return next((code for each, code in _CODES if issubclass(kind, each)), STORAGE)


def sentence(exc: StorageError) -> str:
    """What happened and what to do, as one line."""
    said = str(exc)
    hint = next((hint for kind, hint in _HINTS if isinstance(exc, kind)), None)
    if isinstance(exc, ReferenceViolationError):
        hint = "delete those first" if "cannot be deleted" in said else "put that first"
    if isinstance(exc, InvalidKeyError) and "needs its key field" in said:
        hint = "it holds the id"
    if type(exc) is PermissionDeniedError and not isinstance(exc.__cause__, OSError):
        hint = None  # a server said no: its rights are not those of files
    if isinstance(exc, CorruptionError) and "backup" in said:
        hint = None
    elif isinstance(exc, CorruptionError) and PROGRAM not in said:
        hint = f"`{PROGRAM} backups` lists what can be restored, `{PROGRAM} restore` does it"
    if isinstance(exc.__cause__, OSError) and exc.__cause__.errno in _IN_THE_WAY:
        hint = (
            "a file stands where a folder is needed, or the reverse: correct the path, or move it"
        )
    parts = [said.rstrip("."), _UNKNOWN if exc.outcome_unknown else None, hint]
    return redact_text("; ".join(each for each in parts if each))


def report(exc: StorageError, *, verbose: bool) -> int:
    """Tell an error on stderr; returns its exit code."""
    if isinstance(exc, BatchError):
        _report_batch(exc, verbose=verbose)
    else:
        log_line(sentence(exc))
    if verbose:
        _show_traceback(exc)
    return code_of(exc)


def _report_batch(exc: BatchError, *, verbose: bool) -> None:
    errors = [each for each in exc.outcomes if isinstance(each, StorageError)]
    shown = errors if verbose else errors[:_MAX_SHOWN]
    for each in shown:
        log_line(sentence(each))
    if len(errors) > len(shown):
        log_line(f"and {len(errors) - len(shown):,} more like these (--verbose shows all)")
    if len(exc.outcomes) > 1:
        others = "; the others are done" if len(errors) < len(exc.outcomes) else ""
        log_line(f"{len(errors):,} of {len(exc.outcomes):,} failed{others}")


def report_os_error(exc: OSError, *, verbose: bool) -> int:
    """Tell an error of the operating system that met the command line itself."""
    error = translate_os_error(exc, f"use {exc.filename}" if exc.filename else "go on")
    error.__cause__ = exc
    return report(error, verbose=verbose)


def report_defect(exc: Exception, *, verbose: bool) -> int:
    """Tell an error that nobody foresaw."""
    said = f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
    log_line(
        redact_text(f"a defect of this program, please report it: {said} (--verbose shows where)")
    )
    if verbose:
        _show_traceback(exc)
    return STORAGE


def _show_traceback(exc: BaseException) -> None:
    for text in traceback.format_exception(exc):
        write_error("".join(redact_text(each) for each in text.splitlines(keepends=True)))
