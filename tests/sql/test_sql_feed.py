"""The change feed on SQLite and PostgreSQL: triggers, positions and the retention, by the engine itself."""

from __future__ import annotations

import asyncio
import re
import shutil
import sqlite3
import subprocess
import time
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import asyncpg  # type: ignore[import-untyped]  # it has no types
import pytest

from hf_async_store import (
    Collection,
    FeedExpiredError,
    Field,
    InvalidCursorError,
    SchemaMismatchError,
    open_store,
)
from hf_async_store.strategies.sql import postgres_feed
from hf_async_store.strategies.sql.connections import LeasedConnection
from hf_async_store.strategies.sql.feed_state import FeedState
from hf_async_store.strategies.sql.postgres_feed import reduced
from tests.contract.harnesses import ask, execute, forget_feed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hf_async_store import SQLStorageStrategy, StorageStrategy
    from hf_async_store.driver import FeedEntry
    from hf_async_store.strategies.sql.feeding import FeedingSQLEngine

PLAIN: Final = [Collection("hosts", key="host_id", fields=["name", Field("n", "integer")])]
FED: Final = [
    Collection("hosts", key="host_id", fields=["name", Field("n", "integer")], feed=3600),
    Collection("zones", key="zone_id", fields=["name"]),
]
TABLE: Final = '"hosts-entities"'


def engine_of(store: StorageStrategy) -> FeedingSQLEngine:
    return cast("SQLStorageStrategy", store)._sql


@asynccontextmanager
async def opened(
    url: str, collections: list[Collection] = FED, settings: str = ""
) -> AsyncIterator[tuple[StorageStrategy, FeedingSQLEngine]]:
    async with open_store(f"{url}{settings}", collections=collections) as store:
        await engine_of(store).remember([])
        yield store, engine_of(store)


async def entries(engine: FeedingSQLEngine, since: str, limit: int = 100) -> list[FeedEntry]:
    """All changes after a position, read in pages."""
    found: list[FeedEntry] = []
    while True:
        batch = await engine.read_feed("hosts", since, limit)
        found += batch.entries
        if batch.position == since:
            return found
        since = batch.position


def brief(changes: list[FeedEntry]) -> list[tuple[str, object, object]]:
    """The id of each change, and the versions before and after it."""
    return [
        (
            each.key.id,
            None if each.before is None else each.before.entity["version"],
            None if each.after is None else each.after.entity["version"],
        )
        for each in changes
    ]


def run(url: str, *statements: str) -> None:
    """Run statements as another program."""
    if not url.startswith("sqlite:"):
        execute(url, "; ".join(statements))
        return
    with closing(sqlite3.connect(url.removeprefix("sqlite:"))) as connection, connection:
        for each in statements:
            connection.execute(each)


def number_of_changes(url: str) -> int:
    count = 'SELECT count(*) FROM "hosts-feed"'
    if not url.startswith("sqlite:"):
        return int(ask(url, count)[0])
    with closing(sqlite3.connect(url.removeprefix("sqlite:"))) as connection:
        return int(connection.execute(count).fetchone()[0])


async def test_an_existing_table_gets_its_triggers(url: str) -> None:
    async with opened(url, PLAIN) as (store, _):
        await store.save_entity("hosts", {"host_id": "a"})
    async with open_store(url, collections=FED) as store:
        engine = engine_of(store)
        with pytest.raises(SchemaMismatchError, match="schema apply"):
            await engine.feed_position("hosts")
        kinds = [(each.kind, each.collection) for each in await store.schema_changes()]
        assert ("feed", "hosts") in kinds
        await store.save_entity("zones", {"zone_id": "z"})
        if url.startswith("postgresql:"):
            with pytest.raises(SchemaMismatchError, match="schema apply"):
                await engine.feed_position("hosts")
            with pytest.raises(SchemaMismatchError, match="schema apply"):
                await engine.read_feed("hosts", "[]", 10)
            async with opened(url, PLAIN) as (other, _):
                await other.save_entity("hosts", {"host_id": "b"})
                await store.apply_schema()
                since = await engine.feed_position("hosts")
                await other.save_entity("hosts", {"host_id": "b"})
        else:
            since = await engine.feed_position("hosts")
            await store.save_entity("hosts", {"host_id": "b"})
            await store.save_entity("hosts", {"host_id": "b"})
        assert brief(await entries(engine, since))[-1] == ("b", 1, 2)
        assert await store.schema_changes() == []


async def test_109_changes_that_tasks_share_are_apart_in_a_feed_that_began_meanwhile(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(entity: dict[str, Any]) -> dict[str, Any]:
        return {**entity, "n": entity["n"] + 1}

    async with opened(url, PLAIN) as (old, engine):
        await old.create_entity("hosts", {"host_id": "h", "n": 0})
        async with opened(url) as (new, fed):
            await new.apply_schema()
            since = await fed.feed_position("hosts")
            first = iter([True])  # as if the feed had begun after this answer
            shares = engine.shares_changes
            monkeypatch.setattr(
                engine, "shares_changes", lambda key: next(first, False) or shares(key)
            )
            await asyncio.gather(*(old.modify_entity("hosts", "h", change) for _ in range(8)))
            found = [each.after.version for each in await entries(fed, since) if each.after]
            assert found == [*range(2, 10)]


async def test_what_other_programs_write_is_in_the_feed(url: str) -> None:
    async with opened(url) as (store, engine):
        since = await engine.feed_position("hosts")
        await store.save_entity("hosts", {"host_id": "a", "n": 1})
        run(
            url,
            f"UPDATE {TABLE} SET version = version",
            f"UPDATE {TABLE} SET version = 7",
            f"UPDATE {TABLE} SET host_id = 'b', doc = replace(CAST(doc AS text), '\"a\"', '\"b\"')"
            if url.startswith("sqlite:")
            else f"UPDATE {TABLE} SET host_id = 'b', doc = doc || '{{\"host_id\": \"b\"}}'",
        )
        run(url, f"DELETE FROM {TABLE}")
        found = brief(await entries(engine, since))
        renamed = [("b", None, 7), ("b", 7, None)]
        if url.startswith("sqlite:"):
            assert found == [("a", None, 1), ("a", 1, 7), ("a", 7, None), *renamed]
        else:  # the statements were one transaction, in which "a" was deleted at last
            assert found == [("a", None, 1), ("a", 1, None), *renamed]


async def test_key_columns_alone_are_no_change(url: str) -> None:
    async with opened(url) as (store, engine):
        await store.save_entities("hosts", [{"host_id": f"{n}", "n": n} for n in range(20)])
        since = await engine.feed_position("hosts")
        indexed = [
            Collection("hosts", key="host_id", fields=[Field("n", "integer")], indexes=["n"])
        ]
        async with opened(url, indexed) as (other, _):
            await other.apply_schema()
            await other.claim_entities("hosts", {"n": 3}, limit=1, lease=60)
        assert await entries(engine, since) == []


@pytest.mark.parametrize("limit", [1, 3, 100])
async def test_many_changes_at_once(url: str, limit: int) -> None:
    number = 40
    async with opened(url) as (store, engine):
        since = await engine.feed_position("hosts")
        rows = [{"host_id": f"{n:03}", "n": n} for n in range(number)]
        await store.save_entities("hosts", rows)
        await store.save_entities("hosts", [{**each, "name": "x"} for each in rows])
        await store.delete_entities("hosts", [f"{n:03}" for n in range(number)])
        found = await entries(engine, since, limit)
        ids = [each["host_id"] for each in rows]
        by_id = {each: [change for change in brief(found) if change[0] == each] for each in ids}
        assert all(
            changes == [(each, None, 1), (each, 1, 2), (each, 2, None)]
            for each, changes in by_id.items()
        )
        # Each position continues after its change.
        for place in (0, number, 3 * number - 2):
            assert await entries(engine, found[place].position, limit) == found[place + 1 :]
        assert found[-1].position == await engine.feed_position("hosts")


async def test_a_savepoint_that_is_rolled_back_leaves_nothing(url: str) -> None:
    async with opened(url) as (store, engine):
        since = await engine.feed_position("hosts")
        async with store.begin_transaction() as tx:
            await tx.save_entity("hosts", {"host_id": "a", "n": 1})
            with suppress(KeyError):
                async with tx.begin_transaction() as inner:
                    await inner.save_entity("hosts", {"host_id": "a", "n": 2})
                    await inner.save_entity("hosts", {"host_id": "b", "n": 2})
                    raise KeyError
            await tx.save_entity("hosts", {"host_id": "a", "n": 3})
        [change] = await entries(engine, since)
        assert change.after is not None
        assert (change.before, change.after.entity["n"]) == (None, 3)


async def test_large_and_unusual_documents_are_complete(url: str) -> None:
    text = "".join(chr(33 + n % 90) for n in range(30_000))
    async with opened(url) as (store, engine):
        since = await engine.feed_position("hosts")
        await store.save_entity("hosts", {"host_id": "ä'\"\\", "text": text, "x": 1.0, "y": 2**60})
        await store.update_entity("hosts", "ä'\"\\", {"n": 1})
        first, second = await entries(engine, since)
        assert first.after == second.before
        assert second.after is not None
        assert second.after.entity == await store.get_entity("hosts", "ä'\"\\")
        assert second.after.entity["text"] == text


# -- positions ------------------------------------------------------------------------------


async def test_positions_that_are_none(url: str) -> None:
    async with opened(url) as (store, engine):
        position = await engine.feed_position("hosts")
        for bad in ("", "x", "[]", "{}", position[:-2], position.replace('"hosts"', '"zones"')):
            with pytest.raises(InvalidCursorError):
                await engine.read_feed("hosts", bad, 10)
        store_id = position.split('"')[1]
        with pytest.raises(InvalidCursorError):
            await engine.read_feed("hosts", position.replace(store_id, "0" * 32), 10)
        epoch = position.split('"')[5]
        with pytest.raises(FeedExpiredError):
            await engine.read_feed("hosts", position.replace(epoch, "0" * 16), 10)
        for number in re.finditer(r"(?<=[,\[])-?\d+(?=[,\]])", position):
            bad = f"{position[: number.start()]}{2**63}{position[number.end() :]}"
            with pytest.raises(InvalidCursorError):
                await engine.read_feed("hosts", bad, 10)
        snapshots = ("0:1:", "5:1:", "1:5:5", "1:5:3,2", "1:5:0", f"1:{10**19 - 1}:", "1:5")
        for bad in snapshots if url.startswith("postgresql:") else ():
            with pytest.raises(InvalidCursorError):
                await engine.read_feed("hosts", position.replace("1:1:", bad), 10)
        await store.save_entity("hosts", {"host_id": "a"})


def test_reduced_snapshots() -> None:
    assert reduced("10:20:10,15", 12) == "10:13:10"
    assert reduced("10:20:10,15", 8) == "9:9:"
    assert reduced("10:20:10,15", 30) == "10:31:10,15"
    assert reduced("20:20:", 19) == "20:20:"
    assert reduced("20:25:", 0) == "1:1:"


async def test_idle_readers_meet_at_one_position(url: str) -> None:
    async with opened(url) as (store, engine):
        first = await engine.feed_position("hosts")
        await store.save_entity("hosts", {"host_id": "a"})
        second = await engine.feed_position("hosts")
        await store.save_entity(
            "zones", {"zone_id": "z"}
        )  # a transaction without changes of the feed
        await store.save_entity("hosts", {"host_id": "a"})
        ends = {(await engine.read_feed("hosts", each, 10)).position for each in (first, second)}
        ends.add(await engine.feed_position("hosts"))
        await store.save_entity("zones", {"zone_id": "z"})
        ends.add(await engine.feed_position("hosts"))
        assert len(ends) == 1


# -- retention ------------------------------------------------------------------------------


async def test_old_changes_are_deleted_and_older_positions_expire(url: str) -> None:
    async with opened(url) as (store, engine):
        first = await engine.feed_position("hosts")
        for number in range(3):
            await store.save_entity("hosts", {"host_id": f"{number}"})
        [one, two, _] = await entries(engine, first)
        last = await engine.feed_position("hosts")
        await forget_feed(store, "hosts")
        for each in (first, one.position, two.position):
            with pytest.raises(FeedExpiredError):
                await engine.read_feed("hosts", each, 10)
        assert await engine.feed_position("hosts") == last
        await store.save_entity("hosts", {"host_id": "x"})
        assert brief(await entries(engine, last)) == [("x", None, 1)]
        await forget_feed(store, "hosts")
        with pytest.raises(FeedExpiredError):
            await engine.read_feed("hosts", last, 10)


async def test_the_retention_passes(url: str) -> None:
    brief_retention = [Collection("hosts", key="host_id", fields=["name"], feed=0.5)]
    async with opened(url, brief_retention) as (store, engine):
        since = await engine.feed_position("hosts")
        await store.save_entity("hosts", {"host_id": "a"})
        began = time.monotonic()
        with suppress(FeedExpiredError):
            while time.monotonic() < began + 30:
                assert len(await entries(engine, since)) == 1
                await asyncio.sleep(0.05)
        assert 0.4 < time.monotonic() - began < 25


@pytest.mark.parametrize("applies", [True, False])
async def test_the_retention_of_a_feed_that_comes_later(url: str, applies: bool) -> None:
    fed = [Collection("hosts", key="host_id", fields=["name"], feed=0.5)]
    async with opened(url, PLAIN) as (store, _):
        await store.save_entity("hosts", {"host_id": "a"})
    # It has written before the feed is there, and it does not watch.
    async with opened(url, fed if applies else PLAIN) as (writer, engine):
        await writer.save_entity("hosts", {"host_id": "a"})
        async with opened(url, fed) as (store, _):
            await store.apply_schema()
        if not applies:
            await writer.schema_changes()
            async with engine._main.lease() as lease:
                await engine._read_again(lease)
        await writer.save_entity("hosts", {"host_id": "a"})
        async with asyncio.timeout(30):
            while number_of_changes(url):
                await asyncio.sleep(0.1)


async def test_the_retention_after_a_cancelled_first_write(url: str) -> None:
    fed = [Collection("hosts", key="host_id", fields=["name"], feed=0.5)]
    async with opened(url, fed) as (store, _):
        await store.save_entity("hosts", {"host_id": "a"})
    async with open_store(url, collections=fed) as store:
        engine = engine_of(store)
        pruning = asyncio.Event()
        prune = engine.prune_feeds

        async def slow_prune(*given: Any) -> None:
            pruning.set()
            await asyncio.sleep(30)

        cast("Any", engine).prune_feeds = slow_prune
        preparing = asyncio.create_task(engine._prepare())
        await pruning.wait()
        preparing.cancel()
        await asyncio.gather(preparing, return_exceptions=True)
        cast("Any", engine).prune_feeds = prune
        async with asyncio.timeout(30):
            while number_of_changes(url):
                await asyncio.sleep(0.1)


def test_marks_are_few_and_never_early() -> None:
    state, retention = FeedState("x"), 160.0
    for second in range(1000):
        state = state.marked(float(second), second, retention)
        assert len(state.marks) <= 20
        place = state.expired_before(float(second), retention)
        assert place <= max(second - retention, 0)
        assert place >= second - retention - 12 or second < 180
    # A clock that was set back does not make changes old.
    state = state.marked(500.0, 2000, retention)
    assert state.expired_before(500.0, retention) <= 340


async def test_two_programs_declare_two_retentions(url: str) -> None:
    longer = [Collection("hosts", key="host_id", feed=7200)]
    async with opened(url), opened(url, longer), opened(url) as (_, engine):
        [hosts] = [each for each in await engine.declarations() if each.name == "hosts"]
        assert hosts.feed is not None
        assert hosts.feed.total_seconds() == 7200


# -- SQLite ---------------------------------------------------------------------------------


async def test_a_file_that_was_restored_from_a_copy(tmp_path: Path) -> None:
    path, copy = tmp_path / "store.db", tmp_path / "copy.db"
    url = f"sqlite:{path}"
    async with opened(url) as (store, engine):
        await store.save_entity("hosts", {"host_id": "a"})
        kept = await engine.feed_position("hosts")
    shutil.copy(path, copy)
    async with opened(url) as (store, engine):
        await store.save_entity("hosts", {"host_id": "lost"})
        lost = await engine.feed_position("hosts")
    shutil.copy(copy, path)
    async with opened(url) as (store, engine):
        with pytest.raises(FeedExpiredError):
            await engine.read_feed("hosts", lost, 10)
        await store.save_entity("hosts", {"host_id": "b"})  # it gets the number of the lost change
        with pytest.raises(FeedExpiredError):
            await engine.read_feed("hosts", lost, 10)
        assert brief(await entries(engine, kept)) == [("b", None, 1)]


async def test_an_expired_entity_that_is_created_again_is_one_change(url: str) -> None:
    from hf_async_store import Expire

    expiring = [
        Collection(
            "hosts",
            key="host_id",
            fields=[Field("until", "timestamp")],
            expires=Expire("until"),
            feed=3600,
        )
    ]
    async with opened(url, expiring) as (store, engine):
        await store.save_entity("hosts", {"host_id": "a", "until": "2001-01-01T00:00:00Z"})
        since = await engine.feed_position("hosts")
        await store.create_entity("hosts", {"host_id": "a"})
        assert brief(await entries(engine, since)) == [("a", 1, 1)]


# -- PostgreSQL -----------------------------------------------------------------------------


@asynccontextmanager
async def session(url: str) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


def inserted(entity_id: str) -> str:
    return (
        f'INSERT INTO {TABLE} (host_id, version, doc, "row-generation") '
        f"VALUES ('{entity_id}', 1, '{{\"host_id\": \"{entity_id}\"}}', 9)"
    )


@pytest.mark.parametrize("level", ["serializable", "repeatable read", "read committed"])
async def test_a_transaction_that_commits_after_later_ones(database: str, level: str) -> None:
    """It has the lowest number of all, but deletes and creates what later ones have written."""
    async with opened(database) as (store, engine), session(database) as connection:
        await store.save_entity("hosts", {"host_id": "x"})
        first = await engine.feed_position("hosts")
        async with connection.transaction(isolation=level.replace(" ", "_")):
            await connection.execute(inserted("mine"))
            await store.delete_entity("hosts", "x")
            middle = await engine.feed_position("hosts")
            assert brief(await entries(engine, first)) == [("x", 1, None)]
            await store.create_entity("hosts", {"host_id": "y"})
            await store.delete_entity("hosts", "y")
            await connection.execute(inserted("x"))
            await connection.execute(inserted("y"))
            if level == "read committed":
                await store.save_entity("hosts", {"host_id": "z"})
                await connection.execute(f"UPDATE {TABLE} SET version = 2 WHERE host_id = 'z'")
            during = await engine.feed_position("hosts")
        found = brief(await entries(engine, first, 2))
        expected = {
            "x": [("x", 1, None), ("x", None, 1)],
            "y": [("y", None, 1), ("y", 1, None), ("y", None, 1)],
            "mine": [("mine", None, 1)],
        }
        if level == "read committed":
            expected["z"] = [("z", None, 1), ("z", 1, 2)]
        for each, changes in expected.items():
            assert [change for change in found if change[0] == each] == changes
        assert sum(map(len, expected.values())) == len(found)
        assert len(await entries(engine, middle)) == len(found) - 1
        late = {change[0] for change in brief(await entries(engine, during))}
        assert late == expected.keys()


async def test_a_page_ends_inside_a_window_and_others_commit_meanwhile(database: str) -> None:
    async with opened(database) as (store, engine), session(database) as connection:
        since = await engine.feed_position("hosts")
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(inserted("mine"))
        for number in range(4):
            await store.save_entity("hosts", {"host_id": f"{number}"})
        batch = await engine.read_feed("hosts", since, 2)
        await transaction.commit()
        rest = brief(await entries(engine, batch.position, 2))
        assert rest == [("2", None, 1), ("3", None, 1), ("mine", None, 1)]


async def test_a_transaction_that_stays_open_does_not_make_reads_slow(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, tuple[object, ...]]] = []
    rows = LeasedConnection.rows

    async def recorded(lease: Any, sql: str, args: Any = (), **others: Any) -> Any:
        read.append((sql, args))
        return await rows(lease, sql, args, **others)

    async with opened(database) as (store, engine), session(database) as connection:
        since = await engine.feed_position("hosts")
        async with connection.transaction():
            await connection.execute(inserted("mine"))
            for _ in range(3):
                await store.save_entities("hosts", [{"host_id": f"{n}"} for n in range(1000)])
            await connection.execute('ANALYZE "hosts-feed"')
            assert len(await entries(engine, since, 1000)) == 3000
            since = await engine.feed_position("hosts")
            monkeypatch.setattr(LeasedConnection, "rows", recorded)
            assert await entries(engine, since) == []
            [(sql, args)] = [each for each in read if "min(w.seq)" in each[0]]
            plan = await connection.fetch(f"EXPLAIN (ANALYZE, TIMING OFF) {sql}", *args)
            found = re.findall(r"actual rows=(\d+)|Removed by \w+ *\w*: (\d+)", str(plan))
            # "mine", which is visible here because this is its transaction
            assert sum(int(rows or removed) for rows, removed in found) < 10


async def test_truncate_deletes_every_entity(database: str) -> None:
    async with opened(database) as (store, engine):
        await store.save_entities("hosts", [{"host_id": f"{n}"} for n in range(3)])
        since = await engine.feed_position("hosts")
        execute(database, f"TRUNCATE {TABLE} CASCADE")
        assert sorted(brief(await entries(engine, since))) == [(f"{n}", 1, None) for n in range(3)]


async def test_a_role_that_may_only_write_entities(database: str) -> None:
    async with opened(database) as (store, engine), session(database) as connection:
        since = await engine.feed_position("hosts")
        await store.save_entity("hosts", {"host_id": "a"})
        role = f"writer_{time.monotonic_ns()}"
        await connection.execute(f"CREATE ROLE {role}; GRANT ALL ON {TABLE} TO {role}")
        try:
            await connection.execute(f"SET ROLE {role}")
            await connection.execute(f"UPDATE {TABLE} SET version = 2")
        finally:
            await connection.execute(f"RESET ROLE; DROP OWNED BY {role}; DROP ROLE {role}")
        assert brief(await entries(engine, since)) == [("a", None, 1), ("a", 1, 2)]


async def test_other_roles_cannot_write_to_the_feed_or_prepare_it(database: str) -> None:
    role = f"stranger_{time.monotonic_ns()}"
    async with session(database) as connection:
        await connection.execute(f"CREATE ROLE {role}; GRANT CREATE ON SCHEMA public TO {role}")
        try:
            async with opened(database, PLAIN), session(database) as other:
                await other.execute(f'SET ROLE {role}; CREATE TABLE "hosts-feed" (seq int)')
            async with open_store(database, collections=FED) as store:
                with pytest.raises(SchemaMismatchError, match="hosts-feed"):
                    await store.apply_schema()
                await connection.execute('DROP TABLE "hosts-feed"')
                await store.apply_schema()
            async with session(database) as other:
                await other.execute(f"SET ROLE {role}; CREATE TABLE own (host_id text)")
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await other.execute(
                        "CREATE TRIGGER t AFTER INSERT ON own REFERENCING NEW TABLE AS new_rows "
                        'FOR EACH STATEMENT EXECUTE FUNCTION "hosts-feed"()'
                    )
        finally:
            await connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_a_dump_that_was_restored(database: str) -> None:
    dump = shutil.which("pg_dump") or next(
        map(str, Path("/usr/lib/postgresql").glob("*/bin/pg_dump")), None
    )
    if dump is None:
        pytest.skip("there is no pg_dump")
    async with opened(database) as (store, engine):
        await store.save_entity("hosts", {"host_id": "a"})
        since = await engine.feed_position("hosts")
    found = subprocess.run(
        [dump, "--clean", "--if-exists", database], capture_output=True, check=True
    )
    statements = [
        line
        for line in found.stdout.decode().splitlines()
        if not line.startswith(("\\", "SELECT pg_catalog.set_config('search_path'"))
    ]
    assert any(each.startswith("CREATE TRIGGER") for each in statements)
    psql = str(Path(dump).with_name("psql"))
    subprocess.run([psql, "-q", database], input=found.stdout, capture_output=True, check=True)
    async with open_store(database, collections=FED) as store:
        engine = engine_of(store)
        with pytest.raises(FeedExpiredError):
            await engine.read_feed("hosts", since, 10)
        again = await engine.feed_position("hosts")
        await store.save_entity("hosts", {"host_id": "b"})
        assert brief(await entries(engine, again)) == [("b", None, 1)]
        with pytest.raises(FeedExpiredError):
            await engine.read_feed("hosts", since, 10)


@pytest.mark.parametrize("settings", ["?schema=Some%20schema", "?table_prefix=some_"])
async def test_a_schema_and_a_prefix(database: str, settings: str) -> None:
    execute(database, 'CREATE SCHEMA "Some schema"')
    async with opened(database, FED, settings) as (store, engine):
        since = await engine.feed_position("hosts")
        await store.save_entity("hosts", {"host_id": "a"})
        await store.delete_entity("hosts", "a")
        assert brief(await entries(engine, since)) == [("a", None, 1), ("a", 1, None)]


async def test_a_commit_ends_the_wait_of_another_store(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_feed, "_POLL_SECONDS", 60.0)
    async with opened(url) as (_, engine), opened(url) as (other, _):
        position = await engine.feed_position("hosts")
        await engine.feed_changed({"hosts": position}, 5.0)  # it begins to wait
        began = time.monotonic()
        while time.monotonic() < began + 0.3:
            await engine.feed_changed({"hosts": position}, 0.1)  # what happened before
        waiting = asyncio.create_task(engine.feed_changed({"hosts": position}, 60.0))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        began = time.monotonic()
        await other.save_entity("hosts", {"host_id": "a"})
        await waiting
        assert time.monotonic() - began < 30


async def test_the_connection_that_waits_is_closed_soon(database: str) -> None:
    async with opened(database) as (_, engine):
        position = await engine.feed_position("hosts")
        await engine.feed_changed({"hosts": position}, 1.0)
        query = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%lock_shared%'"
        number = f"{query} AND datname = current_database() AND pid <> pg_backend_pid()"
        assert ask(database, number) == ["1"]
        await asyncio.sleep(3)
        assert ask(database, number) == ["0"]


@pytest.mark.parametrize("event", ["insert", "delete", "disabled"])
async def test_triggers_that_were_dropped_are_noticed(url: str, event: str) -> None:
    is_sqlite = url.startswith("sqlite")
    async with opened(url) as (store, engine):
        await store.save_entity("hosts", {"host_id": "a"})
        since = await engine.feed_position("hosts")
        assert (await store.health())["problems"] == []
        on_table = "" if is_sqlite else f" ON {TABLE}"
        if event == "disabled":
            if is_sqlite:
                pytest.skip("SQLite cannot disable triggers")
            run(url, f"ALTER TABLE {TABLE} DISABLE TRIGGER ALL")
        else:
            run(url, f'DROP TRIGGER "hosts-feed-{event}"{on_table}')
        [problem] = cast("Any", (await store.health())["problems"])
        assert "changes of hosts are not recorded" in problem
        assert f"hosts-feed-{'insert' if event == 'disabled' else event}" in problem
        assert [each.kind for each in await store.schema_changes()] == ["feed"]
        await store.apply_schema()
        assert await store.schema_changes() == []
        assert (await store.health())["problems"] == []
        with pytest.raises(FeedExpiredError):
            await engine.read_feed("hosts", since, 10)
        since = await engine.feed_position("hosts")
        await store.save_entity("hosts", {"host_id": "b"})
        await store.delete_entity("hosts", "b")
        assert brief(await entries(engine, since)) == [("b", None, 1), ("b", 1, None)]


async def test_a_schema_that_was_renamed(database: str) -> None:
    execute(database, 'CREATE SCHEMA "Some schema"')
    async with opened(database, FED, "?schema=Some%20schema") as (store, engine):
        await store.save_entity("hosts", {"host_id": "a"})
        since = await engine.feed_position("hosts")
    execute(database, 'ALTER SCHEMA "Some schema" RENAME TO "other"; CREATE SCHEMA "Some schema"')
    async with opened(database, FED, "?schema=other") as (store, engine):
        await store.save_entity("hosts", {"host_id": "b"})
        await store.save_entity("hosts", {"host_id": "b"})
        await store.delete_entity("hosts", "a")
        assert brief(await entries(engine, since)) == [("b", None, 1), ("b", 1, 2), ("a", 1, None)]
        execute(database, 'TRUNCATE other."hosts-entities"')
        assert brief(await entries(engine, since))[-1] == ("b", 2, None)
