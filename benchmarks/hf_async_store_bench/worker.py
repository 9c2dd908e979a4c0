"""A process that does what it is told: load, open, run rounds, stop, verify. One line each.

Every system is measured in processes of its own, so that processor time and memory are its alone,
and one system's garbage collection is not another's pause.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from typing import TYPE_CHECKING, Final

from hf_async_store_bench import resource_usage
from hf_async_store_bench.acked_writes import AckedWrites
from hf_async_store_bench.adapters import StoreAdapter
from hf_async_store_bench.data import machine
from hf_async_store_bench.load_generator import closed_loop, open_loop
from hf_async_store_bench.messages import Answer, Command, Plan, RoundStats, decode, encode
from hf_async_store_bench.workloads import WORKLOADS, Workload

if TYPE_CHECKING:
    from hf_async_store_bench.adapters import Adapter

_CHUNK: Final = 10_000


class Worker:
    """One process's part of a plan; a method for each command."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._type = plan.system.load()
        self._system: Adapter | None = None
        self._workload: Workload | None = None
        load = plan.load
        # A system that blocks does one after the other, however many wait; and each slot needs
        # at least one machine of its own.
        tasks = 1 if plan.system.blocking else load.tasks
        self._slots = max(1, min(tasks, load.entities // load.processes))
        self._before = resource_usage.resident_bytes()

    async def answer(self, command: Command) -> Answer:
        match command.do:
            case "load":
                return await self._load()
            case "open":
                return await self._open(command.workload or self._plan.load.workload)
            case "run":
                return Answer(stats=await self._run(command))
            case "stop":
                return await self._stop()
            case "verify":
                return await self._verify(command)
            case "scenario":
                from hf_async_store_bench.scenarios import SCENARIOS

                return Answer(
                    measurements=await SCENARIOS[str(command.workload)].measure(self._plan)
                )

    async def end(self) -> None:
        if self._system is not None:
            await self._system.close()

    async def _load(self) -> Answer:
        """Fill it. What lives in this process alone stays open."""
        system = await self._opened()
        apart = not isinstance(system, StoreAdapter) or _is_apart(system)
        load = self._plan.load
        for start in range(0, load.entities, _CHUNK):
            numbers = range(start, min(load.entities, start + _CHUNK))
            await system.fill([machine(each, load.size) for each in numbers])
        if apart:
            await system.close()
        else:
            self._system = system
        return Answer(apart=apart)

    async def _open(self, workload: str) -> Answer:
        if self._system is None:
            self._system = await self._opened()
        self._workload = WORKLOADS[workload](self._system, self._plan, self._slots)
        return Answer(skipped=self._workload.skipped())

    async def _run(self, command: Command) -> RoundStats:
        assert self._workload is not None, "open comes first"
        await self._workload.prepare()
        retries = self._workload.retries
        gc.collect()
        written, used = self._written(), resource_usage.processor_seconds()
        if command.rate is None:
            stats = await closed_loop(self._workload, self._slots, command.seconds)
        else:
            stats = await open_loop(self._workload, self._slots, command.seconds, command.rate)
        stats.processor = resource_usage.processor_seconds() - used
        after = self._written()
        stats.written = None if written is None or after is None else after - written
        stats.retries = self._workload.retries - retries
        stats.memory = resource_usage.resident_bytes() - self._before
        return stats

    def _written(self) -> int | None:
        """To disks, and to a server that does not tell what it wrote."""
        written = resource_usage.written_bytes()
        if self._plan.system.needs == "dynamodb" and written is not None:
            written += resource_usage.sent_bytes()
        return written

    async def _stop(self) -> Answer:
        assert self._workload is not None, "open comes first"
        if self._plan.index:
            await self.end()
            self._system = None
        return Answer(acked=self._workload.acked if self._plan.index else {})

    async def _verify(self, command: Command) -> Answer:
        """In a freshly opened system, where that shows the same data."""
        assert self._workload is not None, "open comes first"
        assert self._system is not None, "open comes first"
        acked = self._workload.acked
        for name, other in command.acked.items():
            acked.setdefault(name, AckedWrites()).add(other)
        if not isinstance(self._system, StoreAdapter) or _is_apart(self._system):
            await self.end()
            self._system = None  # should opening fail, there is nothing to close
            self._system = await self._opened()
        return Answer(verification=await self._workload.verify(self._system, acked))

    async def _opened(self) -> Adapter:
        return await self._type.open(self._plan.environment)


def _is_apart(system: StoreAdapter) -> bool:
    can = system.store.capabilities
    return can.durable or can.multi_process


async def work() -> int:
    """The whole of a worker process; returns its exit code."""
    # What a driver or a competitor prints must not get among the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(answer: Answer) -> None:
        answers.write(encode(answer) + b"\n")
        answers.flush()

    plan = decode(await _line(), Plan)
    try:
        worker = Worker(plan)
    except Exception as exc:  # noqa: BLE001  # as below
        say(Answer(refused=_told(exc)))
        return 1
    try:
        while line := await _line():
            try:
                answer = await worker.answer(decode(line, Command))
            except Exception as exc:  # noqa: BLE001  # the harness tells it, whatever it is
                say(Answer(refused=_told(exc)))
                return 1
            say(answer)
    finally:
        await worker.end()
    return 0


def _told(exc: BaseException) -> str:
    if isinstance(exc, BaseExceptionGroup):
        return _told(exc.exceptions[0])
    return f"{type(exc).__name__}: {exc}"


async def _line() -> bytes:
    return await asyncio.to_thread(sys.stdin.buffer.readline)
