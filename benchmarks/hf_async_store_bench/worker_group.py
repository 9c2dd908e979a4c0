"""The processes of one system under one load, as the harness sees them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final, cast

from hf_async_store_bench.acked_writes import AckedByEntity, AckedWrites
from hf_async_store_bench.messages import (
    Answer,
    Command,
    Environment,
    Load,
    Measurement,
    Plan,
    RoundStats,
    SystemUnderTest,
    VerificationResult,
    decode,
    encode,
)
from hf_async_store_bench.processes import LineProcess

_PATIENCE_SECONDS: Final = 600.0
_END_SECONDS: Final = 10.0
_WORKER: Final = ("hf_async_store_bench", "worker")


class SkippedError(Exception):
    """It cannot be measured here, by what it is or what is missing; that is no failure of it."""


class BrokenError(Exception):
    """A worker ended, or never answered."""


class WorkerGroup:
    """Use `fill` unless it is filled, then `start`, and always `end`."""

    def __init__(
        self,
        system: SystemUnderTest,
        environment: Environment,
        load: Load,
        seed: int,
        *,
        filled: bool = False,
    ) -> None:
        self.system = system
        self.environment = environment
        self.load = load
        self._seed = seed
        self._filled = filled
        self._workers: list[LineProcess] = []

    async def fill(self) -> None:
        """Store the machines. No process is left, but of what lives in one.

        Raises:
            SkippedError, BrokenError.
        """
        first = await self._worker(0)
        answer = await self._ask(first, Command(do="load"))
        self._filled = True
        if answer.apart:
            await self.end()
        elif self.load.processes > 1:
            raise SkippedError("its data is in the memory of one process")

    async def start(self) -> None:
        """Have all processes open it.

        Raises:
            SkippedError, BrokenError.
        """
        assert self._filled, "fill comes first"
        if not self._workers:
            for index in range(self.load.processes):
                await self._worker(index)
        await self.turn_to(self.load.workload)

    async def turn_to(self, workload: str) -> None:
        """Begin a workload. One that wrote must be the last: verifying relies on what was filled.

        Raises:
            SkippedError, BrokenError.
        """
        command = Command(do="open", workload=workload)
        opened = await asyncio.gather(*(self._ask(each, command) for each in self._workers))
        for each in opened:
            if each.skipped is not None:
                raise SkippedError(each.skipped)

    async def run(self, seconds: float, rate: float | None = None) -> RoundStats:
        """One round, in all processes at once.

        Args:
            rate: operations a second of all together; None: as fast as they are answered.
        """
        each_rate = None if rate is None else rate / len(self._workers)
        command = Command(do="run", seconds=seconds, rate=each_rate)
        answers = await asyncio.gather(*(self._ask(each, command) for each in self._workers))
        first, *others = (cast("RoundStats", each.stats) for each in answers)
        for other in others:
            first.add(other)
        return first

    async def verify(self) -> VerificationResult:
        """Stop the load, and compare what was acknowledged with what is there."""
        answers = [await self._ask(each, Command(do="stop")) for each in self._workers]
        acked: AckedByEntity = {}
        for answer in answers:
            for name, other in (answer.acked or {}).items():
                acked.setdefault(name, AckedWrites()).add(other)
        answer = await self._ask(self._workers[0], Command(do="verify", acked=acked))
        return cast("VerificationResult", answer.verification)

    async def measure(self, scenario: str) -> list[Measurement]:
        """A scenario, in a new process."""
        worker = await self._worker(0)
        answer = await self._ask(worker, Command(do="scenario", workload=scenario))
        return answer.measurements or []

    async def end(self) -> None:
        """No process is left of it."""
        for each in self._workers:
            await each.end(_END_SECONDS)
        self._workers = []

    async def _worker(self, index: int) -> LineProcess:
        plan = Plan(
            system=self.system,
            environment=self.environment,
            load=self.load,
            index=index,
            seed=self._seed,
        )
        errors = Path(self.environment.folder).parent / "errors"
        worker = await LineProcess.start(_WORKER, errors, self.system.source)
        self._workers.append(worker)
        worker.tell(encode(plan))
        return worker

    async def _ask(self, worker: LineProcess, command: Command) -> Answer:
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS + 2 * command.seconds):
                line = await worker.ask(encode(command))
        except TimeoutError as exc:
            raise BrokenError(f"no answer to {command.do!r} within the time") from exc
        if not line:
            raise BrokenError(f"ended by itself: {worker.last_words()}")
        answer = decode(line, Answer)
        if answer.refused is not None:
            raise BrokenError(answer.refused)
        return answer
