"""The change feed in PostgreSQL.

Neither the numbers of changes nor those of transactions are in the order of commits: a transaction may
commit after others that began later. So a position is a snapshot: a read returns the changes of the
transactions that committed between two snapshots, in the order of their numbers. A change gets its number
while its transaction holds the lock of the row, so those of an entity are in the order of its versions,
whatever the isolation of the transactions. No reader waits for an open transaction, and none misses one.

A snapshot in a position is reduced to what matters to the feed, so that readers that have read the same
have the same position: transactions after that of the last change are left out.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

import msgspec

from hf_async_store.driver import FeedBatch, FeedEntry, run_to_completion
from hf_async_store.errors import (
    InvalidCursorError,
    ReadOnlyStoreError,
    StorageError,
    StoreClosedError,
)
from hf_async_store.strategies.sql.feed import Feed, Source
from hf_async_store.strategies.sql.feed_state import (
    FeedState,
    Integer,
    decoded_position,
    decoded_state,
    expired,
    foreign,
    state_name,
)
from hf_async_store.strategies.sql.names import DOC, Names, quoted
from hf_async_store.values import VERSION, Key

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.rows import Table

_POLL_SECONDS: Final = 0.5
"""How often to read even though no notification arrived."""

_LOCK_CLASS: Final = 0x68666665
"""The first half of the key of the advisory lock that readers hold while they listen."""

_SNAPSHOT: Final = re.compile(r"([0-9]{1,19}):([0-9]{1,19}):((?:[0-9]{1,19}(?:,[0-9]{1,19})*)?)\Z")
_MAX_XID: Final = (1 << 63) - 1


class _Mark(msgspec.Struct, frozen=True, array_like=True):
    """A snapshot.

    Attributes:
        snapshot: as the server writes it.
        xid: the transaction of the last change in it; 0: none.
        at: when that transaction began, in microseconds: it shows whether the server was restored from an
            earlier state, in which the same number may belong to another transaction.
    """

    snapshot: str
    xid: Integer
    at: Integer

    @property
    def oldest(self) -> int:
        """Every earlier transaction is visible in it."""
        return int(self.snapshot.partition(":")[0])

    def check(self) -> None:
        """Check that the server accepts it.

        Raises:
            InvalidCursorError.
        """
        match = _SNAPSHOT.match(self.snapshot)
        if match is None or not _are_in_order(match) or not 0 <= self.xid <= _MAX_XID:
            raise InvalidCursorError("invalid position in a change feed")


def _are_in_order(match: re.Match[str]) -> bool:
    """Whether the numbers of a snapshot are in their order."""
    least, end, running = int(match[1]), int(match[2]), [int(x) for x in match[3].split(",") if x]
    places = [least, *running, end]
    return 0 < least <= end <= _MAX_XID and places == sorted(places) and end not in running


class _Position(msgspec.Struct, frozen=True, array_like=True):
    """After the changes in `since`, and of those between it and `until` after that numbered `seq`."""

    store: str
    collection: str
    epoch: str
    since: _Mark
    until: _Mark | None = None
    seq: Integer = 0

    @property
    def latest(self) -> _Mark:
        return self.until or self.since

    def text(self) -> str:
        return msgspec.json.encode(self).decode()


def _decoded(text: str) -> _Position:
    position = decoded_position(text, _Position)
    position.since.check()
    position.latest.check()
    return position


def reduced(snapshot: str, last: int) -> str:
    """A snapshot that is the same for every transaction up to one, and in which no later one is visible."""
    end = last + 1
    running = [each for each in snapshot.split(":")[2].split(",") if each and int(each) < end]
    return f"{running[0] if running else end}:{end}:{','.join(running)}"


# -- the tables -----------------------------------------------------------------------------


FEED_EVENTS: Final = ("insert", "update", "delete", "truncate")
"""Each has a trigger."""


def feed_statements(names: Names, table: Table, schema: str, *, identified: bool) -> list[str]:
    """The statements that create the change feed of a table, in a schema.

    Args:
        identified: see `home_sql`.
    """
    name = table.collection
    feed = quoted(names.feed(name))
    place = f"{quoted(schema)}.{feed}"
    events = {
        "insert": "AFTER INSERT ON {} REFERENCING NEW TABLE AS new_rows",
        "update": "AFTER UPDATE ON {} REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows",
        "delete": "AFTER DELETE ON {} REFERENCING OLD TABLE AS old_rows",
        "truncate": "BEFORE TRUNCATE ON {}",
    }
    triggers = {quoted(names.feed_trigger(name, each)): events[each] for each in FEED_EVENTS}
    home = home_sql(feed, identified=identified)
    beginning = f'{{"epoch":"{secrets.token_hex(8)}","home":"'
    return [
        f"CREATE TABLE IF NOT EXISTS {feed} (seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, "
        f"xid xid8 NOT NULL, id {table.grammar.text_type} NOT NULL, "
        "at timestamptz NOT NULL DEFAULT pg_catalog.now(), old_version bigint, old_doc jsonb, "
        "new_version bigint, new_doc jsonb, UNIQUE (xid, id)) "
        "WITH (toast_tuple_target = 8160)",  # two documents are not compressed because they are two
        _function(feed, table, schema),
        # Else others could call it for tables of their own, and so write to the feed.
        f"REVOKE ALL ON FUNCTION {place}() FROM PUBLIC",
        *(f"DROP TRIGGER IF EXISTS {each} ON {table.name}" for each in triggers),
        *(
            f"CREATE TRIGGER {each} {sql.format(table.name)} FOR EACH STATEMENT "
            f"EXECUTE FUNCTION {feed}()"
            for each, sql in triggers.items()
        ),
        f"INSERT INTO {quoted(names.catalogue)} (name, value) SELECT '{state_name(name)}'::text, "
        f"pg_catalog.concat('{beginning}'::text, {home}, '\"}}'::text) "
        "ON CONFLICT (name) DO UPDATE SET value = excluded.value",
    ]


def _function(feed: str, table: Table, schema: str) -> str:
    key = table.key

    def insert(columns: str, source: str) -> str:
        return (
            f"INSERT INTO {feed} AS f (xid, id, old_version, old_doc, new_version, new_doc) "
            f"SELECT pg_current_xact_id(), {columns} FROM {source} ON CONFLICT (xid, id) "
            "DO UPDATE SET new_version = excluded.new_version, new_doc = excluded.new_doc;"
        )

    old, new, null = f"o.{VERSION}, o.{DOC}", f"n.{VERSION}, n.{DOC}", "NULL, NULL"
    both = (
        f"old_rows AS o FULL JOIN new_rows AS n ON n.{key} = o.{key} "
        f"WHERE n.{VERSION} IS DISTINCT FROM o.{VERSION} OR n.{DOC} IS DISTINCT FROM o.{DOC}"
    )
    # A reader that waits for changes holds this lock. Both are taken in one expression, which cannot be
    # interrupted in between.
    lock = f"{_LOCK_CLASS}, TG_RELID::bigint::bit(32)::int"
    notify = (
        f"PERFORM CASE WHEN pg_try_advisory_lock({lock}) THEN pg_advisory_unlock({lock})::text "
        "ELSE pg_notify('hf_feed_' || TG_RELID::text, '')::text END;"
    )
    # The body is a text, in which the name of the schema would stay as it is if that is renamed.
    renamed = (
        f"IF TG_TABLE_SCHEMA <> {_literal(schema)} THEN PERFORM set_config('search_path', "
        "concat('pg_catalog, ', quote_ident(TG_TABLE_SCHEMA), ', pg_temp'), true); END IF;"
    )
    return f"""
CREATE OR REPLACE FUNCTION {quoted(schema)}.{feed}() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, {quoted(schema)}, pg_temp AS $hf_feed$
BEGIN
    {renamed}
    IF TG_OP = 'INSERT' THEN {insert(f"n.{key}, {null}, {new}", "new_rows AS n")}
    ELSIF TG_OP = 'UPDATE' THEN {insert(f"coalesce(n.{key}, o.{key}), {old}, {new}", both)}
    ELSIF TG_OP = 'DELETE' THEN {insert(f"o.{key}, {old}, {null}", "old_rows AS o")}
    ELSE {insert(f"o.{key}, {old}, {null}", f"{table.name} AS o")}
    END IF;
    IF FOUND THEN {notify} END IF;
    RETURN NULL;
END $hf_feed$
"""


def home_sql(feed: str, *, identified: bool) -> str:
    """The expression for the identity of the table of changes.

    Args:
        feed: its name, quoted.
        identified: this role may read the identity of the server.
    """
    table = f"pg_catalog.to_regclass({_literal(feed)}::text)::oid::text"
    server = "(SELECT s.system_identifier FROM pg_catalog.pg_control_system() AS s)::text"
    known = server if identified else "''::text"
    return f"pg_catalog.concat({table}, ':'::text, {known})"


IDENTIFIED_SQL: Final = (
    "SELECT pg_catalog.has_function_privilege("
    "'pg_catalog.pg_control_system()'::text, 'EXECUTE'::text)"
)
"""Whether this role may read the identity of the server."""


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


# -- reading --------------------------------------------------------------------------------


def _microseconds(column: str) -> str:
    return f"(pg_catalog.date_part('epoch'::text, {column}) * 1000000::double precision)::bigint"


class _Head(NamedTuple):
    """What a read sees of the feed as a whole."""

    state: FeedState
    is_home: bool
    mark: _Mark
    known: bool  # the change in whose transaction a position ends is there


class PostgresFeed(Feed):
    """See `Feed`."""

    now_sql: ClassVar[str] = (
        "pg_catalog.date_part('epoch'::text, pg_catalog.clock_timestamp()), "
        "pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot())::text::bigint"
    )
    old_sql: ClassVar[str] = (
        "SELECT f.seq FROM {feed} AS f WHERE f.xid < $1::bigint::text::xid8 ORDER BY f.xid, f.id"
    )
    mark_sql: ClassVar[str] = f"xid::text::bigint, {_microseconds('at')}"
    lock: ClassVar[str] = " FOR UPDATE SKIP LOCKED"
    _identified: bool | None = None

    async def position(self, source: Source) -> str:
        # Not serializable: the predicate locks of this read would abort concurrent writers.
        async with source.lease.transaction("read_committed"):
            head = await self._head(source, None)
            if not head.is_home:
                await self._begin_again(source)
                head = await self._head(source, None)
        return _Position(source.store, source.collection, head.state.epoch, head.mark).text()

    async def read(self, source: Source, since: str, limit: int) -> FeedBatch:
        position = _decoded(since)
        if (position.store, position.collection) != (source.store, source.collection):
            raise foreign(source.collection)
        async with source.lease.reading(statements="many"):
            head = await self._head(source, position.latest)
            _check_kept(source, position, head)
            if position.until is None:
                position = await self._window(source, position, head.mark)
            rows = await self._page(source, position, limit)
        return _batch(source, position, rows, limit)

    async def _head(self, source: Source, latest: _Mark | None) -> _Head:
        if self._identified is None:
            [[self._identified]] = await source.lease.rows(IDENTIFIED_SQL)
        [[value, snapshot, recovering, home, xid, began, known]] = await source.lease.rows(
            f"SELECT {source.state}, pg_catalog.pg_current_snapshot()::text, "
            f"pg_catalog.pg_is_in_recovery(), {home_sql(source.feed, identified=self._identified)}, "
            f"m.xid::text::bigint, {_microseconds('m.at')}, EXISTS (SELECT 1 FROM {source.feed} AS k "
            f"WHERE k.xid = $1::bigint::text::xid8 AND {_microseconds('k.at')} = $2::bigint) "
            f"FROM (SELECT 1) AS one LEFT JOIN LATERAL "
            f"(SELECT f.xid, f.at FROM {source.feed} AS f ORDER BY f.xid DESC LIMIT 1) AS m ON TRUE",
            (0, 0) if latest is None else (latest.xid, latest.at),
        )
        if recovering:
            raise ReadOnlyStoreError(
                "the change feed can be read from the primary server only: a standby does not tell which "
                "transactions are in progress"
            )
        state = decoded_state(value, source.collection)
        end = state.horizon
        last, at = (xid, began) if (xid or 0) > end.place else (end.place, end.mark)
        if latest is not None and latest.xid == end.place:
            known = latest.at == end.mark
        mark = _Mark(reduced(snapshot, last), last, at)
        return _Head(state, _same_home(state.home, home), mark, known)

    async def _window(self, source: Source, position: _Position, until: _Mark) -> _Position:
        """The position from which a page up to a snapshot is read."""
        # What a snapshot does not contain: later transactions, and those that were running. The others are
        # not read: while a transaction stays open, there may be many. Without OFFSET, the server might read
        # all changes in the order of their numbers up to the first.
        _, end, running = position.since.snapshot.split(":")
        changes = f"SELECT f.seq FROM {source.feed} AS f WHERE f.xid"
        [[first]] = await source.lease.rows(
            f"SELECT pg_catalog.min(w.seq) FROM (({changes} >= $1::bigint::text::xid8 OFFSET 0) "
            f"UNION ALL ({changes} = ANY ($2::text::xid8[]) OFFSET 0)) AS w",
            (int(end), f"{{{running}}}"),
        )
        if first is None:
            return msgspec.structs.replace(position, since=until)
        return msgspec.structs.replace(position, until=until, seq=first - 1)

    async def _page(
        self, source: Source, position: _Position, limit: int
    ) -> Sequence[Sequence[Any]]:
        if position.until is None:
            return []
        read = source.table.grammar.read
        return await source.lease.rows(
            f"SELECT f.seq, f.id, f.old_version, {read('f.old_doc')}, f.new_version, "
            f"{read('f.new_doc')} FROM {source.feed} AS f WHERE f.seq > $1::bigint "
            "AND NOT pg_catalog.pg_visible_in_snapshot(f.xid, $2::text::pg_snapshot) "
            "AND pg_catalog.pg_visible_in_snapshot(f.xid, $3::text::pg_snapshot) "
            "AND (f.old_version IS NOT NULL OR f.new_version IS NOT NULL) "
            f"ORDER BY f.seq LIMIT {limit + 1}",
            (position.seq, position.since.snapshot, position.until.snapshot),
        )

    async def prune(self, source: Source) -> bool:
        async with source.lease.transaction("read_committed"):
            if not (await self._head(source, None)).is_home:
                await self._begin_again(source)
            return await super().prune(source)

    async def _begin_again(self, source: Source) -> None:
        """Begin a new epoch: this feed is a copy, whose transactions are of another server or table."""
        assert self._identified is not None, "the head was read"
        [[home]] = await source.lease.rows(
            f"SELECT {home_sql(source.feed, identified=self._identified)} "
            f"FROM {quoted(source.names.catalogue)} AS c "
            f"WHERE c.name = '{state_name(source.collection)}' FOR UPDATE"
        )
        await source.lease.rows(f"DELETE FROM {source.feed}", writes=True)
        await self.store_state(source, FeedState(secrets.token_hex(8), home))

    # -- waiting -----------------------------------------------------------------------------

    _signal: asyncio.Event | None = None
    _listening: frozenset[str] = frozenset()

    async def changed(self, tables: Mapping[str, Table], seconds: float) -> None:
        seconds = min(seconds, _POLL_SECONDS)
        if self._dialect.needs_transactions:  # through a pooler, no notification arrives
            await asyncio.sleep(seconds)
            return
        hints: tuple[type[Exception], ...] = (StorageError, *self._dialect.driver_errors)
        try:
            async with asyncio.timeout(seconds):
                if await self._listen(tables):
                    return
                assert self._signal is not None, "it listens"
                await self._signal.wait()
                self._signal.clear()
        except TimeoutError:
            pass
        except StoreClosedError:
            raise
        except hints:
            # It is only a hint; the next read fails if the server cannot be reached.
            await self._waiting.close()
            await asyncio.sleep(seconds)
        finally:
            self._waiting.unused()

    async def _listen(self, tables: Mapping[str, Table]) -> bool:
        """Listen for the changes of some tables; return whether it did not yet."""
        driver, is_new = await self._waiting.use()
        if is_new:
            self._listening = frozenset()
            self._signal = signal = asyncio.Event()
            driver.add_termination_listener(partial(_set, signal))
        new = tables.keys() - self._listening
        if not new:
            return False
        assert self._signal is not None, "it was made with the connection"
        try:
            for each in sorted(new):
                await self._listen_to(driver, tables[each], partial(_set, self._signal))
        except BaseException:
            await run_to_completion(self._waiting.close())
            raise
        self._listening |= new
        return True

    async def _listen_to(self, driver: Any, table: Table, callback: Any) -> None:
        [[oid]] = await self._dialect.rows(
            driver,
            f"SELECT pg_catalog.to_regclass({_literal(table.name)}::text)::oid::bigint",
            (),
        )
        await driver.add_listener(f"hf_feed_{oid}", callback)
        await self._dialect.rows(
            driver,
            f"SELECT pg_catalog.pg_advisory_lock_shared({_LOCK_CLASS}, $1::bigint::bit(32)::int)",
            (oid,),
        )


def _set(signal: asyncio.Event, *_: object) -> None:
    signal.set()


def _same_home(recorded: str, found: str) -> bool:
    """Whether two identities are the same, as far as both are known."""
    table, _, server = recorded.partition(":")
    table_here, _, server_here = found.partition(":")
    return table == table_here and (server == server_here or not (server and server_here))


def _check_kept(source: Source, position: _Position, head: _Head) -> None:
    """Check that all changes after a position are there.

    Raises:
        FeedExpiredError.
    """
    end = head.state.horizon
    passed = position.until is not None and position.seq >= end.number
    if not (
        head.is_home
        and position.epoch == head.state.epoch
        and (position.since.oldest > end.place or passed)
        and (position.latest.xid < end.place or head.known)
    ):
        raise expired(source.collection)


def _batch(
    source: Source, position: _Position, rows: Sequence[Sequence[Any]], limit: int
) -> FeedBatch:
    """The changes of a page. The last one has the position after the window if nothing is left in it."""
    end = position
    is_last = len(rows) <= limit
    rows = rows[:limit]
    if position.until is not None and is_last:
        end = msgspec.structs.replace(position, since=position.until, until=None, seq=0)
    places = [msgspec.structs.replace(position, seq=row[0]).text() for row in rows]
    if places and end is not position:
        places[-1] = end.text()
    entries = [
        FeedEntry(
            Key(source.collection, str(entity_id)),
            source.record(entity_id, old_doc, old_version),
            source.record(entity_id, new_doc, new_version),
            place,
        )
        for place, (_, entity_id, old_version, old_doc, new_version, new_doc) in zip(
            places, rows, strict=True
        )
    ]
    return FeedBatch(entries, places[-1] if places else end.text())
