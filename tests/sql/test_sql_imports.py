"""Imports: whole entities, many rows in one statement."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from hf_async_store import (
    AlreadyExistsError,
    BatchError,
    Collection,
    Entity,
    ReferenceViolationError,
    open_store,
)
from hf_async_store.changes import ABSENT, Change, Outcome, Put
from hf_async_store.strategies.sql.sqlite_writer import SQLiteWriter
from hf_async_store.values import Key, utc_now

pytestmark = pytest.mark.hf_sampled(by="url")


def machines(count: int, request: str | None = "r-1") -> list[Entity]:
    return [
        {
            "machine_id": f"m-{n:05d}",
            "request_id": request,
            "name": None if n % 3 else f"n-{n}",
            "extra": [n, 1.0, None],
            "version": n,
            "created_at": None,
        }
        for n in range(count)
    ]


async def store_with_parents(path: Path):
    store = await open_store(f"sqlite:{path}/a.db").open()
    await store.create_entity("templates", {"template_id": "t-1"})
    await store.create_entity("requests", {"request_id": "r-1", "template_id": "t-1"})
    return store


def sorted_by_id(entities: list[Entity]) -> list[Entity]:
    return sorted(entities, key=lambda each: str(each["machine_id"]))


@pytest.mark.parametrize("count", [1, 2, 9, 10, 249, 250, 251, 313, 1000])
async def test_any_number_of_rows_is_imported_unchanged(tmp_path: Path, count: int) -> None:
    store = await store_with_parents(tmp_path)
    try:
        given = machines(count)
        assert await store.import_entities("machines", given) == list(range(count))
        assert sorted_by_id(await store.query_entities("machines")) == given
        # Again, over the existing entities, with fewer fields.
        fewer: list[Entity] = [{"machine_id": each["machine_id"], "version": 7} for each in given]
        assert await store._import_stored("machines", fewer) == [7] * count
        assert sorted_by_id(await store.query_entities("machines")) == fewer
    finally:
        await store.close()


@pytest.mark.parametrize("place", [0, 137, 299])
async def test_an_import_without_its_parent_fails_alone(tmp_path: Path, place: int) -> None:
    store = await store_with_parents(tmp_path)
    try:
        given = machines(300)
        given[place]["request_id"] = "nobody"
        with pytest.raises(BatchError) as caught:
            await store._import_stored("machines", given)
        outcomes = caught.value.outcomes
        assert isinstance(outcomes[place], ReferenceViolationError)
        del given[place], outcomes[place]
        assert outcomes == [each["version"] for each in given]
        assert sorted_by_id(await store.query_entities("machines")) == given
    finally:
        await store.close()


async def test_the_last_import_of_a_repeated_id_is_stored(tmp_path: Path) -> None:
    store = await store_with_parents(tmp_path)
    try:
        twice = [*machines(20), {**machines(1)[0], "name": "last", "version": 9}]
        await store._import_stored("machines", twice)
        found = await store.get_entity("machines", "m-00000")
        assert found is not None
        assert (found["name"], found["version"]) == ("last", 9)
    finally:
        await store.close()


async def test_a_collection_of_very_many_fields(tmp_path: Path) -> None:
    wide = Collection("wide", key="wide_id", fields=[f"f{n}" for n in range(400)])
    given: list[Entity] = [
        {"wide_id": f"w-{n:03d}", **{f"f{k}": f"{n}" for k in range(400)}, "version": n}
        for n in range(300)
    ]
    async with open_store(f"sqlite:{tmp_path}/a.db", collections=[wide]) as store:
        assert await store._import_stored("wide", given) == list(range(300))
        assert await store.query_entities("wide") == given


async def test_wal_autocheckpoint_is_restored_after_an_import(tmp_path: Path) -> None:
    store = await store_with_parents(tmp_path)
    try:
        await store._import_stored("machines", machines(300))
        [row] = await store.execute_with_lock("PRAGMA wal_autocheckpoint")  # type: ignore[attr-defined]
        assert list(row.values()) == [1000]
    finally:
        await store.close()


async def test_imports_that_wait_share_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call gets the outcomes of its own changes, in order."""
    commits: list[int] = []
    decided = SQLiteWriter._decided

    def noted(self: SQLiteWriter, connection: Any, changes: Sequence[Change]) -> list[Outcome]:
        commits.append(len(changes))
        return decided(self, connection, changes)

    def put(name: str) -> Put:
        entity: Entity = {"template_id": name}
        return Put(Key("templates", name), entity, utc_now(), ABSENT, import_version=7)

    async with open_store(f"sqlite:{tmp_path / 'store.db'}") as store:
        await store.save_entity("templates", {"template_id": "t"})
        engine = cast("Any", store)._sql
        monkeypatch.setattr(SQLiteWriter, "_decided", noted)
        calls = [[put("a"), put("b")], [put("t")], [put("c")]]
        first, second, third = await asyncio.gather(*map(engine.write_each, calls))
    assert (first, third) == ([7, 7], [7])
    assert isinstance(second[0], AlreadyExistsError)
    assert commits == [4]
