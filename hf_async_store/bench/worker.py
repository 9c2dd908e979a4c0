"""A process that does what it is told: load, open, run rounds, stop, verify. One line each.

Every target is measured in processes of its own, so that processor time and memory are its alone
and nobody's garbage is another's pause. A worker ends when its input does: it never outlives the
harness.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from typing import TYPE_CHECKING, Final

import msgspec

from hf_async_store.bench import meter
from hf_async_store.bench.data import machine
from hf_async_store.bench.load import closed_loop, open_loop
from hf_async_store.bench.plan import Answer, Claim, Command, Plan, Tally
from hf_async_store.bench.targets import StoreTarget
from hf_async_store.bench.workloads import WORKLOADS, Workload

if TYPE_CHECKING:
    from hf_async_store.bench.targets import Target

_CHUNK: Final = 10_000


class Worker:
    """One process's part of a plan; a method for each command."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._type = plan.subject.load()
        self._target: Target | None = None
        self._workload: Workload | None = None
        load = plan.load
        # A target that blocks serves one after the other, however many ask; and each lane needs
        # at least one machine of its own.
        tasks = 1 if plan.subject.blocking else load.tasks
        self._lanes = max(1, min(tasks, load.entities // load.processes))
        self._before = meter.resident_bytes()

    async def answer(self, command: Command) -> Answer:
        match command.do:
            case "load":
                return await self._load()
            case "open":
                return await self._open(command.workload or self._plan.load.workload)
            case "run":
                return Answer(tally=await self._run(command))
            case "stop":
                return await self._stop()
            case "verify":
                return await self._verify(command)

    async def end(self) -> None:
        if self._target is not None:
            await self._target.close()

    async def _load(self) -> Answer:
        """Fill it. What lives in this process alone stays open."""
        target = await self._opened()
        apart = not isinstance(target, StoreTarget) or _is_apart(target)
        load = self._plan.load
        for start in range(0, load.entities, _CHUNK):
            numbers = range(start, min(load.entities, start + _CHUNK))
            await target.fill([machine(each, load.size) for each in numbers])
        if apart:
            await target.close()
        else:
            self._target = target
        return Answer(apart=apart)

    async def _open(self, workload: str) -> Answer:
        if self._target is None:
            self._target = await self._opened()
        self._workload = WORKLOADS[workload](self._target, self._plan, self._lanes)
        return Answer(left_out=self._workload.left_out())

    async def _run(self, command: Command) -> Tally:
        assert self._workload is not None, "open comes first"
        await self._workload.prepare()
        retries = self._workload.retries
        gc.collect()
        written, used = self._written(), meter.processor_seconds()
        if command.rate is None:
            tally = await closed_loop(self._workload, self._lanes, command.seconds)
        else:
            tally = await open_loop(self._workload, self._lanes, command.seconds, command.rate)
        tally.processor = meter.processor_seconds() - used
        after = self._written()
        tally.written = None if written is None or after is None else after - written
        tally.retries = self._workload.retries - retries
        tally.memory = meter.resident_bytes() - self._before
        return tally

    def _written(self) -> int | None:
        """To disks, and to a server that does not tell what it wrote."""
        written = meter.written_bytes()
        if self._plan.subject.place == "dynamodb" and written is not None:
            written += meter.sent_bytes()
        return written

    async def _stop(self) -> Answer:
        assert self._workload is not None, "open comes first"
        if self._plan.index:
            await self.end()
            self._target = None
        return Answer(claims=self._workload.claims if self._plan.index else {})

    async def _verify(self, command: Command) -> Answer:
        """In a freshly opened target, where that shows the same data."""
        assert self._workload is not None, "open comes first"
        assert self._target is not None, "open comes first"
        claims = self._workload.claims
        for name, other in command.claims.items():
            mine = claims.setdefault(name, Claim())
            mine.acknowledged += other.acknowledged
            mine.unknown += other.unknown
        if not isinstance(self._target, StoreTarget) or _is_apart(self._target):
            await self.end()
            self._target = None  # should opening fail, there is nothing to close
            self._target = await self._opened()
        return Answer(verdict=await self._workload.verify(self._target, claims))

    async def _opened(self) -> Target:
        return await self._type.open(self._plan.place)


def _is_apart(target: StoreTarget) -> bool:
    can = target.store.capabilities
    return can.durable or can.processes


async def work() -> int:
    """The whole of a worker process; returns its exit code."""
    # What a driver or a peer prints must not get among the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(answer: Answer) -> None:
        answers.write(msgspec.json.encode(answer) + b"\n")
        answers.flush()

    plan = msgspec.json.decode(await _line(), type=Plan)
    decoder = msgspec.json.Decoder(Command)
    try:
        worker = Worker(plan)
    except Exception as exc:  # noqa: BLE001  # as below
        say(Answer(refused=_told(exc)))
        return 1
    try:
        while line := await _line():
            try:
                answer = await worker.answer(decoder.decode(line))
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
