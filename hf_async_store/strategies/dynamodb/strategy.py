"""`DynamoDBStorageStrategy`: the store on DynamoDB, with the methods specific to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias, overload

from msgspec.structs import replace

from hf_async_store.arguments import check_boolean
from hf_async_store.changes import ANY, Expect, Patch, check_version
from hf_async_store.coalescing import Coalescer, taking_at_once
from hf_async_store.config import (
    DynamoDBConfig,
    StorageConfig,
    anchored,
    load_config,
    strategy_config,
)
from hf_async_store.errors import InvalidInputError, InvalidQueryError, StorageError
from hf_async_store.field_operations import UpdateMap, plain_fields
from hf_async_store.repository import operation_timeout
from hf_async_store.schema import HOST_FACTORY, Collection, Schema
from hf_async_store.strategies.dynamodb.condition_parser import condition
from hf_async_store.strategies.dynamodb.condition_parser import key_condition as read_key_condition
from hf_async_store.strategies.dynamodb.engine import DynamoDBEngine
from hf_async_store.strategies.dynamodb.errors import public_errors
from hf_async_store.strategies.dynamodb.expressions import Names
from hf_async_store.strategies.dynamodb.schema_drift import compared
from hf_async_store.strategies.routing import routed
from hf_async_store.strategy import StorageStrategy, schema_of
from hf_async_store.values import Entity, Value

if TYPE_CHECKING:
    from pathlib import Path

    from hf_async_store.strategies.dynamodb.items import ItemMapping


_ConditionalUpdate: TypeAlias = "tuple[Patch, Callable[[ItemMapping, Names], str]]"
"""An update, and the function that returns its condition for the items of a table."""


class DynamoDBStorageStrategy(StorageStrategy):
    """A store on DynamoDB.

    Args:
        config: a URL `dynamodb://REGION/PREFIX`, the path of a JSON configuration file, a mapping
            with its content, a `StorageConfig` or a `DynamoDBConfig`.
        collections: the collections of the store.

    Raises:
        ConfigurationError: the configuration is invalid.
    """

    def __init__(
        self,
        config: StorageConfig | DynamoDBConfig | Mapping[str, object] | str | Path,
        *,
        collections: Iterable[Collection] = HOST_FACTORY,
    ) -> None:
        schema = schema_of(collections)
        loaded = anchored(load_config(config))
        dynamodb = strategy_config(loaded, DynamoDBConfig)

        def opened(declared: Schema) -> DynamoDBEngine:
            return DynamoDBEngine(dynamodb, declared)

        self._dynamodb = opened(schema)
        self._conditional_updates: Coalescer[_ConditionalUpdate, int] = Coalescer(
            taking_at_once(self._update_where),
            lanes=dynamodb.max_pool_connections,
            size=1,
            writes=True,
        )
        super().__init__(routed(self._dynamodb, schema, loaded, opened), schema)

    async def create_tables(self) -> list[str]:
        """Create the missing declared tables and indexes, and wait until they are active.

        Sets auto scaling and point-in-time recovery as configured. Several processes may call it
        at the same time. Returns a message for each table and index that this call created.
        """
        self._usable()
        with public_errors():
            return await self._dynamodb.tables.create()

    async def compare_tables(self) -> dict[str, Value]:
        """Compare the existing tables with the declared schema and the configuration.

        Returns a dict for each collection. Its `existing` and `declared` contain the billing mode,
        keys, indexes, capacity or the bounds of its scaling, and point-in-time recovery of the
        existing and the declared table; `differences` is a list of messages. `existing` is None for
        a missing table. Within it, a property that the IAM policy does not allow to read is None.
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
        """The entities that satisfy a condition on the key of an index, in the order of its sort field.

        An index is eventually consistent. Entities that it cannot contain are not found: those
        whose field is null, "" or longer than 2,048 bytes.

        Args:
            key_condition: `template_id = :template_id`, and at most one comparison (`=`, `<`,
                `<=`, `>`, `>=`, `BETWEEN :low AND :high`, `begins_with(field, :start)`) on the
                second field of an index on two, joined by AND. On an index on one timestamp,
                integer or number field, one such comparison.
            expression_values: the value of each `:name`.

        Raises:
            InvalidQueryError: the index is not declared, or the condition is malformed; raised
                before any I/O.
        """
        self._usable()
        declared = self._schema[collection]
        matching = [each for each in declared.indexes if each.name == index_name]
        if not matching:
            known = ", ".join(each.name for each in declared.indexes) or "none"
            raise InvalidQueryError(
                f"{collection} has no index {index_name!r}; its indexes are: {known}"
            )
        if limit is not None and (type(limit) is not int or limit < 0):
            raise InvalidQueryError("limit must be an integer >= 0 or None")
        _check_timeout(timeout)
        if not isinstance(descending, bool):
            raise InvalidQueryError("descending must be True or False")
        names = Names()
        mapping = self._dynamodb.tables.mapping_for(collection, index_name)
        [shape] = [each for each in mapping.shapes if each.index == matching[0]]
        expression = read_key_condition(key_condition, expression_values, mapping, shape, names)
        async with (
            operation_timeout(timeout),
            self._engine.direct("query_by_gsi", writes=False),
        ):
            with public_errors():
                return await self._dynamodb.reading.by_index(
                    collection,
                    matching[0],
                    expression,
                    names,
                    limit,
                    descending,
                    None if self._lifetimes is None else self._lifetimes.of(collection),
                )

    @overload
    async def update_entity(
        self,
        collection: str,
        entity_id: str,
        fields: UpdateMap,
        *,
        expected_version: int | Expect = ANY,
        returning: Literal[False] = False,
        timeout: float | None = None,
        condition_expression: str | None = None,
        expression_values: Mapping[str, object] | None = None,
    ) -> int: ...

    @overload
    async def update_entity(
        self,
        collection: str,
        entity_id: str,
        fields: UpdateMap,
        *,
        expected_version: int | Expect = ANY,
        returning: Literal[True],
        timeout: float | None = None,
    ) -> Entity: ...

    async def update_entity(
        self,
        collection: str,
        entity_id: str,
        fields: UpdateMap,
        *,
        expected_version: int | Expect = ANY,
        returning: bool = False,
        timeout: float | None = None,
        condition_expression: str | None = None,
        expression_values: Mapping[str, object] | None = None,
    ) -> int | Entity:
        """As `RepositoryInterface.update_entity`, with an optional DynamoDB condition expression.

        Args:
            condition_expression: a condition on the stored entity, evaluated atomically with the
                write, such as `attribute_exists(request_id) AND version = :expected_version`.
                Names are fields, also those that are reserved words of DynamoDB; a name that is
                not an identifier is written in double quotes.
            expression_values: the value of each `:name`.

        A condition expression cannot be combined with field operations, nested changes or `returning`.

        Raises:
            ConcurrencyConflictError: the condition does not hold; contains the stored entity.
            InvalidQueryError: the condition is malformed; raised before any I/O.
        """
        check_boolean(returning, "returning")
        if condition_expression is None:
            if expression_values is not None:
                raise InvalidQueryError("expression_values requires a condition_expression")
            if returning:
                return await super().update_entity(
                    collection,
                    entity_id,
                    fields,
                    expected_version=expected_version,
                    returning=True,
                    timeout=timeout,
                )
            return await super().update_entity(
                collection, entity_id, fields, expected_version=expected_version, timeout=timeout
            )
        self._usable()
        _check_timeout(timeout)
        expect = check_version(expected_version, absent=False)
        change = self._patch(self._schema[collection], entity_id, fields, expect, self._clock.now())
        if returning or plain_fields(change.fields) is None:
            raise InvalidInputError(
                "condition_expression cannot be combined with field operations, nested changes or "
                "returning"
            )
        # A copy, because it is read again when the table is known.
        values = expression_values
        if isinstance(values, Mapping):
            values = dict(values)

        def condition_of(mapping: ItemMapping, names: Names) -> str:
            return condition(condition_expression, values, mapping, names)

        condition_of(self._dynamodb.tables.mappings[collection], Names())  # raises before any I/O
        change = replace(change, lifetimes=self._lifetimes)
        [version] = await self._conditional_updates.submit([(change, condition_of)], timeout)
        if isinstance(version, StorageError):
            raise version
        await self._record_declarations(timeout=timeout)
        return version

    async def _update_where(self, updates: Sequence[_ConditionalUpdate]) -> list[int]:
        """Make the only one of some updates. It is not interrupted, because it may be applied until its
        response; closing the store waits for it."""
        [(change, condition_of)] = updates
        async with self._engine.direct("condition_expression", writes=True):
            return [await self._dynamodb.update_where(change, condition_of)]

    async def _release(self) -> None:
        await self._conditional_updates.drain()
        await super()._release()


def _check_timeout(timeout: object) -> None:
    if timeout is not None and (
        isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout >= 0
    ):
        raise InvalidInputError("timeout must be a number of seconds >= 0 or None")
