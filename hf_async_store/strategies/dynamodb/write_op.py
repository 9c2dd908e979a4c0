"""The state of one write operation through its attempts."""

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
from hf_async_store.strategies.dynamodb.items import ItemMapping, new_token, token_of, version_of
from hf_async_store.values import UPDATED_AT, utc_now

if TYPE_CHECKING:
    from hf_async_store.strategies.dynamodb.codec import Attributes
    from hf_async_store.strategies.dynamodb.write_cache import WriteReceipt

Item = TypeVar("Item")


class Unknown:
    """Nothing has been read yet."""


UNKNOWN: Final = Unknown()


class WriteOp:
    """One write operation.

    Attributes:
        observed: the item as it was read, None if there was none, or `UNKNOWN`.
        requested_at: when it was requested, as a timestamp.
        ambiguous: an attempt got no response; it may have been applied.
        may_land_later: that attempt may still be applied later.
        from_cache: `observed` is from the write cache, and may be stale.
        receipt: the state that it wrote, where that is known.
        full_replace: the whole item is written, or at least in a request of its own.
        is_upsert: a single save, which one UpdateItem can do.
        outcome: valid once `is_done` is set.
    """

    __slots__ = (
        "ambiguous",
        "change",
        "form",
        "from_cache",
        "full_replace",
        "guarded_by_token",
        "is_done",
        "is_upsert",
        "may_land_later",
        "new_version",
        "observed",
        "outcome",
        "receipt",
        "requested_at",
        "table",
        "token",
    )

    def __init__(self, change: Change, form: ItemMapping, table: str) -> None:
        self.change = change
        self.form = form
        self.table = table
        self.token = new_token()
        self.observed: Attributes | None | Unknown = UNKNOWN
        self.guarded_by_token = False
        self.new_version: int | None = None
        self.ambiguous = False
        self.may_land_later = False
        self.from_cache = False
        self.receipt: WriteReceipt | None = None
        self.full_replace = change.mark is not None
        self.is_upsert = False
        self.is_done = False
        self.outcome: Outcome = None
        self.requested_at = _began(change) if type(change.expect) is int else ""

    @property
    def key(self) -> tuple[str, str]:
        return self.form.key, self.change.key.id

    @property
    def needs_state(self) -> bool:
        """Whether its condition is neither absence nor a version."""
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
            CorruptionError: it is not a valid version.
        """
        return version_of(item, self.table, self.change.key.id)

    def landed_at(self, item: Attributes) -> None:
        """It succeeded, and wrote the version of this item."""
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
            f"{self.change.key.collection} {self.change.key.id!r}: no response was received, and the "
            f"write may have been applied: {why}",
            retryable=False,
            outcome_unknown=True,
        )


def _began(change: Change) -> str:
    if isinstance(change, Put):
        return change.written_at
    at = change.fields.get(UPDATED_AT) if isinstance(change, Patch) else None
    return at if isinstance(at, str) else utc_now()


def deleted_meanwhile(op: WriteOp) -> StorageError:
    return UnavailableError(f"the table {op.table} was deleted", retryable=False)


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
