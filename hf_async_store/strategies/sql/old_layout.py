"""Moves a SQLite store over from the first layout, in which each declared field had a column.

`doc` contained the other fields; `_side` contained, by field, null for an explicit null, or the exact
JSON of a value that the column could not store.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from hf_async_store.errors import CorruptionError
from hf_async_store.schema import Collection
from hf_async_store.strategies.sql.grammar import decode_json, encode_json
from hf_async_store.strategies.sql.names import DOC, OLD_SIDE, declared_name, quoted
from hf_async_store.values import VERSION, Entity, Value

_CHUNK_SIZE: Final = 1000


def set_aside(connection: sqlite3.Connection, tables: Sequence[str]) -> None:
    """Rename the tables, and drop their indexes, whose names are needed."""
    for table in tables:
        indexes = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'index' AND tbl_name = ? AND sql IS NOT NULL",
            (table,),
        ).fetchall()
        for [name] in indexes:
            connection.execute(f'DROP INDEX "{name}"')
        connection.execute(f'ALTER TABLE "{table}" RENAME TO "{_aside(table)}"')


def move_over(
    connection: sqlite3.Connection, tables: Mapping[str, tuple[Collection, Sequence[str]]]
) -> None:
    """Copy the rows of tables that were set aside into the new ones, and drop the old tables.

    Args:
        tables: by name, parents first: the collection, and the columns of the old table.
    """
    for table, (collection, columns) in tables.items():
        _copy(connection, table, collection, columns)
    for table in reversed(list(tables)):
        connection.execute(f'DROP TABLE "{_aside(table)}"')


def _copy(
    connection: sqlite3.Connection, table: str, collection: Collection, columns: Sequence[str]
) -> None:
    names = [each for each in columns if each not in (DOC, OLD_SIDE, VERSION)]
    listed = ", ".join(f'"{each}"' for each in names)
    rows = connection.execute(
        f'SELECT {listed}, {DOC}, {OLD_SIDE}, {VERSION} FROM "{_aside(table)}"'
    )
    key = quoted(collection.key)
    insert = f"INSERT INTO {quoted(collection.name)} ({key}, {VERSION}, {DOC}) VALUES (?, ?, ?)"
    fields = [declared_name(each) for each in names]
    while chunk := rows.fetchmany(_CHUNK_SIZE):
        connection.executemany(insert, [_moved(collection, fields, row) for row in chunk])


def _aside(table: str) -> str:
    return f"{table}~layout1"


def _moved(
    collection: Collection, fields: Sequence[str], row: Sequence[Any]
) -> tuple[str, int, str]:
    try:
        return _decoded(collection, fields, row)
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise CorruptionError(
            f"the table {collection.name} contains an invalid row, {row[0]!r}: {exc}. Another "
            "program wrote it: correct or delete it"
        ) from exc


def _decoded(
    collection: Collection, fields: Sequence[str], row: Sequence[Any]
) -> tuple[str, int, str]:
    *values, doc, side, version = row
    entity: Entity = {
        name: _value(collection, name, value)
        for name, value in zip(fields, values, strict=True)
        if value is not None
    }
    if doc is not None:
        entity.update(decode_json(doc))
    if side is not None:
        for name, text in decode_json(side).items():
            entity[name] = None if text is None else decode_json(text)
    return cast("str", entity[collection.key]), version, encode_json(entity).decode()


def _value(collection: Collection, name: str, value: Any) -> Value:
    field = collection.fields.get(name)
    if field is not None and field.type == "json":
        return cast("Value", decode_json(value))
    if field is not None and field.type == "boolean" and value in (0, 1):
        return bool(value)
    return cast("Value", value)
