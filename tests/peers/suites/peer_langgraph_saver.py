"""LangGraph's conformance suite of checkpointers, each of its checks as a test."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest
from examples.langgraph_saver import COLLECTIONS, EntitySaver
from langgraph.checkpoint.conformance import spec
from peer_store import empty_store

CHECKS = [
    check
    for module in iter_modules(spec.__path__, spec.__name__ + ".")
    for name, checks in vars(import_module(module.name)).items()
    if name.startswith("ALL_") and name.endswith("_TESTS")
    for check in checks
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_conformance(check: Any, tmp_path: Path) -> None:
    async with empty_store(COLLECTIONS, tmp_path) as store:
        await check(EntitySaver(store))
