"""Writes to SQLite: one call in the thread of the connection reads, decides and writes a whole batch.

While the transaction holds the write lock, nothing else can change. So the changes are decided in
memory, in their order, and the resulting rows are written by statements of many rows. Each step of a
statement acquires the interpreter lock, for which the thread may wait while the event loop is busy,
so few steps are better than few bytes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, Final

from hf_async_store.changes import ABSENT, ANY, Change, Delete, Outcome, Put
from hf_async_store.config import SQLConfig
from hf_async_store.errors import StorageError
from hf_async_store.preconditions import check_children
from hf_async_store.schema import Collection, Field, Schema
from hf_async_store.strategies.sql.decisions import (
    Stored,
    keys_by_collection,
    marker_put,
    new_row,
    parents_of,
    refuse_missing_parents,
)
from hf_async_store.strategies.sql.errors import REFUSALS
from hf_async_store.strategies.sql.names import DOC, PROBES
from hf_async_store.strategies.sql.writer import Writer
from hf_async_store.values import CREATED_AT, VERSION, Key

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.connections import LeasedConnection
    from hf_async_store.strategies.sql.rows import Table

_ROWS: Final = (256, 64, 32, 16, 8, 4, 2, 1)
"""The numbers of rows of the statements: few, so that each is prepared once."""

_WAL_PAGES: Final = 1000  # SQLite's own default
_IMPORT_WAL_PAGES: Final = 10_000
"""With fewer checkpoints, a page that many batches of an import change is written to the file once."""

_NOT_LOADED: Final = ""
"""Instead of a document that was not read yet."""


class SQLiteWriter(Writer):
    """Executes the changes of a store."""

    def __init__(self, schema: Schema, tables: Mapping[str, Table], config: SQLConfig) -> None:
        super().__init__(schema, tables, config)
        self._puts: dict[tuple[str, int], str] = {}

    async def write_each(
        self, lease: LeasedConnection, changes: Sequence[Change], *, patient: bool = True
    ) -> list[Outcome]:
        """See `Writer`: in one transaction, if the database accepts all changes."""
        try:
            return await lease.job(lambda connection: self._commit(connection, changes))
        except REFUSALS as exc:
            if len(changes) == 1:
                return [exc]
        middle = len(changes) // 2
        return [
            *await self.write_each(lease, changes[:middle]),
            *await self.write_each(lease, changes[middle:]),
        ]

    async def apply(self, lease: LeasedConnection, changes: Sequence[Change]) -> list[Outcome]:
        """See `Writer`."""
        return await lease.job(
            lambda connection: _Batch(self, connection).run(changes, all_or_none=True)
        )

    def put_sql(self, collection: str, rows: int) -> str:
        """The statement that writes this number of rows."""
        cached = self._puts.get((collection, rows))
        if cached is None:
            table = self.tables[collection]
            cached = self._puts[collection, rows] = (
                f"INSERT INTO {table.name} ({table.key}, {VERSION}, {DOC}) "
                f"VALUES {', '.join(['(?, ?, ?)'] * rows)} ON CONFLICT ({table.key}) "
                f"DO UPDATE SET {VERSION} = excluded.{VERSION}, {DOC} = excluded.{DOC}"
            )
        return cached

    def _commit(self, connection: sqlite3.Connection, changes: Sequence[Change]) -> list[Outcome]:
        imports = len(changes) > 1 and all(_is_import(each) for each in changes)
        if imports:
            connection.execute(f"PRAGMA wal_autocheckpoint = {_IMPORT_WAL_PAGES}")
        try:
            connection.execute("BEGIN IMMEDIATE")
            outcomes = _Batch(self, connection).run(changes, all_or_none=False)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        finally:
            if imports:
                connection.execute(f"PRAGMA wal_autocheckpoint = {_WAL_PAGES}")
        return outcomes


class _Batch:
    """The rows that one batch read, and those that it must write."""

    def __init__(self, writer: SQLiteWriter, connection: sqlite3.Connection) -> None:
        self._schema = writer.schema
        self._tables = writer.tables
        self._references = writer.references
        self._put_sql = writer.put_sql
        self._connection = connection
        self._rows: dict[Key, Stored | None] = {}  # as they are with the changes so far
        self._parents: dict[Key, bool] = {}  # whether an entity that is not in `_rows` exists
        self._pending: dict[Key, Stored | None] = {}
        self._written = False

    def run(self, changes: Sequence[Change], *, all_or_none: bool) -> list[Outcome]:
        """Decide the changes in order, and write the accepted ones."""
        parents: Iterable[Sequence[Key]] = repeat(())
        if self._references:
            parents = [parents_of(self._schema, each) for each in changes]
        self._read(changes, parents)
        outcomes: list[Outcome] = []
        for change, wanted in zip(changes, parents, strict=False):
            outcome = self._apply(change, wanted)
            outcomes.append(outcome)
            if isinstance(outcome, StorageError):
                if all_or_none:
                    return outcomes
            elif change.mark is not None:
                marker = marker_put(change.mark, getattr(change, "written_at", ""))
                self._write(marker, new_row(self._tables[marker.key.collection], marker, None))
        if not self._written and not self._pending:
            # It fails if the database cannot be written, which is not noticed otherwise.
            self._connection.execute(f"DELETE FROM {PROBES} WHERE FALSE")
        self._flush()
        return outcomes

    def _read(self, changes: Sequence[Change], parents: Iterable[Sequence[Key]]) -> None:
        by_key = {each.key: each for each in changes}
        for collection, ids in keys_by_collection(by_key).items():
            table = self._tables[collection]
            docs = any(_needs_document(by_key[Key(collection, each)]) for each in ids)
            doc = f"t.{DOC}" if docs or len(ids) < len(changes) else f"'{_NOT_LOADED}'"
            self._rows.update(dict.fromkeys(Key(collection, each) for each in ids))
            for entity_id, version, text in self._select(table, f"{VERSION}, {doc}", ids):
                self._rows[Key(collection, entity_id)] = Stored(version, text)
        if self._references:
            unread = [each for each in chain.from_iterable(parents) if each not in self._rows]
            self._parents = dict.fromkeys(unread, False)
            for collection, ids in keys_by_collection(unread).items():
                for [entity_id, _] in self._select(self._tables[collection], VERSION, ids):
                    self._parents[Key(collection, entity_id)] = True

    def _select(self, table: Table, columns: str, ids: Sequence[str]) -> list[Any]:
        source = f"SELECT t.{table.key}, {columns} FROM {table.name} AS t WHERE t.{table.key}"
        if len(ids) == 1:
            return self._connection.execute(f"{source} = ?", ids).fetchall()
        listed = (table.grammar.strings(ids),)
        return self._connection.execute(f"{source} {table.grammar.in_list('?')}", listed).fetchall()

    def _apply(self, change: Change, parents: Sequence[Key]) -> Outcome:
        key = change.key
        table = self._tables[key.collection]
        if key in self._pending and self._refers_to_itself(key.collection):
            self._flush()  # the triggers see each row when it is written
        stored = self._rows[key]
        try:
            if stored is not None and change.expect is not ANY and change.expect != stored.version:
                stored = self._loaded(key, stored)
            row = new_row(table, change, stored)
            if self._references:
                self._check_references(table, change, stored, parents)
        except StorageError as exc:
            return exc
        if row is None:
            if stored is None:
                return None
            self._write(change, None)
            return stored.version
        self._write(change, row)
        return row.version

    def _write(self, change: Change, row: Stored | None) -> None:
        self._rows[change.key] = self._pending[change.key] = row

    def _loaded(self, key: Key, stored: Stored) -> Stored:
        if stored.doc != _NOT_LOADED:
            return stored
        [[_, version, doc]] = self._select(
            self._tables[key.collection], f"{VERSION}, t.{DOC}", [key.id]
        )
        return Stored(version, doc)

    def _refers_to_itself(self, collection: str) -> bool:
        return any(each.references == collection for each in self._schema[collection].references)

    # -- references --------------------------------------------------------------------------

    def _check_references(
        self, table: Table, change: Change, stored: Stored | None, parents: Sequence[Key]
    ) -> None:
        if not isinstance(change, Delete):
            if all(map(self._exists, parents)):
                return
            loaded = None if stored is None else self._loaded(change.key, stored)
            refuse_missing_parents(self._schema, table, change, loaded, self._exists)
        elif stored is not None and self._schema.children[change.key.collection]:
            self._flush()
            check_children(self._schema, change.key, self._children)

    def _exists(self, key: Key) -> bool:
        return self._rows[key] is not None if key in self._rows else self._parents[key]

    def _children(self, child: Collection, field: Field, parent: str) -> list[str]:
        table = self._tables[child.name]
        refers = table.grammar.refers("c", field, "?")
        sql = f"SELECT c.{table.key} FROM {table.name} AS c WHERE {refers} LIMIT 2"
        return [each for [each] in self._connection.execute(sql, (parent,)).fetchall()]

    # -- writing -----------------------------------------------------------------------------

    def _flush(self) -> None:
        """Write the pending rows: parents first, and deletes afterwards, children first."""
        puts: dict[str, list[tuple[str, int, str]]] = {}
        deletes: dict[str, list[tuple[str]]] = {}
        for key, row in self._pending.items():
            if row is None:
                deletes.setdefault(key.collection, []).append((key.id,))
            else:
                puts.setdefault(key.collection, []).append((key.id, *row))
        self._pending.clear()
        self._written = True
        for collection in self._schema:
            if collection in puts:
                self._put(collection, puts[collection])
        for collection in reversed(list(self._schema)):
            if collection in deletes:
                table = self._tables[collection]
                sql = f"DELETE FROM {table.name} WHERE {table.key} = ?"
                self._connection.executemany(sql, deletes[collection])

    def _put(self, collection: str, rows: Sequence[tuple[str, int, str]]) -> None:
        start = 0
        for size in _ROWS:
            while len(rows) - start >= size:
                args = list(chain.from_iterable(rows[start : start + size]))
                self._connection.execute(self._put_sql(collection, size), args)
                start += size


def _is_import(change: Change) -> bool:
    return isinstance(change, Put) and change.import_version is not None


def _needs_document(change: Change) -> bool:
    """Whether the new row depends on the stored document."""
    if not isinstance(change, Put):
        return not isinstance(change, Delete)
    whole = change.import_version is not None or CREATED_AT in change.entity
    return not whole and change.expect is not ABSENT
