"""What the errors of the two engines mean to a caller: one table each, by code and never by text."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Final

from hf_async_store.errors import (
    AuthenticationError,
    BrokenReferenceError,
    ConcurrencyConflictError,
    ConfigurationError,
    CorruptionError,
    DiskFullError,
    LockTimeoutError,
    OperationTimeoutError,
    PermissionDeniedError,
    ProtocolError,
    ReadOnlyError,
    StorageError,
    StoreClosedError,
    UnavailableError,
    ValueOutOfDomainError,
)
from hf_async_store.oserrors import translate_os_error

# -- SQLite, by primary result code (source: sqlite.org/rescode.html) -----------------------

_SQLITE: Final[dict[int, type[StorageError]]] = {
    sqlite3.SQLITE_BUSY: LockTimeoutError,
    sqlite3.SQLITE_LOCKED: LockTimeoutError,
    sqlite3.SQLITE_FULL: DiskFullError,
    sqlite3.SQLITE_READONLY: ReadOnlyError,
    sqlite3.SQLITE_PERM: PermissionDeniedError,
    sqlite3.SQLITE_AUTH: PermissionDeniedError,
    sqlite3.SQLITE_IOERR: UnavailableError,
    sqlite3.SQLITE_CANTOPEN: UnavailableError,
    sqlite3.SQLITE_CORRUPT: CorruptionError,
    sqlite3.SQLITE_NOTADB: CorruptionError,
    sqlite3.SQLITE_INTERRUPT: OperationTimeoutError,
    sqlite3.SQLITE_NOMEM: UnavailableError,
}


def sqlite_error(exc: Exception, *, doing: str, path: Path, writes: bool) -> StorageError:
    """The store's error for one of sqlite3, the operating system or a closed connection."""
    if isinstance(exc, OSError):
        return translate_os_error(exc, doing)
    code = getattr(exc, "sqlite_errorcode", None)
    if code is None:
        # aiosqlite's own ValueError, and sqlite3's ProgrammingError: the connection is closed.
        return StoreClosedError(f"cannot {doing}: the connection was closed")
    if code == sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY:
        return BrokenReferenceError(f"cannot {doing}: a reference names no entity")
    kind = _SQLITE.get(code & 0xFF, ProtocolError)
    more = f"; restore {path} from a backup" if kind is CorruptionError else ""
    # Where the disk failed, what it did with the commit is not known.
    unknown = writes and code & 0xFF == sqlite3.SQLITE_IOERR
    return kind(f"cannot {doing}: {exc}{more}", outcome_unknown=unknown)


# -- PostgreSQL, by SQLSTATE (source: its manual, appendix A) --------------------------------

_POSTGRES: Final[dict[str, type[StorageError]]] = {
    "08": UnavailableError,
    "22": ProtocolError,
    "23503": BrokenReferenceError,
    "25006": ReadOnlyError,
    "28": AuthenticationError,
    "3D000": ConfigurationError,
    "40": ConcurrencyConflictError,
    "42501": PermissionDeniedError,
    "53": UnavailableError,
    "53100": DiskFullError,
    "55P03": LockTimeoutError,
    "57": UnavailableError,
    "54000": ValueOutOfDomainError,
    "57014": OperationTimeoutError,
    "58": UnavailableError,
    "58030": UnavailableError,
    "XX001": CorruptionError,
    "XX002": CorruptionError,
}

# The server broke off, or the link is gone: a write may have landed before.
_BROKEN_OFF: Final = frozenset({"08", "57", "58", "XX"})
_NOT_SENT: Final = frozenset({"57P03", "57014", "08001", "08004"})


def postgres_error(sqlstate: str, message: str, *, doing: str, writes: bool) -> StorageError:
    """The store's error for one that the server sent."""
    kind = _POSTGRES.get(sqlstate) or _POSTGRES.get(sqlstate[:2], ProtocolError)
    text = f"cannot {doing}: {message}"
    unknown = writes and sqlstate[:2] in _BROKEN_OFF and sqlstate not in _NOT_SENT
    if kind is ConcurrencyConflictError:
        return ConcurrencyConflictError(
            f"{message}: another transaction was faster, try again",
            retryable=True,
            outcome_unknown=sqlstate == "40003",
        )
    error = kind(text, outcome_unknown=unknown)
    if unknown:
        error.retryable = False
    return error


def link_error(exc: Exception, *, doing: str, writes: bool, timed_out: bool) -> StorageError:
    """The store's error for a link that broke, or on which no answer came in time."""
    kind = OperationTimeoutError if timed_out else UnavailableError
    said = "no answer in time" if timed_out else str(exc) or type(exc).__name__
    return kind(f"cannot {doing}: {said}", retryable=not writes, outcome_unknown=writes)
