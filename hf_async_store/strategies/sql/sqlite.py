"""The dialect of SQLite: a store in a file, with one writer at a time, and JSON stored as text."""

from __future__ import annotations

import asyncio
import atexit
import os
import re
import sqlite3
import threading
import time
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from stat import S_ISDIR
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NamedTuple, TypeAlias, cast
from urllib.parse import quote

import aiosqlite

from hf_async_store.config import SQLConfig
from hf_async_store.disk_space import free_bytes, too_little
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
from hf_async_store.logs import hide_debug_messages
from hf_async_store.os_errors import translate_os_error
from hf_async_store.strategies.sql.dialect import Dialect, Relation, Result
from hf_async_store.strategies.sql.errors import sqlite_error
from hf_async_store.strategies.sql.names import Names, quoted
from hf_async_store.strategies.sql.sqlite_functions import (
    CHANGED_DOCUMENT,
    FUNCTIONS,
    NANOSECONDS,
    RowFunction,
    nanoseconds,
)
from hf_async_store.strategies.sql.sqlite_grammar import SQLiteGrammar
from hf_async_store.values import Value

if TYPE_CHECKING:
    from hf_async_store.schema import Index

_MIN_VERSION: Final = (3, 38, 0)  # has RETURNING and the operators -> and ->>
_CHUNK_SIZE: Final = 256
_CHUNK_BYTES: Final = 1 << 18
_MAX_CHUNK_SIZE: Final = 1024
"""The maximum number of rows that the thread of a connection fetches at a time; large rows are fetched
in smaller chunks, of about `_CHUNK_BYTES`."""

_SAMPLE_SIZE: Final = 16
_WAL_SUFFIXES: Final = ("-wal", "-shm")
_CHECKPOINT_BYTES: Final = 1 << 22
"""The size of the log at which SQLite copies its pages into the database, which may grow by as much."""

_BUSY_TIMEOUT_MS: Final = 20
"""How long SQLite itself waits for a lock. Then the store tries again, so that a cancellation can take
effect in between."""

_CACHE_KIB: Final = 16_000
"""The maximum size of the page cache of a connection. With the 2 MB of SQLite, writing 1,000 of 100,000
entities reads most pages of their indexes anew from the file."""

_STREAM_CACHE_KIB: Final = 2_000
"""The same for a connection that reads a whole store: it reads most pages once."""

_WAL_BYTES: Final = 64_000_000
"""A write-ahead log that became larger, because a reader needed what it contains, is cut to this size when
it is written from its beginning again. Otherwise it stays large until the last process closes it."""

_FIRST_READ: Final = "SELECT count(*) FROM sqlite_master"
"""SQLite opens its files only when a connection reads for the first time."""

_OPEN_ATTEMPTS: Final = 8
"""How often opening is tried if the file is replaced at the same time."""

_EXIT_SECONDS: Final = 5.0
"""How long the exit of the process waits for the connections of stores that were not closed."""

_BUSY: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_FOR_UPDATE: Final = re.compile(r"(?is)\s+for\s+update\s*;?\s*\Z")


_Identity: TypeAlias = "tuple[int, int]"
"""The device and inode of a file."""


class _OpenFiles(NamedTuple):
    """The files that a connection has open, to detect that a path leads to another file later.

    Attributes:
        database: the database file.
        wal: the write-ahead log and its index, by path; None for a file that does not exist (yet).
    """

    database: _Identity
    wal: tuple[tuple[str, _Identity | None], ...]


_Job: TypeAlias = "tuple[asyncio.Future[Any] | None, Callable[[], Any]]"


_MAX_TRACKED: Final = 100
"""With more references to cursors than this, those to cursors that are freed are removed."""


class _ClosingConnection(sqlite3.Connection):
    """A connection that closes its cursors when it is closed.

    SQLite keeps a file open, with its locks, until the last statement is finalized, and a cursor may
    still be referenced: by the traceback of a task that was cancelled, for example.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Not a WeakSet, which would make each statement 3 microseconds slower.
        self._cursors: list[weakref.ref[sqlite3.Cursor]] = []
        self.changed_document = RowFunction()
        self.create_function(CHANGED_DOCUMENT, 3, self.changed_document)

    def cursor(self, factory: Any = sqlite3.Cursor) -> Any:
        """See `sqlite3.Connection.cursor`. Of the references that the connection itself has to all of its
        cursors, it removes those to freed ones only here, and not when a `Cursor` is made directly."""
        cursor = super().cursor(factory)
        self._cursors.append(weakref.ref(cursor))
        if len(self._cursors) > _MAX_TRACKED:
            self._cursors = [each for each in self._cursors if each() is not None]
        return cursor

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        """See `sqlite3.Connection.execute`, which does not call `cursor`."""
        cursor: sqlite3.Cursor = self.cursor()
        return cursor.execute(sql, parameters)

    def executemany(self, sql: str, parameters: Any, /) -> sqlite3.Cursor:
        """See `sqlite3.Connection.executemany`."""
        cursor: sqlite3.Cursor = self.cursor()
        return cursor.executemany(sql, parameters)

    def close(self) -> None:
        """See `sqlite3.Connection.close`."""
        for each in self._cursors:
            cursor = each()
            if cursor is not None:
                with suppress(sqlite3.Error):  # an error of its statement was raised before
                    cursor.close()
        super().close()


class _Connection(aiosqlite.Connection):
    """A connection whose thread does not keep the process alive, and works after the loop was closed.

    Args:
        replaced: returns whether a file of this connection was replaced.

    Attributes:
        files: the files that it has open; None until they are known.
        immutable: for a database that was opened with `immutable=1`: the status of the file then.
        lost: it must not be used again.
    """

    def __init__(
        self,
        connector: Callable[[], sqlite3.Connection],
        replaced: Callable[[_Connection], bool],
    ) -> None:
        super().__init__(connector, iter_chunk_size=64)
        self._replaced = replaced
        self.files: _OpenFiles | None = None
        self.immutable: os.stat_result | None = None
        self.lost = False
        jobs = cast("Any", self)._tx
        self._thread = threading.Thread(target=_run_jobs, args=(jobs,), daemon=True, name="sqlite")
        _OPEN_CONNECTIONS.add(self)

    @property
    def is_open(self) -> bool:
        return self._running and self._connection is not None

    def run(
        self, work: Callable[[sqlite3.Connection], Result], *, completes: bool = False
    ) -> asyncio.Future[Result]:
        """Call a function with the connection in its thread; without the wrappers of aiosqlite, which take
        as long as a small statement.

        Args:
            completes: see `Dialect.job`.
        """
        connection = self._connection
        if connection is None or not self._running:
            raise ValueError("the connection was closed")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result]
        future = _UninterruptedFuture(loop=loop) if completes else loop.create_future()
        cast("Any", self)._tx.put_nowait((future, partial(work, connection)))
        return future

    def stop(self) -> asyncio.Future[Any] | None:
        """See `aiosqlite.Connection.stop`."""
        self._running = False
        connection, self._connection = self._connection, None
        future: asyncio.Future[Any] | None = None
        with suppress(RuntimeError):
            future = asyncio.get_running_loop().create_future()

        def stop() -> object:
            if connection is not None:
                with suppress(sqlite3.Error):  # the connection is not used again
                    connection.close()
            return _STOP

        if connection is not None and self._replaced(self):
            self._leave_open(connection)
            return None
        cast("Any", self)._tx.put_nowait((future, stop))
        return future

    async def close(self) -> None:
        """Close after the jobs that its thread has not completed yet."""
        if self._running:
            stopped = self.stop()
            if stopped is not None:
                await stopped

    def _leave_open(self, connection: sqlite3.Connection) -> None:
        """Keep the connection open until the process ends.

        When SQLite closes the last connection of a file, it deletes the write-ahead log by its path.
        If another database has replaced the file, its log is at this path, and may be in use.
        """

        def wait() -> None:
            if connection.in_transaction:
                with suppress(sqlite3.Error):
                    connection.rollback()
            threading.Event().wait()

        cast("Any", self)._tx.put_nowait((None, wait))


class _UninterruptedFuture(asyncio.Future[Result]):
    """A future that cannot be cancelled: a task that awaits it raises the cancellation when it is done.

    A task that is cancelled cancels the future that it awaits. If that refuses, the task raises the
    cancellation when it continues. A shield would take two more iterations of the event loop.
    """

    def cancel(self, msg: object = None) -> bool:
        """See `asyncio.Future.cancel`."""
        del msg
        return False


_STOP: Final = object()
"""The result of the job that ends the thread of a connection."""


def _run_jobs(jobs: Any) -> None:
    """Run the jobs of a connection in its thread.

    In contrast to the function of aiosqlite, it works after the event loop was closed.
    """
    while True:
        future, work = cast("_Job", jobs.get())
        try:
            result = work()
        except BaseException as exc:  # noqa: BLE001  # the waiting task gets it
            _resolve(future, asyncio.Future.set_exception, exc)
        else:
            _resolve(future, asyncio.Future.set_result, result)
            if result is _STOP:
                return
            del result
        del future, work


def _resolve(
    future: asyncio.Future[Any] | None,
    setter: Callable[[asyncio.Future[Any], Any], None],
    value: object,
) -> None:
    if future is None:
        return

    def resolve() -> None:
        if not future.done():
            setter(future, value)

    with suppress(RuntimeError):  # the loop was closed, so no task waits
        future.get_loop().call_soon_threadsafe(resolve)


_OPEN_CONNECTIONS: Final[weakref.WeakSet[_Connection]] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Close the connections that are still open; waits for at most `_EXIT_SECONDS`."""
    deadline = time.monotonic() + _EXIT_SECONDS
    threads = []
    for each in list(_OPEN_CONNECTIONS):
        if each._connection is not None:
            threads.append(each._thread)
            each.stop()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


class SQLite(Dialect):
    """The dialect of one database file.

    Raises:
        ConfigurationError: `name` is not the path of a file, or SQLite is too old.
    """

    driver_errors: ClassVar[tuple[type[Exception], ...]] = (sqlite3.Error, OSError, ValueError)
    caller_errors = (sqlite3.Warning, TypeError, OverflowError)
    url = "sqlite+aiosqlite://"
    placeholder_prefix = "?"
    single_writer = True
    separate_read_pool = False
    reads_alone = True
    needs_transactions = False
    grammar = SQLiteGrammar()

    def __init__(self, config: SQLConfig) -> None:
        if config.name in ("", ":memory:"):
            raise ConfigurationError(
                "name: SQLite needs the path of a file (a store in memory is `memory:`)"
            )
        if sqlite3.sqlite_version_info < _MIN_VERSION:
            raise ConfigurationError(
                f"SQLite {'.'.join(map(str, _MIN_VERSION))} or newer is needed, but this Python uses "
                f"SQLite {sqlite3.sqlite_version}"
            )
        hide_debug_messages("aiosqlite")
        self._config = config
        # SQLite does not distinguish the case of ASCII letters, and only of these, in names.
        self.names = Names(config.table_prefix.encode().lower().decode())
        # Symbolic links are not resolved here: SQLite follows them itself, and creates its other files next
        # to the target.
        self._path = Path(config.name).absolute()
        self._location = str(self._path)
        self._file: _Identity | None = None  # set when the file is first opened
        self._drivers: weakref.WeakSet[_Connection] = weakref.WeakSet()
        self.capabilities = Capabilities(
            engine="sqlite",
            durable=True,
            multi_process=True,
            claims=True,
            change_markers=True,
            unique_indexes=True,
            feed=True,
            feed_order=True,
            references=True,
            read_batch=1024,
            read_concurrency=2,
        )

    # -- the driver --------------------------------------------------------------------------

    async def connect(
        self, isolation: Isolation | None = None, *, streams: bool = False
    ) -> _Connection:
        # The task may be cancelled while the thread of the driver opens the connection; the driver
        # would then lose the connection, and never close it.
        opening = asyncio.ensure_future(self._open(_STREAM_CACHE_KIB if streams else _CACHE_KIB))
        try:
            return await run_to_completion(opening)
        except asyncio.CancelledError:
            if opening.exception() is None:
                await run_to_completion(opening.result().close())
            raise

    async def _open(self, cache_kib: int) -> _Connection:
        for _ in range(_OPEN_ATTEMPTS):
            before = self._identity()
            if self._file is None and before is None:
                raise StoreNotFoundError(f"there is no file {self._path}")
            self._check_identity(before)
            self._check_path()
            for each in list(self._drivers):
                if each.is_open:
                    self.check_file(each)  # else SQLite would create missing files again
            driver = await self._open_once(cache_kib)
            if driver.files is not None and driver.files.database == before:
                self._file = before
                self._drivers.add(driver)
                return driver
            await driver.close()
        raise UnavailableError(
            f"cannot open {self._path}: it was replaced during each of {_OPEN_ATTEMPTS} attempts"
        )

    async def _open_once(self, cache_kib: int) -> _Connection:
        immutable = self._immutable_status()
        mode = "mode=ro&immutable=1" if immutable is not None else "mode=rw"
        name = f"file:{quote(str(self._path))}?{mode}"
        statements = 256 if self._config.enable_query_cache else 0

        def connect() -> sqlite3.Connection:
            connection = sqlite3.connect(
                name,
                uri=True,
                isolation_level=None,
                timeout=_BUSY_TIMEOUT_MS / 1000,
                cached_statements=statements,
                factory=_ClosingConnection,
            )
            connection.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
            return connection

        driver = _Connection(connect, self._is_replaced)
        driver.immutable = immutable
        try:
            await driver
            await self._prepare(driver, cache_kib)
            driver.files = self._current_files()
        except sqlite3.Error as exc:
            # Translate before closing, which frees resources and so can hide the cause.
            error = self.translate(exc, doing=f"open {self._path}", writes=False)
            await driver.close()
            raise error from exc
        except BaseException:
            await driver.close()
            raise
        return driver

    async def _prepare(self, driver: _Connection, cache_kib: int = _CACHE_KIB) -> None:
        for name, (arguments, function) in FUNCTIONS.items():
            await driver.create_function(name, arguments, function, deterministic=True)
        await driver.create_function(NANOSECONDS, 0, nanoseconds)
        enforced = "ON" if self._config.enforce_references else "OFF"
        await self.rows(driver, f"PRAGMA synchronous = {self._config.synchronous}", ())
        await self.rows(driver, f"PRAGMA foreign_keys = {enforced}", ())
        await self.rows(driver, f"PRAGMA cache_size = -{cache_kib}", ())
        await self.rows(driver, _FIRST_READ, ())

    async def prepare_writing(self, driver: _Connection) -> None:
        [[mode]] = await self.rows(driver, "PRAGMA journal_mode", ())
        if mode != "wal":
            await self.rows(driver, "PRAGMA journal_mode = WAL", ())
            await self.rows(driver, _FIRST_READ, ())
            for each in list(self._drivers):
                each.files = self._current_files()  # the log exists from now on

    # -- the file ----------------------------------------------------------------------------

    def exists(self) -> bool:
        # A store whose file was deleted after it was opened is not an absent store.
        return self._file is not None or self._identity() is not None

    def create_file(self) -> None:
        # Only the owner may read the data; SQLite creates its other files with the same mode.
        if self._file is not None or self._identity() is not None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        except OSError as exc:
            raise translate_os_error(exc, f"create {self._path}") from exc

    def check_file(self, driver: _Connection) -> None:
        files = driver.files
        if files is None:
            return
        current = self._identity()
        if current != files.database:
            self._check_identity(current)
        for path, before in files.wal:
            if before is not None and before != self._identity_of(path):
                raise DataFileConflictError(
                    f"{path} was removed or replaced while the store was in use: stop every program "
                    "that has the store open, and open it again"
                )

    def _is_replaced(self, driver: _Connection) -> bool:
        """Whether a path of the open files of a connection leads to another file now."""
        files = driver.files
        if files is None:
            return False
        try:
            current = [self._identity_of(path) for path, _ in files.wal]
            return self._identity() != files.database or any(
                before is not None and now not in (before, None)
                for (_, before), now in zip(files.wal, current, strict=True)
            )
        except StorageError:
            return True

    def _check_path(self) -> None:
        """Reject a folder, and a file with several hard links.

        SQLite derives the path of its log from the path of the file, so a file with two names would
        have two logs.

        Raises:
            ConfigurationError.
        """
        try:
            found = self._path.stat()
        except OSError as exc:
            raise translate_os_error(exc, f"open {self._path}") from exc
        if S_ISDIR(found.st_mode):
            raise ConfigurationError(
                f"name: {self._path} is a folder; name a file in it, such as sqlite:{self._path}/store.db"
            )
        if found.st_nlink > 1:
            raise ConfigurationError(
                f"name: {self._path} has {found.st_nlink} names (hard links), and SQLite would keep a log "
                "for each of them, which damages the file: remove the other links, or use symbolic links"
            )

    def _check_identity(self, current: _Identity | None) -> None:
        if self._file is None or current == self._file:
            return
        change = "removed, or its folder renamed," if current is None else "replaced"
        raise DataFileConflictError(
            f"{self._path} was {change} while the store was in use: nothing is read from it or "
            "written to it any more. Restore it, or close this store and open it again"
        )

    def _current_files(self) -> _OpenFiles | None:
        database = self._identity()
        return None if database is None else _OpenFiles(database, self._wal_files())

    def _identity(self) -> _Identity | None:
        """The identity of the file that is now at the path.

        It is not determined by opening the file, because closing it would release the locks.
        """
        return self._identity_of(self._location)

    def _wal_files(self) -> tuple[tuple[str, _Identity | None], ...]:
        path = self._path.resolve()
        paths = [f"{path}{each}" for each in _WAL_SUFFIXES]
        return tuple((each, self._identity_of(each)) for each in paths)

    def _identity_of(self, path: str) -> _Identity | None:
        try:
            status = os.stat(path)  # noqa: PTH116  # a Path takes twice as long, for each statement
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as exc:
            raise translate_os_error(exc, f"read the status of {path}") from exc
        return status.st_dev, status.st_ino

    def _immutable_status(self) -> os.stat_result | None:
        """The status of the file if no process can have it open for writing; else None.

        SQLite needs a log and its index next to the file, even to read. If a writer has not created
        them and this process cannot, the file must be opened with `immutable=1`, which states that
        it does not change. `is_lost` checks whether that is still true.
        """
        path = self._path.resolve()
        has_wal = any(identity for _, identity in self._wal_files())
        if has_wal or os.access(path.parent, os.W_OK):
            return None
        try:
            return path.stat()
        except OSError as exc:
            raise translate_os_error(exc, f"open {self._path}") from exc

    def is_lost(self, driver: _Connection) -> bool:
        if driver.immutable is not None and not driver.lost:
            current = self._immutable_status()
            driver.lost = current is None or _file_state(current) != _file_state(driver.immutable)
        return driver.lost

    async def is_same_store(self, mine: _Connection, theirs: _Connection) -> bool:
        return (
            mine.files is not None
            and theirs.files is not None
            and (mine.files.database == theirs.files.database)
        )

    def rows(
        self, driver: _Connection, sql: str, args: Sequence[object]
    ) -> Coroutine[Any, Any, Sequence[Sequence[Any]]]:
        def fetch(connection: sqlite3.Connection) -> Sequence[Sequence[Any]]:
            return connection.execute(sql, args).fetchall()

        reading = self.job(driver, fetch, completes=False)
        return reading if driver.immutable is None else self._unchanged(driver, reading)

    async def _unchanged(self, driver: _Connection, reading: Awaitable[Result]) -> Result:
        rows = await reading
        self._check_immutable(driver)
        return rows

    async def job(
        self, driver: _Connection, work: Callable[[Any], Result], *, completes: bool = True
    ) -> Result:
        # In the thread, because each of its system calls releases the interpreter lock, for which the event
        # loop would then wait.
        def checked(connection: sqlite3.Connection) -> Result:
            self.check_file(driver)
            return work(connection)

        deadline = time.monotonic() + self._config.timeout
        while True:
            running = driver.run(checked, completes=completes)
            try:
                return await running
            except asyncio.CancelledError:
                if completes and running.done():
                    running.exception()  # marks it as retrieved, so that the event loop does not log it
                raise
            except sqlite3.OperationalError as exc:
                if _is_undecodable(exc) and driver.text_factory is str:
                    # Read the rows again as bytes, so that the damaged row can be found.
                    driver.text_factory = _str_or_bytes
                    continue
                code = getattr(exc, "sqlite_errorcode", 0)
                if (code & 0xFF) not in _BUSY or time.monotonic() > deadline:
                    raise
            # The statement had no effect: another connection holds the lock.
            await asyncio.sleep(0)

    async def fetch_dicts(
        self, driver: _Connection, sql: str, args: Sequence[object]
    ) -> list[dict[str, Value]]:
        self.check_file(driver)
        async with driver.execute(sql, args) as cursor:
            rows = await cursor.fetchall()
            names = [each[0] for each in cursor.description or ()]
        return [dict(zip(names, row, strict=True)) for row in rows]

    async def fetch_batches(
        self, driver: _Connection, sql: str, args: Sequence[object], *, may_write: bool
    ) -> AsyncGenerator[Sequence[Sequence[Any]], None]:
        if may_write:
            # SQLite does not guarantee that an open cursor is unaffected by later writes of its own
            # connection, so all rows are read at once.
            yield await self.rows(driver, sql, args)
            return
        async with driver.execute(sql, args) as cursor:
            size = _CHUNK_SIZE
            while rows := await self._fetch_chunk(driver, cursor, size):
                self._check_immutable(driver)
                yield rows
                size = min(max(_CHUNK_BYTES // _max_row_size(rows), 1), _MAX_CHUNK_SIZE)

    async def _fetch_chunk(
        self, driver: _Connection, cursor: aiosqlite.Cursor, size: int
    ) -> Sequence[Sequence[Any]]:
        try:
            return cast("Sequence[Sequence[Any]]", await cursor.fetchmany(size))
        except sqlite3.OperationalError as exc:
            if not _is_undecodable(exc):
                raise
            raise ProtocolError(f"{self._path} contains a string that is not UTF-8") from exc

    def _check_immutable(self, driver: _Connection) -> None:
        if self.is_lost(driver):
            raise UnavailableError(f"{self._path} was changed by another program during the read")

    async def begin(self, driver: _Connection, isolation: Isolation | None) -> Any:
        if driver.in_transaction:
            name = f"s{time.monotonic_ns()}"
            await self.rows(driver, f"SAVEPOINT {name}", ())
            return driver, name
        # A deferred transaction could not write if another connection wrote after its first read.
        await self.rows(driver, "BEGIN IMMEDIATE", ())
        return driver, None

    async def begin_reading(self, driver: _Connection, statements: Literal["one", "many"]) -> Any:
        if statements == "one":
            return None
        await self.rows(driver, "BEGIN", ())
        return driver, None

    async def commit(self, handle: Any) -> None:
        driver, savepoint = handle
        await self.rows(driver, "COMMIT" if savepoint is None else f"RELEASE {savepoint}", ())

    async def roll_back(self, handle: Any) -> None:
        driver, savepoint = handle

        def work(connection: sqlite3.Connection) -> None:
            if savepoint is not None:
                connection.execute(f"ROLLBACK TO {savepoint}")
                connection.execute(f"RELEASE {savepoint}")
            elif connection.in_transaction:
                connection.execute("ROLLBACK")

        await driver.run(work)  # not as a job, which a file that was replaced refuses

    def in_transaction(self, driver: _Connection) -> bool:
        return driver.in_transaction

    async def make_reusable(self, driver: _Connection) -> bool:
        await driver.execute_fetchall("SELECT 1")  # runs after the cancelled jobs
        if driver.in_transaction:
            await driver.execute_fetchall("ROLLBACK")
        return True

    async def discard(self, driver: _Connection, *, in_use: bool) -> None:
        # Waits for the jobs of its thread; the pool would only request the thread to stop.
        del in_use
        await driver.close()

    def translate(
        self, exc: Exception, *, doing: str, writes: bool, callers: bool = False
    ) -> StorageError:
        code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
        reason = None
        if code == sqlite3.SQLITE_CANTOPEN:
            reason = self._cannot_open_reason(doing)
        elif code == sqlite3.SQLITE_NOTADB:
            reason = self._other_format()
        if reason is not None:
            return reason
        return sqlite_error(exc, doing=doing, path=self._path, writes=writes, callers=callers)

    def _other_format(self) -> StorageError | None:
        """The error for a file that looks like that of another engine."""
        if self._file is not None:
            return None  # it was a database; and closing it here would release the locks of this process
        try:
            with self._path.open("rb") as file:
                start = file.read(64).lstrip()
        except OSError as exc:
            return translate_os_error(exc, f"read {self._path}")
        if not start.startswith(b"{"):
            return None
        return ConfigurationError(
            f"name: {self._path} is no SQLite database; it looks like the file of a JSON store, which is "
            f"opened as json:{self._path}"
        )

    def _cannot_open_reason(self, doing: str) -> StorageError | None:
        """The reason why the file cannot be opened, which SQLite does not report."""
        folder = self._path.parent
        try:
            os.close(os.open(folder, os.O_RDONLY))  # a folder has no locks that this would release
            self._path.stat()
        except OSError as exc:
            return translate_os_error(exc, doing)
        if not os.access(self._path, os.R_OK):
            return PermissionDeniedError(
                f"cannot {doing}: this process may not read it; check the owner and mode of the file"
            )
        if os.statvfs(folder).f_flag & os.ST_RDONLY:
            return ReadOnlyStoreError(f"cannot {doing}: the file system of {folder} is read-only")
        if not os.access(folder, os.W_OK):
            return PermissionDeniedError(
                f"cannot {doing}: SQLite must create files in {folder} while another process writes, and "
                "the folder is not writable"
            )
        return None

    # -- the schema --------------------------------------------------------------------------

    async def relations(self, driver: _Connection) -> dict[str, Relation]:
        rows = await self.rows(
            driver,
            "SELECT CASE type WHEN 'trigger' THEN name || ' ON ' || tbl_name ELSE name END, type, tbl_name "
            "FROM sqlite_master",
            (),
        )
        return {name: Relation(kind, table) for name, kind, table in rows}

    async def view_reads(self, driver: _Connection, view: str, table: str) -> bool:
        rows = await self.rows(driver, "SELECT sql FROM sqlite_master WHERE name = ?", (view,))
        return any(quoted(table) in sql for [sql] in rows)

    async def begin_ddl(self, driver: _Connection) -> Any:
        return await self.begin(driver, None)

    # -- the rest ----------------------------------------------------------------------------

    async def explain(
        self,
        driver: _Connection,
        sql: str,
        args: Sequence[object],
        indexes: Mapping[str, Index],
        paths: int,
    ) -> QueryPlan:
        details = [row[3] for row in await self.rows(driver, f"EXPLAIN QUERY PLAN {sql}", args)]
        # The table has the alias "t"; all other sources are lists of arguments.
        access = next(each for each in details if re.match(r"(SEARCH|SCAN) t\b", each))
        known = "|".join(map(re.escape, indexes))  # a name may contain spaces
        used = re.search(rf"USING (?:COVERING )?INDEX ({known}|\S+)(?: \((.*)\)|\Z)", access)
        index = indexes.get(used[1]) if used is not None else None
        searches = access.startswith("SEARCH")
        terms = used[2] or "" if used is not None else ""
        fields = {term.partition("-key")[0] for term in terms.split(" AND ") if term}
        return QueryPlan(
            access="scan" if not searches else "index" if index is not None else "key",
            index=index.name if searches and index is not None else None,
            residual=paths > len(fields) if searches else paths > 0,
            sorted_here=any("TEMP B-TREE FOR" in each for each in details),
            detail="; ".join(details),
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

    async def health(self, driver: _Connection, tables: Mapping[str, str]) -> dict[str, Value]:
        problems: list[Value] = []
        for [line] in await self.rows(driver, "PRAGMA quick_check(5)", ()):
            if line != "ok":
                problems.append(f"{self._path}: {line}")
        if not os.access(self._path, os.W_OK):
            problems.append(f"{self._path} cannot be written")
        folder, wal_bytes = self._path.parent, _size(Path(f"{self._path}-wal"))
        free = free_bytes(folder)
        problems += too_little(folder, free, max(wal_bytes, _CHECKPOINT_BYTES) + _CHECKPOINT_BYTES)
        return {
            "path": str(self._path),
            "mode": oct(self._path.stat().st_mode & 0o777),
            "database_bytes": _size(self._path),
            "wal_bytes": wal_bytes,
            "free_bytes": free,
            "problems": problems,
        }

    def describe(self) -> dict[str, Value]:
        return {"path": str(self._path), "sqlite": sqlite3.sqlite_version}

    def strip_for_update(self, sql: str) -> str:
        # Its transaction acquires the write lock when it begins.
        return _FOR_UPDATE.sub("", sql)


def _is_undecodable(exc: sqlite3.OperationalError) -> bool:
    # Raised by the module sqlite3 itself and not by SQLite, so it has no code.
    return getattr(exc, "sqlite_errorcode", None) is None


def _str_or_bytes(encoded: bytes) -> str | bytes:
    try:
        return encoded.decode()
    except UnicodeDecodeError:
        return encoded


def _file_state(status: os.stat_result) -> tuple[int, ...]:
    """Differs if the file was changed or replaced."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _max_row_size(rows: Sequence[Sequence[Any]]) -> int:
    """The approximate size of the largest of some rows, measured on a sample."""
    sample = rows[:: 1 + len(rows) // _SAMPLE_SIZE]
    return max(1, *(sum(len(each) for each in row if type(each) is str) for row in sample))
