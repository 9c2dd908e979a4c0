"""Queries on a connection: reads the rows of a SELECT as records, and filters and sorts in Python what
SQL could not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from hf_async_store.changes import Record
from hf_async_store.driver import batched
from hf_async_store.errors import CorruptionError, ProtocolError, StorageError
from hf_async_store.generators import Owned
from hf_async_store.query import Query, ordered
from hf_async_store.strategies.sql.compiler import Compiled, compile_count, compile_query
from hf_async_store.strategies.sql.row_mapping import TableMapping
from hf_async_store.values import Entity, Key, canonical

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.connections import LeasedConnection

_CHUNK_SIZE: Final = 256
"""How many rows are decoded per iteration of the event loop."""

_SMALL_LIMIT: Final = 512
"""Queries with at most this limit read all rows at once, without a cursor."""

_MAX_IDS: Final = 1024
"""The maximum number of ids in one statement."""


async def fetch(
    lease: LeasedConnection, tables: Mapping[str, TableMapping], keys: Sequence[Key]
) -> list[Record | None]:
    """The records of `keys`, in their order. A key whose collection has no table is absent."""
    by_collection: dict[str, dict[str, Sequence[object]]] = {}
    for key in keys:
        by_collection.setdefault(key.collection, {})[key.id] = ()
    for name, rows in by_collection.items():
        ids = list(rows)
        rows.clear()
        if name not in tables:
            continue
        table = tables[name]
        for start in range(0, len(ids), _MAX_IDS):
            chunk = ids[start : start + _MAX_IDS]
            sql = table.fetch_many if len(chunk) > 1 else table.fetch_one
            args = (table.dialect.argument(chunk, "list"),) if len(chunk) > 1 else chunk
            for row in await lease.rows(sql, args):
                rows[row[0]] = row
    records: list[Record | None] = []
    for key in keys:
        stored = by_collection[key.collection].get(key.id)
        entity = None if stored is None else tables[key.collection].entity(stored)
        records.append(None if entity is None else Record(key, entity))
    return records


async def records(
    lease: LeasedConnection, table: TableMapping, query: Query
) -> AsyncGenerator[Record, None]:
    """The records that match a query, in its order."""
    if query.limit == 0:
        return
    compiled = compile_query(table, query)
    collection = query.collection
    async with Owned(_entities(lease, table, query, compiled)) as batches:
        if compiled.sorted_here:
            async with Owned(ordered(batches, query)) as rows:
                async for entity_id, entity in rows:
                    yield Record(Key(collection, entity_id), entity)
            return
        count = 0
        async for batch in batches:
            for entity_id, entity in batch:
                yield Record(Key(collection, entity_id), entity)
                count += 1
                if count == query.limit:
                    return


async def select_batches(
    lease: LeasedConnection, table: TableMapping, query: Query
) -> AsyncGenerator[list[Entity], None]:
    """The entities of `records`, in batches."""
    compiled = compile_query(table, query)
    if query.limit is not None or compiled.sorted_here:
        async with Owned(batched(records(lease, table, query))) as batches:
            async for each in batches:
                yield each
        return
    async with Owned(_entities(lease, table, query, compiled)) as found:
        async for batch in found:
            if batch:
                yield [entity for _, entity in batch]


async def select_json(
    lease: LeasedConnection, table: TableMapping, query: Query
) -> AsyncGenerator[list[bytes], None]:
    """The canonical JSON of the entities of `records`, in batches."""
    compiled = compile_query(table, query, table.text_selected)
    if compiled.residual is None and not compiled.sorted_here and compiled.names is None:
        async with Owned(_rows(lease, table, compiled)) as batches:
            async for rows in batches:
                for start in range(0, len(rows), _CHUNK_SIZE):
                    yield table.texts(rows[start : start + _CHUNK_SIZE])
                    await asyncio.sleep(0)
        return
    async with Owned(select_batches(lease, table, query)) as entities:
        async for batch in entities:
            yield list(map(canonical, batch))


def may_be_small(query: Query) -> bool:
    return query.limit is not None and query.limit <= _SMALL_LIMIT


async def small(lease: LeasedConnection, table: TableMapping, query: Query) -> list[Record] | None:
    """The records of a query with a small limit, read at once.

    Returns None if the limit is not small, or if rows must be filtered or sorted in Python.
    """
    if not may_be_small(query):
        return None
    compiled = compile_query(table, query)
    if compiled.sorted_here or compiled.residual is not None:
        return None
    try:
        rows = await lease.rows(compiled.sql, compiled.args)
    except ProtocolError as exc:
        await _raise_if_damaged(lease, table, exc)
        raise
    return [
        Record(Key(query.collection, cast("str", row[0])), table.entity(row, compiled.names))
        for row in rows
    ]


async def count(lease: LeasedConnection, table: TableMapping, query: Query) -> int:
    """The number of records that match a query."""
    compiled = compile_count(table, query)
    if compiled is not None:
        try:
            rows = await lease.rows(compiled.sql, compiled.args)
        except ProtocolError as exc:
            await _raise_if_damaged(lease, table, exc)
            raise
        if len(rows) != 1:
            raise ProtocolError(f"cannot count: the server returned {len(rows)} rows instead of 1")
        return cast("int", rows[0][0])
    number = 0
    async with Owned(records(lease, table, query)) as found:
        async for _ in found:
            number += 1
    return number


async def _entities(
    lease: LeasedConnection, table: TableMapping, query: Query, compiled: Compiled
) -> AsyncGenerator[list[tuple[str, Entity]], None]:
    """In batches, the entities of a SELECT that pass the conditions that SQL could not test, with ids."""
    key = table.collection.key
    async with Owned(_rows(lease, table, compiled)) as batches:
        async for rows in batches:
            for start in range(0, len(rows), _CHUNK_SIZE):
                entities = [
                    table.entity(row, compiled.names) for row in rows[start : start + _CHUNK_SIZE]
                ]
                if compiled.residual is not None:
                    entities = [each for each in entities if compiled.residual(each)]
                yield [(cast("str", each[key]), each) for each in entities]
                await asyncio.sleep(0)


async def _rows(
    lease: LeasedConnection, table: TableMapping, compiled: Compiled
) -> AsyncGenerator[Sequence[Sequence[Any]], None]:
    try:
        async with Owned(lease.fetch_batches(compiled.sql, compiled.args)) as batches:
            async for each in batches:
                yield each
    except ProtocolError as exc:
        await _raise_if_damaged(lease, table, exc)
        raise


async def _raise_if_damaged(
    lease: LeasedConnection, table: TableMapping, exc: ProtocolError
) -> None:
    """Find the row that made a query fail, if another program damaged one.

    The message of the engine ("malformed JSON") names neither table nor row.

    Raises:
        CorruptionError: names the table and the row.
    """
    start = 0
    while True:
        try:
            rows = await lease.rows(
                f"SELECT {table.selected} FROM {table.name} AS t "
                f"ORDER BY t.{table.key} LIMIT {_CHUNK_SIZE} OFFSET {start}"
            )
        except StorageError:
            return  # the query failed for another reason; the caller raises the original error
        for row in rows:
            try:
                table.entity(row)
            except CorruptionError as damage:
                raise damage from exc
        if len(rows) < _CHUNK_SIZE:
            return
        start += _CHUNK_SIZE
