"""The blocking store in SQLite or PostgreSQL."""

from __future__ import annotations

from typing import ClassVar

from hf_async_store.strategies.sql.strategy import SQLStorageStrategy
from hf_async_store.strategies.sql.strategy import SQLTransaction as AsyncSQLTransaction
from hf_async_store.sync.calls import blocking
from hf_async_store.sync.store import Store
from hf_async_store.sync.transaction import Transaction


class SQLTransaction(Transaction):
    """A transaction that also runs the caller's own SQL."""

    execute_with_lock = blocking(AsyncSQLTransaction.execute_with_lock)


class SQLStore(Store):
    """As `SQLStorageStrategy`."""

    transaction_type: ClassVar[type[Transaction]] = SQLTransaction

    def __init__(self, store: SQLStorageStrategy) -> None:
        super().__init__(store)

    execute_with_lock = blocking(SQLStorageStrategy.execute_with_lock)
