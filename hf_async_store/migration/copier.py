"""CollectionCopier collections: one task reads the source in batches, and several workers write them.

A batch is a range of keys. The source is read with keyset pagination, so only one page is held at a
time, and reading can continue after any page. Workers take batches from a short queue, which slows
the reader down when the target is slower. Collections are copied one by one, parents before
children.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec

from hf_async_store.errors import ReferenceViolationError
from hf_async_store.migration.checkpoint import Progress
from hf_async_store.migration.digest import Digest
from hf_async_store.migration.merge import Merged, MergeRule, put
from hf_async_store.values import Entity, canonical

if TYPE_CHECKING:
    from hf_async_store.strategy import StorageStrategy


class MigrationBatch(msgspec.Struct, frozen=True):
    """Some consecutive entities of one collection, as they are read from the source.

    Attributes:
        cursor: the query cursor after this batch; None for the last batch of the collection.
        count, digest: of all entities of the collection up to and including this batch.
        sizes: the size of each entity in bytes of JSON.
    """

    collection: str
    number: int
    entities: list[Entity]
    cursor: str | None
    count: int
    digest: str
    sizes: list[int]


async def batches_of(
    source: StorageStrategy, collection: str, size: int, start: Progress | None = None
) -> AsyncGenerator[MigrationBatch, None]:
    """The batches of a collection, beginning at the progress `start`."""
    progress = start or Progress()
    digest = Digest(progress.digest, progress.count)
    cursor = progress.cursor
    number = 0
    while True:
        page = await source.query_page(collection, limit=size, cursor=cursor)
        encoded = list(map(canonical, page.items))
        digest.add_all(encoded)
        sizes = list(map(len, encoded))
        number += 1
        cursor = page.cursor
        if sizes:
            yield MigrationBatch(
                collection, number, page.items, cursor, digest.count, str(digest), sizes
            )
        if cursor is None:
            return


class CollectionCopier:
    """Copies one collection.

    Args:
        rule: how to treat entities that the target has already; None overwrites them.
        save: a coroutine function that saves the progress after each batch.
        advance: called with the number of entities of each batch that was written.
    """

    def __init__(
        self,
        source: StorageStrategy,
        target: StorageStrategy,
        collection: str,
        *,
        size: int,
        workers: int,
        rule: MergeRule | None,
        start: Progress,
        save: Callable[[Progress], Coroutine[Any, Any, None]],
        advance: Callable[[int], None],
    ) -> None:
        self._source = source
        self._target = target
        self._collection = collection
        self._size = size
        self._workers = workers
        self._rule = rule
        self._start = start
        self._save = save
        self._advance = advance
        self._queue: asyncio.Queue[MigrationBatch | None] = asyncio.Queue(workers)
        self._finished: dict[int, MigrationBatch] = {}
        self._next = 1
        self._waiting: list[str] = []
        declared = target.collections[collection]
        self._key = declared.key
        self._refers_to_itself = any(each.references == collection for each in declared.references)
        self.merged = Merged()
        self.digest = Digest(start.digest, start.count)

    async def run(self) -> None:
        """Copy all entities.

        Raises:
            StorageError: the first error. Everything up to the last checkpoint is in the target.
        """
        await run_together(self._read(), *(self._write_batches() for _ in range(self._workers)))
        await self._write_waiting()
        await self._save(Progress(None, self.digest.count, str(self.digest), done=True))

    async def _read(self) -> None:
        batches = batches_of(self._source, self._collection, self._size, self._start)
        async with aclosing(batches):
            async for batch in batches:
                self.digest = Digest(batch.digest, batch.count)
                await self._queue.put(batch)
        for _ in range(self._workers):
            await self._queue.put(None)

    async def _write_batches(self) -> None:
        while (batch := await self._queue.get()) is not None:
            await self._write(batch.entities, batch.sizes)
            self._advance(len(batch.entities))
            await self._finish(batch)

    async def _write(self, entities: Sequence[Entity], sizes: Sequence[int] | None = None) -> None:
        # Collects entities whose parent, in the same collection, is not in the target yet.
        waiting: list[Entity] | None = [] if self._refers_to_itself else None
        self.merged.add(
            await put(
                self._target, self._collection, entities, self._rule, sizes=sizes, waiting=waiting
            )
        )
        self._waiting += [cast("str", each[self._key]) for each in waiting or ()]

    async def _finish(self, batch: MigrationBatch) -> None:
        """Save the progress up to the last batch that is written together with all before it."""
        self._finished[batch.number] = batch
        newest: MigrationBatch | None = None
        while (done := self._finished.pop(self._next, None)) is not None:
            newest = done
            self._next += 1
        # An entity that waits for its parent is not in the target. While there is one, no progress
        # is saved, so that it is read again after a crash.
        if newest is not None and newest.cursor is not None and not self._waiting:
            await self._save(Progress(newest.cursor, newest.count, newest.digest))

    async def _write_waiting(self) -> None:
        """Write the waiting entities whose parents are in the target now; repeat for the others."""
        while self._waiting:
            waiting, self._waiting = self._waiting, []
            for start in range(0, len(waiting), self._size):
                ids = waiting[start : start + self._size]
                entities = await self._source.get_entities(self._collection, ids)
                await self._write([each for each in entities if each is not None])
            if len(self._waiting) == len(waiting):
                raise ReferenceViolationError(
                    f"{len(waiting):,} entities of {self._collection} refer to a parent in the same "
                    f"collection that does not exist; the first: {waiting[0]!r}. Create the parents in the "
                    "source, or declare the field with enforced=False"
                )


async def run_together(*work: Coroutine[Any, Any, None]) -> None:
    """Run coroutines concurrently; the first error cancels the others and is raised."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for each in tasks:
            each.cancel()
        await asyncio.wait(tasks)


RESUME_HINT: Final = "then continue with `resume` (--resume on the command line)"
