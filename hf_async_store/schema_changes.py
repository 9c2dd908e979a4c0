"""What a declaration and its store disagree about, for every engine, and doing it.

Stored values are read as they are: one that does not fit its declared type stays, compares as its own
type, and is only counted here. The changes have these kinds:

- "collection", "field", "index", "expiry": the store does not remember it, or remembers it differently.
- "key": the store remembers another key. It is refused: the entities have their ids in that field.
- "values": stored values that do not fit the declared type. They stay.
- "form": timestamps in another form than the fixed one. They are rewritten.
- "required": entities in which a required field is missing or null. It is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from typing import Final

import msgspec

from hf_async_store.changes import Patch
from hf_async_store.driver import Engine, SchemaChange, SchemaProgress
from hf_async_store.errors import (
    ConcurrencyConflictError,
    EntityNotFoundError,
    InvalidFieldError,
    SchemaMismatchError,
    StorageError,
    UnavailableError,
)
from hf_async_store.generators import Owned
from hf_async_store.query import build_query
from hf_async_store.recorded_expiry import recorded_expire
from hf_async_store.schema import Collection, Field, Schema
from hf_async_store.values import (
    UPDATED_AT,
    Entity,
    Key,
    Value,
    is_canonical_timestamp,
    parse_timestamp,
    utc_now,
    version_of,
)

REFUSED: Final = frozenset({"key", "required"})
"""The kinds of changes that `apply` refuses."""

_CHUNK_SIZE: Final = 256
_MAX_SHOWN: Final = 5
_ROUND_SIZE: Final = 20_000
_MAX_FRUITLESS: Final = 10

_EFFECTS: Final = {
    "values": "stored values that are not of type {type}: {count:,}; they stay, and compare as their own "
    "type",
    "form": "stored timestamps in another form, which compare as text: {count:,}; they are "
    "rewritten in batches",
    "required": "entities without a value for this required field: {count:,}; give them one first",
}


async def compared(engine: Engine, schema: Schema) -> list[SchemaChange]:
    """Everything that the declaration and the store disagree about. Reads all entities.

    Raises:
        CorruptionError: the recorded declarations are invalid.
    """
    changes = [*unrecorded(await engine.declarations(), schema), *await engine.schema_changes()]
    # The ids of their entities are in another field.
    unreadable = {each.collection for each in changes if each.kind == "key"}
    for collection in schema.values():
        if collection.name in unreadable:
            continue
        found = _Found(collection)
        async with Owned(_chunks(engine, collection)) as chunks:
            async for chunk in chunks:
                for entity in chunk:
                    found.examine(entity)
        changes += found.changes()
    return changes


async def apply(
    engine: Engine, schema: Schema, progress: SchemaProgress | None, *, complete: bool
) -> None:
    """Bring the store to the declaration.

    It can be interrupted and run again: what is done is not done again.

    Raises:
        SchemaMismatchError: the data breaks the declaration; nothing was changed.
    """
    report = progress or _ignore
    changes = await compared(engine, schema)
    refused = [each for each in changes if each.kind in REFUSED]
    if refused:
        raise SchemaMismatchError(
            "nothing was changed: "
            + "; ".join(f"{_place(each)}: {each.detail}" for each in refused)
        )
    await engine.apply_schema(progress=progress, complete=complete)
    for name in {each.collection: None for each in changes if each.kind == "form"}:
        await _rewrite(engine, schema[name], report)
    await engine.remember(schema.values())
    for each in changes:
        if each.kind in ("collection", "field", "index", "expiry"):
            report(each, 1, 1)


def _ignore(change: SchemaChange, done: int, total: int | None) -> None:
    del change, done, total


def _place(change: SchemaChange) -> str:
    return f"{change.collection}.{change.name}" if change.name else change.collection


# -- the recorded declarations --------------------------------------------------------------


def unrecorded(recorded: Iterable[Collection], schema: Schema) -> Iterator[SchemaChange]:
    """The parts of a schema that the recorded declarations lack, or contain differently."""
    known = {each.name: each for each in recorded}
    for collection in schema.values():
        if collection.name not in known:
            yield SchemaChange(
                "collection", collection.name, "", "the store does not know this collection yet"
            )
        else:
            yield from _differences(known[collection.name], collection)


def contradictions(recorded: Iterable[Collection], schema: Schema) -> Iterator[SchemaChange]:
    """Of `unrecorded`, those where another program has declared something else."""
    known = {each.name: each for each in recorded}
    for each in unrecorded(known.values(), schema):
        if each.kind == "key" or (
            each.kind == "field" and each.name in known[each.collection].fields
        ):
            yield each


def _differences(recorded: Collection, declared: Collection) -> Iterator[SchemaChange]:
    name = declared.name
    if recorded.key != declared.key:
        detail = f"the store knows this collection with the key {recorded.key!r}"
        yield SchemaChange("key", name, declared.key, detail)
        return
    for field in declared.fields.values():
        known = recorded.fields.get(field.name)
        if known is None:
            detail = "the store does not know this field yet"
            yield SchemaChange("field", name, field.name, detail)
        elif known != field:
            detail = f"another program declared it as {_described(known)}, not {_described(field)}"
            yield SchemaChange("field", name, field.name, detail)
    if declared.expires is not None and recorded_expire(recorded) != recorded_expire(declared):
        known_as = f"knows {recorded.expires}" if recorded.expires else "does not know it yet"
        detail = f"entities expire by {declared.expires}; the store {known_as}"
        yield SchemaChange("expiry", name, declared.expires.field, detail)
    indexes = {each.name for each in recorded.indexes}
    for index in declared.indexes:
        if index.name not in indexes:
            detail = "the store does not know this index yet"
            yield SchemaChange("index", name, index.name, detail)


def _described(field: Field) -> str:
    parts = [field.type, "required" if field.required else ""]
    if field.references is not None:
        parts.append(f"-> {field.references}" + ("" if field.enforced else " (not enforced)"))
    return " ".join(filter(None, parts))


# -- the stored values ----------------------------------------------------------------------


class _Offenders(msgspec.Struct):
    """Entities that have the same disagreement with one field; `ids` are the first."""

    count: int = 0
    ids: list[str] = []

    def add(self, entity_id: str) -> None:
        self.count += 1
        self.ids = sorted([*self.ids, entity_id])[:_MAX_SHOWN]


class _Found:
    """The stored values of a collection that disagree with its declaration."""

    def __init__(self, collection: Collection) -> None:
        self._collection = collection
        self._offenders: dict[tuple[str, str], _Offenders] = {}

    def examine(self, entity: Entity) -> None:
        for name, kind in _disagreements(self._collection, entity):
            offenders = self._offenders.setdefault((name, kind), _Offenders())
            offenders.add(self._collection.id_of(entity))

    def changes(self) -> list[SchemaChange]:
        collection = self._collection
        return [
            SchemaChange(
                kind,
                collection.name,
                name,
                _EFFECTS[kind].format(count=each.count, type=collection.fields[name].type)
                + f"; the first: {', '.join(map(repr, each.ids))}",
            )
            for (name, kind), each in sorted(self._offenders.items())
        ]


def _disagreements(collection: Collection, entity: Entity) -> Iterator[tuple[str, str]]:
    """The fields of an entity that disagree with their declaration, each with the kind of change."""
    for name, field in collection.typed.items():
        value = entity.get(name)
        if value is None:
            if field.required:
                yield name, "required"
        elif field.type == "timestamp" and isinstance(value, str):
            form = value if is_canonical_timestamp(value) else parse_timestamp(value)
            if form != value:
                yield name, "values" if form is None else "form"
        elif not _fits(field, value):
            yield name, "values"


def _fits(field: Field, value: Value) -> bool:
    try:
        field.check(value, "")
    except InvalidFieldError:
        return False
    return True


async def _chunks(engine: Engine, collection: Collection) -> AsyncGenerator[list[Entity], None]:
    """All entities of a collection; the event loop is not held for longer than one chunk."""
    async with Owned(engine.select_batches(build_query(collection))) as batches:
        async for batch in batches:
            for start in range(0, len(batch), _CHUNK_SIZE):
                yield batch[start : start + _CHUNK_SIZE]
                await asyncio.sleep(0)


# -- timestamps in another form -------------------------------------------------------------


async def _rewrite(engine: Engine, collection: Collection, report: SchemaProgress) -> None:
    """Rewrite the timestamps of a collection in the fixed form, unless they change meanwhile.

    In rounds of reading and writing: no stream is open during a write, because its snapshot could hold
    up a change of the schema by another program, and with it the write.
    """
    change = SchemaChange("form", collection.name, "", "rewrite timestamps")
    done = 0
    before: set[Key] = set()
    fruitless = 0
    while patches := await _patches(engine, collection):
        written: set[Key] = set()
        for start in range(0, len(patches), _CHUNK_SIZE):
            written |= await _written(engine, patches[start : start + _CHUNK_SIZE])
            report(change, done + len(written), None)
        done += len(written)
        # Other programs may have changed these entities, or given them such values again.
        fruitless = 0 if written - before else fruitless + 1
        if fruitless == _MAX_FRUITLESS:
            raise UnavailableError(
                f"{len(patches):,} entities of {collection.name} still have timestamps in another "
                "form, because other programs write them; run `schema apply` again"
            )
        before = written


async def _patches(engine: Engine, collection: Collection) -> list[Patch]:
    """The changes of the first entities whose timestamps are in another form."""
    patches: list[Patch] = []
    async with Owned(_chunks(engine, collection)) as chunks:
        async for chunk in chunks:
            patches += filter(None, (_patch(collection, each) for each in chunk))
            if len(patches) >= _ROUND_SIZE:
                break
    return patches


def _patch(collection: Collection, entity: Entity) -> Patch | None:
    """The change that gives the timestamps of an entity the fixed form; None if they have it."""
    names = [name for name, kind in _disagreements(collection, entity) if kind == "form"]
    if not names:
        return None
    now = utc_now()
    key = Key(collection.name, collection.id_of(entity))
    fields = {each: collection.fields[each].check(entity[each], collection.name) for each in names}
    return Patch(key, {**fields, UPDATED_AT: now}, now, version_of(entity))


async def _written(engine: Engine, patches: Sequence[Patch]) -> set[Key]:
    """Write changes; returns the keys of those that were written. The others met another change."""
    written = set()
    for patch, outcome in zip(patches, await engine.write_each(patches), strict=True):
        if not isinstance(outcome, StorageError):
            written.add(patch.key)
        elif not isinstance(outcome, ConcurrencyConflictError | EntityNotFoundError):
            raise outcome
    return written
