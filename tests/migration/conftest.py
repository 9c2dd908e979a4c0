"""URLs for stores of every engine."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

import pytest
from support import json_url

from hf_async_store import strategies
from hf_async_store.testing.harness import skip_engine

# The test server accepts any credentials; without them, the client would request some over the network.
os.environ.setdefault("AWS_ACCESS_KEY_ID", "test")
os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "test")
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")

Place = Callable[[str, str], str]

_STRATEGIES = {"sqlite": "sql", "postgresql": "sql", "dynamodb": "dynamodb"}


@pytest.fixture
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    """Returns the URL of a new store, for an engine and a name."""

    def make(kind: str, name: str) -> str:
        if kind in _STRATEGIES and _STRATEGIES[kind] not in strategies._BUILT_IN:
            skip_engine(kind, "its strategy is not part of this version")
        if kind == "sqlite":
            return f"sqlite:{tmp_path / name}.db"
        if kind == "postgresql":
            server = request.getfixturevalue("postgres_server")
            url: str = server.database()
            request.addfinalizer(lambda: server.drop(url))
            return url
        if kind == "dynamodb":
            endpoint = request.getfixturevalue("dynamodb_server").endpoint_url
            return f"dynamodb://us-east-1/m{secrets.token_hex(4)}?endpoint_url={endpoint}"
        return json_url(kind, tmp_path, name)

    return make
