"""Abandoned streams, stores that are never closed, and cancellations."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hf_async_store import Collection, JSONStorageStrategy
from hf_async_store.errors import DiskFullError, StorageError, StoreClosedError
from hf_async_store.strategies.json import (
    declarations_file,
    engine,
    files,
    journal_writer,
    recovery,
)
from hf_async_store.strategies.json.journal_writer import _AppendJob
from hf_async_store.values import Key
from tests.json.layouts import both_layouts
from tests.json.support import open_files, open_json, reopened, temporary

pytestmark = pytest.mark.hf_sampled(by="layout")

T = "templates"

SCRIPT = """
import asyncio, sys
from hf_async_store import open_store

async def reader(store, ready):
    async for _ in store.stream_entities("templates"):
        ready.set()
        await asyncio.sleep(3600)

async def main():
    asyncio.get_running_loop().slow_callback_duration = 60  # of a busy machine it is no fault
    store = await open_store("json:" + sys.argv[1]).open()
    await store.save_entities("templates", [{"template_id": f"t-{n}"} for n in range(2000)])
    how = sys.argv[2]
    if how == "break":
        async for _ in store.stream_entities("templates"):
            break
    if how in ("running", "closed"):
        ready = asyncio.Event()
        tasks = [asyncio.create_task(reader(store, ready)) for _ in range(3)]
        await ready.wait()
        if how == "closed":
            for each in tasks:
                each.cancel()
            await store.close()
    if how == "writing":
        for n in range(50):
            asyncio.create_task(store.save_entity("templates", {"template_id": f"w-{n}"}))
        await asyncio.sleep(0)
    if how == "folding":
        store._json.compactor._start()
        await asyncio.sleep(0)
    if how == "transaction":
        tx = store.begin_transaction()
        await tx.__aenter__()
        await tx.save_entity("templates", {"template_id": "never"})
    print("acknowledged", flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    "how", ["nothing", "break", "running", "closed", "writing", "folding", "transaction"]
)
@both_layouts
async def test_a_process_ends_without_closing_its_store(
    tmp_path: Path, layout: str, how: str
) -> None:
    """It prints only a ResourceWarning, and keeps all acknowledged changes."""
    folder = tmp_path / "data"
    place = folder / "request_database.json" if layout == "single_file" else folder
    ran = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-X", "dev", "-c", SCRIPT, str(place), how],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert ran.stdout == "acknowledged\n"
    told = [each for each in ran.stderr.splitlines() if not each.startswith("  ")]
    if how == "closed":
        assert told == []
    else:
        assert "ResourceWarning: unclosed store" in told[0]
        assert f"<JSONStorageStrategy in {folder}>" in told[0]
        assert told[1:] == [
            "ResourceWarning: Enable tracemalloc to get the object allocation traceback"
        ]
    found = (await reopened(folder, layout))[T]
    assert {f"t-{each}" for each in range(2000)} <= found.keys()
    assert "never" not in found
    async with open_json(folder, layout) as store:
        await store.checkpoint()
        assert (await store.health())["ok"]
    assert temporary(folder) == []


@both_layouts
async def test_an_unreferenced_store_warns_and_closes_its_files(
    tmp_path: Path, layout: str
) -> None:
    store = await open_json(tmp_path, layout).open()
    await store.save_entity(T, {"template_id": "t"})
    await store.checkpoint()
    await store._json.compactor.close()  # a pending timer would reference the store
    del store
    with pytest.warns(ResourceWarning, match="unclosed store"):
        gc.collect()
    assert open_files(tmp_path) == []
    closed = await open_json(tmp_path, layout).open()
    await closed.get_entity(T, "t")
    await closed.close()
    del closed
    gc.collect()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the closed loop
def test_a_store_is_freed_whose_event_loop_was_closed_during_an_append(tmp_path: Path) -> None:
    async def begin_save() -> asyncio.Task[int]:
        store = await open_json(tmp_path, "single_file").open()
        await store.get_entity(T, "t-1")
        saving = asyncio.create_task(store.save_entity(T, {"template_id": "t-1"}))
        while (state := store._json.follower.state) is None or state.appending is None:
            await asyncio.sleep(0)
        return saving

    async def save() -> None:
        # The other store would keep its lock.
        async with open_json(tmp_path, "single_file", lock_timeout=0.5) as store:
            await store.save_entity(T, {"template_id": "t-2"})

    gc.collect()
    threads, descriptors = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # it reports the task that it destroys
    loop.run_until_complete(begin_save())
    loop.close()
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - threads:
        assert time.monotonic() < deadline
        gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    asyncio.run(save())


@both_layouts
async def test_a_cancelled_write_is_not_applied_after_its_task_ended(
    tmp_path: Path, layout: str
) -> None:
    """By then the write is either in the journal or will never be."""
    async with open_json(tmp_path, layout) as store, open_json(tmp_path, layout) as other:
        await store.save_entity(T, {"template_id": "t", "name": "0"})
        for number in range(60):

            async def write(number: int = number) -> None:
                async with store.begin_transaction() as tx:
                    await tx.update_entity(T, "t", {"name": str(number)})

            task = asyncio.create_task(write())
            for _ in range(number % 12):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            first = await other.get_entity(T, "t")
            await asyncio.sleep(0.002)
            assert await other.get_entity(T, "t") == first == await store.get_entity(T, "t")
            assert not store._json.locks.exclusive_held


async def test_a_commit_that_is_cancelled_twice_during_its_sync_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncing, may_end = threading.Event(), threading.Event()
    sync_data = journal_writer.sync_data

    def slow(fd: int) -> None:
        syncing.set()
        may_end.wait(30)
        sync_data(fd)

    async with open_json(tmp_path) as store, open_json(tmp_path) as other:
        await store.save_entity(T, {"template_id": "t", "name": "0"})
        monkeypatch.setattr(journal_writer, "sync_data", slow)

        async def write() -> None:
            async with store.begin_transaction() as tx:
                await tx.update_entity(T, "t", {"name": "1"})

        task = asyncio.create_task(write())
        await asyncio.to_thread(syncing.wait, 30)
        for message in ("first", "second"):
            assert task.cancel(message)
            await asyncio.sleep(0)
        assert not task.done()
        assert task.cancelling() == 2
        may_end.set()
        with pytest.raises(asyncio.CancelledError, match="second"):
            await task
        monkeypatch.undo()
        assert await store.update_entity(T, "t", {"name": "2"}) == 3
        assert (await other.get_entity(T, "t") or {})["version"] == 3


HOLD = """
import asyncio, sys
from hf_async_store import open_store

async def main():
    async with open_store("json:" + sys.argv[1]) as store:
        async with store.begin_transaction() as tx:
            await tx.save_entity("templates", {"template_id": "held"})
            print("held", flush=True)
            await asyncio.to_thread(sys.stdin.readline)

asyncio.run(main())
"""


@contextmanager
def _holder(place: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            process.communicate("\n", timeout=60)


@both_layouts
async def test_health_while_a_suspended_process_holds_the_write_lock(
    tmp_path: Path, layout: str
) -> None:
    place = tmp_path / "request_database.json" if layout == "single_file" else tmp_path
    async with open_json(tmp_path, layout, lock_timeout=0.5) as store:
        await store.save_entity(T, {"template_id": "t"})
        assert (await store.health())["ok"]
        with _holder(place) as process:
            os.kill(process.pid, signal.SIGSTOP)
            health = await store.health()
            assert not health["ok"]
            assert "no write could begin" in str(health["problems"])
            assert await store.get_entity(T, "t") is not None  # reads still succeed
            with pytest.raises(StorageError):
                await store.save_entity(T, {"template_id": "u"})
        assert (await store.health())["ok"]
        assert await store.get_entity(T, "held") is not None


@both_layouts
async def test_closing_waits_for_the_commit_of_a_transaction(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its descriptor and the lock would otherwise belong to somebody else when the thread writes."""
    async with open_json(tmp_path, layout) as other:  # so no compaction waits for the lock
        await other.save_entity(T, {"template_id": "t-1"})
        await _close_amid_a_commit(await open_json(tmp_path, layout).open(), monkeypatch)
    assert (await reopened(tmp_path, layout))[T].keys() == {"t-1", "t-2"}


async def _close_amid_a_commit(store: JSONStorageStrategy, monkeypatch: pytest.MonkeyPatch) -> None:
    writes, may_write = threading.Event(), threading.Event()
    write = journal_writer.write_all

    def slowly(fd: int, data: bytes, offset: int) -> None:
        writes.set()
        assert may_write.wait(60)
        write(fd, data, offset)

    tx = store.begin_transaction()
    await tx.__aenter__()
    await tx.save_entity(T, {"template_id": "t-2"})
    monkeypatch.setattr(journal_writer, "write_all", slowly)
    committing = asyncio.create_task(tx.__aexit__(None, None, None))
    assert await asyncio.to_thread(writes.wait, 60)
    closing = asyncio.create_task(store.close())
    await asyncio.sleep(0.05)
    was_closed = closing.done()
    may_write.set()
    await asyncio.gather(committing, closing)
    assert not was_closed


@both_layouts
@pytest.mark.parametrize("method", ["load", "load_unparsed"])
async def test_closing_waits_for_a_read_of_the_files(
    tmp_path: Path, layout: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_json(tmp_path, layout) as store:
        await store.save_entity(T, {"template_id": "t-1"})
    store = await open_json(tmp_path, layout).open()
    load = getattr(store._json.follower.loader, method)
    loads, may_load = asyncio.Event(), asyncio.Event()

    async def slowly(**options: Any) -> Any:
        loads.set()
        await may_load.wait()
        return await load(**options)

    monkeypatch.setattr(store._json.follower.loader, method, slowly)
    reading = asyncio.create_task(store.query_entities(T))
    await loads.wait()
    closing = asyncio.create_task(store.close())
    await asyncio.sleep(0.05)
    was_closed = closing.done()
    may_load.set()
    await closing
    [ended] = await asyncio.gather(reading, return_exceptions=True)
    assert isinstance(ended, list | StoreClosedError)
    assert not was_closed


@both_layouts
async def test_closing_waits_for_the_files_of_a_checkpoint(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process, which then gets the locks, may write the same files."""
    async with open_json(tmp_path, layout) as other:  # so that closing does not compact
        assert await other.get_entity(T, "t-1") is None
        store = await open_json(tmp_path, layout).open()
        await store.save_entity(T, {"template_id": "t-1"})
        await _close_amid(store, store.checkpoint, (store._json.files, "put_in_place"), monkeypatch)
    assert (await reopened(tmp_path, layout))[T].keys() == {"t-1"}


@both_layouts
async def test_closing_waits_for_the_record_of_declarations(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would otherwise replace that of another process, which then gets the lock."""
    store = await open_json(tmp_path, layout).open()
    later = Collection("later", key="later_id")
    await _close_amid(
        store,
        lambda: store._json.remember([later]),
        (declarations_file, "_replace"),
        monkeypatch,
    )


async def _close_amid(
    store: JSONStorageStrategy,
    call: Callable[[], Coroutine[Any, Any, None]],
    threaded: tuple[object, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Close the store while a call runs this function in a thread; the store waits for it."""
    begun, may_go_on = threading.Event(), threading.Event()
    function = getattr(*threaded)

    def slowly(*args: object) -> Any:
        begun.set()
        assert may_go_on.wait(60)
        return function(*args)

    monkeypatch.setattr(*threaded, slowly)
    calling = asyncio.create_task(call())
    assert await asyncio.to_thread(begun.wait, 60)
    closing = asyncio.create_task(store.close())
    await asyncio.sleep(0.05)
    was_closed = closing.done()
    may_go_on.set()
    await asyncio.gather(calling, closing)
    assert not was_closed


async def test_a_commit_after_one_whose_thread_could_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def fails(self: threading.Thread) -> None:
        if self.name == "hf-async-store-append":
            raise RuntimeError("can't start new thread")
        start(self)

    async with open_json(tmp_path, "single_file") as store:
        monkeypatch.setattr(threading.Thread, "start", fails)
        with pytest.raises(RuntimeError, match="can't start"):
            await store.save_entity(T, {"template_id": "t-1"})
        monkeypatch.setattr(threading.Thread, "start", start)
        saving = asyncio.create_task(store.save_entity(T, {"template_id": "t-2"}))
        await asyncio.wait([saving], timeout=20)
        if not saving.done():  # it would wait for ever, also if it is cancelled
            [job] = [each for each in gc.get_objects() if type(each) is _AppendJob]
            job.end()
            pytest.fail("the commit waits for a thread that is not there")
    assert (await reopened(tmp_path, "single_file"))[T].keys() == {"t-2"}


async def test_a_commit_after_one_for_which_there_were_no_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> tuple[int, int]:
        raise OSError(errno.EMFILE, "too many open files")

    async with open_json(tmp_path, "single_file") as store:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pipe", fails)
            with pytest.raises(DiskFullError):
                await store.save_entity(T, {"template_id": "t-1"})
        assert await store.save_entity(T, {"template_id": "t-2"}) == 1
    assert (await reopened(tmp_path, "single_file"))[T].keys() == {"t-2"}


async def test_no_task_is_left_when_opening_a_large_file_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_json(tmp_path, "single_file") as store:
        await store.save_entity(T, {"template_id": "t-1"})
    for each in (files, recovery):
        monkeypatch.setattr(each, "_LARGE_FILE", 0)
    may_end, digest = threading.Event(), files._digest
    parses = asyncio.Event()

    def slowly(data: bytes) -> str:
        assert may_end.wait(60)
        return digest(data)

    async def parsing(*_: object) -> bool:
        parses.set()
        return await asyncio.Future()

    monkeypatch.setattr(files, "_digest", slowly)
    monkeypatch.setattr(recovery.StoreLoader, "_parse_file", parsing)
    before = asyncio.all_tasks()
    opening = asyncio.create_task(reopened(tmp_path, "single_file"))
    await parses.wait()
    opening.cancel()
    try:
        with pytest.raises(asyncio.CancelledError):
            await opening
        assert asyncio.all_tasks() == before
    finally:
        may_end.set()


async def test_closing_frees_the_entities(tmp_path: Path) -> None:
    """Otherwise the garbage collector frees all of them in one step, some time later."""
    store = open_json(tmp_path)
    await store.open()
    await store.save_entity(T, {"template_id": "t-1"})
    state = store._json.follower.state
    assert state is not None
    table = state.sections[T]
    await store.close()
    assert not table.entities


async def test_a_read_that_pauses_while_the_store_closes_finds_no_entity_missing(
    tmp_path: Path,
) -> None:
    store = open_json(tmp_path)
    await store.open()
    await store.save_entity(T, {"template_id": "t-1"})
    store._json._reads = engine._YIELD_MASK  # the next read pauses
    reading = store.get_entity(T, "t-1")
    reading.send(None)
    await store.close()
    with pytest.raises(StoreClosedError):
        reading.send(None)


async def test_a_snapshot_can_still_be_read_after_closing(tmp_path: Path) -> None:
    store = open_json(tmp_path)
    await store.open()
    await store.save_entity(T, {"template_id": "t-1"})
    async with store.snapshot() as reader:
        await store.close()
        assert [each is not None for each in await reader.fetch([Key(T, "t-1")])] == [True]


async def test_no_commit_waits_for_the_syncs_before_and_after_a_compaction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next journal is synced before the write lock is acquired, the folder after it was released."""
    held: dict[str, bool] = {}
    async with open_json(tmp_path) as store:
        await store.save_entity(T, {"template_id": "t-1"})
        for owner, name in ((journal_writer, "prepare_file"), (store._json.files, "settle")):
            call = getattr(owner, name)

            def noted(*given: Any, name: str = name, call: Callable[..., Any] = call) -> Any:
                held[name] = store._json.locks.exclusive_held
                return call(*given)

            monkeypatch.setattr(owner, name, noted)
        await store.checkpoint()
    assert held == {"prepare_file": False, "settle": False}
