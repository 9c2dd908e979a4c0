"""What a reader or a session sees: the sections of the last commit, under the layers of its own writes.

Conditions are decided here, against that view, while the store's write lock is held. A layer maps
collections to ids to new bytes, None for what is gone: just what a commit appends.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Final, Literal, NamedTuple, TypeAlias, cast

import msgspec

from hf_async_store.changes import ANY, Change, Delete, Outcome, Patch, Put, Record
from hf_async_store.driver import QueryPlan, batched
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
from hf_async_store.strategies.json.serializer import Held, JSONSerializer
from hf_async_store.values import CREATED_AT, MAX_ENTITY_BYTES, VERSION, Entity, Key, check_size

Overlay: TypeAlias = dict[str, dict[str, bytes | None]]

_DECIDE_CHUNK: Final = 128
_FEW: Final = 1000
_SHARE: Final = 8
"""Up to this part of a section is taken out of it one by one."""

_READ_CHUNK: Final = 1024
_LOOK_CHUNK: Final = 256
"""Pairs with a map in them are counted by the collector: fewer than make it run are alive at a time."""

_LIGHT: Final = MAX_ENTITY_BYTES // 8
"""A text shorter than this cannot weigh too much: no value weighs 8 times its JSON."""


class OverlayView:
    """Reads and decisions on one state of the store.

    Args:
        state: current, and kept so by the caller for as long as the view decides.
        references: declared references are enforced.

    Attributes:
        layers: this session's own writes, the innermost savepoint last; none for plain reads.
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
        """The bytes of an entity as this view has it."""
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
        return key.id in self._state.sections[key.collection].held

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        if len(keys) <= _READ_CHUNK:
            return [self.record(key, self.stored_bytes(key.collection, key.id)) for key in keys]
        # All bytes first: they are what was stored at one moment.
        raws = [self.stored_bytes(key.collection, key.id) for key in keys]
        records: list[Record | None] = []
        for start in range(0, len(keys), _READ_CHUNK):
            part = slice(start, start + _READ_CHUNK)
            records += map(self.record, keys[part], raws[part])
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
            async with Owned(self._by_id(query, section, access)) as rows:
                async for piece in rows:
                    for entity_id, raw in piece:
                        entity = section.entity(entity_id, raw)
                        yield Record(Key(query.collection, entity_id), entity)
            return
        ids, held = self._candidates(query, section, access)
        # What is kept for sorting are the keys; an entity is decoded when it is yielded.
        async with (
            Owned(self._matching(query, section, access, ids, held)) as chunks,
            Owned(ordered(chunks, query, keep=False)) as rows,
        ):
            async for entity_id, _ in rows:
                raw = section.normalized(entity_id, held[entity_id])
                yield Record(Key(query.collection, entity_id), section.entity(entity_id, raw))

    async def iter_batches(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        """See `SupportsBatches`."""
        if query.order:
            async with Owned(batched(self.select(query))) as pieces:
                async for each in pieces:
                    yield each
            return
        section = self._state.sections[query.collection]
        access = await self._access(query, section)
        async with Owned(self._by_id(query, section, access)) as rows:
            async for piece in rows:
                yield [section.entity(entity_id, raw) for entity_id, raw in piece]

    async def count(self, query: Query) -> int:
        section = self._state.sections[query.collection]
        access = await self._access(query, section, by_id=False)
        ids, held = self._candidates(query, section, access)
        if access.whole and (access.ids is None or not self.layers):
            return len(ids)
        async with Owned(self._matching(query, section, access, ids, held)) as chunks:
            return sum([len(chunk) async for chunk in chunks])

    async def explain(self, query: Query) -> QueryPlan:
        access = await self._access(query, self._state.sections[query.collection])
        return QueryPlan(
            access=access.kind,
            index=access.name,
            residual=not access.whole,
            sorted_here=bool(query.order),
            detail=access.detail,
        )

    async def _access(
        self, query: Query, section: CollectionTable, *, by_id: bool = True
    ) -> _Access:
        """The cheapest way to the candidates; its index is current up to the next await."""
        collection = self._schema[query.collection]
        pinned = equality_candidates(query.where)
        whole = query.where == EVERYTHING or isinstance(query.where, Comparison)
        keys = pinned.get((collection.key,))
        if keys is not None:
            found = {each for each in keys if isinstance(each, str)}
            return _Access("key", None, found, whole, f"{len(found)} ids")
        best: _Access | None = None
        fields = [
            path[0]
            for path in pinned
            if len(path) == 1 and isinstance(path[0], str) and section.can_index(path[0])
        ]
        if fields:
            await section.index(*fields)
        for field in fields:
            ids = section.find(field, pinned[(field,)])
            if best is None or len(ids) < len(best.ids or ()):
                name = _index_name(collection, field)
                # In an index all lists and maps, which only strange files hold there, are alike.
                exact = not any(isinstance(each, list | dict) for each in pinned[(field,)])
                best = _Access("index", name, ids, whole and exact, f"{len(ids)} candidates")
        if best is not None:
            return best
        ordered_ids = await section.sorted_ids() if by_id and not query.order else None
        detail = f"all {len(section.held)} entities"
        whole = query.where == EVERYTHING
        return _Access("scan", None, None, whole, detail, ordered_ids)

    def _candidates(
        self, query: Query, section: CollectionTable, access: _Access
    ) -> tuple[Sequence[str], dict[str, Held]]:
        """Ids and bytes of one moment: this method does not await, and must follow `_access` so."""
        own = self._own(query.collection)
        held = section.held
        if access.ids is None:
            # Tuples, which the collector leaves alone, where a list would be walked again and again.
            ids: Sequence[str] = access.ordered if access.ordered is not None else tuple(held)
            first, last = 0, None
            if query.after is not None and access.ordered is not None:
                first = bisect_right(ids, query.after.id)
            if access.whole and not own and not query.order and query.limit is not None:
                last = first + query.limit
            ids = ids[first:last]  # in one step: the rest may be long
        else:
            ids = [each for each in access.ids if each in held]
        if own:
            ids = [each for each in ids if each not in own]
            ids += [each for each, raw in own.items() if raw is not None]
        if not query.order and (own or access.ids is not None):
            ids = sorted(ids)
            if query.after is not None:
                ids = ids[bisect_right(ids, query.after.id) :]
        # A copy of a dict takes one step, and the collector never looks into it; but a page of a
        # large section is not worth one.
        texts = (
            held.copy()
            if access.ids is None and len(ids) > max(_FEW, len(held) // _SHARE)
            else {each: held[each] for each in ids if each in held}
        )
        texts.update((each, raw) for each, raw in own.items() if raw is not None)
        return ids, texts

    def _own(self, collection: str) -> dict[str, bytes | None]:
        own: dict[str, bytes | None] = {}
        for layer in self.layers:
            own.update(layer.get(collection, {}))
        return own

    async def _by_id(
        self, query: Query, section: CollectionTable, access: _Access
    ) -> AsyncGenerator[list[tuple[str, bytes]], None]:
        ids, held = self._candidates(query, section, access)
        left = len(ids) if query.limit is None else query.limit
        pieces = self._rows(query, section, access, ids, held)
        async with Owned(pieces) as owned:
            async for piece in owned:
                if piece:
                    yield piece[:left]
                left -= len(piece)
                if left <= 0:
                    return

    async def _rows(
        self,
        query: Query,
        section: CollectionTable,
        access: _Access,
        ids: Sequence[str],
        held: dict[str, Held],
    ) -> AsyncGenerator[list[tuple[str, bytes]], None]:
        """The candidates that match, with their bytes, in pieces."""
        matches = compile_filter(query.where)
        for start in range(0, len(ids), _READ_CHUNK):
            part = slice(start, start + _READ_CHUNK)
            rows = [(each, section.normalized(each, held[each])) for each in ids[part]]
            if not access.whole or (access.ids is not None and self.layers):
                rows = [row for row in rows if matches(section.look(*row))]
            yield rows
            await asyncio.sleep(0)

    async def _matching(
        self,
        query: Query,
        section: CollectionTable,
        access: _Access,
        ids: Sequence[str],
        held: dict[str, Held],
    ) -> AsyncGenerator[list[tuple[str, Entity]], None]:
        """The candidates that match, decoded to be looked at, in pieces."""
        matches = compile_filter(query.where)
        await asyncio.sleep(0)  # copying the candidates took its time
        for start in range(0, len(ids), _LOOK_CHUNK):
            part = slice(start, start + _LOOK_CHUNK)
            found = (
                (each, section.look(each, section.normalized(each, held[each])))
                for each in ids[part]
            )
            yield [row for row in found if matches(row[1])]
            await asyncio.sleep(0)

    # -- deciding ----------------------------------------------------------------------------

    async def write(self, changes: Sequence[Change]) -> list[Outcome]:
        """Apply in order to the innermost layer, up to the first that fails."""
        outcomes: list[Outcome] = []
        for number, change in enumerate(changes, 1):
            outcomes.append(await self._decided(change))
            if isinstance(outcomes[-1], StorageError):
                break
            if not number % _DECIDE_CHUNK:
                await asyncio.sleep(0)
        return outcomes

    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        """Apply each that can be; the error of each that cannot."""
        outcomes: list[Outcome] = []
        for number, change in enumerate(changes, 1):
            outcomes.append(await self._decided(change))
            if not number % _DECIDE_CHUNK:
                await asyncio.sleep(0)
        return outcomes

    async def _decided(self, change: Change) -> Outcome:
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
        text = self._serializer.encode(entity, version)
        if len(text) > _LIGHT:
            check_size(entity)
        self._check_parents(change, raw)
        self._stage(change, text)
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
        """The stored version; None if there is no such entity, 0 of one that is damaged: where no
        version is expected, it can still be deleted."""
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
        """The condition; the entity is decoded only to explain a refusal."""
        expect = change.expect
        if expect is not ANY and expect != actual:
            current = None if raw is None else self._entity(change.key, raw)
            check(change.key, expect, actual, current)

    def _check_parents(self, change: Change, raw: bytes | None) -> None:
        if self._references and missing_parents(self._schema, change, self.exists):
            current = None if raw is None else self._entity(change.key, raw)
            check_parents(self._schema, change, current, self.exists)

    def _referrers(self, child: Collection, field: Field, parent: str) -> Iterator[str]:
        own = self._own(child.name)
        for entity_id in self._state.sections[child.name].find(field.name, [parent]):
            if entity_id not in own:
                yield entity_id
        for entity_id, raw in own.items():
            if raw is not None and self._serializer.decode(raw).get(field.name) == parent:
                yield entity_id

    def _stage(self, change: Change, text: bytes | None) -> None:
        layer = self.layers[-1]
        layer.setdefault(change.key.collection, {})[change.key.id] = text
        if change.mark is not None:
            mark = change.mark
            version = cast("int", mark.entity.get(VERSION, 1))
            entity = {name: value for name, value in mark.entity.items() if name != VERSION}
            marks = layer.setdefault(mark.key.collection, {})
            marks[mark.key.id] = self._serializer.encode(entity, version)

    # -- layers ------------------------------------------------------------------------------

    def commit_overlay(self) -> None:
        """The innermost layer becomes part of the one around it."""
        top = self.layers.pop()
        for collection, images in top.items():
            self.layers[-1].setdefault(collection, {}).update(images)


class _Access(NamedTuple):
    """How a query gets to its candidates.

    Attributes:
        ids: the candidates; None: all.
        whole: the access is the whole filter, nothing is left to be tested.
        ordered: all ids in order, where they are wanted so.
    """

    kind: Literal["index", "key", "scan"]
    name: str | None
    ids: set[str] | None
    whole: bool
    detail: str
    ordered: tuple[str, ...] | None = None


def _index_name(collection: Collection, field: str) -> str:
    return next((each.name for each in collection.indexes if each.field == field), f"{field}-index")
