"""Locations and files of a store: links, mounts, special files, names, owners."""

from __future__ import annotations

import asyncio
import json  # imported before a test drops its privileges
import logging
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hf_async_store import HOST_FACTORY, Collection, JSONStorageStrategy, open_store
from hf_async_store.cli import main
from hf_async_store.config import Filenames
from hf_async_store.driver import Engine
from hf_async_store.errors import (
    ConfigurationError,
    DataFileConflictError,
    PermissionDeniedError,
    StorageError,
    UnavailableError,
)
from hf_async_store.migration_routing import unrouted
from tests.json.layouts import both_layouts
from tests.json.support import (
    SINGLE,
    abandon,
    journals,
    open_json,
    parsed,
    reopened,
    temporary,
    whole,
)

pytestmark = pytest.mark.hf_sampled(by="layout")

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may change owners and mount")
T = "templates"
NAMES = [each.name for each in HOST_FACTORY]


def named(folder: Path, name: str, **settings: Any) -> JSONStorageStrategy:
    return open_json(folder, filenames=Filenames(single_file=name), **settings)


async def seed(folder: Path, layout: str = "single_file", **settings: Any) -> None:
    async with open_json(folder, layout, **settings) as store:
        await store.save_entity(T, {"template_id": "t"})
        await store.checkpoint()


def listing(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


# -- links ------------------------------------------------------------------------------------


async def _both_ways(one: JSONStorageStrategy, other: JSONStorageStrategy) -> None:
    """Check that two stores are the same: no save is lost, and no version occurs twice."""
    async with one, other:
        versions = [
            await store.save_entity(T, {"template_id": "x"})
            for _ in range(5)
            for store in (one, other)
        ]
        assert versions == list(range(versions[0], versions[0] + 10))
        assert await one.engine.is_same_store(other.engine)
        for store, name in ((one, "one"), (other, "other")):
            await store.save_entity(T, {"template_id": name})
            await store.checkpoint()
        found = await whole(one)
        assert found == await whole(other)
        assert {"one", "other", "x"} <= found[T].keys()
    assert (await whole_of(other))[T] == found[T]


async def whole_of(store: JSONStorageStrategy) -> Any:
    async with JSONStorageStrategy(store._json.config) as again:
        return await whole(again)


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("packed", [False, True])
async def test_119_a_link_to_the_data_file(tmp_path: Path, there: bool, packed: bool) -> None:
    big, app = tmp_path / "big", tmp_path / "app"
    big.mkdir()
    app.mkdir()
    if there:
        await seed(big, enable_compression=packed)
    name = f"{SINGLE}.gz" if packed else SINGLE
    link = app / name
    (app / "chain").symlink_to(f"../big/{name}")
    link.symlink_to(app / "chain")
    await _both_ways(
        open_json(app, enable_compression=packed), open_json(big, enable_compression=packed)
    )
    assert link.is_symlink()
    assert listing(app) == sorted(["chain", name])
    assert (big / name).is_file()


@both_layouts
async def test_119_a_link_to_the_folder(tmp_path: Path, layout: str) -> None:
    await seed(tmp_path / "big", layout)
    (tmp_path / "app").symlink_to("big")
    await _both_ways(open_json(tmp_path / "app", layout), open_json(tmp_path / "big", layout))
    assert (tmp_path / "app").is_symlink()


@both_layouts
async def test_119_other_spellings(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path)
    relative = open_json(Path("data"), layout)
    monkeypatch.chdir(tmp_path / "else")
    await _both_ways(relative, open_json(Path("../else/../data"), layout))
    assert listing(tmp_path / "else") == []


async def test_119_symbolic_links_of_split_files_to_one_folder(tmp_path: Path) -> None:
    await seed(tmp_path / "big", "split_files")
    app = tmp_path / "app"
    app.mkdir()
    for name in NAMES:
        (app / f"{name}.json").symlink_to(tmp_path / "big" / f"{name}.json")
    await _both_ways(open_json(app, "split_files"), open_json(tmp_path / "big", "split_files"))
    assert listing(app) == sorted(f"{name}.json" for name in NAMES)


async def test_links_to_several_folders_are_refused(tmp_path: Path) -> None:
    app = tmp_path / "app"
    app.mkdir()
    (app / "machines.json").symlink_to(tmp_path / "machines.json")
    with pytest.raises(ConfigurationError, match="several folders"):
        open_json(app, "split_files")


@pytest.mark.parametrize("target", ["db.json.gz", ".x.lock", "x.journal.00000001"])
async def test_links_to_names_that_are_no_data_file(tmp_path: Path, target: str) -> None:
    (tmp_path / SINGLE).symlink_to(tmp_path / target)
    with pytest.raises(ConfigurationError):
        open_json(tmp_path)


@pytest.mark.parametrize("folder", [False, True])
async def test_119_a_link_that_is_changed_while_open(tmp_path: Path, folder: bool) -> None:
    await seed(tmp_path / "a")
    await seed(tmp_path / "b")
    if folder:
        app = link = tmp_path / "app"
    else:
        app = tmp_path / "app"
        app.mkdir()
        link = app / SINGLE

    def lead_to(name: str) -> None:
        fresh = tmp_path / "fresh"
        fresh.symlink_to(tmp_path / name if folder else tmp_path / name / SINGLE)
        fresh.replace(link)

    lead_to("a")
    async with open_json(app) as store:
        await store.save_entity(T, {"template_id": "before"})
        lead_to("b")
        with pytest.raises(DataFileConflictError, match="leads to"):
            await store.save_entity(T, {"template_id": "after"})
        assert not (await store.health())["ok"]
    lead_to("a")
    assert (await reopened(app))[T].keys() == {"t", "before"}
    assert (await reopened(tmp_path / "b"))[T].keys() == {"t"}


async def test_119_a_data_file_that_becomes_a_link_while_open(tmp_path: Path) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    await seed(data)
    await seed(other)
    async with open_json(data) as store:
        await store.get_entity(T, "t")
        (data / SINGLE).unlink()
        (data / SINGLE).symlink_to(other / SINGLE)
        for verb in (
            lambda: store.save_entity(T, {"template_id": "u"}),
            store.checkpoint,
            lambda: store.checkpoint(recover_from="file"),
        ):
            with pytest.raises(DataFileConflictError, match="link"):
                await verb()
    assert (data / SINGLE).is_symlink()
    assert parsed(other / SINGLE)[T].keys() == {"t"}


async def test_119_a_hard_link_to_the_file(tmp_path: Path) -> None:
    """A rename would replace the file under one of its names only."""
    await seed(tmp_path / "a")
    (tmp_path / "b").mkdir()
    os.link(tmp_path / "a" / SINGLE, tmp_path / "b" / SINGLE)
    async with open_json(tmp_path / "b") as store:
        for verb in (
            lambda: store.get_entity(T, "t"),
            lambda: store.save_entity(T, {"template_id": "t"}),
            lambda: store.checkpoint(recover_from="file"),
        ):
            with pytest.raises(ConfigurationError, match="hard links"):
                await verb()
        async with open_json(tmp_path / "a") as first:  # whose journal knows the file
            assert await unrouted(store.engine).is_same_store(unrouted(first.engine))
            await first.save_entity(T, {"template_id": "u"})
    # A backup that was linked into place is not a second store.
    async with open_json(tmp_path / "a") as first:
        await first.save_entity(T, {"template_id": "v"})
        await first.checkpoint()
        backup = first.backups()[0]
    for each in journals(tmp_path / "a"):
        each.unlink()
    (tmp_path / "a" / SINGLE).unlink()
    os.link(backup, tmp_path / "a" / SINGLE)
    assert (await reopened(tmp_path / "a"))[T].keys() == {"t", "u"}


@pytest.mark.parametrize("what", ["journal", "lock"])
async def test_a_planted_link_is_not_followed(tmp_path: Path, what: str) -> None:
    await seed(tmp_path)
    target = tmp_path / "victim"
    place = journals(tmp_path)[-1] if what == "journal" else tmp_path / f".{SINGLE}.lock"
    if what == "journal":
        shutil.copy(place, target)
    place.unlink()
    place.symlink_to(target)
    before = target.read_bytes() if target.exists() else None
    async with open_json(tmp_path) as store:
        with pytest.raises(UnavailableError) as caught:
            await store.save_entity(T, {"template_id": "t"})
        assert not caught.value.retryable
    assert (target.read_bytes() if target.exists() else None) == before


# -- the same store ---------------------------------------------------------------------------


async def same(one: Engine, other: Engine) -> bool:
    assert await one.is_same_store(other) == await other.is_same_store(one)
    return await one.is_same_store(other)


@both_layouts
async def test_a_copy_is_another_store(tmp_path: Path, layout: str) -> None:
    await seed(tmp_path / "a", layout)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    one, other = open_json(tmp_path / "a", layout), open_json(tmp_path / "b", layout)
    assert not await same(one.engine, other.engine)
    assert await same(one.engine, open_json(tmp_path / "a", layout).engine)


@both_layouts
async def test_identity_of_stores_that_do_not_exist_yet(tmp_path: Path, layout: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    one = open_json(tmp_path / "x" / "y", layout).engine
    assert await same(one, open_json(tmp_path / "link" / "x" / "y", layout).engine)
    assert not await same(one, open_json(tmp_path / "x" / "z", layout).engine)
    assert not await same(one, open_json(tmp_path / "y", layout).engine)
    assert not (tmp_path / "x").exists()


async def test_two_stores_in_one_folder_are_two(tmp_path: Path) -> None:
    one, other = named(tmp_path, "a.json"), named(tmp_path, "b.json")
    assert not await same(one.engine, other.engine)
    assert not await same(one.engine, open_json(tmp_path, "split_files").engine)
    more = [*HOST_FACTORY, Collection("jobs", key="id")]
    split = open_json(tmp_path, "split_files", collections=more)
    assert await same(split.engine, open_json(tmp_path, "split_files").engine)


# -- a store that is not there ----------------------------------------------------------------


@both_layouts
@pytest.mark.parametrize("folder", [False, True])
async def test_reads_of_an_absent_store_create_nothing(
    tmp_path: Path, layout: str, folder: bool
) -> None:
    where = tmp_path / "data" / "deep"
    if folder:
        where.mkdir(parents=True)
    async with open_json(where, layout) as store:
        assert not await store.exists()
        assert await store.get_entity(T, "t") is None
        assert await store.query_entities(T) == []
        assert [each async for each in store.stream_entities(T)] == []
        assert await store.count_entities(T) == 0
        assert await store.read_file() == {name: {} for name in NAMES}
        assert await store.engine.undeclared() == []
        async with store.snapshot() as reader:
            assert await reader.fetch([]) == []
        await store.checkpoint()
        assert store.backups() == []
        assert (await store.health())["ok"]
        assert await store.test_connection() >= 0
    assert sorted(tmp_path.rglob("*")) == ([where.parent, where] if folder else [])
    async with open_json(where, layout) as store:
        await store.save_entity(T, {"template_id": "t"})
        assert await store.exists()
        assert store._json.follower.registry.held == "shared"  # it is known to be open
    assert await open_json(where, layout).engine.exists()


# -- what no declaration covers ---------------------------------------------------------------


async def test_undeclared_sections(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_text(
        json.dumps({"templates": {"t": {"template_id": "t"}}, "jobs": {"j": {}}, "about": "me"})
    )
    async with open_json(tmp_path) as store:
        assert await store.engine.undeclared() == ["about", "jobs"]
        await store.save_entity(T, {"template_id": "t"})
        await store.checkpoint()
        assert await store.engine.undeclared() == ["about", "jobs"]


async def test_undeclared_files(tmp_path: Path) -> None:
    more = [*HOST_FACTORY, Collection("jobs", key="id")]
    async with open_json(tmp_path, "split_files", collections=more) as store:
        await store.save_entity("jobs", {"id": "j"})
        await store.save_entity(T, {"template_id": "t"})
        await store.checkpoint()
        assert await store.engine.undeclared() == []
    await seed(tmp_path)  # a separate store beside it
    (tmp_path / "notes.json").write_text('["no entities"]')
    (tmp_path / "found.json").write_text('{"a": {"id": "a"}}')
    os.mkfifo(tmp_path / "pipe.json")
    for _ in range(2):
        async with open_json(tmp_path, "split_files") as store:
            assert await store.engine.undeclared() == ["found", "jobs"]
        for each in tmp_path.glob("store.journal.*"):
            each.unlink()  # which identifies the files of other stores


# -- what can be no data file -----------------------------------------------------------------


def _make(kind: str, path: Path) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    else:
        path.symlink_to("/dev/null")


@both_layouts
@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "device"])
async def test_special_files_are_refused(
    layout: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as name:  # a socket needs a short path
        folder = Path(name)
        _make(kind, folder / (SINGLE if layout == "single_file" else "machines.json"))
        with pytest.raises(StorageError) as caught:
            async with open_json(folder, layout) as store:
                await store.get_entity("machines", "m")
        assert not caught.value.retryable
        with pytest.raises(StorageError):
            async with open_json(folder, layout) as store:
                await store.save_entity(T, {"template_id": "t"})


async def test_a_pipe_in_the_place_of_a_journal(tmp_path: Path) -> None:
    await seed(tmp_path)
    path = journals(tmp_path)[-1]
    path.unlink()
    os.mkfifo(path)
    async with open_json(tmp_path) as store:
        for verb in (
            lambda: store.get_entity(T, "t"),
            lambda: store.save_entity(T, {"template_id": "t"}),
        ):
            with pytest.raises(ConfigurationError, match="is not a regular file"):
                await verb()


RESERVED = [
    "db.json.journal.00000001",
    "db.json.bak.00000001",
    "db.json.bak.00000001.gz",
    "db.json.damaged.00000001",
    ".db.json.lock",
    ".db.json.lock.turn",
    ".store.lock.open",
    ".db.json.0a1b2c3d.tmp",
    "store",
    "db.json.gz",
    "DB.JSON.GZ",
]


@pytest.mark.parametrize("name", RESERVED)
def test_names_of_internal_files_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError):
        named(tmp_path, name)
    if name != "store":
        with pytest.raises(ConfigurationError):
            open_json(tmp_path, "split_files", filenames=Filenames(split_files={"machines": name}))


@pytest.mark.parametrize("name", ["a.journal", "a.bak", "store.json", "journal.1.json", ".a"])
def test_names_similar_to_internal_files_are_accepted(tmp_path: Path, name: str) -> None:
    named(tmp_path, name)


async def test_stores_whose_names_begin_alike(tmp_path: Path) -> None:
    """Neither uses a file of the other."""
    names = ["a", "a.json", "a.json.bak", "a.journal", "a.json.x"]
    for name in names:
        async with named(tmp_path, name) as store:
            for version in range(3):
                await store.save_entity(T, {"template_id": name, "name": str(version)})
                await store.checkpoint()
    before = {each: (tmp_path / each).read_bytes() for each in listing(tmp_path)}
    left = [f".{name}.0a1b2c3d.tmp" for name in names]
    left += [f".{name}.journal.00000009.0a1b2c3d.tmp" for name in names]
    left += [f".{name}.lock.turn.0a1b2c3d.tmp" for name in names]
    for each in left:
        (tmp_path / each).write_text("left behind, or being written by another store")
    async with named(tmp_path, "a") as store:
        await store.save_entity(T, {"template_id": "a", "name": "again"})
        await store.checkpoint()
        assert {each.name for each in store.backups()} == {
            each for each in listing(tmp_path) if each.startswith("a.bak.")
        }
    gone = {each for each in (*before, *left) if not (tmp_path / each).exists()}
    assert {each for each in gone if each.endswith(".tmp")} == {
        ".a.0a1b2c3d.tmp",
        ".a.journal.00000009.0a1b2c3d.tmp",
        ".a.lock.turn.0a1b2c3d.tmp",
    }
    assert all(each.startswith(("a.journal.0", ".a.")) for each in gone)
    for each in before.keys() - gone:
        if each != "a" and not each.startswith(("a.journal.0", ".a.lock")):
            assert (tmp_path / each).read_bytes() == before[each], each


# -- mounts, and all that keeps a fold from succeeding ----------------------------------------


@contextmanager
def mounted(source: Path, target: Path) -> Iterator[None]:
    made = subprocess.run(
        ["mount", "--bind", str(source), str(target)], check=False, capture_output=True
    )
    if made.returncode:
        pytest.skip("no mounts here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(target)], check=True)


@as_root
@pytest.mark.skipif(sys.platform != "linux", reason="files are mounted on Linux only")
@both_layouts
@pytest.mark.parametrize("name", ["plain", "with a blank"])
async def test_a_data_file_that_is_a_mount_is_refused(
    tmp_path: Path, layout: str, name: str
) -> None:
    host, app = tmp_path / "host", tmp_path / name
    await seed(host, layout)
    app.mkdir()
    file = SINGLE if layout == "single_file" else "templates.json"
    (app / file).touch()
    with mounted(host / file, app / file):
        async with open_json(app, layout) as store:
            for verb in (
                lambda: store.get_entity(T, "t"),
                lambda: store.save_entity(T, {"template_id": "t"}),
                store.checkpoint,
            ):
                with pytest.raises(ConfigurationError, match="Mount the folder"):
                    await verb()
            health = await store.health()
            assert not health["ok"]
            assert "mount" in str(health["problems"])
        assert journals(app) == []
    assert (await reopened(host, layout))[T].keys() == {"t"}


@as_root
@pytest.mark.skipif(sys.platform != "linux", reason="files are mounted on Linux only")
async def test_a_data_file_that_becomes_a_mount_while_open(tmp_path: Path) -> None:
    await seed(tmp_path / "host")
    await seed(tmp_path / "app")
    async with open_json(tmp_path / "app") as store:
        await store.get_entity(T, "t")
        with mounted(tmp_path / "host" / SINGLE, tmp_path / "app" / SINGLE):
            with pytest.raises(ConfigurationError, match="Mount the folder"):
                await store.save_entity(T, {"template_id": "u"})
        await store.save_entity(T, {"template_id": "v"})
    assert (await reopened(tmp_path / "app"))[T].keys() == {"t", "v"}


@as_root
@both_layouts
async def test_a_mounted_folder_is_accepted(tmp_path: Path, layout: str) -> None:
    await seed(tmp_path / "host", layout)
    (tmp_path / "app").mkdir()
    with mounted(tmp_path / "host", tmp_path / "app"):
        await _both_ways(open_json(tmp_path / "app", layout), open_json(tmp_path / "host", layout))


@contextmanager
def _immutable(path: Path) -> Iterator[None]:
    made = subprocess.run(["chattr", "+i", str(path)], check=False, capture_output=True)
    if made.returncode:
        pytest.skip("no immutable files here")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", str(path)], check=True)


@contextmanager
def _refused_by_the_system(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> Iterator[None]:
    """Renames over the file fail: it is busy, on another device, or not permitted."""
    real = os.replace

    def replace(source: Any, target: Any, **rest: Any) -> None:
        if str(target) == str(path):
            raise OSError(number, os.strerror(number))
        real(source, target, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        yield


@both_layouts
@pytest.mark.parametrize("number", ["EBUSY", "EXDEV", "EPERM", "EIO"])
@pytest.mark.parametrize("linking", [True, False])
async def test_permanently_failing_compactions_leave_no_files_behind(
    tmp_path: Path,
    layout: str,
    number: str,
    linking: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """For each kind of error, journals and backups stay few, and `health` reports it."""
    import errno

    caplog.set_level(logging.CRITICAL)
    await seed(tmp_path, layout)
    before = parsed(next(tmp_path.glob("*.json")))
    assert before is not None
    if not linking:

        def link(*_: Any) -> None:
            raise OSError(errno.EPERM, "no hard links here")

        monkeypatch.setattr(os, "link", link)
    path = tmp_path / (SINGLE if layout == "single_file" else "templates.json")
    backups = len(list(tmp_path.glob("*.bak.*")))
    with _refused_by_the_system(path, monkeypatch, getattr(errno, number)):
        for count in range(8):
            async with open_json(tmp_path, layout) as store:
                await store.save_entity(T, {"template_id": f"acked-{count}"})
                if count:
                    health = await store.health()
                    assert not health["ok"]
                    assert "compact" in str(health["problems"])
                if count == 7:
                    with pytest.raises(StorageError) as caught:
                        await store.checkpoint()
                    assert caught.value.retryable == (number == "EIO")
                    assert os.strerror(getattr(errno, number)) in str(await store.health())
    assert len(journals(tmp_path)) <= 2
    assert len(list(tmp_path.glob("*.bak.*"))) == backups
    assert temporary(tmp_path) == []
    wanted = {"t", *(f"acked-{count}" for count in range(8))}
    assert (await reopened(tmp_path, layout))[T].keys() == wanted
    async with open_json(tmp_path, layout) as store:
        await store.checkpoint()
        assert (await store.health())["ok"]
        assert store._json.follower.state is not None
        assert store._json.follower.state.pending_bytes == 0
    assert len(journals(tmp_path)) == 1
    found = parsed(path)
    assert (found if layout == "split_files" else found[T]).keys() == wanted


@as_root
async def test_an_immutable_data_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    await seed(tmp_path)
    with _immutable(tmp_path / SINGLE):
        for count in range(6):
            async with open_json(tmp_path) as store:
                await store.save_entity(T, {"template_id": f"acked-{count}"})
        assert len(journals(tmp_path)) == 2
        assert len(list(tmp_path.glob("*.bak.*"))) <= 1
    assert len((await reopened(tmp_path))[T]) == 7


# -- owners -----------------------------------------------------------------------------------

NOBODY, STAFF = 65534, 4242


@pytest.fixture
def srv() -> Iterator[Path]:
    """A folder of the user of a service, because that user cannot access `tmp_path`."""
    folder = Path(tempfile.mkdtemp(prefix="hf-owners-"))
    os.chown(folder, NOBODY, NOBODY)
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextmanager
def user(uid: int, gid: int, *groups: int) -> Iterator[None]:
    before = os.getgroups()
    os.setgroups([gid, *groups])
    os.setegid(gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(before)


def owners(folder: Path) -> dict[str, tuple[int, int, str]]:
    found = {}
    for each in sorted(folder.iterdir()):
        there = each.lstat()
        found[each.name] = there.st_uid, there.st_gid, oct(stat.S_IMODE(there.st_mode))
    return found


@as_root
@both_layouts
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("linking", [True, False])
async def test_120_commands_of_root_keep_owner_and_mode(
    srv: Path, layout: str, packed: bool, linking: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After any command of root the service still works, and files keep owner, group and mode."""
    folder = srv / "data"
    settings: dict[str, Any] = {"enable_compression": packed, "backup_count": 2}
    if not linking:

        def link(*_: Any) -> None:
            raise OSError(1, "no hard links here")

        monkeypatch.setattr(os, "link", link)
    with user(NOBODY, NOBODY):
        await seed(folder, layout, **settings)
    files = [each for each in folder.iterdir() if each.name.endswith((".json", ".json.gz"))]
    for each in files:
        os.chown(each, NOBODY, STAFF)
        each.chmod(0o640)
    for each in folder.glob(".*"):  # as in a restored folder: lock files are created again
        each.unlink()
    async with open_json(folder, layout, **settings) as store:
        for number in range(3):
            await store.save_entity(T, {"template_id": f"root-{number}"})
            await store.save_entity("requests", {"request_id": f"root-{number}"})
            await store.checkpoint()
        await store.save_entity("machines", {"machine_id": "m"})
        for name, (uid, gid, mode) in owners(folder).items():
            assert uid == NOBODY, name
            assert gid in (STAFF, NOBODY), name
            if name.endswith((".json", ".json.gz")) or ".lock" in name:
                assert (gid, mode) == (STAFF, "0o640"), name
        await abandon(store)
    with user(NOBODY, NOBODY, STAFF):
        async with open_json(folder, layout, **settings) as store:
            assert len((await whole(store))[T]) == 4
            await store.save_entity(T, {"template_id": "service"})
            await store.checkpoint()
    for name, (uid, _, _) in owners(folder).items():
        assert uid == NOBODY, name


@as_root
@both_layouts
async def test_120_root_while_the_service_runs(srv: Path, layout: str) -> None:
    folder = srv / "data"
    with user(NOBODY, NOBODY):
        service = await open_json(folder, layout).open()
        await service.save_entity(T, {"template_id": "t-1"})
    async with open_json(folder, layout) as root:
        await root.save_entity(T, {"template_id": "root"})
        await root.checkpoint()
    with user(NOBODY, NOBODY):
        assert await service.get_entity(T, "root")
        await service.save_entity(T, {"template_id": "t-2"})
        await service.checkpoint()
        await service.close()
    assert {each[:2] for each in owners(folder).values()} == {(NOBODY, NOBODY)}


@as_root
@both_layouts
async def test_120_root_creates_the_store(srv: Path, layout: str) -> None:
    """A store that root creates in a folder of the service belongs to the service."""
    folder = srv / "deep" / "data"
    async with open_json(folder, layout) as store:
        await store.save_entity(T, {"template_id": "t-1"})
        made = owners(folder)
        assert {each[:2] for each in made.values()} == {(NOBODY, NOBODY)}
        assert {each[2] for each in made.values()} == {"0o600"}
    with user(NOBODY, NOBODY):
        async with open_json(folder, layout) as store:
            await store.save_entity(T, {"template_id": "t-2"})
            await store.checkpoint()
    assert {each[:2] for each in owners(folder).values()} == {(NOBODY, NOBODY)}


@as_root
@both_layouts
async def test_120_an_owner_that_cannot_be_kept_is_refused(srv: Path, layout: str) -> None:
    """The service owns the folder, so it may replace a file of root, but could not keep its owner."""
    async with open_json(srv, layout) as store:
        await store.save_entity(T, {"template_id": "t"})
    for each in srv.iterdir():
        os.chown(each, 0, 0)
        each.chmod(0o644)
    for each in srv.glob(".*"):
        each.unlink()
    before = {name: each for name, each in owners(srv).items() if ".journal." not in name}
    with user(NOBODY, NOBODY):
        async with open_json(srv, layout) as store:
            assert (await whole(store))[T].keys() == {"t"}
            with pytest.raises(PermissionDeniedError, match="cannot keep owner 0"):
                await store.save_entity(T, {"template_id": "u"})
    assert {name: each for name, each in owners(srv).items() if ".journal." not in name} == before


@as_root
async def test_120_a_group_shares_a_store(srv: Path) -> None:
    """Two users of one group can use the files of each other; a file keeps its owner."""
    os.chown(srv, NOBODY, STAFF)
    srv.chmod(0o2775)
    with user(NOBODY, STAFF):
        await seed(srv)
        (srv / SINGLE).chmod(0o660)
    for each in (*journals(srv), *srv.glob(".*")):
        each.unlink()
    with user(1234, STAFF):
        store = await open_json(srv).open()
        await store.save_entity(T, {"template_id": "of another"})
        with pytest.raises(PermissionDeniedError, match="cannot keep owner"):
            await store.checkpoint()
        await abandon(store)
    with user(NOBODY, STAFF):
        async with open_json(srv) as store:
            assert (await whole(store))[T].keys() == {"t", "of another"}
            await store.save_entity(T, {"template_id": "u"})
            await store.checkpoint()
    assert owners(srv)[SINGLE] == (NOBODY, STAFF, "0o660")


@as_root
@both_layouts
async def test_a_folder_that_may_not_be_written_to(
    srv: Path, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The journal can be written: commits succeed, but no compaction can start a new one."""
    caplog.set_level(logging.CRITICAL)
    with user(NOBODY, NOBODY):
        await seed(srv, layout)
        async with open_json(srv, layout) as store:
            os.seteuid(0)
            os.chown(srv, 0, 0)
            os.seteuid(NOBODY)
            for number in range(3):
                await store.save_entity(T, {"template_id": f"t-{number}"})
                with pytest.raises(PermissionDeniedError):
                    await store.checkpoint()
            assert not (await store.health())["ok"]
        assert len(journals(srv)) == 1
        assert len((await reopened(srv, layout))[T]) == 4


@as_root
@both_layouts
def test_120_copies_made_by_root_belong_to_the_service(srv: Path, layout: str) -> None:
    """Backups, and the files of a damaged store that `restore` keeps, can be read by the service."""
    folder = srv / "data"
    url = f"json:{folder / SINGLE if layout == 'single_file' else folder}"
    with user(NOBODY, NOBODY):
        asyncio.run(seed(folder, layout))
    copy = srv / ("copy" if layout == "split_files" else "copy.json")
    assert main(["backup", "--copy", str(copy), "--store", url]) == 0
    with user(NOBODY, NOBODY):
        asyncio.run(_everything_is_readable(copy))
    for journal in journals(folder):
        journal.write_bytes(b"damaged beyond recognition, and longer than a header")
    assert main(["restore", str(copy), "--store", url]) == 0
    (aside,) = folder.glob("damaged_*")
    with user(NOBODY, NOBODY):
        asyncio.run(_everything_is_readable(aside))
        assert asyncio.run(reopened(folder, layout))[T].keys() == {"t"}
    assert {each[:2] for each in owners(folder).values()} == {(NOBODY, NOBODY)}


async def _everything_is_readable(copy: Path) -> None:
    for each in (copy, *copy.iterdir()) if copy.is_dir() else (copy,):
        assert each.stat().st_uid == NOBODY
        assert each.is_dir() or each.read_bytes()


@as_root
@both_layouts
async def test_a_folder_that_may_not_be_entered(srv: Path, layout: str) -> None:
    folder = srv / "data"
    async with open_json(srv / "other", layout) as store:  # imports what another user may not read
        await store.save_entity(T, {"template_id": "t"})
        assert await whole(store)
    folder.mkdir(mode=0o700)
    with user(NOBODY, NOBODY):
        async with open_json(folder, layout) as store:
            for verb in (
                lambda: store.get_entity(T, "t"),
                lambda: store.query_entities(T),
                lambda: store.save_entity(T, {"template_id": "t"}),
                store.exists,
                store.recorded_collections,
            ):
                with pytest.raises(PermissionDeniedError, match="Permission denied"):
                    await verb()


@both_layouts
async def test_a_path_that_is_too_long(tmp_path: Path, layout: str) -> None:
    async with open_json(tmp_path / ("x" * 300), layout) as store:
        for verb in (
            lambda: store.get_entity(T, "t"),
            lambda: store.save_entity(T, {"template_id": "t"}),
        ):
            with pytest.raises(UnavailableError, match="File name too long") as caught:
                await verb()
            assert not caught.value.retryable


async def test_the_file_of_an_sqlite_store(tmp_path: Path) -> None:
    """It is named, and nobody is told to restore a backup over it."""
    path = tmp_path / "store.json"
    async with open_store(f"sqlite:{path}") as database:
        await database.save_entity(T, {"template_id": "t"})
    before = path.read_bytes()
    async with open_store(f"json:{path}") as store:
        for verb in (
            lambda: store.get_entity(T, "t"),
            lambda: store.query_entities(T),
            lambda: store.save_entity(T, {"template_id": "t"}),
        ):
            with pytest.raises(ConfigurationError, match=f"open it as sqlite:{path}"):
                await verb()
    assert path.read_bytes() == before
    async with open_json(tmp_path, "split_files") as store:
        assert (await store.health())["ok"]
