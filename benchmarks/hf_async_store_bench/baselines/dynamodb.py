"""Baselines of the DynamoDB engine: aiobotocore by hand, an operation each and in batches."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Self

from aiobotocore.config import AioConfig  # type: ignore[import-untyped]  # it has no types
from aiobotocore.session import get_session  # type: ignore[import-untyped]  # it has no types

from hf_async_store_bench.baselines.batching import Batching

if TYPE_CHECKING:
    from hf_async_store_bench.data import Entity
    from hf_async_store_bench.messages import Environment

_WRITES = 25
_READS = 100
_AT_ONCE = 8
_KEY = "machine_id"
_IS_NEW = f"attribute_not_exists({_KEY})"
_INDEXES = {
    "request_id": "created_at",
    "return_request_id": None,
    "status": None,
    "name": None,
}
"""The indexes of the store's machines: what they are found by, and ordered by."""


class _Client:
    """A table of its own on one long-lived client, and the parts that are not measured."""

    _client: Any

    def __init__(self, place: Environment) -> None:
        self._table = f"{place.prefix}-baseline"
        self._stack = AsyncExitStack()

    @classmethod
    async def open(cls, place: Environment) -> Self:
        target = cls(place)
        client = get_session().create_client(
            "dynamodb",
            region_name="eu-west-1",
            endpoint_url=place.server,
            aws_access_key_id="bench",
            aws_secret_access_key="bench",  # the test server takes any
            config=AioConfig(parameter_validation=False, max_pool_connections=64),
        )
        target._client = await target._stack.enter_async_context(client)
        try:
            await target._client.create_table(
                TableName=target._table,
                KeySchema=_key_schema(_KEY),
                AttributeDefinitions=[
                    {"AttributeName": each, "AttributeType": "S"}
                    for each in (_KEY, "created_at", *_INDEXES)
                ],
                GlobalSecondaryIndexes=[
                    {
                        "IndexName": f"{hash_key}-index",
                        "KeySchema": _key_schema(hash_key, range_key),
                        "Projection": {"ProjectionType": "ALL"},
                    }
                    for hash_key, range_key in _INDEXES.items()
                ],
                BillingMode="PAY_PER_REQUEST",
            )
        except target._client.exceptions.ResourceInUseException:
            pass  # another process of this run was faster
        return target

    async def close(self) -> None:
        await self._stack.aclose()

    async def fill(self, machines: Sequence[Entity]) -> None:
        await self._put_all(machines)

    async def read_back(self, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
        found: list[Mapping[str, Any] | None] = []
        for batch in _cut(ids, _READS):
            found += await self._get_all(batch)
        return found

    async def _put_all(self, machines: Sequence[Entity]) -> Sequence[None]:
        """In batches of 25, eight at once."""
        gate = asyncio.Semaphore(_AT_ONCE)

        async def put(batch: Sequence[Entity]) -> None:
            async with gate:
                await self._put_batch(batch)

        async with asyncio.TaskGroup() as group:
            for batch in _cut(machines, _WRITES):
                group.create_task(put(batch))
        return [None] * len(machines)

    async def _put_batch(self, machines: Sequence[Entity]) -> Sequence[None]:
        # It refuses a key that comes twice.
        latest = {each[_KEY]: each for each in machines}
        left = {self._table: [{"PutRequest": {"Item": _item(each)}} for each in latest.values()]}
        while left:
            left = (await self._client.batch_write_item(RequestItems=left))["UnprocessedItems"]
        return [None] * len(machines)

    async def _get_all(self, ids: Sequence[str]) -> Sequence[Mapping[str, Any] | None]:
        found: dict[str, Mapping[str, Any]] = {}
        keys = [{_KEY: {"S": each}} for each in dict.fromkeys(ids)]
        left: dict[str, Any] = {self._table: {"Keys": keys, "ConsistentRead": True}}
        while left:
            answer = await self._client.batch_get_item(RequestItems=left)
            machines = map(_entity, answer["Responses"][self._table])
            found |= {each[_KEY]: each for each in machines}
            left = answer["UnprocessedKeys"]
        return [found.get(each) for each in ids]


class Each(_Client):
    """A request for each operation; writes raise the version, as a store does."""

    async def save(self, machine: Entity) -> None:
        fields = {name: value for name, value in machine.items() if name != _KEY}
        await self._update(machine[_KEY], {k: v for k, v in fields.items() if v is not None})

    async def create(self, machine: Entity) -> None:
        await self._client.put_item(
            TableName=self._table, Item=_item(machine), ConditionExpression=_IS_NEW
        )

    async def update(self, machine: str, fields: Entity) -> None:
        await self._update(machine, fields, ConditionExpression=f"attribute_exists({_KEY})")

    async def _update(self, machine: str, fields: Entity, **condition: str) -> None:
        names = {f"#{place}": name for place, name in enumerate(fields)}
        values = {f":{place}": _value(value) for place, value in enumerate(fields.values())}
        sets = ", ".join(f"#{place} = :{place}" for place in range(len(fields)))
        await self._client.update_item(
            TableName=self._table,
            Key={_KEY: {"S": machine}},
            UpdateExpression=f"SET {sets} ADD version :one",
            ExpressionAttributeNames=names,
            ExpressionAttributeValues={**values, ":one": {"N": "1"}},
            ReturnValues="UPDATED_NEW",
            **condition,
        )

    async def acquire(self, request: Entity, machines: Sequence[Entity]) -> None:
        """In one transaction, which can hold 100."""
        items = [{_KEY: request["request_id"]}, *machines]
        puts = [
            {"Put": {"TableName": self._table, "Item": _item(each), "ConditionExpression": _IS_NEW}}
            for each in items
        ]
        await self._client.transact_write_items(TransactItems=puts)

    async def get(self, machine: str) -> Mapping[str, Any] | None:
        answer = await self._client.get_item(
            TableName=self._table, Key={_KEY: {"S": machine}}, ConsistentRead=True
        )
        return _entity(answer["Item"]) if "Item" in answer else None


class Batched(_Client):
    """All that wait: BatchWriteItem of 25, which checks nothing, and BatchGetItem of 100."""

    def __init__(self, place: Environment) -> None:
        super().__init__(place)
        self._saves = Batching(self._put_batch, size=_WRITES, at_once=_AT_ONCE)
        self._gets = Batching(self._get_all, size=_READS, at_once=_AT_ONCE)

    async def save(self, machine: Entity) -> None:
        await self._saves(machine)

    async def get(self, machine: str) -> Mapping[str, Any] | None:
        return await self._gets(machine)

    async def save_many(self, machines: Sequence[Entity]) -> None:
        await self._put_all(machines)

    async def create_many(self, machines: Sequence[Entity]) -> None:
        await self._put_all(machines)

    async def acquire(self, request: Entity, machines: Sequence[Entity]) -> None:
        await self._put_all([{_KEY: request["request_id"]}, *machines])


def _cut(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _key_schema(hash_key: str, range_key: str | None = None) -> list[dict[str, str]]:
    keys = [{"AttributeName": hash_key, "KeyType": "HASH"}]
    return keys + ([{"AttributeName": range_key, "KeyType": "RANGE"}] if range_key else [])


def _item(machine: Entity) -> dict[str, Any]:
    """A new item. A null cannot be the key of an index, so it is omitted."""
    item = _map({name: value for name, value in machine.items() if value is not None})
    return {**item, "version": {"N": "1"}}


def _map(entity: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _value(value) for name, value in entity.items()}


def _value(value: Any) -> dict[str, Any]:
    match value:
        case None:
            return {"NULL": True}
        case bool():
            return {"BOOL": value}
        case int() | float():
            return {"N": str(value)}
        case dict():
            return {"M": _map(value)}
        case _:
            return {"S": value}


def _entity(item: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _plain(value) for name, value in item.items()}


def _plain(value: Mapping[str, Any]) -> Any:
    ((kind, held),) = value.items()
    match kind:
        case "NULL":
            return None
        case "N":
            number = Decimal(held)
            return int(number) if number == int(number) else float(number)
        case "M":
            return _entity(held)
        case _:
            return held
