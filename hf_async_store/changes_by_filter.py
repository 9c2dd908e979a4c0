"""Changes of all entities that match a query: `update_where` and `delete_where`.

Each entity is changed on condition that it still has the version that matched the query. If it has
another one, it is read and judged again. So an entity that has stopped matching is left unchanged.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import Final, cast

import msgspec

from hf_async_store.backoff import Backoff
from hf_async_store.changes import Change, ChangedMatches, Outcome
from hf_async_store.errors import (
    ConcurrencyConflictError,
    EntityNotFoundError,
    LockTimeoutError,
    PartialChangeError,
    StorageError,
)
from hf_async_store.event_loop import pause
from hf_async_store.generators import Owned
from hf_async_store.query import Query, compile_filter, position_of
from hf_async_store.returning_updates import Primitives
from hf_async_store.schema import Collection
from hf_async_store.values import VERSION, Entity, Key, version_of

_BATCH_SIZE: Final = 500
_CONFLICT_SECONDS: Final = 30.0
_FIRST_PAUSE: Final = 0.002
_LONGEST_PAUSE: Final = 0.1


class ChangesByFilter:
    """Changes the entities that match a query, each at most once, in its order, up to its limit.

    Args:
        change: returns the change of an entity that has this version.
        keep: keep the entities as they were read, in `entities`.

    Attributes:
        done: how many entities were changed.
        entities: the changed entities as they were before, if they are kept.
    """

    def __init__(
        self,
        store: Primitives,
        collection: Collection,
        query: Query,
        change: Callable[[Key, int], Change],
        *,
        keep: bool = False,
    ) -> None:
        self._store = store
        self._collection = collection
        self._query = query if keep else _without_other_fields(query, collection)
        self._change = change
        self._matches = compile_filter(query.where)
        self._keep = keep
        self.done = 0
        self.entities: list[Entity] = []

    async def run(self) -> None:
        """Change the entities in batches, which succeed independently.

        The query is read page by page: no snapshot is held while the batches are written.

        Raises:
            PartialChangeError: a change failed.
        """
        # In the order by id, no id comes twice; in another one, a change may move an entity.
        seen: set[str] | None = set() if self._query.order else None
        query = await self._store._first_page(msgspec.structs.replace(self._query, paged=True))
        while True:
            size = _BATCH_SIZE if query.limit is None else min(_BATCH_SIZE, query.limit - self.done)
            page = await self._change_page(query.with_limit(size), seen)
            if len(page) < max(size, 1) or self.done == query.limit:
                return
            if seen is not None:
                seen.update(map(self._id, page))
            after = position_of(query, self._id(page[-1]), page[-1])
            query = msgspec.structs.replace(query, after=after)

    async def _change_page(self, query: Query, seen: set[str] | None) -> list[Entity]:
        """Change the entities that match a query, but those that were seen; returns all of them."""
        if query.limit and not seen:
            changed = await self._changed_at_once(query)
            if changed is not None:
                await self._change_independently(changed.entities, changed.outcomes)
                return changed.entities
        async with Owned(self._read(query)) as batches:
            page = [each async for batch in batches for each in batch]
        await self._change_independently(
            [each for each in page if seen is None or self._id(each) not in seen]
        )
        return page

    async def _changed_at_once(self, query: Query) -> ChangedMatches | None:
        """What the engine changed in one step; None if it cannot, or if that failed without any effect."""
        try:
            change = self._change(Key(self._collection.name, ""), 0)
            return await self._store._change_matches(query, change)
        except StorageError as exc:
            if not exc.outcome_unknown and not isinstance(exc, LockTimeoutError):
                return None
            raise PartialChangeError(self.done, exc, self.entities) from exc

    async def run_in_transaction(self) -> None:
        """Change all of them in the transaction of the primitives; a failure is raised as it is.

        All of them are read first, so that the changes do not affect what the query returns.
        """
        ids: list[str] = []
        async with Owned(self._read(self._query)) as batches:
            async for batch in batches:
                ids += map(self._id, batch)
        for start in range(0, len(ids), _BATCH_SIZE):
            # By key, so that what was judged is part of the transaction, on engines whose queries are not.
            entities = await self._matching(ids[start : start + _BATCH_SIZE])
            if entities:
                await self._store._write(self._changes(entities), None)
                self._changed(entities)
            await pause()  # an engine in memory may not have awaited anything

    async def _read(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        if query.limit == 0:
            return
        try:
            async with Owned(self._store._batches(query)) as batches:
                async for batch in batches:
                    yield batch
        except StorageError as exc:
            if not self.done:
                raise
            raise PartialChangeError(self.done, exc, self.entities) from exc

    async def _change_independently(
        self, entities: Sequence[Entity], outcomes: Sequence[Outcome] | None = None
    ) -> None:
        """Change entities; `outcomes`: of the first attempt, if it was made."""
        backoff = Backoff(_CONFLICT_SECONDS, first=_FIRST_PAUSE, longest=_LONGEST_PAUSE)
        while entities:
            try:
                if outcomes is None:
                    outcomes = await self._store._write(self._changes(entities), None)
                conflict, stale = self._apply(entities, outcomes)
                if conflict is None:
                    return
                if not await backoff.pause():
                    raise conflict
                self._store._note_retry(self._collection.name)
                entities, outcomes = await self._matching(stale), None
            except StorageError as exc:
                raise PartialChangeError(self.done, exc, self.entities) from exc

    def _apply(
        self, entities: Sequence[Entity], outcomes: Sequence[Outcome]
    ) -> tuple[StorageError | None, list[str]]:
        """Count the entities that were changed.

        Returns:
            A conflict, if there is any, and the ids to be judged again.

        Raises:
            StorageError: the first failure of another kind.
        """
        if {*map(type, outcomes)} <= {int}:  # the usual case
            self._changed(entities)
            return None, []
        failed = list(zip(entities, outcomes, strict=True))
        self._changed(each for each, outcome in failed if not isinstance(outcome, StorageError))
        conflict, stale = None, list[str]()
        for entity, outcome in failed:
            if isinstance(outcome, ConcurrencyConflictError) and not outcome.outcome_unknown:
                conflict = conflict or outcome
                stale.append(self._id(entity))
            elif isinstance(outcome, StorageError) and not isinstance(outcome, EntityNotFoundError):
                raise outcome
        return conflict, stale

    async def _matching(self, ids: Iterable[str]) -> list[Entity]:
        """The current entities with these ids that match the filter."""
        keys = [Key(self._collection.name, each) for each in ids]
        records = await self._store._fetch(keys, None)
        return [each.entity for each in records if each is not None and self._matches(each.entity)]

    def _changes(self, entities: Iterable[Entity]) -> list[Change]:
        name = self._collection.name
        return [self._change(Key(name, self._id(each)), version_of(each)) for each in entities]

    def _changed(self, entities: Iterable[Entity]) -> None:
        changed = list(entities)
        self.done += len(changed)
        if self._keep:
            self.entities += changed

    def _id(self, entity: Entity) -> str:
        return self._collection.id_of(entity)


def _without_other_fields(query: Query, collection: Collection) -> Query:
    """The query, which reads only what a position in it and a change need."""
    names = [collection.key, VERSION, *(cast("str", each.path[0]) for each in query.order)]
    return msgspec.structs.replace(query, fields=tuple(dict.fromkeys(names)))
