"""One change on its way through the tries that it takes."""

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
    """Nothing was read yet."""


UNKNOWN: Final = Unknown()


class WriteOp:
    """One change on its way.

    Attributes:
        observed: the item as it was read, None if there was none, or `UNKNOWN`.
        requested_at: when it was asked for, in the form of a timestamp.
        ambiguous: the answer to a try was lost; it may have landed.
        may_land_later: it may even land later.
        from_cache: what was seen is what this store remembers, and may be wrong.
        receipt: what it left, where that is known.
        full_replace: it must be written whole, or at least in a request of its own.
        is_upsert: it is a save on its own, which one request can do.
        outcome: as soon as it is known; `is_done` tells.
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
        """Whether its condition says neither that nothing is there, nor a version."""
        return self.change.expect is not ABSENT and type(self.change.expect) is not int

    def done(self, outcome: Outcome) -> None:
        """It ends so. Whatever the error is, what a lost try did, or will do, stays unknown."""
        if self.ambiguous and isinstance(outcome, StorageError):
            outcome.outcome_unknown = True
        self.is_done = True
        self.outcome = outcome

    def is_own(self, item: Attributes) -> bool:
        return token_of(item) == self.token

    def version_of(self, item: Attributes) -> int:
        """The version of the item that this change is about.

        Raises:
            CorruptionError: it has none that could be one.
        """
        return version_of(item, self.table, self.change.key.id)

    def landed_at(self, item: Attributes) -> None:
        """It ends well, and left this version."""
        try:
            self.done(self.version_of(item))
        except CorruptionError as exc:
            self.ambiguous = isinstance(self.change, Put | Patch)
            # What was deleted may have had any version.
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
