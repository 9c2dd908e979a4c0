"""Rewriting the entities of a collection one by one, while other programs read and write.

Each is written on condition that it still has the version that was read; one that was changed meanwhile
is read and judged again. So the work can be interrupted at any point, and begun anew: what is done is
found to be done. No stream is open during a write, because its snapshot could hold up a change of the
schema by another program, and with it the write.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Final, TypeAlias

import msgspec

from hf_async_store.backoff import Backoff
from hf_async_store.changes import Patch
from hf_async_store.driver import Engine, SchemaChange, SchemaProgress
from hf_async_store.errors import (
    ConcurrencyConflictError,
    EntityNotFoundError,
    StorageError,
    UnavailableError,
)
from hf_async_store.event_loop import pause
from hf_async_store.generators import Owned
from hf_async_store.query import Query, build_query, position_of
from hf_async_store.schema import Collection
from hf_async_store.values import UPDATED_AT, Entity, Key, Removed, Value, utc_now, version_of

NewFields: TypeAlias = "Mapping[str, Value | Removed]"
"""The fields of an entity to change; none: it stays as it is."""

_PAGE_SIZE: Final = 512
_BATCH_SIZE: Final = 256
_CONFLICT_SECONDS: Final = 60.0
_FIRST_PAUSE: Final = 0.005
_LONGEST_PAUSE: Final = 0.5


async def rewrite(
    engine: Engine,
    collection: Collection,
    change: Callable[[Entity], Awaitable[NewFields]],
    report: Callable[[int], None],
) -> int:
    """Rewrite the entities of a collection, in batches; each is a write like any other.

    Returns the number of entities that were written.

    Args:
        change: returns the fields to change, validated. It may be called several times for an entity.
        report: called with the number of entities that are done.

    Raises:
        UnavailableError: other programs change some of the entities all the time.
        StorageError: a change is refused. Those of the batches before it have been made.
    """
    done = written = 0
    async with Owned(pages(engine, collection)) as read:
        async for page in read:
            written += await _rewrite_page(engine, collection, page, change)
            done += len(page)
            report(done)
    return written


def reporting(progress: SchemaProgress, change: SchemaChange) -> Callable[[int], None]:
    """Reports the number of entities that are done as the progress of a change."""
    return lambda done: progress(change, done, None)


async def pages(
    engine: Engine, collection: Collection, query: Query | None = None, size: int = _PAGE_SIZE
) -> AsyncGenerator[list[Entity], None]:
    """The entities of a collection, all of them or those of a query. Between two pages nothing is held
    open, so the caller may use the engine; each page is what the engine stores when it is read."""
    query = (query or build_query(collection, paged=True)).with_limit(size)
    while True:
        async with Owned(engine.select_batches(query)) as batches:
            page = [each async for batch in batches for each in batch]
        if page:
            yield page
        if len(page) < size:
            return
        after = position_of(query, collection.id_of(page[-1]), page[-1])
        query = msgspec.structs.replace(query, after=after)


async def _rewrite_page(
    engine: Engine,
    collection: Collection,
    entities: Sequence[Entity],
    change: Callable[[Entity], Awaitable[NewFields]],
) -> int:
    written = 0
    backoff = Backoff(_CONFLICT_SECONDS, first=_FIRST_PAUSE, longest=_LONGEST_PAUSE)
    while True:
        changed: list[Key] = []
        for start in range(0, len(entities), _BATCH_SIZE):
            batch = entities[start : start + _BATCH_SIZE]
            patches = [_patch(collection, each, await change(each)) for each in batch]
            count, conflicts = await _write(engine, [each for each in patches if each is not None])
            written += count
            changed += conflicts
            await pause()
        if not changed:
            return written
        if not await backoff.pause():
            raise UnavailableError(
                f"{len(changed):,} entities of {collection.name}, the first of them {changed[0].id!r}, "
                "are changed by other programs all the time: run `schema apply` again"
            )
        entities = [each.entity for each in await engine.fetch(changed) if each is not None]


def _patch(collection: Collection, entity: Entity, fields: NewFields) -> Patch | None:
    if not fields:
        return None
    now = utc_now()
    key = Key(collection.name, collection.id_of(entity))
    return Patch(key, {**fields, UPDATED_AT: now}, now, version_of(entity))


async def _write(engine: Engine, patches: Sequence[Patch]) -> tuple[int, list[Key]]:
    """Write changes; returns how many were written, and the keys of the entities that another program has
    changed meanwhile."""
    if not patches:
        return 0, []
    written, changed = 0, []
    for patch, outcome in zip(patches, await engine.write_each(patches), strict=True):
        if isinstance(outcome, ConcurrencyConflictError) and not outcome.outcome_unknown:
            changed.append(patch.key)
        elif isinstance(outcome, StorageError) and not isinstance(outcome, EntityNotFoundError):
            raise outcome
        else:
            written += not isinstance(outcome, StorageError)
    return written, changed
