"""The deletion of all entities of a collection: `StorageStrategy.clear`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from msgspec.structs import replace

from hf_async_store.changes import Delete, Outcome
from hf_async_store.driver import Engine, run_to_completion
from hf_async_store.errors import PartialChangeError, ReferenceViolationError, StorageError
from hf_async_store.event_loop import pause
from hf_async_store.generators import Owned
from hf_async_store.query import Order, Query, position_of
from hf_async_store.schema import Collection
from hf_async_store.values import VERSION, Entity, Key

_BATCH_SIZE: Final = 500


class Clearing:
    """Deletes what is stored in collections, in batches, also entities that have expired.

    Attributes:
        done: how many entities were deleted.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.done = 0

    async def clear(self, collection: Collection) -> None:
        """Delete the entities of a collection.

        Raises:
            PartialChangeError: one could not be deleted.
        """
        to_itself = any(each.references == collection.name for each in collection.references)
        descending = True  # children usually have later ids than their parents
        while True:
            before = self.done
            order = (Order((collection.key,), descending),) if to_itself else ()
            try:
                referenced = await self._delete_in(collection, order)
            except StorageError as exc:
                raise PartialChangeError(self.done, exc) from exc
            if referenced is None:
                return
            if self.done == before:
                raise PartialChangeError(self.done, referenced) from referenced
            descending = not descending

    async def _delete_in(
        self, collection: Collection, order: tuple[Order, ...]
    ) -> ReferenceViolationError | None:
        """Delete each entity to which no other refers.

        Returns:
            The error of one that others refer to, if there is any.
        """
        fields = (collection.key, VERSION)
        query = Query(collection.name, order=order, fields=fields, paged=True)
        query = (await self._engine.first_page(query)).with_limit(_BATCH_SIZE)
        referenced: ReferenceViolationError | None = None
        while True:
            page = await self._read(query)
            changes = [Delete(Key(collection.name, collection.id_of(each))) for each in page]
            if changes:
                # To the end, as for every write that is cancelled.
                outcomes = await run_to_completion(self._engine.write_each(changes))
                referenced = self._count(outcomes) or referenced
            if len(page) < _BATCH_SIZE:
                return referenced
            after = position_of(query, collection.id_of(page[-1]), page[-1])
            query = replace(query, after=after)
            await pause()

    async def _read(self, query: Query) -> list[Entity]:
        async with Owned(self._engine.select_batches(query)) as batches:
            return [each async for batch in batches for each in batch]

    def _count(self, outcomes: Iterable[Outcome]) -> ReferenceViolationError | None:
        """Count the deleted entities.

        Returns:
            The error of one that others refer to, if there is any.

        Raises:
            StorageError: the first failure of another kind.
        """
        referenced: ReferenceViolationError | None = None
        failure: StorageError | None = None
        for each in outcomes:
            if isinstance(each, ReferenceViolationError):
                referenced = each
            elif isinstance(each, StorageError):
                failure = failure or each
            elif each is not None:
                self.done += 1
        if failure is not None:
            raise failure
        return referenced
