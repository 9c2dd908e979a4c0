"""The other processes: how one is started, followed and ended, and what it does.

A worker gets its plan over a pipe and notices when that closes: it never outlives the demo, however
that ends. It has a session of its own, so that Ctrl-C reaches the demo alone.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Final, cast

import msgspec

from hf_async_store.demo.ledger import Ledger
from hf_async_store.demo.orchestrator import Orchestrator
from hf_async_store.demo.plan import Plan

_READY: Final = "ready"
_GO: Final = b"go\n"
_TAIL: Final = 400


class Worker:
    """A worker, as the demo sees it: use `start`, and always `end`."""

    def __init__(self, plan: Plan, process: asyncio.subprocess.Process, errors: Path) -> None:
        self.plan = plan
        self.done = 0
        """How many requests it has brought to their end."""
        self.midway = asyncio.Event()
        """It has done half of its part, or has ended."""
        self.killed = False
        self._process = process
        self._stdin = cast("asyncio.StreamWriter", process.stdin)
        self._stdout = cast("asyncio.StreamReader", process.stdout)
        self._errors = errors

    @classmethod
    async def start(cls, plan: Plan) -> Worker:
        """Start one. It waits for `go`."""
        errors = Path(plan.ledger).with_suffix(".errors")
        with errors.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "hf_async_store.demo",
                "--worker",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
            )
        worker = cls(plan, process, errors)
        worker._tell(msgspec.json.encode(plan) + b"\n")
        return worker

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ready(self) -> None:
        """Wait until it has opened its store, or has failed to."""
        await self._heard()

    def go(self) -> None:
        """Let it begin."""
        self._tell(_GO)

    async def follow(self) -> str | None:
        """Follow its progress to its end; returns what is wrong with that end, if anything."""
        while line := await self._heard():
            self.done = int(line)
            if self.done >= len(self.plan.sizes) / 2:
                self.midway.set()
        self.midway.set()
        code = await self._process.wait()
        if code == 0 or self.killed:
            return None
        return f"ended by itself with {code}: {self._last_words()}"

    def kill(self) -> None:
        """End it as the power would: no handler of its own runs."""
        if self._process.returncode is None:
            self.killed = True
            self._process.kill()

    async def end(self) -> None:
        """Make sure that it is gone."""
        if self._process.returncode is None:
            self._process.kill()
        self._stdin.close()
        # To the end of its pipe, too: only then is everything about it released.
        await self._process.communicate()

    def _tell(self, line: bytes) -> None:
        if not self._stdin.is_closing():
            self._stdin.write(line)

    async def _heard(self) -> str:
        return (await self._stdout.readline()).decode().strip()

    def _last_words(self) -> str:
        return self._errors.read_text(errors="replace").strip()[-_TAIL:] or "it said nothing"


async def work() -> int:
    """What a worker does; returns its exit code."""
    told = await _stdin()
    plan = msgspec.json.decode(await told.readline(), type=Plan)
    with Ledger(Path(plan.ledger)) as ledger:
        async with plan.open() as store:
            # The first verb opens for real; what it costs is no part of the work.
            await store.get_entity("templates", plan.counters[0])
            _say(_READY)
            if await told.readline() != _GO:
                return 1
            orchestrator = Orchestrator(store, ledger, plan, lambda done: _say(str(done)))
            return await _until_alone(orchestrator, told)


async def _until_alone(orchestrator: Orchestrator, told: asyncio.StreamReader) -> int:
    """Run to the end, or until the demo is gone."""
    running = asyncio.create_task(orchestrator.run())
    alone = asyncio.create_task(told.read())
    await asyncio.wait({running, alone}, return_when=asyncio.FIRST_COMPLETED)
    alone.cancel()
    if running.done():
        await running
        return 0
    running.cancel()
    await asyncio.wait({running})
    return 1


async def _stdin() -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=2**24)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    return reader


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
