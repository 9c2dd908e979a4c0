"""What a declaration and its store disagree about, for every engine, and doing it.

Stored values are read as they are: one that does not fit its declared type stays, compares as its own
type, and is only counted here. The changes have these kinds:

- "collection", "field", "index", "expiry": the store does not remember it, or remembers it differently.
- "key": the store remembers another key. It is refused: the entities have their ids in that field. Until
  it is corrected, only the recorded declarations are compared.
- "values": stored values that do not fit the declared type. They stay.
- "form": timestamps in another form than the fixed one. They are rewritten.
- "required": entities in which a required field is missing or null. It is refused.
- "reference": entities that refer to a parent that does not exist, where references are enforced. They
  stay.
- "unique": entities that have the same values in the fields of a unique index, or values that it cannot
  contain. It is refused.
- "unique index": a unique index that is not enforced yet, because the collection had entities before it
  was declared.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Final

import msgspec

from hf_async_store.driver import Engine, SchemaChange, SchemaProgress
from hf_async_store.entity_rewriting import NewFields, pages, reporting, rewrite
from hf_async_store.errors import InvalidFieldError, SchemaMismatchError
from hf_async_store.event_loop import pause
from hf_async_store.generators import Owned
from hf_async_store.recorded_expiry import recorded_expire
from hf_async_store.schema import Collection, Field, Index, Schema
from hf_async_store.transforms import Transforms, transform
from hf_async_store.unique import digest
from hf_async_store.values import Entity, Key, Value, is_canonical_timestamp, parse_timestamp

log: Final = logging.getLogger("hf_async_store.schema")

REFUSED: Final = frozenset({"key", "required", "unique"})
"""The kinds of changes that `apply` refuses."""

_MAX_SHOWN: Final = 5
_MAX_VALUE: Final = 60
"""Maximum length of a value that a change shows."""
_MAX_KNOWN_PARENTS: Final = 50_000

_EFFECTS: Final = {
    "values": "stored values that are not of type {type}: {count:,}; they stay, and compare as their own "
    "type",
    "form": "stored timestamps in another form, which compare as text: {count:,}; they are "
    "rewritten in batches",
    "reference": "entities whose parent does not exist: {count:,}; they stay, and can be read and updated: "
    "save the parents, or change or delete these",
    "required": "entities without a value for this required field: {count:,}; give them one first",
    "unique": "entities with the same values as another one, or with values that a unique index cannot "
    "contain: {count:,}; change them first",
}


async def compared(engine: Engine, schema: Schema) -> list[SchemaChange]:
    """Everything that the declaration and the store disagree about. Reads all entities.

    Raises:
        CorruptionError: the recorded declarations are invalid.
    """
    changes = list(unrecorded(await engine.declarations(), schema))
    if any(each.kind == "key" for each in changes):
        return changes  # engines that create tables can read nothing by this declaration
    changes += await engine.schema_changes()
    unenforced = await engine.unenforced()
    changes += [_unenforced(name, index) for name, index in unenforced]
    # The ids of their entities are in another field.
    unreadable = {each.collection for each in changes if each.kind == "key"}
    for collection in schema.values():
        if collection.name in unreadable:
            continue
        found = _Found(collection, [e for name, e in unenforced if name == collection.name])
        parents = _MissingParents(engine, collection)
        async with Owned(pages(engine, collection)) as read:
            async for page in read:
                for entity in page:
                    found.examine(entity)
                for entity, name in await parents.of(page):
                    found.add(entity, name, "reference")
                await pause()
        changes += found.changes()
    return changes


async def apply(
    engine: Engine,
    schema: Schema,
    progress: SchemaProgress | None,
    transforms: Transforms,
    *,
    complete: bool,
) -> int:
    """Transform the entities, then bring the store to the declaration.

    It can be interrupted and run again: what is done is not done again. Returns the number of entities that
    the transforms have changed.

    Raises:
        SchemaMismatchError: the data breaks the declaration; nothing was changed, except by the
            transforms, which may provide required values.
    """
    report = progress or _ignore
    transformed = 0
    if transforms:
        _refuse(unrecorded(await engine.declarations(), schema), "nothing was changed")
        for name, function in transforms.items():
            transformed += await transform(engine, schema[name], function, report)
    changes = await compared(engine, schema)
    for each in changes:
        log.info("to do: %s of %s", each.kind, _place(each))
    _refuse(changes, "no more was changed" if transforms else "nothing was changed")
    await engine.apply_schema(progress=progress, complete=complete)
    for name in {each.collection: None for each in changes if each.kind == "form"}:
        new_forms = partial(_new_forms, schema[name])
        change = SchemaChange("form", name, "", "rewrite timestamps")
        await rewrite(engine, schema[name], new_forms, reporting(report, change))
    await engine.remember(schema.values())
    for each in changes:
        if each.kind in ("collection", "field", "index", "expiry"):
            report(each, 1, 1)
    log.info("the store agrees with the declared collections")
    return transformed


def _refuse(changes: Iterable[SchemaChange], state: str) -> None:
    refused = [each for each in changes if each.kind in REFUSED]
    if refused:
        raise SchemaMismatchError(
            f"{state}: " + "; ".join(f"{_place(each)}: {each.detail}" for each in refused)
        )


def _unenforced(collection: str, index: Index) -> SchemaChange:
    detail = (
        "the values are not checked yet; `schema apply` (on DynamoDB with --complete) compares them all, "
        "and from then on new ones are checked"
    )
    return SchemaChange("unique index", collection, index.name, detail)


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
            detail = (
                f"another program declared it as {_described(known)}, not as {_described(field)}"
            )
            yield SchemaChange("field", name, field.name, detail)
    if declared.expires is not None and recorded_expire(recorded) != recorded_expire(declared):
        known_as = f"knows {recorded.expires}" if recorded.expires else "does not know it yet"
        detail = f"entities expire by {declared.expires}; the store {known_as}"
        yield SchemaChange("expiry", name, declared.expires.field, detail)
    indexes = {each.name: each for each in recorded.indexes}
    for index in declared.indexes:
        if index.name not in indexes:
            detail = "the store does not know this index yet"
            yield SchemaChange("index", name, index.name, detail)
        elif index.unique and not indexes[index.name].unique:
            detail = "the store does not know yet that this index is unique"
            yield SchemaChange("index", name, index.name, detail)


def _described(field: Field) -> str:
    parts = ["required" if field.required else "", field.type]
    if field.references is not None:
        parts.append(f"-> {field.references}" + ("" if field.enforced else " (not enforced)"))
    return " ".join(filter(None, parts))


# -- the stored values ----------------------------------------------------------------------


class _Offenders(msgspec.Struct):
    """Entities that have the same disagreement with one field; `ids` are the first.

    Attributes:
        same: of a unique index, two entities with the same values, in words.
    """

    count: int = 0
    ids: list[str] = []
    same: str = ""

    def add(self, entity_id: str) -> None:
        self.count += 1
        self.ids = sorted([*self.ids, entity_id])[:_MAX_SHOWN]


class _Found:
    """The stored values of a collection that disagree with its declaration."""

    def __init__(self, collection: Collection, unenforced: Iterable[Index]) -> None:
        self._collection = collection
        self._unenforced = {each.name: each.fields for each in unenforced}
        self._offenders: dict[tuple[str, str], _Offenders] = {}
        self._owners: dict[tuple[str, bytes], str] = {}

    def examine(self, entity: Entity) -> None:
        entity_id = self._collection.id_of(entity)
        for name, kind in _disagreements(self._collection, entity):
            self.add(entity, name, kind)
        for name, fields in self._unenforced.items():
            self._compare(name, fields, entity, entity_id)

    def add(self, entity: Entity, name: str, kind: str) -> None:
        """Add a disagreement with a field or an index."""
        self._add(name, kind, self._collection.id_of(entity))

    def _add(self, name: str, kind: str, entity_id: str) -> _Offenders:
        offenders = self._offenders.setdefault((name, kind), _Offenders())
        offenders.add(entity_id)
        return offenders

    def _compare(self, name: str, fields: tuple[str, ...], entity: Entity, entity_id: str) -> None:
        try:
            value = digest(entity, fields, self._collection.name)
        except InvalidFieldError:
            self._add(name, "unique", entity_id)
            return
        if value is None:
            return
        owner = self._owners.setdefault((name, value), entity_id)
        if owner != entity_id:
            # The owner is listed once.
            if owner:
                self._add(name, "unique", owner)
            offenders = self._add(name, "unique", entity_id)
            if owner and not offenders.same:
                values = ", ".join(f"{each} {_shown(entity[each])}" for each in fields)
                offenders.same = f"; {owner!r} and {entity_id!r} both have {values}"
            self._owners[name, value] = ""

    def changes(self) -> list[SchemaChange]:
        collection = self._collection
        return [
            SchemaChange(
                kind,
                collection.name,
                name,
                _effect(kind, each.count, collection.fields.get(name))
                + f"; the first: {', '.join(map(repr, each.ids))}{each.same}",
                blocking=kind == "unique",
            )
            for (name, kind), each in sorted(self._offenders.items())
        ]


def _shown(value: Value) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]}..."


def _effect(kind: str, count: int, field: Field | None) -> str:
    return _EFFECTS[kind].format(count=count, type="" if field is None else field.type)


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


# -- references -------------------------------------------------------------------------------


class _MissingParents:
    """The references of a collection whose parents do not exist."""

    def __init__(self, engine: Engine, collection: Collection) -> None:
        self._engine = engine
        self._references = collection.references if engine.capabilities.references else ()
        self._existing: set[Key] = set()

    async def of(self, page: Sequence[Entity]) -> list[tuple[Entity, str]]:
        """Of a page, the entities and fields that refer to a missing parent."""
        referring = [
            (Key(field.parent, value), entity, field.name)
            for field in self._references
            for entity in page
            if type(value := entity.get(field.name)) is str
        ]
        parents = {key for key, _, _ in referring}
        if len(self._existing) > _MAX_KNOWN_PARENTS:
            self._existing &= parents
        if unknown := list(parents - self._existing):
            records = await self._engine.fetch(unknown)
            self._existing.update(each.key for each in records if each is not None)
        return [(entity, name) for key, entity, name in referring if key not in self._existing]


# -- timestamps in another form -------------------------------------------------------------


async def _new_forms(collection: Collection, entity: Entity) -> NewFields:
    """The timestamps of an entity that are in another form, in the fixed one."""
    return {
        name: collection.fields[name].check(entity[name], collection.name)
        for name, kind in _disagreements(collection, entity)
        if kind == "form"
    }
