"""Long work, during which the event loop runs other tasks: in pieces, or in a thread."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import islice
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Generic, ParamSpec, Protocol, Self, TypeAlias, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

Item = TypeVar("Item")
Result = TypeVar("Result")
Parameters = ParamSpec("Parameters")

Garbage: TypeAlias = "dict[Any, Any] | list[Any]"

_STEP_SECONDS: Final = 0.004
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


class TimedSteps:
    """Divides long work whose pieces take different times: `await steps.pause()` after each piece.

    If the pieces since the last pause took some milliseconds, the event loop runs other tasks.
    """

    __slots__ = ("_end",)

    def __init__(self) -> None:
        self._end = monotonic() + _STEP_SECONDS

    async def pause(self) -> None:
        if monotonic() >= self._end:
            await asyncio.sleep(0)
            self._end = monotonic() + _STEP_SECONDS


async def reclaim(garbage: Garbage) -> None:
    """Empty a container in small steps: in one step it would block the event loop."""
    steps = TimedSteps()
    while garbage:
        if isinstance(garbage, dict):
            for _ in range(min(len(garbage), _FREE_ENTRIES)):
                garbage.popitem()
        else:
            del garbage[-_FREE_ITEMS:]
        await steps.pause()


class Chunks(Generic[Item]):
    """Iterates over items in lists of `size`: `async for chunk in Chunks(items, size)`.

    Between two chunks, the event loop runs other tasks. Items are taken only when their chunk is
    requested. This is not an async generator, because the event loop would have to close that in a
    separate task if the body of the loop raised an exception.
    """

    __slots__ = ("_items", "_size", "_state")

    def __init__(self, items: Iterable[Item], size: int) -> None:
        self._items = iter(items)
        self._size = size
        self._state = "new"

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Item]:
        if self._state == "started":
            await asyncio.sleep(0)
        chunk = [] if self._state == "ended" else list(islice(self._items, self._size))
        if not chunk:
            raise StopAsyncIteration
        # After a short chunk there is no other: the loop ends without a further pause.
        self._state = "ended" if len(chunk) < self._size else "started"
        return chunk
