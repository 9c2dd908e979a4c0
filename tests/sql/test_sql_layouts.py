"""Stores whose tables have the layout of an earlier or later version, and the catalogue of a store."""

from __future__ import annotations

import json
import sqlite3
from typing import TYPE_CHECKING, Any

import pytest

from hf_async_store import (
    Collection,
    CorruptionError,
    Field,
    Index,
    NewerFormatError,
    ReferenceViolationError,
    SchemaMismatchError,
    open_store,
)
from tests.contract.harnesses import ask, execute

if TYPE_CHECKING:
    from pathlib import Path

COLLECTIONS = [
    Collection("teams", key="team_id", fields=["name"]),
    Collection(
        "jobs",
        key="job_id",
        fields=[
            Field("team_id", references="teams"),
            Field("size", "integer"),
            Field("ratio", "number"),
            Field("open", "boolean"),
            Field("data", "json"),
            "note",
        ],
        indexes=[Index("team_id", "size"), "note"],
    ),
]
OLD = """
CREATE TABLE teams (team_id TEXT, name TEXT, created_at TEXT, updated_at TEXT, doc TEXT, _side TEXT,
    version BIGINT NOT NULL, PRIMARY KEY (team_id));
CREATE TABLE jobs (job_id TEXT, team_id TEXT, size BIGINT, ratio BLOB, open BOOLEAN, data TEXT,
    note TEXT, created_at TEXT, updated_at TEXT, doc TEXT, _side TEXT, version BIGINT NOT NULL,
    PRIMARY KEY (job_id), FOREIGN KEY(team_id) REFERENCES teams (team_id));
CREATE INDEX "jobs-team_id-size-index" ON jobs (team_id, size);
CREATE INDEX "jobs-note-index" ON jobs (note);
CREATE TABLE _hf_async_store (name TEXT NOT NULL, value TEXT, PRIMARY KEY (name));
INSERT INTO teams VALUES ('t', 'blue', '2026-01-01T00:00:00.000000Z', NULL, NULL, NULL, 4);
INSERT INTO jobs VALUES ('j1', 't', 3, 1.5, 1, '{"a":[1,1.0]}', NULL, NULL, NULL,
    '{"more":{"deep":null}}', '{"note":null}', 7);
INSERT INTO jobs VALUES ('j2', NULL, NULL, 2, 0, 'null', 'x', NULL, NULL, NULL, NULL, 1);
"""
JOBS: list[dict[str, Any]] = [
    {"job_id": "j1", "team_id": "t", "size": 3, "ratio": 1.5, "open": True,
     "data": {"a": [1, 1.0]}, "note": None, "more": {"deep": None}, "version": 7},
    {"job_id": "j2", "ratio": 2, "open": False, "data": None, "note": "x", "version": 1},
]  # fmt: skip


def made(path: Path, script: str) -> None:
    connection = sqlite3.connect(path)
    connection.executescript(script)
    connection.close()


async def test_a_store_of_the_first_layout_is_moved_over(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    made(path, OLD)
    async with open_store(f"sqlite:{path}", collections=COLLECTIONS) as store:
        with pytest.raises(SchemaMismatchError, match="the first write moves them over"):
            await store.get_entity("jobs", "j1")
        assert await store.test_connection() > 0
        found = await store.query_entities("jobs")
        assert [repr(dict(sorted(each.items()))) for each in found] == [
            repr(dict(sorted(each.items()))) for each in JOBS
        ]
        team = await store.get_entity("teams", "t")
        assert team is not None
        assert (team["name"], team["version"]) == ("blue", 4)
        plan = await store.explain_query("jobs", {"team_id": "t"}, "size")
        assert plan.index == "team_id-size-index"
        assert await store.update_entity("jobs", "j1", {"size": 4}, expected_version=7) == 8
        with pytest.raises(ReferenceViolationError):
            await store.delete_entity("teams", "t")
    connection = sqlite3.connect(path)
    tables = {name for [name] in connection.execute("SELECT name FROM sqlite_master")}
    connection.close()
    assert not [each for each in tables if "layout1" in each]


async def test_a_move_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    made(path, OLD + "UPDATE jobs SET doc = '{' WHERE job_id = 'j2';")
    before = path.read_bytes()
    async with open_store(f"sqlite:{path}", collections=COLLECTIONS) as store:
        with pytest.raises(CorruptionError, match="jobs.*'j2'"):
            await store.test_connection()
    assert len(path.read_bytes()) >= len(before)
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT count(*) FROM jobs WHERE _side IS NULL").fetchall() == [(1,)]
    connection.close()


async def test_a_store_of_the_first_layout_is_refused_on_postgresql(database: str) -> None:
    execute(
        database,
        'CREATE TABLE teams (team_id text COLLATE "C" PRIMARY KEY, doc jsonb, _side jsonb, '
        "version bigint NOT NULL)",
    )
    async with open_store(database, collections=COLLECTIONS[:1]) as store:
        for work in (store.get_entity("teams", "t"), store.save_entity("teams", {"team_id": "t"})):
            with pytest.raises(SchemaMismatchError, match="hf-async-store backup"):
                await work


async def test_the_catalogue_describes_the_store(url: str) -> None:
    async with open_store(url, collections=COLLECTIONS[:1]) as store:
        await store.save_entity("teams", {"team_id": "t"})
    before = catalogue(url)
    assert before["layout"] == "2"
    assert list(json.loads(before["declarations"])) == ["teams"]
    async with open_store(url, collections=COLLECTIONS) as store:
        await store.save_entity("teams", {"team_id": "t"})
    after = catalogue(url)
    assert after["store_id"] == before["store_id"]
    assert json.loads(after["declarations"])["jobs"]["fields"]["size"] == "integer"
    assert json.loads(after["constraints"]) == {"references": True}


async def test_a_store_of_a_later_layout_is_refused(url: str) -> None:
    async with open_store(url, collections=COLLECTIONS) as store:
        await store.save_entity("teams", {"team_id": "t"})
    later = "UPDATE _hf_async_store_catalogue SET value = '3' WHERE name = 'layout'"
    if url.startswith("sqlite"):
        made(url.removeprefix("sqlite:"), later)  # type: ignore[arg-type]  # a path as a string
    else:
        execute(url, later)
    async with open_store(url, collections=COLLECTIONS) as store:
        for work in (store.get_entity("teams", "t"), store.save_entity("teams", {"team_id": "t"})):
            with pytest.raises(NewerFormatError, match="layout 3"):
                await work


async def test_another_program_cannot_break_references_or_generated_columns(
    tmp_path: Path,
) -> None:
    path = tmp_path / "store.db"
    async with open_store(f"sqlite:{path}", collections=COLLECTIONS) as store:
        await store.save_entity("teams", {"team_id": "t"})
        await store.save_entity("jobs", JOBS[0])
    connection = sqlite3.connect(path, isolation_level=None)
    row = "SELECT team_id, size, ratio, open, data, note FROM jobs"
    assert connection.execute(row).fetchall() == [("t", 3, 1.5, 1, '{"a":[1,1.0]}', None)]
    for statement in (
        "DELETE FROM teams",
        "UPDATE jobs SET doc = json_set(doc, '$.team_id', 'nobody')",
        "INSERT INTO jobs (job_id, version, doc) VALUES ('k', 1, '{\"team_id\": \"nobody\"}')",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="a reference is broken"):
            connection.execute(statement)
    connection.execute("UPDATE jobs SET doc = json_set(doc, '$.size', 'large', '$.ratio', '1')")
    assert connection.execute("SELECT size, ratio FROM jobs").fetchall() == [(None, None)]
    connection.execute("UPDATE jobs SET doc = json_remove(doc, '$.team_id')")
    connection.execute("DELETE FROM teams")
    connection.close()


def catalogue(url: str) -> dict[str, str]:
    if url.startswith("sqlite"):
        connection = sqlite3.connect(url.removeprefix("sqlite:"))
        found = connection.execute("SELECT name, value FROM _hf_async_store_catalogue").fetchall()
        connection.close()
        return dict(found)
    pairs = ask(url, "SELECT name || '=' || value FROM _hf_async_store_catalogue")
    return dict(each.split("=", 1) for each in pairs)  # type: ignore[misc]  # always two parts
