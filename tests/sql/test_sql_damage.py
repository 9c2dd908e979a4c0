"""Rows and tables that another program changed: a correct result, or an error that names the row.

The inputs are generated; `HF_ASYNC_STORE_FUZZ` is their number.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_async_store import Collection, CorruptionError, StorageError, contains, open_store, path
from hf_async_store.testing.harness import CONTRACT_COLLECTIONS
from hf_async_store.values import all_canonical
from tests.contract.harnesses import execute

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

pytestmark = pytest.mark.hf_sampled(by="url")

EXAMPLES = int(os.environ.get("HF_ASYNC_STORE_FUZZ", "150"))
WHOLE: dict[str, object] = {
    "item_id": "victim",
    "label": "a",
    "count": 3,
    "ratio": 1.5,
    "active": True,
    "due_at": "2026-01-01T00:00:00Z",
    "data": {"x": [1, None, "y"]},
    "more": {"deep": [1, {"z": 2.5}]},
    "nothing": None,
}
COLUMNS = ["item_id", "doc", "doc", "doc", "version"]

json_texts = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
).map(lambda value: json.dumps(value, ensure_ascii=False))
odd_texts = st.sampled_from(
    [
        "",
        "{",
        "[" * 5000,
        "null",
        "[]",
        '[["item_id", "other"]]',
        '{"item_id": "other"}',
        '{"version": 7}',
        '{"a": "\\ud800"}',
        '{"a": "\\u0000"}',
        '{"a": NaN}',
        '{"a": 1e999}',
        '{"label": 7}',
        '{"label": "7"}',
        '{"label": {"a": 1}}',
        '{"label": "{"}',
        '{"nowhere": null}',
        '{"a": 1} trailing',
        "\ufeff{}",
        "true",
        "3",
        "2026-13-45",
        "9" * 400,
    ]
)


def mutated(text: str) -> st.SearchStrategy[str]:
    """A string with one character changed, removed or inserted."""
    places = st.integers(0, max(len(text) - 1, 0))
    return st.tuples(places, st.sampled_from(["", '"', "{", "\\", "0", "\0", "é"])).map(
        lambda change: text[: change[0]] + change[1] + text[change[0] + 1 :]
    )


texts = json_texts | odd_texts | mutated('{"more":{"deep":[1,{"z":2.5}]}}') | st.text(max_size=8)
# Text that is not UTF-8, and blobs.
values = (
    st.none()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.binary(max_size=8)
    | texts
    | st.binary(max_size=8).map(lambda raw: ("text", raw))
)


def set_column(file: Path, column: str, value: Any) -> bool:
    connection = sqlite3.connect(file)
    try:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        how = "CAST(? AS TEXT)" if isinstance(value, tuple) else "?"
        given_value = value[1] if isinstance(value, tuple) else value
        connection.execute(
            f'UPDATE "items-entities" SET "{column}" = {how} WHERE item_id = \'victim\'',
            (given_value,),
        )
        connection.commit()
    except (sqlite3.IntegrityError, sqlite3.OperationalError, UnicodeEncodeError):
        return False
    finally:
        connection.close()
    return True


async def texts_read(store: Any) -> object:
    found: list[bytes] = []
    async with store.snapshot() as reader:
        query = store._query("items", None, None, None, None)
        async for piece in reader.select_batches(query):
            found += all_canonical(piece)
    return found


async def streamed(store: Any) -> object:
    return [each async for each in store.stream_entities("items")]


async def in_transaction(store: Any) -> object:
    async with store.begin_transaction() as tx:
        found = await tx.get_entity("items", "victim")
        await tx.query_entities("items", {"count": 3})
        return found


READS: dict[str, Callable[[Any], Awaitable[object]]] = {
    "get": lambda store: store.get_entity("items", "victim"),
    "get many": lambda store: store.get_entities("items", ["good", "victim"]),
    "query": lambda store: store.query_entities("items"),
    "first": lambda store: store.query_entities("items", order_by="-count", limit=1),
    "filtered": lambda store: store.query_entities("items", {"label": contains("a")}),
    "in json": lambda store: store.query_entities("items", {path("more", "deep", 0): 1}),
    "by json": lambda store: store.query_entities("items", order_by="more", limit=5),
    "in a declared json": lambda store: store.query_entities(
        "items", {path("data", "x"): contains(1)}
    ),
    "some fields": lambda store: store.query_entities("items", fields=["label", "more"]),
    "page": lambda store: store.query_page("items", order_by="ratio", limit=1),
    "count": lambda store: store.count_entities("items", {"active": True}),
    "count in json": lambda store: store.count_entities("items", {path("more", "deep"): [1]}),
    "stream": streamed,
    "texts": texts_read,
    "transaction": in_transaction,
    "explain": lambda store: store.explain_query("items", {"count": 3}),
    "health": lambda store: store.health(),
}
WRITES: dict[str, Callable[[Any], Awaitable[object]]] = {
    "update": lambda store: store.update_entity("items", "victim", {"label": "b", "x": 1}),
    "update as expected": lambda store: store.update_entity(
        "items", "victim", {"count": 4}, expected_version=1
    ),
    "modify": lambda store: store.modify_entity("items", "victim", lambda found: found),
    "save": lambda store: store.save_entity("items", {"item_id": "victim", "label": "c"}),
    "delete": lambda store: store.delete_entity("items", "victim"),
}


def plain(value: object) -> bool:
    """Whether an entity may contain the value, apart from its size."""
    if isinstance(value, dict):
        return all(isinstance(each, str) for each in value) and all(map(plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    if isinstance(value, float):
        return value - value == 0
    return value is None or isinstance(value, str | int | bool)


async def the_truth_or_an_error(store: Any, verbs: dict[str, Any], readable_id: bool) -> int:
    errors = 0
    for name, verb in verbs.items():
        try:
            found = await verb(store)
        except StorageError as exc:
            errors += 1
            if isinstance(exc, CorruptionError):
                assert "items" in str(exc) or "hf_catalogue" in str(exc), (name, exc)
                assert "victim" in str(exc) or not readable_id or "hf_" in str(exc), (name, exc)
        else:
            if isinstance(found, list | dict) and name != "texts":
                assert plain(found), (name, found)
    return errors


def test_122_damaged_rows(tmp_path: Path) -> None:
    file = tmp_path / "store.db"
    tried = refused = 0
    with asyncio.Runner() as runner:
        store = open_store(f"sqlite:{file}", collections=CONTRACT_COLLECTIONS)
        runner.run(store.open())
        runner.run(store.save_entity("items", {"item_id": "good", "label": "g", "more": [1]}))

        @given(column=st.sampled_from(COLUMNS), value=values)
        @settings(max_examples=EXAMPLES, derandomize=False)
        def damaged(column: str, value: Any) -> None:
            nonlocal tried, refused

            async def one() -> None:
                nonlocal tried, refused
                connection = sqlite3.connect(file)
                connection.execute("DELETE FROM \"items-entities\" WHERE item_id IS NOT 'good'")
                connection.commit()
                connection.close()
                await store.save_entity("items", WHOLE)
                if not set_column(file, column, value):
                    return
                tried += 1
                readable = column != "item_id"
                refused += bool(await the_truth_or_an_error(store, READS, readable))
                good = await store.get_entity("items", "good")
                assert good is not None
                assert good["more"] == [1]
                await the_truth_or_an_error(store, WRITES, readable)
                assert await store.save_entity("items", {**WHOLE, "item_id": "neighbour"}) >= 1

            runner.run(one())

        damaged()
        runner.run(store.close())
    assert tried > EXAMPLES // 3
    assert refused > tried // 10, "the damage was not detected"
    print(f"{tried} damaged rows, {refused} of them refused")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("doc", "[]"),
        ("doc", "7"),
        ("doc", '{"item_id": "other"}'),
        ("doc", '{"label": "a"}'),
        ("doc", '{"item_id": "victim", "label": "\\ud800"}'),
        ("doc", '{"item_id": "victim", "ratio": 1e999}'),
        ("version", "x"),
        ("version", -1),
        ("version", 1.5),
    ],
)
async def test_122_the_error_names_the_damaged_row(tmp_path: Path, column: str, value: Any) -> None:
    file = tmp_path / "store.db"
    async with open_store(f"sqlite:{file}", collections=CONTRACT_COLLECTIONS) as store:
        await store.save_entities(
            "items", [{"item_id": f"i{n:04}", "more": [n]} for n in range(700)]
        )
        await store.save_entity("items", WHOLE)
        assert set_column(file, column, value)
        for name in ("get", "query", "stream", "texts", "transaction"):
            with pytest.raises(CorruptionError, match=r"items.*item_id 'victim'"):
                await READS[name](store)
        assert await store.get_entity("items", "i0003") is not None
        assert len(await store.query_entities("items", {"item_id": "i0003"})) == 1


@pytest.mark.parametrize(
    "doc", ["{", "", '{"item_id": "victim", "label": }', b"\x00\xff", b"{}", "[" * 5000]
)
async def test_122_a_document_that_is_not_json(tmp_path: Path, doc: Any) -> None:
    file = tmp_path / "store.db"
    async with open_store(f"sqlite:{file}", collections=CONTRACT_COLLECTIONS) as store:
        await store.save_entity("items", WHOLE)
        await store.save_entity("items", {"item_id": "good", "label": "a"})
        assert set_column(file, "doc", doc)
        by_path = ["count in json"] if isinstance(doc, str) else []  # a blob has no members
        for name in ("get", "query", "stream", "texts", "transaction", *by_path):
            with pytest.raises(CorruptionError, match=r"items.*'victim'"):
                await READS[name](store)
        assert len(await store.query_entities("items", {"item_id": "good"})) == 1
    # It does not prevent the declaration of another index.
    more = Collection("items", key="item_id", fields=["nothing"], indexes=["nothing"])
    async with open_store(f"sqlite:{file}", collections=[more]) as store:
        await store.save_entity("items", {"item_id": "other", "nothing": "x"})
        assert await store.count_entities("items", {"nothing": "x"}) == 1


async def test_122_an_invalid_id(tmp_path: Path) -> None:
    file = tmp_path / "store.db"
    async with open_store(f"sqlite:{file}", collections=CONTRACT_COLLECTIONS) as store:
        await store.save_entity("items", WHOLE)
        assert not set_column(file, "item_id", None), "another program cannot write it"
        assert set_column(file, "item_id", b"victim")
        for name in ("query", "stream", "texts"):
            with pytest.raises(CorruptionError, match='the table "items-entities"'):
                await READS[name](store)
        await store.execute_with_lock(  # type: ignore[attr-defined]
            "DELETE FROM \"items-entities\" WHERE typeof(item_id) = 'blob'"
        )
        assert await store.query_entities("items") == []


TABLES = [
    'DROP TABLE "items-entities"',
    "DROP VIEW items",
    'ALTER TABLE "items-entities" RENAME COLUMN "label-key" TO "x y"',
    'ALTER TABLE "items-entities" RENAME TO other',
    'ALTER TABLE "items-entities" RENAME COLUMN doc TO docs',
    'ALTER TABLE "items-entities" RENAME COLUMN version TO v',
    'ALTER TABLE "items-entities" RENAME COLUMN item_id TO id',
    'DROP TABLE "items-entities"; CREATE VIEW "items-entities" AS SELECT 1 AS item_id, 2 AS doc',
    'DROP TABLE "items-entities"; CREATE TABLE "items-entities" (item_id TEXT PRIMARY KEY)',
    "DROP TABLE hf_catalogue",
    "DELETE FROM hf_catalogue",
    "UPDATE hf_catalogue SET value = 'x'",
    "CREATE TRIGGER no BEFORE UPDATE ON \"items-entities\" BEGIN SELECT RAISE(ABORT, 'no'); END",
    "CREATE TRIGGER no BEFORE INSERT ON \"items-entities\" BEGIN SELECT RAISE(ROLLBACK, 'no'); END",
    'CREATE UNIQUE INDEX mine ON "items-entities" ("label-key")',
]


@pytest.mark.parametrize("opened", ["before", "after"])
@pytest.mark.parametrize("statement", TABLES)
async def test_122_tables_that_were_changed(tmp_path: Path, statement: str, opened: str) -> None:
    file = tmp_path / "store.db"

    def change() -> None:
        connection = sqlite3.connect(file)
        connection.executescript(statement)
        connection.close()

    async with open_store(f"sqlite:{file}", collections=CONTRACT_COLLECTIONS) as store:
        await store.save_entity("items", WHOLE)
        if opened == "before":
            change()
            await the_truth_or_an_error(store, {**READS, **WRITES}, True)
    if opened == "after":
        change()
        async with open_store(f"sqlite:{file}", collections=CONTRACT_COLLECTIONS) as store:
            await the_truth_or_an_error(store, {**READS, **WRITES}, True)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("doc", "'[]'"),
        ("doc", "'7'"),
        ("doc", "'[[\"label\", 1]]'"),
        ("doc", '\'{"item_id": "other"}\''),
        ("doc", '\'{"label": "a"}\''),
        ("version", "-1"),
    ],
)
async def test_122_damaged_rows_on_postgresql(database: str, column: str, value: str) -> None:
    async with open_store(database, collections=CONTRACT_COLLECTIONS) as store:
        await store.save_entity("items", {"item_id": "good"})
        await store.save_entity("items", WHOLE)
        execute(
            database, f'UPDATE "items-entities" SET "{column}" = {value} WHERE item_id = \'victim\''
        )
        for name in ("get", "query", "stream", "texts", "transaction"):
            with pytest.raises(CorruptionError, match=r"items.*item_id 'victim'"):
                await READS[name](store)
        assert await store.get_entity("items", "good") is not None
        await the_truth_or_an_error(store, {**READS, **WRITES}, True)
