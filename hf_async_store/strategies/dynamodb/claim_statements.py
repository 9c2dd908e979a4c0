"""Claims of several entities in one request, each as a statement with its own condition and outcome."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hf_async_store.coalescing import Coalescer, taking_at_once
from hf_async_store.errors import StorageError
from hf_async_store.strategies.dynamodb.claim_items import claim_parts, request_in
from hf_async_store.strategies.dynamodb.errors import (
    ConditionFailed,
    StatementRefused,
    short,
    translate,
)
from hf_async_store.strategies.dynamodb.items import CLAIM, TOKEN

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hf_async_store.strategies.dynamodb.client import Client
    from hf_async_store.strategies.dynamodb.codec import Attribute, Attributes

MAX_STATEMENTS: Final = 25
_LANES: Final = 2
"""So many requests at once: with more of them, fewer claims would share one."""


class ClaimStatement(NamedTuple):
    """The claim of an item.

    Attributes:
        key: the name and value of its key.
        observed: the item as it was read, and must still be.
        claim: the new claim.
        made: identifies the request, see `claim_items`.
        alone: returns the UpdateItem request that does the same.
    """

    table: str
    key: tuple[str, str]
    observed: Attributes
    claim: Attribute
    made: str
    alone: Callable[[], dict[str, Any]]

    @property
    def statement(self) -> dict[str, Any]:
        old = claim_parts(self.observed)
        same = [f'"{CLAIM}"."{each}" = ?' for each in old] or [f'"{CLAIM}" IS MISSING']
        key, entity_id = self.key
        # The names of tables and keys are validated where they are declared; all else is a parameter.
        text = f'UPDATE "{self.table}" SET "{CLAIM}" = ? WHERE "{key}" = ? AND "{TOKEN}" = ?'  # noqa: S608
        parameters = [self.claim, {"S": entity_id}, self.observed[TOKEN], *old.values()]
        return {
            "Statement": " AND ".join([text, *same]),
            "Parameters": parameters,
            "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
        }


class ClaimStatements:
    """Sends the claims that the tasks of a store make at the same time."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._is_supported = True
        self._together: Coalescer[ClaimStatement, str | None | StorageError] = Coalescer(
            taking_at_once(self._execute), lanes=_LANES, size=MAX_STATEMENTS, writes=True
        )

    def can_express(self, item: Attributes) -> bool:
        """Whether a statement can claim an item."""
        return (
            self._is_supported and TOKEN in item and (CLAIM not in item or bool(claim_parts(item)))
        )

    async def claim(self, claim: ClaimStatement) -> str | None | StorageError:
        """The request whose claim the item has now: this one, if the item was as observed.

        None if the item has no claim; an error if that is not known.
        """
        [outcome] = await self._together.submit([claim], None)
        return outcome

    async def _execute(self, claims: list[ClaimStatement]) -> list[str | None | StorageError]:
        if len(claims) == 1:
            return [await self._execute_alone(claims[0])]
        statements = [each.statement for each in claims]
        try:
            response = await self._client.call("BatchExecuteStatement", {"Statements": statements})
        except StatementRefused:
            self._is_supported = False
            raise
        return [
            self._outcome(claim, result.get("Error"))
            for claim, result in zip(claims, response["Responses"], strict=True)
        ]

    async def _execute_alone(self, claim: ClaimStatement) -> str | None:
        """As an UpdateItem request, which costs less than a statement."""
        try:
            await self._client.call("UpdateItem", claim.alone())
        except ConditionFailed as exc:
            return request_in(exc.item)
        return claim.made

    def _outcome(
        self, claim: ClaimStatement, error: Mapping[str, Any] | None
    ) -> str | None | StorageError:
        if error is None:
            return claim.made
        code = short(error.get("Code") or "")
        failure = translate(code, error.get("Message") or "", 400, error)
        if isinstance(failure, ConditionFailed):
            return request_in(failure.item)
        if isinstance(failure, StatementRefused):
            self._is_supported = False
        return failure
