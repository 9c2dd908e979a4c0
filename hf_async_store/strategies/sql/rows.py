"""The storage format: a row is the id, the version, and the whole entity as one JSON document.

The document contains the id, but not the version. All other columns are generated from it, for other
programs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from hf_async_store.errors import CorruptionError
from hf_async_store.strategies.sql.grammar import decode_json
from hf_async_store.strategies.sql.names import DOC, quoted
from hf_async_store.values import VERSION, Entity

if TYPE_CHECKING:
    from hf_async_store.schema import Collection, Field
    from hf_async_store.strategies.sql.grammar import Grammar

_DAMAGED: Final = (ValueError, TypeError, RecursionError)
"""The exceptions that decoding a damaged row can raise."""


class Table:
    """The table of a collection.

    Attributes:
        name: quoted.
        key: the name of the key column, quoted.
        terms: by field, the sort terms that its indexes contain.
        selected: the expressions that a SELECT must read for `entity`.
        fetch_one, fetch_many: the SQL that reads rows by an id, and by a list of ids.
    """

    def __init__(
        self, collection: Collection, grammar: Grammar, columns: Iterable[str] | None = None
    ) -> None:
        """
        Args:
            columns: those that exist; None: all.
        """
        there = None if columns is None else frozenset(columns)
        self.collection = collection
        self.grammar = grammar
        self.name = quoted(collection.name)
        self.key = quoted(collection.key)
        self.terms = {
            field.name: grammar.indexed_terms(field, "t.")
            for field in indexed_fields(collection)
            if there is None or there.issuperset(grammar.sort_columns(field))
        }
        self.selected = f"t.{self.key}, {grammar.read(f't.{DOC}')}, t.{VERSION}"
        source = f"SELECT {self.selected} FROM {self.name} AS t WHERE t.{self.key}"
        self.fetch_one = f"{source} = {grammar.parameter(1, 'text')}"
        self.fetch_many = f"{source} {grammar.in_list(grammar.parameter(1, 'list'))}"

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
            if type(entity_id) is not str or entity.get(self.collection.key) != entity_id:
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
            f"the table {self.collection.name} contains an invalid row, "
            f"{self.collection.key} {entity_id!r}: {exc}. Another program wrote it: correct or "
            "delete it"
        )


def indexed_fields(collection: Collection) -> list[Field]:
    """The fields whose sort terms some index contains, without the key, which sorts by itself."""
    names = [each.name for each in collection.references]
    for index in collection.indexes:
        names += [index.field, *([index.sort] if index.sort else [])]
    return [collection.fields[each] for each in dict.fromkeys(names) if each != collection.key]
