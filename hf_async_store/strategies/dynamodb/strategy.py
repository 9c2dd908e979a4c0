"""`DynamoDBStorageStrategy`: the store on DynamoDB, and the verbs that only it has."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from hf_async_store.changes import ANY, Expect, Patch, check_version
from hf_async_store.config import (
    DynamoDBConfig,
    StorageConfig,
    anchored,
    load_config,
    strategy_config,
)
from hf_async_store.driver import run_to_completion
from hf_async_store.errors import InvalidInputError, InvalidQueryError, OperationTimeoutError
from hf_async_store.repository import operation_timeout
from hf_async_store.schema import HOST_FACTORY, Collection
from hf_async_store.strategies.dynamodb.condition_parser import condition
from hf_async_store.strategies.dynamodb.condition_parser import key_condition as read_key_condition
from hf_async_store.strategies.dynamodb.engine import DynamoDBEngine
from hf_async_store.strategies.dynamodb.errors import public_errors
from hf_async_store.strategies.dynamodb.expressions import Names
from hf_async_store.strategies.dynamodb.schema_drift import compared
from hf_async_store.strategy import StorageStrategy, schema_of
from hf_async_store.values import Entity, Value, utc_now

if TYPE_CHECKING:
    from pathlib import Path


class DynamoDBStorageStrategy(StorageStrategy):
    """A store on DynamoDB.

    Args:
        config: `dynamodb://REGION/PREFIX`, a map in the spec's shape, a `StorageConfig` or a
            `DynamoDBConfig`.
        collections: what may be stored.

    Raises:
        ConfigurationError.
    """

    def __init__(
        self,
        config: StorageConfig | DynamoDBConfig | Mapping[str, object] | str | Path,
        *,
        collections: Iterable[Collection] = HOST_FACTORY,
    ) -> None:
        schema = schema_of(collections)
        self._under_way: set[asyncio.Task[int]] = set()
        loaded = anchored(load_config(config))
        self._dynamodb = DynamoDBEngine(strategy_config(loaded, DynamoDBConfig), schema)
        super().__init__(self._dynamodb, schema, loaded)

    def _reopen_with_collections(
        self, collections: Iterable[Collection]
    ) -> DynamoDBStorageStrategy:
        return DynamoDBStorageStrategy(self._dynamodb.config, collections=collections)

    async def create_tables(self) -> list[str]:
        """Make the tables and indexes that are declared and missing, and wait until they are there.

        Sets auto scaling and point-in-time recovery as configured. Safe when several processes do
        it at once; returns what this one made, in words.
        """
        self._usable()
        with public_errors():
            return await self._dynamodb.tables.create()

    async def compare_tables(self) -> dict[str, Value]:
        """The tables as they are, beside what is declared and configured: by collection a map.

        `there` and `declared` hold billing mode, keys, indexes, capacity or the bounds in which it
        is scaled, and point-in-time recovery; `differences` says in words where they differ. A
        table that is missing has None as `there`; so has what may not be looked at within it.
        """
        self._usable()
        with public_errors():
            return await compared(self._dynamodb.tables)

    async def query_by_gsi(
        self,
        collection: str,
        index_name: str,
        key_condition: str,
        expression_values: Mapping[str, object],
        *,
        limit: int | None = None,
        descending: bool = False,
        timeout: float | None = None,
    ) -> list[Entity]:
        """The entities in a part of an index, in the order of its sort field.

        An index is always a little behind. What it cannot hold is not found: null, "", text of
        more than 2,048 bytes.

        Args:
            key_condition: `template_id = :template_id`, and at most one comparison (`=`, `<`,
                `<=`, `>`, `>=`, `BETWEEN :low AND :high`, `begins_with(field, :start)`) on the
                sort field, joined by AND.
            expression_values: the value of each `:name`.

        Raises:
            InvalidQueryError: no such index, or a malformed condition, before any I/O.
        """
        self._usable()
        declared = self._schema[collection]
        found = [each for each in declared.indexes if each.name == index_name]
        if not found:
            known = ", ".join(each.name for each in declared.indexes) or "none"
            raise InvalidQueryError(f"{collection} has no index {index_name!r}; there are: {known}")
        if limit is not None and (type(limit) is not int or limit < 0):
            raise InvalidQueryError("limit is an integer >= 0, or None")
        _check_timeout(timeout)
        if not isinstance(descending, bool):
            raise InvalidQueryError("descending is True or False")
        names = Names()
        form = self._dynamodb.tables.forms[collection]
        text = read_key_condition(key_condition, expression_values, form, found[0], names)
        async with operation_timeout(timeout):
            await self._require_source_active("query_by_gsi")
            with public_errors():
                return await self._dynamodb.reading.by_index(
                    collection,
                    found[0],
                    names.request(KeyConditionExpression=text),
                    limit,
                    descending,
                )

    async def update_entity(
        self,
        collection: str,
        entity_id: str,
        fields: Mapping[str, object],
        *,
        expected_version: int | Expect = ANY,
        timeout: float | None = None,
        condition_expression: str | None = None,
        expression_values: Mapping[str, object] | None = None,
    ) -> int:
        """As `RepositoryInterface.update_entity`, also under a condition in DynamoDB's language.

        Args:
            condition_expression: what must hold of the stored entity, decided in the same step as
                the write: `attribute_exists(request_id) AND version = :expected_version`. Names
                are fields, reserved words or not; a name that is no word stands in double quotes.
            expression_values: the value of each `:name`.

        Raises:
            ConcurrencyConflictError: the condition does not hold; it carries the stored entity.
            InvalidQueryError: a malformed condition, before any I/O.
        """
        if condition_expression is None:
            if expression_values is not None:
                raise InvalidQueryError("expression_values belong to a condition_expression")
            return await super().update_entity(
                collection, entity_id, fields, expected_version=expected_version, timeout=timeout
            )
        self._usable()
        _check_timeout(timeout)
        expect = check_version(expected_version, absent=False)
        change = self._patch(self._schema[collection], entity_id, fields, expect, utc_now())
        names = Names()
        form = self._dynamodb.tables.forms[collection]
        text = condition(condition_expression, expression_values, form, names)
        return await self._to_its_end(self._update_where(change, text, names), timeout)

    async def _update_where(self, change: Patch, condition: str, names: Names) -> int:
        async with self._guard_untracked_write("condition_expression"):
            with public_errors():
                return await self._dynamodb.writes.update_where(change, condition, names)

    async def _to_its_end(self, work: Coroutine[Any, Any, int], timeout: float | None) -> int:
        """Await a write that nothing interrupts: what was sent may land until its answer is here.

        Who is cancelled waits for that; who set a time limit learns in time that the outcome is not
        known, and it ends at the latest when the store is closed.
        """
        task = asyncio.create_task(work)
        self._under_way.add(task)
        task.add_done_callback(self._ended)
        try:
            await asyncio.wait((task,), timeout=timeout)
        except asyncio.CancelledError:
            await run_to_completion(asyncio.wait((task,)))
            raise
        if not task.done():
            raise OperationTimeoutError(
                f"not done within {timeout:g} s", retryable=False, outcome_unknown=True
            )
        return task.result()

    def _ended(self, task: asyncio.Task[int]) -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            task.exception()  # seen here: nobody else may be there to see it

    async def _release(self) -> None:
        if self._under_way:
            await asyncio.wait(self._under_way)
        await super()._release()


def _check_timeout(timeout: object) -> None:
    if timeout is not None and (
        isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout >= 0
    ):
        raise InvalidInputError("timeout is a number of seconds >= 0, or None")
