"""Existing tables: as declared, incomplete, or different."""

from __future__ import annotations

import random
import sqlite3
from typing import TYPE_CHECKING, Any

import pytest

from hf_async_store import (
    Collection,
    ConfigurationError,
    Field,
    Index,
    ReferenceViolationError,
    SchemaMismatchError,
    open_store,
    path,
)
from tests.contract.harnesses import execute

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.hf_sampled(by="url")

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
        wanted = {"jobs-owner-created_at-index", "jobs-size-index", "jobs-left-index"}
        assert wanted <= found or url.startswith("postgresql")  # there `apply_schema` creates them
        await store.engine.apply_schema()
        assert await store.engine.schema_changes() == []
        found = {each["name"] for each in await store.execute_with_lock(catalogue)}  # type: ignore[attr-defined]
        assert wanted <= found
    async with open_store(url, collections=[AFTER]) as store:
        assert await store.count_entities("jobs") == 2


async def test_names_of_indexes_of_two_collections_differ(url: str) -> None:
    collections = [
        Collection("jobs", key="job_id", fields=["old_owner"], indexes=["old_owner"]),
        Collection("jobs_old", key="job_id", fields=["owner"], indexes=["owner"]),
    ]
    async with open_store(url, collections=collections) as store:
        await store.save_entity("jobs", {"job_id": "a", "old_owner": "ann"})
        await store.save_entity("jobs_old", {"job_id": "b", "owner": "bob"})
        assert await store.engine.schema_changes() == []


@pytest.mark.parametrize(
    ("relation", "statement"),
    [
        ("table jobs", "CREATE TABLE jobs (job_id TEXT PRIMARY KEY)"),
        ("view jobs", "CREATE VIEW jobs AS SELECT 1 AS job_id"),
        ("table jobs-entities", 'CREATE TABLE "jobs-entities" (job_id TEXT PRIMARY KEY)'),
    ],
)
@pytest.mark.parametrize("is_new", [True, False])
async def test_a_table_of_another_program_is_refused_and_left_alone(
    url: str, relation: str, statement: str, is_new: bool
) -> None:
    others = Collection("others", key="other_id")
    if not is_new:
        async with open_store(url, collections=[others]) as store:
            await store.save_entity("others", {"other_id": "o"})
    run(url, statement)
    async with open_store(url, collections=[others, AFTER]) as store:
        for _ in range(2):
            with pytest.raises(SchemaMismatchError, match=f"there is a {relation} that"):
                await store.save_entity("jobs", {"job_id": "a"})
        if is_new:
            with pytest.raises(SchemaMismatchError, match=f"there is a {relation} that"):
                await store.get_entity("jobs", "a")
    run(url, f'DROP {relation.split()[0]} "{relation.split()[1]}"')
    async with open_store(url, collections=[others, AFTER]) as store:
        assert await store.save_entity("jobs", {"job_id": "a"}) == 1


async def test_another_key_is_refused(url: str) -> None:
    async with open_store(url, collections=[BEFORE]) as store:
        await store.save_entity("jobs", {"job_id": "a"})
    other = Collection("jobs", key="id")
    async with open_store(url, collections=[other]) as store:
        with pytest.raises(
            SchemaMismatchError, match="the key of the collection 'jobs' is 'job_id'"
        ):
            await store.save_entity("jobs", {"id": "a"})


@pytest.mark.parametrize("types", [("integer", "text"), ("text", "integer"), ("text", "json")])
async def test_a_field_of_another_type_is_found_by_its_stored_values(
    url: str, types: tuple[Any, Any]
) -> None:
    before, after = (
        Collection(
            "jobs",
            key="job_id",
            fields=[Field("size", each)],
            indexes=[] if each == "json" else ["size"],
        )
        for each in types
    )
    values: dict[str, Any] = {"integer": 3, "text": "3", "json": [3]}
    async with open_store(url, collections=[before]) as store:
        await store.save_entity("jobs", {"job_id": "old", "size": values[types[0]]})
    async with open_store(url, collections=[after]) as store:
        await store.save_entity("jobs", {"job_id": "new", "size": values[types[1]]})
        for name, type_ in (("old", types[0]), ("new", types[1])):
            found = await store.query_entities("jobs", {path("size"): values[type_]})
            assert [(each["job_id"], each["size"]) for each in found] == [(name, values[type_])]
        ordered = await store.query_entities("jobs", order_by="size", limit=5)
        ranks = {int: 0, str: 1, list: 2}
        kinds = [ranks[type(each["size"])] for each in ordered]
        assert kinds == sorted(kinds)


async def test_columns_of_an_administrator_are_kept(url: str) -> None:
    async with open_store(url, collections=[BEFORE]) as store:
        await store.save_entity("jobs", {"job_id": "a"})
        run(url, 'ALTER TABLE "jobs-entities" ADD COLUMN note TEXT')
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


async def test_the_setting_of_references_belongs_to_a_program(url: str) -> None:
    orphan = {"request_id": "r", "template_id": "nobody"}
    async with (
        open_store(url) as strict,
        open_store(f"{url}?enforce_references=no") as lax,
    ):
        for number in range(2):
            with pytest.raises(ReferenceViolationError):
                await strict.save_entity("requests", {**orphan, "request_id": f"new {number}"})
            await lax.save_entity("requests", {**orphan, "request_id": f"r {number}"})
            # A reference that stays broken is not refused.
            await strict.update_entity("requests", f"r {number}", {"status": "x"})


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


async def test_a_field_that_refers_to_two_collections(url: str) -> None:
    def declared(parent: str | None, *, enforced: bool = True) -> list[Collection]:
        owner = Field("owner", references=parent, enforced=enforced)
        return [
            Collection("people", key="person_id"),
            Collection("teams", key="team_id"),
            Collection("jobs", key="job_id", fields=[owner]),
        ]

    async with open_store(url, collections=declared("people")) as store:
        await store.save_entity("people", {"person_id": "p"})
        await store.save_entity("jobs", {"job_id": "a", "owner": "p"})
    async with open_store(url, collections=declared("teams")) as store:
        assert (await store.query_entities("jobs", {"owner": "p"}))[0]["job_id"] == "a"
        for _ in range(2):
            with pytest.raises(SchemaMismatchError, match=r"jobs\.owner .*'people'.*'teams'"):
                await store.save_entity("jobs", {"job_id": "b"})
        kinds = [(each.kind, each.name) for each in await store.schema_changes()]
        assert ("field", "owner") in kinds
    async with open_store(url, collections=declared("teams", enforced=False)) as store:
        await store.save_entity("jobs", {"job_id": "b", "owner": "p"})
        with pytest.raises(ReferenceViolationError):
            await store.save_entity("jobs", {"job_id": "b", "owner": "t"})
