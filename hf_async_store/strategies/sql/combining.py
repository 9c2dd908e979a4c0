"""Combines changes of one entity that wait together: they are decided one after the other, and one row is
written for all of them. So many tasks that change the same entity share commits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import msgspec

from hf_async_store.changes import Change, Outcome, Patch, Put
from hf_async_store.errors import StorageError
from hf_async_store.strategies.sql.decisions import Stored, new_row, refuse_missing_parents
from hf_async_store.strategies.sql.waves import are_related

if TYPE_CHECKING:
    from hf_async_store.schema import Schema
    from hf_async_store.strategies.sql.pending import PendingChange
    from hf_async_store.strategies.sql.rows import Table, Tables
    from hf_async_store.values import Key


def combined(
    tables: Tables, pending: Sequence[PendingChange], *, references: bool
) -> Sequence[PendingChange]:
    """Independent changes, of which those of one entity are combined where nobody can tell.

    Not in a collection with a change feed, which has each version. Not if an entity may depend on
    another one that is changed between its own changes.
    """
    changes = [each.change for each in pending]
    if len({each.key for each in changes}) == len(changes):
        return pending
    if references and are_related(tables.schema, changes):
        return pending
    found: list[PendingChange] = []
    last: dict[Key, int] = {}  # where the last change of an entity is in `found`
    for each in pending:
        key = each.change.key
        place = last.get(key)
        if place is not None and _may_follow(tables, found[place], each.change):
            first = found[place]
            later = (*first.later, (each.place, each.change))
            found[place] = msgspec.structs.replace(first, shape=None, later=later)
        else:
            last[key] = len(found)
            found.append(each)
    return found


def _may_follow(tables: Tables, first: PendingChange, change: Change) -> bool:
    table = tables[change.key.collection]
    if table.entry.has_feed or table.unique:
        return False
    fields = [each.name for each in tables.schema[table.collection].references]
    changes = [each for _, each in first.steps]
    if not all(is_plain(each, fields) for each in (*changes, change)):
        return False
    if not isinstance(change, Put):
        return True
    # The statement tests the parents of the row that is written: those of all entities in between.
    return all(
        each.entity.get(name) == change.entity.get(name)
        for each in changes
        if isinstance(each, Put)
        for name in fields
    )


def is_plain(change: Change, references: Sequence[str]) -> bool:
    """Whether a change saves or patches an entity by itself, and a patch changes no reference."""
    if change.lifetimes is not None or change.mark is not None:
        return False
    if isinstance(change, Put):
        return change.import_version is None
    return isinstance(change, Patch) and change.fields.keys().isdisjoint(references)


def decided(
    schema: Schema,
    table: Table,
    pending: PendingChange,
    stored: Stored | None,
    exists: Callable[[Key], bool] | None,
) -> tuple[Stored | None, list[tuple[int, Outcome]]]:
    """The row after combined changes, and their outcomes by position.

    Args:
        exists: whether a parent exists; None: references are not enforced.
    """
    row = stored
    outcomes: list[tuple[int, Outcome]] = []
    for place, change in pending.steps:
        try:
            changed = cast("Stored", new_row(table, change, row))  # no change deletes
            if exists is not None:
                refuse_missing_parents(schema, table, change, row, exists)
        except StorageError as exc:
            outcomes.append((place, exc))
        else:
            row = changed
            outcomes.append((place, row.version))
    return row, outcomes
