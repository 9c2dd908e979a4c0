"""On SQLite, `update_where` with a limit is one statement where each row is changed in the same way."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from hf_async_store import (
    REMOVE,
    Collection,
    CorruptionError,
    Field,
    PartialChangeError,
    desc,
    increment,
    open_store,
)
from hf_async_store.strategies.sql.sqlite import _ClosingConnection
from hf_async_store.testing.assertions import get_existing
from hf_async_store.values import INT_MAX
from tests.sql.jobs import JOBS, PENDING, RUNNING, filled

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    execute = _ClosingConnection.execute

    def noted(self: _ClosingConnection, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        found.append(sql.split()[0])
        return execute(self, sql, parameters)

    monkeypatch.setattr(_ClosingConnection, "execute", noted)
    return found


async def _damage(folder: Path, statement: str) -> None:
    with closing(sqlite3.connect(folder / "jobs.sqlite")) as connection:
        connection.execute(statement)
        connection.commit()


async def test_one_statement(tmp_path: Path, statements: list[str]) -> None:
    async with filled(f"sqlite:{tmp_path}/jobs.sqlite") as store:
        for expected in (2, 2, 2, 0):
            statements.clear()
            done = await store.update_where("jobs", PENDING, RUNNING, order_by="rank", limit=2)
            assert (done, statements) == (expected, ["BEGIN", "SELECT", "UPDATE", "COMMIT"])
        assert await store.count_entities("jobs", RUNNING) == 6
        assert await store.count_entities("jobs", PENDING) == 0


@pytest.mark.parametrize(
    "changes",
    [{"rank": increment(1)}, {"parent_id": "0"}, {"name": "x"}],
    ids=["computed", "reference", "unique"],
)
async def test_several_where_more_must_be_decided(
    tmp_path: Path, statements: list[str], changes: dict[str, Any]
) -> None:
    async with filled(f"sqlite:{tmp_path}/jobs.sqlite") as store:
        statements.clear()
        assert await store.update_where("jobs", PENDING, changes, order_by="rank", limit=1) == 1
        assert len(statements) > 4
        assert (await get_existing(store, "jobs", "5"))["version"] == 2


async def test_fields_are_set_and_removed_as_in_other_updates(tmp_path: Path) -> None:
    async with filled(f"sqlite:{tmp_path}/jobs.sqlite") as store:
        await store.update_entity("jobs", "5", {"note": 1e300, "nested": {"ä": [1.0, 2]}})
        changes = {"rank": REMOVE, "status": None, "more": [1.0, "ü"]}
        assert await store.update_where("jobs", PENDING, changes, order_by="rank", limit=1) == 1
        job = await get_existing(store, "jobs", "5")
        assert (
            job.items() >= {"status": None, "more": [1.0, "ü"], "note": 1e300, "version": 3}.items()
        )
        assert job["nested"] == {"ä": [1.0, 2]}
        assert "rank" not in job
        assert await store.query_entities("jobs", {"status": None}) == [job]
        assert (await store.query_entities("jobs", order_by="rank", limit=1))[0] == job


@pytest.mark.parametrize("order_by", ["rank", desc("rank"), None], ids=str)
async def test_pages_follow_the_order(tmp_path: Path, order_by: Any) -> None:
    """The position of the next page is the last row of a page, in the order of the query."""
    async with open_store(f"sqlite:{tmp_path}/jobs.sqlite", collections=[JOBS]) as store:
        jobs = [{"job_id": f"{n * 7919 % 1100:04}", "rank": n % 10} for n in range(1100)]
        await store.save_entities("jobs", jobs)
        assert await store.update_where("jobs", {}, {"note": "x"}, order_by=order_by) == 1100
        assert {each["version"] for each in await store.query_entities("jobs")} == {2}


async def test_a_row_that_cannot_be_changed_is_named_and_the_others_stay(tmp_path: Path) -> None:
    async with filled(f"sqlite:{tmp_path}/jobs.sqlite") as store:
        await _damage(
            tmp_path, f"UPDATE \"jobs-entities\" SET version = {INT_MAX} WHERE job_id = '3'"
        )
        with pytest.raises(PartialChangeError, match="greatest possible"):
            await store.update_where("jobs", PENDING, RUNNING, order_by="rank", limit=6)
    async with open_store(f"sqlite:{tmp_path}/jobs.sqlite", collections=[JOBS]) as store:
        await _damage(tmp_path, "UPDATE \"jobs-entities\" SET doc = '{' WHERE job_id = '3'")
        with pytest.raises(CorruptionError, match="jobs-entities.*'3'"):
            await store.update_where("jobs", PENDING, RUNNING, order_by="rank", limit=6)


async def test_a_trigger_of_another_program_that_keeps_a_row(tmp_path: Path) -> None:
    async with filled(f"sqlite:{tmp_path}/jobs.sqlite") as store:
        await _damage(
            tmp_path,
            "CREATE TRIGGER kept BEFORE UPDATE ON \"jobs-entities\" WHEN OLD.job_id = '5' "
            "BEGIN SELECT RAISE(IGNORE); END",
        )
        changes = {"note": "x"}
        await store.update_where("jobs", PENDING, changes, order_by="rank", limit=2)
        assert (await get_existing(store, "jobs", "4"))["note"] == "x"


async def test_tasks_that_modify_one_entity_share_commits(
    tmp_path: Path, statements: list[str]
) -> None:
    counters = Collection("counters", key="counter_id", fields=[Field("n", "integer")])
    async with open_store(f"sqlite:{tmp_path}/counters.sqlite", collections=[counters]) as store:
        await store.save_entity("counters", {"counter_id": "c", "n": 0})
        statements.clear()
        await asyncio.gather(
            *(
                store.modify_entity("counters", "c", lambda each: {**each, "n": each["n"] + 1})
                for _ in range(16)
            )
        )
        found = await get_existing(store, "counters", "c")
        assert (found["n"], found["version"]) == (16, 17)
        assert statements.count("COMMIT") <= 4
