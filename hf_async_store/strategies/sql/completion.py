"""Driver calls that are not interrupted: as `run_to_completion`, without a task.

A task costs three turns of the event loop and a fifth of what a small statement costs in this process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context
from types import coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


@coroutine
def completed(work: Coroutine[Any, Any, Result]) -> Generator[Any, None, Result]:
    """Await a driver call until it is done even if the caller is cancelled; then raise the cancellation.

    Args:
        work: awaits futures alone. What cancels its own task, as `asyncio.timeout` and task groups do,
            would have no effect before the next future is done.
    """
    cancelled: asyncio.CancelledError | None = None
    try:
        while True:
            waited = work.send(None)
            while True:
                try:
                    yield None if waited is None else _Uninterrupted(waited)
                except asyncio.CancelledError as exc:
                    cancelled = exc
                if waited is None or waited.done():
                    break
    except StopIteration as end:
        if cancelled is None:
            result: Result = end.value
            return result
    except GeneratorExit:
        raise
    except BaseException:
        if cancelled is None:
            raise
    finally:
        work.close()
    raise cancelled


class _Uninterrupted:
    """A future as the task that waits for it sees it: a cancellation of the task does not reach it, and is
    raised when the future is done.

    Not a future of its own that is done after the other one: that costs one more turn of the event loop.
    """

    __slots__ = ("_asyncio_future_blocking", "_future")

    def __init__(self, future: asyncio.Future[Any]) -> None:
        future._asyncio_future_blocking = False  # it is not the task that waits for it
        self._asyncio_future_blocking = True
        self._future = future

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._future.get_loop()

    def add_done_callback(
        self, callback: Callable[[_Uninterrupted], object], *, context: Context
    ) -> None:
        """Let the task go on when the future is done, whose result it is not asked for."""
        self._future.add_done_callback(lambda _: callback(self), context=context)

    def done(self) -> bool:
        return self._future.done()

    def result(self) -> None:
        """Nothing: the call that is completed takes the result, or the error, from the future."""

    def cancel(self, msg: object = None) -> bool:
        """False: the task raises the cancellation later."""
        del msg
        return False
