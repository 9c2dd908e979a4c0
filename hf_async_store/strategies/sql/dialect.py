"""The interface of a database system: everything that differs between SQLite and PostgreSQL."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

from hf_async_store.driver import Capabilities, Isolation, QueryPlan, run_to_completion
from hf_async_store.values import Value

if TYPE_CHECKING:
    from sqlalchemy import MetaData
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.types import TypeEngine

    from hf_async_store.errors import StorageError
    from hf_async_store.schema import Field, Index, Schema
    from hf_async_store.strategies.sql.compiler import Arguments, SortPart
    from hf_async_store.strategies.sql.row_mapping import Kind
    from hf_async_store.values import FieldType


class BulkUpsert(NamedTuple):
    """Whole entities with the same statement key, to be written in bulk.

    Attributes:
        parents: for each reference, a statement that counts how many ids of a list exist, and that
            list.
        versions: a statement that selects the stored versions for a list of ids; None if they are
            not needed.
        fresh: whether every entity must be absent.
        text: returns the SQL of the statement for a number of rows.
        columns: the arguments of the statement by column, the id first.
    """

    parents: Sequence[tuple[str, Sequence[str]]]
    versions: str | None
    fresh: bool
    text: Callable[[int], str]
    columns: Sequence[Sequence[object]]


class ImportStatements(Protocol):
    """Statements that write many rows, and return only the number of rows that were written.

    Attributes:
        before, after: the statements to run before and after the transaction that contains them;
            `after` runs even if the transaction fails.
    """

    before: str
    after: str

    def blocks(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """How to divide this many rows: pairs of rows per statement and number of executions."""
        ...

    def values(self, columns: int, rows: int) -> str:
        """As `Dialect.values_source`, with one parameter for each value of each row."""
        ...

    async def run(self, driver: Any, sql: str, arg_lists: Sequence[Sequence[object]]) -> int:
        """Run a statement once for each list of arguments; returns how many rows were written."""
        ...


class SessionEndedError(Exception):
    """The server ended the session before the statement was sent. Part of `driver_errors`."""


class Dialect(ABC):
    """A database system: its driver, its SQL and its limits."""

    capabilities: Capabilities
    driver_errors: ClassVar[tuple[type[Exception], ...]]
    """The exceptions that the driver raises; `translate` accepts all of them."""

    caller_errors: ClassVar[tuple[type[Exception], ...]]
    """Further exceptions that it raises for an invalid statement or invalid arguments of a caller."""

    placeholder_prefix: ClassVar[str]
    """The prefix of the number of a parameter."""

    single_writer: ClassVar[bool]
    """Whether only one connection can write at a time."""

    separate_read_pool: bool
    """Whether reads by key use a separate pool, whose connections never write."""

    needs_transactions: bool
    """Whether even a single statement must run in an explicit transaction."""

    batches_commit_together: ClassVar[bool]
    """Whether the statements of one batch of independent changes share a transaction."""

    bulk: ClassVar[ImportStatements | None]
    """The statements for imports; None if imports use the same statements as other writes."""

    inline_references: ClassVar[bool]
    """Whether CREATE TABLE declares the foreign keys, which then cannot be added or dropped later."""

    to_column: Mapping[str, Callable[[Any], tuple[object, bool]]]
    """By field type: converts a value for its column. Returns also whether the column stores it exactly.

    A type that is not listed needs no conversion.
    """

    from_column: Mapping[str, Callable[[Any], Value]]
    """By field type: converts what a SELECT returns to a value. A type that is not listed needs no
    conversion."""

    @abstractmethod
    def json_text(self, value: Value) -> tuple[str, bool]:
        """A value encoded for a JSON column, and whether the column stores it exactly."""

    # -- the driver --------------------------------------------------------------------------

    @abstractmethod
    def engine(self, *, size: int, overflow: int, read_only: bool) -> AsyncEngine:
        """An engine with a pool of connections, none of them open yet."""

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

    async def bulk_upsert_locked(self, driver: Any, puts: BulkUpsert) -> dict[str, int] | None:
        """Read first and then write, in a transaction during which no other connection can write.

        Returns the versions of the entities that existed before. Returns None, and writes nothing,
        if a precondition is not met or the dialect does not support this.
        """
        return None

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
    async def discard(self, driver: Any) -> None:
        """Close a connection whose state is unknown, if invalidating it in its pool does not do so."""

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

    @abstractmethod
    async def is_same_store(self, mine: Any, theirs: Any) -> bool:
        """Whether the connections of two stores of this dialect access the same tables.

        Raises:
            StorageError, driver_errors: it cannot be determined.
        """

    # -- the schema --------------------------------------------------------------------------

    @abstractmethod
    def column_type(self, kind: FieldType | Kind) -> TypeEngine[Any]: ...

    @abstractmethod
    def index_expression(self, column: Any, field: Field) -> Any:
        """The expression that an index of a column contains."""

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
    async def reflect_tables(self, driver: Any) -> list[str]:
        """The names of all existing tables."""

    @abstractmethod
    async def reflect_columns(
        self, driver: Any, tables: Sequence[str]
    ) -> dict[str, dict[str, str]]:
        """By table and column, the types of the existing columns of these tables."""

    @abstractmethod
    async def reflect_indexes(self, driver: Any, tables: Sequence[str]) -> dict[str, str]:
        """By name, the definitions of the existing indexes of these tables; "" for a constraint."""

    @abstractmethod
    def same_type(self, existing: str, kind: FieldType | Kind) -> bool: ...

    @abstractmethod
    async def begin_ddl(self, driver: Any) -> Any:
        """Begin a transaction for DDL; it excludes every other transaction for DDL."""

    @abstractmethod
    def extra_ddl(
        self, schema: Schema, metadata: MetaData, existing: Mapping[str, str]
    ) -> list[str]:
        """The statements for what the schema needs besides tables, columns and declared indexes.

        Args:
            existing: as `reflect_indexes` returns it.
        """

    # -- grammar: writes ---------------------------------------------------------------------

    @abstractmethod
    def batches(self, rows: int) -> list[int]:
        """How to divide this many rows into statements."""

    @abstractmethod
    def statement_variant(self, rows: int) -> int:
        """A number that is equal for all numbers of rows for which the SQL is the same."""

    @abstractmethod
    def values_source(self, kinds: Sequence[Kind], rows: int) -> str:
        """The item of a FROM clause that provides rows of arguments as `i (c0, c1, ...)`."""

    @abstractmethod
    def bind_columns(
        self, columns: Sequence[Sequence[object]], kinds: Sequence[Kind]
    ) -> Sequence[object]:
        """The arguments of `values_source`, given the columns of its rows."""

    @abstractmethod
    def cast_input(self, column: str, kind: Kind) -> str:
        """A column of `values_source`, converted to its kind."""

    @abstractmethod
    def json_merge(self, column: str, sets: str, removes: str) -> str:
        """The JSON object of a column, without the members named in the JSON list `removes`, and with
        those of the JSON object `sets`; NULL if empty."""

    @abstractmethod
    def size(self, column: str) -> str:
        """The number of bytes of a text or JSON column; NULL for NULL."""

    @abstractmethod
    def deletion(self, table: str, key: str, rows: int, *, versions: bool) -> str:
        """A DELETE of rows `t` by key, and by version if `versions` is true; conditions can be appended."""

    # -- grammar: reads ----------------------------------------------------------------------

    @abstractmethod
    def read(self, column: str, kind: Kind) -> str:
        """The expression by which a SELECT reads a column."""

    @abstractmethod
    def parameter(self, number: int, kind: Kind) -> str: ...

    @abstractmethod
    def argument(self, value: Any, kind: Kind) -> object:
        """A value, converted to the type that the driver requires for a parameter of this kind."""

    @abstractmethod
    def one_of(self, expression: str, values: Sequence[Any], kind: Kind, args: Arguments) -> str:
        """The condition that a column equals one of some values of its kind."""

    @abstractmethod
    def one_of_ids(self, expression: str) -> str:
        """The condition that a key is in a list, which is the first and only argument."""

    @abstractmethod
    def index_prefix(self, expression: str) -> str | None:
        """The prefix of a string that an index contains; None if it contains the whole string."""

    @abstractmethod
    def has_overflow(self, name: str) -> str:
        """The condition that the overflow column contains a declared field; it is never NULL."""

    @abstractmethod
    def contains_string(self, expression: str, part: str) -> str: ...

    @abstractmethod
    def ordered(self, part: SortPart, *, descending: bool) -> str:
        """An item of an ORDER BY; ascending, NULL sorts first, and descending, last."""

    @abstractmethod
    def json_test(
        self, base: str, steps: Sequence[str | int], op: str, value: Value, args: Arguments
    ) -> tuple[str, bool]:
        """The condition that an operator on a path in a JSON column is true.

        Returns also whether the condition is exact; otherwise it accepts more rows.
        """

    @abstractmethod
    def json_order(self, base: str, steps: Sequence[str | int], args: Arguments) -> SortPart | None:
        """The expression that sorts by a path in a JSON column; None if the engine has none."""

    @abstractmethod
    def order_argument(self, value: Value) -> object:
        """A value, converted to what the expression of `json_order` is compared with."""

    # -- the rest ----------------------------------------------------------------------------

    @abstractmethod
    async def explain(
        self,
        driver: Any,
        sql: str,
        args: Sequence[object],
        indexes: Mapping[str, Index],
        comparisons: int,
    ) -> QueryPlan:
        """The plan of the engine for a SELECT.

        Args:
            indexes: the declared indexes by their names in SQL.
            comparisons: the number of comparisons in the filter.
        """

    @asynccontextmanager
    async def scratch(self, driver: Any) -> AsyncIterator[Any]:
        """A connection for temporary tables: no other connection sees them, and they are dropped
        afterwards.

        Args:
            driver: a connection to the store; None if the store does not exist.
        """
        handle = await self.begin_ddl(driver)
        try:
            yield driver
        finally:
            await run_to_completion(self.roll_back(handle))

    @abstractmethod
    async def health(self, driver: Any, tables: Sequence[str]) -> dict[str, Value]: ...

    @abstractmethod
    def describe(self) -> dict[str, Value]:
        """The location of the data."""

    @abstractmethod
    def strip_for_update(self, sql: str) -> str:
        """The caller's statement, without a trailing FOR UPDATE if the engine does not support it."""
