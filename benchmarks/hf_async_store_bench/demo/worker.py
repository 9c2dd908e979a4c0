"""The other processes: how one is started, followed and ended, and what it does."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

import msgspec

from hf_async_store_bench.demo.orchestrator import Orchestrator
from hf_async_store_bench.demo.plan import Plan
from hf_async_store_bench.demo.write_log import WriteLog
from hf_async_store_bench.processes import LineProcess, next_line

GO: Final = b"go"


@dataclass(eq=False)
class Worker:
    """A worker, as the demo sees it: use `start`, and always end its process."""

    plan: Plan
    process: LineProcess
    done: int = 0  # requests that it has completed
    midway: asyncio.Event = field(default_factory=asyncio.Event)  # half is done, or it has ended

    @classmethod
    async def start(cls, plan: Plan) -> Self:
        """Start one. It waits for `go`."""
        errors = Path(plan.write_log).with_suffix(".errors")
        first = msgspec.json.encode(plan)
        return cls(plan, await LineProcess.start("demo.worker", first, errors))

    async def follow(self) -> str | None:
        """Follow its progress to its end; returns what is wrong with that end, if anything."""
        while line := await self.process.hear():
            self.done = int(line)
            if self.done >= len(self.plan.sizes) / 2:
                self.midway.set()
        self.midway.set()
        code = await self.process.wait()
        if code == 0 or self.process.killed:
            return None
        return f"ended by itself with {code}: {self.process.last_words()}"


async def work() -> int:
    """What a worker does; returns its exit code."""
    plan = msgspec.json.decode(await next_line(), type=Plan)
    with WriteLog(Path(plan.write_log)) as write_log:
        async with plan.open() as store:
            # The first call opens for real; what it costs is no part of the work.
            await store.get_entity("templates", plan.templates[0])
            _say("ready")
            if (await next_line()).strip() != GO:
                return 1
            threading.Thread(target=_end_with_the_demo, daemon=True).start()
            await Orchestrator(store, write_log, plan, lambda done: _say(str(done))).run()
    return 0


def _end_with_the_demo() -> None:
    """Nothing more is told; the end of what is told is the end of the demo."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
