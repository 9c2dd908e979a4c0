"""Beneath the DynamoDB store: aiobotocore by hand, an operation each and all that wait together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Self

from aiobotocore.config import AioConfig  # type: ignore[import-untyped]  # it has no types
from aiobotocore.session import get_session  # type: ignore[import-untyped]  # it has no types

from hf_async_store.bench.floors.together import Together

if TYPE_CHECKING:
    from hf_async_store.bench.data import Entity
    from hf_async_store.bench.plan import Place

_WRITES = 25
_READS = 100
_LANES = 8
_KEY = "machine_id"


class _Client:
    """A table of its own on one long-lived client, and the parts that are not measured."""

    _client: Any

    def __init__(self, place: Place) -> None:
        self._table = f"{place.prefix}-floor"
        self._stack = AsyncExitStack()

    @classmethod
    async def open(cls, place: Place) -> Self:
        target = cls(place)
        client = get_session().create_client(
            "dynamodb",
            region_name="eu-west-1",
            endpoint_url=place.server,
            aws_access_key_id="bench",
            aws_secret_access_key="bench",  # noqa: S106  # the test server takes any
            config=AioConfig(parameter_validation=False, max_pool_connections=64),
        )
        target._client = await target._stack.enter_async_context(client)
        try:
            await target._client.create_table(
                TableName=target._table,
                KeySchema=[{"AttributeName": _KEY, "KeyType": "HASH"}],
                AttributeDefinitions=[{"AttributeName": _KEY, "AttributeType": "S"}],
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
        gate = asyncio.Semaphore(_LANES)

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
    """A request for each operation."""

    async def save(self, machine: Entity) -> None:
        await self._client.put_item(TableName=self._table, Item=_item(machine))

    async def create(self, machine: Entity) -> None:
        await self._client.put_item(
            TableName=self._table,
            Item=_item(machine),
            ConditionExpression=f"attribute_not_exists({_KEY})",
        )

    async def update(self, machine: str, fields: Entity) -> None:
        await self._client.update_item(
            TableName=self._table,
            Key={_KEY: {"S": machine}},
            UpdateExpression="SET " + ", ".join(f"#{each} = :{each}" for each in fields),
            ConditionExpression=f"attribute_exists({_KEY})",
            ExpressionAttributeNames={f"#{each}": each for each in fields},
            ExpressionAttributeValues={f":{name}": _value(each) for name, each in fields.items()},
        )

    async def get(self, machine: str) -> Mapping[str, Any] | None:
        answer = await self._client.get_item(
            TableName=self._table, Key={_KEY: {"S": machine}}, ConsistentRead=True
        )
        return _entity(answer["Item"]) if "Item" in answer else None


class AllTogether(_Client):
    """All that wait: BatchWriteItem of 25, which checks nothing, and BatchGetItem of 100."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._saves = Together(self._put_batch, size=_WRITES, lanes=_LANES)
        self._gets = Together(self._get_all, size=_READS, lanes=_LANES)

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


def _item(machine: Entity) -> dict[str, Any]:
    return {name: _value(value) for name, value in machine.items()}


def _value(value: Any) -> dict[str, Any]:
    match value:
        case None:
            return {"NULL": True}
        case bool():
            return {"BOOL": value}
        case int() | float():
            return {"N": str(value)}
        case dict():
            return {"M": _item(value)}
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
