"""Translates the errors of the two engines: one table for each, by error code, not by message."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path
from typing import Final, NamedTuple

from hf_async_store.errors import (
    AuthenticationError,
    ConcurrencyConflictError,
    ConfigurationError,
    CorruptionError,
    DiskFullError,
    InvalidInputError,
    InvalidQueryError,
    LockTimeoutError,
    OperationTimeoutError,
    PermissionDeniedError,
    ProtocolError,
    ReadOnlyStoreError,
    ReferenceViolationError,
    SchemaMismatchError,
    StorageError,
    StoreClosedError,
    UnavailableError,
    UnsupportedValueError,
)
from hf_async_store.os_errors import translate_os_error

REFUSALS: Final = (ReferenceViolationError, InvalidInputError)
"""The errors of a change that the database rejects because of its data. Other changes in the same
statement may be valid."""

_REFERENCE: Final = (
    "a parent is missing or still has children (if parents are stored elsewhere, declare the field "
    "with enforced=False, or set enforce_references to false)"
)


class DuplicateValueError(InvalidInputError):
    """A unique index of this store rejected a row; the writer finds out whose values it has."""


# -- SQLite, by extended or primary result code (source: sqlite.org/rescode.html) ------------

_SQLITE: Final[dict[int, type[StorageError]]] = {
    sqlite3.SQLITE_BUSY: LockTimeoutError,
    sqlite3.SQLITE_LOCKED: LockTimeoutError,
    sqlite3.SQLITE_FULL: DiskFullError,
    sqlite3.SQLITE_IOERR_SHMSIZE: DiskFullError,  # the others with this cause are SQLITE_FULL
    sqlite3.SQLITE_READONLY: ReadOnlyStoreError,
    sqlite3.SQLITE_PERM: PermissionDeniedError,
    sqlite3.SQLITE_AUTH: PermissionDeniedError,
    sqlite3.SQLITE_IOERR: UnavailableError,
    sqlite3.SQLITE_CANTOPEN: UnavailableError,
    sqlite3.SQLITE_CORRUPT: CorruptionError,
    sqlite3.SQLITE_NOTADB: CorruptionError,
    sqlite3.SQLITE_INTERRUPT: OperationTimeoutError,
    sqlite3.SQLITE_NOMEM: UnavailableError,
}

_HELD: Final = (
    ": another process, or another store object of this process, holds the lock of {path}"
)
# What the message says after that of SQLite.
_SQLITE_MORE: Final[dict[int, str]] = {
    sqlite3.SQLITE_BUSY: _HELD,
    sqlite3.SQLITE_LOCKED: _HELD,
    sqlite3.SQLITE_CORRUPT: "; restore {path} from a backup",
    sqlite3.SQLITE_NOTADB: (
        ": the file is damaged, or is no SQLite database. Correct the path, or restore {path} from a backup"
    ),
    sqlite3.SQLITE_IOERR_SHMSIZE: (
        "; even reading needs 32 KB of disk space, for the shared-memory file {path}-shm"
    ),
}

# The codes that mean that the caller's own statement is wrong.
_SQLITE_CALLERS: Final = frozenset(
    {
        sqlite3.SQLITE_ERROR,
        sqlite3.SQLITE_CONSTRAINT,
        sqlite3.SQLITE_MISMATCH,
        sqlite3.SQLITE_MISUSE,
        sqlite3.SQLITE_RANGE,
        sqlite3.SQLITE_TOOBIG,
    }
)
# SQLite has one code for everything that is wrong in a statement, so its messages decide here.
_SQLITE_MISSING: Final = re.compile(r"no such (table|column)|has no column named")
_SQLITE_TAKEN: Final = re.compile(
    r"already exists|already (a|another) (table|index)|duplicate column name|use DROP TABLE"
)
_NOT_OURS: Final = (
    "this store did not create what has this name: rename or drop it, or set table_prefix"
)


def sqlite_error(
    exc: Exception, *, doing: str, path: Path, writes: bool, callers: bool = False
) -> StorageError:
    """The `StorageError` for an exception of sqlite3, the operating system or aiosqlite.

    Args:
        doing: what failed, for the message, after "cannot".
        writes: the failed statement may have written and committed.
        callers: the caller's own statement raised it.
    """
    if isinstance(exc, OSError):
        return translate_os_error(exc, doing)
    code = getattr(exc, "sqlite_errorcode", None)
    if code is None and callers:
        return _invalid_statement(str(exc))  # raised by the module sqlite3 itself, without a code
    if code is None:
        # aiosqlite's own ValueError, and sqlite3's ProgrammingError: the connection is closed.
        return StoreClosedError(f"cannot {doing}: the connection was closed")
    if code == sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY:
        return ReferenceViolationError(f"cannot {doing}: {exc}; {_REFERENCE}")
    if callers and code & 0xFF in _SQLITE_CALLERS:
        return _invalid_statement(str(exc))
    if code & 0xFF == sqlite3.SQLITE_CONSTRAINT:
        # The store checks its own constraints first, so this is one that another program created.
        return InvalidInputError(
            f"cannot {doing}: a constraint or trigger of the database rejects the change: {exc}"
        )
    if code & 0xFF == sqlite3.SQLITE_ERROR and _SQLITE_MISSING.search(str(exc)):
        return SchemaMismatchError(f"cannot {doing}: {exc}{_RESTORE_TABLES}")
    if code & 0xFF == sqlite3.SQLITE_ERROR and _SQLITE_TAKEN.search(str(exc)):
        return SchemaMismatchError(f"cannot {doing}: {exc}; {_NOT_OURS}")
    kind = _SQLITE.get(code) or _SQLITE.get(code & 0xFF, ProtocolError)
    more = _SQLITE_MORE.get(code) or _SQLITE_MORE.get(code & 0xFF, "")
    # After an I/O error, it is unknown whether the commit was written.
    unknown = writes and code & 0xFF == sqlite3.SQLITE_IOERR
    return kind(f"cannot {doing}: {exc}{more.format(path=path)}", outcome_unknown=unknown)


_RESTORE_TABLES: Final = (
    "; the tables were changed since this store was opened: restore them, or open the store again, "
    "which creates missing tables and columns without their data"
)


def _invalid_statement(message: str) -> InvalidInputError:
    return InvalidInputError(
        f"execute_with_lock: the statement or its arguments are invalid: {message}"
    )


# -- PostgreSQL, by SQLSTATE (source: its manual, appendix A) --------------------------------


class _Meaning(NamedTuple):
    """The meaning of a SQLSTATE, or of a class of SQLSTATEs.

    Attributes:
        kind: the class of the error.
        advice: the cause or what to do, appended to the message of the server.
        callers: in a caller's own statement, it is an `InvalidInputError` instead.
        unknown: a write may have been applied nevertheless.
        retryable: None: the default of the class.
    """

    kind: type[StorageError]
    advice: str = ""
    callers: bool = False
    unknown: bool = False
    retryable: bool | None = None


_INVALID_STATEMENT: Final = _Meaning(ProtocolError, callers=True)
_DATABASE_RULE: Final = _Meaning(
    InvalidInputError,
    "a constraint or trigger that this store did not create rejects the change",
    callers=True,
)
_SCHEMA_CHANGED: Final = _Meaning(
    SchemaMismatchError, _RESTORE_TABLES.removeprefix("; "), callers=True
)
_FOREIGN: Final = _Meaning(SchemaMismatchError, _NOT_OURS, callers=True)
_CONFLICT: Final = _Meaning(
    ConcurrencyConflictError, "a conflict with another transaction: try again", retryable=True
)
_CONNECTION_LOST: Final = _Meaning(UnavailableError, unknown=True)
_CHECK_LOGIN: Final = "check username, password, sslmode and the server's pg_hba.conf"

_CLASSES: Final[dict[str, _Meaning]] = {
    "00": _Meaning(ProtocolError, unknown=True),  # successful completion
    "01": _Meaning(ProtocolError, unknown=True),  # warning
    "02": _INVALID_STATEMENT,  # no data
    "03": _INVALID_STATEMENT,  # SQL statement not yet complete
    "08": _CONNECTION_LOST,  # connection exception
    "09": _DATABASE_RULE,  # triggered action exception
    "0A": _INVALID_STATEMENT,  # feature not supported
    "0B": _INVALID_STATEMENT,  # invalid transaction initiation
    "0F": _INVALID_STATEMENT,  # locator exception
    "0L": _Meaning(
        PermissionDeniedError, "the role is not allowed to grant this"
    ),  # invalid grantor
    "0P": _Meaning(ConfigurationError, "create it, or correct the setting username", callers=True),
    "0Z": _DATABASE_RULE,  # diagnostics exception: in the handler of a trigger
    "10": _INVALID_STATEMENT,  # XQuery error
    "20": _DATABASE_RULE,  # case not found: in a trigger
    "21": _INVALID_STATEMENT,  # cardinality violation
    "22": _INVALID_STATEMENT,  # data exception
    "23": _DATABASE_RULE,  # integrity constraint violation
    "24": _INVALID_STATEMENT,  # invalid cursor state
    "25": _INVALID_STATEMENT,  # invalid transaction state
    "26": _INVALID_STATEMENT,  # invalid SQL statement name
    "27": _DATABASE_RULE,  # triggered data change violation
    "28": _Meaning(AuthenticationError, _CHECK_LOGIN),  # invalid authorization specification
    "2B": _INVALID_STATEMENT,  # dependent privilege descriptors still exist
    "2D": _INVALID_STATEMENT,  # invalid transaction termination
    "2F": _DATABASE_RULE,  # SQL routine exception
    "34": _INVALID_STATEMENT,  # invalid cursor name
    "38": _DATABASE_RULE,  # external routine exception
    "39": _DATABASE_RULE,  # external routine invocation exception
    "3B": _INVALID_STATEMENT,  # savepoint exception
    "3D": _Meaning(ConfigurationError, "create it, or correct the setting name", callers=True),
    "3F": _Meaning(ConfigurationError, "create it, or correct the setting schema", callers=True),
    "40": _CONFLICT,  # transaction rollback
    "42": _INVALID_STATEMENT,  # syntax error or access rule violation
    "44": _DATABASE_RULE,  # WITH CHECK OPTION violation
    "53": _Meaning(UnavailableError, "the server is out of resources: try again later"),
    "54": _Meaning(InvalidInputError, "a limit of the server is exceeded", callers=True),
    "55": _INVALID_STATEMENT,  # object not in prerequisite state
    "57": _CONNECTION_LOST,  # operator intervention
    "58": _CONNECTION_LOST,  # system error, external to PostgreSQL
    "72": _CONFLICT,  # snapshot too old
    "F0": _Meaning(UnavailableError, "correct the server's configuration files", retryable=False),
    "HV": _DATABASE_RULE,  # foreign data wrapper: behind a table or trigger that the store did not create
    "P0": _DATABASE_RULE,  # PL/pgSQL
    "XX": _Meaning(ProtocolError, unknown=True),  # internal error
}

_STATES: Final[dict[str, _Meaning]] = {
    "08001": _Meaning(UnavailableError),  # the connection was never established
    "08004": _Meaning(UnavailableError, "the server refused the connection"),
    "08P01": _Meaning(ProtocolError, unknown=True),
    "0A000": _Meaning(
        ProtocolError,
        "on a standby behind pgbouncer, set isolation to repeatable_read",
        callers=True,
    ),
    "22021": _Meaning(
        UnsupportedValueError, "the value contains a character that the database does not accept"
    ),
    "22P05": _Meaning(
        UnsupportedValueError,
        "the value contains a character that the encoding of the database does not have; use UTF8",
    ),
    "23001": _Meaning(ReferenceViolationError, _REFERENCE, callers=True),
    "23503": _Meaning(ReferenceViolationError, _REFERENCE),
    "25006": _Meaning(
        ReadOnlyStoreError,
        "the server is a standby, or the database is set to read-only: see target_session_attrs and "
        "default_transaction_read_only",
    ),
    "25P03": _Meaning(
        UnavailableError, "the server's idle_in_transaction_session_timeout ended the transaction"
    ),
    "25P04": _Meaning(UnavailableError, "the server's transaction_timeout ended the transaction"),
    "28P01": _Meaning(AuthenticationError, "correct username or password"),
    "40002": _DATABASE_RULE,
    "40003": _Meaning(
        ConcurrencyConflictError,
        "a conflict with another transaction: try again",
        unknown=True,
    ),
    "42501": _Meaning(PermissionDeniedError, "the role lacks a privilege: GRANT it"),
    "42701": _FOREIGN,  # duplicate column
    "42703": _SCHEMA_CHANGED,  # undefined column
    "42704": _SCHEMA_CHANGED,  # undefined object
    "42710": _FOREIGN,  # duplicate object: a type
    "42804": _SCHEMA_CHANGED,  # datatype mismatch
    "42809": _SCHEMA_CHANGED,  # wrong object type
    "42883": _SCHEMA_CHANGED,  # undefined function: the type of a column was changed
    "42P01": _SCHEMA_CHANGED,  # undefined table
    "42P07": _FOREIGN,  # duplicate table, view or index
    "42P18": _SCHEMA_CHANGED,  # indeterminate datatype
    "53100": _Meaning(DiskFullError, "the server's disk is full"),
    "53300": _Meaning(UnavailableError, "the server accepts no more connections: try again later"),
    "54000": _Meaning(UnsupportedValueError, "a limit of the server is exceeded", callers=True),
    "54001": _Meaning(InvalidQueryError, "the filter is too complex", callers=True),
    "54011": _Meaning(ConfigurationError, "too many declared fields", callers=True),
    "54023": _Meaning(InvalidQueryError, "the filter has too many values", callers=True),
    "55006": _Meaning(UnavailableError, "another session uses the object: try again"),
    "55P03": _Meaning(LockTimeoutError, "another transaction holds the lock: see timeout"),
    "57014": _Meaning(OperationTimeoutError, "see the setting timeout"),
    "57P01": _Meaning(
        UnavailableError,
        "the server is restarted or shut down, or an administrator ended the session",
        unknown=True,
    ),
    "57P03": _Meaning(UnavailableError, "the server is starting or stopping: try again"),
    "57P04": _Meaning(ConfigurationError, "name: the database was dropped", unknown=True),
    "57P05": _Meaning(UnavailableError, "the server's idle_session_timeout ended the session"),
    "58P01": _Meaning(CorruptionError, "one of the server's own files is missing", unknown=True),
    "F0001": _Meaning(UnavailableError, "the server's lock file exists: try again"),
    "P0002": _DATABASE_RULE,
    "XX001": _Meaning(CorruptionError, "restore the database from a backup", unknown=True),
    "XX002": _Meaning(CorruptionError, "rebuild the index with REINDEX", unknown=True),
}


def postgres_error(
    sqlstate: str, message: str, *, doing: str, writes: bool, callers: bool = False
) -> StorageError:
    """The `StorageError` for an error that the server sent. For the arguments, see `sqlite_error`."""
    meaning = _STATES.get(sqlstate) or _CLASSES.get(sqlstate[:2])
    if meaning is None:
        # Not a SQLSTATE, so it is unknown whether a write was applied.
        return ProtocolError(f"cannot {doing}: {message}", outcome_unknown=writes)
    if callers and meaning.callers:
        return _invalid_statement(message)
    explained = f"cannot {doing}: {message}" + (f"; {meaning.advice}" if meaning.advice else "")
    unknown = writes and meaning.unknown
    return meaning.kind(
        explained, retryable=False if unknown else meaning.retryable, outcome_unknown=unknown
    )


def connection_error(exc: Exception, *, doing: str, writes: bool, timed_out: bool) -> StorageError:
    """The `StorageError` for a connection that was lost, or on which no response arrived in time."""
    kind = OperationTimeoutError if timed_out else UnavailableError
    reason = "no response in time" if timed_out else str(exc) or type(exc).__name__
    return kind(f"cannot {doing}: {reason}", retryable=not writes, outcome_unknown=writes)
