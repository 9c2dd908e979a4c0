"""The same store for programs without an event loop: its methods wait for their results.

    from hf_async_store.sync import open_store

    with open_store("json:data/request_database.json") as store:
        store.save_entity("requests", {"request_id": "req-1", "status": "PENDING"})

The methods run in one event loop in a background thread. Any number of threads may use a store at once;
what they write at the same time shares a commit, as with tasks.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Final, cast

from hf_async_store import strategies
from hf_async_store.expiry import PURGE_SECONDS
from hf_async_store.schema import HOST_FACTORY, Collection
from hf_async_store.sync.calls import Stream
from hf_async_store.sync.claims import Claim, TypedClaim
from hf_async_store.sync.feed import Changes, Subscription
from hf_async_store.sync.store import Store
from hf_async_store.sync.transaction import Repository, Snapshot, Transaction
from hf_async_store.sync.typed import TypedRepository
from hf_async_store.sync.typed_collections import TypedCollection

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime
    from pathlib import Path

    from hf_async_store.config import ConfigSource, StorageConfig
    from hf_async_store.observer import Observer
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.sync.dynamodb import DynamoDBStore
    from hf_async_store.sync.json import JSONStore
    from hf_async_store.sync.migration import (
        MigrationTool,
        backup_store,
        compare_stores,
        restore_store,
    )
    from hf_async_store.sync.sql import SQLStore, SQLTransaction

_LAZY_IMPORTS: Final = {
    "DynamoDBStore": "hf_async_store.sync.dynamodb",
    "JSONStore": "hf_async_store.sync.json",
    "SQLStore": "hf_async_store.sync.sql",
    "SQLTransaction": "hf_async_store.sync.sql",
    "MigrationTool": "hf_async_store.sync.migration",
    "backup_store": "hf_async_store.sync.migration",
    "compare_stores": "hf_async_store.sync.migration",
    "restore_store": "hf_async_store.sync.migration",
}

_STORES: Final = {
    "hf_async_store.strategies.dynamodb.strategy": "DynamoDBStore",
    "hf_async_store.strategies.json.strategy": "JSONStore",
    "hf_async_store.strategies.sql.strategy": "SQLStore",
}
"""By the module of a strategy, the blocking store with the methods that only this strategy has."""


def open_store(
    config: StorageConfig | Mapping[str, object] | str | Path,
    *,
    collections: Iterable[Collection] = HOST_FACTORY,
    follow_moves: Iterable[ConfigSource] = (),
    clock: Callable[[], datetime] | None = None,
    purge_seconds: float | None = PURGE_SECONDS,
    observer: Observer | None = None,
) -> Store:
    """As `hf_async_store.open_store`, for use with `with`.

    The store has the methods of its strategy: it is a `JSONStore`, `SQLStore` or `DynamoDBStore`.
    """
    return blocking_store(
        strategies.open_store(
            config,
            collections=collections,
            follow_moves=follow_moves,
            clock=clock,
            purge_seconds=purge_seconds,
            observer=observer,
        )
    )


def blocking_store(store: StorageStrategy) -> Store:
    """The blocking form of an asynchronous store that was created and not opened."""
    for each in type(store).__mro__:
        if each.__module__ in _STORES:
            return cast("type[Store]", __getattr__(_STORES[each.__module__]))(store)
    return Store(store)


def __getattr__(name: str) -> object:
    if name in _LAZY_IMPORTS:
        return getattr(import_module(_LAZY_IMPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Changes",
    "Claim",
    "DynamoDBStore",
    "JSONStore",
    "MigrationTool",
    "Repository",
    "SQLStore",
    "SQLTransaction",
    "Snapshot",
    "Store",
    "Stream",
    "Subscription",
    "Transaction",
    "TypedClaim",
    "TypedCollection",
    "TypedRepository",
    "backup_store",
    "blocking_store",
    "compare_stores",
    "open_store",
    "restore_store",
]
