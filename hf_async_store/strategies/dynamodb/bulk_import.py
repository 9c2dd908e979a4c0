"""Imports: whole items that unconditionally replace the stored ones, by `BatchWriteItem`.

The operation is idempotent; unprocessed items are sent again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from hf_async_store.changes import ANY, Change, Put
from hf_async_store.errors import StorageError, UnavailableError
from hf_async_store.strategies.dynamodb.errors import TableMissing, UnexpectedResponse
from hf_async_store.strategies.dynamodb.request_retry import is_safe_to_retry, throttled
from hf_async_store.strategies.dynamodb.write_op import WriteOp, chunks, deleted_meanwhile

if TYPE_CHECKING:
    from hf_async_store.strategies.dynamodb.client import Client

MAX_PUTS: Final = 25
"""Source: DynamoDB API Reference, BatchWriteItem."""


def is_import(change: Change) -> bool:
    return (
        isinstance(change, Put)
        and change.import_version is not None
        and change.expect is ANY
        and change.mark is None
    )


class Imports:
    """Writes the imports among independent changes."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def write(self, ops: list[WriteOp]) -> None:
        """Replace the stored items unconditionally, by `BatchWriteItem`."""
        for op in ops:
            op.state, op.new_version = "upsert", cast("Put", op.change).import_version
        sent = [self._write_batch(each) for each in chunks(ops, MAX_PUTS)]
        await asyncio.gather(*sent)

    async def _write_batch(self, ops: Sequence[WriteOp]) -> None:
        remaining = {(each.table, each.change.key.id): each for each in ops}
        retries = self._client.retries()
        while remaining:
            last: StorageError = throttled("an import")
            try:
                request = {"RequestItems": _put_requests(remaining.values())}
                response = await self._client.call("BatchWriteItem", request)
                unprocessed = response.get("UnprocessedItems") or {}
                remaining = _complete_processed(remaining, unprocessed)
            except UnavailableError as exc:
                last = exc
                if not is_safe_to_retry(exc):
                    for op in remaining.values():
                        op.doubt = "open"
            except StorageError as exc:
                await self._refused(list(remaining.values()), exc)
                return
            if remaining and not await retries.pause_after(last):
                for op in remaining.values():
                    op.end(last)
                return

    async def _refused(self, ops: Sequence[WriteOp], exc: StorageError) -> None:
        """One rejected item fails the whole batch. Split it, so that the others succeed."""
        if len(ops) == 1:
            ops[0].end(deleted_meanwhile(ops[0]) if isinstance(exc, TableMissing) else exc)
            return
        middle = len(ops) // 2
        await asyncio.gather(self._write_batch(ops[:middle]), self._write_batch(ops[middle:]))


def _put_requests(ops: Iterable[WriteOp]) -> dict[str, list[dict[str, Any]]]:
    """The items to write, by table."""
    requests: dict[str, list[dict[str, Any]]] = {}
    for op in ops:
        put = cast("Put", op.change)
        version = cast("int", put.import_version)
        item = op.mapping.item(put.key.id, put.entity, version, op.token)
        requests.setdefault(op.table, []).append({"PutRequest": {"Item": item}})
    return requests


def _complete_processed(
    sent: dict[tuple[str, str], WriteOp],
    unprocessed: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[tuple[str, str], WriteOp]:
    """Complete the processed operations; return the unprocessed ones."""
    mappings = {each.table: each.mapping for each in sent.values()}
    remaining = {}
    for table, requests in unprocessed.items():
        for each in requests:
            item = each["PutRequest"]["Item"]
            item_key = (table, mappings[table].id_of(item) if table in mappings else "")
            if item_key not in sent:
                raise UnexpectedResponse(
                    "DynamoDB returned an unprocessed item that was not sent", outcome_unknown=True
                )
            remaining[item_key] = sent[item_key]
    for item_key, op in sent.items():
        if item_key not in remaining:
            op.respond("applied")
    return remaining
