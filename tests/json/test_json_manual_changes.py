"""Files that are replaced, edited or removed manually (contract 91).

With an empty journal the changed file is adopted. With commits in the journal it is an error that
offers two choices. In no case the two states are silently mixed, whichever processes have the store
open.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Literal

import pytest

from hf_async_store import JSONStorageStrategy
from hf_async_store.errors import (
    CorruptionError,
    DataFileConflictError,
)
from hf_async_store.strategies.json import files
from hf_async_store.strategies.json.journal import Seal, control, record
from tests.json.layouts import both_layouts
from tests.json.support import (
    SINGLE,
    Stored,
    abandon,
    data_files,
    journals,
    never_folds,
    open_json,
    parsed,
    reopened,
    temporary,
    whole,
)

pytestmark = pytest.mark.hf_sampled(by="layout")

both_ways = pytest.mark.parametrize("way", ["file", "journal"])
_PATIENCE: Final = 60.0
"""The time limit of a test, in seconds; a replaced file is noticed in a fraction of a second."""

Way = Literal["file", "journal"]


async def _generations(folder: Path, layout: str) -> list[Stored]:
    """A store with an empty journal after three compactions; the contents after each, oldest first."""
    states = []
    async with open_json(folder, layout) as store:
        for number in range(3):
            async with store.begin_transaction() as tx:
                await tx.save_entity("templates", {"template_id": "t", "name": str(number)})
                await tx.save_entity("machines", {"machine_id": f"m{number}"})
            await store.checkpoint()
            states.append(await whole(store))
    return states


def _restore_backup(folder: Path, age: int, *, by_rename: bool = False) -> None:
    """Copy the backups of one compaction over the data files; `age` 1 is the newest."""
    for name in ("request_database.json", "templates.json", "machines.json"):
        backups = sorted(folder.glob(f"{name}.bak.*"))
        if backups:
            _replace(folder / name, backups[-age].read_bytes(), by_rename=by_rename)


def _replace(file: Path, text: bytes, *, by_rename: bool) -> None:
    if by_rename:
        new = file.with_name(file.name + "~")
        new.write_bytes(text)
        new.replace(file)
    else:
        file.write_bytes(text)


def _edit(folder: Path, *, by_rename: bool) -> None:
    """Change the name in every data file, like a text editor."""
    for file in data_files(folder):
        text = file.read_bytes().replace(b'"name":"2"', b'"name": "edited"')
        _replace(file, text, by_rename=by_rename)


async def _wait_until(check: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not await check():
        assert time.monotonic() < deadline, "the change was not noticed"
        await asyncio.sleep(0.005)


@asynccontextmanager
async def _another_store(folder: Path, layout: str) -> AsyncIterator[JSONStorageStrategy]:
    """Another open store with all data in memory; it compacts only if a test asks for it."""
    store = await open_json(folder, layout).open()
    never_folds(store)
    await whole(store)
    try:
        yield store
    finally:
        await abandon(store)


async def _replaced(store: JSONStorageStrategy) -> bool:
    try:
        await store.get_entity("templates", "t")
    except DataFileConflictError as exc:
        assert "--recover-from file" in str(exc)
        assert "--recover-from journal" in str(exc)
        return True
    return False


# -- at rest ----------------------------------------------------------------------------------


@both_layouts
@pytest.mark.parametrize("age", [1, 2])
async def test_91_a_backup_is_copied_over_a_closed_store(
    tmp_path: Path, layout: str, age: int
) -> None:
    states = await _generations(tmp_path, layout)
    _restore_backup(tmp_path, age)
    wanted = states[-1 - age]
    assert await reopened(tmp_path, layout) == wanted
    async with open_json(tmp_path, layout) as store:
        assert "replaced manually" in str((await store.health())["problems"])
        assert await store.save_entity("templates", {"template_id": "new"}) == 1
        await store.checkpoint()
        assert (await store.health())["problems"] == []
    now = await reopened(tmp_path, layout)
    assert now["templates"].pop("new")
    assert now == wanted


@both_layouts
@pytest.mark.parametrize("by_rename", [False, True])
@pytest.mark.parametrize("age", [1, 2])
async def test_91_a_backup_is_copied_over_an_open_store_with_an_empty_journal(
    tmp_path: Path, layout: str, age: int, by_rename: bool
) -> None:
    """Readers and writers see the replaced file, whichever of them compacted last."""
    states = await _generations(tmp_path, layout)
    async with (
        _another_store(tmp_path, layout) as reader,
        _another_store(tmp_path, layout) as folder,
        _another_store(tmp_path, layout) as writer,
    ):
        await folder.save_entity("requests", {"request_id": "r"})
        await folder.checkpoint()
        for each in (reader, writer):
            assert (await each.get_entity("templates", "t") or {})["version"] == 3
        _restore_backup(tmp_path, age, by_rename=by_rename)
        wanted = states[-1 - age] if layout == "split_files" else (states[-age])
        await writer.save_entity("templates", {"template_id": "new"})
        for each in (writer, folder, reader):
            now = await whole(each)
            assert now["templates"].pop("new")["version"] == 1
            assert {**now, "requests": {}} == wanted
        await folder.checkpoint()
        assert await whole(reader) == await reopened(tmp_path, layout) == await whole(writer)


@both_layouts
@pytest.mark.parametrize("by_rename", [False, True])
async def test_91_an_edit_is_seen_by_readers(tmp_path: Path, layout: str, by_rename: bool) -> None:
    states = await _generations(tmp_path, layout)
    async with _another_store(tmp_path, layout) as reader:
        _edit(tmp_path, by_rename=by_rename)

        async def edited() -> bool:
            entity = await reader.get_entity("templates", "t")
            assert entity in (states[-1]["templates"]["t"], {**(entity or {}), "name": "edited"})
            return (entity or {})["name"] == "edited"

        await _wait_until(edited)
        assert await reader.get_entity("machines", "m2")


# -- with commits waiting ---------------------------------------------------------------------


async def _pending(folder: Path, layout: str) -> tuple[list[Stored], Stored]:
    states = await _generations(folder, layout)
    store = await open_json(folder, layout).open()
    never_folds(store)
    await store.save_entity("templates", {"template_id": "t", "name": "pending"})
    await store.save_entity("machines", {"machine_id": "pending"})
    now = await whole(store)
    await abandon(store)
    return states, now


def _with_pending_commits(base: Stored, pending: Stored) -> Stored:
    """The contents of a file with the two commits of the journal applied."""
    return {
        "templates": {**base["templates"], "t": pending["templates"]["t"]},
        "requests": base["requests"],
        "machines": {**base["machines"], "pending": pending["machines"]["pending"]},
    }


@both_ways
@both_layouts
@pytest.mark.parametrize("age", [1, 2])
async def test_91_a_backup_over_a_closed_store_with_commits(
    tmp_path: Path, layout: str, way: Way, age: int
) -> None:
    states, pending = await _pending(tmp_path, layout)
    _restore_backup(tmp_path, age)
    before = {each.name: each.read_bytes() for each in [*data_files(tmp_path), *journals(tmp_path)]}
    async with _another_store_with_commits(tmp_path, layout) as store:
        for verb in (
            lambda: store.get_entity("templates", "t"),
            lambda: store.query_entities("machines"),
            lambda: store.save_entity("templates", {"template_id": "t"}),
            store.checkpoint,
        ):
            with pytest.raises(DataFileConflictError):
                await verb()
        after = [*data_files(tmp_path), *journals(tmp_path)]
        assert before == {each.name: each.read_bytes() for each in after}
        await store.checkpoint(recover_from=way)
        base = states[-1 - age]
        wanted = base if way == "file" else _with_pending_commits(base, pending)
        assert await whole(store) == wanted
        assert await reopened(tmp_path, layout) == wanted
        assert await store.save_entity("templates", {"template_id": "t"}) > 1
    assert len(journals(tmp_path)) == 1


@asynccontextmanager
async def _another_store_with_commits(
    folder: Path, layout: str
) -> AsyncIterator[JSONStorageStrategy]:
    store = await open_json(folder, layout).open()
    never_folds(store)
    try:
        yield store
    finally:
        await store.close()


@both_ways
@both_layouts
@pytest.mark.parametrize("by_rename", [False, True])
async def test_91_a_backup_over_an_open_store_with_commits(
    tmp_path: Path, layout: str, way: Way, by_rename: bool
) -> None:
    """A store with the commits in memory, a store that only reads, and a store that is opened later."""
    states, pending = await _pending(tmp_path, layout)
    async with (
        _another_store(tmp_path, layout) as writer,
        _another_store(tmp_path, layout) as reader,
    ):
        assert await whole(writer) == pending
        _restore_backup(tmp_path, 1, by_rename=by_rename)
        with pytest.raises(DataFileConflictError):
            await writer.save_entity("templates", {"template_id": "t"})
        await _wait_until(lambda: _replaced(reader))
        await _wait_until(lambda: _replaced(writer))
        async with _another_store_with_commits(tmp_path, layout) as later:
            assert await _replaced(later)
            await later.checkpoint(recover_from=way)
        wanted = states[-2] if way == "file" else _with_pending_commits(states[-2], pending)
        for each in (reader, writer):
            assert await whole(each) == wanted
        version = wanted["templates"]["t"]["version"]
        assert await writer.save_entity("templates", {"template_id": "t"}) == int(str(version)) + 1
        assert await whole(reader) == await whole(writer) == await reopened(tmp_path, layout)


@both_ways
async def test_91_one_of_the_split_files_with_commits(tmp_path: Path, way: Way) -> None:
    """The journal contains a transaction for two files, and one of them is replaced by its backup."""
    states, pending = await _pending(tmp_path, "split_files")
    backup = sorted(tmp_path.glob("templates.json.bak.*"))[-1]
    shutil.copy(backup, tmp_path / "templates.json")
    async with _another_store_with_commits(tmp_path, "split_files") as store:
        with pytest.raises(DataFileConflictError, match=r"templates\.json"):
            await store.get_entity("machines", "pending")
        await store.checkpoint(recover_from=way)
        now = await whole(store)
    if way == "journal":
        assert (
            now == pending
        )  # the journal contains whole entities: no field of the old one remains
    else:
        assert now == {**states[-1], "templates": states[-2]["templates"]}


async def test_91_a_replaced_file_is_restored(tmp_path: Path) -> None:
    """When the correct file is restored, all data are available again, without a choice by the user."""
    _, pending = await _pending(tmp_path, "single_file")
    right = (tmp_path / SINGLE).read_bytes()
    async with _another_store(tmp_path, "single_file") as store:
        (tmp_path / SINGLE).write_bytes(b"{}\n")
        await _wait_until(lambda: _replaced(store))
        (tmp_path / SINGLE).write_bytes(right)
        assert await whole(store) == pending
        assert await store.save_entity("templates", {"template_id": "t"}) == 5


# -- in another process -----------------------------------------------------------------------

_WATCHER: Final = """
import asyncio, json, sys
from hf_async_store import StorageError
from tests.json.support import open_json

async def main(folder, layout):
    told = None
    store = await open_json(__import__("pathlib").Path(folder), layout).open()
    while True:
        try:
            entity = await store.get_entity("templates", "t")
            now = entity and entity["name"]
        except StorageError as exc:
            now = type(exc).__name__
        except Exception as exc:
            now = repr(exc)
        if now != told:
            told = now
            print(json.dumps(now), flush=True)
        await asyncio.sleep(0.001)

asyncio.run(main(*sys.argv[1:]))
"""


@asynccontextmanager
async def _watcher(folder: Path, layout: str) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    """A process that has the store open and reports its contents when they change."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _WATCHER,
        str(folder),
        layout,
        cwd=Path(__file__).parents[2],
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    out = process.stdout

    async def told() -> Any:
        return json.loads(await asyncio.wait_for(out.readline(), _PATIENCE))

    try:
        yield told
    finally:
        process.kill()
        await process.wait()


@both_layouts
async def test_91_another_process_follows_a_replacement(tmp_path: Path, layout: str) -> None:
    await _generations(tmp_path, layout)
    async with _watcher(tmp_path, layout) as told:
        assert await told() == "2"
        _restore_backup(tmp_path, 1, by_rename=True)
        assert await told() == "1"
        async with open_json(tmp_path, layout) as store:
            await store.save_entity("templates", {"template_id": "t", "name": "new"})
            assert await told() == "new"


@both_ways
@both_layouts
async def test_91_another_process_recovers_from_a_replacement(
    tmp_path: Path, layout: str, way: Way
) -> None:
    await _pending(tmp_path, layout)
    async with _watcher(tmp_path, layout) as told:
        assert await told() == "pending"
        _restore_backup(tmp_path, 1, by_rename=True)
        assert await told() == "DataFileConflictError"
        async with _another_store_with_commits(tmp_path, layout) as store:
            await store.checkpoint(recover_from=way)
            assert await told() == ("1" if way == "file" else "pending")
            await store.save_entity("templates", {"template_id": "t", "name": "new"})
            assert await told() == "new"


# -- removed ----------------------------------------------------------------------------------


@both_layouts
async def test_91_a_data_file_is_removed(tmp_path: Path, layout: str) -> None:
    """This is an error and never an empty store, until the file is restored or the operator confirms it."""
    states = await _generations(tmp_path, layout)
    kept = {each: each.read_bytes() for each in data_files(tmp_path)}
    async with _another_store(tmp_path, layout) as opened:
        for each in kept:
            each.unlink()
        with pytest.raises(CorruptionError, match="missing"):
            await reopened(tmp_path, layout)
        with pytest.raises(CorruptionError, match="missing"):
            await opened.save_entity("templates", {"template_id": "t"})
        with pytest.raises(CorruptionError, match="missing"):
            await opened.checkpoint()
        for file, text in kept.items():
            file.write_bytes(text)
        assert await whole(opened) == states[-1]
        for each in kept:
            each.unlink()
        await opened.checkpoint(recover_from="file")
        assert await whole(opened) == {"templates": {}, "requests": {}, "machines": {}}
        assert await opened.save_entity("templates", {"template_id": "t"}) == 1
    assert (await reopened(tmp_path, layout))["templates"]["t"]["version"] == 1


@both_layouts
async def test_91_the_journal_of_a_closed_store_is_removed(tmp_path: Path, layout: str) -> None:
    """If the journal is empty, the data files contain everything."""
    states = await _generations(tmp_path, layout)
    for each in journals(tmp_path):
        each.unlink()
    assert await reopened(tmp_path, layout) == states[-1]
    async with open_json(tmp_path, layout) as store:
        assert await store.save_entity("templates", {"template_id": "t"}) == 4


@both_layouts
async def test_91_an_empty_journal_is_removed(tmp_path: Path, layout: str) -> None:
    """The store is open, but the journal is empty: nothing is lost."""
    states = await _generations(tmp_path, layout)
    async with _another_store(tmp_path, layout) as store, _another_store(tmp_path, layout) as other:
        for each in journals(tmp_path):
            each.unlink()
        assert await whole(store) == states[-1]
        assert await store.save_entity("templates", {"template_id": "t"}) == 4
        assert await other.save_entity("templates", {"template_id": "t"}) == 5
        assert await whole(store) == await whole(other) == await reopened(tmp_path, layout)


@both_layouts
async def test_91_the_journal_is_removed_with_commits(tmp_path: Path, layout: str) -> None:
    """A store that was open reports that commits are missing."""
    states, pending = await _pending(tmp_path, layout)
    async with _another_store(tmp_path, layout) as store:
        assert await whole(store) == pending
        for each in journals(tmp_path):
            each.unlink()
        for verb in (
            lambda: store.get_entity("templates", "t"),
            lambda: store.save_entity("templates", {"template_id": "t"}),
            store.checkpoint,
        ):
            with pytest.raises(CorruptionError, match="removed"):
                await verb()
        await store.checkpoint(recover_from="file")
        assert await whole(store) == states[-1]
        assert await store.save_entity("templates", {"template_id": "t"}) == 4


async def test_91_the_journal_is_moved_away_from_a_reader(tmp_path: Path) -> None:
    _, pending = await _pending(tmp_path, "single_file")
    async with _another_store(tmp_path, "single_file") as store:
        (journal,) = journals(tmp_path)
        journal.rename(tmp_path / "away")

        async def noticed() -> bool:
            try:
                assert (await store.get_entity("templates", "t")) == pending["templates"]["t"]
            except CorruptionError:
                return True
            return False

        await _wait_until(noticed)


async def test_91_the_journal_is_moved_away(tmp_path: Path) -> None:
    """Commits must not be written to the open file of a journal that was moved away."""
    await _pending(tmp_path, "single_file")
    async with _another_store(tmp_path, "single_file") as store:
        await store.save_entity("templates", {"template_id": "t", "name": "more"})
        expected = await whole(store)
        (journal,) = journals(tmp_path)
        away = tmp_path / "away"
        journal.rename(away)
        with pytest.raises(CorruptionError, match="removed"):
            await store.save_entity("templates", {"template_id": "t", "name": "lost"})
        away.rename(journal)
        assert await whole(store) == expected
        assert await store.save_entity("templates", {"template_id": "t"}) == 6
        assert await whole(store) == await reopened(tmp_path)


@both_layouts
async def test_91_lock_files_are_removed(tmp_path: Path, layout: str) -> None:
    """They are removed while no process holds them: writers still exclude one another."""
    await _generations(tmp_path, layout)
    async with _another_store(tmp_path, layout) as one, _another_store(tmp_path, layout) as other:
        for round_ in range(5):
            for each in tmp_path.glob(".*.lock*"):
                each.unlink()
            both = await asyncio.gather(
                *(
                    each.save_entity("templates", {"template_id": "t", "name": str(round_)})
                    for each in (one, other)
                    for _ in range(10)
                )
            )
            assert len(set(both)) == 20
        await one.checkpoint()
        for each in tmp_path.glob(".*.lock*"):
            each.unlink()
        await other.checkpoint()
        assert (await one.get_entity("templates", "t") or {})["version"] == 103


@both_layouts
@pytest.mark.parametrize("waiting", [False, True])
async def test_91_the_folder_is_removed_while_open(
    tmp_path: Path, layout: str, waiting: bool
) -> None:
    """This is an error and not an empty store, until the operator confirms it."""
    folder = tmp_path / "data"
    await (_pending if waiting else _generations)(folder, layout)
    async with _another_store(folder, layout) as store:
        shutil.rmtree(folder)
        for verb in (
            lambda: store.get_entity("templates", "t"),
            lambda: store.query_entities("templates"),
            lambda: store.save_entity("templates", {"template_id": "t"}),
        ):
            with pytest.raises(
                DataFileConflictError, match="data was removed or renamed"
            ) as caught:
                await verb()
            assert not caught.value.retryable
            assert not folder.exists()
        await store.checkpoint(recover_from="file")
        assert await whole(store) == {"templates": {}, "requests": {}, "machines": {}}
        assert await store.save_entity("templates", {"template_id": "t"}) == 1
        assert await whole(store) == await reopened(folder, layout)


@both_layouts
async def test_91_the_folder_is_replaced_by_another_one(tmp_path: Path, layout: str) -> None:
    folder = tmp_path / "data"
    states = await _generations(folder, layout)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    async with _another_store(folder, layout) as store, _another_store(folder, layout) as reader:
        for each in (store, reader):
            await each.save_entity("templates", {"template_id": "t", "name": "later"})
        folder.rename(tmp_path / "away")
        copy.rename(folder)
        assert await store.save_entity("templates", {"template_id": "t", "name": "here"}) == 4

        async def here() -> bool:
            return (await reader.get_entity("templates", "t") or {})["name"] == "here"

        await _wait_until(here)
        found = await reopened(folder, layout)
        assert found["machines"] == states[-1]["machines"]
        assert found["templates"]["t"]["version"] == 4
    away = await reopened(tmp_path / "away", layout)
    assert away["templates"]["t"]["version"] == 5


# -- files of one's own beside the store --------------------------------------------------------


@both_layouts
async def test_files_with_similar_names_are_ignored(tmp_path: Path, layout: str) -> None:
    """Files with names similar to those of the store are never read and never removed."""
    name = SINGLE if layout == "single_file" else "machines.json"
    stem = SINGLE if layout == "single_file" else "store"
    own = [
        f"{name}.bak",
        f"{name}.bak.before-upgrade",
        f"{name}.bak.00000001.keep",
        f"{name}.bak.²",
        f"{stem}.journal",
        f"{stem}.journal.00000001.copy",
        f"{stem}.journal.²",
        f"{name}.tmp",
        f".{name}",
        "notes.tmp",
    ]
    for each in own:
        (tmp_path / each).write_bytes(b"mine")
    async with open_json(tmp_path, layout, backup_count=2) as store:
        for number in range(5):
            await store.save_entity("machines", {"machine_id": f"m{number}"})
            await store.checkpoint()
        assert len(store.backups()) == 2
    assert [each for each in own if (tmp_path / each).read_bytes() != b"mine"] == []
    assert len((await reopened(tmp_path, layout))["machines"]) == 5


@both_layouts
async def test_backups_continue_after_the_journal_was_removed(tmp_path: Path, layout: str) -> None:
    """Generation numbers start again; the newest backups are still those of the last compactions."""
    name = SINGLE if layout == "single_file" else "machines.json"
    async with open_json(tmp_path, layout, backup_count=2) as store:
        for number in range(6):
            await store.save_entity("machines", {"machine_id": f"m{number}"})
            await store.checkpoint()
    for each in journals(tmp_path):
        each.unlink()
    async with open_json(tmp_path, layout, backup_count=2) as store:
        for number in range(6, 9):
            before = (tmp_path / name).read_bytes()
            await store.save_entity("machines", {"machine_id": f"m{number}"})
            await store.checkpoint()
            newest = store.backups()[0]
            assert newest.read_bytes() == before
            assert len(store.backups()) == 2


async def test_backups_are_kept_if_backups_are_turned_off(tmp_path: Path) -> None:
    await _generations(tmp_path, "single_file")
    before = sorted(tmp_path.glob("*.bak.*"))
    assert before
    async with open_json(tmp_path, backup_enabled=False) as store:
        await store.save_entity("machines", {"machine_id": "more"})
        await store.checkpoint()
    assert sorted(tmp_path.glob("*.bak.*")) == before


async def test_another_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative folder is resolved with the working directory at the creation of the store."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    async with open_json(Path("data")) as store:
        await store.save_entity("templates", {"template_id": "t"})
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert await store.save_entity("templates", {"template_id": "t"}) == 2
        await store.checkpoint()
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert (await reopened(tmp_path / "data"))["templates"]["t"]["version"] == 2


@both_layouts
@pytest.mark.parametrize("which", [0, 1, 2])
async def test_one_of_several_journals_is_removed(tmp_path: Path, layout: str, which: int) -> None:
    """Journals that were not compacted form a chain; if one is missing, there is an error that offers
    choices."""
    await _chain_without(tmp_path, layout, which)
    async with _another_store_with_commits(tmp_path, layout) as store:
        if which == 2:  # the newest: its removal cannot be detected
            assert (await store.get_entity("templates", "t") or {})["name"] == "chain 1"
            return
        for verb in (
            lambda: store.get_entity("templates", "t"),
            lambda: store.save_entity("templates", {"template_id": "t"}),
            store.checkpoint,
            lambda: store.checkpoint(recover_from="journal"),
        ):
            with pytest.raises(CorruptionError, match="journal"):
                await verb()
        await store.checkpoint(recover_from="file")
        assert (await store.get_entity("templates", "t") or {})["name"] == "2"
        assert await store.save_entity("templates", {"template_id": "t"}) == 4


async def _chain_without(folder: Path, layout: str, which: int) -> None:
    """Three journals that were not compacted, one of which is removed."""
    await _generations(folder, layout)
    async with _another_store(folder, layout) as store:
        engine = store._json
        for number in range(2):
            await store.save_entity("templates", {"template_id": "t", "name": f"chain {number}"})
            async with engine.writing() as state:
                await engine.journal.start_generation(state)
        await store.save_entity("templates", {"template_id": "t", "name": "chain 2"})
    chain = journals(folder)
    assert len(chain) == 3
    chain[which].unlink()


@both_layouts
async def test_a_gap_offers_to_keep_the_commits_before_it(tmp_path: Path, layout: str) -> None:
    await _chain_without(tmp_path, layout, 1)
    async with _another_store_with_commits(tmp_path, layout) as store:
        with pytest.raises(CorruptionError, match="has a gap.*--recover-from salvage"):
            await store.get_entity("templates", "t")
        await store.checkpoint(recover_from="salvage")
        assert (await store.get_entity("templates", "t") or {})["name"] == "chain 0"


@both_layouts
async def test_commits_after_a_gap_are_never_applied(tmp_path: Path, layout: str) -> None:
    """Even if an older journal, whose commits the data files contain, is before the gap."""
    async with _another_store(tmp_path, layout) as store:
        await store.save_entity("templates", {"template_id": "t", "name": "a"})
        [old] = journals(tmp_path)
        content = old.read_bytes()
        await store.checkpoint()
        await store.save_entity("templates", {"template_id": "t", "name": "b"})
        async with store._json.writing() as state:
            await store._json.journal.start_generation(state)
        await store.save_entity("templates", {"template_id": "t", "name": "c"})
    missing, newest = journals(tmp_path)
    missing.unlink()
    old.write_bytes(content + record(*control(Seal(2)), 2))
    async with _another_store_with_commits(tmp_path, layout) as store:
        with pytest.raises(CorruptionError, match="generation 2 is missing") as caught:
            await store.get_entity("templates", "t")
        assert "--recover-from file" in str(caught.value)
        assert "salvage" not in str(caught.value)
        await store.checkpoint(recover_from="salvage")
        assert (await store.get_entity("templates", "t") or {})["name"] == "a"
    [kept] = tmp_path.glob("*.damaged.*")
    assert kept.name[-8:] == newest.name[-8:]


# -- in the middle of things ------------------------------------------------------------------


@both_layouts
async def test_91_a_file_is_replaced_during_a_compaction(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compaction has written its files but not renamed them: it must not overwrite the replaced file."""
    await _pending(tmp_path, layout)
    async with _another_store(tmp_path, layout) as store:
        folding = store._json.compactor
        real = folding._write
        fired: list[bool] = []

        async def write(*args: Any) -> Any:
            written = await real(*args)
            if not fired:
                fired.append(True)
                _edit(tmp_path, by_rename=True)
            return written

        monkeypatch.setattr(folding, "_write", write)
        edited = {each.name: each.read_bytes() for each in data_files(tmp_path)}
        with pytest.raises(DataFileConflictError):
            await store.checkpoint()
        assert fired
        for each in data_files(tmp_path):
            assert each.read_bytes() in (
                edited[each.name],
                edited[each.name].replace(b'"name":"2"', b'"name": "edited"'),
            )
            assert b'"name":"2"' not in each.read_bytes()
        assert not temporary(tmp_path)


@pytest.mark.parametrize("largest", [0, 1 << 40])
@pytest.mark.parametrize("edit", ["valid", "damaged"])
async def test_91_an_edit_that_the_signature_of_the_file_does_not_show(
    tmp_path: Path, edit: str, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large file is parsed as if it were the known one with its signature, until its digest is known."""
    monkeypatch.setattr(files, "_LARGE_FILE", largest)
    await _generations(tmp_path, "single_file")
    file = tmp_path / SINGLE
    status = file.stat()
    old = b'{"version":3,"template_id":"t","name":"2"' if edit == "valid" else b"{\n"
    text = file.read_bytes()
    assert old in text
    new = old.replace(b'"2"', b'"3"') if edit == "valid" else b"[\n"
    file.write_bytes(text.replace(old, new, 1))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    if edit == "damaged":
        with pytest.raises(CorruptionError):
            await reopened(tmp_path, "single_file")
    else:
        async with open_json(tmp_path, "single_file") as store:
            entity = await store.get_entity("templates", "t")
            assert entity is not None
            assert entity["name"] == "3"
            assert store._json.follower.state is not None
            assert store._json.follower.state.replaced == {SINGLE}


async def test_91_a_file_that_is_copied_while_it_is_read(tmp_path: Path) -> None:
    """`cp` does not replace a file atomically: an incomplete file is an error, or read again later."""
    await _generations(tmp_path, "single_file")
    text = (tmp_path / SINGLE).read_bytes().replace(b'"name":"2"', b'"name":"3"')
    async with _another_store(tmp_path, "single_file") as store:
        fd = os.open(tmp_path / SINGLE, os.O_WRONLY | os.O_TRUNC)
        seen = set()
        for place in range(len(text)):
            os.write(fd, text[place : place + 1])
            try:
                entity = await store.get_entity("templates", "t")
                seen.add((entity or {}).get("name"))
            except CorruptionError:
                seen.add("error")
        os.close(fd)

        async def all_there() -> bool:
            entity = await store.get_entity("templates", "t")
            seen.add((entity or {}).get("name"))
            return (entity or {}).get("name") == "3"

        await _wait_until(all_there)
    assert seen <= {"2", "3", "error"}
    assert parsed(tmp_path / SINGLE)
