"""The SQL strategy: a store in SQLite or PostgreSQL, with SQLAlchemy, aiosqlite and asyncpg."""

from __future__ import annotations

from hf_async_store.strategies.sql.strategy import SQLStorageStrategy, SQLTransaction

__all__ = ["SQLStorageStrategy", "SQLTransaction"]
