"""The requests of writes: statements, and requests for one item with a ConditionExpression."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import msgspec

from hf_async_store.changes import Delete, Patch, Put
from hf_async_store.errors import CorruptionError
from hf_async_store.field_operations import plain_fields
from hf_async_store.preconditions import is_there, next_version, patched
from hf_async_store.strategies.dynamodb.claim_items import keep_claim
from hf_async_store.strategies.dynamodb.expressions import Names
from hf_async_store.strategies.dynamodb.items import (
    CLAIM,
    CREATED_SUBSTITUTE,
    DECLARATION_DIGEST,
    NEAR_MAX_VERSION,
    SIZE,
    TIME_TO_LIVE,
    TOKEN,
    ItemMapping,
    new_token,
    size_bound_of,
    size_of,
    stored_size,
    token_of,
    version_of,
)
from hf_async_store.strategies.dynamodb.partiql import (
    Condition,
    Path,
    Statement,
    delete,
    insert,
    update,
)
from hf_async_store.strategies.dynamodb.write_op import WriteOp, receipt_of
from hf_async_store.values import (
    CREATED_AT,
    INT_MAX,
    MAX_ENTITY_BYTES,
    REMOVE,
    UPDATED_AT,
    VERSION,
    Entity,
    Removed,
    Value,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_async_store.strategies.dynamodb.codec import Attribute, Attributes


class StatementSupport:
    """Which forms of statements the server supports, as far as it is known.

    Attributes:
        returns_items: the response to a statement contains the item, which not every server returns.
        inserts_as_parameter: an insert can pass its item as one parameter, which AWS does not document.
    """

    def __init__(self) -> None:
        self.returns_items: bool | None = None
        self.inserts_as_parameter = True


# -- statements ------------------------------------------------------------------------------


def statement_of(op: WriteOp, support: StatementSupport) -> Statement | None:
    """The statement for the next attempt, or for a write by items the UpdateItem request; None if none
    can express it.

    Sets `new_version` and `receipt` of the write.

    Raises:
        StorageError: the observed item cannot be changed.
    """
    op.receipt = op.new_version = None
    if op.state == "insert":
        return None if op.by_item else _insert(op, whole=support.inserts_as_parameter)
    is_delete = isinstance(op.change, Delete)
    # A delete of a missing item succeeds, too; only a returned item shows that it existed.
    is_known = not is_delete or (support.returns_items and not op.by_item)
    condition = _condition(op) if is_known else None
    if condition is None:
        return None
    return delete(op.table, op.key, condition) if is_delete else _update(op, condition)


def _condition(op: WriteOp) -> Condition | None:
    """The condition of an update or delete, whose `new_version` it sets; None if none is sufficient."""
    if op.state in ("token", "cached"):
        return _token_condition(op)
    expect = op.change.expect
    condition: Condition = ()
    if isinstance(expect, int):
        # Otherwise, a delayed attempt could be applied after the entity was deleted and created again,
        # when it has the same version.
        is_older = UPDATED_AT, "<", {"S": op.requested_at}
        condition = ((VERSION, "=", {"N": str(expect)}), is_older)
    if isinstance(op.change, Delete):
        return condition
    if isinstance(expect, int):
        if expect == INT_MAX:
            return None  # if this is the stored version, there is no next one
        op.new_version = expect + 1
    return (*condition, (DECLARATION_DIGEST, "=", op.mapping.digest))


def _token_condition(op: WriteOp) -> Condition | None:
    observed = cast("Attributes", op.observed)
    token = token_of(observed)
    if token is None:
        return None  # another program wrote the item
    if not isinstance(op.change, Delete):
        is_current = op.state == "cached" or observed.get(DECLARATION_DIGEST) == op.mapping.digest
        if isinstance(op.change, Patch) and not is_current:
            return None
        op.new_version = next_version(op.change.key, op.version_of(observed))
    condition: Condition = ((TOKEN, "=", {"S": token}),)
    if isinstance(op.change, Delete):
        return condition
    # Another declaration may have rewritten the item, without a new token because the entity is the same.
    digest = op.mapping.digest if op.state == "cached" else observed.get(DECLARATION_DIGEST)
    return None if digest is None else (*condition, (DECLARATION_DIGEST, "=", digest))


def _insert(op: WriteOp, *, whole: bool) -> Statement:
    put = cast("Put", op.change)
    entity = put.entity
    if CREATED_AT not in entity and put.import_version is None:
        entity = {**entity, CREATED_AT: put.written_at}
    op.new_version = 1 if put.import_version is None else put.import_version
    item = op.mapping.item(put.key.id, entity, op.new_version, op.token)
    op.receipt = receipt_of(item, op.new_version, op.token)
    return insert(op.table, item, whole=whole)


def _update(op: WriteOp, condition: Condition) -> Statement | None:
    if isinstance(op.change, Put):
        return None if op.change.import_version is not None else _replace(op, op.change, condition)
    return _patch(op, cast("Patch", op.change), condition)


def _replace(op: WriteOp, put: Put, condition: Condition) -> Statement | None:
    version = cast("int", op.new_version)
    attributes, names = op.mapping.parts(put.entity, keep_created=True)
    attributes.pop(op.mapping.key)
    attributes[SIZE] = stored_size(put.entity, version)
    op.receipt = receipt_of(attributes, version, op.token)
    if op.state == "token":
        attributes, names = _difference(cast("Attributes", op.observed), attributes, op.mapping)
    assigned: dict[Path, Attribute] = {(TOKEN,): {"S": op.token}}
    assigned.update({(name,): each for name, each in attributes.items()})
    removed = [(each,) for each in names]
    return _update_with(op, assigned, removed, condition, None)


def _patch(op: WriteOp, patch: Patch, condition: Condition) -> Statement | None:
    fields = plain_fields(patch.fields)
    if fields is None:
        return None
    if op.mapping.key in fields:
        fields = {name: each for name, each in fields.items() if name != op.mapping.key}
    changes, removed = op.mapping.changes(fields)
    assigned: dict[Path, Attribute] = {(TOKEN,): {"S": op.token}, **changes}
    added_size: int | None = size_of(cast("Entity", fields))
    assert added_size is not None
    known = _known_size(op) + added_size
    if op.new_version is not None and known <= MAX_ENTITY_BYTES:
        assigned[SIZE,] = {"N": str(known)}
        op.receipt = receipt_of({SIZE: assigned[SIZE,]}, op.new_version, op.token)
        added_size = None
    else:
        condition = (*condition, (SIZE, "<=", {"N": str(MAX_ENTITY_BYTES - added_size)}))
    return _update_with(op, assigned, removed, condition, added_size)


def _update_with(
    op: WriteOp,
    assigned: dict[Path, Attribute],
    removed: Sequence[Path],
    condition: Condition,
    added_size: int | None,
) -> Statement | None:
    """The update of an existing item; see `partiql.update`."""
    version = op.new_version
    if not op.by_item:
        return update(
            op.table, op.key, assigned, removed, condition, version=version, added_size=added_size
        )
    names = Names()
    sets = [f"{names.path(path)} = {names.value(each)}" for path, each in assigned.items()]
    if version is None:
        sets.append(_added(names, VERSION, 1))
    else:
        sets.append(f"{names.name(VERSION)} = {names.value({'N': str(version)})}")
    if added_size is not None:
        sets.append(_added(names, SIZE, added_size))
    # It does not hold for a missing item.
    conditions = [
        f"{names.name(name)} {sign} {names.value(value)}" for name, sign, value in condition
    ]
    return _update_request(op, names, sets, removed, " AND ".join(conditions))


def _added(names: Names, attribute: str, number: int) -> str:
    name = names.name(attribute)
    return f"{name} = {name} + {names.value({'N': str(number)})}"


def _known_size(op: WriteOp) -> int:
    """The upper bound of the size of the item; if unknown, a value that exceeds the limit."""
    observed = op.observed if op.state in ("token", "cached") else None
    size = None if observed is None else size_bound_of(observed)
    return MAX_ENTITY_BYTES + 1 if size is None else size


def _difference(
    observed: Attributes, attributes: Attributes, mapping: ItemMapping
) -> tuple[Attributes, list[str]]:
    """The attributes that a save must set and remove, given the complete stored item.

    Args:
        attributes: the attributes of the whole entity.
    """
    kept = {mapping.key, VERSION, TOKEN, CLAIM}
    if CREATED_AT not in attributes:
        kept |= {CREATED_AT, CREATED_SUBSTITUTE}
    changed = {name: each for name, each in attributes.items() if observed.get(name) != each}
    return changed, [each for each in observed if each not in attributes and each not in kept]


# -- requests for one item -------------------------------------------------------------------


def whole_item_request(op: WriteOp) -> tuple[str, dict[str, Any]]:
    """The action and request that write or delete the item if it is still as observed.

    Sets `new_version` of the write.

    Raises:
        StorageError: the observed item cannot be changed.
    """
    change, observed = op.change, op.observed
    version = 0 if observed is None else _stored_version(op, observed)
    stored = None if observed is None else op.mapping.entity(observed)
    entity = op.decide(stored)
    request: dict[str, Any] = {
        "TableName": op.table,
        **unchanged(op.mapping, observed),
        "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
    }
    op.receipt = None
    if entity is None:
        op.new_version = version
        return "Delete", {**request, "Key": {op.mapping.key: {"S": change.key.id}}}
    op.new_version = version = cast("int", entity[VERSION])
    item = op.mapping.item(change.key.id, entity, version, op.token)
    if isinstance(change, Patch) and observed is not None:
        op.mapping.check_attributes(observed)
        op.mapping.keep_encodings(item, observed)
    if stored is not None and is_there(change, change.key, stored):  # else its claim has ended
        keep_claim(request, item, observed)
    receipt = receipt_of(item, version, op.token)
    op.receipt = receipt and msgspec.structs.replace(receipt, is_claimed=CLAIM in item)
    return "Put", {**request, "Item": item}


def _stored_version(op: WriteOp, item: Attributes) -> int:
    """The version of an item; 0 if it is invalid and the change does not depend on it.

    Raises:
        CorruptionError: the version is invalid.
    """
    change = op.change
    try:
        return op.version_of(item)
    except CorruptionError:
        is_import = isinstance(change, Put) and change.import_version is not None
        if is_import or (isinstance(change, Delete) and type(change.expect) is not int):
            return 0
        raise


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
    maximum = names.value({"N": str(NEAR_MAX_VERSION)})
    same_declaration = f"{names.name(DECLARATION_DIGEST)} = {names.value(op.mapping.digest)}"
    absent = f"attribute_not_exists({names.name(op.mapping.key)})"
    condition = f"{absent} OR ({version} < {maximum} AND {same_declaration})"
    return _update_request(op, names, assignments, [(each,) for each in removed], condition)


def update_item(
    op: WriteOp, condition: str, names: Names, also_removed: Sequence[Path]
) -> dict[str, Any]:
    """The UpdateItem request of an update with a condition of the caller."""
    change = cast("Patch", op.change)
    stored_entity = None if op.observed is None else op.mapping.entity(op.observed)
    fields = _new_values(change, stored_entity)
    fields.pop(op.mapping.key, None)
    sets, removed = op.mapping.changes(fields, stored_entity)
    if op.expires and stored_entity is not None:
        time_to_live = op.mapping.time_to_live(patched(stored_entity, change.fields, 0))
        if time_to_live is None:
            removed.append((TIME_TO_LIVE,))
        else:
            sets[TIME_TO_LIVE,] = time_to_live
    added_size = size_of(cast("Entity", fields))
    version, stored = names.name(VERSION), names.name(SIZE)
    assignments = [f"{names.path(path)} = {names.value(each)}" for path, each in sets.items()]
    assignments.append(f"{names.name(TOKEN)} = {names.value({'S': op.token})}")
    assignments += [_added(names, VERSION, 1), _added(names, SIZE, added_size)]
    conditions = [
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
    removed = [*removed, *also_removed]
    return _update_request(op, names, assignments, removed, " AND ".join(conditions))


def _new_values(change: Patch, stored: Entity | None) -> dict[str, Value | Removed]:
    fields = plain_fields(change.fields)
    if fields is None:
        assert stored is not None, "it was read, because fields are computed from it"
        entity = patched(stored, change.fields, 0)
        fields = {name: entity.get(name, REMOVE) for name in change.fields}
    return fields


def _update_request(
    op: WriteOp,
    names: Names,
    assignments: Sequence[str],
    removed: Sequence[Path],
    condition: str,
) -> dict[str, Any]:
    expression = f"SET {', '.join(assignments)}"
    if removed:
        expression += f" REMOVE {', '.join(names.path(each) for each in removed)}"
    return {
        "TableName": op.table,
        "Key": {op.mapping.key: {"S": op.change.key.id}},
        "ReturnValues": "UPDATED_NEW",
        "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
        **names.request(UpdateExpression=expression, ConditionExpression=condition),
    }


def rewriting(mapping: ItemMapping, table: str, item: Attributes) -> dict[str, Any]:
    """The PutItem request that writes the entity of an item by this declaration, if it is unchanged.

    Raises:
        CorruptionError: another program wrote the item, and it cannot be rewritten.
    """
    mapping.check_attributes(item)
    entity_id = mapping.id_of(item)
    version = version_of(item, table, entity_id)
    new = mapping.item(entity_id, mapping.entity(item), version, token_of(item) or new_token())
    mapping.keep_encodings(new, item)
    request = {"TableName": table, "Item": new, **unchanged(mapping, item)}
    keep_claim(request, new, item)
    return request


def unchanged(mapping: ItemMapping, observed: Attributes | None) -> dict[str, Any]:
    """The condition that an item has not changed since it was read."""
    if observed is None:
        return {
            "ConditionExpression": "attribute_not_exists(#k)",
            "ExpressionAttributeNames": {"#k": mapping.key},
        }
    if TOKEN in observed:
        return {
            "ConditionExpression": "#w = :w",
            "ExpressionAttributeNames": {"#w": TOKEN},
            "ExpressionAttributeValues": {":w": observed[TOKEN]},
        }
    # Another program wrote the item: only its version can be compared.
    request: dict[str, Any] = {
        "ConditionExpression": "attribute_exists(#k) AND attribute_not_exists(#w)",
        "ExpressionAttributeNames": {"#k": mapping.key, "#w": TOKEN},
    }
    request["ExpressionAttributeNames"]["#v"] = VERSION
    if VERSION in observed:
        request["ConditionExpression"] += " AND #v = :v"
        request["ExpressionAttributeValues"] = {":v": observed[VERSION]}
    else:
        request["ConditionExpression"] += " AND attribute_not_exists(#v)"
    return request
