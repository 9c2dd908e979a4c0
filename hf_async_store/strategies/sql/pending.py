"""Changes as rows of arguments of the statements of `write_sql`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import NoneType
from typing import TYPE_CHECKING, Final, NamedTuple

from hf_async_store.changes import ABSENT, ANY, Change, Delete, Patch, Put
from hf_async_store.query import MISSING
from hf_async_store.sort_bytes import sort_bytes
from hf_async_store.strategies.sql.decisions import Stored
from hf_async_store.strategies.sql.grammar import decode_json
from hf_async_store.strategies.sql.postgres_jsonb import array_text, bytes_array_text, json_text
from hf_async_store.strategies.sql.write_sql import StatementKey, Verb, WriteStatements
from hf_async_store.values import CREATED_AT, Key, Removed, Value

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.rows import Tables

_PLAIN: Final = (str, int, float, bool, NoneType, list, dict, Removed)
"""The types of the values of a patch that does not depend on the stored entity."""


class PendingChange(NamedTuple):
    """A change, its position in the whole list of changes, and its arguments.

    Attributes:
        shape: None: there is no statement for it; it must be decided on the stored entity.
        row: the first columns of arguments.
        encoded: the values of `sort_bytes` in the columns after them.
        parents: the ids to which it refers, in the last columns.
        doc: the document.
    """

    place: int
    change: Change
    shape: StatementKey | None
    row: tuple[object, ...] = ()
    encoded: tuple[bytes, ...] = ()
    parents: tuple[str | None, ...] = ()
    doc: str = ""


def arguments(group: list[PendingChange]) -> list[str]:
    """The arguments of the statement of changes that share one, without the first."""
    args = [array_text(each) for each in zip(*(each.row for each in group), strict=True)]
    args += [bytes_array_text(each) for each in zip(*(each.encoded for each in group), strict=True)]
    args += [array_text(each) for each in zip(*(each.parents for each in group), strict=True)]
    if not isinstance(group[0].change, Delete):
        args.append(f"[{','.join([each.doc for each in group])}]")
    return args


class Encoder:
    """Encodes changes."""

    def __init__(self, tables: Tables, statements: WriteStatements) -> None:
        self.tables = tables
        self.statements = statements

    def pending(self, place: int, change: Change) -> PendingChange:
        """A change with its arguments."""
        expected = change.expect if type(change.expect) is int else None
        if isinstance(change, Delete):
            return self._deletion(place, change, expected)
        if isinstance(change, Patch):
            return self._patch(place, change, expected)
        return self._put(place, change, expected)

    def exactly(self, pending: PendingChange, stored: Stored, row: Stored | None) -> PendingChange:
        """The same change, as the replacement of exactly this stored version by a decided row."""
        key = pending.change.key
        if row is None:
            return self._deletion(pending.place, pending.change, stored.version)
        entity, before = decode_json(row.doc), decode_json(stored.doc)
        # A reference may stay as it is even if its parent is missing.
        new = {name: each for name, each in entity.items() if before.get(name) != each}
        table = self.tables[key.collection]
        return PendingChange(
            pending.place,
            pending.change,
            StatementKey(key.collection, "replace", table.key_fields, created=True, imported=True),
            (key.id, stored.version, row.version),
            table.keys(entity),
            self._parents(key, new),
            row.doc,
        )

    def _deletion(self, place: int, change: Change, expected: int | None) -> PendingChange:
        key = change.key
        has_children = bool(self.statements.children_of(key.collection))
        return PendingChange(
            place,
            change,
            StatementKey(key.collection, "delete"),
            (key.id, expected),
            (sort_bytes(key.id),) if has_children else (),
        )

    def _patch(self, place: int, change: Patch, expected: int | None) -> PendingChange:
        fields, key = change.fields, change.key
        if not all(isinstance(each, _PLAIN) for each in fields.values()):
            return PendingChange(place, change, None)
        named = tuple([e for e in self.tables[key.collection].key_fields if e in fields])
        sets: dict[str, Value] = {}
        removed: list[str] = []
        for name, value in fields.items():
            if isinstance(value, Removed):
                removed.append(name)
            else:
                sets[name] = value
        doc = json_text(sets)
        names = array_text(removed) if removed else None
        return PendingChange(
            place,
            change,
            StatementKey(key.collection, "patch", named),
            (key.id, expected, names, len(doc.encode())),
            tuple([sort_bytes(sets.get(each, MISSING)) for each in named]),
            self._parents(key, sets),
            doc,
        )

    def _put(self, place: int, change: Put, expected: int | None) -> PendingChange:
        key, entity, version = change.key, change.entity, change.import_version
        table = self.tables[key.collection]
        created = version is not None or CREATED_AT in entity
        encoded = table.keys(entity)
        doc = json_text(entity)
        if not created:
            doc = f'{{"{CREATED_AT}":"{change.written_at}",{doc[1:]}'
            if CREATED_AT in table.key_fields:
                encoded = table.keys({**entity, CREATED_AT: change.written_at})
        verb: Verb = "replace"
        row: tuple[object, ...] = (key.id,)
        if change.expect is ANY:
            verb = "save"
        elif change.expect is ABSENT:
            verb, created = "create", True
        else:
            row = (*row, expected)
        if version is not None:
            row = (*row, version)
        shape = StatementKey(key.collection, verb, table.key_fields, created, version is not None)
        return PendingChange(place, change, shape, row, encoded, self._parents(key, entity), doc)

    def _parents(self, key: Key, fields: Mapping[str, object]) -> tuple[str | None, ...]:
        found = (fields.get(each.name) for each in self.statements.parents_of(key.collection))
        return tuple([each if isinstance(each, str) else None for each in found])


def by_statement(pending: Iterable[PendingChange]) -> list[list[PendingChange]]:
    """Group changes by statement, each group sorted by id: rows are locked in this order."""
    groups: dict[StatementKey | None, list[PendingChange]] = {}
    for each in pending:
        groups.setdefault(each.shape, []).append(each)
    return [sorted(each, key=_id_of) for each in groups.values()]


def _id_of(pending: PendingChange) -> str:
    return pending.change.key.id
