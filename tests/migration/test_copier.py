"""The order in which the copier sees the ends of its concurrent writes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from hf_async_store import Collection, Entity, StorageStrategy, UnavailableError, open_store
from hf_async_store.migration.checkpoint import Progress
from hf_async_store.migration.copier import CollectionCopier

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

ITEMS = Collection("items", key="item_id")
SIZE, BATCHES = 10, 12


class Stores:
    """A source of 12 batches and a target; `read` and `write` are awaited before each batch."""

    def __init__(self, source: StorageStrategy, target: StorageStrategy) -> None:
        self.saved: list[int] = []
        self.read_batches = 0
        self.running = 0
        self.copier = CollectionCopier(
            source=source,
            target=target,
            declared=ITEMS,
            size=SIZE,
            workers=8,
            rule=None,
            start=Progress(),
            save=self._save,
            advance=lambda count: None,
        )
        self._page, self._import = source._stored_page, target._import_stored
        source._stored_page = self._reading  # type: ignore[method-assign, assignment]
        target._import_stored = self._writing  # type: ignore[method-assign, assignment]

    read: Callable[[int], Awaitable[object]]
    write: Callable[[int], Awaitable[object]]

    async def _save(self, progress: Progress) -> None:
        self.saved.append(progress.count)

    async def _reading(self, *arguments: object, **named: object) -> object:
        await self.read(self.read_batches)
        self.read_batches += 1
        return await self._page(*arguments, **named)  # type: ignore[arg-type]

    async def _writing(
        self, name: str, entities: list[Entity], *rest: object, **named: object
    ) -> object:
        self.running += 1
        try:
            await self.write(int(str(entities[0]["item_id"])) // SIZE)
            return await self._import(name, entities, *rest, **named)  # type: ignore[arg-type]
        finally:
            self.running -= 1


@pytest.fixture
async def stores() -> AsyncIterator[Stores]:
    async with (
        open_store("memory:", collections=[ITEMS]) as source,
        open_store("memory:", collections=[ITEMS]) as target,
    ):
        await source.import_entities(
            "items", [{"item_id": f"{n:04}"} for n in range(SIZE * BATCHES)]
        )
        yield Stores(source, target)


async def at_once(number: int) -> None:
    await asyncio.sleep(0)


async def slowly(number: int) -> None:
    await asyncio.sleep(0.02)


async def test_progress_is_saved_when_a_batch_is_written(stores: Stores) -> None:
    lags: list[int] = []

    async def read(number: int) -> None:
        await slowly(number)
        lags.append(SIZE * number - (stores.saved or [0])[-1])

    stores.read, stores.write = read, at_once
    await stores.copier.run()
    assert stores.saved[-1] == SIZE * BATCHES
    assert max(lags) <= 2 * SIZE


async def test_the_error_of_a_write_ends_the_reading(stores: Stores) -> None:
    async def write(number: int) -> None:
        raise UnavailableError(f"batch {number}")

    stores.read, stores.write = slowly, write
    with pytest.raises(UnavailableError, match="batch 0"):
        await stores.copier.run()
    assert stores.read_batches <= 3


async def test_an_error_of_a_batch_that_is_not_the_oldest(stores: Stores) -> None:
    async def write(number: int) -> None:
        if number == 2:
            raise UnavailableError("the target")
        await asyncio.sleep(0.05 if number < 2 else 10)

    stores.read, stores.write = at_once, write
    with pytest.raises(UnavailableError, match="the target"):
        await asyncio.wait_for(stores.copier.run(), 5)
    assert stores.saved == [SIZE, 2 * SIZE]
    assert stores.running == 0


async def test_an_error_of_a_write_is_preferred_to_one_of_the_source(stores: Stores) -> None:
    async def read(number: int) -> None:
        if number == 4:
            await asyncio.sleep(0.05)
            raise UnavailableError("the source")

    async def write(number: int) -> None:
        if number == 2:
            raise UnavailableError("the target")
        await asyncio.sleep(10)

    stores.read, stores.write = read, write
    with pytest.raises(UnavailableError, match="the target") as caught:
        await asyncio.wait_for(stores.copier.run(), 5)
    assert "the source" in str(caught.value.__context__)
    assert stores.running == 0


async def test_a_cancel_while_the_oldest_write_is_awaited_ends_all_writes(stores: Stores) -> None:
    ended: list[int] = []

    async def write(number: int) -> None:
        try:
            await asyncio.sleep(10)
        finally:
            await asyncio.shield(asyncio.sleep(0.02))
            ended.append(number)

    stores.read, stores.write = at_once, write
    run = asyncio.create_task(stores.copier.run())
    while stores.running < 8:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.02)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert sorted(ended) == list(range(8))
    assert stores.saved == []
