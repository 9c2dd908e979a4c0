"""Unique indexes of a JSON store: `write_file`, and a lost or damaged file of declarations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hf_async_store import Collection, Index, JSONStorageStrategy, UniqueViolationError, open_store

if TYPE_CHECKING:
    from pathlib import Path

PLAIN = [Collection("hosts", key="host_id", fields=["name"])]
UNIQUE = [Collection("hosts", key="host_id", fields=["name"], indexes=[Index("name", unique=True)])]


async def test_write_file_is_refused(tmp_path: Path) -> None:
    url = f"json:{tmp_path}/db.json"
    async with open_store(url, collections=UNIQUE) as store:
        await store.create_entity("hosts", {"host_id": "a", "name": "x"})
    async with JSONStorageStrategy(url, collections=PLAIN) as json:
        hosts = {each: {"host_id": each, "name": "y"} for each in "bc"}
        with pytest.raises(UniqueViolationError, match="'c'.*'b' already"):
            await json.write_file({"hosts": hosts})
        assert [each["host_id"] for each in await json.query_entities("hosts")] == ["a"]
        hosts["c"]["name"] = "x"
        await json.write_file({"hosts": hosts})
        with pytest.raises(UniqueViolationError):
            await json.create_entity("hosts", {"host_id": "a", "name": "x"})


@pytest.mark.parametrize("content", [b"{", b'{"format": 9}', b'{"format": 2, "collections": []}'])
async def test_a_program_enforces_its_own_index_if_the_file_is_damaged(
    tmp_path: Path, content: bytes
) -> None:
    url = f"json:{tmp_path}/db.json"
    async with (
        open_store(url, collections=UNIQUE) as store,
        open_store(url, collections=PLAIN) as other,
    ):
        await store.create_entity("hosts", {"host_id": "a", "name": "x"})
        with pytest.raises(UniqueViolationError):
            await other.create_entity("hosts", {"host_id": "b", "name": "x"})
        (tmp_path / ".db.json.declarations").write_bytes(content)
        if content.endswith(b"[]}"):  # valid, and says nothing: as if it had been lost
            assert "not enforced" in str((await store.health())["problems"])
            await store.apply_schema()
        for each in (store, other):
            with pytest.raises(UniqueViolationError):
                await each.create_entity("hosts", {"host_id": "b", "name": "x"})


async def test_many_entities_at_once(tmp_path: Path) -> None:
    """So many that the owners of values are looked up anew afterwards."""
    url = f"json:{tmp_path}/db.json"
    async with open_store(url, collections=UNIQUE) as store:
        await store.create_entity("hosts", {"host_id": "a", "name": "x"})
        new = [{"host_id": f"h{each}", "name": f"n{each}"} for each in range(6000)]
        await store.save_entities("hosts", new)
        for name, owner in (("x", "a"), ("n5999", "h5999")):
            with pytest.raises(UniqueViolationError, match=f"'{owner}' already"):
                await store.create_entity("hosts", {"host_id": "b", "name": name})
        await store.delete_entities("hosts", [f"h{each}" for each in range(5000)])
        await store.create_entity("hosts", {"host_id": "b", "name": "n7"})


async def test_what_another_program_declared_is_still_enforced_if_the_file_is_damaged(
    tmp_path: Path,
) -> None:
    url = f"json:{tmp_path}/db.json"
    by_zone = Collection(
        "hosts", key="host_id", fields=["zone"], indexes=[Index("zone", unique=True)]
    )
    async with (
        open_store(url, collections=UNIQUE) as one,
        open_store(url, collections=[by_zone]) as other,
    ):
        await other.delete_entity("hosts", "nobody")
        for store in (one, other):
            await store.save_entity("hosts", {"host_id": "a", "name": "x", "zone": "y"})
        (tmp_path / ".db.json.declarations").write_bytes(b"{")
        for store in (one, other):
            for name, zone in (("x", "z"), ("z", "y")):
                with pytest.raises(UniqueViolationError):
                    await store.create_entity("hosts", {"host_id": "b", "name": name, "zone": zone})
