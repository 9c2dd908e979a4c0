"""What is measured, behind one small interface: a store, a baseline, a competitor.

Every adapter can be opened in an `Environment` and closed; `fill(machines)` stores them in the fastest
way there is, and `read_back(ids)` gives what is stored. It has in addition what its system can do: get,
save, update, create (refused if it is there), save_many and create_many (each for itself), import_many
(as they are), acquire (a request and its machines, all or none), run_process (that shows one machine).
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Self

from hf_async_store import StorageStrategy, open_store
from hf_async_store_bench.data import TEMPLATE, Entity, batches, machine, transaction_limit
from hf_async_store_bench.messages import Environment, WrongAnswerError

_ASKED = {"template_id": "t-1", "status": "PENDING", "request_type": "acquire"}
_BATCH = 10_000
_IMPORTED = 1000
_CALL = 100  # machines of one call where a transaction cannot hold a whole request


async def fill(adapter: Any, entities: int, size: int) -> None:
    """Store so many machines of a size, which are never all in memory."""
    for start in range(0, entities, _BATCH):
        numbers = range(start, min(entities, start + _BATCH))
        await adapter.fill([machine(each, size) for each in numbers])


class StoreAdapter:
    """A store of the product, by its URL."""

    def __init__(self, store: StorageStrategy, url: str = "") -> None:
        self.store = store
        self._url = url
        self._limit = transaction_limit(store.capabilities)

    @classmethod
    async def open(cls, environment: Environment) -> Self:
        return cls(await open_store(environment.url).open(), environment.url)

    @property
    def is_apart(self) -> bool:
        """Its data is not in this process alone: it can be opened once more."""
        return self.store.capabilities.durable or self.store.capabilities.multi_process

    async def close(self) -> None:
        await self.store.close()

    async def fill(self, machines: Sequence[Entity]) -> None:
        await self.store.save_entity("templates", TEMPLATE)
        ids = dict.fromkeys(each["request_id"] for each in machines)
        await self.store.save_entities("requests", [{"request_id": i, **_ASKED} for i in ids])
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
        command = [sys.executable, "-m", "hf_async_store", "get", "machines", machine, "--json"]
        process = await asyncio.create_subprocess_exec(
            *command,
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
            return
        name, done = request["request_id"], {"status": request["status"]}
        version = await self.store.create_entity("requests", {**request, "status": "creating"})
        for batch in batches(machines, _CALL):
            await self.store.create_entities("machines", batch)
        await self.store.update_entity("requests", name, done, expected_version=version)
