"""The view of a reader or a session: the committed sections, overlaid with the session's own writes.

Preconditions are checked here, against that view, while the store's write lock is held. A layer
contains the new bytes of entities by collection and id, None for a deleted entity: the same form as
in a commit.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Final, Literal, NamedTuple, TypeAlias, cast

import msgspec

from hf_async_store.changes import ANY, Change, Delete, Outcome, Patch, Put, Record
from hf_async_store.driver import QueryPlan, Reader
from hf_async_store.errors import CorruptionError, StorageError
from hf_async_store.generators import Owned
from hf_async_store.preconditions import (
    check,
    check_children,
    check_parents,
    missing_parents,
    next_version,
    patched,
)
from hf_async_store.query import (
    EVERYTHING,
    Comparison,
    Query,
    compile_filter,
    equality_candidates,
    ordered,
)
from hf_async_store.schema import Collection, Field, Schema
from hf_async_store.strategies.json.collection_table import CollectionTable
from hf_async_store.strategies.json.recovery import StoreState
from hf_async_store.strategies.json.serializer import JSONSerializer, StoredEntity
from hf_async_store.values import CREATED_AT, MAX_ENTITY_BYTES, VERSION, Entity, Key, check_size

Overlay: TypeAlias = dict[str, dict[str, bytes | None]]

_WRITE_CHUNK: Final = 128
_MIN_DICT_COPY: Final = 1000
_DICT_COPY_DIVISOR: Final = 8
"""Up to 1/8 of a section is copied entity by entity; if more is needed, the whole dict is copied."""

_READ_CHUNK: Final = 1024
_DECODE_CHUNK: Final = 256
"""The garbage collector counts tuples that contain a dict. The chunk is small enough that the tuples
alive at a time do not start a collection."""

_SIZE_CHECK_BYTES: Final = MAX_ENTITY_BYTES // 8
"""An entity whose JSON is shorter than this cannot exceed the size limit: the size that the limit
counts is less than 8 times the size of the JSON."""


class SessionView(Reader):
    """Reads one state of the store, and checks and applies changes to it.

    Args:
        state: the current state. The caller keeps it current while changes are applied.
        references: whether declared references are enforced.

    Attributes:
        layers: the writes of this session, the innermost savepoint last; empty for plain reads.
    """

    def __init__(
        self, state: StoreState, schema: Schema, serializer: JSONSerializer, *, references: bool
    ) -> None:
        self._state = state
        self._schema = schema
        self._serializer = serializer
        self._references = references
        self.layers: list[Overlay] = []

    # -- reading -----------------------------------------------------------------------------

    def stored_bytes(self, collection: str, entity_id: str) -> bytes | None:
        """The bytes of an entity in this view; None if it does not exist."""
        for layer in reversed(self.layers):
            images = layer.get(collection)
            if images is not None and entity_id in images:
                return images[entity_id]
        return self._state.sections[collection].canonical(entity_id)

    def exists(self, key: Key) -> bool:
        for layer in reversed(self.layers):
            images = layer.get(key.collection)
            if images is not None and key.id in images:
                return images[key.id] is not None
        return key.id in self._state.sections[key.collection].entities

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        if len(keys) <= _READ_CHUNK:
            return [self.record(key, self.stored_bytes(key.collection, key.id)) for key in keys]
        # All bytes first, without an await: they are those of one moment.
        raws = [self.stored_bytes(key.collection, key.id) for key in keys]
        records: list[Record | None] = []
        for start in range(0, len(keys), _READ_CHUNK):
            chunk = slice(start, start + _READ_CHUNK)
            records += map(self.record, keys[chunk], raws[chunk])
            await asyncio.sleep(0)
        return records

    def record(self, key: Key, raw: bytes | None) -> Record | None:
        return None if raw is None else Record(key, self._entity(key, raw))

    def _entity(self, key: Key, raw: bytes) -> Entity:
        return self._state.sections[key.collection].entity(key.id, raw)

    # -- queries -----------------------------------------------------------------------------

    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        section = self._state.sections[query.collection]
        access = await self._access(query, section)
        if not query.order:
            async with Owned(self._by_id(query, section, access)) as chunks:
                async for chunk in chunks:
                    for entity_id, raw in chunk:
                        entity = section.entity(entity_id, raw)
                        yield Record(Key(query.collection, entity_id), entity)
            return
        ids, entities = self._candidates(query, section, access)
        # Only sort keys are kept in memory; an entity is decoded again when it is yielded.
        async with (
            Owned(self._matching(query, section, access, ids, entities)) as matching,
            Owned(ordered(matching, query, keep=False)) as rows,
        ):
            async for entity_id, _ in rows:
                raw = section.normalized(entity_id, entities[entity_id])
                yield Record(Key(query.collection, entity_id), section.entity(entity_id, raw))

    async def select_batches(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        if query.order:
            async with Owned(super().select_batches(query)) as batches:
                async for batch in batches:
                    yield batch
            return
        section = self._state.sections[query.collection]
        access = await self._access(query, section)
        async with Owned(self._by_id(query, section, access)) as chunks:
            async for chunk in chunks:
                yield [section.entity(entity_id, raw) for entity_id, raw in chunk]

    async def count(self, query: Query) -> int:
        section = self._state.sections[query.collection]
        access = await self._access(query, section, by_id=False)
        ids, entities = self._candidates(query, section, access)
        if access.complete and (access.ids is None or not self.layers):
            return len(ids)
        async with Owned(self._matching(query, section, access, ids, entities)) as chunks:
            return sum([len(chunk) async for chunk in chunks])

    async def explain(self, query: Query) -> QueryPlan:
        access = await self._access(query, self._state.sections[query.collection])
        return QueryPlan(
            access=access.kind,
            index=access.name,
            residual=not access.complete,
            sorted_here=bool(query.order),
            detail=access.detail,
        )

    async def _access(
        self, query: Query, section: CollectionTable, *, by_id: bool = True
    ) -> _Access:
        """The cheapest access path to the candidates. Its index is up to date until the next await."""
        collection = self._schema[query.collection]
        equalities = equality_candidates(query.where)
        complete = query.where == EVERYTHING or isinstance(query.where, Comparison)
        keys = equalities.get((collection.key,))
        if keys is not None:
            key_ids = {each for each in keys if isinstance(each, str)}
            return _Access("key", None, key_ids, complete, f"{len(key_ids)} ids")
        best: _Access | None = None
        fields = [
            path[0]
            for path in equalities
            if len(path) == 1 and isinstance(path[0], str) and section.can_index(path[0])
        ]
        if fields:
            await section.index(*fields)
        for field in fields:
            ids = section.find(field, equalities[(field,)])
            if best is None or len(ids) < len(best.ids or ()):
                name = _index_name(collection, field)
                # An index treats all lists and dicts as equal (only files written by other programs
                # contain these in an indexed field).
                exact = not any(isinstance(each, list | dict) for each in equalities[(field,)])
                best = _Access("index", name, ids, complete and exact, f"{len(ids)} candidates")
        if best is not None:
            return best
        ordered_ids = await section.sorted_ids() if by_id and not query.order else None
        detail = f"all {len(section.entities)} entities"
        complete = query.where == EVERYTHING
        return _Access("scan", None, None, complete, detail, ordered_ids)

    def _candidates(
        self, query: Query, section: CollectionTable, access: _Access
    ) -> tuple[Sequence[str], dict[str, StoredEntity]]:
        """Ids and bytes of the candidates at one moment. It must be called after `_access` without an
        await in between, and does not await itself."""
        own = self._own_writes(query.collection)
        entities = section.entities
        if access.ids is None:
            # Tuples, which the garbage collector does not traverse; it would traverse a list at every
            # collection.
            ids: Sequence[str] = access.ordered if access.ordered is not None else tuple(entities)
            first, last = 0, None
            if query.after is not None and access.ordered is not None:
                first = bisect_right(ids, query.after.id)
            if access.complete and not own and not query.order and query.limit is not None:
                last = first + query.limit
            ids = ids[first:last]
        else:
            ids = [each for each in access.ids if each in entities]
        if own:
            ids = [each for each in ids if each not in own]
            ids += [each for each, raw in own.items() if raw is not None]
        if not query.order and (own or access.ids is not None):
            ids = sorted(ids)
            if query.after is not None:
                ids = ids[bisect_right(ids, query.after.id) :]
        # Copying a dict is one step, and the garbage collector does not traverse the copy. For a page
        # of a large section, picking the entities is faster.
        raws = (
            entities.copy()
            if access.ids is None
            and len(ids) > max(_MIN_DICT_COPY, len(entities) // _DICT_COPY_DIVISOR)
            else {each: entities[each] for each in ids if each in entities}
        )
        raws.update((each, raw) for each, raw in own.items() if raw is not None)
        return ids, raws

    def _own_writes(self, collection: str) -> dict[str, bytes | None]:
        own: dict[str, bytes | None] = {}
        for layer in self.layers:
            own.update(layer.get(collection, {}))
        return own

    async def _by_id(
        self, query: Query, section: CollectionTable, access: _Access
    ) -> AsyncGenerator[list[tuple[str, bytes]], None]:
        ids, entities = self._candidates(query, section, access)
        remaining = len(ids) if query.limit is None else query.limit
        async with Owned(self._rows(query, section, access, ids, entities)) as chunks:
            async for chunk in chunks:
                if chunk:
                    yield chunk[:remaining]
                remaining -= len(chunk)
                if remaining <= 0:
                    return

    async def _rows(
        self,
        query: Query,
        section: CollectionTable,
        access: _Access,
        ids: Sequence[str],
        entities: dict[str, StoredEntity],
    ) -> AsyncGenerator[list[tuple[str, bytes]], None]:
        """The candidates that match, with their bytes, in chunks."""
        matches = compile_filter(query.where)
        for start in range(0, len(ids), _READ_CHUNK):
            chunk = ids[start : start + _READ_CHUNK]
            rows = [(each, section.normalized(each, entities[each])) for each in chunk]
            if not access.complete or (access.ids is not None and self.layers):
                rows = [row for row in rows if matches(section.decode_cached(*row))]
            yield rows
            await asyncio.sleep(0)

    async def _matching(
        self,
        query: Query,
        section: CollectionTable,
        access: _Access,
        ids: Sequence[str],
        entities: dict[str, StoredEntity],
    ) -> AsyncGenerator[list[tuple[str, Entity]], None]:
        """The candidates that match, decoded for reading only, in chunks."""
        matches = compile_filter(query.where)
        await asyncio.sleep(0)  # copying the candidates may have taken some time
        for start in range(0, len(ids), _DECODE_CHUNK):
            chunk = ids[start : start + _DECODE_CHUNK]
            rows = (
                (each, section.decode_cached(each, section.normalized(each, entities[each])))
                for each in chunk
            )
            yield [row for row in rows if matches(row[1])]
            await asyncio.sleep(0)

    # -- changes -----------------------------------------------------------------------------

    async def write(self, changes: Sequence[Change]) -> list[Outcome]:
        """Apply the changes to the innermost layer in order, up to the first that fails."""
        outcomes: list[Outcome] = []
        for number, change in enumerate(changes, 1):
            outcomes.append(await self._apply(change))
            if isinstance(outcomes[-1], StorageError):
                break
            if not number % _WRITE_CHUNK:
                await asyncio.sleep(0)
        return outcomes

    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        """Apply the changes independently; the outcome of a failed one is its error."""
        outcomes: list[Outcome] = []
        for number, change in enumerate(changes, 1):
            outcomes.append(await self._apply(change))
            if not number % _WRITE_CHUNK:
                await asyncio.sleep(0)
        return outcomes

    async def _apply(self, change: Change) -> Outcome:
        try:
            if isinstance(change, Delete):
                return await self._delete(change)
            return self._put(change) if isinstance(change, Put) else self._patch(change)
        except StorageError as exc:
            return exc

    def _put(self, change: Put) -> int:
        key = change.key
        raw = self.stored_bytes(key.collection, key.id)
        actual = self._version(key, raw)
        self._check(change, actual, raw)
        version = change.import_version
        entity = change.entity
        if version is None:
            version = next_version(key, actual)
            if CREATED_AT not in entity:
                entity = self._with_created_at(change, raw)
        self._check_parents(change, raw)
        self._stage(change, self._serializer.encode(entity, version))
        return version

    def _with_created_at(self, change: Put, raw: bytes | None) -> Entity:
        kept: str | msgspec.UnsetType | None = change.written_at
        if raw is not None:
            collection = self._schema[change.key.collection]
            kept = self._serializer.created_at(collection, change.key.id, raw)
        return change.entity if kept is msgspec.UNSET else {**change.entity, CREATED_AT: kept}

    def _patch(self, change: Patch) -> int:
        key = change.key
        raw = self.stored_bytes(key.collection, key.id)
        actual = self._version(key, raw)
        self._check(change, actual, raw)
        assert raw is not None, "a patch expects PRESENT or a version"
        version = next_version(key, actual)
        entity = patched(self._entity(key, raw), change.fields, version)
        del entity[VERSION]
        encoded = self._serializer.encode(entity, version)
        if len(encoded) > _SIZE_CHECK_BYTES:
            check_size(entity)
        self._check_parents(change, raw)
        self._stage(change, encoded)
        return version

    async def _delete(self, change: Delete) -> int | None:
        key = change.key
        actual = self._version_to_delete(change)
        if actual is not None:
            if self._references:
                for child, field in self._schema.children[key.collection]:
                    await self._state.sections[child.name].index(field.name)
                check_children(self._schema, key, self._referrers)
            self._stage(change, None)
        return actual

    def _version_to_delete(self, change: Delete) -> int | None:
        """The stored version; None if the entity does not exist; 0 if it is damaged and the change
        expects no version: such an entity can still be deleted."""
        try:
            raw = self.stored_bytes(change.key.collection, change.key.id)
            actual = self._version(change.key, raw)
            self._check(change, actual, raw)
        except CorruptionError:
            if change.expect is not ANY:
                raise
            return 0
        return actual

    def _version(self, key: Key, raw: bytes | None) -> int | None:
        if raw is None:
            return None
        return self._serializer.version(self._schema[key.collection], key.id, raw)

    def _check(self, change: Change, actual: int | None, raw: bytes | None) -> None:
        """Check the precondition; the entity is decoded only for the error."""
        expect = change.expect
        if expect is not ANY and expect != actual:
            current = None if raw is None else self._entity(change.key, raw)
            check(change.key, expect, actual, current)

    def _check_parents(self, change: Change, raw: bytes | None) -> None:
        if self._references and missing_parents(self._schema, change, self.exists):
            current = None if raw is None else self._entity(change.key, raw)
            check_parents(self._schema, change, current, self.exists)

    def _referrers(self, child: Collection, field: Field, parent: str) -> Iterator[str]:
        own = self._own_writes(child.name)
        for entity_id in self._state.sections[child.name].find(field.name, [parent]):
            if entity_id not in own:
                yield entity_id
        for entity_id, raw in own.items():
            if raw is not None and self._serializer.decode(raw).get(field.name) == parent:
                yield entity_id

    def _stage(self, change: Change, encoded: bytes | None) -> None:
        layer = self.layers[-1]
        layer.setdefault(change.key.collection, {})[change.key.id] = encoded
        if change.mark is not None:
            mark = change.mark
            version = cast("int", mark.entity.get(VERSION, 1))
            entity = {name: value for name, value in mark.entity.items() if name != VERSION}
            marks = layer.setdefault(mark.key.collection, {})
            marks[mark.key.id] = self._serializer.encode(entity, version)

    # -- layers ------------------------------------------------------------------------------

    def commit_overlay(self) -> None:
        """Merge the innermost layer into the one around it."""
        top = self.layers.pop()
        for collection, images in top.items():
            self.layers[-1].setdefault(collection, {}).update(images)


class _Access(NamedTuple):
    """The access path of a query to its candidates.

    Attributes:
        ids: the candidates; None: all entities.
        complete: every candidate matches the filter, so the filter need not be evaluated.
        ordered: all ids, sorted, if the query needs them in this order.
    """

    kind: Literal["index", "key", "scan"]
    name: str | None
    ids: set[str] | None
    complete: bool
    detail: str
    ordered: tuple[str, ...] | None = None


def _index_name(collection: Collection, field: str) -> str:
    return next((each.name for each in collection.indexes if each.field == field), f"{field}-index")
