"""How a long run ends before its time, with everything that it started."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def ended_by_sigterm() -> Iterator[Callable[[], bool]]:
    """Let SIGTERM end the run as Ctrl-C does: with everything cleaned up.

    The function tells whether it came.
    """
    task = asyncio.current_task()
    loop = asyncio.get_running_loop()
    came = asyncio.Event()

    def end() -> None:
        came.set()
        if task is not None:
            task.cancel()

    try:
        loop.add_signal_handler(signal.SIGTERM, end)
    except (ValueError, RuntimeError, NotImplementedError):
        yield came.is_set  # not in the main thread: whoever runs the loop decides
        return
    try:
        yield came.is_set
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
