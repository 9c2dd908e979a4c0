"""Long work, during which the event loop runs other tasks: in pieces, or in a thread."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Sized
from contextlib import contextmanager
from functools import cache, partial
from heapq import heappop, heappush
from itertools import count, islice
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Final, Generic, ParamSpec, Protocol, Self, TypeAlias, TypeVar
from weakref import WeakKeyDictionary, ref

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor
    from contextvars import Context

Item = TypeVar("Item")
Result = TypeVar("Result")
Parameters = ParamSpec("Parameters")

Garbage: TypeAlias = "dict[Any, Any] | list[Any]"

_ITERATION_SECONDS: Final = 0.001
"""How long each iteration of the event loop is held by pieces of long work, before the last of them."""

_SHORT_PIECES: Final = 8
"""The maximum number of pieces in an iteration, if they are short."""

_YIELD_SECONDS: Final = 1e-5
"""The shortest sleep of a thread; with Linux, it takes 60 us."""

_FREE_ITEMS: Final = 32
_FREE_ENTRIES: Final = 512


@cache
def _worker() -> ThreadPoolExecutor:
    """The thread that computes for all event loops of this process.

    It is only one, because the threads and the event loop take turns: with each further one, the event loop
    would wait longer for its own. It is not from the default executor of the loop, whose threads may all
    wait for the result of a query.
    """
    # Imported here, because most commands of the command line need no thread.
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(1, thread_name_prefix="hf-async-store")


os.register_at_fork(
    after_in_child=_worker.cache_clear
)  # a child has no other threads than its main one


async def computed(work: Callable[[], Result], *, long: bool) -> Result:
    """The result of a pure function; of one that takes long, from a thread.

    A thread gives the interpreter back to the event loop every 5 ms. If the caller is cancelled, the
    thread completes what it has begun, which has no effect.
    """
    if not long:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_worker(), work)


async def in_thread(
    work: Callable[Parameters, Result], *args: Parameters.args, **options: Parameters.kwargs
) -> Result:
    """Call a function that blocks in a thread, as `asyncio.to_thread` does.

    The thread is a new one, and ends with the call: those of the default executor may all wait for the
    result of a call of the store, and threads that are kept would outlive the stores.
    """
    return await begun_in_thread(partial(work, *args, **options))


def begun_in_thread(work: Callable[[], Result]) -> asyncio.Future[Result]:
    """As `in_thread`, for a caller that does something else meanwhile. No task waits for the thread, so
    the future may be abandoned."""
    with one_thread() as run:
        return run(work)


def let_event_loop_run() -> None:
    """Called every 1 or 2 ms by a thread that computes: an event loop that waits for the interpreter lock
    gets it now.

    Otherwise it waits for up to 5 ms (`sys.getswitchinterval`), after each of several system calls of an
    iteration. A sleep of 0 seconds would end before the event loop has woken up.
    """
    sleep(_YIELD_SECONDS)


class RunInThread(Protocol):
    """Begins a call of a function that blocks."""

    def __call__(self, work: Callable[..., Result], *args: object) -> asyncio.Future[Result]: ...


@contextmanager
def one_thread() -> Iterator[RunInThread]:
    """A thread for several calls, one after another. It ends after the last of them.

    The event loop is held until a thread has started, so a thread for each call would hold it again and
    again, on a busy machine for milliseconds.
    """
    from concurrent.futures import ThreadPoolExecutor

    threads = ThreadPoolExecutor(1, thread_name_prefix="hf-async-store-file")
    try:
        yield partial(asyncio.get_running_loop().run_in_executor, threads)
    finally:
        threads.shutdown(wait=False)


class Continuation:
    """What one task awaits, until a callback of the event loop calls `end`, which continues the task at
    once. A future, which continues it in the next iteration, is measurably slower in a small commit.

    It has the methods of a future that a task calls. A subclass adds `cancel`, which must not call `end`,
    since the current task may be another.
    """

    __slots__ = ("_asyncio_future_blocking", "_continue", "_loop", "is_ended")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._asyncio_future_blocking = False
        self._continue: Callable[[], object] | None = None
        self.is_ended = False

    def __await__(self) -> Generator[object, None, None]:
        if not self.is_ended:
            self._asyncio_future_blocking = True
            yield self

    def end(self) -> None:
        self.is_ended = True
        following = self._continue
        self._continue = None  # it refers to this object
        if following is not None:
            following()

    # -- called by the task ------------------------------------------------------------------

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def add_done_callback(self, callback: Callable[[Any], object], *, context: Context) -> None:
        self._continue = partial(context.run, callback, self)

    def result(self) -> None:
        """Nothing is raised in the task."""


class LongWork:
    """Work of an event loop that is divided into pieces; see `long_work`.

    Each iteration of the loop has some milliseconds for pieces, however many tasks have such work: with one
    of each, an iteration would be the longer the more tasks there are. They take turns, in the order in
    which they began to wait.
    """

    __slots__ = ("__weakref__", "_end", "_numbers", "_scheduled", "_waiting", "_woken")

    def __init__(self) -> None:
        # Of the time in this iteration; None: it has had no piece yet.
        self._end: float | None = None
        self._scheduled = False  # `_next_iteration` will be called in the next iteration
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []  # a heap, by number
        self._woken = False  # some that waited were woken, and the time is theirs
        self._numbers = count()

    async def pause(self) -> None:
        """Called after each piece: the event loop runs other tasks, and other long work."""
        if not self._waiting:
            await asyncio.sleep(0)  # takes one iteration, what follows two
            if not self._waiting and self._may_continue():
                return
        loop = asyncio.get_running_loop()
        number = next(self._numbers)
        while True:
            turn: asyncio.Future[None] = loop.create_future()
            heappush(self._waiting, (number, turn))
            self._schedule()
            await turn
            if self._may_continue(woken=True):
                return

    async def pause_if_due(self) -> None:
        """As `pause`, if long work has taken its time in this iteration: for pieces that take different
        times, and before the first one."""
        if not self._may_continue():
            await self.pause()

    def _may_continue(self, *, woken: bool = False) -> bool:
        if self._end is not None:
            return monotonic() < self._end
        if self._woken and not woken:
            return False
        self._end = monotonic() + _ITERATION_SECONDS
        self._schedule()
        return True

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._next_iteration)

    def _next_iteration(self) -> None:
        self._end, self._scheduled = None, False
        woken = 0
        while self._waiting and woken < _SHORT_PIECES:
            _, turn = heappop(self._waiting)
            if not turn.done():  # as it is after a cancellation
                turn.set_result(None)
                woken += 1
        # They run in the next iteration. Otherwise those that come in this one, such as the tasks that
        # have just received a response, would have the time of each iteration before them.
        self._woken = woken > 0
        if self._woken:
            self._schedule()


_BY_LOOP: Final[WeakKeyDictionary[asyncio.AbstractEventLoop, ref[LongWork]]] = WeakKeyDictionary()
"""Weak, because what waits references the loop, which may have been closed. The loop references its long
work while there is any."""


def long_work() -> LongWork:
    """The long work of the event loop that runs."""
    loop = asyncio.get_running_loop()
    known = _BY_LOOP.get(loop)
    work = None if known is None else known()
    if work is None:
        work = LongWork()
        _BY_LOOP[loop] = ref(work)
    return work


def pause() -> Coroutine[Any, Any, None]:
    """See `LongWork.pause`."""
    return long_work().pause()


async def reclaim(garbage: Garbage) -> None:
    """Empty a container in small steps: in one step it would block the event loop."""
    work = long_work()
    while garbage:
        if isinstance(garbage, dict):
            for _ in range(min(len(garbage), _FREE_ENTRIES)):
                garbage.popitem()
        else:
            del garbage[-_FREE_ITEMS:]
        await work.pause_if_due()


class Chunks(Generic[Item]):
    """Iterates over items in lists of `size`: `async for chunk in Chunks(items, size)`.

    What is done with a chunk is a piece of long work: between two chunks, the event loop runs other tasks,
    and before the first of several, if long work has taken its time in this iteration. Items are taken only
    when their chunk is requested. This is not an async generator, because the event loop would have to
    close that in a separate task if the body of the loop raised an exception.
    """

    __slots__ = ("_is_long", "_items", "_size", "_state")

    def __init__(self, items: Iterable[Item], size: int) -> None:
        self._items = iter(items)
        self._size = size
        self._state = "new"
        self._is_long = isinstance(items, Sized) and len(items) > size

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Item]:
        if self._state == "started":
            await pause()
        elif self._is_long and self._state == "new":
            await long_work().pause_if_due()
        chunk = [] if self._state == "ended" else list(islice(self._items, self._size))
        if not chunk:
            raise StopAsyncIteration
        # After a short chunk there is no other: the loop ends without a further pause.
        self._state = "ended" if len(chunk) < self._size else "started"
        return chunk


async def computed_in_pieces(items: Iterable[Item], size: int) -> list[Item]:
    """The items of an iterable that computes them, `size` of them in each piece of long work."""
    work, found, remaining = long_work(), list[Item](), iter(items)
    await work.pause_if_due()
    while piece := list(islice(remaining, size)):
        found += piece
        await work.pause_if_due()
    return found
