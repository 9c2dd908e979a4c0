"""Filled stores, each filled once: a workload that only reads takes it as it is, one that writes a copy.

A file is copied as a file, a PostgreSQL database as the template of another. What neither can be
done with (what lives in one process, the tables of a DynamoDB server) is filled anew.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Final

from hf_async_store.bench.crew import Crew

if TYPE_CHECKING:
    from hf_async_store.bench.places import Places
    from hf_async_store.bench.plan import Load, Place, Subject

_KEPT_BYTES: Final = 20_000_000
"""Of machines in a store. What is larger is used once, and not worth the disk."""

_LARGER: Final = 1.5
"""Times as long as a machine of a small store takes one of a store that outgrows its caches."""

_UNKNOWN: Final = 0.1
"""The part of filling that grows with the machines, at least: of one size nothing more is known."""


class Stock:
    """The stores of one run. What was kept goes when its places do."""

    def __init__(self, places: Places, seed: int) -> None:
        self._places = places
        self._seed = seed
        self._kept: dict[tuple[Subject, int, int], asyncio.Task[Place]] = {}
        self._filled: dict[str, dict[int, float]] = {}

    def expected(self, subject: Subject, load: Load) -> float:
        """The seconds that filling it would take, as far as is known: to start, and for each byte."""
        known = self._filled.get(subject.name)
        if known is None:
            return 0.0
        start = min(known.values())
        most = max(known)
        each = max(known[most] - start, _UNKNOWN * start) / most
        return start + _LARGER * each * load.entities * load.size

    async def crew(self, subject: Subject, load: Load, *, writes: bool) -> Crew:
        """A crew whose target is filled. Give it back when it has ended.

        Raises:
            LeftOutError, BrokenError.
        """
        keeps = subject.copied and subject.place != "nothing"
        keeps = keeps and load.entities * load.size <= _KEPT_BYTES
        if not keeps or (writes and not self._places.can_copy(subject)):
            return await self._fill(subject, self._places.make(subject), load)
        place = await self._original(subject, load)
        if writes:
            place = await self._places.copy(subject, place)
        return Crew(subject, place, load, self._seed, filled=True)

    def give_back(self, crew: Crew) -> None:
        """Remove what no other crew will use."""
        originals = [each.result() for each in self._kept.values() if _is_there(each)]
        if crew.place not in originals:
            self._places.remove(crew.subject, crew.place)

    async def _original(self, subject: Subject, load: Load) -> Place:
        key = (subject, load.entities, load.size)
        if key not in self._kept:
            self._kept[key] = asyncio.create_task(self._made(subject, load))
        return await asyncio.shield(self._kept[key])

    async def _made(self, subject: Subject, load: Load) -> Place:
        crew = await self._fill(subject, self._places.make(subject), load)
        await crew.end()
        await self._places.settle(subject, crew.place)
        return crew.place

    async def _fill(self, subject: Subject, place: Place, load: Load) -> Crew:
        crew = Crew(subject, place, load, self._seed)
        began = time.monotonic()
        try:
            await crew.fill()
        except BaseException:
            await crew.end()
            self._places.remove(subject, place)
            raise
        known = self._filled.setdefault(subject.name, {})
        known[load.entities * load.size] = time.monotonic() - began
        return crew


async def settled() -> None:
    """What filling and copying left to write is written: it would disturb what is measured next."""
    await asyncio.to_thread(os.sync)


def _is_there(task: asyncio.Task[Place]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None
