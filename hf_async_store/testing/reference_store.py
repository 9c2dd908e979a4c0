"""What the memory engine answers by any declaration about the same entities: the right answers."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from hf_async_store.config import MemoryConfig
from hf_async_store.query import build_query
from hf_async_store.schema import Collection, Field
from hf_async_store.strategies.memory import MemoryEngine
from hf_async_store.strategy import StorageStrategy, schema_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping

    from hf_async_store.values import Entity


class ReferenceStore:
    """Entities, which are kept while no store is open.

    Args:
        references: whether references are enforced.
    """

    def __init__(self, *, references: bool) -> None:
        self._config = MemoryConfig(enforce_references=references)
        self._entities: dict[str, dict[str, Entity]] = {}

    @asynccontextmanager
    async def opened(
        self, collections: Iterable[Collection], recorded: Iterable[Collection] = ()
    ) -> AsyncGenerator[StorageStrategy, None]:
        """A store of the memory engine with a declaration, which has the entities and changes them.

        Args:
            recorded: declarations of other programs, whose references are enforced, too.
        """
        declared = schema_of(collections)
        schema = schema_of(_with_references(declared, recorded))
        engine = MemoryEngine(schema, self._config)
        for name in schema:
            # Not by writes, which would check the references.
            engine._stored.table(name).apply(self._entities.get(name, {}))
        async with StorageStrategy(engine, declared) as store:
            yield store
            for name, collection in declared.items():
                found = self._entities[name] = {}
                async for record in engine.select(build_query(collection)):
                    found[record.key.id] = record.entity


def _with_references(
    declared: Mapping[str, Collection], recorded: Iterable[Collection]
) -> Iterator[Collection]:
    """Collections with the references of declarations, and of the recorded ones."""
    others = {each.name: each for each in recorded}
    for name in {**declared, **others}:
        collection = declared[name] if name in declared else others[name]
        fields = {each: collection.fields[each] for each in collection.fields}
        for each in others[name].references if name in others else ():
            fields[each.name] = Field(each.name, references=each.references)
        del fields[collection.key]
        yield Collection(name, key=collection.key, fields=fields.values())
