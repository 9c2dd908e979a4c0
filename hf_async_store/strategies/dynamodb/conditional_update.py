"""Updates with a condition of the caller, in DynamoDB's expression language."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, cast

from hf_async_store.errors import (
    ConcurrencyConflictError,
    CorruptionError,
    EntityNotFoundError,
    StorageError,
    UnavailableError,
)
from hf_async_store.preconditions import next_version, patched
from hf_async_store.strategies.dynamodb.errors import (
    ConditionFailed,
    StatementRefused,
    TableMissing,
    conflict,
    refused_query,
)
from hf_async_store.strategies.dynamodb.items import (
    DECLARATION_DIGEST,
    new_token,
    size_bound_of,
    size_of,
    token_of,
)
from hf_async_store.strategies.dynamodb.write_op import WriteOp, deleted_meanwhile
from hf_async_store.strategies.dynamodb.write_requests import unchanged, update_item
from hf_async_store.values import MAX_ENTITY_BYTES, Entity, check_size

if TYPE_CHECKING:
    from hf_async_store.changes import Patch
    from hf_async_store.strategies.dynamodb.client import Client
    from hf_async_store.strategies.dynamodb.codec import Attributes
    from hf_async_store.strategies.dynamodb.expressions import Names
    from hf_async_store.strategies.dynamodb.reading import Reading

_ROUNDS_WITHOUT_PAUSE: Final = 8


class ConditionalUpdate:
    """One update with a condition.

    Args:
        condition: a ConditionExpression with placeholders of `names`.
    """

    def __init__(
        self, client: Client, reading: Reading, op: WriteOp, condition: str, names: Names
    ) -> None:
        self._client = client
        self._reading = reading
        self._op = op
        self._condition = condition
        self._names = names
        self._retries = client.retries()

    async def run(self) -> int:
        """Update the entity; return the new version.

        Raises:
            EntityNotFoundError: the entity does not exist.
            ConcurrencyConflictError: the condition or the expected version does not hold.
            InvalidQueryError: DynamoDB rejected the condition.
        """
        rounds = 0
        while True:
            rounds += 1
            if rounds > _ROUNDS_WITHOUT_PAUSE and not await self._retries.pause():
                raise conflict(self._op.change.key.collection, self._op.change.key.id)
            try:
                return self._version_in((await self._send())["Attributes"])
            except ConditionFailed as exc:
                await self._condition_failed(exc)
            except (ConcurrencyConflictError, UnavailableError) as exc:
                if exc.outcome_unknown:
                    # The condition may still hold; a repeated request could be applied twice.
                    return await self._own_version(exc)
                if not await self._retries.pause_after(exc):
                    raise

    async def _send(self) -> dict[str, Any]:
        request = update_item(self._op, self._condition, self._names.copy())
        try:
            return await self._client.call("UpdateItem", request)
        except StatementRefused as exc:
            raise refused_query(exc) from exc
        except TableMissing as exc:
            raise deleted_meanwhile(self._op) from exc

    async def _condition_failed(self, exc: ConditionFailed) -> None:
        """Return if the request is to be repeated."""
        op, item = self._op, exc.item
        if item is None:
            raise EntityNotFoundError(op.change.key.collection, op.change.key.id) from exc
        if item.get(DECLARATION_DIGEST) != op.mapping.digest:
            await self._rewrite(item)
        elif self._may_be_size(item):
            op.observed = item
        else:
            raise self._conflict(item) from exc

    async def _rewrite(self, item: Attributes) -> None:
        """Rewrite an item that was written with another declaration or by another program."""
        op, mapping, key = self._op, self._op.mapping, self._op.change.key
        token = token_of(item) or new_token()
        mapping.check_attributes(item)
        new = mapping.item(key.id, mapping.entity(item), op.version_of(item), token)
        mapping.keep_encodings(new, item)
        request = {"TableName": op.table, "Item": new, **unchanged(mapping, item)}
        # The entity remains the same, so a delayed or repeated request has no effect.
        with suppress(ConditionFailed):
            await self._client.read("PutItem", request)

    def _may_be_size(self, item: Attributes) -> bool:
        """Whether only the condition on the size may have failed, so that the update can be repeated.

        Raises:
            UnsupportedValueError: the updated entity would exceed the limit.
        """
        op, change = self._op, cast("Patch", self._op.change)
        if isinstance(change.expect, int) and op.version_of(item) != change.expect:
            return False
        if op.observed is not None:
            return token_of(item) != token_of(op.observed)  # another write came first
        added_size = size_of(cast("Entity", dict(change.fields)))
        if (size_bound_of(item) or 0) <= MAX_ENTITY_BYTES - added_size:
            return False
        check_size(patched(op.mapping.entity(item), change.fields, op.version_of(item)))
        return True

    def _conflict(self, item: Attributes) -> StorageError:
        op, key = self._op, self._op.change.key
        version = op.version_of(item)
        if isinstance(op.change.expect, int) and version != op.change.expect:
            return op.version_conflict(item)
        next_version(key, version)
        return ConcurrencyConflictError(
            f"condition_expression does not hold for {op.name}",
            collection=key.collection,
            entity_id=key.id,
            actual=version,
            current=op.mapping.entity(item),
        )

    async def _own_version(self, lost: StorageError) -> int:
        """The version written by a request whose response was lost.

        Raises:
            UnavailableError: whether it was applied is unknown; has `outcome_unknown`.
        """
        op = self._op
        try:
            item = await self._reading.item(op.change.key)
        except StorageError as exc:
            raise op.unknown(exc) from exc
        if item is not None and token_of(item) == op.token:
            return self._version_in(item)
        raise op.unknown(lost) from lost

    def _version_in(self, item: Attributes) -> int:
        try:
            return self._op.version_of(item)
        except CorruptionError as exc:
            exc.outcome_unknown = True
            raise
