"""A change that the database refuses, and the changes that share its statement."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from hf_async_store import (
    BatchError,
    LockTimeoutError,
    PartialChangeError,
    StorageError,
    UnavailableError,
    open_store,
)
from hf_async_store.changes import Put
from hf_async_store.strategies.sql.catalogue import CatalogueChangedError
from hf_async_store.strategies.sql.engine import SQLEngine
from hf_async_store.values import Key

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from hf_async_store.changes import Change, Outcome, TakeChanges

AT = "2026-01-01T00:00:00.000000Z"
REFUSING = [
    "CREATE TRIGGER no BEFORE INSERT ON \"templates-entities\" WHEN new.doc ->> 'image_id' = 'bad' "
    "BEGIN SELECT RAISE(ABORT, 'no'); END",
    "CREATE TRIGGER no BEFORE INSERT ON \"templates-entities\" WHEN new.doc ->> 'image_id' = 'bad' "
    "BEGIN SELECT RAISE(ROLLBACK, 'no'); END",
    "CREATE UNIQUE INDEX mine ON \"templates-entities\" (doc ->> 'image_id') "
    "WHERE doc ->> 'image_id' = 'bad'",
]


def template(number: int) -> dict[str, Any]:
    return {"template_id": f"t{number:03}", "image_id": "bad" if number in (0, 7) else str(number)}


def change(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path)
    connection.executescript(statement)
    connection.close()


async def _at_once(store: Any) -> list[object]:
    return await asyncio.gather(
        *(store.save_entity("templates", template(n)) for n in range(20)), return_exceptions=True
    )


async def _as_batch(store: Any) -> list[object]:
    try:
        return list(await store.save_entities("templates", [template(n) for n in range(20)]))
    except BatchError as exc:
        return list(exc.outcomes)


@pytest.mark.parametrize("way", [_at_once, _as_batch])
@pytest.mark.parametrize("statement", REFUSING)
async def test_135_a_refused_change_raises_a_storage_error(
    tmp_path: Path, statement: str, way: Any
) -> None:
    path = tmp_path / "store.db"
    async with open_store(f"sqlite:{path}") as store:
        await store.save_entity("machines", {"machine_id": "m"})
        change(path, statement)
        for each in await way(store):
            assert type(each) is int or isinstance(each, StorageError), repr(each)
        # And the reported outcomes are correct.
        found = await store.query_entities("templates")
        outcomes = await way(store)
        assert len(outcomes) == 20
        assert len(await store.query_entities("templates")) >= len(found)


@pytest.mark.parametrize("way", [_at_once, _as_batch])
@pytest.mark.parametrize("statement", REFUSING)
async def test_135_the_neighbours_of_a_refused_change_are_written(
    tmp_path: Path, statement: str, way: Any
) -> None:
    path = tmp_path / "store.db"
    async with open_store(f"sqlite:{path}") as store:
        await store.save_entity("machines", {"machine_id": "m"})
        change(path, statement)
        outcomes = await way(store)
        refused = [n for n, each in enumerate(outcomes) if isinstance(each, StorageError)]
        assert set(refused) <= {0, 7}
        assert refused
        found = {each["template_id"] for each in await store.query_entities("templates")}
        assert found == {f"t{n:03}" for n in range(20) if n not in refused}


@pytest.mark.parametrize("statement", REFUSING[:2])
async def test_135_the_neighbours_of_a_refused_import_are_written(
    tmp_path: Path, statement: str
) -> None:
    path = tmp_path / "store.db"
    async with open_store(f"sqlite:{path}") as store:
        await store.save_entity("machines", {"machine_id": "m"})
        change(path, statement)
        changes = [
            Put(Key("templates", f"t{n:03}"), template(n), AT, import_version=3) for n in range(400)
        ]
        outcomes = await store.engine.write_each(changes)
        refused = [n for n, each in enumerate(outcomes) if isinstance(each, StorageError)]
        assert refused == [0, 7]
        found = await store.query_entities("templates")
        assert len(found) == 398
        assert {each["version"] for each in found} == {3}


async def _goes_on_after_a_refusal(store: Any) -> None:
    async with store.begin_transaction() as tx:
        await tx.save_entity("machines", {"machine_id": "n"})
        with suppress(StorageError):
            await tx.save_entities("templates", [template(n) for n in range(20)])
        await tx.save_entity("machines", {"machine_id": "o"})


@pytest.mark.parametrize("statement", REFUSING[:2])
async def test_135_a_transaction_with_a_refused_change_writes_nothing(
    tmp_path: Path, statement: str
) -> None:
    path = tmp_path / "store.db"
    async with open_store(f"sqlite:{path}") as store:
        await store.save_entity("machines", {"machine_id": "m"})
        change(path, statement)
        with pytest.raises(StorageError):
            await _goes_on_after_a_refusal(store)
        assert await store.query_entities("templates") == []
        assert [each["machine_id"] for each in await store.query_entities("machines")] == ["m"]


async def test_changes_that_are_sent_again_do_not_fail_those_before_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(f"sqlite:{tmp_path}/store.db") as store:
        calls: list[Sequence[Change]] = []

        async def write(engine: SQLEngine, take: TakeChanges, *, patient: bool) -> list[Outcome]:
            del engine, patient
            calls.append(take())
            if len(calls) == 1:  # another program changed the catalogue meanwhile
                return [1, CatalogueChangedError(), 1]
            raise UnavailableError("the connection was lost")

        monkeypatch.setattr(SQLEngine, "_write_each", write)
        changes = [Put(Key("templates", each), {"template_id": each}, "") for each in "abc"]
        found = await store.engine.write_each(changes)
        assert calls == [changes, changes[1:2]]
        assert [each if isinstance(each, int) else type(each) for each in found] == [
            1,
            UnavailableError,
            1,
        ]


async def test_135_readers_do_not_wait_for_a_blocked_writer(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    async with open_store(f"sqlite:{path}?timeout=60") as store:
        await store.save_entity("templates", template(1))
        other = sqlite3.connect(path)
        other.execute("BEGIN IMMEDIATE")
        writers = [asyncio.create_task(store.save_entity("templates", template(n))) for n in (2, 3)]
        async with asyncio.timeout(30):
            for _ in range(20):
                assert await store.get_entity("templates", "t001") is not None
                assert await store.count_entities("templates") == 1
        assert not any(each.done() for each in writers)
        other.rollback()
        other.close()
        assert await asyncio.gather(*writers) == [1, 1]


async def test_nothing_that_matches_needs_no_write_lock(tmp_path: Path) -> None:
    """Another process may write for long; what has nothing to write does not wait for it."""
    url = f"sqlite:{tmp_path / 'store.db'}"
    async with open_store(f"{url}?timeout=0.2") as store:
        await store.save_entity("templates", template(1))
        other = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        assert await store.update_where("templates", {"image_id": "2"}, {"image_id": "3"}) == 0
        assert await store.delete_where("templates", {"image_id": "2"}, limit=1) == 0
        with pytest.raises(PartialChangeError) as caught:
            await store.delete_where("templates", {"image_id": "1"}, limit=1)
        other.close()
        assert isinstance(caught.value.cause, LockTimeoutError)
        assert await store.delete_where("templates", {"image_id": "1"}, limit=1) == 1
