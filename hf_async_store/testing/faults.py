"""Faults of an engine for tests of applications: a write that fails, and one whose answer is lost."""

from __future__ import annotations

from collections import deque
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

from msgspec import Struct

from hf_async_store.errors import StorageError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Coroutine, Sequence
    from contextlib import AbstractAsyncContextManager

    from hf_async_store.changes import Change, Outcome, TakeChanges
    from hf_async_store.driver import Engine, Isolation, Session
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.values import Key


class _Fault(Struct, frozen=True):
    """The error of a write, and whether the write is executed all the same."""

    error: StorageError
    executed: bool


class Faults:
    """Faults of the next writes of a store; each is met once, in order.

    A write is one request to the engine or one commit: the changes of a batch fail together, and so do
    those of tasks that share a commit. A transaction fails at its end. Claiming, renewing and releasing
    are no writes in this sense; what is changed under a claim is, and so is what it is finished with.
    Statements and conditions in the language of the engine (`execute_with_lock`, `condition_expression`)
    do not meet faults.
    """

    def __init__(self, store: StorageStrategy) -> None:
        self._faults: deque[_Fault] = deque()
        store._use_engine(cast("Engine", _FaultyEngine(store.engine, self)))

    @property
    def pending(self) -> int:
        """The number of faults that no write has met yet."""
        return len(self._faults)

    def fail_next_write(self, error: StorageError | None = None) -> None:
        """Let the next write fail before anything is written.

        Args:
            error: by default, UnavailableError, which is `retryable`.
        """
        failure = UnavailableError("the engine is not available: a fault of the test")
        self._faults.append(_Fault(error or failure, executed=False))

    def lose_next_answer(self) -> None:
        """Let the next write succeed, but raise UnavailableError with `outcome_unknown`."""
        lost = "the connection was lost before the engine answered: a fault of the test"
        error = UnavailableError(lost, retryable=False, outcome_unknown=True)
        self._faults.append(_Fault(error, executed=True))

    @asynccontextmanager
    async def _around_write(self) -> AsyncGenerator[None, None]:
        """The context in which a write is executed."""
        fault = self._faults.popleft() if self._faults else None
        if fault is None:
            yield
            return
        if fault.executed:
            yield
        raise fault.error.copy()


class _FaultyEngine:
    """An engine with faults: what writes is below, everything else is that of the engine."""

    def __init__(self, engine: Engine, faults: Faults) -> None:
        self._engine = engine
        self._faults = faults

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        async with self._faults._around_write():
            return await self._engine.write_each(changes)

    async def write_unblocked(self, take: TakeChanges) -> list[Outcome]:
        async with self._faults._around_write():
            return await self._engine.write_unblocked(take)

    def write_cancellable(
        self, changes: Sequence[Change]
    ) -> Coroutine[Any, Any, list[Outcome]] | None:
        # `write_unblocked` fails then.
        return None if self._faults._faults else self._engine.write_cancellable(changes)

    async def write_claimed(self, token: int, change: Change, *, ends: bool) -> int:
        async with self._faults._around_write():
            return await self._engine.write_claimed(token, change, ends=ends)

    def session(self, isolation: Isolation | None) -> AbstractAsyncContextManager[Session]:
        return self._committed(self._engine.session(isolation))

    def retried_session(self, isolation: Isolation | None) -> AbstractAsyncContextManager[Session]:
        return self._committed(self._engine.retried_session(isolation))

    def claimed_session(
        self, key: Key, token: int, *, ends: bool = False
    ) -> AbstractAsyncContextManager[Session]:
        return self._committed(self._engine.claimed_session(key, token, ends=ends))

    @asynccontextmanager
    async def _committed(
        self, context: AbstractAsyncContextManager[Session]
    ) -> AsyncGenerator[Session, None]:
        async with AsyncExitStack() as write, context as session:
            observed = _ObservedSession(session)
            yield cast("Session", observed)
            if observed.written:
                # Entered last and left last: around the commit alone.
                await write.enter_async_context(self._faults._around_write())


class _ObservedSession:
    """A session that records what is written in it."""

    def __init__(self, session: Session, written: list[Change] | None = None) -> None:
        self._session = session
        self.written: list[Change] = [] if written is None else written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    async def write(self, changes: Sequence[Change]) -> list[Outcome]:
        self.written += changes
        return await self._session.write(changes)

    @asynccontextmanager
    async def savepoint(self) -> AsyncGenerator[Session, None]:
        async with self._session.savepoint() as session:
            yield cast("Session", _ObservedSession(session, self.written))
