"""Measures the DynamoDB store on this machine, beside the bare drivers on the same server.

    python benchmarks/dynamodb_store.py [--quick] [--only NAME ...] [--json FILE]

The server is the one that the tests start, one process of Python: where many wait, it is the limit
of both sides. So the client's own processor time is measured as well; on AWS that is what remains.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from aiodynamo.client import Client, Table
from aiodynamo.credentials import Key, StaticCredentials
from aiodynamo.http.aiohttp import AIOHTTP
from measure import (
    Figure,
    alternate,
    arguments,
    ratios,
    reported,
    seconds,
    watched_loop,
)
from stores import Entity, machine
from yarl import URL

from hf_async_store import DynamoDBStorageStrategy
from hf_async_store.testing.servers import dynamodb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable

_RESULTS: Final = Path(__file__).parent / "results" / "dynamodb_store.json"
_TASKS: Final = 64
_BATCH: Final = 1000
_REGION: Final = "us-east-1"
_TABLE: Final = "bare_machines"


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is done."""

    rounds: int = 7
    operations: int = 1280
    singles: int = 150
    starts: int = 7


_QUICK: Final = Settings(rounds=3, operations=640, singles=80, starts=3)


@dataclass(slots=True)
class Bench:
    """What every row is given: the store, and bare drivers on a table of the same shape."""

    settings: Settings
    url: str
    store: DynamoDBStorageStrategy
    bare: Any
    peer: Table
    numbers: itertools.count[int]

    def fresh(self) -> Entity:
        """A machine that nobody has."""
        return machine(next(self.numbers))


Row: TypeAlias = "Callable[[Bench], Coroutine[None, None, list[Figure]]]"
Operation: TypeAlias = "Callable[[int], Awaitable[object]]"

# -- the bare side --------------------------------------------------------------------------


def attributes(entity: Entity) -> dict[str, Any]:
    """An entity as a bare program would write it by hand: texts, and a map of texts."""
    found: dict[str, Any] = {}
    for name, value in entity.items():
        if isinstance(value, str):
            found[name] = {"S": value}
        elif isinstance(value, dict):
            found[name] = {"M": {each: {"S": str(inner)} for each, inner in value.items()}}
        elif value is None:
            found[name] = {"NULL": True}
        else:
            found[name] = {"N": str(value)}
    found["version"] = {"N": "1"}
    # Where an index has it as its key, a null is no key.
    return {name: each for name, each in found.items() if each != {"NULL": True}}


def bare_get(bench: Bench, entity_id: str) -> Awaitable[object]:
    key = {"machine_id": {"S": entity_id}}
    return bench.bare.get_item(TableName=_TABLE, Key=key, ConsistentRead=True)


def bare_create(bench: Bench, entity: Entity) -> Awaitable[object]:
    return bench.bare.put_item(
        TableName=_TABLE,
        Item=attributes(entity),
        ConditionExpression="attribute_not_exists(machine_id)",
    )


def bare_update(bench: Bench, entity_id: str, status: str) -> Awaitable[object]:
    return bench.bare.update_item(
        TableName=_TABLE,
        Key={"machine_id": {"S": entity_id}},
        UpdateExpression="SET #s = :s ADD version :one",
        ConditionExpression="attribute_exists(machine_id)",
        ExpressionAttributeNames={"#s": "status"},
        ExpressionAttributeValues={":s": {"S": status}, ":one": {"N": "1"}},
        ReturnValues="UPDATED_NEW",
    )


def bare_save(bench: Bench, entity: Entity) -> Awaitable[object]:
    """Insert or replace, and count the version up: one update of every field."""
    item = attributes(entity)
    key = item.pop("machine_id")
    del item["version"]
    names = {f"#{number}": name for number, name in enumerate(item)}
    values = {f":{number}": value for number, value in enumerate(item.values())}
    sets = ", ".join(f"#{number} = :{number}" for number in range(len(item)))
    return bench.bare.update_item(
        TableName=_TABLE,
        Key={"machine_id": key},
        UpdateExpression=f"SET {sets} ADD version :one",
        ExpressionAttributeNames=names,
        ExpressionAttributeValues={**values, ":one": {"N": "1"}},
        ReturnValues="UPDATED_NEW",
    )


async def bare_batch(bench: Bench, entities: list[Entity]) -> None:
    """`BatchWriteItem` of 25, eight at once; it checks nothing."""
    pieces = iter([entities[start : start + 25] for start in range(0, len(entities), 25)])

    async def lane() -> None:
        for piece in pieces:
            requests = [{"PutRequest": {"Item": attributes(each)}} for each in piece]
            await bench.bare.batch_write_item(RequestItems={_TABLE: requests})

    await asyncio.gather(*(lane() for _ in range(8)))


# -- what is measured -----------------------------------------------------------------------


@dataclass(slots=True)
class Pair:
    """One operation of both sides; each is given the number of the call."""

    name: str
    ours: Operation
    theirs: Operation
    rate: float
    processor: float | None = None


def pairs(bench: Bench, ids: list[str], machines: list[Entity]) -> list[Pair]:
    store = bench.store

    def changed(n: int) -> Entity:
        """A machine as a poll found it: two of its fields are new."""
        more = {"status": f"s{n}", "private_ip": f"10.0.0.{n}"}
        return {**machines[n % len(ids)], **more}

    return [
        Pair(
            "get",
            lambda n: store.get_entity("machines", ids[n % len(ids)]),
            lambda n: bare_get(bench, ids[n % len(ids)]),
            4.0,
        ),
        Pair(
            "create",
            lambda n: store.create_entity("machines", bench.fresh()),
            lambda n: bare_create(bench, bench.fresh()),
            3.0,
            0.35,
        ),
        Pair(
            "update",
            lambda n: store.update_entity("machines", ids[n % len(ids)], {"status": f"s{n}"}),
            lambda n: bare_update(bench, ids[n % len(ids)], f"s{n}"),
            2.0,
            0.35,
        ),
        Pair(
            "save",
            lambda n: store.save_entity("machines", changed(n)),
            lambda n: bare_save(bench, changed(n)),
            1.8,
            0.35,
        ),
    ]


async def prepared(bench: Bench) -> tuple[list[str], list[Entity]]:
    """Machines that both sides have."""
    machines = [bench.fresh() for _ in range(bench.settings.operations)]
    await bench.store.create_entities("machines", machines)
    await bare_batch(bench, machines)
    return [str(each["machine_id"]) for each in machines], machines


async def at_once(operation: Operation, number: int, tasks: int = _TASKS) -> None:
    """So many calls by so many tasks, each of which waits for its own."""
    numbers = iter(range(number))

    async def task() -> None:
        for each in numbers:
            await operation(each)

    await asyncio.gather(*(task() for _ in range(tasks)))


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def together(bench: Bench) -> list[Figure]:
    """64 tasks that wait, beside aiobotocore used one operation each."""
    ids, machines = await prepared(bench)
    number = bench.settings.operations
    figures: list[Figure] = []
    for pair in pairs(bench, ids, machines):
        used: dict[str, list[float]] = {"ours": [], "theirs": []}

        async def side(name: str, operation: Operation, used: Any = used) -> float:
            gc.collect()
            before = processor_seconds()
            rate = number / await seconds(at_once(operation, number))
            used[name].append((processor_seconds() - before) / number * 1e6)
            return rate

        ours, theirs = await alternate(
            bench.settings.rounds,
            lambda pair=pair, side=side: side("ours", pair.ours),
            lambda pair=pair, side=side: side("theirs", pair.theirs),
        )
        figures.append(
            Figure(
                "together",
                f"{pair.name}, {_TASKS} waiting, over aiobotocore",
                ratios(ours, theirs),
                "x",
                at_least=pair.rate,
                beside={"a second": _median(ours), "aiobotocore": _median(theirs)},
            )
        )
        figures.append(
            Figure(
                "together",
                f"{pair.name}: client processor, over aiobotocore",
                ratios(used["ours"][1:], used["theirs"][1:]),
                "x",
                at_most=pair.processor,
                beside={
                    "us": _median(used["ours"][1:]),
                    "aiobotocore": _median(used["theirs"][1:]),
                },
            )
        )
    return figures


async def peer(bench: Bench) -> list[Figure]:
    """Gets beside aiodynamo on aiohttp, 64 waiting."""
    ids, _ = await prepared(bench)
    number = bench.settings.operations

    async def ours() -> float:
        return number / await seconds(
            at_once(lambda n: bench.store.get_entity("machines", ids[n]), number)
        )

    async def theirs() -> float:
        return number / await seconds(
            at_once(
                lambda n: bench.peer.get_item({"machine_id": ids[n]}, consistent_read=True), number
            )
        )

    mine, others = await alternate(bench.settings.rounds, ours, theirs)
    return [
        Figure(
            "peer",
            f"get, {_TASKS} waiting, over aiodynamo",
            ratios(mine, others),
            "x",
            at_least=1.0,
            beside={"a second": _median(mine), "aiodynamo": _median(others)},
        )
    ]


async def single(bench: Bench) -> list[Figure]:
    """One at a time: what the store adds to a bare call, or takes away."""
    ids, machines = await prepared(bench)
    number = bench.settings.singles
    figures: list[Figure] = []
    for pair in pairs(bench, ids, machines):
        ours, theirs = await alternate(
            bench.settings.rounds,
            lambda pair=pair: seconds(at_once(pair.ours, number, 1)),
            lambda pair=pair: seconds(at_once(pair.theirs, number, 1)),
        )
        figures.append(
            Figure(
                "single",
                f"{pair.name}, one at a time, over aiobotocore",
                ratios(ours, theirs),
                "x",
                at_most=1.1,
                beside={
                    "ms": _median(ours) / number * 1e3,
                    "aiobotocore": _median(theirs) / number * 1e3,
                },
            )
        )
    return figures


async def batch(bench: Bench) -> list[Figure]:
    """1,000 in one call, beside `BatchWriteItem`, which checks nothing."""
    machines = [bench.fresh() for _ in range(_BATCH)]
    await bench.store.create_entities("machines", machines)
    store = bench.store

    def changed() -> list[Entity]:
        number = next(bench.numbers)
        more = {"status": f"s{number}", "private_ip": f"10.0.0.{number}"}
        return [{**each, **more} for each in machines]

    figures = []
    calls: list[tuple[str, float | None, Callable[[], Awaitable[object]]]] = [
        (
            "create_entities",
            0.35,
            lambda: store.create_entities("machines", [bench.fresh() for _ in range(_BATCH)]),
        ),
        ("save_entities", 0.2, lambda: store.save_entities("machines", changed())),
        ("import_entities", None, lambda: store.import_entities("machines", machines)),
    ]
    for name, target, call in calls:

        async def ours(call: Any = call) -> float:
            return _BATCH / await seconds(call())

        async def theirs() -> float:
            return _BATCH / await seconds(bare_batch(bench, [bench.fresh() for _ in range(_BATCH)]))

        mine, others = await alternate(bench.settings.rounds, ours, theirs)
        figures.append(
            Figure(
                "batch",
                f"{name} of {_BATCH:,}, over bare BatchWriteItem",
                ratios(mine, others),
                "x",
                at_least=target,
                beside={"a second": _median(mine), "BatchWriteItem": _median(others)},
            )
        )
    return figures


async def transactions(bench: Bench) -> list[Figure]:
    """Transactions of 25 creates, 8 at once, beside a bare `TransactWriteItems` of the same."""

    async def ours(_: int) -> None:
        async with bench.store.begin_transaction() as tx:
            await tx.create_entities("machines", [bench.fresh() for _ in range(25)])

    async def theirs(_: int) -> None:
        items = [
            {
                "Put": {
                    "TableName": _TABLE,
                    "Item": attributes(bench.fresh()),
                    "ConditionExpression": "attribute_not_exists(machine_id)",
                }
            }
            for _ in range(25)
        ]
        await bench.bare.transact_write_items(TransactItems=items)

    number = 40

    async def rate(operation: Operation) -> float:
        return 25 * number / await seconds(at_once(operation, number, 8))

    mine, others = await alternate(bench.settings.rounds, lambda: rate(ours), lambda: rate(theirs))
    return [
        Figure(
            "transactions",
            "25 creates in each, 8 at once, over bare TransactWriteItems",
            ratios(mine, others),
            "x",
            beside={"entities a second": _median(mine), "bare": _median(others)},
        )
    ]


async def start(bench: Bench) -> list[Figure]:
    """The first get of a store: how long it takes, and how long it holds the loop."""
    took: list[float] = []
    held: list[float] = []
    for _ in range(bench.settings.starts + 1):
        async with watched_loop() as hold, _store(bench.url) as store:
            took.append(await seconds(store.get_entity("machines", "none")) * 1e3)
        held.append(hold.wall * 1e3)
    return [
        Figure("start", "first get of a store", took[1:], "ms"),
        Figure("start", "longest hold of the loop meanwhile", held[1:], "ms"),
    ]


# -- small parts ----------------------------------------------------------------------------


def _median(samples: Iterable[float]) -> float:
    ordered = sorted(samples)
    return ordered[len(ordered) // 2]


def _store(url: str) -> DynamoDBStorageStrategy:
    return DynamoDBStorageStrategy(f"dynamodb://{_REGION}/bench?endpoint_url={url}")


async def _bare_table(bare: Any, like: str) -> None:
    """A table of the same shape as the store's."""
    there = (await bare.describe_table(TableName=like))["Table"]
    await bare.create_table(
        TableName=_TABLE,
        KeySchema=there["KeySchema"],
        AttributeDefinitions=there["AttributeDefinitions"],
        BillingMode="PAY_PER_REQUEST",
        GlobalSecondaryIndexes=[
            {name: each[name] for name in ("IndexName", "KeySchema", "Projection")}
            for each in there["GlobalSecondaryIndexes"]
        ],
    )


_ROWS: Final[dict[str, Row]] = {
    each.__name__: each for each in (together, peer, single, batch, transactions, start)
}


async def measured(names: Iterable[str], settings: Settings, url: str) -> list[Figure]:
    config = AioConfig(parameter_validation=False, max_pool_connections=_TASKS)
    figures: list[Figure] = []
    async with (
        _store(url) as store,
        get_session().create_client(
            "dynamodb", region_name=_REGION, endpoint_url=url, config=config
        ) as bare,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=_TASKS)) as http,
    ):
        await store.create_tables()
        await _bare_table(bare, "bench_machines")
        credentials = StaticCredentials(Key("bench", "bench"))
        peer_client = Client(AIOHTTP(http), credentials, _REGION, URL(url))
        table = peer_client.table(_TABLE)
        bench = Bench(settings, url, store, bare, table, itertools.count())
        for name in names:
            print(f"measuring {name} ...", file=sys.stderr, flush=True)
            figures += await _ROWS[name](bench)
    return figures


def main() -> None:
    about = "Measures the DynamoDB store on this machine."
    options = arguments(about, _ROWS, _RESULTS).parse_args()
    settings = _QUICK if options.quick else Settings()
    os.environ["AWS_ACCESS_KEY_ID"] = os.environ["AWS_SECRET_ACCESS_KEY"] = "bench"
    drivers = ("aiobotocore", "botocore", "aiohttp", "aiodynamo")
    with reported(options, settings, drivers) as (_, figures):
        for name in options.only:  # a server each: what one row stored must not slow the next
            with dynamodb() as server:
                figures += asyncio.run(measured([name], settings, server.endpoint_url))


if __name__ == "__main__":
    main()
