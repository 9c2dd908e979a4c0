"""The claim of an item: its attribute `_l`, and conditions on it.

The attribute is a map: `t` the token, `o` the owner, `r` the era, `e` the end of the lease or of the delay,
`h` whether it is held until then, `a` the number of attempts, `w` a unique text of the request that made
it, by which it is recognised if the response was lost, and which begins with the name of the store and a
dot, and `f` the token of the claim before it if that was released, by which the release is recognised.
A deletion removes it with the item. Updates leave it as it is; what replaces an item as a whole keeps it,
on condition that it has not changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

from hf_async_store.claim_records import ClaimState
from hf_async_store.errors import CorruptionError
from hf_async_store.strategies.dynamodb.expressions import Names
from hf_async_store.strategies.dynamodb.items import CLAIM, token_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from hf_async_store.claim_clock import Moment
    from hf_async_store.strategies.dynamodb.codec import Attribute, Attributes
    from hf_async_store.values import Key

_TOKEN: Final = "t"  # noqa: S105 - the name of a member
_OWNER: Final = "o"
_ERA: Final = "r"
_ENDS: Final = "e"
_HELD: Final = "h"
_ATTEMPTS: Final = "a"
_REQUEST: Final = "w"
_RELEASED: Final = "f"


def claim_in(item: Attributes | None, key: Key) -> ClaimState | None:
    """The claim of an item; None if it has none.

    Raises:
        CorruptionError: another program wrote the attribute.
    """
    if item is None or CLAIM not in item:
        return None
    try:
        claim = item[CLAIM]["M"]
        return ClaimState(
            key.collection,
            key.id,
            claim[_OWNER]["S"],
            int(claim[_TOKEN]["N"]),
            claim[_ERA]["S"],
            float(claim[_ENDS]["N"]),
            bool(claim[_HELD]["BOOL"]),
            int(claim[_ATTEMPTS]["N"]),
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise CorruptionError(
            f"{key.collection} {key.id!r}: its attribute {CLAIM} is not a claim: remove it"
        ) from exc


def claim_attribute(state: ClaimState, request: str, before: ClaimState | None) -> Attribute:
    """The attribute of a new claim, which a request makes.

    Args:
        before: the claim that it replaces.
    """
    members: Attributes = {
        _REQUEST: {"S": request},
        _TOKEN: {"N": str(state.token)},
        _OWNER: {"S": state.owner},
        _ERA: {"S": state.era},
        _ENDS: {"N": repr(state.ends)},
        _HELD: {"BOOL": state.held},
        _ATTEMPTS: {"N": str(state.attempts)},
    }
    if before is not None and not before.held:
        members[_RELEASED] = {"N": str(before.token)}
    return {"M": members}


def request_in(item: Attributes | None) -> str | None:
    """The request that made the claim of an item; without a claim, the one that wrote the item last."""
    found = (item or {}).get(CLAIM, {}).get("M", {}).get(_REQUEST, {}).get("S")
    return cast("str | None", found) or token_of(item or {})


def follows_release(item: Attributes | None, token: int) -> bool:
    """Whether the claim of an item was made after the one with this token was released."""
    members = (item or {}).get(CLAIM, {}).get("M", {})
    return bool(members.get(_RELEASED) == {"N": str(token)})


def same_claim(item: Attributes, names: Names) -> str:
    """The condition that the claim of an item is as it was read."""
    if CLAIM not in item:
        return f"attribute_not_exists({names.name(CLAIM)})"
    compared = [
        f"{names.path((CLAIM, name))} = {names.value(each)}"
        for name, each in claim_parts(item).items()
    ]
    return " AND ".join(compared) or f"attribute_exists({names.name(CLAIM)})"


def claim_parts(item: Attributes) -> Attributes:
    """The members of the claim of an item that change with every change of it; {} if it has none."""
    claim = item.get(CLAIM, {}).get("M", {})
    return {each: claim[each] for each in (_TOKEN, _ENDS, _HELD) if each in claim}


def held_claim(names: Names, token: int, now: Moment, skew: float) -> str:
    """The condition that the claim is held with this token, also by clocks that differ by `skew`."""
    assert now.seconds is not None, "by the wall clock"
    token_, held, era, ends = (names.path((CLAIM, each)) for each in (_TOKEN, _HELD, _ERA, _ENDS))
    return (
        f"{token_} = {names.value({'N': str(token)})} AND {held} = {names.value({'BOOL': True})} "
        f"AND {era} = {names.value({'S': now.era})} "
        f"AND {ends} > {names.value({'N': repr(now.seconds + skew)})}"
    )


def set_end(names: Names, ends: float, *, held: bool) -> str:
    """The UpdateExpression that lets a claim end at a time."""
    return (
        f"SET {names.path((CLAIM, _ENDS))} = {names.value({'N': repr(ends)})}, "
        f"{names.path((CLAIM, _HELD))} = {names.value({'BOOL': held})}"
    )


def also_if(request: dict[str, Any], condition_of: Callable[[Names], str]) -> None:
    """Add a condition to that of a request.

    Args:
        condition_of: returns the condition, with placeholders of the names.
    """
    add_expression(
        request,
        "ConditionExpression",
        lambda names: f"{request['ConditionExpression']} AND {condition_of(names)}",
    )


def add_expression(
    request: dict[str, Any], kind: str, expression_of: Callable[[Names], str]
) -> None:
    """Set an expression of a request that has others."""
    names = Names()
    names.names = dict(request.get("ExpressionAttributeNames", {}))
    names.values = dict(request.get("ExpressionAttributeValues", {}))
    request[kind] = expression_of(names)
    request["ExpressionAttributeNames"] = names.names
    if names.values:
        request["ExpressionAttributeValues"] = names.values


def keep_claim(request: dict[str, Any], item: Attributes, observed: Attributes | None) -> None:
    """Let an item that replaces an observed one have its claim, on condition that it has not changed."""
    if observed is None:
        return
    if CLAIM in observed:
        item[CLAIM] = observed[CLAIM]
    also_if(request, lambda names: same_claim(observed, names))
