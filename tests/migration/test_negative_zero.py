"""Stores that hold -0.0, because an older version or another program stored it."""

from __future__ import annotations

from math import copysign
from typing import TYPE_CHECKING

import pytest
from support import everything, opened, settings

from hf_async_store import MigrationTool, open_store, values
from hf_async_store.migration import backup_store, compare_stores, restore_store
from hf_async_store.migration.live import LiveMigration
from hf_async_store.testing.harness import CONTRACT_COLLECTIONS
from hf_async_store.values import canonical

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Place

KINDS = ["json-single", "sqlite"]
GIVEN = {"ratio": -0.0, "x": -0.0, "data": [-0.0, {"a": -0.05, "b": "-0.0"}], "count": 2**63 - 1}
EXPECTED = (
    b'{"count":9223372036854775807,"data":[0.0,{"a":-0.05,"b":"-0.0"}],"item_id":"%s","ratio":0.0'
)


async def fill_with_negative_zero(url: str) -> None:
    with pytest.MonkeyPatch.context() as patched:
        # As an older version stored floats.
        patched.setitem(values._COPIERS, float, lambda value, depth: (value, values.FLOAT_SIZE))
        async with opened(url) as store:
            for each in ("a", "b"):
                await store.import_entities("items", [{"item_id": each, "version": 3, **GIVEN}])
    async with opened(url) as store:
        found = await store.get_entity("items", "a")
        assert found is not None
        assert [copysign(1, float(str(found[each]))) for each in ("ratio", "x")] == [-1, -1]


def test_zeros_have_no_sign_in_canonical_json() -> None:
    entity = {"item_id": "s", **GIVEN}
    assert canonical(entity).startswith(EXPECTED % b"s")
    assert (
        canonical({"big": 2**64 - 1, "deep": [[-0.0]]})
        == b'{"big":18446744073709551615,"deep":[[0.0]]}'
    )


@pytest.mark.parametrize("target", [*KINDS, "memory"])
@pytest.mark.parametrize("source", KINDS)
async def test_it_is_migrated_compared_and_merged(
    source: str, target: str, place: Place, tmp_path: Path
) -> None:
    one, other = place(source, "one"), place(target, "two") if target != "memory" else "memory:"
    await fill_with_negative_zero(one)
    async with opened(one) as first, opened(other) as second:
        report = await MigrationTool(first, second, settings(tmp_path)).migrate()
        assert report.collections["items"].written == 2
        for each in (await everything(second))["items"].values():
            assert b'"ratio":0.0' in values._encode(each)
            assert b"[0.0," in values._encode(each)
        assert (await compare_stores(first, second)).equal
        again = await MigrationTool(first, second, settings(tmp_path), merge="replace").migrate()
        assert (again.collections["items"].written, again.collections["items"].unchanged) == (0, 2)


@pytest.mark.parametrize("kind", KINDS)
async def test_it_is_merged_into_once(kind: str, place: Place, tmp_path: Path) -> None:
    """The target holds -0.0: an entity with 0.0 is equal to it."""
    url = place(kind, "one")
    await fill_with_negative_zero(url)
    async with opened(url) as store, opened("memory:") as other:
        backup = await backup_store(store, tmp_path / "backup.jsonl.gz")
        restored = await restore_store(other, backup.path)
        assert restored.merged["items"].written == 2
        assert (await compare_stores(store, other)).equal
        assert (await backup_store(other, tmp_path / "second.jsonl.gz")).digests == backup.digests
        merged = await restore_store(store, backup.path, merge="replace")
        assert (merged.merged["items"].written, merged.merged["items"].unchanged) == (0, 2)
        report = await MigrationTool(other, store, settings(tmp_path), merge="replace").migrate()
        assert (report.collections["items"].written, report.collections["items"].unchanged) == (
            0,
            2,
        )


async def test_it_is_migrated_live(place: Place) -> None:
    source, target = place("sqlite", "one"), place("json-single", "two")
    await fill_with_negative_zero(source)
    async with LiveMigration(source, target, collections=CONTRACT_COLLECTIONS) as move:
        await move.start()
    async with open_store(target, collections=CONTRACT_COLLECTIONS, follow_moves=[source]) as store:
        for each in (await everything(store))["items"].values():
            assert b'"ratio":0.0' in values._encode(each)
