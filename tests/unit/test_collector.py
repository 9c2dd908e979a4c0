"""While a call gathers, or a transaction or the memory engine keeps, many entities, none of them starts a
full collection."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_async_store
from hf_async_store import collector
from hf_async_store.strategies.dynamodb.write_cache import WriteReceipt

PROGRAM = """
import asyncio, gc
import hf_async_store

COLLECTION = hf_async_store.Collection("jobs", key="job_id", open=True)

def jobs():
    return [{"job_id": f"j{each:05}", "tags": {"owners": ["somebody"]}} for each in range(30_000)]

async def full_collections(call):
    gc.collect()
    before = gc.get_stats()[2]["collections"]
    result = await call
    return gc.get_stats()[2]["collections"] - before, len(result)

async def main():
    async with hf_async_store.open_store("URL", collections=[COLLECTION]) as store:
        kept = jobs()
        await store.save_entities("jobs", kept)
        if WRITES:
            await write(store, kept)
        ids = [each["job_id"] for each in kept]
        await read(store, ids)
        async with store.begin_transaction() as tx:
            await read(tx, ids)
        if hasattr(store, "read_file"):
            print(await full_collections(decoded(store)))

async def write(store, kept):
    print(await full_collections(store.save_entities("jobs", kept)))
    print(await full_collections(saved_in_parts(store, kept)))
    async with store.begin_transaction() as tx:
        print(await full_collections(saved_in_parts(tx, kept)))

async def saved_in_parts(store, kept):
    starts = range(0, len(kept), 500)
    return [n for i in starts for n in await store.save_entities("jobs", kept[i : i + 500])]

async def read(store, ids):
    print(await full_collections(store.query_entities("jobs")))
    print(await full_collections(store.get_entities("jobs", ids)))

async def decoded(store):
    return (await store.read_file())["jobs"]

BEFORE
asyncio.run(main())
print(gc.get_freeze_count() > 0)
"""


def output_of(url: str, before: str = "", *, writes: bool = False) -> list[str]:
    program = PROGRAM.replace("URL", url).replace("BEFORE", before).replace("WRITES", str(writes))
    package = Path(hf_async_store.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(package)}
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    ).stdout.splitlines()


def test_calls_of_the_memory_engine() -> None:
    assert output_of("memory:", writes=True) == ["(0, 30000)"] * 7 + ["False"]


def test_results_of_the_json_engine(tmp_path: Path) -> None:
    assert output_of(f"json:{tmp_path}/db.json") == ["(0, 30000)"] * 5 + ["False"]


def test_what_a_program_has_frozen_stays_frozen() -> None:
    assert output_of("memory:", "gc.freeze()")[-1] == "True"


def test_what_is_frozen_is_counted_once_between_full_collections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counting takes 35 ms if three million objects are frozen."""
    counted, full = 0, [0]

    def freeze_count() -> int:
        nonlocal counted
        counted += 1
        return 3_000_000

    def not_called() -> None:
        raise AssertionError("what the program has frozen would be moved")

    monkeypatch.setattr(collector, "_exemptions", collector._Exemptions())
    monkeypatch.setattr(gc, "get_freeze_count", freeze_count)
    monkeypatch.setattr(gc, "freeze", not_called)
    monkeypatch.setattr(gc, "unfreeze", not_called)
    monkeypatch.setattr(gc, "get_stats", lambda: [{}, {}, {"collections": full[0]}])
    for full[0] in range(2):
        gathered = collector.GatheredObjects()
        for _ in range(10):
            gathered.add(2_000)
    assert counted == 2
    for full[0] in range(2, 500):  # then ever more rarely: each time, the event loop is held
        gathered.add(2_000)
    assert counted == 4


def test_what_is_no_longer_frozen_is_moved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen, moved, full = 1000, 0, [0]

    def freeze() -> None:
        nonlocal moved
        moved += 1

    monkeypatch.setattr(collector, "_exemptions", collector._Exemptions())
    monkeypatch.setattr(gc, "get_freeze_count", lambda: frozen)
    monkeypatch.setattr(gc, "freeze", freeze)
    monkeypatch.setattr(gc, "unfreeze", lambda: None)
    monkeypatch.setattr(gc, "get_stats", lambda: [{}, {}, {"collections": full[0]}])
    gathered = collector.GatheredObjects()
    for full[0] in range(20):
        gathered.add(2_000)
    assert moved == 0
    frozen = 0
    for full[0] in range(20, 100):
        gathered.add(2_000)
    assert moved > 20


def test_the_last_writes_on_dynamodb_are_not_traversed() -> None:
    assert not gc.is_tracked(WriteReceipt(1, "token", 100))
