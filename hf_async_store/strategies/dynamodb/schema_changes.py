"""What the tables lack for the declaration, and making it: indexes, and the items of other declarations."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from hf_async_store.driver import SchemaChange, SchemaProgress
from hf_async_store.errors import (
    ConcurrencyConflictError,
    InvalidFieldError,
    SchemaMismatchError,
)
from hf_async_store.generators import Owned
from hf_async_store.schema import UNIQUE_COLLECTION
from hf_async_store.strategies.dynamodb.errors import ConditionFailed
from hf_async_store.strategies.dynamodb.expressions import Names
from hf_async_store.strategies.dynamodb.index_keys import keys_of_table
from hf_async_store.strategies.dynamodb.index_state import IndexState, Pass
from hf_async_store.strategies.dynamodb.items import (
    DECLARATION_DIGEST,
    TIME_TO_LIVE,
    ItemMapping,
)
from hf_async_store.strategies.dynamodb.partitions import PARALLEL, counted, gather
from hf_async_store.strategies.dynamodb.table_stream import problem_with, view_of
from hf_async_store.strategies.dynamodb.tables import (
    active_indexes,
    incomplete_message,
    mismatch_message,
)
from hf_async_store.strategies.dynamodb.transactions import DynamoDBSession
from hf_async_store.strategies.dynamodb.write_op import chunks
from hf_async_store.strategies.dynamodb.write_requests import rewriting
from hf_async_store.unique import cannot_be_unique
from hf_async_store.values import MAX_KEY_BYTES, Key

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from hf_async_store.schema import Index
    from hf_async_store.strategies.dynamodb.client import Client
    from hf_async_store.strategies.dynamodb.codec import Attributes
    from hf_async_store.strategies.dynamodb.reading import Reading
    from hf_async_store.strategies.dynamodb.tables import Tables
    from hf_async_store.strategies.dynamodb.write_cache import WriteCache
    from hf_async_store.unique import Fields

_PAGE_SIZE: Final = 250
_REWRITES_PER_SECOND: Final = 250.0


class SchemaApplication:
    """Compares the tables with the declaration, and brings them to it."""

    def __init__(
        self, client: Client, tables: Tables, reading: Reading, write_cache: WriteCache
    ) -> None:
        self._client = client
        self._write_cache = write_cache
        self._tables = tables
        self._reading = reading

    # -- comparing ---------------------------------------------------------------------------

    async def changes(self) -> list[SchemaChange]:
        """As `Engine.schema_changes`. A missing table is none, because the first write creates it."""
        found: list[SchemaChange] = []
        for collection in self._tables.schema:
            table = await self._tables.described(collection)
            if table is None:
                continue
            try:
                self._tables.check_key(collection, table)
            except SchemaMismatchError as exc:
                key = self._tables.schema[collection].key
                found.append(SchemaChange("key", collection, key, str(exc)))
            else:
                complete = (await self._tables.index_state(collection, table)).complete
                indexes = list(self._index_changes(collection, table, complete))
                found += indexes
                # Otherwise nothing depends on it which declaration an item was written with.
                found += await self._item_changes(collection, table) if indexes else ()
                found += await self._removal_changes(collection)
                found += self._feed_changes(collection, table)
        return found

    def _feed_changes(self, collection: str, table: Mapping[str, Any]) -> list[SchemaChange]:
        problem = problem_with(table, self._tables.name(collection))
        if not self._tables.is_fed(collection) or not problem:
            return []
        return [SchemaChange("feed", collection, "", problem)]

    async def _removal_changes(self, collection: str) -> list[SchemaChange]:
        expires = self._tables.schema[collection].expires
        if expires is None:
            return []
        attribute = await self._tables.time_to_live(collection)
        if attribute in (None, TIME_TO_LIVE):
            return []
        name = self._tables.name(collection)
        detail = f"time to live of {name} is off; it is enabled, so that DynamoDB removes expired entities"
        if attribute:
            detail = f"time to live of {name} uses the attribute {attribute}, and stays as it is"
        return [SchemaChange("removal", collection, expires.field, detail)]

    def _index_changes(
        self, collection: str, table: Mapping[str, Any], complete: frozenset[str]
    ) -> Iterator[SchemaChange]:
        tables, name = self._tables, self._tables.name(collection)
        missing = tables.missing(collection, table)
        for index in tables.schema[collection].indexes:
            if index in missing:
                detail = (
                    "it is made in the background; queries use it after `schema apply --complete`"
                )
            elif tables.mismatch(collection, index, table):
                detail = mismatch_message(name, index, tables.mismatch(collection, index, table))
            elif index.name not in active_indexes(table):
                detail = f"{name}: the index {index.name} is being created"
            elif index.name not in complete:
                detail = incomplete_message(name, index)
            else:
                continue
            yield _index_change(collection, index, detail)

    async def _item_changes(self, collection: str, table: Mapping[str, Any]) -> list[SchemaChange]:
        mapping = ItemMapping(self._tables.schema[collection], keys_of_table(table))
        params = {**self._outdated(collection, mapping), "Select": "COUNT"}
        number = await counted(self._reading.pages("Scan", params))
        return [_item_change(collection, f"{number:,} entities were")] if number else []

    def _outdated(self, collection: str, mapping: ItemMapping) -> dict[str, Any]:
        """The Scan request for the entities that were written by another declaration."""
        names = Names()
        digest = f"{names.name(DECLARATION_DIGEST)} = {names.value(mapping.digest)}"
        longest = names.value({"N": str(MAX_KEY_BYTES)})
        condition = f"size({names.name(mapping.key)}) <= {longest} AND NOT {digest}"
        return {
            "TableName": self._tables.name(collection),
            "ConsistentRead": True,
            **names.request(FilterExpression=condition),
        }

    # -- applying ----------------------------------------------------------------------------

    async def apply(self, progress: SchemaProgress, *, complete: bool) -> None:
        """As `Engine.apply_schema`.

        Raises:
            SchemaMismatchError: an existing index does not match its declaration, or a stream cannot be a
                change feed; nothing was changed.
            CorruptionError: another program wrote an item that cannot be rewritten.
        """
        existing: list[str] = []
        for collection in self._tables.schema:
            table = await self._tables.described(collection)
            if table is not None:
                existing.append(collection)
                self._check_indexes(collection, table)
                self._check_stream(collection, table)
        for collection in existing:
            await self._enable_stream(collection, progress)
            for change in await self._removal_changes(collection):
                await self._tables.enable_time_to_live(collection)
                progress(change, 1, 1)
            await self._make_indexes(collection, progress)
            await self._tables.refresh(collection)
            await self._rewrite(collection, progress, complete=complete)
            if complete:
                await self._enforce(collection, progress)
            await self._tables.refresh(collection)

    def _check_stream(self, collection: str, table: Mapping[str, Any]) -> None:
        if view_of(table) is not None:
            for each in self._feed_changes(collection, table):
                raise SchemaMismatchError(each.detail)

    async def _enable_stream(self, collection: str, progress: SchemaProgress) -> None:
        table = await self._tables.described(collection)
        for change in self._feed_changes(collection, table) if table is not None else ():
            await self._tables.enable_stream(collection)
            progress(change, 1, 1)

    def _check_indexes(self, collection: str, table: Mapping[str, Any]) -> None:
        missing = self._tables.missing(collection, table)
        for index in self._tables.schema[collection].indexes:
            mismatch = index not in missing and self._tables.mismatch(collection, index, table)
            if mismatch:
                name = self._tables.name(collection)
                raise SchemaMismatchError(mismatch_message(name, index, mismatch))

    async def _make_indexes(self, collection: str, progress: SchemaProgress) -> None:
        """Make the missing indexes, one at a time, and wait for those that are being made."""
        tables = self._tables
        for index in tables.schema[collection].indexes:
            change = _index_change(collection, index, "it is made in the background")

            def seen(
                table: Mapping[str, Any], index: Index = index, change: SchemaChange = change
            ) -> None:
                progress(change, *_progress_of(table, index))

            table = await tables.described(collection)
            if table is None:
                return
            if index in tables.missing(collection, table):
                await tables.add_index(collection, index, seen)
            elif index.name not in active_indexes(table):
                await tables.wait_until_active(collection, seen)
        await tables.scale(collection)

    async def _rewrite(self, collection: str, progress: SchemaProgress, *, complete: bool) -> None:
        """Rewrite the entities of other declarations, and remember which indexes are complete."""
        tables, mapping = self._tables, self._tables.mappings[collection]
        table = await tables.wait_until_active(collection)
        state = await tables.state(collection)
        begun = Pass(mapping.digest["S"], complete, "")
        if state is not None and state.interrupted is not None and state.interrupted.covers(begun):
            begun = state.interrupted
        change = _item_change(collection, "entities that were")
        params = self._outdated(collection, mapping)
        if begun.after:
            params["ExclusiveStartKey"] = {mapping.key: {"S": begun.after}}
        examined = 0
        async with Owned(self._reading.pages("Scan", params, _PAGE_SIZE, grows=False)) as pages:
            async for page in pages:
                await self._rewrite_items(collection, mapping, page["Items"])
                examined += page.get("ScannedCount", page["Count"])
                progress(change, examined, max(table.get("ItemCount", 0), examined))
                last = page.get("LastEvaluatedKey")
                if last:
                    await self._remember(collection, begun.up_to(mapping.id_of(last)))
        names = active_indexes(table) if complete else frozenset[str]()
        await tables.change_state(collection, lambda old: old.with_pass(None).with_complete(names))

    # -- unique indexes ----------------------------------------------------------------------

    async def unenforced(self) -> list[tuple[str, Index]]:
        """As `Engine.unenforced`."""
        found: list[tuple[str, Index]] = []
        for collection in self._tables.schema.unique:
            if await self._tables.described(collection) is not None:
                indexes = await self._unenforced(collection)
                if indexes and not await self._tables.is_empty(collection):
                    found += [(collection, each) for each in indexes]
        return found

    async def _unenforced(self, collection: str) -> list[Index]:
        state = await self._tables.state(collection) or IndexState()
        declared = self._tables.schema[collection].indexes
        return [each for each in declared if each.unique and not state.is_enforced(each.fields)]

    async def _enforce(self, collection: str, progress: SchemaProgress) -> None:
        """Write the markers of all values. From the beginning, this process and new ones maintain them.

        Raises:
            SchemaMismatchError: two entities have the same values.
        """
        tables, indexes = self._tables, await self._unenforced(collection)
        if not indexes:
            return
        unique = [each.fields for each in indexes]
        await tables.change_state(collection, lambda old: old.with_unique(unique, marked=False))
        await tables.refresh(collection)
        for each in (collection, UNIQUE_COLLECTION.name):
            await tables.ensure(each)
        try:
            await self._mark(collection, unique)
        except SchemaMismatchError:
            await tables.change_state(collection, lambda old: old.without_unique(unique))
            raise
        await tables.change_state(collection, lambda old: old.with_unique(unique, marked=True))
        for index in indexes:
            progress(SchemaChange("unique index", collection, index.name, "enforced"), 1, 1)

    async def _mark(self, collection: str, unique: list[Fields]) -> None:
        mapping = self._tables.mappings[collection]
        names = Names()
        longest = names.value({"N": str(MAX_KEY_BYTES)})
        params = {
            "TableName": self._tables.name(collection),
            "ConsistentRead": True,
            **names.request(FilterExpression=f"size({names.name(mapping.key)}) <= {longest}"),
        }
        async with Owned(self._reading.pages("Scan", params, _PAGE_SIZE, grows=False)) as pages:
            async for page in pages:
                keys = [Key(collection, mapping.id_of(each)) for each in page["Items"]]
                for part in chunks(keys, PARALLEL):
                    await gather([self._mark_values(each, unique) for each in part])

    async def _mark_values(self, key: Key, unique: list[Fields]) -> None:
        retries = self._client.retries()
        while True:
            session = DynamoDBSession(self._client, self._tables, self._reading, self._write_cache)
            try:
                refused = await session.mark(key, unique)
                if refused is None:
                    await session.commit()
            except ConcurrencyConflictError as exc:
                if exc.outcome_unknown or not await retries.pause_after(exc):
                    raise
            except InvalidFieldError as exc:
                raise cannot_be_unique(unique[0], exc) from exc
            else:
                if refused is not None:
                    raise cannot_be_unique(refused.fields, refused)
                return

    async def _remember(self, collection: str, done: Pass) -> None:
        await self._tables.change_state(collection, lambda old: old.with_pass(done))

    async def _rewrite_items(
        self, collection: str, mapping: ItemMapping, items: list[Attributes]
    ) -> None:
        """Rewrite these items, at a bounded rate."""
        began = time.monotonic()
        for part in chunks(items, PARALLEL):
            requests = [rewriting(mapping, self._tables.name(collection), each) for each in part]
            await gather([self._put(each) for each in requests])
        await asyncio.sleep(max(0.0, began + len(items) / _REWRITES_PER_SECOND - time.monotonic()))

    async def _put(self, request: dict[str, Any]) -> None:
        # The entity remains the same, so a delayed or repeated request has no effect.
        with suppress(ConditionFailed):
            await self._client.read("PutItem", request)


def _progress_of(table: Mapping[str, Any], index: Index) -> tuple[int, int | None]:
    """How many items an index contains, and how many the table."""
    total = table.get("ItemCount") or None
    for each in table.get("GlobalSecondaryIndexes", ()):
        if each["IndexName"] == index.name and index.name in active_indexes(table):
            return total or 1, total or 1
        if each["IndexName"] == index.name:
            return each.get("ItemCount", 0), total
    return 0, total


def _index_change(collection: str, index: Index, detail: str) -> SchemaChange:
    return SchemaChange("index", collection, index.name, detail)


def _item_change(collection: str, what: str) -> SchemaChange:
    detail = f"{what} written by another declaration; they are rewritten in the background"
    return SchemaChange("items", collection, "", detail)
