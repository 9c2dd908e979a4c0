"""Copying collections: the source is read in batches, and several of them are written at once.

A batch is a range of keys. The source is read with keyset pagination, so only one page is held at a
time, and reading can continue after any page. The reader waits for the oldest batch when the target is
slower. Collections are copied one by one, parents before children.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

import msgspec

from hf_async_store.errors import ReferenceViolationError
from hf_async_store.migration.checkpoint import Progress
from hf_async_store.migration.digest import Digest
from hf_async_store.migration.merge import Merged, MergeRule, put
from hf_async_store.values import Entity, with_canonical

if TYPE_CHECKING:
    from hf_async_store.schema import Collection
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
        page = await source._stored_page(collection, size, cursor)
        forms = list(map(with_canonical, page.items))
        encoded = [each for _, each in forms]
        digest.add_all(encoded)
        sizes = list(map(len, encoded))
        number += 1
        cursor = page.cursor
        if sizes:
            entities = [each for each, _ in forms]
            yield MigrationBatch(
                collection, number, entities, cursor, digest.count, str(digest), sizes
            )
        if cursor is None:
            return


class CollectionCopier(msgspec.Struct, kw_only=True):
    """Copies one collection.

    Attributes:
        workers: the maximum number of batches that are written at once.
        rule: how to treat entities that the target has already; None overwrites them.
        save: a coroutine function that saves the progress after each batch.
        advance: called with the number of entities of each batch that was written.
        waiting: the ids of entities whose parents are not in the target yet.
        digest: the digest of the entities that were read so far.
    """

    source: StorageStrategy
    target: StorageStrategy
    declared: Collection
    size: int
    workers: int
    rule: MergeRule | None
    start: Progress
    save: Callable[[Progress], Coroutine[Any, Any, None]]
    advance: Callable[[int], None]
    merged: Merged = msgspec.field(default_factory=Merged)
    waiting: list[str] = []
    digest: Digest = msgspec.field(default_factory=Digest)

    def __post_init__(self) -> None:
        self.digest = Digest(self.start.digest, self.start.count)

    async def run(self) -> None:
        """Copy all entities.

        Raises:
            StorageError: the error of the oldest write that has failed, otherwise the first error.
                Everything up to the last checkpoint is in the target.
        """
        writing: deque[asyncio.Task[MigrationBatch]] = deque()  # in the order of the batches
        batches = batches_of(self.source, self.declared.name, self.size, self.start)
        try:
            async with aclosing(batches):
                async for batch in batches:
                    await self._save_written(writing, self.workers - 1)
                    self.digest = Digest(batch.digest, batch.count)
                    writing.append(asyncio.ensure_future(self._write_batch(batch)))
            await self._save_written(writing, 0)
        except Exception:
            for each in writing:
                if each.done():
                    each.result()
            raise
        finally:
            for each in writing:
                each.cancel()
            await asyncio.gather(*writing, return_exceptions=True)
        await self._write_waiting()
        await self.save(Progress(None, self.digest.count, str(self.digest), done=True))

    async def _save_written(self, writing: deque[asyncio.Task[MigrationBatch]], most: int) -> None:
        """Save the progress of the oldest batches that are written, and remove them; wait until at
        most this number of batches is left."""
        while writing and (len(writing) > most or writing[0].done()):
            await asyncio.wait([writing[0]])
            await self._save_progress(writing[0].result())
            writing.popleft()

    async def _write_batch(self, batch: MigrationBatch) -> MigrationBatch:
        await self._write(batch.entities, batch.sizes)
        self.advance(len(batch.entities))
        return batch

    async def _save_progress(self, batch: MigrationBatch) -> None:
        """Save the progress after a batch that is written, together with all before it."""
        # An entity that waits for its parent is not in the target. While there is one, no progress
        # is saved, so that it is read again after a crash.
        if batch.cursor is not None and not self.waiting:
            await self.save(Progress(batch.cursor, batch.count, batch.digest))

    async def _write(self, entities: Sequence[Entity], sizes: Sequence[int] | None = None) -> None:
        name = self.declared.name
        # Collects entities whose parent, in the same collection, is not in the target yet.
        refers_to_itself = any(each.references == name for each in self.declared.references)
        waiting: list[Entity] | None = [] if refers_to_itself else None
        written = await put(self.target, name, entities, self.rule, sizes=sizes, waiting=waiting)
        self.merged.add(written)
        self.waiting += map(self.declared.id_of, waiting or ())

    async def _write_waiting(self) -> None:
        """Write the waiting entities whose parents are in the target now; repeat for the others."""
        while self.waiting:
            waiting, self.waiting = self.waiting, []
            for start in range(0, len(waiting), self.size):
                ids = waiting[start : start + self.size]
                entities = await self.source._get_stored(self.declared.name, ids)
                await self._write([each for each in entities if each is not None])
            if len(self.waiting) == len(waiting):
                raise ReferenceViolationError(
                    f"{len(waiting):,} entities of {self.declared.name} refer to a parent in the same "
                    f"collection that does not exist; the first: {waiting[0]!r}. Create the parents in the "
                    "source, or declare the field with enforced=False"
                )


RESUME_HINT: Final = "then continue with `resume` (--resume on the command line)"
