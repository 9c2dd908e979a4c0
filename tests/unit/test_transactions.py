"""Transactions on an engine whose sessions fail, or that was closed."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

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
