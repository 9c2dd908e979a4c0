"""The processes of one subject under one load, as the harness sees them."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Final, cast

import msgspec

from hf_async_store.bench.plan import (
    Answer,
    Claim,
    Claims,
    Command,
    Load,
    Place,
    Plan,
    Subject,
    Tally,
    Verdict,
)

_LINE: Final = 2**28
_PATIENCE_SECONDS: Final = 600.0
_LAST_WORDS: Final = 400


class LeftOutError(Exception):
    """It cannot be measured here, by what it is or what is missing; that is no failure of it."""


class BrokenError(Exception):
    """A worker ended, or never answered."""


class Crew:
    """Use `fill` unless it is filled, then `start`, and always `end`."""

    def __init__(
        self, subject: Subject, place: Place, load: Load, seed: int, *, filled: bool = False
    ) -> None:
        self.subject = subject
        self.place = place
        self.load = load
        self._seed = seed
        self._filled = filled
        self._workers: list[_Process] = []

    async def fill(self) -> None:
        """Store the machines. No process is left, but of what lives in one.

        Raises:
            LeftOutError, BrokenError.
        """
        first = await self._worker(0)
        answer = await first.ask(Command(do="load"))
        self._filled = True
        if answer.apart:
            await self.end()
        elif self.load.processes > 1:
            raise LeftOutError("it lives in one process")

    async def start(self) -> None:
        """Have all processes open it.

        Raises:
            LeftOutError, BrokenError.
        """
        assert self._filled, "fill comes first"
        if not self._workers:
            for index in range(self.load.processes):
                await self._worker(index)
        await self.turn_to(self.load.workload)

    async def turn_to(self, workload: str) -> None:
        """Begin a workload. One that wrote must be the last: verifying relies on what was filled.

        Raises:
            LeftOutError, BrokenError.
        """
        command = Command(do="open", workload=workload)
        for opened in await asyncio.gather(*(each.ask(command) for each in self._workers)):
            if opened.left_out is not None:
                raise LeftOutError(opened.left_out)

    async def run(self, seconds: float, rate: float | None = None) -> Tally:
        """One round, in all processes at once.

        Args:
            rate: operations a second of all together; None: as fast as they are answered.
        """
        each_rate = None if rate is None else rate / len(self._workers)
        command = Command(do="run", seconds=seconds, rate=each_rate)
        answers = await asyncio.gather(*(each.ask(command) for each in self._workers))
        tallies = [cast("Tally", each.tally) for each in answers]
        for other in tallies[1:]:
            tallies[0].add(other)
        return tallies[0]

    async def verify(self) -> Verdict:
        """Stop the load, and compare what was acknowledged with what is there."""
        answers = [await each.ask(Command(do="stop")) for each in self._workers]
        claims: Claims = {}
        for answer in answers:
            for name, other in (answer.claims or {}).items():
                mine = claims.setdefault(name, Claim())
                mine.acknowledged += other.acknowledged
                mine.unknown += other.unknown
        answer = await self._workers[0].ask(Command(do="verify", claims=claims))
        return cast("Verdict", answer.verdict)

    async def end(self) -> None:
        """No process is left of it."""
        for each in self._workers:
            await each.end()
        self._workers = []

    async def _worker(self, index: int) -> _Process:
        plan = Plan(
            subject=self.subject, place=self.place, load=self.load, index=index, seed=self._seed
        )
        worker = await _Process.start(plan, Path(self.place.folder).parent / "errors")
        self._workers.append(worker)
        return worker


class _Process:
    """One worker."""

    def __init__(self, process: asyncio.subprocess.Process, errors: Path) -> None:
        self._process = process
        self._errors = errors
        self._stdin = cast("asyncio.StreamWriter", process.stdin)
        self._stdout = cast("asyncio.StreamReader", process.stdout)

    @classmethod
    async def start(cls, plan: Plan, errors: Path) -> _Process:
        with errors.open("ab") as stderr:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "hf_async_store.bench",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                limit=_LINE,
                start_new_session=True,  # a Ctrl-C at the terminal is for the harness
            )
        worker = cls(process, errors)
        worker._stdin.write(msgspec.json.encode(plan) + b"\n")
        return worker

    async def ask(self, command: Command) -> Answer:
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS + 2 * command.seconds):
                self._stdin.write(msgspec.json.encode(command) + b"\n")
                await self._stdin.drain()
                line = await self._stdout.readline()
        except TimeoutError as exc:
            raise BrokenError(f"no answer to {command.do!r} within the time") from exc
        except ConnectionError:
            line = b""
        if not line:
            raise BrokenError(f"ended by itself: {self._last_words()}")
        answer = msgspec.json.decode(line, type=Answer)
        if answer.refused is not None:
            raise BrokenError(answer.refused)
        return answer

    async def end(self) -> None:
        """Let it close what it has open; a process that does not is ended."""
        self._stdin.close()
        try:
            async with asyncio.timeout(10):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
        await self._process.communicate()

    def _last_words(self) -> str:
        said = self._errors.read_text(errors="replace") if self._errors.exists() else ""
        return said.strip()[-_LAST_WORDS:] or "it said nothing"
