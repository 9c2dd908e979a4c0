"""Transactions, as async context managers; shared by all strategies.

`TransactionManager` records which task is inside which transaction of a store, so that a call that
would deadlock with its own transaction is rejected. `Transaction` is a repository on a session of an
engine: it runs the calls of several tasks one after another, aborts when a change fails, and leaves
commit and rollback to the context manager of the session.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Final, Self, TypeVar

from hf_async_store.changes import ANY, PRESENT, Change, Delete, Outcome, Patch, Put, Record
from hf_async_store.collector import GatheredObjects
from hf_async_store.conflict_retry import TransactionTicket
from hf_async_store.driver import Session
from hf_async_store.errors import (
    ConcurrencyConflictError,
    EntityNotFoundError,
    EventLoopMismatchError,
    InvalidInputError,
    StorageError,
    TransactionAbortedError,
    TransactionClosedError,
    TransactionReentryError,
)
from hf_async_store.event_loop import Chunks
from hf_async_store.field_operations import UpdateMap
from hf_async_store.lifetimes import Clock, Lifetimes
from hf_async_store.query import Query
from hf_async_store.repository import RepositoryInterface, new_version, operation_timeout
from hf_async_store.schema import Schema
from hf_async_store.slow_queries import SlowQueries
from hf_async_store.values import Entity, Key

if TYPE_CHECKING:
    from hf_async_store.changes_by_filter import ChangesByFilter
    from hf_async_store.models import Model
    from hf_async_store.typed import TypedRepository

Result = TypeVar("Result")

_CHUNK_SIZE: Final = 4096
"""How many versions are noted between two iterations of the event loop."""


class TransactionManager:
    """Records which task is inside which transaction, or holds which lock, of one store."""

    def __init__(self) -> None:
        self._inside: dict[asyncio.Task[object], str] = {}

    def refuse_reentry(self) -> None:
        """Raise `TransactionReentryError` for a call that would deadlock with its own transaction."""
        if self._inside:
            task = asyncio.current_task()
            what = None if task is None else self._inside.get(task)
            if what is not None:
                raise TransactionReentryError(
                    f"this task is inside {what} of this store, so the call would deadlock"
                )

    def enter(self, what: str) -> Callable[[], None]:
        """Record that the current task is inside `what`; returns the function that ends this.

        Raises:
            TransactionReentryError: it is already inside something.
        """
        self.refuse_reentry()
        task = asyncio.current_task()
        if task is None:
            raise TransactionClosedError("a transaction must be used in an asyncio task")
        self._inside[task] = what

        def leave() -> None:
            self._inside.pop(task, None)

        return leave


class Transaction(RepositoryInterface):
    """A transaction: all of its writes are committed at its end, or none.

    A read-only one refuses writes, and sees one snapshot in all its reads: the last commit, not the
    changes of a transaction around it. It waits for no writer and blocks none.

    Use it as an async context manager: leaving it commits, leaving it by an exception rolls it back
    and propagates the exception. Calls by several tasks at once run one after another.

    Raises, at its end:
        TransactionAbortedError: a change in it had failed; nothing was written.
        ConcurrencyConflictError: it conflicts with a concurrent one; nothing was written. Retryable.
        TransactionTooLargeError: it exceeds a limit of the engine; nothing was written.
        StorageError with `outcome_unknown`: no response to the commit was received.
    """

    def __init__(
        self,
        schema: Schema,
        session: Callable[[], AbstractAsyncContextManager[Session]],
        *,
        lifetimes: Lifetimes | None,
        clock: Clock,
        enter: Callable[[], Callable[[], None]],
        parent: Transaction | None = None,
        read_only: bool = False,
        ticket: TransactionTicket | None = None,
        after_commit: Callable[[], Awaitable[None]] | None = None,
        slow_queries: SlowQueries | None = None,
    ) -> None:
        super().__init__(schema, SlowQueries() if slow_queries is None else slow_queries)
        self._lifetimes, self._clock = lifetimes, clock
        self._read_only = read_only
        self._ticket = ticket
        self._new_session = session
        self._context: AbstractAsyncContextManager[Session] | None = None
        self._enter = enter
        self._parent = parent
        self._after_commit = after_commit
        self._has_written = False
        self._gathered = GatheredObjects()  # what is kept until its end
        self._leave: Callable[[], None] | None = None
        self._is_entered = False
        self._session: Session | None = None
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: BaseException | None = None
        self._inner: Transaction | None = None
        self._call_lock: asyncio.Lock = asyncio.Lock() if parent is None else parent._call_lock
        # By key, the version that was last read or written here; None: there was no entity.
        self._known_versions: dict[Key, int | None] = (
            {} if parent is None else dict(parent._known_versions)
        )

    def typed(self, model: type[Model]) -> TypedRepository[Model]:
        """As `StorageStrategy.typed`, in this transaction."""
        from hf_async_store.typed import TypedRepository

        return TypedRepository(self, model)

    def begin_transaction(self) -> Self:
        """A nested transaction: a savepoint that can be rolled back alone.

        Until it ends, only its own methods may be called.
        """
        self._check_usable()
        if self._read_only:
            raise InvalidInputError(
                "a read-only transaction has nothing to roll back, so it has no nested transactions"
            )
        return type(self)(
            self._schema,
            self._savepoint,
            lifetimes=self._lifetimes,
            clock=self._clock,
            enter=lambda: lambda: None,
            parent=self,
            slow_queries=self._slow_queries,
        )

    @asynccontextmanager
    async def _savepoint(self) -> AsyncGenerator[Session, None]:
        async with (await self._begin()).savepoint() as session:
            yield session

    async def conditional_update(
        self,
        collection: str,
        entity_id: str,
        fields: UpdateMap,
        *,
        timeout: float | None = None,
    ) -> int:
        """`update_entity` that also fails if the entity changed since this transaction read it.

        Raises:
            EntityNotFoundError: it does not exist, or did not when this transaction read it.
            ConcurrencyConflictError: it has changed since. Retryable.
        """
        declared = self._schema[collection]
        key = declared.key_of(entity_id)
        seen = self._known_versions.get(key, ANY)
        if seen is None:
            raise EntityNotFoundError(collection, key.id)
        expect = PRESENT if seen is ANY else seen
        change = self._patch(declared, key.id, fields, expect, self._clock.now())
        try:
            return new_version(await self._write((change,), timeout))
        except ConcurrencyConflictError as exc:
            exc.retryable = True
            raise

    # -- async context manager ---------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._is_entered or self._closed:
            raise TransactionClosedError("a transaction can be entered only once")
        parent = self._parent
        if parent is not None:
            parent._check_usable()
        self._loop = asyncio.get_running_loop()
        leave = self._enter()
        # By this task: an engine may record which task holds its locks. Another one may begin it.
        self._context = self._new_session()
        if parent is not None:
            try:
                async with self._call_lock:
                    await self._begin()
            except BaseException:
                leave()
                raise
        self._leave = leave
        self._is_entered = True
        if parent is not None:
            parent._inner = self
        return self

    async def _begin(self) -> Session:
        """The session, which the first call begins: until then, it holds no lock of the engine."""
        if self._session is None:
            assert self._context is not None, "the transaction has been entered"
            try:
                self._session = await self._context.__aenter__()
            except BaseException as exc:
                # Also if a nested transaction begins it: it cannot be begun again.
                self._failure = exc
                raise
        return self._session

    async def __aexit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        self._refuse_other_loop()
        self._closed = True
        own_error = await self._acquire_last() or (self._abort_error() if exc is None else None)
        error = own_error or exc
        try:
            if self._context is not None and self._session is not None:
                await self._context.__aexit__(
                    None if error is None else type(error),
                    error,
                    None if error is None else error.__traceback__,
                )
        except BaseException as failure:
            if failure is not error:
                self._fail_parent(failure)
                raise
        finally:
            self._call_lock.release()
            self._end()
        if own_error is not None:
            raise own_error
        if exc is None and self._has_written and self._after_commit is not None:
            await self._after_commit()

    async def _acquire_last(self) -> asyncio.CancelledError | None:
        """Wait until the calls of other tasks have ended, even if cancelled: the session must be ended.

        Returns the cancellation, if any, which then rolls the transaction back.
        """
        cancelled: asyncio.CancelledError | None = None
        while True:
            try:
                await self._call_lock.acquire()
            except asyncio.CancelledError as exc:
                cancelled = exc
            else:
                return cancelled

    def _abort_error(self) -> TransactionAbortedError | None:
        if self._inner is not None:
            self._failure = TransactionClosedError("a nested transaction is still open")
        if self._failure is None:
            return None
        unknown = isinstance(self._failure, StorageError) and self._failure.outcome_unknown
        outcome = "it is not known what was written" if unknown else "nothing was written"
        error = TransactionAbortedError(
            f"{outcome}, because a change in this transaction failed: {self._failure}",
            outcome_unknown=unknown,
        )
        error.__cause__ = self._failure
        return error

    def _fail_parent(self, failure: BaseException) -> None:
        """After a savepoint could not be ended, abort the parent: its state is undefined, too."""
        if self._parent is not None:
            self._parent._failure = failure

    def _end(self) -> None:
        if self._parent is not None:
            self._parent._inner = None
            self._parent._has_written |= self._has_written
            if self._failure is None:
                self._parent._known_versions.update(self._known_versions)
        if self._leave is not None:
            self._leave()

    def _check_usable(self) -> None:
        if self._closed:
            raise TransactionClosedError("this transaction has ended")
        if not self._is_entered:
            raise TransactionClosedError("this transaction has not been entered: use `async with`")
        self._refuse_other_loop()
        if self._inner is not None:
            raise TransactionReentryError(
                "a nested transaction is open; call its methods until it ends"
            )
        if self._failure is not None:
            raise TransactionAbortedError(
                f"a change in this transaction failed: {self._failure}"
            ) from self._failure

    def _refuse_other_loop(self) -> None:
        if self._loop is not asyncio.get_running_loop():
            raise EventLoopMismatchError(
                "this transaction was begun in another event loop: use it there"
            )

    # -- primitives --------------------------------------------------------------------------

    @asynccontextmanager
    async def _step(
        self, timeout: float | None = None, keys: Sequence[Key] = (), *, writes: bool = False
    ) -> AsyncGenerator[Session, None]:
        """One call of the session, which reads or writes `keys`; any error in it aborts the transaction."""
        self._check_usable()
        async with operation_timeout(timeout), self._call_lock:
            self._check_usable()
            try:
                if self._ticket is not None:
                    # Locks of a session that has begun would keep those before it in the queue waiting.
                    may_wait = self._session is None and not self._read_only
                    await self._ticket.enter(keys, writes=writes, may_wait=may_wait)
                yield await self._begin()
            except BaseException as exc:
                self._failure = exc
                raise

    async def _retried(
        self, key: Key, attempt: Callable[[], Awaitable[Result]], seconds: float
    ) -> Result:
        return await attempt()

    async def _create_absent(self, puts: Sequence[Put], timeout: float | None) -> list[bool]:
        # A create that fails would abort the transaction.
        records = await self._fetch([each.key for each in puts], timeout) if puts else []
        existing = {each.key for each in records if each is not None}
        created: list[bool] = []
        for put in puts:
            created.append(put.key not in existing)
            existing.add(put.key)
        absent = [put for put, is_new in zip(puts, created, strict=True) if is_new]
        await self._write_many(absent, timeout)
        return created

    async def _update_returning(
        self, patches: Sequence[Patch], timeout: float | None
    ) -> list[Entity | StorageError]:
        results = await super()._update_returning(patches, timeout)
        for each in results:
            if isinstance(each, StorageError):
                self._failure = each
                raise each
        return results

    async def _change_by_filter(self, changes: ChangesByFilter) -> None:
        await changes.run_in_transaction()

    async def _fetch(self, keys: Sequence[Key], timeout: float | None) -> list[Record | None]:
        async with self._step(timeout, keys) as session:
            records = self._living(await session.fetch(keys))
        async for chunk in Chunks(zip(keys, records, strict=True), _CHUNK_SIZE):
            for key, record in chunk:
                self._known_versions[key] = None if record is None else record.version
            self._gathered.add(len(chunk))
        return records

    async def _write(self, changes: Sequence[Change], timeout: float | None) -> list[Outcome]:
        if self._read_only:
            raise InvalidInputError("this transaction is read-only, so it cannot write")
        if self._lifetimes is not None:
            changes = await self._for_writing(changes, self._lifetimes, timeout)
        keys = [each.key for each in changes]
        async with self._step(timeout, keys, writes=True) as session:
            self._has_written = True
            # A copy, which the session may keep: the caller empties its own list.
            outcomes = await session.write([*changes])
            if outcomes and isinstance(outcomes[-1], StorageError):
                raise outcomes[-1]
        async for chunk in Chunks(zip(changes, outcomes, strict=True), _CHUNK_SIZE):
            for change, outcome in chunk:
                # None of them is an error; the outcome of a delete is the version that it deleted.
                if not isinstance(outcome, StorageError):
                    self._known_versions[change.key] = None if type(change) is Delete else outcome
            self._gathered.add(len(chunk))
        return outcomes

    def _select(self, query: Query) -> AsyncGenerator[Record, None]:
        return self._select_stored(self._living_query(query))

    async def _select_stored(self, query: Query) -> AsyncGenerator[Record, None]:
        # The lock is held for each item and not for the whole iteration, because the caller may write
        # in the body of its loop.
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
            return await session.count(self._living_query(query))

    async def _first_page(self, query: Query) -> Query:
        async with self._step() as session:
            return await session.first_page(query)
