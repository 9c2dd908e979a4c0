"""Engines beside the memory engine, step by step."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest

from hf_async_store import HOST_FACTORY, open_store
from hf_async_store.testing.machine import Stores, run_machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager


def json_at(name: str) -> Callable[[], AbstractContextManager[Stores]]:
    @contextmanager
    def make() -> Iterator[Stores]:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "data" / name
            yield lambda: open_store(f"json:{path}", collections=HOST_FACTORY)

    return make


@contextmanager
def memory() -> Iterator[Stores]:
    """The memory engine beside itself: that the machine finds no difference where there is none."""
    yield lambda: open_store("memory:", collections=HOST_FACTORY)


ENGINES = {"memory": memory, "json-single": json_at("db.json"), "json-split": json_at("folder")}


@pytest.mark.parametrize("engine", ENGINES)
def test_machine(engine: str) -> None:
    run_machine(ENGINES[engine])


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("engine", ENGINES)
def test_machine_long(engine: str) -> None:
    run_machine(ENGINES[engine], long=True)
