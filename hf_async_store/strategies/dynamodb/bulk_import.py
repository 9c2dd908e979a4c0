"""Imports: whole items that unconditionally replace the stored ones, by `BatchWriteItem`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

from hf_async_store.strategies.dynamodb.errors import UnexpectedResponse

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from hf_async_store.changes import Put
    from hf_async_store.strategies.dynamodb.write_op import WriteOp

MAX_PUTS: Final = 25
"""Source: DynamoDB API Reference, BatchWriteItem."""


def import_request(ops: Iterable[WriteOp]) -> dict[str, Any]:
    """The BatchWriteItem request of imports, whose `new_version` it sets."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for op in ops:
        put = cast("Put", op.change)
        op.new_version = version = cast("int", put.import_version)
        item = op.mapping.item(put.key.id, put.entity, version, op.token)
        tables.setdefault(op.table, []).append({"PutRequest": {"Item": item}})
    return {"RequestItems": tables}


def unprocessed_keys(ops: Sequence[WriteOp], response: Mapping[str, Any]) -> set[tuple[str, str]]:
    """The tables and ids of the items that the server has not processed.

    Raises:
        UnexpectedResponse: one of them was not sent.
    """
    mappings = {each.table: each.mapping for each in ops}
    keys = {
        (table, mappings[table].id_of(each["PutRequest"]["Item"]) if table in mappings else "")
        for table, requests in (response.get("UnprocessedItems") or {}).items()
        for each in requests
    }
    if keys - {(each.table, each.change.key.id) for each in ops}:
        raise UnexpectedResponse(
            "DynamoDB returned an unprocessed item that was not sent", outcome_unknown=True
        )
    return keys
