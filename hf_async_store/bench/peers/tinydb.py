"""tinydb: a JSON file that is written whole at every change, without a sync."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tinydb import TinyDB, where

if TYPE_CHECKING:
    from hf_async_store.bench.data import Entity
    from hf_async_store.bench.plan import Place


class Target:
    def __init__(self, database: TinyDB) -> None:
        self._database = database

    @classmethod
    async def open(cls, place: Place) -> Self:
        return cls(TinyDB(Path(place.folder) / "tinydb.json"))

    async def close(self) -> None:
        self._database.close()

    async def fill(self, machines: Sequence[Entity]) -> None:
        self._database.insert_multiple(machines)

    async def read_back(self, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
        stored = {each["machine_id"]: each for each in self._database.all()}
        return [stored.get(each) for each in ids]

    async def save(self, machine: Entity) -> None:
        self._database.upsert(machine, where("machine_id") == machine["machine_id"])

    async def get(self, machine: str) -> Mapping[str, Any] | None:
        return self._database.get(where("machine_id") == machine)

    async def create_many(self, machines: Sequence[Entity]) -> None:
        self._database.insert_multiple(machines)
