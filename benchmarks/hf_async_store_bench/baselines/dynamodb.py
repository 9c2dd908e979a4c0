"""Baselines of the DynamoDB engine: aiobotocore by hand, an operation each and in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from aiobotocore.config import AioConfig  # type: ignore[import-untyped]  # it has no types
from aiobotocore.session import get_session  # type: ignore[import-untyped]  # it has no types

from hf_async_store_bench.baselines import Baseline
from hf_async_store_bench.baselines.batching import BatchedOperations, Batching
from hf_async_store_bench.concurrency import side_by_side
from hf_async_store_bench.data import Entity, batches

_WRITES = 25
_READS = 100
_AT_ONCE = 8
_KEY = "machine_id"
_IS_NEW = f"attribute_not_exists({_KEY})"
_SORTED = dict.fromkeys(("request_id", "status"), "created_at")
_INDEXES = {**_SORTED, "return_request_id": None, "name": None, "created_at": None}  # as the store


class _Client(Baseline):
    """A table of its own on one long-lived client, and the parts that are not measured."""

    async def start(self) -> None:
        self._table = f"{self.environment.prefix}-baseline"
        config = AioConfig(parameter_validation=False, max_pool_connections=64)
        where = {"region_name": "eu-west-1", "endpoint_url": self.environment.server}
        keys = {"aws_access_key_id": "bench", "aws_secret_access_key": "bench"}  # it takes any
        client = get_session().create_client("dynamodb", config=config, **where, **keys)
        self._client = await self.stack.enter_async_context(client)
        # Another process of this run may be faster.
        with suppress(self._client.exceptions.ResourceInUseException):
            names, every = (_KEY, *_INDEXES), {"Projection": {"ProjectionType": "ALL"}}
            await self._client.create_table(
                TableName=self._table,
                KeySchema=_key_schema(_KEY),
                AttributeDefinitions=[{"AttributeName": i, "AttributeType": "S"} for i in names],
                GlobalSecondaryIndexes=[
                    {"IndexName": f"{each[0]}-index", "KeySchema": _key_schema(*each), **every}
                    for each in _INDEXES.items()
                ],
                BillingMode="PAY_PER_REQUEST",
            )

    async def fill(self, machines: Sequence[Entity]) -> None:
        """In batches of 25, eight at once."""
        await side_by_side(self._put_batch, batches(machines, _WRITES), _AT_ONCE)

    async def read_back(self, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
        found: list[Mapping[str, Any] | None] = []
        for batch in batches(ids, _READS):
            found += await self._get_all(batch)
        return found

    async def _put_batch(self, machines: Sequence[Entity]) -> None:
        # It refuses a key that comes twice.
        latest = {each[_KEY]: each for each in machines}
        left = {self._table: [{"PutRequest": {"Item": _item(each)}} for each in latest.values()]}
        while left:
            left = (await self._client.batch_write_item(RequestItems=left))["UnprocessedItems"]

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
    """One client with 64 connections, no validation of parameters; a request for each operation
    (UpdateItem for saves)."""

    async def save(self, machine: Entity) -> None:
        fields = {k: v for k, v in machine.items() if v is not None and k != _KEY}
        await self._update(machine[_KEY], fields)

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
        changed = {"Key": {_KEY: {"S": machine}}, "ExpressionAttributeNames": names}
        changed["ExpressionAttributeValues"] = {**values, ":one": {"N": "1"}}
        changed["UpdateExpression"] = f"SET {sets} ADD version :one"
        every = {"TableName": self._table, "ReturnValues": "UPDATED_NEW"}
        await self._client.update_item(**every, **changed, **condition)

    async def acquire(self, request: Entity, machines: Sequence[Entity]) -> None:
        """In one transaction, which can hold 100."""
        items = map(_item, [{_KEY: request["request_id"]}, *machines])
        new = {"TableName": self._table, "ConditionExpression": _IS_NEW}
        puts = [{"Put": {**new, "Item": each}} for each in items]
        await self._client.transact_write_items(TransactItems=puts)

    async def get(self, machine: str) -> Mapping[str, Any] | None:
        answer = await self._client.get_item(
            TableName=self._table, Key={_KEY: {"S": machine}}, ConsistentRead=True
        )
        return _entity(answer["Item"]) if "Item" in answer else None


class Batched(BatchedOperations, _Client):
    """BatchWriteItem of 25, which checks nothing and knows no versions, and BatchGetItem of 100; 8 at
    once."""

    async def start(self) -> None:
        await super().start()
        self._saves = Batching(self._put_batch, size=_WRITES, at_once=_AT_ONCE)
        self._gets = Batching(self._get_all, size=_READS, at_once=_AT_ONCE)

    create = BatchedOperations.save
    save_many = create_many = _Client.fill

    async def acquire(self, request: Entity, machines: Sequence[Entity]) -> None:
        await self.fill([{_KEY: request["request_id"]}, *machines])


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
    """Of what machines have: numbers are whole ones."""
    if isinstance(value, int):
        return {"N": str(value)}
    return {"M": _map(value)} if isinstance(value, dict) else {"S": value}


def _entity(item: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _plain(value) for name, value in item.items()}


def _plain(value: Mapping[str, Any]) -> Any:
    ((kind, held),) = value.items()
    if kind == "N":
        return int(held)
    return _entity(held) if kind == "M" else held
