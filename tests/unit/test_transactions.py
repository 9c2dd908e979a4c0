"""Transactions on an engine whose sessions fail, or that was closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hf_async_store import (
    LockTimeoutError,
    StoreClosedError,
    TransactionAbortedError,
    open_store,
)
from hf_async_store.driver import Isolation, Session


async def test_a_nested_transaction_that_cannot_begin_the_outer_one_aborts_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @asynccontextmanager
    async def locked(isolation: Isolation | None) -> AsyncGenerator[Session, None]:
        raise LockTimeoutError("locked")
        yield

    async with open_store("memory:") as store:
        monkeypatch.setattr(store.engine, "session", locked)
        tx = await store.begin_transaction().__aenter__()
        with pytest.raises(LockTimeoutError):
            await tx.begin_transaction().__aenter__()
        with pytest.raises(TransactionAbortedError, match="locked"):
            await tx.get_entity("templates", "t")
        with pytest.raises(TransactionAbortedError, match="locked"):
            await tx.__aexit__(None, None, None)


@pytest.mark.parametrize("read_only", [False, True])
async def test_the_first_call_after_the_store_was_closed(*, read_only: bool) -> None:
    async with open_store("memory:") as store:
        tx = await store.begin_transaction(read_only=read_only).__aenter__()
    with pytest.raises(StoreClosedError):
        await tx.get_entity("templates", "t")
    with pytest.raises(TransactionAbortedError):
        await tx.__aexit__(None, None, None)


@pytest.mark.parametrize("url", ["memory:", "json:store.json"])
async def test_the_task_of_the_first_call_does_not_hold_the_lock(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It belongs to the task that is inside the transaction; the other one may begin its own."""
    monkeypatch.chdir(tmp_path)
    async with open_store(url) as store:
        await store.save_entity("templates", {"template_id": "t"})
        called = asyncio.Event()

        async def child() -> None:
            await tx.get_entity("templates", "t")
            called.set()
            async with store.begin_transaction() as own:
                await own.update_entity("templates", "t", {"name": "own"})

        async with store.begin_transaction() as tx:
            task = asyncio.create_task(child())
            await called.wait()
            await tx.update_entity("templates", "t", {"name": "first"})
        await task
        found = await store.get_entity("templates", "t") or {}
        assert (found["name"], found["version"]) == ("own", 3)


@pytest.mark.parametrize("url", ["memory:", "json:data?lock_timeout=0.2", "sqlite:store.db"])
async def test_a_commit_after_the_store_was_closed(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with open_store(url) as store:
        tx = await store.begin_transaction().__aenter__()
        await tx.save_entity("templates", {"template_id": "t"})
    with pytest.raises(StoreClosedError):
        await tx.__aexit__(None, None, None)
    async with open_store(url) as store:
        assert await store.get_entity("templates", "t") is None
