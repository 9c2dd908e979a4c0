"""diskcache: a synchronous map on SQLite, that does not sync."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from diskcache import Cache

if TYPE_CHECKING:
    from hf_async_store.bench.data import Entity
    from hf_async_store.bench.plan import Place


class Target:
    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    @classmethod
    async def open(cls, place: Place) -> Self:
        return cls(Cache(place.folder, eviction_policy="none"))

    async def close(self) -> None:
        self._cache.close()

    async def fill(self, machines: Sequence[Entity]) -> None:
        await self.create_many(machines)

    async def read_back(self, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
        return [self._cache.get(each) for each in ids]

    async def save(self, machine: Entity) -> None:
        self._cache.set(machine["machine_id"], machine)

    async def get(self, machine: str) -> Mapping[str, Any] | None:
        found: Mapping[str, Any] | None = self._cache.get(machine)
        return found

    async def create_many(self, machines: Sequence[Entity]) -> None:
        with self._cache.transact():
            for each in machines:
                self._cache.set(each["machine_id"], each)
