"""py-key-value-aio: one async interface over many stores; here its disk and its PostgreSQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from hf_async_store.bench.data import Entity
    from hf_async_store.bench.plan import Place


class Disk:
    """Its store on diskcache."""

    def __init__(self, store: Any) -> None:
        self._store = store

    @classmethod
    async def open(cls, place: Place) -> Self:
        from key_value.aio.stores.disk import DiskStore

        target = cls(DiskStore(directory=place.folder))
        await target._store.setup()
        return target

    async def close(self) -> None:
        await self._store.close()

    async def fill(self, machines: Sequence[Entity]) -> None:
        await self.create_many(machines)

    async def read_back(self, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
        found: list[Mapping[str, Any] | None] = await self._store.get_many(list(ids))
        return found

    async def save(self, machine: Entity) -> None:
        await self._store.put(machine["machine_id"], machine)

    async def get(self, machine: str) -> Mapping[str, Any] | None:
        found: Mapping[str, Any] | None = await self._store.get(machine)
        return found

    async def create_many(self, machines: Sequence[Entity]) -> None:
        ids = [each["machine_id"] for each in machines]
        await self._store.put_many(ids, machines)


class PostgreSQL(Disk):
    """Its store on an asyncpg pool of its own."""

    @classmethod
    async def open(cls, place: Place) -> Self:
        from key_value.aio.stores.postgresql import PostgreSQLStore

        target = cls(PostgreSQLStore(url=place.server))
        await target._store.__aenter__()
        return target

    async def close(self) -> None:
        await self._store.__aexit__(None, None, None)
