"""HTTP without a framework: errors as problem documents, versions as entity tags, links between pages.

It needs no other package; `integrations.starlette` answers requests with it. Headers of requests are
mappings that ignore case, or have names in lower case.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from hashlib import blake2s
from http import HTTPStatus
from typing import Any, Final, TypeAlias
from urllib.parse import urlencode

from msgspec import Struct

from hf_async_store.changes import ABSENT, ANY, Expect
from hf_async_store.errors import (
    AlreadyExistsError,
    BatchError,
    ClaimLostError,
    ConcurrencyConflictError,
    DiskFullError,
    EntityNotFoundError,
    FeedExpiredError,
    InvalidInputError,
    LockTimeoutError,
    OperationTimeoutError,
    PartialChangeError,
    ReadOnlyStoreError,
    ReferenceViolationError,
    StorageError,
    StoreClosedError,
    TransactionAbortedError,
    TransactionTooLargeError,
    UnavailableError,
    UniqueViolationError,
)
from hf_async_store.query import Page
from hf_async_store.values import CREATED_AT, UPDATED_AT, Entity, version_of

Headers: TypeAlias = Mapping[str, str]

PROBLEM_TYPE: Final = "application/problem+json"
"""The media type of a problem document (RFC 9457)."""

_RETRY_SECONDS: Final = 1


class PreconditionFailedError(StorageError):
    """The If-Match or If-None-Match of a request is not fulfilled; nothing was written."""


# -- errors ---------------------------------------------------------------------------------

_STATUSES: Final[tuple[tuple[type[StorageError], int], ...]] = (
    (EntityNotFoundError, 404),
    (AlreadyExistsError, 409),
    (UniqueViolationError, 409),
    (ReferenceViolationError, 409),
    (ConcurrencyConflictError, 409),
    (ClaimLostError, 409),
    (FeedExpiredError, 410),
    (PreconditionFailedError, 412),
    (TransactionTooLargeError, 413),
    (InvalidInputError, 422),
    (LockTimeoutError, 503),
    (OperationTimeoutError, 503),
    (UnavailableError, 503),
    (ReadOnlyStoreError, 503),
    (DiskFullError, 503),
    (StoreClosedError, 503),
)


class Problem(Struct, frozen=True):
    """What to answer to a request that failed.

    Attributes:
        status: the status code.
        headers: `Content-Type`, and `Retry-After` if the same request may succeed later.
        document: the body, to be encoded as JSON.
    """

    status: int
    headers: dict[str, str]
    document: dict[str, Any]


def problem_of(error: StorageError, headers: Headers | None = None) -> Problem:
    """The problem document of an error.

    Errors with status 500 and above are described by their status alone: what they say of servers, files
    and stored data is for the log.

    Args:
        headers: of the request, by which a conflict may be a failed precondition.
    """
    status = status_of(error, headers)
    answer = {"Content-Type": PROBLEM_TYPE}
    if status == HTTPStatus.SERVICE_UNAVAILABLE and error.retryable:
        answer["Retry-After"] = str(_RETRY_SECONDS)
    document: dict[str, Any] = {"title": HTTPStatus(status).phrase, "status": status}
    if status < HTTPStatus.INTERNAL_SERVER_ERROR:
        document |= {"detail": _detail(error), "error": type(error).__name__, **_place(error)}
    document |= {"retryable": error.retryable, "outcome_unknown": error.outcome_unknown}
    if isinstance(error, PartialChangeError):
        document["done"] = error.done
    if isinstance(error, BatchError):
        document["outcomes"] = [
            problem_of(each, headers).document if isinstance(each, StorageError) else None
            for each in error.outcomes
        ]
    return Problem(status, answer, document)


def status_of(error: StorageError, headers: Headers | None = None) -> int:
    """The status code for an error; see `problem_of`."""
    if isinstance(error, BatchError):
        failed = [each for each in error.outcomes if isinstance(each, StorageError)]
        return max(status_of(each, headers) for each in failed)
    if isinstance(error, TransactionAbortedError) and isinstance(error.__cause__, StorageError):
        return status_of(error.__cause__, headers)
    if isinstance(error, PartialChangeError):
        return status_of(error.cause, headers)
    if headers is not None and _has_failed_precondition(error, headers):
        return 412
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), 500)


def _has_failed_precondition(error: StorageError, headers: Headers) -> bool:
    """Whether an error says that the If-Match or If-None-Match of its request is not fulfilled."""
    if isinstance(error, AlreadyExistsError):
        return headers.get("if-none-match", "").strip() == "*"
    if isinstance(error, ConcurrencyConflictError) and error.expected is not None:
        return error.expected in map(_version_in, _strong_tags(headers.get("if-match", "")))
    return False


def _detail(error: StorageError) -> str:
    text = str(error)
    quoted: BaseException | None = error  # also an error in whose text it is
    while quoted is not None:
        if isinstance(quoted, UniqueViolationError):  # its message names another entity
            shown = f"another entity of {quoted.collection} has the same {quoted.field}"
            text = text.replace(str(quoted), shown)
        quoted = quoted.__cause__
    return text


def _place(error: StorageError) -> dict[str, Any]:
    """The members that tell a program which entity is concerned."""
    members = {"collection": "collection", "entity_id": "id", "fields": "fields"}
    found = {name: getattr(error, attribute, None) for attribute, name in members.items()}
    return {name: each for name, each in found.items() if each is not None}


# -- entity tags ----------------------------------------------------------------------------
#
# A tag is a strong validator (RFC 9110, section 8.8.1): it is another one after every change. The version
# alone begins again at 1 if an entity is deleted and created again, so the times of its creation, which the
# caller may give, and of its last change are part of it.

_TAG: Final = re.compile(r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"')
_TAGS: Final = re.compile(rf"[\s,]*{_TAG.pattern}\s*(?:,\s*(?:{_TAG.pattern}\s*)?)*")
_VERSION: Final = re.compile(r'"(\d{1,18})-[0-9a-f]{12}"')
_ANYTHING: Final = "*"


def entity_tag(entity: Entity) -> str:
    """The ETag of an entity, which is another one after every change of the entity."""
    times = repr((entity.get(CREATED_AT), entity.get(UPDATED_AT)))
    return f'"{version_of(entity)}-{blake2s(times.encode(), digest_size=6).hexdigest()}"'


def expected_version(headers: Headers) -> int | Expect:
    """The `expected_version` of a request: that of its If-Match, or ABSENT for `If-None-Match: *`.

    By it, the store compares in the same step in which it writes. An entity that was deleted and created
    again, and since then written as often as before, is taken for the first one: where that matters, use
    `check_preconditions` in a transaction.

    Raises:
        PreconditionFailedError: it cannot be fulfilled: no entity has this tag, or both are given.
        InvalidInputError: malformed, or more than one tag can express: `check_preconditions` takes it.
    """
    match, none_match = headers.get("if-match"), headers.get("if-none-match")
    if none_match is not None:
        if none_match.strip() != _ANYTHING:
            raise InvalidInputError("If-None-Match of a change must be *")
        if match is not None:
            raise PreconditionFailedError("If-Match and If-None-Match: * exclude each other")
        return ABSENT
    if match is None:
        return ANY
    tags = [] if match.strip() == _ANYTHING else _tags(match)
    if len(tags) != 1:
        raise InvalidInputError(
            "If-Match of this request must be one entity tag; to take * or several tags, the endpoint "
            "needs check_preconditions in a transaction"
        )
    version = _version_in(tags[0])
    if version is None:
        raise PreconditionFailedError(f"no entity has the tag {tags[0]}")
    return version


def check_preconditions(headers: Headers, entity: Entity | None) -> None:
    """Check the If-Match and If-None-Match of a request that changes an entity (RFC 9110, section 13).

    The entity must have been read in the transaction that changes it.

    Args:
        entity: as it is before the change; None: it does not exist.

    Raises:
        PreconditionFailedError: one of them is not fulfilled.
        InvalidInputError: one of them is malformed.
    """
    if not is_match(headers, entity) or is_none_match(headers, entity):
        raise PreconditionFailedError("the entity is not the one that the request expects")


def is_match(headers: Headers, entity: Entity | None) -> bool:
    """Whether If-Match, if it is given, is fulfilled. Weak tags never match."""
    match = headers.get("if-match")
    if match is None or entity is None:
        return match is None
    return match.strip() == _ANYTHING or entity_tag(entity) in _tags(match)


def is_none_match(headers: Headers, entity: Entity | None) -> bool:
    """Whether If-None-Match names the entity: a client that reads it has it already."""
    none_match = headers.get("if-none-match")
    if none_match is None or entity is None:
        return False
    tags = [each.removeprefix("W/") for each in _tags(none_match)]
    return none_match.strip() == _ANYTHING or entity_tag(entity) in tags


def _tags(header: str) -> list[str]:
    """The entity tags of a header.

    Raises:
        InvalidInputError: it is malformed.
    """
    if header.strip() == _ANYTHING:
        return []
    if not _TAGS.fullmatch(header):
        raise InvalidInputError('an entity tag is written in quotes, as it is in ETag: "..."')
    return _TAG.findall(header)


def _strong_tags(header: str) -> list[str]:
    return [each for each in _TAG.findall(header) if not each.startswith("W/")]


def _version_in(tag: str) -> int | None:
    """The version in a strong tag; None if `entity_tag` has not made it."""
    found = _VERSION.fullmatch(tag)
    return int(found[1]) if found else None


# -- pages ----------------------------------------------------------------------------------


def page_headers(page: Page, parameters: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The Link header (RFC 8288) of a page to the next one; empty on the last.

    The link is relative, and so needs to know of no proxy: it has the query parameters of the request, with
    `cursor` for that of the next page.

    Args:
        parameters: the query parameters of the request.
    """
    if page.cursor is None:
        return {}
    kept = [(name, value) for name, value in parameters if name != "cursor"]
    return {"Link": f'<?{urlencode([*kept, ("cursor", page.cursor)])}>; rel="next"'}
