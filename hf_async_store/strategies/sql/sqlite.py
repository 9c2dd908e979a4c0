"""SQLite: a file, one writer at a time, JSON as text."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import os
import re
import sqlite3
import threading
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NamedTuple, TypeAlias, cast
from urllib.parse import quote

import aiosqlite
from sqlalchemy import BigInteger, Boolean, Text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool
from sqlalchemy.types import TypeEngine, UserDefinedType

from hf_async_store.config import SQLConfig
from hf_async_store.driver import Capabilities, Isolation, QueryPlan, run_to_completion
from hf_async_store.errors import (
    ConfigurationError,
    DataFileConflictError,
    PermissionDeniedError,
    ProtocolError,
    ReadOnlyStoreError,
    StorageError,
    StoreNotFoundError,
    UnavailableError,
)
from hf_async_store.os_errors import translate_os_error
from hf_async_store.schema import Field, Index, Schema
from hf_async_store.strategies.sql import sqlite_functions as functions
from hf_async_store.strategies.sql.compiler import Arguments, SortPart
from hf_async_store.strategies.sql.dialect import BulkUpsert, Dialect
from hf_async_store.strategies.sql.errors import sqlite_error
from hf_async_store.strategies.sql.row_mapping import SIDE, Kind, decode_json, encode_json
from hf_async_store.values import INT_MAX, FieldType, Value

if TYPE_CHECKING:
    from sqlalchemy import MetaData

_OLDEST: Final = (3, 38, 0)  # has RETURNING, and the arrows of JSON
_CHUNK_SIZE: Final = 256
_PIECE_BYTES: Final = 1 << 18
_MOST_ROWS: Final = 1024
"""So many rows at most come with one turn of the connection's thread; fewer where they are heavy."""
_FEW: Final = 16
_BLOCK: Final = 250
_IN_BULK: Final = (1000, 250)
_BLOCKS: Final = (_BLOCK, 50, 10, 1)
_LOG_PAGES: Final = 1000  # SQLite's own default
_BULK_LOG_PAGES: Final = 10_000
_MOST_PARAMETERS: Final = 32_766
_OTHERS: Final = ("-wal", "-shm")
_INNER_WAIT_MS: Final = 20
"""How long SQLite itself waits for a lock before the loop gets a turn, and a cancellation its way."""

_LOOK: Final = "SELECT count(*) FROM sqlite_master"
"""SQLite opens its files at the first look."""

_TRIES: Final = 8
"""How often a file is opened that is replaced at the same moment."""

_EXIT_SECONDS: Final = 5.0
"""How long the end of the process waits for a store that nobody closed."""

_FUNCTIONS: Final[Mapping[str, tuple[int, Callable[..., Any]]]] = {
    "hf_real": (1, functions.real),
    "hf_test": (3, functions.test),
    "hf_at": (2, functions.at),
    "hf_merged": (3, functions.merged),
    "hf_key": (1, functions.key),
}

_MEMBER: Final = re.compile(r'[^"\\\x00-\x1f]+\Z')
_BUSY: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_FOR_UPDATE: Final = re.compile(r"(?is)\s+for\s+update\s*;?\s*\Z")


def _boolean(value: Any) -> Value:
    # What is neither was written by another program; it stays what it is.
    return bool(value) if value in (0, 1) else cast("Value", value)


def _json(value: Any) -> Value:
    if not isinstance(value, str):
        raise TypeError(f"a JSON column holds {value!r}")
    return cast("Value", decode_json(value))


class _Untyped(UserDefinedType[Any]):
    """A column without affinity: it keeps 1 and 1.0 apart."""

    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        return "BLOB"


_Identity: TypeAlias = "tuple[int, int]"
"""Device and inode."""


class _CursorPayload(NamedTuple):
    """What a connection has open: under these names it is found again, or something else is.

    Attributes:
        file: the database.
        others: the log and its index, by path; each None where it is not there (yet).
    """

    file: _Identity
    others: tuple[tuple[Path, _Identity | None], ...]


_Job: TypeAlias = "tuple[asyncio.Future[Any] | None, Callable[[], Any]]"


class _Connection(aiosqlite.Connection):
    """A connection whose thread lets the process end, and outlives the loop.

    Args:
        replaced: whether its file was replaced.

    Attributes:
        place: what it has open; None until that is known.
        frozen: of a file that nobody can write, opened as one that does not change: what it looked
            like then.
        lost: it must not be used again.
    """

    def __init__(
        self,
        connector: Callable[[], sqlite3.Connection],
        replaced: Callable[[_Connection], bool],
    ) -> None:
        super().__init__(connector, iter_chunk_size=64)
        self._replaced = replaced
        self.place: _CursorPayload | None = None
        self.frozen: os.stat_result | None = None
        self.lost = False
        jobs = cast("Any", self)._tx
        self._thread = threading.Thread(target=_serve, args=(jobs,), daemon=True, name="sqlite")
        _OPEN.add(self)

    @property
    def is_open(self) -> bool:
        return self._running and self._connection is not None

    def stop(self) -> asyncio.Future[Any] | None:
        """See `aiosqlite.Connection.stop`."""
        self._running = False
        connection, self._connection = self._connection, None
        future: asyncio.Future[Any] | None = None
        with suppress(RuntimeError):
            future = asyncio.get_running_loop().create_future()

        def stop() -> object:
            if connection is not None:
                with suppress(sqlite3.Error):  # it is of no more use in any case
                    connection.close()
            return _STOP

        if connection is not None and self._replaced(self):
            self._leave_open(connection)
            return None
        cast("Any", self)._tx.put_nowait((future, stop))
        return future

    async def close(self) -> None:
        """Behind whatever its thread still does."""
        if self._running:
            stopped = self.stop()
            if stopped is not None:
                await stopped

    def _leave_open(self, connection: sqlite3.Connection) -> None:
        """Give it up without closing it, until the process ends.

        SQLite ends the last connection of a file by removing the log by its name; where another
        file has taken that name, the log may be in use by others.
        """

        def wait() -> None:
            if connection.in_transaction:
                with suppress(sqlite3.Error):
                    connection.rollback()
            threading.Event().wait()

        cast("Any", self)._tx.put_nowait((None, wait))


_STOP: Final = object()
"""Ends the thread of a connection."""


def _serve(jobs: Any) -> None:
    """What the thread of a connection does: as aiosqlite's own, but the loop may be closed."""
    while True:
        future, work = cast("_Job", jobs.get())
        try:
            result = work()
        except BaseException as exc:  # noqa: BLE001  # whatever it is, who asked must hear it
            _answer(future, asyncio.Future.set_exception, exc)
        else:
            _answer(future, asyncio.Future.set_result, result)
            if result is _STOP:
                return
            del result
        del future, work


def _answer(
    future: asyncio.Future[Any] | None,
    how: Callable[[asyncio.Future[Any], Any], None],
    what: object,
) -> None:
    if future is None:
        return

    def answer() -> None:
        if not future.done():
            how(future, what)

    with suppress(RuntimeError):  # the loop was closed: nobody waits
        future.get_loop().call_soon_threadsafe(answer)


_OPEN: Final[weakref.WeakSet[_Connection]] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Close what nobody closed, as far as that does not hold up the end of the process."""
    deadline = time.monotonic() + _EXIT_SECONDS
    threads = []
    for each in list(_OPEN):
        if each._connection is not None:
            threads.append(each._thread)
            each.stop()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


class _ImportChunks:
    """Imports as parameters, up to 250 rows in a statement.

    It returns no rows: for each, the thread of the connection would wait for its turn, of which it
    gets few while the loop makes the next batch.
    """

    # What is committed is as safe in the log as in the file. Brought over less often, a page that
    # many batches change is written once for all of them.
    before = f"PRAGMA wal_autocheckpoint = {_BULK_LOG_PAGES}"
    after = f"PRAGMA wal_autocheckpoint = {_LOG_PAGES}"

    def blocks(self, rows: int, columns: int) -> list[tuple[int, int]]:
        found = []
        for size in _BLOCKS:
            if size * columns <= _MOST_PARAMETERS and (times := rows // size):
                found.append((size, times))
                rows %= size
        return found

    def values(self, columns: int, rows: int) -> str:
        numbers = itertools.count(1)
        values = ", ".join(
            f"({', '.join(f'?{next(numbers)}' for _ in range(columns))})" for _ in range(rows)
        )
        parts = [f"column{n + 1} AS c{n}" for n in range(columns)]
        return f"(SELECT {', '.join(parts)} FROM (VALUES {values})) AS i"

    async def run(
        self, driver: aiosqlite.Connection, sql: str, blocks: Sequence[Sequence[object]]
    ) -> int:
        async with driver.executemany(sql, blocks) as cursor:
            return cursor.rowcount


class SQLite(Dialect):
    """The dialect of one file.

    Raises:
        ConfigurationError: there is no file named.
    """

    driver_errors: ClassVar[tuple[type[Exception], ...]] = (sqlite3.Error, OSError, ValueError)
    caller_errors = (sqlite3.Warning, TypeError, OverflowError)
    placeholder_prefix = "?"
    single_writer = True
    separate_read_pool = False
    needs_transactions = False
    batches_commit_together = True
    bulk = _ImportChunks()
    inline_references = True
    to_column = MappingProxyType({"json": lambda value: (encode_json(value).decode(), True)})
    from_column = MappingProxyType({"boolean": _boolean, "json": _json})

    def __init__(self, config: SQLConfig) -> None:
        if config.name in ("", ":memory:"):
            raise ConfigurationError(
                "name: SQLite needs the path of a file (a store in memory is `memory:`)"
            )
        if sqlite3.sqlite_version_info < _OLDEST:
            raise ConfigurationError(
                f"SQLite {'.'.join(map(str, _OLDEST))} is needed, not {sqlite3.sqlite_version}"
            )
        self._config = config
        # Links stay: SQLite follows them itself, and finds its other files where the file is.
        self._path = Path(config.name).absolute()
        self._file: _Identity | None = None  # once it was opened
        self._drivers: weakref.WeakSet[_Connection] = weakref.WeakSet()
        self.capabilities = Capabilities(
            engine="sqlite",
            durable=True,
            multi_process=True,
            references=True,
            read_batch=1024,
            read_concurrency=2,
        )

    def json_text(self, value: Value) -> tuple[str, bool]:
        return encode_json(value).decode(), True

    # -- the driver --------------------------------------------------------------------------

    def engine(self, *, size: int, overflow: int, read_only: bool) -> AsyncEngine:
        return create_async_engine(
            "sqlite+aiosqlite://",
            async_creator=self._connect,
            poolclass=AsyncAdaptedQueuePool,
            pool_size=size,
            max_overflow=overflow,
            pool_recycle=self._config.pool_recycle,
            pool_reset_on_return=None,
            pool_use_lifo=True,
        )

    async def _connect(self) -> aiosqlite.Connection:
        # The pool may do this while a cancelled task checks out; the driver would then forget, and
        # never close, what its thread is opening.
        opening = asyncio.ensure_future(self._open())
        try:
            return await run_to_completion(opening)
        except asyncio.CancelledError:
            if opening.exception() is None:
                await run_to_completion(opening.result().close())
            raise

    async def _open(self) -> _Connection:
        for _ in range(_TRIES):
            before = self._identity()
            if self._file is None and before is None:
                raise StoreNotFoundError(f"there is no file {self._path}")
            self._check_file(before)
            self._check_names()
            for each in list(self._drivers):
                if each.is_open:
                    self.check_place(each)  # or it would make the files anew that are missing
            driver = await self._opened()
            if driver.place is not None and driver.place.file == before:
                self._file = before
                self._drivers.add(driver)
                return driver
            await driver.close()
        raise UnavailableError(f"cannot open {self._path}: it was replaced again and again")

    async def _opened(self) -> _Connection:
        frozen = self._frozen()
        mode = "mode=ro&immutable=1" if frozen is not None else "mode=rw"
        name = f"file:{quote(str(self._path))}?{mode}"
        cached = 256 if self._config.enable_query_cache else 0

        def connect() -> sqlite3.Connection:
            return sqlite3.connect(
                name,
                uri=True,
                isolation_level=None,
                timeout=_INNER_WAIT_MS / 1000,
                cached_statements=cached,
            )

        driver = _Connection(connect, self._is_replaced)
        driver.frozen = frozen
        try:
            await driver
            await self._prepare(driver)
            driver.place = self._place()
        except sqlite3.Error as exc:
            # Before the close: what was short is short no more afterwards.
            error = self.translate(exc, doing=f"open {self._path}", writes=False)
            await driver.close()
            raise error from exc
        except BaseException:
            await driver.close()
            raise
        return driver

    async def _prepare(self, driver: _Connection) -> None:
        for name, (arguments, function) in _FUNCTIONS.items():
            await driver.create_function(name, arguments, function, deterministic=True)
        enforced = "ON" if self._config.enforce_references else "OFF"
        await self.rows(driver, f"PRAGMA synchronous = {self._config.synchronous}", ())
        await self.rows(driver, f"PRAGMA foreign_keys = {enforced}", ())
        await self.rows(driver, _LOOK, ())

    async def prepare_writing(self, driver: _Connection) -> None:
        [[mode]] = await self.rows(driver, "PRAGMA journal_mode", ())
        if mode != "wal":
            await self.rows(driver, "PRAGMA journal_mode = WAL", ())
            await self.rows(driver, _LOOK, ())
            for each in list(self._drivers):
                each.place = self._place()  # where all of them find the log from now on

    # -- the file ----------------------------------------------------------------------------

    def exists(self) -> bool:
        # A file that was there and is not any more is no absent store.
        return self._file is not None or self._identity() is not None

    def make_place(self) -> None:
        # Nobody else may read what is stored; SQLite gives its other files the same mode.
        if self._file is not None or self._identity() is not None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        except OSError as exc:
            raise translate_os_error(exc, f"create {self._path}") from exc

    def check_place(self, driver: _Connection) -> None:
        place = driver.place
        if place is None:
            return
        now = self._identity()
        if now != place.file:
            self._check_file(now)
        for path, before in place.others:
            if before is not None and before != self._identity_of(path):
                raise DataFileConflictError(
                    f"{path} was removed or replaced while the store was in use: end every "
                    "program that has the store open, and open it again"
                )

    def _is_replaced(self, driver: _Connection) -> bool:
        """Whether other files have taken the names of what a connection has open."""
        place = driver.place
        if place is None:
            return False
        try:
            taken = [self._identity_of(path) for path, _ in place.others]
            return self._identity() != place.file or any(
                before is not None and now not in (before, None)
                for (_, before), now in zip(place.others, taken, strict=True)
            )
        except StorageError:
            return True

    def _check_names(self) -> None:
        """SQLite names its log after the file, so that two names of one file have two logs."""
        try:
            names = self._path.stat().st_nlink
        except OSError as exc:
            raise translate_os_error(exc, f"open {self._path}") from exc
        if names > 1:
            raise ConfigurationError(
                f"name: {self._path} has {names} names (hard links), and SQLite would keep a log "
                "for each, which damages the file: remove the others, or use symbolic links"
            )

    def _check_file(self, now: _Identity | None) -> None:
        if self._file is None or now == self._file:
            return
        what = "removed, or its folder renamed," if now is None else "replaced"
        raise DataFileConflictError(
            f"{self._path} was {what} while the store was in use: nothing is read from it or "
            "written to it any more. Put it back, or close this store and open it again"
        )

    def _place(self) -> _CursorPayload | None:
        file = self._identity()
        return None if file is None else _CursorPayload(file, self._others())

    def _identity(self) -> _Identity | None:
        """Of the file that the path names now; never by opening it, which would end its locks."""
        return self._identity_of(self._path)

    def _others(self) -> tuple[tuple[Path, _Identity | None], ...]:
        path = self._path.resolve()
        paths = [path.with_name(f"{path.name}{each}") for each in _OTHERS]
        return tuple((each, self._identity_of(each)) for each in paths)

    def _identity_of(self, path: Path) -> _Identity | None:
        try:
            found = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as exc:
            raise translate_os_error(exc, f"look at {path}") from exc
        return found.st_dev, found.st_ino

    def _frozen(self) -> os.stat_result | None:
        """What a file looks like that nobody can have open to write.

        SQLite needs files of its own beside it, even to read. Where they cannot be made, and a
        writer has not made them, it must be told that the file does not change; whether that stays
        true is looked at with every connection that is taken from the pool.
        """
        path = self._path.resolve()
        there = any(identity for _, identity in self._others())
        if there or os.access(path.parent, os.W_OK):
            return None
        try:
            return path.stat()
        except OSError as exc:
            raise translate_os_error(exc, f"open {self._path}") from exc

    def is_lost(self, driver: _Connection) -> bool:
        if driver.frozen is not None and not driver.lost:
            now = self._frozen()
            driver.lost = now is None or _changes(now) != _changes(driver.frozen)
        return driver.lost

    async def is_same_store(self, mine: _Connection, theirs: _Connection) -> bool:
        return (
            mine.place is not None
            and theirs.place is not None
            and (mine.place.file == theirs.place.file)
        )

    async def rows(
        self, driver: aiosqlite.Connection, sql: str, args: Sequence[object]
    ) -> Sequence[Sequence[Any]]:
        deadline = time.monotonic() + self._config.timeout
        while True:
            try:
                rows = await driver.execute_fetchall(sql, args)
                self._check_frozen(driver)
                return cast("Sequence[Sequence[Any]]", rows)
            except sqlite3.OperationalError as exc:
                if _is_undecodable(exc) and driver.text_factory is str:
                    # Read once more, so that it can be told which row holds it.
                    driver.text_factory = _text_or_bytes
                    continue
                code = getattr(exc, "sqlite_errorcode", 0)
                if (code & 0xFF) not in _BUSY or time.monotonic() > deadline:
                    raise
            # Nothing of the statement happened; another process has the lock.
            await asyncio.sleep(0)

    async def bulk_upsert_locked(
        self, driver: aiosqlite.Connection, puts: BulkUpsert
    ) -> dict[str, int] | None:
        # In one turn of the driver's thread, for which it has no public way.
        found = await driver._execute(_bulk_upsert_locked, driver._conn, puts)  # type: ignore[no-untyped-call]  # as it is
        return cast("dict[str, int] | None", found)

    async def fetch_dicts(
        self, driver: aiosqlite.Connection, sql: str, args: Sequence[object]
    ) -> list[dict[str, Value]]:
        async with driver.execute(sql, args) as cursor:
            rows = await cursor.fetchall()
            names = [each[0] for each in cursor.description or ()]
        return [dict(zip(names, row, strict=True)) for row in rows]

    async def fetch_batches(
        self, driver: aiosqlite.Connection, sql: str, args: Sequence[object], *, written: bool
    ) -> AsyncGenerator[Sequence[Sequence[Any]], None]:
        if written:
            # What is written meanwhile must not show, and SQLite does not promise that.
            yield await self.rows(driver, sql, args)
            return
        async with driver.execute(sql, args) as cursor:
            size = _CHUNK_SIZE
            while rows := await self._piece(driver, cursor, size):
                self._check_frozen(driver)
                yield rows
                size = min(max(_PIECE_BYTES // _heaviest(rows), 1), _MOST_ROWS)

    async def _piece(
        self, driver: aiosqlite.Connection, cursor: aiosqlite.Cursor, size: int
    ) -> Sequence[Sequence[Any]]:
        try:
            return cast("Sequence[Sequence[Any]]", await cursor.fetchmany(size))
        except sqlite3.OperationalError as exc:
            if not _is_undecodable(exc):
                raise
            raise ProtocolError(f"{self._path} holds a text that is not UTF-8") from exc

    def _check_frozen(self, driver: aiosqlite.Connection) -> None:
        if isinstance(driver, _Connection) and driver.frozen is not None and self.is_lost(driver):
            raise UnavailableError(f"{self._path} was changed by another program during the read")

    async def begin(self, driver: aiosqlite.Connection, isolation: Isolation | None) -> Any:
        if driver.in_transaction:
            name = f"s{time.monotonic_ns()}"
            await self.rows(driver, f"SAVEPOINT {name}", ())
            return driver, name
        # Not deferred: what was read would have to be read again once another has written.
        await self.rows(driver, "BEGIN IMMEDIATE", ())
        return driver, None

    async def begin_reading(
        self, driver: aiosqlite.Connection, statements: Literal["one", "many"]
    ) -> Any:
        if statements == "one":
            return None
        await self.rows(driver, "BEGIN", ())
        return driver, None

    async def commit(self, handle: Any) -> None:
        driver, savepoint = handle
        await self.rows(driver, "COMMIT" if savepoint is None else f"RELEASE {savepoint}", ())

    async def roll_back(self, handle: Any) -> None:
        driver, savepoint = handle
        if savepoint is not None:
            await self.rows(driver, f"ROLLBACK TO {savepoint}", ())
            await self.rows(driver, f"RELEASE {savepoint}", ())
        elif driver.in_transaction:
            await self.rows(driver, "ROLLBACK", ())

    def in_transaction(self, driver: aiosqlite.Connection) -> bool:
        return driver.in_transaction

    async def make_reusable(self, driver: aiosqlite.Connection) -> bool:
        await driver.execute_fetchall("SELECT 1")  # behind whatever was cancelled
        if driver.in_transaction:
            await driver.execute_fetchall("ROLLBACK")
        return True

    async def discard(self, driver: _Connection) -> None:
        # Behind what its thread still does; the pool would only tell the thread to stop.
        await driver.close()

    def translate(
        self, exc: Exception, *, doing: str, writes: bool, callers: bool = False
    ) -> StorageError:
        if getattr(exc, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_CANTOPEN:
            reason = self._reason(doing)
            if reason is not None:
                return reason
        return sqlite_error(exc, doing=doing, path=self._path, writes=writes, callers=callers)

    def _reason(self, doing: str) -> StorageError | None:
        """Why a file cannot be opened, which SQLite does not say."""
        folder = self._path.parent
        try:
            os.close(os.open(folder, os.O_RDONLY))  # a folder has no locks to lose
            self._path.stat()
        except OSError as exc:
            return translate_os_error(exc, doing)
        if not os.access(self._path, os.R_OK):
            return PermissionDeniedError(f"cannot {doing}: {self._path} cannot be read")
        if os.statvfs(folder).f_flag & os.ST_RDONLY:
            return ReadOnlyStoreError(f"cannot {doing}: the file system of {folder} is read-only")
        if not os.access(folder, os.W_OK):
            return PermissionDeniedError(
                f"cannot {doing}: SQLite needs to make files in {folder} while others write"
            )
        return None

    # -- the schema --------------------------------------------------------------------------

    def column_type(self, kind: FieldType | Kind) -> TypeEngine[Any]:
        if kind in ("integer", "bigint"):
            return BigInteger()
        if kind == "boolean":
            return Boolean(create_constraint=False)
        return _Untyped() if kind == "number" else Text()

    def index_part(self, column: Any, field: Field) -> Any:
        return column

    async def found_tables(self, driver: aiosqlite.Connection) -> list[str]:
        rows = await self.rows(
            driver, "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY 1", ()
        )
        return [name for [name] in rows]

    async def reflect_columns(
        self, driver: aiosqlite.Connection, tables: Sequence[str]
    ) -> dict[str, dict[str, str]]:
        rows = await self.rows(
            driver,
            'SELECT m.name, p.name, p.type, p.pk, p."notnull" AND p.dflt_value IS NULL '
            "FROM sqlite_master AS m, pragma_table_info(m.name) AS p WHERE m.type = 'table'",
            (),
        )
        found: dict[str, dict[str, str]] = {}
        for table, column, kind, key, needed in rows:
            if table in tables:
                notes = " PRIMARY KEY" if key else " NOT NULL" if needed else ""
                found.setdefault(table, {})[column] = f"{kind.upper()}{notes}"
        return found

    async def reflect_indexes(
        self, driver: aiosqlite.Connection, tables: Sequence[str]
    ) -> dict[str, str]:
        rows = await self.rows(
            driver, "SELECT name, sql FROM sqlite_master WHERE type = 'index'", ()
        )
        return {name: sql or "" for name, sql in rows}

    def same_type(self, found: str, kind: FieldType | Kind) -> bool:
        wanted = {"integer": "BIGINT", "bigint": "BIGINT", "boolean": "BOOLEAN", "number": "BLOB"}
        return found.split(" ")[0] == wanted.get(kind, "TEXT")

    async def begin_ddl(self, driver: aiosqlite.Connection) -> Any:
        return await self.begin(driver, None)

    def extra_ddl(self, schema: Schema, metadata: MetaData, found: Mapping[str, str]) -> list[str]:
        return []

    # -- grammar: writes ---------------------------------------------------------------------

    def batches(self, rows: int) -> list[int]:
        # As parameters they are twice as fast as out of JSON; but each number of rows is a text of
        # its own, so there is one only.
        rest = rows % _BLOCK
        return [_BLOCK] * (rows // _BLOCK) + ([rest] if rest else [])

    def statement_variant(self, rows: int) -> int:
        return rows if rows in (1, _BLOCK) else 0

    def values_source(self, kinds: Sequence[Kind], rows: int) -> str:
        if _as_parameters(kinds, rows):
            return self.bulk.values(len(kinds), rows)
        parts = [f"{_member(n, kind)} AS c{n}" for n, kind in enumerate(kinds)]
        return f"(SELECT {', '.join(parts)} FROM json_each(?1)) AS i"

    def bind_columns(
        self, columns: Sequence[Sequence[object]], kinds: Sequence[Kind]
    ) -> Sequence[object]:
        if len(columns[0]) == 1:
            return [each[0] for each in columns]
        if _as_parameters(kinds, len(columns[0])):
            return list(itertools.chain.from_iterable(zip(*columns, strict=True)))
        texts = [
            list(map(_float_as_text, each)) if kind == "number" else each
            for each, kind in zip(columns, kinds, strict=True)
        ]
        return (encode_json(list(zip(*texts, strict=True))).decode(),)

    def cast_input(self, column: str, kind: Kind) -> str:
        return column

    def json_merge(self, column: str, sets: str, removes: str) -> str:
        return f"hf_merged({column}, {sets}, {removes})"

    def size(self, column: str) -> str:
        return f"length(CAST({column} AS BLOB))"

    def deletion(self, table: str, key: str, rows: int, *, versions: bool) -> str:
        kinds = ["text", "bigint"] if versions else ["text"]
        source = self.values_source(kinds, rows)
        if versions:
            return (
                f"DELETE FROM {table} AS t "
                f"WHERE (t.{key}, t.version) IN (SELECT i.c0, i.c1 FROM {source})"
            )
        return f"DELETE FROM {table} AS t WHERE t.{key} IN (SELECT i.c0 FROM {source})"

    # -- grammar: reads ----------------------------------------------------------------------

    def read(self, column: str, kind: Kind) -> str:
        return column

    def parameter(self, number: int, kind: Kind) -> str:
        return f"?{number}"

    def argument(self, value: Any, kind: Kind) -> object:
        return encode_json(value).decode() if kind == "list" else value

    def one_of(self, expression: str, values: Sequence[Any], kind: Kind, args: Arguments) -> str:
        value = "value"
        if kind == "number":
            # As texts: its JSON would read floats to within the last bit.
            values = list(map(_float_as_text, values))
            value = "CASE type WHEN 'text' THEN hf_real(value) ELSE value END"
        return f"{expression} IN (SELECT {value} FROM json_each({args.add(list(values), 'list')}))"

    def one_of_ids(self, expression: str) -> str:
        return f"{expression} IN (SELECT value FROM json_each(?1))"

    def index_prefix(self, expression: str) -> str | None:
        return None

    def has_overflow(self, name: str) -> str:
        return f"(json_type(t.{SIDE}, '$.{name}') IS NOT NULL)"

    def has_text(self, expression: str, part: str) -> str:
        return f"instr({expression}, {part}) > 0"

    def ordered(self, part: SortPart, *, descending: bool) -> str:
        way = " DESC" if descending else ""
        null = f", {part.null}{way}" if part.null is not None else ""
        return f"{part.sql}{way}{null}"

    def json_test(
        self, base: str, steps: Sequence[str | int], op: str, value: Value, args: Arguments
    ) -> tuple[str, bool]:
        if op == "in" and not value:
            return "FALSE", True
        place = _place(base, steps, args)
        if op == "exists":
            return f"{place} IS {'NOT ' if value else ''}NULL", True
        if op in ("eq", "in"):
            values = [value] if op == "eq" else cast("list[Value]", value)
            if not any(isinstance(each, list | dict) for each in values):
                texts = [text for each in values for text in _json_texts(each)]
                return self.one_of(place, texts, "text", args), True
        if op in ("lt", "lte", "gt", "gte") and isinstance(value, str):
            sign = {"lt": "<", "lte": "<=", "gt": ">", "gte": ">="}[op]
            bound = args.add(value, "text")
            return f"(substr({place}, 1, 1) = '\"' AND {place} ->> '$' {sign} {bound})", True
        operand = args.add(encode_json(value).decode(), "text")
        return f"hf_test({place}, '{op}', {operand})", True

    def json_order(self, base: str, steps: Sequence[str | int], args: Arguments) -> SortPart | None:
        return SortPart(f"hf_key({_place(base, steps, args)})", nullable=True)

    def order_argument(self, value: Value) -> object:
        return functions.order_bytes(value)

    # -- the rest ----------------------------------------------------------------------------

    async def explain(
        self,
        driver: aiosqlite.Connection,
        sql: str,
        args: Sequence[object],
        indexes: Mapping[str, Index],
        comparisons: int,
    ) -> QueryPlan:
        lines = [row[3] for row in await self.rows(driver, f"EXPLAIN QUERY PLAN {sql}", args)]
        # The table itself is "t" here; what else is read are lists of arguments.
        own = next(each for each in lines if re.match(r"(SEARCH|SCAN) t\b", each))
        used = re.search(r"USING (?:COVERING )?INDEX (\S+)(?: \((.*)\))?", own)
        index = indexes.get(used[1]) if used is not None else None
        found = own.startswith("SEARCH")
        terms = used[2].count(" AND ") + 1 if used is not None and used[2] else 0
        return QueryPlan(
            access="scan" if not found else "index" if index is not None else "key",
            index=index.name if found and index is not None else None,
            residual=comparisons > terms if found else comparisons > 0,
            sorted_here=any("TEMP B-TREE FOR" in each for each in lines),
            detail="; ".join(lines),
        )

    @asynccontextmanager
    async def scratch(self, driver: Any) -> AsyncIterator[_Connection]:
        def connect() -> sqlite3.Connection:
            return sqlite3.connect(":memory:", isolation_level=None)

        scratch = _Connection(connect, lambda _: False)
        try:
            await scratch
            await self._prepare(scratch)
            yield scratch
        finally:
            await run_to_completion(scratch.close())

    async def health(self, driver: aiosqlite.Connection, tables: Sequence[str]) -> dict[str, Value]:
        problems: list[Value] = []
        for [line] in await self.rows(driver, "PRAGMA quick_check(5)", ()):
            if line != "ok":
                problems.append(f"{self._path}: {line}")
        if not os.access(self._path, os.W_OK):
            problems.append(f"{self._path} cannot be written")
        room = os.statvfs(self._path.parent)
        return {
            "path": str(self._path),
            "mode": oct(self._path.stat().st_mode & 0o777),
            "database_bytes": _size(self._path),
            "wal_bytes": _size(Path(f"{self._path}-wal")),
            "free_bytes": room.f_bavail * room.f_frsize,
            "problems": problems,
        }

    def describe(self) -> dict[str, Value]:
        return {"path": str(self._path), "sqlite": sqlite3.sqlite_version}

    def strip_for_update(self, sql: str) -> str:
        # The transaction that it runs in begins by taking the write lock.
        return _FOR_UPDATE.sub("", sql)


def _is_undecodable(exc: sqlite3.OperationalError) -> bool:
    # It comes from Python's module and not from SQLite, so it has no code.
    return getattr(exc, "sqlite_errorcode", None) is None


def _text_or_bytes(text: bytes) -> str | bytes:
    try:
        return text.decode()
    except UnicodeDecodeError:
        return text


def _changes(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _bulk_upsert_locked(connection: sqlite3.Connection, puts: BulkUpsert) -> dict[str, int] | None:
    """`Dialect.bulk_upsert_locked`, in the driver's thread."""
    for sql, parents in puts.parents:
        [[there]] = connection.execute(sql, (encode_json(parents).decode(),))
        if there < len(parents):
            return None
    rows = list(zip(*puts.columns, strict=True))
    blocks = _blocks(len(rows), len(puts.columns))
    versions: dict[str, int] = {}
    if puts.versions is not None and not (puts.fresh and blocks == [len(rows)]):
        ids = (encode_json(puts.columns[0]).decode(),)
        versions.update(connection.execute(puts.versions, ids).fetchall())
        if versions and (puts.fresh or max(versions.values()) == INT_MAX):
            return None
    start = 0
    for size in blocks:
        args = list(itertools.chain.from_iterable(rows[start : start + size]))
        start += size
        try:
            connection.execute(puts.text(size), args)
        except sqlite3.IntegrityError:
            if puts.fresh and size == len(rows):
                return None  # it was its own look: nothing of it stays
            raise
    if start < len(rows):
        connection.executemany(puts.text(1), rows[start:])
    return versions


def _blocks(rows: int, columns: int) -> list[int]:
    """How many rows go into statements of their own; the rest is done by one for a row."""
    blocks: list[int] = []
    for size in _IN_BULK:
        if size * columns <= _MOST_PARAMETERS:
            blocks += [size] * ((rows - sum(blocks)) // size)
    return blocks


def _heaviest(rows: Sequence[Sequence[Any]]) -> int:
    """About the bytes of the heaviest of some rows: of a few of them, for all are much alike."""
    few = rows[:: 1 + len(rows) // _FEW]
    return max(1, *(sum(len(each) for each in row if type(each) is str) for row in few))


def _as_parameters(kinds: Sequence[Kind], rows: int) -> bool:
    return rows == 1 or (rows == _BLOCK and rows * len(kinds) <= _MOST_PARAMETERS)


def _member(number: int, kind: Kind) -> str:
    """A member of a row of arguments that came as JSON."""
    member = f"value ->> '$[{number}]'"
    if kind != "number":
        return member
    return (
        f"CASE json_type(value, '$[{number}]') WHEN 'text' THEN hf_real({member}) ELSE {member} END"
    )


def _float_as_text(value: object) -> object:
    return repr(value) if isinstance(value, float) else value


def _place(base: str, steps: Sequence[str | int], args: Arguments) -> str:
    """The JSON text at a place below a column, NULL where there is none."""
    if not steps:
        return base
    if all(isinstance(each, int) or _MEMBER.match(each) for each in steps):
        path = "".join(f"[{each}]" if isinstance(each, int) else f'."{each}"' for each in steps)
        return f"({base} -> {args.add(f'${path}', 'text')})"
    return f"hf_at({base}, {args.add(encode_json(list(steps)).decode(), 'text')})"


def _json_texts(value: Value) -> list[str]:
    """The ways in which a stored JSON text may write a value that equals this one."""
    texts = [encode_json(value).decode()]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return texts
    if isinstance(value, float) and value.is_integer():
        texts.append(str(int(value)))
    elif isinstance(value, int) and int(float(value)) == value:
        texts.append(encode_json(float(value)).decode())
    return [*texts, "0.0", "-0.0"] if value == 0 else texts
