"""Stores whose tables have the layout of an earlier or later version, and the catalogue of a store."""

from __future__ import annotations

import json
import sqlite3
from typing import TYPE_CHECKING

import pytest

from hf_async_store import (
    Collection,
    Field,
    Index,
    NewerFormatError,
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


def made(path: Path, script: str) -> None:
    connection = sqlite3.connect(path)
    connection.executescript(script)
    connection.close()


async def test_a_store_of_an_earlier_layout_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    made(path, OLD)
    before = path.read_bytes()
    async with open_store(f"sqlite:{path}", collections=COLLECTIONS) as store:
        for work in (store.get_entity("jobs", "j1"), store.save_entity("teams", {"team_id": "t"})):
            with pytest.raises(SchemaMismatchError, match="hf-async-store backup"):
                await work
    assert path.read_bytes() == before


async def test_a_store_of_an_earlier_layout_is_refused_on_postgresql(database: str) -> None:
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
    assert before["layout"] == "3"
    assert json.loads(before["collection:teams"])["key"] == "team_id"
    assert "collection:jobs" not in before
    async with open_store(url, collections=COLLECTIONS) as store:
        await store.save_entity("teams", {"team_id": "t"})
    after = catalogue(url)
    assert after["store_id"] == before["store_id"]
    assert int(after["generation"]) > int(before["generation"])
    jobs = json.loads(after["collection:jobs"])
    assert jobs["fields"]["size"] == {"type": "integer"}
    assert jobs["fields"]["team_id"] == {"references": "teams"}
    assert jobs["indexes"] == [{"fields": ["team_id", "size"]}, {"fields": ["note"]}]
    assert jobs["columns"] == {"team_id": True, "size": True, "note": True}
    async with open_store(url, collections=[]) as store:
        found = await store.engine.declarations()
    assert [(each.name, each.indexes) for each in found if each.name != "hf_move"] == [
        (each.name, each.indexes) for each in COLLECTIONS
    ]


async def test_a_store_of_a_later_layout_is_refused(url: str) -> None:
    async with open_store(url, collections=COLLECTIONS) as store:
        await store.save_entity("teams", {"team_id": "t"})
    later = "UPDATE hf_catalogue SET value = '4' WHERE name = 'layout'"
    if url.startswith("sqlite"):
        made(url.removeprefix("sqlite:"), later)  # type: ignore[arg-type]  # a path as a string
    else:
        execute(url, later)
    async with open_store(url, collections=COLLECTIONS) as store:
        for work in (store.get_entity("teams", "t"), store.save_entity("teams", {"team_id": "t"})):
            with pytest.raises(NewerFormatError, match="layout 4"):
                await work


async def test_the_view_shows_typed_columns(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    async with open_store(f"sqlite:{path}", collections=COLLECTIONS) as store:
        await store.save_entity("teams", {"team_id": "t"})
        job = {"job_id": "j", "team_id": "t", "size": 3, "ratio": 1.5, "open": True}
        await store.save_entity("jobs", {**job, "data": {"a": [1, 1.0]}, "note": None})
    connection = sqlite3.connect(path, isolation_level=None)
    row = "SELECT job_id, version, team_id, size, ratio, open, data, note FROM jobs"
    assert connection.execute(row).fetchall() == [("j", 1, "t", 3, 1.5, 1, '{"a":[1,1.0]}', None)]
    connection.execute(
        "UPDATE \"jobs-entities\" SET doc = json_set(doc, '$.size', 'large', '$.ratio', '1')"
    )
    assert connection.execute("SELECT size, ratio FROM jobs").fetchall() == [(None, None)]
    connection.close()


def catalogue(url: str) -> dict[str, str]:
    if url.startswith("sqlite"):
        connection = sqlite3.connect(url.removeprefix("sqlite:"))
        found = connection.execute("SELECT name, value FROM hf_catalogue").fetchall()
        connection.close()
        return dict(found)
    pairs = ask(url, "SELECT name || '=' || value FROM hf_catalogue")
    return dict(each.split("=", 1) for each in pairs)  # type: ignore[misc]  # always two parts
