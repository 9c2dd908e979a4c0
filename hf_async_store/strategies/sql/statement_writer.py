"""Writes to PostgreSQL: divides changes into waves, and groups each wave by statement.

The changes of a wave are independent of one another, so that all changes with the same `StatementKey`
can share a statement.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, repeat, starmap
from typing import TYPE_CHECKING, Final

from hf_async_store.changes import Change, ChangedMatches, Outcome, Patch, Put, TakeChanges
from hf_async_store.config import SQLConfig
from hf_async_store.errors import ConcurrencyConflictError, LockTimeoutError, StorageError
from hf_async_store.event_loop import computed, computed_in_pieces
from hf_async_store.preconditions import no_longer_shared
from hf_async_store.query import Query
from hf_async_store.strategies.sql.catalogue import CatalogueChangedError
from hf_async_store.strategies.sql.combining import combined, is_plain
from hf_async_store.strategies.sql.decisions import (
    Stored,
    changed_since_read,
    marker_put,
    new_row,
)
from hf_async_store.strategies.sql.errors import REFUSALS
from hf_async_store.strategies.sql.matching_update import MatchingUpdate
from hf_async_store.strategies.sql.pending import Encoder, PendingChange, by_statement
from hf_async_store.strategies.sql.retries import conflict_backoff
from hf_async_store.strategies.sql.sending import (
    IndependentBatch,
    Patience,
    TransactionBatch,
    halves,
)
from hf_async_store.strategies.sql.waves import wave_numbers
from hf_async_store.strategies.sql.write_sql import Held, StatementKey, WriteStatements
from hf_async_store.strategies.sql.writer import Writer
from hf_async_store.values import Key

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.connections import LeasedConnection
    from hf_async_store.strategies.sql.rows import Tables

_SHORT: Final = 1 << 14
"""The maximum number of characters of a document that is sent to be compared and replaced. A longer one is
patched in a transaction, which sends only what is changed."""

_STEP: Final = 128
"""The number of changes that are encoded in one step: up to 1 ms."""

_LONG: Final = 2048
"""More changes of a transaction than these are grouped in a thread: 33,000 take 20 to 40 ms."""


class StatementWriter(Writer):
    """Executes the changes of a store."""

    def __init__(self, tables: Tables, config: SQLConfig) -> None:
        super().__init__(tables, config)
        # For transactions of the configured isolation level: see `WriteStatements.of`.
        self._locks = self.references and config.isolation != "serializable"
        self._in_one_step: set[str] = set()  # the collections for which `change_matches` runs
        self._encoder = Encoder(tables, WriteStatements(tables, references=self.references))

    async def write_each(
        self, lease: LeasedConnection, take: TakeChanges, *, patient: bool = True
    ) -> list[Outcome]:
        """See `Writer`."""
        changes = take()
        self.check_tables(changes)
        # Another program may have changed the declarations since these were made of several changes.
        late = {
            n: no_longer_shared(each.key)
            for n, each in enumerate(changes)
            if type(each) is Put and each.shared and not self.shares_changes(each.key.collection)
        }
        others = [each for n, each in enumerate(changes) if n not in late] if late else changes
        outcomes = await self._write_others(lease, others, patient=patient) if others else []
        if not late:
            return outcomes
        found = iter(outcomes)
        return [late[n] if n in late else next(found) for n in range(len(changes))]

    async def _write_others(
        self, lease: LeasedConnection, changes: Sequence[Change], *, patient: bool
    ) -> list[Outcome]:
        if any(each.mark is not None for each in changes):
            patience = Patience(self.config.timeout if patient else 0)
            return await self._write_marked(lease, changes, patience, patient=patient)
        batch = IndependentBatch(
            self._encoder,
            lease,
            len(changes),
            config=self.config,
            locks=self._locks,
            patient=patient,
        )
        return await batch.run(await self._groups(changes, combine=True))

    def if_held(self, change: Change, *, placed: bool) -> tuple[str, list[object]] | None:
        """See `Writer`. Only for what needs no other statement before, or in the same transaction."""
        shape = (pending := self._encoder.pending(0, change)).shape
        if shape is None or shape.verb not in ("patch", "delete") or shape.unique:
            return None
        if change.mark is not None or self.config.pgbouncer:
            return None
        if shape.verb == "delete" and self._locks:
            return None
        held: Held = "place" if placed else "id"
        sql = self._encoder.statements.of(shape, locks=self._locks, held=held, alone=True)
        times = self._encoder.statements.times(shape)
        return sql, [None, *times, *self._encoder.arguments(shape, [pending], alone=True)]

    async def change_matches(
        self, lease: LeasedConnection, query: Query, change: Change
    ) -> ChangedMatches | None:
        """See `Writer`. One at a time for each collection: others share statements and commits."""
        name = query.collection
        if not isinstance(change, Patch) or name in self._in_one_step:
            return None
        if self.config.pgbouncer or self.config.isolation == "read_committed":
            return None  # the transaction of a statement would not have one snapshot
        update = MatchingUpdate.of(self._encoder, query, change, Patience(0).wait(2))
        if update is None:
            return None
        self._in_one_step.add(name)
        try:
            return update.result(
                await lease.rows(update.sql, update.args, doing="write", writes=True)
            )
        except (ConcurrencyConflictError, LockTimeoutError, *REFUSALS) as exc:
            if exc.outcome_unknown:
                raise
            return None
        finally:
            self._in_one_step.discard(name)

    async def apply(self, lease: LeasedConnection, changes: Sequence[Change]) -> list[Outcome]:
        """See `Writer`."""
        isolation = lease.isolation or self.config.isolation
        locks = self.references and isolation != "serializable"
        batch = TransactionBatch(self._encoder, lease, len(changes), locks=locks)
        groups = await self._groups(changes, in_order=True)
        outcomes = await batch.run(groups, all_or_none=True)
        for index, each in enumerate(outcomes):
            if isinstance(each, StorageError):
                return outcomes[: index + 1]
        await self._write_markers(lease, changes, outcomes)
        return outcomes

    def replacement(self, change: Change, stored: Stored) -> PendingChange | None:
        """See `Writer`."""
        table = self.tables[change.key.collection]
        references = [each.name for each in self.schema[table.collection].references]
        if table.unique or not is_plain(change, references) or len(stored.doc) > _SHORT:
            return None
        if references and not isinstance(change, Patch):
            return None
        row = new_row(table, change, stored)
        pending = PendingChange(0, change, None)
        return self._encoder.exactly(pending, stored, row, expired=False, same=True)

    async def replace(self, lease: LeasedConnection, replacement: PendingChange) -> None:
        """See `Writer`."""
        key, shape = replacement.change.key, replacement.shape
        assert shape is not None, "nothing is to be decided"
        batch = TransactionBatch(self._encoder, lease, 1, locks=self._locks)
        if not await batch.execute(shape, [replacement]):
            raise changed_since_read(key)

    async def _groups(
        self, changes: Sequence[Change], *, in_order: bool = False, combine: bool = False
    ) -> list[list[PendingChange]]:
        """The changes in groups to be executed in order, one statement each.

        Args:
            in_order: of changes that may free unique values and write them, those of different statements
                are executed in their order.
            combine: those of one entity may share a row; see `combined`.
        """
        encoded = starmap(self._encoder.pending, enumerate(changes))
        pending = await computed_in_pieces(encoded, _STEP) if len(changes) > _STEP else [*encoded]
        grouping = partial(self._grouped, pending, in_order=in_order, combine=combine)
        return await computed(grouping, long=len(changes) > _LONG)

    def _grouped(
        self, pending: Sequence[PendingChange], *, in_order: bool, combine: bool
    ) -> list[list[PendingChange]]:
        if combine:
            pending = combined(self.tables, pending, references=self.references)
        changes = [each.change for each in pending]
        numbers = wave_numbers(self.schema, changes, references=self.references)
        in_order = in_order and any(self.tables[each.key.collection].unique for each in changes)
        segments = self._segments(pending) if in_order else repeat(0)
        waves: dict[tuple[int, int], list[PendingChange]] = {}
        for each, segment, wave in zip(pending, segments, numbers, strict=False):
            waves.setdefault((segment, wave), []).append(each)
        return list(chain.from_iterable(by_statement(waves[each]) for each in sorted(waves)))

    def _segments(self, pending: Sequence[PendingChange]) -> Iterator[int]:
        """For each change, the number of its segment, which ends before another statement for the same
        unique columns."""
        segment, shapes = 0, dict[str, StatementKey | None]()
        for each in pending:
            name = each.change.key.collection
            if self.tables[name].unique and shapes.setdefault(name, each.shape) != each.shape:
                segment, shapes = segment + 1, {name: each.shape}
            yield segment

    # -- change markers ----------------------------------------------------------------------

    async def _write_marked(
        self,
        lease: LeasedConnection,
        changes: Sequence[Change],
        patience: Patience,
        *,
        patient: bool,
    ) -> list[Outcome]:
        """Apply changes and their markers in one transaction; if the database rejects one of the changes,
        or its entity is locked, each half in a transaction of its own."""
        try:
            return await self._commit_marked(lease, changes, patience)
        except (*REFUSALS, LockTimeoutError) as exc:
            if len(changes) == 1:
                return [exc]
            if isinstance(exc, LockTimeoutError):
                patience.shorten()
        outcomes: list[Outcome] = []
        blocked: dict[Key, StorageError] = {}  # later changes of these keys must not come first
        for half in halves(changes):
            wanted = [each for each in half if each.key not in blocked]
            try:
                found = []
                if wanted:
                    found = await self._write_marked(lease, wanted, patience, patient=patient)
            except StorageError as exc:
                if not outcomes:
                    raise
                # The first half was applied.
                found = [exc.copy() for _ in wanted]
            rest = iter(found)
            for change in half:
                error = blocked.get(change.key)
                outcome = next(rest) if error is None else error.copy()
                if isinstance(outcome, LockTimeoutError) and not patient:
                    blocked[change.key] = outcome
                outcomes.append(outcome)
        return outcomes

    async def _commit_marked(
        self, lease: LeasedConnection, changes: Sequence[Change], patience: Patience
    ) -> list[Outcome]:
        backoff = conflict_backoff(self.config.timeout)
        while True:
            try:
                async with lease.transaction("read_committed" if self._locks else None):
                    batch = TransactionBatch(
                        self._encoder,
                        lease,
                        len(changes),
                        locks=self._locks,
                        patience=patience.wait(len(changes)),
                    )
                    outcomes = await batch.run(await self._groups(changes), all_or_none=False)
                    await self._write_markers(lease, changes, outcomes)
                return outcomes
            except ConcurrencyConflictError as exc:
                if isinstance(exc, CatalogueChangedError) or not await backoff.pause():
                    raise

    async def _write_markers(
        self, lease: LeasedConnection, changes: Sequence[Change], outcomes: Sequence[Outcome]
    ) -> None:
        """Write the markers of the changes that succeeded, in the open transaction."""
        markers = [
            marker_put(change.mark, getattr(change, "written_at", ""))
            for change, outcome in zip(changes, outcomes, strict=True)
            if change.mark is not None and not isinstance(outcome, StorageError)
        ]
        if markers:
            batch = TransactionBatch(self._encoder, lease, len(markers), locks=False)
            for each in await batch.run(await self._groups(markers), all_or_none=False):
                if isinstance(each, StorageError):
                    raise each
