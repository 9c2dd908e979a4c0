"""What the errors of the two engines mean to a caller: one table each, by code and never by text."""

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
"""What the database refuses of a change for what it holds; its neighbours in a statement may pass."""

_REFERENCE: Final = (
    "a parent is missing or still has children (if parents are kept elsewhere, declare the field "
    "with enforced=False, or set enforce_references to false)"
)

# -- SQLite, by primary result code (source: sqlite.org/rescode.html) -----------------------

_SQLITE: Final[dict[int, type[StorageError]]] = {
    sqlite3.SQLITE_BUSY: LockTimeoutError,
    sqlite3.SQLITE_LOCKED: LockTimeoutError,
    sqlite3.SQLITE_FULL: DiskFullError,
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

# What a statement of the caller can be wrong in.
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
# SQLite has one code for all that is wrong in a statement; these texts are its own.
_SQLITE_LACKS: Final = re.compile(r"no such (table|column)|has no column named")


def sqlite_error(
    exc: Exception, *, doing: str, path: Path, writes: bool, callers: bool = False
) -> StorageError:
    """The store's error for one of sqlite3, the operating system or a closed connection.

    Args:
        callers: it came from a statement of the caller.
    """
    if isinstance(exc, OSError):
        return translate_os_error(exc, doing)
    code = getattr(exc, "sqlite_errorcode", None)
    if code is None and callers:
        return _callers_fault(str(exc))  # sqlite3 itself refused it, and gives those no code
    if code is None:
        # aiosqlite's own ValueError, and sqlite3's ProgrammingError: the connection is closed.
        return StoreClosedError(f"cannot {doing}: the connection was closed")
    if code == sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY:
        return ReferenceViolationError(f"cannot {doing}: {exc}; {_REFERENCE}")
    if callers and code & 0xFF in _SQLITE_CALLERS:
        return _callers_fault(str(exc))
    if code & 0xFF == sqlite3.SQLITE_CONSTRAINT:
        # Ours are decided before; this one is a constraint or trigger that others made.
        return InvalidInputError(f"cannot {doing}: the database itself refuses it: {exc}")
    if code & 0xFF == sqlite3.SQLITE_ERROR and _SQLITE_LACKS.search(str(exc)):
        return SchemaMismatchError(f"cannot {doing}: {exc}{_CHANGED_SINCE}")
    kind = _SQLITE.get(code & 0xFF, ProtocolError)
    more = f"; restore {path} from a backup" if kind is CorruptionError else ""
    # Where the disk failed, what it did with the commit is not known.
    unknown = writes and code & 0xFF == sqlite3.SQLITE_IOERR
    return kind(f"cannot {doing}: {exc}{more}", outcome_unknown=unknown)


_CHANGED_SINCE: Final = (
    "; the tables were changed since this store was opened: restore them, or open the store again, "
    "which makes what lacks, empty"
)


def _callers_fault(said: str) -> InvalidInputError:
    return InvalidInputError(f"execute_with_lock: the statement or its arguments: {said}")


# -- PostgreSQL, by SQLSTATE (source: its manual, appendix A) --------------------------------


class _Meaning(NamedTuple):
    """What a SQLSTATE, or a class of them, means.

    Attributes:
        kind: the store's error.
        do: what to do about it, appended to what the server said.
        callers: in a statement of the caller, it is the caller who is wrong.
        unknown: whether a write may have landed all the same.
        retryable: None leaves it to the kind.
    """

    kind: type[StorageError]
    do: str = ""
    callers: bool = False
    unknown: bool = False
    retryable: bool | None = None


_OURS: Final = _Meaning(ProtocolError, callers=True)
_THEIRS: Final = _Meaning(
    InvalidInputError,
    "a constraint or trigger of the database refuses this change; it is not one of this store's",
    callers=True,
)
_CHANGED: Final = _Meaning(SchemaMismatchError, _CHANGED_SINCE.removeprefix("; "), callers=True)
_CONFLICT: Final = _Meaning(
    ConcurrencyConflictError, "another transaction was faster, try again", retryable=True
)
_ENDED: Final = _Meaning(UnavailableError, unknown=True)
_WHO: Final = "look at username, password, sslmode and the server's pg_hba.conf"

_CLASSES: Final[dict[str, _Meaning]] = {
    "00": _Meaning(ProtocolError, unknown=True),  # successful completion is no error
    "01": _Meaning(ProtocolError, unknown=True),  # nor is a warning
    "02": _OURS,  # no data
    "03": _OURS,  # SQL statement not yet complete
    "08": _ENDED,  # connection exception
    "09": _THEIRS,  # triggered action exception
    "0A": _OURS,  # feature not supported
    "0B": _OURS,  # invalid transaction initiation
    "0F": _OURS,  # locator exception
    "0L": _Meaning(PermissionDeniedError, "the role may not grant this"),  # invalid grantor
    "0P": _Meaning(ConfigurationError, "username: there is no such role", callers=True),
    "0Z": _THEIRS,  # diagnostics exception: of a handler in a trigger
    "10": _OURS,  # XQuery error
    "20": _THEIRS,  # case not found: in a trigger
    "21": _OURS,  # cardinality violation
    "22": _OURS,  # data exception
    "23": _THEIRS,  # integrity constraint violation
    "24": _OURS,  # invalid cursor state
    "25": _OURS,  # invalid transaction state
    "26": _OURS,  # invalid SQL statement name
    "27": _THEIRS,  # triggered data change violation
    "28": _Meaning(AuthenticationError, _WHO),  # invalid authorization specification
    "2B": _OURS,  # dependent privilege descriptors still exist
    "2D": _OURS,  # invalid transaction termination
    "2F": _THEIRS,  # SQL routine exception
    "34": _OURS,  # invalid cursor name
    "38": _THEIRS,  # external routine exception
    "39": _THEIRS,  # external routine invocation exception
    "3B": _OURS,  # savepoint exception
    "3D": _Meaning(ConfigurationError, "name: there is no such database", callers=True),
    "3F": _Meaning(ConfigurationError, "schema: there is no such schema", callers=True),
    "40": _CONFLICT,  # transaction rollback
    "42": _OURS,  # syntax error or access rule violation
    "44": _THEIRS,  # WITH CHECK OPTION violation
    "53": _Meaning(UnavailableError, "the server is out of resources, try again later"),
    "54": _Meaning(InvalidInputError, "more than the server takes", callers=True),
    "55": _OURS,  # object not in prerequisite state
    "57": _ENDED,  # operator intervention
    "58": _ENDED,  # system error, external to PostgreSQL
    "72": _CONFLICT,  # snapshot too old
    "F0": _Meaning(UnavailableError, "mend the server's configuration files", retryable=False),
    "HV": _THEIRS,  # foreign data wrapper: a table or trigger of others leads there
    "P0": _THEIRS,  # PL/pgSQL
    "XX": _Meaning(ProtocolError, unknown=True),  # internal error
}

_STATES: Final[dict[str, _Meaning]] = {
    "08001": _Meaning(UnavailableError),  # the connection was never made
    "08004": _Meaning(UnavailableError, "the server refused the connection"),
    "08P01": _Meaning(ProtocolError, unknown=True),
    "0A000": _Meaning(
        ProtocolError,
        "on a standby behind pgbouncer, set isolation to repeatable_read",
        callers=True,
    ),
    "22021": _Meaning(UnsupportedValueError, "a character that the database does not take"),
    "22P05": _Meaning(
        UnsupportedValueError,
        "the encoding of the database lacks a character of the value: it should be UTF8",
    ),
    "23001": _Meaning(ReferenceViolationError, _REFERENCE, callers=True),
    "23503": _Meaning(ReferenceViolationError, _REFERENCE),
    "25006": _Meaning(
        ReadOnlyStoreError,
        "a standby, or a database that is set to read-only: see target_session_attrs and "
        "default_transaction_read_only",
    ),
    "25P03": _Meaning(
        UnavailableError, "the server's idle_in_transaction_session_timeout ended the transaction"
    ),
    "25P04": _Meaning(UnavailableError, "the server's transaction_timeout ended the transaction"),
    "28P01": _Meaning(AuthenticationError, "look at username and password"),
    "40002": _THEIRS,
    "40003": _Meaning(
        ConcurrencyConflictError,
        "another transaction was faster, try again",
        unknown=True,
    ),
    "42501": _Meaning(PermissionDeniedError, "the role lacks a privilege: GRANT it"),
    "42703": _CHANGED,  # undefined column
    "42704": _CHANGED,  # undefined object
    "42804": _CHANGED,  # datatype mismatch
    "42809": _CHANGED,  # wrong object type
    "42883": _CHANGED,  # undefined function: of a column that has another type by now
    "42P01": _CHANGED,  # undefined table
    "42P18": _CHANGED,  # indeterminate datatype
    "53100": _Meaning(DiskFullError, "the server's disk is full"),
    "53300": _Meaning(UnavailableError, "the server takes no more connections, try again later"),
    "54000": _Meaning(UnsupportedValueError, "more than the server takes", callers=True),
    "54001": _Meaning(InvalidQueryError, "the filter is too complex", callers=True),
    "54011": _Meaning(ConfigurationError, "too many declared fields", callers=True),
    "54023": _Meaning(InvalidQueryError, "the filter has too many values", callers=True),
    "55006": _Meaning(UnavailableError, "another session uses it, try again"),
    "55P03": _Meaning(LockTimeoutError, "another transaction holds it: see timeout"),
    "57014": _Meaning(OperationTimeoutError, "see timeout"),
    "57P03": _Meaning(UnavailableError, "the server is starting or stopping, try again"),
    "57P04": _Meaning(ConfigurationError, "name: the database was dropped", unknown=True),
    "57P05": _Meaning(UnavailableError, "the server's idle_session_timeout ended the session"),
    "58P01": _Meaning(CorruptionError, "the server lacks one of its own files", unknown=True),
    "F0001": _Meaning(UnavailableError, "the server's lock file exists, try again"),
    "P0002": _THEIRS,
    "XX001": _Meaning(CorruptionError, "restore the database from a backup", unknown=True),
    "XX002": _Meaning(CorruptionError, "REINDEX it", unknown=True),
}


def postgres_error(
    sqlstate: str, message: str, *, doing: str, writes: bool, callers: bool = False
) -> StorageError:
    """The store's error for one that the server sent.

    Args:
        callers: it came from a statement of the caller.
    """
    meaning = _STATES.get(sqlstate) or _CLASSES.get(sqlstate[:2])
    if meaning is None:
        # No SQLSTATE at all: whoever sent this, it does not say whether a write landed.
        return ProtocolError(f"cannot {doing}: {message}", outcome_unknown=writes)
    if callers and meaning.callers:
        return _callers_fault(message)
    text = f"cannot {doing}: {message}" + (f"; {meaning.do}" if meaning.do else "")
    unknown = writes and meaning.unknown
    return meaning.kind(
        text, retryable=False if unknown else meaning.retryable, outcome_unknown=unknown
    )


def link_error(exc: Exception, *, doing: str, writes: bool, timed_out: bool) -> StorageError:
    """The store's error for a link that broke, or on which no answer came in time."""
    kind = OperationTimeoutError if timed_out else UnavailableError
    said = "no answer in time" if timed_out else str(exc) or type(exc).__name__
    return kind(f"cannot {doing}: {said}", retryable=not writes, outcome_unknown=writes)
