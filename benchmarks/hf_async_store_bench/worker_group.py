"""The processes of one system under one load, as the harness sees them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from hf_async_store_bench import messages
from hf_async_store_bench.acked_writes import AckedByEntity, add_all
from hf_async_store_bench.processes import LineProcess

_PATIENCE_SECONDS: Final = 600.0
_END_SECONDS: Final = 10.0


class SkippedError(Exception):
    """It cannot be measured here, by what it is or what is missing; that is no failure of it."""


class BrokenError(Exception):
    """A worker ended, or never answered."""


@dataclass(eq=False)
class WorkerGroup:
    """Use `fill` unless its environment is filled, then `start`, and always `end`. All but that raise
    SkippedError or BrokenError."""

    system: messages.SystemUnderTest
    environment: messages.Environment
    load: messages.Load
    seed: int
    _workers: list[LineProcess] = field(default_factory=list)

    async def fill(self) -> None:
        """Store the machines. No process is left, but of what lives in one."""
        first = await self._worker(0)
        answer = await self._ask(first, messages.Command(do="load"))
        if answer.apart:
            await self.end()
        elif self.load.processes > 1:
            raise SkippedError("its data is in the memory of one process")

    async def start(self) -> Self:
        """Have all processes open it."""
        if not self._workers:
            for index in range(self.load.processes):
                await self._worker(index)
        return await self.turn_to(self.load.workload)

    async def turn_to(self, workload: str) -> Self:
        """Begin a workload. One that wrote must be the last: verifying relies on what was filled."""
        for each in await self._ask_all(messages.Command(do="open", workload=workload)):
            if each.skipped is not None:
                raise SkippedError(each.skipped)
        return self

    async def run(self, seconds: float, rate: float | None = None) -> messages.RoundStats:
        """One round, in all processes at once; so many operations a second of all together, or as fast
        as they are answered."""
        each_rate = None if rate is None else rate / len(self._workers)
        answers = await self._ask_all(messages.Command(do="run", seconds=seconds, rate=each_rate))
        return messages.RoundStats.together(each.stats for each in answers)

    async def verify(self) -> messages.VerificationResult:
        """Stop the load, and compare what was acknowledged with what is there."""
        acked: AckedByEntity = {}
        for answer in await self._ask_all(messages.Command(do="stop")):
            add_all(acked, answer.acked)
        answer = await self._ask(self._workers[0], messages.Command(do="verify", acked=acked))
        return answer.verification

    async def measure(self, scenario: str, seconds: float) -> list[messages.Measurement]:
        command = messages.Command(do="scenario", workload=scenario, seconds=seconds)
        return (await self._ask(await self._worker(0), command)).measurements

    async def end(self) -> None:
        for each in self._workers:
            await each.end(_END_SECONDS)
        self._workers = []

    async def _worker(self, index: int) -> LineProcess:
        plan = messages.Plan(self.system, self.environment, self.load, index, self.seed)
        errors = Path(self.environment.folder).parent / "errors"
        first = messages.encode(plan)
        worker = await LineProcess.start("worker", first, errors, self.system.source)
        self._workers.append(worker)
        return worker

    async def _ask_all(self, command: messages.Command) -> list[messages.Answer]:
        return await asyncio.gather(*(self._ask(each, command) for each in self._workers))

    async def _ask(self, worker: LineProcess, command: messages.Command) -> messages.Answer:
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS + 2 * command.seconds):
                line = await worker.ask(messages.encode(command))
        except TimeoutError as exc:
            raise BrokenError(f"no answer to {command.do!r} within the time") from exc
        if not line:
            raise BrokenError(f"ended by itself: {worker.last_words()}")
        answer = messages.decode(line, messages.Answer)
        if answer.refused is not None:
            raise BrokenError(answer.refused)
        return answer
