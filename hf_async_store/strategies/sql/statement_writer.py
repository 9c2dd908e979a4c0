"""Writes to PostgreSQL: divides changes into waves, groups each wave by statement, and finds out why a
change was rejected.

The changes of a wave are independent of one another, so that all changes with the same `StatementKey`
can share a statement. A change that the statement does not return did not meet its precondition and
had no effect. Then the stored entity is read, and the change is decided as in every engine. If it
is valid now, it is sent again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, cast

from hf_async_store.changes import ABSENT, ANY, Change, Delete, Outcome, Patch
from hf_async_store.config import SQLConfig
from hf_async_store.errors import ConcurrencyConflictError, LockTimeoutError, StorageError
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
from hf_async_store.strategies.sql.postgres_jsonb import array_text, json_text
from hf_async_store.strategies.sql.retries import Attempts
from hf_async_store.strategies.sql.waves import wave_numbers
from hf_async_store.strategies.sql.write_sql import StatementKey, WriteStatements
from hf_async_store.strategies.sql.writer import Writer
from hf_async_store.values import CREATED_AT, Key, Removed

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.connections import LeasedConnection
    from hf_async_store.strategies.sql.rows import Table

_MAX_ROWS: Final = 1024
_MAX_SIZE: Final = 1 << 24
"""The maximum number of characters of the documents of a statement; a JSON array in PostgreSQL is limited
to 256 MiB."""

_TRIES: Final = 64
"""How often a change is sent whose precondition is met each time the entity is read."""


class Run(Protocol):
    """Runs one statement that writes; the implementation decides whether an error is retried."""

    async def __call__(self, sql: str, args: Sequence[object]) -> Sequence[Sequence[object]]: ...


class PendingChange(NamedTuple):
    """A change, its position in the whole list of changes, its row of arguments, and its document."""

    place: int
    change: Change
    shape: StatementKey
    row: tuple[object, ...]
    doc: str = ""


class StatementWriter(Writer):
    """Executes the changes of a store."""

    def __init__(self, schema: Schema, tables: Mapping[str, Table], config: SQLConfig) -> None:
        super().__init__(schema, tables, config)
        self._statements = WriteStatements(schema, tables, references=self.references)

    async def write_each(self, lease: LeasedConnection, changes: Sequence[Change]) -> list[Outcome]:
        """See `Writer`."""
        # Behind pgbouncer, a statement needs a transaction to have the isolation level of this store.
        if self.config.pgbouncer or any(each.mark is not None for each in changes):
            return await self._write_together(lease, changes)
        outcomes: list[Outcome] = [None] * len(changes)
        run = _RunWithRetries(lease, self.config.timeout)
        failure: StorageError | None = None
        for number, group in enumerate(self.groups(changes)):
            if failure is not None:
                _fail(group, failure, outcomes, sent=False)
                continue
            try:
                await self.send(run, lease, group, outcomes, alone=True)
            except StorageError as exc:
                if not number:
                    raise
                # Earlier statements were applied, and must not be reported as failed.
                failure = exc
                _fail(group, exc, outcomes, sent=True)
        return outcomes

    async def _write_together(
        self, lease: LeasedConnection, changes: Sequence[Change]
    ) -> list[Outcome]:
        """Apply changes and their change markers in one transaction; if the database rejects one of the
        changes, each half in a transaction of its own."""
        attempts = Attempts(self.config.timeout)
        while True:
            outcomes: list[Outcome] = [None] * len(changes)
            try:
                async with lease.transaction():
                    await self._send_all(lease, changes, outcomes, all_or_none=False)
            except ConcurrencyConflictError:
                if attempts.ended:
                    raise
                await attempts.wait()
            except REFUSALS as exc:
                if len(changes) == 1:
                    return [exc]
                middle = len(changes) // 2
                return [
                    *await self._write_together(lease, changes[:middle]),
                    *await self._write_together(lease, changes[middle:]),
                ]
            else:
                return outcomes

    async def apply(self, lease: LeasedConnection, changes: Sequence[Change]) -> list[Outcome]:
        """See `Writer`."""
        outcomes: list[Outcome] = [None] * len(changes)
        await self._send_all(lease, changes, outcomes, all_or_none=True)
        for index, each in enumerate(outcomes):
            if isinstance(each, StorageError):
                return outcomes[: index + 1]
        return outcomes

    async def _send_all(
        self,
        lease: LeasedConnection,
        changes: Sequence[Change],
        outcomes: list[Outcome],
        *,
        all_or_none: bool,
    ) -> None:
        """Execute changes, and write the markers of those that succeeded, in the open transaction."""

        async def run(sql: str, args: Sequence[object]) -> Sequence[Sequence[object]]:
            return await lease.rows(sql, args, doing="write", writes=True)

        failed = len(changes)  # with `all_or_none`: the position of the first change that failed
        for group in self.groups(changes):
            wanted = [each for each in group if each.place < failed]
            if not wanted:
                continue
            await self.send(run, lease, wanted, outcomes, alone=False)
            if all_or_none:
                broken = [e.place for e in wanted if isinstance(outcomes[e.place], StorageError)]
                failed = min([failed, *broken])
        if failed < len(changes):
            return
        markers = [
            marker_put(change.mark, getattr(change, "written_at", ""))
            for change, outcome in zip(changes, outcomes, strict=True)
            if change.mark is not None and not isinstance(outcome, StorageError)
        ]
        if markers:
            marker_outcomes: list[Outcome] = [None] * len(markers)
            await self._send_all(lease, markers, marker_outcomes, all_or_none=False)
            for outcome in marker_outcomes:
                if isinstance(outcome, StorageError):
                    raise outcome

    def groups(self, changes: Sequence[Change]) -> list[list[PendingChange]]:
        """The changes in groups to be executed in order, one statement each."""
        numbers = wave_numbers(self.schema, changes, references=self.references)
        waves: dict[int, list[PendingChange]] = {}
        for place, (change, wave) in enumerate(zip(changes, numbers, strict=True)):
            waves.setdefault(wave, []).append(self._pending(place, change))
        return list(chain.from_iterable(_by_statement(waves[each]) for each in sorted(waves)))

    async def send(
        self,
        run: Run,
        lease: LeasedConnection,
        group: Sequence[PendingChange],
        outcomes: list[Outcome],
        *,
        alone: bool,
    ) -> None:
        """Execute changes with the same statement key, and store the outcome of each in `outcomes`.

        Args:
            alone: the statement is a transaction by itself. If the database rejects it, it is sent
                again in two halves.

        Raises:
            ReferenceViolationError, InvalidInputError: the database rejected a statement, and
                `alone` is false.
        """
        waiting = _pieces(group)
        for attempt in range(_TRIES):
            again = [
                each
                for part in waiting
                for each in await self._attempt(run, lease, part, outcomes, alone=alone)
            ]
            waiting = again
            if not waiting:
                return
            if attempt:
                await asyncio.sleep(random.uniform(0, 0.001 * attempt))
        for each in chain.from_iterable(waiting):
            outcomes[each.place] = _overtaken(each.change.key)

    async def _attempt(
        self,
        run: Run,
        lease: LeasedConnection,
        group: list[PendingChange],
        outcomes: list[Outcome],
        *,
        alone: bool,
    ) -> list[list[PendingChange]]:
        """Send changes in one statement; returns the groups that must be sent again."""
        sql = self._statements.of(group[0].shape, patient=not alone or len(group) == 1)
        args = list(map(array_text, zip(*(each.row for each in group), strict=True)))
        if group[0].shape.verb != "delete":
            args.append(f"[{','.join([each.doc for each in group])}]")
        try:
            rows = await run(sql, args)
        except REFUSALS as exc:
            # Another transaction changed a parent or child after the statement had checked the
            # references, or the database has constraints that this store did not create.
            if not alone:
                raise
            if len(group) == 1:
                outcomes[group[0].place] = exc
                return []
            return _halves(group)
        except LockTimeoutError:
            if not alone or len(group) == 1:
                raise
            return await self._without_locked(lease, group)
        written = dict(cast("Sequence[tuple[str, int]]", rows))
        rejected: list[PendingChange] = []
        for each in group:
            version = written.get(each.change.key.id)
            if version is None:
                rejected.append(each)
            else:
                outcomes[each.place] = version
        return _by_statement(await self._decided(lease, rejected, outcomes)) if rejected else []

    async def _without_locked(
        self, lease: LeasedConnection, group: list[PendingChange]
    ) -> list[list[PendingChange]]:
        """The changes of which no row is locked, and then each of the others."""
        table = self.tables[group[0].shape.collection]
        ids = table.grammar.strings([each.change.key.id for each in group])
        source = f"SELECT t.{table.key} FROM {table.name} AS t WHERE t.{table.key} = ANY($1::text::text[])"
        # Not serializable, so that it is no reason for another transaction to fail.
        async with lease.transaction("read_committed"):
            rows = await lease.rows(
                f"WITH free AS MATERIALIZED ({source} FOR UPDATE SKIP LOCKED) "
                f"{source} EXCEPT ALL SELECT {table.key} FROM free",
                (ids,),
            )
        locked = {row[0] for row in rows}
        free = [each for each in group if each.change.key.id not in locked]
        if not locked:  # another row is locked: that of a parent, or one that is not committed
            return _halves(group)
        held = [[each] for each in group if each.change.key.id in locked]
        return [free, *held] if free else held

    # -- rows of arguments -------------------------------------------------------------------

    def _pending(self, place: int, change: Change) -> PendingChange:
        collection = change.key.collection
        expected = change.expect if type(change.expect) is int else None
        row: tuple[object, ...]
        if isinstance(change, Delete):
            return PendingChange(
                place, change, StatementKey(collection, "delete"), (change.key.id, expected)
            )
        if isinstance(change, Patch):
            shape = StatementKey(collection, "patch")
            sets = {n: v for n, v in change.fields.items() if not isinstance(v, Removed)}
            removes = [n for n, v in change.fields.items() if isinstance(v, Removed)]
            doc = json_text(sets)
            row = (
                change.key.id,
                expected,
                array_text(removes) if removes else None,
                len(doc.encode()),
                *self._references_of(collection, change.fields),
            )
            return PendingChange(place, change, shape, row, doc)
        imported = change.import_version is not None
        created = imported or CREATED_AT in change.entity
        doc = json_text(change.entity)
        if not created:
            doc = f'{{"{CREATED_AT}":"{change.written_at}",{doc[1:]}'
        row = (change.key.id,)
        if change.expect is ANY:
            shape = StatementKey(collection, "save", created, imported)
        elif change.expect is ABSENT:
            shape = StatementKey(collection, "create", created=True, imported=imported)
        else:
            shape = StatementKey(collection, "replace", created, imported)
            row = (*row, expected)
        if imported:
            row = (*row, change.import_version)
        row += self._references_of(collection, change.entity)
        return PendingChange(place, change, shape, row, doc)

    def _references_of(self, collection: str, fields: Mapping[str, object]) -> tuple[object, ...]:
        if not self.references:
            return ()
        found = (fields.get(each.name) for each in self.schema[collection].references)
        return tuple(each if isinstance(each, str) else None for each in found)

    def _exactly(self, pending: PendingChange, stored: Stored, row: Stored | None) -> PendingChange:
        """The same change, as the replacement of exactly this stored version by a decided row."""
        key = pending.change.key
        if row is None:
            shape = StatementKey(key.collection, "delete")
            return pending._replace(shape=shape, row=(key.id, stored.version))
        shape = StatementKey(key.collection, "replace", created=True, imported=True)
        nothing = (None,) * len(self._references_of(key.collection, {}))  # they were checked
        args = (key.id, stored.version, row.version, *nothing)
        return pending._replace(shape=shape, row=args, doc=row.doc)

    # -- rejected changes --------------------------------------------------------------------

    async def _decided(
        self, lease: LeasedConnection, rejected: list[PendingChange], outcomes: list[Outcome]
    ) -> list[PendingChange]:
        """Store the errors of rejected changes in `outcomes`; returns those that are valid now."""
        rejected = [each for each in rejected if not self._tells_absence(each, outcomes)]
        stored = await self.read(lease, [each.change.key for each in rejected]) if rejected else {}
        parents = await self._existing(lease, rejected) if self.references else set()
        again: list[PendingChange] = []
        for each in rejected:
            key = each.change.key
            table = self.tables[key.collection]
            found = stored.get(key)
            try:
                row = new_row(table, each.change, found)
                if self.references and isinstance(each.change, Delete) and found is not None:
                    await self._check_children(lease, key)
                elif self.references:
                    refuse_missing_parents(
                        self.schema, table, each.change, found, parents.__contains__
                    )
            except StorageError as exc:
                outcomes[each.place] = exc
                continue
            if found is not None:
                again.append(self._exactly(each, found, row))
            elif row is None:
                outcomes[each.place] = None
            else:
                again.append(self._pending(each.place, each.change))
        return again

    def _tells_absence(self, pending: PendingChange, outcomes: list[Outcome]) -> bool:
        """Whether a change can be rejected only because the entity does not exist."""
        change = pending.change
        absent = (
            isinstance(change, Delete)
            and change.expect is ANY
            and not (self.references and self.schema.children[change.key.collection])
        )
        if absent:
            outcomes[pending.place] = None
        return absent

    async def read(self, lease: LeasedConnection, keys: Iterable[Key]) -> dict[Key, Stored]:
        """The stored rows of keys."""
        found: dict[Key, Stored] = {}
        for collection, ids in keys_by_collection(keys).items():
            table = self.tables[collection]
            for entity_id, doc, version in await lease.rows(
                table.fetch_many, (table.grammar.strings(ids),)
            ):
                found[Key(collection, entity_id)] = Stored(version, doc)
        return found

    async def _existing(
        self, lease: LeasedConnection, rejected: Iterable[PendingChange]
    ) -> set[Key]:
        """The existing parents to which changes refer."""
        wanted = chain.from_iterable(parents_of(self.schema, each.change) for each in rejected)
        found: set[Key] = set()
        for collection, ids in keys_by_collection(wanted).items():
            table = self.tables[collection]
            sql = f"SELECT t.{table.key} FROM {table.name} AS t WHERE t.{table.key}"
            listed = table.grammar.in_list("$1::text::text[]")
            rows = await lease.rows(f"{sql} {listed}", (table.grammar.strings(ids),))
            found.update(Key(collection, row[0]) for row in rows)
        return found

    async def _check_children(self, lease: LeasedConnection, key: Key) -> None:
        children: dict[tuple[str, str], list[str]] = {}
        for child, field in self.schema.children[key.collection]:
            table = self.tables[child.name]
            refers = table.grammar.refers("c", field, "$1::text")
            rows = await lease.rows(
                f"SELECT c.{table.key} FROM {table.name} AS c WHERE {refers} LIMIT 2", (key.id,)
            )
            children[child.name, field.name] = [row[0] for row in rows]

        def referrers(child: Collection, field: Field, _: str) -> list[str]:
            return children[child.name, field.name]

        check_children(self.schema, key, referrers)


class _RunWithRetries:
    """Runs a statement that is a transaction by itself, and repeats it after a conflict."""

    def __init__(self, lease: LeasedConnection, seconds: float) -> None:
        self._lease = lease
        self._attempts = Attempts(seconds)

    async def __call__(self, sql: str, args: Sequence[object]) -> Sequence[Sequence[object]]:
        while True:
            try:
                return await self._lease.rows(sql, args, doing="write", writes=True)
            except ConcurrencyConflictError as exc:
                if exc.outcome_unknown or self._attempts.ended:
                    raise
            await self._attempts.wait()


def _fail(
    group: Sequence[PendingChange], exc: StorageError, outcomes: list[Outcome], *, sent: bool
) -> None:
    for each in group:
        error = outcomes[each.place] = exc.copy()
        if not sent:
            error.outcome_unknown = False


def _by_statement(pending: Iterable[PendingChange]) -> list[list[PendingChange]]:
    """Group changes by statement, each group sorted by id: rows are locked in this order."""
    groups: dict[StatementKey, list[PendingChange]] = {}
    for each in pending:
        groups.setdefault(each.shape, []).append(each)
    return [sorted(each, key=_id_of) for each in groups.values()]


def _id_of(pending: PendingChange) -> str:
    return pending.change.key.id


def _pieces(group: Sequence[PendingChange]) -> list[list[PendingChange]]:
    """Divide a group so that a statement has neither too many rows nor too many bytes."""
    pieces: list[list[PendingChange]] = []
    size = 0
    for each in group:
        if not pieces or len(pieces[-1]) == _MAX_ROWS or size + len(each.doc) > _MAX_SIZE:
            pieces.append([])
            size = 0
        pieces[-1].append(each)
        size += len(each.doc)
    return pieces


def _halves(group: list[PendingChange]) -> list[list[PendingChange]]:
    return [group[: len(group) // 2], group[len(group) // 2 :]]


def _overtaken(key: Key) -> ConcurrencyConflictError:
    return ConcurrencyConflictError(
        f"{key.collection} {key.id!r}: other writers kept changing the entity between each write "
        "and the read after it: try again",
        collection=key.collection,
        entity_id=key.id,
        retryable=True,
    )
