"""Queries on a connection: reads the rows of a SELECT as records, filters in Python what SQL could not,
and sorts rows with inexact values among their neighbours.

In the order of the statement, rows that may be in the wrong order are next to each other. Such a run of
rows is sorted by the reference.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

from hf_async_store.changes import Record
from hf_async_store.driver import batched
from hf_async_store.errors import CorruptionError, ProtocolError, StorageError
from hf_async_store.generators import Owned
from hf_async_store.query import (
    MISSING,
    Missing,
    Query,
    compile_order,
    order_key,
    ordered,
    position_key,
)
from hf_async_store.strategies.sql.compiler import Compiled, compile_count, compile_query
from hf_async_store.values import Entity, Key, Value, canonical

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.connections import LeasedConnection
    from hf_async_store.strategies.sql.grammar import Form, Grammar
    from hf_async_store.strategies.sql.rows import Table

_CHUNK_SIZE: Final = 256
"""How many rows are decoded per iteration of the event loop."""

_SMALL_LIMIT: Final = 512
"""Queries with at most this limit read all rows at once, without a cursor."""

_MAX_IDS: Final = 1024
"""The maximum number of ids in one statement."""

_LARGE_RUN: Final = 1_000
"""From this number of rows on, a run is sorted in pieces, so that the event loop is not held."""

_Row: TypeAlias = "tuple[str, Entity]"


async def fetch(
    lease: LeasedConnection, tables: Mapping[str, Table], keys: Sequence[Key]
) -> list[Record | None]:
    """The records of `keys`, in their order. A key whose collection has no table is absent."""
    found: dict[Key, Sequence[object]] = {}
    for collection, ids in _by_collection(keys).items():
        if collection in tables:
            for row in await _rows_of(lease, tables[collection], ids):
                found[Key(collection, cast("str", row[0]))] = row
    return [
        Record(key, tables[key.collection].entity(found[key])) if key in found else None
        for key in keys
    ]


def _by_collection(keys: Sequence[Key]) -> dict[str, list[str]]:
    ids: dict[str, dict[str, None]] = {}
    for key in keys:
        ids.setdefault(key.collection, {})[key.id] = None
    return {collection: list(each) for collection, each in ids.items()}


async def _rows_of(
    lease: LeasedConnection, table: Table, ids: Sequence[str]
) -> list[Sequence[Any]]:
    if len(ids) == 1:
        return list(await lease.rows(table.fetch_one, ids))
    rows: list[Sequence[Any]] = []
    for start in range(0, len(ids), _MAX_IDS):
        listed = table.grammar.strings(ids[start : start + _MAX_IDS])
        rows += await lease.rows(table.fetch_many, (listed,))
    return rows


async def records(
    lease: LeasedConnection, table: Table, query: Query
) -> AsyncGenerator[Record, None]:
    """The records that match a query, in its order."""
    if query.limit == 0:
        return
    # A limit could end the result within a run.
    compiled = compile_query(table, query, limited=not query.order)
    async with Owned(_entities(lease, table, compiled)) as batches:
        count = 0
        async with Owned(_refined(batches, query, table.grammar, compiled)) as rows:
            async for entity_id, entity in rows:
                yield Record(Key(query.collection, entity_id), entity)
                count += 1
                if count == query.limit:
                    return


async def select_batches(
    lease: LeasedConnection, table: Table, query: Query
) -> AsyncGenerator[list[Entity], None]:
    """The entities of `records`, in batches."""
    compiled = compile_query(table, query)
    if query.limit is not None or compiled.forms:
        async with Owned(batched(records(lease, table, query))) as batches:
            async for each in batches:
                yield each
        return
    async with Owned(_entities(lease, table, compiled)) as found:
        async for batch in found:
            if batch:
                yield [entity for _, entity in batch]


async def select_json(
    lease: LeasedConnection, table: Table, query: Query
) -> AsyncGenerator[list[bytes], None]:
    """The canonical JSON of the entities of `records`, in batches."""
    async with Owned(select_batches(lease, table, query)) as batches:
        async for batch in batches:
            yield list(map(canonical, batch))


def may_be_small(query: Query) -> bool:
    return query.limit is not None and query.limit <= _SMALL_LIMIT


async def small(lease: LeasedConnection, table: Table, query: Query) -> list[Record] | None:
    """The records of a query with a small limit, read at once.

    Returns None if the limit is not small, if rows must be filtered in Python, or if the last row may
    be in the wrong place.
    """
    if not may_be_small(query):
        return None
    compiled = compile_query(table, query)
    if not compiled.limited:
        return None
    try:
        rows = await lease.rows(compiled.sql, compiled.args)
    except ProtocolError as exc:
        await _raise_if_damaged(lease, table, exc)
        raise
    found = [(cast("str", row[0]), table.entity(row)) for row in rows]
    if compiled.forms:
        exact = table.grammar.exact
        inexact = [not all(map(exact, _values(query, each), compiled.forms)) for _, each in found]
        if inexact and inexact[-1] and len(found) == query.limit:
            return None
        if any(inexact):
            key_of = compile_order(query)
            found.sort(key=lambda row: key_of(*row))
    return [Record(Key(query.collection, entity_id), entity) for entity_id, entity in found]


async def count(lease: LeasedConnection, table: Table, query: Query) -> int:
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


# -- runs of rows with inexact values -------------------------------------------------------


async def _refined(
    batches: AsyncIterable[list[_Row]], query: Query, grammar: Grammar, compiled: Compiled
) -> AsyncGenerator[_Row, None]:
    """Rows in the order of the query, after its position, from rows in the order of the statement."""
    if not compiled.forms:
        async for batch in batches:
            for row in batch:
                yield row
        return
    # The statement returns also rows close to an inexact position, before it.
    after, forms = query.after, compiled.forms
    coarse = after is not None and not all(map(grammar.exact, after.values, forms))
    run: list[_Row] = []
    last: list[Value | Missing] = []
    exact = True  # no value of the run is inexact
    async for batch in batches:
        for row in batch:
            values = _values(query, row[1])
            is_exact = all(map(grammar.exact, values, forms))
            if run and ((exact and is_exact) or not _is_same_run(last, values, forms, grammar)):
                async with Owned(_sorted(run, query, as_is=exact and not coarse)) as rows:
                    async for each in rows:
                        yield each
                run, exact = [], True
            run.append(row)
            last, exact = values, exact and is_exact
    async with Owned(_sorted(run, query, as_is=exact and not coarse)) as rows:
        async for each in rows:
            yield each


async def _sorted(run: list[_Row], query: Query, *, as_is: bool) -> AsyncGenerator[_Row, None]:
    """The rows of a run that are after the position of the query, in its order."""
    if as_is:
        for row in run:
            yield row
        return
    if len(run) < _LARGE_RUN:
        key_of = compile_order(query)
        after = None if query.after is None else position_key(query, query.after)
        keyed = sorted((key_of(*row), row) for row in run)  # no two keys are equal
        for key, row in keyed:
            if after is None or key > after:
                yield row
        return
    async with Owned(ordered(_once(run), query)) as rows:
        async for row in rows:
            yield row


async def _once(run: list[_Row]) -> AsyncGenerator[list[_Row], None]:
    yield run


def _is_same_run(
    one: Sequence[Value | Missing],
    other: Sequence[Value | Missing],
    forms: Sequence[Form],
    grammar: Grammar,
) -> bool:
    """Whether the statement may have returned two adjacent rows in the wrong order."""
    for left, right, form in zip(one, other, forms, strict=True):
        if not (grammar.exact(left, form) and grammar.exact(right, form)):
            return grammar.confusable(left, right, form)
        if order_key(left) != order_key(right):
            return False
    return False


def _values(query: Query, entity: Entity) -> list[Value | Missing]:
    """The values of an entity at the paths of the order."""
    return [_value_at(entity, each.path) for each in query.order]


def _value_at(entity: Entity, path: Sequence[str | int]) -> Value | Missing:
    value: Any = entity
    for step in path:
        if isinstance(step, str):
            value = value.get(step, MISSING) if isinstance(value, dict) else MISSING
        else:
            value = value[step] if isinstance(value, list) and step < len(value) else MISSING
    return cast("Value | Missing", value)


# -- rows -----------------------------------------------------------------------------------


async def _entities(
    lease: LeasedConnection, table: Table, compiled: Compiled
) -> AsyncGenerator[list[_Row], None]:
    """In batches, the entities of a SELECT that pass the conditions that SQL could not test, with ids."""
    async with Owned(_rows(lease, table, compiled)) as batches:
        async for rows in batches:
            for start in range(0, len(rows), _CHUNK_SIZE):
                found = [
                    (cast("str", row[0]), table.entity(row))
                    for row in rows[start : start + _CHUNK_SIZE]
                ]
                if compiled.residual is not None:
                    found = [each for each in found if compiled.residual(each[1])]
                yield found
                await asyncio.sleep(0)


async def _rows(
    lease: LeasedConnection, table: Table, compiled: Compiled
) -> AsyncGenerator[Sequence[Sequence[Any]], None]:
    try:
        async with Owned(lease.fetch_batches(compiled.sql, compiled.args)) as batches:
            async for each in batches:
                yield each
    except ProtocolError as exc:
        await _raise_if_damaged(lease, table, exc)
        raise


async def _raise_if_damaged(lease: LeasedConnection, table: Table, exc: ProtocolError) -> None:
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
