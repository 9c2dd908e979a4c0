"""Strategies by name: built in, registered by another package, and unknown."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hf_async_store import ConfigurationError, StorageConfig, StorageStrategy, open_store
from hf_async_store.config import MemoryConfig
from hf_async_store.driver import INTERFACE_VERSION, Schema
from hf_async_store.strategies import GROUP
from hf_async_store.strategies.memory import MemoryEngine

TOY = '''
from hf_async_store.config import StorageConfig
from hf_async_store.strategies.memory import MemoryStorageStrategy


class ToyStorageStrategy(MemoryStorageStrategy):
    """Memory under another name; it remembers how it was configured."""

    def __init__(self, config, *, collections):
        super().__init__(collections=collections)
        self.options = dict(config.options)
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that registers the strategies `toy`, and `torn`, which cannot be imported."""
    (tmp_path / "toy_strategy.py").write_text(TOY)
    info = tmp_path / "toy_strategy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-strategy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[{GROUP}]\ntoy = toy_strategy:ToyStorageStrategy\ntorn = no_such_module:Nothing\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    "config",
    [
        "toy:somewhere?colour=red",
        {"storage": {"strategy": "toy", "toy_strategy": {"colour": "red"}}},
        StorageConfig(strategy="toy", options={"colour": "red"}),
    ],
    ids=["url", "mapping", "config"],
)
async def test_another_package_registers_a_strategy(config: object) -> None:
    async with open_store(config) as store:  # type: ignore[arg-type]  # the toy takes any configuration
        assert type(store).__name__ == "ToyStorageStrategy"
        assert store.options["colour"] == "red"  # type: ignore[attr-defined]  # of the toy
        assert await store.save_entity("templates", {"template_id": "t-1"}) == 1
        assert await store.count_entities("templates") == 1


@pytest.mark.usefixtures("toy")
def test_a_registered_strategy_that_cannot_be_imported() -> None:
    with pytest.raises(ConfigurationError, match="'torn' .*cannot be imported.*no_such_module"):
        open_store(StorageConfig(strategy="torn", options={}))


@pytest.mark.usefixtures("toy")
def test_an_unknown_strategy_lists_the_known_ones() -> None:
    with pytest.raises(
        ConfigurationError,
        match="no storage strategy 'nope'; there are: dynamodb, json, memory, sql",
    ):
        open_store(StorageConfig(strategy="nope", options={}))


def test_an_engine_for_another_version_of_the_interface_is_refused() -> None:
    class Engine(MemoryEngine):
        pass

    def refusal(version: object) -> str:
        Engine.interface_version = version  # type: ignore[assignment]  # also what is no number
        with pytest.raises(ConfigurationError) as caught:
            StorageStrategy(Engine(Schema(()), MemoryConfig()), Schema(()))
        return str(caught.value)

    Engine.__module__ = "msgspec.engine"
    assert "for version 0 of the driver interface" in refusal(0)
    assert refusal(0).endswith("install a newer release of msgspec")
    assert refusal(INTERFACE_VERSION + 1).endswith("install a newer release of hf_async_store")
    assert f"interface_version = {INTERFACE_VERSION} in the class" in refusal(None)
    assert "'memory' (msgspec.engine." in refusal(None)


@pytest.mark.parametrize(
    "module", ["hf_async_store", "hf_async_store.strategies.json", "hf_async_store.strategies"]
)
def test_no_driver_and_nothing_heavy_is_imported(module: str) -> None:
    heavy = ("sqlalchemy", "aiosqlite", "asyncpg", "aiobotocore", "botocore", "rich", "pydantic")
    code = f"import {module}, sys; print([each for each in {heavy} if each in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


ABANDONS = """
import asyncio, gc, sys
from hf_async_store import StoreClosedError, open_store

async def main():
    store = await open_store(sys.argv[1]).open()
    await store.save_entity("templates", {"template_id": "t-1"})
    store.abandon()
    try:
        await store.get_entity("templates", "t-1")
    except StoreClosedError:
        print("closed")
    del store
    gc.collect()

asyncio.run(main())
"""


@pytest.mark.parametrize("url", ["json:{}/db.json", "json:{}/split", "sqlite:{}/store.db"])
async def test_an_abandoned_store_keeps_its_writes_and_ends_silently(
    url: str, tmp_path: Path
) -> None:
    place = url.format(tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "always::ResourceWarning", "-c", ABANDONS, place],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "closed\n"
    assert done.stderr == ""
    async with open_store(place) as store:
        assert await store.get_entity("templates", "t-1")
