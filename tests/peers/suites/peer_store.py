"""The store on which a suite runs: its URL is in the environment, `{folder}` in it is that of the test."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from hf_async_store import Collection, StorageStrategy, open_store

URL_VARIABLE: Final = "HF_ASYNC_STORE_PEERS_URL"


async def empty_url(collections: Sequence[Collection], folder: Path) -> str:
    """The URL of a store that holds no entities of these collections."""
    url = os.environ[URL_VARIABLE]
    if "{folder}" not in url:
        async with open_store(url, collections=collections) as store:
            for each in reversed(collections):  # children before their parents
                await store.delete_where(each.name, {})
    return url.format(folder=folder)


@asynccontextmanager
async def empty_store(
    collections: Sequence[Collection], folder: Path
) -> AsyncGenerator[StorageStrategy, None]:
    """An open store without entities, which has not read the clock yet: tests set it back."""
    url = await empty_url(collections, folder)
    async with open_store(url, collections=collections) as store:
        yield store
