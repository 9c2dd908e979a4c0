"""An update of the first entities of a query by one statement on SQLite, which changes the document of each
by a function.

To read the rows, decide each change and write the rows takes twice as long. The statement does the same to
each row: changes that must be decided for each entity, such as those of references, are not made by it.
"""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any, Final

from hf_async_store.changes import ChangedMatches, Patch
from hf_async_store.errors import StorageError
from hf_async_store.field_operations import plain_fields
from hf_async_store.query import MISSING, compile_order
from hf_async_store.sort_bytes import sort_bytes
from hf_async_store.strategies.sql import reading
from hf_async_store.strategies.sql.compiler import compile_query
from hf_async_store.strategies.sql.decisions import decode_members, encoded_document
from hf_async_store.strategies.sql.grammar import Compiled, decode_json
from hf_async_store.strategies.sql.names import DOC
from hf_async_store.strategies.sql.query_shapes import compiled_by_shape
from hf_async_store.strategies.sql.sqlite_functions import CHANGED_DOCUMENT
from hf_async_store.values import INT_MAX, VERSION, Entity, Key, Removed, version_of

if TYPE_CHECKING:
    from collections.abc import Container

    from hf_async_store.changes import Change
    from hf_async_store.query import Query
    from hf_async_store.strategies.sql.rows import Table

_REFUSED: Final = (ValueError, TypeError, LookupError, RecursionError, StorageError)


def _compile_places(table: Table, query: Query) -> Compiled:
    """The SELECT of the numbers of the rows of a query."""
    return compile_query(table, query, selected="t.rowid")


class CannotDecideError(Exception):
    """One of the rows must be read, and decided by itself."""


class MatchingUpdate:
    """The statement. `of` returns None if it is not enough.

    Args:
        sql, args: the statement.
        fields: the new values.
    """

    def __init__(
        self, table: Table, query: Query, fields: dict[str, Any], sql: str, args: list[object]
    ) -> None:
        self._table = table
        self._query = query
        self._sql = sql
        self._args = args
        self._changed = {name: each for name, each in fields.items() if type(each) is not Removed}
        self._removed = fields.keys() - self._changed.keys()
        self._read = [each for each in query.fields or () if each not in (table.key_field, VERSION)]
        self._entities: list[Entity] = []  # those that were changed, as they were read
        self._refused = False

    @classmethod
    def of(
        cls, table: Table, query: Query, change: Change, decided: Container[str]
    ) -> MatchingUpdate | None:
        """The update of what a query selects.

        Args:
            decided: the fields of which a new value must be decided for each entity.
        """
        fields = plain_fields(change.fields) if isinstance(change, Patch) else None
        if fields is None or query.fields is None or reading.is_tried_by_id(table, query):
            return None
        if any(each in decided for each in fields):
            return None
        compiled = compiled_by_shape(_compile_places, table, query)
        if not compiled.limited or not reading.is_position_exact(table, query):
            return None
        args = compiled.args
        sets = [f"{VERSION} = t.{VERSION} + 1"]
        sets.append(f"{DOC} = {CHANGED_DOCUMENT}(t.{table.key}, t.{DOC}, t.{VERSION})")
        for name, column in zip(table.key_fields, table.key_columns, strict=True):
            if name in fields:
                value = fields[name]
                args.append(sort_bytes(MISSING if isinstance(value, Removed) else value))
                sets.append(f"{column} = {table.grammar.parameter(len(args), 'bytes')}")
        # A failure rolls back the transaction: see `sqlite_writer`.
        sql = f"UPDATE OR FAIL {table.name} AS t SET {', '.join(sets)} WHERE t.rowid IN ({compiled.sql})"
        return cls(table, query, fields, sql, args)

    def run(self, connection: Any) -> ChangedMatches:
        """Execute it in the open transaction.

        Raises:
            CannotDecideError: the transaction must be rolled back.
        """
        self._entities = []
        connection.changed_document.of_row = self._document
        try:
            changed = connection.execute(self._sql, self._args).rowcount
        except sqlite3.OperationalError as exc:
            if self._refused:
                raise CannotDecideError from exc
            raise
        query, entities = self._query, self._entities
        # A trigger of another program may keep a row as it is.
        if changed != len(entities) or not reading.are_in_place(query, entities):
            raise CannotDecideError
        key, order = self._table.key_field, compile_order(query)
        entities.sort(key=lambda each: order(str(each[key]), each))
        keys = [Key(query.collection, str(each[key])) for each in entities]
        return ChangedMatches(keys, entities, [version_of(each) + 1 for each in entities])

    def _document(self, entity_id: str, doc: str, version: int) -> str:
        """The new document of a row, which is recorded as it was."""
        try:
            members: dict[str, Any] = decode_members(doc)
            entity: Entity = {self._table.key_field: entity_id, VERSION: version}
            for name in self._read:
                if name in members:
                    entity[name] = decode_json(members[name])
            is_valid = decode_json(members[self._table.key_field]) == entity_id
            if not is_valid or type(version) is not int or not 0 <= version < INT_MAX:
                raise ValueError("another program wrote it")
            members.update(self._changed)
            for name in self._removed:
                members.pop(name, None)
            changed = encoded_document(self._table, members)
        except _REFUSED:
            self._refused = True
            raise
        self._entities.append(entity)
        return changed
