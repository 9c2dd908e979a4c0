"""A process that does what it is told: load, open, run rounds, stop, verify. One line each."""

from __future__ import annotations

import gc
import os
import sys
from typing import Any

import msgspec

from hf_async_store_bench import resource_usage
from hf_async_store_bench.acked_writes import add_all
from hf_async_store_bench.adapters import fill
from hf_async_store_bench.load_generator import closed_loop, open_loop
from hf_async_store_bench.messages import Answer, Command, Plan, decode, encode
from hf_async_store_bench.processes import next_line
from hf_async_store_bench.workloads import WORKLOADS, Workload


class Worker:
    """One process's part of a plan; a method for each command."""

    _workload: Workload

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._type = plan.system.load()
        self._system: Any = None
        # A system that blocks does one after the other, however many wait; and each slot needs
        # at least one machine of its own.
        tasks = 1 if plan.system.blocking else plan.load.tasks
        self._slots = max(1, min(tasks, plan.load.entities // plan.load.processes))
        self._before = resource_usage.resident_bytes()

    async def scenario(self, command: Command) -> Answer:
        from hf_async_store_bench.scenarios import SCENARIOS

        plan = msgspec.structs.replace(self._plan, seconds=command.seconds)
        return Answer(measurements=await SCENARIOS[command.workload].measure(plan))

    async def end(self) -> None:
        if self._system is not None:
            system, self._system = self._system, None  # should closing fail, it is not tried again
            await system.close()

    async def load(self, command: Command) -> Answer:
        """Fill it. What lives in this process alone stays open."""
        self._system = await self._type.open(self._plan.environment)
        await fill(self._system, self._plan.load.entities, self._plan.load.size)
        apart = _is_apart(self._system)
        if apart:
            await self.end()
        return Answer(apart=apart)

    async def open(self, command: Command) -> Answer:
        """Begin a workload, unless it cannot be measured."""
        if self._system is None:
            self._system = await self._type.open(self._plan.environment)
        self._workload = WORKLOADS[command.workload](self._system, self._plan, self._slots)
        return Answer(skipped=self._workload.skipped())

    async def run(self, command: Command) -> Answer:
        work, retries = self._workload.one, self._workload.retries
        gc.collect()
        written, used = self._written(), resource_usage.processor_seconds()
        if command.rate is None:
            stats = await closed_loop(work, self._slots, command.seconds)
        else:
            stats = await open_loop(work, self._slots, command.seconds, command.rate)
        stats.processor = resource_usage.processor_seconds() - used
        after = self._written()
        stats.written = None if written is None or after is None else after - written
        stats.retries = self._workload.retries - retries
        stats.memory = resource_usage.resident_bytes() - self._before
        return Answer(stats=stats)

    def _written(self) -> int | None:
        """To disks, and to a server that does not tell what it wrote."""
        written = resource_usage.written_bytes()
        if self._plan.system.needs == "dynamodb" and written is not None:
            written += resource_usage.sent_bytes()
        return written

    async def stop(self, command: Command) -> Answer:
        """The first process stays open, and verifies what all have written."""
        if not self._plan.index:
            return Answer()
        await self.end()
        return Answer(acked=self._workload.acked)

    async def verify(self, command: Command) -> Answer:
        """In a freshly opened system, where that shows the same data."""
        acked = self._workload.acked
        add_all(acked, command.acked)
        if _is_apart(self._system):
            await self.end()
            self._system = await self._type.open(self._plan.environment)
        return Answer(verification=await self._workload.verify(self._system, acked))


def _is_apart(system: Any) -> bool:
    """Whether it can be opened elsewhere, too: of a store; all others have files or a server."""
    return getattr(system, "is_apart", True)


async def work() -> int:
    """The whole of a worker process; returns its exit code."""
    # What a driver or a competitor prints must not get among the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(answer: Answer) -> None:
        answers.write(encode(answer) + b"\n")
        answers.flush()

    worker: Worker | None = None
    try:
        worker = Worker(decode(await next_line(), Plan))
        while line := await next_line():
            command = decode(line, Command)
            say(await getattr(worker, command.do)(command))
    except Exception as exc:  # noqa: BLE001  # the harness tells it, whatever it is
        first = exc.exceptions[0] if isinstance(exc, ExceptionGroup) else exc
        say(Answer(refused=f"{type(first).__name__}: {first}"))
        return 1
    finally:
        if worker is not None:
            await worker.end()
    return 0
