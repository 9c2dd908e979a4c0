"""Transactions: the async context-manager protocol that every strategy shares.

`TransactionManager` begins them for one store and knows which task is inside what, so that a verb
that would wait for itself is refused instead. `Transaction` is a repository over an engine's
session: it orders the verbs of several tasks, dooms itself when a change fails, and leaves commit
and rollback to the session's own context.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from operator import attrgetter
from types import TracebackType
from typing import Final, Self, TypeVar, cast

from hf_async_store.changes import ANY, PRESENT, Change, Delete, Outcome, Record
from hf_async_store.driver import Session
from hf_async_store.errors import (
    ConcurrencyConflictError,
    EntityNotFoundError,
    EventLoopMismatchError,
    StorageError,
    TransactionAbortedError,
    TransactionClosedError,
    TransactionReentryError,
)
from hf_async_store.query import Query
from hf_async_store.repository import RepositoryInterface, operation_timeout
from hf_async_store.schema import Schema
from hf_async_store.values import Key, utc_now

Result = TypeVar("Result")

_KEY: Final = attrgetter("key")


class TransactionManager:
    """Which task is inside which transaction or acquired lock of one store."""

    def __init__(self) -> None:
        self._inside: dict[asyncio.Task[object], str] = {}

    def refuse_reentry(self) -> None:
        """Refuse a verb of the store that its own task would wait for.

        Raises:
            TransactionReentryError.
        """
        if self._inside:
            task = asyncio.current_task()
            what = None if task is None else self._inside.get(task)
            if what is not None:
                raise TransactionReentryError(
                    f"this task is inside {what} of this store, and the call would wait for itself"
                )

    def enter(self, what: str) -> Callable[[], None]:
        """Note that the current task is inside `what`; returns the function that ends it.

        Raises:
            TransactionReentryError: it is inside something already.
        """
        self.refuse_reentry()
        task = asyncio.current_task()
        if task is None:
            raise TransactionClosedError("a transaction needs a running task")
        self._inside[task] = what

        def leave() -> None:
            self._inside.pop(task, None)

        return leave


class Transaction(RepositoryInterface):
    """Everything written in it lands at its end, or nothing does.

    Use it as an async context manager: leaving it commits, leaving it by an exception rolls it
    back, and that exception comes out. Verbs awaited by several tasks at once run one by one.

    Raises, at its end:
        TransactionAbortedError: a change in it had failed; nothing was written.
        ConcurrencyConflictError: it lost a race against others; nothing was written. Retryable.
        TransactionTooLargeError: beyond what the engine takes; nothing was written.
        StorageError with `outcome_unknown`: the answer to the commit was lost.
    """

    def __init__(
        self,
        schema: Schema,
        context: AbstractAsyncContextManager[Session],
        *,
        enter: Callable[[], Callable[[], None]],
        parent: Transaction | None = None,
    ) -> None:
        super().__init__(schema)
        self._context = context
        self._enter = enter
        self._parent = parent
        self._leave: Callable[[], None] | None = None
        self._session: Session | None = None
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: BaseException | None = None
        self._inner: Transaction | None = None
        self._turn: asyncio.Lock = asyncio.Lock() if parent is None else parent._turn
        self._seen: dict[Key, int | None] = {} if parent is None else dict(parent._seen)

    def begin_transaction(self) -> Self:
        """A nested transaction: a savepoint that can be rolled back alone.

        Until it ends, only its own verbs may be used.
        """
        session = self._usable()
        return type(self)(
            self._schema, session.savepoint(), enter=lambda: lambda: None, parent=self
        )

    async def conditional_update(
        self,
        collection: str,
        entity_id: str,
        fields: Mapping[str, object],
        *,
        timeout: float | None = None,
    ) -> int:
        """`update_entity` that also fails if the entity changed since this transaction read it.

        Raises:
            EntityNotFoundError: it is not there, or was not when this transaction read it.
            ConcurrencyConflictError: it changed since. Retryable.
        """
        declared = self._schema[collection]
        key = declared.key_of(entity_id)
        seen = self._seen.get(key, ANY)
        if seen is None:
            raise EntityNotFoundError(collection, key.id)
        change = self._patch(declared, key.id, fields, PRESENT if seen is ANY else seen, utc_now())
        try:
            version = await self._one(change, timeout)
        except ConcurrencyConflictError as exc:
            exc.retryable = True
            raise
        assert version is not None, "only a delete has no version"
        return version

    # -- the protocol ------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._session is not None or self._closed:
            raise TransactionClosedError("a transaction can be entered once")
        parent = self._parent
        if parent is not None:
            parent._usable()
        self._loop = asyncio.get_running_loop()
        leave = self._enter()
        try:
            async with self._turn:
                self._session = await self._context.__aenter__()
        except BaseException:
            leave()
            raise
        self._leave = leave
        if parent is not None:
            parent._inner = self
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._refuse_other_loop()
        self._closed = True
        own = await self._last_turn() or (self._aborted() if exc is None else None)
        ending = own or exc
        try:
            await self._context.__aexit__(
                None if ending is None else type(ending),
                ending,
                None if ending is None else ending.__traceback__,
            )
        except BaseException as failure:
            if failure is not ending:
                self._spread(failure)
                raise
        finally:
            self._turn.release()
            self._end()
        if own is not None:
            raise own

    async def _last_turn(self) -> asyncio.CancelledError | None:
        """Wait for verbs of other tasks to end, whatever happens: the session must be left.

        Returns the cancellation that came meanwhile; it then rolls the transaction back.
        """
        cancelled: asyncio.CancelledError | None = None
        while True:
            try:
                await self._turn.acquire()
            except asyncio.CancelledError as exc:
                cancelled = exc
            else:
                return cancelled

    def _aborted(self) -> TransactionAbortedError | None:
        if self._inner is not None:
            self._failure = TransactionClosedError("a nested transaction is still open")
        if self._failure is None:
            return None
        unknown = isinstance(self._failure, StorageError) and self._failure.outcome_unknown
        what = "it is not known what was written" if unknown else "nothing was written"
        error = TransactionAbortedError(
            f"{what}, because a change in this transaction failed: {self._failure}",
            outcome_unknown=unknown,
        )
        error.__cause__ = self._failure
        return error

    def _spread(self, failure: BaseException) -> None:
        """A savepoint that could not be left properly leaves its parent undefined."""
        if self._parent is not None:
            self._parent._failure = failure

    def _end(self) -> None:
        if self._parent is not None:
            self._parent._inner = None
            if self._failure is None:
                self._parent._seen.update(self._seen)
        if self._leave is not None:
            self._leave()

    def _usable(self) -> Session:
        if self._closed:
            raise TransactionClosedError("this transaction has ended")
        if self._session is None:
            raise TransactionClosedError("this transaction was not entered (use `async with`)")
        self._refuse_other_loop()
        if self._inner is not None:
            raise TransactionReentryError(
                "a nested transaction is open; use its verbs until it ends"
            )
        if self._failure is not None:
            raise TransactionAbortedError(
                f"a change in this transaction failed: {self._failure}"
            ) from self._failure
        return self._session

    def _refuse_other_loop(self) -> None:
        if self._loop is not asyncio.get_running_loop():
            raise EventLoopMismatchError(
                "this transaction was begun in another event loop: use it there"
            )

    # -- primitives --------------------------------------------------------------------------

    @asynccontextmanager
    async def _step(self, timeout: float | None = None) -> AsyncGenerator[Session, None]:
        """One verb on the session; whatever goes wrong in it dooms the transaction."""
        self._usable()
        async with operation_timeout(timeout), self._turn:
            session = self._usable()
            try:
                yield session
            except BaseException as exc:
                self._failure = exc
                raise

    async def _retried(
        self, key: Key, attempt: Callable[[], Awaitable[Result]], seconds: float
    ) -> Result:
        return await attempt()

    async def _fetch(self, keys: Sequence[Key], timeout: float | None) -> list[Record | None]:
        async with self._step(timeout) as session:
            records = await session.fetch(keys)
        for key, record in zip(keys, records, strict=True):
            self._seen[key] = None if record is None else record.version
        return records

    async def _write(self, changes: Sequence[Change], timeout: float | None) -> list[Outcome]:
        async with self._step(timeout) as session:
            outcomes = await session.write(changes)
            if outcomes and isinstance(outcomes[-1], StorageError):
                raise outcomes[-1]
        # None of them is an error now; what a delete gives is the version that was.
        versions = cast("list[int | None]", outcomes)
        self._seen.update(zip(map(_KEY, changes), versions, strict=True))
        for each in changes:
            if type(each) is Delete:
                self._seen[each.key] = None
        return outcomes

    async def _select(self, query: Query) -> AsyncGenerator[Record, None]:
        # The turn is taken for each step and not for the whole walk: a caller may well write in
        # the body of its loop.
        async with self._step() as session:
            records = session.select(query)
        try:
            while True:
                async with self._step():
                    record = await anext(records, None)
                if record is None:
                    return
                yield record
        finally:
            await records.aclose()

    async def _count(self, query: Query) -> int:
        async with self._step() as session:
            return await session.count(query)
