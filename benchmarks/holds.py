"""The longest hold of the event loop in each kind of work on 100,000 machines."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeAlias

from measure import Hold, watched_loop
from stores import Entity, Stores, machine, machine_id, opened, request, request_id

from hf_async_store import JSONStorageStrategy, gt

if TYPE_CHECKING:
    from pathlib import Path

IDLE: Final = "nothing, for a second: what the machine adds"
_SIZE: Final = 100_000
_MANY: Final = 10_000
_PAGES: Final = 4
_REQUESTS: Final = (_SIZE + _MANY) // 1000

Work: TypeAlias = Callable[[JSONStorageStrategy], Awaitable[object]]


async def longest_holds(stores: Stores, runs: int) -> dict[str, list[Hold]]:
    """By kind of work, one hold for each run; each run begins with a fresh copy of the store."""
    found: dict[str, list[Hold]] = {}
    for _ in range(runs):
        path = await stores.copy(_SIZE)
        await _run(path, found)
        stores.remove(path)
    return found


async def _run(path: Path, found: dict[str, list[Hold]]) -> None:
    async def watch(what: str, work: Work) -> None:
        gc.collect()
        async with watched_loop() as hold:
            result = await work(store)
        # Only now: freeing what a caller was given is the caller's own time.
        del result
        found.setdefault(what, []).append(hold)

    batch = list(map(machine, range(_SIZE, _SIZE + _MANY)))
    acquired = list(map(machine, range(_SIZE + _MANY, _SIZE + _MANY + 1000)))
    store = opened(path)
    await watch(IDLE, lambda _: asyncio.sleep(1))
    await watch("open and first get", _open)
    await watch("one save", lambda s: s.save_entity("machines", machine(0)))
    await store.create_entities("requests", map(request, range(_SIZE // 1000, _REQUESTS)))
    await watch("batch of 10,000 creates", lambda s: s.create_entities("machines", batch))
    await watch("transaction of 1,000 creates", lambda s: _acquire(s, acquired))
    await watch("query by index, which is built first", _by_request)
    await watch("query by index", _by_request)
    await watch("count with a filter", lambda s: s.count_entities("machines", _FILTER))
    await watch("full scan with order_by", lambda s: s.query_entities("machines", None, "name"))
    await watch("stream with order_by, nothing kept", _stream)
    await watch("walk over sorted pages of 1,000", _walk)
    await watch("get_entities of 10,000", lambda s: s.get_entities("machines", _IDS))
    await watch("fold (checkpoint)", lambda s: s.checkpoint())
    await watch("read_file", lambda s: s.read_file())
    whole = await store.read_file()
    for each in whole["machines"].values():
        each["status"] = "CHANGED"
    other = opened(path)
    await _open(other)
    await watch("write_file, all machines changed", lambda s: s.write_file(whole))
    for each in whole["machines"].values():
        each["status"] = "AGAIN"
    await watch("the same with a snapshot open", lambda s: _write_beside(s, whole))
    await watch("another store follows that", lambda _: other.get_entity("machines", _IDS[0]))
    await watch("fold of all that", lambda s: s.checkpoint())
    await other.close()
    await store.close()


_FILTER: Final = {"instance_type": gt("m5.large")}
_IDS: Final = [machine_id(number) for number in range(_MANY)]


async def _open(store: JSONStorageStrategy) -> object:
    await store.open()
    return await store.get_entity("machines", machine_id(0))


async def _by_request(store: JSONStorageStrategy) -> object:
    return await store.query_entities("machines", {"request_id": request_id(50)})


async def _acquire(store: JSONStorageStrategy, machines: list[Entity]) -> None:
    async with store.begin_transaction() as tx:
        await tx.create_entity("requests", request(_REQUESTS))
        await tx.create_entities("machines", machines)


async def _stream(store: JSONStorageStrategy) -> None:
    async for _ in store.stream_entities("machines", None, "name"):
        pass


async def _write_beside(store: JSONStorageStrategy, whole: dict[str, dict[str, Entity]]) -> None:
    async with store.snapshot():
        await store.write_file(whole)


async def _walk(store: JSONStorageStrategy) -> object:
    pages = [await store.query_page("machines", None, "name", 1000)]
    while len(pages) < _PAGES:
        cursor = pages[-1].cursor
        pages.append(await store.query_page("machines", None, "name", 1000, cursor=cursor))
    return pages
