"""What of a source is incompatible with a target, found by reading and without writing anything."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Final, cast

from hf_async_store.errors import InvalidInputError, StorageError
from hf_async_store.migration.merge import check_whole, name_of
from hf_async_store.preconditions import missing_parent
from hf_async_store.query import build_query
from hf_async_store.values import Entity, Key

if TYPE_CHECKING:
    from collections.abc import Callable

    from hf_async_store.driver import Reader
    from hf_async_store.schema import Collection, Field
    from hf_async_store.strategy import StorageStrategy

LIMIT: Final = 20
_CHUNK_SIZE: Final = 500
_MOST_PARENTS: Final = 100_000


def enforces_references(store: StorageStrategy) -> bool:
    """Whether a store refuses an entity whose parent is missing."""
    configured = store.describe().get("configuration")
    switch = configured.get("enforce_references", True) if isinstance(configured, dict) else True
    return store.capabilities.references and bool(switch)


async def find_incompatibilities(
    source: StorageStrategy,
    target: StorageStrategy,
    *,
    limit: int = LIMIT,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[dict[str, int], list[str], bool]:
    """Read the source through; returns its counts, what does not fit, and whether there is more.

    Looked at are what every write looks at (keys, values, declared types, sizes, versions), and
    whether the parents are there, if the target wants them.
    """
    fitting = _Preflight(source, target, limit)
    for name in source.collections:
        await fitting.look_at(name, advance)
    return fitting.counts, fitting.problems[:limit], len(fitting.problems) > limit


class _Preflight:
    def __init__(self, source: StorageStrategy, target: StorageStrategy, limit: int) -> None:
        self._source = source
        self._target = target
        self._limit = limit
        self._references = enforces_references(target)
        self._parents: set[Key] = set()
        self.counts: dict[str, int] = {}
        self.problems: list[str] = []

    async def look_at(self, name: str, advance: Callable[[int], None]) -> None:
        declared = self._target.collections[name]
        self.counts[name] = 0
        async with self._source.snapshot() as reader:
            piece: list[Entity] = []
            query = build_query(self._source.collections[name])
            try:
                async with aclosing(reader.select(query)) as records:
                    async for record in records:
                        piece.append(record.entity)
                        if len(piece) == _CHUNK_SIZE:
                            await self._check(declared, piece, reader)
                            advance(len(piece))
                            piece = []
            except StorageError as exc:
                # What the source itself cannot read is the first thing that does not fit.
                self._note(str(exc))
            await self._check(declared, piece, reader)
            advance(len(piece))

    def _note(self, problem: str) -> None:
        if len(self.problems) <= self._limit:
            self.problems.append(problem)

    async def _check(self, declared: Collection, piece: list[Entity], reader: Reader) -> None:
        self.counts[declared.name] += len(piece)
        for entity in piece:
            try:
                check_whole(declared, entity)
            except InvalidInputError as exc:
                self._note(f"{name_of(declared, entity)}: {exc}")
        if self._references:
            for field in declared.references:
                await self._check_parents(declared, field, piece, reader)

    async def _check_parents(
        self, declared: Collection, field: Field, piece: list[Entity], reader: Reader
    ) -> None:
        parent = cast("str", field.references)
        wanted = {
            Key(parent, value)
            for entity in piece
            if isinstance(value := entity.get(field.name), str)
        } - self._parents
        keys = sorted(wanted)
        if len(self._parents) > _MOST_PARENTS:
            self._parents.clear()
        for key, found in zip(keys, await reader.fetch(keys), strict=True):
            if found is not None:
                self._parents.add(key)
        missing = [each for each in keys if each not in self._parents]
        if missing:
            there = await self._target.get_entities(parent, [each.id for each in missing])
            gone = {each.id for each, found in zip(missing, there, strict=True) if found is None}
            for entity in piece:
                if entity.get(field.name) in gone:
                    name = cast("str", entity[field.name])
                    entity_id = entity.get(declared.key)
                    self._note(str(missing_parent(declared.name, entity_id, field, name)))
