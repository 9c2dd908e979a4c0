"""Several stores in one database, next to the tables of other programs."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from contextlib import AsyncExitStack, closing
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import asyncpg  # type: ignore[import-untyped]  # it has no types
import pytest

from hf_async_store import (
    Collection,
    ConfigurationError,
    Field,
    Index,
    LockTimeoutError,
    PermissionDeniedError,
    SchemaMismatchError,
    open_store,
)
from hf_async_store.config import load_config
from hf_async_store.strategies.sql.names import Names
from tests.contract.harnesses import ask, execute

if TYPE_CHECKING:
    from collections.abc import Iterable

pytestmark = pytest.mark.hf_sampled(by="url")

PREFIXES: Final = (
    "app_",
    'My "odd" 100% é; -- ',
    "Größe.' ? :x $1 (a) ",
    "sqlite_",
    "sqlit",
    "p" * 62 + "1",
    "p" * 62 + "2",
    "ü" * 40,
)
BEFORE: Final = [Collection("jobs", key="job_id", fields=["owner"], indexes=["owner"])]
AFTER: Final = [
    Collection(
        "jobs",
        key="job_id",
        fields=["owner", Field("size", "integer")],
        indexes=["owner", "size", Index("owner", "size")],
    ),
    Collection("tasks", key="task_id", fields=[Field("job_id", references="jobs")]),
]


def within(url: str, prefix: str) -> str:
    return f"{url}?table_prefix={quote(prefix, safe='')}" if prefix else url


def run(url: str, statement: str) -> list[str]:
    """The first column of the rows of a statement, over a separate connection."""
    if url.startswith("sqlite:"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:"))) as connection, connection:
            return [str(each[0]) for each in connection.execute(statement)]
    return ask(url, statement)


def relations(url: str) -> list[str]:
    if url.startswith("sqlite:"):
        return run(url, "SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite^_%' ESCAPE '^'")
    return run(
        url,
        "SELECT c.relname FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace "
        "WHERE n.nspname = 'public' AND c.relname NOT LIKE '%pkey%' ORDER BY 1",
    )


async def every_verb(url: str, others: int) -> None:
    async with open_store(url, collections=AFTER) as store:
        await store.create_entities("jobs", [{"job_id": f"j{n}", "size": n} for n in range(5)])
        await store.save_entity("tasks", {"task_id": "t", "job_id": "j1"})
        await store.update_entity("jobs", "j1", {"owner": str(others)})
        async with store.begin_transaction() as tx:
            await tx.delete_entity("jobs", "j0")
        assert await store.count_entities("jobs") == 4
        [found] = await store.query_entities("jobs", {"owner": str(others)}, order_by="size")
        assert found["job_id"] == "j1"
        await store.apply_schema()
        plan = await store.explain_query("jobs", {"size": 3})
        # The server may prefer to read a table of four rows.
        assert plan.index == "size-index" or "Seq Scan" in plan.detail, plan
        report = await store.health()
        assert report["ok"], report["problems"]
        assert await store.schema_changes() == []
        assert await store.undeclared() == []
        names = [each.name for each in await store.recorded_collections()]
        assert sorted(names) == ["jobs", "tasks"]


async def test_stores_with_prefixes_are_separate(url: str) -> None:
    everything = ("", *PREFIXES)
    for number, prefix in enumerate(everything):
        await every_verb(within(url, prefix), number)
    async with AsyncExitStack() as stack:
        stores = [
            await stack.enter_async_context(open_store(within(url, each), collections=AFTER))
            for each in (*everything, *everything)
        ]
        for number, store in enumerate(stores[: len(everything)]):
            assert (await store.get_entity("jobs", "j1") or {})["owner"] == str(number)
            for other, second in enumerate(stores[len(everything) :]):
                assert await store.is_same_store(second) is (other == number)


async def test_everything_of_a_store_has_its_prefix(url: str) -> None:
    async with open_store(within(url, "App_"), collections=BEFORE) as store:
        await store.save_entity("jobs", {"job_id": "a"})
    async with open_store(within(url, "App_"), collections=AFTER) as store:
        await store.apply_schema()
        await store.save_entity("tasks", {"task_id": "t"})
    prefix = "app_" if url.startswith("sqlite:") else "App_"
    assert all(each.startswith(prefix) for each in relations(url)), relations(url)
    assert f"{prefix}hf_catalogue" in relations(url)


async def test_the_case_of_a_prefix_on_sqlite(tmp_path: Any) -> None:
    """SQLite finds the same table by both names."""
    url = f"sqlite:{tmp_path}/store.db"
    async with (
        open_store(within(url, "APPä"), collections=BEFORE) as one,
        open_store(within(url, "appä"), collections=BEFORE) as other,
        open_store(within(url, "appÄ"), collections=BEFORE) as third,
    ):
        await one.save_entity("jobs", {"job_id": "a"})
        assert await other.get_entity("jobs", "a") is not None
        assert await one.is_same_store(other)
        assert await third.get_entity("jobs", "a") is None
        await third.save_entity("jobs", {"job_id": "b"})
        assert not await one.is_same_store(third)


def test_long_names_are_cut_without_collisions() -> None:
    found = [
        name
        for prefix in ("p" * 60, "p" * 61, "é" * 31, "é" * 32)
        for collection in ("c" * 48, "c" * 47 + "d")
        for names in [Names(prefix)]
        for name in (
            names.view(collection),
            names.table(collection),
            names.index(collection, ["a"]),
            names.index(collection, ["a", "b"]),
            names.catalogue,
        )
    ]
    assert len(set(found)) == len(found) - 4  # the catalogue of each prefix twice
    assert max(len(each.encode()) for each in found) <= 63


@pytest.mark.parametrize("wrong", ["a\0b", "\udc80"])
def test_invalid_prefixes(wrong: str) -> None:
    with pytest.raises(ConfigurationError, match="table_prefix"):
        open_store({"sql_strategy": {"name": "x.db", "table_prefix": wrong}})


def test_the_location_names_the_part_of_the_database() -> None:
    base = "postgresql://u@h/n"
    found = {
        load_config(f"{base}{query}").location()
        for query in ("", "?schema=a", "?schema=b", "?table_prefix=a", "?schema=a&table_prefix=a")
    }
    assert len(found) == 5
    assert load_config("sqlite:/x?table_prefix=%25").location() == "sqlite:/x?table_prefix=%25"


async def test_schemas_and_prefixes_together(database: str) -> None:
    execute(database, 'CREATE SCHEMA "A"; CREATE SCHEMA "a"')
    parts = [
        f"{database}?schema={schema}&table_prefix={prefix}"
        for schema in ("A", "a")
        for prefix in ("x", "X")
    ]
    await asyncio.gather(*(every_verb(each, n) for n, each in enumerate(parts)))
    for number, each in enumerate(parts):
        async with open_store(each, collections=AFTER) as store:
            assert (await store.get_entity("jobs", "j1") or {})["owner"] == str(number)
    assert relations(database) == []


async def test_an_apply_does_not_wait_for_that_of_another_store(database: str) -> None:
    for prefix in ("a", "b"):
        async with open_store(within(database, prefix), collections=BEFORE) as store:
            await store.save_entity("jobs", {"job_id": "a"})
    async with (
        open_store(within(database, "a"), collections=AFTER) as one,
        open_store(within(database, "b"), collections=AFTER) as other,
    ):
        engine: Any = one._sql  # type: ignore[attr-defined]
        async with engine.writing() as lease, engine._sync._exclusively(lease.driver):
            async with asyncio.timeout(10):
                await other.apply_schema()


# -- what belongs to somebody else ------------------------------------------------------------

OCCUPANTS: Final = [
    ("jobs", "CREATE TABLE jobs (x int)"),
    ("jobs", "CREATE VIEW jobs AS SELECT 1 AS x"),
    ("jobs-entities", 'CREATE TABLE "jobs-entities" (x int)'),
    ("hf_catalogue", "CREATE TABLE hf_catalogue (x int)"),
    ("hf_catalogue", "CREATE VIEW hf_catalogue AS SELECT 1 AS x"),
    ("jobs-owner-index", 'CREATE TABLE o (x int); CREATE INDEX "jobs-owner-index" ON o (x)'),
]
POSTGRES_OCCUPANTS: Final = [
    ("jobs", "CREATE TYPE jobs AS ENUM ('x')"),
    ("jobs", "CREATE TYPE jobs AS (x int)"),
    ("jobs", "CREATE DOMAIN jobs AS int"),
    ("jobs", "CREATE SEQUENCE jobs"),
    ("hf_catalogue", "CREATE SEQUENCE hf_catalogue"),
    ("hf_catalogue", "CREATE TABLE o (x int); CREATE INDEX hf_catalogue ON o (x)"),
    ("jobs", "CREATE MATERIALIZED VIEW jobs AS SELECT 1 AS x"),
    ("jobs-entities", "CREATE TYPE \"jobs-entities\" AS ENUM ('x')"),
    ("hf_catalogue", "CREATE TYPE hf_catalogue AS ENUM ('x')"),
]


def script(url: str, statements: str) -> None:
    for each in statements.split("; "):
        run(url, each)


@pytest.mark.parametrize(("name", "statement"), OCCUPANTS)
async def test_98_what_has_the_name_of_a_table_view_or_index_is_refused(
    url: str, name: str, statement: str
) -> None:
    script(url, statement)
    await refused(url, name)


@pytest.mark.parametrize(("name", "statement"), POSTGRES_OCCUPANTS)
async def test_98_what_has_such_a_name_on_postgresql_is_refused(
    database: str, name: str, statement: str
) -> None:
    script(database, statement)
    await refused(database, name)


async def refused(url: str, name: str) -> None:
    before = relations(url)
    async with open_store(url, collections=BEFORE) as store:
        for _ in range(2):
            with pytest.raises(SchemaMismatchError, match=f"{name}.*rename or drop it"):
                await store.save_entity("jobs", {"job_id": "a"})
    assert relations(url) == before
    async with open_store(within(url, "mine_"), collections=BEFORE) as store:
        assert await store.save_entity("jobs", {"job_id": "a"}) == 1


@pytest.mark.parametrize(
    ("name", "statement"),
    [
        ("size-key", 'ALTER TABLE "jobs-entities" ADD COLUMN "size-key" int'),
        ("jobs-size-index", 'CREATE TABLE o (x int); CREATE INDEX "jobs-size-index" ON o (x)'),
        ("jobs", "DROP VIEW jobs; CREATE VIEW jobs AS SELECT 1 AS job_id"),
        ("jobs", "DROP VIEW jobs; CREATE TABLE jobs (x int)"),
    ],
)
async def test_98_what_has_a_name_that_a_later_declaration_needs(
    url: str, name: str, statement: str
) -> None:
    async with open_store(url, collections=BEFORE) as store:
        await store.save_entity("jobs", {"job_id": "a"})
    script(url, statement)
    before = relations(url)
    later = [AFTER[0]]
    async with open_store(url, collections=later) as store:
        assert await store.get_entity("jobs", "a") is not None
        for _ in range(2):
            with pytest.raises(SchemaMismatchError, match=f"{name}.*rename or drop it"):
                await store.apply_schema()
    assert set(before) <= set(relations(url))
    if name == "size-key":
        assert run(url, 'SELECT "size-key" FROM "jobs-entities"') == ["None"]


async def test_98_columns_indexes_triggers_and_tables_of_others_do_not_matter(url: str) -> None:
    async with open_store(url, collections=BEFORE) as store:
        await store.save_entity("jobs", {"job_id": "a"})
        await store.delete_entity("jobs", "a")
    script(url, "CREATE TABLE theirs (x int)")
    script(url, "CREATE TABLE tasks_of_others (x int)")
    script(url, "ALTER TABLE \"jobs-entities\" ADD COLUMN note text DEFAULT 'n'")
    script(url, 'CREATE INDEX theirs_too ON "jobs-entities" (note)')
    script(url, "CREATE VIEW looking AS SELECT job_id FROM jobs")
    if url.startswith("sqlite:"):
        run(
            url,
            'CREATE TRIGGER noting AFTER INSERT ON "jobs-entities" '
            "BEGIN INSERT INTO theirs VALUES (1); END",
        )
    else:
        execute(
            url,
            "CREATE FUNCTION noting() RETURNS trigger LANGUAGE plpgsql AS "
            "$$BEGIN INSERT INTO public.theirs VALUES (1); RETURN NEW; END$$; "
            'CREATE TRIGGER noting AFTER INSERT ON "jobs-entities" '
            "FOR EACH ROW EXECUTE FUNCTION noting()",
        )
    await every_verb(url, 0)
    assert run(url, "SELECT count(*) FROM theirs") == ["5"]
    assert set(run(url, 'SELECT note FROM "jobs-entities"')) == {"n"}
    assert len(run(url, "SELECT * FROM looking")) == 4


# -- rights and locks on PostgreSQL -------------------------------------------------------------

ODD_ROLE: Final = 'My "odd" 100% Röle'


async def test_133_missing_rights_name_the_statement(database: str) -> None:
    name = ODD_ROLE.replace('"', '""')
    execute(
        database,
        f'CREATE ROLE "{name}" LOGIN; REVOKE CREATE ON SCHEMA public FROM PUBLIC; '
        f'GRANT USAGE ON SCHEMA public TO "{name}"',
    )
    as_role = database.replace("postgres@", f"{quote(ODD_ROLE, safe='')}@")
    url, own = within(as_role, 'x"y% '), within(database, 'x"y% ')
    try:
        async with open_store(url, collections=BEFORE) as store:
            with pytest.raises(
                PermissionDeniedError, match='run CREATE TABLE "x""y% hf_catalogue"'
            ):
                await store.save_entity("jobs", {"job_id": "a"})
        async with open_store(own, collections=AFTER) as store:
            await store.save_entity("jobs", {"job_id": "a"})
            await store.apply_schema()
        rights = "SELECT, INSERT, UPDATE, DELETE"
        execute(database, f'GRANT {rights} ON ALL TABLES IN SCHEMA public TO "{name}"')
        for collections in (AFTER, BEFORE):
            async with open_store(url, collections=collections) as store:
                await store.update_entity("jobs", "a", {"owner": "x"})
                assert await store.count_entities("jobs", {"owner": "x"}) == 1
                assert await store.test_connection() > 0
                await store.apply_schema()
        more = [Collection("more", key="more_id")]
        async with open_store(url, collections=[*AFTER, *more]) as store:
            with pytest.raises(PermissionDeniedError, match="run (LOCK|CREATE) TABLE.*GRANT it"):
                await store.save_entity("more", {"more_id": "a"})
            assert await store.get_entity("jobs", "a") is not None
    finally:
        execute(database, f'DROP OWNED BY "{name}"; DROP ROLE "{name}"')


async def test_a_missing_schema_is_named(database: str) -> None:
    async with open_store(f"{database}?schema=no%20such", collections=BEFORE) as store:
        assert await store.get_entity("jobs", "a") is None
        with pytest.raises(ConfigurationError, match="schema"):
            await store.save_entity("jobs", {"job_id": "a"})


def readers(database: str) -> Any:
    return asyncpg.connect(database)


async def test_a_view_that_others_read_for_long(database: str) -> None:
    async with open_store(database, collections=BEFORE) as store:
        await store.save_entity("jobs", {"job_id": "a"})
    reader = await readers(database)
    try:
        reading = reader.transaction()
        await reading.start()
        await reader.fetch("SELECT * FROM jobs")
        later: Iterable[Collection] = [AFTER[0]]
        async with (
            open_store(database, collections=BEFORE) as old,
            open_store(f"{database}?timeout=3", collections=later) as impatient,
            open_store(f"{database}?timeout=120", collections=later) as new,
        ):
            started = time.monotonic()
            with pytest.raises(LockTimeoutError, match='REPLACE VIEW "jobs"'):
                await impatient.save_entity("jobs", {"job_id": "b"})
            assert 0.5 < time.monotonic() - started < 60
            writing = asyncio.create_task(new.save_entity("jobs", {"job_id": "b"}))
            await asyncio.sleep(0.3)
            assert await old.save_entity("jobs", {"job_id": "a"}) == 2
            # A reader of the view waits for at most one attempt, not for all of them.
            started = time.monotonic()
            assert run(database, "SELECT count(*) FROM jobs") == ["1"]
            assert time.monotonic() - started < 30
            assert not writing.done()
            await reading.rollback()
            assert await writing == 1
    finally:
        await reader.close()


async def test_a_changed_type_under_a_view_of_somebody_else(database: str) -> None:
    before = [Collection("jobs", key="job_id", fields=["owner"])]
    after = [Collection("jobs", key="job_id", fields=[Field("owner", "integer")])]
    async with open_store(database, collections=before) as store:
        await store.save_entity("jobs", {"job_id": "a", "owner": "x"})
    execute(database, 'CREATE VIEW "their report" AS SELECT owner FROM jobs')
    async with open_store(database, collections=after) as store:
        with pytest.raises(SchemaMismatchError, match="their report.*Nothing was changed"):
            await store.save_entity("jobs", {"job_id": "b", "owner": 1})
        assert run(database, 'SELECT owner FROM "their report"') == ["x"]
        assert await store.count_entities("jobs") == 1
        execute(database, 'DROP VIEW "their report"')
        assert await store.save_entity("jobs", {"job_id": "b", "owner": 1}) == 1
