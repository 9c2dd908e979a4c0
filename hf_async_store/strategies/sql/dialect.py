"""The interface of a database system and its driver: what differs between SQLite and PostgreSQL."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar

from hf_async_store.driver import Capabilities, Isolation, QueryPlan, run_to_completion
from hf_async_store.values import Value

if TYPE_CHECKING:
    from hf_async_store.errors import StorageError
    from hf_async_store.schema import Index
    from hf_async_store.strategies.sql.grammar import Grammar
    from hf_async_store.strategies.sql.names import Names

Result = TypeVar("Result")


class Relation(NamedTuple):
    """An existing table, view, index or trigger; `table`: of an index or trigger, its table."""

    kind: str
    table: str = ""


class SessionEndedError(Exception):
    """The server ended the session before the statement was sent. Part of `driver_errors`."""


class Dialect(ABC):
    """A database system: its driver, its SQL and its limits."""

    capabilities: Capabilities
    driver_errors: ClassVar[tuple[type[Exception], ...]]
    """The exceptions that the driver raises; `translate` accepts all of them."""

    caller_errors: ClassVar[tuple[type[Exception], ...]]
    """Further exceptions that it raises for an invalid statement or invalid arguments of a caller."""

    url: ClassVar[str]
    """That of SQLAlchemy, which names the driver."""

    placeholder_prefix: ClassVar[str]
    """The prefix of the number of a parameter."""

    single_writer: ClassVar[bool]
    """Whether only one connection can write at a time."""

    separate_read_pool: bool
    """Whether reads by key, and small queries, use separate pools, whose connections never write."""

    reads_alone: bool
    """Whether a query of one statement needs no transaction, on a connection of the main pool, either."""

    needs_transactions: bool
    """Whether even a single statement must run in an explicit transaction."""

    grammar: Grammar
    names: Names

    # -- the driver --------------------------------------------------------------------------

    @abstractmethod
    async def connect(self, isolation: Isolation | None = None, *, streams: bool = False) -> Any:
        """A new connection, which the caller closes.

        Args:
            isolation, streams: see `Connections`.
        """

    def exists(self) -> bool:
        """Whether the file of the store exists. For a server, always true: only connecting shows it."""
        return True

    def create_file(self) -> None:
        """Create the file of the store, before the first write.

        Raises:
            StorageError: it cannot be created.
        """
        return

    def check_file(self, driver: Any) -> None:
        """Check that the file that a connection has open is still the one at the path of the store.

        Raises:
            DataFileConflictError: it is not.
        """
        return

    async def prepare_writing(self, driver: Any) -> None:
        """Apply the settings that a file needs before the first write; a reader does not change it."""
        return

    async def reset(self, driver: Any) -> bool:
        """Undo what a caller's own SQL changed in a session; returns whether it can be used again."""
        return False

    @abstractmethod
    def in_transaction(self, driver: Any) -> bool: ...

    async def job(
        self, driver: Any, work: Callable[[Any], Result], *, completes: bool = True
    ) -> Result:
        """Call a function with the connection of the driver, in its thread.

        Only for a driver that has one. If the function could not acquire the write lock, it is
        called again.

        Args:
            completes: a cancellation is raised after the function has returned, and not before.
        """
        raise NotImplementedError

    @abstractmethod
    def is_lost(self, driver: Any) -> bool:
        """Whether a connection of the pool is known to be broken."""

    @abstractmethod
    async def rows(self, driver: Any, sql: str, args: Sequence[object]) -> Sequence[Sequence[Any]]:
        """Run one statement and read all its rows."""

    @abstractmethod
    async def fetch_dicts(
        self, driver: Any, sql: str, args: Sequence[object]
    ) -> list[dict[str, Value]]:
        """As `rows`, with each row as a dict by column name."""

    @abstractmethod
    def fetch_batches(
        self, driver: Any, sql: str, args: Sequence[object], *, may_write: bool
    ) -> AsyncGenerator[Sequence[Sequence[Any]], None]:
        """Run one statement and read its rows in batches, from a cursor.

        Args:
            may_write: the connection may write before the last row was read; the rows must not
                show that.
        """

    @abstractmethod
    async def begin(self, driver: Any, isolation: Isolation | None) -> Any:
        """Begin a transaction that may write, or a savepoint inside one; returns its handle."""

    @abstractmethod
    async def begin_reading(self, driver: Any, statements: Literal["one", "many"]) -> Any:
        """Begin a transaction that reads one snapshot; returns its handle.

        Returns None if one statement reads one snapshot without a transaction.
        """

    @abstractmethod
    async def commit(self, handle: Any) -> None: ...

    @abstractmethod
    async def roll_back(self, handle: Any) -> None: ...

    @abstractmethod
    async def make_reusable(self, driver: Any) -> bool:
        """Roll back what a failure left open; returns whether the connection can return to the pool."""

    @abstractmethod
    async def discard(self, driver: Any, *, in_use: bool) -> None:
        """Close a connection, if invalidating it in its pool does not do so.

        Args:
            in_use: a statement may be running on it.
        """

    @abstractmethod
    def translate(
        self, exc: Exception, *, doing: str, writes: bool, callers: bool = False
    ) -> StorageError:
        """The `StorageError` for an exception of the driver.

        Args:
            doing: what failed, for the message, after "cannot".
            writes: the failed statement may have written and committed.
            callers: the caller's own statement raised it.
        """

    @contextmanager
    def translating(self, doing: str) -> Iterator[None]:
        """Translate the exceptions of the driver, of calls that do not write and commit.

        What uses a driver, and not a lease, is inside one of these.
        """
        try:
            yield
        except self.driver_errors as exc:
            raise self.translate(exc, doing=doing, writes=False) from exc

    @abstractmethod
    async def is_same_store(self, mine: Any, theirs: Any) -> bool:
        """Whether the connections of two stores of this dialect with the same `names` access the same
        tables.

        Raises:
            StorageError, driver_errors: it cannot be determined.
        """

    # -- the schema --------------------------------------------------------------------------

    async def untrusted_owners(
        self, driver: Any, tables: Sequence[str], declared: Sequence[str]
    ) -> dict[str, str]:
        """By table, the owner of each table that belongs to an untrusted role.

        A role is trusted if it is a superuser, if this role has its privileges, or if it owns the
        database, the schema or a declared table. Code that an untrusted role attached to a table
        (policies, triggers, checks) would run with the privileges of this role.
        """
        return {}

    @abstractmethod
    async def relations(self, driver: Any) -> dict[str, Relation]:
        """By name, each existing "table", "view" and "index"."""

    @abstractmethod
    async def view_reads(self, driver: Any, view: str, table: str) -> bool:
        """Whether a view reads a table."""

    @abstractmethod
    async def begin_ddl(self, driver: Any) -> Any:
        """Begin a transaction for DDL; it excludes every other transaction for DDL."""

    @asynccontextmanager
    async def changing_tables(self, driver: Any) -> AsyncIterator[None]:
        """A transaction for DDL: see `begin_ddl`."""
        handle = await self.begin_ddl(driver)
        try:
            yield
        except BaseException:
            await run_to_completion(self.roll_back(handle))
            raise
        await run_to_completion(self.commit(handle))

    # -- the rest ----------------------------------------------------------------------------

    @abstractmethod
    async def explain(
        self,
        driver: Any,
        sql: str,
        args: Sequence[object],
        indexes: Mapping[str, Index],
        paths: int,
    ) -> QueryPlan:
        """The plan of the engine for a SELECT.

        Args:
            indexes: the declared indexes by their names in SQL.
            paths: the number of paths in the filter.
        """

    @abstractmethod
    def scratch(self, driver: Any) -> AbstractAsyncContextManager[Any]:
        """A connection for temporary tables: no other connection sees them, and they are dropped
        afterwards.

        Args:
            driver: a connection to the store; None if the store does not exist.
        """

    @abstractmethod
    async def health(self, driver: Any, tables: Mapping[str, str]) -> dict[str, Value]:
        """The state of the database.

        Args:
            tables: by the name of a table, its collection.
        """

    @abstractmethod
    def describe(self) -> dict[str, Value]:
        """The location of the data."""

    @abstractmethod
    def strip_for_update(self, sql: str) -> str:
        """The caller's statement, without a trailing FOR UPDATE if the engine does not support it."""
