"""The exception hierarchy. Every exception that the store raises by itself is a `StorageError`.

Each error has two attributes that decide what a caller may do next:

* `retryable`: the same call may succeed later without any change by the caller.
* `outcome_unknown`: the write may or may not have been applied; read before writing again.

A missing entity is not an error: `None`, `False` and an empty list are valid results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from hf_async_store.redaction import redact_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_async_store.value_types import Entity


class StorageError(Exception):
    """Base class of every error of the store.

    Attributes:
        retryable: the same call may succeed later, unchanged.
        outcome_unknown: the write may or may not have been applied.
    """

    _retryable: ClassVar[bool] = False

    def __init__(
        self, message: str, *, retryable: bool | None = None, outcome_unknown: bool = False
    ) -> None:
        # Messages quote drivers, servers and configurations, and a URL in them may contain a password.
        super().__init__(redact_text(message))
        self.retryable: bool = self._retryable if retryable is None else retryable
        self.outcome_unknown: bool = outcome_unknown

    def __reduce__(self) -> tuple[object, ...]:
        # Subclasses have constructor arguments other than the message, so the default could not be
        # unpickled.
        return _rebuild, (type(self), self.args, self.__dict__)

    def copy(self) -> Self:
        """An equal but separate error, for a failure that is raised to several callers."""
        other = _rebuild(type(self), self.args, dict(self.__dict__))
        other.__cause__ = self.__cause__
        return other


Error = TypeVar("Error", bound=StorageError)


def _rebuild(kind: type[Error], args: tuple[object, ...], state: dict[str, object]) -> Error:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


# -- invalid arguments: raised before any I/O ------------------------------------------------


class ConfigurationError(StorageError):
    """An invalid configuration, URL or declaration; the message names the key by its path."""


class InvalidInputError(StorageError):
    """Base class of the errors for an invalid value, key, field, version, query or cursor."""

    def at(self, item: str) -> Self:
        """The same error, with the item of a batch named in front of its message."""
        return _rebuild(type(self), (f"{item}: {self}",), dict(self.__dict__))


class UnknownCollectionError(InvalidInputError):
    """A collection that is not declared; the message lists the declared ones."""


class InvalidKeyError(InvalidInputError):
    """An id that is not a string of 1 to 1,024 bytes of UTF-8, or is missing from its entity."""


class UnsupportedValueError(InvalidInputError):
    """A value that is not portable between engines; the message names the path of the value."""


class InvalidFieldError(InvalidInputError):
    """A declared field with a value of the wrong type, or a required field that is missing."""


class InvalidVersionError(InvalidInputError):
    """An expected version that is neither a non-negative integer nor ABSENT."""


class InvalidQueryError(InvalidInputError):
    """A malformed filter, operator, order or limit."""


class InvalidCursorError(InvalidInputError):
    """An invalid cursor, or the cursor of another query."""


class FeedExpiredError(StorageError):
    """The change feed does not contain any more what was committed after a token.

    It was kept for the retention of the collection, or up to the limit of the engine; or the store was
    restored from a copy, where the changes that followed the token may differ. To go on, read the
    collection itself and watch it from then on.
    """


# -- state of the stored data ---------------------------------------------------------------


class EntityNotFoundError(StorageError):
    """The operation needs an existing entity, and there is none."""

    def __init__(self, collection: str, entity_id: str) -> None:
        super().__init__(f"{collection} has no entity {entity_id!r}")
        self.collection = collection
        self.entity_id = entity_id


class AlreadyExistsError(StorageError):
    """The operation needs an unused id, and there is an entity with this id."""

    def __init__(self, collection: str, entity_id: str) -> None:
        super().__init__(f"{collection} already has an entity {entity_id!r}")
        self.collection = collection
        self.entity_id = entity_id


class EntityMismatchError(StorageError):
    """A stored entity does not fit the model as which it is read.

    Attributes:
        collection, entity_id: the entity.
        field: the path of the first field that does not fit; "" for the entity as a whole. The message
            names the others.
    """

    def __init__(
        self, collection: str, entity_id: str, model: str, field: str, problem: str
    ) -> None:
        where = f", field {field!r}" if field else ""
        super().__init__(f"{collection} {entity_id!r} does not fit {model}{where}: {problem}")
        self.collection = collection
        self.entity_id = entity_id
        self.field = field


class UniqueViolationError(StorageError):
    """Another entity has this value in the field of a unique index, or these values in its fields.

    Attributes:
        collection, entity_id: the entity that was to be written.
        fields: the fields of the index.
        owner_id: the id of the entity that has the values.
    """

    def __init__(
        self, collection: str, entity_id: str, fields: Sequence[str], owner_id: str
    ) -> None:
        what = "value" if len(fields) == 1 else "values"
        super().__init__(
            f"{collection} {entity_id!r}: the {what} of {', '.join(fields)} must be unique, and "
            f"{owner_id!r} already has the same"
        )
        self.collection = collection
        self.entity_id = entity_id
        self.fields = tuple(fields)
        self.owner_id = owner_id

    @property
    def field(self) -> str:
        """The fields of the index, joined by commas: usually one name."""
        return ", ".join(self.fields)


class ConcurrencyConflictError(StorageError):
    """A concurrent change conflicts with this write or transaction.

    Attributes:
        collection, entity_id: the entity, if a single one is concerned.
        expected: the version that the caller expected, or None.
        actual: the stored version, or None if it is not known.
        current: the stored entity, if the engine returns it at no extra cost; else None.

    `retryable` is true for a transaction that was rolled back because of a concurrent one and may
    be run again, and false for a stale `expected_version`, which requires a new read first.
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
    """`run_transaction` or `modify_entity` met conflicts until `retry_seconds` had passed."""


class SubscriptionAdvancedError(ConcurrencyConflictError):
    """A named subscription was advanced by another consumer, or past this change already.

    What would have been committed with it is in the store, so no transaction is run again because of this
    error. To go on, leave the subscription and enter it anew.
    """


class ReferenceViolationError(StorageError):
    """A referenced parent does not exist, or a parent to be deleted still has children."""


class BatchError(StorageError):
    """Some changes of a batch failed; the others were applied.

    It is `retryable` if all of them failed, and each error is: otherwise the same call would also repeat
    what was applied, such as an `increment`. The failed changes of `outcomes` can be repeated alone.

    Attributes:
        outcomes: one per change, in input order: what the method for a single entity returns, or
            the error of that change. `create_entities(if_absent=True)`: whether it was created.
    """

    def __init__(self, message: str, outcomes: Sequence[object]) -> None:
        errors = [each for each in outcomes if isinstance(each, StorageError)]
        super().__init__(
            message,
            retryable=len(errors) == len(outcomes) and all(each.retryable for each in errors),
            outcome_unknown=any(each.outcome_unknown for each in errors),
        )
        self.outcomes: list[Any] = list(outcomes)  # their type depends on the method


class PartialChangeError(StorageError):
    """`update_where` or `delete_where` stopped because a change failed; the cause is chained.

    A second call also changes again those that were changed and still match; so it is `retryable` only
    if none was changed.

    Attributes:
        done: how many entities were changed before; they stay changed.
        cause: the failure.
        entities: those that `delete_where(returning=True)` has deleted, as they were.
    """

    def __init__(self, done: int, cause: StorageError, entities: Sequence[Entity] = ()) -> None:
        super().__init__(
            f"stopped after {done:,} entities were changed: {cause}",
            retryable=cause.retryable and done == 0,
            outcome_unknown=cause.outcome_unknown,
        )
        self.done = done
        self.cause = cause
        self.entities = list(entities)


# -- transactions and lifecycle -------------------------------------------------------------


class TransactionError(StorageError):
    """Base class of the errors about the state of a transaction."""


class TransactionAbortedError(TransactionError):
    """A change in this transaction failed, so it can only be rolled back. The cause is chained."""


class TransactionClosedError(TransactionError):
    """A transaction was used before it began or after it ended."""


class TransactionReentryError(TransactionError):
    """A task called the store inside its own transaction, or acquired a lock that it already holds.

    It would deadlock with itself.
    """


class ClaimLostError(StorageError):
    """A claim or a lock is not held any more, so what was done under it was refused.

    Its lease has ended, it was released or broken, or its entity was deleted. Another program may work on
    the entity now. With `outcome_unknown`, the call itself may have ended the claim: its first answer was
    lost.
    """

    def __init__(self, message: str, collection: str, entity_id: str) -> None:
        super().__init__(message)
        self.collection = collection
        self.entity_id = entity_id


class TransactionTooLargeError(TransactionError):
    """More changes or bytes than the engine allows in one transaction; nothing was written."""


class StoreClosedError(StorageError):
    """The store was closed."""


class StoreNotFoundError(StorageError):
    """The store does not exist, and the operation needs one, such as a backup or a migration.

    The methods of a store do not raise it: to them, a store that does not exist is empty.
    """


class EventLoopMismatchError(StorageError):
    """The store was used in another event loop than the one it was opened in, or after a fork."""


class MigrationError(StorageError):
    """A migration or restore cannot continue. The source is unchanged; the message says what to do."""


class TargetNotEmptyError(MigrationError):
    """The target is not empty, and no merge strategy was chosen."""


class VerificationError(MigrationError):
    """Source and target differ.

    Attributes:
        differences: the first differences, each a line with collection, id, field and the types of
            both values.
    """

    def __init__(self, message: str, differences: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.differences = list(differences)


class StoreRelocatedError(StorageError):
    """The store was or is being migrated, and this program may not follow; the message says why.

    Attributes:
        new_url: the URL of the other store as recorded, without secrets; "" if there is none. For
            display and comparison only, never to be opened: anyone with write access to the store
            can set it. A program follows only to the stores listed in `follow_moves` of its own
            configuration.
    """

    def __init__(self, message: str, new_url: str) -> None:
        super().__init__(message)
        self.new_url = redact_text(new_url)


# -- failures of the engine and its environment ---------------------------------------------


class LockTimeoutError(StorageError):
    """A lock could not be acquired in time."""

    _retryable = True


class OperationTimeoutError(StorageError):
    """The caller's `timeout` expired."""

    _retryable = True


class UnavailableError(StorageError):
    """The engine cannot be reached, or its device reported an I/O error."""

    _retryable = True


class ThrottledError(UnavailableError):
    """The engine throttled requests for longer than they were retried."""


class PoolTimeoutError(UnavailableError):
    """No connection of the pool became free in time; the message names the settings."""


class PermissionDeniedError(StorageError):
    """The operating system or the server denied access."""


class AuthenticationError(PermissionDeniedError):
    """The server rejected the user name or the password."""


class ReadOnlyStoreError(StorageError):
    """The file system or the server is read-only."""


class DiskFullError(StorageError):
    """Out of disk space, quota or file descriptors. Data stored before is intact."""


class CorruptionError(StorageError):
    """Stored data is damaged; the message names the file, the position and how to recover."""


class DataFileConflictError(CorruptionError):
    """A data file was replaced from outside while a store used it. The message names the remedies.

    JSON: the journal holds commits to the old file, or a symbolic link to the file has another
    target than when the store was opened, or the folder was removed. SQLite: the store had the file open.
    """


class NewerFormatError(StorageError):
    """The data was written by a newer release of this package; upgrade it. Nothing was changed."""


class SchemaMismatchError(StorageError):
    """Existing tables or entities differ from the declaration; the message lists the differences."""


class ProtocolError(StorageError):
    """The engine returned an unexpected error or an invalid response."""
