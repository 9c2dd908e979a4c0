"""`SQLStorageStrategy`: a store in SQLite or PostgreSQL, with `execute_with_lock`, which only it has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

import msgspec

from hf_async_store.arguments import check_callable
from hf_async_store.config import (
    SQLConfig,
    StorageConfig,
    anchored,
    load_config,
    strategy_config,
)
from hf_async_store.schema import HOST_FACTORY, Collection, Schema
from hf_async_store.strategies.routing import routed
from hf_async_store.strategies.sql.claim_sql import PostgresClaimSQL, SQLiteClaimSQL
from hf_async_store.strategies.sql.feeding import FeedingSQLEngine
from hf_async_store.strategies.sql.session import SQLSession
from hf_async_store.strategy import StorageStrategy, schema_of
from hf_async_store.transaction import Transaction
from hf_async_store.values import Value

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.postgresql import PasswordProvider


class SQLTransaction(Transaction):
    """A transaction that also runs the caller's own SQL."""

    async def execute_with_lock(
        self,
        sql: str,
        params: Sequence[object] | Mapping[str, object] = (),
        *,
        timeout: float | None = None,
    ) -> list[dict[str, Value]]:
        """As `SQLStorageStrategy.execute_with_lock`, in this transaction: locks are held until it ends."""
        async with self._step(timeout) as session:
            own = await session.direct("execute_with_lock")
            return await cast("SQLSession", own).execute(sql, params)


class SQLStorageStrategy(StorageStrategy):
    """A store in SQLite or PostgreSQL.

    Args:
        config: `sqlite:PATH`, `postgresql://USER:PASSWORD@HOST:PORT/NAME`, a dict with the keys of
            the spec, a `StorageConfig` or an `SQLConfig`.
        collections: the collections whose entities can be stored.
        password: called with host, port and user name for each new connection to PostgreSQL;
            returns the password, for example a token that expires. It may be async.

    Raises:
        ConfigurationError: `config` cannot be used.
    """

    transaction_type: ClassVar[type[Transaction]] = SQLTransaction

    def __init__(
        self,
        config: StorageConfig | SQLConfig | Mapping[str, object] | str | Path,
        *,
        collections: Iterable[Collection] = HOST_FACTORY,
        password: PasswordProvider | None = None,
    ) -> None:
        if password is not None:
            check_callable(password, "password")
        schema = schema_of(collections)
        loaded = anchored(load_config(config))
        sql = strategy_config(loaded, SQLConfig)

        def opened(declared: Schema) -> FeedingSQLEngine:
            return _engine(sql, declared, password)

        self._sql = opened(schema)
        super().__init__(routed(self._sql, schema, loaded, opened), schema)

    async def execute_with_lock(
        self, sql: str, params: Sequence[object] | Mapping[str, object] = ()
    ) -> list[dict[str, Value]]:
        """Run a caller's own statement in a separate transaction; returns its rows as dicts by column.

        For each collection there is a view with its name: the id, `version`, and the declared fields, NULL
        where the stored value has another type. A statement that changes entities uses the table
        `"NAME-entities"`, and must set `doc` (the whole entity as JSON), `version` and the key columns
        together; it is not validated. Both names begin with `table_prefix`. On SQLite, a trailing FOR
        UPDATE is removed, because the transaction acquires the write lock when it begins. All locks are
        released when the call returns.

        Args:
            params: a list of arguments for `?`, or a dict of arguments for `:name`.
        """
        self._usable()
        async with self._engine.direct("execute_with_lock", writes=True):
            return await self._sql.execute_with_lock(sql, params)


def _engine(
    config: SQLConfig, schema: Schema, password: PasswordProvider | None
) -> FeedingSQLEngine:
    # Each module imports its driver, which may not be installed.
    if config.type == "sqlite":
        from hf_async_store.strategies.sql.sqlite import SQLite
        from hf_async_store.strategies.sql.sqlite_feed import SQLiteFeed
        from hf_async_store.strategies.sql.sqlite_schema import SQLiteSchema
        from hf_async_store.strategies.sql.sqlite_writer import SQLiteWriter

        return FeedingSQLEngine(
            SQLiteFeed,
            SQLiteClaimSQL,
            None,
            config,
            schema,
            SQLite(config),
            SQLiteSchema,
            SQLiteWriter,
        )
    from hf_async_store.strategies.sql.postgres_feed import PostgresFeed
    from hf_async_store.strategies.sql.postgres_schema import PostgresSchema
    from hf_async_store.strategies.sql.postgresql import PostgreSQL
    from hf_async_store.strategies.sql.statement_writer import StatementWriter

    dialect, claimers = PostgreSQL(config, password), None
    if not config.pgbouncer:
        # A plan that is kept must not read a whole table because it was small when the plan was made.
        options = f"{config.options} -c enable_seqscan=off".strip()
        claims = msgspec.structs.replace(config, isolation="read_committed", options=options)
        claimers = PostgreSQL(claims, password)
    return FeedingSQLEngine(
        PostgresFeed,
        PostgresClaimSQL,
        claimers,
        config,
        schema,
        dialect,
        PostgresSchema,
        StatementWriter,
    )
