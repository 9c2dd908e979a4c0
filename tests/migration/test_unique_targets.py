"""Unique indexes of a target: what breaks them is refused by name, and the source stays as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hf_async_store import Collection, Field, Index, MigrationTool, StorageError, open_store
from hf_async_store.migration import backup_store, restore_store

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

PLAIN = [Collection("hosts", key="host_id", fields=["name", Field("n", "integer")])]
UNIQUE = [
    Collection(
        "hosts",
        key="host_id",
        fields=["name", Field("n", "integer")],
        indexes=[Index("name", unique=True)],
    )
]
HOSTS = [{"host_id": f"h-{n}", "name": f"web-{n}", "n": n} for n in range(50)]


async def filled(url: str, collections: Iterable[Collection], *more: dict[str, object]) -> None:
    async with open_store(url, collections=collections) as store:
        await store.save_entities("hosts", [*HOSTS, *more])


@pytest.mark.parametrize("kind", ["json", "sqlite"])
async def test_81_a_migration_names_what_breaks_the_target(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the progress file is written there
    source = f"json:{tmp_path}/source.json"
    target = f"{kind}:{tmp_path}/target.{kind}"
    await filled(source, PLAIN, {"host_id": "h-50", "name": "web-7"})
    async with MigrationTool(source, target, collections=UNIQUE) as tool:
        with pytest.raises(StorageError, match=r"'h-(50|7)'.*name.*'h-(50|7)'"):
            await tool.migrate()
    async with open_store(source, collections=PLAIN) as store:
        assert await store.count_entities("hosts") == 51


async def test_81_a_backup_keeps_the_declaration_and_its_restore_enforces_it(
    tmp_path: Path,
) -> None:
    async with open_store(f"json:{tmp_path}/source.json", collections=UNIQUE) as store:
        await store.save_entities("hosts", HOSTS)
        made = await backup_store(store, tmp_path / "b.jsonl.gz")
    async with open_store(f"sqlite:{tmp_path}/target.db", collections=UNIQUE) as store:
        await restore_store(store, made.path)
        assert await store.schema_changes() == []
    async with open_store(f"sqlite:{tmp_path}/target.db", collections=PLAIN) as store:
        with pytest.raises(StorageError, match="'h-7' already has the same"):
            await store.create_entity("hosts", {"host_id": "new", "name": "web-7"})


async def test_81_a_restore_names_what_breaks_the_target(tmp_path: Path) -> None:
    await filled(f"json:{tmp_path}/source.json", PLAIN, {"host_id": "h-50", "name": "web-7"})
    async with open_store(f"json:{tmp_path}/source.json", collections=PLAIN) as store:
        made = await backup_store(store, tmp_path / "b.jsonl.gz")
    async with open_store(f"sqlite:{tmp_path}/target.db", collections=UNIQUE) as store:
        with pytest.raises(StorageError, match=r"'h-(50|7)'.*name.*'h-(50|7)'"):
            await restore_store(store, made.path)
