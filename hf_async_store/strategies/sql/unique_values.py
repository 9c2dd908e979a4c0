"""Unique values on PostgreSQL: which changes of a statement want the same, and whose they are.

The server rejects a whole statement because of one of its rows. Then the owners of the values are looked
up, and only the changes that may depend on one another are sent one by one, in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from hf_async_store.changes import Change
from hf_async_store.errors import UniqueViolationError
from hf_async_store.strategies.sql.decisions import expires, row_is_there
from hf_async_store.strategies.sql.names import DOC, quoted, unique_column
from hf_async_store.strategies.sql.pending import PendingChange
from hf_async_store.strategies.sql.postgres_jsonb import array_text, optional_bytes_array_text
from hf_async_store.unique import Fields, violation
from hf_async_store.values import Key

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.connections import LeasedConnection
    from hf_async_store.strategies.sql.rows import Table

Owners: TypeAlias = "dict[tuple[Fields, bytes], str]"
"""By unique index and value: the id of the entity that has the value."""

_place_of: Final = attrgetter("place")


async def owners_of(
    lease: LeasedConnection, table: Table, piece: Sequence[PendingChange], *, indexed: bool = False
) -> Owners:
    """The owners of the values that changes of one statement write.

    The rows of entities that have expired hold no such values any more afterwards.

    Args:
        indexed: look up only values whose index exists for certain. For the others, the server would read
            all rows, and a transaction that did so would conflict with every other one.
    """
    change, doc = piece[0].change, ""
    if judged := expires(change, table.collection):
        doc = f", {table.grammar.read(f't.{DOC}')}"
    shape = piece[0].shape
    assert shape is not None, "it writes unique columns"
    wanted = {
        fields: optional_bytes_array_text([each.digests[number] for each in piece])
        for number, fields in enumerate(shape.unique)
        if not (indexed and fields in table.entry.unenforced)
    }
    if not wanted:
        return {}
    columns = [f"t.{quoted(unique_column(each))}" for each in wanted]
    found = " OR ".join(
        f"{column} = ANY(${number}::text::bytea[])" for number, column in enumerate(columns, 1)
    )
    rows = await lease.rows(
        f"SELECT t.{table.key}, {', '.join(columns)}{doc} FROM {table.name} AS t WHERE {found}",
        list(wanted.values()),
    )
    if judged:
        rows = await _without_expired(lease, table, change, rows)
    return {
        (fields, value): entity_id
        for entity_id, *values in rows
        for fields, value in zip(wanted, values, strict=True)
        if value is not None
    }


async def _without_expired(
    lease: LeasedConnection, table: Table, change: Change, rows: Sequence[Sequence[Any]]
) -> list[Sequence[Any]]:
    """The rows, without their documents, of entities that exist for a change; the others are freed."""
    living: list[Sequence[Any]] = []
    expired: list[tuple[str, str]] = []
    for entity_id, *values, doc in rows:
        if row_is_there(table, change, Key(table.collection, entity_id), doc):
            living.append((entity_id, *values))
        else:
            expired.append((entity_id, doc))
    if expired:
        columns = ", ".join(f"{quoted(unique_column(each))} = NULL" for each in table.unique)
        await lease.rows(
            f"UPDATE {table.name} AS t SET {columns} "
            "FROM ROWS FROM (unnest($1::text::text[], $2::text::text[])) AS i (id, d) "
            f"WHERE t.{table.key} = i.id AND t.{DOC} = i.d::jsonb",
            [array_text(list(each)) for each in zip(*expired, strict=True)],
            doing="free unique values",
            writes=True,
        )
    return living


def values_of(pending: PendingChange) -> list[tuple[Fields, bytes]]:
    """The unique values that a change writes."""
    assert pending.shape is not None, "it writes unique columns"
    pairs = zip(pending.shape.unique, pending.digests, strict=True)
    return [(fields, value) for fields, value in pairs if value is not None]


def refusal(pending: PendingChange, owners: Owners) -> UniqueViolationError | None:
    """The error of a change that writes a value of another entity."""
    for value in values_of(pending):
        owner = owners.get(value)
        if owner is not None and owner != pending.change.key.id:
            return violation(pending.change.key, value[0], owner)
    return None


def separated(piece: Sequence[PendingChange], owners: Owners) -> list[list[PendingChange]]:
    """The changes that cannot depend on one another, and each of the others, in order.

    Returns a single list if no change writes a value of another entity, or the same as another change.
    """
    writers: dict[tuple[Fields, bytes], list[str]] = {}
    for pending in piece:
        for value in values_of(pending):
            writers.setdefault(value, []).append(pending.change.key.id)
    contested: set[str] = set()
    for value, ids in writers.items():
        owner = owners.get(value, ids[0])
        if any(each != owner for each in ids):
            contested |= {owner, *ids}
    others = [each for each in piece if each.change.key.id not in contested]
    alone = [each for each in piece if each.change.key.id in contested]
    return [*([others] if others else []), *([each] for each in sorted(alone, key=_place_of))]
