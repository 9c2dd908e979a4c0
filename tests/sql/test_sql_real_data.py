"""Real stores, imported and read back: equal in value, type and version."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Final

import pytest

from hf_async_store import HOST_FACTORY, MigrationTool, open_store
from hf_async_store.config import MigrationConfig
from hf_async_store.testing.assertions import typed
from hf_async_store.values import parse_timestamp

pytestmark = pytest.mark.hf_sampled(by="url")

REAL: Final = os.environ.get("HF_ASYNC_STORE_REAL_DATA")
SCHEMA: Final = {each.name: each for each in HOST_FACTORY}
TIMES: Final = {
    each.name: {name for name, field in each.fields.items() if field.type == "timestamp"}
    for each in HOST_FACTORY
}


LAYOUTS: Final = ("single_file", "split_files_flat", "split_files_wrapped")


def found_in_the_field(layout: str) -> dict[str, dict[str, dict[str, Any]]]:
    """The entities in the files, by collection and id, read with a plain JSON parser."""
    if REAL:
        return {
            name: {each[collection.key]: each for each in _entities(Path(REAL) / layout, name)}
            for name, collection in SCHEMA.items()
        }
    return {
        "templates": {"t": {"template_id": "t", "created_at": "2026-07-06T22:07:11.806716"}},
        "requests": {"r": {"request_id": "r", "template_id": "t", "version": 0, "error": None}},
        "machines": {"m": {"machine_id": "m", "request_id": "r", "tags": {"a": [1, 1.0]}}},
    }


def _entities(folder: Path, name: str) -> list[dict[str, Any]]:
    single = folder / "request_database.json"
    file = single if single.exists() else folder / f"{name}.json"
    data = json.loads(file.read_bytes())
    return list(data.get(name, data).values())


def stored_form(collection: str, entity: dict[str, Any]) -> object:
    """The entity as it must be read: timestamps of declared fields in the normalised form."""
    times = TIMES[collection]
    return typed(
        {
            "version": 0,
            **{
                name: parse_timestamp(value) if name in times and isinstance(value, str) else value
                for name, value in entity.items()
            },
        }
    )


@pytest.mark.skipif(not REAL, reason="HF_ASYNC_STORE_REAL_DATA is not set; generated data is used")
def test_real_data_are_available() -> None:
    for layout in LAYOUTS:
        assert sum(map(len, found_in_the_field(layout).values())) > 10


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_real_data_are_read_as_imported(url: str, layout: str) -> None:
    data = found_in_the_field(layout)
    async with open_store(f"{url}?enforce_references=no") as store:
        for name in store.collections:
            entities = list(data[name].values())
            await store.import_entities(name, entities)
        for name, collection in store.collections.items():
            by_id = {each[collection.key]: each for each in data[name].values()}
            read = await store.get_entities(name, list(by_id))
            for entity, back in zip(by_id.values(), read, strict=True):
                assert back is not None
                assert typed(back) == stored_form(name, entity)
            walked = [each async for each in store.stream_entities(name)]
            assert [each[collection.key] for each in walked] == sorted(by_id)
            assert await store.count_entities(name) == len(by_id)


@pytest.mark.skipif(not REAL, reason="HF_ASYNC_STORE_REAL_DATA is not set")
@pytest.mark.parametrize("layout", LAYOUTS)
async def test_a_real_json_store_is_migrated(url: str, layout: str, tmp_path: Path) -> None:
    data = found_in_the_field(layout)
    shutil.copytree(Path(str(REAL)) / layout, tmp_path / layout)
    found = tmp_path / layout / ("request_database.json" if layout == "single_file" else "")
    async with (
        open_store(f"json:{found}?enforce_references=no") as source,
        open_store(f"{url}?enforce_references=no") as target,
    ):
        config = MigrationConfig(create_backup=False, backup_location=f"{tmp_path}/backups/")
        report = await MigrationTool(source, target, config).migrate()
        assert report.ok
        assert report.verified
        for name, by_id in data.items():
            read = await target.get_entities(name, list(by_id))
            for entity, back in zip(by_id.values(), read, strict=True):
                assert back is not None
                assert typed(back) == stored_form(name, entity)
            assert await target.count_entities(name) == len(by_id)
