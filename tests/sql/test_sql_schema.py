"""Existing tables: as declared, incomplete, or different."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from typing import TYPE_CHECKING

import pytest

from hf_async_store import (
    Collection,
    ConfigurationError,
    Field,
    Index,
    ReferenceViolationError,
    SchemaMismatchError,
    open_store,
)
from tests.contract.harnesses import ask, execute

if TYPE_CHECKING:
    from pathlib import Path

BEFORE = Collection("jobs", key="job_id", fields=["owner"])
AFTER = Collection(
    "jobs",
    key="job_id",
    fields=["owner", Field("size", "integer"), Field("left", "text")],
    indexes=[Index("owner", "created_at"), "size", "left"],
)


def run(url: str, statement: str) -> None:
    """Change the database over a separate connection."""
    if url.startswith("sqlite:"):
        connection = sqlite3.connect(url.removeprefix("sqlite:"))
        connection.executescript(statement)
        connection.close()
    else:
        execute(url, statement)


async def test_later_declared_fields_and_indexes_are_added(url: str) -> None:
    async with open_store(url, collections=[BEFORE]) as store:
        await store.save_entity("jobs", {"job_id": "old", "owner": "ann", "size": 3, "more": [1]})
    async with open_store(url, collections=[AFTER]) as store:
        # A field that was not declared at first is still stored in the document, and is returned.
        old = await store.get_entity("jobs", "old")
        assert old is not None
        assert (old["size"], old["more"]) == (3, [1])
        await store.save_entity("jobs", {"job_id": "new", "owner": "ann", "size": 4, "left": "x"})
        catalogue = (
            "SELECT name FROM sqlite_master WHERE type = 'index'"
            if url.startswith("sqlite")
            else "SELECT indexname AS name FROM pg_indexes"
        )
        found = {each["name"] for each in await store.execute_with_lock(catalogue)}  # type: ignore[attr-defined]
        assert {f"jobs-{each.name}" for each in AFTER.indexes} <= found
    async with open_store(url, collections=[AFTER]) as store:
        assert await store.count_entities("jobs") == 2


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (
            "CREATE TABLE jobs (job_id VARCHAR(255) PRIMARY KEY)",
            r"jobs\.job_id is .*VARCHAR|varying",
        ),
        ("CREATE TABLE jobs (job_id BIGINT PRIMARY KEY)", r"jobs\.job_id is BIGINT|bigint"),
        ("CREATE TABLE jobs (id TEXT PRIMARY KEY)", r"no column for its key job_id"),
        (
            "CREATE TABLE jobs (job_id TEXT {c} PRIMARY KEY, owner INTEGER)",
            r"jobs\.owner is (INTEGER|integer), but declared as text",
        ),
        (
            "CREATE TABLE jobs (job_id TEXT {c} PRIMARY KEY, other TEXT {c} NOT NULL)",
            r"jobs\.other is required in the database, but not declared",
        ),
        ("CREATE TABLE jobs (job_id TEXT {c})", r"jobs\.job_id is declared as the key"),
        (
            "CREATE TABLE jobs (job_id TEXT {c} PRIMARY KEY, owner TEXT {c}, created_at TEXT {c});"
            'CREATE INDEX "jobs-owner-created_at-index" ON jobs (created_at)',
            r"the index jobs-owner-created_at-index is not on owner, created_at",
        ),
    ],
    ids=range(7),
)
async def test_differences_from_the_declaration_are_named(url: str, table: str, said: str) -> None:
    run(url, table.format(c="" if url.startswith("sqlite") else 'COLLATE "C"'))
    async with open_store(url, collections=[AFTER]) as store:
        for _ in range(2):
            with pytest.raises(SchemaMismatchError, match=said):
                await store.save_entity("jobs", {"job_id": "a"})


async def test_a_column_of_another_collation_differs(database: str) -> None:
    execute(database, "CREATE TABLE jobs (job_id TEXT PRIMARY KEY)")
    async with open_store(database, collections=[BEFORE]) as store:
        with pytest.raises(SchemaMismatchError, match="COLLATE default"):
            await store.get_entity("jobs", "a")


async def test_undeclared_columns_are_kept(url: str) -> None:
    collation = "" if url.startswith("sqlite") else 'COLLATE "C"'
    run(url, f"CREATE TABLE jobs (job_id TEXT {collation} PRIMARY KEY, note TEXT, other INTEGER)")
    async with open_store(url, collections=[BEFORE]) as store:
        await store.save_entity("jobs", {"job_id": "a", "note": "in the document"})
        found = await store.get_entity("jobs", "a")
        assert found is not None
        assert found["note"] == "in the document"


async def test_existing_tables_are_not_created_again(database: str) -> None:
    async with open_store(database) as store:
        await store.save_entity("templates", {"template_id": "t"})
    role = f"writer_{random.randrange(10**9)}"
    rights = "SELECT, INSERT, UPDATE, DELETE"
    execute(
        database,
        f"CREATE ROLE {role} LOGIN; REVOKE CREATE ON SCHEMA public FROM PUBLIC; "
        f"GRANT {rights} ON ALL TABLES IN SCHEMA public TO {role}",
    )
    try:
        async with open_store(database.replace("postgres@", f"{role}@")) as store:
            assert await store.save_entity("templates", {"template_id": "t"}) == 2
            assert await store.test_connection() > 0
    finally:
        execute(database, f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_the_setting_of_references_drops_and_adds_foreign_keys(database: str) -> None:
    keys = "SELECT conname FROM pg_constraint WHERE contype = 'f'"
    orphan = {"request_id": "r", "template_id": "nobody"}
    for number in range(2):
        async with open_store(database) as store:
            with pytest.raises(ReferenceViolationError):
                await store.save_entity("requests", {**orphan, "request_id": f"new {number}"})
            assert len(await asyncio.to_thread(ask, database, keys)) == 3
        async with open_store(f"{database}?enforce_references=no") as store:
            await store.save_entity("requests", {**orphan, "request_id": f"r {number}"})
            assert await asyncio.to_thread(ask, database, keys) == []


async def test_reserved_names(url: str) -> None:
    odd = Collection(
        "sqlite_things",
        key="ctid",
        fields=["xmin", "order", "left", Field("table", "integer")],
        indexes=["xmin", "order", "left", "table"],
        open=True,
    )
    async with open_store(url, collections=[odd]) as store:
        entity = {"ctid": "1", "xmin": "a", "order": "b", "left": "c", "table": 1, "rowid": 2}
        await store.create_entity("sqlite_things", entity)
        for name in ("xmin", "order", "left", "table", "rowid"):
            [found] = await store.query_entities("sqlite_things", {name: entity[name]}, name)
            assert found["ctid"] == "1"
        await store.update_entity("sqlite_things", "1", {"order": "x"}, expected_version=1)
        assert await store.delete_entity("sqlite_things", "1")


async def test_long_names_do_not_collide(url: str) -> None:
    fields = ["a" * 48, "a" * 47 + "b"]
    long = Collection("c" * 48, key="id", fields=fields, indexes=[Index(*fields), *fields])
    for _ in range(2):
        async with open_store(url, collections=[long]) as store:
            await store.save_entity("c" * 48, {"id": "x", fields[1]: "v"})
            plan = await store.explain_query("c" * 48, {fields[1]: "v"})
            assert plan.index == f"{fields[1]}-index"


async def test_a_missing_file_name_is_refused() -> None:
    for wrong in ("sqlite::memory:", {"strategy": "sql"}):
        with pytest.raises(ConfigurationError, match="path of a file"):
            open_store(wrong)


async def test_a_folder_is_made(tmp_path: Path) -> None:
    async with open_store(f"sqlite:{tmp_path}/a/b/store.db") as store:
        assert await store.count_entities("templates") == 0
