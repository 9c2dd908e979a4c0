"""Other processes write while a commit is synced. Two store objects stand for two processes."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hf_async_store.errors import LockTimeoutError, UnavailableError
from hf_async_store.strategies.json.strategy import JSONStorageStrategy
from tests.json.layouts import both_layouts
from tests.json.process_roles import Member
from tests.json.support import (
    LAYOUTS,
    WHOLE,
    Call,
    FileCalls,
    journals,
    never_folds,
    open_json,
    reopened,
)

pytestmark = [
    pytest.mark.hf_sampled,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux has abstract sockets"),
]


class LongSync:
    """The sync of a commit that takes until `end`. The commit is written when another store waits."""

    def __init__(self, store: JSONStorageStrategy) -> None:
        self._store = store
        self._ended = threading.Event()
        self.error = 0
        self._thread: int | None = None  # that writes the commit
        self._began = False

    def __call__(self, call: Call, size: int) -> int:
        this = threading.get_ident()
        if self._began or ".journal." not in call.path or self._thread not in (None, this):
            return WHOLE
        if call.name == "pwrite":
            self._thread = this
            deadline = time.monotonic() + 20
            while not self._store._json.locks.is_awaited and time.monotonic() < deadline:
                time.sleep(0.001)
        elif call.name == "fdatasync":
            self._began = True
            self._ended.wait(20)
            if self.error:
                raise OSError(self.error, os.strerror(self.error))
        return WHOLE

    def end(self, error: int = 0) -> None:
        self.error = error
        self._ended.set()


async def _save(store: JSONStorageStrategy, template_id: str, name: str = "") -> None:
    await store.save_entity("templates", {"template_id": template_id, "name": name})


@asynccontextmanager
async def _syncing(
    folder: Path, layout: str
) -> AsyncIterator[tuple[JSONStorageStrategy, JSONStorageStrategy, LongSync, asyncio.Task[None]]]:
    """A store whose commit of "a1" is being synced, and another one that has written "b1" since."""
    async with open_json(folder, layout) as a, open_json(folder, layout) as b:
        for store, name in ((a, "a0"), (b, "b0")):
            never_folds(store)
            await _save(store, name, "x" * 5000)  # the next journal will be shorter
        sync = LongSync(a)
        with FileCalls(folder, sync):
            try:
                syncing = asyncio.create_task(_save(a, "a1"))
                async with asyncio.timeout(20):
                    while not a._json.locks.exclusive_held:
                        await asyncio.sleep(0)
                    await _save(b, "b1")
                assert not syncing.done()
                yield a, b, sync, syncing
            finally:
                sync.end(sync.error)
                await asyncio.wait([syncing])


@both_layouts
async def test_a_store_reads_what_others_write_while_it_syncs(tmp_path: Path, layout: str) -> None:
    async with _syncing(tmp_path, layout) as (a, b, sync, syncing):
        for _ in range(3):
            await _save(b, "b2")
            for store in (a, b):
                assert await store.get_entity("templates", "a1")
                assert await store.get_entity("templates", "b1")
                found = await store.get_entity("templates", "b2")
                other = await b.get_entity("templates", "b2")
                assert found == other
        assert await a.count_entities("templates") == 5
        assert not syncing.done()
        sync.end()
        await syncing
        await _save(a, "b2")
        assert (await b.get_entity("templates", "b2") or {})["version"] == 4
    assert {*(await reopened(tmp_path, layout))["templates"]} == {"a0", "a1", "b0", "b1", "b2"}


@both_layouts
async def test_a_compaction_while_another_process_syncs(tmp_path: Path, layout: str) -> None:
    """The store that syncs follows to the next journal meanwhile, and its file is another one then."""
    async with _syncing(tmp_path, layout) as (a, b, sync, syncing):
        await b.checkpoint()
        await _save(b, "b2")
        assert await a.get_entity("templates", "b2")
        await b.checkpoint()
        assert await a.count_entities("templates") == 5
        assert not syncing.done()
        sync.end()
        await syncing
        await _save(a, "a2")
        assert await b.get_entity("templates", "a2")
    assert {*(await reopened(tmp_path, layout))["templates"]} == {
        *("a0", "a1", "a2", "b0", "b1", "b2")
    }


@both_layouts
async def test_a_sync_that_fails_after_others_have_written(tmp_path: Path, layout: str) -> None:
    async with _syncing(tmp_path, layout) as (a, b, sync, syncing):
        [journal] = journals(tmp_path)
        sync.end(errno.EIO)
        with pytest.raises(UnavailableError) as caught:
            await syncing
        assert caught.value.outcome_unknown
        assert journal.exists()
        await _save(b, "b2")
        assert not journal.exists(), "a journal whose sync failed is still in use"
        await _save(a, "a2")
        assert (await b.health())["problems"] == []
    assert {*(await reopened(tmp_path, layout))["templates"]} >= {*("a0", "a2", "b0", "b1", "b2")}


@pytest.mark.parametrize("fails", [False, True])
async def test_the_first_write_of_a_process_waits_for_syncs(tmp_path: Path, fails: bool) -> None:
    """Otherwise it might miss that one of them fails, and acknowledge what depends on lost records."""
    async with _syncing(tmp_path, LAYOUTS[0]) as (_, _, sync, syncing):
        [journal] = journals(tmp_path)
        async with open_json(tmp_path, lock_timeout=0.2) as impatient:
            with pytest.raises(LockTimeoutError, match=r"did not end its sync of .*\.journal\."):
                await _save(impatient, "c0")
        async with open_json(tmp_path) as third:
            first = asyncio.create_task(_save(third, "c1"))
            await asyncio.sleep(0.05)
            assert not first.done()
            sync.end(errno.EIO if fails else 0)
            assert (await asyncio.gather(syncing, return_exceptions=True) != [None]) == fails
            await first
            assert journal.exists() != fails
    assert {*(await reopened(tmp_path))["templates"]} == {"a0", "a1", "b0", "b1", "c1"}


async def test_others_write_while_a_new_process_waits_for_a_sync(tmp_path: Path) -> None:
    """The process that syncs may be suspended: the new one does not keep the write lock all the time."""
    async with _syncing(tmp_path, LAYOUTS[0]) as (_, b, sync, _), open_json(tmp_path) as third:
        b._json.locks._timeout = 2.0
        first = asyncio.create_task(_save(third, "c1"))
        while not third._json.locks.exclusive_held:
            await asyncio.sleep(0)
        await _save(b, "b2")
        assert not first.done()
        sync.end()
        await first
    assert {*(await reopened(tmp_path))["templates"]} == {"a0", "a1", "b0", "b1", "b2", "c1"}


@both_layouts
async def test_a_cancelled_commit_waits_for_its_sync(tmp_path: Path, layout: str) -> None:
    async with _syncing(tmp_path, layout) as (a, b, sync, syncing):
        syncing.cancel()
        await asyncio.sleep(0.01)
        assert not syncing.done()
        await _save(b, "b2")
        sync.end()
        with pytest.raises(asyncio.CancelledError):
            await syncing
        await _save(a, "a2")
        assert await a.count_entities("templates") == 6


@both_layouts
async def test_a_process_killed_while_it_syncs(tmp_path: Path, layout: str) -> None:
    async with open_json(tmp_path, layout) as store:
        never_folds(store)
        await _save(store, "first")
        async with Member("killed_in_a_sync", tmp_path, layout) as dying:
            dying.say()
            assert await dying.line() == "writing"
            await _save(store, "next")
            await dying.process.wait()
        await _save(store, "last")
    found = {*(await reopened(tmp_path, layout))["templates"]}
    assert found == {"first", "synced", "unsynced", "next", "last"}
