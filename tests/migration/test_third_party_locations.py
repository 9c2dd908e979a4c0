"""The location of a store whose engine is part of another package, in migrations."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from live_applications import hurry

from hf_async_store import (
    MigrationError,
    StoreRelocatedError,
    load_config,
    migration_routing,
    open_store,
)
from hf_async_store.migration import MigrationTool, live
from hf_async_store.migration.live import LiveMigration
from hf_async_store.strategies import GROUP

ACME = """
from hf_async_store import StorageStrategy
from hf_async_store.config import SQLConfig
from hf_async_store.strategies.routing import routed
from hf_async_store.strategies.sql.strategy import _engine
from hf_async_store.strategy import schema_of


class AcmeStrategy(StorageStrategy):
    '''SQLite under another name; `part` selects a part of the database, as `table_prefix` does.'''

    def __init__(self, config, *, collections):
        schema = schema_of(collections)
        options = config.options
        prefix = options.get("table_prefix", "") + options.get("part", "")
        sql = SQLConfig(name=options["url"].partition(":")[2], table_prefix=prefix)

        def opened(declared):
            engine = _engine(sql, declared, None)
            engine.describe = dict
            return engine

        super().__init__(routed(opened(schema), schema, config, opened), schema)
"""


@pytest.fixture(autouse=True)
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package that registers the strategy `acme`."""
    (tmp_path / "acme_strategy.py").write_text(ACME)
    info = tmp_path / "acme_strategy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-strategy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nacme = acme_strategy:AcmeStrategy\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "acme_strategy", raising=False)


@pytest.fixture(autouse=True)
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("LEASE_SECONDS", "ABANDONED_SWITCH_SECONDS")
    for module, name in [(migration_routing, each) for each in names] + [
        (live, "LEASE_SECONDS"),
        (live, "SWITCH_SECONDS"),
    ]:
        monkeypatch.setattr(module, name, getattr(module, name))  # restored after the test
    hurry()


async def migrated(source: str, target: str) -> None:
    async with open_store(source) as store:
        await store.save_entity("templates", {"template_id": "t-1"})
    async with LiveMigration(source, target) as migration:
        await migration.start()


@pytest.mark.parametrize(
    ("url", "location"),
    [
        ("acme://app:hunter2@h/3?table_prefix=a%20b&pool=3", "acme://h/3?table_prefix=a%20b"),
        ("acme:x?pool=3&token=hunter2", "acme:x"),
        ("acme:x?table_prefix=", "acme:x"),
        ("acme:x?schema=s&database=d", "acme:x?database=d&schema=s"),
        (
            "acme:x?endpoint_url=http://u:hunter2@h:80",
            "acme:x?endpoint_url=http%3A%2F%2Fu%3A%2A%2A%2A%40h%3A80",
        ),
    ],
)
def test_a_location_names_the_part_of_the_database(url: str, location: str) -> None:
    assert load_config(url).location() == location


async def test_a_migration_is_followed_to_the_part_of_the_database_that_is_its_target(
    tmp_path: Path,
) -> None:
    source, target = f"acme:{tmp_path}/a", f"acme:{tmp_path}/b"
    async with open_store(f"{target}?table_prefix=wrong"):
        pass
    await migrated(source, f"{target}?table_prefix=live")
    wrong = f"{source}?follow_moves={target}?table_prefix=wrong"
    async with open_store(wrong) as store:
        with pytest.raises(StoreRelocatedError, match="table_prefix=live"):
            await store.get_entity("templates", "t-1")
        with pytest.raises(StoreRelocatedError, match="table_prefix=live"):
            await store.save_entity("templates", {"template_id": "t-2"})
    async with open_store(f"{source}?follow_moves={target}?table_prefix=live%26pool=3") as store:
        assert await store.get_entity("templates", "t-1") is not None


async def test_stores_of_one_database_are_migrated_to_each_other(tmp_path: Path) -> None:
    source, target = (f"acme:{tmp_path}/a?table_prefix={each}" for each in "ab")
    await migrated(source, target)
    async with open_store(f"{source}&follow_moves={target}") as store:
        assert await store.save_entity("templates", {"template_id": "t-2"}) == 1
    async with open_store(f"{target}&follow_moves={source}") as store:
        assert await store.count_entities("templates") == 2


async def test_two_stores_of_one_location_cannot_be_migrated_live(tmp_path: Path) -> None:
    with pytest.raises(MigrationError, match="have the same location"):
        await migrated(f"acme:{tmp_path}/a?part=x", f"acme:{tmp_path}/a?part=y")


async def test_a_store_that_is_not_part_of_the_migration_is_not_followed(tmp_path: Path) -> None:
    source, target = f"acme:{tmp_path}/a", f"acme:{tmp_path}/b"
    await migrated(source, f"{target}?part=live")
    async with open_store(f"{source}?follow_moves={target}?part=wrong") as store:
        for _ in range(2):
            with pytest.raises(StoreRelocatedError, match="has no record of this migration"):
                await store.save_entity("templates", {"template_id": "t-2"})
    async with open_store(f"{target}?part=wrong") as store:
        assert await store.count_entities("templates") == 0
    async with open_store(f"{source}?follow_moves={target}?part=live") as store:
        assert await store.count_entities("templates") == 1


def test_each_target_has_a_progress_file_of_its_own(tmp_path: Path) -> None:
    config = {"backup_location": f"{tmp_path}/backups/"}
    targets = [f"acme:{tmp_path}/{each}" for each in ("a", "b", "b?table_prefix=c", "b?pool=3")]
    paths = [MigrationTool(f"acme:{tmp_path}/s", each, config)._file.path for each in targets]
    assert len(set(paths)) == 3
    assert paths[1] == paths[3]
