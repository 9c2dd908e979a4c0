"""The catalogue of a store: what is declared by all of its programs together, and what exists for it.

It is the table `hf_catalogue (name, value)`, whose name has the prefix of the store, with the rows

- `layout`: the number of the layout of the tables;
- `store_id`: a random identity;
- `generation`: a number that increases with every change of the catalogue;
- `collection:NAME`: a JSON object, the `Entry` of a collection whose table exists;
- `feed:NAME`: a JSON object, the state of the change feed of a collection: see `feed_state`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Final

import msgspec

from hf_async_store.declarations import other_key
from hf_async_store.errors import (
    ConcurrencyConflictError,
    ConfigurationError,
    CorruptionError,
    NewerFormatError,
    SchemaMismatchError,
    StorageError,
)
from hf_async_store.expiry import Expire
from hf_async_store.recorded_expiry import RecordedExpire, recorded_expire
from hf_async_store.schema import Collection, Field, Index, Schema
from hf_async_store.strategies.sql.names import Names, quoted
from hf_async_store.values import FieldType

LAYOUT: Final = 3
"""The number of the layout of the tables. Earlier layouts had no table of this name."""

_PREFIX: Final = "collection:"


class CatalogueChangedError(ConcurrencyConflictError):
    """Another program changed the catalogue. Nothing was written; the engine reads it again."""

    def __init__(self) -> None:
        super().__init__(
            "another program changed the declarations of the store meanwhile: try again",
            retryable=True,
        )


class TableMissingError(StorageError):
    """A change of a collection whose table is made when it is first needed. Nothing was written."""

    def __init__(self, collection: str) -> None:
        super().__init__(f"the table of {collection!r} does not exist yet")


class DeclaredField(msgspec.Struct, frozen=True, omit_defaults=True):
    """A field that some program declared.

    Attributes:
        references: the collection to which it refers.
        enforced: some program enforces the reference; then every program does.
    """

    type: FieldType = "text"
    required: bool = False
    references: str | None = None
    enforced: bool = True

    @property
    def parent(self) -> str | None:
        """The collection to which it refers, if that is enforced."""
        return self.references if self.enforced else None


class DeclaredIndex(msgspec.Struct, frozen=True, omit_defaults=True):
    """An index that some program declared; `ready`: it exists and is complete."""

    fields: tuple[str, ...]
    ready: bool = True


class DeclaredUnique(msgspec.Struct, frozen=True, omit_defaults=True):
    """A unique index that some program declared, in addition to the index that queries use.

    Attributes:
        column: every program writes its column.
        enforced: each row contains the column, and its index exists.
    """

    fields: tuple[str, ...]
    column: bool = False
    enforced: bool = False


class DeclaredFeed(msgspec.Struct, frozen=True, omit_defaults=True):
    """The change feed of a collection.

    Attributes:
        seconds: for how long its changes are kept: the longest time that a program declared.
        ready: triggers record the changes.
    """

    seconds: float
    ready: bool = True


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """A collection whose table exists.

    Attributes:
        fields: by name, without the key.
        columns: by field that has a key column, in order: whether each row contains its value.
        generation: the least generation of a row that contains all key columns.
        unique: the unique indexes.
        expires: when its entities expire for the programs that declare it. No other program is affected.
        feed: the change feed, if some program declared it.
    """

    key: str
    fields: dict[str, DeclaredField]
    indexes: tuple[DeclaredIndex, ...] = ()
    columns: dict[str, bool] = {}
    generation: int = 1
    unique: tuple[DeclaredUnique, ...] = ()
    expires: RecordedExpire | None = None
    feed: DeclaredFeed | None = None

    def indexed(self, fields: Sequence[str]) -> tuple[str, ...]:
        """The fields of an index that precede the id, which ends every index."""
        names = tuple(fields)
        return names[: names.index(self.key)] if self.key in names else names

    def wanted_columns(self) -> list[str]:
        """The fields that need a key column: those of indexes, and references."""
        names = [name for each in self.indexes for name in self.indexed(each.fields)]
        names += [name for name, each in self.fields.items() if each.parent is not None]
        return list(dict.fromkeys(names))

    def wanted_indexes(self) -> list[tuple[str, ...]]:
        """The fields of the indexes that should exist: the declared ones, and one for each reference."""
        declared = [indexed for each in self.indexes if (indexed := self.indexed(each.fields))]
        first = {each[0] for each in declared}
        references = [
            (name,)
            for name, each in self.fields.items()
            if each.parent is not None and name not in first
        ]
        return list(dict.fromkeys([*declared, *references]))

    @property
    def unique_columns(self) -> tuple[tuple[str, ...], ...]:
        """The fields of the unique indexes whose columns every program writes."""
        return tuple(each.fields for each in self.unique if each.column)

    @property
    def has_feed(self) -> bool:
        """Whether triggers record the changes."""
        return self.feed is not None and self.feed.ready

    @property
    def lacks_feed(self) -> bool:
        """Whether a change feed is only declared."""
        return self.feed is not None and not self.feed.ready

    def feeding(self) -> Entry:
        """With the declared change feed ready."""
        feed = None if self.feed is None else DeclaredFeed(self.feed.seconds)
        return msgspec.structs.replace(self, feed=feed)

    @property
    def unenforced(self) -> tuple[tuple[str, ...], ...]:
        """The fields of the unique indexes that are only declared."""
        return tuple(each.fields for each in self.unique if not each.enforced)

    def enforcing(self, fields: Iterable[tuple[str, ...]]) -> Entry:
        """With the unique indexes of these fields enforced; of the next generation if a column is new."""
        wanted = {*fields}
        changed = self.with_unique_columns(wanted)
        unique = tuple(
            msgspec.structs.replace(each, enforced=each.enforced or each.fields in wanted)
            for each in changed.unique
        )
        return msgspec.structs.replace(changed, unique=unique)

    def with_unique_columns(self, fields: Iterable[tuple[str, ...]]) -> Entry:
        """With the columns of these unique indexes; of the next generation if one is new."""
        wanted = {*fields}
        unique = tuple(
            msgspec.structs.replace(each, column=each.column or each.fields in wanted)
            for each in self.unique
        )
        generation = self.generation + (unique != self.unique)
        return msgspec.structs.replace(self, unique=unique, generation=generation)

    def completed(self) -> Entry:
        """With all wanted key columns and indexes; of the next generation if a column is new."""
        new = {each: True for each in self.wanted_columns() if each not in self.columns}
        return msgspec.structs.replace(
            self,
            indexes=tuple(DeclaredIndex(each.fields) for each in self.indexes),
            columns={**dict.fromkeys(self.columns, True), **new},
            generation=self.generation + bool(new),
        )


class Catalogue(msgspec.Struct, frozen=True):
    """The catalogue, as it was read at one time."""

    entries: dict[str, Entry] = {}
    store_id: str = ""
    generation: int = 0

    def schema(self) -> Schema:
        """The declarations of all programs together.

        Raises:
            SchemaMismatchError: they contradict one another.
        """
        try:
            return Schema(_collection(name, each) for name, each in self.entries.items())
        except ConfigurationError as exc:
            raise SchemaMismatchError(
                f"the declarations of this store's programs contradict one another: {exc}"
            ) from exc

    def with_entries(self, entries: Mapping[str, Entry]) -> Catalogue:
        """With these entries added or replaced; the same catalogue if that changes nothing."""
        if all(self.entries.get(name) == each for name, each in entries.items()):
            return self
        return msgspec.structs.replace(
            self, entries={**self.entries, **entries}, generation=self.generation + 1
        )


def declared(
    catalogue: Catalogue, collections: Iterable[Collection], *, latest: bool = False
) -> dict[str, Entry]:
    """The entries of some collections, after a program declared them.

    A new collection has all key columns and indexes at once. To an existing one, nothing is added but
    the declaration: its new indexes are not ready.

    Args:
        latest: replace the recorded types of fields, too. A program does that once, because two
            programs with contrary declarations would otherwise do it in turns.

    Raises:
        SchemaMismatchError: a collection has another key.
    """
    known = catalogue.entries
    return {each.name: _merged(known.get(each.name), each, latest) for each in collections}


def refuse_other_parents(catalogue: Catalogue, collections: Iterable[Collection]) -> None:
    """Refuse a field that refers to another collection than another program has declared.

    Every program enforces the references of all, so no value could fit both.

    Raises:
        SchemaMismatchError.
    """
    for collection in collections:
        entry = catalogue.entries.get(collection.name)
        known = {} if entry is None else entry.fields
        for field in collection.references:
            recorded = known[field.name].parent if field.name in known else None
            if recorded not in (None, field.parent):
                raise SchemaMismatchError(
                    f"{collection.name}.{field.name} refers to {recorded!r} in this store, but to "
                    f"{field.parent!r} in this declaration: declare another field, or the reference "
                    "with enforced=False"
                )


def _merged(known: Entry | None, collection: Collection, latest: bool) -> Entry:
    fields = {
        name: DeclaredField(each.type, each.required, each.references, each.enforced)
        for name, each in collection.fields.items()
        if name != collection.key
    }
    indexes = [each.fields for each in collection.indexes]
    unique = [each.fields for each in collection.indexes if each.unique]
    if known is None:
        new = Entry(
            collection.key,
            fields,
            tuple(map(DeclaredIndex, indexes)),
            unique=tuple(map(DeclaredUnique, unique)),
            expires=recorded_expire(collection),
            feed=_feed(None, collection),
        )
        return msgspec.structs.replace(new.completed().enforcing(unique).feeding(), generation=1)
    if known.key != collection.key:
        raise other_key(collection.name, known.key, collection.key)
    for name, each in known.fields.items():
        here = fields.get(name, each)
        parent = each.parent or here.parent
        given = here if latest else each
        if given.parent != parent:
            given = msgspec.structs.replace(given, type="text", references=parent, enforced=True)
        fields[name] = given
    ready = [each.fields for each in known.indexes]
    more = [DeclaredIndex(each, ready=False) for each in indexes if each not in ready]
    others = [each.fields for each in known.unique]
    more_unique = [DeclaredUnique(each) for each in unique if each not in others]
    order = {**dict.fromkeys(known.fields), **fields}
    return msgspec.structs.replace(
        known,
        fields={name: fields[name] for name in order},
        indexes=(*known.indexes, *more),
        unique=(*known.unique, *more_unique),
        expires=_expires(known, collection, latest),
        feed=_feed(known.feed, collection),
    )


def _feed(known: DeclaredFeed | None, collection: Collection) -> DeclaredFeed | None:
    if collection.feed is None:
        return known
    here = DeclaredFeed(collection.feed.total_seconds(), ready=False)
    if known is None:
        return here
    return msgspec.structs.replace(known, seconds=max(known.seconds, here.seconds))


def _expires(known: Entry, collection: Collection, latest: bool) -> RecordedExpire | None:
    here = recorded_expire(collection)
    return (here or known.expires) if latest else (known.expires or here)


def _collection(name: str, entry: Entry) -> Collection:
    unique = [each.fields for each in entry.unique]
    indexed = {field for index in entry.indexes for field in index.fields}
    return Collection(
        name,
        key=entry.key,
        fields=[
            # A field that one program indexes may be of type json for another one.
            Field(
                field,
                "text" if each.type == "json" and field in indexed else each.type,
                each.required,
                each.references,
                each.enforced,
            )
            for field, each in entry.fields.items()
        ],
        indexes=[Index.of(each.fields, unique=each.fields in unique) for each in entry.indexes],
        expires=_usable_expire(entry),
        feed=None if entry.feed is None else timedelta(seconds=entry.feed.seconds),
    )


def _usable_expire(entry: Entry) -> Expire | None:
    """The recorded expiry, unless other programs declare its field with another type."""
    expires = entry.expires
    field = None if expires is None else entry.fields.get(expires.field)
    return expires.declared() if expires and field and field.type == "timestamp" else None


# -- rows of the table ----------------------------------------------------------------------


def read_sql(names: Names) -> str:
    """The SELECT that reads the rows of `from_rows`."""
    return f"SELECT name, value FROM {quoted(names.catalogue)}"


def generation_sql(names: Names) -> str:
    """The SELECT that reads the generation."""
    return f"SELECT value FROM {quoted(names.catalogue)} WHERE name = 'generation'"


def from_rows(rows: Iterable[Sequence[object]], table: str) -> Catalogue:
    """The catalogue from the rows of its table.

    Raises:
        NewerFormatError: the tables have another layout.
        CorruptionError: a row is damaged.
    """
    values = {str(name): value for name, value in rows}
    try:
        layout = int(str(values["layout"]))
        entries = {
            name.removeprefix(_PREFIX): msgspec.json.decode(str(value), type=Entry)
            for name, value in values.items()
            if layout == LAYOUT and name.startswith(_PREFIX)
        }
        generation = int(str(values.get("generation", 0)))
    except (KeyError, ValueError, msgspec.DecodeError) as exc:
        raise CorruptionError(
            f"the table {table} is damaged ({exc}): restore it from a backup"
        ) from exc
    if layout != LAYOUT:
        raise NewerFormatError(
            f"the tables have layout {layout}, and this version of the package knows "
            f"layout {LAYOUT}: use the version that created them, or a later one"
        )
    return Catalogue(entries, str(values.get("store_id", "")), generation)


def to_rows(catalogue: Catalogue, names: Iterable[str]) -> list[tuple[str, str]]:
    """The rows of the table that describe the store, and the collections with these names."""
    return [
        ("layout", str(LAYOUT)),
        ("store_id", catalogue.store_id),
        ("generation", str(catalogue.generation)),
        *(
            (f"{_PREFIX}{each}", msgspec.json.encode(catalogue.entries[each]).decode())
            for each in names
        ),
    ]
