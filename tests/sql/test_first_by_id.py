"""A few rows in the order of ids, of which very many match: SQLite looks at the first rows of the table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from hf_async_store import Collection, Index, open_store
from hf_async_store.strategies.sql import sqlite

if TYPE_CHECKING:
    from pathlib import Path

    from hf_async_store import StorageStrategy

JOBS = Collection("jobs", key="job_id", fields=["status"], indexes=[Index("status", "created_at")])
MANY = 3000
"""More matches than are sorted."""


def job(number: int) -> dict[str, object]:
    """The first thousand jobs have another status than those after them."""
    status = "NEW" if number < 1000 else ("DONE" if number % 5 else "NEW")
    return {"job_id": f"j{number:05}", "status": status}


@pytest.fixture
async def store(tmp_path: Path) -> Any:
    async with open_store(f"sqlite:{tmp_path}/s.db", collections=[JOBS]) as opened:
        await opened.create_entities("jobs", [job(number) for number in range(1000 + MANY)])
        yield opened


def expected(status: str, *, descending: bool = False) -> list[str]:
    found = [str(job(n)["job_id"]) for n in range(1000 + MANY) if job(n)["status"] == status]
    return found[::-1] if descending else found


async def ids_of(store: StorageStrategy, status: str, order: str, limit: int) -> list[str]:
    found = await store.query_entities("jobs", {"status": status}, order, limit)
    return [str(each["job_id"]) for each in found]


@pytest.mark.parametrize("status", ["NEW", "DONE"])
@pytest.mark.parametrize("limit", [1, 50, 64, 65])
async def test_the_same_rows(store: StorageStrategy, status: str, limit: int) -> None:
    """Those of "DONE" are not among the first rows of the table."""
    assert await ids_of(store, status, "job_id", limit) == expected(status)[:limit]
    backwards = expected(status, descending=True)
    assert await ids_of(store, status, "-job_id", limit) == backwards[:limit]


@pytest.mark.parametrize("order", ["job_id", "-job_id", None])
async def test_pages(store: StorageStrategy, order: str | None) -> None:
    found: list[str] = []
    cursor = None
    while True:
        page = await store.query_page("jobs", {"status": "DONE"}, order, 60, cursor=cursor)
        found += [str(each["job_id"]) for each in page.items]
        cursor = page.cursor
        if cursor is None:
            break
    assert found == expected("DONE", descending=order == "-job_id")


async def test_in_a_transaction_its_own_changes_count(store: StorageStrategy) -> None:
    async with store.begin_transaction() as tx:
        await tx.create_entity("jobs", {"job_id": "a", "status": "DONE"})
        await tx.delete_entity("jobs", expected("DONE")[0])
        found = await tx.query_entities("jobs", {"status": "DONE"}, "job_id", 3)
        assert [each["job_id"] for each in found] == ["a", *expected("DONE")[1:3]]


async def test_few_rows_are_read(store: StorageStrategy) -> None:
    statements: list[str] = []
    execute = sqlite._ClosingConnection.execute

    def noted(self: Any, sql: str, *args: Any) -> Any:
        statements.append(sql)
        return execute(self, sql, *args)

    with mock.patch.object(sqlite._ClosingConnection, "execute", noted):
        await ids_of(store, "DONE", "-job_id", 50)
    assert len(statements) == 2
    assert "OFFSET 1023" in statements[-1]
