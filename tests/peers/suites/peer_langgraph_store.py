"""The tests of LangGraph's store on SQLite, with our store in place of its own; imported at the end of its
test module."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from examples.langgraph_store import COLLECTIONS, EntityMemoryStore
from peer_store import empty_store


@pytest.fixture
async def store(tmp_path: Path) -> AsyncGenerator[EntityMemoryStore, None]:
    async with empty_store(COLLECTIONS, tmp_path) as entities:
        yield EntityMemoryStore(entities)


@pytest.fixture
def conn_string() -> str:
    return ""


@asynccontextmanager
async def create_vector_store(
    fake_embeddings: Any, conn_string: str = "", text_fields: list[str] | None = None
) -> AsyncGenerator[EntityMemoryStore, None]:
    with TemporaryDirectory() as folder:
        async with empty_store(COLLECTIONS, Path(folder)) as entities:
            embed, dims = fake_embeddings, fake_embeddings.dims
            fields = {"fields": text_fields} if text_fields else {}
            yield EntityMemoryStore(entities, index={"dims": dims, "embed": embed, **fields})
