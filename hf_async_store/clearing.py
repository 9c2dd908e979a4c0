"""The deletion of all entities of a collection: `StorageStrategy.clear`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from hf_async_store.changes import Delete, Outcome
from hf_async_store.driver import Engine, run_to_completion
from hf_async_store.entity_rewriting import pages
from hf_async_store.errors import PartialChangeError, ReferenceViolationError, StorageError
from hf_async_store.event_loop import pause
from hf_async_store.generators import Owned
from hf_async_store.query import Order, Query
from hf_async_store.schema import Collection
from hf_async_store.values import VERSION, Key

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
        query = await self._engine.first_page(query)
        referenced: ReferenceViolationError | None = None
        async with Owned(pages(self._engine, collection, query, _BATCH_SIZE)) as read:
            async for page in read:
                changes = [Delete(Key(collection.name, collection.id_of(each))) for each in page]
                # To the end, as for every write that is cancelled.
                outcomes = await run_to_completion(self._engine.write_each(changes))
                referenced = self._count(outcomes) or referenced
                await pause()
        return referenced

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
