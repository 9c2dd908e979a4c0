"""An update of the first entities of a query in one statement on PostgreSQL, instead of a query and writes.

The statement finds them, and changes all or none. Its transaction has one snapshot, so it fails if another
one has changed one of them since. It changes none if the server cannot decide for one of them as the store
would.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_async_store.sort_bytes import INEXACT, MAX_SORT_BYTES
from hf_async_store.strategies.sql.compiler import compile_query
from hf_async_store.strategies.sql.grammar import Arguments
from hf_async_store.strategies.sql.names import key_column, quoted
from hf_async_store.values import VERSION

if TYPE_CHECKING:
    from hf_async_store.changes import Patch
    from hf_async_store.query import Query
    from hf_async_store.strategies.sql.pending import Encoder
    from hf_async_store.strategies.sql.rows import Table


def update_of_first(
    encoder: Encoder, query: Query, patch: Patch, seconds: float
) -> tuple[str, list[object]] | None:
    """The statement, see `WriteStatements.of_selected`, and its arguments; None if one is not enough.

    Args:
        seconds: how long it waits for a lock.
    """
    table = encoder.tables.get(query.collection)
    if table is None:
        return None
    pending = encoder.pending(0, patch)
    shape, places = pending.shape, [_is_placed(table, each.path) for each in query.order]
    if shape is None or shape.unique or shape.parents or None in places:
        return None
    _, *columns, document = encoder.arguments(shape, [pending], alone=True)
    args = Arguments(table.grammar)
    args.values = [str(int(seconds * 1000)), document, *columns]
    assignments, condition = encoder.statements.assignments(shape)
    decided = " AND ".join([condition, *filter(None, places)])
    selected = f"t.ctid, t.{table.key}, ({decided}) IS TRUE"
    compiled = compile_query(table, query, args=args, selected=selected)
    if not compiled.limited:
        return None
    return encoder.statements.of_selected(table, compiled.sql, assignments), args.values


def _is_placed(table: Table, path: tuple[str | int, ...]) -> str | None:
    """The condition that the key column of a path determines the place of the row; '' if it always does,
    None if there is no such column."""
    name = path[0]
    if len(path) > 1 or not isinstance(name, str):
        return None
    if name in (VERSION, table.key_field):
        return ""
    if name not in table.ready:
        return None
    column = f"t.{quoted(key_column(name))}"
    return (
        f"pg_catalog.octet_length({column}) < {MAX_SORT_BYTES}::int "
        f"AND pg_catalog.get_byte({column}, 0) < {INEXACT}::int"
    )
