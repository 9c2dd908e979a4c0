"""Stores are filled once; writing workloads use a copy; servers are restored."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from faulty_systems import Measure, system

from hf_async_store_bench import resource_usage
from hf_async_store_bench.dataset_cache import DatasetCache
from hf_async_store_bench.environments import Environments
from hf_async_store_bench.messages import Load
from hf_async_store_bench.settings import FULL
from hf_async_store_bench.systems import chosen, named

GET = Load(workload="get", tasks=2, entities=300)
SAVE = Load(workload="save", tasks=2, entities=300)


@pytest.mark.parametrize(
    "name",
    [
        "json",
        "sqlite",
        pytest.param("postgresql", marks=pytest.mark.long),
        "aiosqlite, a multi-row insert",
    ],
)
async def test_a_copy_is_another_store_with_the_same_machines(tmp_path: Path, name: str) -> None:
    (one,) = [each for each in chosen([name]) if each.name == name]
    adapter = one.load()
    with Environments(folder=str(tmp_path)) as environments:
        datasets = DatasetCache(environments, seed=1)
        shared = [await datasets.group(one, GET, writes=False) for _ in range(2)]
        copies = [await datasets.group(one, SAVE, writes=True) for _ in range(2)]
        assert shared[0].environment == shared[1].environment
        assert len({each.environment.folder for each in (*shared, *copies)}) == 3
        ids = [f"i-{each:017x}" for each in (0, 299)]
        opened = await adapter.open(copies[0].environment)
        assert None not in await opened.read_back(ids)
        await opened.close()
        for each in (*shared, *copies):
            datasets.give_back(each)
        assert Path(shared[0].environment.folder).exists()
        assert not Path(copies[0].environment.folder).exists()


@pytest.mark.hf_sampled(by="module")
@pytest.mark.parametrize(
    "name",
    [
        "sqlite",
        *(pytest.param(each, marks=pytest.mark.long) for each in ("postgresql", "dynamodb")),
    ],
)
async def test_engines_on_servers_are_read_and_written(measure: Measure, name: str) -> None:
    (engine,) = [each for each in chosen([name]) if each.name == name]
    results = await measure([engine], GET, SAVE, rounds=2, duration=0.1, steady=0.0)
    assert results.failures == []
    assert results.skipped == []
    saves = results.cell(name, SAVE.name)
    assert saves is not None
    # Each machine was written to a disk, a log or a server, completely or as a change.
    assert saves.written is not None
    assert saves.written > 100


@pytest.mark.hf_sampled(by="module")
@pytest.mark.parametrize(
    "name",
    ["sqlite3 batched by hand", pytest.param("asyncpg batched by hand", marks=pytest.mark.long)],
)
async def test_baselines_are_verified_after_reads(measure: Measure, name: str) -> None:
    results = await measure([named(name)], GET, rounds=1, duration=0.1, steady=0.0)
    assert results.failures == []
    cell = results.cell(name, GET.name)
    assert cell is not None
    assert cell.checked == GET.entities


def test_bytes_sent_by_a_connection_are_counted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as one:
            other, _ = server.accept()
            before = resource_usage.sent_bytes()
            one.sendall(b"x" * 50_000)
            received = 0
            while received < 50_000:
                received += len(other.recv(65_536))
            assert 50_000 <= resource_usage.sent_bytes() - before < 60_000
            other.close()


def test_sweeps_begin_with_both_ends() -> None:
    for each in FULL.series:
        assert set(each.values[:2]) == {min(each.values), max(each.values)}


@pytest.mark.long
async def test_every_workload_has_one_round_before_any_has_many(measure: Measure) -> None:
    loads = [Load(workload=each, tasks=2, entities=300) for each in ("save", "get", "mixed")]
    results = await measure(
        [system("Good")], *loads, rounds=1000, duration=0.05, steady=0.0, budget=6.0
    )
    counts = [len(cell.rounds) for cell in results.cells]
    assert len(counts) == 3
    assert min(counts) >= 1
    assert sum(counts) < 200
    assert results.seconds < 20


@pytest.mark.long
async def test_remaining_time_is_used_for_uncertain_results(measure: Measure) -> None:
    results = await measure(
        [system("Good")], SAVE, GET, rounds=2, duration=0.05, steady=0.0, budget=60.0, again=True
    )
    assert max(len(cell.rounds) for cell in results.cells) > 2
    assert max(len(cell.rounds) for cell in results.cells) <= 8


@pytest.mark.hf_sampled(by="module")
async def test_a_competitor_that_loses_writes_is_skipped_and_reported(measure: Measure) -> None:
    losing = system("Losing", role="competitor")
    results = await measure([system("Good"), losing], SAVE, rounds=2, steady=0.0)
    assert results.failures == []
    assert results.cell("Losing", SAVE.name) is None
    assert "acknowledged" in next(each.why for each in results.skipped)


def test_workloads_without_durability_configure_the_engines(tmp_path: Path) -> None:
    for durable, said in ((False, "synchronous=NORMAL"), (True, "store.sqlite")):
        with Environments(durable=durable, folder=str(tmp_path)) as environments:
            (sqlite,) = [each for each in chosen(["sqlite"]) if each.name == "sqlite"]
            assert environments.make(sqlite).url.endswith(said)
