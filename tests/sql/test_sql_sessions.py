"""Session settings changed by a caller's SQL do not affect the next verb."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from hf_async_store import (
    InvalidInputError,
    StorageError,
    TransactionAbortedError,
    open_store,
)
from hf_async_store.strategies.sql import parameters

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.hf_sampled(by="url")

ONE = "pool_size=1&max_overflow=0"

POSTGRESQL = [
    "SET search_path TO nowhere",
    "SET statement_timeout = 1",
    "SET default_transaction_read_only = on",
    "SET default_transaction_isolation = 'read uncommitted'",
    "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
    "SET ROLE pg_read_all_data",
    "SET SESSION AUTHORIZATION pg_read_all_data",
    "SELECT set_config('search_path', 'nowhere', false)",
    'CREATE TEMP TABLE "templates-entities" (template_id text)',
    "SELECT pg_advisory_lock(4711)",
    "PREPARE mine AS SELECT 1",
    "LISTEN something",
    "DECLARE mine CURSOR WITH HOLD FOR SELECT 1",
]
SQLITE = [
    "PRAGMA query_only = ON",
    "PRAGMA case_sensitive_like = ON",
    "PRAGMA max_page_count = 1",
    "PRAGMA writable_schema = ON",
    'CREATE TEMP TABLE "templates-entities" (template_id text)',
    'CREATE TEMP VIEW "machines-entities" AS SELECT 1',
]


def template(name: str, **fields: object) -> dict[str, object]:
    return {"template_id": name, **fields}


async def _verbs_work(store: Any) -> None:
    assert await store.save_entity("templates", template("t")) >= 1
    assert await store.get_entity("templates", "t") is not None
    assert await store.count_entities("templates") == 1
    assert await store.count_entities("machines") == 0
    assert len([each async for each in store.stream_entities("templates")]) == 1
    await store.run_transaction(lambda tx: tx.save_entity("templates", template("t")))
    async with store.begin_transaction() as tx:
        assert await tx.count_entities("templates") == 1
        await tx.save_entity("templates", template("t"))


@pytest.mark.parametrize("statement", POSTGRESQL)
async def test_123_postgresql_session_state_is_reset(database: str, statement: str) -> None:
    async with open_store(f"{database}?{ONE}") as store:
        await store.save_entity("templates", template("t"))
        await store.execute_with_lock(statement)  # type: ignore[attr-defined]
        await _verbs_work(store)
        async with store.begin_transaction() as tx:
            await tx.save_entity("templates", template("t"))
            await tx.execute_with_lock(statement)  # type: ignore[attr-defined]
        await _verbs_work(store)
        [left] = await store.execute_with_lock(  # type: ignore[attr-defined]
            "SELECT current_setting('search_path') AS path, current_user = session_user AS own, "
            "(SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711) AS locks, "
            "(SELECT count(*) FROM pg_prepared_statements WHERE from_sql) AS prepared, "
            "(SELECT count(*) FROM pg_cursors WHERE name = 'mine') AS cursors, "
            "(SELECT count(*) FROM pg_listening_channels()) AS listening, "
            "to_regclass('pg_temp.templates') IS NULL AS clean, "
            "current_setting('application_name') AS name"
        )
        assert left == {
            "path": '"$user", public',
            "own": True,
            "locks": 0,
            "prepared": 0,
            "cursors": 0,
            "listening": 0,
            "clean": True,
            "name": "hf_async_store",
        }


async def test_123_postgresql_keeps_its_connection_if_possible(database: str) -> None:
    async with open_store(f"{database}?{ONE}") as store:
        pids = {
            each["pid"]
            for _ in range(5)
            for each in await store.execute_with_lock("SELECT pg_backend_pid() AS pid")  # type: ignore[attr-defined]
        }
        assert len(pids) == 1


@pytest.mark.parametrize("statement", SQLITE)
async def test_123_sqlite_session_state_is_reset(tmp_path: Path, statement: str) -> None:
    async with open_store(f"sqlite:{tmp_path}/store.db?{ONE}") as store:
        await store.save_entity("templates", template("t"))
        await store.execute_with_lock(statement)  # type: ignore[attr-defined]
        await _verbs_work(store)


async def half(store: Any, sql: Any, params: Any = (), *, swallow: bool = False) -> None:
    """A transaction that writes, and then executes a statement that must fail."""
    async with store.begin_transaction() as tx:
        await tx.save_entity("templates", template("half"))
        try:
            await tx.execute_with_lock(sql, params)
        except TransactionAbortedError:
            if not swallow:
                raise


CONTROL = [
    "COMMIT",
    "commit;",
    "  -- a comment\n COMMIT",
    "/* one /* two */ */ commit",
    ";COMMIT",
    "ROLLBACK",
    "COMMIT AND CHAIN",
    "END",
    "ABORT",
    "BEGIN",
    "START TRANSACTION",
    "SAVEPOINT mine",
    "RELEASE mine",
    "ROLLBACK TO mine",
    "PREPARE TRANSACTION 'mine'",
]


@pytest.mark.parametrize("statement", CONTROL)
async def test_123_a_statement_cannot_end_a_transaction(url: str, statement: str) -> None:
    async with open_store(url) as store:
        await store.save_entity("templates", template("t"))
        with pytest.raises(InvalidInputError):
            await half(store, statement)
        assert await store.get_entity("templates", "half") is None
        with pytest.raises(InvalidInputError):
            await store.execute_with_lock(statement)  # type: ignore[attr-defined]
        await _verbs_work(store)


@pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK"])
async def test_123_a_transaction_ended_by_a_statement_is_reported(
    url: str, statement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A statement that ends the transaction without being refused beforehand."""
    async with open_store(url) as store:
        await store.save_entity("templates", template("t"))
        monkeypatch.setattr(parameters, "_CONTROL", parameters.re.compile("never"))
        for swallow in (False, True):
            with pytest.raises(TransactionAbortedError) as caught:
                await half(store, statement, swallow=swallow)
            assert caught.value.outcome_unknown, swallow
            assert "nothing was written" not in str(caught.value), swallow
        there = await store.get_entity("templates", "half") is not None
        assert there == (statement == "COMMIT")
        await store.delete_entity("templates", "half")
        await _verbs_work(store)


WRONG: list[tuple[object, object]] = [
    (None, ()),
    (b"SELECT 1", ()),
    ("", ()),
    ("  -- nothing", ()),
    ("SELECT 1; SELECT 2", ()),
    ("SELEC 1", ()),
    ("SELECT * FROM no_such_table", ()),
    ("SELECT no_such_column FROM templates", ()),
    ("SELECT '\ud800'", ()),
    ("SELECT 1\0", ()),
    ("SELECT ?", None),
    ("SELECT ?", "x"),
    ("SELECT ?", 7),
    ("SELECT ?", []),
    ("SELECT ?", [1, 2]),
    ("SELECT :a", {}),
    ("SELECT :a", {"b": 1}),
    ("SELECT template_id FROM templates WHERE template_id = ?", [object()]),
    ("SELECT template_id FROM templates WHERE template_id = ?", ["\ud800"]),
    ("SELECT template_id FROM templates WHERE template_id = ?", ["\0"]),
    ("SELECT template_id FROM templates WHERE version = ?", [2**70]),
    ("SELECT template_id FROM templates WHERE version = ?", [{"a": 1}]),
]


@pytest.mark.parametrize(("sql", "params"), WRONG, ids=[repr(each)[:60] for each in WRONG])
async def test_127_wrong_statements_and_arguments(url: str, sql: Any, params: Any) -> None:
    async with open_store(url) as store:
        await store.save_entity("templates", template("t"))
        with pytest.raises(InvalidInputError) as caught:
            await store.execute_with_lock(sql, params)  # type: ignore[attr-defined]
        assert not caught.value.retryable
        assert not caught.value.outcome_unknown
        with pytest.raises(InvalidInputError):
            await half(store, sql, params)
        assert await store.get_entity("templates", "half") is None
        await _verbs_work(store)


async def test_123_a_cancelled_statement_of_a_caller(url: str) -> None:
    slow = (
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000000) "
        "SELECT count(*) FROM n"
    )
    async with open_store(f"{url}?{ONE}") as store:
        await store.save_entity("templates", template("t"))
        for _ in range(3):
            task = asyncio.create_task(store.execute_with_lock(slow))  # type: ignore[attr-defined]
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await _verbs_work(store)


async def test_health_reports_a_dropped_table(url: str) -> None:
    async with open_store(url) as store:
        await store.save_entity("templates", template("t"))
        assert (await store.health())["ok"] is True
        cascade = "" if url.startswith("sqlite") else " CASCADE"
        await store.execute_with_lock(f'DROP TABLE "machines-entities"{cascade}')  # type: ignore[attr-defined]
        for verb in (
            lambda: store.get_entity("machines", "m"),
            lambda: store.query_entities("machines"),
            lambda: store.save_entity("machines", {"machine_id": "m"}),
        ):
            with pytest.raises(StorageError):
                await verb()
        health = await store.health()
        assert health["ok"] is False
        assert "machines" in str(health["problems"])
        if cascade:
            await store.execute_with_lock(  # type: ignore[attr-defined]
                'ALTER TABLE "requests-entities" DROP COLUMN "status-key" CASCADE'
            )
            assert "requests-entities" in str((await store.health())["problems"])
