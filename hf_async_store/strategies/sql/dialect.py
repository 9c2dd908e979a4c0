"""What differs between SQLite and PostgreSQL, for the rest of the strategy."""

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
    """Whole entities of one shape, to be written in bulk.

    Attributes:
        parents: for each reference, a statement that counts those of a list of ids that are there,
            and that list.
        versions: a statement that selects the stored versions of a list of ids; None where they do
            not matter.
        fresh: whether none of them may be there.
        text: the statement for so many rows.
        columns: what it takes, the id first.
    """

    parents: Sequence[tuple[str, Sequence[str]]]
    versions: str | None
    fresh: bool
    text: Callable[[int], str]
    columns: Sequence[Sequence[object]]


class ImportStatements(Protocol):
    """Statements that write many rows, and return nothing but how many.

    Attributes:
        before, after: what is run around a transaction of them, however it ends.
    """

    before: str
    after: str

    def blocks(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """How to divide this many rows: pairs of rows per statement and repetitions."""
        ...

    def values(self, columns: int, rows: int) -> str:
        """`Dialect.values_source`, of rows whose every column is a parameter."""
        ...

    async def run(self, driver: Any, sql: str, blocks: Sequence[Sequence[object]]) -> int:
        """Run a statement for each block of parameters; how many rows were written."""
        ...


class SessionEndedError(Exception):
    """The server ended a session before what was asked of it was sent; of `driver_errors`."""


class Dialect(ABC):
    """One database system: its driver, its SQL, its limits."""

    capabilities: Capabilities
    driver_errors: ClassVar[tuple[type[Exception], ...]]
    """What the driver raises; `translate` knows what it means."""

    caller_errors: ClassVar[tuple[type[Exception], ...]]
    """What else it raises for a statement or arguments that it does not take at all."""

    placeholder_prefix: ClassVar[str]
    """What stands before the number of a parameter."""

    single_writer: ClassVar[bool]
    """Whether only one connection can write at a time."""

    separate_read_pool: bool
    """Whether gets by key should have connections of their own, which never write."""

    needs_transactions: bool
    """Whether a statement by itself must be put into a transaction, to run as it should."""

    batches_commit_together: ClassVar[bool]
    """Whether the statements of one batch of independent changes share a transaction."""

    bulk: ClassVar[ImportStatements | None]
    """How imports get statements of their own; None where those of any write do as well."""

    inline_references: ClassVar[bool]
    """Whether a table is made with its foreign keys, which then cannot be added or dropped."""

    to_column: Mapping[str, Callable[[Any], tuple[object, bool]]]
    """By field type: a value as its column takes it, and whether the column holds it exactly."""

    from_column: Mapping[str, Callable[[Any], Value]]
    """By field type: what a column gives, as a value. What is not there is one already."""

    @abstractmethod
    def json_text(self, value: Value) -> tuple[str, bool]:
        """A value as a JSON column takes it, and whether the column holds it exactly."""

    # -- the driver --------------------------------------------------------------------------

    @abstractmethod
    def engine(self, *, size: int, overflow: int, read_only: bool) -> AsyncEngine:
        """A pool of connections, none of them open yet."""

    def exists(self) -> bool:
        """Whether there is a file to connect to; of a server, only connecting shows that."""
        return True

    def make_place(self) -> None:
        """Create the file to connect to, before the first write.

        Raises:
            StorageError: it cannot be made.
        """
        return

    def check_place(self, driver: Any) -> None:
        """Check that a connection reads and writes the file that is at the path of the store.

        Raises:
            DataFileConflictError: it does not.
        """
        return

    async def prepare_writing(self, driver: Any) -> None:
        """What must be set once before the first write; a reader leaves the file as it is."""
        return

    async def reset(self, driver: Any) -> bool:
        """Undo what a caller's own SQL did to a session; whether that can be relied on."""
        return False

    @abstractmethod
    def in_transaction(self, driver: Any) -> bool: ...

    async def bulk_upsert_locked(self, driver: Any, puts: BulkUpsert) -> dict[str, int] | None:
        """Read first and then write, in a transaction during which nobody else can write.

        Returns the versions of what was there before; None where it cannot be done like this, and
        nothing was written.
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
        """As `rows`, each a dict by column."""

    @abstractmethod
    def fetch_batches(
        self, driver: Any, sql: str, args: Sequence[object], *, written: bool
    ) -> AsyncGenerator[Sequence[Sequence[Any]], None]:
        """Run one statement and read its rows in batches, from a cursor of the engine.

        Args:
            written: the connection may write meanwhile, and that must not show in the rows.
        """

    @abstractmethod
    async def begin(self, driver: Any, isolation: Isolation | None) -> Any:
        """Begin a transaction that may write, or with one begun, a savepoint; returns its handle."""

    @abstractmethod
    async def begin_reading(self, driver: Any, statements: Literal["one", "many"]) -> Any:
        """Begin a transaction that reads one snapshot; None where a statement is one anyway."""

    @abstractmethod
    async def commit(self, handle: Any) -> None: ...

    @abstractmethod
    async def roll_back(self, handle: Any) -> None: ...

    @abstractmethod
    async def make_reusable(self, driver: Any) -> bool:
        """End whatever a failure left open; whether the connection may go back to the pool."""

    @abstractmethod
    async def discard(self, driver: Any) -> None:
        """Close a connection whose state is uncertain, as far as its pool would not wait for that."""

    @abstractmethod
    def translate(
        self, exc: Exception, *, doing: str, writes: bool, callers: bool = False
    ) -> StorageError:
        """The store's error for one of the driver.

        Args:
            callers: it came from a statement of the caller.
        """

    @abstractmethod
    async def is_same_store(self, mine: Any, theirs: Any) -> bool:
        """Whether connections of two stores of this kind lead to the same tables.

        Raises:
            StorageError, driver_errors: it cannot be found out.
        """

    # -- the schema --------------------------------------------------------------------------

    @abstractmethod
    def column_type(self, kind: FieldType | Kind) -> TypeEngine[Any]: ...

    @abstractmethod
    def index_part(self, column: Any, field: Field) -> Any:
        """What of a column an index holds."""

    async def owned_by_others(
        self, driver: Any, tables: Sequence[str], declared: Sequence[str]
    ) -> dict[str, str]:
        """The owners of those of the tables that belong to a role which is not trusted: neither this
        one, nor an owner of the schema, nor of a declared table. What it put there would run as ours."""
        return {}

    @abstractmethod
    async def found_tables(self, driver: Any) -> list[str]:
        """The names of all tables that are there."""

    @abstractmethod
    async def reflect_columns(
        self, driver: Any, tables: Sequence[str]
    ) -> dict[str, dict[str, str]]:
        """By table and column, the types that are there."""

    @abstractmethod
    async def reflect_indexes(self, driver: Any, tables: Sequence[str]) -> dict[str, str]:
        """By name, the tables of the indexes and constraints that are there."""

    @abstractmethod
    def same_type(self, found: str, kind: FieldType | Kind) -> bool: ...

    @abstractmethod
    async def begin_ddl(self, driver: Any) -> Any:
        """Begin a transaction that excludes others of its kind."""

    @abstractmethod
    def extra_ddl(self, schema: Schema, metadata: MetaData, found: Mapping[str, str]) -> list[str]:
        """What else the schema needs, apart from tables, columns and indexes."""

    # -- grammar: writes ---------------------------------------------------------------------

    @abstractmethod
    def batches(self, rows: int) -> list[int]:
        """How to divide this many rows into statements."""

    @abstractmethod
    def statement_variant(self, rows: int) -> int:
        """A number that is the same for all numbers of rows that share one SQL string."""

    @abstractmethod
    def values_source(self, kinds: Sequence[Kind], rows: int) -> str:
        """What a FROM names so that rows of arguments are there as `i (c0, c1, ...)`."""

    @abstractmethod
    def bind_columns(
        self, columns: Sequence[Sequence[object]], kinds: Sequence[Kind]
    ) -> Sequence[object]:
        """The arguments of `values_source` for the columns of its rows."""

    @abstractmethod
    def cast_input(self, column: str, kind: Kind) -> str:
        """A column of `values_source` as its kind."""

    @abstractmethod
    def json_merge(self, column: str, sets: str, removes: str) -> str:
        """A JSON object with the members of another, and without those of a list; NULL if empty."""

    @abstractmethod
    def size(self, column: str) -> str:
        """The bytes of a text or JSON column; NULL for NULL."""

    @abstractmethod
    def deletion(self, table: str, key: str, rows: int, *, versions: bool) -> str:
        """A DELETE of rows `t` by their keys and perhaps versions, up to its conditions."""

    # -- grammar: reads ----------------------------------------------------------------------

    @abstractmethod
    def read(self, column: str, kind: Kind) -> str:
        """A column as a SELECT names it."""

    @abstractmethod
    def parameter(self, number: int, kind: Kind) -> str: ...

    @abstractmethod
    def argument(self, value: Any, kind: Kind) -> object:
        """A value as the driver takes it for a parameter of this kind."""

    @abstractmethod
    def one_of(self, expression: str, values: Sequence[Any], kind: Kind, args: Arguments) -> str:
        """Whether a column is one of some values of its kind."""

    @abstractmethod
    def one_of_ids(self, expression: str) -> str:
        """Whether a key is one of a list, which is the first and only argument."""

    @abstractmethod
    def index_prefix(self, expression: str) -> str | None:
        """The prefix of a string that an index holds; None if all of it."""

    @abstractmethod
    def has_overflow(self, name: str) -> str:
        """Whether the overflow column holds a declared field: never NULL."""

    @abstractmethod
    def has_text(self, expression: str, part: str) -> str: ...

    @abstractmethod
    def ordered(self, part: SortPart, *, descending: bool) -> str:
        """A part of an ORDER BY, with NULL before everything when it ascends."""

    @abstractmethod
    def json_test(
        self, base: str, steps: Sequence[str | int], op: str, value: Value, args: Arguments
    ) -> tuple[str, bool]:
        """An operator on a path in a JSON column; and whether it is exact, or accepts more rows."""

    @abstractmethod
    def json_order(self, base: str, steps: Sequence[str | int], args: Arguments) -> SortPart | None:
        """What sorts by a path in a JSON column; None if nothing does."""

    @abstractmethod
    def order_argument(self, value: Value) -> object:
        """A value as `json_order` compares with it."""

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
        """The engine's own plan.

        Args:
            indexes: the declared ones by their names in SQL.
            comparisons: how many the filter has.
        """

    @asynccontextmanager
    async def scratch(self, driver: Any) -> AsyncIterator[Any]:
        """A connection on which tables can be made that nobody else sees, and that are dropped afterwards.

        Args:
            driver: a connection to the store; None where the store is absent.
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
        """Where the data is."""

    @abstractmethod
    def strip_for_update(self, sql: str) -> str:
        """A statement of the caller as the engine takes it."""
