"""Updates that return the entities as written, on engines that return only versions.

Each entity is read, and its update is written on condition that it still has the version that was
read. What was written is then known without another read, which could show a later change. An update
that met another version is read and written again.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from time import monotonic
from typing import Final, Protocol

import msgspec

from hf_async_store.changes import Change, ChangedMatches, Outcome, Patch, Record
from hf_async_store.errors import ConcurrencyConflictError, StorageError
from hf_async_store.event_loop import Chunks
from hf_async_store.preconditions import changed
from hf_async_store.query import Query
from hf_async_store.values import Entity, Key, copy_entity

_CHUNK_SIZE: Final = 128
"""The number of updates decided between two iterations of the event loop."""


class Primitives(Protocol):
    """The primitives of `RepositoryInterface` that are used here and in `changes_by_filter`."""

    async def _fetch(self, keys: Sequence[Key], timeout: float | None) -> list[Record | None]: ...

    async def _write(self, changes: Sequence[Change], timeout: float | None) -> list[Outcome]: ...

    def _batches(self, query: Query) -> AsyncGenerator[list[Entity], None]: ...

    async def _change_matches(self, query: Query, change: Change) -> ChangedMatches | None: ...

    async def _first_page(self, query: Query) -> Query: ...

    def _note_retry(self, collection: str | None) -> None: ...


class ReturningUpdates:
    """Independent updates of different entities.

    Attributes:
        results: by position, the entity as written, or the error of the update.
    """

    def __init__(self, store: Primitives, patches: Sequence[Patch], timeout: float | None) -> None:
        self._store = store
        self._patches = patches
        self._deadline = None if timeout is None else monotonic() + timeout
        self.results: dict[int, Entity | StorageError] = {}

    @property
    def pending(self) -> list[int]:
        """The positions of the updates without a result."""
        return [number for number in range(len(self._patches)) if number not in self.results]

    @property
    def _time_left(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - monotonic())

    async def attempt(self) -> None:
        """Read and write the pending ones once.

        Raises:
            ConcurrencyConflictError: some are still pending, because another write came first.
        """
        pending = self.pending
        keys = [self._patches[number].key for number in pending]
        records = await self._store._fetch(keys, self._time_left)
        changes: dict[int, Patch] = {}
        written: dict[int, Entity] = {}
        async for chunk in Chunks(zip(pending, records, strict=True), _CHUNK_SIZE):
            for number, record in chunk:
                patch = self._patches[number]
                try:
                    entity = changed(patch, None if record is None else record.entity)
                except StorageError as exc:
                    self.results[number] = exc
                    continue
                assert entity is not None
                assert record is not None, "a patch expects PRESENT or a version"
                changes[number] = msgspec.structs.replace(patch, expect=record.version)
                written[number] = copy_entity(entity)
        if changes:
            outcomes = await self._store._write(list(changes.values()), self._time_left)
            self._apply(written, outcomes)

    def _apply(self, written: dict[int, Entity], outcomes: Sequence[Outcome]) -> None:
        conflict: StorageError | None = None
        for (number, entity), outcome in zip(written.items(), outcomes, strict=True):
            if not isinstance(outcome, StorageError):
                self.results[number] = entity
            elif _may_be_repeated(self._patches[number], outcome):
                conflict = outcome
            else:
                self.results[number] = outcome
        if conflict is not None:
            raise conflict


def _may_be_repeated(patch: Patch, outcome: StorageError) -> bool:
    """Whether an update failed because of the version that was read, and not of the caller's."""
    is_conflict = isinstance(outcome, ConcurrencyConflictError) and not outcome.outcome_unknown
    return is_conflict and type(patch.expect) is not int
