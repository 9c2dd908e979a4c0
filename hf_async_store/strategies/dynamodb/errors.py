"""Translation of the errors of DynamoDB and of its driver into errors of the store."""

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

TABLE_REMEDY: Final = (
    "Restore the table, or create it empty by `hf-async-store create-tables`; if it was not deleted, check "
    "table_prefix"
)
"""What to do about a missing table, in error messages."""

# -- internal errors, which the callers handle or convert with `public` ------------------------


class ConditionFailed(StorageError):  # noqa: N818  # an internal error, which callers handle
    """The condition of a write did not hold; nothing was written.

    Attributes:
        item: the stored item; None if there is none.
    """

    def __init__(self, item: Attributes | None) -> None:
        super().__init__("the condition of the write did not hold")
        self.item = item


class Cancelled(StorageError):  # noqa: N818  # as above
    """A transaction was cancelled; nothing was written.

    Attributes:
        reasons: one for each action: its code, "None" for an action that was not the cause, and
            the item.
    """

    def __init__(self, reasons: Sequence[Mapping[str, Any]]) -> None:
        super().__init__("DynamoDB cancelled the transaction")
        self.reasons = reasons


class TableMissing(StorageError):  # noqa: N818  # as above
    """The table or index does not exist."""


class ActionDenied(PermissionDeniedError):  # noqa: N818  # as above
    """The IAM policy does not allow the action. A minimal policy omits the optional actions."""


class ResponseLost(UnavailableError):  # noqa: N818  # as above
    """No valid response was received: the request may have been applied, or may be applied later."""


class UnexpectedResponse(ResponseLost):
    """The response is invalid for its request; a retry helps only if the cause is transient."""


class StatementRefused(StorageError):  # noqa: N818  # as above
    """The server rejected a statement or request as invalid."""


def public(exc: StorageError) -> StorageError:
    """The public error for an internal one."""
    kind: type[StorageError]
    if isinstance(exc, UnexpectedResponse | StatementRefused | ConditionFailed | Cancelled):
        kind = ProtocolError
    elif isinstance(exc, ResponseLost | TableMissing):
        kind = UnavailableError
    elif isinstance(exc, ActionDenied):
        kind = PermissionDeniedError
    else:
        return exc
    converted = kind(
        str(exc),
        retryable=exc.retryable and not isinstance(exc, UnexpectedResponse),
        outcome_unknown=exc.outcome_unknown,
    )
    converted.__cause__ = exc
    return converted


@contextmanager
def public_errors(*passed_through: type[StorageError]) -> Iterator[None]:
    """Convert internal errors of this engine that are raised in the block to public ones.

    Args:
        passed_through: errors that are not converted.
    """
    try:
        yield
    except passed_through:
        raise
    except StorageError as exc:
        converted = public(exc)
        if converted is exc:
            raise
        raise converted from exc


class RecordsTrimmed(StorageError):  # noqa: N818  # as above
    """A stream does not contain the requested records any more."""


class IteratorExpired(StorageError):  # noqa: N818  # as above
    """An iterator of a stream is too old to be used."""


# -- responses of DynamoDB ---------------------------------------------------------------------


class _ErrorSpec(NamedTuple):
    """The error for an error code of DynamoDB."""

    kind: type[StorageError]
    message: str
    retryable: bool | None = None
    outcome_unknown: bool = False


_THROTTLED: Final = _ErrorSpec(ThrottledError, "DynamoDB throttles requests")
_DENIED: Final = _ErrorSpec(
    ActionDenied, "DynamoDB denies access; the policy of the role or user does not allow the action"
)
_ACCOUNT: Final = _ErrorSpec(
    PermissionDeniedError,
    "DynamoDB denies access to the account; it is not active for this service or region",
)
_WRONG_KEY: Final = _ErrorSpec(
    AuthenticationError, "DynamoDB does not accept the AWS credentials; check the access key"
)
_WRONG_SECRET: Final = _ErrorSpec(
    AuthenticationError,
    "DynamoDB does not accept the signature; check the secret access key, the region, and proxies "
    "that change requests",
)
_EXPIRED: Final = _ErrorSpec(AuthenticationError, "the AWS credentials have expired; get new ones")
_CLOCK: Final = _ErrorSpec(
    AuthenticationError,
    "DynamoDB does not accept the time of the request; correct the clock of this machine",
)
_ENCRYPTION: Final = _ErrorSpec(
    PermissionDeniedError,
    "DynamoDB cannot use the KMS key that encrypts the table; check its state and its policy",
)
_IN_PROGRESS: Final = _ErrorSpec(
    UnavailableError, "DynamoDB is already processing another operation on the same resource"
)
_FAILED: Final = _ErrorSpec(
    UnavailableError, "DynamoDB failed to process the request", outcome_unknown=True
)
_NOT_UNDERSTOOD: Final = _ErrorSpec(
    ProtocolError, "the server does not implement DynamoDB's protocol; check endpoint_url"
)
_FULL: Final = _ErrorSpec(
    DiskFullError, "an item collection has reached its size limit in DynamoDB"
)
_TOKEN_USED: Final = _ErrorSpec(
    ProtocolError, "another transaction has used the same client request token"
)

# Source: DynamoDB Developer Guide, "Error handling with DynamoDB"; DynamoDB API Reference, "Common
# Errors" and the errors of each action; BatchStatementError.
_CODES_OF: Final[Mapping[_ErrorSpec, str]] = {
    _THROTTLED: (
        "LimitExceeded ProvisionedThroughputExceeded RequestLimitExceeded Throttling "
        "ThrottlingError TooManyRequests SlowDown KMSThrottling"
    ),
    _DENIED: "AccessDenied NotAuthorized UnauthorizedOperation",
    _ACCOUNT: "OptInRequired AccountProblem SubscriptionRequired",
    _WRONG_KEY: (
        "UnrecognizedClient InvalidClientTokenId InvalidAccessKeyId MissingAuthenticationToken"
    ),
    _WRONG_SECRET: "InvalidSignature IncompleteSignature SignatureDoesNotMatch",
    _EXPIRED: "ExpiredToken",
    _CLOCK: "RequestExpired RequestTimeTooSkewed",
    _ENCRYPTION: (
        "KMSAccessDenied KMSDisabled KMSInvalidState KMSInvalidKeyUsage KMSNotFound "
        "InaccessibleEncryptionCredentials"
    ),
    _IN_PROGRESS: "TransactionInProgress ResourceInUse TableInUse ReplicatedWriteConflict",
    _FAILED: (
        "InternalServer InternalServerError InternalFailure ServiceUnavailable RequestTimeout "
        "RequestAbandoned"
    ),
    _NOT_UNDERSTOOD: "Serialization UnknownOperation InvalidAction MissingAction",
    _FULL: "ItemCollectionSizeLimitExceeded",
    _TOKEN_USED: "IdempotentParameterMismatch",
}
CODES: Final = {code: spec for spec, codes in _CODES_OF.items() for code in codes.split()}

_REFUSED_ACTION: Final = re.compile(
    r"perform: ([\w:-]{1,80}) on resource: (\S{1,300}?)[.,]?(?: |$)"
)


def short(code: str) -> str:
    """An error code without its namespace and its suffix `Exception`."""
    return code.rpartition("#")[2].partition(":")[0].removesuffix("Exception")


def translate(code: str, message: str, status: int, body: Mapping[str, Any]) -> StorageError:
    """The error for an error response.

    Args:
        status: the HTTP status; for 500 and above the request may have been applied.
    """
    code = short(code)
    if code == "ConditionalCheckFailed":
        return ConditionFailed(body.get("Item"))
    if code == "TransactionCanceled":
        return Cancelled(body.get("CancellationReasons") or ())
    if code == "TransactionConflict":
        return conflict()
    if code in ("ResourceNotFound", "TableNotFound", "IndexNotFound"):
        return TableMissing(f"the table or index does not exist: {message[:300]}")
    if code == "TrimmedDataAccess":
        return RecordsTrimmed("the stream does not contain the requested records any more")
    if code == "ExpiredIterator":
        return IteratorExpired("the iterator of the stream has expired")
    spec = CODES.get(code)
    if spec is None and status >= 500:
        spec = _FAILED
    if spec is None:
        return _invalid(code, message)
    if spec is _WRONG_SECRET and _is_clock_error(message):
        spec = _CLOCK
    return spec.kind(
        f"{spec.message}: {code or status}{_action(message)}",
        retryable=spec.retryable,
        outcome_unknown=spec.outcome_unknown or status >= 500,
    )


def _is_clock_error(message: str) -> bool:
    """Whether a signature was rejected because of its time.

    Examples: "Signature expired: 20150830T123600Z is now earlier than ...", "Signature not yet
    current: ...".
    """
    return "expired" in message or "not yet current" in message


def _action(message: str) -> str:
    """The denied action and its resource, if the message names them."""
    match = _REFUSED_ACTION.search(message)
    return f" ({match[1]} on {match[2]})" if match else ""


def _invalid(code: str, message: str) -> StorageError:
    # A message about a rejected value may contain the value.
    lower = message.lower()
    if "size" in lower and "exceeded" in lower:
        return UnsupportedValueError("(entity): exceeds the item size limit of DynamoDB")
    if "nesting" in lower:
        # Any portable value fits into an item, but an item that is a parameter of a statement is
        # nested one level deeper.
        return StatementRefused("DynamoDB rejected the request: values are nested too deeply")
    if "security token" in lower or "signature" in lower:
        spec = _CLOCK if _is_clock_error(lower) else _WRONG_SECRET
        return spec.kind(f"{spec.message}: {code}")
    if "specified index" in lower:
        return TableMissing("the table does not have the index of the query")
    return StatementRefused(f"DynamoDB rejected the request: {code}: {message[:300]}")


def conflict(collection: str | None = None, entity_id: str | None = None) -> StorageError:
    """The error for an item that another transaction was writing at the same time."""
    return ConcurrencyConflictError(
        "another transaction was writing the same entity at the same time",
        collection=collection,
        entity_id=entity_id,
        retryable=True,
    )


def unreadable(table: str, entity_id: str, why: str) -> CorruptionError:
    """The error for an item, written by another program, that is not a valid entity."""
    return CorruptionError(
        f"the item {entity_id!r} of the table {table} is invalid: {why}; it was written by another "
        "program: correct the item or delete it"
    )


# -- errors of the driver --------------------------------------------------------------------

_FILE_ERRORS: Final = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def _words(names: str) -> frozenset[str]:
    return frozenset(names.split())


_CONFIGURATION: Final = _words(
    "ConfigNotFound ConfigParseError EndpointProviderError EndpointResolutionError "
    "EndpointVariantError InfiniteLoopConfigError InvalidConfigError InvalidDefaultsMode "
    "InvalidEndpointConfigurationError InvalidMaxRetryAttemptsError InvalidProxiesConfigError "
    "InvalidRegionError InvalidRetryModeError InvalidSTSRegionalEndpointsConfigError "
    "MissingDependencyException NoRegionError ProfileNotFound UnknownEndpointError "
    "UnknownRegionError UnknownSignatureVersionError"
)
_NO_CREDENTIALS: Final = _words(
    "CredentialRetrievalError LoginAuthorizationCodeError LoginError "
    "LoginInsufficientPermissions LoginRefreshRequired LoginTokenLoadError NoAuthTokenError "
    "NoCredentialsError PartialCredentialsError RefreshWithMFAUnsupportedError SSOError "
    "SSOTokenLoadError TokenRetrievalError UnauthorizedSSOTokenError UnknownCredentialError "
    "UnknownTokenProviderError"
)
_NOT_CONNECTED: Final = _words("ConnectTimeoutError ProxyConnectionError")
_NETWORK: Final = _NOT_CONNECTED | _words(
    "ConnectionClosedError EndpointConnectionError HTTPClientError MetadataRetrievalError "
    "ReadTimeoutError SSLError"
)


def before_sending(exc: Exception) -> StorageError:
    """The error for a failure before a request was sent: configuration, credentials, signing.

    Nothing was written.
    """
    name = type(exc).__name__
    if isinstance(exc, StorageError):
        return exc
    if name in _CONFIGURATION:
        return ConfigurationError(f"dynamodb_strategy: {_message_of(exc)}")
    if name in _NO_CREDENTIALS:
        return AuthenticationError(
            f"no usable AWS credentials: {name}; set dynamodb_strategy.profile or the AWS "
            "environment variables"
        )
    if name == "ClientError":
        return _credentials_service_error(exc)
    cause = _cause(exc)
    if isinstance(cause, _FILE_ERRORS):
        return _file_error(cause)
    if isinstance(exc, ValueError) and "endpoint" in str(exc).lower():
        # The message of `exc` contains the configured endpoint, which may contain a password.
        return ConfigurationError(
            "dynamodb_strategy.endpoint_url (or AWS_ENDPOINT_URL or AWS_ENDPOINT_URL_DYNAMODB): "
            "must be a URL with http:// or https:// and a host"
        )
    if isinstance(exc, OSError) or name in _NETWORK:
        return UnavailableError(f"AWS credentials are temporarily unavailable: {name}")
    if isinstance(exc, ImportError) and exc.name in ("aiobotocore", "botocore"):
        return ConfigurationError(
            "DynamoDB needs the package aiobotocore: pip install 'hf_async_store[dynamodb]'"
        )
    return ConfigurationError(
        f"dynamodb_strategy: the AWS configuration or credentials cannot be used: {name}"
    )


def _credentials_service_error(exc: Exception) -> StorageError:
    """The error for an error response of STS or SSO to a request for credentials."""
    response: Mapping[str, Any] = getattr(exc, "response", {})
    error = response.get("Error") or {}
    code, message = short(str(error.get("Code", ""))), str(error.get("Message", ""))
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 400)
    spec = CODES.get(code) or CODES.get(code.removesuffix("Error"))
    request = f"{getattr(exc, 'operation_name', 'a request')} for AWS credentials"
    if spec is not None and issubclass(spec.kind, UnavailableError):
        return spec.kind(f"{request} failed: {code}")
    if status >= 500:
        return UnavailableError(f"{request} failed: {code or status}")
    if spec is _WRONG_SECRET and _is_clock_error(message):
        spec = _CLOCK
    if spec is None or spec is _DENIED:
        return PermissionDeniedError(
            f"{request} was denied: {code}{_action(message)}; check role_arn and source_profile of "
            "the profile, and the trust policy of the role"
        )
    return spec.kind(f"{request} was denied: {code}; check the credentials that sign it")


def scaling_error(exc: Exception) -> StorageError:
    """The error for a failed request to Application Auto Scaling, sent through a botocore client."""
    if isinstance(exc, StorageError):
        return exc
    if type(exc).__name__ != "ClientError":
        return of_client(exc, "Application Auto Scaling")
    response: Mapping[str, Any] = getattr(exc, "response", {})
    code = short(str((response.get("Error") or {}).get("Code", "")))
    spec = CODES.get(code, _ErrorSpec(UnavailableError, "", retryable=False))
    return spec.kind(
        f"Application Auto Scaling rejected the request: {code}", retryable=spec.retryable
    )


def _file_error(exc: OSError) -> ConfigurationError:
    named = f" {exc.filename}" if exc.filename else ""
    return ConfigurationError(
        f"a file or program of the AWS configuration cannot be used:{named}: {exc.strerror} "
        "(check AWS_CA_BUNDLE, ca_bundle, credential_process and web_identity_token_file)"
    )


def _cause(exc: Exception) -> object:
    """The error that botocore wrapped, or `exc` itself."""
    return getattr(exc, "kwargs", {}).get("error", exc)


def _message_of(exc: Exception) -> str:
    return str(exc)[:500]


def of_client(exc: Exception, service: str, host: str = "") -> StorageError:
    """The error for an exception of botocore that was raised while a request was sent.

    Args:
        host: the host that the request was sent to, if it is known.
    """
    where = f"{service} at {host}" if host else service
    name = type(exc).__name__
    cause = _cause(exc)
    if isinstance(cause, _FILE_ERRORS):
        return _file_error(cause)
    if name == "HTTPClientError" and isinstance(cause, ssl.SSLError):
        # Raised before a connection is opened. botocore raises failures of a connection as its
        # own `SSLError`.
        return ConfigurationError(
            f"the certificates of the AWS configuration cannot be used: {cause.reason} "
            "(check AWS_CA_BUNDLE and ca_bundle)"
        )
    if name in _CONFIGURATION:
        return ConfigurationError(f"dynamodb_strategy: {_message_of(exc)}")
    if name == "SSLError":
        return _tls_error(exc, where)
    if name in _NOT_CONNECTED or (name == "EndpointConnectionError" and _never_connected(exc)):
        return UnavailableError(
            f"{where} cannot be reached: {name}{_reason(cause)}; check region, endpoint_url and the network"
        )
    return ResponseLost(f"no response from {where}: {name}", outcome_unknown=True)


def _tls_error(exc: Exception, where: str) -> StorageError:
    cause = getattr(_cause(exc), "certificate_error", None)
    inner = cause or getattr(_cause(exc), "os_error", None)
    if isinstance(inner, ssl.SSLCertVerificationError):
        return ConfigurationError(
            f"the certificate of {where} is not trusted: {inner.verify_message}; check "
            "dynamodb_strategy.endpoint_url and AWS_CA_BUNDLE"
        )
    return UnavailableError(f"{where} cannot be reached: SSLError{_reason(inner)}")


def _reason(cause: object) -> str:
    reason = getattr(cause, "strerror", None) or getattr(cause, "reason", None)
    return f" ({str(reason)[:200]})" if reason else ""


def _never_connected(exc: Exception) -> bool:
    """Whether no connection was established, so that nothing was sent.

    aiobotocore raises the same error if a connection is reset while waiting for the response.
    """
    from aiohttp import ClientConnectorError

    return isinstance(_cause(exc), ClientConnectorError | socket.gaierror)


def refused_query(exc: StatementRefused) -> InvalidQueryError:
    """The error for an expression of the caller that DynamoDB rejected."""
    return InvalidQueryError(str(exc))
