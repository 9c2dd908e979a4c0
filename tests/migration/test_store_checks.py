"""Case 134 and related requirements: the identity of a store does not depend on the spelling of its URL,
a mistyped name is not an empty store, and undeclared collections are reported."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

import msgspec
import pytest
from support import KINDS, everything, fill, opened, settings

from hf_async_store import (
    HOST_FACTORY,
    Collection,
    ConfigurationError,
    InvalidInputError,
    MigrationError,
    MigrationTool,
    StorageStrategy,
    StoreNotFoundError,
    UnavailableError,
    open_store,
)
from hf_async_store.migration import backup_store, compare_stores, restore_store
from hf_async_store.migration.checkpoint import identity
from hf_async_store.migration.live import LiveMigration
from hf_async_store.testing.harness import CONTRACT_COLLECTIONS

if TYPE_CHECKING:
    from conftest import Place

pytestmark = pytest.mark.hf_sampled(by="kind")

FILES = ("json-single", "json-split", "sqlite")


def other_spellings(kind: str, url: str, tmp_path: Path) -> list[str]:
    """Other spellings of the same location."""
    if kind in FILES:
        scheme, _, name = url.partition(":")
        path = Path(name)
        (tmp_path / "sub").mkdir()
        link = tmp_path / f"link{path.suffix}"
        link.symlink_to(path)
        spelt = [
            f"{path.parent}/./{path.name}",
            f"{path.parent}/sub/../{path.name}",
            os.path.relpath(path),
        ]
        spelt.append(str(link))
        folder = tmp_path / "folder"
        folder.symlink_to(path.parent)
        spelt.append(str(folder / path.name))
        return [f"{scheme}:{each}" for each in spelt]
    parts = urlsplit(url)
    if kind == "postgresql":
        if not parts.hostname:
            return [url + ("&" if parts.query else "?") + "pool_size=3"]
        user = f"{parts.username}:{parts.password}@" if parts.password else f"{parts.username}@"
        hosts = {"localhost": "127.0.0.1", "127.0.0.1": "localhost"}
        moved = parts._replace(netloc=f"{user}{hosts[parts.hostname]}:{parts.port}")
        return [urlunsplit(moved), url + "?timeout=20"]
    return [url.replace("127.0.0.1", "localhost"), f"{url}&consistent_reads=no"]


@pytest.mark.parametrize("cleanup", [False, True])
@pytest.mark.parametrize("kind", KINDS)
async def test_134_a_migration_to_the_same_store_is_refused_whatever_its_spelling(
    kind: str, cleanup: bool, place: Place, tmp_path: Path
) -> None:
    url = place(kind, "a")
    async with opened(url) as store:
        await fill(store, 10)
        before = await everything(store)
    for other in [url, *other_spellings(kind, url, tmp_path)]:
        for pair in ((url, other), (other, url)):
            tool = MigrationTool(
                *pair,
                settings(tmp_path, cleanup_source=cleanup),
                collections=CONTRACT_COLLECTIONS,
                merge="replace",
            )
            async with tool:
                for dry_run in (True, False):
                    with pytest.raises(MigrationError, match="the same store|cannot be determined"):
                        await tool.migrate(dry_run=dry_run)
    async with opened(url) as store:
        assert await everything(store) == before
    assert not list(tmp_path.rglob("*.jsonl.gz"))


@pytest.mark.parametrize("kind", ["json-single", "sqlite", "postgresql"])
async def test_134_a_live_migration_to_the_same_store_is_refused(
    kind: str, place: Place, tmp_path: Path
) -> None:
    url = place(kind, "a")
    async with opened(url) as store:
        await fill(store, 5)
    for other in other_spellings(kind, url, tmp_path):
        try:
            live = LiveMigration(url, other, collections=CONTRACT_COLLECTIONS)
        except ConfigurationError:
            continue  # refused because of its form
        async with live:
            with pytest.raises(MigrationError):
                await live.start()
    async with opened(url) as store:
        assert await store.count_entities("machines") == 5


@pytest.mark.parametrize("kind", FILES)
async def test_134_a_copy_is_another_store(kind: str, place: Place, tmp_path: Path) -> None:
    url = place(kind, "a")
    async with opened(url) as store:
        await fill(store, 10)
    scheme, _, name = url.partition(":")
    copy = tmp_path / "copies" / Path(name).name
    copy.parent.mkdir()
    (shutil.copytree if Path(name).is_dir() else shutil.copy)(name, copy)
    async with opened(url) as source, opened(f"{scheme}:{copy}") as target:
        assert not await source.is_same_store(target)
        assert await source.is_same_store(source)
        report = await MigrationTool(source, target, settings(tmp_path)).migrate()
        assert report.verified


@pytest.mark.parametrize("kind", ["memory", *FILES])
async def test_a_store_is_not_compared_with_itself(kind: str, place: Place, tmp_path: Path) -> None:
    url = "memory:" if kind == "memory" else place(kind, "a")
    async with opened(url) as store, opened(url) as second:
        await fill(store, 5)
        other = store if kind == "memory" else second
        tool = MigrationTool(store, other, settings(tmp_path))
        for compare in (
            lambda: compare_stores(store, other),
            lambda: tool.compare(),
            lambda: tool.validate_migration(),
        ):
            with pytest.raises(MigrationError, match=r"are the same store.*nothing was compared"):
                await compare()


async def test_a_migration_is_refused_if_the_identity_cannot_be_determined(tmp_path: Path) -> None:
    async with opened(f"json:{tmp_path}/a.json") as source, opened("memory:") as target:
        await fill(source, 5)

        async def unknown(other: StorageStrategy) -> bool:
            raise UnavailableError("nobody answers")

        source.is_same_store = unknown  # type: ignore[method-assign]
        with pytest.raises(MigrationError, match="cannot be determined") as caught:
            await MigrationTool(source, target, settings(tmp_path)).migrate()
        assert caught.value.retryable
        assert not any((await everything(target)).values())


def test_a_checkpoint_is_found_without_durability(tmp_path: Path) -> None:
    """A store without durability is still the same store in the next process."""
    urls = [f"json:{tmp_path}/a.json", f"json:{tmp_path}/a.json?sync_writes=no"]
    assert len({identity(open_store(each)) for each in urls}) == 1
    shared = [open_store(urls[0]) for _ in range(2)]
    for each in shared:
        fleeting = msgspec.structs.replace(each.capabilities, durable=False)
        each.engine.capabilities = fleeting  # type: ignore[misc]
    assert len({identity(each) for each in shared}) == 1
    one, other = open_store("memory:"), open_store("memory:")
    assert identity(one) != identity(other)


# -- a store that is not there ------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_a_missing_source_is_not_taken_for_an_empty_one(
    kind: str, place: Place, tmp_path: Path
) -> None:
    url = place(kind, "absent")
    target = f"json:{tmp_path}/target.json"
    async with opened(url) as store, opened(target) as other:
        assert not await store.exists()
        with pytest.raises(StoreNotFoundError, match="there is no store at .*mistyped") as caught:
            await backup_store(store, f"{tmp_path}/backups/")
        for word in _words_of(kind, url):
            assert word in str(caught.value)
        for dry_run in (False, True):
            tool = MigrationTool(store, other, settings(tmp_path))
            with pytest.raises(StoreNotFoundError, match="at the source"):
                await tool.migrate(dry_run=dry_run)
        for pair in ((store, other), (other, store)):
            with pytest.raises(StoreNotFoundError):
                await compare_stores(*pair)
        with pytest.raises(StoreNotFoundError):
            await MigrationTool(store, other, settings(tmp_path)).validate_migration()
        # Nothing was created by that, and reads return empty results.
        assert not await store.exists()
        assert not await other.exists()
        assert await store.get_entity("templates", "t-1") is None
        assert await store.count_entities("templates") == 0
        assert await store.query_entities("templates") == []
        assert not await store.exists()
    assert not list(tmp_path.rglob("*.gz"))
    assert not list(tmp_path.rglob("*.checkpoint"))
    assert not [each for each in tmp_path.rglob("*") if each.name.startswith("absent")]


def _words_of(kind: str, url: str) -> Sequence[str]:
    if kind in FILES:
        return [url.partition(":")[2]]
    parts = urlsplit(url)
    name = parts.path.strip("/")
    return [name, "us-east-1"] if kind == "dynamodb" else [name]


# -- what a declaration leaves out ----------------------------------------------------------------

_OWN = [
    Collection("templates", key="template_id", fields=["name", "owner"]),
    Collection("orders", key="order_id"),
]


async def _application(url: str) -> None:
    async with open_store(url, collections=_OWN) as store:
        await store.save_entity(
            "templates", {"template_id": "t-1", "name": "x", "owner": "ops", "free": 1}
        )
        await store.save_entity("orders", {"order_id": "o-1"})


@pytest.mark.parametrize("kind", KINDS)
async def test_undeclared_collections_are_migrated_or_reported(
    kind: str, place: Place, tmp_path: Path
) -> None:
    """A command that declares fewer collections than the application loses nothing silently."""
    url = place(kind, "a")
    await _application(url)
    async with (
        open_store(url, collections=HOST_FACTORY) as store,
        open_store("memory:", collections=HOST_FACTORY) as target,
    ):
        lost = await store.undeclared()
        assert "orders" in lost
        tool = MigrationTool(store, target, settings(tmp_path))
        for work in (
            lambda: backup_store(store, tmp_path / "b.jsonl.gz"),
            lambda: tool.migrate(),
            lambda: tool.migrate(dry_run=True),
            lambda: tool.create_backup(),
            lambda: tool.validate_migration(),
            lambda: compare_stores(store, target),
            lambda: compare_stores(target, store),
        ):
            with pytest.raises(ConfigurationError) as caught:
                await work()
            assert all(each in str(caught.value) for each in lost)
            assert "--leave-out" in str(caught.value)
        assert not list(tmp_path.rglob("*.gz"))
        assert await target.count_entities("templates") == 0
        some = [each for each in lost if each != "orders"]
        with pytest.raises(ConfigurationError, match="orders"):
            await backup_store(store, tmp_path / "b.jsonl.gz", leave_out=some)
        # With an explicit option they are left out, and the report says so.
        made = await backup_store(store, tmp_path / "b.jsonl.gz", leave_out=lost)
        assert made.left_out == lost
        report = await MigrationTool(store, target, settings(tmp_path), leave_out=lost).migrate()
        assert report.verified
        assert report.left_out == lost
        compared = await compare_stores(store, target, leave_out=lost)
        assert compared.equal
        with pytest.raises(InvalidInputError, match="'templates' is declared"):
            await backup_store(store, tmp_path / "c.jsonl.gz", leave_out=["templates"])
    # If they are declared, all are migrated.
    async with open_store(url, collections=_OWN) as store:
        assert await store.undeclared() == []
        made = await backup_store(store, tmp_path / "whole.jsonl.gz")
        assert made.counts == {"templates": 1, "orders": 1}
    async with open_store("memory:", collections=_OWN) as copy:
        await restore_store(copy, made.path)
        found = await copy.get_entity("templates", "t-1")
        assert found is not None
        assert (found["owner"], found["free"]) == ("ops", 1)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_excluding_fields_with_cleanup_source_is_refused(
    kind: str, place: Place, tmp_path: Path
) -> None:
    url = place(kind, "a")
    await _application(url)
    async with (
        open_store(url, collections=HOST_FACTORY) as store,
        open_store("memory:", collections=HOST_FACTORY) as target,
    ):
        with pytest.raises(ConfigurationError, match="would be lost"):
            MigrationTool(
                store,
                target,
                settings(tmp_path, cleanup_source=True),
                leave_out=["templates.owner", "orders"],
            )


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_fields_that_are_not_declared_do_not_remain_in_a_replaced_entity(
    kind: str, place: Place, tmp_path: Path
) -> None:
    url = place(kind, "a")
    await _application(url)
    async with open_store("memory:", collections=HOST_FACTORY) as source:
        await source.save_entity("templates", {"template_id": "t-1", "name": "new"})
        made = await backup_store(source, tmp_path / "b.jsonl.gz")
        async with open_store(url, collections=HOST_FACTORY) as target:
            await restore_store(target, made.path, merge="replace")
    async with open_store(url, collections=_OWN) as store:
        found = await store.get_entity("templates", "t-1")
        assert found is not None
        assert found["name"] == "new"
        assert "owner" not in found


@pytest.mark.parametrize("kind", ["json-single", "sqlite", "postgresql", "dynamodb"])
async def test_a_live_migration_reports_undeclared_collections(
    kind: str, place: Place, tmp_path: Path
) -> None:
    url = place(kind, "a")
    await _application(url)
    async with LiveMigration(url, f"json:{tmp_path}/target.json", collections=HOST_FACTORY) as live:
        with pytest.raises(ConfigurationError, match="orders"):
            await live.start()


# -- a source is only read -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_reading_creates_no_tables_in_the_source(
    kind: str, place: Place, tmp_path: Path
) -> None:
    """The source has tables for one of three collections; reading does not create the others."""
    url = place(kind, "a")
    only = [Collection("templates", key="template_id")]
    async with open_store(url, collections=only) as store:
        await store.save_entity("templates", {"template_id": "t-1"})
    wide = [only[0], Collection("orders", key="order_id"), Collection("jobs", key="job_id")]
    async with (
        open_store(url, collections=wide) as store,
        open_store("memory:", collections=wide) as target,
    ):
        made = await backup_store(store, tmp_path / "b.jsonl.gz")
        assert made.counts == {"templates": 1, "orders": 0, "jobs": 0}
        await MigrationTool(store, target, settings(tmp_path)).migrate()
        assert (await compare_stores(store, target)).equal
    async with open_store(url, collections=only) as store:
        assert await store.undeclared() == []
