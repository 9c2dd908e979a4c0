"""The other processes: how one is started, followed and ended, and what it does."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Final, Self

import msgspec

from hf_async_store_bench.demo.orchestrator import Orchestrator
from hf_async_store_bench.demo.plan import Plan
from hf_async_store_bench.demo.write_log import WriteLog
from hf_async_store_bench.processes import LineProcess

_READY: Final = "ready"
_GO: Final = b"go"
_WORKER: Final = ("hf_async_store_bench", "demo-worker")


class Worker:
    """A worker, as the demo sees it: use `start`, and always `end`."""

    def __init__(self, plan: Plan, process: LineProcess) -> None:
        self.plan = plan
        self.done = 0
        """How many requests it has completed."""
        self.midway = asyncio.Event()
        """It has done half of its part, or has ended."""
        self.killed = False
        self._process = process

    @classmethod
    async def start(cls, plan: Plan) -> Self:
        """Start one. It waits for `go`."""
        errors = Path(plan.write_log).with_suffix(".errors")
        process = await LineProcess.start(_WORKER, errors)
        process.tell(msgspec.json.encode(plan))
        return cls(plan, process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ready(self) -> None:
        """Wait until it has opened its store, or has failed to."""
        await self._process.hear()

    def go(self) -> None:
        """Let it begin."""
        self._process.tell(_GO)

    async def follow(self) -> str | None:
        """Follow its progress to its end; returns what is wrong with that end, if anything."""
        while line := await self._process.hear():
            self.done = int(line)
            if self.done >= len(self.plan.sizes) / 2:
                self.midway.set()
        self.midway.set()
        code = await self._process.wait()
        if code == 0 or self.killed:
            return None
        return f"ended by itself with {code}: {self._process.last_words()}"

    def kill(self) -> None:
        """End it as a loss of power would: no handler of its own runs."""
        self.killed = self.killed or self._process.is_running
        self._process.kill()

    async def end(self) -> None:
        """Make sure that it is gone."""
        self._process.kill()
        await self._process.end()


async def work() -> int:
    """What a worker does; returns its exit code."""
    told = await _stdin()
    plan = msgspec.json.decode(await told.readline(), type=Plan)
    with WriteLog(Path(plan.write_log)) as write_log:
        async with plan.open() as store:
            # The first call opens for real; what it costs is no part of the work.
            await store.get_entity("templates", plan.counters[0])
            _say(_READY)
            if (await told.readline()).strip() != _GO:
                return 1
            orchestrator = Orchestrator(store, write_log, plan, lambda done: _say(str(done)))
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
