"""The file system fails at every one of its calls in turn (contract 83).

Each scene is run once to record its file calls, then once per call and error: that call fails, or
all calls from it on fail until the fault is removed.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from hf_async_store import JSONStorageStrategy
from hf_async_store.errors import (
    DataFileConflictError,
    DiskFullError,
    PermissionDeniedError,
    ReadOnlyStoreError,
    StorageError,
    UnavailableError,
)
from hf_async_store.testing.repetitions import sampled
from tests.json.support import (
    CHANGES,
    LAYOUTS,
    WHOLE,
    Call,
    FileCalls,
    Stored,
    abandon,
    data_files,
    journals,
    open_files,
    open_json,
    reopened,
    temporary,
    watched,
    whole,
    without_times,
)

pytestmark = pytest.mark.hf_sampled(by="layout")

CLASSES: Final[dict[int, type[StorageError]]] = {
    errno.EIO: UnavailableError,
    errno.ENOSPC: DiskFullError,
    errno.EDQUOT: DiskFullError,
    errno.EROFS: ReadOnlyStoreError,
    errno.EACCES: PermissionDeniedError,
}
ANYWHERE: Final = (errno.EIO, errno.EACCES)
"""The errors that can also occur in reads."""


Act = Callable[[JSONStorageStrategy], Awaitable[object]]


class Scene(NamedTuple):
    """An operation during which the file system fails.

    Attributes:
        act: the operation.
        writes: it commits, so that the contents before and after it differ.
        warm: what is done with the same store before, without a fault.
        by_hand: the data file is changed manually before.
        raises: the operation may raise; otherwise it must succeed despite the fault.
    """

    act: Act
    writes: bool = False
    warm: Act | None = None
    by_hand: bool = False
    raises: bool = True


async def _seed(store: JSONStorageStrategy) -> None:
    async with store.begin_transaction() as tx:
        await tx.save_entity("templates", {"template_id": "t1", "name": "a"})
        await tx.save_entity("requests", {"request_id": "r1", "template_id": "t1"})
        await tx.save_entity("machines", {"machine_id": "m1", "request_id": "r1"})


async def _commit(store: JSONStorageStrategy) -> None:
    async with store.begin_transaction() as tx:
        await tx.update_entity("templates", "t1", {"name": "b"})
        await tx.delete_entity("machines", "m1")
        await tx.save_entity("machines", {"machine_id": "m2", "request_id": "r1"})


async def _one(store: JSONStorageStrategy) -> None:
    await store.update_entity("templates", "t1", {"vm_type": "warm"})


async def _get(store: JSONStorageStrategy) -> None:
    assert await store.get_entity("machines", "m1"), "an error was taken for absence"


async def _query(store: JSONStorageStrategy) -> None:
    rows = await store.query_entities("machines", {"request_id": "r1"})
    assert len(rows) == 1, "an error was taken for absence"


async def _checkpoint(store: JSONStorageStrategy) -> None:
    await store.checkpoint()


async def _others_write(store: JSONStorageStrategy) -> None:
    await _get(store)
    folder = Path(str(store.describe()["folder"]))
    layout = "split_files" if "machines.json" in str(store.describe()["files"]) else "single_file"
    async with open_json(folder, layout) as other:
        await _one(other)
        await other.checkpoint()
        await _one(other)


async def _failed_sync(store: JSONStorageStrategy) -> None:
    def hook(call: Call, size: int) -> int:
        if call.name == "fdatasync":
            raise OSError(errno.EIO, "not brought to the disk")
        return WHOLE

    await _get(store)
    with FileCalls(Path(str(store.describe()["folder"])), hook):
        with pytest.raises(UnavailableError) as caught:
            await _one(store)
    assert caught.value.outcome_unknown


async def _write_file(store: JSONStorageStrategy) -> None:
    found = await store.read_file()
    found["machines"] = {"m2": {"machine_id": "m2", "request_id": "r1"}}
    found["templates"]["t1"]["name"] = "b"
    await store.write_file(found)


async def _adopt(store: JSONStorageStrategy) -> None:
    await store.checkpoint(recover_from="journal")


async def _probe(store: JSONStorageStrategy) -> None:
    await store.test_connection()


async def _health(store: JSONStorageStrategy) -> None:
    report = await store.health()
    assert isinstance(report["problems"], list)


async def _close(store: JSONStorageStrategy) -> None:
    await store.close()


SCENES: Final[dict[str, Scene]] = {
    "commit": Scene(_commit, writes=True, warm=_one),
    "first commit of a process": Scene(_commit, writes=True),
    "write_file": Scene(_write_file, writes=True, warm=_get),
    "commit after a failed sync": Scene(_commit, writes=True, warm=_failed_sync),
    "first read of a process": Scene(_get),
    "query of a process": Scene(_query),
    "read what others wrote": Scene(_get, warm=_others_write),
    "checkpoint": Scene(_checkpoint, warm=_one),
    "close": Scene(_close, warm=_one, raises=False),
    "probe": Scene(_probe, warm=_get),
    "health": Scene(_health, warm=_get, raises=False),
    "adopt": Scene(_adopt, by_hand=True),
}


class Fault(NamedTuple):
    """A failing call, alone or with all later ones."""

    call: Call
    number: int
    lasts: bool

    def __str__(self) -> str:
        more = " and all that follow" if self.lasts else ""
        return f"{self.call}{more} with {errno.errorcode[self.number]}"


class Broken:
    """The hook that injects a fault; records the calls that it let fail."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.failed: list[Call] = []

    def __call__(self, call: Call, size: int) -> int:
        at = self.fault.call.number
        if call.number == at or (self.fault.lasts and call.number > at and self._fits(call)):
            self.failed.append(call)
            raise OSError(self.fault.number, os.strerror(self.fault.number))
        return WHOLE

    def _fits(self, call: Call) -> bool:
        return self.fault.number in ANYWHERE or call.name in CHANGES


# -- stages -----------------------------------------------------------------------------------


@contextmanager
def _folder() -> Iterator[Path]:
    memory = Path("/dev/shm")
    where = str(memory) if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="hf-fault-", dir=where) as folder:
        yield Path(folder)


async def _prepared(folder: Path, layout: str, scene: Scene) -> Stored:
    """A store with an empty journal, or with a manually changed file and a commit in its journal."""
    async with open_json(folder, layout) as store:
        await _seed(store)
    if scene.by_hand:
        store = await open_json(folder, layout).open()
        await _one(store)
        await abandon(store)
        for each in data_files(folder):
            if each.name != "requests.json":
                each.write_bytes(each.read_bytes().replace(b'"r1"', b'"r1" '))
    return await _shown(folder, layout)


async def _shown(folder: Path, layout: str) -> Stored:
    try:
        return without_times(await reopened(folder, layout))
    except DataFileConflictError:
        return {}


@asynccontextmanager
async def _opened(folder: Path, layout: str, scene: Scene) -> AsyncIterator[JSONStorageStrategy]:
    store = await open_json(folder, layout).open()
    try:
        if scene.warm is not None:
            await scene.warm(store)
        yield store
    finally:
        await store.close()


async def _calls(start: Path, folder: Path, layout: str, scene: Scene) -> list[Call]:
    shutil.copytree(start, folder)
    async with _opened(folder, layout, scene) as store:
        with watched(folder, only=None) as calls:
            await scene.act(store)
    return calls


async def _states(start: Path, folder: Path, layout: str, scene: Scene) -> tuple[Stored, Stored]:
    """The contents before and after the operation."""
    shutil.copytree(start, folder)
    store = await open_json(folder, layout).open()
    if scene.warm is not None:
        await scene.warm(store)
    before = {} if scene.by_hand else without_times(await whole(store))
    await scene.act(store)
    if scene.act is _close:
        return before, before
    after = without_times(await whole(store))
    await abandon(store)
    return before, after


async def _fail(
    folder: Path, layout: str, scene: Scene, fault: Fault, states: tuple[Stored, Stored]
) -> None:
    """Run the scene with one fault, and check the store afterwards."""
    before, after = states
    broken = Broken(fault)
    async with _opened(folder, layout, scene) as store:
        with FileCalls(folder, broken, only=None):
            error = await _error_of(scene, store)
        _check_error(scene, fault, broken, error)
        if scene.act is not _close:
            await _check_store(store, folder, layout, scene, error, before, after)
    assert open_files(folder) == [], f"left open: {open_files(folder)}"
    if scene.act is _close:
        assert without_times(await reopened(folder, layout)) == after, "lost at close"


async def _error_of(scene: Scene, store: JSONStorageStrategy) -> StorageError | None:
    try:
        await asyncio.wait_for(scene.act(store), 60)
    except StorageError as exc:
        return exc
    return None


def _check_error(scene: Scene, fault: Fault, broken: Broken, error: StorageError | None) -> None:
    if error is None:
        return
    assert scene.raises, f"raised {error!r}"
    assert type(error) is CLASSES[fault.number], f"raised {error!r}"
    assert isinstance(error.__cause__, OSError), f"not chained: {error!r}"
    # If it cannot be read who waits, the commit goes on: another call is the reason of the error.
    last = next(
        each for each in broken.failed if each.name != "pread" or not each.path.endswith(".turn")
    )
    unknown = scene.writes and last.name == "fdatasync" and _is_commit(last, broken)
    assert error.outcome_unknown == unknown, f"outcome_unknown is {error.outcome_unknown}: {error}"


def _is_commit(call: Call, broken: Broken) -> bool:
    """Whether the call is the sync of the commit itself, not of a seal or compaction before it."""
    return ".journal." in call.path and call.number == _last_sync.get(id(broken.fault), -1)


_last_sync: dict[int, int] = {}


async def _check_store(
    store: JSONStorageStrategy,
    folder: Path,
    layout: str,
    scene: Scene,
    error: StorageError | None,
    before: Stored,
    after: Stored,
) -> None:
    """Check that the previous data are intact, and that the store is usable after the fault is removed."""
    if scene.by_hand:
        await _check_adoption(store, error)
    landed = error is None or error.outcome_unknown
    expected = after if landed or not scene.writes else before
    now = without_times(await whole(store))
    assert now == expected, f"shows {now}, not {expected}"
    assert without_times(await reopened(folder, layout)) == expected, "a new store shows another"
    await asyncio.wait_for(_go_on(store, folder, layout), 60)


async def _check_adoption(store: JSONStorageStrategy, error: StorageError | None) -> None:
    try:
        await store.get_entity("templates", "t1")
    except DataFileConflictError:
        assert error is not None, "adopted, and still a question"
        await _adopt(store)


async def _go_on(store: JSONStorageStrategy, folder: Path, layout: str) -> None:
    await store.save_entity("templates", {"template_id": "after"})
    async with open_json(folder, layout) as other:
        assert await other.save_entity("templates", {"template_id": "after"}) == 2
        await other.save_entity("requests", {"request_id": "after"})
    assert await store.save_entity("templates", {"template_id": "after"}) == 3
    await store.checkpoint()
    assert not temporary(folder), f"left behind: {temporary(folder)}"
    assert len(journals(folder)) == 1, f"left behind: {journals(folder)}"
    gone = [each for each in open_files(folder) if "(deleted)" in each]
    assert not gone, f"still open: {gone}"
    assert await whole(store) == await reopened(folder, layout)


async def _sweep(
    name: str, layout: str, faults_of: Callable[[Call], list[tuple[int, bool]]]
) -> int:
    scene = SCENES[name]
    problems: list[str] = []
    runs = 0
    with _folder() as base:
        start = base / "start"
        await _prepared(start, layout, scene)
        calls = await _calls(start, base / "calls", layout, scene)
        states = await _states(start, base / "states", layout, scene)
        syncs = [each.number for each in calls if each.name == "fdatasync"]
        for call in sampled(calls):
            for number, lasts in faults_of(call):
                fault = Fault(call, number, lasts)
                _last_sync[id(fault)] = syncs[-1] if syncs else -1
                folder = base / str(runs)
                runs += 1
                shutil.copytree(start, folder)
                try:
                    await _fail(folder, layout, scene, fault, states)
                except Exception as exc:
                    problems.append(f"{fault}: {type(exc).__name__}: {str(exc)[:600]}")
                shutil.rmtree(folder, ignore_errors=True)
    assert not problems, f"{len(problems)} of {runs}:\n" + "\n".join(problems[:12])
    return runs


def _in_turn(call: Call) -> list[tuple[int, bool]]:
    """One fault for each call, with varying errors; every second fault is permanent."""
    errors = list(CLASSES) if call.name in CHANGES else list(ANYWHERE)
    return [(errors[call.number % len(errors)], call.number % 2 == 1)]


def _every(call: Call) -> list[tuple[int, bool]]:
    errors = list(CLASSES) if call.name in CHANGES else list(ANYWHERE)
    return [(number, lasts) for number in errors for lasts in (False, True)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SCENES)
async def test_83_a_fault_at_every_call(name: str, layout: str) -> None:
    assert await _sweep(name, layout, _in_turn)


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SCENES)
async def test_83_every_fault_at_every_call(name: str, layout: str) -> None:
    assert await _sweep(name, layout, _every)


# -- a disk that is really full ---------------------------------------------------------------


@contextmanager
def _small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as exc:
        pytest.skip(f"no file system can be mounted here: {exc}")
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _fill(folder: Path) -> Path:
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError as exc:
                assert exc.errno == errno.ENOSPC
    return filler


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_83_a_full_disk(tmp_path: Path, layout: str) -> None:
    """Writes fail and reads succeed; when space is available again, writes succeed and nothing is lost."""
    with _small_disk(tmp_path / "disk", "1m") as disk:
        folder = disk / "store"
        async with open_json(folder, layout) as store:
            await _seed(store)
            before = await whole(store)
            filler = _fill(disk)
            for _ in range(3):
                with pytest.raises(DiskFullError) as caught:
                    await store.save_entity("templates", {"template_id": "t2", "name": "x" * 9000})
                assert not caught.value.outcome_unknown
                with pytest.raises(DiskFullError):
                    await store.checkpoint()
                assert await whole(store) == before
                assert await reopened(folder, layout) == before
            filler.unlink()
            await store.save_entity("templates", {"template_id": "t2", "name": "x" * 9000})
            await store.checkpoint()
            assert not temporary(folder)
            assert len(journals(folder)) == 1
            now = await whole(store)
        assert list(now["templates"]) == ["t1", "t2"]
        assert await reopened(folder, layout) == now


async def test_83_a_disk_that_fills_up_under_load(tmp_path: Path) -> None:
    """Acknowledged writes are stored, refused ones are not."""
    with _small_disk(tmp_path / "disk", "600k") as disk:
        folder = disk / "store"
        kept: set[str] = set()
        refused: set[str] = set()
        async with open_json(folder, backup_enabled=False) as store:

            async def one(number: int) -> None:
                name = f"t{number:03}"
                try:
                    await store.save_entity("templates", {"template_id": name, "name": "x" * 4000})
                    kept.add(name)
                except DiskFullError:
                    refused.add(name)

            for start in range(0, 240, 8):
                await asyncio.gather(*(one(number) for number in range(start, start + 8)))
            assert kept
            assert refused
            assert {*await _ids(store)} == kept
        assert {*(await reopened(folder))["templates"]} == kept


async def _ids(store: JSONStorageStrategy) -> list[str]:
    return [str(each["template_id"]) for each in await store.query_entities("templates")]
