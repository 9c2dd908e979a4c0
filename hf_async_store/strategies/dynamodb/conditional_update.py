"""Updates with a condition of the caller, in DynamoDB's expression language."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from hf_async_store.errors import ConcurrencyConflictError, EntityNotFoundError, StorageError
from hf_async_store.preconditions import next_version, patched, present
from hf_async_store.strategies.dynamodb.errors import ConditionFailed
from hf_async_store.strategies.dynamodb.items import (
    CLAIM,
    DECLARATION_DIGEST,
    size_bound_of,
    size_of,
    token_of,
)
from hf_async_store.strategies.dynamodb.write_op import WriteOp
from hf_async_store.strategies.dynamodb.write_requests import rewriting, update_item
from hf_async_store.values import MAX_ENTITY_BYTES, Entity, check_size

if TYPE_CHECKING:
    from hf_async_store.changes import Patch
    from hf_async_store.strategies.dynamodb.client import Client
    from hf_async_store.strategies.dynamodb.codec import Attributes
    from hf_async_store.strategies.dynamodb.expressions import Names
    from hf_async_store.strategies.dynamodb.items import ItemMapping
    from hf_async_store.strategies.dynamodb.write_states import Response


class ConditionalUpdate(WriteOp):
    """An update of an entity that satisfies a condition.

    Args:
        condition: a ConditionExpression with placeholders of `names`.
        ends_claim: it removes the claim of the item.
    """

    def __init__(
        self,
        change: Patch,
        mapping: ItemMapping,
        table: str,
        condition: str,
        names: Names,
        *,
        ends_claim: bool,
    ) -> None:
        super().__init__(change, mapping, table)
        self.state = "condition"
        self._condition = condition
        self._names = names
        self._also_removed = [(CLAIM,)] if ends_claim else []

    async def request(self, client: Client) -> dict[str, Any]:
        """The UpdateItem request.

        First rewrites the observed item, if another program or another declaration wrote it.

        Raises:
            UnsupportedValueError: the updated entity would exceed a limit.
        """
        await self._observe(client)
        if self.observed is not None and self._is_undeclared(self.observed):
            await self._rewrite(client, self.observed)
            self.observed = None
            await self._observe(client)
        return update_item(self, self._condition, self._names.copy(), self._also_removed)

    async def _observe(self, client: Client) -> None:
        """Read the item, if the update depends on it: it computes fields or a composite sort key, or the
        entity may have expired."""
        if not self.whole:
            return
        if self.observed is None:
            key = {self.key[0]: {"S": self.key[1]}}
            params = {"TableName": self.table, "Key": key, "ConsistentRead": True}
            self.observed = (await client.read("GetItem", params)).get("Item")
        entity = None if self.observed is None else self.mapping.entity(self.observed)
        entity = present(self.change, entity)
        if self.observed is None or entity is None:
            raise EntityNotFoundError(self.change.key.collection, self.change.key.id)
        fields, version = cast("Patch", self.change).fields, self.version_of(self.observed)
        check_size(patched(entity, fields, version))

    def _is_undeclared(self, item: Attributes) -> bool:
        is_complete = token_of(item) is not None and size_bound_of(item) is not None
        return item.get(DECLARATION_DIGEST) != self.mapping.digest or not is_complete

    async def _rewrite(self, client: Client, item: Attributes) -> None:
        # The entity remains the same, so a delayed or repeated request has no effect.
        with suppress(ConditionFailed):
            await client.read("PutItem", rewriting(self.mapping, self.table, item))

    def respond_with(self, item: Attributes | None) -> None:
        if item is None or self.state != "condition":
            super().respond_with(item)
            return
        try:
            self.respond(self._response_of(item), item)
        except StorageError as exc:
            self.end(exc)

    def respond(
        self,
        response: Response,
        item: Attributes | None = None,
        cause: StorageError | None = None,
    ) -> None:
        was_sent = self.state == "condition"
        super().respond(response, item, cause)
        if was_sent and self.state == "read" and self.observed is not None:
            self.state = (
                "condition"  # the request requires the observed token, so it can be repeated
            )

    def _response_of(self, item: Attributes) -> Response:
        """Why the condition of the request does not hold.

        Raises:
            UnsupportedValueError: the updated entity would exceed a limit.
        """
        if token_of(item) == self.token:
            return "own"
        is_undeclared = self._is_undeclared(item)
        if self.doubt != "none" and (is_undeclared or not self.is_observed(item)):
            return "other"  # an earlier attempt may have been applied before that
        if is_undeclared:
            return "unsuitable"
        change, version = cast("Patch", self.change), self.version_of(item)
        if isinstance(change.expect, int) and version != change.expect:
            return "other_version"
        if self.observed is not None:
            # The request required the observed token instead of a size.
            return "unmet" if token_of(item) == token_of(self.observed) else "unsuitable"
        added_size = size_of(cast("Entity", dict(change.fields)))
        if (size_bound_of(item) or 0) > MAX_ENTITY_BYTES - added_size:
            check_size(patched(self.mapping.entity(item), change.fields, version))
            return "unsuitable"
        next_version(change.key, version)
        return "unmet"

    def conflict_with(self, item: Attributes) -> StorageError:
        version = self.version_of(item)
        if isinstance(self.change.expect, int) and version != self.change.expect:
            return super().conflict_with(item)
        return ConcurrencyConflictError(
            f"condition_expression does not hold for {self.name}",
            collection=self.change.key.collection,
            entity_id=self.change.key.id,
            actual=version,
            current=self.mapping.entity(item),
        )
