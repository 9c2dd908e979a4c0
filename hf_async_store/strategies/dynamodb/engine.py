"""The DynamoDB engine: implements the driver interface with the modules of this package."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from typing import Final

from hf_async_store.changes import Change, Outcome, Patch, Record
from hf_async_store.claim_clock import WallClock
from hf_async_store.config import AutoScaling, DynamoDBConfig
from hf_async_store.driver import (
    INTERFACE_VERSION,
    Capabilities,
    Claimed,
    ClaimInfo,
    ClaimTerms,
    Engine,
    FeedBatch,
    Isolation,
    QueryPlan,
    SchemaChange,
    SchemaProgress,
    Session,
    giving_back,
    remember_in,
    run_to_completion,
)
from hf_async_store.errors import StorageError, StoreNotFoundError, UnavailableError
from hf_async_store.generators import Owned
from hf_async_store.query import Query
from hf_async_store.schema import CATALOGUE_COLLECTION, Collection, Index, Schema
from hf_async_store.strategies.dynamodb.claiming import Claiming
from hf_async_store.strategies.dynamodb.client import Client
from hf_async_store.strategies.dynamodb.dax import cache_of
from hf_async_store.strategies.dynamodb.errors import (
    ActionDenied,
    TableMissing,
    public,
    public_errors,
)
from hf_async_store.strategies.dynamodb.expressions import Names
from hf_async_store.strategies.dynamodb.feed import Feed
from hf_async_store.strategies.dynamodb.independent_writes import MAX_STATEMENTS, Writes
from hf_async_store.strategies.dynamodb.items import ItemMapping, probe_id
from hf_async_store.strategies.dynamodb.reading import MAX_KEYS, Reading
from hf_async_store.strategies.dynamodb.schema_changes import SchemaApplication
from hf_async_store.strategies.dynamodb.stream_shards import RETENTION_SECONDS
from hf_async_store.strategies.dynamodb.tables import Tables
from hf_async_store.strategies.dynamodb.transactions import (
    MAX_ACTIONS,
    MAX_BYTES,
    DynamoDBSession,
    HeldClaim,
)
from hf_async_store.strategies.dynamodb.write_cache import WriteCache
from hf_async_store.values import Key, Value

_CONCURRENCY: Final = 8


class DynamoDBEngine(Engine):
    """The engine of one store: its client, tables, reads and writes."""

    interface_version = INTERFACE_VERSION
    capabilities: Capabilities = Capabilities(
        engine="dynamodb",
        durable=True,
        multi_process=True,
        claims=True,
        change_markers=True,
        unique_indexes=True,
        query_isolation="eventual",
        queries_in_transaction="own_writes",
        references=False,
        removes_expired=True,
        feed=True,
        max_feed_retention=timedelta(seconds=RETENTION_SECONDS),
        default_order="none",
        max_transaction_changes=MAX_ACTIONS,
        max_transaction_bytes=MAX_BYTES,
        write_concurrency=_CONCURRENCY,
        write_batch=MAX_STATEMENTS,
        read_batch=MAX_KEYS,
        read_concurrency=_CONCURRENCY,
    )

    def __init__(self, config: DynamoDBConfig, schema: Schema) -> None:
        self.config = config
        self.schema = schema
        self.client = Client(config)
        self.tables = Tables(self.client, schema)
        self._cache = cache_of(config)
        self.reading = Reading(self.client, self.tables, self._cache)
        self._write_cache = WriteCache()
        self._schema = SchemaApplication(self.client, self.tables, self.reading, self._write_cache)
        self.writes = Writes(self.client, self.tables, self.reading, self._write_cache)
        self.claim_clock = WallClock()
        self._claiming = Claiming(self.client, self.tables, self.reading, self.writes)
        self._streams = Client(config, "dynamodbstreams")
        self._feed = Feed(self._streams, self.tables)

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        with public_errors():
            return await self.reading.fetch(keys)

    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        with public_errors():
            async with Owned(self.reading.select(query)) as records:
                async for record in records:
                    yield record

    async def first_page(self, query: Query) -> Query:
        with public_errors():
            return await self.reading.first_page(query)

    async def count(self, query: Query) -> int:
        with public_errors():
            return await self.reading.count(query)

    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        self.client.check_open()
        # A request is not cancelled, because it may be applied at any time before its response.
        with public_errors():
            outcomes = await run_to_completion(self.writes.write_each(changes))
        self._claiming.candidates.forget_after(changes)
        return [public(each) if isinstance(each, StorageError) else each for each in outcomes]

    async def update_where(
        self, change: Patch, condition_of: Callable[[ItemMapping, Names], str]
    ) -> int:
        """As `Writes.update_where`."""
        with public_errors():
            version = await self.writes.update_where(change, condition_of)
        self._claiming.candidates.forget_after([change])
        return version

    def shares_changes(self, key: Key) -> bool:
        """As `Engine.shares_changes`. Not with a stream, which has each version."""
        return not self.tables.has_stream(key.collection) and not self.tables.unique(key.collection)

    @asynccontextmanager
    async def session(self, isolation: Isolation | None) -> AsyncGenerator[Session, None]:
        session = DynamoDBSession(self.client, self.tables, self.reading, self._write_cache)
        with public_errors():
            yield session
            await session.commit()
        self._claiming.candidates.forget_after(session.changes())

    # -- claims ------------------------------------------------------------------------------

    async def claim(self, query: Query, terms: ClaimTerms) -> list[Claimed]:
        now = self.claim_clock.now()
        with public_errors():
            async with giving_back(self) as claimed:
                await run_to_completion(self._claiming.claim(query, terms, now, claimed))
                return claimed

    async def claim_name(self, keys: Sequence[Key], terms: ClaimTerms) -> Claimed | None:
        now = self.claim_clock.now()
        with public_errors():
            async with giving_back(self) as claimed:
                await run_to_completion(self._claiming.claim_name(keys, terms, now, claimed))
                return claimed[0] if claimed else None

    async def renew_claim(self, key: Key, token: int, lease: float) -> None:
        with public_errors():
            await run_to_completion(self._claiming.renew(key, token, lease, self.claim_clock.now()))

    async def release_claim(self, key: Key, token: int, after: float | None) -> None:
        with public_errors():
            await run_to_completion(
                self._claiming.release(key, token, after, self.claim_clock.now())
            )

    def claimed_session(
        self, key: Key, token: int, *, ends: bool = False
    ) -> AbstractAsyncContextManager[Session]:
        skew = self.config.max_clock_skew
        return self._under_claim(HeldClaim(key, token, self.claim_clock, ends, skew))

    @asynccontextmanager
    async def _under_claim(self, claim: HeldClaim) -> AsyncGenerator[Session, None]:
        parts = self.client, self.tables, self.reading, self._write_cache
        session = DynamoDBSession(*parts, claim)
        await session.check_claim()
        with public_errors():
            yield session
            await session.commit()
        changes = session.changes()
        if claim.ends and all(each.key != claim.key for each in changes):
            self._claiming.candidates.forget()  # it is free, and as it was
        else:
            self._claiming.candidates.forget_after(changes)

    async def write_claimed(self, token: int, change: Change, *, ends: bool) -> int:
        if isinstance(change, Patch) and change.mark is None:
            with public_errors():
                version = await run_to_completion(
                    self._claiming.update(token, change, self.claim_clock, ends=ends)
                )
            if version is not None:
                return version
        return await super().write_claimed(token, change, ends=ends)

    async def break_claim(self, key: Key) -> bool:
        with public_errors():
            return await run_to_completion(self._claiming.break_claim(key))

    async def claims(self, collection: str) -> list[ClaimInfo]:
        with public_errors():
            return await self._claiming.listed(collection, self.claim_clock.now())

    # -- feed --------------------------------------------------------------------------------

    async def feed_position(self, collection: str) -> str:
        with public_errors():
            return await self._feed.end(collection)

    async def read_feed(self, collection: str, since: str, limit: int) -> FeedBatch:
        with public_errors():
            return await self._feed.read(collection, since, limit)

    async def feed_changed(self, positions: Mapping[str, str], seconds: float) -> None:
        self.client.check_open()
        await self._feed.changed(positions, seconds)

    # -- the existing store ------------------------------------------------------------------

    async def fetch_undeclared(self, collection: Collection, entity_id: str) -> Record | None:
        mapping = ItemMapping(collection)
        params = {
            "TableName": f"{self.config.table_prefix}_{collection.name}",
            "Key": {mapping.key: {"S": entity_id}},
            "ConsistentRead": True,
        }
        try:
            with public_errors(TableMissing, ActionDenied):
                item = (await self.client.read("GetItem", params)).get("Item")
        except TableMissing:
            return None
        except ActionDenied:
            # A minimal policy covers the declared tables only. In this case no live migration of
            # this store is in progress, because that requires access to this table, too.
            return None
        return None if item is None else mapping.record(item)

    async def remember(self, collections: Iterable[Collection]) -> None:
        self.client.check_open()
        # The tables of an engine are those of its schema.
        engine = DynamoDBEngine(self.config, Schema([CATALOGUE_COLLECTION]))
        try:
            await remember_in(engine, collections)
        finally:
            await engine.close()

    async def exists(self) -> bool:
        with public_errors():
            return await self.tables.exists()

    async def is_same_store(self, other: Engine) -> bool:
        if not isinstance(other, DynamoDBEngine):
            return False
        collections = {*self.schema, *other.schema}
        with public_errors():
            own_ids = await self.tables.identities(collections)
            other_ids = await other.tables.identities(collections)
        if not own_ids and not other_ids:
            raise StoreNotFoundError(
                "DynamoDB stores are compared by their tables, but neither of the two has any: "
                f"{self.config.table_prefix}_... and {other.config.table_prefix}_..."
            )
        return bool(own_ids & other_ids)

    async def undeclared(self) -> list[str]:
        with public_errors():
            return await self.tables.undeclared()

    async def schema_changes(self) -> list[SchemaChange]:
        with public_errors():
            return await self._schema.changes()

    async def unenforced(self) -> list[tuple[str, Index]]:
        with public_errors():
            return await self._schema.unenforced()

    async def apply_schema(
        self, *, progress: SchemaProgress | None = None, complete: bool = False
    ) -> None:
        with public_errors():
            await self._schema.apply(progress or _ignore, complete=complete)

    async def explain(self, query: Query) -> QueryPlan:
        self.client.check_open()
        with public_errors():
            return await self.reading.explain(query)

    async def probe(self) -> None:
        with public_errors():
            for collection in self.schema:
                if await self.tables.find(collection) is not None:
                    await run_to_completion(self._probe(collection))
                    return
        # The store does not exist yet; its first write creates it. DescribeTable has succeeded, so
        # the service is available.

    async def _probe(self, collection: str) -> None:
        table = self.tables.name(collection)
        key = {self.tables.mappings[collection].key: {"S": probe_id()}}
        await self.client.read("PutItem", {"TableName": table, "Item": key})
        try:
            params = {"TableName": table, "Key": key, "ConsistentRead": True}
            if (await self.client.read("GetItem", params)).get("Item") != key:
                raise UnavailableError(f"an item written to {table} could not be read back")
        finally:
            await self.client.read("DeleteItem", {"TableName": table, "Key": key})

    async def health(self) -> Mapping[str, Value]:
        with public_errors():
            summaries, problems = await self.tables.compare()
        return {"tables": summaries, "problems": list[Value](problems)}

    def describe(self) -> Mapping[str, Value]:
        config = self.config
        scaling = config.auto_scaling
        return {
            "region": config.region,
            "endpoint_url": config.endpoint,
            "tables": {name: self.tables.name(name) for name in self.schema},
            "consistency": {
                "reads by key": "current" if config.consistent_reads else "eventual",
                "scans": "current" if config.consistent_reads else "eventual",
                "index queries": "eventual",
                "transactions": "serializable for reads by key",
            },
            "configuration": {
                "profile": config.profile,
                "table_prefix": config.table_prefix,
                "billing_mode": config.billing_mode,
                "read_capacity": config.read_capacity,
                "write_capacity": config.write_capacity,
                "auto_scaling": scaling.enabled if isinstance(scaling, AutoScaling) else scaling,
                "enable_dax": config.enable_dax,
                "consistent_reads": config.consistent_reads,
                "point_in_time_recovery": config.point_in_time_recovery,
                "allow_scan": config.allow_scan,
            },
        }

    async def close(self) -> None:
        self._streams.end_retries()
        await self._streams.close()
        await self.tables.close()
        if self._cache is not None:
            await self._cache.close()
        await self.client.close()

    def abandon(self) -> None:
        self._streams.abandon()
        self.client.abandon()


def _ignore(change: SchemaChange, done: int, total: int | None) -> None:
    del change, done, total
