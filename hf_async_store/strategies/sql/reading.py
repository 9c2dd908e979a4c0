"""Queries on a connection: the rows of a SELECT as records, and what the SELECT could not do."""

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
"""How many rows are decoded before the loop gets a turn."""

_SMALL: Final = 512
"""Up to this limit rows come in one answer, without a cursor."""

_MOST_IDS: Final = 1024


async def fetch(
    lease: LeasedConnection, tables: Mapping[str, TableMapping], keys: Sequence[Key]
) -> list[Record | None]:
    """The records of `keys`, in their order; none of a collection that has no table."""
    by_collection: dict[str, dict[str, Sequence[object]]] = {}
    for key in keys:
        by_collection.setdefault(key.collection, {})[key.id] = ()
    for name, found in by_collection.items():
        ids = list(found)
        found.clear()
        if name not in tables:
            continue
        table = tables[name]
        for start in range(0, len(ids), _MOST_IDS):
            piece = ids[start : start + _MOST_IDS]
            sql = table.fetch_many if len(piece) > 1 else table.fetch_one
            args = (table.dialect.argument(piece, "list"),) if len(piece) > 1 else piece
            for row in await lease.rows(sql, args):
                found[row[0]] = row
    records: list[Record | None] = []
    for key in keys:
        found_row = by_collection[key.collection].get(key.id)
        entity = None if found_row is None else tables[key.collection].entity(found_row)
        records.append(None if entity is None else Record(key, entity))
    return records


async def records(
    lease: LeasedConnection, table: TableMapping, query: Query
) -> AsyncGenerator[Record, None]:
    """The records that match, in the query's order."""
    if query.limit == 0:
        return
    compiled = compile_query(table, query)
    collection = query.collection
    async with Owned(_entities(lease, table, query, compiled)) as pieces:
        if compiled.sorted_here:
            async with Owned(ordered(pieces, query)) as rows:
                async for entity_id, entity in rows:
                    yield Record(Key(collection, entity_id), entity)
            return
        count = 0
        async for piece in pieces:
            for entity_id, entity in piece:
                yield Record(Key(collection, entity_id), entity)
                count += 1
                if count == query.limit:
                    return


async def iter_batches(
    lease: LeasedConnection, table: TableMapping, query: Query
) -> AsyncGenerator[list[Entity], None]:
    """The entities that `records` gives, in batches."""
    compiled = compile_query(table, query)
    if query.limit is not None or compiled.sorted_here:
        async with Owned(batched(records(lease, table, query))) as found:
            async for each in found:
                yield each
        return
    async with Owned(_entities(lease, table, query, compiled)) as rows:
        async for piece in rows:
            if piece:
                yield [entity for _, entity in piece]


async def iter_json(
    lease: LeasedConnection, table: TableMapping, query: Query
) -> AsyncGenerator[list[bytes], None]:
    """The canonical JSON of the entities that `records` gives, in batches."""
    compiled = compile_query(table, query, table.text_selected)
    if compiled.residual is None and not compiled.sorted_here and compiled.names is None:
        async with Owned(_rows(lease, table, compiled)) as found:
            async for rows in found:
                for start in range(0, len(rows), _CHUNK_SIZE):
                    yield table.texts(rows[start : start + _CHUNK_SIZE])
                    await asyncio.sleep(0)
        return
    async with Owned(iter_batches(lease, table, query)) as entities:
        async for piece in entities:
            yield list(map(canonical, piece))


def may_be_small(query: Query) -> bool:
    return query.limit is not None and query.limit <= _SMALL


async def small(lease: LeasedConnection, table: TableMapping, query: Query) -> list[Record] | None:
    """The records of a query with a small limit, in one statement; None where it takes more."""
    if not may_be_small(query):
        return None
    compiled = compile_query(table, query)
    if compiled.sorted_here or compiled.residual is not None:
        return None
    try:
        rows = await lease.rows(compiled.sql, compiled.args)
    except ProtocolError as exc:
        await _find_damage(lease, table, exc)
        raise
    return [
        Record(Key(query.collection, cast("str", row[0])), table.entity(row, compiled.names))
        for row in rows
    ]


async def count(lease: LeasedConnection, table: TableMapping, query: Query) -> int:
    """How many records match."""
    compiled = compile_count(table, query)
    if compiled is not None:
        try:
            rows = await lease.rows(compiled.sql, compiled.args)
        except ProtocolError as exc:
            await _find_damage(lease, table, exc)
            raise
        if len(rows) != 1:
            raise ProtocolError(f"cannot count: {len(rows)} rows came for one")
        return cast("int", rows[0][0])
    number = 0
    async with Owned(records(lease, table, query)) as found:
        async for _ in found:
            number += 1
    return number


async def _entities(
    lease: LeasedConnection, table: TableMapping, query: Query, compiled: Compiled
) -> AsyncGenerator[list[tuple[str, Entity]], None]:
    """The entities of a SELECT that pass the conditions that SQL could not test, in batches."""
    key = table.collection.key
    async with Owned(_rows(lease, table, compiled)) as pieces:
        async for rows in pieces:
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
        async with Owned(lease.fetch_batches(compiled.sql, compiled.args)) as pieces:
            async for each in pieces:
                yield each
    except ProtocolError as exc:
        await _find_damage(lease, table, exc)
        raise


async def _find_damage(lease: LeasedConnection, table: TableMapping, exc: ProtocolError) -> None:
    """Name the row that a query failed on, if it is one that another program damaged.

    The message of the engine ("malformed JSON") names neither table nor row.

    Raises:
        CorruptionError: with the row.
    """
    start = 0
    while True:
        try:
            rows = await lease.rows(
                f"SELECT {table.selected} FROM {table.name} AS t "
                f"ORDER BY t.{table.key} LIMIT {_CHUNK_SIZE} OFFSET {start}"
            )
        except StorageError:
            return  # the query failed for another reason, which is raised
        for row in rows:
            try:
                table.entity(row)
            except CorruptionError as damage:
                raise damage from exc
        if len(rows) < _CHUNK_SIZE:
            return
        start += _CHUNK_SIZE
