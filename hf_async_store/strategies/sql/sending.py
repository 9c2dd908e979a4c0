"""Sends changes to PostgreSQL, and finds out why some were rejected.

A change that a statement does not return did not meet its precondition and had no effect. Then the stored
entity is read, and the change is decided as in every engine. If it is valid now, it is sent again.
"""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, TypeVar

from hf_async_store.backoff import Backoff
from hf_async_store.changes import ANY, Delete, Outcome, Put
from hf_async_store.config import SQLConfig
from hf_async_store.errors import (
    ConcurrencyConflictError,
    CorruptionError,
    LockTimeoutError,
    OperationTimeoutError,
    StorageError,
)
from hf_async_store.event_loop import computed_in_pieces
from hf_async_store.preconditions import check_children
from hf_async_store.schema import Collection, Field
from hf_async_store.sort_bytes import sort_bytes
from hf_async_store.strategies.sql.catalogue import CatalogueChangedError
from hf_async_store.strategies.sql.combining import decided
from hf_async_store.strategies.sql.decisions import (
    Stored,
    expires,
    keys_by_collection,
    new_row,
    parents_of,
    present_row,
    refuse_missing_parents,
    row_is_there,
)
from hf_async_store.strategies.sql.ended_claims import end_claim
from hf_async_store.strategies.sql.errors import REFUSALS, DuplicateValueError
from hf_async_store.strategies.sql.names import DOC
from hf_async_store.strategies.sql.pending import (
    Encoder,
    PendingChange,
    by_statement,
)
from hf_async_store.strategies.sql.postgres_jsonb import array_text
from hf_async_store.strategies.sql.retries import conflict_backoff
from hf_async_store.strategies.sql.unique_values import owners_of, refusal, separated
from hf_async_store.strategies.sql.write_sql import StatementKey, refers_to
from hf_async_store.values import Key

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.connections import LeasedConnection
    from hf_async_store.strategies.sql.rows import Table

_Item = TypeVar("_Item")

_LONGEST_WAIT: Final = 0.1
_SHORTEST_WAIT: Final = 0.001

_MAX_ROWS: Final = 1024
_MAX_SIZE: Final = 1 << 24
"""The maximum number of characters of the documents of a statement; a JSON array in PostgreSQL is limited
to 256 MiB."""

_PART: Final = 4096
"""So many changes of a transaction are looked at in one step."""

_STEP: Final = 128
"""The arguments for more changes than these are computed in several steps."""

_TRIES: Final = 64
"""How often a change is sent whose precondition is met each time the entity is read."""

_BRIEF: Final = "250ms"
"""How long each statement may take that finds out why another one reached `statement_timeout`."""

_NOT_SENT: Final = StorageError("the change was not sent")


def _parts(group: list[PendingChange]) -> Iterator[list[PendingChange]]:
    return (group[start : start + _PART] for start in range(0, len(group), _PART))


class Patience:
    """For how many seconds the statements of a batch wait for a lock.

    One that contains several changes waits for a short time, because most of them may be free. Each that
    had to be divided makes it shorter: otherwise a thousand changes that are all blocked, each of which
    is found to be so, would take minutes.

    Args:
        seconds: how long, in all, the statements of a single change wait.
    """

    def __init__(self, seconds: float) -> None:
        self._single = Backoff(seconds, first=0, longest=0)
        self._shared = _LONGEST_WAIT

    def wait(self, count: int) -> float:
        """How long a statement of some changes waits."""
        return max(self._shared, self._single.remaining) if count == 1 else self._shared

    def shorten(self) -> None:
        """A statement is divided because it waited in vain."""
        self._shared = max(_SHORTEST_WAIT, self._shared / 2)


class _Batch(ABC):
    """Changes that are sent together, and their outcomes.

    Args:
        count: of the changes.
        locks: see `WriteStatements.of`.
    """

    def __init__(
        self, encoder: Encoder, lease: LeasedConnection, count: int, *, locks: bool
    ) -> None:
        self.lease = lease
        self.outcomes: list[Outcome] = [_NOT_SENT] * count
        self.locks = locks
        self._encoder = encoder
        self._tables = encoder.tables
        self._schema = encoder.tables.schema
        self._statements = encoder.statements

    async def send(self, group: Sequence[PendingChange]) -> None:
        """Execute changes of one statement, and store their outcomes."""
        waiting = _pieces(group)
        for attempt in range(_TRIES):
            again = [
                part
                for piece in waiting
                for each in await self.attempt(piece)
                for part in _pieces(each)
            ]
            if not again:
                return
            waiting = again
            if attempt:
                await asyncio.sleep(random.uniform(0, 0.001 * attempt))
        for pending in chain.from_iterable(waiting):
            if pending.later:  # some of them may not depend on what is stored
                await self._send_one_by_one(pending)
            else:
                self.fail(pending, overtaken(pending.change.key))

    def fail(self, pending: PendingChange, exc: StorageError) -> None:
        """Store the outcome of a change, and of those that are combined with it."""
        self.outcomes[pending.place] = exc
        for place, _ in pending.later:
            self.outcomes[place] = exc.copy()

    async def attempt(self, piece: list[PendingChange]) -> list[list[PendingChange]]:
        """Execute changes in one statement; returns those that must be sent again, by statement."""
        shape = piece[0].shape
        if shape is None:
            return by_statement(await self._decided(piece))
        written = dict(await self.execute(shape, piece))
        rejected: list[PendingChange] = []
        for each in piece:
            version = written.get(each.change.key.id)
            if version is None:
                rejected.append(each)
            else:
                self.outcomes[each.place] = version
                for place, outcome in each.decided:
                    self.outcomes[place] = outcome
        return by_statement(await self._decided(rejected)) if rejected else []

    def is_blocked(self, pending: PendingChange) -> bool:
        """Whether an earlier change of the same key is blocked; then this one fails in the same way."""
        del pending
        return False

    def writes_unique(self, piece: Sequence[PendingChange]) -> bool:
        """Whether the statement of some changes writes unique columns."""
        shape = piece[0].shape
        return shape is not None and bool(shape.unique)

    def table_of(self, piece: Sequence[PendingChange]) -> Table:
        return self._tables[piece[0].change.key.collection]

    @abstractmethod
    async def execute(self, shape: StatementKey, piece: list[PendingChange]) -> Any:
        """The rows that the statement of some changes returns."""

    async def run_statement(
        self, shape: StatementKey, piece: list[PendingChange], patience: float | None
    ) -> Any:
        """Run the statement of some changes.

        Args:
            patience: for how many seconds it waits for a lock; None: as it is set.
        """
        limit = None if patience is None else str(max(1, int(patience * 1000)))
        if self._locks_parents(shape):
            ids = array_text([each.change.key.id for each in piece])
            await self.lease.rows(self._statements.of_parents(shape.collection), (limit, ids))
        alone = len(piece) == 1
        sql = self._statements.of(shape, locks=self.locks, alone=alone)
        columns = self._encoder.arguments(shape, piece, alone=alone)
        arguments = await computed_in_pieces(columns, 1) if len(piece) > _STEP else [*columns]
        args = (limit, *self._statements.times(shape), *arguments)
        return await self.lease.rows(sql, args, doing="write", writes=True)

    def _locks_parents(self, shape: StatementKey) -> bool:
        """Whether rows must be locked in a statement before the one that deletes them."""
        is_delete = self.locks and shape.verb == "delete"
        return is_delete and bool(self._statements.children_of(shape.collection))

    # -- rejected changes --------------------------------------------------------------------

    async def _decided(self, rejected: Sequence[PendingChange]) -> list[PendingChange]:
        """Store the outcomes of rejected changes; returns those that are valid now."""
        rejected = [each for each in rejected if not self._tells_absence(each)]
        stored = await self.read_stored(each.change.key for each in rejected)
        parents = await self._existing_parents(rejected) if self._statements.references else set()
        again: list[PendingChange] = []
        for each in rejected:
            key = each.change.key
            table, found = self._tables[key.collection], stored.get(key)
            if each.later:
                again += await self._decided_together(table, each, found, parents)
                continue
            try:
                present = present_row(table, each.change, found)
                row = new_row(table, each.change, present)
                if isinstance(each.change, Delete):
                    if present is not None:
                        await self._check_children(key)
                elif self._statements.references:
                    refuse_missing_parents(
                        self._schema, table, each.change, present, parents.__contains__
                    )
            except StorageError as exc:
                self.outcomes[each.place] = exc
                continue
            if found is not None and (present is not None or row is not None):
                if present is None:
                    await self._end_claim(table, key, found)
                again.append(self._exactly(each, found, row, expired=present is None))
            elif row is None:
                self.outcomes[each.place] = None
            else:
                assert isinstance(each.change, Put), "only a whole entity can be new"
                again.append(self._encoder.creating(each.place, each.change))
        return again

    async def _decided_together(
        self, table: Table, pending: PendingChange, stored: Stored | None, parents: set[Key]
    ) -> list[PendingChange]:
        """As `_decided`, of combined changes."""
        exists = parents.__contains__ if self._statements.references else None
        row, outcomes = decided(self._schema, table, pending, stored, exists)
        if any(isinstance(each, CorruptionError) for _, each in outcomes):
            await self._send_one_by_one(pending)  # a statement can replace a damaged entity
            return []
        if row is not None and row is not stored:
            return [self._encoder.exactly_combined(pending, stored, row, outcomes)]
        for place, outcome in outcomes:
            self.outcomes[place] = outcome
        return []

    async def _send_one_by_one(self, pending: PendingChange) -> None:
        """Execute combined changes, each in a statement of its own."""
        for place, change in pending.steps:
            each = self._encoder.pending(place, change)
            if not self.is_blocked(each):
                await self.send([each])

    async def _end_claim(self, table: Table, key: Key, expired: Stored) -> None:
        """End the claim of an expired entity that is replaced."""
        claims = self._tables.names.claims(table.collection)
        async with self.between_statements():
            await end_claim(self.lease, claims, table, key, expired)

    def between_statements(self) -> AbstractAsyncContextManager[None]:
        """A transaction for what is done between the statements of changes."""
        return nullcontext()

    def _exactly(
        self, pending: PendingChange, stored: Stored, row: Stored | None, *, expired: bool
    ) -> PendingChange:
        change = pending.change
        purges = isinstance(change, Delete) and change.purge
        return self._encoder.exactly(pending, stored, row, expired=expired or purges)

    def _tells_absence(self, pending: PendingChange) -> bool:
        """Whether a change can be rejected only because the entity does not exist."""
        change = pending.change
        absent = (
            isinstance(change, Delete)
            and change.expect is ANY
            and not self._statements.children_of(change.key.collection)
        )
        if absent:
            self.outcomes[pending.place] = None
        return absent

    async def read_stored(self, keys: Iterable[Key]) -> dict[Key, Stored]:
        """The stored rows of keys."""
        found: dict[Key, Stored] = {}
        for collection, ids in keys_by_collection(keys).items():
            for entity_id, doc, version in await self.lease.rows(
                self._tables[collection].fetch_many, (array_text(ids),)
            ):
                found[Key(collection, entity_id)] = Stored(version, doc)
        return found

    async def _existing_parents(self, rejected: Iterable[PendingChange]) -> set[Key]:
        """The existing parents to which changes refer."""
        changes = [change for each in rejected for _, change in each.steps]
        wanted = chain.from_iterable(parents_of(self._schema, each) for each in changes)
        found: set[Key] = set()
        for collection, ids in keys_by_collection(wanted).items():
            table = self._tables[collection]
            judge = next((each for each in changes if expires(each, collection)), None)
            doc = "''::text" if judge is None else table.grammar.read(f"t.{DOC}")
            sql = f"SELECT t.{table.key}, {doc} FROM {table.name} AS t WHERE t.{table.key}"
            for entity_id, text in await self.lease.rows(
                f"{sql} = ANY($1::text::text[])", (array_text(ids),)
            ):
                key = Key(collection, entity_id)
                if judge is None or row_is_there(table, judge, key, text):
                    found.add(key)
        return found

    async def _check_children(self, key: Key) -> None:
        """Refuse to delete an entity to which others refer."""
        children: dict[tuple[str, str], list[str]] = {}
        for child, field in self._statements.children_of(key.collection):
            table = self._tables[child.name]
            refers = refers_to(table, field.name, "p.encoded", "p.id")
            rows = await self.lease.rows(
                f"SELECT c.{table.key} FROM {table.name} AS c, "
                f"(SELECT $1::text, $2::bytea) AS p (id, encoded) WHERE {refers} LIMIT 2",
                (key.id, sort_bytes(key.id)),
            )
            children[child.name, field.name] = [row[0] for row in rows]

        def referrers(child: Collection, field: Field, _: str) -> list[str]:
            return children[child.name, field.name]

        if children:
            check_children(self._schema, key, referrers)


class TransactionBatch(_Batch):
    """Changes in an open transaction. An error of the database ends it.

    Args:
        patience: see `run_statement`.
    """

    def __init__(
        self,
        encoder: Encoder,
        lease: LeasedConnection,
        count: int,
        *,
        locks: bool,
        patience: float | None = None,
    ) -> None:
        super().__init__(encoder, lease, count, locks=locks)
        self._patience = patience

    async def attempt(self, piece: list[PendingChange]) -> list[list[PendingChange]]:
        """See `_Batch`. The owners of unique values are looked up before, because an error of the database
        would end the transaction."""
        if self.writes_unique(piece):
            owners = await owners_of(self.lease, self.table_of(piece), piece, indexed=True)
            if len(piece) > 1 and len(parts := separated(piece, owners)) > 1:
                return parts
            refused = refusal(piece[0], owners) if len(piece) == 1 else None
            if refused is not None:
                if await self._decided(piece):  # its precondition is met
                    self.outcomes[piece[0].place] = refused
                return []
        try:
            return await super().attempt(piece)
        except DuplicateValueError as exc:
            raise ConcurrencyConflictError(
                "another transaction wrote the same value of a unique index: try again",
                retryable=True,
            ) from exc

    async def run(
        self, groups: Sequence[list[PendingChange]], *, all_or_none: bool
    ) -> list[Outcome]:
        """Execute changes.

        Args:
            all_or_none: those after the first that fails need not be executed.
        """
        failed = len(self.outcomes)
        for part in chain.from_iterable(map(_parts, groups)):
            wanted = [each for each in part if each.place < failed]
            if wanted:
                await self.send(wanted)
            if all_or_none:
                broken = [
                    e.place for e in wanted if isinstance(self.outcomes[e.place], StorageError)
                ]
                failed = min([failed, *broken])
        return self.outcomes

    async def execute(self, shape: StatementKey, piece: list[PendingChange]) -> Any:
        return await self.run_statement(shape, piece, self._patience)


class IndependentBatch(_Batch):
    """Changes of which each succeeds or fails alone. Each statement is a transaction of its own.

    Args:
        patient: wait until a locked entity is free, or for `timeout`.
    """

    def __init__(
        self,
        encoder: Encoder,
        lease: LeasedConnection,
        count: int,
        *,
        config: SQLConfig,
        locks: bool,
        patient: bool,
    ) -> None:
        super().__init__(encoder, lease, count, locks=locks)
        self._patient = patient
        self._patience = Patience(config.timeout if patient else 0)
        # Behind pgbouncer, a statement needs a transaction to have the isolation level of this store.
        self._in_transactions = config.pgbouncer
        self._backoff = conflict_backoff(config.timeout)
        self._blocked: dict[Key, LockTimeoutError] = {}
        self._timed_out = False  # a statement reached `statement_timeout`
        self._is_brief = False  # the statements that are sent now may take `_BRIEF` each

    async def run(self, groups: Sequence[list[PendingChange]]) -> list[Outcome]:
        """Execute changes.

        Raises:
            StorageError: nothing was written.
        """
        try:
            for group in groups:
                await self.send([each for each in group if not self.is_blocked(each)])
        except StorageError as exc:
            # What earlier statements wrote must not be reported as failed.
            if not any(isinstance(each, int) for each in self.outcomes):
                raise
            for place, outcome in enumerate(self.outcomes):
                if outcome is _NOT_SENT:
                    error = self.outcomes[place] = exc.copy()
                    error.outcome_unknown = False
        return self.outcomes

    def is_blocked(self, pending: PendingChange) -> bool:
        """See `_Batch`."""
        error = self._blocked.get(pending.change.key)
        if error is not None:
            self.fail(pending, error.copy())
        return error is not None

    async def attempt(self, piece: list[PendingChange]) -> list[list[PendingChange]]:
        try:
            return await super().attempt(piece)
        except REFUSALS as exc:
            if isinstance(exc, DuplicateValueError) and self.writes_unique(piece):
                return await self._apart(piece)
            # The database has constraints that this store did not create.
            if len(piece) > 1:
                return halves(piece)
            if piece[0].later:
                await self._send_one_by_one(piece[0])
            else:
                self.outcomes[piece[0].place] = exc
            return []
        except LockTimeoutError as exc:
            return await self._after_waiting(piece, exc)
        except OperationTimeoutError as exc:
            if exc.outcome_unknown:
                raise
            self._is_brief = True  # the caller has waited for `timeout` already
            try:
                return await self._after_timeout(piece, exc)
            finally:
                self._is_brief = False

    def between_statements(self) -> AbstractAsyncContextManager[None]:
        # Not serializable, so that it is no reason for another transaction to fail.
        return self.lease.transaction("read_committed")

    async def _apart(self, piece: list[PendingChange]) -> list[list[PendingChange]]:
        """Divide changes of which one wrote a value of another entity; store its outcome."""
        async with self.between_statements():
            owners = await owners_of(self.lease, self.table_of(piece), piece)
        if len(piece) > 1:
            parts = separated(piece, owners)
            return parts if len(parts) > 1 else halves(piece)
        refused = refusal(piece[0], owners)
        if refused is None:
            return [piece]  # its owner was changed meanwhile
        self.outcomes[piece[0].place] = refused
        return []

    async def execute(self, shape: StatementKey, piece: list[PendingChange]) -> Any:
        while True:
            try:
                async with self._transaction(shape):
                    await self._limit_statements()
                    wait = self._patience.wait(len(piece))
                    return await self.run_statement(shape, piece, wait)
            except StorageError as exc:
                if exc.outcome_unknown:
                    for each in piece:
                        self.fail(each, exc.copy())
                is_conflict = isinstance(exc, ConcurrencyConflictError) and not exc.outcome_unknown
                is_final = not is_conflict or isinstance(exc, CatalogueChangedError)
                if is_final or not await self._backoff.pause():
                    raise

    async def _limit_statements(self) -> None:
        """Let the statements of the open transaction be brief, if they must."""
        if self._is_brief:
            await self.lease.rows(f"SET LOCAL statement_timeout = '{_BRIEF}'")

    def _transaction(self, shape: StatementKey) -> AbstractAsyncContextManager[None]:
        if self._locks_parents(shape):
            # Each of its statements must see what was committed before it.
            return self.lease.transaction("read_committed")
        in_transaction = self._in_transactions or self._is_brief
        return self.lease.transaction() if in_transaction else nullcontext()

    async def _after_timeout(
        self, piece: list[PendingChange], exc: OperationTimeoutError
    ) -> list[list[PendingChange]]:
        """As `attempt`, after the statement reached `statement_timeout`, which counts from its beginning:
        it may end a wait for a lock before `lock_timeout` does."""
        if await self._locked(piece):
            error = LockTimeoutError(str(exc))
            error.__cause__ = exc
            return await self._after_waiting(piece, error)
        if self._timed_out:
            raise exc
        # Another row may be locked: that of a parent, or one that is not committed. Sent once more, the
        # statement waits for a short time, and tells it.
        self._timed_out = True
        self._patience.shorten()
        return await self.attempt(piece)

    async def _after_waiting(
        self, piece: list[PendingChange], exc: LockTimeoutError
    ) -> list[list[PendingChange]]:
        """As `attempt`, after the statement waited for a lock in vain."""
        if len(piece) > 1:
            self._patience.shorten()
            return await self._without_locked(piece, exc)
        self._block(piece, exc)
        return []

    async def _without_locked(
        self, piece: list[PendingChange], exc: LockTimeoutError
    ) -> list[list[PendingChange]]:
        """The changes of which no row is locked, and, if this batch is patient, each of the others."""
        names = await self._locked(piece)
        locked = [each for each in piece if each.change.key.id in names]
        free = [each for each in piece if each.change.key.id not in names]
        if not locked:  # another row is locked: that of a parent, or one that is not committed
            return halves(piece)
        if not self._patient:
            self._block(locked, exc)
            locked = []
        return [*([free] if free else []), *([each] for each in locked)]

    async def _locked(self, piece: list[PendingChange]) -> set[str]:
        """The ids of the rows, among those that the statement of some changes writes, that are locked."""
        shape = piece[0].shape
        if shape is None:  # nothing was written
            return set()
        table = self._tables[shape.collection]
        ids = array_text([each.change.key.id for each in piece])
        source = f"SELECT t.{table.key} FROM {table.name} AS t WHERE t.{table.key} = ANY($1::text::text[])"
        strength = "UPDATE" if shape.verb == "delete" else "NO KEY UPDATE"
        async with self.between_statements():
            await self._limit_statements()
            rows = await self.lease.rows(
                f"WITH free AS MATERIALIZED ({source} FOR {strength} SKIP LOCKED) "
                f"{source} EXCEPT ALL SELECT {table.key} FROM free",
                (ids,),
            )
        return {row[0] for row in rows}

    def _block(self, locked: Sequence[PendingChange], exc: LockTimeoutError) -> None:
        for each in locked:
            self.fail(each, error := exc.copy())
            if not self._patient:
                self._blocked[each.change.key] = error


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


def halves(items: Sequence[_Item]) -> list[list[_Item]]:
    return [list(items[: len(items) // 2]), list(items[len(items) // 2 :])]


def overtaken(key: Key) -> ConcurrencyConflictError:
    """The error of a change whose precondition was met each time, and that had no effect."""
    return ConcurrencyConflictError(
        f"{key.collection} {key.id!r}: other writers kept changing the entity between each write "
        "and the read after it: try again",
        collection=key.collection,
        entity_id=key.id,
        retryable=True,
    )
