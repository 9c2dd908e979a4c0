"""The file of a SQLite store: replaced, removed, with several names, with other owners, disk full."""

from __future__ import annotations

import asyncio
import gc
import os
import sqlite3
import subprocess
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hf_async_store import (
    BatchError,
    ConfigurationError,
    CorruptionError,
    DataFileConflictError,
    DiskFullError,
    ReadOnlyStoreError,
    StorageError,
    open_store,
)
from hf_async_store.query import Query
from hf_async_store.strategies.sql import sqlite
from tests.contract.harnesses import open_files

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may do this")


def template(name: str, **fields: object) -> dict[str, object]:
    return {"template_id": name, **fields}


def copied(path: Path, to: Path) -> None:
    """A complete copy, like a backup."""
    source, target = sqlite3.connect(path), sqlite3.connect(to)
    source.backup(target)
    source.close()
    target.close()


# -- replaced, removed, renamed --------------------------------------------------------------


def _replaced(path: Path) -> None:
    path.with_name("backup.db").replace(path)


def _copied_over_by_rename(path: Path) -> None:
    path.rename(path.with_name("away.db"))
    path.with_name("backup.db").rename(path)


def _removed(path: Path) -> None:
    path.unlink()


def _all_removed(path: Path) -> None:
    for end in ("", "-wal", "-shm"):
        path.with_name(path.name + end).unlink()


def _folder_renamed(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))


def _log_removed(path: Path) -> None:
    path.with_name(f"{path.name}-wal").unlink()


def _index_removed(path: Path) -> None:
    path.with_name(f"{path.name}-shm").unlink()


def _link_turned(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("backup.db"))


WAYS = [
    _replaced,
    _copied_over_by_rename,
    _removed,
    _all_removed,
    _folder_renamed,
    _log_removed,
    _index_removed,
]


async def refused(verb: Callable[[], Awaitable[object]]) -> StorageError:
    """The error of a verb; for a batch, the error of its first change."""
    with pytest.raises(StorageError) as caught:
        await verb()
    if isinstance(caught.value, BatchError):
        [first, *_] = caught.value.outcomes
        assert isinstance(first, StorageError)
        return first
    return caught.value


async def _verbs(store: Any) -> dict[str, Callable[[], Awaitable[object]]]:
    async def stream() -> object:
        return [each async for each in store.stream_entities("templates")]

    async def snapshot() -> object:
        async with store.snapshot() as reader:
            return await reader.count(store._query("templates", None, None, None, None))

    return {
        "save": lambda: store.save_entity("templates", template("lost")),
        "save many": lambda: store.save_entities(
            "templates", [template(f"lost-{n}") for n in range(600)]
        ),
        "update": lambda: store.update_entity("templates", "t", {"note": "lost"}),
        "delete": lambda: store.delete_entity("templates", "t"),
        "import": lambda: store.import_entities(
            "templates", [{**template(f"lost-{n}"), "version": 3} for n in range(20)]
        ),
        "transaction": lambda: store.run_transaction(
            lambda tx: tx.save_entity("templates", template("lost"))
        ),
        "sql": lambda: store.execute_with_lock('DELETE FROM "templates-entities"'),
        "get": lambda: store.get_entity("templates", "t"),
        "query": lambda: store.query_entities("templates"),
        "page": lambda: store.query_page("templates", limit=5),
        "count": lambda: store.count_entities("templates"),
        "stream": stream,
        "snapshot": snapshot,
        "exists": store.exists,
        "probe": store.test_connection,
    }


@pytest.mark.parametrize("way", WAYS)
async def test_119_a_file_that_is_replaced_in_use_is_noticed(
    tmp_path: Path, way: Callable[[Path], None]
) -> None:
    path = tmp_path / "data" / "store.db"
    async with open_store(f"sqlite:{path}") as store:
        await store.save_entity("templates", template("t"))
        copied(path, path.with_name("backup.db"))
        await store.save_entity("templates", template("later"))
        way(path)
        for name, verb in (await _verbs(store)).items():
            error = await refused(verb)
            assert isinstance(error, DataFileConflictError), (name, error)
            assert not error.outcome_unknown, name
            assert not error.retryable, name
            assert str(path) in str(error), name
        health = await store.health()
        assert health["ok"] is False
        assert str(path) in str(health["problems"])
    if way in (_log_removed, _index_removed):
        # The file is the same, so that its last connection checkpoints the log into it.
        async with open_store(f"sqlite:{path}") as store:
            assert await store.count_entities("templates") == 2


async def test_119_a_changed_symbolic_link_is_noticed(tmp_path: Path) -> None:
    real, path = tmp_path / "real.db", tmp_path / "store.db"
    async with open_store(f"sqlite:{real}") as store:
        await store.save_entity("templates", template("t"))
    copied(real, tmp_path / "backup.db")
    path.symlink_to(real)
    async with open_store(f"sqlite:{path}") as store:
        assert await store.count_entities("templates") == 1
        _link_turned(path)
        with pytest.raises(DataFileConflictError):
            await store.save_entity("templates", template("lost"))


async def test_119_a_transaction_does_not_commit_to_a_removed_file(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    async with open_store(f"sqlite:{path}") as store:
        await store.save_entity("templates", template("t"))
        copied(path, path.with_name("backup.db"))

        async def transaction() -> None:
            async with store.begin_transaction() as tx:
                await tx.save_entity("templates", template("lost"))
                path.rename(tmp_path / "away.db")
                path.with_name("backup.db").rename(path)

        with pytest.raises(DataFileConflictError) as caught:
            await transaction()
        assert not caught.value.outcome_unknown
        (tmp_path / "away.db").rename(path)
        found = await store.query_entities("templates")
        assert [each["template_id"] for each in found] == ["t"]


async def test_119_a_commit_to_a_replaced_file_is_not_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "store.db"
    async with open_store(f"sqlite:{path}") as store:
        await store.save_entity("templates", template("t"))
        dialect = store._sql._dialect  # type: ignore[attr-defined]
        commit, job = dialect.commit, dialect.job

        async def committed(handle: Any) -> None:
            await commit(handle)
            path.rename(tmp_path / "away.db")

        async def ran(driver: Any, work: Any) -> Any:
            found = await job(driver, work)
            path.rename(tmp_path / "away.db")
            return found

        async def transaction() -> None:
            await store.run_transaction(lambda tx: tx.save_entity("templates", template("unknown")))

        async def save() -> None:
            await store.save_entity("templates", template("unknown"))

        for patched, with_what, verb in (("commit", committed, transaction), ("job", ran, save)):
            with monkeypatch.context() as patch:
                patch.setattr(dialect, patched, with_what)
                with pytest.raises(DataFileConflictError) as caught:
                    await verb()
                assert caught.value.outcome_unknown
            (tmp_path / "away.db").rename(path)
            # The restored file is the original one.
            assert await store.get_entity("templates", "unknown") is not None


async def test_119_a_replaced_store_leaves_the_files_of_its_successor_alone(tmp_path: Path) -> None:
    """The last connection removes the log by its name; it must not remove that of the new file."""
    path = tmp_path / "store.db"
    async with open_store(f"sqlite:{path}") as store:
        await store.save_entity("templates", template("t"))
        copied(path, tmp_path / "backup.db")
        _all_removed(path)
        (tmp_path / "backup.db").rename(path)
        with pytest.raises(DataFileConflictError):
            await store.save_entity("templates", template("lost"))
        async with open_store(f"sqlite:{path}") as successor:
            await successor.save_entity("templates", template("new"))
            await store.close()
            assert path.with_name("store.db-wal").exists()
            await successor.save_entity("templates", template("newer"))
            async with open_store(f"sqlite:{path}") as third:
                assert await third.count_entities("templates") == 3


# -- several names ---------------------------------------------------------------------------


async def test_119_one_file_by_several_paths_is_one_store(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    real = folder / "store.db"
    (tmp_path / "link.db").symlink_to(real)
    (tmp_path / "linked").symlink_to(folder)
    paths = [
        real,
        tmp_path / "link.db",
        tmp_path / "linked" / "store.db",
        tmp_path / "folder" / ".." / "folder" / "store.db",
        tmp_path / "linked" / ".." / "folder" / "store.db",
    ]
    stores = [await open_store(f"sqlite:{each}").open() for each in paths]
    try:
        versions = [
            await each.save_entity("templates", template("t")) for _ in range(4) for each in stores
        ]
        assert versions == list(range(1, 4 * len(paths) + 1))
        for each in stores:
            assert await each.engine.is_same_store(stores[0].engine)
        assert list(tmp_path.rglob("*-wal")) == [folder / "store.db-wal"]
    finally:
        for each in stores:
            await each.close()
    assert (tmp_path / "link.db").is_symlink()


async def test_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()  # a folder has a hard link for each one in it
    async with open_store(f"sqlite:{tmp_path}") as store:
        for verb in (
            lambda: store.save_entity("templates", template("t")),
            lambda: store.get_entity("templates", "t"),
        ):
            with pytest.raises(
                ConfigurationError, match="is a folder; name a file in it"
            ) as caught:
                await verb()
            assert str(caught.value).endswith(f"such as sqlite:{tmp_path}/store.db")


async def test_119_hard_links_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    async with open_store(f"sqlite:{path}") as store:
        await store.save_entity("templates", template("t"))
    (tmp_path / "other.db").hardlink_to(path)
    for each in (path, tmp_path / "other.db"):
        async with open_store(f"sqlite:{each}") as store:
            with pytest.raises(ConfigurationError, match="hard links"):
                await store.save_entity("templates", template("u"))
            with pytest.raises(ConfigurationError, match="hard links"):
                await store.get_entity("templates", "t")
    (tmp_path / "other.db").unlink()
    async with open_store(f"sqlite:{path}") as store:
        assert await store.get_entity("templates", "t") is not None


async def test_a_copy_is_another_store(tmp_path: Path) -> None:
    one, two = tmp_path / "one.db", tmp_path / "two.db"
    async with open_store(f"sqlite:{one}") as store:
        await store.save_entity("templates", template("t"))
        copied(one, two)
        async with (
            open_store(f"sqlite:{two}") as copy,
            open_store(f"sqlite:{tmp_path / 'none.db'}") as none,
            open_store("memory:") as other,
        ):
            for each in (copy, none, other):
                assert not await store.engine.is_same_store(each.engine)
            assert not await none.engine.is_same_store(none.engine)
        assert not (tmp_path / "none.db").exists()


async def test_a_relative_path_is_resolved_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in ("one", "two"):
        (tmp_path / each).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    async with open_store("sqlite:store.db") as store:
        monkeypatch.chdir(tmp_path / "two")
        await store.save_entity("templates", template("t"))
        monkeypatch.chdir(tmp_path)
        assert await store.count_entities("templates") == 1
        assert store.describe()["path"] == str(tmp_path / "one" / "store.db")
    assert [str(each.relative_to(tmp_path)) for each in tmp_path.rglob("*.db")] == ["one/store.db"]


# -- owner and mode --------------------------------------------------------------------------

ONE_COMMAND = """
import asyncio, os, sys, tempfile
from hf_async_store import open_store
async def main(path, name):
    async with open_store(f"sqlite:{path}") as store:
        await store.save_entity("templates", {"template_id": name})
        for end in ("", "-wal", "-shm"):
            found = os.stat(path + end)
            print(oct(found.st_mode & 0o777), found.st_uid, found.st_gid)
path, name, user, *groups = sys.argv[1:]
with tempfile.TemporaryDirectory() as folder:
    stdout, sys.stdout = sys.stdout, open(os.devnull, "w")
    asyncio.run(main(f"{folder}/warm.db", name))  # imports what another user may not read
    sys.stdout.close()
    sys.stdout = stdout
if int(user):
    os.setgroups([int(each) for each in groups])
    os.setgid(int(user))
    os.setuid(int(user))
asyncio.run(main(path, name))
"""


@as_root
def test_120_a_command_of_root_leaves_owner_and_mode(tmp_path: Path) -> None:
    folder = Path("/tmp") / f"hf-async-store-{os.getpid()}"  # that other users may access
    folder.mkdir(mode=0o755)
    path = folder / "store.db"
    try:
        os.chown(folder, 65534, 65534)

        def run(name: str, user: int, *groups: int) -> list[str]:
            command = [sys.executable, "-c", ONE_COMMAND, path, name, user, *groups]
            done = subprocess.run(
                list(map(str, command)), check=True, capture_output=True, text=True, timeout=60
            )
            return done.stdout.splitlines()

        assert run("a", 65534) == ["0o600 65534 65534"] * 3
        path.chmod(0o640)
        os.chown(path, 65534, 4)
        assert run("b", 0) == ["0o640 65534 4"] * 3
        assert run("c", 65534, 4)[0] == "0o640 65534 4"
        found = path.stat()
        assert (found.st_mode & 0o777, found.st_uid, found.st_gid) == (0o640, 65534, 4)
    finally:
        for each in folder.iterdir():
            each.unlink()
        folder.rmdir()


READ = """
import asyncio, os, sys
from hf_async_store import PermissionDeniedError, open_store
async def main():
    async with open_store(f"sqlite:{sys.argv[1]}-") as store:
        await store.exists()  # imports the rest, which another user may not
    os.setuid(65534)
    async with open_store(f"sqlite:{sys.argv[1]}") as store:
        try:
            await store.get_entity("templates", "t")
        except PermissionDeniedError as exc:
            print(exc)
asyncio.run(main())
"""


@as_root
def test_a_file_that_may_not_be_read() -> None:
    folder = Path("/tmp") / f"hf-async-store-{os.getpid()}"  # that other users may access
    folder.mkdir(mode=0o755)
    path = folder / "store.db"
    try:
        path.touch(mode=0o600)
        command = [sys.executable, "-c", READ, str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        assert done.stdout == (
            f"cannot open {path}: this process may not read it; check the owner and mode of the file\n"
        )
    finally:
        path.unlink()
        folder.rmdir()


# -- no room, no descriptors, no writing -----------------------------------------------------


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A separate file system, which can be remounted read-only."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "tmpfs", folder], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("a file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


async def test_a_file_system_that_is_read_only(mounted: Path) -> None:
    path = mounted / "store.db"
    async with open_store(f"sqlite:{path}") as store:
        await store.save_entities("templates", [template(f"t{n:03}") for n in range(600)])
    subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
    async with open_store(f"sqlite:{path}") as store:
        assert await store.get_entity("templates", "t001") is not None
        assert await store.count_entities("templates") == 600
        assert len([each async for each in store.stream_entities("templates")]) == 600
        for name, verb in (await _verbs(store)).items():
            if name in ("save", "save many", "update", "delete", "transaction", "sql", "probe"):
                error = await refused(verb)
                assert isinstance(error, ReadOnlyStoreError), (name, error)
                assert not error.retryable, name
        assert (await store.health())["ok"] is False
        # Writable again: data that another store writes must be read, not cached data.
        subprocess.run(["mount", "-o", "remount,rw", mounted], check=True)
        async with open_store(f"sqlite:{path}") as other:
            await other.save_entity("templates", template("new"))
        assert await store.count_entities("templates") == 601
        await store.save_entity("templates", template("newer"))
        assert await store.count_entities("templates") == 602
    async with open_store(f"sqlite:{mounted / 'none.db'}") as store:
        subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
        assert await store.query_entities("templates") == []
        with pytest.raises(ReadOnlyStoreError):
            await store.save_entity("templates", template("t"))


async def test_a_full_disk_and_a_store_that_nobody_has_open(mounted: Path) -> None:
    """Then SQLite must create its shared-memory file, even to read."""
    path = mounted / "store.db"
    async with open_store(f"sqlite:{path}") as store:
        await store.save_entity("templates", template("t"))
    subprocess.run(["mount", "-o", "remount,size=128k", mounted], check=True)
    filler = mounted / "filler"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(b"x" * (1 << 20))
    async with open_store(f"sqlite:{path}") as store:
        for name, verb in (await _verbs(store)).items():
            error = await refused(verb)
            assert type(error) is DiskFullError, (name, error)
            assert f"32 KB of disk space, for the shared-memory file {path}-shm" in str(error)
            assert not error.outcome_unknown, name
        filler.unlink()
        assert await store.get_entity("templates", "t") is not None
        assert await store.save_entity("templates", template("u")) == 1


NO_DESCRIPTORS = """
import asyncio, os, resource, sys
from hf_async_store import open_store, StorageError
async def main():
    store = await open_store(sys.argv[1]).open()
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
    held = []
    try:
        while True:
            held.append(os.open("/dev/null", 0))
    except OSError:
        os.close(held.pop())
    for verb in (lambda: store.save_entity("templates", {"template_id": "t"}),
                 lambda: store.get_entity("templates", "t")):
        try:
            print(await verb())
        except StorageError as exc:
            print(type(exc).__name__, exc.retryable)
    for each in held:
        os.close(each)
    print(await store.save_entity("templates", {"template_id": "t"}))
    await store.close()
asyncio.run(main())
"""


def test_no_file_descriptors_available(tmp_path: Path) -> None:
    path = tmp_path / "store.db"

    async def made() -> None:
        async with open_store(f"sqlite:{path}") as store:
            await store.save_entity("templates", template("t"))

    asyncio.run(made())
    done = subprocess.run(
        [sys.executable, "-c", NO_DESCRIPTORS, f"sqlite:{path}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stderr == ""
    name = f"{DiskFullError.__name__} False"
    assert done.stdout.splitlines() == [name, name, "2"]


async def test_a_cursor_that_is_still_referenced_does_not_keep_the_file_open(
    tmp_path: Path,
) -> None:
    """The traceback of a cancelled task references the cursor of its stream."""
    async with open_store(f"sqlite:{tmp_path}/store.db") as store:
        await store.save_entities("templates", [{"template_id": f"t-{n}"} for n in range(100)])
        pool = store._sql._streams  # type: ignore[attr-defined]
        lease = await pool.acquire()
        cursor = await lease.driver.execute('SELECT * FROM "templates-entities"')
        assert await cursor.fetchone() is not None
    assert open_files(tmp_path) == []
    del cursor


async def test_a_statement_leaves_nothing_in_memory(tmp_path: Path) -> None:
    """A connection of Python's sqlite3 references all of its cursors, also freed ones, in some cases."""

    def references() -> int:
        gc.collect()
        return sum(type(each) is weakref.ReferenceType for each in gc.get_objects())

    async with open_store(f"sqlite:{tmp_path}/store.db") as store:
        await store.save_entity("templates", {"template_id": "t-1"})
        before = references()
        for _ in range(1000):
            await store.get_entity("templates", "t-1")
        assert references() - before < 500


async def test_a_log_that_grew_behind_a_reader_becomes_small_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "_WAL_BYTES", 1_000_000)
    log = tmp_path / "store.db-wal"

    def large(text: str) -> list[dict[str, object]]:
        return [{"template_id": f"t-{number}", "text": text * 100_000} for number in range(20)]

    async with open_store(f"sqlite:{tmp_path}/store.db") as store:
        await store.save_entities("templates", large("x"))
        async with store.snapshot() as snapshot:
            assert await snapshot.count(Query("templates")) == 20
            for text in "abc":
                await store.save_entities("templates", large(text))
            assert log.stat().st_size > 6_000_000
        for _ in range(4):
            await store.save_entity("templates", {"template_id": "t-1"})
        assert log.stat().st_size <= 1_000_000
        assert await store.count_entities("templates") == 20


@pytest.mark.parametrize(
    "content", [b"{}\n", b'\n { "templates": {} }', b"id,name\n1,a\n" * 9, b"ab"]
)
async def test_a_file_of_another_kind(tmp_path: Path, content: bytes) -> None:
    """It is named, and nobody is told to restore a backup over the file of a JSON store."""
    path = tmp_path / "s.json"
    path.write_bytes(content)
    is_json = b"{" in content
    async with open_store(f"sqlite:{path}") as store:
        for verb in (
            lambda: store.get_entity("templates", "t"),
            lambda: store.query_entities("templates"),
            lambda: store.save_entity("templates", template("t")),
        ):
            with pytest.raises(ConfigurationError if is_json else CorruptionError) as caught:
                await verb()
            said = str(caught.value)
            assert "no SQLite database" in said
            assert ("opened as json:" in said) is is_json
            assert ("restore" in said) is not is_json
    assert path.read_bytes() == content
