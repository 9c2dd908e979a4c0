"""Writes to SQLite: one call in the thread of the connection reads, decides and writes a whole batch.

While the transaction holds the write lock, nothing else can change. So the changes are decided in
memory, in their order, and the resulting rows are written by statements of many rows. Each step of a
statement acquires the interpreter lock, for which the thread may wait while the event loop is busy,
so few steps are better than few bytes. An update sets only the key columns that change, because SQLite
rewrites the entries of every index of which a column is set.

The statements are `OR FAIL`, because a failure rolls back the whole batch anyway: with `OR ABORT`, the
default, a statement of many rows would first copy each page that it changes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, compress
from operator import ne
from typing import TYPE_CHECKING, Any, Final, cast

from msgspec.structs import replace

from hf_async_store.changes import (
    ABSENT,
    ANY,
    Change,
    ChangedMatches,
    Delete,
    Outcome,
    Patch,
    Put,
    TakeChanges,
)
from hf_async_store.config import SQLConfig
from hf_async_store.errors import StorageError
from hf_async_store.event_loop import let_event_loop_run
from hf_async_store.preconditions import check_children, no_longer_shared
from hf_async_store.query import Comparison, Query
from hf_async_store.schema import Collection, Field
from hf_async_store.strategies.sql import reading
from hf_async_store.strategies.sql.catalogue import CatalogueChangedError, generation_sql
from hf_async_store.strategies.sql.compiler import compile_query
from hf_async_store.strategies.sql.decisions import (
    Stored,
    expires,
    keys_by_collection,
    marker_put,
    new_row,
    parents_of,
    present_row,
    refuse_missing_parents,
    row_is_there,
)
from hf_async_store.strategies.sql.errors import REFUSALS
from hf_async_store.strategies.sql.immediate import committed
from hf_async_store.strategies.sql.names import DOC, quoted
from hf_async_store.strategies.sql.sqlite_feed import last_changes, merge_changes
from hf_async_store.strategies.sql.sqlite_matching import CannotDecideError, MatchingUpdate
from hf_async_store.strategies.sql.writer import Writer
from hf_async_store.unique import violation
from hf_async_store.values import CREATED_AT, VERSION, Key, version_of

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.connections import LeasedConnection
    from hf_async_store.strategies.sql.rows import Table, Tables

_ROWS: Final = (256, 64, 32, *range(16, 0, -1))
"""The numbers of rows of the statements: few, so that each is prepared once."""

_WAL_PAGES: Final = 1000  # SQLite's own default
_IMPORT_WAL_PAGES: Final = 10_000
"""With fewer checkpoints, a page that many batches of an import change is written to the file once."""

_STEP: Final = 256
"""After so many decisions, 1 or 2 ms, the event loop may run."""

_NOT_LOADED: Final = ""
"""Instead of a document that was not read yet."""


class SQLiteWriter(Writer):
    """Executes the changes of a store."""

    def __init__(self, tables: Tables, config: SQLConfig) -> None:
        super().__init__(tables, config)
        self._generation_sql = generation_sql(tables.names)
        self._statements: dict[tuple[str, tuple[int, ...] | None, int], str] = {}

    async def write_each(
        self, lease: LeasedConnection, take: TakeChanges, *, patient: bool = True
    ) -> list[Outcome]:
        """See `Writer`: in one transaction, if the database accepts all changes."""
        try:
            return await lease.job(lambda connection: self._commit(connection, take))
        except REFUSALS as exc:
            changes = take()
            if len(changes) <= 1:
                return [exc for _ in changes]
        middle = len(changes) // 2
        outcomes = await self.write_each(lease, lambda: changes[:middle])
        try:
            return outcomes + await self.write_each(lease, lambda: changes[middle:])
        except StorageError as exc:
            # The first half was applied, and must not be reported as failed.
            return outcomes + [exc.copy() for _ in changes[middle:]]

    async def change_matches(
        self, lease: LeasedConnection, query: Query, change: Change
    ) -> ChangedMatches | None:
        """See `Writer`. If another process has the write lock, nothing is done: there may be no matches,
        for which nobody need wait."""
        table = self.tables[query.collection]
        update = MatchingUpdate.of(table, query, change, self._decided_fields(table))
        match = self._decided_matches(table, query, change) if update is None else update.run
        if match is None:
            return None

        def checked(connection: sqlite3.Connection) -> ChangedMatches | None:
            self._check_catalogue(connection)
            return match(connection)

        def at_once(connection: sqlite3.Connection) -> ChangedMatches | None:
            try:
                return committed(connection, checked)
            except CannotDecideError:
                return None
            except sqlite3.OperationalError as exc:
                if getattr(exc, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
                    return None
                raise

        return await lease.job(at_once)

    def _decided_matches(
        self, table: Table, query: Query, change: Change
    ) -> Callable[[sqlite3.Connection], ChangedMatches | None] | None:
        """What reads the matches of a query, decides the change of each, and writes them."""
        read = reading.in_thread(table, query)
        if read is None:
            return None

        def match(connection: sqlite3.Connection) -> ChangedMatches | None:
            entities = read(connection)
            if entities is None:
                return None
            keys = [Key(query.collection, cast("str", each[table.key_field])) for each in entities]
            changes = [
                replace(change, key=key, expect=version_of(entity))
                for key, entity in zip(keys, entities, strict=True)
            ]
            return ChangedMatches(keys, entities, self._decided(connection, changes))

        return match

    def _decided_fields(self, table: Table) -> set[str]:
        """The fields of which a new value is decided by other entities."""
        references = self.schema[table.collection].references if self.references else ()
        return {*chain.from_iterable(table.unique), *(each.name for each in references)}

    async def apply(self, lease: LeasedConnection, changes: Sequence[Change]) -> list[Outcome]:
        """See `Writer`."""
        return await lease.job(lambda connection: self.executed(connection, changes))

    def executed(self, connection: sqlite3.Connection, changes: Sequence[Change]) -> list[Outcome]:
        """See `Writer`."""
        self._check_catalogue(connection)
        return _Batch(self, connection).run(changes, all_or_none=True)

    def _check_catalogue(self, connection: sqlite3.Connection) -> None:
        """Check under the write lock that the tables are as they were read."""
        generation = connection.execute(self._generation_sql).fetchone()
        if generation != (str(self.tables.catalogue.generation),):
            raise CatalogueChangedError

    def insert_sql(self, table: Table, rows: int) -> str:
        """The statement that inserts this number of rows: id, version, document, key columns."""
        columns = [table.key, VERSION, DOC, *table.columns]
        values = _values(len(columns), rows)
        return f"INSERT OR FAIL INTO {table.name} ({', '.join(columns)}) VALUES {values}"

    def update_sql(self, table: Table, changed: tuple[int, ...], rows: int) -> str:
        """The statement that updates this number of rows: id, version, document, and some key columns."""
        names = [VERSION, DOC, *(table.columns[each] for each in changed)]
        sets = ", ".join(f"{name} = v.column{number}" for number, name in enumerate(names, 2))
        values = _values(len(names) + 1, rows)
        return (
            f"UPDATE OR FAIL {table.name} AS t SET {sets} FROM (VALUES {values}) AS v "
            f"WHERE t.{table.key} = v.column1"
        )

    def statement(self, table: Table, changed: tuple[int, ...] | None, rows: int) -> str:
        """The statement for rows of which these key columns change; None: for new rows."""
        place = (table.collection, changed, rows)
        cached = self._statements.get(place)
        if cached is None:
            if changed is None:
                cached = self.insert_sql(table, rows)
            else:
                cached = self.update_sql(table, changed, rows)
            self._statements[place] = cached
        return cached

    def _commit(self, connection: sqlite3.Connection, take: TakeChanges) -> list[Outcome]:
        imports = False

        def write(connection: sqlite3.Connection) -> list[Outcome]:
            nonlocal imports
            changes = take()
            self.check_tables(changes)
            imports = len(changes) > 1 and all(map(_is_import, changes))
            if imports:
                connection.execute(f"PRAGMA wal_autocheckpoint = {_IMPORT_WAL_PAGES}")
            return self._decided(connection, changes) if changes else []

        try:
            return committed(connection, write)
        finally:
            if imports:
                connection.execute(f"PRAGMA wal_autocheckpoint = {_WAL_PAGES}")

    def _decided(self, connection: sqlite3.Connection, changes: Sequence[Change]) -> list[Outcome]:
        """Decide independent changes under the write lock, and write the accepted ones."""
        self._check_catalogue(connection)
        feeds = self._feeds({each.key.collection for each in changes})
        since = last_changes(connection, feeds) if feeds else {}
        batch = _Batch(self, connection)
        outcomes = batch.run(changes, all_or_none=False)
        if since and batch.repeats:
            merge_changes(connection, since)
        return outcomes

    def _feeds(self, collections: Iterable[str]) -> list[str]:
        """The tables of changes of some collections."""
        names = self.tables.names
        return [names.feed(each) for each in collections if self.tables[each].entry.has_feed]


class _Batch:
    """The rows that one batch read, and those that it must write.

    Attributes:
        repeats: a row may have been written several times.
    """

    def __init__(self, writer: SQLiteWriter, connection: sqlite3.Connection) -> None:
        self._schema = writer.schema
        self._tables = writer.tables.by_name
        self._names = writer.tables.names
        self._references = writer.references
        self._statement = writer.statement
        self._shares = writer.shares_changes
        self._connection = connection
        self._rows: dict[Key, Stored | None] = {}  # as they are with the changes so far
        self._parents: dict[Key, bool] = {}  # whether an entity that is not in `_rows` exists
        self._before: dict[Key, Stored | None] = {}  # the stored rows of those that changed
        # By unique column and value: the entities that got it by one of the changes.
        self._claims: dict[tuple[str, int, bytes], list[str]] = {}
        self._recreated: set[Key] = set()  # the rows of expired entities that new ones replace
        self._written = False
        self.repeats = False

    def run(self, changes: Sequence[Change], *, all_or_none: bool) -> list[Outcome]:
        """Decide the changes in order, and write the accepted ones."""
        self._read(changes)
        must_check = self._references and self._read_parents(changes)
        outcomes: list[Outcome] = []
        for number, change in enumerate(changes, 1):
            outcome = self._apply(change, must_check=must_check)
            outcomes.append(outcome)
            if not number % _STEP:
                let_event_loop_run()
            if isinstance(outcome, StorageError):
                if all_or_none:
                    return outcomes
            elif change.mark is not None:
                marker = marker_put(change.mark, getattr(change, "written_at", ""))
                self._set(marker.key, new_row(self._tables[marker.key.collection], marker, None))
        if not self._written and not self._before:
            # It fails if the database cannot be written, which is not noticed otherwise.
            catalogue = quoted(self._names.catalogue)
            self._connection.execute(f"DELETE FROM {catalogue} WHERE FALSE")
        self._flush()
        return outcomes

    # -- reading -----------------------------------------------------------------------------

    def _read(self, changes: Sequence[Change]) -> None:
        by_key = {each.key: each for each in changes}
        marks = [each.mark.key for each in changes if each.mark is not None]
        self._rows = dict.fromkeys(chain(by_key, marks))
        # Changes of one entity may need whatever an earlier one of them left unchanged.
        everything = len(by_key) < len(changes)
        doc = f"t.{DOC}" if everything or any(map(_needs_document, changes)) else f"'{_NOT_LOADED}'"
        named = None if everything else _named_fields(changes)
        for collection, ids in keys_by_collection(self._rows).items():
            table = self._tables[collection]
            keys = [
                f"t.{column}" if named is None or field in named else "NULL"
                for field, column in zip(table.key_fields, table.key_columns, strict=True)
            ]
            keys += [f"t.{column}" for column in table.columns[len(keys) :]]
            for row in self._select(table, ", ".join([VERSION, doc, *keys]), ids):
                self._rows[Key(collection, row[0])] = Stored(row[1], row[2], row[3:])

    def _read_parents(self, changes: Sequence[Change]) -> bool:
        """Find out which parents exist; returns whether the references must be checked one by one."""
        wanted: dict[str, set[str]] = {}
        groups = _by_kind(changes)
        for (collection, kind), group in groups.items():
            references = self._schema[collection].references
            if kind is Delete or not references:
                continue
            given = _given(group)
            for field in references:
                ids = wanted.setdefault(field.parent, set())
                ids.update([each for part in given if type(each := part.get(field.name)) is str])
        self._parents = {}
        for collection, found in wanted.items():
            unread = sorted(each for each in found if Key(collection, each) not in self._rows)
            if not unread:
                continue
            self._parents.update(dict.fromkeys([Key(collection, each) for each in unread], False))
            for [entity_id, _] in self._select(self._tables[collection], VERSION, unread):
                self._parents[Key(collection, entity_id)] = True
        may_expire = any(
            expires(each, field.parent)
            for each in changes
            if each.lifetimes is not None
            for field in self._schema[each.key.collection].references
        )
        return (
            may_expire
            or not all(self._parents.values())
            or any(collection in wanted for collection, _ in groups)
            or any(kind is Delete and self._schema.children[each] for each, kind in groups)
        )

    def _select(self, table: Table, columns: str, ids: Sequence[str]) -> list[Any]:
        source = f"SELECT t.{table.key}, {columns} FROM {table.name} AS t WHERE t.{table.key}"
        if len(ids) == 1:
            return self._connection.execute(f"{source} = ?", ids).fetchall()
        listed = (table.grammar.strings(ids),)
        return self._connection.execute(f"{source} {table.grammar.in_list('?')}", listed).fetchall()

    def _loaded(self, key: Key, stored: Stored) -> Stored:
        """A stored row with its document."""
        if stored.doc != _NOT_LOADED:
            return stored
        [[_, doc]] = self._select(self._tables[key.collection], f"t.{DOC}", [key.id])
        return replace(stored, doc=doc)

    # -- decisions ---------------------------------------------------------------------------

    def _apply(self, change: Change, *, must_check: bool) -> Outcome:
        key = change.key
        table = self._tables[key.collection]
        stored = self._rows[key]
        try:
            if type(change) is Put and change.shared and not self._shares(key.collection):
                raise no_longer_shared(key)
            if stored is not None:
                stored = self._judged(table, change, stored)
            row = new_row(table, change, stored)
            if must_check:
                self._check_references(table, change, stored)
            if table.unique and row is not None:
                self._check_unique(table, change, stored, row)
        except StorageError as exc:
            return exc
        if row is not None:
            if stored is None and self._rows[key] is not None:
                self._recreated.add(key)
            self._set(key, row)
            return row.version
        if stored is None:
            return None
        self._set(key, None)
        return stored.version

    def _judged(self, table: Table, change: Change, stored: Stored) -> Stored | None:
        """A stored row as a change sees it, with its document if that is needed; None if it has expired."""
        key, expect = change.key, change.expect
        if expires(change, key.collection):
            return present_row(table, change, self._loaded(key, stored))
        return stored if expect is ANY or expect == stored.version else self._loaded(key, stored)

    def _set(self, key: Key, row: Stored | None) -> None:
        self._before.setdefault(key, self._rows[key])
        self._rows[key] = row

    def _check_unique(
        self, table: Table, change: Change, stored: Stored | None, row: Stored
    ) -> None:
        """Refuse unique values that belong to another entity, and record those that do not."""
        key = change.key
        first = len(table.key_fields)
        for place, fields in enumerate(table.unique, first):
            value = row.keys[place]
            if value is not None and (stored is None or stored.keys[place] != value):
                for owner in self._owners(table, place, value, key):
                    if row_is_there(table, change, owner, self._whole_row(table, owner).doc):
                        raise violation(key, fields, owner.id)
                    self._free(table, owner)
                self._claims.setdefault((table.collection, place, value), []).append(key.id)

    def _owners(self, table: Table, place: int, value: bytes, key: Key) -> Iterator[Key]:
        """The keys of the entities, other than this one, that have a value in a unique column."""
        sql = f"SELECT {table.key} FROM {table.name} WHERE {table.columns[place]} = ?"
        stored = [row[0] for row in self._connection.execute(sql, (value,)).fetchall()]
        for each in (*self._claims.get((table.collection, place, value), ()), *stored):
            if each == key.id:
                continue
            other = Key(key.collection, each)
            row = self._rows.get(other)
            if other not in self._rows or (row is not None and row.keys[place] == value):
                yield other

    def _whole_row(self, table: Table, key: Key) -> Stored:
        """A row that exists, which is kept with its document and all key columns."""
        row = self._rows.get(key)
        if row is None:
            columns = ", ".join([VERSION, f"t.{DOC}", *(f"t.{each}" for each in table.columns)])
            [[_, version, doc, *keys]] = self._select(table, columns, [key.id])
            row = Stored(version, doc, tuple(keys))
        else:
            row = self._loaded(key, row)
        self._rows[key] = row
        return row

    def _free(self, table: Table, key: Key) -> None:
        """Let the row of an entity that has expired hold no unique value any more."""
        row = self._rows[key]
        assert row is not None, "it was read"
        empty = (None,) * len(table.unique)
        self._set(key, replace(row, keys=(*row.keys[: len(table.key_fields)], *empty)))

    def _check_references(self, table: Table, change: Change, stored: Stored | None) -> None:
        if not isinstance(change, Delete):
            exists = partial(self._exists_for, change)
            if not all(map(exists, parents_of(self._schema, change))):
                loaded = None if stored is None else self._loaded(change.key, stored)
                refuse_missing_parents(self._schema, table, change, loaded, exists)
        elif stored is not None and self._schema.children[change.key.collection]:
            self._flush()
            check_children(self._schema, change.key, self._children)

    def _exists(self, key: Key) -> bool:
        return self._rows[key] is not None if key in self._rows else self._parents[key]

    def _exists_for(self, change: Change, key: Key) -> bool:
        """Whether a parent exists, and has not expired."""
        if not self._exists(key) or not expires(change, key.collection):
            return self._exists(key)
        table = self._tables[key.collection]
        row = self._rows.get(key)
        if row is None:
            [[_, doc]] = self._select(table, table.grammar.read(f"t.{DOC}"), [key.id])
        else:
            doc = self._loaded(key, row).doc
        return row_is_there(table, change, key, doc)

    def _children(self, child: Collection, field: Field, parent: str) -> list[str]:
        query = Query(child.name, Comparison((field.name,), "eq", parent), limit=2)
        compiled = compile_query(self._tables[child.name], query)
        return [row[0] for row in self._connection.execute(compiled.sql, compiled.args).fetchall()]

    # -- writing -----------------------------------------------------------------------------

    def _flush(self) -> None:
        """Write the changed rows, those together that need the same statement."""
        deletes: dict[str, list[str]] = {}
        writes: dict[tuple[str, tuple[int, ...] | None], list[tuple[object, ...]]] = {}
        freed: dict[str, list[str]] = {}  # by table with unique columns: the rows that change one
        for key, before in self._before.items():
            row = self._rows[key]
            if before is not None and (row is None or key in self._recreated):
                # The claim of an entity is deleted with its row.
                deletes.setdefault(key.collection, []).append(key.id)
                before = None
            if row is None:
                continue
            changed = None if before is None else _different(before.keys, row.keys)
            if changed:
                table = self._tables[key.collection]
                if table.unique and changed[-1] >= len(table.key_fields):
                    # Another row may get the value in an earlier statement.
                    freed.setdefault(key.collection, []).append(key.id)
                    changed = tuple(sorted({*changed, *_unique_places(table)}))
            args = writes.get((key.collection, changed))
            if args is None:
                args = writes[key.collection, changed] = []
            keys = row.keys if changed is None else [row.keys[each] for each in changed]
            args.append((key.id, row.version, row.doc, *keys))
        self.repeats = self._written or bool(self._recreated)
        self._before.clear()
        self._recreated.clear()
        self._written = True
        self._execute(deletes, freed, writes)

    def _execute(
        self,
        deletes: Mapping[str, Sequence[str]],
        freed: Mapping[str, Sequence[str]],
        writes: Mapping[tuple[str, tuple[int, ...] | None], list[tuple[object, ...]]],
    ) -> None:
        for collection, gone in deletes.items():
            table = self._tables[collection]
            sql = f"DELETE FROM {table.name} WHERE {table.key} {table.grammar.in_list('?')}"
            self._connection.execute(sql, (table.grammar.strings(gone),))
        for collection, ids in freed.items():
            table = self._tables[collection]
            sets = ", ".join(f"{each} = NULL" for each in table.columns[len(table.key_fields) :])
            sql = f"UPDATE {table.name} SET {sets} WHERE {table.key} {table.grammar.in_list('?')}"
            self._connection.execute(sql, (table.grammar.strings(ids),))
        for (collection, changed), rows in writes.items():
            for part in _pieces(rows):
                sql = self._statement(self._tables[collection], changed, len(part))
                self._connection.execute(sql, list(chain.from_iterable(part)))


def _by_kind(changes: Iterable[Change]) -> dict[tuple[str, type[Change]], list[Change]]:
    """The changes by collection and type."""
    groups: dict[tuple[str, type[Change]], list[Change]] = {}
    for each in changes:
        groups.setdefault((each.key.collection, type(each)), []).append(each)
    return groups


def _given(changes: Iterable[Change]) -> list[Mapping[str, object]]:
    """The fields that changes, none of them a delete, give their entities."""
    return [each.entity if type(each) is Put else cast("Patch", each).fields for each in changes]


def _values(columns: int, rows: int) -> str:
    row = f"({', '.join('?' * columns)})"
    return ", ".join([row] * rows)


def _different(before: Sequence[bytes | None], after: Sequence[bytes | None]) -> tuple[int, ...]:
    """The positions at which key columns differ."""
    if before == after:
        return ()
    return tuple(compress(range(len(after)), map(ne, before, after)))


def _unique_places(table: Table) -> range:
    return range(len(table.key_fields), len(table.columns))


def _pieces(rows: list[tuple[object, ...]]) -> Iterator[list[tuple[object, ...]]]:
    start = 0
    for size in _ROWS:
        while len(rows) - start >= size:
            yield rows[start : start + size]
            start += size


def _is_import(change: Change) -> bool:
    return isinstance(change, Put) and change.import_version is not None and not change.shared


def _named_fields(changes: Iterable[Change]) -> set[str] | None:
    """The fields whose stored key columns matter to the changes; None: all of them."""
    names: set[str] = set()
    for each in changes:
        if isinstance(each, Put):
            return None
        if not isinstance(each, Delete):
            names.update(each.fields)
    return names


def _needs_document(change: Change) -> bool:
    """Whether the new row depends on the stored document."""
    if expires(change, change.key.collection):
        return True
    if not isinstance(change, Put):
        return not isinstance(change, Delete)
    whole = change.import_version is not None or CREATED_AT in change.entity
    return not whole and change.expect is not ABSENT
