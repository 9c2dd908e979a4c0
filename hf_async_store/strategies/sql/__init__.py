"""The SQL strategy: the store in SQLite or PostgreSQL, on SQLAlchemy, aiosqlite and asyncpg."""

from __future__ import annotations

from hf_async_store.strategies.sql.strategy import SQLStorageStrategy, SQLTransaction

__all__ = ["SQLStorageStrategy", "SQLTransaction"]
