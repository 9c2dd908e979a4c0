"""The view of a reader or a session: the committed sections, overlaid with the session's own writes.

Preconditions are checked here, against that view, while the store's write lock is held. A layer
contains the new bytes of entities by collection and id, None for a deleted entity: the same form as
in a commit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from itertools import repeat
from types import NoneType
from typing import Final, TypeAlias, cast

import msgspec

from hf_async_store.changes import (
    ABSENT,
    ANY,
    Change,
    Delete,
    EncodedPut,
    Outcome,
    Patch,
    Put,
    PutForm,
    Record,
    decoded,
)
from hf_async_store.claim_records import claim_key
from hf_async_store.collector import GatheredObjects
from hf_async_store.errors import CorruptionError, StorageError
from hf_async_store.event_loop import Chunks, pause
from hf_async_store.preconditions import (
    check,
    check_children,
    check_parents,
    is_there,
    missing_parents,
    next_version,
    no_longer_shared,
    patched,
    present,
)
from hf_async_store.schema import Collection, Field, Schema
from hf_async_store.strategies.json.collection_table import CollectionTable
from hf_async_store.strategies.json.serializer import (
    JSONSerializer,
    StoredEntity,
    encode_json,
    version_prefix,
)
from hf_async_store.strategies.json.snapshot_reader import SnapshotReader
from hf_async_store.strategies.json.store_state import StoreState
from hf_async_store.table_reading import TableReader
from hf_async_store.unique import Claims, Fields, claimed
from hf_async_store.values import (
    CREATED_AT,
    MAX_ENTITY_BYTES,
    VERSION,
    Entity,
    Key,
    Value,
    check_size,
)

Overlay: TypeAlias = dict[str, dict[str, bytes | None]]

_WRITE_CHUNK: Final = 128
_ENCODED_CHUNK: Final = 512
"""The number of encoded puts that are applied in about the same time."""

_READ_CHUNK: Final = 1024

_SIZE_CHECK_BYTES: Final = MAX_ENTITY_BYTES // 8
"""An entity whose JSON is shorter than this cannot exceed the size limit: the size that the limit
counts is less than 8 times the size of the JSON."""


class SessionView(TableReader[StoredEntity]):
    """Reads one state of the store, and checks and applies changes to it.

    Args:
        references: whether declared references are enforced.
        unique: by collection, the fields of the unique indexes that are enforced.
        shares_changes: see `Engine.shares_changes`; by now it may be false for a change that is shared.

    Attributes:
        state: the current state. The caller keeps it current while changes are applied.
        layers: the writes of this session, the innermost savepoint last; empty for plain reads.
    """

    def __init__(
        self,
        state: StoreState,
        schema: Schema,
        serializer: JSONSerializer,
        *,
        references: bool,
        unique: Mapping[str, tuple[Fields, ...]],
        shares_changes: Callable[[Key], bool],
    ) -> None:
        self.state = state
        self._schema = schema
        self._serializer = serializer
        self._references = references
        self._unique = unique
        self._shares_changes = shares_changes
        self._claims: Claims | None = None  # most changes claim nothing
        self.layers: list[Overlay] = []

    # -- reading -----------------------------------------------------------------------------

    def stored_bytes(self, collection: str, entity_id: str) -> bytes | None:
        """The bytes of an entity in this view; None if it does not exist."""
        for layer in reversed(self.layers):
            images = layer.get(collection)
            if images is not None and entity_id in images:
                return images[entity_id]
        table = self.state.sections[collection]
        stored = table.entities.get(entity_id)
        if stored is None or type(stored) is bytes:
            return stored
        return table.normalized(entity_id, stored)

    def exists(self, key: Key) -> bool:
        for layer in reversed(self.layers):
            images = layer.get(key.collection)
            if images is not None and key.id in images:
                return images[key.id] is not None
        return key.id in self.state.sections[key.collection].entities

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        if len(keys) <= _READ_CHUNK:
            return [self.record(key, self.stored_bytes(key.collection, key.id)) for key in keys]
        if not self.layers:
            reader = SnapshotReader(self.state, {key.collection for key in keys})
            try:
                return await reader.fetch(keys)
            finally:
                await reader.close()
        # A session has the write lock: nothing changes between the chunks.
        records: list[Record | None] = []
        gathered = GatheredObjects()
        async for chunk in Chunks(keys, _READ_CHUNK):
            records += [
                self.record(key, self.stored_bytes(key.collection, key.id)) for key in chunk
            ]
            gathered.add(len(chunk))
        return records

    def record(self, key: Key, raw: bytes | None) -> Record | None:
        return None if raw is None else Record(key, self._entity(key, raw))

    def _entity(self, key: Key, raw: bytes) -> Entity:
        return self.state.sections[key.collection].entity(key.id, raw)

    def _table(self, collection: str) -> CollectionTable:
        return self.state.sections[collection]

    def _own_changes(self, collection: str) -> dict[str, StoredEntity | None]:
        own: dict[str, StoredEntity | None] = {}
        for layer in self.layers:
            own.update(layer.get(collection, {}))
        return own

    # -- changes -----------------------------------------------------------------------------

    async def write(self, changes: Sequence[Change], *, each: bool = False) -> list[Outcome]:
        """Apply the changes to the innermost layer in order; the outcome of a failed one is its error.

        Args:
            each: apply them independently; otherwise only up to the first that fails.
        """
        outcomes: list[Outcome] = []
        is_encoded = bool(changes) and isinstance(changes[0], EncodedPut)
        size = _ENCODED_CHUNK if is_encoded else _WRITE_CHUNK
        for start in range(0, len(changes), size):
            if start:
                await pause()
            chunk = changes[start : start + size]
            if is_encoded:
                versions = self._put_columns(chunk) if each else []
                outcomes += versions or await self.write([*map(decoded, chunk)], each=each)
                if not each and isinstance(outcomes[-1], StorageError):
                    return outcomes
                continue
            puts = self._usual_puts(chunk) if each and len(chunk) > 1 else None
            if puts is not None:
                outcomes += self._put_all(puts)
                continue
            for change in chunk:
                try:
                    # Most changes need nothing that must be awaited: a coroutine costs as much as the rest.
                    if self._unique or isinstance(change, Delete):
                        await self._prepare(change)
                    outcomes.append(self._apply(change))
                except StorageError as exc:
                    outcomes.append(exc)
                    if not each:
                        return outcomes
        return outcomes

    def _usual_puts(self, changes: Sequence[Change]) -> list[Put] | None:
        """The changes, if they are puts of one collection, each decided by its stored entity alone."""
        puts = [
            each
            for each in changes
            if type(each) is Put
            and each.lifetimes is None
            and each.mark is None
            and not each.shared
        ]
        name = changes[0].key.collection
        if len(puts) < len(changes) or {each.key.collection for each in puts} != {name}:
            return None
        if self._unique.get(name) or (self._references and not self._have_parents(name, puts)):
            return None
        return puts

    def _have_parents(self, collection: str, puts: Sequence[Put]) -> bool:
        """Whether the parents of all are `_are_committed`."""
        for field in self._schema[collection].references:
            parents = {each.entity.get(field.name) for each in puts} - {None}
            if not self._are_committed(field.parent, parents):
                return False
        return True

    def _have_parents_of(self, collection: str, forms: Iterable[PutForm]) -> bool:
        """As `_have_parents`, of encoded puts with these forms."""
        return all(
            self._are_committed(field.parent, form.parents.get(field.name, frozenset()))
            for field in self._schema[collection].references
            for form in forms
        )

    def _are_committed(self, collection: str, ids: AbstractSet[Value]) -> bool:
        """Whether all are among the committed entities, and this session has not changed any."""
        if ids - self.state.sections[collection].entities.keys():
            return False
        return not any(collection in each for each in self.layers)

    def _put_columns(self, changes: Sequence[Change]) -> list[int]:
        """Apply encoded puts column by column, without decoding anything; returns the new versions.

        Nothing is done, and nothing returned, if one of them is unusual, see `_usual_puts`, or may fail.
        """
        puts = [
            each
            for each in changes
            if type(each) is EncodedPut and each.mark is None and each.lifetimes is None
        ]
        name, forms = changes[0].key.collection, {each.form for each in puts}
        ids = [each.key.id for each in puts if each.key.collection == name]
        [layer] = self.layers  # this session has no savepoint
        if len(set(ids)) < len(changes) or not layer.get(name, {}).keys().isdisjoint(ids):
            return []
        stored = list(map(self.state.sections[name].entities.get, ids))
        is_unusual = self._unique.get(name) or set(map(type, stored)) - {bytes, NoneType}
        if is_unusual or (self._references and not self._have_parents_of(name, forms)):
            return []
        try:
            versions = self._next_versions(puts, stored)
            ends = [each.form.end for each in puts]
            if not all(each.has_created_at for each in forms):
                ends = list(map(self._end, puts, stored))
        except StorageError:
            return []
        expects = [each.expect for each in puts]
        if expects.count(ANY) < len(expects) and expects != [
            ABSENT if raw is None else version - 1
            for raw, version in zip(stored, versions, strict=True)
        ]:
            return []
        imported = [each.import_version for each in puts]
        versions = [new if v is None else v for v, new in zip(imported, versions, strict=True)]
        starts = {each: version_prefix(each) for each in set(versions)}
        rows = zip(map(starts.__getitem__, versions), puts, ends, strict=True)
        texts = [b"".join((start, each.text[1:-1], end)) for start, each, end in rows]
        layer.setdefault(name, {}).update(zip(ids, texts, strict=True))
        return versions

    def _next_versions(self, puts: Sequence[Put], stored: Sequence[bytes | None]) -> list[int]:
        key, version_of = puts[0].key, self._serializer.version
        present = [raw for raw in stored if raw is not None]
        if not present:
            return [next_version(key, None)] * len(puts)
        # Most entities of a batch have the same version.
        start = present[0][: present[0].find(b",") + 1]
        if len(present) == len(puts) and all(map(bytes.startswith, present, repeat(start))):
            return [next_version(key, version_of(key, start))] * len(puts)
        return [
            next_version(each.key, None if raw is None else version_of(each.key, raw))
            for each, raw in zip(puts, stored, strict=True)
        ]

    def _put_all(self, puts: Sequence[Put]) -> list[Outcome]:
        """`_put` of each of `_usual_puts`, in one loop without a call for each step.

        This session has no savepoint.
        """
        name = puts[0].key.collection
        stored = self.state.sections[name].entities
        [layer] = self.layers
        images = layer.setdefault(name, {})
        version_of = self._serializer.version
        # Most entities of a batch have, and get, the version of the one before.
        known, known_start = 0, version_prefix(0)
        last, start = known, known_start
        outcomes: list[Outcome] = []
        for put in puts:
            key, entity, version = put.key, put.entity, put.import_version
            raw, actual = stored.get(key.id), None
            try:
                if type(raw) is bytes:
                    if not raw.startswith(known_start):
                        known = version_of(key, raw)
                        known_start = version_prefix(known)
                    actual = known
                is_complete = version is not None or CREATED_AT in entity
                if (
                    key.id in images
                    or (put.expect is not ANY and put.expect != (ABSENT if raw is None else actual))
                    or (raw is not None and (actual is None or not is_complete))
                ):
                    outcomes.append(self._put(put))
                    continue
                if version is None:
                    version = next_version(key, actual)
                    if not is_complete:
                        entity = {**entity, CREATED_AT: put.written_at}
                if version != last:
                    last, start = version, version_prefix(version)
                images[key.id] = start + encode_json(entity)[1:]
                outcomes.append(version)
            except StorageError as exc:
                outcomes.append(exc)
        return outcomes

    def _apply(self, change: Change) -> int | None:
        if isinstance(change, Put):
            return self._put(change)
        return self._patch(change) if isinstance(change, Patch) else self._delete(change)

    async def _prepare(self, change: Change) -> None:
        """Build the indexes by which the change is checked."""
        name = change.key.collection
        if not isinstance(change, Delete):
            for fields in self._unique.get(name, ()):
                await self.state.sections[name].owners(fields)
        elif self._references and self._version_to_delete(change) is not None:
            for child, field in self._schema.children[name]:
                await self.state.sections[child.name].indexes.ready_for(field.name)

    def _put(self, change: Put) -> int:
        key = change.key
        if change.shared and not self._shares_changes(key):
            raise no_longer_shared(key)
        raw, actual = self._current(change)
        replaces_expired = raw is None and change.lifetimes is not None and self.exists(key)
        version = change.import_version
        entity = change.entity
        if version is None:
            version = next_version(key, actual)
            if CREATED_AT not in entity:
                entity = self._with_created_at(change, raw)
        if self._references:
            self._check_parents(change, raw)
        if self._unique:
            self._check_unique(change, raw, entity)
        self._stage(change, self._serializer.encode(entity, version))
        if replaces_expired:
            self._end_claim(key)
        return version

    def _with_created_at(self, change: Put, raw: bytes | None) -> Entity:
        kept = self._created_at(change, raw)
        return change.entity if kept is msgspec.UNSET else {**change.entity, CREATED_AT: kept}

    def _created_at(self, change: Put, raw: bytes | None) -> str | msgspec.UnsetType | None:
        if raw is None:
            return change.written_at
        collection = self._schema[change.key.collection]
        return self._serializer.created_at(collection, change.key.id, raw)

    def _end(self, put: EncodedPut, raw: bytes | None) -> bytes:
        """What follows the fields in the text of a put in the canonical bytes of the entity."""
        end = put.form.end
        if put.import_version is not None or put.form.has_created_at:
            return end
        created_at = self._created_at(put, raw)
        if created_at is msgspec.UNSET:
            return end
        return b'%b,"created_at":%b}' % (end[:-1], encode_json(created_at))

    def _patch(self, change: Patch) -> int:
        key = change.key
        raw, actual = self._current(change)
        assert raw is not None, "a patch expects PRESENT or a version"
        version = next_version(key, actual)
        entity = patched(self._entity(key, raw), change.fields, version)
        del entity[VERSION]
        encoded = self._serializer.encode(entity, version)
        if len(encoded) > _SIZE_CHECK_BYTES:
            check_size(entity)
        if self._references:
            self._check_parents(change, raw)
        if self._unique:
            self._check_unique(change, raw, entity)
        self._stage(change, encoded)
        return version

    def _delete(self, change: Delete) -> int | None:
        key = change.key
        actual = self._version_to_delete(change)
        if actual is not None:
            if self._references:
                check_children(self._schema, key, self._referrers)
            self._stage(change, None)
            self._end_claim(key)
        return actual

    def _end_claim(self, key: Key) -> None:
        claim = claim_key(key)
        if self.exists(claim):
            self.layers[-1].setdefault(claim.collection, {})[claim.id] = None

    def _version_to_delete(self, change: Delete) -> int | None:
        """The stored version; None if the entity does not exist; 0 if it is damaged and the change
        expects no version: such an entity can still be deleted."""
        try:
            return self._current(change)[1]
        except CorruptionError:
            if change.expect is not ANY:
                raise
            return 0

    def _current(self, change: Change) -> tuple[bytes | None, int | None]:
        """The bytes and the version of the entity, which meet the precondition of the change."""
        key, expect = change.key, change.expect
        raw = self.stored_bytes(key.collection, key.id)
        if raw is not None and change.lifetimes is not None and key.collection in change.lifetimes:
            raw = None if present(change, self._entity(key, raw)) is None else raw
        actual = None if raw is None else self._serializer.version(key, raw)
        if expect is not ANY and expect != actual:
            # The entity is decoded only for the error.
            check(key, expect, actual, None if raw is None else self._entity(key, raw))
        return raw, actual

    def _check_parents(self, change: Put | Patch, raw: bytes | None) -> None:
        if change.lifetimes is None and self._are_parents_stored(change):
            return
        exists = self.exists if change.lifetimes is None else partial(self._exists_for, change)
        if missing_parents(self._schema, change, exists):
            current = None if raw is None else self._entity(change.key, raw)
            check_parents(self._schema, change, current, exists)

    def _are_parents_stored(self, change: Put | Patch) -> bool:
        """Whether all parents are among the committed entities and this session changed none of their
        collections: the usual case, decided without an object for each key."""
        fields = change.entity if isinstance(change, Put) else change.fields
        sections, layers = self.state.sections, self.layers
        for field in self._schema[change.key.collection].references:
            parent = fields.get(field.name)
            if type(parent) is str:
                collection = field.parent
                if parent not in sections[collection].entities:
                    return False
                for layer in layers:
                    if collection in layer:
                        return False
        return True

    def _exists_for(self, change: Change, key: Key) -> bool:
        """Whether a parent exists for a change."""
        if change.lifetimes is None or key.collection not in change.lifetimes:
            return self.exists(key)
        raw = self.stored_bytes(key.collection, key.id)
        return raw is not None and is_there(change, key, self._entity(key, raw))

    def _referrers(self, child: Collection, field: Field, parent: str) -> Iterator[str]:
        own = self._own_changes(child.name)
        for entity_id in self.state.sections[child.name].indexes.find(field.name, parent):
            if entity_id not in own:
                yield entity_id
        for entity_id, raw in own.items():
            if raw is not None and self._serializer.decode(bytes(raw)).get(field.name) == parent:
                yield entity_id

    # -- unique values -----------------------------------------------------------------------

    def _check_unique(self, change: Change, raw: bytes | None, entity: Entity) -> None:
        key = change.key
        unique = self._unique.get(key.collection)
        if unique:
            before = None if raw is None else self._serializer.decode(raw)
            wanted = list(claimed(key.collection, unique, before, entity))
            self._claims = self._claims or Claims(self._current_entity, self._owners)
            self._claims.check(key, wanted, partial(is_there, change))

    def _current_entity(self, key: Key) -> Entity | None:
        raw = self.stored_bytes(key.collection, key.id)
        return None if raw is None else self._serializer.decode(raw)

    def _owners(self, collection: str, fields: Fields, digest: bytes) -> list[str]:
        return self.state.sections[collection].known_owners(fields).of(digest)

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
