"""orb-py's own JSON storage: it blocks, and writes its whole file at every save."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from orb.infrastructure.storage.json.strategy import JSONStorageStrategy

if TYPE_CHECKING:
    from hf_async_store.bench.data import Entity
    from hf_async_store.bench.plan import Place


class Target:
    def __init__(self, storage: JSONStorageStrategy) -> None:
        self._storage = storage

    @classmethod
    async def open(cls, place: Place) -> Self:
        logging.disable(logging.INFO)  # it logs every save
        return cls(JSONStorageStrategy(str(Path(place.folder) / "machines.json")))

    async def close(self) -> None:
        self._storage.cleanup()

    async def fill(self, machines: Sequence[Entity]) -> None:
        await self.create_many(machines)

    async def read_back(self, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
        stored = self._storage.find_all()
        return [stored.get(each) for each in ids]

    async def save(self, machine: Entity) -> None:
        self._storage.save(machine["machine_id"], machine)

    async def get(self, machine: str) -> Mapping[str, Any] | None:
        return self._storage.find_by_id(machine)

    async def create_many(self, machines: Sequence[Entity]) -> None:
        self._storage.save_batch({each["machine_id"]: each for each in machines})
