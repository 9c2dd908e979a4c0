"""The interface of what executes the changes of a store on a leased connection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_async_store.changes import Change, ChangedMatches, Outcome, TakeChanges
from hf_async_store.config import SQLConfig
from hf_async_store.query import Query
from hf_async_store.strategies.sql.catalogue import TableMissingError

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.connections import LeasedConnection
    from hf_async_store.strategies.sql.decisions import Stored
    from hf_async_store.strategies.sql.pending import PendingChange
    from hf_async_store.strategies.sql.rows import Tables


class Replacement(NamedTuple):
    """See `Writer.replacement`.

    Attributes:
        writer: the one that decided it, and must execute it: another one may have other key columns.
    """

    writer: Writer
    pending: PendingChange


class Writer(ABC):
    """Executes the changes of a store.

    Args:
        tables: as the catalogue describes them. If the catalogue has changed, the methods raise
            `CatalogueChangedError`, and nothing was written; the engine then makes a new writer.
    """

    def __init__(self, tables: Tables, config: SQLConfig) -> None:
        self.tables = tables
        self.schema = tables.schema
        self.references = config.enforce_references
        self.config = config

    @abstractmethod
    async def write_each(
        self, lease: LeasedConnection, take: TakeChanges, *, patient: bool = True
    ) -> list[Outcome]:
        """See `Engine.write_unblocked`; if `patient`, it waits for locked entities, as `write_each` does.

        Raises:
            TableMissingError.
        """

    def check_tables(self, changes: Iterable[Change]) -> None:
        """Raise TableMissingError unless all changes have a table."""
        for each in changes:
            if each.key.collection not in self.tables.by_name:
                raise TableMissingError(each.key.collection)

    async def change_matches(
        self, lease: LeasedConnection, query: Query, change: Change
    ) -> ChangedMatches | None:
        """See `Engine.change_matches`; of a query that `reading.may_be_small`."""
        del lease, query, change
        return None

    def if_held(self, change: Change, *, placed: bool) -> tuple[str, list[object]] | None:
        """The statement of a change that has an effect only if `held` has a row, and its arguments.

        It returns the version and the place of the row, or nothing if the change must be decided on the
        stored entity. None: there is no such statement.

        Args:
            placed: the row in the place that `held` has is changed, if it has the id.
        """
        del change, placed
        return None

    def shares_changes(self, collection: str) -> bool:
        """Whether changes of one entity may share a row, with the version of the last.

        Not with a change feed, which has each version, or unique indexes, of which one of the changes may
        take a value of another entity.
        """
        table = self.tables.get(collection)
        return table is not None and not table.entry.has_feed and not table.unique

    def replacement(self, change: Change, stored: Stored) -> PendingChange | None:
        """A change of a stored entity as its replacement, which depends on nothing but that entity.

        Returns None if it may depend on others, or write something else with it.

        Raises:
            StorageError: the change is refused.
        """
        del change, stored
        return None

    async def replace(self, lease: LeasedConnection, replacement: PendingChange) -> None:
        """Execute a `replacement` in a transaction of its own.

        Raises:
            ConcurrencyConflictError: the entity is not the stored one any more.
        """
        raise NotImplementedError

    def executed(self, connection: Any, changes: Sequence[Change]) -> list[Outcome]:
        """As `apply`, in the thread of a driver that has one, and its open transaction."""
        raise NotImplementedError

    @abstractmethod
    async def apply(self, lease: LeasedConnection, changes: Sequence[Change]) -> list[Outcome]:
        """Execute the changes of a session in its transaction, up to the first that fails."""
