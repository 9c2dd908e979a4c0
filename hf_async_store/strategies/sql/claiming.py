"""Claims in SQL: a table of claims beside each table of entities, made when the first entity is claimed.

The row of a claim is deleted with its entity: by a foreign key on PostgreSQL, by a trigger on SQLite.

On SQLite, a claim, and a change under it, is one transaction, in one call of the driver. On PostgreSQL, a
claim is one READ COMMITTED statement, which skips entities that others have locked, so that claimers
neither wait for one another nor fail with conflicts. It locks the entities; the row of the claim then
decides, because the statement may have seen it as it was before another claimer committed. What is done
under a claim locks the row of the claim in the same transaction, whatever its isolation.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, cast

from hf_async_store.changes import Change, Delete, Record
from hf_async_store.claim_clock import BootClock, Moment, ServerClock
from hf_async_store.claim_records import Claimed, ClaimInfo, ClaimState, ClaimTerms, lost
from hf_async_store.config import SQLConfig
from hf_async_store.driver import Session, giving_back, written
from hf_async_store.errors import PermissionDeniedError
from hf_async_store.query import Query, compile_order
from hf_async_store.strategies.sql.claim_sql import TOOK_LONG
from hf_async_store.strategies.sql.completion import completed
from hf_async_store.strategies.sql.connections import Connections
from hf_async_store.strategies.sql.engine import SQLEngine
from hf_async_store.strategies.sql.grammar import Compiled
from hf_async_store.strategies.sql.immediate import committed
from hf_async_store.strategies.sql.index_order import prefix_of
from hf_async_store.strategies.sql.session import SQLSession
from hf_async_store.values import VERSION, Key

if TYPE_CHECKING:
    import sqlite3

    from hf_async_store.strategies.sql.claim_sql import ClaimSQL
    from hf_async_store.strategies.sql.connections import LeasedConnection
    from hf_async_store.strategies.sql.dialect import Dialect
    from hf_async_store.strategies.sql.rows import Table

_FIRST_PAGE: Final = 16
_CLAIMERS: Final = 4
"""The maximum number of connections for claims."""

_MOST_PLACES: Final = 10_000
"""Of how many claimed entities the place is remembered."""

_Statement: TypeAlias = tuple[str, Sequence[object]]
_Steps: TypeAlias = Generator[_Statement, Sequence[Sequence[Any]], list[Claimed]]
"""Statements, each of which depends on the rows of the one before."""


class _Taking(NamedTuple):
    """A statement that reads and claims.

    Attributes:
        asked: for what query, terms and time it was made, and in which form; of a clock of the server, the
            time is always the same. A text, because 1 == True.
    """

    table: Table
    asked: str
    sql: str
    args: Sequence[object]


class _Places:
    """Where PostgreSQL has the rows of claimed entities, as `ctid`.

    A serializable statement that looks up a row by its id depends on the whole page of the index: it fails
    if, meanwhile, another one changes any entity whose id is in this page. The place of a row is no
    promise: whoever uses it must check the id, and look it up if another row, or none, is there.
    """

    def __init__(self) -> None:
        self._places: dict[Key, object] = {}

    def put(self, key: Key, place: object) -> None:
        self._places[key] = place
        if len(self._places) > _MOST_PLACES:
            del self._places[next(iter(self._places))]

    def pop(self, key: Key) -> object:
        """The place of a row, if it is known; else None."""
        return self._places.pop(key, None)


class ClaimingSQLEngine(SQLEngine):
    """One database whose entities can be claimed.

    Args:
        statement: the class of the statements about claims.
        claimers: on PostgreSQL, a dialect whose connections are READ COMMITTED: there, a statement about
            claims is one round trip. None if such connections cannot be kept (pgbouncer), and on SQLite.
        others: those of `SQLEngine`.
    """

    def __init__(self, statement: type[ClaimSQL], claimers: Dialect | None, *others: Any) -> None:
        super().__init__(*others)
        self._claimers = None if claimers is None else _claimers(claimers, self._config)
        self.claim_clock = BootClock() if self._dialect.single_writer else ServerClock()
        self._claim_sql = statement
        self._claim_tables: set[str] = set()  # the collections whose table of claims exists
        self._last_claims: dict[str, _Taking] = {}  # the last statement of each collection
        self._passing_many: set[str] = (
            set()
        )  # the collections whose last claim took long, or found none
        self._places = _Places()

    @asynccontextmanager
    async def _claiming(self, *, alone: bool) -> AsyncGenerator[LeasedConnection, None]:
        """A connection for READ COMMITTED statements.

        Args:
            alone: for a single statement, which then commits by itself; else for one transaction.
        """
        await self._prepare()
        pool = self.writing() if self._claimers is None else self._claimers.lease()
        async with pool as lease:
            if alone and (self._claimers is not None or self._dialect.single_writer):
                yield lease
            else:
                async with lease.transaction("read_committed"):
                    yield lease

    def _alone(self) -> AbstractAsyncContextManager[LeasedConnection]:
        """As `_claiming` of a single statement, of a store that was prepared."""
        return self._claiming(alone=True) if self._claimers is None else self._claimers.lease()

    async def close(self) -> None:
        try:
            if self._claimers is not None:
                await self._claimers.close()
        finally:
            await super().close()

    def abandon(self) -> None:
        if self._claimers is not None:
            self._claimers.abandon()
        super().abandon()

    def _statement(self, collection: str) -> ClaimSQL:
        return self._claim_sql(
            self._dialect.grammar, self._dialect.names.claims(collection), self.claim_clock.now()
        )

    # -- the tables --------------------------------------------------------------------------

    async def _prepare_claims(self, collection: str) -> None:
        """Create the table of the claims of a collection, if necessary."""
        if collection in self._claim_tables:
            return
        await self._prepare()
        async with self.writing() as lease:
            if not await self._has_claims(lease, collection):
                await self._create_claims(lease, collection)
        self._claim_tables.add(collection)

    async def _has_claims(self, lease: LeasedConnection, collection: str) -> bool:
        """Whether the table exists.

        Raises:
            PermissionDeniedError: it belongs to an untrusted role.
        """
        dialect = self._dialect
        name = dialect.names.claims(collection)
        trusted = list(map(dialect.names.table, self.schema))
        with dialect.translating("read the tables"):
            if name not in await dialect.relations(lease.driver):
                return False
            owners = await dialect.untrusted_owners(lease.driver, [name], trusted)
        if owners:
            raise PermissionDeniedError(
                f"the table {name} belongs to the role {owners[name]!r}, which owns no table of this "
                "store, so it is not used: drop it, or change its owner"
            )
        return True

    async def _create_claims(self, lease: LeasedConnection, collection: str) -> None:
        dialect, driver = self._dialect, lease.driver
        entities, name = self.known_tables.get(collection), dialect.names.claims(collection)
        with dialect.translating("create the table of claims"):
            async with dialect.changing_tables(driver):
                if name not in await dialect.relations(driver):
                    for each in self._claim_sql.ddl(name, entities):
                        await dialect.rows(driver, each, ())

    async def _exists(self, collection: str) -> bool:
        """Whether the table exists. Nothing is created."""
        if collection in self._claim_tables:
            return True
        if not self._dialect.exists():
            return False
        async with self._main.lease() as lease:
            if not await self._has_claims(lease, collection):
                return False
        self._claim_tables.add(collection)
        return True

    # -- claiming ----------------------------------------------------------------------------

    async def claim(self, query: Query, terms: ClaimTerms) -> list[Claimed]:
        await self._prepare_claims(query.collection)
        async with giving_back(self) as claimed:
            await self._retried(lambda: self._claim(query, terms, claimed))
            return claimed

    async def _claim(self, query: Query, terms: ClaimTerms, claimed: list[Claimed]) -> None:
        """Claim entities, and add them to a list before anything can be cancelled."""
        claimed.clear()  # of an attempt that left nothing behind
        await self._prepare()
        table = self.known_tables[query.collection]
        if self._dialect.single_writer:

            def take(connection: sqlite3.Connection) -> list[Claimed]:
                return _executed(connection, self._steps(table, query, terms))

            async with self.writing() as lease:
                await lease.job(lambda each: claimed.extend(committed(each, take)))
            return
        while True:
            taking = self._taking(table, query, terms)
            if taking is None:
                break
            async with self._alone() as lease:
                # To the end, so that what was claimed is known even if the caller is cancelled.
                found = await completed(self._take(lease, taking, claimed))
            if len(claimed) > 1:
                sort_key = compile_order(query)
                claimed.sort(key=lambda each: sort_key(each.record.key.id, each.record.entity))
            if claimed or not found:
                return
            # Others have claimed all candidates since the statement began: the next one sees that.
        async with self._claiming(alone=False) as lease:
            claimed += await _sent(lease, self._steps(table, query, terms))

    async def _take(self, lease: LeasedConnection, taking: _Taking, claimed: list[Claimed]) -> bool:
        """Run a statement that claims; returns whether there was any candidate."""
        rows = await lease.written(taking.sql, taking.args, "claim entities")
        collection = taking.table.collection
        if not rows or rows[0][-1]:
            self._passing_many.add(collection)
        else:
            self._passing_many.discard(collection)
        for *row, place, token, attempts, _ in rows:
            if token is not None:
                claimed.append(_claimed(taking.table, row, token, attempts))
                self._places.put(claimed[-1].record.key, place)
        return bool(rows)

    def _taking(self, table: Table, query: Query, terms: ClaimTerms) -> _Taking | None:
        """The statement that reads and claims; None if what it reads must be filtered further."""
        many = query.collection in self._passing_many
        asked = "" if query.has_many_values else repr((query, terms, self.claim_clock.now(), many))
        last = self._last_claims.get(query.collection)
        if asked and last is not None and last.table is table and last.asked == asked:
            return last
        statement, candidates = self._candidates(table, query, terms, many=many)
        if candidates.residual is not None:
            return None
        sql = (
            f"WITH i (id, doc, version, place) AS MATERIALIZED ({candidates.sql}), "
            f"n AS ({statement.insert('i', terms)}) "
            f"SELECT i.id, i.doc, i.version, i.place, n.token, n.attempts, {TOOK_LONG} "
            "FROM i LEFT JOIN n ON n.id = i.id"
        )
        found = _Taking(table, asked, sql, statement.values)
        if asked:
            self._last_claims[query.collection] = found
        return found

    def _steps(self, table: Table, query: Query, terms: ClaimTerms) -> _Steps:
        """Claim what a first statement finds; it may have to be filtered further."""
        assert query.limit is not None, "claims are limited"
        size = query.limit
        while True:
            statement, candidates = self._candidates(
                table, query.with_limit(size), terms, many=True
            )
            rows = yield candidates.sql, statement.values
            found = {row[0]: row[:3] for row in rows}
            if candidates.residual is not None:
                matches = candidates.residual
                found = {each: row for each, row in found.items() if matches(table.entity(row))}
            if len(found) >= query.limit or len(rows) < size:
                break
            size = 4 * size + _FIRST_PAGE
        ids = list(found)[: query.limit]
        if not ids:
            return []
        rows = yield self._insert(table.collection, ids, terms)
        taken = {row[0]: row[1:] for row in rows}
        return [_claimed(table, found[each], *taken[each]) for each in ids if each in taken]

    def _candidates(
        self, table: Table, query: Query, terms: ClaimTerms, *, many: bool
    ) -> tuple[ClaimSQL, Compiled]:
        """See `ClaimSQL.candidates`."""
        statement = self._statement(table.collection)
        assert query.limit is not None, "claims are limited"
        prefix = prefix_of(table, query) if table.grammar.has_statistics else None
        # As a parameter: for an unknown limit PostgreSQL expects so many rows that it plans each execution
        # with the present values and sizes, instead of keeping a plan, unless only one plan is possible.
        keeps_plan = prefix is not None and query.limit == 1
        limit = "1" if keeps_plan else statement.integer(query.limit)
        everything = query.with_limit(None)
        return statement, statement.candidates(
            table, everything, terms, prefix or (), limit, many=many
        )

    def _insert(self, collection: str, ids: Sequence[str], terms: ClaimTerms) -> _Statement:
        """Claims ids; returns the id, the token and the number of attempts of each that was free."""
        statement = self._statement(collection)
        return statement.insert(statement.listed(ids), terms), statement.values

    async def claim_name(self, keys: Sequence[Key], terms: ClaimTerms) -> Claimed | None:
        await self._prepare_claims(keys[0].collection)
        async with giving_back(self) as claimed:
            for key in keys:
                await self._retried(partial(self._claim_id, key, terms, claimed))
                if claimed:
                    return claimed[0]
        return None

    async def _claim_id(self, key: Key, terms: ClaimTerms, claimed: list[Claimed]) -> None:
        claimed.clear()

        async def take(lease: LeasedConnection) -> None:
            sql, args = self._insert(key.collection, [key.id], terms)
            rows = await lease.written(sql, args, "claim a name")
            claimed.extend(Claimed(Record(key, {VERSION: 0}), *each[1:]) for each in rows)

        async with self._claiming(alone=True) as lease:
            await completed(take(lease))

    # -- what a holder does ------------------------------------------------------------------

    async def _refuse_unknown(self, key: Key) -> None:
        """Refuse a claim if there are none: it was made before a live migration to this store."""
        if not await self._exists(key.collection):
            raise lost(key)

    async def renew_claim(self, key: Key, token: int, lease: float) -> None:
        await self._change(key, lambda each: each.update(key, token, lease, held=True))

    async def release_claim(self, key: Key, token: int, after: float | None) -> None:
        if after is None:
            await self._change(key, lambda each: each.delete(key, token))
        else:
            await self._change(key, lambda each: each.update(key, token, after, held=False))

    async def _change(self, key: Key, sql_of: Callable[[ClaimSQL], str]) -> None:
        """Run a statement that changes a claim if it is held."""
        await self._refuse_unknown(key)
        if not await self._retried(lambda: self._changed(key, sql_of)):
            raise lost(key)

    async def _changed(self, key: Key, sql_of: Callable[[ClaimSQL], str]) -> bool:
        async with self._claiming(alone=True) as lease:
            statement = self._statement(key.collection)  # with the time after waiting for a lock
            sql = sql_of(statement)
            return bool(
                await lease.rows(sql, statement.values, doing="change a claim", writes=True)
            )

    async def write_claimed(self, token: int, change: Change, *, ends: bool) -> int:
        await self._refuse_unknown(change.key)
        write = self._write_locked if self._dialect.single_writer else self._write_at_once
        version = await self._retried(partial(write, token, change, ends=ends))
        if version is not None:
            return version
        return await super().write_claimed(token, change, ends=ends)

    async def _write_locked(self, token: int, change: Change, *, ends: bool) -> int:
        """The version that one transaction of SQLite wrote."""
        key = change.key

        def execute(connection: sqlite3.Connection, sql: Callable[[ClaimSQL], str]) -> Any:
            statement = self._statement(key.collection)  # with the time after waiting for the lock
            return connection.execute(sql(statement), statement.values).fetchone()

        def write(connection: sqlite3.Connection) -> int:
            if execute(connection, lambda each: each.check(key, token)) is None:
                raise lost(key)
            [outcome] = self._writer.executed(connection, [change])
            version = written(key, outcome)
            if ends:
                execute(connection, lambda each: each.delete(key, None))
            return version

        async with self.writing() as lease:
            return await lease.job(lambda connection: committed(connection, write))

    async def _write_at_once(self, token: int, change: Change, *, ends: bool) -> int | None:
        """The version that one statement wrote; None if the change must be decided in a session."""
        await self._prepare()
        place = self._places.pop(change.key)
        version = None
        if place is not None:
            version = await self._write_row(token, change, place, ends=ends)
        if version is None:  # perhaps the row is in another place
            version = await self._write_row(token, change, None, ends=ends)
        return version

    async def _write_row(
        self, token: int, change: Change, place: object, *, ends: bool
    ) -> int | None:
        """As `_write_at_once`, of a row that is found in a place, if one is given; else by its id."""
        key = change.key
        async with self._main.lease() as lease:  # that of `writing`, as there may be several
            found = self._writer.if_held(change, placed=place is not None)
            if found is None:
                return None
            statement = self._statement(key.collection)
            sql, statement.values = found
            # The claim of an entity that is deleted is deleted by the foreign key.
            deletes = ends and type(change) is not Delete
            snapshot = self._config.isolation != "read_committed"
            sql = statement.write(sql, key, token, place, ends=deletes, snapshot=snapshot)
            rows = await lease.rows(sql, statement.values, doing="write", writes=True)
        if not rows:
            raise lost(key)
        [(version, written_to)] = rows
        if version is not None and not ends:
            self._places.put(key, written_to)
        return cast("int | None", version)

    def claimed_session(
        self, key: Key, token: int, *, ends: bool = False
    ) -> AbstractAsyncContextManager[Session]:
        return self._under_claim(key, token, ends=ends)

    @asynccontextmanager
    async def _under_claim(
        self, key: Key, token: int, *, ends: bool
    ) -> AsyncGenerator[Session, None]:
        await self._refuse_unknown(key)
        async with SQLSession(self, None) as session:
            lease = await session.begin()
            statement = self._statement(key.collection)
            if not await lease.rows(statement.check(key, token), statement.values):
                raise lost(key)
            yield session
            if ends:
                statement = self._statement(key.collection)
                sql = statement.delete(key, None)
                await lease.rows(sql, statement.values, doing="end the claim", writes=True)

    # -- for operators -----------------------------------------------------------------------

    async def break_claim(self, key: Key) -> bool:
        if not await self._exists(key.collection):
            return False
        return await self._retried(lambda: self._changed(key, lambda each: each.delete(key, None)))

    async def claims(self, collection: str) -> list[ClaimInfo]:
        if not await self._exists(collection):
            return []
        statement, now = self._statement(collection), self.claim_clock.now()
        async with self._main.lease() as lease:
            rows = await lease.rows(statement.list(), statement.values)
        found = []
        for entity_id, token, owner, era, ends, held, attempts, seconds in rows:
            state = ClaimState(collection, entity_id, owner, token, era, ends, bool(held), attempts)
            found.append(state.info(Moment(now.era, seconds)))
        return found


def _claimers(dialect: Dialect, config: SQLConfig) -> Connections:
    exhausted = f"all {_CLAIMERS} connections for claims were in use for {config.pool_timeout:g} s"
    return Connections(dialect, config, kept=1, most=_CLAIMERS, exhausted=exhausted)


def _executed(connection: sqlite3.Connection, steps: _Steps) -> list[Claimed]:
    """Execute statements in the thread of the driver."""
    try:
        sql, args = next(steps)
        while True:
            sql, args = steps.send(connection.execute(sql, args).fetchall())
    except StopIteration as end:
        return cast("list[Claimed]", end.value)


async def _sent(lease: LeasedConnection, steps: _Steps) -> list[Claimed]:
    """Execute statements in the open transaction."""
    try:
        sql, args = next(steps)
        while True:
            rows = await lease.rows(sql, args, doing="claim entities", writes=True)
            sql, args = steps.send(rows)
    except StopIteration as end:
        return cast("list[Claimed]", end.value)


def _claimed(table: Table, row: Sequence[Any], token: int, attempts: int) -> Claimed:
    return Claimed(Record(Key(table.collection, row[0]), table.entity(row)), token, attempts)
