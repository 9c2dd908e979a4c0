"""The change feed of the JSON engine: its journals, read from positions."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_async_store import Collection, JSONStorageStrategy
from hf_async_store.driver import FeedBatch, FeedEntry
from hf_async_store.errors import (
    CorruptionError,
    FeedExpiredError,
    InvalidCursorError,
    SchemaMismatchError,
    StoreClosedError,
)
from hf_async_store.strategies.json.folder_watch import FolderWatch
from hf_async_store.strategies.json.journal import (
    Kind,
    commit_payload,
    fed_payload,
    read_commit,
    record,
    scan,
)
from tests.json.layouts import both_layouts
from tests.json.process_roles import Member, together
from tests.json.support import journals, never_folds, open_files, open_json

FED: Final = [
    Collection("jobs", key="job_id", fields=["status"], feed=3600),
    Collection("notes", key="note_id", feed=60),
    Collection("plain", key="plain_id"),
]
UNFED: Final = [
    Collection("jobs", key="job_id", fields=["status"]),
    Collection("notes", key="note_id"),
    Collection("plain", key="plain_id"),
]

Change = tuple[str, int | None, int | None]
"""The id of an entity, and its versions before and after."""


@asynccontextmanager
async def opened(folder: Path, layout: str = "single_file", **settings: Any) -> AsyncIterator[Any]:
    settings = {"collections": FED, "sync_writes": False, **settings}
    async with open_json(folder, layout, **settings) as store:
        yield store


def job(number: int, **fields: Any) -> dict[str, Any]:
    return {"job_id": f"j-{number}", **fields}


async def position(store: JSONStorageStrategy, collection: str = "jobs") -> str:
    return await store._json.feed_position(collection)


async def at_end(store: JSONStorageStrategy) -> str:
    """The position at the end, after it has been read from there."""
    return (await read(store, await position(store))).position


async def read(
    store: JSONStorageStrategy, since: str, limit: int = 1000, collection: str = "jobs"
) -> FeedBatch:
    return await store._json.read_feed(collection, since, limit)


async def entries_since(
    store: JSONStorageStrategy, since: str, limit: int = 1000, collection: str = "jobs"
) -> list[FeedEntry]:
    """All that follows; the last batch is empty, and its position is the given one."""
    found: list[FeedEntry] = []
    while True:
        batch = await read(store, since, limit, collection)
        assert len(batch.entries) <= limit
        assert not batch.entries or batch.entries[-1].position == batch.position or limit > 1
        if not batch.entries:
            again = await read(store, batch.position, limit, collection)
            assert again.position == batch.position
            return found
        found += batch.entries
        since = batch.position


async def changes_since(
    store: JSONStorageStrategy, since: str, limit: int = 1000, collection: str = "jobs"
) -> list[Change]:
    return [plain(each) for each in await entries_since(store, since, limit, collection)]


def plain(entry: FeedEntry) -> Change:
    before = None if entry.before is None else entry.before.entity["version"]
    after = None if entry.after is None else entry.after.entity["version"]
    return entry.key.id, before, after  # type: ignore[return-value]  # versions are integers


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.feed.*"))


async def five_changes(store: JSONStorageStrategy) -> list[Change]:
    await store.create_entity("jobs", job(1, status="new"))
    await store.save_entity("plain", {"plain_id": "p"})
    await store.save_entities("jobs", [job(1, status="done"), job(2)])
    await store.save_entity("notes", {"note_id": "n"})
    await store.delete_entity("jobs", "j-1")
    await store.create_entity("jobs", job(1))
    return [
        ("j-1", None, 1),
        ("j-1", 1, 2),
        ("j-2", None, 1),
        ("j-1", 2, None),
        ("j-1", None, 1),
    ]


# -- what is delivered -----------------------------------------------------------------------


@both_layouts
@pytest.mark.parametrize("limit", [1, 2, 1000])
async def test_the_changes_of_a_collection(tmp_path: Path, layout: str, limit: int) -> None:
    async with opened(tmp_path, layout) as store:
        start = await position(store)
        assert (await read(store, start)).position == start
        expected = await five_changes(store)
        found = await entries_since(store, start, limit)
        assert [plain(each) for each in found] == expected
        assert found[1].before is not None
        assert found[1].before.entity["status"] == "new"
        assert found[1].after is not None
        assert found[1].after.entity["status"] == "done"
        # Each entry names the position after itself.
        for number, each in enumerate(found, 1):
            assert await changes_since(store, each.position, limit) == expected[number:]
        assert (await read(store, found[-1].position)).position == await position(store)


async def test_a_program_that_does_not_declare_the_feed_feeds_it(tmp_path: Path) -> None:
    async with opened(tmp_path) as store, opened(tmp_path, collections=UNFED) as other:
        start = await position(store)
        expected = await five_changes(other)
        assert await changes_since(store, start) == expected


async def test_the_first_write_of_a_store_is_in_the_feed(tmp_path: Path) -> None:
    """A later one would come after the declaration was recorded."""
    async with opened(tmp_path) as store:
        await store.save_entity("jobs", job(1))
        (journal,) = journals(tmp_path)
        assert Kind.FED_COMMIT in _kinds(journal)


async def test_a_store_without_feeds_is_as_before(tmp_path: Path) -> None:
    async with opened(tmp_path, collections=UNFED) as store:
        await five_changes(store)
        (journal,) = journals(tmp_path)
        assert Kind.FED_COMMIT not in _kinds(journal)
        assert b'"feed"' not in journal.read_bytes()
        await store.checkpoint()
        assert not kept(tmp_path)
        with pytest.raises(SchemaMismatchError, match="declares the collection with `feed`"):
            await position(store)


def _kinds(journal: Path) -> list[int]:
    data, offset, kinds = journal.read_bytes(), 0, []
    while offset < len(data):
        kinds.append(data[offset + 4])
        offset += 28 + int.from_bytes(data[offset + 8 : offset + 12])
    return kinds


async def test_what_is_not_committed_is_not_in_the_feed(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        start = await position(store)
        with suppress(ZeroDivisionError):
            async with store.begin_transaction() as tx:
                await tx.create_entity("jobs", job(1))
                raise ZeroDivisionError
        async with store.begin_transaction() as tx:
            await tx.create_entity("jobs", job(2))
            await tx.save_entity("jobs", job(3))
            await tx.save_entity("jobs", job(3))
            await tx.delete_entity("jobs", "j-2")
        assert await changes_since(store, start) == [("j-3", None, 2)]


@both_layouts
async def test_one_large_commit_is_delivered_in_parts(tmp_path: Path, layout: str) -> None:
    many = [job(n, text="x" * 300) for n in range(3000)]
    async with opened(tmp_path, layout) as store, opened(tmp_path, layout) as other:
        start = await position(store)
        await store.create_entities("jobs", many)
        await store.import_entities("jobs", [{**each, "version": 7} for each in many])
        expected = [(each["job_id"], None, 1) for each in many]
        expected += [(each["job_id"], 1, 7) for each in many]  # type: ignore[misc]
        assert await changes_since(store, start, 700) == expected
        end = (await read(store, await position(store))).position
        assert not store._json._feed.may_go_on([end])
        assert store._json._feed.may_go_on([(await read(store, start, 3001)).position])
        # A position within the commit is valid in another process, and after a compaction.
        batch = await read(store, start, 1234)
        await other.checkpoint()
        assert await changes_since(other, batch.position, 900) == expected[1234:]
        assert batch.entries[11].position != batch.position
        assert await changes_since(other, batch.entries[11].position, 5000) == expected[12:]


async def test_a_damaged_entity_that_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "request_database.json").write_text(
        '{"jobs": {"j-1": {"job_id": "j-1", "bad": "\\ud800"}, "j-2": {"job_id": "j-2"}}}'
    )
    async with opened(tmp_path) as store:
        start = await position(store)
        await store.delete_entity("jobs", "j-1")
        await store.save_entity("jobs", job(2))
        (deleted, saved) = await entries_since(store, start)
        assert deleted.before is not None
        assert deleted.before.entity == {"job_id": "j-1", "version": 0}
        assert plain(saved) == ("j-2", 0, 1)


# -- compactions -----------------------------------------------------------------------------


@both_layouts
@pytest.mark.parametrize("packed", [False, True])
async def test_compactions_between_the_changes(tmp_path: Path, layout: str, packed: bool) -> None:
    settings = {"enable_compression": packed}
    async with (
        opened(tmp_path, layout, **settings) as store,
        opened(tmp_path, layout, **settings) as other,
    ):
        start = await position(store)
        positions, expected = [start], []
        for number in range(1, 80):
            await store.save_entity("jobs", job(number % 7))
            expected.append((f"j-{number % 7}", (number - 1) // 7 or None, (number - 1) // 7 + 1))
            if number % 7 == 0:
                expected[-1] = ("j-0", number // 7 - 1 or None, number // 7)
            positions.append((await read(other, positions[-1])).position)
            await (store if number % 2 else other).checkpoint()
        # 79 compactions are merged into few files, and small stores have few files.
        assert len(kept(tmp_path)) < 40
        for reader in (store, other):
            for number in (0, 1, 33, 64, 78):
                assert await changes_since(reader, positions[number], 7) == expected[number:]
    assert not list(tmp_path.glob(".*.tmp"))


async def test_a_position_at_the_end_stays_valid(tmp_path: Path) -> None:
    """A reader that knows all changes needs no journal that was kept."""
    async with opened(tmp_path) as store:
        here = await position(store)
        for number in range(40):
            await store.save_entity("plain", {"plain_id": f"p-{number % 3}"})
            await store.save_entity("notes", {"note_id": "n"})
            await store.checkpoint()
            batch = await read(store, here)
            assert batch.entries == []
            here = batch.position
            assert here == await position(store)
        for each in kept(tmp_path):
            each.unlink()
        async with opened(tmp_path) as other:
            assert (await read(other, here)).position == here
        await store.save_entity("jobs", job(1))
        assert await changes_since(store, here) == [("j-1", None, 1)]


async def test_after_each_commit(tmp_path: Path) -> None:
    async with opened(tmp_path, update_files="after each commit") as store:
        start = await position(store)
        for _ in range(100):
            await store.save_entity("jobs", job(1))
        assert len(kept(tmp_path)) < 40
        assert await changes_since(store, start) == [("j-1", n or None, n + 1) for n in range(100)]


@pytest.mark.parametrize("step", range(4))
async def test_a_merge_that_was_interrupted(tmp_path: Path, step: int) -> None:
    async with opened(tmp_path) as store:
        start = await position(store)
        for _ in range(31):
            await store.save_entity("jobs", job(1))
            await store.checkpoint()
        copies = tmp_path.with_name(f"{tmp_path.name}-copies")
        copies.mkdir()
        for each in kept(tmp_path):
            shutil.copy2(each, copies)
        while len(kept(tmp_path)) > 2:
            await store.save_entity("jobs", job(1))
            await store.checkpoint()
        count = (await store.get_entity("jobs", "j-1"))["version"]
        # It may have been interrupted after any number of the merged files was removed.
        for each in sorted(copies.iterdir())[step * 9 :]:
            shutil.copy2(each, tmp_path)
        expected = [("j-1", n or None, n + 1) for n in range(count)]
        assert await changes_since(store, start) == expected
        await store.save_entity("jobs", job(2))
        await store.checkpoint()
        assert len(kept(tmp_path)) <= 3
        assert await changes_since(store, start) == [*expected, ("j-2", None, 1)]


# -- what is not kept ------------------------------------------------------------------------


async def test_the_retention(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        start = await position(store)
        await store.save_entity("jobs", job(1))
        middle = (await read(store, start)).position
        await store.checkpoint()
        await store.save_entity("jobs", job(2))
        await store.checkpoint()
        first, second = kept(tmp_path)
        _make_older(first, 3500)
        _make_older(second, 3500)
        await store.save_entity("jobs", job(2))
        await store.checkpoint()
        assert len(await changes_since(store, start)) == 3, "the longest retention counts"
        _make_older(first, 3700)
    async with opened(tmp_path, collections=UNFED) as other:
        await other.save_entity("plain", {"plain_id": "p"})  # removed by whoever opens the store
        assert first not in kept(tmp_path)
    async with opened(tmp_path) as store:
        with pytest.raises(FeedExpiredError, match="watch it from now on"):
            await read(store, start)
        assert await changes_since(store, middle) == [("j-2", None, 1), ("j-2", 1, 2)]


def _make_older(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


async def test_feed_bytes(tmp_path: Path) -> None:
    async with opened(tmp_path, feed_bytes=20_000) as store:
        positions = [await position(store)]
        for _ in range(30):
            await store.save_entity("jobs", job(1, text="x" * 1000))
            positions.append((await read(store, positions[-1])).position)
            await store.checkpoint()
            assert sum(each.stat().st_size for each in kept(tmp_path)) <= 20_000
        with pytest.raises(FeedExpiredError):
            await read(store, positions[0])
        assert await changes_since(store, positions[-5]) == [
            ("j-1", n, n + 1) for n in range(26, 30)
        ]


# -- positions that do not fit ---------------------------------------------------------------


async def test_positions_of_others(tmp_path: Path) -> None:
    async with opened(tmp_path / "a") as store, opened(tmp_path / "b") as other:
        mine, foreign = await position(store), await position(other)
        for wrong in (
            foreign,
            await position(store, "notes"),
            "",
            "x",
            mine + "x",
            mine + "9" * 20,
        ):
            with pytest.raises(InvalidCursorError):
                await read(store, wrong)
        await store.save_entity("jobs", job(1))
        with pytest.raises((InvalidCursorError, FeedExpiredError)):
            await read(store, mine + "1")
        inside = (await read(store, mine)).position + "2"
        with pytest.raises(InvalidCursorError):
            await read(store, inside)


@both_layouts
async def test_a_data_file_that_was_replaced(tmp_path: Path, layout: str) -> None:
    name = "request_database.json" if layout == "single_file" else "jobs.json"
    async with opened(tmp_path, layout) as store:
        start = await position(store)
        await store.save_entity("jobs", job(1))
        await store.checkpoint()
        here = (await read(store, start)).position
        jobs = '{"j-9": {"job_id": "j-9"}}'
        content = f'{{"jobs": {jobs}}}' if layout == "single_file" else jobs
        waiting = asyncio.create_task(store._json.feed_changed({"jobs": here}, 30.0))
        await asyncio.sleep(0.1)
        (tmp_path / name).write_text(content)
        await asyncio.wait_for(waiting, 10)
        for each in (start, here):
            with pytest.raises(FeedExpiredError):
                await read(store, each)
        later = await position(store)
        await store.save_entity("jobs", job(2))
        for each in (start, here):
            with pytest.raises(FeedExpiredError):
                await read(store, each)
        assert await changes_since(store, later) == [("j-2", None, 1)]


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("compacted", [False, True])
@both_layouts
async def test_a_folder_that_was_restored_from_a_copy(
    tmp_path: Path, layout: str, same: bool, compacted: bool
) -> None:
    """Positions that the copy contains, too, are valid; later ones are not, whatever is at their place."""
    folder, copy = tmp_path / "store", tmp_path / "copy"
    async with opened(folder, layout) as store:
        never_folds(store)
        start = await position(store)
        await store.save_entity("jobs", job(1, text="a"))
        before_copy = (await read(store, start)).position
        shutil.copytree(folder, copy)
        await store.save_entity("jobs", job(2, text="a"))
        await store.delete_entity("jobs", "j-1")
        if compacted:
            await store.checkpoint()
        after_copy = (await read(store, before_copy)).position
    shutil.rmtree(folder)
    copy.rename(folder)
    async with opened(folder, layout) as store:
        with pytest.raises(FeedExpiredError):
            await read(store, after_copy)
        await store.save_entity("jobs", job(2, text="a" if same else "aaa"))
        await store.delete_entity("jobs", "j-1")
        if compacted:
            await store.checkpoint()
        for _ in range(3):
            with pytest.raises(FeedExpiredError):
                await read(store, after_copy)
            await store.save_entity("jobs", job(3))
        assert len(await changes_since(store, before_copy)) == 5


@pytest.mark.parametrize("recover_from", ["file", "journal", "salvage"])
async def test_a_recovery(tmp_path: Path, recover_from: Any) -> None:
    async with opened(tmp_path) as store:
        start = await position(store)
        await store.save_entity("jobs", job(1))
        await store.checkpoint()
        await store.save_entity("jobs", job(1))
        here = (await read(store, start)).position
        await store.checkpoint(recover_from=recover_from)
        for each in (start, here):
            with pytest.raises(FeedExpiredError):
                await read(store, each)
        later = await position(store)
        await store.save_entity("jobs", job(2))
        assert await changes_since(store, later) == [("j-2", None, 1)]


async def test_records_that_are_lost_at_the_end_of_a_sealed_journal(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        start = await position(store)
        await store.save_entity("jobs", job(1))
        await store.save_entity("jobs", job(2))
        await store.checkpoint()
        here = await position(store)
        (sealed,) = kept(tmp_path)
        os.truncate(sealed, sealed.stat().st_size - 100)
        with pytest.raises(FeedExpiredError):
            await changes_since(store, start)
        assert await changes_since(store, here) == []


async def test_a_journal_that_is_missing(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        start = await position(store)
        for number in range(4):
            await store.save_entity("jobs", job(number))
            await store.checkpoint()
        kept(tmp_path)[2].unlink()
        batch = await read(store, start, 2)
        assert len(batch.entries) == 2
        with pytest.raises(FeedExpiredError):
            await read(store, batch.position)


async def test_declarations_that_were_deleted(tmp_path: Path) -> None:
    async with opened(tmp_path) as store, opened(tmp_path, collections=UNFED) as other:
        start = await position(store)
        await store.save_entity("jobs", job(1))
        next(tmp_path.glob(".*.declarations")).unlink()
        await other.save_entity("jobs", job(1))  # not in the feed
        with pytest.raises(SchemaMismatchError):
            await read(store, start)
        await store.save_entity("jobs", job(1))
        with pytest.raises(InvalidCursorError):
            await read(store, start)
        later = await position(store)
        await other.save_entity("jobs", job(1))
        assert await changes_since(store, later) == [("j-1", 3, 4)]


# -- torn and damaged journals ---------------------------------------------------------------


async def test_an_incomplete_record(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        never_folds(store)
        start = await position(store)
        await store.save_entity("jobs", job(1))
        (journal,) = journals(tmp_path)
        data = journal.read_bytes()
        await store.save_entity("jobs", job(2))
        tail = journal.read_bytes()[len(data) :]
        for size in (1, 27, 28, 29, len(tail) - 1):
            journal.write_bytes(data + tail[:size])
            async with opened(tmp_path) as reader:
                assert await changes_since(reader, start) == [("j-1", None, 1)]
                never_folds(reader)
        async with opened(tmp_path) as writer:
            await writer.save_entity("jobs", job(3))
            assert await changes_since(writer, start) == [("j-1", None, 1), ("j-3", None, 1)]


async def test_damage(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        never_folds(store)
        start = await position(store)
        await store.save_entity("jobs", job(1))
        await store.save_entity("jobs", job(2))
        (journal,) = journals(tmp_path)
        data = bytearray(journal.read_bytes())
        data[-3] ^= 1
        journal.write_bytes(data)
        with pytest.raises(CorruptionError, match="damaged"):
            await read(store, start)


@given(st.dictionaries(st.text(), st.integers()), st.dictionaries(st.text(), st.integers()))
def test_a_fed_commit_round_trips(after: dict[str, int], before: dict[str, int]) -> None:
    images, pre_images = ({"c": _images(each)} for each in (after, before))
    payload = b"".join(fed_payload([*commit_payload(images)], pre_images))
    data = record(Kind.FED_COMMIT, payload, 0)
    for size in (1, 7, 50, len(data)):
        chunks = [data[start : start + size] for start in range(0, len(data), size)]
        ((entry, end),) = scan(chunks, "journal", 0, 0)
        assert (entry.kind, end) == (Kind.COMMIT, len(data))
        assert read_commit(entry.payload) == images
        assert read_commit(b"".join(entry.before)) == pre_images


def _images(versions: dict[str, int]) -> dict[str, bytes | None]:
    return {
        each: None if version < 0 else b'{"version":%d}' % version
        for each, version in versions.items()
    }


def test_a_fed_commit_that_is_too_short() -> None:
    for size in range(12):
        with pytest.raises(CorruptionError, match="too short"):
            list(scan([record(Kind.FED_COMMIT, bytes(size), 0)], "journal", 0, 0))


# -- waiting ---------------------------------------------------------------------------------


@pytest.fixture(params=["inotify", "polling"])
def watching(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "polling":
        monkeypatch.setattr("hf_async_store.strategies.json.folder_watch.sys.platform", "other")


@pytest.mark.usefixtures("watching")
async def test_a_commit_ends_the_wait(tmp_path: Path) -> None:
    async with opened(tmp_path) as store, opened(tmp_path) as other:
        here = await at_end(store)
        for number in range(5):
            waiting = asyncio.create_task(store._json.feed_changed({"jobs": here}, 30.0))
            await asyncio.sleep(0.02)
            assert not waiting.done()
            if number == 3:
                await other.checkpoint()
            else:
                await other.save_entity("jobs", job(number))
            await asyncio.wait_for(waiting, 10)
            here = (await read(store, here)).position
        began = time.monotonic()
        await store._json.feed_changed({"jobs": here}, 0.1)
        assert 0.09 < time.monotonic() - began < 5
        await other.save_entity("jobs", job(9))
        # A change between the last read and the wait ends it at once; so does an unknown position.
        for each in (here, "unknown"):
            await asyncio.wait_for(store._json.feed_changed({"jobs": each}, 30.0), 5)


@pytest.mark.usefixtures("watching")
async def test_a_slow_compaction_is_not_polled_without_pause(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        here = await at_end(store)
        await store.save_entity("jobs", job(1))
        here = (await read(store, here)).position
        put_in_place = store._json.files.put_in_place

        def slowly(*given: Any) -> None:
            put_in_place(*given)
            time.sleep(0.5)

        store._json.files.put_in_place = slowly
        compacting = asyncio.create_task(store.checkpoint())
        waits = 0
        while not compacting.done():
            await store._json.feed_changed({"jobs": here}, 0.1)
            here = (await read(store, here)).position
            waits += 1
        await compacting
        assert waits < 40


@pytest.mark.usefixtures("watching")
async def test_a_wait_that_ends_early(tmp_path: Path) -> None:
    before = open_files(tmp_path), len(os.listdir("/proc/self/fd"))
    async with opened(tmp_path) as store:
        here = await at_end(store)
        cancelled = asyncio.create_task(store._json.feed_changed({"jobs": here}, 30.0))
        await asyncio.sleep(0.02)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        closed = asyncio.create_task(store._json.feed_changed({"jobs": here}, 30.0))
        await asyncio.sleep(0.02)
    with pytest.raises(StoreClosedError):
        await asyncio.wait_for(closed, 5)
    assert (open_files(tmp_path), len(os.listdir("/proc/self/fd"))) == before


async def test_inotify_that_is_not_available(tmp_path: Path) -> None:
    watch = FolderWatch(tmp_path / "missing")
    calls = 0

    def is_changed() -> bool:
        nonlocal calls
        calls += 1
        return calls > 3

    await asyncio.wait_for(watch.wait(is_changed, 60.0), 5)
    assert calls == 4
    watch.close()


# -- processes -------------------------------------------------------------------------------


@pytest.mark.hf_sampled
@both_layouts
async def test_eight_processes_and_a_reader(tmp_path: Path, layout: str) -> None:
    """With compactions all the time: no change is missing, and each entity's are in order."""
    settings = {"write_buffer_size": 2000}
    fed = [Collection("machines", key="machine_id", feed=3600)]
    async with opened(tmp_path, layout, collections=fed, **settings) as store:
        start = await position(store, "machines")
        writers = asyncio.create_task(
            together(
                *(
                    Member("feeder", tmp_path, layout, name=f"p{n}", times=60, settings=settings)
                    for n in range(8)
                )
            )
        )
        here, found = start, []
        while not writers.done():
            await store._json.feed_changed({"machines": here}, 0.2)
            batch = await read(store, here, 16, "machines")
            found += [plain(each) for each in batch.entries]
            here = batch.position
        expected = await writers
        found += await changes_since(store, here, collection="machines")
        assert found == await changes_since(store, start, collection="machines")
        by_id: dict[str, list[tuple[int | None, int | None]]] = {}
        for entity_id, *versions in found:
            by_id.setdefault(entity_id, []).append(tuple(versions))  # type: ignore[arg-type]
        for each in by_id.values():
            assert all(one[1] == other[0] for one, other in pairwise(each))
        assert sum(map(len, by_id.values())) == sum(expected)


async def test_109_changes_that_tasks_share_are_apart_in_a_feed_that_began_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(entity: dict[str, Any]) -> dict[str, Any]:
        return {**entity, "n": entity["n"] + 1}

    async with (
        open_json(tmp_path, collections=UNFED) as old,
        open_json(tmp_path, collections=FED) as new,
    ):
        await old.create_entity("jobs", {"job_id": "j", "n": 0})
        since = await new.engine.feed_position("jobs")
        first = iter([True])  # as if the feed had begun after this answer
        shares_changes = old._json.shares_changes
        monkeypatch.setattr(
            old._json, "shares_changes", lambda key: next(first, False) or shares_changes(key)
        )
        await asyncio.gather(*(old.modify_entity("jobs", "j", change) for _ in range(8)))
        assert next(first, None) is None, "no changes were shared"
        feed = await new.engine.read_feed("jobs", since, 100)
        found = [each.after.version for each in feed.entries if each.after is not None]
        assert found == [*range(2, 10)]
