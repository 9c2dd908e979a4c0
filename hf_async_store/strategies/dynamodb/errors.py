"""What DynamoDB answers, as the store's errors: the one table of this engine."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import Any, Final

from hf_async_store.errors import (
    ConcurrencyConflictError,
    ConfigurationError,
    DiskFullError,
    InvalidQueryError,
    PermissionDeniedError,
    StorageError,
    ThrottledError,
    UnavailableError,
    ValueOutOfDomainError,
)
from hf_async_store.strategies.dynamodb.codec import Attributes


class ConditionFailed(StorageError):  # noqa: N818  # an answer, which its caller turns into an error
    """The condition of a write did not hold; nothing was written.

    Attributes:
        item: what is stored instead; None if nothing is.
    """

    def __init__(self, item: Attributes | None) -> None:
        super().__init__("the condition did not hold")
        self.item = item


class Cancelled(StorageError):  # noqa: N818  # as above
    """A transaction was cancelled; nothing was written.

    Attributes:
        reasons: one per action: its code, "None" for those that were not the cause, and the item.
    """

    def __init__(self, reasons: Sequence[Mapping[str, Any]]) -> None:
        super().__init__("the transaction was cancelled")
        self.reasons = reasons


class TableMissing(StorageError):  # noqa: N818  # as above
    """There is no such table, or index."""


class AnswerLost(UnavailableError):  # noqa: N818  # as above
    """A request was sent and never answered: it may have been done, or be done at any time."""


class StatementRefused(StorageError):  # noqa: N818  # as above
    """A statement that the server does not understand."""


# Source: DynamoDB Developer Guide, "Error handling with DynamoDB", and BatchStatementError.
THROTTLED: Final = frozenset(
    {
        "LimitExceeded",
        "ProvisionedThroughputExceeded",
        "RequestLimitExceeded",
        "Throttling",
        "ThrottlingError",
        "TooManyRequests",
        "SlowDown",
    }
)
_DENIED: Final = frozenset(
    {
        "AccessDenied",
        "ExpiredToken",
        "IncompleteSignature",
        "InvalidClientTokenId",
        "InvalidSignature",
        "MissingAuthenticationToken",
        "NotAuthorized",
        "OptInRequired",
        "UnrecognizedClient",
    }
)
_UNDER_WAY: Final = frozenset({"TransactionInProgress", "ResourceInUse", "ReplicatedWriteConflict"})
_FAILED: Final = frozenset({"InternalServer", "InternalServerError", "ServiceUnavailable"})


def short(code: str) -> str:
    """A code without its namespace and `Exception`."""
    return code.rpartition("#")[2].removesuffix("Exception")


def translate(code: str, message: str, status: int, body: Mapping[str, Any]) -> StorageError:
    """The error of an answer that is one.

    Args:
        status: of HTTP; from 500 on, what was asked for may have been done.
    """
    code = short(code)
    if code == "ConditionalCheckFailed":
        return ConditionFailed(body.get("Item"))
    if code == "TransactionCanceled":
        return Cancelled(body.get("CancellationReasons") or ())
    if code in THROTTLED:
        return ThrottledError(f"DynamoDB asks for less: {code}")
    if code == "TransactionConflict":
        return conflict()
    if code == "ResourceNotFound":
        return TableMissing(message)
    if code in _DENIED:
        return PermissionDeniedError(f"DynamoDB refuses access: {code}")
    if code in _UNDER_WAY:
        return UnavailableError(f"DynamoDB is busy with the same thing: {code}")
    if code == "ItemCollectionSizeLimitExceeded":
        return DiskFullError(f"DynamoDB has no room: {code}")
    if code in _FAILED or status >= 500:
        return UnavailableError(f"DynamoDB failed: {code or status}", outcome_unknown=True)
    return _invalid(code, message)


def _invalid(code: str, message: str) -> StorageError:
    # The message of a refused value may show the value, so only what is told apart is passed on.
    lower = message.lower()
    if "size" in lower and "exceeded" in lower:
        return ValueOutOfDomainError("(entity): more than DynamoDB takes in one item")
    if "nesting" in lower:
        # Whatever is portable fits into an item; a statement that holds the item is one level deeper.
        return StatementRefused("DynamoDB refuses the request: nested deeper than it takes")
    if "security token" in lower or "signature" in lower:
        return PermissionDeniedError(f"DynamoDB refuses access: {code}")
    if "specified index" in lower:
        return TableMissing("the table has no such index")
    return StatementRefused(f"DynamoDB refuses the request: {code}: {message[:300]}")


def conflict(collection: str | None = None, entity_id: str | None = None) -> StorageError:
    """Another transaction was at the same item at the same moment."""
    return ConcurrencyConflictError(
        "another transaction was writing the same entity",
        collection=collection,
        entity_id=entity_id,
        retryable=True,
    )


def of_client(exc: Exception) -> StorageError:
    """The error of a request that got no answer, by what botocore raises."""
    name = type(exc).__name__
    if name in ("ProfileNotFound", "NoRegionError", "InvalidRegionError", "ConfigParseError"):
        return ConfigurationError(f"dynamodb_strategy: {exc}")
    if name in ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"):
        return PermissionDeniedError(f"no usable AWS credentials: {name}")
    if name in (
        "TokenRetrievalError",
        "UnauthorizedSSOTokenError",
        "SSOTokenLoadError",
        "RefreshWithMFAUnsupportedError",
    ):
        return PermissionDeniedError(f"no usable AWS credentials: {name}")
    if name in ("ConnectTimeoutError", "ProxyConnectionError", "SSLError") or (
        name == "EndpointConnectionError" and _never_connected(exc)
    ):
        return UnavailableError(f"DynamoDB cannot be reached: {name}")
    return AnswerLost(f"the answer of DynamoDB was lost: {name}", outcome_unknown=True)


def _never_connected(exc: Exception) -> bool:
    """Whether there was no connection, so that nothing was sent.

    aiobotocore raises the same error where a connection is reset while the answer is waited for.
    """
    from aiohttp import ClientConnectorError

    cause = getattr(exc, "kwargs", {}).get("error")
    return isinstance(cause, ClientConnectorError | socket.gaierror)


def refused_query(exc: StatementRefused) -> InvalidQueryError:
    """For what a caller wrote in DynamoDB's own language."""
    return InvalidQueryError(str(exc))
