"""Encodings of values that the database engines and the store must interpret in the same way."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import asyncpg
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_async_store.query import order_key
from hf_async_store.strategies.sql.postgres_jsonb import array_text, json_text
from hf_async_store.strategies.sql.row_mapping import decode_json, encode_json
from hf_async_store.strategies.sql.sqlite_functions import at, merged, order_bytes
from hf_async_store.testing import hypothesis_strategies
from hf_async_store.testing.assertions import typed
from hf_async_store.testing.repetitions import repetitions

if TYPE_CHECKING:
    from hf_async_store_bench.servers import PostgresServer

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)
ODD = ("", "null", "NULL", "{}", '"', "\\", "\\n", "a,b", "{a}", " ", "\n\t", "é", "\u0001", "'")


@given(hypothesis_strategies.values, hypothesis_strategies.values)
@settings(max_examples=repetitions(2000))
def test_order_bytes_sort_like_order_keys(one: Any, other: Any) -> None:
    keys, texts = (order_key(one), order_key(other)), (order_bytes(one), order_bytes(other))
    assert (keys[0] < keys[1]) == (texts[0] < texts[1])
    assert (keys[0] == keys[1]) == (texts[0] == texts[1])


@given(
    st.dictionaries(TEXTS, hypothesis_strategies.values, max_size=4), hypothesis_strategies.values
)
def test_dicts_are_merged_exactly(map_: dict[str, Any], value: Any) -> None:
    text = encode_json(map_).decode()
    names = list(map_)
    found = merged(text, encode_json({"new": value}).decode(), encode_json(names).decode())
    assert found is not None
    assert typed(decode_json(found)) == typed({"new": value})
    assert merged(text, None, encode_json(names).decode()) is None
    for name in names:
        inner = at(text, encode_json([name]).decode())
        assert inner is not None
        assert typed(decode_json(inner)) == typed(map_[name])


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
            for value, (text, is_exact) in zip(values, written, strict=True):
                found = await connection.fetchval("SELECT $1::text::jsonb::text", text)
                json.loads(found)
                assert (typed(decode_json(found)) == typed(value)) or not is_exact, value
            for each in texts:
                found = await connection.fetchval("SELECT $1::text::text[]", array_text(each))
                assert found == each
        finally:
            await connection.close()

    asyncio.run(compare())
