"""A batch stores the same bytes, with the same outcomes, as the same changes one by one.

The entities of a batch are encoded when they are validated, and decided column by column or one by one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest

from hf_async_store import BatchError, Collection, Field, StorageError, open_store
from hf_async_store.changes import EncodedPut, Outcome, Put
from hf_async_store.strategies.json.session_view import SessionView

COLLECTIONS: Final = [
    Collection("groups", key="id"),
    Collection(
        "things",
        key="id",
        fields=[
            Field("group", references="groups"),
            Field("at", "timestamp"),
            Field("n", "number"),
        ],
        open=True,
    ),
]
FILE: Final = "data.json"

Batch = tuple[str, list[dict[str, Any]]]
"""The verb, and its entities."""


def things(count: int = 20, start: int = 0, **fields: Any) -> list[dict[str, Any]]:
    return [{"id": f"t-{n}", "group": "g", "tags": {"n": n}, **fields} for n in range(start, count)]


def every_second(entities: list[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    return [each if n % 2 else {**each, **fields} for n, each in enumerate(entities)]


CREATED: Final = "2020-01-01T00:00:00.000000Z"
CASES: Final[dict[str, list[Batch]]] = {
    "created, and kept": [("save", things()), ("save", things(n=1))],
    "created by the caller": [
        ("create", things(created_at=CREATED)),
        ("save", things(created_at=CREATED)),
    ],
    "null as created_at": [("save", things(created_at=None)), ("save", things(created_at=None))],
    "some null as created_at": [
        ("save", every_second(things(created_at=None), created_at=CREATED))
    ],
    "another zone": [("save", things(created_at="2020-01-01T02:00:00+02:00", at="2020-01-01"))],
    "fields of the store": [
        ("save", things(version=7, updated_at=CREATED)),
        ("save", things(version=1)),
    ],
    "some with other fields": [("save", every_second(things(), version=3, n=-0.0))],
    "different versions": [("save", things(9)), ("save", things()), ("save", things(n=2.5))],
    "an entity that exists": [("save", things(3)), ("create", things())],
    "all exist": [("create", things()), ("create", things())],
    "an id twice": [("save", [*things(), *things(n=1)]), ("create", [*things(25), *things(25)])],
    "a missing parent": [
        ("save", every_second(things(), group="no")),
        ("save", things(group=None)),
    ],
    "no parents": [("save", [{"id": each["id"], "n": 1} for each in things()])] * 2,
    "imported": [
        ("import", things(version=3)),
        ("import", every_second(things(), version=9)),
        ("import", things(version=1, updated_at=CREATED, created_at=None)),
        ("save", things()),
    ],
    "unusual characters": [("save", things(text="ü\n\\u0000 \U0001f600", ü={"\\": [1, "\x01"]}))],
    "the greatest version": [("import", things(version=2**63 - 1)), ("save", things())],
}


async def result(folder: Path, batches: list[Batch], *, together: bool) -> tuple[list[Any], bytes]:
    """The outcomes, and the file at the end."""
    now = datetime(2026, 1, 1, tzinfo=UTC)
    folder.mkdir(exist_ok=True)
    url = f"json:{folder / FILE}"
    async with open_store(url, collections=COLLECTIONS, clock=lambda: now) as store:
        await store.save_entity("groups", {"id": "g"})
        outcomes: list[Any] = []
        for verb, entities in batches:
            now += timedelta(days=1)
            write = getattr(store, f"{verb}_entities")
            for batch in [entities] if together else [[each] for each in entities]:
                try:
                    outcomes += await write("things", batch)
                except BatchError as exc:
                    outcomes += [
                        str(each) if isinstance(each, StorageError) else each
                        for each in exc.outcomes
                    ]
    return outcomes, (folder / FILE).read_bytes()


@pytest.mark.parametrize("batches", CASES.values(), ids=CASES)
async def test_a_batch_stores_what_its_changes_store(tmp_path: Path, batches: list[Batch]) -> None:
    together = await result(tmp_path / "together", batches, together=True)
    assert together == await result(tmp_path / "alone", batches, together=False)


@pytest.mark.parametrize("batches", CASES.values(), ids=CASES)
async def test_a_batch_after_another_program_wrote_the_file(
    tmp_path: Path, batches: list[Batch]
) -> None:
    for name in ("together", "alone"):
        (tmp_path / name).mkdir()
        entities = {each["id"]: each for each in things(11, created_at=CREATED, unknown=[0])}
        text = json.dumps({"things": entities, "groups": {}}, indent=1)
        (tmp_path / name / FILE).write_text(text)
    together = await result(tmp_path / "together", batches, together=True)
    assert together == await result(tmp_path / "alone", batches, together=False)


async def test_the_entities_of_a_batch_are_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("an entity was decoded, or decided alone")

    monkeypatch.setattr(EncodedPut, "entity", property(refuse))
    monkeypatch.setattr(SessionView, "_put_all", refuse)
    async with open_store(f"json:{tmp_path}", collections=COLLECTIONS) as store:
        await store.save_entity("groups", {"id": "g"})
        assert await store.save_entities("things", things(1000)) == [1] * 1000
        assert await store.create_entities("things", things(2000, 1000)) == [1] * 1000
        assert await store.save_entities("things", things(2000)) == [2] * 2000
        assert await store.import_entities("things", things(2000, version=7)) == [7] * 2000
        assert (
            await store.save_entities("things", await store.query_entities("things")) == [8] * 2000
        )


async def test_what_is_decided_one_by_one_takes_several_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that has an id twice."""
    steps: list[int] = []
    put_all = SessionView._put_all

    def counted(view: SessionView, puts: Sequence[Put]) -> list[Outcome]:
        steps.append(len(puts))
        return put_all(view, puts)

    monkeypatch.setattr(SessionView, "_put_all", counted)
    async with open_store(f"json:{tmp_path}", collections=COLLECTIONS) as store:
        await store.save_entity("groups", {"id": "g"})
        versions = await store.save_entities("things", [*things(1000), *things(1)])
    assert versions == [*[1] * 1000, 2]
    assert sum(steps) > 400
    assert max(steps) <= 128
