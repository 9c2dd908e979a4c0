"""Comparison of the existing tables with the declared schema and the configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from hf_async_store.strategies.dynamodb.tables import billing_mode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from hf_async_store.strategies.dynamodb.tables import Tables
    from hf_async_store.values import Value


async def compared(tables: Tables) -> dict[str, Value]:
    """For each collection the existing table, the declared one, and the differences as messages.

    `there` is None for a missing table, and contains None for properties that the IAM policy does
    not allow to read.
    """
    return {collection: await _compared(tables, collection) for collection in tables.schema}


async def _compared(tables: Tables, collection: str) -> dict[str, Value]:
    name = tables.name(collection)
    declared = _declared(tables, collection)
    table = await tables.described(collection)
    if table is None:
        differences = [f"{name} is missing; run `create-tables` to create it"]
        told: dict[str, Any] = {"table": name, "status": "missing", "there": None}
    else:
        there = _shape(table, billing_mode(table))
        there["point_in_time_recovery"] = await tables.recovers(name)
        if tables.scaling is not None:
            there["auto_scaling"] = await tables.scaled(collection)
        differences = list(_differences(declared, there, name))
        told = {"table": name, "status": table["TableStatus"], "there": there}
    return cast("dict[str, Value]", {**told, "declared": declared, "differences": differences})


def _declared(tables: Tables, collection: str) -> dict[str, Any]:
    """The table that `create-tables` creates."""
    request = tables.request(collection)
    told = _shape(request, request["BillingMode"])
    told["point_in_time_recovery"] = tables.recovery
    scaling = tables.scaling
    if scaling is not None:
        bounds = {
            "read_capacity": [scaling.min_read_capacity, scaling.max_read_capacity],
            "write_capacity": [scaling.min_write_capacity, scaling.max_write_capacity],
        }
        for part in (told, *told["indexes"].values()):  # the capacity varies within the bounds
            del part["read_capacity"], part["write_capacity"]
        told["auto_scaling"] = dict.fromkeys(tables.scalable(collection), bounds)
    return told


def _shape(table: Mapping[str, Any], mode: str) -> dict[str, Any]:
    """The properties common to the description of a table and the request that creates it."""
    indexes = table.get("GlobalSecondaryIndexes", ())
    return {
        "billing_mode": mode,
        **_part(table, mode),
        "indexes": {each["IndexName"]: _part(each, mode) for each in indexes},
    }


def _part(part: Mapping[str, Any], mode: str) -> dict[str, Any]:
    keys = sorted(part["KeySchema"], key=lambda each: str(each["KeyType"]))
    told: dict[str, Any] = {"key": [each["AttributeName"] for each in keys]}
    if "IndexName" in part:
        told["projection"] = part.get("Projection", {}).get("ProjectionType", "ALL")
    if "IndexStatus" in part and part["IndexStatus"] != "ACTIVE":
        told["status"] = part["IndexStatus"]
    if mode == "PROVISIONED":
        throughput = part.get("ProvisionedThroughput", {})
        told["read_capacity"] = throughput.get("ReadCapacityUnits", 0)
        told["write_capacity"] = throughput.get("WriteCapacityUnits", 0)
    return told


def _differences(
    declared: Mapping[str, Any], there: Mapping[str, Any], where: str
) -> Iterator[str]:
    for name, value in declared.items():
        actual = there.get(name)
        if name == "indexes":
            yield from _of_indexes(value, actual or {}, where)
        elif isinstance(value, dict) and isinstance(actual, dict):
            yield from _differences(value, actual, f"{where}, {name}")
        elif name not in there:
            yield f"{where} has no {name}, but the declared value is {_word(value)}"
        elif actual is None:
            yield (
                f"{where}: the policy does not allow reading {name}; the declared value is "
                f"{_word(value)}"
            )
        elif actual != value:
            yield f"{where}: {name} is {_word(actual)}, but the declared value is {_word(value)}"
    if "status" in there:
        yield f"{where} is {there['status']}"


def _of_indexes(declared: Mapping[str, Any], there: Mapping[str, Any], where: str) -> Iterable[str]:
    for name, value in declared.items():
        if name in there:
            yield from _differences(value, there[name], f"{where}, {name}")
        else:
            yield f"{where} has no index {name}; run `create-tables` to create it"
    for name in there:
        if name not in declared:
            yield f"{where} has an index {name} that is not declared"


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
