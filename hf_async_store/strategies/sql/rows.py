"""The tables of a store, and their format: a row is the id, the version, the whole entity as one JSON
document, the key columns, and the unique columns.

The document contains the id, but not the version. A key column contains `sort_bytes` of a field of an
index, or of a reference; a unique column contains `unique.digest` of the fields of a unique index.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from hf_async_store.errors import CorruptionError
from hf_async_store.sort_bytes import sort_bytes_of
from hf_async_store.strategies.sql.grammar import decode_json
from hf_async_store.strategies.sql.names import (
    DOC,
    Names,
    key_column,
    quoted,
    sql_name,
    unique_column,
)
from hf_async_store.unique import digest, stored_digest
from hf_async_store.values import VERSION, Entity, Value

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.catalogue import Catalogue, Entry
    from hf_async_store.strategies.sql.grammar import Compiled, Grammar

_DAMAGED: Final = (ValueError, TypeError, RecursionError)
"""The exceptions that decoding a damaged row can raise."""


class Table:
    """The table of a collection. Immutable.

    Attributes:
        collection: the name of the collection.
        key_field: the name of its key.
        name: of the table, quoted.
        key: the name of the key's column, quoted.
        key_fields: all fields that have a key column, in the order of `keys`.
        key_columns: the names of the key columns, quoted, in the same order.
        unique: the fields of the unique columns.
        columns: the names of the key columns and the unique columns, quoted: those of `Stored.keys`.
        ready: the fields whose key columns queries may use.
        plain: these, without the id and the version, which have columns of their own.
        statements: those of queries, by shape: see `query_shapes`. The only part that changes.
        generation: see `Entry`.
        selected: the expressions that a SELECT must read for `entity`.
        fetch_one, fetch_many: the SQL that reads rows by an id, and by a list of ids.
    """

    def __init__(self, collection: str, entry: Entry, grammar: Grammar, names: Names) -> None:
        self.collection = collection
        self.entry = entry
        self.grammar = grammar
        self.key_field = entry.key
        self.name = quoted(names.table(collection))
        self.key = quoted(sql_name(entry.key))
        self.key_fields = tuple(entry.columns)
        self.key_columns = tuple(quoted(key_column(each)) for each in entry.columns)
        self.unique = entry.unique_columns
        unique_columns = tuple(quoted(unique_column(each)) for each in self.unique)
        self.columns = (*self.key_columns, *unique_columns)
        self.ready = frozenset(name for name, filled in entry.columns.items() if filled)
        self.plain = self.ready - {entry.key, VERSION}
        self.statements: dict[tuple[object, ...], Compiled] = {}
        self.generation = entry.generation
        self.selected = f"t.{self.key}, {grammar.read(f't.{DOC}')}, t.{VERSION}"
        source = f"SELECT {self.selected} FROM {self.name} AS t WHERE t.{self.key}"
        self.fetch_one = f"{source} = {grammar.parameter(1, 'text')}"
        self.fetch_many = f"{source} {grammar.in_list(grammar.parameter(1, 'list'))}"

    def keys(self, entity: Entity) -> tuple[bytes | None, ...]:
        """The values of `columns` of an entity.

        Raises:
            InvalidFieldError: a unique index cannot contain its values.
        """
        keys = sort_bytes_of(entity, self.key_fields)
        return (*keys, *self.digests(entity)) if self.unique else keys

    def digests(self, entity: Mapping[str, Value]) -> list[bytes | None]:
        """The values of the unique columns; raises as `keys`."""
        return [digest(entity, fields, self.collection) for fields in self.unique]

    def stored_keys(self, entity: Entity) -> tuple[bytes | None, ...]:
        """As `keys`, of an entity that was stored before the unique indexes."""
        keys = sort_bytes_of(entity, self.key_fields)
        return (*keys, *(stored_digest(entity, fields) for fields in self.unique))

    def entity(self, row: Sequence[object]) -> Entity:
        """The entity of a row of `selected`.

        Raises:
            CorruptionError: the row contains something that this store never writes.
        """
        try:
            entity_id, doc, version = row
            entity = decode_json(doc) if type(doc) is str else None
            if type(entity) is not dict:
                raise TypeError(f"{DOC} does not contain a JSON object")
            if type(entity_id) is not str or entity.get(self.key_field) != entity_id:
                raise ValueError(f"the id is not that in {DOC}")
            if type(version) is not int or version < 0:
                raise ValueError(f"version is {version!r}")
        except _DAMAGED as exc:
            raise self.damaged(row[0], exc) from exc
        entity[VERSION] = version
        return entity

    def damaged(self, entity_id: object, exc: Exception) -> CorruptionError:
        """The error for a row that cannot be decoded."""
        return CorruptionError(
            f"the table {self.name} contains an invalid row, {self.key_field} {entity_id!r}: {exc}. "
            "Another program wrote it: correct or delete it"
        )


class Tables(Mapping[str, Table]):
    """The existing tables of a store by collection, as the catalogue describes them. Immutable.

    When the catalogue has changed, the engine replaces the whole object, and makes a new writer.

    Attributes:
        schema: the declarations of all programs together.
        names: of the tables of this store.
        by_name: the same as this mapping.
    """

    def __init__(self, catalogue: Catalogue, grammar: Grammar, names: Names) -> None:
        self.catalogue = catalogue
        self.names = names
        self.schema = catalogue.schema()
        self.by_name = {
            name: Table(name, each, grammar, names) for name, each in catalogue.entries.items()
        }

    def __getitem__(self, name: str) -> Table:
        return self.by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)
