"""The session of a transaction that the store repeats after a conflict, on a database with many writers.

Most of these read one entity, and then change it. That takes two round trips instead of four: no
transaction is open meanwhile, and at the end one statement replaces the entity if it is still the one
that was read. Anything else begins a transaction, which ends in a conflict if the entity has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from hf_async_store.changes import Change, Outcome, Record
from hf_async_store.driver import Isolation
from hf_async_store.errors import StorageError
from hf_async_store.strategies.sql.decisions import Stored, changed_since_read
from hf_async_store.strategies.sql.session import Connected, SQLSession, on_live_connection
from hf_async_store.values import Key

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.connections import LeasedConnection
    from hf_async_store.strategies.sql.writer import Replacement

_TRANSACTIONS: Final = 100
"""After a transaction that did more than read an entity and change it, so many that read an entity of the
same collection first begin at once."""


class Replaces(Connected, Protocol):
    """What such a session needs of its engine.

    Attributes:
        begin_at_once: by collection, how many of the next transactions that read one of its entities first
            begin at once.
    """

    begin_at_once: dict[str, int]

    def replacement(self, change: Change, stored: Stored) -> Replacement | None:
        """See `Writer.replacement`."""
        ...

    async def replace(self, lease: LeasedConnection, replacement: Replacement) -> None:
        """See `Writer.replace`."""
        ...


class _Seen(NamedTuple):
    """An entity that was read before the transaction has begun."""

    key: Key
    stored: Stored | None


class RetriedSession(SQLSession):
    """A session that begins its transaction only when it must."""

    def __init__(self, engine: Replaces, isolation: Isolation | None) -> None:
        super().__init__(engine, isolation)
        self._replaces = engine
        self._early: LeasedConnection | None = None  # no transaction has begun on it
        self._seen: _Seen | None = None
        self._change: Change | None = None
        self._replacement: Replacement | None = None

    async def __aexit__(self, *exc_info: Any) -> None:
        if exc_info[0] is not None or self._replacement is None or self._early is None:
            await super().__aexit__(*exc_info)
            return
        async with self._stack:
            await self._replaces.replace(self._early, self._replacement)

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        if not await self._may_begin_later(keys):
            return await super().fetch(keys)
        [key] = keys
        seen = await on_live_connection(lambda: self._look(key))
        if seen.stored is None:
            return [None]
        table = self._engine.known_tables[key.collection]
        return [Record(key, table.entity((key.id, seen.stored.doc, seen.stored.version)))]

    async def _may_begin_later(self, keys: Sequence[Key]) -> bool:
        is_first = self._lease is None and self._seen is None and not self._read_absent
        if not is_first or len(keys) != 1 or await self._engine.is_absent():
            return False
        counts, name = self._replaces.begin_at_once, keys[0].collection
        if count := counts.get(name, 0):
            counts[name] = count - 1
        return not count

    async def _look(self, key: Key) -> _Seen:
        async with AsyncExitStack() as stack:
            lease = await stack.enter_async_context(self._engine.writing())
            seen = await self._stored(lease, key)
            self._early, self._seen, self._stack = lease, seen, stack.pop_all()
        return seen

    async def _stored(self, lease: LeasedConnection, key: Key) -> _Seen:
        table = self._engine.known_tables.get(key.collection)
        rows = [] if table is None else await lease.rows(table.fetch_one, (key.id,))
        return _Seen(key, Stored(rows[0][2], rows[0][1]) if rows else None)

    async def write(self, changes: Sequence[Change]) -> list[Outcome]:
        seen = self._seen
        if seen is None or seen.stored is None or self._change is not None or len(changes) != 1:
            return await super().write(changes)
        [change] = changes
        try:
            if change.key == seen.key:
                self._replacement = self._replaces.replacement(change, seen.stored)
        except StorageError as exc:
            return [exc]
        if self._replacement is None:
            return await super().write(changes)
        self._change = change
        return [self._replacement.pending.version]

    async def _begun(self) -> LeasedConnection:
        if self._early is None:
            return await super()._begun()
        await self._stack.enter_async_context(self._early.transaction(self._isolation))
        return self._early

    async def _write_lease(self) -> LeasedConnection:
        lease = await super()._write_lease()
        seen, self._seen = self._seen, None
        if seen is None:
            return lease
        self._replaces.begin_at_once[seen.key.collection] = _TRANSACTIONS
        self._replacement = None
        if await self._stored(lease, seen.key) != seen:
            raise changed_since_read(seen.key)
        if self._change is not None:
            [outcome] = await self._engine.apply(lease, [self._change])
            if isinstance(outcome, StorageError):
                raise outcome
        return lease
