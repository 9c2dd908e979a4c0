"""Fixtures to run the command line, mostly in this process."""

from __future__ import annotations

import asyncio
import io
import shutil
import sys
from typing import TYPE_CHECKING

import pytest
from command import STORE, Cli, Ran

from hf_async_store import open_store
from hf_async_store.cli import main

if TYPE_CHECKING:
    from pathlib import Path


class _Stdin(io.TextIOWrapper):
    """Standard input with the given text."""

    def __init__(self, data: bytes | None) -> None:
        super().__init__(io.BytesIO(data or b""))
        self._is_terminal = data is None

    def isatty(self) -> bool:
        return self._is_terminal


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and a store named by the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ASYNC_STORE", STORE)
    return tmp_path


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command in this process; `stdin=None` is a terminal without input."""

    def run(*words: str, stdin: bytes | None = None) -> Ran:
        with _Stdin(stdin) as typed:
            monkeypatch.setattr(sys, "stdin", typed)
            code = main(words)
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return run


@pytest.fixture(scope="session")
def full_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a store with a template, two requests and three machines."""
    folder = tmp_path_factory.mktemp("full")
    tags = {"owner": "ops", "a/b": [1, 2]}
    entities: dict[str, list[dict[str, object]]] = {
        "templates": [{"template_id": "t-1", "name": "Standard", "max_number": 10}],
        "requests": [
            {"request_id": "r-1", "status": "PENDING", "machine_count": 3, "tags": tags},
            {"request_id": "r-2", "status": "DONE", "machine_count": 1, "zone": 7},
        ],
        "machines": [
            {"machine_id": "m-1", "request_id": "r-1", "status": "RUNNING", "name": "one"},
            {"machine_id": "m-2", "request_id": "r-1", "status": "STOPPED", "name": None},
            {"machine_id": "m-3", "request_id": "r-2", "status": "RUNNING"},
        ],
    }
    entities["requests"][1]["completed_at"] = "2025-06-30T12:00:00Z"

    async def fill() -> None:
        async with open_store(f"json:{folder}/db.json") as store:
            for name, each in entities.items():
                await store.save_entities(name, each)

    asyncio.run(fill())
    return folder


@pytest.fixture
def filled(cli: Cli, full_folder: Path) -> Cli:
    """Runs commands on a store with some entities."""
    shutil.copytree(full_folder, "data")
    return cli
