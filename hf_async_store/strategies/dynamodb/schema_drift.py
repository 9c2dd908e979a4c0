"""Comparison of the existing tables with the declared schema and the configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from hf_async_store.strategies.dynamodb.table_stream import VIEW, view_of
from hf_async_store.strategies.dynamodb.tables import billing_mode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from hf_async_store.strategies.dynamodb.tables import Tables
    from hf_async_store.values import Value


async def compared(tables: Tables) -> dict[str, Value]:
    """For each collection the existing table, the declared one, and the differences as messages.

    `existing` is None for a missing table, and contains None for properties that the IAM policy does
    not allow to read.
    """
    return {collection: await _compared(tables, collection) for collection in tables.schema}


async def _compared(tables: Tables, collection: str) -> dict[str, Value]:
    name = tables.name(collection)
    declared = _declared(tables, collection)
    table = await tables.described(collection)
    if table is None:
        differences = [f"{name} is missing; run `create-tables` to create it"]
        properties: dict[str, Any] = {"table": name, "status": "missing", "existing": None}
    else:
        existing = _shape(table, billing_mode(table))
        existing["point_in_time_recovery"] = await tables.has_recovery(name)
        if tables.is_fed(collection):
            existing["stream"] = view_of(table) or "off"
        if tables.scaling is not None:
            existing["auto_scaling"] = await tables.scaling_bounds(collection)
        differences = list(_differences(declared, existing, name))
        properties = {"table": name, "status": table["TableStatus"], "existing": existing}
    return cast(
        "dict[str, Value]", {**properties, "declared": declared, "differences": differences}
    )


def _declared(tables: Tables, collection: str) -> dict[str, Any]:
    """The table that `create-tables` creates."""
    request = tables.request(collection)
    properties = _shape(request, request["BillingMode"])
    properties["point_in_time_recovery"] = tables.config.point_in_time_recovery
    if tables.is_fed(collection):
        properties["stream"] = VIEW
    scaling = tables.scaling
    if scaling is not None:
        bounds = {
            "read_capacity": [scaling.min_read_capacity, scaling.max_read_capacity],
            "write_capacity": [scaling.min_write_capacity, scaling.max_write_capacity],
        }
        for element in (
            properties,
            *properties["indexes"].values(),
        ):  # the capacity varies within the bounds
            del element["read_capacity"], element["write_capacity"]
        properties["auto_scaling"] = dict.fromkeys(tables.scaling_resources(collection), bounds)
    return properties


def _shape(table: Mapping[str, Any], mode: str) -> dict[str, Any]:
    """The properties common to the description of a table and the request that creates it."""
    indexes = table.get("GlobalSecondaryIndexes", ())
    return {
        "billing_mode": mode,
        **_properties(table, mode),
        "indexes": {each["IndexName"]: _properties(each, mode) for each in indexes},
    }


def _properties(element: Mapping[str, Any], mode: str) -> dict[str, Any]:
    keys = sorted(element["KeySchema"], key=lambda each: str(each["KeyType"]))
    properties: dict[str, Any] = {"key": [each["AttributeName"] for each in keys]}
    if "IndexName" in element:
        properties["projection"] = element.get("Projection", {}).get("ProjectionType", "ALL")
    if "IndexStatus" in element and element["IndexStatus"] != "ACTIVE":
        properties["status"] = element["IndexStatus"]
    if mode == "PROVISIONED":
        throughput = element.get("ProvisionedThroughput", {})
        properties["read_capacity"] = throughput.get("ReadCapacityUnits", 0)
        properties["write_capacity"] = throughput.get("WriteCapacityUnits", 0)
    return properties


def _differences(
    declared: Mapping[str, Any], existing: Mapping[str, Any], location: str
) -> Iterator[str]:
    for name, value in declared.items():
        actual = existing.get(name)
        if name == "indexes":
            yield from _index_differences(value, actual or {}, location)
        elif isinstance(value, dict) and isinstance(actual, dict):
            yield from _differences(value, actual, f"{location}, {name}")
        elif name not in existing:
            yield f"{location} has no {name}, but the declared value is {_format(value)}"
        elif actual is None:
            yield (
                f"{location}: the policy does not allow reading {name}; the declared value is "
                f"{_format(value)}"
            )
        elif actual != value:
            yield f"{location}: {name} is {_format(actual)}, but the declared value is {_format(value)}"
    if "status" in existing:
        yield f"{location} is {existing['status']}"


def _index_differences(
    declared: Mapping[str, Any], existing: Mapping[str, Any], location: str
) -> Iterable[str]:
    for name, value in declared.items():
        if name in existing:
            yield from _differences(value, existing[name], f"{location}, {name}")
        else:
            yield f"{location} has no index {name}; run `schema apply` to create it"
    for name in existing:
        if name not in declared:
            yield f"{location} has an index {name} that is not declared"


def _format(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
