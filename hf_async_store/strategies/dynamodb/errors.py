"""Errors of DynamoDB and of its driver, translated into the errors of the store."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from hf_async_store.errors import (
    AuthenticationError,
    ConcurrencyConflictError,
    ConfigurationError,
    CorruptionError,
    DiskFullError,
    InvalidQueryError,
    PermissionDeniedError,
    ProtocolError,
    StorageError,
    ThrottledError,
    UnavailableError,
    UnsupportedValueError,
)
from hf_async_store.strategies.dynamodb.codec import Attributes

# -- responses that their callers turn into errors; none of them leaves the engine: see `public` --


class ConditionFailed(StorageError):  # noqa: N818  # a response, which its caller turns into an error
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


class ActionDenied(PermissionDeniedError):  # noqa: N818  # as above
    """The policy does not allow an action, as a minimal one for what is optional."""


class AnswerLost(UnavailableError):  # noqa: N818  # as above
    """No response was received: the request may have been applied, or may be applied later."""


class BadAnswer(AnswerLost):
    """The response is not one to the request; a retry helps only if the cause is transient."""


class StatementRefused(StorageError):  # noqa: N818  # as above
    """A statement that the server rejects as invalid."""


def public(exc: StorageError) -> StorageError:
    """The public error for an internal one."""
    kind: type[StorageError]
    if isinstance(exc, BadAnswer | StatementRefused | ConditionFailed | Cancelled):
        kind = ProtocolError
    elif isinstance(exc, AnswerLost | TableMissing):
        kind = UnavailableError
    elif isinstance(exc, ActionDenied):
        kind = PermissionDeniedError
    else:
        return exc
    known = kind(
        str(exc),
        retryable=exc.retryable and not isinstance(exc, BadAnswer),
        outcome_unknown=exc.outcome_unknown,
    )
    known.__cause__ = exc
    return known


@contextmanager
def public_errors(*kept: type[StorageError]) -> Iterator[None]:
    """Errors that are internal to this engine are raised as public ones.

    Args:
        kept: are raised as they are.
    """
    try:
        yield
    except kept:
        raise
    except StorageError as exc:
        known = public(exc)
        if known is exc:
            raise
        raise known from exc


# -- responses of DynamoDB ---------------------------------------------------------------------


class _Row(NamedTuple):
    """What a code of DynamoDB means."""

    kind: type[StorageError]
    means: str
    retryable: bool | None = None
    outcome_unknown: bool = False


_THROTTLED: Final = _Row(ThrottledError, "DynamoDB throttles requests")
_DENIED: Final = _Row(
    ActionDenied, "DynamoDB refuses access; the policy of the role or user does not allow it"
)
_ACCOUNT: Final = _Row(
    PermissionDeniedError,
    "DynamoDB refuses the account; it is not active for this service or region",
)
_WRONG_KEY: Final = _Row(
    AuthenticationError, "DynamoDB does not accept the AWS credentials; look at the access key"
)
_WRONG_SECRET: Final = _Row(
    AuthenticationError,
    "DynamoDB does not accept the signature; look at the secret access key, at the region, and at "
    "proxies that change requests",
)
_EXPIRED: Final = _Row(AuthenticationError, "the AWS credentials have expired; get new ones")
_CLOCK: Final = _Row(
    AuthenticationError,
    "DynamoDB does not accept the time of the request; set the clock of this machine",
)
_ENCRYPTION: Final = _Row(
    PermissionDeniedError, "DynamoDB cannot use the KMS key that encrypts the table"
)
_UNDER_WAY: Final = _Row(
    UnavailableError, "DynamoDB is already processing another operation on the same resource"
)
_FAILED: Final = _Row(UnavailableError, "DynamoDB failed", outcome_unknown=True)
_NOT_UNDERSTOOD: Final = _Row(ProtocolError, "the server does not speak DynamoDB's protocol")

# Source: DynamoDB Developer Guide, "Error handling with DynamoDB"; DynamoDB API Reference, "Common
# Errors" and the errors of each action; BatchStatementError.
CODES: Final[Mapping[str, _Row]] = {
    # throttling
    "LimitExceeded": _THROTTLED,
    "ProvisionedThroughputExceeded": _THROTTLED,
    "RequestLimitExceeded": _THROTTLED,
    "Throttling": _THROTTLED,
    "ThrottlingError": _THROTTLED,
    "TooManyRequests": _THROTTLED,
    "SlowDown": _THROTTLED,
    "KMSThrottling": _THROTTLED,
    # authentication and authorization
    "AccessDenied": _DENIED,
    "NotAuthorized": _DENIED,
    "UnauthorizedOperation": _DENIED,
    "OptInRequired": _ACCOUNT,
    "AccountProblem": _ACCOUNT,
    "SubscriptionRequired": _ACCOUNT,
    "UnrecognizedClient": _WRONG_KEY,
    "InvalidClientTokenId": _WRONG_KEY,
    "InvalidAccessKeyId": _WRONG_KEY,
    "MissingAuthenticationToken": _WRONG_KEY,
    "InvalidSignature": _WRONG_SECRET,
    "IncompleteSignature": _WRONG_SECRET,
    "SignatureDoesNotMatch": _WRONG_SECRET,
    "ExpiredToken": _EXPIRED,
    "RequestExpired": _CLOCK,
    "RequestTimeTooSkewed": _CLOCK,
    # the key of the table
    "KMSAccessDenied": _ENCRYPTION,
    "KMSDisabled": _ENCRYPTION,
    "KMSInvalidState": _ENCRYPTION,
    "KMSInvalidKeyUsage": _ENCRYPTION,
    "KMSNotFound": _ENCRYPTION,
    "InaccessibleEncryptionCredentials": _ENCRYPTION,
    # concurrent operations
    "TransactionInProgress": _UNDER_WAY,
    "ResourceInUse": _UNDER_WAY,
    "TableInUse": _UNDER_WAY,
    "ReplicatedWriteConflict": _UNDER_WAY,
    # it failed
    "InternalServer": _FAILED,
    "InternalServerError": _FAILED,
    "InternalFailure": _FAILED,
    "ServiceUnavailable": _FAILED,
    "RequestTimeout": _FAILED,
    "RequestAbandoned": _FAILED,
    "ItemCollectionSizeLimitExceeded": _Row(
        DiskFullError, "an item collection has reached its size limit in DynamoDB"
    ),
    # the request is not understood
    "Serialization": _NOT_UNDERSTOOD,
    "UnknownOperation": _NOT_UNDERSTOOD,
    "InvalidAction": _NOT_UNDERSTOOD,
    "MissingAction": _NOT_UNDERSTOOD,
    "IdempotentParameterMismatch": _Row(
        ProtocolError, "another transaction has used the same client request token"
    ),
}

_REFUSED_ACTION: Final = re.compile(
    r"perform: ([\w:-]{1,80}) on resource: (\S{1,300}?)[.,]?(?: |$)"
)


def short(code: str) -> str:
    """A code without its namespace and `Exception`."""
    return code.rpartition("#")[2].partition(":")[0].removesuffix("Exception")


def translate(code: str, message: str, status: int, body: Mapping[str, Any]) -> StorageError:
    """The error of an error response.

    Args:
        status: of HTTP; for 500 and above the request may have been applied.
    """
    code = short(code)
    if code == "ConditionalCheckFailed":
        return ConditionFailed(body.get("Item"))
    if code == "TransactionCanceled":
        return Cancelled(body.get("CancellationReasons") or ())
    if code == "TransactionConflict":
        return conflict()
    if code in ("ResourceNotFound", "TableNotFound", "IndexNotFound"):
        return TableMissing(f"there is no such table or index: {message[:300]}")
    row = CODES.get(code)
    if row is None and status >= 500:
        row = _FAILED
    if row is None:
        return _invalid(code, message)
    if row is _WRONG_SECRET and _is_of_the_clock(message):
        row = _CLOCK
    return row.kind(
        f"{row.means}: {code or status}{_action(message)}",
        retryable=row.retryable,
        outcome_unknown=row.outcome_unknown or status >= 500,
    )


def _is_of_the_clock(message: str) -> bool:
    """Whether a signature is right, and its time is not.

    "Signature expired: 20150830T123600Z is now earlier than ...", "Signature not yet current: ...".
    """
    return "expired" in message or "not yet current" in message


def _action(message: str) -> str:
    """The denied action and its resource, where a message names them."""
    found = _REFUSED_ACTION.search(message)
    return f" ({found[1]} on {found[2]})" if found else ""


def _invalid(code: str, message: str) -> StorageError:
    # The message of a refused value may show the value, so only known messages are passed on.
    lower = message.lower()
    if "size" in lower and "exceeded" in lower:
        return UnsupportedValueError("(entity): larger than the item size limit of DynamoDB")
    if "nesting" in lower:
        # Whatever is portable fits into an item; a statement that holds the item is one level deeper.
        return StatementRefused("DynamoDB refuses the request: nested too deeply")
    if "security token" in lower or "signature" in lower:
        row = _CLOCK if _is_of_the_clock(lower) else _WRONG_SECRET
        return row.kind(f"{row.means}: {code}")
    if "specified index" in lower:
        return TableMissing("the table has no such index")
    return StatementRefused(f"DynamoDB refuses the request: {code}: {message[:300]}")


def conflict(collection: str | None = None, entity_id: str | None = None) -> StorageError:
    """Another transaction was writing the same item concurrently."""
    return ConcurrencyConflictError(
        "another transaction was writing the same entity",
        collection=collection,
        entity_id=entity_id,
        retryable=True,
    )


def unreadable(table: str, entity_id: str, why: str) -> CorruptionError:
    """An item that another program wrote, and that cannot be read as an entity."""
    return CorruptionError(
        f"the item {entity_id!r} of the table {table}: {why}; another program wrote it, and must "
        "correct or delete it"
    )


# -- errors of the driver --------------------------------------------------------------------

_CONFIGURATION: Final = frozenset(
    {
        "ConfigNotFound",
        "ConfigParseError",
        "EndpointProviderError",
        "EndpointResolutionError",
        "EndpointVariantError",
        "InfiniteLoopConfigError",
        "InvalidConfigError",
        "InvalidDefaultsMode",
        "InvalidEndpointConfigurationError",
        "InvalidMaxRetryAttemptsError",
        "InvalidProxiesConfigError",
        "InvalidRegionError",
        "InvalidRetryModeError",
        "InvalidSTSRegionalEndpointsConfigError",
        "MissingDependencyException",
        "NoRegionError",
        "ProfileNotFound",
        "UnknownEndpointError",
        "UnknownRegionError",
        "UnknownSignatureVersionError",
    }
)
_NO_CREDENTIALS: Final = frozenset(
    {
        "CredentialRetrievalError",
        "LoginAuthorizationCodeError",
        "LoginError",
        "LoginInsufficientPermissions",
        "LoginRefreshRequired",
        "LoginTokenLoadError",
        "NoAuthTokenError",
        "NoCredentialsError",
        "PartialCredentialsError",
        "RefreshWithMFAUnsupportedError",
        "SSOError",
        "SSOTokenLoadError",
        "TokenRetrievalError",
        "UnauthorizedSSOTokenError",
        "UnknownCredentialError",
        "UnknownTokenProviderError",
    }
)
_UNREACHED: Final = frozenset({"ConnectTimeoutError", "ProxyConnectionError"})


def before_sending(exc: Exception) -> StorageError:
    """The error of what failed before a request was sent: configuration, credentials, signing.

    Whatever it is, nothing was written.
    """
    name = type(exc).__name__
    if isinstance(exc, StorageError):
        return exc
    if name in _CONFIGURATION:
        return ConfigurationError(f"dynamodb_strategy: {_text(exc)}")
    if name in _NO_CREDENTIALS:
        return AuthenticationError(
            f"no usable AWS credentials: {name}; set dynamodb_strategy.profile, or the AWS environment"
        )
    if name == "ClientError":
        return _of_credentials_service(exc)
    cause = _cause(exc)
    if isinstance(
        cause, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError
    ):
        return _of_file(cause)
    if isinstance(exc, ValueError) and "endpoint" in str(exc).lower():
        # Its message is the endpoint as it was given, and there may be a password in it.
        return ConfigurationError(
            "dynamodb_strategy.endpoint_url (or AWS_ENDPOINT_URL, or AWS_ENDPOINT_URL_DYNAMODB): "
            "not a URL with http:// or https:// and a host"
        )
    if isinstance(exc, OSError) or name in _UNREACHED or _is_of_the_network(name):
        return UnavailableError(f"AWS credentials cannot be obtained at this moment: {name}")
    return ConfigurationError(
        f"dynamodb_strategy: AWS configuration or credentials that cannot be used: {name}"
    )


def _is_of_the_network(name: str) -> bool:
    return name in (
        "ConnectionClosedError",
        "EndpointConnectionError",
        "HTTPClientError",
        "MetadataRetrievalError",
        "ReadTimeoutError",
        "SSLError",
    )


def _of_credentials_service(exc: Exception) -> StorageError:
    """The error of a response of STS or SSO, from which credentials were requested."""
    response: Mapping[str, Any] = getattr(exc, "response", {})
    error = response.get("Error") or {}
    code, message = short(str(error.get("Code", ""))), str(error.get("Message", ""))
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 400)
    row = CODES.get(code) or CODES.get(code.removesuffix("Error"))
    asked = f"{getattr(exc, 'operation_name', 'a request')} for AWS credentials"
    if row is not None and issubclass(row.kind, UnavailableError):
        return row.kind(f"{asked} failed: {code}")
    if status >= 500:
        return UnavailableError(f"{asked} failed: {code or status}")
    if row is _WRONG_SECRET and _is_of_the_clock(message):
        row = _CLOCK
    if row is None or row is _DENIED:
        return PermissionDeniedError(
            f"{asked} was refused: {code}{_action(message)}; look at role_arn and source_profile of "
            "the profile, and at the trust policy of the role"
        )
    return row.kind(f"{asked} was refused: {code}; look at the credentials that it is made with")


def of_scaling(exc: Exception, place: str) -> StorageError:
    """The error of a request to Application Auto Scaling, which goes through a client of botocore."""
    if isinstance(exc, StorageError):
        return exc
    if type(exc).__name__ != "ClientError":
        return of_client(exc, place)
    response: Mapping[str, Any] = getattr(exc, "response", {})
    code = short(str((response.get("Error") or {}).get("Code", "")))
    row = CODES.get(code, _Row(UnavailableError, "", retryable=False))
    return row.kind(f"auto scaling was refused: {code}", retryable=row.retryable)


def _of_file(exc: OSError) -> ConfigurationError:
    named = f" {exc.filename}" if exc.filename else ""
    return ConfigurationError(
        f"a file or program that the AWS configuration names cannot be used:{named}: {exc.strerror} "
        "(AWS_CA_BUNDLE, ca_bundle, credential_process, web_identity_token_file)"
    )


def _cause(exc: Exception) -> object:
    """The error that botocore wrapped."""
    return getattr(exc, "kwargs", {}).get("error", exc)


def _text(exc: Exception) -> str:
    return str(exc)[:500]


def of_client(exc: Exception, place: str) -> StorageError:
    """The error of a request without a response, by what botocore raises.

    Args:
        place: the host that the request was sent to.
    """
    name = type(exc).__name__
    cause = _cause(exc)
    if isinstance(
        cause, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError
    ):
        return _of_file(cause)
    if name == "HTTPClientError" and isinstance(cause, ssl.SSLError):
        # Raised before there is a connection, whose own failures are an `SSLError` of botocore.
        return ConfigurationError(
            f"the certificates that the AWS configuration names cannot be used: {cause.reason} "
            "(AWS_CA_BUNDLE, ca_bundle)"
        )
    if name in _CONFIGURATION:
        return ConfigurationError(f"dynamodb_strategy: {_text(exc)}")
    if name == "SSLError":
        return _of_tls(exc, place)
    if name in _UNREACHED or (name == "EndpointConnectionError" and _never_connected(exc)):
        return UnavailableError(f"DynamoDB cannot be reached at {place}: {name}{_reason(cause)}")
    return AnswerLost(f"no response from DynamoDB at {place}: {name}", outcome_unknown=True)


def _of_tls(exc: Exception, place: str) -> StorageError:
    cause = getattr(_cause(exc), "certificate_error", None)
    inner = cause or getattr(_cause(exc), "os_error", None)
    if isinstance(inner, ssl.SSLCertVerificationError):
        return ConfigurationError(
            f"the certificate of {place} is not trusted: {inner.verify_message}; look at "
            "dynamodb_strategy.endpoint_url, and at AWS_CA_BUNDLE"
        )
    return UnavailableError(f"DynamoDB cannot be reached at {place}: SSLError{_reason(inner)}")


def _reason(cause: object) -> str:
    said = getattr(cause, "strerror", None) or getattr(cause, "reason", None)
    return f" ({str(said)[:200]})" if said else ""


def _never_connected(exc: Exception) -> bool:
    """Whether there was no connection, so that nothing was sent.

    aiobotocore raises the same error where a connection is reset while waiting for the response.
    """
    from aiohttp import ClientConnectorError

    return isinstance(_cause(exc), ClientConnectorError | socket.gaierror)


def refused_query(exc: StatementRefused) -> InvalidQueryError:
    """For what a caller wrote in DynamoDB's own language."""
    return InvalidQueryError(str(exc))
