"""A field that is declared after entities with it were stored, and one that is no longer declared."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any, Final

import pytest

from hf_async_store import Collection, Field, Index, exists, gt, open_store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hf_async_store_bench.servers import DynamoDBServer, PostgresServer

BEFORE: Final = [Collection("jobs", key="job_id", fields=["owner"])]
AFTER: Final = [
    Collection(
        "jobs",
        key="job_id",
        fields=["owner", Field("size", "integer"), Field("due_at", "timestamp")],
        indexes=["owner", Index("owner", "due_at")],
    )
]
COUNT: Final = 50


def job(number: int) -> dict[str, Any]:
    return {
        "job_id": f"j{number:02}",
        "owner": f"o{number % 3}",
        "size": number,
        "due_at": f"2026-01-{number % 28 + 1:02}T00:00:00.000000Z",
    }


@pytest.fixture(params=["json-single", "json-split", "sqlite", "postgresql", "dynamodb"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres_server")
        database = server.database()
        yield database
        server.drop(database)
    elif request.param == "dynamodb":
        servers: DynamoDBServer = request.getfixturevalue("dynamodb_server")
        prefix = f"t{secrets.token_hex(6)}"
        yield f"dynamodb://eu-west-1/{prefix}?endpoint_url={servers.endpoint_url}"
    else:
        paths = {"json-single": "json:{}/store.json", "json-split": "json:{}/store"}
        yield paths.get(request.param, "sqlite:{}/store.db").format(tmp_path)


async def filled(url: str) -> None:
    async with open_store(url, collections=BEFORE) as store:
        await store.save_entities("jobs", [job(each) for each in range(COUNT)])


async def test_a_later_declared_field_is_filtered_by_its_stored_values(url: str) -> None:
    await filled(url)
    async with open_store(url, collections=AFTER) as store:
        await store.save_entity("jobs", job(COUNT))
        found = await store.query_entities("jobs", {"size": gt(3)})
        assert sorted(each["size"] for each in found) == list(range(4, COUNT + 1))
        assert await store.count_entities("jobs", {"due_at": exists()}) == COUNT + 1


async def test_a_later_declared_field_is_ordered_by_its_stored_values(
    url: str,
) -> None:
    await filled(url)
    wanted = sorted(
        (job(each) for each in range(COUNT + 3) if each % 3 == 1),
        key=lambda each: (each["due_at"], each["job_id"]),
    )
    async with open_store(url, collections=AFTER) as store:
        await store.save_entities("jobs", [job(COUNT + each) for each in range(3)])
        found = await store.query_entities("jobs", {"owner": "o1"}, order_by="due_at", limit=8)
        assert [each["job_id"] for each in found] == [each["job_id"] for each in wanted[:8]]


async def test_a_later_declared_field_can_be_updated(
    url: str,
) -> None:
    await filled(url)
    async with open_store(url, collections=AFTER) as store:
        await store.update_entity("jobs", "j01", {"size": 77})
        found = await store.get_entity("jobs", "j01")
        assert found is not None
        assert (found["size"], found["due_at"]) == (77, job(1)["due_at"])


async def test_a_field_that_is_no_longer_declared_is_kept(
    url: str,
) -> None:
    async with open_store(url, collections=AFTER) as store:
        await store.save_entities("jobs", [job(each) for each in range(3)])
    async with open_store(url, collections=BEFORE) as store:
        await store.update_entity("jobs", "j02", {"owner": "somebody"})
        found = await store.get_entity("jobs", "j02")
        assert found is not None
        assert {"size": found.get("size"), "owner": found["owner"]} == {
            "size": 2,
            "owner": "somebody",
        }
