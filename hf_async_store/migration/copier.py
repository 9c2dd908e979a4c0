"""Copying collections: one walk over the source in batches, several workers that write them.

A batch is a range of keys: the walk is by keyset, so it holds one page at a time and can go on from
any of them. Workers take batches from a short queue, which holds the walk back when the target is
slower. Collections follow one another, parents before children.
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
    """A piece of one collection, as it is read from the source.

    Attributes:
        cursor: where the walk goes on behind it; None if it is the last of its collection.
        count, digest: of everything of the collection up to and with this batch.
        sizes: of the JSON of each entity, in bytes.
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
    """A collection in batches, from where `start` has come."""
    begun = start or Progress()
    digest = Digest(begun.digest, begun.count)
    cursor = begun.cursor
    number = 0
    while True:
        page = await source.query_page(collection, limit=size, cursor=cursor)
        texts = list(map(canonical, page.items))
        digest.add_all(texts)
        sizes = list(map(len, texts))
        number += 1
        cursor = page.cursor
        if sizes:
            yield MigrationBatch(
                collection, number, page.items, cursor, digest.count, str(digest), sizes
            )
        if cursor is None:
            return


class Copying:
    """One collection on its way.

    Args:
        rule: how to settle with what is there; None writes over it.
        save: is awaited with the progress after each batch.
        advance: called with how many entities are done.
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
        """Copy everything.

        Raises:
            StorageError: the first that went wrong; what was checkpointed is in the target.
        """
        await together(self._walk(), *(self._work() for _ in range(self._workers)))
        await self._write_waiting()
        await self._save(Progress(None, self.digest.count, str(self.digest), done=True))

    async def _walk(self) -> None:
        batches = batches_of(self._source, self._collection, self._size, self._start)
        async with aclosing(batches):
            async for batch in batches:
                self.digest = Digest(batch.digest, batch.count)
                await self._queue.put(batch)
        for _ in range(self._workers):
            await self._queue.put(None)

    async def _work(self) -> None:
        while (batch := await self._queue.get()) is not None:
            await self._write(batch.entities, batch.sizes)
            self._advance(len(batch.entities))
            await self._finish(batch)

    async def _write(self, entities: Sequence[Entity], sizes: Sequence[int] | None = None) -> None:
        # Those whose parent, in the same collection, is not there yet.
        waiting: list[Entity] | None = [] if self._refers_to_itself else None
        self.merged.add(
            await put(
                self._target, self._collection, entities, self._rule, sizes=sizes, waiting=waiting
            )
        )
        self._waiting += [cast("str", each[self._key]) for each in waiting or ()]

    async def _finish(self, batch: MigrationBatch) -> None:
        """Save the progress up to the last batch before which none is missing."""
        self._finished[batch.number] = batch
        newest: MigrationBatch | None = None
        while (done := self._finished.pop(self._next, None)) is not None:
            newest = done
            self._next += 1
        # What waits for its parent is not in the target: it must be met again after a kill.
        if newest is not None and newest.cursor is not None and not self._waiting:
            await self._save(Progress(newest.cursor, newest.count, newest.digest))

    async def _write_waiting(self) -> None:
        """Write those whose parents are there by now, again and again, until all are."""
        while self._waiting:
            waiting, self._waiting = self._waiting, []
            for start in range(0, len(waiting), self._size):
                ids = waiting[start : start + self._size]
                found = await self._source.get_entities(self._collection, ids)
                await self._write([each for each in found if each is not None])
            if len(self._waiting) == len(waiting):
                raise ReferenceViolationError(
                    f"{len(waiting)} entities of {self._collection} refer to others of it that "
                    f"are not there, the first: {waiting[0]!r}"
                )


async def together(*work: Coroutine[Any, Any, None]) -> None:
    """Run all at once; the first that fails ends the others, and its error comes out."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for each in tasks:
            each.cancel()
        await asyncio.wait(tasks)


RESUME_HINT: Final = "then go on with `resume` (--resume on the command line)"
