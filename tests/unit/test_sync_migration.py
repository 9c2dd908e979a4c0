"""Migration, backup and restore for blocking callers."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest

import hf_async_store
from hf_async_store.errors import EventLoopMismatchError, StoreNotFoundError
from hf_async_store.sync import (
    MigrationTool,
    backup_store,
    compare_stores,
    open_store,
    restore_store,
)

if TYPE_CHECKING:
    from pathlib import Path


def tool(tmp_path: Path) -> MigrationTool:
    config = {"backup_location": f"{tmp_path}/backups/"}
    source, target = f"json:{tmp_path}/source.json", f"sqlite:{tmp_path}/target.db"
    return MigrationTool(hf_async_store.MigrationTool(source, target, config))


def test_125_a_migration(tmp_path: Path) -> None:
    threads = threading.active_count()
    with open_store(f"json:{tmp_path}/source.json") as store:
        store.create_entities("templates", [{"template_id": str(n)} for n in range(50)])
    with tool(tmp_path) as migration:
        migration.validate_source_connection()
        batches = list(migration.get_migration_batches(20))
        assert sum(len(each.entities) for each in batches) == 50
        assert migration.migrate().verified
        assert migration.compare().equal
    assert threading.active_count() <= threads
    with open_store(f"sqlite:{tmp_path}/target.db") as store:
        assert store.count_entities("templates") == 50


def test_125_a_migration_that_is_refused(tmp_path: Path) -> None:
    threads = threading.active_count()
    with tool(tmp_path) as migration, pytest.raises(StoreNotFoundError):
        migration.migrate()
    assert threading.active_count() <= threads

    async def enter() -> None:
        with pytest.raises(EventLoopMismatchError):
            tool(tmp_path).__enter__()

    asyncio.run(enter())


def test_125_backup_restore_and_comparison(tmp_path: Path) -> None:
    with open_store(f"json:{tmp_path}/a.json") as one, open_store("memory:") as other:
        one.create_entities("templates", [{"template_id": str(n)} for n in range(50)])
        made = backup_store(one, tmp_path / "backup.jsonl")
        counts: list[int] = []
        restore_store(other, made.path, advance=counts.append)
        assert sum(counts) == 50
        assert compare_stores(one, other).equal
