"""What is measured, behind one small interface: a store, a baseline, a competitor.

An adapter has no method for what its system cannot do: a workload asks by protocol.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from hf_async_store import open_store
from hf_async_store_bench.data import TEMPLATE, Entity, batches, transaction_limit
from hf_async_store_bench.messages import WrongAnswerError

if TYPE_CHECKING:
    from hf_async_store import StorageStrategy
    from hf_async_store_bench.messages import Environment

_BATCH = 10_000
_IMPORTED = 1000
_CALL = 100
"""Machines of one call where a transaction cannot hold a whole request, as the demo does it."""


class Adapter(Protocol):
    """Open, filled, used, read back, closed."""

    @classmethod
    async def open(cls, environment: Environment) -> Self:
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
class ImportsMany(Protocol):
    async def import_many(self, machines: Sequence[Entity]) -> None:
        """New machines as they are, as when data is loaded in bulk."""
        ...


@runtime_checkable
class RunsProcesses(Protocol):
    async def run_process(self, machine: str) -> None:
        """A whole process that shows one machine."""
        ...


@runtime_checkable
class Acquires(Protocol):
    async def acquire(self, request: Entity, machines: Sequence[Entity]) -> None:
        """A request and its machines: all of them, or none."""
        ...


class StoreAdapter:
    """A store of the product, by its URL."""

    def __init__(self, store: StorageStrategy, url: str = "") -> None:
        self.store = store
        self._url = url
        self._limit = transaction_limit(store.capabilities)

    @classmethod
    async def open(cls, environment: Environment) -> Self:
        return cls(await open_store(environment.url).open(), environment.url)

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
        for batch in batches(machines, _BATCH):
            await self.store.create_entities("machines", batch)

    async def read_back(self, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
        found: list[Mapping[str, Any] | None] = []
        for batch in batches(ids, _BATCH):
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

    async def import_many(self, machines: Sequence[Entity]) -> None:
        for batch in batches(machines, _IMPORTED):
            await self.store.import_entities("machines", batch)

    async def run_process(self, machine: str) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "hf_async_store", "get", "machines", machine, "--json"),
            env={**os.environ, "HF_ASYNC_STORE": self._url},
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await process.communicate()
        if process.returncode or machine.encode() not in output:
            raise WrongAnswerError(f"exit code {process.returncode}")

    async def acquire(self, request: Entity, machines: Sequence[Entity]) -> None:
        """In one transaction; where that cannot hold them, in batches, and PENDING at the end."""
        if self._limit is None or len(machines) < self._limit:
            async with self.store.begin_transaction() as tx:
                await tx.create_entity("requests", request)
                await tx.create_entities("machines", machines)
        else:
            await self._acquire_in_batches(request, machines)

    async def _acquire_in_batches(self, request: Entity, machines: Sequence[Entity]) -> None:
        version = await self.store.create_entity("requests", {**request, "status": "creating"})
        for batch in batches(machines, _CALL):
            await self.store.create_entities("machines", batch)
        await self.store.update_entity(
            "requests",
            str(request["request_id"]),
            {"status": request["status"]},
            expected_version=version,
        )
