"""Imports: whole items that unconditionally replace the stored ones, by `BatchWriteItem`.

The operation is idempotent; unprocessed items are sent again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from hf_async_store.changes import ANY, Change, Put
from hf_async_store.errors import StorageError, UnavailableError
from hf_async_store.strategies.dynamodb.backoff import Backoff, is_safe_to_retry, throttled
from hf_async_store.strategies.dynamodb.errors import TableMissing, UnexpectedResponse
from hf_async_store.strategies.dynamodb.write_op import WriteOp, chunks, deleted_meanwhile

if TYPE_CHECKING:
    from hf_async_store.strategies.dynamodb.client import Client
    from hf_async_store.strategies.dynamodb.codec import Attributes
    from hf_async_store.strategies.dynamodb.tables import Tables

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

    def __init__(self, client: Client, tables: Tables) -> None:
        self._client = client
        self._tables = tables
        self._retry_seconds = client.config.retry_timeout

    async def write(self, ops: list[WriteOp]) -> None:
        """Replace the stored items unconditionally, by `BatchWriteItem`."""
        sent = [self._write_batch(each) for each in chunks(ops, MAX_PUTS)]
        await asyncio.gather(*sent)

    async def _write_batch(self, ops: Sequence[WriteOp]) -> None:
        remaining = {(each.table, each.change.key.id): each for each in ops}
        backoff = Backoff(self._retry_seconds)
        last: StorageError = throttled("an import")
        while remaining:
            requests: dict[str, list[dict[str, Any]]] = {}
            for op in remaining.values():
                put = cast("Put", op.change)
                item = op.mapping.item(
                    put.key.id, put.entity, cast("int", put.import_version), op.token
                )
                requests.setdefault(op.table, []).append({"PutRequest": {"Item": item}})
            try:
                response = await self._client.call("BatchWriteItem", {"RequestItems": requests})
                remaining = self._complete_processed(
                    remaining, response.get("UnprocessedItems") or {}
                )
                last = throttled("an import")
            except UnavailableError as exc:
                last = exc
                if not is_safe_to_retry(exc):
                    for op in remaining.values():
                        op.ambiguous = True
            except StorageError as exc:
                if len(remaining) == 1:
                    [op] = remaining.values()
                    op.done(deleted_meanwhile(op) if isinstance(exc, TableMissing) else exc)
                    return
                # One rejected item fails the whole batch. Split it, so that the others succeed.
                batch = list(remaining.values())
                middle = len(batch) // 2
                await asyncio.gather(
                    self._write_batch(batch[:middle]), self._write_batch(batch[middle:])
                )
                return
            if remaining and not await backoff.pause(last):
                for op in remaining.values():
                    error = last.copy()
                    error.outcome_unknown = op.ambiguous
                    op.done(error)
                return

    def _complete_processed(
        self,
        sent: dict[tuple[str, str], WriteOp],
        unprocessed: Mapping[str, Sequence[Mapping[str, Any]]],
    ) -> dict[tuple[str, str], WriteOp]:
        """Complete the processed operations; return the unprocessed ones."""
        remaining = {}
        for table, requests in unprocessed.items():
            for each in requests:
                item = each["PutRequest"]["Item"]
                item_key = (table, self._id_of(table, item))
                if item_key not in sent:
                    raise UnexpectedResponse(
                        "DynamoDB returned an unprocessed item that was not sent",
                        outcome_unknown=True,
                    )
                remaining[item_key] = sent[item_key]
        for item_key, op in sent.items():
            if item_key not in remaining:
                op.done(cast("Put", op.change).import_version)
        return remaining

    def _id_of(self, table: str, item: Attributes) -> str:
        """The id of an item; "" if the table is not one of this store."""
        collections = [name for name in self._tables.schema if self._tables.name(name) == table]
        return self._tables.mappings[collections[0]].id_of(item) if collections else ""
