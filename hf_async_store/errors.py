"""The error tree. Everything the store raises on purpose derives from `StorageError`.

Two questions decide what a caller may do next, so every error answers them:

* `retryable`: the same call may succeed later without a change on the caller's side.
* `outcome_unknown`: the write may or may not have landed; read before writing again.

Absence is not an error: `None`, `False` and an empty list mean that the engine answered so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self, TypeVar

from hf_async_store.redaction import redact_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_async_store.values import Entity


class StorageError(Exception):
    """Base of every error of the store.

    Attributes:
        retryable: the same call may succeed later as it is.
        outcome_unknown: the write may have landed, or not.
    """

    _retryable: ClassVar[bool] = False

    def __init__(
        self, message: str, *, retryable: bool | None = None, outcome_unknown: bool = False
    ) -> None:
        # Messages quote drivers, servers and configurations: a URL among them may hold a password.
        super().__init__(redact_text(message))
        self.retryable: bool = self._retryable if retryable is None else retryable
        self.outcome_unknown: bool = outcome_unknown

    def __reduce__(self) -> tuple[object, ...]:
        # Subclasses take other arguments than the message, so the default would not come back.
        return _rebuild, (type(self), self.args, self.__dict__)

    def copy(self) -> Self:
        """An equal error of its own, for each of several callers that one failure reaches."""
        twin = _rebuild(type(self), self.args, dict(self.__dict__))
        twin.__cause__ = self.__cause__
        return twin


Error = TypeVar("Error", bound=StorageError)


def _rebuild(kind: type[Error], args: tuple[object, ...], state: dict[str, object]) -> Error:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


# -- what the caller handed in: refused before any I/O ---------------------------------------


class ConfigurationError(StorageError):
    """A configuration, URL or declaration that cannot be used; names the key by its path."""


class InvalidInputError(StorageError):
    """Base of the refusals of a value, key, field, version, query or cursor."""

    def at(self, place: str) -> Self:
        """The same error, naming its place in a batch."""
        return _rebuild(type(self), (f"{place}: {self}",), dict(self.__dict__))


class UnknownCollectionError(InvalidInputError):
    """A collection that was not declared; the message names those that were."""


class InvalidKeyError(InvalidInputError):
    """An id that is not text of 1 to 1,024 bytes of UTF-8, or is missing from its entity."""


class UnsupportedValueError(InvalidInputError):
    """A value outside the portable domain; names the path of the value."""


class InvalidFieldError(InvalidInputError):
    """A declared field with a value of another type, or a required field that is missing."""


class InvalidVersionError(InvalidInputError):
    """An expected version that is neither a non-negative integer nor ABSENT."""


class InvalidQueryError(InvalidInputError):
    """A malformed filter, operator, order or limit."""


class InvalidCursorError(InvalidInputError):
    """A cursor that was altered, or belongs to another query."""


# -- what the store answered ----------------------------------------------------------------


class EntityNotFoundError(StorageError):
    """A verb that needs an entity found none."""

    def __init__(self, collection: str, entity_id: str) -> None:
        super().__init__(f"{collection} has no entity {entity_id!r}")
        self.collection = collection
        self.entity_id = entity_id


class AlreadyExistsError(StorageError):
    """An entity that had to be absent is there."""

    def __init__(self, collection: str, entity_id: str) -> None:
        super().__init__(f"{collection} already has an entity {entity_id!r}")
        self.collection = collection
        self.entity_id = entity_id


class ConcurrencyConflictError(StorageError):
    """Somebody else changed what this write, or this transaction, relied on.

    Attributes:
        collection, entity_id: the entity, where one can be named.
        expected: the version that the caller expected, or None.
        actual: the version that is stored, or None when it is not known.
        current: the stored entity, where the engine gives it free; else None.

    `retryable` is true for a transaction that lost a race and may simply run again, and false
    for a stale `expected_version`, which first needs a fresh read.
    """

    def __init__(
        self,
        message: str,
        *,
        collection: str | None = None,
        entity_id: str | None = None,
        expected: int | None = None,
        actual: int | None = None,
        current: Entity | None = None,
        retryable: bool | None = None,
        outcome_unknown: bool = False,
    ) -> None:
        super().__init__(message, retryable=retryable, outcome_unknown=outcome_unknown)
        self.collection = collection
        self.entity_id = entity_id
        self.expected = expected
        self.actual = actual
        self.current = current


class RetriesExhaustedError(ConcurrencyConflictError):
    """`run_transaction` or `modify_entity` met conflicts until its time was up."""


class ReferenceViolationError(StorageError):
    """A parent that does not exist, or a parent that still has children."""


class BatchError(StorageError):
    """Some changes of a batch failed; the others landed.

    Attributes:
        outcomes: one per change in input order: what the verb returns for one entity, or the
            error of that one change.
    """

    def __init__(self, message: str, outcomes: Sequence[int | bool | StorageError]) -> None:
        errors = [each for each in outcomes if isinstance(each, StorageError)]
        super().__init__(
            message,
            retryable=all(each.retryable for each in errors),
            outcome_unknown=any(each.outcome_unknown for each in errors),
        )
        self.outcomes = list(outcomes)


# -- transactions and life ------------------------------------------------------------------


class TransactionError(StorageError):
    """Base of the errors about a transaction itself."""


class TransactionAbortedError(TransactionError):
    """A change in this transaction failed; only a rollback is left. The cause is chained."""


class TransactionClosedError(TransactionError):
    """A transaction used after its end, or before its beginning."""


class TransactionReentryError(TransactionError):
    """A verb of the store inside one's own transaction, or a lock that the task already holds.

    It would wait for itself.
    """


class TransactionTooLargeError(TransactionError):
    """More changes or bytes than the engine takes in one transaction; nothing was written."""


class StoreClosedError(StorageError):
    """The store was closed."""


class StoreNotFoundError(StorageError):
    """No store is there, and the operation needs one: a reading command, a backup, a migration.

    Programs do not meet it: their reads of an absent store answer as an empty one does.
    """


class EventLoopMismatchError(StorageError):
    """The store was used from another event loop, or after a fork, than the one it opened in."""


class MigrationError(StorageError):
    """A move or restore that cannot go on. The source is as it was; the message says what to do."""


class TargetNotEmptyError(MigrationError):
    """The target holds entities already, and nothing says how to merge them."""


class VerificationError(MigrationError):
    """Source and target differ.

    Attributes:
        differences: the first of them, as text: collection, id, field and both values' types.
    """

    def __init__(self, message: str, differences: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.differences = list(differences)


class StoreRelocatedError(StorageError):
    """The store is, or was, moved, and this program may not follow: the message says why.

    Attributes:
        new_url: the other place, as it is recorded: a URL without secrets. Text to show and to
            compare, never to open: whoever can write to a store can write it. A program follows
            only to a place that `follow_moves` of its own configuration names.
    """

    def __init__(self, message: str, new_url: str) -> None:
        super().__init__(message)
        self.new_url = redact_text(new_url)


# -- what went wrong beneath ----------------------------------------------------------------


class LockTimeoutError(StorageError):
    """A lock was not free in time."""

    _retryable = True


class OperationTimeoutError(StorageError):
    """The caller's `timeout` ran out."""

    _retryable = True


class UnavailableError(StorageError):
    """The engine cannot be reached, or its device answered with an I/O error."""

    _retryable = True


class ThrottledError(UnavailableError):
    """The engine asked for less, and retries did not outlast it."""


class PoolTimeoutError(UnavailableError):
    """No connection of the pool became free in time; the message names the settings."""


class PermissionDeniedError(StorageError):
    """The operating system or the server refused access."""


class AuthenticationError(PermissionDeniedError):
    """The server did not accept the user or the password."""


class ReadOnlyStoreError(StorageError):
    """The file system or the server takes no writes."""


class DiskFullError(StorageError):
    """No space, quota or file descriptors left. What was stored before is intact."""


class CorruptionError(StorageError):
    """Stored bytes that are not what the store wrote; names the file, the place and the way back."""


class DataFileConflictError(CorruptionError):
    """A data file was replaced by hand while a store relied on it. Names the ways out.

    JSON: while its journal holds commits, or a link to the file leads elsewhere than when the store
    was opened. SQLite: while the store had it open.
    """


class NewerFormatError(StorageError):
    """A newer release of this package wrote what is stored; update it. Nothing was changed."""


class SchemaMismatchError(StorageError):
    """A table that is there differs from the declaration; the message lists the differences."""


class ProtocolError(StorageError):
    """The engine answered by an error that it should not give, or did not speak its protocol."""
