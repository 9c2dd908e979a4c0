"""An event loop in a background thread, which runs the calls of all other threads.

Each calling thread has one task in the event loop, which runs its calls one after another. So what the
async store binds to a task (an open transaction, a lock) belongs to a thread here.

A call is a turn that changes sides: the thread sends the call and waits; the event loop runs it, and
gives the turn back with the result, or with a function that the thread is to call meanwhile.
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import inspect
import os
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, Protocol, TypeVar

from hf_async_store.errors import (
    EventLoopMismatchError,
    InvalidInputError,
    StorageError,
    StoreClosedError,
)

if TYPE_CHECKING:
    from hf_async_store.strategy import StorageStrategy

Result = TypeVar("Result")

_END_SECONDS: Final = 5.0
"""How long the calls of other threads may take to end after the last store was closed."""

_CANCEL_SECONDS: Final = 1.0
"""How long an interrupted call may take to end: a shared commit that waits for a lock takes longer."""

_NO_POOLS: Final = "cannot schedule new futures after"
"""The message of Python if a pool of threads, such as that of the JSON engine, is used after the main
thread has ended."""


class _Call(Generic[Result]):
    """One call of a thread.

    Attributes:
        turn: held while it is the event loop's turn, and by nobody if it is the thread's.
        function: what the thread is to call before the call continues.
        reply: sets the result of `function` in the event loop.
    """

    cancelled = False
    ended = False
    result: Result | None = None
    error: BaseException | None = None
    function: Callable[[], object] | None = None
    reply: Callable[[], Any] | None = None

    def __init__(self, work: Callable[[], Awaitable[Result]]) -> None:
        self.work = work
        self.turn = threading.Lock()
        self.turn.acquire()

    # In the thread.

    def run_function(self) -> None:
        function, self.function = self.function, None
        assert function is not None
        try:
            result = function()
            if inspect.iscoroutine(result):
                result.close()
                raise InvalidInputError("the function must be a plain one, not async")
        except Exception as exc:  # noqa: BLE001 - it is raised where the function was asked for
            self.reply = _raising(exc)
        else:
            self.reply = lambda: result

    def outcome(self) -> Result:
        try:
            if isinstance(self.error, asyncio.CancelledError):
                raise StoreClosedError(
                    "the event loop of this store has ended", outcome_unknown=True
                ) from self.error
            if isinstance(self.error, RuntimeError) and _NO_POOLS in str(self.error):
                raise StoreClosedError(
                    "the main thread has ended; it must wait for the threads that use a store",
                    outcome_unknown=True,
                ) from self.error
            if self.error is not None:
                raise self.error
        finally:
            self.error = None  # its traceback refers to this call
        return self.result  # type: ignore[return-value]  # it may be None itself

    # In the event loop.

    def give_turn(self) -> None:
        if self.turn.locked():  # else the thread was interrupted before it took its turn
            self.turn.release()

    def end(self, error: BaseException | None = None) -> None:
        self.error = error
        self.ended = True
        self.give_turn()


def _raising(exc: Exception) -> Callable[[], Any]:
    def reply() -> None:
        raise exc

    return reply


async def _in_context(
    context: contextvars.Context, work: Callable[[], Awaitable[Result]]
) -> Result:
    """Await `work()` with the values of another context."""
    before = [(variable, variable.set(value)) for variable, value in context.items()]
    try:
        return await work()
    finally:
        for variable, token in before:
            variable.reset(token)


class Entered(Protocol):
    """A context that a thread has entered."""

    async def _leave(self, exc: BaseException | None) -> None:
        """Leave it in the event loop, by an exception of the thread if there is one."""


class Caller:
    """A thread that makes calls, and its task in the event loop."""

    def __init__(self, loop_thread: EventLoopThread) -> None:
        self._loop_thread = loop_thread
        self._task: asyncio.Task[None] | None = None
        self._inbox: deque[_Call[Any]] = deque()
        self._arrival: asyncio.Future[None] | None = None
        self._running: list[_Call[Any]] = []  # each is made by a function of the one before it
        self._is_ending = False

    # In the thread.

    def run(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """Await `work()` in the event loop, and wait for its result.

        An exception that a signal handler raises meanwhile, such as KeyboardInterrupt, cancels it, and
        propagates when `work` has ended, at the latest after `_CANCEL_SECONDS`.
        """
        if self._loop_thread.passes_context:
            work = partial(_in_context, contextvars.copy_context(), work)
        call = _Call(work)
        try:
            while not call.ended:
                self._loop_thread.send(self, call)
                call.turn.acquire()
                if call.function is not None:
                    call.run_function()
        except BaseException:
            self._loop_thread.cancel(self, call)
            while not call.ended and call.turn.acquire(timeout=_CANCEL_SECONDS):
                pass
            raise
        return call.outcome()

    # In the event loop.

    def receive(self, call: _Call[Any]) -> None:
        self._inbox.append(call)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._serve())
            self._task.add_done_callback(self._has_ended)
            self._loop_thread.callers.add(self)
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    def cancel(self, call: _Call[Any]) -> None:
        """Cancel a call whose thread was interrupted, in whatever state it is."""
        call.cancelled = True
        if call.ended:
            call.give_turn()
        elif call not in self._running:
            if call not in self._inbox:  # it was interrupted before it was sent
                call.end(asyncio.CancelledError())
        elif call is self._running[-1] and self._task is not None:
            self._task.cancel()

    def finish(self) -> asyncio.Task[None]:
        """End the task when its call has ended; returns the task, which has been started."""
        assert self._task is not None
        self._is_ending = True
        if not self._running:
            self._task.cancel()
        return self._task

    def end(self) -> None:
        """End the task, and cancel its call."""
        self._is_ending = True
        if self._task is not None:
            self._task.cancel()

    def _has_ended(self, task: asyncio.Task[None]) -> None:
        # Not at the end of the task, which may be cancelled before it starts.
        del task
        self._loop_thread.callers.discard(self)
        for each in self._inbox:
            each.end(asyncio.CancelledError())

    async def call_back(self, function: Callable[[], Result]) -> Result:
        """Let the thread call `function`, which may make further calls; returns its result."""
        call = self._running[-1]
        call.function = function
        call.give_turn()
        while not call.cancelled:
            received = await self._next()
            if received is call:
                assert call.reply is not None
                return call.reply()  # type: ignore[no-any-return]
            await self._run(received)
        raise asyncio.CancelledError  # the thread was interrupted in a call that `function` made

    async def _serve(self) -> None:
        while not self._is_ending:
            await self._run(await self._next())

    async def _next(self) -> _Call[Any]:
        while not self._inbox:
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        return self._inbox.popleft()

    async def _run(self, call: _Call[Any]) -> None:
        error: BaseException | None = None
        self._running.append(call)
        try:
            if call.cancelled:
                raise asyncio.CancelledError
            call.result = await call.work()
        except BaseException as exc:  # noqa: BLE001 - it is raised in the thread
            error = exc
        self._running.pop()
        task = asyncio.current_task()
        assert task is not None
        while task.cancelling():
            task.uncancel()
        call.end(error)


class EventLoopThread:
    """The event loop of the blocking stores of this process.

    It starts when the first store is opened and ends when the last one is closed.

    Attributes:
        passes_context: each call has the context variables of its thread, for the observer of a store.
    """

    _current: ClassVar[EventLoopThread | None] = None
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self) -> None:
        self.is_ending = False
        self.passes_context = False
        self.callers: set[Caller] = set()
        # In the order in which they were entered.
        self.entered: weakref.WeakKeyDictionary[Entered, None] = weakref.WeakKeyDictionary()
        self.sources: weakref.WeakSet[AsyncGenerator[Any, None]] = weakref.WeakSet()  # of streams
        self.stores: weakref.WeakSet[StorageStrategy] = weakref.WeakSet()
        self._users = 0
        self._forked = False
        self._has_ended = False
        self._submitted: deque[tuple[Caller, _Call[Any]]] = deque()
        self._wake_up_sent = False
        self._local = threading.local()
        self._loop = asyncio.new_event_loop()
        self._ending: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(
            target=self._main, name="hf-async-store-event-loop", daemon=True
        )

    @classmethod
    def acquire(cls, store: StorageStrategy) -> EventLoopThread:
        """The event loop, for one more store."""
        with cls._lock:
            current = cls._current
            if current is None:
                current = cls()
                current._thread.start()
                cls._current = current
            # Again for each store: at exit, this runs before what its strategy has registered.
            atexit.unregister(cls.abandon_all)
            atexit.register(cls.abandon_all)
            current._users += 1
            current.stores.add(store)
            return current

    def release(self, store: StorageStrategy) -> None:
        """End the event loop if no other store uses it, and wait until it has ended."""
        with self._lock:
            self.stores.discard(store)
            self._users -= 1
            if self._users:
                return
            EventLoopThread._current = None
        self.is_ending = True
        self.schedule(lambda: self._ending.set_result(None))
        self._thread.join()

    # -- in the calling threads --------------------------------------------------------------

    def caller(self) -> Caller:
        """The caller that is the current thread.

        Raises:
            EventLoopMismatchError: a call would block a running event loop, or this is a forked child.
            StoreClosedError: the event loop has ended.
        """
        if self._forked:
            raise EventLoopMismatchError(
                "this store was opened before a fork; open one in the child"
            )
        refuse_running_loop()
        if self.is_ending:
            raise StoreClosedError("this store was closed")
        try:
            return self._local.presence.caller  # type: ignore[no-any-return]
        except AttributeError:
            presence = self._local.presence = _Presence(Caller(self))
            return presence.caller

    def send(self, caller: Caller, call: _Call[Any]) -> None:
        """Pass a call, or the reply to its function, to the task of the caller.

        The first of the calls that are sent at the same time wakes the event loop, which costs a system
        call; the others only join the queue.
        """
        self._submitted.append((caller, call))
        if not self._wake_up_sent:
            self._wake_up_sent = True
            self.schedule(self._receive)
        if self._has_ended:
            self._refuse_submitted()

    def cancel(self, caller: Caller, call: _Call[Any]) -> None:
        def cancel() -> None:
            self._receive()  # the interrupt may have prevented the wake-up
            caller.cancel(call)

        self.schedule(cancel)
        if self._has_ended:
            call.end(asyncio.CancelledError())

    def schedule(self, function: Callable[[], object]) -> None:
        """Call `function` in the event loop, if it has not ended."""
        if not (self._forked or self._has_ended):
            with suppress(RuntimeError):  # it has been closed in this moment
                self._loop.call_soon_threadsafe(function)

    # -- in the thread of the event loop -----------------------------------------------------

    def _main(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve())
        finally:
            self.is_ending = True
            self._has_ended = True
            self._refuse_submitted()

    async def _serve(self) -> None:
        await self._ending
        tasks = [each.finish() for each in self.callers]
        if tasks:
            await asyncio.wait(tasks, timeout=_END_SECONDS)
            for each in self.callers:
                each.end()
            await asyncio.wait(tasks)
        await self._leave_contexts()

    async def _leave_contexts(self) -> None:
        """Leave the contexts and end the streams of threads that cannot do it any more.

        One after another, the inner ones first: `asyncio.Runner` would end all generators at once, and a
        context manager that is a generator could not leave another one that has ended already.
        """
        for each in reversed(tuple(self.entered)):
            with suppress(StorageError):
                await each._leave(asyncio.CancelledError())
        for source in tuple(self.sources):
            with suppress(StorageError):
                await source.aclose()

    async def let_callers_run(self) -> None:
        """Let the threads whose calls have just ended run, and receive the calls that they make.

        Without this, the threads form several groups, each of which shares a commit.
        """
        await asyncio.sleep(0)  # the tasks end the calls
        time.sleep(0)  # releases the GIL, for which the threads are waiting  # noqa: ASYNC251
        self._receive()
        await asyncio.sleep(0)  # the tasks start the new calls

    def _receive(self) -> None:
        self._wake_up_sent = False
        while self._submitted:
            caller, call = self._submitted.popleft()
            if self.is_ending and caller not in self.callers:
                call.end(asyncio.CancelledError())  # a new task might not be run to its end
            else:
                caller.receive(call)

    def _refuse_submitted(self) -> None:
        with suppress(IndexError):
            while True:
                self._submitted.popleft()[1].end(asyncio.CancelledError())

    # -- the end of the process --------------------------------------------------------------

    @classmethod
    def abandon_all(cls) -> None:
        """At exit: give up the stores that were not closed, so that nothing waits for them."""
        current = cls._current
        if current is None:
            return
        stopped = threading.Event()

        def stop() -> None:
            # Not ended: cancelled tasks would wait for locks, and report errors; so would streams if
            # they were freed.
            sources = list(current.sources)
            stopped.set()
            threading.Event().wait()
            del sources

        current.schedule(stop)
        stopped.wait(_END_SECONDS)
        for each in list(current.stores):
            each.abandon()
            message = f"unclosed store {each!r}: use `with`"
            warnings.warn(message, ResourceWarning, stacklevel=1, source=each)

    @classmethod
    def forget(cls) -> None:
        """In a forked child, which has no copy of the thread."""
        if cls._current is not None:
            cls._current._forked = True
        cls._current = None
        cls._lock = threading.Lock()


class _Presence:
    """Is freed when its thread ends: the task of the thread then ends, too."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller

    def __del__(self) -> None:
        self.caller._loop_thread.schedule(self.caller.end)


def refuse_running_loop() -> None:
    """Raise `EventLoopMismatchError` if the current thread runs an event loop."""
    # Not `get_running_loop`, whose exception takes as long as the rest of what a call does here.
    if asyncio._get_running_loop() is not None:
        raise EventLoopMismatchError(
            "a blocking call would stop the event loop that runs in this thread: use "
            "`hf_async_store.open_store` there"
        )


os.register_at_fork(after_in_child=EventLoopThread.forget)
