"""Engines with an injected fault. Worker processes import this module by name."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Self

from hf_async_store.changes import Change, Outcome, Put
from hf_async_store.strategies.memory import MemoryStorageStrategy
from hf_async_store_bench.adapters import StoreAdapter
from hf_async_store_bench.data import Entity
from hf_async_store_bench.messages import Environment, Role, SystemUnderTest
from hf_async_store_bench.results import Results

Measure = Callable[..., Coroutine[Any, Any, Results]]
"""The fixture `measure`."""


def system(fault: str, role: Role = "strategy") -> SystemUnderTest:
    return SystemUnderTest(
        name=fault,
        role=role,
        engine="memory",
        adapter=f"faulty_systems:{fault}",
        needs="nothing",
        url="memory:",
    )


class Good(StoreAdapter):
    """The unmodified memory engine."""

    kind: type[MemoryStorageStrategy] = MemoryStorageStrategy

    @classmethod
    async def open(cls, environment: Environment) -> Self:
        return cls(await cls.kind({"strategy": "memory"}).open())


class Slow(Good):
    """Each save takes ten milliseconds more."""

    async def save(self, machine: Entity) -> None:
        await asyncio.sleep(0.01)
        await super().save(machine)


class Stalling(Good):
    """Blocks for two fifths of each half second, and is otherwise as fast as the memory engine."""

    async def save(self, machine: Entity) -> None:
        part = time.monotonic() % 0.5
        if part < 0.2:
            await asyncio.sleep(0.2 - part)
        await super().save(machine)


class Burning(Good):
    """Uses a millisecond of processor time in each save."""

    async def save(self, machine: Entity) -> None:
        until = time.thread_time() + 0.001
        while time.thread_time() < until:
            pass
        await super().save(machine)


class Hoarding(Good):
    """Leaks a hundred kilobytes in each save."""

    async def save(self, machine: Entity) -> None:
        self.kept = [*getattr(self, "kept", []), bytearray(os.urandom(1) * 100_000)]
        await super().save(machine)


class _Losing(MemoryStorageStrategy):
    """Acknowledges one in a hundred saves without applying it."""

    seen = 0

    async def _write(self, changes: Sequence[Change], timeout: float | None) -> list[Outcome]:
        if len(changes) == 1 and isinstance(changes[0], Put):
            self.seen += 1
            if self.seen % 100 == 0:
                return [1]
        return await super()._write(changes, timeout)


class Losing(Good):
    kind = _Losing


class Lying(Good):
    """Returns another machine from one in fifty gets."""

    asked = 0

    async def get(self, machine: str) -> Mapping[str, Any] | None:
        self.asked += 1
        if self.asked % 50 == 0:
            machine = "i-00000000000000000"
        return await super().get(machine)


class Refusing(Good):
    """Fails one in fifty saves, of which a busy machine makes few."""

    asked = 0

    async def save(self, machine: Entity) -> None:
        self.asked += 1
        if self.asked % 50 == 0:
            raise RuntimeError("no")
        await super().save(machine)


class Dying(Good):
    """Ends its process during the run."""

    async def save(self, machine: Entity) -> None:
        raise SystemExit(3)


class Half(Good):
    """Stores half of the machines of a request."""

    async def acquire(self, request: Entity, machines: Sequence[Entity]) -> None:
        await super().acquire(request, machines[: len(machines) // 2])
