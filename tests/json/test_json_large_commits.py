"""Commits that replace a section: built in chunks, visible atomically."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from hf_async_store import JSONStorageStrategy, in_
from hf_async_store.driver import Reader
from hf_async_store.errors import DiskFullError
from hf_async_store.query import build_query
from hf_async_store.schema import Schema
from hf_async_store.strategies.json import journal, journal_writer
from hf_async_store.strategies.json.serializer import CHUNK_BYTES
from hf_async_store.values import Key
from tests.json.support import (
    LAYOUTS,
    abandon,
    never_folds,
    open_json,
    reopened,
    whole,
    without_times,
)

pytestmark = pytest.mark.hf_sampled

COUNT: Final = 6000
"""More entities than are ever applied one by one."""

Whole = dict[str, dict[str, dict[str, Any]]]


def machines(status: str, numbers: range) -> dict[str, dict[str, Any]]:
    return {
        f"m{each:05}": {"machine_id": f"m{each:05}", "status": status, "name": f"n{each % 7}"}
        for each in numbers
    }


OLD: Final[Whole] = {
    "templates": {"t-1": {"template_id": "t-1", "name": "old"}},
    "requests": {},
    "machines": machines("OLD", range(COUNT)),
}
NEW: Final[Whole] = {
    "templates": {"t-1": {"template_id": "t-1", "name": "new"}},
    "requests": {"r-1": {"request_id": "r-1", "status": "NEW"}},
    "machines": machines("NEW", range(10, COUNT + 10)),
}


def plain(found: Any) -> Any:
    return {
        name: {
            each: {key: value for key, value in entity.items() if key != "version"}
            for each, entity in entities.items()
        }
        for name, entities in without_times(found).items()
    }


async def made(folder: Path, layout: str = "single_file") -> JSONStorageStrategy:
    store = await open_json(folder, layout).open()
    await store.write_file(OLD)
    return store


@asynccontextmanager
async def used(folder: Path, layout: str = "single_file") -> AsyncIterator[JSONStorageStrategy]:
    store = await made(folder, layout)
    try:
        yield store
    finally:
        await store.close()


async def seen(reader: Reader, schema: Schema, **query: Any) -> list[dict[str, Any]]:
    built = build_query(schema["machines"], **query)
    return [each.entity async for each in reader.select(built)]


async def check_snapshot(reader: Reader, store: JSONStorageStrategy, wanted: Whole) -> None:
    """Check that all reads of a snapshot return the expected contents."""
    schema = store.collections
    machines = wanted["machines"]
    ids = [f"m{each:05}" for each in range(0, COUNT + 10, 5)]
    records = await reader.fetch([Key("machines", each) for each in ids])
    for each, record in zip(ids, records, strict=True):
        status = None if record is None else record.entity["status"]
        assert status == machines.get(each, {}).get("status")
    found = await seen(reader, schema)
    assert [each["machine_id"] for each in found] == sorted(machines)
    assert all(each["status"] == machines[each["machine_id"]]["status"] for each in found)
    found = await seen(reader, schema, order_by=["name", "-status"])
    rows = sorted(machines.values(), key=lambda each: each["machine_id"], reverse=True)
    rows.sort(key=lambda each: each["name"])
    if len({each["status"] for each in rows}) == 1:
        assert [each["machine_id"] for each in found] == [each["machine_id"] for each in rows]
    assert await reader.count(build_query(schema["machines"])) == len(machines)
    statuses = [each["status"] for each in machines.values()]
    old = build_query(schema["machines"], filters={"status": "OLD"})
    assert await reader.count(old) == statuses.count("OLD")


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_a_snapshot_shows_the_old_state_through_write_file(
    layout: str, tmp_path: Path
) -> None:
    async with used(tmp_path, layout) as store, store.snapshot() as first:
        await store.save_entity("machines", {"machine_id": "m00005", "status": "ONE"})
        await store.delete_entity("machines", "m00007")
        between: Whole = {**OLD, "machines": {**OLD["machines"]}}
        between["machines"]["m00005"] = {"machine_id": "m00005", "status": "ONE", "name": "n5"}
        del between["machines"]["m00007"]
        await store.save_entity("machines", between["machines"]["m00005"])
        async with store.snapshot() as second:
            await store.write_file(NEW)
            async with store.snapshot() as third:
                await check_snapshot(first, store, OLD)
                await check_snapshot(second, store, between)
                await check_snapshot(third, store, NEW)
                await store.save_entity("machines", {"machine_id": "m00011", "status": "TWO"})
                await store.delete_entity("machines", "m00012")
                await store.write_file(OLD)
                await check_snapshot(first, store, OLD)
                await check_snapshot(second, store, between)
                await check_snapshot(third, store, NEW)
        await check_snapshot(first, store, OLD)
        assert plain(await whole(store)) == OLD


async def test_a_snapshot_that_is_read_during_write_file(tmp_path: Path) -> None:
    async with used(tmp_path) as store, store.snapshot() as reader:
        await check_snapshot(reader, store, OLD)  # builds the indexes
        looks = writes = 0
        while looks == writes:  # each first look may have ended before the write began
            writing = asyncio.create_task(store.write_file(OLD if writes % 2 else NEW))
            writes += 1
            while not writing.done():
                await check_snapshot(reader, store, OLD)
                looks += 1
            await writing
            assert writes < 20
        await check_snapshot(reader, store, OLD)


async def test_a_closed_snapshot_releases_its_data(tmp_path: Path) -> None:
    async with used(tmp_path) as store:
        section = (await store._json.follower.current()).sections["machines"]
        async with store.snapshot():
            await store.write_file(NEW)
        assert not section._moments
        assert not section.garbage


async def test_queries_see_a_large_commit_atomically(tmp_path: Path) -> None:
    """Queries by a scan, by an index that is built meanwhile, and by two indexes at once."""
    async with used(tmp_path) as store:

        async def look() -> int:
            looks = 0
            while not done.is_set():
                found = await store.query_entities("machines")
                assert len({each["status"] for each in found}) == 1
                counts = [
                    await store.count_entities("machines", {"status": each})
                    for each in ("OLD", "NEW")
                ]
                assert set(counts) <= {0, COUNT}
                both = {"status": in_(["OLD", "NEW"]), "request_id": None}
                found = await store.query_entities("machines", {**both})
                assert found == []
                looks += 1
            return looks

        done = asyncio.Event()
        looking = [asyncio.create_task(look()) for _ in range(2)]
        for wanted in (NEW, OLD, NEW, OLD):
            await store.write_file(wanted)
        done.set()
        assert min(await asyncio.gather(*looking)) > 1
        assert await store.count_entities("machines", {"status": "OLD"}) == COUNT
        assert plain(await whole(store)) == OLD


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_other_processes_follow_a_large_commit(layout: str, tmp_path: Path) -> None:
    store = await made(tmp_path, layout)
    other = await open_json(tmp_path, layout).open()
    assert plain(await whole(other)) == OLD
    await store.write_file(NEW)
    assert plain(await whole(other)) == NEW
    assert await other.count_entities("machines", {"status": "NEW"}) == COUNT
    await abandon(store)
    await abandon(other)
    assert plain(await reopened(tmp_path, layout)) == NEW


async def test_large_journals_are_read_in_chunks_in_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Except for the head of each journal, by which a follower knows whether it may continue."""
    large = {each: {**entity, "name": "n" * 1000} for each, entity in NEW["machines"].items()}
    reads: list[tuple[str, int]] = []
    real = os.pread

    def pread(fd: int, size: int, offset: int) -> bytes:
        found = real(fd, size, offset)
        reads.append((threading.current_thread().name, len(found)))
        return found

    store = await made(tmp_path)
    other = await open_json(tmp_path).open()
    assert plain(await whole(other)) == OLD
    for wanted in (OLD, {**NEW, "machines": large}):
        async with store._json.writing() as state:
            await store._json.journal.start_generation(state)
        await store.write_file(wanted)
    monkeypatch.setattr(os, "pread", pread)
    assert (await other.get_entity("machines", "m00010") or {})["name"] == "n" * 1000
    assert max(size for _, size in reads) <= CHUNK_BYTES < sum(size for _, size in reads) // 8
    on_the_loop = sum(size for name, size in reads if name == threading.main_thread().name)
    assert on_the_loop < 2 * CHUNK_BYTES
    assert plain(await whole(other)) == {**NEW, "machines": large}
    await abandon(other)
    await abandon(store)


async def test_a_record_on_one_line_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record in the format of an earlier version."""

    def on_one_line(images: journal.Images) -> list[bytes]:
        return [b"".join(journal.commit_payload(images)).replace(b"\n", b"")]

    store = await open_json(tmp_path).open()
    never_folds(
        store
    )  # after a compaction the journal has headers, in which a byte can be a newline
    await store.write_file(OLD)
    monkeypatch.setattr(journal_writer, "commit_payload", on_one_line)
    await store.write_file(NEW)
    await abandon(store)
    assert b"\n" not in sorted(tmp_path.glob("*.journal.*"))[-1].read_bytes()[-100_000:]
    assert plain(await reopened(tmp_path)) == NEW


async def test_a_large_commit_that_fails_is_not_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = 0

    def full(fd: int, data: bytes, offset: int) -> None:
        nonlocal pieces
        pieces += 1
        if pieces == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_all(fd, data, offset)

    write_all = journal_writer.write_all
    store = await made(tmp_path)
    monkeypatch.setattr(journal_writer, "write_all", full)
    monkeypatch.setattr(journal_writer, "_LARGE_RECORD", 1 << 16)
    with pytest.raises(DiskFullError):
        await store.write_file(NEW)
    assert pieces == 3
    assert plain(await whole(store)) == OLD
    await store.save_entity("templates", {"template_id": "t-1", "name": "again"})
    await abandon(store)
    found = plain(await reopened(tmp_path))
    assert found.pop("templates") == {"t-1": {"template_id": "t-1", "name": "again"}}
    assert found == {name: OLD[name] for name in found}


@pytest.mark.parametrize("share", [0.1, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99])
async def test_a_cancelled_large_commit_is_applied_completely_or_not(
    share: float, tmp_path: Path
) -> None:
    store = await made(tmp_path)
    turns = 0
    for number in range(2):
        writing = asyncio.create_task(store.write_file(NEW if number else OLD | {"requests": {}}))
        limit = int(turns * share) if number else 1 << 30
        count = 0
        while not writing.done() and count < limit:
            await asyncio.sleep(0)
            count += 1
        turns = count
        writing.cancel()
        await asyncio.wait([writing])
        if not number:
            await store.write_file({**OLD, "machines": machines("ELSE", range(COUNT))})
            await store.write_file(OLD)
    found = plain(await whole(store))
    assert found in (OLD, NEW)
    await store.save_entity("templates", {"template_id": "t-2"})
    await abandon(store)
    again = plain(await reopened(tmp_path))
    del again["templates"]["t-2"]
    assert again == found


async def test_a_commit_is_freed_without_the_garbage_collector(tmp_path: Path) -> None:
    """The data of an append may be large, and a collection may be far away."""
    async with open_json(tmp_path) as store:
        await store.save_entity("templates", {"template_id": "t-1"})
        gc.collect()
        gc.disable()
        try:
            await store.save_entity("templates", {"template_id": "t-2"})
            async with asyncio.timeout(5):
                while any(type(each) is journal_writer._AppendJob for each in gc.get_objects()):
                    await asyncio.sleep(0.001)  # the thread may not have released it yet
        finally:
            gc.enable()
