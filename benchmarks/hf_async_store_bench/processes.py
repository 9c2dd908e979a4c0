"""Processes of ours that are told what to do line by line; they never outlive who started them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Self, cast


class LineProcess:
    """Use `start`, and always `end`."""

    def __init__(self, process: asyncio.subprocess.Process, errors: Path) -> None:
        self._process = process
        self._errors = errors
        self._stdin = cast("asyncio.StreamWriter", process.stdin)
        self._stdout = cast("asyncio.StreamReader", process.stdout)
        self.pid = process.pid
        self.wait = process.wait
        self.killed = False

    @classmethod
    async def start(cls, role: str, first: bytes, errors: Path, source: str = "") -> Self:
        """Start a worker with a role that `__main__` knows, and tell it a first line. Its stderr goes to
        a file; a source comes first where modules are looked for."""
        paths = [source, str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        # PYTHONSAFEPATH: else the working directory would come before the source.
        changed = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-m", "hf_async_store_bench", role]
        with errors.open("ab") as stderr:
            pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE}
            how: dict[str, Any] = {**pipes, "limit": 2**28, "start_new_session": True}
            how["env"] = {**os.environ, **changed} if source else None
            process = await asyncio.create_subprocess_exec(*command, stderr=stderr, **how)
        started = cls(process, errors)
        started.tell(first)
        return started

    def tell(self, line: bytes) -> None:
        if not self._stdin.is_closing():
            self._stdin.write(line + b"\n")

    async def hear(self) -> bytes:
        """Its next line; empty once it has ended."""
        return (await self._stdout.readline()).strip()

    async def ask(self, line: bytes) -> bytes:
        """What it answers; empty if it has ended."""
        try:
            self.tell(line)
            await self._stdin.drain()
            return await self.hear()
        except ConnectionError:
            return b""

    def kill(self) -> None:
        """End it as a loss of power would: no handler of its own runs."""
        if self._process.returncode is None:
            self._process.kill()
            self.killed = True

    async def end(self, patience: float = 0.0) -> None:
        """Close its input, and kill it if it does not end by itself; nothing of it is left."""
        self._stdin.close()
        try:
            async with asyncio.timeout(patience):
                await self._process.wait()
        except TimeoutError:
            self.kill()
        # To the end of its pipe, too: only then is everything about it released.
        await self._process.communicate()

    def last_words(self) -> str:
        """The end of what it wrote to stderr."""
        said = self._errors.read_text(errors="replace") if self._errors.exists() else ""
        return said.strip()[-400:] or "it said nothing"


async def next_line() -> bytes:
    """In such a process, what it is told next; empty at the end."""
    return await asyncio.to_thread(sys.stdin.buffer.readline)


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
