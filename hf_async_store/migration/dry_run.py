"""Finding what a target would refuse by reading the source, without writing anything."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Final

import msgspec

from hf_async_store.errors import InvalidInputError, StorageError
from hf_async_store.migration.merge import check_entity, name_of
from hf_async_store.migration.store_checks import settings_of
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


def enforces_references(store: StorageStrategy) -> bool:
    """Whether a store refuses an entity whose parent is missing."""
    enforce = settings_of(store).get("enforce_references", True)
    return store.capabilities.references and bool(enforce)


async def find_incompatibilities(
    source: StorageStrategy,
    target: StorageStrategy,
    *,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[dict[str, int], list[str], bool]:
    """Read the whole source; returns its counts, the problems, and whether there are more problems.

    Checked is what every write checks (keys, values, declared types, sizes, versions), and, if the
    target enforces references, whether the parents exist.
    """
    dry_run = _DryRun(source, target, enforces_references(target))
    for name in source.collections:
        await dry_run.check_collection(name, advance)
    return dry_run.counts, dry_run.problems[:LIMIT], len(dry_run.problems) > LIMIT


class _DryRun(msgspec.Struct):
    source: StorageStrategy
    target: StorageStrategy
    references: bool
    counts: dict[str, int] = {}
    problems: list[str] = []

    async def check_collection(self, name: str, advance: Callable[[int], None]) -> None:
        declared = self.target.collections[name]
        self.counts[name] = 0
        async with self.source.snapshot(expired=True) as reader:
            chunk: list[Entity] = []
            query = build_query(self.source.collections[name])
            try:
                async with aclosing(reader.select(query)) as records:
                    async for record in records:
                        chunk.append(record.entity)
                        if len(chunk) == _CHUNK_SIZE:
                            await self._check(declared, chunk, reader)
                            advance(len(chunk))
                            chunk = []
            except StorageError as exc:
                # An entity that the source itself cannot read is a problem, too.
                self._add_problem(str(exc))
            await self._check(declared, chunk, reader)
            advance(len(chunk))

    def _add_problem(self, problem: str) -> None:
        if len(self.problems) <= LIMIT:
            self.problems.append(problem)

    async def _check(self, declared: Collection, chunk: list[Entity], reader: Reader) -> None:
        self.counts[declared.name] += len(chunk)
        for entity in chunk:
            try:
                check_entity(declared, entity)
            except InvalidInputError as exc:
                self._add_problem(f"{name_of(declared, entity)}: {exc}")
        if self.references:
            for field in declared.references:
                await self._check_parents(declared, field, chunk, reader)

    async def _check_parents(
        self, declared: Collection, field: Field, chunk: list[Entity], reader: Reader
    ) -> None:
        parents = {each for entity in chunk if isinstance(each := entity.get(field.name), str)}
        keys = [Key(field.parent, each) for each in sorted(parents)]
        found = await reader.fetch(keys)
        ids = [key.id for key, record in zip(keys, found, strict=True) if record is None]
        in_target = await self.target._get_stored(field.parent, ids)
        missing = {each for each, stored in zip(ids, in_target, strict=True) if stored is None}
        for entity in chunk if missing else ():
            parent = entity.get(field.name)
            if isinstance(parent, str) and parent in missing:
                entity_id = entity.get(declared.key)
                self._add_problem(str(missing_parent(declared.name, entity_id, field, parent)))
