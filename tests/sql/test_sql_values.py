"""Encodings of values that the database engines and the store must interpret in the same way."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, cast

import asyncpg
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_async_store import Collection
from hf_async_store.changes import Patch
from hf_async_store.strategies.sql.catalogue import Catalogue, declared
from hf_async_store.strategies.sql.decisions import Stored, new_row
from hf_async_store.strategies.sql.grammar import decode_json, encode_json
from hf_async_store.strategies.sql.names import Names
from hf_async_store.strategies.sql.postgres_jsonb import array_text, json_text
from hf_async_store.strategies.sql.rows import Table
from hf_async_store.strategies.sql.sqlite_functions import at
from hf_async_store.strategies.sql.sqlite_grammar import SQLiteGrammar
from hf_async_store.testing import hypothesis_strategies
from hf_async_store.testing.assertions import typed
from hf_async_store.testing.repetitions import repetitions
from hf_async_store.values import REMOVE, Key, Removed, Value

if TYPE_CHECKING:
    from hf_async_store_bench.servers import PostgresServer

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)
AT = "2026-01-01T00:00:00.000000Z"
ODD = ("", "null", "NULL", "{}", '"', "\\", "\\n", "a,b", "{a}", " ", "\n\t", "é", "\u0001", "'")


@given(
    st.dictionaries(TEXTS, hypothesis_strategies.values, max_size=4), hypothesis_strategies.values
)
def test_patches_are_merged_exactly(map_: dict[str, Any], value: Any) -> None:
    jobs = Collection("jobs", key="job_id")
    table = Table("jobs", declared(Catalogue(), [jobs])["jobs"], SQLiteGrammar(), Names())
    key = Key("jobs", "j")
    before = {**map_, "job_id": "j"}
    stored = Stored(3, encode_json(before).decode())
    names = [each for each in map_ if each != "new"]
    removed = cast("dict[str, Value | Removed]", dict.fromkeys(names, REMOVE))
    row = new_row(table, Patch(key, {**removed, "new": value}, AT), stored)
    assert row is not None
    assert row.version == 4
    assert typed(decode_json(row.doc)) == typed({"job_id": "j", "new": value})
    for name in names:
        inner = at(stored.doc, encode_json([name]).decode())
        assert inner is not None
        assert typed(decode_json(inner)) == typed(map_[name])


def positive_zero(value: Any) -> Any:
    if isinstance(value, list):
        return list(map(positive_zero, value))
    if isinstance(value, dict):
        return {name: positive_zero(each) for name, each in value.items()}
    return value + 0.0 if isinstance(value, float) else value


def test_postgresql_reads_the_written_values(postgres_server: PostgresServer) -> None:
    """A thousand values are read through JSONB, and lists of strings through arrays."""
    values: list[Any] = []
    texts: list[list[str | None]] = [list(ODD), [None, *ODD], []]

    @given(hypothesis_strategies.values)
    @settings(max_examples=repetitions(1000), database=None)
    def gather(value: Any) -> None:
        values.append(value)

    @given(st.lists(st.none() | TEXTS | st.sampled_from(ODD), max_size=5))
    @settings(max_examples=repetitions(300), database=None)
    def gather_texts(found: list[str | None]) -> None:
        texts.append(found)

    gather()
    gather_texts()

    async def compare() -> None:
        connection = await asyncpg.connect(postgres_server.url)
        try:
            written = [json_text(each) for each in values]
            for value, text in zip(values, written, strict=True):
                found = await connection.fetchval("SELECT $1::text::jsonb::text", text)
                json.loads(found)
                # A decimal has no negative zero; the store normalises it before.
                assert typed(decode_json(found)) == typed(positive_zero(value)), value
            for each in texts:
                found = await connection.fetchval("SELECT $1::text::text[]", array_text(each))
                assert found == each
        finally:
            await connection.close()

    asyncio.run(compare())
