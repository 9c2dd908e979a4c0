"""The state of a write operation across its attempts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeVar

from hf_async_store.changes import ABSENT, Change, Outcome, Patch, Put
from hf_async_store.errors import (
    CorruptionError,
    EntityNotFoundError,
    StorageError,
    UnavailableError,
)
from hf_async_store.strategies.dynamodb.errors import TABLE_REMEDY
from hf_async_store.strategies.dynamodb.items import ItemMapping, new_token, token_of, version_of
from hf_async_store.values import UPDATED_AT, utc_now

if TYPE_CHECKING:
    from hf_async_store.strategies.dynamodb.codec import Attributes
    from hf_async_store.strategies.dynamodb.write_cache import WriteReceipt

Item = TypeVar("Item")


class Unknown:
    """The type of `UNKNOWN`: the item has not been read."""


UNKNOWN: Final = Unknown()


class WriteOp:
    """One write operation.

    Attributes:
        observed: the item as it was read, None if it did not exist, or `UNKNOWN`.
        guarded_by_token: the statement requires the token of `observed`.
        new_version: the version that the statement writes; None if the server computes it or for a
            delete.
        requested_at: the timestamp of the request, if a version is expected; otherwise "".
        ambiguous: an attempt got no response and may have been applied.
        may_be_applied_later: that attempt may still be applied later.
        from_cache: `observed` is from the write cache and may be stale.
        receipt: the written state, if it is known.
        separate_request: the operation is sent as a separate request, not as a statement in a batch.
        is_upsert: the operation is a single save, for which one UpdateItem is sufficient.
        outcome: the outcome, valid once `is_done` is set.
    """

    __slots__ = (
        "ambiguous",
        "change",
        "from_cache",
        "guarded_by_token",
        "is_done",
        "is_upsert",
        "mapping",
        "may_be_applied_later",
        "new_version",
        "observed",
        "outcome",
        "receipt",
        "requested_at",
        "separate_request",
        "table",
        "token",
    )

    def __init__(self, change: Change, mapping: ItemMapping, table: str) -> None:
        self.change = change
        self.mapping = mapping
        self.table = table
        self.token = new_token()
        self.observed: Attributes | None | Unknown = UNKNOWN
        self.guarded_by_token = False
        self.new_version: int | None = None
        self.ambiguous = False
        self.may_be_applied_later = False
        self.from_cache = False
        self.receipt: WriteReceipt | None = None
        self.separate_request = change.mark is not None
        self.is_upsert = False
        self.is_done = False
        self.outcome: Outcome = None
        self.requested_at = _requested_at(change) if type(change.expect) is int else ""

    @property
    def key(self) -> tuple[str, str]:
        return self.mapping.key, self.change.key.id

    @property
    def needs_state(self) -> bool:
        """Whether the operation expects neither absence nor a version."""
        return self.change.expect is not ABSENT and type(self.change.expect) is not int

    def done(self, outcome: Outcome) -> None:
        """Set the outcome. An error has `outcome_unknown` if an attempt got no response."""
        if self.ambiguous and isinstance(outcome, StorageError):
            outcome.outcome_unknown = True
        self.is_done = True
        self.outcome = outcome

    def is_own(self, item: Attributes) -> bool:
        return token_of(item) == self.token

    def version_of(self, item: Attributes) -> int:
        """The version of the item that this operation writes.

        Raises:
            CorruptionError: the version is invalid.
        """
        return version_of(item, self.table, self.change.key.id)

    def complete_with(self, item: Attributes) -> None:
        """Complete a successful operation with the version of the written or deleted item."""
        try:
            self.done(self.version_of(item))
        except CorruptionError as exc:
            self.ambiguous = isinstance(self.change, Put | Patch)
            # The deleted item may have had any version.
            self.done(exc if self.ambiguous else 0)

    def not_found(self) -> EntityNotFoundError:
        return EntityNotFoundError(self.change.key.collection, self.change.key.id)

    def unknown(self, why: str) -> UnavailableError:
        return UnavailableError(
            f"{self.change.key.collection} {self.change.key.id!r}: no response to the write was "
            f"received, and it may have been applied: {why}",
            retryable=False,
            outcome_unknown=True,
        )


def _requested_at(change: Change) -> str:
    if isinstance(change, Put):
        return change.written_at
    at = change.fields.get(UPDATED_AT) if isinstance(change, Patch) else None
    return at if isinstance(at, str) else utc_now()


def deleted_meanwhile(op: WriteOp) -> StorageError:
    return UnavailableError(
        f"the table {op.table} was deleted while the store was open. {TABLE_REMEDY}",
        retryable=False,
    )


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
