"""Cases 77 to 80: migration, resumption, verification, failures."""

from __future__ import annotations

import asyncio
import itertools
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from support import KINDS, everything, fill, opened, real_data, settings

from hf_async_store import (
    HOST_FACTORY,
    Collection,
    ConfigurationError,
    Entity,
    Field,
    InvalidFieldError,
    MigrationError,
    MigrationTool,
    StorageError,
    StorageStrategy,
    TargetNotEmptyError,
    VerificationError,
    open_store,
)
from hf_async_store.migration import backup_store, compare_stores, diff, restore_store
from hf_async_store.migration.diff import differing

if TYPE_CHECKING:
    from conftest import Place

pytestmark = pytest.mark.hf_sampled(by="kind")

PAIRS = list(itertools.permutations(KINDS, 2))
_SHORT = {("dynamodb", "json-split"), ("postgresql", "sqlite"), ("sqlite", "dynamodb")}
SOME_PAIRS = [
    each if each in _SHORT else pytest.param(*each, marks=pytest.mark.long) for each in PAIRS
]
"""The pairs for tests with many processes: each engine on one side at least; all in `make test-long`."""

MOVER = [sys.executable, str(Path(__file__).with_name("mover.py"))]


async def _migrate(source: StorageStrategy, target: StorageStrategy, folder: Path, **more: object):
    return await MigrationTool(source, target, settings(folder, **more)).migrate()


# -- case 77: everything arrives as it was --------------------------------------------------


@pytest.mark.parametrize(("source_kind", "target_kind"), PAIRS)
async def test_77_values_versions_and_timestamps_are_kept(
    source_kind: str, target_kind: str, place: Place, tmp_path: Path
) -> None:
    async with (
        opened(place(source_kind, "a")) as source,
        opened(place(target_kind, "b")) as target,
    ):
        await fill(source)
        before = await everything(source)
        report = await _migrate(source, target, tmp_path, batch_size=7)
        assert report.ok
        assert report.verified
        assert report.collections["machines"].written == 60
        assert repr(_sorted(await everything(target))) == repr(_sorted(before))
        assert repr(_sorted(await everything(source))) == repr(_sorted(before))
        compared = await compare_stores(source, target)
        assert compared.equal
        assert compared.collections["machines"].source_count == 60
        # The backup that was made first is one of the source; a backup of the target is equal.
        assert report.backup is not None
        again = await backup_store(target, tmp_path / "again.jsonl.gz")
        assert Path(again.path).read_bytes() == Path(report.backup).read_bytes()


def _sorted(value: object) -> object:
    if isinstance(value, dict):
        return {name: _sorted(value[name]) for name in sorted(value)}
    return [_sorted(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("source_kind", "target_kind"), PAIRS)
async def test_77_real_data(
    source_kind: str, target_kind: str, place: Place, tmp_path: Path
) -> None:
    data = real_data()
    if not data:
        pytest.skip("HF_ASYNC_STORE_REAL_DATA names no real data")
    async with (
        open_store(place(source_kind, "a")) as source,
        open_store(place(target_kind, "b")) as target,
    ):
        for name in source.collections:
            await source.import_entities(name, data[name].values())
        report = await _migrate(source, target, tmp_path)
        assert report.verified
        assert report.collections["machines"].read == len(data["machines"])


@pytest.mark.parametrize("layout", ["single_file/request_database.json", "split_files_flat",
                                    "split_files_wrapped"])  # fmt: skip
async def test_real_layouts_can_be_sources(layout: str, tmp_path: Path, place: Place) -> None:
    import os
    import shutil

    found = os.environ.get("HF_ASYNC_STORE_REAL_DATA")
    if not found:
        pytest.skip("HF_ASYNC_STORE_REAL_DATA names no real data")
    origin = Path(found) / layout
    copy = tmp_path / "field" / origin.name
    copy.parent.mkdir()
    (shutil.copytree if origin.is_dir() else shutil.copy)(origin, copy)
    before = {each: each.read_bytes() for each in copy.parent.rglob("*.json")}
    async with (
        open_store(f"json:{copy}") as source,
        open_store(place("json-single", "b")) as target,
    ):
        report = await _migrate(source, target, tmp_path)
    assert {name: each.read for name, each in report.collections.items()} == {
        "templates": 20,
        "requests": 40,
        "machines": 1345,
    }
    assert {each: each.read_bytes() for each in copy.parent.rglob("*.json")} == before


async def test_77_a_migration_there_and_back_is_identical(place: Place, tmp_path: Path) -> None:
    urls = [place(kind, f"s{n}") for n, kind in enumerate((*KINDS, KINDS[0]))]
    async with opened(urls[0]) as store:
        await fill(store)
        first = await backup_store(store, tmp_path / "first.jsonl.gz")
    for one, other in itertools.pairwise(urls):
        async with opened(one) as source, opened(other) as target:
            await _migrate(source, target, tmp_path, create_backup=False)
    async with opened(urls[-1]) as store:
        last = await backup_store(store, tmp_path / "last.jsonl.gz")
    assert Path(first.path).read_bytes() == Path(last.path).read_bytes()


async def test_running_it_twice_changes_nothing(place: Place, tmp_path: Path) -> None:
    async with opened(place("json-single", "a")) as source, opened("memory:") as target:
        await fill(source)
        await _migrate(source, target, tmp_path)
        before = await everything(target)
        report = await _migrate(source, target, tmp_path)
        assert report.verified
        assert sum(each.written for each in report.collections.values()) == 0
        assert await everything(target) == before


async def test_parents_in_the_same_collection_are_written_first(tmp_path: Path) -> None:
    tree = Collection("nodes", key="node_id", fields=[Field("parent", references="nodes")])
    async with (
        open_store("memory:?enforce_references=no", collections=[tree]) as source,
        open_store("memory:", collections=[tree]) as target,
    ):
        await source.import_entities(
            "nodes",
            [{"node_id": f"n-{n:03d}", "parent": f"n-{n + 1:03d}"} for n in range(49)]
            + [{"node_id": "n-049", "parent": None}],
        )
        report = await _migrate(source, target, tmp_path, batch_size=4)
        assert report.verified
        assert await target.count_entities("nodes") == 50
        cleaned = await MigrationTool(
            source, target, settings(tmp_path, cleanup_source=True, create_backup=False)
        ).migrate()
        assert cleaned.collections["nodes"].cleaned == 50


# -- case 78: killed and resumed ------------------------------------------------------------


def _mover(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MOVER, *words], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("source_kind", "target_kind"), SOME_PAIRS)
@pytest.mark.parametrize(
    "in_the_middle", [True, pytest.param(False, marks=pytest.mark.long)], ids=["amid", "after"]
)
async def test_78_killed_at_any_batch_then_resumed(
    source_kind: str, target_kind: str, in_the_middle: bool, place: Place, tmp_path: Path
) -> None:
    one, other = place(source_kind, "a"), place(target_kind, "b")
    async with opened(one) as source:
        await fill(source, 100)
    killed = 0
    more = ["amid"] if in_the_middle else []
    while True:
        # A batch that ends before an earlier one is not in the checkpoint yet: kills at the first
        # batch alone might never get anywhere.
        what = "resume" if killed else "migrate"
        done = _mover(one, other, str(tmp_path), what, str(1 + killed // 3), *more)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        killed += 1
        assert killed < 60
    assert killed >= 3
    async with opened(one) as source, opened(other) as target:
        compared = await compare_stores(source, target)
        assert compared.equal, compared.differences
    assert not list(tmp_path.rglob("*.checkpoint"))


async def _interrupted(tmp_path: Path, place: Place) -> tuple[str, str]:
    one, other = place("json-single", "a"), place("json-split", "b")
    async with opened(one) as source:
        await fill(source, 100)
    done = _mover(one, other, str(tmp_path), "migrate", "4")
    assert done.returncode == -signal.SIGKILL, done.stderr
    return one, other


async def test_78_resume_writes_only_what_is_left(tmp_path: Path, place: Place) -> None:
    one, other = await _interrupted(tmp_path, place)
    done = _mover(one, other, str(tmp_path), "resume")
    assert done.returncode == 0, done.stderr
    async with opened(one) as source:
        everything_there = sum(len(each) for each in (await everything(source)).values())
    assert 0 < int(done.stdout) < everything_there


async def test_78_a_changed_source_is_noticed(tmp_path: Path, place: Place) -> None:
    one, other = await _interrupted(tmp_path, place)
    async with opened(one) as source, opened(other) as target:
        await source.update_entity("templates", "t-1", {"name": "changed since"})
        tool = MigrationTool(source, target, settings(tmp_path, create_backup=False))
        report = await tool.resume()
        assert any("templates changed in the source" in each for each in report.notices)
        assert (await compare_stores(source, target)).equal


async def test_78_a_changed_target_is_noticed(tmp_path: Path, place: Place) -> None:
    one, other = await _interrupted(tmp_path, place)
    async with opened(one) as source, opened(other) as target:
        await target.update_entity("templates", "t-1", {"name": "by another"})
        tool = MigrationTool(source, target, settings(tmp_path, create_backup=False))
        with pytest.raises(MigrationError, match=r"templates changed in the target.*'t-1'"):
            await tool.resume()


async def test_78_nothing_to_resume_is_reported(tmp_path: Path) -> None:
    async with opened("memory:") as source, opened(f"json:{tmp_path}/b.json") as target:
        with pytest.raises(MigrationError, match="nothing to resume"):
            await MigrationTool(source, target, settings(tmp_path)).resume()


# -- case 79: verification ------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("plant", "named"),
    [
        ({"data": 1.0}, ["items 'odd-4' differs in data"]),
        ({"data": True}, ["items 'odd-4' differs in data"]),
        ({"data": 1, "version": 5}, ["items 'odd-4' differs in version"]),
        ({"data": 1, "more": None}, ["items 'odd-4' differs in more"]),
        (None, ["items 'odd-4' is missing in the target"]),
        ({"item_id": "stranger"}, ["items 'stranger' is in the target only"]),
    ],
)
async def test_79_differences_are_found_and_named(
    plant: dict[str, object] | None, named: list[str], kind: str, place: Place, tmp_path: Path
) -> None:
    async with opened("memory:") as source, opened(place(kind, "b")) as target:
        await fill(source, 10)
        tool = MigrationTool(source, target, settings(tmp_path))
        await tool.migrate()
        assert (await tool.validate_migration())["items"] == await source.count_entities("items")
        if plant is None:
            await target.delete_entity("items", "odd-4")
        else:
            base = {"item_id": "odd-4", "extra": 1, "version": 4}
            await target.import_entities("items", [{**base, **plant}])
        with pytest.raises(VerificationError) as caught:
            await tool.validate_migration()
        assert caught.value.differences == named


async def test_79_entities_are_compared_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []

    def counted(one: Entity, other: Entity) -> list[str]:
        calls.append(one["template_id"])
        return differing(one, other)

    monkeypatch.setattr(diff, "differing", counted)
    async with opened("memory:") as one, opened("memory:") as two:
        for store, name in ((one, "missing"), (two, "extra")):
            templates = [{"template_id": each} for each in ("a", "b", name)]
            await store.import_entities("templates", templates)
        await two.update_entity("templates", "b", {"name": "other"})
        found = (await compare_stores(one, two)).differences
    assert sorted(each.kind for each in found) == ["changed", "extra", "missing"]
    assert sorted(calls, key=str) == ["a", "b"]


async def test_79_many_differences_are_listed_up_to_a_limit(tmp_path: Path) -> None:
    async with opened("memory:") as source, opened("memory:") as target:
        await fill(source, 100)
        compared = await compare_stores(source, target, limit=5)
        assert len(compared.differences) == 5
        assert compared.more
        assert not compared.equal


# -- case 80: failing -----------------------------------------------------------------------


async def test_80_an_invalid_value_leaves_the_source_unchanged(tmp_path: Path) -> None:
    loose = Collection("things", key="thing_id", fields=[Field("size", "json")])
    strict = Collection("things", key="thing_id", fields=[Field("size", "integer")])
    async with (
        open_store("memory:", collections=[loose]) as source,
        open_store("memory:", collections=[strict]) as target,
    ):
        await source.create_entities(
            "things", [{"thing_id": f"x-{n}", "size": "large" if n == 17 else n} for n in range(30)]
        )
        before = await everything(source)
        tool = MigrationTool(source, target, settings(tmp_path, batch_size=5))
        report = await tool.migrate(dry_run=True)
        assert not report.ok
        assert len(report.problems) == 1
        assert "'x-17'" in report.problems[0]
        assert "things.size is declared as integer" in report.problems[0]
        assert await target.count_entities("things") == 0
        with pytest.raises(MigrationError, match=r"source is unchanged.*resume") as caught:
            await tool.migrate()
        assert isinstance(caught.value.__cause__, InvalidFieldError)
        # It is named as in the dry run, and not by its position in a batch.
        assert report.problems[0] in str(caught.value)
        assert "item " not in str(caught.value)
        assert await everything(source) == before
        await source.update_entity("things", "x-17", {"size": 17})
        assert (await tool.resume()).verified


@pytest.mark.parametrize("rule", [None, "keep", "replace", "newest"])
async def test_80_a_refused_entity_is_named(rule: str | None, tmp_path: Path) -> None:
    loose = Collection("things", key="thing_id", fields=[Field("size", "json")])
    strict = Collection("things", key="thing_id", fields=[Field("size", "integer")])
    async with (
        open_store("memory:", collections=[loose]) as source,
        open_store("memory:", collections=[strict]) as target,
    ):
        if rule is not None:
            await target.create_entity("things", {"thing_id": "own"})
        await source.create_entities("things", [{"thing_id": f"x-{n}"} for n in range(30)])
        await source.update_entity("things", "x-17", {"size": "large"})
        tool = MigrationTool(source, target, settings(tmp_path), merge=rule)  # type: ignore[arg-type]
        with pytest.raises(MigrationError, match=r"things 'x-17': things\.size") as caught:
            await tool.migrate()
        assert "item " not in str(caught.value)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_80_an_entity_refused_by_the_server_is_named(
    kind: str, place: Place, tmp_path: Path
) -> None:
    async with (
        open_store("memory:?enforce_references=no") as source,
        open_store(place(kind, "b")) as target,
    ):
        await source.create_entities("requests", [{"request_id": f"r-{n}"} for n in range(30)])
        await source.update_entity("requests", "r-17", {"template_id": "gone"})
        with pytest.raises(MigrationError, match=r"requests 'r-17'.*'gone'"):
            await MigrationTool(source, target, settings(tmp_path)).migrate()


async def test_80_a_missing_parent_is_found_by_a_dry_run(tmp_path: Path) -> None:
    async with (
        open_store("memory:?enforce_references=no") as source,
        open_store("memory:") as target,
    ):
        await source.create_entity("templates", {"template_id": "t-1"})
        await source.create_entities(
            "requests",
            [{"request_id": f"r-{n}", "template_id": "t-1" if n else "gone"} for n in range(3)],
        )
        tool = MigrationTool(source, target, settings(tmp_path))
        report = await tool.migrate(dry_run=True)
        assert report.problems == [
            "requests 'r-0': template_id refers to 'gone', which does not exist in templates (if it is "
            "stored elsewhere, declare the field with enforced=False, or set enforce_references to false)"
        ]
        assert any("enforces references" in each for each in report.notices)
        with pytest.raises(MigrationError, match="'gone'"):
            await tool.migrate()
        assert await target.count_entities("machines") == 0


async def test_80_a_target_that_fails_midway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk of the target is full for some time."""
    import errno
    import os

    from hf_async_store import DiskFullError

    async with (
        opened(f"json:{tmp_path}/a.json") as source,
        opened(f"json:{tmp_path}/b/b.json") as target,
    ):
        await fill(source, 200)
        before = await everything(source)
        tool = MigrationTool(source, target, settings(tmp_path, batch_size=10))
        room = 6
        pwrite = os.pwrite

        def full(fd: int, data: bytes, offset: int) -> int:
            nonlocal room
            if os.readlink(f"/proc/self/fd/{fd}").startswith(f"{tmp_path}/b/"):
                room -= 1
                if room < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return pwrite(fd, data, offset)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(MigrationError, match="resume") as caught:
                await tool.migrate()
        assert any(isinstance(each, DiskFullError) for each in _chain(caught.value))
        assert await everything(source) == before
        assert (await tool.resume()).verified


async def test_80_a_target_whose_server_dies_midway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_async_store.migration import copier
    from hf_async_store.testing.harness import skip_engine
    from hf_async_store_bench.servers import ServerUnavailable, postgres

    try:
        server_context = postgres()
        server = server_context.__enter__()
    except ServerUnavailable as exc:
        skip_engine("postgresql", str(exc))
    try:
        async with (
            opened(f"json:{tmp_path}/a.json") as source,
            opened(f"{server.database()}?pool_timeout=5&timeout=5") as target,
        ):
            await fill(source, 300)
            before = await everything(source)
            tool = MigrationTool(source, target, settings(tmp_path, batch_size=20))
            put, written = copier.put, 0

            async def dying(*arguments: object, **more: object) -> object:
                nonlocal written
                written += 1
                if written == 9:
                    server.kill()
                return await put(*arguments, **more)  # type: ignore[arg-type]

            with monkeypatch.context() as patch:
                patch.setattr(copier, "put", dying)
                with pytest.raises(MigrationError, match=r"source is unchanged.*resume") as caught:
                    await tool.migrate()
            assert all(isinstance(each, StorageError) for each in _chain(caught.value)[:2])
            assert await everything(source) == before
            server.start()
            report = await tool.resume()
            assert report.verified
            assert report.resumed
    finally:
        server_context.__exit__(None, None, None)


def _chain(exc: BaseException) -> list[BaseException]:
    found = [exc]
    while found[-1].__cause__ is not None:
        found.append(found[-1].__cause__)
    return found


async def test_80_the_source_is_emptied_only_after_verification(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cleanup_source needs"):
        MigrationTool(
            "memory:", "memory:", {"cleanup_source": True, "validate_after_migration": False}
        )
    async with opened("memory:") as source, opened("memory:") as target:
        await fill(source)
        tool = MigrationTool(source, target, settings(tmp_path, cleanup_source=True))
        before = await everything(source)

        async def lying(*, limit: int = 0) -> object:
            raise VerificationError("planted")

        compare, tool.compare = tool.compare, lying  # type: ignore[assignment, method-assign]
        with pytest.raises(VerificationError, match="planted"):
            await tool.migrate()
        assert await everything(source) == before
        tool.compare = compare  # type: ignore[method-assign]
        report = await tool.migrate()
        assert report.cleaned
        assert not any((await everything(source)).values())
        assert await everything(target) == before
        # There is nothing left to copy, and the target keeps its entities.
        with pytest.raises(TargetNotEmptyError):
            await tool.migrate()


async def test_80_entities_changed_after_verification_are_not_deleted(tmp_path: Path) -> None:
    async with opened("memory:") as source, opened("memory:") as target:
        await fill(source)
        tool = MigrationTool(source, target, settings(tmp_path, cleanup_source=True))
        clean = tool._clean

        async def late(*arguments: object) -> None:
            await source.update_entity("machines", "m-00030", {"status": "late"})
            await clean(*arguments)  # type: ignore[arg-type]

        tool._clean = late  # type: ignore[method-assign]
        with pytest.raises(MigrationError, match="changed since it was verified"):
            await tool.migrate()
        kept = await source.get_entity("machines", "m-00030")
        assert kept is not None
        assert kept["status"] == "late"


# -- a target that is not empty -------------------------------------------------------------


async def test_a_target_with_other_entities_is_refused(tmp_path: Path) -> None:
    async with opened("memory:") as source, opened("memory:") as target:
        await fill(source)
        await target.create_entity("templates", {"template_id": "own"})
        tool = MigrationTool(source, target, settings(tmp_path))
        with pytest.raises(
            TargetNotEmptyError, match=r"templates 'own' in it is not in the source"
        ):
            await tool.migrate()
        assert await target.count_entities("machines") == 0
        report = await tool.migrate(dry_run=True)
        assert "is not empty" in report.problems[0]


@pytest.mark.parametrize(
    ("rule", "name", "written"),
    [("keep", "theirs", 2), ("replace", "Template 1", 3), ("newest", "theirs", 2)],
)
async def test_merging_follows_the_rule(rule: str, name: str, written: int, tmp_path: Path) -> None:
    async with opened("memory:") as source, opened("memory:") as target:
        await fill(source, 10)
        await target.save_entity("templates", {"template_id": "t-1", "name": "theirs"})
        await target.save_entity("templates", {"template_id": "own"})
        tool = MigrationTool(source, target, settings(tmp_path), merge=rule)  # type: ignore[arg-type]
        report = await tool.migrate()
        assert report.verified
        assert report.collections["templates"].written == written
        found = await target.get_entity("templates", "t-1")
        assert found is not None
        assert found["name"] == name
        assert await target.get_entity("templates", "own") is not None


async def test_newest_compares_the_time_of_the_last_write(tmp_path: Path) -> None:
    def item(name: str, moment: str | None, version: int = 1) -> dict[str, object]:
        return {"item_id": name, "updated_at": moment, "version": version, "label": "arriving"}

    early, late = "2026-01-01T00:00:00.000000Z", "2026-01-02T00:00:00.000000Z"
    async with opened("memory:") as source, opened("memory:") as target:
        await source.import_entities(
            "items", [item("a", late), item("b", early), item("c", None, 9), item("d", late, 2)]
        )
        await target.import_entities(
            "items",
            [
                {**item(name, moment, version), "label": "there"}
                for name, moment, version in [
                    ("a", early, 9),
                    ("b", late, 1),
                    ("c", early, 1),
                    ("d", late, 1),
                ]
            ],
        )
        await MigrationTool(source, target, settings(tmp_path), merge="newest").migrate()
        found = {each["item_id"]: each["label"] for each in await target.query_entities("items")}
        assert found == {"a": "arriving", "b": "there", "c": "there", "d": "arriving"}


# -- the steps of the spec ------------------------------------------------------------------


async def test_the_steps_of_the_spec_one_by_one(tmp_path: Path) -> None:
    config = settings(tmp_path)
    async with MigrationTool(f"json:{tmp_path}/a.json", f"json:{tmp_path}/b", config) as tool:
        await tool.source.create_entities(
            "templates", [{"template_id": f"t-{n}"} for n in range(25)]
        )
        await tool.validate_source_connection()
        await tool.validate_target_connection()
        assert await tool.validate_schema_compatibility() == []
        path = await tool.create_backup(
            source_type="json", backup_location=f"{tmp_path}/backups/migration_backup_20250630.json"
        )
        assert Path(path).name == "migration_backup_20250630.json"
        with pytest.raises(ConfigurationError, match="not 'sql'"):
            await tool.create_backup(source_type="sql")
        sizes = []
        async for batch in tool.get_migration_batches(batch_size=10):
            sizes.append((batch.collection, len(batch.entities)))
            await tool.target.import_entities(batch.collection, batch.entities)
        assert sizes == [("templates", 10), ("templates", 10), ("templates", 5)]
        stats = await tool.validate_migration()
        assert stats == {"templates": 25, "requests": 0, "machines": 0}
        async with open_store("memory:") as store:
            await restore_store(store, path)
            assert await store.count_entities("templates") == 25


async def test_a_store_is_not_moved_onto_itself(tmp_path: Path) -> None:
    url = f"json:{tmp_path}/a.json"
    async with opened(url) as store:
        await fill(store, 1)
    async with MigrationTool(url, f"{url}?sync_writes=no", settings(tmp_path)) as tool:
        with pytest.raises(MigrationError, match="the same store"):
            await tool.migrate()


async def test_other_collections_are_refused(tmp_path: Path) -> None:
    own = Collection("own", key="own_id")
    async with (
        open_store("memory:", collections=[*HOST_FACTORY, own]) as source,
        open_store("memory:") as target,
    ):
        with pytest.raises(MigrationError, match="does not declare 'own'"):
            await MigrationTool(source, target, settings(tmp_path)).migrate()


async def test_a_source_that_cannot_be_read_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{ this is no JSON")
    async with MigrationTool(f"json:{tmp_path}/a.json", "memory:", settings(tmp_path)) as tool:
        with pytest.raises(MigrationError, match="the source cannot be read") as caught:
            await tool.migrate()
        assert isinstance(caught.value.__cause__, StorageError)


async def test_the_report_is_plain_data(tmp_path: Path) -> None:
    async with opened("memory:") as source, opened("memory:") as target:
        await fill(source, 5)
        report = await _migrate(source, target, tmp_path)
        assert (
            msgspec.json.decode(msgspec.json.encode(report))["collections"]["machines"]["read"] == 5
        )


async def test_a_slow_target_causes_backpressure(tmp_path: Path) -> None:
    """The reader is never more than a few batches ahead of the writers."""
    async with opened("memory:") as source, opened("memory:") as target:
        await source.create_entities("items", [{"item_id": f"i-{n:04d}"} for n in range(400)])
        read = written = furthest = 0
        page, write = source._stored_page, target._import_stored

        async def reading(*arguments: object, **named: object) -> object:
            nonlocal read, furthest
            found = await page(*arguments, **named)  # type: ignore[arg-type]
            read += len(found.items)
            furthest = max(furthest, read - written)
            return found

        async def writing(
            name: str, entities: list[object], *rest: object, **named: object
        ) -> object:
            nonlocal written
            await asyncio.sleep(0.002)
            done = await write(name, entities, *rest, **named)  # type: ignore[arg-type]
            written += len(entities)
            return done

        source._stored_page = reading  # type: ignore[method-assign, assignment]
        target._import_stored = writing  # type: ignore[method-assign, assignment]
        await _migrate(source, target, tmp_path, batch_size=10, parallel_workers=3)
        # Batches held by the workers, in the queue, and held by the reader.
        assert 10 < furthest <= 10 * (3 + 3 + 2)


@pytest.mark.parametrize("ending", ["", "/"])
def test_checkpoints_are_stored_where_backups_are(tmp_path: Path, ending: str) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    config = {"migration": {"backup_location": f"{folder}{ending}"}}
    tool = MigrationTool("memory:", f"json:{tmp_path}/target.json", config)
    assert tool._file.path.parent == folder
