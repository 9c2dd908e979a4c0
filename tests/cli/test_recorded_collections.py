"""Case 129: commands see what all applications of a store have declared, without being told."""

from __future__ import annotations

import asyncio
import secrets
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from hf_async_store import Collection, Field, Index, open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from command import Cli

    from hf_async_store_bench.servers import DynamoDBServer, PostgresServer

SHOP: Final = [
    Collection(
        "jobs",
        key="job_id",
        fields=["owner", Field("size", "integer")],
        indexes=["owner", Index("owner", "size")],
    )
]
LAB: Final = [
    Collection("jobs", key="job_id", fields=[Field("due_at", "timestamp")], indexes=["due_at"]),
    Collection(
        "samples",
        key="sample_id",
        fields=[Field("job_id", references="jobs"), Field("mass", "number")],
        indexes=["mass"],
    ),
]
CONTENT: Final = {"jobs": 35, "samples": 20}

ENGINES: Final = ("json", "folder", "sqlite", "postgresql", "dynamodb", "json")
"""Each is the source of a migration to the next one."""


@pytest.fixture
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Returns the URL of an empty store of an engine."""
    databases: list[str] = []

    def make(engine: str) -> str:
        name = f"t{secrets.token_hex(6)}"
        if engine == "postgresql":
            server: PostgresServer = request.getfixturevalue("postgres_server")
            databases.append(server.database())
            return databases[-1]
        if engine == "dynamodb":
            service: DynamoDBServer = request.getfixturevalue("dynamodb_server")
            return f"dynamodb://us-east-1/{name}?endpoint_url={service.endpoint_url}"
        paths = {"json": "json:{}.json", "folder": "json:{}", "sqlite": "sqlite:{}.db"}
        return paths[engine].format(tmp_path / name)

    yield make
    for each in databases:
        request.getfixturevalue("postgres_server").drop(each)


async def _two_applications(url: str) -> None:
    """Both are open at the same time, and write in turns."""
    async with open_store(url, collections=SHOP) as shop, open_store(url, collections=LAB) as lab:
        for number in range(30):
            job = {"job_id": f"j{number:02}", "owner": f"o{number % 3}", "size": number}
            await shop.save_entity("jobs", job)
            if number < CONTENT["samples"]:
                sample = {"sample_id": f"s{number:02}", "job_id": f"j{number:02}", "mass": 0.5}
                await lab.save_entity("samples", {**sample, "note": [number]})
        jobs = [{"job_id": f"k{number}", "due_at": "2026-01-05"} for number in range(5)]
        await lab.save_entities("jobs", jobs)
        await lab.update_entity("jobs", "j00", {"due_at": "2026-02-03", "note": "urgent"})


async def _entities(url: str) -> dict[str, Any]:
    """Everything that the store remembers, and has."""
    async with open_store(url, collections=LAB) as lab:
        recorded = await lab.recorded_collections()
    async with open_store(url, collections=recorded) as store:
        found: dict[str, Any] = {}
        for each in recorded:
            found[each.name] = await store.query_entities(each.name, order_by=each.key)
            found[f"declaration of {each.name}"] = (
                {name: repr(field) for name, field in sorted(each.fields.items())},
                sorted(index.name for index in each.indexes),
            )
        return found


def _check(cli: Cli, url: str) -> None:
    for name, number in CONTENT.items():
        assert cli("count", name, "--store", url).out == f"{number}\n"
    rows = cli(
        "query", "samples", "mass=0.5", "--order", "-sample_id", "--json", "--store", url
    ).rows
    assert [each["note"] for each in rows] == [[each] for each in reversed(range(20))]
    rows = cli("query", "jobs", "owner=o1", "size:gt=20", "--json", "--store", url).rows
    assert {each["job_id"] for each in rows} == {"j22", "j25", "j28"}
    rows = cli("query", "jobs", "due_at=2026-02-03", "--json", "--store", url).rows
    assert [(each["job_id"], each["note"]) for each in rows] == [("j00", "urgent")]
    ran = cli("query", "templates", "--store", url)
    assert ran.code == 2
    assert "declared are: jobs, samples" in ran.message


@pytest.mark.hf_sampled
@pytest.mark.parametrize(("source", "target"), list(pairwise(ENGINES)))
def test_129_all_applications_of_a_store(
    cli: Cli, new_url: Callable[[str], str], tmp_path: Path, source: str, target: str
) -> None:
    url, moved, restored = new_url(source), new_url(target), new_url(source)
    asyncio.run(_two_applications(url))
    _check(cli, url)
    before = asyncio.run(_entities(url))
    assert set(before) >= set(CONTENT)

    backup = str(tmp_path / "backup.jsonl.gz")
    assert cli("backup", backup, "--store", url).code == 0
    assert cli("verify", backup).code == 0
    assert cli("restore", backup, "--store", restored).code == 0
    _check(cli, restored)
    assert asyncio.run(_entities(restored)) == before

    assert cli("migrate", "--from", url, "--to", moved, "--no-backup").code == 0
    assert cli("verify", "--from", url, "--to", moved).code == 0
    _check(cli, moved)
    assert asyncio.run(_entities(moved)) == before
    # The applications go on, each with its own declaration; what one of them writes is noticed.
    asyncio.run(_write_more(moved))
    ran = cli("verify", "--from", url, "--to", moved)
    assert ran.code != 0
    assert "s99" in ran.out + ran.err


async def _write_more(url: str) -> None:
    async with open_store(url, collections=LAB) as lab, open_store(url, collections=SHOP) as shop:
        await lab.save_entity("samples", {"sample_id": "s99", "job_id": "k0"})
        assert await shop.count_entities("jobs", {"owner": "o1"}) == 10


@pytest.mark.parametrize("engine", ENGINES[:-1])
def test_init_records_the_collections_that_are_named(
    cli: Cli, engine: str, new_url: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new_url(engine)
    Path("declared_for_init.py").write_text(
        "from hf_async_store import Collection\n"
        "ALL = [Collection('jobs', key='job_id', fields=['owner'])]\n"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    for _ in range(2):
        assert cli("init", "--collections", "declared_for_init:ALL", "--store", store).code == 0
    assert cli("put", "jobs", '{"job_id": "j"}', "--store", store).code == 0
    assert cli("count", "jobs", "--store", store).out == "1\n"
    assert "no collection 'machines'" in cli("count", "machines", "--store", store).message
