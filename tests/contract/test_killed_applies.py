"""Case 97: `apply_schema` in a process that is killed at any step is completed by two others."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import signal
import sys
from typing import TYPE_CHECKING, Final

import pytest

from hf_async_store import gte, open_store, path
from hf_async_store.testing.declarations import check_answers
from hf_async_store.testing.repetitions import sampled
from hf_async_store.testing.rollout_programs import NEW, OLD
from hf_async_store.values import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hf_async_store_bench.servers import DynamoDBServer, PostgresServer

pytestmark = pytest.mark.hf_sampled(by="module")

COUNT: Final = 30


async def filled(url: str) -> str:
    async with open_store(url, collections=OLD) as store:
        jobs = [
            {"job_id": f"j{n:02}", "owner": f"o{n % 2}", "size": n, "due_at": "2026-01-05"}
            for n in range(COUNT)
        ]
        await store.save_entities("jobs", jobs)
    return url


async def run_apply(url: str, step: int = 0) -> int | None:
    """The steps that it took, or None if it was killed before this one."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.contract.apply_killer", url, str(step)),
        stdout=asyncio.subprocess.PIPE,
    )
    said, _ = await process.communicate()
    assert process.returncode in (0, -signal.SIGKILL)
    return int(said) if process.returncode == 0 else None


async def check_unfinished(url: str, number: int) -> None:
    """Old and new programs give right answers, and write."""
    for collections in (NEW, OLD):
        async with open_store(url, collections=collections) as store:
            await store.update_entity("jobs", "j00", {"hits": number, "size": 50})
            found = await store.query_entities("jobs", {path("size"): gte(25)}, "-owner")
            assert {each["size"] for each in found} == {50, *range(25, COUNT)}


async def check_complete(url: str) -> None:
    async with open_store(url, collections=NEW) as store:
        assert await store.schema_changes() == []
        await check_answers(store, NEW[0])
        jobs = await store.query_entities("jobs", order_by="job_id")
        assert {each["due_at"] for each in jobs} == {"2026-01-05T00:00:00.000000Z"}
        assert [each["size"] for each in jobs] == [50, *range(1, COUNT)]
        assert {each[VERSION] for each in jobs[1:]} == {2}, "each was rewritten once"


async def sweep(fresh: Callable[[], str]) -> None:
    """Kill a process at every step, each on a store of its own; at a random one unless the run is full."""
    total = await run_apply(await asyncio.to_thread(fresh))
    assert total is not None
    assert total > 5
    for step in sampled(range(1, total + 1), one_in=total):
        url = await asyncio.to_thread(fresh)
        # Its number of steps may differ a little, for example by a file that is removed at the end.
        if await run_apply(url, step) is not None:
            assert step > total * 0.8
        await check_unfinished(url, step)
        assert None not in await asyncio.gather(run_apply(url), run_apply(url))
        await check_complete(url)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["db.json", "folder", "store.db"])
async def test_97_a_killed_apply_on_files(tmp_path: Path, name: str) -> None:
    engine = "sqlite" if name == "store.db" else "json"
    await filled(f"{engine}:{tmp_path}/first/{name}")

    def fresh() -> str:
        folder = tmp_path / secrets.token_hex(4)
        shutil.copytree(tmp_path / "first", folder)
        return f"{engine}:{folder}/{name}"

    await sweep(fresh)


@pytest.mark.timeout(3600)
async def test_97_a_killed_apply_on_postgresql(postgres_server: PostgresServer) -> None:
    first = await filled(postgres_server.database())
    await sweep(lambda: postgres_server.copy(first))


@pytest.mark.timeout(3600)
async def test_97_a_killed_apply_on_dynamodb(dynamodb_server: DynamoDBServer) -> None:
    def fresh() -> str:
        prefix = f"t{secrets.token_hex(6)}"
        url = f"dynamodb://us-east-1/{prefix}?endpoint_url={dynamodb_server.endpoint_url}"
        return asyncio.run(filled(url))

    await sweep(fresh)
