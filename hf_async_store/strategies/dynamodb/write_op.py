"""One write: its change, its state, and its outcome."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, TypeVar, cast

from hf_async_store.changes import Change, Delete, Outcome, Patch, Put
from hf_async_store.errors import (
    AlreadyExistsError,
    ConcurrencyConflictError,
    CorruptionError,
    EntityNotFoundError,
    StorageError,
    UnavailableError,
)
from hf_async_store.field_operations import plain_fields
from hf_async_store.preconditions import changed, present
from hf_async_store.strategies.dynamodb.errors import TABLE_REMEDY
from hf_async_store.strategies.dynamodb.items import (
    CLAIM,
    ItemMapping,
    new_token,
    size_bound_of,
    token_of,
    version_of,
)
from hf_async_store.strategies.dynamodb.write_cache import WriteReceipt
from hf_async_store.strategies.dynamodb.write_states import (
    RESULTS,
    Doubt,
    Response,
    State,
    StoredItem,
    intent_of,
    is_import,
    next_step,
    response_of,
)
from hf_async_store.values import UPDATED_AT, Entity, utc_now

if TYPE_CHECKING:
    from hf_async_store.strategies.dynamodb.codec import Attributes
    from hf_async_store.strategies.dynamodb.partiql import Statement

Item = TypeVar("Item")


class WriteOp:
    """One write.

    Attributes:
        state, doubt, whole: see `write_states`.
        observed: the item that was read or returned last, or its state in the write cache; None if
            there is none.
        statement: the statement of the next attempt.
        new_version: the version that the attempt writes, or that of the entity that it deletes; None if
            the response contains it.
        by_item: no statements are used, see `independent_writes`.
        requested_at: the timestamp of the request, if a version is expected; otherwise "".
        receipt: the written state, if it is known.
        outcome: the outcome, valid once `is_done` is true.
    """

    def __init__(
        self, change: Change, mapping: ItemMapping, table: str, *, by_item: bool = False
    ) -> None:
        self.change = change
        self.by_item = by_item
        self.mapping = mapping
        self.table = table
        self.token = new_token()
        self.intent = intent_of(change)
        self.state: State = "import" if is_import(change) else "start"
        self.expires = change.lifetimes is not None and change.key.collection in change.lifetimes
        if self.expires and self.intent == "create":
            # It can replace an entity that has expired: `preconditions.changed` decides that.
            self.intent, self.state = "save", "insert"
        self.doubt: Doubt = "none"
        # Field operations are decided here on the item that is read.
        is_plain = not isinstance(change, Patch) or plain_fields(change.fields) is not None
        self.whole = change.mark is not None or not is_plain or mapping.needs_stored(change)
        if self.expires and self.state != "insert":
            self.whole = True  # whether the entity has expired is decided here, too
        self.observed: Attributes | None = None
        self.statement: Statement | None = None
        self.new_version: int | None = None
        self.receipt: WriteReceipt | None = None
        self.outcome: Outcome = None
        self.requested_at = _requested_at(change) if type(change.expect) is int else ""

    @property
    def key(self) -> tuple[str, str]:
        return self.mapping.key, self.change.key.id

    @property
    def name(self) -> str:
        """The entity, in messages."""
        return f"{self.change.key.collection} {self.change.key.id!r}"

    @property
    def is_done(self) -> bool:
        return self.state in RESULTS

    def decide(self, stored: Entity | None) -> Entity | None:
        """The entity after the change of a stored one; None if it is deleted.

        Raises:
            StorageError: the change is refused.
        """
        return changed(self.change, stored)

    # -- responses ---------------------------------------------------------------------------

    def respond(
        self,
        response: Response,
        item: Attributes | None = None,
        cause: StorageError | None = None,
    ) -> None:
        """Go to the state that follows from a response; set the outcome if that is a result.

        Args:
            item: the item in the response.
            cause: the error in the response.
        """
        self.state, self.doubt, self.whole = next_step(
            self.state, self.doubt, response, self.intent, self.whole
        )
        if self.state in RESULTS:
            self.outcome = self._outcome(item, cause)
        elif item is not None or response == "missing":
            self.observed = item

    def respond_with(self, item: Attributes | None) -> None:
        """As `respond`, to an item that was read or that did not meet the condition of an attempt."""
        self.whole = self.whole or self.expires
        try:
            if item is not None and self._is_absent(item):
                self.respond("missing")
                return
            stored = None if item is None else self._compared(item)
            self.respond(response_of(self.state, stored, whole=self.whole), item)
        except (CorruptionError, ConcurrencyConflictError) as exc:
            self.end(exc)

    def _is_absent(self, item: Attributes) -> bool:
        """Whether the entity of an item has expired, and this write does not replace or remove it."""
        if not self.expires or self.intent == "save" or token_of(item) == self.token:
            return False
        return present(self.change, self.mapping.entity(item)) is None

    def end(self, error: StorageError) -> None:
        """End with an error. It has `outcome_unknown` if an attempt may have been applied."""
        self.state = "error"
        self.outcome = self._error(error)

    def _compared(self, item: Attributes) -> StoredItem:
        expect = self.change.expect
        return StoredItem(
            is_own=token_of(item) == self.token,
            has_version=type(expect) is not int or self.version_of(item) == expect,
            is_older=item.get(UPDATED_AT, {}).get("S", self.requested_at) < self.requested_at,
            is_observed=self.is_observed(item),
        )

    def is_observed(self, item: Attributes | None) -> bool:
        """Whether an item has the token of the observed one."""
        observed = self.observed
        return item is not None and observed is not None and token_of(item) == token_of(observed)

    # -- outcomes ----------------------------------------------------------------------------

    def _outcome(self, item: Attributes | None, cause: StorageError | None) -> Outcome:
        state, key = self.state, self.change.key
        if state == "applied":
            return self.new_version if item is None else self._version_in(item)
        if state == "nothing":
            return None
        if state == "not_found":
            return EntityNotFoundError(key.collection, key.id)
        if state == "exists":
            return AlreadyExistsError(key.collection, key.id)
        if state == "conflict":
            return self.conflict_with(cast("Attributes", item))
        if state == "error" and cause is not None:
            return self._error(cause)
        return self.unknown(cause)

    def _error(self, error: StorageError) -> StorageError:
        error = error.copy()
        error.outcome_unknown = error.outcome_unknown or self.doubt != "none"
        return error

    def _version_in(self, item: Attributes) -> Outcome:
        """The version of the item that was written or deleted; sets the receipt of an update."""
        try:
            version = self.version_of(item)
        except CorruptionError as exc:
            exc.outcome_unknown = True
            return 0 if isinstance(self.change, Delete) else exc  # that item may have any version
        if not isinstance(self.change, Delete):
            self.receipt = receipt_of(item, version, self.token)
        return version

    def version_of(self, item: Attributes) -> int:
        """The version of an item of this entity.

        Raises:
            CorruptionError: the version is invalid.
        """
        return version_of(item, self.table, self.change.key.id)

    def conflict_with(self, item: Attributes) -> StorageError:
        """The error for an item that does not have the expected version."""
        key, expected, actual = self.change.key, self.change.expect, self.version_of(item)
        return ConcurrencyConflictError(
            f"{self.name} is at version {actual}, not {expected}",
            collection=key.collection,
            entity_id=key.id,
            expected=cast("int", expected),
            actual=actual,
            current=self.mapping.entity(item),
        )

    def unknown(self, cause: StorageError | None) -> StorageError:
        """The error for a write of which it cannot be determined whether it was applied."""
        why = "the stored item does not have the token of the write" if cause is None else cause
        error = UnavailableError(
            f"{self.name}: no response to the write was received, and it may have been applied: {why}",
            retryable=False,
            outcome_unknown=True,
        )
        error.__cause__ = cause
        return error


def receipt_of(item: Attributes, version: int, token: str) -> WriteReceipt | None:
    """The state after a write of these attributes; None if they do not contain a size."""
    size = size_bound_of(item)
    return None if size is None else WriteReceipt(version, token, size, CLAIM in item or None)


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
