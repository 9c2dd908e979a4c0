"""Executes changes: divides them into waves, groups each wave by statement, and finds out why a change
was rejected.

The changes of a wave are independent of one another, so that all changes with the same `StatementKey`
can share a statement. A change that the statement does not return did not meet its precondition and
had no effect. Then the stored entity is read and checked by `preconditions`, as in every engine. If it
meets the precondition now, the change is sent again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, cast

from hf_async_store.changes import (
    ABSENT,
    ANY,
    Change,
    ChangeMarker,
    Delete,
    Outcome,
    Patch,
    Put,
    Record,
)
from hf_async_store.errors import (
    ConcurrencyConflictError,
    StorageError,
)
from hf_async_store.field_operations import plain_fields
from hf_async_store.preconditions import changed, check_children, check_parents, missing_parents
from hf_async_store.schema import Collection, Field, Schema
from hf_async_store.strategies.sql import reading
from hf_async_store.strategies.sql.dialect import BulkUpsert
from hf_async_store.strategies.sql.errors import REFUSALS
from hf_async_store.strategies.sql.row_mapping import TableMapping, quoted
from hf_async_store.strategies.sql.write_sql import StatementKey, Verb, WriteStatementCache
from hf_async_store.values import CREATED_AT, VERSION, Key

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.connections import LeasedConnection

_TRIES: Final = 64
"""How often a change is sent whose precondition is met each time the entity is read."""

_IMPORT_PIECE: Final = 256
"""How many rows are built per iteration of the event loop."""

DECIDED_HERE: Final = ("*",)
"""In the statement key of updates with field operations: no statement expresses them. As if it had been
rejected, each is decided on the entity that is read, and sent as a replacement of this version."""

# Called for many changes by `map`.
_ID: Final = attrgetter("key.id")
_COLLECTION: Final = attrgetter("key.collection")
_ENTITY: Final = attrgetter("entity")
_EXPECT: Final = attrgetter("expect")
_VERSION: Final = attrgetter("import_version")
_AT: Final = attrgetter("written_at")


class Run(Protocol):
    """Runs one statement that writes; the implementation decides whether an error is retried."""

    def __call__(
        self, sql: str, args: Sequence[object]
    ) -> Awaitable[Sequence[Sequence[object]]]: ...


class StatementGroup(NamedTuple):
    """Changes with the same statement key, sorted by id.

    Attributes:
        places: the position of each change in the whole list of changes.
        columns: the arguments of their statement by column, the id first.
    """

    shape: StatementKey
    places: Sequence[int]
    changes: Sequence[Change]
    columns: Sequence[Sequence[object]]

    def part(self, start: int, end: int) -> StatementGroup:
        return StatementGroup(
            self.shape,
            self.places[start:end],
            self.changes[start:end],
            [each[start:end] for each in self.columns],
        )

    def before(self, place: int) -> StatementGroup:
        """The changes whose position in the whole list is before this one."""
        if max(self.places) < place:
            return self
        kept = [n for n, each in enumerate(self.places) if each < place]
        return StatementGroup(
            self.shape,
            [self.places[n] for n in kept],
            [self.changes[n] for n in kept],
            [[each[n] for n in kept] for each in self.columns],
        )


class BulkWriter:
    """Executes the writes of a store on a leased connection."""

    def __init__(
        self,
        schema: Schema,
        tables: Mapping[str, TableMapping],
        statements: WriteStatementCache,
        *,
        references: bool,
    ) -> None:
        self._schema = schema
        self._tables = tables
        self._statements = statements
        self._references = references

    def statements(self, waves: Sequence[Sequence[StatementGroup]]) -> int:
        """The number of statements that the changes of these waves need."""
        return sum(
            len(self._tables[batch.shape.collection].dialect.batches(len(batch.places)))
            # A read, and the write on condition that it is current.
            * (2 if batch.shape.names == DECIDED_HERE else 1)
            for wave in waves
            for batch in wave
        )

    def dependency_batches(self, changes: Sequence[Change]) -> list[list[StatementGroup]]:
        """Divide changes into waves, to be executed in order, and group each wave by statement key."""
        levels = _dependency_depth(self._schema, changes) if self._may_touch(changes) else None
        alike = self._single_shape_batch(changes) if levels is None else None
        if alike is not None:
            return [[alike]]
        waves: list[list[PendingChange]] = []
        for place, change in enumerate(changes):
            level = 0 if levels is None else levels[place]
            while len(waves) <= level:
                waves.append([])
            waves[level].append(self._sent(place, change))
        return [_batches(wave) for wave in waves]

    def _single_shape_batch(self, changes: Sequence[Change]) -> StatementGroup | None:
        """One group for all changes, built column by column; None unless they are whole entities with
        the same statement key, as those of a batch often are."""
        first = changes[0]
        if not isinstance(first, Put) or set(map(type, changes)) != {Put}:
            return None
        puts = cast("Sequence[Put]", changes)
        count = len(puts)
        given = first.import_version is not None
        if (
            first.expect not in (ANY, ABSENT)
            or list(map(_EXPECT, puts)).count(first.expect) < count
            or list(map(_VERSION, puts)).count(None) != (0 if given else count)
            or list(map(_COLLECTION, puts)).count(first.key.collection) < count
        ):
            return None
        ids = list(map(_ID, puts))
        places = sorted(range(count), key=ids.__getitem__)
        puts = [puts[place] for place in places]
        created = given or CREATED_AT in first.entity
        columns = self._tables[first.key.collection].columns_of(
            list(map(_ENTITY, puts)), None if created else list(map(_AT, puts))
        )
        if columns is None:
            return None
        if given:
            columns.append(list(map(_VERSION, puts)))
        verb: Verb = "save" if first.expect is ANY else "create"
        shape = StatementKey(first.key.collection, verb, created=created, with_version=given)
        return StatementGroup(shape, places, puts, columns)

    def _may_touch(self, changes: Sequence[Change]) -> bool:
        if len(changes) == 1:
            return False
        keys = {each.key for each in changes}
        if len(keys) < len(changes):
            return True
        collections = {each.key.collection for each in changes}
        return self._references and (
            len(collections) > 1
            or any(
                each.references in collections
                for name in collections
                for each in self._schema[name].references
            )
        )

    def _sent(self, place: int, change: Change, kept: tuple[str, ...] = ()) -> PendingChange:
        collection = change.key.collection
        table = self._tables[collection]
        versions = type(change.expect) is int
        if isinstance(change, Delete):
            row: list[object] = [change.key.id]
            shape = StatementKey(collection, "delete", versions=versions)
        elif isinstance(change, Patch):
            fields = plain_fields(change.fields)
            if fields is None:
                shape = StatementKey(collection, "patch", names=DECIDED_HERE, versions=versions)
                return PendingChange(place, change, shape, [change.key.id])
            patched = table.patched(fields)
            document = patched.sets is not None or patched.removes is not None
            row = [change.key.id, *patched.values.values()]
            if document:
                row += [patched.sets, patched.removes]
            row += [patched.side_sets, patched.side_removes, patched.weight]
            names = tuple(patched.values)
            shape = StatementKey(
                collection, "patch", versions=versions, names=names, document=document
            )
        else:
            given = change.import_version is not None
            created = CREATED_AT in change.entity
            whole = created or given
            row = table.row(
                change.entity if whole else {**change.entity, CREATED_AT: change.written_at}
            )
            if given:
                row.append(change.import_version)
            verb: Verb = "replace"
            if change.expect is ANY or change.expect is ABSENT:
                verb = "save" if change.expect is ANY else "create"
            shape = StatementKey(
                collection, verb, created=created, with_version=given, versions=versions, kept=kept
            )
        if versions:
            row.append(change.expect)
        return PendingChange(place, change, shape, row)

    async def send(
        self,
        run: Run,
        lease: LeasedConnection,
        batch: StatementGroup,
        outcomes: list[Outcome],
        *,
        halves: bool,
    ) -> None:
        """Execute changes with the same statement key, and store the outcome of each in `outcomes`.

        Args:
            halves: if the database rejects a statement, it is sent again in two halves.

        Raises:
            ReferenceViolationError, InvalidInputError: the database rejected a statement, and
                `halves` is false.
        """
        if await self._bulk_upsert_locked(lease, batch, outcomes):
            return
        start = 0
        for size in self._tables[batch.shape.collection].dialect.batches(len(batch.places)):
            waiting = [batch.part(start, start + size)]
            start += size
            for attempt in range(_TRIES):
                last = attempt == _TRIES - 1
                again = [
                    each
                    for part in waiting
                    for each in await self._attempt(
                        run, lease, part, outcomes, halves=halves and not last
                    )
                ]
                waiting = again
                if not waiting:
                    break
                if attempt:
                    await asyncio.sleep(random.uniform(0, 0.001 * attempt))
            for part in waiting:
                for place, change in zip(part.places, part.changes, strict=True):
                    outcomes[place] = _overtaken(change.key)

    async def _attempt(
        self,
        run: Run,
        lease: LeasedConnection,
        batch: StatementGroup,
        outcomes: list[Outcome],
        *,
        halves: bool,
    ) -> list[StatementGroup]:
        """Send changes in one statement; returns those that must be sent again."""
        try:
            landed = {}
            if batch.shape.names != DECIDED_HERE:
                landed = await self._applied(run, batch)
        except REFUSALS as exc:
            # Another transaction changed a parent or child after the statement had checked the
            # references, or the database has constraints that this store did not create.
            if not halves or lease.lost_transaction:
                raise
            count = len(batch.places)
            if count > 1:
                return [batch.part(0, count // 2), batch.part(count // 2, count)]
            outcomes[batch.places[0]] = exc
            return []
        left: list[tuple[int, Change]] = []
        for place, change in zip(batch.places, batch.changes, strict=True):
            version = landed.get(change.key.id)
            if version is None:
                left.append((place, change))
            else:
                outcomes[place] = version
        return _batches(await self._diagnose_rejected(lease, left, outcomes)) if left else []

    async def _applied(self, run: Run, batch: StatementGroup) -> dict[str, int]:
        """Send changes in one statement; returns by id the new versions of those that were applied."""
        statement = self._statements.of(batch.shape, len(batch.places))
        dialect = self._tables[batch.shape.collection].dialect
        rows = await run(statement.sql, dialect.bind_columns(batch.columns, statement.kinds))
        return dict(cast("Sequence[tuple[str, int]]", rows))

    async def _bulk_upsert_locked(
        self, lease: LeasedConnection, batch: StatementGroup, outcomes: list[Outcome]
    ) -> bool:
        """Execute many changes in bulk if no other connection can write; returns whether it was possible.

        The preconditions are then checked by separate reads before the write. One statement that
        checks and returns each row takes twice as long.
        """
        shape = batch.shape
        if (
            len(batch.places) == 1
            or not lease.has_exclusive_write
            or shape.verb not in ("save", "create")
        ):
            return False
        table = self._tables[shape.collection]
        parents: list[tuple[str, Sequence[str]]] = []
        for field in table.collection.references if self._references else ():
            if field.references == shape.collection:
                return False
            ids = set(batch.columns[table.names.index(field.name)]) - {None}
            parent = self._tables[cast("str", field.references)]
            parents.append((parent.count, cast("list[str]", sorted(ids))))
        used = tuple(
            n
            for n, each in enumerate(batch.columns)
            if each[0] is not None or each.count(None) < len(each)
        )
        versions = await lease.bulk_upsert_locked(
            BulkUpsert(
                parents=parents,
                versions=None if shape.with_version and shape.verb == "save" else table.versions,
                fresh=shape.verb == "create",
                text=lambda rows: self._statements.in_bulk(shape, used, rows),
                columns=[batch.columns[n] for n in used],
            )
        )
        if versions is None:
            return False
        for place, change in zip(batch.places, batch.changes, strict=True):
            if shape.with_version:
                outcomes[place] = cast("Put", change).import_version
            else:
                outcomes[place] = versions.get(change.key.id, 0) + 1 if versions else 1
        return True

    # -- imports -----------------------------------------------------------------------------

    def imports_in(self, changes: Sequence[Change]) -> list[Put] | None:
        """The changes, if all of them are imports of whole entities into one collection without any
        precondition, and the dialect has bulk statements for these; else None."""
        collection = changes[0].key.collection
        if self._tables[collection].dialect.bulk is None or len(changes) == 1:
            return None
        for each in changes:
            if (
                type(each) is not Put
                or each.expect is not ANY
                or each.import_version is None
                or each.mark is not None
                or each.key.collection != collection
            ):
                return None
        return None if self._may_touch(changes) else cast("list[Put]", changes)

    async def import_rows(self, puts: Sequence[Put]) -> list[list[object]]:
        """Build the rows of arguments for imports, before a connection is leased."""
        row = self._tables[puts[0].key.collection].row
        rows: list[list[object]] = []
        for start in range(0, len(puts), _IMPORT_PIECE):
            if start:
                await asyncio.sleep(0)
            rows += [
                [*row(put.entity), put.import_version]
                for put in puts[start : start + _IMPORT_PIECE]
            ]
        return rows

    async def imported(
        self, lease: LeasedConnection, collection: str, rows: list[list[object]]
    ) -> bool:
        """Write rows of imports; returns whether all were written. Rows whose parent is missing are not."""
        bulk = self._tables[collection].dialect.bulk
        assert bulk is not None, "checked by `imports_in`"
        start = landed = 0
        for size, times in bulk.blocks(len(rows), len(rows[0])):
            ends = range(start + size, start + size * times + 1, size)
            blocks = [list(chain.from_iterable(rows[end - size : end])) for end in ends]
            start = ends[-1]
            landed += await lease.many(self._statements.imports(collection, size), blocks)
        return landed == len(rows)

    # -- rejected changes --------------------------------------------------------------------

    async def _diagnose_rejected(
        self,
        lease: LeasedConnection,
        refused: Sequence[tuple[int, Change]],
        outcomes: list[Outcome],
    ) -> list[PendingChange]:
        """Store the errors of rejected changes in `outcomes`; returns those that are valid now."""
        left: list[tuple[int, Change]] = []
        for place, change in refused:
            if self._tells_absence(change):
                outcomes[place] = None
            else:
                left.append((place, change))
        if not left:
            return []
        records = await self.fetch(lease, [change.key for _, change in left])
        parents = await self._parents(lease, [change for _, change in left])
        again: list[PendingChange] = []
        for (place, change), record in zip(left, records, strict=True):
            try:
                entity = changed(change, None if record is None else record.entity)
                if self._references:
                    await self._check_references(lease, change, record, parents)
            except StorageError as exc:
                outcomes[place] = exc
                continue
            if isinstance(change, Delete):
                if record is None:
                    outcomes[place] = None
                else:
                    again.append(self._sent(place, change))
                continue
            kept = self._broken(change, parents)
            if record is None or entity is None or not (kept or isinstance(change, Patch)):
                again.append(self._sent(place, change))
                continue
            # The statement rejects two kinds of valid changes: an update of a large entity that stays
            # within the size limit, and a reference whose parent was already missing. Now that the
            # entity was read, the change replaces exactly this version.
            version = cast("int", entity.pop(VERSION))
            put = Put(change.key, entity, change.written_at, record.version, version)
            # If it is rejected again, the original change is checked.
            again.append(self._sent(place, put, kept)._replace(change=change))
        return again

    def _broken(self, change: Put | Patch, parents: set[Key]) -> tuple[str, ...]:
        """The names of references whose parent is missing, but which `check_parents` accepted."""
        if not self._references:
            return ()
        return tuple(
            field.name for field, _ in missing_parents(self._schema, change, parents.__contains__)
        )

    def _tells_absence(self, change: Change) -> bool:
        """Whether this change can be rejected only because the entity does not exist."""
        return (
            isinstance(change, Delete)
            and change.expect is ANY
            and not (self._references and self._schema.children[change.key.collection])
        )

    async def _parents(self, lease: LeasedConnection, changes: Iterable[Change]) -> set[Key]:
        """The existing parents to which changes refer."""
        if not self._references:
            return set()
        wanted: set[Key] = set()
        for change in changes:
            if isinstance(change, Delete):
                continue
            fields = change.entity if isinstance(change, Put) else change.fields
            for field in self._schema[change.key.collection].references:
                parent = fields.get(field.name)
                if isinstance(parent, str):
                    wanted.add(Key(cast("str", field.references), parent))
        there: set[Key] = set()
        for name in {each.collection for each in wanted}:
            table = self._tables[name]
            ids = [each.id for each in wanted if each.collection == name]
            source = table.dialect.values_source(["text"], len(ids))
            rows = await lease.rows(
                f"SELECT t.{table.key} FROM {table.name} AS t "
                f"WHERE t.{table.key} IN (SELECT i.c0 FROM {source})",
                table.dialect.bind_columns([ids], ["text"]),
            )
            there.update(Key(name, row[0]) for row in rows)
        return there

    async def _check_references(
        self, lease: LeasedConnection, change: Change, record: Record | None, parents: set[Key]
    ) -> None:
        if not isinstance(change, Delete):
            entity = None if record is None else record.entity
            check_parents(self._schema, change, entity, parents.__contains__)
        elif record is not None:
            children = {
                (child.name, field.name): await self._children(lease, child, field, change.key)
                for child, field in self._schema.children[change.key.collection]
            }
            check_children(
                self._schema, change.key, lambda child, field, _: children[child.name, field.name]
            )

    async def _children(
        self, lease: LeasedConnection, child: Collection, field: Field, parent: Key
    ) -> list[str]:
        table = self._tables[child.name]
        parameter = table.dialect.parameter(1, "text")
        rows = await lease.rows(
            f"SELECT t.{table.key} FROM {table.name} AS t "
            f"WHERE t.{quoted(field.name)} = {parameter} LIMIT 2",
            (parent.id,),
        )
        return [row[0] for row in rows]

    async def fetch(self, lease: LeasedConnection, keys: Sequence[Key]) -> list[Record | None]:
        """The records of `keys`, in their order."""
        return await reading.fetch(lease, self._tables, keys)


def marker_put(mark: ChangeMarker, at: str) -> Put:
    """The change that writes a change marker with its version."""
    entity = dict(mark.entity)
    version = cast("int", entity.pop(VERSION, 0))
    return Put(mark.key, entity, at, import_version=version)


class PendingChange(NamedTuple):
    """A change, its position, its statement key and its row of arguments."""

    place: int
    change: Change
    shape: StatementKey
    row: list[object]


def _batches(sents: Iterable[PendingChange]) -> list[StatementGroup]:
    by_shape: dict[StatementKey, list[PendingChange]] = {}
    for each in sents:
        by_shape.setdefault(each.shape, []).append(each)
    batches = []
    for shape, alike in by_shape.items():
        alike.sort(key=_id_of)
        places, changes, _, rows = zip(*alike, strict=True)
        batches.append(StatementGroup(shape, places, changes, list(zip(*rows, strict=True))))
    return batches


def _id_of(sent: PendingChange) -> str:
    return sent.change.key.id


def _overtaken(key: Key) -> ConcurrencyConflictError:
    return ConcurrencyConflictError(
        f"{key.collection} {key.id!r}: other writers kept changing the entity between each write "
        "and the read after it: try again",
        collection=key.collection,
        entity_id=key.id,
        retryable=True,
    )


def _dependency_depth(schema: Schema, changes: Sequence[Change]) -> list[int]:
    """For each change, the number of its wave: after the waves of all changes on which it may depend.

    A change depends on the earlier changes of the same key. A child and a change of its parent
    depend on each other in input order, and so do a delete in a collection that has children and
    every change of these children.
    """
    of_key: dict[Key, int] = {}
    of_children: dict[Key, int] = {}  # by parent: the last wave of a change that refers to it
    of_deletes: dict[str, int] = {}  # by collection of parents: the last wave of a delete
    of_collection: dict[str, int] = {}  # by collection: the last wave of any change
    levels: list[int] = []
    for change in changes:
        collection = change.key.collection
        declared = schema[collection]
        named: list[Key] = []
        if not isinstance(change, Delete):
            fields = change.entity if isinstance(change, Put) else change.fields
            for field in declared.references:
                given = fields.get(field.name)
                if isinstance(given, str):
                    named.append(Key(cast("str", field.references), given))
        before = [of_key.get(change.key, -1), of_children.get(change.key, -1)]
        before += [of_key.get(parent, -1) for parent in named]
        before += [of_deletes.get(cast("str", each.references), -1) for each in declared.references]
        if isinstance(change, Delete):
            before += [
                of_collection.get(child.name, -1) for child, _ in schema.children[collection]
            ]
        level = 1 + max(before)
        levels.append(level)
        of_key[change.key] = level
        of_collection[collection] = max(level, of_collection.get(collection, -1))
        for parent in named:
            of_children[parent] = max(level, of_children.get(parent, -1))
        if isinstance(change, Delete) and schema.children[collection]:
            of_deletes[collection] = max(level, of_deletes.get(collection, -1))
    return levels
