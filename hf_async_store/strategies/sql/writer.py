"""The interface of what executes the changes of a store on a leased connection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hf_async_store.changes import Change, Outcome
from hf_async_store.config import SQLConfig
from hf_async_store.schema import Schema

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.connections import LeasedConnection
    from hf_async_store.strategies.sql.rows import Table


class Writer(ABC):
    """Executes the changes of a store."""

    def __init__(self, schema: Schema, tables: Mapping[str, Table], config: SQLConfig) -> None:
        self.schema = schema
        self.tables = tables
        self.references = config.enforce_references
        self.config = config

    @abstractmethod
    async def write_each(self, lease: LeasedConnection, changes: Sequence[Change]) -> list[Outcome]:
        """See `Engine.write_each`."""

    @abstractmethod
    async def apply(self, lease: LeasedConnection, changes: Sequence[Change]) -> list[Outcome]:
        """Execute the changes of a session in its transaction, up to the first that fails."""
