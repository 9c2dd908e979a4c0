"""The storage format: converts entities to rows of a table, and rows to entities.

* Each declared field has a column of the same name, NULL if the field is missing. A json field is
  stored as JSON.
* `doc` contains all other fields as one JSON object; NULL if there are none.
* `version` is the version that the store assigns.
* `_side` contains, by field name, what the column of a field cannot store: null for an explicit null
  (to distinguish it from a missing field), or the exact JSON of a value that the engine would
  change. NULL if there is neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from hashlib import blake2b
from math import isfinite
from operator import itemgetter
from types import MappingProxyType, NoneType
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

import msgspec

from hf_async_store.batch_validation import columns_of, group_by_keys
from hf_async_store.errors import CorruptionError
from hf_async_store.schema import Collection, Field
from hf_async_store.values import CREATED_AT, VERSION, Entity, Removed, Value, canonical

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.dialect import Dialect

DOC: Final = "doc"
SIDE: Final = "_side"

Kind: TypeAlias = str
"""The type of a column: a field type, or "bigint" for an integer of the store itself."""

# The system columns of every table in PostgreSQL.
_TAKEN: Final = frozenset({"tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"})

_MOST_NULLS: Final = 256
_NULL: Final = msgspec.Raw(b"null")
"""An explicit null."""

_USUAL: Final = frozenset({str, int, bool, NoneType})
"""The Python types that most columns return."""

_DAMAGED: Final = (ValueError, TypeError, RecursionError)
"""The exceptions that decoding a damaged row can raise."""

encode_json: Final = msgspec.json.encode
decode_json: Final = msgspec.json.decode


def sql_name(name: str) -> str:
    """The name of a declared field or collection in SQL.

    Reserved names get the prefix `_`, with which no declared name begins.
    """
    return f"_{name}" if name in _TAKEN or name.startswith("sqlite_") else name


def declared_name(name: str) -> str:
    """The inverse of `sql_name`."""
    return name.removeprefix("_") if sql_name(name.removeprefix("_")) == name else name


def quoted(name: str) -> str:
    """A declared name, which matches `[a-z][a-z0-9_]*`, as a quoted SQL identifier."""
    return f'"{sql_name(name)}"'


def limited(name: str) -> str:
    """A name of at most 63 bytes, because PostgreSQL truncates longer ones."""
    if len(name) <= 63:
        return name
    return f"{name[:50]}~{blake2b(name.encode(), digest_size=6).hexdigest()}"


def with_columns(collection: Collection, columns: Iterable[str]) -> Collection:
    """A copy of a collection, for reading, without the fields whose column does not exist.

    Such a field was declared later, and is read from the document, in which it was stored before.
    """
    there = set(columns)
    found = copy(collection)
    found.fields = MappingProxyType(
        {name: field for name, field in collection.fields.items() if sql_name(name) in there}
    )
    found.references = tuple(each for each in collection.references if each.name in found.fields)
    return found


class Patched(msgspec.Struct, frozen=True):
    """The fields of an update in the storage format.

    Attributes:
        values: by declared field, the new value of its column.
        sets, removes: the other fields: JSON of the dict of those to set, and of the list of names
            to remove.
        side_sets, side_removes: the same for `_side`.
        weight: an upper bound for what the update adds to the size of the entity.
    """

    values: dict[str, object]
    sets: str | None
    removes: str | None
    side_sets: str | None
    side_removes: str
    weight: int


class TableMapping:
    """The table of a collection.

    Attributes:
        name: of the table, quoted.
        key: the name of the key column, quoted.
        columns: the names of the columns of declared fields, quoted, the key first.
        kinds: the types of these columns.
        fetch_one, fetch_many: the SQL that reads whole rows by an id, and by a list of ids.
        versions, count: the SQL that reads the versions for a list of ids, and that counts how many
            of the ids exist.
        whole: the text columns, with the prefix `t.`, whose whole value an index contains.
    """

    def __init__(self, collection: Collection, dialect: Dialect) -> None:
        self.collection = collection
        self.dialect = dialect
        self.name = quoted(collection.name)
        self.key = quoted(collection.key)
        self.fields: tuple[Field, ...] = tuple(collection.fields.values())
        self.columns = tuple(quoted(each.name) for each in self.fields)
        self.kinds: tuple[Kind, ...] = tuple(each.type for each in self.fields)
        self.names = tuple(each.name for each in self.fields)
        references = {f"t.{quoted(each.name)}" for each in collection.references}
        self.whole = frozenset({f"t.{self.key}", *references})
        self._blank: Entity = dict.fromkeys(self.names)
        self._columns_of = itemgetter(*self.names)  # at least the key and two timestamps
        self._places = {name: place for place, name in enumerate(self.names)}
        self._stored = tuple((each.name, dialect.to_column.get(each.type)) for each in self.fields)
        self._converting = tuple(
            (place, each.name, dialect.to_column[each.type])
            for place, each in enumerate(self.fields)
            if each.type in dialect.to_column
        )
        self._loaded = tuple(
            (each.name, dialect.from_column[each.type])
            for each in self.fields
            if each.type in dialect.from_column
        )
        self.selected = self.selection(self.fields, doc=True)
        self._text_names = tuple(sorted([*self.names, VERSION]))
        self._text_places = {name: place for place, name in enumerate(self._text_names)}
        self._text_loaded = tuple(
            (self._text_places[name], convert) for name, convert in self._loaded
        )
        self._text_nulls: dict[str, tuple[int, ...]] = {}
        # A field whose value is None is omitted from the JSON, and so are doc and side.
        self._text_form = msgspec.defstruct(
            "Row",
            [(name, object, None) for name in (*self._text_names, DOC, SIDE)],
            omit_defaults=True,
            gc=False,
        )
        # Its names are sorted. Only a json field can contain further names, which `canonical` sorts.
        self._text_encode = canonical if "json" in self.kinds else encode_json
        columns = [
            dialect.read(f"t.{quoted(each)}", collection.fields[each].type)
            if each in collection.fields
            else f"t.{VERSION}"
            for each in self._text_names
        ]
        json = [dialect.read(f"t.{each}", "json") for each in (DOC, SIDE)]
        self.text_selected = ", ".join([*columns, *json])
        source = f"SELECT {self.selected} FROM {self.name} AS t WHERE"
        self.fetch_one = f"{source} t.{self.key} = {dialect.parameter(1, 'text')}"
        listed = dialect.one_of_ids(f"t.{self.key}")
        self.fetch_many = f"{source} {listed}"
        self.versions = f"SELECT t.{self.key}, t.{VERSION} FROM {self.name} AS t WHERE {listed}"
        self.count = f"SELECT count(*) FROM {self.name} AS t WHERE {listed}"

    def selection(self, fields: Iterable[Field], *, doc: bool) -> str:
        """The list of expressions that a SELECT must read for `entity`."""
        parts = [self.dialect.read(f"t.{quoted(each.name)}", each.type) for each in fields]
        parts.append(self.dialect.read(f"t.{DOC}", "json") if doc else "NULL")
        parts.append(self.dialect.read(f"t.{SIDE}", "json"))
        return ", ".join([*parts, f"t.{VERSION}"])

    # -- entities to rows --------------------------------------------------------------------

    def row(self, entity: Entity) -> list[object]:
        """An entity without its version in the storage format: its columns, `doc`, `_side`."""
        # Every write calls this, so most of the work is done by functions in C: all columns are copied
        # at once, and then only those whose values need a conversion are changed.
        whole = {**self._blank, **entity}
        row: list[object] = list(self._columns_of(whole))
        side: dict[str, str | None] = {}
        for place, name, convert in self._converting:
            value = row[place]
            if value is not None:
                row[place], exact = convert(value)
                if not exact:
                    side[name] = encode_json(value).decode()
        if None in entity.values():
            for name, value in entity.items():
                if value is None and name in self._places:
                    row[self._places[name]] = self._null(name, side)
        if len(whole) == len(self._blank):
            row.append(None)
        else:
            others = {n: v for n, v in entity.items() if n not in self._places}
            row.append(self._document(others, side))
        row.append(encode_json(side).decode() if side else None)
        return row

    def columns_of(
        self, entities: Sequence[Entity], created: Sequence[str] | None
    ) -> list[Sequence[object]] | None:
        """The result of `row` for each entity, by column; None if the entities have too different fields.

        Args:
            created: the `created_at` of each entity, if the entities do not contain it.
        """
        groups = group_by_keys(entities)
        if groups is None or any((CREATED_AT in names) != (created is None) for names in groups):
            return None
        rows: list[Sequence[object]] = [()] * len(entities)
        for names, places in groups.items():
            given: dict[str, Sequence[Value]] = dict(
                zip(names, columns_of([entities[place] for place in places]), strict=True)
            )
            if created is not None:
                given[CREATED_AT] = [created[place] for place in places]
            columns = self._columns(given, len(places))
            if len(groups) == 1:
                return columns
            for place, row in zip(places, zip(*columns, strict=True), strict=True):
                rows[place] = row
        return list(zip(*rows, strict=True))

    def _columns(self, given: Mapping[str, Sequence[Value]], count: int) -> list[Sequence[object]]:
        """The columns of entities that have the same fields; `given` contains their values by field."""
        nothing: Sequence[object] = (None,) * count
        columns: list[Sequence[object]] = []
        odd: dict[int, dict[str, str | None]] = {}  # by position: the content of `_side`
        null: list[str] = []  # the fields that are null in all entities
        for name, convert in self._stored:
            column = given.get(name)
            if column is None:
                columns.append(nothing)
            elif convert is not None or None in column:
                if convert is None and column.count(None) == count:
                    null.append(name)
                    columns.append(nothing)
                else:
                    columns.append([self._value(name, v, odd, n) for n, v in enumerate(column)])
            else:
                columns.append(column)
        declared = self.collection.fields
        others = {name: column for name, column in given.items() if name not in declared}
        documents = nothing
        if others:
            documents = [
                self._whole(dict(zip(others, values, strict=True)), odd, place)
                for place, values in enumerate(zip(*others.values(), strict=True))
            ]
        usual = encode_json(dict.fromkeys(null)).decode() if null else None
        sides: list[object] = [usual] * count
        for place, side in odd.items():
            sides[place] = encode_json({**dict.fromkeys(null), **side}).decode()
        return [*columns, documents, sides]

    def _value(
        self, name: str, value: Value, odd: dict[int, dict[str, str | None]], place: int
    ) -> object:
        side: dict[str, str | None] = {}
        stored = self._null(name, side) if value is None else self._converted(name, value, side)
        if side:
            odd.setdefault(place, {}).update(side)
        return stored

    def _whole(self, others: Entity, odd: dict[int, dict[str, str | None]], place: int) -> str:
        side: dict[str, str | None] = {}
        text = self._document(others, side)
        if side:
            odd.setdefault(place, {}).update(side)
        return text

    def patched(self, fields: Mapping[str, Value | Removed]) -> Patched:
        """The fields of an update in the storage format."""
        declared = self.collection.fields
        values: dict[str, object] = {}
        sets: Entity = {}
        removes: list[str] = []
        side: dict[str, str | None] = {}
        plain: Entity = {}
        for name, value in fields.items():
            if isinstance(value, Removed):
                if name in declared:
                    values[name] = None
                else:
                    removes.append(name)
                continue
            plain[name] = value
            if name not in declared:
                sets[name] = value
            elif value is None:
                values[name] = self._null(name, side)
            else:
                values[name] = self._converted(name, value, side)
        document = self._document(sets, side) if sets else None
        return Patched(
            values={name: values[name] for name in sorted(values)},
            sets=document,
            removes=encode_json(removes).decode() if removes else None,
            side_sets=encode_json(side).decode() if side else None,
            side_removes=encode_json([name for name in fields if name not in side]).decode(),
            weight=9 * len(encode_json(plain)),
        )

    def _null(self, name: str, side: dict[str, str | None]) -> str | None:
        if self.collection.fields[name].type == "json":
            return "null"
        side[name] = None
        return None

    def _converted(self, name: str, value: Value, side: dict[str, str | None]) -> object:
        convert = self.dialect.to_column.get(self.collection.fields[name].type)
        if convert is None:
            return value
        stored, exact = convert(value)
        if not exact:
            side[name] = encode_json(value).decode()
        return stored

    def _document(self, others: Entity, side: dict[str, str | None]) -> str:
        text, exact = self.dialect.json_text(others)
        if not exact:
            for name, value in others.items():
                if not self.dialect.json_text(value)[1]:
                    side[name] = encode_json(value).decode()
        return text

    # -- rows to entities --------------------------------------------------------------------

    def entity(self, row: Sequence[object], names: Sequence[str] | None = None) -> Entity:
        """The entity of a row.

        Args:
            names: the declared fields with which the row begins; None: all.

        Raises:
            CorruptionError: the row contains something that this store never writes.
        """
        try:
            return self._entity(row, names)
        except _DAMAGED as exc:
            raise self._damaged(row[0], exc) from exc

    def _damaged(self, entity_id: object, exc: Exception) -> CorruptionError:
        return CorruptionError(
            f"the table {self.collection.name} contains an invalid row, "
            f"{self.collection.key} {entity_id!r}: {exc}. Another program wrote it: correct or "
            "delete it"
        )

    def _entity(self, row: Sequence[object], names: Sequence[str] | None) -> Entity:
        _check_row(row, row[0], row[-1])
        entity: Entity = {
            name: value
            for name, value in zip(names or self.names, cast("Sequence[Value]", row), strict=False)
            if value is not None
        }
        doc, side, version = row[-3:]
        self._complete(entity, doc, side, names)
        entity[VERSION] = cast("int", version)
        return entity

    def _complete(
        self, entity: Entity, doc: object, side: object, names: Sequence[str] | None = None
    ) -> None:
        """Convert the columns of an entity, and add the fields in `doc` and `_side`."""
        for name, convert in self._loaded:
            if name in entity:
                entity[name] = convert(cast("str", entity[name]))
        if doc is not None:
            others = _map_in(doc, DOC)
            if self.collection.key in others:
                raise ValueError(f"{DOC} also contains the key {self.collection.key}")
            entity.update(others)
        if side is not None:
            for name, text in _map_in(side, SIDE).items():
                if names is None or name in names or name not in self.collection.fields:
                    entity[name] = None if text is None else decode_json(text)

    def texts(self, rows: Iterable[Sequence[object]]) -> list[bytes]:
        """The canonical JSON of the entities in rows that a SELECT of `text_selected` returned.

        The columns are sorted by name, so most rows are encoded without being converted to entities
        first.
        """
        form, loaded, encode = self._text_form, self._text_loaded, self._text_encode
        nulls = self._text_nulls
        key, version = self._text_places[self.collection.key], self._text_places[VERSION]
        texts: list[bytes] = []
        row: Sequence[object] = ()
        try:
            for row in rows:
                _check_row(row, row[key], row[version])
                if row[-2] is not None:
                    texts.append(self._text_with_doc(row))
                    continue
                side = cast("str | None", row[-1])
                if side is None and not loaded:
                    texts.append(encode(form(*row)))
                    continue
                values = list(row)
                for place, convert in loaded:
                    if values[place] is not None:
                        value = convert(cast("str", values[place]))
                        values[place] = _NULL if value is None else value
                if side is not None:
                    values[-1] = None
                    places = nulls.get(side)
                    if places is None:
                        self._put_side(values, side)
                    else:
                        for place in places:
                            values[place] = _NULL
                texts.append(encode(form(*values)))
        except _DAMAGED as exc:
            raise self._damaged(row[key], exc) from exc
        return [canonical(decode_json(each)) if b"-0.0" in each else each for each in texts]

    def _text_with_doc(self, row: Sequence[object]) -> bytes:
        *values, doc, side = row
        entity: Entity = {
            name: value
            for name, value in zip(self._text_names, cast("list[Value]", values), strict=True)
            if value is not None
        }
        self._complete(entity, doc, side)
        return canonical(entity)

    def _put_side(self, values: list[object], side: str) -> None:
        places = []
        texts = _map_in(side, SIDE)
        for name, text in texts.items():
            if name not in self._text_places:
                raise ValueError(
                    f"{SIDE} contains the field {name!r}, which is not a declared column"
                )
            place = self._text_places[name]
            values[place] = _NULL if text is None else decode_json(text)
            places.append(place)
        # Most rows have only nulls in `_side`, and many rows have the same.
        if len(self._text_nulls) < _MOST_NULLS and set(texts.values()) == {None}:
            self._text_nulls[side] = tuple(places)


def _check_row(row: Sequence[object], entity_id: object, version: object = 0) -> None:
    """Reject values that this store never writes.

    Raises:
        ValueError, TypeError: another program wrote the row.
    """
    if type(entity_id) is not str:
        raise ValueError("the id is not a string")
    if type(version) is not int or version < 0:
        raise ValueError(f"version is {version!r}")
    if not _USUAL.issuperset(map(type, row)):
        for each in row:
            if isinstance(each, bytes):
                raise TypeError("a column contains bytes, or a string that is not UTF-8")
            if isinstance(each, float) and not isfinite(each):
                raise ValueError(f"a column contains {each!r}")


def _map_in(text: object, column: str) -> dict[str, Any]:
    """The JSON object in `doc` or `_side`."""
    found = decode_json(text) if isinstance(text, str) else None
    if not isinstance(found, dict):
        raise TypeError(f"{column} does not contain a JSON object")
    return found
