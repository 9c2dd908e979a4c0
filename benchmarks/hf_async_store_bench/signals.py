"""How a long run ends before its time, with everything that it started."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine


async def run_to_completion(work: Coroutine[None, None, int]) -> int:
    """The exit code of a run. SIGTERM ends it as Ctrl-C does: with everything cleaned up."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    terminated = asyncio.Event()

    def end() -> None:
        terminated.set()
        task.cancel()

    try:
        loop.add_signal_handler(signal.SIGTERM, end)
    except (ValueError, RuntimeError, NotImplementedError):
        return await task  # not in the main thread: whoever runs the loop decides
    try:
        return await task
    except asyncio.CancelledError:
        if not terminated.is_set():
            raise
        return 128 + signal.SIGTERM
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
