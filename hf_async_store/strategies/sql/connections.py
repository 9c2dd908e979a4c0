"""The connections of a store: a pool, a gate before it, and leases.

SQLAlchemy's pool keeps connections, opens more up to the overflow, and replaces old ones. The gate
before it counts: who waits for a connection waits here, where a cancellation loses nothing, and is
told by a `PoolTimeoutError` which setting is too small. A lease is one connection for a while; its
statements go to the driver itself, without SQLAlchemy's own path around each.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.pool import QueuePool

from hf_async_store.config import SQLConfig
from hf_async_store.engine import Isolation, finish
from hf_async_store.entities import Value
from hf_async_store.errors import (
    PoolTimeoutError,
    StorageError,
    StoreClosedError,
    UnavailableError,
)

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect as SQLDialect

    from hf_async_store.strategies.sql.dialect import Dialect, Puts

_TRIES: Final = 32
"""How many broken connections in a row are taken from the pool before a new one must do."""


class Lease:
    """One connection, held by one task at a time."""

    def __init__(self, dialect: Dialect, connection: AsyncConnection, driver: Any) -> None:
        self.dialect = dialect
        self.connection = connection
        self.driver = driver
        self.killed = False
        self.ended = asyncio.Event()  # no commit is under way
        self.ended.set()
        self.doubtful = False  # a cancellation left the driver in the middle of something
        self._open: list[Any] = []
        self._written = True  # what is open may write

    async def rows(
        self, sql: str, args: Sequence[object] = (), *, doing: str = "read", writes: bool = False
    ) -> Sequence[Sequence[Any]]:
        """Run one statement and read all its rows."""
        self._usable()
        try:
            return await self.dialect.rows(self.driver, sql, args)
        except self.dialect.driver_errors as exc:
            raise self._error(exc, doing, writes=writes and not self._open) from exc
        except BaseException:
            self.doubtful = True
            raise

    @property
    def alone(self) -> bool:
        """Whether nobody else can write until the transaction ends that is open."""
        return self.dialect.one_writer and self._written and bool(self._open)

    async def put_all(self, puts: Puts) -> dict[str, int] | None:
        """`Dialect.put_all`, where `alone`."""
        self._usable()
        try:
            return await self.dialect.put_all(self.driver, puts)
        except self.dialect.driver_errors as exc:
            raise self._error(exc, "write", writes=False) from exc
        except BaseException:
            self.doubtful = True
            raise

    @asynccontextmanager
    async def bulk(self) -> AsyncIterator[None]:
        """A transaction for statements of many rows: see `Bulk`."""
        bulk = self.dialect.bulk
        assert bulk is not None, "asked by who knows that there is one"
        await self.rows(bulk.before)
        try:
            async with self.transaction():
                yield
        finally:
            with suppress(StorageError):  # then the connection is of no more use
                await finish(self.rows(bulk.after))

    async def many(self, sql: str, blocks: Sequence[Sequence[object]]) -> int:
        """Run one statement that writes, in a transaction, for each block of arguments."""
        self._usable()
        assert self.dialect.bulk is not None, "asked by who knows that there is one"
        try:
            return await self.dialect.bulk.run(self.driver, sql, blocks)
        except self.dialect.driver_errors as exc:
            raise self._error(exc, "write", writes=False) from exc
        except BaseException:
            self.doubtful = True
            raise

    async def labelled(self, sql: str, args: Sequence[object]) -> list[dict[str, Value]]:
        self._usable()
        try:
            return await self.dialect.labelled(self.driver, sql, args)
        except self.dialect.driver_errors as exc:
            raise self._error(exc, "execute the statement", writes=False, callers=True) from exc
        except BaseException:
            self.doubtful = True
            raise

    async def pieces(
        self, sql: str, args: Sequence[object]
    ) -> AsyncGenerator[Sequence[Sequence[Any]], None]:
        """Run one statement and read its rows piece by piece."""
        self._usable()
        try:
            async with aclosing(
                self.dialect.pieces(self.driver, sql, args, written=self._written)
            ) as pieces:
                async for each in pieces:
                    yield each
                    self._usable()
        except self.dialect.driver_errors as exc:
            raise self._error(exc, "read", writes=False) from exc
        except asyncio.CancelledError:
            self.doubtful = True
            raise

    @asynccontextmanager
    async def transaction(self, isolation: Isolation | None = None) -> AsyncIterator[None]:
        """Everything inside commits together; inside another, it is a savepoint."""
        await self._begin(lambda: self.dialect.begin(self.driver, isolation))
        try:
            yield
        except BaseException:
            await finish(self._roll_back())
            raise
        await finish(self._commit())

    @asynccontextmanager
    async def reading(self, *, statements: Literal["one", "many"]) -> AsyncIterator[None]:
        """Everything inside sees one state, and writes nothing."""
        await self._begin(lambda: self.dialect.begin_reading(self.driver, statements))
        self._written = False
        try:
            yield
        finally:
            await finish(self._roll_back())
            self._written = True

    async def _begin(self, begin: Callable[[], Awaitable[Any]]) -> None:
        self._usable()
        try:
            handle = await begin()
        except self.dialect.driver_errors as exc:
            raise self._error(exc, "begin a transaction", writes=False) from exc
        except BaseException:
            self.doubtful = True
            raise
        self._open.append(handle)

    async def _commit(self) -> None:
        outermost = len(self._open) == 1
        handle = self._open.pop()
        self._usable()
        if outermost:
            self.ended.clear()
        try:
            await self.dialect.commit(handle)
        except self.dialect.driver_errors as exc:
            error = self._error(exc, "commit", writes=outermost)
            self._open.append(handle)
            await self._roll_back()
            raise error from exc
        finally:
            self.ended.set()

    async def _roll_back(self) -> None:
        handle = self._open.pop()
        if handle is None or self.killed:
            return
        # Where this fails the connection is of no more use, and `tidy` sees to that; what led
        # here is what the caller must hear.
        with suppress(*self.dialect.driver_errors):
            await self.dialect.roll_back(handle)
            self.doubtful = self.doubtful and bool(self._open)

    def _usable(self) -> None:
        if self.killed:
            raise StoreClosedError("this store was closed")

    def _error(
        self, exc: Exception, doing: str, *, writes: bool, callers: bool = False
    ) -> StorageError:
        error = self.dialect.translate(exc, doing=doing, writes=writes, callers=callers)
        if self.killed and not error.outcome_unknown:
            return StoreClosedError("this store was closed")
        return error


class Connections:
    """The pool of one store, or its part for reading.

    Args:
        read_only: for connections that never write, where the engine gains by knowing it.
    """

    def __init__(
        self, dialect: Dialect, config: SQLConfig, *, size: int, overflow: int, read_only: bool
    ) -> None:
        self._dialect = dialect
        self._config = config
        self._size = max(size, 1)
        self._most = self._size + overflow
        self._gate = asyncio.Semaphore(self._most)
        self._engine = dialect.engine(size=self._size, overflow=overflow, read_only=read_only)
        self._held: set[Lease] = set()
        self._closed = False

    @property
    def sql_dialect(self) -> SQLDialect:
        """What SQLAlchemy writes SQL for."""
        return self._engine.dialect

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[Lease]:
        """A connection of the pool.

        Raises:
            PoolTimeoutError: none became free in time.
            UnavailableError, AuthenticationError: a new one could not be made.
        """
        lease = await self.acquire()
        try:
            yield lease
        except BaseException:
            await finish(self.release(lease, tidy=True))
            raise
        await self.release(lease, tidy=False)

    async def acquire(self) -> Lease:
        if self._closed:
            raise StoreClosedError("this store was closed")
        await self._enter()
        taken: list[Lease] = []
        try:
            if self._pool().checkedin():
                await self._take(taken)  # nothing in it waits
            else:
                await finish(self._take(taken))
        except BaseException:
            if taken:
                await finish(self.release(taken[0], tidy=False))
            else:
                self._gate.release()
            raise
        return taken[0]

    async def _enter(self) -> None:
        if not self._gate.locked():
            await self._gate.acquire()
            return
        limit = self._config.pool_timeout
        try:
            async with asyncio.timeout(limit):
                await self._gate.acquire()
        except TimeoutError as exc:
            raise PoolTimeoutError(
                f"all {self._most} connections were in use for {limit:g} s: raise pool_size "
                f"({self._config.pool_size}) or max_overflow ({self._config.max_overflow}), or "
                "wait longer with pool_timeout"
            ) from exc

    async def _take(self, taken: list[Lease]) -> None:
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
            if not self._dialect.is_lost(driver):
                taken.append(Lease(self._dialect, connection, driver))
                self._held.add(taken[0])
                return
            # The server was started again since it was last used.
            await connection.invalidate()
            await connection.close()
        raise UnavailableError("every new connection was lost at once")

    def _connect_error(self, exc: SQLAlchemyError) -> StorageError:
        original = getattr(exc, "orig", None)
        if isinstance(original, self._dialect.driver_errors):
            return self._dialect.translate(original, doing="connect", writes=False)
        return UnavailableError(f"cannot connect: {exc}")

    async def release(self, lease: Lease, *, tidy: bool) -> None:
        """Give a connection back; one that is in doubt is looked at, and perhaps thrown away."""
        try:
            if not lease.killed:
                if tidy and not await self._is_tidy(lease):
                    await self._discard(lease)
                if self._pool().overflow() > 0:
                    await finish(lease.connection.close())
                else:
                    await lease.connection.close()
        finally:
            if lease in self._held:
                self._held.discard(lease)
                self._gate.release()

    async def _discard(self, lease: Lease) -> None:
        with suppress(*self._dialect.driver_errors):
            await self._dialect.discard(lease.driver)
        await lease.connection.invalidate()

    async def _is_tidy(self, lease: Lease) -> bool:
        if lease.doubtful:
            return False
        try:
            return await self._dialect.tidy(lease.driver)
        except self._dialect.driver_errors:
            return False

    def figures(self) -> dict[str, int]:
        """Of the pool: how many connections it may have, has, and has lent."""
        pool = self._pool()
        return {
            "most": self._most,
            "open": pool.checkedin() + pool.checkedout(),
            "in_use": len(self._held),
        }

    def _pool(self) -> QueuePool:
        return cast("QueuePool", self._engine.pool)

    async def close(self) -> None:
        """Close every connection, those in use, too; a commit that is under way ends first."""
        self._closed = True
        for lease in list(self._held):
            await lease.ended.wait()
            lease.killed = True
            await self._discard(lease)
            await lease.connection.close()
        await self._engine.dispose()
