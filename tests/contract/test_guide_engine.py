"""The contract on the engine that the guide shows to authors of engines, from its text alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from hf_async_store import Capabilities, Collection, StorageConfig, StorageStrategy
from hf_async_store.testing.contract import StrategyContract
from hf_async_store.testing.harness import CONTRACT_COLLECTIONS

_GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"


def _example() -> dict[str, Any]:
    blocks = re.findall(r"```python\n(.*?)```", _GUIDE.read_text(), re.DOTALL)
    [text] = [each for each in blocks if "class AcmeEngine" in each]
    namespace: dict[str, Any] = {"__name__": "acme_store"}
    exec(compile(f"from __future__ import annotations\n{text}", str(_GUIDE), "exec"), namespace)
    return namespace


_ACME = _example()


class AcmeHarness:
    capabilities: Capabilities = _ACME["AcmeEngine"].capabilities

    def store(
        self, collections: Iterable[Collection] = CONTRACT_COLLECTIONS, **settings: object
    ) -> StorageStrategy:
        config = StorageConfig(strategy="acme", options=settings)
        store: StorageStrategy = _ACME["AcmeStrategy"](config, collections=collections)
        return store

    def url(self) -> None:
        return None

    def leaks(self) -> list[str]:
        return []


@pytest.mark.hf_sampled(by="class")
class TestEngineOfTheGuide(StrategyContract):
    @pytest.fixture
    def harness(self) -> AcmeHarness:
        return AcmeHarness()
