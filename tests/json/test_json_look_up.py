"""The first reads of a process find their entities in the data files, which are not parsed."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hf_async_store import Collection, CorruptionError, Field
from hf_async_store.strategies.json import recovery
from hf_async_store.strategies.json.journal import Kind, record, scan
from tests.json.layouts import both_layouts
from tests.json.support import SINGLE, abandon, never_folds, open_json

if TYPE_CHECKING:
    from hf_async_store import JSONStorageStrategy

T = "templates"
M = "machines"
IDS = ["a", "aa", 'a"', "é\n", '"a":', "machines", "templates", "b"]
"""Ids that are contained in one another, need escapes, or have the name of a section."""


async def fill(folder: Path, layout: str, **settings: Any) -> None:
    async with open_json(folder, layout, update_files="at close", **settings) as store:
        for name, key in ((T, "template_id"), (M, "machine_id")):
            rows = [{key: each, "name": f"{name} {each}", "note": f'\n"{each}":{{'} for each in IDS]
            await store.save_entities(name, rows)


def refuse_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(*_: object, **__: object) -> None:
        raise AssertionError("a data file was parsed")

    monkeypatch.setattr(recovery.StoreLoader, "_parse_file", parse)


def is_loaded(store: JSONStorageStrategy) -> bool:
    return store._json.follower.state is not None


@both_layouts
@pytest.mark.parametrize("compressed", [False, True])
async def test_entities_are_found_without_parsing(
    tmp_path: Path, layout: str, compressed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(tmp_path, layout, enable_compression=compressed)
    refuse_parsing(monkeypatch)
    for each in IDS:
        async with open_json(tmp_path, layout, enable_compression=compressed) as store:
            for name in (T, M):
                [found] = await store.get_entities(name, [each])
                assert found is not None
                assert (found["name"], found["version"]) == (f"{name} {each}", 1)
            assert not is_loaded(store)
    async with open_json(tmp_path, layout, enable_compression=compressed) as store:
        assert await store.get_entities("requests", ["r-1"]) == [None]


@both_layouts
async def test_later_reads_and_writes_see_everything(tmp_path: Path, layout: str) -> None:
    await fill(tmp_path, layout)
    async with open_json(tmp_path, layout) as store:
        assert await store.get_entity(T, "a") is not None
        assert not is_loaded(store)
        assert await store.count_entities(T) == len(IDS)
        assert await store.save_entity(T, {"template_id": "a"}) == 2
    async with open_json(tmp_path, layout) as store:
        many = await asyncio.gather(*(store.get_entity(M, each) for each in IDS))
        assert [each["machine_id"] for each in many if each] == IDS
        assert await store.get_entities(T, ["a", "missing"]) != [None, None]
        assert is_loaded(store)


@both_layouts
async def test_an_entity_that_is_missing_is_looked_for_by_parsing(
    tmp_path: Path, layout: str
) -> None:
    await fill(tmp_path, layout)
    async with open_json(tmp_path, layout) as store:
        assert await store.get_entities(T, ["missing"]) == [None]
        assert is_loaded(store)


@both_layouts
async def test_commits_in_the_journal_are_found_without_parsing(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(tmp_path, layout)
    writer = await open_json(tmp_path, layout).open()
    await writer.save_entity(T, {"template_id": "a", "name": "changed"})
    await writer.save_entity(T, {"template_id": "a", "name": "changed again"})
    await writer.delete_entity(T, "b")
    await writer.delete_entity(T, 'a"')
    await writer.create_entity(T, {"template_id": 'a"', "name": "new"})
    with monkeypatch.context() as patch:
        refuse_parsing(patch)
        async with open_json(tmp_path, layout) as store:
            changed, deleted, recreated, same = await store.get_entities(T, ["a", "b", 'a"', "aa"])
            assert changed is not None
            assert recreated is not None
            assert same is not None
            assert (changed["name"], changed["version"], deleted) == ("changed again", 3, None)
            assert (recreated["name"], recreated["version"]) == ("new", 1)
            assert (same["name"], same["version"]) == (f"{T} aa", 1)
            assert not is_loaded(store)
    await abandon(writer)


@both_layouts
@pytest.mark.parametrize("feed", [False, True])
async def test_commits_of_several_collections_are_found_without_parsing(
    tmp_path: Path, layout: str, feed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = timedelta(hours=1) if feed else None
    jobs = [Collection(each, key="id", feed=kept) for each in ("jobs", "tasks", "steps")]
    async with open_json(tmp_path, layout, collections=jobs, update_files="at close") as store:
        await store.save_entities("tasks", [{"id": each} for each in IDS])
    writer = await open_json(tmp_path, layout, collections=jobs).open()
    never_folds(writer)
    async with writer.begin_transaction() as tx:
        for each in ("jobs", "tasks"):
            await tx.save_entities(each, [{"id": i, "name": f"{each} {i}"} for i in IDS])
    async with writer.begin_transaction() as tx:
        await tx.save_entities("jobs", [{"id": i, "note": "x" * 9000} for i in IDS])
        await tx.delete_entities("tasks", ["a", "b"])
    refuse_parsing(monkeypatch)
    for each in IDS:
        async with open_json(tmp_path, layout, collections=jobs) as store:
            assert (job := await store.get_entity("jobs", each)) is not None
            task = await store.get_entity("tasks", each)
            assert (job["version"], job["note"]) == (2, "x" * 9000)
            assert (task and task["name"]) == (None if each in ("a", "b") else f"tasks {each}")
            assert not is_loaded(store)
    async with open_json(tmp_path, layout, collections=jobs) as store:
        assert await store.get_entity("steps", "a") is None
        assert not is_loaded(store)
    await abandon(writer)


@both_layouts
async def test_a_commit_in_another_layout_is_parsed(tmp_path: Path, layout: str) -> None:
    await fill(tmp_path, layout)
    writer = await open_json(tmp_path, layout).open()
    await writer.save_entity(T, {"template_id": "b", "name": "changed"})
    await abandon(writer)
    [journal] = tmp_path.glob("*.journal.*")
    payload = b'{"templates": {"a": {"version":7,"template_id":"a","name":"of another program"}}}'
    data = journal.read_bytes()
    records = len(list(scan([data], journal.name, 0, 0)))
    journal.write_bytes(data + record(Kind.COMMIT, payload, records))
    async with open_json(tmp_path, layout) as store:
        found, changed = await store.get_entities(T, ["a", "b"])
        assert found is not None
        assert changed is not None
        assert (found["version"], changed["name"]) == (7, "changed")
        assert is_loaded(store)


@both_layouts
async def test_closing_after_a_lookup_does_not_parse_what_is_not_compacted(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = [{"template_id": f"t-{each}", "note": "x" * 100_000} for each in range(12)]
    async with open_json(tmp_path, layout, update_files="at close") as store:
        await store.save_entities(T, large)
    writer = await open_json(tmp_path, layout).open()
    await writer.save_entity(T, {"template_id": "t-0", "name": "changed"})
    await abandon(writer)
    files = {each: each.read_bytes() for each in tmp_path.glob("*.json")}
    with monkeypatch.context() as patch:
        refuse_parsing(patch)
        async with open_json(tmp_path, layout) as store:
            assert (found := await store.get_entity(T, "t-0")) is not None
            assert found["name"] == "changed"
    assert {each: each.read_bytes() for each in files} == files
    # With more in the journal than a quarter of the files, it is compacted.
    writer = await open_json(tmp_path, layout).open()
    never_folds(writer)
    await writer.save_entities(T, large[:4])
    await abandon(writer)
    async with open_json(tmp_path, layout) as store:
        assert await store.get_entity(T, "t-0") is not None
        assert not is_loaded(store)
    assert {each: each.read_bytes() for each in files} != files


@both_layouts
async def test_commits_of_a_process_that_was_killed_are_compacted_after_a_lookup(
    tmp_path: Path, layout: str
) -> None:
    await fill(tmp_path, layout)
    writer = await open_json(tmp_path, layout).open()
    await writer.save_entity(T, {"template_id": "a", "name": "changed"})
    await abandon(writer)
    async with open_json(tmp_path, layout) as store:
        assert (found := await store.get_entity(T, "a")) is not None
        assert found["name"] == "changed"
        assert not is_loaded(store)
    name = SINGLE if layout == "single_file" else "templates.json"
    assert b"changed" in (tmp_path / name).read_bytes()


@both_layouts
async def test_a_commit_after_a_lookup_is_read_and_compacted_at_close(
    tmp_path: Path, layout: str
) -> None:
    await fill(tmp_path, layout)
    reader = await open_json(tmp_path, layout).open()
    assert await reader.get_entity(T, "a") is not None
    assert not is_loaded(reader)
    # The writer is not the last that closes the store, so it does not write the data files.
    async with open_json(tmp_path, layout) as writer:
        await writer.save_entity(T, {"template_id": "a", "name": "changed"})
    name = SINGLE if layout == "single_file" else "templates.json"
    assert b"changed" not in (tmp_path / name).read_bytes()
    await reader.close()
    assert b"changed" in (tmp_path / name).read_bytes()


@both_layouts
async def test_a_file_that_was_replaced_is_parsed(tmp_path: Path, layout: str) -> None:
    await fill(tmp_path, layout)
    name = SINGLE if layout == "single_file" else "templates.json"
    text = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(text.replace(b"templates b", b"templates c"))
    async with open_json(tmp_path, layout) as store:
        found = await store.get_entity(T, "b")
        assert found is not None
        assert found["name"] == "templates c"
        assert is_loaded(store)


@both_layouts
async def test_files_that_are_removed_after_a_lookup_are_missed(
    tmp_path: Path, layout: str
) -> None:
    await fill(tmp_path, layout)
    store = await open_json(tmp_path, layout).open()
    assert await store.get_entity(T, "a") is not None
    assert not is_loaded(store)
    for each in tmp_path.iterdir():
        each.unlink()
    with pytest.raises(CorruptionError, match="was removed while it was in use"):
        await store.count_entities(T)
    await abandon(store)


@both_layouts
async def test_a_collection_of_another_program_is_found(tmp_path: Path, layout: str) -> None:
    jobs = Collection("jobs", key="job_id", fields=[Field("owner")])
    async with open_json(tmp_path, layout, collections=[jobs], update_files="at close") as store:
        await store.save_entity("jobs", {"job_id": "j-1", "owner": "ops"})
    async with open_json(tmp_path, layout) as store:
        found = await store._json.fetch_undeclared(jobs, "j-1")
        assert found is not None
        assert found.entity["owner"] == "ops"
        assert await store._json.fetch_undeclared(jobs, "j-2") is None
