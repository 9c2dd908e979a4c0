"""The change feed in SQLite: there is one writer at a time, so the numbers of changes are in commit order.

A transaction of this package that changes an entity twice merges its changes when it commits. One of
another program has a change for each of its statements.
"""

from __future__ import annotations

import asyncio
import secrets
import sqlite3
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, ClassVar, Final

import msgspec

from hf_async_store.driver import FeedBatch, FeedEntry
from hf_async_store.strategies.sql.feed import Feed, Source
from hf_async_store.strategies.sql.feed_state import (
    FeedState,
    Integer,
    decoded_position,
    decoded_state,
    encoded_state,
    expired,
    foreign,
    state_name,
)
from hf_async_store.strategies.sql.names import DOC, Names, quoted
from hf_async_store.values import VERSION, Key

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.connections import LeasedConnection
    from hf_async_store.strategies.sql.rows import Table

_PAUSE: Final = 0.008
"""Between two looks whether the file was changed."""

_LOOK_SECONDS: Final = 0.1
"""How long the thread of the connection looks before it returns."""

_COLUMNS: Final = "id, old_version, old_doc, new_version, new_doc"


class _Position(msgspec.Struct, frozen=True, array_like=True):
    """After a change.

    Attributes:
        seq: its number; 0: the beginning.
        mark: its random number, which shows whether the file was replaced by an older copy.
    """

    store: str
    collection: str
    epoch: str
    seq: Integer
    mark: Integer

    def text(self) -> str:
        return msgspec.json.encode(self).decode()

    def check(self, source: Source, state: FeedState, mark: int | None) -> None:
        """Check that the feed can be continued here.

        Args:
            mark: the random number of the change as it is stored.
        """
        if (self.store, self.collection) != (source.store, source.collection):
            raise foreign(source.collection)
        end = state.horizon
        found = end.mark if self.seq == end.number else mark
        if self.epoch != state.epoch or self.seq < end.number or self.mark != found:
            raise expired(source.collection)


FEED_EVENTS: Final = ("insert", "update", "rename", "delete")
"""Each has a trigger."""


def feed_statements(names: Names, table: Table) -> list[str]:
    """The statements that create the change feed of a table."""
    name = table.collection
    feed, key = quoted(names.feed(name)), table.key
    old, new = (f"{row}.{VERSION}, {row}.{DOC}" for row in ("old", "new"))
    insert = f"INSERT INTO {feed} ({_COLUMNS}) VALUES"
    deleted = f"{insert} (old.{key}, {old}, NULL, NULL)"
    created = f"{insert} (new.{key}, NULL, NULL, {new})"
    differs = " OR ".join(f"old.{each} IS NOT new.{each}" for each in (VERSION, DOC))
    triggers = {
        "insert": f"INSERT ON {table.name} BEGIN {created}",
        "update": f"UPDATE OF {VERSION}, {DOC} ON {table.name} "
        f"WHEN old.{key} = new.{key} AND ({differs}) BEGIN {insert} (new.{key}, {old}, {new})",
        "rename": f"UPDATE OF {key} ON {table.name} WHEN old.{key} <> new.{key} "
        f"BEGIN {deleted}; {created}",
        "delete": f"DELETE ON {table.name} BEGIN {deleted}",
    }
    state = encoded_state(FeedState(secrets.token_hex(8)))
    return [
        f"CREATE TABLE IF NOT EXISTS {feed} (seq INTEGER PRIMARY KEY AUTOINCREMENT, "
        "mark INTEGER NOT NULL DEFAULT (random()), id TEXT NOT NULL, "
        "old_version BIGINT, old_doc TEXT, new_version BIGINT, new_doc TEXT)",
        *(
            f"CREATE TRIGGER IF NOT EXISTS {quoted(names.feed_trigger(name, event))} "
            f"AFTER {triggers[event]}; END"
            for event in FEED_EVENTS
        ),
        f"INSERT OR REPLACE INTO {quoted(names.catalogue)} (name, value) "
        f"VALUES ('{state_name(name)}', '{state}')",
    ]


def last_changes(connection: sqlite3.Connection, feeds: Sequence[str]) -> dict[str, int]:
    """The number of the last change in each of some tables of changes."""
    listed = ", ".join("?" * len(feeds))
    rows = connection.execute(
        f"SELECT name, seq FROM sqlite_sequence WHERE name IN ({listed})", feeds
    )
    return {**dict.fromkeys(feeds, 0), **dict(rows.fetchall())}


def merge_changes(connection: sqlite3.Connection, since: Mapping[str, int]) -> None:
    """Merge the changes of each entity since some changes into one.

    Args:
        since: by table of changes, the number of the last change before.
    """
    now = last_changes(connection, list(since))
    for feed, last in since.items():
        if now[feed] - last > 1:
            table = quoted(feed)
            for sql in (_KEEP_FIRST, _DELETE_REPEATED):
                connection.execute(sql.format(table=table), (last,))


_KEEP_FIRST: Final = """
UPDATE {table} AS f SET old_version = b.old_version, old_doc = b.old_doc
FROM (
    SELECT min(seq) AS first, max(seq) AS last FROM {table} WHERE seq > ?1
    GROUP BY id HAVING count(*) > 1
) AS g JOIN {table} AS b ON b.seq = g.first
WHERE f.seq = g.last
"""

_DELETE_REPEATED: Final = """
DELETE FROM {table} WHERE seq > ?1 AND (
    seq NOT IN (SELECT max(seq) FROM {table} WHERE seq > ?1 GROUP BY id)
    OR (old_version IS NULL AND new_version IS NULL)
)
"""


class SQLiteFeed(Feed):
    """See `Feed`."""

    now_sql: ClassVar[str] = (
        "(julianday('now') - 2440587.5) * 86400.0, (SELECT coalesce(max(f.seq), 0) + 1 FROM {feed} AS f)"
    )
    old_sql: ClassVar[str] = "SELECT f.seq FROM {feed} AS f WHERE f.seq < ?1 ORDER BY f.seq"
    mark_sql: ClassVar[str] = "seq, mark"
    lock: ClassVar[str] = ""
    _version: int = 0

    @asynccontextmanager
    async def merging(self, lease: LeasedConnection, feeds: Sequence[str]) -> AsyncIterator[None]:
        if not feeds:
            yield
            return
        since = await lease.job(lambda connection: last_changes(connection, feeds))
        yield
        await lease.job(lambda connection: merge_changes(connection, since))

    async def position(self, source: Source) -> str:
        [[value, seq, mark]] = await source.lease.rows(
            f"SELECT {source.state}, f.seq, f.mark FROM (SELECT 1) LEFT JOIN "
            f"(SELECT seq, mark FROM {source.feed} ORDER BY seq DESC LIMIT 1) AS f"
        )
        state = decoded_state(value, source.collection)
        if seq is None:
            seq, mark = state.horizon.number, state.horizon.mark
        return _Position(source.store, source.collection, state.epoch, seq, mark).text()

    async def read(self, source: Source, since: str, limit: int) -> FeedBatch:
        position = decoded_position(since, _Position)
        rows = await source.lease.rows(
            f"SELECT {source.state}, (SELECT k.mark FROM {source.feed} AS k WHERE k.seq = ?1), f.* "
            f"FROM (SELECT 1) LEFT JOIN (SELECT seq, mark, {_COLUMNS} FROM {source.feed} "
            "WHERE seq > ?1 ORDER BY seq LIMIT ?2) AS f ORDER BY f.seq",
            (position.seq, limit),
        )
        value, known = rows[0][:2]
        position.check(source, decoded_state(value, source.collection), known)
        entries = [_entry(source, position, row[2:]) for row in rows if row[2] is not None]
        return FeedBatch(entries, entries[-1].position if entries else since)

    async def changed(self, tables: Mapping[str, Table], seconds: float) -> None:
        # It is compared with the version that the previous call saw, so no commit is missed in between.
        del tables
        with self._dialect.translating("wait for changes"):
            try:
                async with asyncio.timeout(seconds):
                    driver, is_new = await self._waiting.use()
                    before = None if is_new else self._version
                    while (version := await self._look(driver, before)) == before:
                        pass
                    self._version = version
            except TimeoutError:
                pass
            finally:
                self._waiting.unused()

    async def _look(self, driver: Any, before: int | None) -> int:
        """The version of the data, as soon as it is another one; also after some time."""

        def look(connection: sqlite3.Connection) -> int:
            end = monotonic() + _LOOK_SECONDS
            while True:
                [version] = connection.execute("PRAGMA data_version").fetchone()
                if version != before or monotonic() > end:
                    return int(version)
                sleep(_PAUSE)

        # In the thread of the connection: each call of it takes longer than a look.
        return await self._dialect.job(driver, look, completes=False)


def _entry(source: Source, since: _Position, row: Sequence[Any]) -> FeedEntry:
    seq, mark, entity_id, old_version, old_doc, new_version, new_doc = row
    return FeedEntry(
        Key(source.collection, str(entity_id)),
        source.record(entity_id, old_doc, old_version),
        source.record(entity_id, new_doc, new_version),
        msgspec.structs.replace(since, seq=seq, mark=mark).text(),
    )
