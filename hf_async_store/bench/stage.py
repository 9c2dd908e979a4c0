"""Where crews come and go: filled, started, run and verified; what breaks is told, not raised."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Final, TypeVar

from hf_async_store.bench.crew import BrokenError, Crew, LeftOutError
from hf_async_store.bench.results import Cell, LeftOut, Results
from hf_async_store.bench.stock import Stock, settled
from hf_async_store.bench.workloads import WORKLOADS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from hf_async_store.bench.places import Places
    from hf_async_store.bench.plan import Load, Subject, Tally
    from hf_async_store.bench.settings import Settings

_WARM_UP: Final = 0.25
"""Seconds that go before the first round and do not count; a round's length if that is less."""

_STEADY_SHARE: Final = 0.5
_STEADY_MOST: Final = 5000.0
"""Operations a second: beyond that, the latencies would be those of the harness."""

_STEADY_LEAST: Final = 4
"""Operations: of fewer, no percentile says anything."""

AT_ONCE: Final = 2
"""Crews that are filled and started side by side: it is computing, not waiting."""

_Item = TypeVar("_Item")


class Stage:
    """What every part of a run measures on, and where it tells what came of it."""

    def __init__(self, settings: Settings, places: Places, results: Results) -> None:
        self.results = results
        self.stock = Stock(places, settings.seed)
        self._settings = settings
        self._places = places

    def leave_out(self, what: str, why: str) -> None:
        left_out = LeftOut(what, why)
        if left_out not in self.results.left_out:
            self.results.left_out.append(left_out)

    # -- crews -------------------------------------------------------------------------------

    @asynccontextmanager
    async def filled(
        self, subjects: Sequence[Subject], load: Load, workloads: Sequence[str]
    ) -> AsyncIterator[list[Crew]]:
        """Crews with their data, to be started; all are gone afterwards, with what they wrote.

        Args:
            workloads: that they will do.
        """
        writes = any(WORKLOADS[each].writes for each in workloads)

        async def fill(subject: Subject) -> Crew | None:
            try:
                crew = await self.stock.crew(subject, load, writes=writes)
            except (LeftOutError, BrokenError) as exc:
                self._could_not_start(subject, load, exc)
                return None
            stack.callback(self.stock.give_back, crew)
            stack.push_async_callback(crew.end)
            return crew

        async with AsyncExitStack() as stack:
            crews = await _side_by_side(fill, subjects)
            await settled()
            yield crews

    async def started(self, crews: Sequence[Crew]) -> list[Crew]:
        """Those that could be."""

        async def start(crew: Crew) -> Crew | None:
            try:
                await crew.start()
            except (LeftOutError, BrokenError) as exc:
                self._could_not_start(crew.subject, crew.load, exc)
                return None
            return crew

        return await _side_by_side(start, crews)

    def _could_not_start(self, subject: Subject, load: Load, exc: Exception) -> None:
        if isinstance(exc, BrokenError) and subject.kind == "strategy":
            self.results.broken.append(f"{subject.name}: {load.name}: {exc}")
        else:
            self.leave_out(f"{subject.name}: {load.name}", str(exc))

    # -- what a crew does --------------------------------------------------------------------

    async def warm_up(self, crew: Crew, cell: Cell) -> None:
        await self._round(crew, cell, min(_WARM_UP, self._settings.duration))

    async def round(self, crew: Crew, cell: Cell) -> None:
        """As fast as it is answered."""
        tally = await self._round(crew, cell, self._settings.duration)
        if tally is not None:
            cell.rounds.append(tally)

    async def steady_round(self, crew: Crew, cell: Cell) -> None:
        """At fixed times, about half as many as it can: how long does one wait then?"""
        operations = sum(each.operations for each in cell.rounds)
        seconds = sum(each.seconds for each in cell.rounds)
        if not self._settings.steady or not operations:
            return
        half = min(operations / seconds * _STEADY_SHARE, _STEADY_MOST * crew.load.processes)
        rate = self._settings.rate or half
        # Of what is slow, enough to say something, within reason.
        length = min(max(self._settings.steady, 10 / rate), self._settings.steady * 2)
        if length * rate < _STEADY_LEAST:
            return
        tally = await self._round(crew, cell, length, rate)
        if tally is not None:
            cell.steady.append(tally)

    async def verify(self, crew: Crew, cell: Cell) -> None:
        """Everything that was acknowledged is there."""
        if cell.failures:
            return
        try:
            verdict = await crew.verify()
        except BrokenError as exc:
            self._broken(crew.subject, cell, str(exc))
            return
        if verdict.failures and cell.kind == "peer":
            # That is no fault of this package, and its figures are no measure of anything.
            self._broken(crew.subject, cell, verdict.failures[0])
            return
        cell.checked += verdict.checked
        cell.failures += verdict.failures[:10]
        more = len(verdict.failures) - 10
        if more > 0:
            cell.failures.append(f"and {more:,} more like these")

    async def _round(
        self, crew: Crew, cell: Cell, seconds: float, rate: float | None = None
    ) -> Tally | None:
        """With what the server logged for it: nobody else is at work."""
        if cell.failures:
            return None
        before = await self._places.logged_bytes(crew.subject)
        try:
            tally = await crew.run(seconds, rate)
        except BrokenError as exc:
            self._broken(crew.subject, cell, str(exc))
            return None
        if tally.written is not None:
            tally.written += await self._places.logged_bytes(crew.subject) - before
        # Nothing here makes an operation fail but a conflict, and those are counted apart.
        cell.failures += [f"wrong answer: {each}" for each in tally.wrong[:3]]
        if cell.kind == "strategy":
            cell.failures += [
                f"{count:,} operations ended in {name}" for name, count in tally.errors.items()
            ]
        return tally

    def _broken(self, subject: Subject, cell: Cell, why: str) -> None:
        """A strategy must not break; a floor or a peer that does is left out."""
        if subject.kind == "strategy":
            cell.failures.append(why)
        else:
            cell.rounds, cell.steady = [], []
            self.leave_out(f"{subject.name}: {cell.load.name}", why)


async def _side_by_side(
    work: Callable[[_Item], Awaitable[Crew | None]], items: Sequence[_Item]
) -> list[Crew]:
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(item: _Item) -> Crew | None:
        async with gate:
            return await work(item)

    found = await asyncio.gather(*map(one, items))
    return [each for each in found if each is not None]
