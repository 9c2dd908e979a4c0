"""A power failure: data that were not synced may be lost. This is simulated with a model of the disk.

At every file call of a workload, the possible states of the disk after a power failure are generated:
the contents of files and the names in the folder as last synced, or as they are now. All acknowledged
changes must exist in each of these states.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import pytest

from hf_async_store.errors import CorruptionError, UnavailableError
from hf_async_store.strategies.json import compaction
from hf_async_store.strategies.json.journal import (
    HEADER_SIZE,
    Head,
    Kind,
    control,
    read_naming,
    record,
    scan,
)
from hf_async_store.testing.repetitions import sampled
from tests.json.crash_driver import WORKLOADS, model
from tests.json.process_roles import Member
from tests.json.support import (
    LAYOUTS,
    WHOLE,
    Call,
    FileCalls,
    Stored,
    abandon,
    data_files,
    journals,
    never_folds,
    open_json,
    parsed,
    reopened,
    whole,
    without_times,
)

pytestmark = pytest.mark.hf_sampled(by="layout")

_open, _fstat, _pread, _close, _stat = os.open, os.fstat, os.pread, os.close, os.stat


class Moment(NamedTuple):
    """The state of the disk at one call, and the number of steps acknowledged before it."""

    call: Call
    acked: int
    disks: list[dict[str, bytes]]


class Disk:
    """Tracks one folder: its current state, and the possible states after a power failure.

    It keeps the files open, so that no inode number is used twice.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fds: dict[int, int] = {}
        self._synced: dict[int, bytes] = {}
        self._names: dict[str, int] = {}
        self._last: Call | None = None
        self.acked = 0
        self.moments: list[Moment] = []

    def __call__(self, call: Call, size: int) -> int:
        """Called before each file call, when the previous one is done."""
        self._follow()
        self.moments.append(Moment(call, self.acked, self._disks()))
        self._last = call
        return WHOLE

    def _follow(self) -> None:
        now = self._now()
        last = self._last
        if last is None or last.name not in ("fsync", "fdatasync"):
            return
        if Path(last.path) == self._folder:
            self._names = now
        else:
            inode = now.get(Path(last.path).name)
            if inode is not None:
                self._synced[inode] = self._content(inode)

    def _now(self) -> dict[str, int]:
        found = {}
        for name in os.listdir(self._folder) if self._folder.exists() else []:
            if ".lock" in name:
                continue
            inode = _stat(self._folder / name).st_ino
            found[name] = inode
            if inode not in self._fds:
                self._fds[inode] = _open(self._folder / name, os.O_RDONLY)
        return found

    def _content(self, inode: int) -> bytes:
        fd = self._fds[inode]
        return _pread(fd, _fstat(fd).st_size, 0)

    def _disks(self) -> list[dict[str, bytes]]:
        """The possible states: old or new names, with old, new or partly written contents."""
        now = self._now()
        disks = []
        for names, part in itertools.product((self._names, now), (0.0, 0.5, 1.0)):
            disks.append({name: self._some(inode, part) for name, inode in names.items()})
        return disks

    def _some(self, inode: int, part: float) -> bytes:
        synced, now = self._synced.get(inode, b""), self._content(inode)
        if now.startswith(synced):
            return now[: len(synced) + int(part * (len(now) - len(synced)))]
        return now if part else synced

    def close(self) -> None:
        for fd in self._fds.values():
            _close(fd)


async def _run(folder: Path, layout: str, workload: str, **settings: Any) -> Disk:
    disk = Disk(folder)
    with FileCalls(folder, disk):
        async with open_json(folder, layout, **settings) as store:
            for step in WORKLOADS[workload]:
                await step(store)
                disk.acked += 1
    return disk


async def _after(folder: Path, disk: dict[str, bytes], layout: str, **settings: Any) -> Stored:
    folder.mkdir()
    for name, text in disk.items():
        (folder / name).write_bytes(text)
    for each in data_files(folder):
        parsed(each)
    found = await reopened(folder, layout, **settings)
    async with open_json(folder, layout, **settings) as store:
        await store.save_entity("templates", {"template_id": "after"})
        await store.checkpoint()
        now = await whole(store)
        assert now["templates"].pop("after")
        assert now == found
        assert len(journals(folder)) == 1
    return without_times(found)


_SETTINGS: Final[list[dict[str, Any]]] = [{}, {"enable_compression": True, "backup_enabled": False}]


async def _sweep(layout: str, settings: dict[str, Any], *, loses: bool = False) -> None:
    problems = []
    states = await model(WORKLOADS["script"], {})
    memory = Path("/dev/shm")
    where = str(memory) if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="hf-power-", dir=where) as base:
        disk = await _run(Path(base, "run"), layout, "script", **settings)
        disk.close()
        seen: set[tuple[int, frozenset[tuple[str, bytes]]]] = set()
        for moment in sampled(disk.moments):
            for number, files in enumerate(moment.disks):
                key = (moment.acked, frozenset(files.items()))
                if key in seen:
                    continue
                seen.add(key)
                least = 0 if loses else moment.acked
                try:
                    found = await _after(Path(base, str(len(seen))), files, layout, **settings)
                    assert found in states[least : moment.acked + 2], f"there is {found}"
                except Exception as exc:
                    what = f"{moment.call}, disk {number}, after {moment.acked} steps"
                    problems.append(f"{what}: {type(exc).__name__}: {str(exc)[:300]}")
    assert not problems, f"{len(problems)} of {len(seen)}:\n" + "\n".join(problems[:12])
    assert len(seen) > 30, "too few states for a meaningful test"


@pytest.mark.parametrize("settings", _SETTINGS, ids=["plain", "packed"])
@pytest.mark.parametrize("layout", LAYOUTS)
async def test_82_power_failure(layout: str, settings: dict[str, Any]) -> None:
    await _sweep(layout, settings)


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_82_power_failure_without_syncs(layout: str) -> None:
    """With `sync_writes` off, only the last commits may be lost."""
    await _sweep(layout, {"sync_writes": False}, loses=True)


# -- an append after a power failure --------------------------------------------------------------

_TORN: Final[dict[str, Callable[[bytes], bytes]]] = {
    "zeros behind a part": lambda whole: whole[: HEADER_SIZE + 4] + b"\0" * (len(whole) - 32),
    "zeros behind a part of the header": lambda whole: whole[:11] + b"\0" * (len(whole) - 11),
    "nothing but zeros": lambda whole: b"\0" * 4096,
    "a content that was not written": lambda whole: (
        whole[:HEADER_SIZE] + b"\0" * (len(whole) - HEADER_SIZE)
    ),
    "zeros to the end of the block": lambda whole: whole[:-3] + b"\0" * 4096,
}


@pytest.mark.parametrize("torn", _TORN)
@pytest.mark.parametrize("layout", LAYOUTS)
async def test_85_the_readable_part_of_a_journal_is_adopted(
    tmp_path: Path, layout: str, torn: str
) -> None:
    before, damaged = await _torn(tmp_path, layout, _TORN[torn])
    [journal] = journals(tmp_path)
    async with open_json(tmp_path, layout) as store:
        with pytest.raises(CorruptionError, match="--recover-from salvage"):
            await store.get_entity("templates", "t0")
        assert journal.read_bytes() == damaged, "detecting the damage changed the journal"
        await store.checkpoint(recover_from="salvage")
        assert await whole(store) == before
        assert await store.save_entity("templates", {"template_id": "t2"}) == 2
    [kept] = tmp_path.glob("*.damaged.*")
    assert kept.read_bytes() == damaged
    assert len(journals(tmp_path)) == 1
    found = await reopened(tmp_path, layout)
    assert found["templates"].pop("t2")["version"] == 2
    assert found["templates"] == {
        name: each for name, each in before["templates"].items() if name != "t2"
    }


async def _torn(folder: Path, layout: str, tear: Callable[[bytes], bytes]) -> tuple[Stored, bytes]:
    """A store with a data file, three commits and an incomplete fourth one in its journal; returns the
    contents without the fourth commit, and the bytes of the journal."""
    async with open_json(folder, layout) as store:
        await store.save_entity("templates", {"template_id": "t0", "name": "filed"})
        await store.checkpoint()
    store = await open_json(folder, layout).open()
    never_folds(store)
    await store.save_entity("templates", {"template_id": "t1"})
    await store.save_entity("machines", {"machine_id": "m1", "name": "ü"})
    await store.save_entity("templates", {"template_id": "t2"})
    before = await whole(store)
    size = journals(folder)[-1].stat().st_size
    await store.save_entity("templates", {"template_id": "lost"})
    await abandon(store)
    [journal] = journals(folder)
    data = journal.read_bytes()
    damaged = data[:size] + tear(data[size:])
    journal.write_bytes(damaged)
    return before, damaged


async def test_85_a_journal_after_a_damaged_one_is_excluded_and_kept(tmp_path: Path) -> None:
    """Of two journals the older one is damaged: the newer one is valid only if the data files contain
    the older one."""
    before, damaged = await _torn(tmp_path, "single_file", lambda torn: b"\0" * 99)
    [old] = journals(tmp_path)
    generation = int(old.name.rpartition(".")[2])
    newer = old.with_name(old.name.replace(f"{generation:08d}", f"{generation + 1:08d}"))
    head = next(scan([damaged], "", 0, 0))[0]
    told = msgspec.structs.replace(read_naming(Head, head.payload), generation=generation + 1)
    newer.write_bytes(
        record(*control(told), 0)
        + record(Kind.COMMIT, b'{"templates":{"t9":{"version":1,"template_id":"t9"}}}', 1)
    )
    async with open_json(tmp_path) as store:
        with pytest.raises(CorruptionError):
            await store.get_entity("templates", "t0")
        await store.checkpoint(recover_from="salvage")
        assert await whole(store) == before
    assert len(list(tmp_path.glob("*.damaged.*"))) == 2
    assert await reopened(tmp_path) == before


@pytest.mark.parametrize("torn", _TORN)
async def test_85_an_open_store_follows_the_adoption(tmp_path: Path, torn: str) -> None:
    """The store had read a commit that the disk has lost: its memory must follow the files."""
    async with open_json(tmp_path) as other:
        never_folds(other)
        before, damaged = await _torn(tmp_path, "single_file", lambda torn: torn)
        assert await other.get_entity("templates", "lost")
        [journal] = journals(tmp_path)
        size = len(damaged) - len(_last(damaged))
        damaged = damaged[:size] + _TORN[torn](damaged[size:])
        with journal.open("r+b") as file:
            file.truncate(size)
            file.seek(size)
            file.write(damaged[size:])
        async with open_json(tmp_path) as store:
            await store.checkpoint(recover_from="salvage")
            assert await whole(other) == before
            assert await other.get_entity("templates", "lost") is None
            assert await other.save_entity("templates", {"template_id": "lost"}) == 1
            assert await store.save_entity("templates", {"template_id": "lost"}) == 2


def _last(data: bytes) -> bytes:
    *_, (_, start), (_, end) = scan([data], "", 0, 0)
    return data[start:end]


async def test_82_the_folders_above_a_new_store_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    folder = tmp_path / "a" / "b"
    async with open_json(folder) as store:
        await store.save_entity("templates", {"template_id": "t"})
        assert {str(folder), str(folder.parent), str(tmp_path)} <= synced


async def test_82_replaced_files_of_a_process_that_died_are_synced_before_journals_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a process that has synced the folder after a compaction of its own, before that."""
    calls: list[str] = []

    async def dies(*_: object) -> None:
        raise UnavailableError("it died")

    async with open_json(tmp_path) as store, open_json(tmp_path) as dying:
        never_folds(store)
        never_folds(dying)
        for each in (dying, store):
            await each.save_entity("templates", {"template_id": "t"})
            await each.checkpoint()
        await dying.save_entity("templates", {"template_id": "t2"})
        monkeypatch.setattr(dying._json.compactor, "_settle", dies)
        with pytest.raises(UnavailableError):
            await dying.checkpoint()
        for name in ("settle", "drop_journals"):
            function = getattr(store._json.files, name)

            def noted(*given: Any, name: str = name, function: Any = function) -> Any:
                calls.append(name)
                return function(*given)

            monkeypatch.setattr(store._json.files, name, noted)
        await store.checkpoint()
        assert calls[:2] == ["settle", "drop_journals"]
        assert len(journals(tmp_path)) == 1


# -- a sync that failed -------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_82_a_failed_sync_is_detected_by_other_processes(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process appends to that journal: the next writer first writes all data into new files."""
    # On a busy machine, more than the usual second passes.
    monkeypatch.setattr(compaction, "_IDLE_SECONDS", 300)
    async with open_json(tmp_path, layout) as store:
        await store.save_entity("templates", {"template_id": "ours"})
        async with Member("unsynced", tmp_path, layout) as failing:
            failing.say()
            assert await failing.line() == {"unknown": True}
            [journal] = journals(tmp_path)
            health = await store.health()
            assert any("a sync of" in str(each) for each in health["problems"])
            failing.say()
            await failing.process.wait()
        await store.save_entity("templates", {"template_id": "next"})
        assert not journal.exists(), "a journal whose sync failed is still in use"
        text = "".join(each.read_text() for each in data_files(tmp_path))
        assert '"unsynced"' in text
        assert '"ours"' in text
        assert (await store.health())["problems"] == []
        shown = await whole(store)
        assert {*shown["templates"]} == {"ours", "synced", "unsynced", "next"}
        assert await reopened(tmp_path, layout) == shown


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_82_a_store_opened_after_a_failed_sync_detects_it(
    tmp_path: Path, layout: str
) -> None:
    async with Member("unsynced", tmp_path, layout) as failing:
        failing.say()
        assert await failing.line() == {"unknown": True}
        failing.say()
        await failing.process.wait()
    [journal] = journals(tmp_path)
    async with open_json(tmp_path, layout) as store:
        await store.save_entity("templates", {"template_id": "next"})
        assert not journal.exists()
        assert '"unsynced"' in "".join(each.read_text() for each in data_files(tmp_path))
