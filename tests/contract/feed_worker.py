"""The worker processes of `test_feed_processes`: writers, which log what they have committed, and a reader,
which logs what it was told, and goes on after the last token of its log."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import TypeVar

from hf_async_store import ConcurrencyConflictError, StorageStrategy, Transaction, open_store
from hf_async_store.testing.harness import FEED_COLLECTIONS

Result = TypeVar("Result")

SHARED = [f"shared-{each}" for each in range(5)]
"""The ids that all writers write, and nobody deletes."""


class _Log:
    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def add(self, *words: object) -> None:
        os.write(self._fd, (" ".join(map(str, words)) + "\n").encode())


async def _again(work: Callable[[], Awaitable[Result]]) -> Result:
    """What `work` returns, as soon as no other transaction is in its way."""
    while True:
        try:
            return await work()
        except ConcurrencyConflictError as exc:
            if not exc.retryable or exc.outcome_unknown:
                raise


async def _write(url: str, log: _Log, name: str, number: int) -> None:
    random = Random(name)
    own = [f"{name}-{each}" for each in range(4)]
    versions: dict[str, int] = {}
    async with open_store(url, collections=FEED_COLLECTIONS) as store:
        for count in range(number):
            entity_id = random.choice([*own, random.choice(SHARED)])
            kind = random.random()
            if kind < 0.15 and entity_id in versions:
                await _again(partial(store.delete_entity, "notes", entity_id))
                log.add("delete", entity_id, versions.pop(entity_id))
            elif kind < 0.3:
                versions |= await _transact(store, log, own, random)
            elif kind < 0.4:
                await _roll_back(store, entity_id)
            else:
                entity = {"note_id": entity_id, "count": count}
                version = await _again(partial(store.save_entity, "notes", entity))
                log.add("put", entity_id, version)
                if entity_id in own:
                    versions[entity_id] = version
            await asyncio.sleep(random.choice([0, 0, 0.005]))


async def _transact(
    store: StorageStrategy, log: _Log, ids: list[str], random: Random
) -> dict[str, int]:
    async def work(tx: Transaction) -> dict[str, int]:
        written = {}
        for each in ids[:2]:
            written[each] = await tx.save_entity("notes", {"note_id": each})
            await asyncio.sleep(random.choice([0, 0.02]))
        return written

    written = await store.run_transaction(work)
    for entity_id, version in written.items():
        log.add("put", entity_id, version)
    return written


async def _roll_back(store: StorageStrategy, entity_id: str) -> None:
    try:
        async with store.begin_transaction() as tx:
            await tx.save_entity("notes", {"note_id": entity_id, "label": "never"})
            raise KeyError
    except (KeyError, ConcurrencyConflictError):
        pass


async def _read(url: str, path: str, last: str) -> None:
    token = Path(path).read_text().splitlines()[-1].split()[-1]
    log = _Log(path)
    async with (
        open_store(url, collections=FEED_COLLECTIONS) as store,
        store.watch("notes", since=token) as changes,
    ):
        async for each in changes:
            assert each.entity is None or each.entity.get("label") != "never"
            log.add(each.kind, each.id, each.version, each.token)
            if each.id == last:
                return


if __name__ == "__main__":
    role, url, path, name, number = sys.argv[1:]
    if role == "write":
        asyncio.run(_write(url, _Log(path), name, int(number)))
    else:
        asyncio.run(_read(url, path, name))
