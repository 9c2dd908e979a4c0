"""Queries on a connection: the rows of a SELECT as records, and what the SELECT could not do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Final, cast

from hf_async_store.engine import gathered
from hf_async_store.entities import Entity, Key, Record, canonical
from hf_async_store.errors import ProtocolError
from hf_async_store.query import Query, ordered
from hf_async_store.strategies.sql.compiler import Compiled, compile_count, compile_query
from hf_async_store.strategies.sql.tables import Table

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.connections import Lease

_PIECE: Final = 256
"""How many rows are decoded before the loop gets a turn."""

_SMALL: Final = 512
"""Up to this limit rows come in one answer, without a cursor."""


async def records(lease: Lease, table: Table, query: Query) -> AsyncGenerator[Record, None]:
    """The records that match, in the query's order."""
    if query.limit == 0:
        return
    compiled = compile_query(table, query)
    collection = query.collection
    async with aclosing(_entities(lease, table, query, compiled)) as pieces:
        if compiled.sorted_here:
            async with aclosing(ordered(pieces, query)) as rows:
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


async def pieces(lease: Lease, table: Table, query: Query) -> AsyncGenerator[list[Entity], None]:
    """The entities that `records` gives, in pieces."""
    compiled = compile_query(table, query)
    if query.limit is not None or compiled.sorted_here:
        async with aclosing(gathered(records(lease, table, query))) as found:
            async for each in found:
                yield each
        return
    async with aclosing(_entities(lease, table, query, compiled)) as rows:
        async for piece in rows:
            if piece:
                yield [entity for _, entity in piece]


async def texts(lease: Lease, table: Table, query: Query) -> AsyncGenerator[list[bytes], None]:
    """The canonical texts of the entities that `records` gives, in pieces."""
    compiled = compile_query(table, query, table.text_selected)
    if compiled.residual is None and not compiled.sorted_here and compiled.names is None:
        async with aclosing(lease.pieces(compiled.sql, compiled.args)) as found:
            async for rows in found:
                for start in range(0, len(rows), _PIECE):
                    yield table.texts(rows[start : start + _PIECE])
                    await asyncio.sleep(0)
        return
    async with aclosing(pieces(lease, table, query)) as entities:
        async for piece in entities:
            yield list(map(canonical, piece))


async def small(lease: Lease, table: Table, query: Query) -> list[Record] | None:
    """The records of a query with a small limit, in one statement; None where it takes more."""
    if query.limit is None or query.limit > _SMALL:
        return None
    compiled = compile_query(table, query)
    if compiled.sorted_here or compiled.residual is not None:
        return None
    return [
        Record(Key(query.collection, cast("str", row[0])), table.entity(row, compiled.names))
        for row in await lease.rows(compiled.sql, compiled.args)
    ]


async def count(lease: Lease, table: Table, query: Query) -> int:
    """How many records match."""
    compiled = compile_count(table, query)
    if compiled is not None:
        rows = await lease.rows(compiled.sql, compiled.args)
        if len(rows) != 1:
            raise ProtocolError(f"cannot count: {len(rows)} rows came for one")
        return cast("int", rows[0][0])
    number = 0
    async with aclosing(records(lease, table, query)) as found:
        async for _ in found:
            number += 1
    return number


async def _entities(
    lease: Lease, table: Table, query: Query, compiled: Compiled
) -> AsyncGenerator[list[tuple[str, Entity]], None]:
    """The entities of a SELECT that pass what it could not test, in pieces."""
    key = table.collection.key
    async with aclosing(lease.pieces(compiled.sql, compiled.args)) as pieces:
        async for rows in pieces:
            for start in range(0, len(rows), _PIECE):
                entities = [
                    table.entity(row, compiled.names) for row in rows[start : start + _PIECE]
                ]
                if compiled.residual is not None:
                    entities = [each for each in entities if compiled.residual(each)]
                yield [(cast("str", each[key]), each) for each in entities]
                await asyncio.sleep(0)
