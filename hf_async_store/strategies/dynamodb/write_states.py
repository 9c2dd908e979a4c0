"""The states of a write, as a table: state and response give the next state. Without I/O.

A write is sent in attempts until it has a result. Its state is the condition under which the next
attempt is applied, or the result:

| state | meaning |
|---|---|
| start | no attempt has been chosen; see `first_state` |
| read | the next request reads the item |
| insert | applied if there is no item |
| upsert | applied if there is no item, or one that was written with this declaration |
| existing | applied if there is an item |
| version | applied if the item has the expected version, and was written before this write was requested |
| token | applied if the item has the token of the observed one |
| cached | applied if the item has the token in the write cache |
| applied | result: success |
| nothing | result: there was nothing to delete |
| not_found, exists, conflict | results: refused because of the stored entity |
| error | result: an error that a repetition does not resolve |
| unknown | result: whether an attempt was applied cannot be determined |

The doubt of a write tells whether an earlier attempt may have been applied. "failed_insert": perhaps,
but not later, because the server reported a failure of an attempt that may have inserted the item; if
there is no item, it was not applied. "open": it may have been applied, or may be applied later.

An attempt without a response is repeated only in a state whose condition no attempt meets after
another one was applied: version, token and cached. In the others, the item is read: if it has the token
of this write, the write was applied. While there is doubt, only that token is a proof; whatever else
the item contains may be the consequence of an attempt of this write, and is never reported as a
conflict.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias, cast, get_args

from hf_async_store.changes import ABSENT, ANY, Change, Delete, Put

if TYPE_CHECKING:
    from collections.abc import Mapping

Intent: TypeAlias = Literal["create", "save", "delete", "replace", "change", "expect"]
"""What a change requires of the entity. "create": it does not exist. "save" and "delete": nothing.
"replace" (of the whole entity) and "change": it exists. "expect": it has a certain version."""

Attempt: TypeAlias = Literal["insert", "upsert", "existing", "version", "token", "cached"]
Result: TypeAlias = Literal[
    "applied", "nothing", "not_found", "exists", "conflict", "error", "unknown"
]
State: TypeAlias = Literal["start", "read"] | Attempt | Result
Doubt: TypeAlias = Literal["none", "failed_insert", "open"]

Response: TypeAlias = Literal[
    # To an attempt that was applied. "silent": without the item, and therefore without the new version.
    "applied",
    "silent",
    # To a read, or to an attempt whose condition does not hold. "own": the item has the token of this
    # write. "exists": the response does not contain the item. "not_older": it was not written before
    # this write was requested. "other": it does not have the token of the observed item. "unsuitable":
    # it is as expected, but has another declaration or is near a limit.
    "missing",
    "own",
    "exists",
    "found",
    "other_version",
    "not_older",
    "other",
    "unsuitable",
    # "unsupported": no statement can express the attempt, or the server rejected it as invalid.
    # "busy": not applied; a repetition may succeed. "failed": applied before this response, or never.
    # "lost": no valid response; the attempt may have been applied, and may be applied later.
    "unsupported",
    "busy",
    "failed",
    "lost",
    "error",
]

ATTEMPTS: Final = frozenset(get_args(Attempt))
RESULTS: Final = frozenset(get_args(Result))

_Target: TypeAlias = (
    State
    | Literal["if_missing", "if_exists"]  # depends on the intent
    | Literal["read whole", "insert whole", "token whole"]  # from now on, writes the whole item
)

# Every attempt may also be answered by "applied", "own", "busy" and "error". A response that is not
# listed contradicts the attempt; it leaves the outcome unknown.
_NEXT: Final[Mapping[State, Mapping[Response, _Target]]] = {
    "read": {
        "own": "applied",
        "found": "token",
        "missing": "if_missing",
        "other_version": "conflict",
        "error": "error",
    },
    "insert": {
        "exists": "if_exists",
        "unsupported": "insert whole",
        "failed": "read",
        "lost": "read",
    },
    "upsert": {
        "missing": "read whole",
        "unsuitable": "token whole",
        "unsupported": "read whole",
        "failed": "read",
        "lost": "read",
    },
    "existing": {
        "silent": "read",
        "missing": "if_missing",
        "unsuitable": "token whole",
        "unsupported": "read whole",
        "failed": "read",
        "lost": "read",
    },
    "version": {
        "missing": "if_missing",
        "other_version": "conflict",
        "not_older": "token",
        "unsuitable": "token whole",
        "unsupported": "read whole",
        "failed": "version",
        "lost": "version",
    },
    "token": {
        "missing": "if_missing",
        "other_version": "conflict",
        "other": "token",
        "unsuitable": "token whole",
        "unsupported": "token whole",
        "failed": "token",
        "lost": "token",
    },
    "cached": {
        "missing": "if_missing",
        "other_version": "conflict",
        "other": "start",
        "unsuitable": "token whole",
        "unsupported": "read whole",
        "failed": "cached",
        "lost": "cached",
    },
}

# While there is doubt, these take precedence.
_IN_DOUBT: Final[Mapping[Response, State]] = {
    "missing": "unknown",
    "exists": "read",
    "found": "unknown",
    "other_version": "unknown",
    "not_older": "unknown",
    "other": "unknown",
}
_IF_MISSING: Final[Mapping[Intent, State]] = {
    "create": "insert",
    "save": "insert",
    "delete": "nothing",
    "replace": "not_found",
    "change": "not_found",
    "expect": "not_found",
}


class StoredItem(NamedTuple):
    """The stored item, compared with a write.

    Attributes:
        is_own: it has the token of this write.
        has_version: it has the expected version, if the write expects one.
        is_older: it was written before this write was requested, if the write expects a version.
        is_observed: it has the token of the observed item.
    """

    is_own: bool
    has_version: bool
    is_older: bool
    is_observed: bool


class Step(NamedTuple):
    """What follows from a response.

    Attributes:
        whole: from now on, attempts write the whole item, in a request of their own.
    """

    state: State
    doubt: Doubt
    whole: bool


def intent_of(change: Change) -> Intent:
    if change.expect is ABSENT:
        return "create"
    if isinstance(change.expect, int):
        return "expect"
    if change.expect is ANY:
        return "delete" if isinstance(change, Delete) else "save"
    return "replace" if isinstance(change, Put) else "change"


def first_state(
    intent: Intent, *, whole: bool, is_cached: bool, alone: bool, reads_first: bool
) -> State:
    """The state for the first attempt of a write.

    Args:
        is_cached: the write cache contains the state of the entity.
        alone: no other write is sent at the same time.
        reads_first: read the item instead of sending an attempt that cannot be repeated.
    """
    if intent == "create":
        return "insert"
    if whole:
        return "read"
    if is_cached:
        return "cached"
    if intent == "expect":
        return "version"
    if intent == "save" and alone and not reads_first:
        return "upsert"
    # No statement inserts or replaces.
    return "read" if reads_first or intent in ("save", "replace") else "existing"


def response_of(state: State, item: StoredItem | None, *, whole: bool) -> Response:
    """The response in an item that was read, or that did not meet the condition of an attempt."""
    if item is None:
        return "missing"
    if item.is_own:
        return "own"
    if state == "insert":
        return "exists"
    if not item.has_version:
        return "other_version"
    if state == "read":
        return "found"
    if state == "version" and not item.is_older:
        return "not_older"
    # Writes of the whole item have no other condition than the token.
    is_other = state in ("token", "cached") and (whole or not item.is_observed)
    return "other" if is_other else "unsuitable"


def next_step(
    state: State, doubt: Doubt, response: Response, intent: Intent, *, whole: bool
) -> Step:
    """What follows from a response to an attempt or a read."""
    target = _target(state, doubt, response, whole=whole)
    if target == "if_missing":
        target = _IF_MISSING[intent]
    elif target == "if_exists":
        target = "exists" if intent == "create" else "read"
    name, _, is_whole = target.partition(" ")
    if response == "failed":
        is_insert = state in ("insert", "upsert") and doubt != "open"
        doubt = "failed_insert" if is_insert else "open"
    elif response in ("lost", "silent"):
        doubt = "open"
    return Step(cast("State", name), doubt, whole or bool(is_whole))


def _target(state: State, doubt: Doubt, response: Response, *, whole: bool) -> _Target:
    if state in ATTEMPTS:
        if response in ("applied", "own"):
            return "applied"
        if response == "busy":
            return state
        if response == "error" or (response == "unsupported" and whole):
            return "error"
    if doubt != "none":
        if response == "missing" and doubt == "failed_insert":
            return "insert"
        if state == "read" and response == "error":
            return "unknown"
        if response in _IN_DOUBT:
            return _IN_DOUBT[response]
    return _NEXT[state].get(response, "unknown")
