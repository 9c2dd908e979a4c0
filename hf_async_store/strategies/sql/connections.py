"""The connections of a store: a pool, a counter that limits it, and leases.

SQLAlchemy's pool keeps connections open, opens more up to the overflow, and replaces old ones. A
counter limits the connections in use: callers wait for it before they use the pool, so a
cancellation while waiting cannot lose a connection, and a `PoolTimeoutError` names the setting that is
too small. A lease is one connection, checked out for some time; its statements are sent to the driver
directly, without the overhead of SQLAlchemy for each statement.

A connection that was used is kept here, checked out, for the next caller, and returned to the pool only
when it was idle for some time: checking one out costs several times what a small statement does in this
process, and the pool would close one beyond its size as soon as it is returned, so that repeated bursts
would open and close one connection per call.
"""

from __future__ import annotations

import asyncio
import atexit
import time
import warnings
import weakref
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, TypeVar, cast

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, PoolProxiedConnection, QueuePool
from sqlalchemy.util import greenlet_spawn

from hf_async_store.config import SQLConfig
from hf_async_store.driver import Isolation, run_to_completion
from hf_async_store.errors import (
    DataFileConflictError,
    PoolTimeoutError,
    StorageError,
    StoreClosedError,
    TransactionAbortedError,
    UnavailableError,
)
from hf_async_store.strategies.sql.completion import completed
from hf_async_store.values import Value

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.dialect import Dialect

_MAX_BROKEN_CONNECTIONS: Final = 32
"""How many broken connections, beyond the maximum of the pool, a checkout replaces before it fails."""

_IDLE_SECONDS: Final = 10.0
"""How long a connection is kept checked out while it is not needed."""

Result = TypeVar("Result")
_Work: TypeAlias = "Coroutine[Any, Any, None]"


class LeasedConnection:
    """One connection, checked out of the pool and used by one task at a time."""

    def __init__(self, dialect: Dialect, connection: PoolProxiedConnection, driver: Any) -> None:
        self.dialect = dialect
        self.connection = connection
        self.driver = driver
        self.checked_out_at = self.in_use_since = time.monotonic()
        self.force_closed = False
        self.commit_done = asyncio.Event()  # set while no commit is in progress
        self.commit_done.set()
        self.state_unknown = False  # a failure or cancellation interrupted the driver
        self.session_altered = False  # a caller's own SQL may have changed the session
        self.isolation: Isolation | None = None  # of the open transaction; None: as configured
        self.return_task: asyncio.Task[None] | None = None  # returns it to the pool
        self._transactions: list[Any] = []  # the handles of the transaction and its savepoints
        self._may_write = True  # whether the transaction that is open may write

    def for_next_caller(self) -> LeasedConnection:
        """A lease of the same connection."""
        other = LeasedConnection(self.dialect, self.connection, self.driver)
        other.checked_out_at = self.checked_out_at
        return other

    def rows(
        self, sql: str, args: Sequence[object] = (), *, doing: str = "read", writes: bool = False
    ) -> Awaitable[Sequence[Sequence[Any]]]:
        """Run one statement and read all its rows."""
        if writes and not self._transactions:
            # The statement commits by itself, so it completes before a cancellation is raised: a
            # write must not be applied after its task has ended.
            return completed(self.autocommit(sql, args, doing))
        return self._rows(sql, args, doing, writes=False)

    async def written(
        self, sql: str, args: Sequence[object], doing: str
    ) -> Sequence[Sequence[Any]]:
        """As `rows` of a statement that writes, for a caller that completes it itself."""
        if self._transactions:
            return await self._rows(sql, args, doing, writes=False)
        return await self.autocommit(sql, args, doing)

    def _rows(
        self, sql: str, args: Sequence[object], doing: str, *, writes: bool
    ) -> Coroutine[Any, Any, Sequence[Sequence[Any]]]:
        return self._run(lambda: self.dialect.rows(self.driver, sql, args), doing, writes=writes)

    async def read(self, work: Callable[[Any], Result]) -> Result:
        """See `Dialect.job`, for a function that only reads, by several statements."""
        return await self._run(
            lambda: self.dialect.job(self.driver, work, completes=False), "read", writes=False
        )

    async def _run(
        self,
        work: Callable[[], Awaitable[Result]],
        doing: str,
        *,
        writes: bool,
        completes: bool = False,
        callers: bool = False,
    ) -> Result:
        """What a call of the driver returns, whose exceptions are translated.

        Args:
            doing, writes, callers: see `Dialect.translate`.
            completes: a cancellation is raised after the call has ended.
        """
        self._check_open()
        try:
            return await work()
        except self.dialect.driver_errors as exc:
            raise self._error(exc, doing, writes=writes, callers=callers) from exc
        except StorageError:
            raise
        except BaseException as exc:
            if callers and isinstance(exc, self.dialect.caller_errors):
                raise self._error(exc, doing, writes=writes, callers=True) from exc
            if not (completes and isinstance(exc, asyncio.CancelledError)):
                self.state_unknown = True
            raise

    async def autocommit(
        self, sql: str, args: Sequence[object], doing: str
    ) -> Sequence[Sequence[Any]]:
        self.commit_done.clear()
        try:
            rows = await self._rows(sql, args, doing, writes=True)
            if self.dialect.in_transaction(self.driver):
                self.state_unknown = True
                raise TransactionAbortedError(
                    "the statement was executed in a transaction that nobody commits: the connection "
                    "was left in it before",
                    outcome_unknown=True,
                )
            self._check_committed()
        finally:
            self.commit_done.set()
        return rows

    def _check_committed(self) -> None:
        """Check after a commit that it was written to the file of the store."""
        try:
            self.dialect.check_file(self.driver)
        except StorageError as exc:
            exc.outcome_unknown = True
            raise

    async def job(self, work: Callable[[Any], Result]) -> Result:
        """See `Dialect.job`, for a function that writes: outside a transaction, it commits by itself."""
        commits = not self._transactions
        if commits:
            self.commit_done.clear()
        try:
            result = await self._run(
                lambda: self.dialect.job(self.driver, work), "write", writes=commits, completes=True
            )
            if commits:
                self._check_committed()
            return result
        finally:
            self.commit_done.set()

    async def fetch_dicts(self, sql: str, args: Sequence[object]) -> list[dict[str, Value]]:
        """Run a caller's own statement in the open transaction."""
        self.session_altered = True
        rows = await self._run(
            lambda: self.dialect.fetch_dicts(self.driver, sql, args),
            "execute the statement",
            writes=False,
            callers=True,
        )
        self._check_open()
        if not self.dialect.in_transaction(self.driver):
            raise TransactionAbortedError(
                "the statement ended its transaction: earlier writes of the transaction may be "
                "committed or rolled back. Read what is stored before you write again. A statement, "
                "and the triggers and functions that it calls, must not commit or roll back",
                outcome_unknown=True,
            )
        return rows

    async def fetch_batches(
        self, sql: str, args: Sequence[object]
    ) -> AsyncGenerator[Sequence[Sequence[Any]], None]:
        """Run one statement and read its rows in batches."""
        self._check_open()
        self.dialect.check_file(self.driver)
        batches = self.dialect.fetch_batches(self.driver, sql, args, may_write=self._may_write)
        try:
            async for each in batches:
                yield each
                self._check_open()
        except self.dialect.driver_errors as exc:
            raise self._error(exc, "read", writes=False) from exc
        except asyncio.CancelledError:
            self.state_unknown = True
            raise
        finally:
            try:
                await batches.aclose()
            except self.dialect.driver_errors:
                # The store was closed in the meantime, or the connection was lost. The caller needs
                # no more rows, so the error is not raised.
                self.state_unknown = True

    @asynccontextmanager
    async def transaction(self, isolation: Isolation | None = None) -> AsyncIterator[None]:
        """A transaction, or a savepoint inside a transaction: the statements inside commit together."""
        if not self._transactions:
            self.isolation = isolation
        await self._begin(lambda: self.dialect.begin(self.driver, isolation))
        try:
            yield
        except BaseException:
            await completed(self._roll_back())
            raise
        await completed(self._commit())

    @asynccontextmanager
    async def reading(self, *, statements: Literal["one", "many"]) -> AsyncIterator[None]:
        """The statements inside only read. With "many", all of them see one snapshot; with "one", each
        single statement does."""
        await self._begin(lambda: self.dialect.begin_reading(self.driver, statements))
        self._may_write = False
        try:
            yield
        finally:
            if self._transactions[-1] is None or self.force_closed:
                # Without suspending: a loop that shuts down closes all generators at the same time,
                # and each of them requires that the generators inside it have ended.
                self._transactions.pop()
            else:
                await run_to_completion(self._roll_back())
            self._may_write = True

    async def _begin(self, begin: Callable[[], Awaitable[Any]]) -> None:
        handle = await self._run(begin, "begin a transaction", writes=False)
        self._transactions.append(handle)
        try:
            self.dialect.check_file(self.driver)
        except StorageError:
            await run_to_completion(self._roll_back())
            raise

    async def _commit(self) -> None:
        handle = self._transactions.pop()
        outermost = not self._transactions
        if outermost:
            self.commit_done.clear()
        try:
            try:
                await self._run(lambda: self.dialect.commit(handle), "commit", writes=outermost)
            except StorageError:
                self._transactions.append(handle)
                await self._roll_back()
                raise
            if outermost:
                self._check_committed()
        finally:
            self.commit_done.set()

    async def _roll_back(self) -> None:
        handle = self._transactions.pop()
        if handle is None or self.force_closed:
            return
        # If this fails, the connection is broken, and `release` finds that out; the caller gets the
        # error that caused the rollback.
        with suppress(*self.dialect.driver_errors):
            await self.dialect.roll_back(handle)
            self.state_unknown = self.state_unknown and bool(self._transactions)

    def _check_open(self) -> None:
        if self.force_closed:
            raise StoreClosedError("this store was closed")

    def _error(
        self, exc: Exception, doing: str, *, writes: bool, callers: bool = False
    ) -> StorageError:
        error = self.dialect.translate(exc, doing=doing, writes=writes, callers=callers)
        if self.force_closed and not error.outcome_unknown:
            return StoreClosedError("this store was closed")
        return error


class Connections:
    """One of the connection pools of a store.

    Args:
        kept: how many connections stay open while they are idle.
        most: the maximum number of connections.
        exhausted: the message of the error if no connection becomes free in time.
        waits: whether a caller waits while all connections are in use.
        isolation: the connections only read, and on PostgreSQL each statement does so at this level;
            None: they also write.
        streams: the connections read much, once.
    """

    def __init__(
        self,
        dialect: Dialect,
        config: SQLConfig,
        *,
        kept: int,
        most: int,
        exhausted: str,
        waits: bool = True,
        isolation: Isolation | None = None,
        streams: bool = False,
    ) -> None:
        self._dialect = dialect
        self._config = config
        self._most = most
        self._exhausted = exhausted
        self._waits = waits
        self._permits = _Permits(most)
        size = max(kept, 1)
        self._engine = create_async_engine(
            dialect.url,
            async_creator=lambda: dialect.connect(isolation, streams=streams),
            poolclass=AsyncAdaptedQueuePool,
            pool_size=size,
            max_overflow=most - size,
            pool_recycle=config.pool_recycle,
            pool_reset_on_return=None,
            pool_use_lifo=True,
        )
        self._leased: set[LeasedConnection] = set()
        self._tasks: set[asyncio.Task[None]] = set()  # open connections, or close idle ones
        self._idle: list[LeasedConnection] = []  # checked out and not used
        # If the store is not closed, SQLAlchemy would log the error that these were not returned.
        # At the end of the process they stay as they are.
        weakref.finalize(self, _detach, self._idle).atexit = False
        self._unused_since_check = (
            0  # how many of these were idle all the time since the last check
        )
        self._timer: asyncio.TimerHandle | None = None
        self._has_connected = False
        self._closed = False

    def lease(self, patience: float | None = None) -> AbstractAsyncContextManager[LeasedConnection]:
        """A connection of the pool.

        Args:
            patience: how many seconds to wait for one; None: `pool_timeout`.

        Raises:
            PoolTimeoutError: no connection became free in time.
            UnavailableError, AuthenticationError: a new connection could not be opened.
            StoreClosedError: the store was closed, also amid a statement that does not write.
        """
        return _Leasing(self, patience)

    async def acquire(self, patience: float | None = None) -> LeasedConnection:
        """See `lease`; ended by `release`."""
        self.check_open()
        if not self._permits.take():
            await self._wait_for_permit(self._config.pool_timeout if patience is None else patience)
        leases: list[LeasedConnection] = []
        try:
            self.check_open()
            if (kept := self._pop_idle()) is not None:
                leases.append(kept)
            elif self._pool().checkedin():
                await self._check_out(leases)  # it never suspends
            else:
                await run_to_completion(self._start(self._check_out(leases)))
        except BaseException:
            if leases:
                await self.release(leases[0], check=False)
            else:
                self._permits.give_back()
            raise
        leases[0].in_use_since = time.monotonic()
        return leases[0]

    @property
    def longest_use(self) -> float:
        """For how many seconds the connections have been in use, that of the longest."""
        if not self._leased:
            return 0.0
        return time.monotonic() - min([each.in_use_since for each in self._leased])

    def _pop_idle(self) -> LeasedConnection | None:
        """The idle connection that was used last, or None."""
        while self._idle:
            kept = self._idle.pop()
            self._unused_since_check = min(self._unused_since_check, len(self._idle))
            if self._dialect.is_lost(kept.driver):
                self._start(self._discard(kept.connection, kept.driver))
                continue
            self._leased.add(kept)
            return kept
        return None

    def check_open(self) -> None:
        """Raise StoreClosedError after `close`."""
        if self._closed:
            raise StoreClosedError("this store was closed")

    def _start(self, work: _Work) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _wait_for_permit(self, patience: float) -> None:
        if not self._waits or patience <= 0:
            raise PoolTimeoutError(self._exhausted)
        try:
            async with asyncio.timeout(patience):
                await self._permits.wait()
        except TimeoutError as exc:
            raise PoolTimeoutError(self._exhausted) from exc

    async def _check_out(self, leases: list[LeasedConnection]) -> None:
        if not self._has_connected:
            self._has_connected = True
            _OPEN_POOLS.add(self)
        for _ in range(_MAX_BROKEN_CONNECTIONS + self._most):
            try:
                # Not `AsyncEngine.connect`: its objects cost more than a small query.
                connection = await greenlet_spawn(self._pool().connect)
            except StorageError:
                raise
            except Exception as exc:  # an invalid response can make a driver raise anything
                raise self._connect_error(exc) from exc
            driver = connection.driver_connection
            if self._dialect.is_lost(driver) or self._closed:
                # For example, the server was restarted since the connection was last used.
                await self._discard(connection, driver)
                self.check_open()
                continue
            leases.append(LeasedConnection(self._dialect, connection, driver))
            self._leased.add(leases[0])
            return
        raise UnavailableError(
            f"cannot connect to {self._config.location()}: every connection was closed, or became "
            "unusable, as soon as it was opened. Check the log of the server, its connection limit, and "
            "any proxy or connection pooler"
        )

    def _connect_error(self, exc: Exception) -> StorageError:
        drivers = self._dialect.driver_errors
        if not isinstance(exc, drivers):
            # SQLAlchemy has two kinds of errors for those of the driver.
            original = getattr(exc, "orig", exc.__cause__)
            if isinstance(original, drivers):
                exc = original
            elif isinstance(exc, SQLAlchemyError):
                return UnavailableError(f"cannot connect: {exc}")
        return self._dialect.translate(exc, doing="connect", writes=False)

    async def release(self, lease: LeasedConnection, *, check: bool) -> None:
        """Return a connection to the pool; further calls for the same lease have no effect.

        Args:
            check: find out first whether the connection can be reused, and close it if not. A
                connection on which a caller's own SQL ran is always checked.
        """
        if lease.return_task is not None:
            await run_to_completion(lease.return_task)
        elif check or lease.session_altered:
            await run_to_completion(self._start_return(lease, self._return_or_discard(lease)))
        else:
            self._forget(lease)
            self._keep_idle(lease)

    def _start_return(self, lease: LeasedConnection, work: _Work) -> asyncio.Task[None]:
        assert lease.return_task is None, "a connection is returned once"
        lease.return_task = asyncio.get_running_loop().create_task(work)
        return lease.return_task

    async def _return_or_discard(self, lease: LeasedConnection) -> None:
        try:
            if not await self._is_reusable(lease):
                await self._discard(lease.connection, lease.driver)
                return
        finally:
            self._forget(lease)
        self._keep_idle(lease.for_next_caller())

    async def _discard_lease(self, lease: LeasedConnection) -> None:
        try:
            await self._discard(lease.connection, lease.driver, in_use=True)
        finally:
            self._forget(lease)

    def _forget(self, lease: LeasedConnection) -> None:
        self._leased.discard(lease)
        self._permits.give_back()

    async def _discard(
        self, connection: PoolProxiedConnection, driver: Any, *, in_use: bool = False
    ) -> None:
        with suppress(*self._dialect.driver_errors):
            await self._dialect.discard(driver, in_use=in_use)
        await greenlet_spawn(connection.invalidate)

    async def _is_reusable(self, lease: LeasedConnection) -> bool:
        if lease.state_unknown:
            return False
        try:
            reusable = await self._dialect.make_reusable(lease.driver)
            return reusable and (
                not lease.session_altered or await self._dialect.reset(lease.driver)
            )
        except self._dialect.driver_errors:
            return False

    # -- idle connections ------------------------------------------------------------------------

    def _keep_idle(self, lease: LeasedConnection) -> None:
        age = time.monotonic() - lease.checked_out_at
        if self._closed or age > self._config.pool_recycle:
            self._start(self._discard(lease.connection, lease.driver))
            return
        self._idle.append(lease)
        if self._timer is None:
            self._unused_since_check = 0
            self._schedule_check()

    def _schedule_check(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(_IDLE_SECONDS, self._close_unused)

    def _close_unused(self) -> None:
        """Return the connections to the pool that were idle all the time since the last check, and close
        those beyond its size."""
        self._timer = None
        unused = self._idle[: self._unused_since_check]
        del self._idle[: self._unused_since_check]
        overflow = self._pool().overflow()
        for number, each in enumerate(unused):
            if number < overflow:
                self._start(self._discard(each.connection, each.driver))
            else:
                each.connection.close()
        if self._idle:
            self._unused_since_check = len(self._idle)
            self._schedule_check()

    def figures(self) -> dict[str, int]:
        """The maximum number of connections, the number of open ones, and that of checked-out ones."""
        pool = self._pool()
        return {
            "most": self._most,
            "open": pool.checkedin() + pool.checkedout(),
            "in_use": len(self._leased),
        }

    def _pool(self) -> QueuePool:
        return cast("QueuePool", self._engine.pool)

    # -- closing -----------------------------------------------------------------------------

    async def close(self) -> None:
        """Close every connection, including those in use. A commit in progress completes first."""
        self._closed = True
        _OPEN_POOLS.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        ends: set[asyncio.Task[None]] = set()
        for lease in list(self._leased):
            while not lease.commit_done.is_set():  # the next one may begin before this task runs
                await lease.commit_done.wait()
            if lease.return_task is None and lease in self._leased:
                lease.force_closed = True
                self._start_return(lease, self._discard_lease(lease))
            if lease.return_task is not None:
                ends.add(lease.return_task)
        for lease in self._idle:
            self._start(self._discard(lease.connection, lease.driver))
        self._idle.clear()
        for tasks in (ends, self._tasks):
            if tasks:
                await asyncio.wait(tasks)
        await self._engine.dispose()
        for each in ends:
            each.result()

    def abandon(self) -> None:
        """Leave the connections open until the process ends, without a ResourceWarning."""
        self._closed = True
        _OPEN_POOLS.discard(self)

    def warn_unclosed(self) -> None:
        self._closed = True
        _OPEN_POOLS.discard(self)
        warnings.warn(
            f"a store was not closed: {self._dialect.describe()}",
            ResourceWarning,
            stacklevel=2,
            source=self,
        )

    def __del__(self) -> None:
        if self._has_connected and not self._closed:
            self.warn_unclosed()


class _Permits:
    """How many more connections may be in use; those who wait get one in their order.

    Taking and giving back a permit of `asyncio.Semaphore` takes as long as a tenth of a small query.

    Attributes:
        free: while it is positive, nobody waits.
    """

    __slots__ = ("_waiting", "free")

    def __init__(self, number: int) -> None:
        self.free = number
        self._waiting: deque[asyncio.Future[None]] = deque()

    def take(self) -> bool:
        """Take a permit that is free; false if there is none."""
        if not self.free:
            return False
        self.free -= 1
        return True

    async def wait(self) -> None:
        """Wait for a permit, while none is free, and take it."""
        given = asyncio.get_running_loop().create_future()
        self._waiting.append(given)
        try:
            await given
        except BaseException:
            if given.done() and not given.cancelled():  # in the same iteration of the loop
                self.give_back()
            given.cancel()
            raise

    def give_back(self) -> None:
        """Give a permit to the next one who waits and was not cancelled."""
        while self._waiting:
            given = self._waiting.popleft()
            if not given.done():
                given.set_result(None)
                return
        self.free += 1


class _Leasing(AbstractAsyncContextManager[LeasedConnection]):
    """See `Connections.lease`. A generator would take twice as long."""

    __slots__ = ("_lease", "_patience", "_pool")

    def __init__(self, pool: Connections, patience: float | None) -> None:
        self._pool = pool
        self._patience = patience

    async def __aenter__(self) -> LeasedConnection:
        self._lease = await self._pool.acquire(self._patience)
        return self._lease

    async def __aexit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        await self._pool.release(self._lease, check=exc is not None)
        if self._lease.force_closed and _is_failed_read(exc, self._lease.dialect):
            raise StoreClosedError("this store was closed") from exc


def _is_failed_read(exc: BaseException | None, dialect: Dialect) -> bool:
    """Whether an error tells that a statement failed that does not write.

    Of SQLite's files, closing the last connection removes one.
    """
    if not isinstance(exc, StorageError) or exc.outcome_unknown:
        return False
    failed = isinstance(exc.__cause__, dialect.driver_errors)
    return failed or isinstance(exc, DataFileConflictError)


def _detach(idle: list[LeasedConnection]) -> None:
    """Take connections away from their pool, which does not close them then."""
    for each in idle:
        each.connection.detach()
    idle.clear()


_OPEN_POOLS: Final[weakref.WeakSet[Connections]] = weakref.WeakSet()


@atexit.register
def _warn_of_unclosed() -> None:
    for each in list(_OPEN_POOLS):
        each.warn_unclosed()
