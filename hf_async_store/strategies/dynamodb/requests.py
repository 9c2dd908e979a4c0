"""Requests that write one item with a ConditionExpression."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from hf_async_store.changes import Patch, Put
from hf_async_store.strategies.dynamodb.expressions import Names
from hf_async_store.strategies.dynamodb.items import (
    DECLARATION_DIGEST,
    NEAR_MAX_VERSION,
    SIZE,
    TOKEN,
    ItemMapping,
    size_of,
    stored_size,
    token_of,
)
from hf_async_store.values import CREATED_AT, INT_MAX, MAX_ENTITY_BYTES, VERSION, Entity

if TYPE_CHECKING:
    from hf_async_store.strategies.dynamodb.codec import Attributes
    from hf_async_store.strategies.dynamodb.write_op import WriteOp


def upsert_item(op: WriteOp) -> dict[str, Any]:
    """The UpdateItem request of a save without an expected version."""
    change = cast("Put", op.change)
    names = Names()
    attributes, removed = op.mapping.parts(change.entity, keep_created=True)
    attributes.pop(op.mapping.key)
    attributes[TOKEN] = {"S": op.token}
    # The version is unknown here; the condition below excludes those near the maximum.
    attributes[SIZE] = stored_size(change.entity, 0)
    assignments = [f"{names.name(name)} = {names.value(each)}" for name, each in attributes.items()]
    if CREATED_AT not in attributes:
        created = names.name(CREATED_AT)
        assignments.append(
            f"{created} = if_not_exists({created}, {names.value({'S': change.written_at})})"
        )
    version = names.name(VERSION)
    zero, one = names.value({"N": "0"}), names.value({"N": "1"})
    assignments.append(f"{version} = if_not_exists({version}, {zero}) + {one}")
    update = f"SET {', '.join(assignments)}"
    if removed:
        update += f" REMOVE {', '.join(map(names.name, removed))}"
    maximum = names.value({"N": str(NEAR_MAX_VERSION)})
    same_declaration = f"{names.name(DECLARATION_DIGEST)} = {names.value(op.mapping.digest)}"
    absent = f"attribute_not_exists({names.name(op.mapping.key)})"
    condition = f"{absent} OR ({version} < {maximum} AND {same_declaration})"
    return {
        "TableName": op.table,
        "Key": {op.mapping.key: {"S": change.key.id}},
        "ReturnValues": "UPDATED_NEW",
        **names.request(UpdateExpression=update, ConditionExpression=condition),
    }


def update_item(op: WriteOp, condition: str, names: Names) -> dict[str, Any]:
    """The UpdateItem request of an update with a condition of the caller."""
    change = cast("Patch", op.change)
    fields = {name: each for name, each in change.fields.items() if name != op.mapping.key}
    sets, removed = op.mapping.changes(fields)
    added_size = size_of(cast("Entity", fields))
    version, stored = names.name(VERSION), names.name(SIZE)
    assignments = [f"{names.path(path)} = {names.value(each)}" for path, each in sets.items()]
    assignments.append(f"{names.name(TOKEN)} = {names.value({'S': op.token})}")
    assignments.append(f"{version} = {version} + {names.value({'N': '1'})}")
    assignments.append(f"{stored} = {stored} + {names.value({'N': str(added_size)})}")
    update = f"SET {', '.join(assignments)}"
    if removed:
        update += f" REMOVE {', '.join(names.path(each) for each in removed)}"
    conditions = [
        f"attribute_exists({names.name(op.mapping.key)})",
        f"({condition})",
        f"{names.name(DECLARATION_DIGEST)} = {names.value(op.mapping.digest)}",
        f"{version} < {names.value({'N': str(INT_MAX)})}",
    ]
    if type(change.expect) is int:
        conditions.append(f"{version} = {names.value({'N': str(change.expect)})}")
    if isinstance(op.observed, dict):
        token = names.value({"S": token_of(op.observed) or ""})
        conditions.append(f"{names.name(TOKEN)} = {token}")
    else:
        max_size = names.value({"N": str(MAX_ENTITY_BYTES - added_size)})
        conditions.append(f"{stored} <= {max_size}")
    return {
        "TableName": op.table,
        "Key": {op.mapping.key: {"S": change.key.id}},
        "ReturnValues": "UPDATED_NEW",
        "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
        **names.request(UpdateExpression=update, ConditionExpression=" AND ".join(conditions)),
    }


def unchanged(mapping: ItemMapping, observed: Attributes | None) -> dict[str, Any]:
    """The condition that an item has not changed since it was read."""
    if observed is None:
        return {
            "ConditionExpression": "attribute_not_exists(#k)",
            "ExpressionAttributeNames": {"#k": mapping.key},
        }
    token = token_of(observed)
    if token is not None:
        return {
            "ConditionExpression": "#w = :w",
            "ExpressionAttributeNames": {"#w": TOKEN},
            "ExpressionAttributeValues": {":w": {"S": token}},
        }
    # Another program wrote the item: only its version can be compared.
    request: dict[str, Any] = {
        "ConditionExpression": "attribute_exists(#k) AND attribute_not_exists(#w)",
        "ExpressionAttributeNames": {"#k": mapping.key, "#w": TOKEN},
    }
    if VERSION in observed:
        request["ConditionExpression"] += " AND #v = :v"
        request["ExpressionAttributeNames"]["#v"] = VERSION
        request["ExpressionAttributeValues"] = {":v": observed[VERSION]}
    return request
