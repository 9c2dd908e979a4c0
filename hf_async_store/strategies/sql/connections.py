"""The connections of a store: a pool, a semaphore before it, and leases.

SQLAlchemy's pool keeps connections, opens more up to the overflow, and replaces old ones. A semaphore
before it counts them: a caller waits there for a connection, where a cancellation loses nothing, and a
`PoolTimeoutError` names the setting that is too small. A lease is one connection held for some time;
its statements are sent to the driver directly, without SQLAlchemy's overhead around each.

The pool would close a connection beyond its size as soon as it is returned, and repeated bursts would
open and close one per call. So these are kept here for some time.
"""

from __future__ import annotations

import asyncio
import atexit
import time
import warnings
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, cast

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.pool import QueuePool

from hf_async_store.config import SQLConfig
from hf_async_store.driver import Isolation, run_to_completion
from hf_async_store.errors import (
    PoolTimeoutError,
    StorageError,
    StoreClosedError,
    TransactionAbortedError,
    UnavailableError,
)
from hf_async_store.values import Value

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect as SQLDialect

    from hf_async_store.strategies.sql.dialect import BulkUpsert, Dialect

_TRIES: Final = 32
"""How many broken connections in a row are taken from the pool before the attempt fails."""

_IDLE_SECONDS: Final = 10.0
"""How long a connection beyond the pool's size is kept without being needed."""

_Work: TypeAlias = "Coroutine[Any, Any, None]"


class LeasedConnection:
    """One connection, held by one task at a time."""

    def __init__(self, dialect: Dialect, connection: AsyncConnection, driver: Any) -> None:
        self.dialect = dialect
        self.connection = connection
        self.driver = driver
        self.since = time.monotonic()
        self.force_closed = False
        self.ended = asyncio.Event()  # no commit is under way
        self.ended.set()
        self.suspect = False  # a cancellation left the driver in the middle of something
        self.altered = False  # a caller's own SQL may have changed the session
        self.returning: asyncio.Task[None] | None = None  # its way back to the pool
        self._open: list[Any] = []
        self._written = True  # what is open may write

    async def rows(
        self, sql: str, args: Sequence[object] = (), *, doing: str = "read", writes: bool = False
    ) -> Sequence[Sequence[Any]]:
        """Run one statement and read all its rows."""
        if writes and not self._open:
            # It commits by itself, so it completes before a cancellation is raised: a write
            # of a task that has ended must not be applied later.
            return await run_to_completion(self._committing(sql, args, doing))
        return await self._rows(sql, args, doing, writes=False)

    async def _rows(
        self, sql: str, args: Sequence[object], doing: str, *, writes: bool
    ) -> Sequence[Sequence[Any]]:
        self._usable()
        try:
            self.dialect.check_place(self.driver)
            return await self.dialect.rows(self.driver, sql, args)
        except self.dialect.driver_errors as exc:
            raise self._error(exc, doing, writes=writes) from exc
        except StorageError:
            raise
        except BaseException:
            self.suspect = True
            raise

    async def _committing(
        self, sql: str, args: Sequence[object], doing: str
    ) -> Sequence[Sequence[Any]]:
        self.ended.clear()
        try:
            rows = await self._rows(sql, args, doing, writes=True)
            self._check_committed()
        finally:
            self.ended.set()
        return rows

    def _check_committed(self) -> None:
        """What was committed is in the file of the store, or is not acknowledged."""
        try:
            self.dialect.check_place(self.driver)
        except StorageError as exc:
            exc.outcome_unknown = True
            raise

    @property
    def has_exclusive_write(self) -> bool:
        """Whether nobody else can write until the transaction ends that is open."""
        return self.dialect.single_writer and self._written and bool(self._open)

    @property
    def lost_transaction(self) -> bool:
        """Whether the database itself ended the transaction, as a trigger may do in SQLite."""
        return bool(self._open) and not self.dialect.in_transaction(self.driver)

    async def bulk_upsert_locked(self, puts: BulkUpsert) -> dict[str, int] | None:
        """`Dialect.bulk_upsert_locked`, where `has_exclusive_write`."""
        self._usable()
        try:
            return await self.dialect.bulk_upsert_locked(self.driver, puts)
        except self.dialect.driver_errors as exc:
            raise self._error(exc, "write", writes=False) from exc
        except BaseException:
            self.suspect = True
            raise

    @asynccontextmanager
    async def bulk(self) -> AsyncIterator[None]:
        """A transaction for statements of many rows: see `ImportStatements`."""
        bulk = self.dialect.bulk
        assert bulk is not None, "the caller has checked that there is one"
        await self.rows(bulk.before)
        try:
            async with self.transaction():
                yield
        finally:
            with suppress(StorageError):  # then the connection is of no more use
                await run_to_completion(self.rows(bulk.after))

    async def many(self, sql: str, blocks: Sequence[Sequence[object]]) -> int:
        """Run one statement that writes, in a transaction, for each block of arguments."""
        self._usable()
        assert self.dialect.bulk is not None, "the caller has checked that there is one"
        try:
            return await self.dialect.bulk.run(self.driver, sql, blocks)
        except self.dialect.driver_errors as exc:
            raise self._error(exc, "write", writes=False) from exc
        except BaseException:
            self.suspect = True
            raise

    async def fetch_dicts(self, sql: str, args: Sequence[object]) -> list[dict[str, Value]]:
        """Run a caller's own statement, in the transaction that is open."""
        self._usable()
        self.altered = True
        try:
            rows = await self.dialect.fetch_dicts(self.driver, sql, args)
        except (*self.dialect.driver_errors, *self.dialect.caller_errors) as exc:
            raise self._error(exc, "execute the statement", writes=False, callers=True) from exc
        except BaseException:
            self.suspect = True
            raise
        self._usable()
        if not self.dialect.in_transaction(self.driver):
            raise TransactionAbortedError(
                "the statement ended the transaction that it ran in: what was written before it "
                "may be stored",
                outcome_unknown=True,
            )
        return rows

    async def fetch_batches(
        self, sql: str, args: Sequence[object]
    ) -> AsyncGenerator[Sequence[Sequence[Any]], None]:
        """Run one statement and read its rows in batches."""
        self._usable()
        self.dialect.check_place(self.driver)
        batches = self.dialect.fetch_batches(self.driver, sql, args, written=self._written)
        try:
            async for each in batches:
                yield each
                self._usable()
        except self.dialect.driver_errors as exc:
            raise self._error(exc, "read", writes=False) from exc
        except asyncio.CancelledError:
            self.suspect = True
            raise
        finally:
            try:
                await batches.aclose()
            except self.dialect.driver_errors:
                # The store was closed meanwhile, or the connection was lost. A caller that stops
                # early needs no more rows, so the error is of no interest.
                self.suspect = True

    @asynccontextmanager
    async def transaction(self, isolation: Isolation | None = None) -> AsyncIterator[None]:
        """Everything inside commits together; inside another, it is a savepoint."""
        await self._begin(lambda: self.dialect.begin(self.driver, isolation))
        try:
            yield
        except BaseException:
            await run_to_completion(self._roll_back())
            raise
        await run_to_completion(self._commit())

    @asynccontextmanager
    async def reading(self, *, statements: Literal["one", "many"]) -> AsyncIterator[None]:
        """Everything inside sees one state, and writes nothing."""
        await self._begin(lambda: self.dialect.begin_reading(self.driver, statements))
        self._written = False
        try:
            yield
        finally:
            if self._open[-1] is None or self.force_closed:
                # Without suspending: at its end the loop closes all generators at once, and
                # each of them must find its inner ones finished.
                self._open.pop()
            else:
                await run_to_completion(self._roll_back())
            self._written = True

    async def _begin(self, begin: Callable[[], Awaitable[Any]]) -> None:
        self._usable()
        try:
            handle = await begin()
        except self.dialect.driver_errors as exc:
            raise self._error(exc, "begin a transaction", writes=False) from exc
        except BaseException:
            self.suspect = True
            raise
        self._open.append(handle)
        try:
            self.dialect.check_place(self.driver)
        except StorageError:
            await run_to_completion(self._roll_back())
            raise

    async def _commit(self) -> None:
        outermost = len(self._open) == 1
        handle = self._open.pop()
        self._usable()
        if outermost:
            self.ended.clear()
        try:
            try:
                self.dialect.check_place(self.driver)
            except StorageError:
                self._open.append(handle)
                await self._roll_back()
                raise
            await self.dialect.commit(handle)
            if outermost:
                self._check_committed()
        except self.dialect.driver_errors as exc:
            error = self._error(exc, "commit", writes=outermost)
            self._open.append(handle)
            await self._roll_back()
            raise error from exc
        finally:
            self.ended.set()

    async def _roll_back(self) -> None:
        handle = self._open.pop()
        if handle is None or self.force_closed:
            return
        # Where this fails the connection is of no more use, and `reusable` sees to that; the caller
        # gets the error that led here.
        with suppress(*self.dialect.driver_errors):
            await self.dialect.roll_back(handle)
            self.suspect = self.suspect and bool(self._open)

    def _usable(self) -> None:
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
    """The pool of one store, or its part for one purpose.

    Args:
        kept: how many connections stay open when nothing is to be done.
        most: how many there may be.
        exhausted: the message of the error when no connection became free in time.
        waits: whether a caller waits while all are in use.
        read_only: for connections that never write, where the engine can use that.
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
        read_only: bool = False,
    ) -> None:
        self._dialect = dialect
        self._config = config
        self._most = most
        self._exhausted = exhausted
        self._waits = waits
        self._gate = asyncio.Semaphore(most)
        size = max(kept, 1)
        self._engine = dialect.engine(size=size, overflow=most - size, read_only=read_only)
        self._held: set[LeasedConnection] = set()
        self._tasks: set[asyncio.Task[None]] = set()  # connecting, or closing what is idle
        self._surplus: list[LeasedConnection] = []  # idle, beyond the pool's size
        self._unneeded = 0  # how many of them nobody needed since the last look
        self._timer: asyncio.TimerHandle | None = None
        self._used = False
        self._closed = False

    @property
    def sql_dialect(self) -> SQLDialect:
        """What SQLAlchemy writes SQL for."""
        return self._engine.dialect

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[LeasedConnection]:
        """A connection of the pool.

        Raises:
            PoolTimeoutError: none became free in time.
            UnavailableError, AuthenticationError: a new one could not be made.
        """
        lease = await self.acquire()
        try:
            yield lease
        except BaseException:
            await self.release(lease, reusable=True)
            raise
        await self.release(lease, reusable=False)

    async def acquire(self) -> LeasedConnection:
        self._usable()
        await self._enter()
        taken: list[LeasedConnection] = []
        try:
            self._usable()
            if self._pool().checkedin():
                await self._take(taken)  # it never suspends
            elif (kept := self._kept()) is not None:
                taken.append(kept)
            else:
                await run_to_completion(self._task(self._take(taken)))
        except BaseException:
            if taken:
                await self.release(taken[0], reusable=False)
            else:
                self._gate.release()
            raise
        return taken[0]

    def _kept(self) -> LeasedConnection | None:
        """One of the connections beyond the pool's size that were kept."""
        while self._surplus:
            kept = self._surplus.pop()
            self._unneeded = min(self._unneeded, len(self._surplus))
            if self._dialect.is_lost(kept.driver):
                self._task(self._throw_away(kept.connection, kept.driver))
                continue
            lease = LeasedConnection(self._dialect, kept.connection, kept.driver)
            lease.since = kept.since
            self._held.add(lease)
            return lease
        return None

    def _usable(self) -> None:
        if self._closed:
            raise StoreClosedError("this store was closed")

    def _task(self, work: _Work) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _enter(self) -> None:
        if not self._gate.locked():
            await self._gate.acquire()
            return
        if not self._waits:
            raise PoolTimeoutError(self._exhausted)
        try:
            async with asyncio.timeout(self._config.pool_timeout):
                await self._gate.acquire()
        except TimeoutError as exc:
            raise PoolTimeoutError(self._exhausted) from exc

    async def _take(self, taken: list[LeasedConnection]) -> None:
        if not self._used:
            self._used = True
            _UNCLOSED.add(self)
        for _ in range(_TRIES + self._most):
            try:
                connection = await self._engine.connect()
            except SQLAlchemyError as exc:
                raise self._connect_error(exc) from exc
            except StorageError:
                raise
            except Exception as exc:  # a driver raises whatever it comes upon in a bad answer
                raise self._dialect.translate(exc, doing="connect", writes=False) from exc
            driver = cast("Any", await connection.get_raw_connection()).driver_connection
            if self._dialect.is_lost(driver) or self._closed:
                # The server was started again since it was last used.
                await self._throw_away(connection, driver)
                self._usable()
                continue
            taken.append(LeasedConnection(self._dialect, connection, driver))
            self._held.add(taken[0])
            return
        raise UnavailableError("every new connection was lost at once")

    def _connect_error(self, exc: SQLAlchemyError) -> StorageError:
        original = getattr(exc, "orig", None)
        if isinstance(original, self._dialect.driver_errors):
            return self._dialect.translate(original, doing="connect", writes=False)
        return UnavailableError(f"cannot connect: {exc}")

    async def release(self, lease: LeasedConnection, *, reusable: bool) -> None:
        """Return a connection; one whose state is uncertain is checked, and perhaps closed.

        However often it is called, a connection is returned once.
        """
        if lease.returning is not None:
            await run_to_completion(lease.returning)
        elif reusable or lease.altered:
            await run_to_completion(self._return(lease, self._give_back(lease)))
        elif self._pool().overflow() > 0:
            self._keep(lease)
        else:
            await lease.connection.close()  # it never suspends
            self._gone(lease)

    def _return(self, lease: LeasedConnection, work: _Work) -> asyncio.Task[None]:
        assert lease.returning is None, "a connection is returned once"
        lease.returning = asyncio.get_running_loop().create_task(work)
        return lease.returning

    async def _give_back(self, lease: LeasedConnection) -> None:
        try:
            if await self._is_reusable(lease):
                await lease.connection.close()
            else:
                await self._throw_away(lease.connection, lease.driver)
        finally:
            self._gone(lease)

    async def _end(self, lease: LeasedConnection) -> None:
        try:
            await self._throw_away(lease.connection, lease.driver)
        finally:
            self._gone(lease)

    def _gone(self, lease: LeasedConnection) -> None:
        self._held.discard(lease)
        self._gate.release()

    async def _throw_away(self, connection: AsyncConnection, driver: Any) -> None:
        with suppress(*self._dialect.driver_errors):
            await self._dialect.discard(driver)
        await connection.invalidate()
        await connection.close()

    async def _is_reusable(self, lease: LeasedConnection) -> bool:
        if lease.suspect:
            return False
        try:
            reusable = await self._dialect.make_reusable(lease.driver)
            return reusable and (not lease.altered or await self._dialect.reset(lease.driver))
        except self._dialect.driver_errors:
            return False

    # -- idle connections ------------------------------------------------------------------------

    def _keep(self, lease: LeasedConnection) -> None:
        self._gone(lease)
        if time.monotonic() - lease.since > self._config.pool_recycle:
            self._task(self._throw_away(lease.connection, lease.driver))
            return
        self._surplus.append(lease)
        if self._timer is None:
            self._unneeded = 0
            self._look_later()

    def _look_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(_IDLE_SECONDS, self._look)

    def _look(self) -> None:
        """Close what nobody needed since the last look."""
        self._timer = None
        unneeded, self._surplus = (
            self._surplus[: self._unneeded],
            self._surplus[self._unneeded :],
        )
        for each in unneeded:
            self._task(self._throw_away(each.connection, each.driver))
        if self._surplus:
            self._unneeded = len(self._surplus)
            self._look_later()

    def figures(self) -> dict[str, int]:
        """Of the pool: its maximum number of connections, those that are open, and those checked out."""
        pool = self._pool()
        return {
            "most": self._most,
            "open": pool.checkedin() + pool.checkedout(),
            "in_use": len(self._held),
        }

    def _pool(self) -> QueuePool:
        return cast("QueuePool", self._engine.pool)

    # -- closing -----------------------------------------------------------------------------

    async def close(self) -> None:
        """Close every connection, those in use, too; a commit that is under way ends first."""
        self._closed = True
        _UNCLOSED.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        ends: set[asyncio.Task[None]] = set()
        for lease in list(self._held):
            await lease.ended.wait()
            if lease.returning is None and lease in self._held:
                lease.force_closed = True
                self._return(lease, self._end(lease))
            if lease.returning is not None:
                ends.add(lease.returning)
        for lease in self._surplus:
            self._task(self._throw_away(lease.connection, lease.driver))
        for tasks in (ends, self._tasks):
            if tasks:
                await asyncio.wait(tasks)
        await self._engine.dispose()
        for each in ends:
            each.result()

    def abandon(self) -> None:
        """Leave the connections to the end of the process, which is no mistake of the caller."""
        self._closed = True
        _UNCLOSED.discard(self)

    def warn_unclosed(self) -> None:
        self._closed = True
        _UNCLOSED.discard(self)
        warnings.warn(
            f"a store was not closed: {self._dialect.describe()}",
            ResourceWarning,
            stacklevel=2,
            source=self,
        )

    def __del__(self) -> None:
        if self._used and not self._closed:
            self.warn_unclosed()


_UNCLOSED: Final[weakref.WeakSet[Connections]] = weakref.WeakSet()


@atexit.register
def _warn_of_unclosed() -> None:
    for each in list(_UNCLOSED):
        each.warn_unclosed()
