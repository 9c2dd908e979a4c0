"""Real data are read as they were written."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hf_async_store import HOST_FACTORY, open_store
from hf_async_store.testing.assertions import typed
from hf_async_store.testing.repetitions import sampled
from tests.dynamodb.support import store_at

if TYPE_CHECKING:
    from tests.dynamodb.proxy import Proxy

VARIABLE = "HF_ASYNC_STORE_REAL_DATA"


@pytest.fixture
def data() -> dict[str, dict[str, Any]]:
    given = os.environ.get(VARIABLE)
    if not given:
        pytest.skip(f"{VARIABLE} names no data")
    text = (Path(given) / "single_file" / "request_database.json").read_text()
    loaded: dict[str, dict[str, Any]] = json.loads(text)
    return loaded


def _instant(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


TIMES = {
    each.name: {name for name, field in each.fields.items() if field.type == "timestamp"}
    for each in HOST_FACTORY
}


async def test_real_data_round_trip(proxy: Proxy, data: dict[str, dict[str, Any]]) -> None:
    async with store_at(proxy.url, None, HOST_FACTORY) as store:
        for name in store.collections:
            entities = list(data[name].values())
            versions = await store.import_entities(name, entities)
            assert versions == [each.get("version", 0) for each in entities]
        for name, declared in store.collections.items():
            found = await store.get_entities(name, list(data[name]))
            for entity, original in zip(found, data[name].values(), strict=True):
                assert entity is not None
                for field in TIMES[name]:
                    given = original.get(field)
                    if isinstance(given, str):
                        assert _instant(str(entity[field])) == _instant(given)
                        entity[field] = given
                assert typed(entity) == typed({"version": 0, **original})
            assert await store.count_entities(name) == len(data[name])
            queried = await store.query_entities(name, order_by=declared.key)
            assert [each[declared.key] for each in queried] == sorted(data[name])


async def test_queries_of_real_data_agree_with_the_memory_engine(
    proxy: Proxy, data: dict[str, dict[str, Any]]
) -> None:
    async with store_at(proxy.url, None, HOST_FACTORY) as store, open_store("memory:") as memory:
        for name in store.collections:
            for each in (store, memory):
                await each.import_entities(name, list(data[name].values()))
        for declared in HOST_FACTORY:
            for index in declared.indexes:
                values = {each.get(index.field) for each in data[declared.name].values()}
                for value in sampled(sorted(values, key=str)[:20]):
                    order = [index.sort or index.field, declared.key]
                    filters = {index.field: value}
                    found = await store.query_entities(declared.name, filters, order)
                    wanted = await memory.query_entities(declared.name, filters, order)
                    assert typed(found) == typed(wanted), filters
                    down = [f"-{each}" for each in order]
                    found = await store.query_entities(declared.name, filters, down, 7)
                    assert typed(found) == typed(
                        await memory.query_entities(declared.name, filters, down, 7)
                    )
