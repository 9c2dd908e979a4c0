"""Queries on a connection: reads the rows of a SELECT as records, filters in Python what SQL could not,
and sorts the rows of each group.

A group is what `compiler.group_of` says: adjacent rows that SQL returns in any order.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, cast

import msgspec

from hf_async_store.changes import Record
from hf_async_store.collector import GatheredObjects
from hf_async_store.errors import CorruptionError, ProtocolError, StorageError
from hf_async_store.event_loop import computed, pause
from hf_async_store.generators import Owned
from hf_async_store.query import (
    And,
    Comparison,
    Filter,
    Missing,
    Query,
    Steps,
    ordered,
    value_reader,
)
from hf_async_store.sort_bytes import sort_bytes
from hf_async_store.strategies.sql.compiler import (
    SHORT,
    compile_count,
    compile_first_by_id,
    compile_query,
    group_of,
)
from hf_async_store.strategies.sql.grammar import Compiled
from hf_async_store.strategies.sql.query_shapes import compiled_by_shape
from hf_async_store.values import Entity, Key, Value

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.connections import LeasedConnection
    from hf_async_store.strategies.sql.rows import Table

_CHUNK_SIZE: Final = 256

_SMALL_LIMIT: Final = 512
"""Queries with at most this limit read all rows at once, without a cursor."""

_FEW: Final = 64
_MANY: Final = 512
"""A query for at most few rows in the order of ids, of which there are many matches, is answered from the
first rows of the table, if they contain enough."""

_TRIED: Final = 1024
"""How many rows of the table are read for that."""

_MAX_IDS: Final = 1024
"""The maximum number of ids in one statement."""

_compile_unsorted: Final = partial(compile_query, in_order=False)

Row: TypeAlias = "tuple[str, Entity]"
"""The id of a row, and its entity."""


async def fetch(
    lease: LeasedConnection, tables: Mapping[str, Table], keys: Sequence[Key]
) -> list[Record | None]:
    """The records of `keys`, in their order. A key whose collection has no table is absent."""
    records: list[Record | None] = []
    gathered = GatheredObjects()
    for start in range(0, len(keys), _MAX_IDS):
        some = await _fetch_some(lease, tables, keys[start : start + _MAX_IDS])
        records += some
        gathered.add(2 * len(some))  # each is a record with an entity
    return records


async def _fetch_some(
    lease: LeasedConnection, tables: Mapping[str, Table], keys: Sequence[Key]
) -> list[Record | None]:
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
) -> Sequence[Sequence[Any]]:
    if len(ids) == 1:
        return await lease.rows(table.fetch_one, ids)
    return await lease.rows(table.fetch_many, (table.grammar.strings(ids),))


async def records(
    lease: LeasedConnection, table: Table, query: Query
) -> AsyncGenerator[Record, None]:
    """The records that match a query, in its order."""
    async with Owned(_in_order(lease, table, query)) as batches:
        async for batch in batches:
            for entity_id, entity in batch:
                yield Record(Key(query.collection, entity_id), entity)


async def select_batches(
    lease: LeasedConnection, table: Table, query: Query
) -> AsyncGenerator[list[Entity], None]:
    """The entities of `records`, in batches."""
    async with Owned(_in_order(lease, table, query)) as batches:
        async for batch in batches:
            yield [entity for _, entity in batch]


def may_be_small(query: Query) -> bool:
    """Whether `small` may read its rows: it has a small limit, or is for one value of a field."""
    if query.limit is not None:
        return query.limit <= _SMALL_LIMIT
    parts = query.where.parts if isinstance(query.where, And) else (query.where,)
    return any(isinstance(each, Comparison) and each.op == "eq" for each in parts)


def statements(query: Query) -> Literal["one", "many"]:
    """How many statements `records` may need: a group at the limit, or at the position, has its own."""
    return "many" if query.order and (query.limit or query.after) else "one"


async def compiled_query(
    table: Table, query: Query, *, group: Sequence[Value | Missing] | None = None
) -> Compiled:
    """`compile_query`, of a query whose filter may have many values."""
    if group is None and not query.has_many_values:
        return compiled_by_shape(compile_query, table, query)
    work = partial(compile_query, table, query, group=group)
    return await computed(work, long=query.has_many_values)


async def small(lease: LeasedConnection, table: Table, query: Query) -> list[Entity] | None:
    """The entities of a query with few rows, read at once.

    Returns None if a cursor is needed: there are many rows, or they must be filtered in Python, or sorted
    in groups. A query without a limit is tried if an index leads to the rows of one value, which are
    often few; then little was read in vain.
    """
    if query.limit is None:
        return await _few(lease, table, query) if _has_indexed_value(table, query.where) else None
    compiled = await compiled_query(table, query)
    if not compiled.limited or not is_position_exact(table, query):
        return None
    if is_tried_by_id(table, query):
        read = _by_id_or_index(table, query, compiled)
        try:
            rows: Sequence[Sequence[Any]] = await lease.read(read)
        except ProtocolError as exc:
            await _raise_if_damaged(lease, table, exc)
            raise
    else:
        rows = await _all_rows(lease, table, compiled)
    entities = list(map(table.entity, rows))
    return entities if are_in_place(query, entities) else None


async def _few(lease: LeasedConnection, table: Table, query: Query) -> list[Entity] | None:
    """The entities of a query without a limit; None as `small`, or if there are many."""
    limited = query.with_limit(_SMALL_LIMIT)
    if query.order or query.has_many_values:
        few = await small(lease, table, limited)
        return few if few is not None and len(few) < _SMALL_LIMIT else None
    # By id. They are sorted here, in a tenth of the time that the database would take.
    compiled = compiled_by_shape(_compile_unsorted, table, limited)
    rows = await _all_rows(lease, table, compiled) if compiled.limited else ()
    if not compiled.limited or len(rows) == _SMALL_LIMIT:
        return None
    return sorted(map(table.entity, rows), key=itemgetter(table.key_field))


def in_thread(table: Table, query: Query) -> Callable[[Any], list[Entity] | None] | None:
    """What reads as `small` does, of a query with a limit, in the thread of a driver that has one.

    Its rows are not searched for damage; None as `small`.
    """
    compiled = compiled_by_shape(compile_query, table, query)
    if not compiled.limited or not is_position_exact(table, query):
        return None
    read = _rows_in_thread(table, query, compiled)

    def in_place(connection: Any) -> list[Entity] | None:
        entities = list(map(table.entity, read(connection)))
        return entities if are_in_place(query, entities) else None

    return in_place


def _rows_in_thread(table: Table, query: Query, compiled: Compiled) -> Callable[[Any], list[Any]]:
    if is_tried_by_id(table, query):
        return _by_id_or_index(table, query, compiled)
    return lambda connection: connection.execute(compiled.sql, compiled.args).fetchall()


def are_in_place(query: Query, entities: Sequence[Entity]) -> bool:
    """Whether SQL has selected and sorted the entities of a query; else they may be in groups."""
    return not any(_may_be_in_groups(each.path, entities) for each in query.order)


def is_position_exact(table: Table, query: Query) -> bool:
    """Whether SQL finds the first row after the position of a query; else it may be in a group."""
    return query.after is None or not group_of(table, query.order, query.after.values)


def is_tried_by_id(table: Table, query: Query) -> bool:
    """Whether a query in the order of ids may be answered from the first of all rows.

    SQLite, which has no statistics, would read all matches by an index on the filter, and sort them.
    """
    by_id = not query.order or query.order[0].path == (table.key_field,)
    few = query.limit is not None and 0 < query.limit <= _FEW
    return (
        few
        and by_id
        and not table.grammar.has_statistics
        and _has_indexed_value(table, query.where)
    )


def _by_id_or_index(table: Table, query: Query, compiled: Compiled) -> Callable[[Any], list[Any]]:
    """What reads the rows of a query in the order of ids: from the first of all rows if there are many
    matches, and enough among those, else by the index on the filter. So it reads a limited number of rows
    too many."""
    matching = f"SELECT 1 FROM {table.name} AS t WHERE {compiled.where} LIMIT {_MANY}"
    first = compile_first_by_id(table, query, compiled, _TRIED)

    def read(connection: Any) -> list[Any]:
        counted = connection.execute(f"SELECT count(*) FROM ({matching})", compiled.args)
        if counted.fetchone() == (_MANY,):
            found: list[Any] = connection.execute(first.sql, first.args).fetchall()
            if len(found) == query.limit:
                return found
        return cast("list[Any]", connection.execute(compiled.sql, compiled.args).fetchall())

    return read


def _has_indexed_value(table: Table, where: Filter) -> bool:
    parts = where.parts if isinstance(where, And) else (where,)
    return any(
        isinstance(each, Comparison)
        and each.op == "eq"
        and len(each.path) == 1
        and each.path[0] in table.ready
        for each in parts
    )


def _may_be_in_groups(path: Steps, entities: Sequence[Entity]) -> bool:
    """Whether a row may be in a group of rows that are sorted by the value at a path; see `group_of`."""
    values = list(map(value_reader(path), entities))
    if not {list, dict}.isdisjoint(map(type, values)):
        return True
    return max([len(each) for each in values if isinstance(each, str)], default=0) > SHORT


async def count_at_once(lease: LeasedConnection, table: Table, query: Query) -> int | None:
    """The number of records that match a query; None if SQL cannot count them."""
    if query.limit is not None or query.after is not None:
        return None
    if query.has_many_values:
        compiled = await computed(partial(compile_count, table, query), long=True)
    else:
        compiled = compiled_by_shape(compile_count, table, query)
    if compiled.residual is not None:
        return None
    rows = await _all_rows(lease, table, compiled)
    if len(rows) != 1:
        raise ProtocolError(f"cannot count: the server returned {len(rows)} rows instead of 1")
    return cast("int", rows[0][0])


async def count(lease: LeasedConnection, table: Table, query: Query) -> int:
    """The number of records that match a query."""
    counted = await count_at_once(lease, table, query)
    if counted is not None:
        return counted
    number = 0
    async with Owned(records(lease, table, query)) as found:
        async for _ in found:
            number += 1
    return number


async def _in_order(
    lease: LeasedConnection, table: Table, query: Query
) -> AsyncGenerator[list[Row], None]:
    """The rows that match a query, in its order, up to its limit, in batches that are not empty."""
    left = query.limit
    if left == 0:
        return
    async with Owned(_after_position(lease, table, query)) as batches:
        async for batch in batches:
            wanted = batch if left is None else batch[:left]
            if wanted:
                yield wanted
            if left is not None:
                left -= len(wanted)
                if not left:
                    return


# -- groups ---------------------------------------------------------------------------------


async def _after_position(
    lease: LeasedConnection, table: Table, query: Query
) -> AsyncGenerator[list[Row], None]:
    """In batches, the rows that match a query, in its order, after its position."""
    unplaced = msgspec.structs.replace(query, after=None, limit=None)
    if query.after is not None:
        before = group_of(table, query.order, query.after.values)
        if before is not None:
            placed = msgspec.structs.replace(query, limit=None)
            yield await _sorted(_whole_group(lease, table, query, before), placed)
    compiled = await compiled_query(table, query)
    readers = [value_reader(each.path) for each in query.order]
    members: list[Row] = []  # the last rows read, if they are in a group
    group: list[Value | Missing] = []
    read = 0
    async with Owned(_batches(lease, table, compiled)) as batches:
        async for batch in batches:
            read += len(batch)
            groups = [
                group_of(table, query.order, [read(entity) for read in readers])
                for _, entity in batch
                if readers
            ]
            if not members and not any(groups):
                yield batch
                continue
            placed_rows: list[Row] = []
            for row, found in zip(batch, groups, strict=True):
                if members and (found is None or _bytes_of(found) != _bytes_of(group)):
                    placed_rows += await _sorted(_once(members), unplaced)
                    members = []
                if found is None:
                    placed_rows.append(row)
                else:
                    members.append(row)
                    group = found
            yield placed_rows
    if members:
        divided = compiled.limited and read == query.limit  # by the limit
        source = _whole_group(lease, table, query, group) if divided else _once(members)
        yield await _sorted(source, unplaced)


async def _whole_group(
    lease: LeasedConnection, table: Table, query: Query, group: Sequence[Value | Missing]
) -> AsyncGenerator[list[Row], None]:
    compiled = await compiled_query(table, query, group=group)
    async with Owned(_batches(lease, table, compiled)) as batches:
        async for each in batches:
            yield each


async def _sorted(source: AsyncGenerator[list[Row], None], query: Query) -> list[Row]:
    """Rows in the order of a query, after its position."""
    async with Owned(source) as batches, Owned(ordered(batches, query)) as rows:
        return [each async for each in rows]


async def _once(rows: list[Row]) -> AsyncGenerator[list[Row], None]:
    yield rows


def _bytes_of(group: Sequence[Value | Missing]) -> list[bytes]:
    return list(map(sort_bytes, group))


# -- rows -----------------------------------------------------------------------------------


async def _batches(
    lease: LeasedConnection, table: Table, compiled: Compiled
) -> AsyncGenerator[list[Row], None]:
    """In batches, the entities of a SELECT that pass the conditions that SQL could not test, with ids."""
    async with Owned(_raw_batches(lease, table, compiled)) as batches:
        async for rows in batches:
            for start in range(0, len(rows), compiled.step):
                found = [(row[0], table.entity(row)) for row in rows[start : start + compiled.step]]
                if compiled.residual is not None:
                    found = [each for each in found if compiled.residual(each[1])]
                yield found
                await pause()


async def _raw_batches(
    lease: LeasedConnection, table: Table, compiled: Compiled
) -> AsyncGenerator[Sequence[Sequence[Any]], None]:
    try:
        async with Owned(lease.fetch_batches(compiled.sql, compiled.args)) as batches:
            async for each in batches:
                yield each
    except ProtocolError as exc:
        await _raise_if_damaged(lease, table, exc)
        raise


async def _all_rows(
    lease: LeasedConnection, table: Table, compiled: Compiled
) -> Sequence[Sequence[Any]]:
    try:
        return await lease.rows(compiled.sql, compiled.args)
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
