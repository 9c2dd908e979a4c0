"""The dialect of PostgreSQL: a server with many writers, serializable transactions, and JSON as JSONB."""

from __future__ import annotations

import asyncio
import random
import re
import secrets
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NamedTuple, TypeAlias, cast
from weakref import WeakKeyDictionary

from hf_async_store.config import SQLConfig
from hf_async_store.driver import Capabilities, Isolation, QueryPlan, run_to_completion
from hf_async_store.errors import (
    AuthenticationError,
    ConcurrencyConflictError,
    ConfigurationError,
    InvalidInputError,
    ProtocolError,
    ReadOnlyStoreError,
    StorageError,
    UnavailableError,
)
from hf_async_store.strategies.sql.catalogue import CatalogueChangedError
from hf_async_store.strategies.sql.dialect import Dialect, Relation, SessionEndedError
from hf_async_store.strategies.sql.errors import (
    DuplicateValueError,
    connection_error,
    postgres_error,
)
from hf_async_store.strategies.sql.names import (
    GENERATION_PREFIX,
    Names,
    is_unique_index,
    quoted,
)
from hf_async_store.strategies.sql.postgres_grammar import PostgresGrammar
from hf_async_store.strategies.sql.write_sql import CHANGED
from hf_async_store.values import Value

try:
    import asyncpg  # type: ignore[import-untyped]  # it has no types
except ImportError as exc:
    raise ConfigurationError(
        "PostgreSQL needs the package asyncpg: pip install 'hf_async_store[postgres]'"
    ) from exc

if TYPE_CHECKING:
    from hf_async_store.schema import Index

PasswordProvider: TypeAlias = "Callable[[str, int, str], str | Awaitable[str]]"
"""Called with host, port and user name; returns the password for one new connection."""

_PORT: Final = 5432
_CHUNK_SIZE: Final = 256
_GRACE: Final = 5.0
"""How many seconds the driver waits longer than `statement_timeout`, within which the server reports that
a statement was cancelled."""

_REQUEST_SECONDS: Final = 1.0
"""How long a connection that is ended waits for its requests to cancel statements, which take milliseconds
unless the server does not respond."""

_UNLIMITED: Final = 7 * 24 * 3600.0
"""How many seconds the driver waits for statements such as the build of an index."""

INVALID: Final = "invalid index"
"""The kind, in `relations`, of an index whose build was interrupted, or is in progress."""

_ROLE_SECONDS: Final = 0.25
"""For how many seconds after a connection was opened the role of its server is assumed to be unchanged. If
no server accepts writes, connections are replaced at most this often."""

_SERVER_ERRORS: Final = (asyncpg.PostgresError, asyncpg.PostgresWarning)
"""The exceptions that the driver raises for an error that the server sent."""

_NOT_SENT: Final = ("cannot switch to state", "not connected")
"""The beginnings of the driver's messages that mean that the server had ended the session before the
statement was sent. The driver has no error class for this."""


class _ServerReadOnlyError(Exception):
    """The server of this connection accepts no writes, but that of a new connection may."""


class _InvalidResponseError(Exception):
    """The response of the server is invalid."""


class _Session:
    """The state of a connection.

    Attributes:
        on_standby: the server was a standby when the connection was opened.
        opened_at: by the monotonic clock.
        state_unknown: after an error on the connection or an invalid response, its state is unknown.
    """

    __slots__ = ("on_standby", "opened_at", "state_unknown")

    def __init__(self, *, on_standby: bool) -> None:
        self.on_standby = on_standby
        self.opened_at = time.monotonic()
        self.state_unknown = False


_SESSIONS: Final[WeakKeyDictionary[Any, _Session]] = WeakKeyDictionary()
"""By connection, for all stores of the process."""


class _Transaction(NamedTuple):
    """A transaction or savepoint, and its connection."""

    driver: Any
    transaction: Any


class PostgreSQL(Dialect):
    """The dialect of one database on a server."""

    driver_errors: ClassVar[tuple[type[Exception], ...]] = (
        asyncpg.PostgresError,
        asyncpg.PostgresWarning,  # for an error with the SQLSTATE of a warning
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,
        OSError,
        SessionEndedError,
        _ServerReadOnlyError,
        _InvalidResponseError,
    )
    caller_errors = ()
    other_columns: ClassVar[type[Exception]] = asyncpg.InvalidTableDefinitionError
    """Raised by CREATE OR REPLACE VIEW if a column of the existing view is missing, or has another type."""

    has_dependents: ClassVar[Any] = asyncpg.DependentObjectsStillExistError
    """Raised by DROP VIEW if others depend on the view, which its `detail` names."""

    duplicates: ClassVar[type[Exception]] = asyncpg.UniqueViolationError
    """Raised by CREATE UNIQUE INDEX if two rows have the same value."""

    url = "postgresql+asyncpg://"
    placeholder_prefix = "$"
    single_writer = False
    grammar = PostgresGrammar()

    def __init__(self, config: SQLConfig, password: PasswordProvider | None = None) -> None:
        self._config = config
        self.names = Names(config.table_prefix)
        self._password = password or _provider(config.login_provider)
        self._outdated_at = float("-inf")
        self.needs_transactions = config.pgbouncer
        self.separate_read_pool = not config.pgbouncer
        self.reads_alone = False
        first = config.isolation
        others: tuple[Isolation, ...] = ("serializable", "repeatable_read", "read_committed")
        self.capabilities = Capabilities(
            engine="postgresql",
            durable=True,
            multi_process=True,
            claims=True,
            change_markers=True,
            unique_indexes=True,
            feed=True,
            isolations=(first, *(each for each in others if each != first)),
            read_conflict_policy="ordered",
            read_batch=512,
            read_concurrency=2,
            write_concurrency=1,
        )

    # -- the driver --------------------------------------------------------------------------

    async def connect(self, isolation: Isolation | None = None, *, streams: bool = False) -> Any:
        # A cancellation waits for it: if a task is cancelled while it opens a TCP connection, the driver
        # keeps an exception that is never retrieved.
        opening = asyncio.ensure_future(self._connect_to_any(isolation))
        try:
            return await run_to_completion(opening)
        except asyncio.CancelledError:
            if not opening.cancelled() and opening.exception() is None:
                opening.result().terminate()
            raise

    async def _connect_to_any(self, isolation: Isolation | None) -> Any:
        """A connection to the first server that responds and matches `target_session_attrs`."""
        self._check_files()
        servers = self._config.servers()
        if self._config.load_balance_hosts == "random":
            random.shuffle(servers)
        wanted = self._config.target_session_attrs
        first_choice = "standby" if wanted == "prefer-standby" else wanted
        failures: list[StorageError] = []
        driver = await self._connect_to_first(servers, first_choice, failures)
        if driver is None and wanted == "prefer-standby":
            driver = await self._connect_to_first(servers, "any", failures)
        if driver is None:
            if len(failures) == 1:
                raise failures[0]
            listed = "; ".join(map(str, failures))
            raise UnavailableError(f"none of the servers can be used: {listed}") from failures[-1]
        try:
            await self._apply_settings(driver, isolation)
        except BaseException as exc:
            driver.terminate()
            if not isinstance(exc, Exception):
                raise
            raise self.translate(exc, doing="connect", writes=False) from exc
        return driver

    async def _connect_to_first(
        self, servers: Sequence[tuple[str, int]], wanted: str, failures: list[StorageError]
    ) -> Any:
        """A connection to the first server with the wanted role, or None. Adds the errors of the servers
        before it to `failures`."""
        for host, port in servers:
            host, port = host or "localhost", port or _PORT
            try:
                driver = await self._open(host, port)
            except UnavailableError as exc:
                failures.append(exc)
                continue
            try:
                role = await _server_role(driver)
            except BaseException as exc:
                driver.terminate()
                if not isinstance(exc, Exception):
                    raise
                failures.append(self._connection_failure(exc, host, port))
                continue
            if role.matches(wanted):
                _SESSIONS[driver] = _Session(on_standby=role.is_standby)
                return driver
            driver.terminate()
            failures.append(
                UnavailableError(
                    f"{host}:{port} is {role}, but target_session_attrs is "
                    f"{self._config.target_session_attrs!r}"
                )
            )
        return None

    async def _open(self, host: str, port: int) -> Any:
        config = self._config
        try:
            return await asyncpg.connect(
                self._dsn(),
                host=host,
                port=port,
                user=config.username or None,
                password=await self._password_for(host, port),
                database=config.name or None,
                timeout=config.connect_timeout or config.timeout,
                command_timeout=config.timeout + _GRACE,
                statement_cache_size=0
                if config.pgbouncer or not config.enable_query_cache
                else 512,
                server_settings=self._session_settings(),
                target_session_attrs="any",
            )
        except StorageError:
            raise
        except Exception as exc:  # an invalid response can make the driver raise anything
            raise self._connection_failure(exc, host, port) from exc

    async def _apply_settings(self, driver: Any, isolation: Isolation | None) -> None:
        """Set the session parameters that depend on the connection; see also `_session_settings`.

        Args:
            isolation: see `Connections`.
        """
        if self._config.pgbouncer:
            return  # the settings would remain in a server session that other clients use, too
        if _SESSIONS[driver].on_standby:
            # A standby has no serializable transactions. If it is promoted, this session must not
            # write at a lower isolation level than the configured one.
            isolation = "repeatable_read"
        if isolation is not None:
            level = isolation.replace("_", " ")
            await driver.execute(
                f"SET default_transaction_isolation = '{level}'; SET default_transaction_read_only = on"
            )

    def _check_files(self) -> None:
        """Check the files for TLS, so that an error names the configuration key and the file.

        Raises:
            ConfigurationError: a file cannot be used.
        """
        config = self._config
        if config.sslmode == "disable":
            return
        for key in ("sslrootcert", "sslcrl", "sslcert", "sslkey"):
            path = getattr(config, key)
            if not path:
                continue
            try:
                Path(path).read_bytes()
                if key in ("sslrootcert", "sslcrl"):
                    ssl.create_default_context(cafile=path)
            except ssl.SSLError as exc:
                raise ConfigurationError(f"{key}: {path!r} contains no PEM certificate") from exc
            except (OSError, ValueError) as exc:
                reason = getattr(exc, "strerror", None) or exc
                raise ConfigurationError(f"{key}: cannot read {path!r}: {reason}") from exc
        if config.sslkey and not config.sslcert:
            raise ConfigurationError("sslkey: sslcert is required, too")
        if config.sslcert:
            password = config.sslpassword.reveal() if config.sslpassword else ""
            try:
                ssl.create_default_context().load_cert_chain(
                    config.sslcert, config.sslkey or None, lambda: password
                )
            except (ssl.SSLError, ValueError) as exc:
                raise ConfigurationError(
                    f"sslcert, sslkey: {config.sslcert!r} and {config.sslkey!r} are not a "
                    "certificate and its key in PEM format, or sslpassword does not decrypt the key"
                ) from exc

    def _dsn(self) -> str:
        """A DSN with the options for TLS, which asyncpg does not accept as arguments."""
        from urllib.parse import quote, urlencode

        config = self._config
        query: dict[str, str] = {"sslmode": config.sslmode}
        for key in ("sslrootcert", "sslcert", "sslkey", "sslcrl"):
            if getattr(config, key):
                query[key] = getattr(config, key)
        if config.sslpassword:
            query["sslpassword"] = config.sslpassword.reveal()
        return f"postgresql:///?{urlencode(query, quote_via=quote)}"

    async def _password_for(self, host: str, port: int) -> str | None:
        config = self._config
        if self._password is None:
            return None if config.password is None else config.password.reveal()
        try:
            password = self._password(host, port, config.username)
            return password if isinstance(password, str) else await password
        except Exception as exc:  # the caller's own function can raise anything
            raise AuthenticationError(
                f"cannot connect to {host}:{port}: the password function failed ({type(exc).__name__})"
            ) from exc

    def _session_settings(self) -> dict[str, str]:
        """The session parameters of each connection; all others keep the defaults of the server."""
        config = self._config
        if config.pgbouncer:
            # Other settings would remain in a server session that other clients use, too.
            return {"application_name": config.application_name} if config.application_name else {}
        limit = str(int(config.timeout * 1000))
        settings = {
            "application_name": config.application_name or "hf_async_store",
            "default_transaction_isolation": config.isolation.replace("_", " "),
            "statement_timeout": limit,
            "lock_timeout": limit,
            "jit": "off",
        }
        if config.schema:
            settings["search_path"] = quoted(config.schema)
        if config.options:
            settings["options"] = config.options
        return settings

    def _connection_failure(self, exc: Exception, host: str, port: int) -> StorageError:
        """The error for a connection that could not be opened."""
        config = self._config
        doing = f"connect to {host}:{port}"
        if isinstance(exc, _SERVER_ERRORS):
            return self.translate(exc, doing=doing, writes=False)
        if isinstance(exc, asyncpg.ClientConfigurationError):
            return ConfigurationError(f"cannot {doing}: {exc}")
        if isinstance(exc, asyncpg.ProtocolError):
            return ProtocolError(
                f"cannot {doing}: the response is not from a PostgreSQL server: {exc}"
            )
        if _is_closed(exc):
            return UnavailableError(f"cannot {doing}: the server closed the new connection")
        if isinstance(exc, asyncpg.InterfaceError | asyncpg.InternalClientError):
            # The most common cause: the server requires a password, and none is configured.
            return AuthenticationError(f"cannot {doing}: {exc}; correct username or password")
        if isinstance(exc, ssl.SSLCertVerificationError):
            return ConfigurationError(
                f"cannot {doing}: sslmode {config.sslmode!r} does not trust its certificate: "
                f"{exc.verify_message}; see sslrootcert and host"
            )
        # The driver has no error class for this. A server that shuts down may cause the same error.
        needs_tls = config.sslmode in ("require", "verify-ca", "verify-full")
        if needs_tls and type(exc) is ConnectionError and "rejected SSL upgrade" in str(exc):
            return ConfigurationError(
                f"cannot {doing}: sslmode {config.sslmode!r} needs TLS, but the server does not "
                "support it, or is not a PostgreSQL server"
            )
        if isinstance(exc, UnicodeError):
            return ConfigurationError(f"cannot {doing}: host: not a valid host name")
        if isinstance(exc, OSError):  # includes TimeoutError
            return UnavailableError(
                f"cannot {doing}: {_not_connected(exc)}; is the server running? Check host and port"
            )
        return ProtocolError(f"cannot {doing}: the response is not from a PostgreSQL server")

    def is_lost(self, driver: Any) -> bool:
        if driver.is_closed():
            return True
        session = _SESSIONS[driver]
        if session.state_unknown or session.opened_at <= self._outdated_at:
            return True
        return session.on_standby and _setting(driver, "in_hot_standby") == "off"

    def _record_error(self, driver: Any, exc: BaseException) -> None:
        """Update the state of a connection after an error, and raise a more specific error if possible.

        Raises:
            SessionEndedError, _ServerReadOnlyError, _InvalidResponseError: the error has this cause.
        """
        if not isinstance(exc, Exception):
            # Outside a transaction, a cancelled operation may leave the session in one that the driver
            # does not know: the driver prepares statements with Flush, which begins an implicit
            # transaction, and Sync, which would end it, is sent by the execution. ROLLBACK ends it, too.
            _SESSIONS[driver].state_unknown |= not self.in_transaction(driver)
        elif isinstance(exc, asyncpg.ReadOnlySQLTransactionError):
            if self._is_outdated(driver):
                raise _ServerReadOnlyError(exc.message) from exc
        elif isinstance(exc, asyncpg.InterfaceError):
            # The driver itself rejected the statement; nothing was sent.
            if driver.is_closed():
                raise SessionEndedError from exc
        elif not isinstance(exc, _SERVER_ERRORS):
            _SESSIONS[driver].state_unknown = True
            if _is_closed(exc):
                raise SessionEndedError from exc
            if not isinstance(exc, OSError):
                # An invalid response can make the decoders raise anything.
                raise _InvalidResponseError(type(exc).__name__) from exc
        elif isinstance(exc, asyncpg.UnknownPostgresError):
            _SESSIONS[driver].state_unknown = True

    def _is_outdated(self, driver: Any) -> bool:
        """Whether a connection is too old to know the current role of the server, which can change.

        In this case, it and all older connections will be replaced.
        """
        session = _SESSIONS[driver]
        if session.opened_at <= self._outdated_at:
            return True
        now = time.monotonic()
        if now - session.opened_at < _ROLE_SECONDS:
            return False
        self._outdated_at = now
        return True

    async def rows(self, driver: Any, sql: str, args: Sequence[object]) -> Sequence[Sequence[Any]]:
        try:
            return cast("Sequence[Sequence[Any]]", await driver.fetch(sql, *args))
        except BaseException as exc:
            # The driver rejects a statement of the store only after an invalid response to its preparation.
            _SESSIONS[driver].state_unknown |= _is_rejected_by_driver(exc)
            self._record_error(driver, exc)
            raise

    async def _row(self, driver: Any, sql: str, args: Sequence[object] = ()) -> Sequence[Any]:
        """Run a statement that returns exactly one row."""
        rows = await self.rows(driver, sql, args)
        if len(rows) != 1:
            raise _InvalidResponseError(f"{len(rows)} rows instead of 1")
        return rows[0]

    async def fetch_dicts(
        self, driver: Any, sql: str, args: Sequence[object]
    ) -> list[dict[str, Value]]:
        try:
            return [dict(each) for each in await driver.fetch(sql, *args)]
        except BaseException as exc:
            self._record_error(driver, exc)
            raise

    async def fetch_batches(
        self, driver: Any, sql: str, args: Sequence[object], *, may_write: bool
    ) -> AsyncGenerator[Sequence[Sequence[Any]], None]:
        try:
            cursor = await driver.cursor(sql, *args)
            rows = await cursor.fetch(_CHUNK_SIZE)
        except BaseException as exc:
            self._record_error(driver, exc)
            raise
        while rows:
            yield rows
            if len(rows) < _CHUNK_SIZE:
                return
            try:
                rows = await cursor.fetch(_CHUNK_SIZE)
            except BaseException as exc:
                self._record_error(driver, exc)
                raise

    async def begin(self, driver: Any, isolation: Isolation | None) -> Any:
        if isolation is None and self._config.pgbouncer and not self.in_transaction(driver):
            isolation = self._config.isolation
        if isolation is not None and _SESSIONS[driver].on_standby:
            isolation = "repeatable_read"  # the highest level on a standby, which accepts no writes
        return await self._begin(driver, isolation=isolation)

    async def begin_reading(self, driver: Any, statements: Literal["one", "many"]) -> Any:
        # Not serializable: the predicate locks of a long read would be promoted from rows to the
        # whole table, and abort concurrent transactions.
        return await self._begin(driver, isolation="repeatable_read", readonly=True)

    async def _begin(self, driver: Any, **options: Any) -> _Transaction:
        try:
            transaction = driver.transaction(**options)
            await transaction.start()
        except BaseException as exc:
            # The driver may treat the transaction as begun, and would create savepoints from now on. After
            # a cancellation, the server may have begun it, which the driver does not know yet.
            _SESSIONS[driver].state_unknown |= not self.in_transaction(driver)
            self._record_error(driver, exc)
            raise
        return _Transaction(driver, transaction)

    async def commit(self, handle: _Transaction) -> None:
        try:
            await handle.transaction.commit()
        except BaseException as exc:
            self._record_error(handle.driver, exc)
            raise

    async def roll_back(self, handle: _Transaction) -> None:
        if _SESSIONS[handle.driver].state_unknown:
            # The server may never respond. It rolls back by itself when the connection is closed.
            handle.driver.terminate()
            return
        try:
            await handle.transaction.rollback()
        except BaseException as exc:
            self._record_error(handle.driver, exc)
            raise

    async def make_reusable(self, driver: Any) -> bool:
        return not self.is_lost(driver) and not self.in_transaction(driver)

    def in_transaction(self, driver: Any) -> bool:
        return not driver.is_closed() and bool(driver.is_in_transaction())

    async def reset(self, driver: Any) -> bool:
        if self._config.pgbouncer:
            return False  # outside a transaction, statements may run in another server session
        await driver.execute(_RESET)
        # Callers' statements never run on read-only connections.
        await self._apply_settings(driver, None)
        return True

    async def discard(self, driver: Any, *, in_use: bool) -> None:
        # The pool closes the connection, and the server rolls back. A server that may never respond
        # must not delay that. Closing a connection in use would first connect again, to cancel the
        # statement, which `statement_timeout` ends as well.
        if in_use or _SESSIONS[driver].state_unknown:
            # Terminating the connection would cancel the driver's requests to cancel its statements, and
            # one that is cancelled amid connecting leaves an exception that is never retrieved.
            if requests := [each for each in driver._cancellations if not each.done()]:
                await asyncio.wait(requests, timeout=_REQUEST_SECONDS)
            driver.terminate()

    async def is_same_store(self, mine: Any, theirs: Any) -> bool:
        if mine is theirs:
            return True
        async with self._rolled_back(mine), self._rolled_back(theirs):
            key = secrets.randbits(63)
            await self.rows(mine, "SELECT pg_catalog.pg_advisory_xact_lock($1::bigint)", (key,))
            # Advisory locks are local to a database, so only the same database has this lock.
            [free] = await self._row(
                theirs, "SELECT pg_catalog.pg_try_advisory_xact_lock($1::bigint)", (key,)
            )
            cluster, database, schema, is_standby = await self._row(mine, _IDENTITY)
            other = await self._row(theirs, _IDENTITY)
        their_cluster, their_database, their_schema, theirs_is_standby = other
        if (database, schema) != (their_database, their_schema):
            return False
        if not free:
            return True
        # A standby has separate locks, but the data of its primary.
        return cluster == their_cluster and bool(is_standby or theirs_is_standby)

    @asynccontextmanager
    async def _rolled_back(self, driver: Any, *, readonly: bool = True) -> AsyncIterator[Any]:
        """A transaction that is rolled back; behind pgbouncer, all its statements use the same server
        session."""
        handle = await self._begin(driver, isolation="read_committed", readonly=readonly)
        try:
            yield driver
        finally:
            await run_to_completion(self.roll_back(handle))

    def translate(
        self, exc: Exception, *, doing: str, writes: bool, callers: bool = False
    ) -> StorageError:
        if isinstance(exc, _ServerReadOnlyError):
            return ReadOnlyStoreError(
                f"cannot {doing}: {exc}; the server of this connection accepts no writes, and the "
                "connection is replaced: try again",
                retryable=True,
            )
        if isinstance(exc, SessionEndedError):
            # The driver discards what the server sends to an idle connection, so its SQLSTATE is unknown.
            return UnavailableError(
                f"cannot {doing}: the server had ended the session, and nothing was sent: the server was "
                "restarted or shut down, an administrator ended the session, or it was idle for longer "
                "than idle_in_transaction_session_timeout or idle_session_timeout allow"
            )
        if (known := _of_own_tables(exc, doing, callers=callers)) is not None:
            return known
        if isinstance(exc, asyncpg.ConnectionDoesNotExistError) and isinstance(
            exc.__cause__, asyncpg.PostgresError
        ):
            exc = exc.__cause__  # the reason why the server closed the connection
        if _is_closed(exc):
            return UnavailableError(
                f"cannot {doing}: the server had closed the connection, and nothing was sent"
            )
        if _is_rejected_by_driver(exc):
            if callers:
                return InvalidInputError(f"execute_with_lock: {_rejection(exc)}")
            return ProtocolError(f"cannot {doing}: {_rejection(exc)}")
        if isinstance(exc, _SERVER_ERRORS) and exc.sqlstate is not None:
            # Only `message`, because the details contain stored data.
            return postgres_error(
                exc.sqlstate, exc.message or str(exc), doing=doing, writes=writes, callers=callers
            )
        if isinstance(exc, OSError):
            timed_out = isinstance(exc, TimeoutError)
            return connection_error(exc, doing=doing, writes=writes, timed_out=timed_out)
        return ProtocolError(
            f"cannot {doing}: the response of the server is invalid ({exc or type(exc).__name__})",
            retryable=not writes,
            outcome_unknown=writes,
        )

    # -- the schema --------------------------------------------------------------------------

    async def untrusted_owners(
        self, driver: Any, tables: Sequence[str], declared: Sequence[str]
    ) -> dict[str, str]:
        rows = await self.rows(driver, _UNTRUSTED_OWNERS, (list(tables), list(declared)))
        return {str(table): str(owner) for table, owner in rows}

    async def relations(self, driver: Any) -> dict[str, Relation]:
        rows = await self.rows(driver, _RELATIONS, ())
        return {name: Relation(kind, table) for name, kind, table in rows}

    async def view_reads(self, driver: Any, view: str, table: str) -> bool:
        return bool(await self.rows(driver, _VIEW_READS, (view, table)))

    async def schema_name(self, driver: Any) -> str:
        """The name of the schema in which the tables are."""
        [schema] = await self._row(driver, "SELECT current_schema()::text")
        return str(schema)

    async def lock_key(self, driver: Any, purpose: str) -> int:
        """The key of an advisory lock: that of a purpose, for this store in its database."""
        schema = await self.schema_name(driver)
        place = f"{purpose}\0{schema}\0{self.names.prefix}".encode()
        return int.from_bytes(blake2b(place, digest_size=8).digest(), "big", signed=True)

    @property
    def timeout(self) -> float:
        """The setting `timeout`."""
        return self._config.timeout

    async def run_unlimited(self, driver: Any, sql: str) -> None:
        """Run statements outside a transaction that may take very long."""
        try:
            await driver.execute(sql, timeout=_UNLIMITED)
        except BaseException as exc:
            self._record_error(driver, exc)
            raise

    async def read_committed(
        self, driver: Any, sql: str, args: Sequence[object]
    ) -> Sequence[Sequence[Any]]:
        """The rows of a statement that reads much, and must be no reason for others to fail."""
        async with self._rolled_back(driver):
            return await self.rows(driver, sql, args)

    async def begin_ddl(self, driver: Any) -> Any:
        """See `Dialect`.

        Serializable, so that of a transaction that read the catalogue before a reference was declared, and
        those that rely on the reference, one fails. It reads nothing before it has locked the catalogue,
        and so sees what the previous holder of the lock created.
        """
        sql = f"LOCK TABLE {quoted(self.names.catalogue)} IN SHARE ROW EXCLUSIVE MODE"
        while True:
            handle = await self._begin(driver, isolation="serializable")
            try:
                await self.rows(driver, sql, ())
            except asyncpg.UndefinedTableError:
                await run_to_completion(self.roll_back(handle))
            except BaseException as exc:
                await run_to_completion(self.roll_back(handle))
                if isinstance(exc, asyncpg.PostgresError):
                    raise self.translate(exc, doing=f"run {sql}", writes=False) from exc
                raise
            else:
                return handle
            creating = await self._begin_creating(driver)
            if creating is not None:
                return creating

    async def _begin_creating(self, driver: Any) -> _Transaction | None:
        """As `begin_ddl`, to create a store; None if another process has created it meanwhile."""
        handle = await self._begin(driver, isolation="read_committed")
        try:
            lock = "SELECT pg_catalog.pg_advisory_xact_lock($1::bigint)"
            await self.rows(driver, lock, (await self.lock_key(driver, "create"),))
            if self.names.catalogue not in await self.relations(driver):
                return handle
        except BaseException:
            await run_to_completion(self.roll_back(handle))
            raise
        await run_to_completion(self.roll_back(handle))
        return None

    def scratch(self, driver: Any) -> AbstractAsyncContextManager[Any]:
        return self._rolled_back(driver, readonly=False)

    # -- the rest ----------------------------------------------------------------------------

    async def explain(
        self,
        driver: Any,
        sql: str,
        args: Sequence[object],
        indexes: Mapping[str, Index],
        paths: int,
    ) -> QueryPlan:
        [plans] = await self._row(driver, f"EXPLAIN (FORMAT JSON) {sql}", args)
        nodes = _nodes(plans[0]["Plan"])  # SQLAlchemy makes the driver decode JSON
        scans = [each for each in nodes if each.get("Alias") == "t" or "Index Name" in each]
        names = [str(each["Index Name"]) for each in scans if "Index Cond" in each]
        index = next((indexes[each] for each in names if each in indexes), None)
        return QueryPlan(
            access="index" if index is not None else "key" if names else "scan",
            index=None if index is None else index.name,
            residual=any("Filter" in each for each in scans),
            sorted_here=any("Sort" in str(each["Node Type"]) for each in nodes),
            detail=" < ".join(_described(each) for each in nodes),
        )

    async def health(self, driver: Any, tables: Mapping[str, str]) -> dict[str, Value]:
        began = time.time()
        version, size, recovering, used, most, clock = await self._row(driver, _HEALTH)
        difference = clock - (began + time.time()) / 2
        sizes = await self.rows(driver, _SIZES, (list(tables),))
        problems: list[Value] = []
        if recovering:
            problems.append("the server is a standby and accepts no writes")
        if used >= most * 0.9:
            problems.append(f"{used} of the server's {most} connections are in use")
        return {
            "server_version": version,
            "database_bytes": size,
            "table_bytes": {tables[table]: number for table, number in sizes},
            "server_connections": used,
            "server_max_connections": most,
            "server_clock_ahead_seconds": round(difference, 3),
            "problems": problems,
        }

    def describe(self) -> dict[str, Value]:
        config = self._config
        servers = [f"{host or 'localhost'}:{port or _PORT}" for host, port in config.servers()]
        return {"server": ",".join(servers), "database": config.name or config.username}

    def strip_for_update(self, sql: str) -> str:
        return sql


# As `DISCARD ALL`, but without deallocating the prepared statements of the driver.
_RESET: Final = """
CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; UNLISTEN *;
SELECT pg_advisory_unlock_all(); DISCARD PLANS; DISCARD TEMP; DISCARD SEQUENCES;
DO $$DECLARE prepared text; BEGIN
    FOR prepared IN SELECT name FROM pg_prepared_statements WHERE from_sql LOOP
        EXECUTE 'DEALLOCATE ' || quote_ident(prepared);
    END LOOP;
END$$
"""

# A cast to regnamespace would parse the name, and fail for a name that needs quotes.
_SCHEMA: Final = "(SELECT oid FROM pg_catalog.pg_namespace WHERE nspname = current_schema())"

# Another role may have created functions and operators in the schema. The server would prefer one that
# matches the types of the arguments better than that of pg_catalog. So no argument needs a conversion.
_RELATIONS: Final = f"""
SELECT c.relname::text, CASE
    WHEN i.indisvalid = false THEN '{INVALID}' WHEN c.relkind = 'i'::"char" THEN 'index'
    WHEN c.relkind = 'v'::"char" THEN 'view' WHEN c.relkind = 'c'::"char" THEN 'type' ELSE 'table' END,
    coalesce(o.relname::text, ''::text)
FROM pg_catalog.pg_class AS c LEFT JOIN pg_catalog.pg_index AS i ON i.indexrelid = c.oid
LEFT JOIN pg_catalog.pg_class AS o ON o.oid = i.indrelid
WHERE c.relnamespace = {_SCHEMA} AND c.relkind IN ('r', 'p', 'f', 'v', 'm', 'i', 'I', 'S', 'c')
UNION ALL SELECT pg_catalog.concat(g.tgname, ' ON '::text, t.relname), 'trigger', t.relname::text
FROM pg_catalog.pg_trigger AS g JOIN pg_catalog.pg_class AS t ON t.oid = g.tgrelid
WHERE t.relnamespace = {_SCHEMA} AND g.tgenabled IN ('O'::"char", 'A'::"char") AND NOT g.tgisinternal
"""

_VIEW_READS: Final = f"""
SELECT 1 FROM pg_catalog.pg_class AS v
JOIN pg_catalog.pg_rewrite AS r ON r.ev_class = v.oid
JOIN pg_catalog.pg_depend AS d ON d.objid = r.oid
JOIN pg_catalog.pg_class AS t ON t.oid = d.refobjid
WHERE v.relnamespace = {_SCHEMA} AND v.relname::text = $1::text
    AND t.relnamespace = {_SCHEMA} AND t.relname::text = $2::text LIMIT 1
"""

_UNTRUSTED_OWNERS: Final = f"""
SELECT c.relname::text, r.rolname::text FROM pg_class AS c
JOIN pg_roles AS r ON r.oid = c.relowner
JOIN pg_namespace AS n ON n.oid = c.relnamespace
JOIN pg_database AS d ON d.datname = current_database()
WHERE c.relnamespace = {_SCHEMA} AND c.relname::text = ANY($1::text[])
    AND NOT (r.rolsuper OR pg_catalog.pg_has_role(c.relowner, 'USAGE'::text)
        OR c.relowner = n.nspowner OR c.relowner = d.datdba
        OR EXISTS (
            SELECT 1 FROM pg_class AS o WHERE o.relnamespace = c.relnamespace
            AND o.relowner = c.relowner AND o.relname::text = ANY($2::text[])
        ))
"""

_HEALTH: Final = """
SELECT current_setting('server_version'), pg_database_size(current_database()),
    pg_is_in_recovery(), (
        SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'::text
    ),
    current_setting('max_connections')::int,
    pg_catalog.date_part('epoch'::text, pg_catalog.clock_timestamp())
"""

_SIZES: Final = f"""
SELECT relname::text, pg_catalog.pg_total_relation_size(oid::regclass) FROM pg_class
WHERE relnamespace = {_SCHEMA} AND relname::text = ANY($1::text[]) ORDER BY 1
"""


_IDENTITY: Final = f"""
SELECT system_identifier, (SELECT oid FROM pg_database WHERE datname = current_database()),
    {_SCHEMA}, pg_is_in_recovery()
FROM pg_control_system()
"""


class _ServerRole(NamedTuple):
    """The current role of a server."""

    is_standby: bool
    is_read_only: bool

    def matches(self, wanted: str) -> bool:
        """Whether it matches a value of `target_session_attrs`."""
        kinds = {
            "any": True,
            "read-write": not self.is_read_only,
            "read-only": self.is_read_only,
            "primary": not self.is_standby,
            "standby": self.is_standby,
        }
        return kinds[wanted]

    def __str__(self) -> str:
        if self.is_standby:
            return "a standby"
        return "read-only" if self.is_read_only else "a primary that accepts writes"


async def _server_role(driver: Any) -> _ServerRole:
    standby = _setting(driver, "in_hot_standby")
    read_only = _setting(driver, "default_transaction_read_only")
    if standby is None or read_only is None:  # before PostgreSQL 14, and behind pgbouncer
        [[is_standby, read_only]] = await driver.fetch(
            "SELECT pg_is_in_recovery(), current_setting('default_transaction_read_only')"
        )
        standby = "on" if is_standby else "off"
    return _ServerRole(standby == "on", "on" in (standby, read_only))


def _setting(driver: Any, name: str) -> str | None:
    """A setting as the server reported it last; None if it does not report it."""
    return cast("str | None", getattr(driver.get_settings(), name, None))


def _of_own_tables(exc: Exception, doing: str, *, callers: bool) -> StorageError | None:
    """The error for a statement that was made for tables, or a catalogue, that have changed since, or that
    violated a unique index of this store."""
    if isinstance(exc, asyncpg.UniqueViolationError) and not callers:
        is_own = is_unique_index(str(exc.constraint_name), str(exc.table_name))
        return DuplicateValueError(f"cannot {doing}: a value is not unique") if is_own else None
    if isinstance(exc, asyncpg.InvalidCachedStatementError):
        return ConcurrencyConflictError(
            f"cannot {doing}: the tables were changed since the statement was prepared: try again",
            retryable=True,
        )
    if isinstance(exc, asyncpg.CheckViolationError):
        stale = str(exc.constraint_name).startswith(GENERATION_PREFIX)
    else:
        stale = isinstance(exc, asyncpg.InvalidTextRepresentationError) and CHANGED in str(exc)
    return CatalogueChangedError() if stale and not callers else None


def _not_connected(exc: OSError) -> str:
    """The reason why no connection was opened. For a refused one, the driver only has the address."""
    if isinstance(exc, ConnectionRefusedError):
        return "connection refused"
    return exc.strerror or str(exc) or "no response in time (connect_timeout)"


def _is_closed(exc: Exception) -> bool:
    """Whether the driver sent nothing because the server had ended the session.

    The driver has no class for this; SQLAlchemy, too, looks at the message.
    """
    if isinstance(exc, asyncpg.InternalClientError):
        return str(exc).startswith(_NOT_SENT)
    return isinstance(exc, asyncpg.InterfaceError) and str(exc).endswith("connection is closed")


def _is_rejected_by_driver(exc: BaseException) -> bool:
    """Whether the driver itself rejected a statement or its arguments.

    For invalid arguments it raises an exception class of the server's errors, but without the
    severity that the server always sends.
    """
    if isinstance(exc, asyncpg.DataError):
        return exc.severity is None
    return isinstance(exc, asyncpg.InterfaceError)


def _rejection(exc: Exception) -> str:
    """The reason why the driver rejected a statement, without the argument that its message contains."""
    match = re.match(r"invalid input for query argument (\$[0-9]+)", str(exc))
    if match is not None:
        return f"the argument for {match[1]} does not have the type that the statement requires"
    return str(exc).partition("\n")[0]


def _provider(name: str) -> PasswordProvider | None:
    if not name:
        return None
    module, _, attribute = name.partition(":")
    try:
        return cast("PasswordProvider", getattr(import_module(module), attribute))
    except (ImportError, AttributeError, ValueError) as exc:
        raise ConfigurationError(
            f"login_provider: {name!r} is not a module:function that can be imported"
        ) from exc


def _nodes(plan: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The nodes of a plan, from the top down."""
    nodes = [plan]
    for each in plan.get("Plans", ()):
        nodes += _nodes(each)
    return nodes


def _described(node: Mapping[str, Any]) -> str:
    names = ("Index Name", "Relation Name", "Index Cond", "Filter", "Sort Key")
    more = (f"{name.lower()} {node[name]}" for name in names if name in node)
    return ", ".join((str(node["Node Type"]), *more))
