"""Driver calls that are not interrupted: as `run_to_completion`, without a task.

A task costs three turns of the event loop and a fifth of what a small statement costs in this process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
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
            if waited is not None:
                waited._asyncio_future_blocking = False  # it is not this task that waits for it
            cancelled = (yield from _ended(waited)) or cancelled
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


def _ended(
    waited: asyncio.Future[Any] | None,
) -> Generator[Any, None, asyncio.CancelledError | None]:
    """As `_done`, also if the caller is cancelled; returns the last cancellation."""
    cancelled: asyncio.CancelledError | None = None
    while True:
        try:
            yield from _done(waited)
        except asyncio.CancelledError as exc:
            cancelled = exc
        if waited is None or waited.done():
            return cancelled


def _done(waited: asyncio.Future[Any] | None) -> Generator[Any, None, None]:
    """Wait for a future, which a cancellation does not reach; None: for the next turn of the loop."""
    if waited is None:
        yield
        return
    done = waited.get_loop().create_future()

    def wake(_: asyncio.Future[Any]) -> None:
        if not done.done():
            done.set_result(None)

    waited.add_done_callback(wake)
    try:
        yield from done
    finally:
        # anyio cancels a task again in each turn of the loop.
        waited.remove_done_callback(wake)
