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
| condition | applied if the item satisfies a condition of the caller |
| import | applied whatever is stored; if no response is received, also later |
| applied | result: success |
| nothing | result: there was nothing to delete |
| not_found, exists, conflict | results: refused because of the stored entity |
| error | result: an error that a repetition does not resolve |
| unknown | result: whether an attempt was applied cannot be determined |

An attempt without a response is repeated only in a state whose condition no attempt meets after another
one was applied (version, token and cached, and condition if it also requires the observed token), or if it
is an import, which overwrites whatever is stored.
In the others, the item is read: if it has the token of this write, the write was applied. While there
is doubt about earlier attempts, only that token is a proof; whatever else the item contains may be the
consequence of an attempt of this write, and is never reported as a conflict.
"""

from __future__ import annotations

from functools import cache
from typing import Final, Literal, NamedTuple, TypeAlias, cast, get_args

from hf_async_store.changes import ABSENT, ANY, Change, Delete, Put

Intent: TypeAlias = Literal["create", "save", "delete", "replace", "change", "expect"]
"""What a change requires of the entity. "create": it does not exist. "save" and "delete": nothing.
"replace" (of the whole entity) and "change": it exists. "expect": it has a certain version."""

Statement: TypeAlias = Literal["insert", "existing", "version", "token", "cached"]
Separate: TypeAlias = Literal["upsert", "condition", "import"]
Result: TypeAlias = Literal[
    "applied", "nothing", "not_found", "exists", "conflict", "error", "unknown"
]
State: TypeAlias = Literal["start", "read"] | Statement | Separate | Result

Doubt: TypeAlias = Literal["none", "failed_insert", "open"]
"""Whether an earlier attempt may have been applied. "failed_insert": perhaps, but not later, because the
server reported a failure of an attempt that may have inserted the item; if there is no item, it was not
applied. "open": it may have been applied, or may be applied later."""

# fmt: off
Response: TypeAlias = Literal[
    "applied",
    "silent",         # the attempt was applied; the response does not contain the new version
    # To a read, or to an attempt whose condition does not hold:
    "own",            # the item has the token of this write
    "missing",
    "exists",         # there is an item; the response does not contain it
    "found",          # the item was read
    "other_version",
    "not_older",      # the item was not written before this write was requested
    "other",          # the item does not have the token of the observed one
    "unsuitable",     # the item is as expected, but has another declaration, or is near a limit
    "unmet",          # the item does not satisfy the condition of the caller
    "unsupported",    # no statement can express the attempt, or the server rejected it as invalid
    "busy",           # the attempt was not applied; a repetition may succeed
    "failed",         # the server failed; the attempt was applied before, or never
    "lost",           # no valid response; the attempt may have been applied, or may be applied later
    "error",
]
# fmt: on

STATEMENTS: Final = frozenset(get_args(Statement))
"""The attempts that can be sent as statements."""

ATTEMPTS: Final = STATEMENTS | frozenset(get_args(Separate))
RESULTS: Final = frozenset(get_args(Result))

# "*": from now on, attempts write the whole item. "?": depends on the intent. "-": the response
# contradicts the attempt, so that the outcome is unknown. "doubt", unless "=", is the next state in any
# state while there is doubt.
_TABLE: Final = """
response      read     insert  upsert  existing version  token    cached   condition import  doubt
applied       -        applied applied applied  applied  applied  applied  applied   applied =
silent        -        -       -       read     -        -        -        -         -       =
own           applied  applied applied applied  applied  applied  applied  applied   -       =
missing       missing? -       read*   missing? missing? missing? missing? missing?  -       unknown
exists        -        exists? -       -        -        -        -        -         -       read
found         token    -       -       -        -        -        -        -         -       unknown
other_version conflict -       -       -        conflict conflict conflict conflict  -       unknown
not_older     -        -       -       -        token    -        -        -         -       unknown
other         -        -       -       -        -        token    start    -         -       unknown
unsuitable    -        -       token*  token*   token*   token*   token*   condition -       =
unmet         -        -       -       -        -        -        -        conflict  -       unknown
unsupported   -        insert* read*   read*    read*    token*   read*    error     error   =
busy          -        insert  upsert  existing version  token    cached   condition import  =
failed        -        read    read    read     version  token    cached   read      import  =
lost          -        read    read    read     version  token    cached   read      import  =
error         error    error   error   error    error    error    error    error     error   =
"""
_COLUMNS, *_ROWS = (each.split() for each in _TABLE.strip().splitlines())
_NEXT: Final = {
    (state, row[0]): target
    for row in _ROWS
    for state, target in zip(_COLUMNS[1:], row[1:], strict=True)
}
_IF_MISSING: Final[dict[Intent, State]] = {
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


def is_import(change: Change) -> bool:
    """Whether the change replaces the entity unconditionally, so that it can be repeated."""
    is_plain = change.expect is ANY and change.mark is None
    return is_plain and isinstance(change, Put) and change.import_version is not None


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


@cache
def next_step(state: State, doubt: Doubt, response: Response, intent: Intent, whole: bool) -> Step:
    """What follows from a response to an attempt or a read."""
    target = _target(state, doubt, response, whole)
    if target == "missing?":
        target = _IF_MISSING[intent]
    elif target == "exists?":
        target = "exists" if intent == "create" else "read"
    if response == "failed":
        is_insert = state in ("insert", "upsert") and doubt != "open"
        doubt = "failed_insert" if is_insert else "open"
    elif response in ("lost", "silent"):
        doubt = "open"
    return Step(cast("State", target.removesuffix("*")), doubt, whole or target.endswith("*"))


def _target(state: State, doubt: Doubt, response: Response, whole: bool) -> str:
    target = _NEXT[state, response]
    if target == "-":
        return "unknown"
    if response == "unsupported" and whole:
        return "error"  # there is no other form
    if doubt == "none":
        return target
    if response == "missing" and doubt == "failed_insert":
        return "insert"
    if response == "error" and state == "read":
        return "unknown"
    in_doubt = _NEXT["doubt", response]
    return target if in_doubt == "=" else in_doubt
