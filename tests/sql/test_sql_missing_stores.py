"""Stores that do not exist, that exist in part, or that contain undeclared collections."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hf_async_store import Collection, ConcurrencyConflictError, Field, Index, open_store
from tests.contract.harnesses import ask, execute

if TYPE_CHECKING:
    from collections.abc import Iterable

JOBS = Collection("jobs", key="job_id", fields=["owner"])
TASKS = Collection("tasks", key="task_id")


def tables(url: str) -> list[str]:
    """The tables of the database, over a separate connection; none for a missing file."""
    if not url.startswith("sqlite"):
        return ask(url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")
    path = Path(url.removeprefix("sqlite:"))
    if not path.exists():
        return []
    connection = sqlite3.connect(path)
    found = connection.execute("SELECT name FROM sqlite_master ORDER BY 1").fetchall()
    connection.close()
    return [name for [name] in found if not name.startswith("sqlite_")]


def run(url: str, statement: str) -> None:
    if url.startswith("sqlite"):
        connection = sqlite3.connect(url.removeprefix("sqlite:"))
        connection.executescript(statement)
        connection.close()
    else:
        execute(url, statement)


async def read_nothing(store: Any, collection: str = "templates") -> None:
    assert await store.get_entity(collection, "t") is None
    assert await store.get_entities(collection, ["t", "u"]) == [None, None]
    assert await store.query_entities(collection) == []
    assert await store.query_entities(collection, {"updated_at": "2026-01-01"}, limit=3) == []
    page = await store.query_page(collection, limit=3)
    assert (page.items, page.cursor) == ([], None)
    assert await store.update_where(collection, {}, {"updated_at": "2026-01-01"}, limit=3) == 0
    assert await store.delete_where(collection, {}, limit=3) == 0
    assert [each async for each in store.stream_entities(collection)] == []
    assert await store.count_entities(collection) == 0


async def test_reads_of_an_absent_store_create_nothing(url: str) -> None:
    async with open_store(url) as store:
        assert not await store.exists()
        await read_nothing(store)
        assert (await store.explain_query("templates", {"image_id": "x"})).access == "scan"
        async with store.snapshot() as reader:
            query = store._query("templates", None, None, None, None)
            assert [each async for each in reader.select(query)] == []
            assert await reader.count(query) == 0
            assert await reader.fetch([]) == []
        async with store.begin_transaction() as tx:
            await read_nothing(tx)
        assert await store.engine.undeclared() == []
        assert not await store.exists()
        assert tables(url) == []
        if url.startswith("sqlite"):
            assert list(Path(url.removeprefix("sqlite:")).parent.iterdir()) == []
        assert await store.save_entity("templates", {"template_id": "t"}) == 1
        assert await store.exists()
        assert await store.count_entities("templates") == 1
        assert await store.count_entities("machines") == 0
    async with open_store(url) as store:
        assert await store.exists()
    async with open_store(url, collections=[JOBS]) as store:
        assert await store.exists(), "whatever is declared"
        await read_nothing(store, "jobs")
        assert "jobs-entities" not in tables(url)


async def test_a_store_that_is_created_by_another_process_meanwhile(url: str) -> None:
    async with open_store(url) as reader, open_store(url) as writer:
        await read_nothing(reader)
        await writer.save_entity("templates", {"template_id": "t"})
        assert await reader.get_entity("templates", "t") is not None
        assert await reader.count_entities("templates") == 1


@pytest.mark.parametrize("used", [False, True])
async def test_a_transaction_that_read_an_absent_store(url: str, used: bool) -> None:
    async with open_store(url) as store, open_store(url) as other:

        async def meanwhile() -> None:
            await other.save_entity("templates", {"template_id": "t"})
            if not used:
                await other.delete_entity("templates", "t")

        if used:

            async def transaction() -> None:
                async with store.begin_transaction() as tx:
                    assert await tx.get_entity("templates", "t") is None
                    await asyncio.create_task(meanwhile())
                    await tx.save_entity("templates", {"template_id": "t"})

            with pytest.raises(ConcurrencyConflictError) as caught:
                await transaction()
            assert caught.value.retryable
            return
        async with store.begin_transaction() as tx:
            assert await tx.get_entity("templates", "t") is None
            await asyncio.create_task(meanwhile())
            assert await tx.create_entity("templates", {"template_id": "t"}) == 1


async def test_reads_return_fields_without_a_column_and_add_none(url: str) -> None:
    before = Collection("jobs", key="job_id", fields=["owner"])
    after = Collection(
        "jobs",
        key="job_id",
        fields=["owner", Field("size", "integer"), "left"],
        indexes=[Index("size"), "left"],
    )
    async with open_store(url, collections=[before]) as store:
        await store.save_entities(
            "jobs", [{"job_id": f"j{n}", "owner": "ann", "size": n, "left": "x"} for n in range(5)]
        )
    columns = (
        "SELECT name FROM pragma_table_xinfo('jobs-entities')"
        if url.startswith("sqlite")
        else "SELECT attname FROM pg_attribute "
        "WHERE attrelid = '\"jobs-entities\"'::regclass AND attnum > 0"
    )

    def found() -> list[str]:
        if not url.startswith("sqlite"):
            return ask(url, columns)
        connection = sqlite3.connect(url.removeprefix("sqlite:"))
        rows = connection.execute(columns).fetchall()
        connection.close()
        return [name for [name] in rows]

    async with open_store(url, collections=[after, TASKS]) as store:
        assert await store.count_entities("jobs", {"size": 3}) == 1
        found_jobs = await store.query_entities("jobs", {"left": "x"}, order_by="-size", limit=2)
        assert [each["size"] for each in found_jobs] == [4, 3]
        assert len([each async for each in store.stream_entities("jobs", order_by="size")]) == 5
        job = await store.get_entity("jobs", "j1")
        assert job is not None
        assert (job["size"], job["left"], job["owner"]) == (1, "x", "ann")
        page = await store.query_page("jobs", order_by="size", limit=2)
        more = await store.query_page("jobs", order_by="size", limit=2, cursor=page.cursor)
        assert [each["size"] for each in more.items] == [2, 3]
        await read_nothing(store, "tasks")
        assert {"size-key", "left-key"}.isdisjoint(found())
        assert "tasks-entities" not in tables(url)
        assert (await store.explain_query("jobs", {"size": 3})).access == "scan"
        await store.save_entity("jobs", {"job_id": "new", "size": 9})
        assert "tasks-entities" in tables(url)
        await store.engine.apply_schema()
        assert {"size-key", "left-key"} <= set(found())


async def test_undeclared_collections_are_reported(url: str) -> None:
    wide = Collection("jobs", key="job_id", fields=["owner", Field("size", "integer"), "unused"])
    narrow = Collection("jobs", key="job_id", fields=["owner"])

    async def undeclared(collections: Iterable[Collection]) -> list[str]:
        async with open_store(url, collections=collections) as store:
            return await store.engine.undeclared()

    async with open_store(url, collections=[wide, TASKS]) as store:
        await store.save_entity("jobs", {"job_id": "j", "owner": "ann", "size": 4, "more": 1})
        await store.save_entity("tasks", {"task_id": "t"})
    assert await undeclared([wide, TASKS]) == []
    # A field that is not declared is still in the entity.
    assert await undeclared([narrow]) == ["tasks"]
    assert await undeclared([TASKS]) == ["jobs"]
    run(url, "CREATE TABLE others (id INTEGER); INSERT INTO others VALUES (1)")
    run(url, 'ALTER TABLE "jobs-entities" ADD COLUMN "odd ""name""" TEXT')
    assert await undeclared([narrow, TASKS]) == []


async def test_a_database_of_another_program_is_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    connection = sqlite3.connect(path)
    connection.executescript(
        "CREATE TABLE mine (id INTEGER PRIMARY KEY); INSERT INTO mine VALUES (1)"
    )
    connection.close()
    before = path.read_bytes()
    async with open_store(f"sqlite:{path}") as store:
        assert not await store.exists()
        await read_nothing(store)
        assert await store.engine.undeclared() == []
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["other.db"]
    empty = tmp_path / "empty.db"
    empty.touch()
    async with open_store(f"sqlite:{empty}") as store:
        assert not await store.exists()
        await read_nothing(store)
        assert empty.stat().st_size == 0
        assert await store.save_entity("templates", {"template_id": "t"}) == 1
