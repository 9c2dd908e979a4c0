"""Compactions, and other processes that follow the resulting generations of files."""

from __future__ import annotations

import asyncio
import errno
import os
import struct
import threading
import time
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from hf_async_store import Collection, JSONStorageStrategy
from hf_async_store.errors import (
    CorruptionError,
    DataFileConflictError,
    DiskFullError,
    StorageError,
    UnavailableError,
)
from hf_async_store.values import Key
from tests.json.layouts import both_layouts
from tests.json.support import (
    WHOLE,
    Call,
    FileCalls,
    abandon,
    data_files,
    journals,
    open_files,
    open_json,
    parsed,
    reopened,
    temporary,
    whole,
)


@asynccontextmanager
async def abandoned(store: JSONStorageStrategy) -> AsyncIterator[JSONStorageStrategy]:
    """A store whose process ends without the final compaction."""
    await store.open()
    try:
        yield store
    finally:
        await abandon(store)


def failing(name: str, number: int = errno.EIO) -> Any:
    """A hook that lets every call of this name fail."""

    def hook(call: Call, size: int) -> int:
        if call.name == name:
            raise OSError(number, os.strerror(number))
        return WHOLE

    return hook


@both_layouts
async def test_compactions_leave_one_journal(tmp_path: Path, layout: str) -> None:
    async with open_json(tmp_path, layout) as store:
        await store.save_entity("templates", {"template_id": "t1"})
        await store.checkpoint()
        for number in range(4):
            await store.save_entity("machines", {"machine_id": f"m{number}"})
            await store.checkpoint()
            assert len(journals(tmp_path)) == 1
            assert len(await _a_look(tmp_path, layout)) == number + 1


async def _a_look(folder: Path, layout: str) -> list[str]:
    return list((await reopened(folder, layout))["machines"])


@both_layouts
async def test_a_compaction_killed_before_its_renames_is_not_complete(
    tmp_path: Path, layout: str
) -> None:
    async with abandoned(open_json(tmp_path, layout)) as follower:
        async with abandoned(open_json(tmp_path, layout)) as writer:
            await writer.save_entity("templates", {"template_id": "t1"})
            assert await follower.get_entity("templates", "t1")
            with FileCalls(tmp_path, failing("replace")), pytest.raises(UnavailableError):
                await writer.checkpoint()
        # The journal names files that were never renamed.
        assert await follower.get_entity("templates", "t1")
        await follower.checkpoint()
        assert not temporary(tmp_path)
    assert list((await reopened(tmp_path, layout))["templates"]) == ["t1"]


async def test_a_compaction_killed_between_its_renames_is_continued(tmp_path: Path) -> None:
    """Split files: a compaction was killed between two renames, and another process continues."""
    renamed: list[str] = []

    def hook(call: Call, size: int) -> int:
        if call.name == "replace":
            if renamed:
                raise OSError(errno.EIO, "the second fails")
            renamed.append(call.path)
        return WHOLE

    async with abandoned(open_json(tmp_path, "split_files")) as follower:
        async with abandoned(open_json(tmp_path, "split_files")) as writer:
            for name in range(2):
                async with writer.begin_transaction() as tx:
                    await tx.save_entity("templates", {"template_id": "t1", "name": str(name)})
                    await tx.save_entity("requests", {"request_id": "r1", "status": str(name)})
                assert await follower.get_entity("requests", "r1")
                with FileCalls(tmp_path, hook), pytest.raises(UnavailableError):
                    await writer.checkpoint()
                renamed.clear()
            await writer.update_entity("requests", "r1", {"status": "last"})
        expected = await whole(follower)
        assert expected["requests"]["r1"]["version"] == 3
        assert await reopened(tmp_path, "split_files") == expected
        await follower.checkpoint()
        assert len(journals(tmp_path)) == 1
    assert await reopened(tmp_path, "split_files") == expected


@both_layouts
async def test_a_cancelled_checkpoint_leaves_one_journal_to_write_to(
    tmp_path: Path, layout: str
) -> None:
    """It is cancelled at each of its awaits; a sealed journal is never written to."""
    async with open_json(tmp_path, layout) as one, open_json(tmp_path, layout) as other:
        for turns in range(60):
            await one.save_entity("templates", {"template_id": "t", "name": "n"})
            task = asyncio.ensure_future(one.checkpoint())
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            version = await one.save_entity("templates", {"template_id": "t", "name": "one"})
            assert await other.save_entity("templates", {"template_id": "t"}) == version + 1
            assert (await one.get_entity("templates", "t") or {})["version"] == version + 1
        assert await reopened(tmp_path, layout) == await whole(one)
    assert open_files(tmp_path) == []


class Gate:
    """A hook that blocks a call in a worker thread until it is released."""

    def __init__(self, name: str, part: str = "") -> None:
        self._name = name
        self._part = part
        self._open = threading.Event()
        self.reached = threading.Event()
        self.fails: int | None = None

    def __call__(self, call: Call, size: int) -> int:
        if call.name == self._name and self._part in call.path and not self._open.is_set():
            self.reached.set()
            assert self._open.wait(60), "the test forgot this call"
            if self.fails is not None:
                raise OSError(self.fails, os.strerror(self.fails))
        return WHOLE

    async def stands(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, 60), "the call never came"

    def release(self) -> None:
        self._open.set()


@both_layouts
@pytest.mark.parametrize(
    "moment", [("rename", ".journal."), ("pwrite", ".journal."), ("write", "")]
)
async def test_a_checkpoint_cancelled_while_a_thread_works(
    tmp_path: Path, layout: str, moment: tuple[str, str]
) -> None:
    """The call of the thread ends before files are closed and locks are released."""
    gate = Gate(*moment)
    async with open_json(tmp_path, layout) as one, open_json(tmp_path, layout) as other:
        await one.save_entity("templates", {"template_id": "t"})
        await other.save_entity("templates", {"template_id": "t"})
        before = open_files(tmp_path)
        with FileCalls(tmp_path, gate):
            task = asyncio.ensure_future(one.checkpoint())
            await gate.stands()
            task.cancel()
            for _ in range(50):
                await asyncio.sleep(0)
            closed = moment[0] == "write" and len(open_files(tmp_path)) <= len(before)
            gate.release()
            await asyncio.gather(task, return_exceptions=True)
        assert not closed, "the file was closed while a thread was writing to it"
        for number in range(3, 9):
            writer = other if number % 2 else one
            assert await writer.save_entity("templates", {"template_id": "t"}) == number
        assert await reopened(tmp_path, layout) == await whole(one) == await whole(other)
    assert open_files(tmp_path) == []
    assert len(journals(tmp_path)) == 1


async def test_split_files_of_different_generations_are_not_mixed(tmp_path: Path) -> None:
    """Split files: a transaction is committed and compacted while a reader is between two files."""
    async with open_json(tmp_path, "split_files") as writer:
        await _pair(writer, 1)
        await writer.checkpoint()
        await _read_between(tmp_path, writer)


async def test_split_files_that_change_during_a_read_without_a_journal(tmp_path: Path) -> None:
    """The same with files from another program that no journal names."""
    async with open_json(tmp_path, "split_files") as writer:
        await _pair(writer, 1)
    for each in journals(tmp_path):
        each.unlink()
    async with open_json(tmp_path, "split_files") as writer:
        await _read_between(tmp_path, writer)


async def _read_between(folder: Path, writer: JSONStorageStrategy) -> None:
    """A reader loads the files; before it reads the last one, the others are compacted again."""
    done: list[str] = []
    async with open_json(folder, "split_files") as reader:
        files = reader._json.files
        real = files.read

        async def read(name: str, *known: Any) -> Any:
            if name == "machines.json" and not done:
                done.append(name)
                await _pair(writer, 2)
                await writer.checkpoint()
            return await real(name, *known)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "read", read)
            found = await reader._json.fetch([_key("templates"), _key("machines")])
    assert done
    assert [each and each.entity["name"] for each in found] == ["2", "2"]


def _key(collection: str) -> Key:
    return Key(collection, "x")


async def _pair(store: JSONStorageStrategy, number: int) -> None:
    async with store.begin_transaction() as tx:
        await tx.save_entity("templates", {"template_id": "x", "name": str(number)})
        await tx.save_entity("machines", {"machine_id": "x", "name": str(number)})


async def test_sections_declared_by_other_processes_survive_a_compaction(tmp_path: Path) -> None:
    """During a compaction another process commits to a collection that the compacting process does
    not declare, and the compacting process follows."""
    known = [Collection("known", key="id")]
    extra = [*known, Collection("extra", key="id")]
    async with open_json(tmp_path, collections=extra) as other:
        await other.save_entities("extra", [{"id": "one"}, {"id": "two"}])
    gate = Gate("write")
    async with (
        open_json(tmp_path, collections=known) as folding,
        open_json(tmp_path, collections=extra) as other,
    ):
        await folding.save_entity("known", {"id": "k"})
        with FileCalls(tmp_path, gate):
            fold = asyncio.ensure_future(folding.checkpoint())
            await gate.stands()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "write", os.write)
                await other.save_entity("extra", {"id": "three"})
            assert await folding.get_entity("known", "k")
            gate.release()
            await fold
        for _ in range(2):
            async with abandoned(open_json(tmp_path, collections=extra)) as store:
                found = {each["id"] for each in await store.query_entities("extra")}
                assert found == {"one", "two", "three"}
            await folding.save_entity("known", {"id": "k"})
            await folding.checkpoint()


@both_layouts
async def test_a_collection_declared_after_the_journal_was_created(
    tmp_path: Path, layout: str
) -> None:
    """A process declares more collections than the process that created the journal."""
    few = [Collection("few", key="id")]
    more = [*few, Collection("more", key="id")]
    async with open_json(tmp_path, layout, collections=few) as one:
        await one.save_entity("few", {"id": "f"})
        async with abandoned(open_json(tmp_path, layout, collections=more)) as other:
            await other.save_entity("more", {"id": "m"})
            await other.save_entity("few", {"id": "f"})
            async with abandoned(open_json(tmp_path, layout, collections=more)) as third:
                assert (await third.get_entity("more", "m") or {})["version"] == 1
                assert await third.save_entity("more", {"id": "m"}) == 2
                assert await third.save_entity("few", {"id": "f"}) == 3
            assert (await other.get_entity("more", "m") or {})["version"] == 2
        assert await one.save_entity("few", {"id": "f"}) == 4
        await one.checkpoint()
    async with open_json(tmp_path, layout, collections=more) as store:
        assert (await store.get_entity("more", "m") or {})["version"] == 2
        assert (await store.get_entity("few", "f") or {})["version"] == 4


async def test_an_incomplete_record_is_not_taken_for_a_later_commit(tmp_path: Path) -> None:
    """A process was killed during a long append; a shorter append follows, and fails."""
    header = struct.pack(">4sB3xIIQ", b"HFJ1", 2, 1 << 20, 7, 2)
    torn = header + struct.pack(">I", zlib.crc32(header)) + b"x" * 5000
    async with open_json(tmp_path) as store:
        await store.save_entity("templates", {"template_id": "t1"})
        (journal,) = journals(tmp_path)
        with journal.open("ab") as file:
            file.write(torn)
        gate = Gate("pwrite")
        gate.fails = errno.ENOSPC

        def hook(call: Call, size: int) -> int:
            # The first call in a thread: if the tail is truncated there, readers run before it.
            in_thread = threading.current_thread() is not threading.main_thread()
            return gate(call._replace(name="pwrite"), size) if in_thread else WHOLE

        with FileCalls(tmp_path, hook):
            write = asyncio.ensure_future(store.save_entity("templates", {"template_id": "t2"}))
            await gate.stands()
            assert await store.get_entity("templates", "t2") is None
            gate.release()
            with pytest.raises(DiskFullError):
                await write
        assert await store.get_entity("templates", "t2") is None
        assert await store.save_entity("templates", {"template_id": "t2"}) == 1
        assert await reopened(tmp_path) == await whole(store)


async def test_a_switch_to_compression_is_completed_after_a_crash(tmp_path: Path) -> None:
    """Compression was enabled, and the first compaction was killed between its rename and its unlink."""
    async with open_json(tmp_path) as store:
        await store.save_entity("templates", {"template_id": "t1"})
    async with abandoned(open_json(tmp_path, enable_compression=True)) as store:
        await store.save_entity("templates", {"template_id": "t2"})

        def hook(call: Call, size: int) -> int:
            if call.name == "unlink" and call.path.endswith(".json"):
                raise OSError(errno.EIO, "now")
            return WHOLE

        with FileCalls(tmp_path, hook), pytest.raises(StorageError):
            await store.checkpoint()
    assert len(data_files(tmp_path)) == 2
    for compressed in (True, False):
        found = await reopened(tmp_path, enable_compression=compressed)
        assert list(found["templates"]) == ["t1", "t2"]
    async with open_json(tmp_path, enable_compression=True) as store:
        await store.checkpoint()
        (left,) = data_files(tmp_path)
        assert left.suffix == ".gz"
        assert list(parsed(left)["templates"]) == ["t1", "t2"]


async def test_a_packed_and_a_changed_unpacked_file_are_refused(tmp_path: Path) -> None:
    """The file was unpacked and changed: it cannot be determined which one is valid."""
    async with open_json(tmp_path, enable_compression=True) as store:
        await store.save_entity("templates", {"template_id": "t1"})
    (tmp_path / "request_database.json").write_bytes(b"{}\n")
    with pytest.raises(CorruptionError, match="both"):
        await reopened(tmp_path, enable_compression=True)


async def test_the_memory_of_old_files_is_bounded(tmp_path: Path) -> None:
    async with open_json(tmp_path) as store, open_json(tmp_path) as follower:
        for number in range(20):
            await store.save_entity("templates", {"template_id": "t", "name": str(number)})
            await store.checkpoint()
            await follower.get_entity("templates", "t")
        for each in (store, follower):
            state = each._json.follower.state
            assert state is not None
            assert max(map(len, state.known.values())) <= 4


async def test_a_read_of_an_absent_store_logs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_json(tmp_path / "nowhere") as store:
        assert await store.get_entity("templates", "t") is None
    assert not (tmp_path / "nowhere").exists()
    assert not caplog.records


@both_layouts
async def test_failing_compactions_are_retried_with_growing_pauses(
    tmp_path: Path, layout: str
) -> None:
    """Each attempt starts a generation. While the disk is full, commits succeed, and journals stay few."""

    def full(call: Call, size: int) -> int:
        if call.name == "fdatasync" and call.path.endswith(".tmp"):
            tries.append(call)
            raise OSError(errno.ENOSPC, "no room for a data file")
        return WHOLE

    tries: list[Call] = []
    longest_pause = 0.001 * 2**7
    begun = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_async_store.strategies.json.compaction._PAUSE_SECONDS", 0.001)
        patch.setattr("hf_async_store.strategies.json.compaction._IDLE_SECONDS", 0.002)
        async with open_json(tmp_path, layout, write_buffer_size=100) as store:
            with FileCalls(tmp_path, full):
                for number in range(400):
                    await store.save_entity("templates", {"template_id": "t", "name": str(number)})
                    await asyncio.sleep(0.001)
            assert tries
            # One for each doubling of the pause, then one per pause: a slow disk causes more of these.
            assert len(journals(tmp_path)) < 12 + (time.monotonic() - begun) / longest_pause
            await store.checkpoint()
            assert len(journals(tmp_path)) == 1
        assert (await reopened(tmp_path, layout))["templates"]["t"]["version"] == 400


@both_layouts
async def test_a_long_compaction_is_followed_by_a_long_pause_unless_it_failed(
    tmp_path: Path, layout: str
) -> None:
    """One that only waited for the lock of another process has written nothing."""
    async with open_json(tmp_path, layout, lock_timeout=0.2) as store:
        await store.save_entity("templates", {"template_id": "t"})
        await store.checkpoint()
        compactor, state = store._json.compactor, store._json.follower.state
        assert state is not None
        async with open_json(tmp_path, layout) as other, other.acquire_write_lock():
            compactor.begin()
            await compactor.close()
        assert compactor._failures == 1
        assert compactor._rest(state) == 0
        compactor._last_duration = 1.0
        assert compactor._rest(state) > 9
        await store.save_entity("templates", {"template_id": "u", "name": "x" * 5000})
        assert compactor._rest(state) == 0  # the journal is larger than the data files


@both_layouts
async def test_a_small_commit_after_a_failed_one_is_compacted_when_the_store_is_idle(
    tmp_path: Path, layout: str
) -> None:
    async with open_json(tmp_path, layout) as store:
        compactor = store._json.compactor
        await store.save_entity("templates", {"template_id": "t"})
        await store.checkpoint()
        await compactor.close()
        compactor.consider()  # as after a commit that wrote nothing
        assert compactor._timer is None
        await store.save_entity("templates", {"template_id": "u"})
        assert compactor._timer is not None


@both_layouts
async def test_what_is_committed_during_a_compaction_is_compacted_when_the_store_is_idle(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_json(tmp_path, layout) as store:
        compactor = store._json.compactor
        compact = compactor._compact

        async def with_a_commit() -> bool:
            done = await compact()
            await store.save_entity("templates", {"template_id": "u"})
            return done

        await store.save_entity("templates", {"template_id": "t"})
        monkeypatch.setattr(compactor, "_compact", with_a_commit)
        await compactor.close()
        compactor.begin()
        assert compactor._task is not None
        await compactor._task
        assert compactor._timer is not None


@both_layouts
async def test_a_commit_after_another_process_made_the_store_small_is_compacted_when_it_is_idle(
    tmp_path: Path, layout: str
) -> None:
    async with open_json(tmp_path, layout) as store, open_json(tmp_path, layout) as other:
        await store.save_entities(
            "templates", [{"template_id": str(n), "name": "x" * 200_000} for n in range(6)]
        )
        await store.checkpoint()
        compactor = store._json.compactor
        await compactor.close()
        await store.save_entity("templates", {"template_id": "t"})
        assert compactor._timer is None
        await other.delete_where("templates", {})
        await other.checkpoint()
        await store.save_entity("templates", {"template_id": "u", "name": "y" * 500})
        assert compactor._timer is not None


@pytest.mark.hf_sampled
@both_layouts
@pytest.mark.parametrize("verb", ["close", "adopt", "write_file"])
async def test_cancelled_at_every_await(tmp_path: Path, layout: str, verb: str) -> None:
    """No file stays open, nothing is lost, and the next store is usable."""
    for turns in range(0, 60, 3):
        folder = tmp_path / str(turns)
        async with abandoned(open_json(folder, layout)) as store:
            await store.save_entity("templates", {"template_id": "t"})
            await store.checkpoint()
            await store.save_entity("templates", {"template_id": "t", "name": "pending"})
            before = await store.read_file()
            after: dict[str, Any] = {**before, "machines": {"m": {"machine_id": "m"}}}
            if verb == "close":
                work = store.close()
            elif verb == "adopt":
                work = store.checkpoint(recover_from="journal")
            else:
                work = store.write_file(after)
            task = asyncio.ensure_future(work)
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        try:
            found = await reopened(folder, layout)
        except DataFileConflictError:
            assert verb == "adopt"
        else:
            assert found["templates"] == before["templates"]
            assert set(found["machines"]) in (set(), {"m"})
        async with open_json(folder, layout) as other:
            if verb == "adopt":
                await other.checkpoint(recover_from="journal")
            assert await other.save_entity("templates", {"template_id": "t"}) == 3
            await other.checkpoint()
            assert not temporary(folder)
            assert len(journals(folder)) == 1
        assert open_files(folder) == []
