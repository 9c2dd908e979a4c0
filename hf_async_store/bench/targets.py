"""What is measured, behind one small interface: a store of this package, a floor, a peer.

A target does what it can and has no method for what it cannot: a workload asks by protocol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from hf_async_store.bench.data import TEMPLATE, Entity
from hf_async_store.demo.plan import batches, transaction_limit
from hf_async_store.strategies import open_store

if TYPE_CHECKING:
    from hf_async_store.bench.plan import Place
    from hf_async_store.strategy import StorageStrategy

_BATCH = 10_000
_PIECE = 100
"""Machines of one call where a transaction cannot hold a whole request, as the demo does it."""


class Target(Protocol):
    """Open, filled, used, read back, closed."""

    @classmethod
    async def open(cls, place: Place) -> Self:
        """Open it, with whatever it needs made ready."""
        ...

    async def close(self) -> None:
        """Release everything; nothing acknowledged is lost."""
        ...

    async def fill(self, machines: Sequence[Entity]) -> None:
        """Store them in the fastest way there is; not measured."""
        ...

    async def read_back(self, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
        """The stored machines; not measured."""
        ...


@runtime_checkable
class Gets(Protocol):
    async def get(self, machine: str) -> Mapping[str, Any] | None: ...


@runtime_checkable
class Saves(Protocol):
    async def save(self, machine: Entity) -> None: ...


@runtime_checkable
class GetsAndSaves(Gets, Saves, Protocol):
    pass


@runtime_checkable
class Creates(Protocol):
    async def create(self, machine: Entity) -> None:
        """Refused if it is there."""
        ...


@runtime_checkable
class Updates(Protocol):
    async def update(self, machine: str, fields: Entity) -> None:
        """Some fields of a machine that is there."""
        ...


@runtime_checkable
class SavesMany(Protocol):
    async def save_many(self, machines: Sequence[Entity]) -> None: ...


@runtime_checkable
class CreatesMany(Protocol):
    async def create_many(self, machines: Sequence[Entity]) -> None: ...


@runtime_checkable
class Acquires(Protocol):
    async def acquire(self, request: Entity, machines: Sequence[Entity]) -> None:
        """A request and its machines: all of them, or none."""
        ...


class StoreTarget:
    """A store of this package, by its URL."""

    def __init__(self, store: StorageStrategy) -> None:
        self.store = store
        self._limit = transaction_limit(store.capabilities)

    @classmethod
    async def open(cls, place: Place) -> Self:
        return cls(await open_store(place.url).open())

    async def close(self) -> None:
        await self.store.close()

    async def fill(self, machines: Sequence[Entity]) -> None:
        await self.store.save_entity("templates", TEMPLATE)
        requests = {
            each["request_id"]: {
                "request_id": each["request_id"],
                "template_id": "t-1",
                "status": "PENDING",
                "request_type": "acquire",
            }
            for each in machines
        }
        await self.store.save_entities("requests", list(requests.values()))
        for start in range(0, len(machines), _BATCH):
            await self.store.create_entities("machines", machines[start : start + _BATCH])

    async def read_back(self, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
        found: list[Mapping[str, Any] | None] = []
        for batch in batches(list(ids), _BATCH):
            found += await self.store.get_entities("machines", batch)
        return found

    async def get(self, machine: str) -> Mapping[str, Any] | None:
        return await self.store.get_entity("machines", machine)

    async def save(self, machine: Entity) -> None:
        await self.store.save_entity("machines", machine)

    async def create(self, machine: Entity) -> None:
        await self.store.create_entity("machines", machine)

    async def update(self, machine: str, fields: Entity) -> None:
        await self.store.update_entity("machines", machine, fields)

    async def save_many(self, machines: Sequence[Entity]) -> None:
        await self.store.save_entities("machines", machines)

    async def create_many(self, machines: Sequence[Entity]) -> None:
        await self.store.create_entities("machines", machines)

    async def acquire(self, request: Entity, machines: Sequence[Entity]) -> None:
        """In one transaction; where that cannot hold them, in pieces and PENDING at the end."""
        if self._limit is None or len(machines) < self._limit:
            async with self.store.begin_transaction() as tx:
                await tx.create_entity("requests", request)
                await tx.create_entities("machines", machines)
        else:
            await self._acquire_in_pieces(request, machines)

    async def _acquire_in_pieces(self, request: Entity, machines: Sequence[Entity]) -> None:
        version = await self.store.create_entity("requests", {**request, "status": "creating"})
        for start in range(0, len(machines), _PIECE):
            await self.store.create_entities("machines", machines[start : start + _PIECE])
        await self.store.update_entity(
            "requests",
            str(request["request_id"]),
            {"status": request["status"]},
            expected_version=version,
        )
