"""The tables and indexes of a store: requests to create them, their status and their differences."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

from hf_async_store.config import AutoScaling
from hf_async_store.errors import (
    ConfigurationError,
    SchemaMismatchError,
    StorageError,
    UnavailableError,
)
from hf_async_store.schema import (
    LOCK_COLLECTION,
    SUBSCRIPTION_COLLECTION,
    SYSTEM_NAMES,
    UNIQUE_COLLECTION,
    Index,
    Schema,
)
from hf_async_store.strategies.dynamodb.errors import (
    ActionDenied,
    ConditionFailed,
    StatementRefused,
    TableMissing,
    scaling_error,
)
from hf_async_store.strategies.dynamodb.expressions import Names
from hf_async_store.strategies.dynamodb.index_keys import (
    MAX_INDEXES,
    IndexShape,
    keys_of_table,
)
from hf_async_store.strategies.dynamodb.index_state import (
    CONTENT,
    STATE_ID,
    IndexState,
    attributes_of,
    state_of,
)
from hf_async_store.strategies.dynamodb.items import TIME_TO_LIVE, ItemMapping, probe_id
from hf_async_store.strategies.dynamodb.table_stream import SPECIFICATION, problem_with, view_of
from hf_async_store.strategy import schema_of
from hf_async_store.unique import Fields
from hf_async_store.values import MAX_KEY_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hf_async_store.strategies.dynamodb.client import Client
    from hf_async_store.strategies.dynamodb.codec import Attributes
    from hf_async_store.values import Value

_WAIT_SECONDS: Final = 600.0
_INDEX_SECONDS: Final = 7 * 24 * 3600.0
"""How long is waited for an index of an existing table, while its progress is reported."""

_MAX_TARGETS: Final = 50
"""Source: Application Auto Scaling API Reference, DescribeScalableTargets."""

# Source: DynamoDB Developer Guide, "Naming rules", of tables and indexes.
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{3,255}\Z")

_SCALING_ENDPOINT: Final = "AWS_ENDPOINT_URL_APPLICATION_AUTO_SCALING"


SeeTable: TypeAlias = Callable[[Mapping[str, Any]], None]


def _ignore(table: Mapping[str, Any]) -> None:
    del table


class Tables:
    """The tables of the declared collections."""

    def __init__(self, client: Client, schema: Schema) -> None:
        self._client = client
        self.config = client.config
        self.schema = schema = schema_of(schema)
        self.mappings: dict[str, ItemMapping] = {
            name: ItemMapping(each) for name, each in schema.items()
        }
        for each in (UNIQUE_COLLECTION, LOCK_COLLECTION, SUBSCRIPTION_COLLECTION):
            self.mappings.setdefault(each.name, ItemMapping(each))
        self._declared = dict(self.mappings)
        prefix = client.config.table_prefix
        self._names = {name: f"{prefix}_{name}" for name in self.mappings}
        self._collections = {table: name for name, table in self._names.items()}
        for collection in schema:
            table = self._names[collection]
            _check_name(table, "dynamodb_strategy.table_prefix", "table")
            if len(schema[collection].indexes) > MAX_INDEXES:
                raise ConfigurationError(
                    f"{collection} declares {len(schema[collection].indexes)} indexes, but a table of "
                    f"DynamoDB has at most {MAX_INDEXES}"
                )
            for index in schema[collection].indexes:
                _check_name(index.name, f"collection {collection}", "index")
        self._ready: dict[str, frozenset[str]] = {}
        self._unique: dict[str, tuple[Fields, ...]] = {}
        self._with_stream: dict[str, bool] = {}
        self._opening: dict[tuple[str, bool], asyncio.Task[frozenset[str] | None]] = {}
        self._creating: set[asyncio.Task[object]] = set()

    def name(self, collection: str) -> str:
        """The name of the table of a collection."""
        return self._names[collection]

    def collection_of(self, table: str) -> str:
        return self._collections[table]

    def mapping_for(self, collection: str, index: str) -> ItemMapping:
        """The mapping for conditions on an index: the declared one, as long as it cannot be used."""
        is_usable = index in self._ready.get(collection, ())
        return (self.mappings if is_usable else self._declared)[collection]

    def is_ready(self, collection: str) -> bool:
        return collection in self._ready

    def has_stream(self, collection: str) -> bool:
        """Whether the table had a stream when this process looked; before, whether one is declared."""
        return self._with_stream.get(collection, self.is_fed(collection))

    def is_fed(self, collection: str) -> bool:
        """Whether a change feed is declared."""
        return self.schema[collection].feed is not None

    async def ensure(self, collection: str) -> frozenset[str]:
        """Create the table if it is missing, wait until it is active, and return its usable indexes.

        The result is cached. A missing index of an existing table is not created here, because that
        may take hours; `create` does it.

        Raises:
            SchemaMismatchError: a table of this name has a different key.
        """
        ready = await self._open_once(collection, create=True)
        assert ready is not None, "the table exists or was created"
        if collection not in self._unique:
            await self._begin_writing(collection)
        return ready

    # -- unique indexes ----------------------------------------------------------------------

    def unique(self, collection: str) -> tuple[Fields, ...]:
        """The fields of the unique indexes whose markers must be maintained: the declared ones and, after
        `ensure`, those of the table."""
        return self._unique.get(collection, self.schema[collection].unique)

    async def ensure_existing(self, collection: str) -> None:
        """As `ensure`, if the table exists."""
        if collection not in self._unique and await self.find(collection) is not None:
            await self.ensure(collection)

    async def _begin_writing(self, collection: str) -> None:
        """Find out, before the first write of this process, which unique indexes it must maintain.

        Those that it declares are added if the table has no entities. Otherwise only this process
        maintains them: another one may enforce them later, when this one is running already.
        """
        if collection in SYSTEM_NAMES:
            self._unique[collection] = ()
            return
        state = await self.state(collection) or IndexState()
        declared = self.schema[collection].unique
        new = [each for each in declared if each not in state.unique]
        if new and await self._is_empty(collection, unknown=False):
            await self.change_state(collection, lambda old: old.with_unique(new, marked=True))
            state = await self.state(collection) or IndexState()
        self._unique[collection] = tuple(dict.fromkeys([*state.unique, *declared]))

    async def _is_empty(self, collection: str, *, unknown: bool) -> bool:
        """As `is_empty`; `unknown` if the policy does not allow scans."""
        try:
            return await self.is_empty(collection)
        except ActionDenied:
            return unknown

    async def is_empty(self, collection: str) -> bool:
        """Whether the table has no entities; what else it contains has longer keys."""
        names = Names()
        longest = names.value({"N": str(MAX_KEY_BYTES)})
        condition = f"size({names.name(self.schema[collection].key)}) <= {longest}"
        params: dict[str, Any] = {
            "TableName": self.name(collection),
            "ConsistentRead": True,
            "Select": "COUNT",
            **names.request(FilterExpression=condition),
        }
        while True:
            page = await self._client.read("Scan", params)
            if page["Count"]:
                return False
            if not page.get("LastEvaluatedKey"):
                return True
            params["ExclusiveStartKey"] = page["LastEvaluatedKey"]

    async def find(self, collection: str) -> frozenset[str] | None:
        """As `ensure`, but does not create the table: returns None if it is missing."""
        return await self._open_once(collection, create=False)

    async def _open_once(self, collection: str, *, create: bool) -> frozenset[str] | None:
        ready = self._ready.get(collection)
        if ready is not None:
            return ready
        task_key = collection, create
        task = self._opening.get(task_key)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._open(collection, create=create))
            self._opening[task_key] = task
        try:
            found = await asyncio.shield(task)
        finally:
            if task.done():
                self._opening.pop(task_key, None)
        if found is not None:
            self._ready[collection] = found
        return found

    async def close(self) -> None:
        """Wait for the requests of the running tasks, but not for their retries.

        A table that is being created is also configured: no later store would do that.
        """
        while self._creating:
            await asyncio.wait(self._creating)
        self._client.end_retries()
        while self._opening:
            _, task = self._opening.popitem()
            await asyncio.wait((task,))
            if not task.cancelled():
                task.exception()

    async def _open(self, collection: str, *, create: bool) -> frozenset[str] | None:
        try:
            table = await self.described(collection)
            if table is None and not create:
                return None
            if table is None or table["TableStatus"] != "ACTIVE":
                if table is None and await self._create(collection):
                    await self._finish_creation(collection)
                table = await self.wait_until_active(collection)
        except ActionDenied:
            # A minimal policy does not allow DescribeTable: assume that the table is as declared.
            if not create and not await self._table_exists(collection):
                return None
            names = frozenset(each.name for each in self.schema[collection].indexes)
            with suppress(TableMissing):
                names &= (await self._first_state(collection, names)).complete
            return names
        self.check_key(collection, table)
        return await self._adopt(collection, table)

    async def _adopt(self, collection: str, table: Mapping[str, Any]) -> frozenset[str]:
        """From now on maintain the indexes of the table; return those that queries can use."""
        state = await self.index_state(collection, table)
        mapping = ItemMapping(self.schema[collection], keys_of_table(table))
        if mapping.digest != self.mappings[collection].digest:
            self.mappings[collection] = mapping
        self._with_stream[collection] = view_of(table) is not None
        return self._usable(collection, table, state)

    async def _finish_creation(self, collection: str) -> None:
        task = cast("asyncio.Task[object]", asyncio.current_task())
        self._creating.add(task)
        try:
            await self.wait_until_active(collection)
            await self._configure(collection)
        finally:
            self._creating.discard(task)

    async def _table_exists(self, collection: str) -> bool:
        """Whether the table exists, determined by a read of a key that no entity has."""
        key = {self.mappings[collection].key: {"S": probe_id()}}
        try:
            await self._client.read("GetItem", {"TableName": self.name(collection), "Key": key})
        except TableMissing:
            return False
        return True

    async def exists(self) -> bool:
        """Whether any of the tables exists."""
        for collection in self.schema:
            try:
                if await self.described(collection) is not None:
                    return True
            except ActionDenied:
                if await self._table_exists(collection):
                    return True
        return False

    async def undeclared(self) -> list[str]:
        """The collections of tables with this prefix that are neither declared nor system collections."""
        prefix = f"{self.config.table_prefix}_"
        found: list[str] = []
        params: dict[str, str] = {}
        while True:
            response = await self._client.read("ListTables", params)
            found += [each for each in response["TableNames"] if each.startswith(prefix)]
            last = response.get("LastEvaluatedTableName")
            if not last or last == params.get("ExclusiveStartTableName"):
                break
            params = {"ExclusiveStartTableName": last}
        return sorted({each.removeprefix(prefix) for each in found} - {*self.schema} - SYSTEM_NAMES)

    async def identities(self, collections: Iterable[str]) -> frozenset[tuple[str, ...]]:
        """Identifiers of the existing tables of these collections, which are unique among all tables.

        Raises:
            StorageError: the server does not return an identifier for a table.
        """
        found: set[tuple[str, ...]] = set()
        for collection in collections:
            table = await self._described(f"{self.config.table_prefix}_{collection}")
            if table is not None:
                found |= _identities(table)
        return frozenset(found)

    def check_key(self, collection: str, table: Mapping[str, Any]) -> None:
        """Check that a table has the key of its collection.

        Raises:
            SchemaMismatchError: it has another one.
        """
        declared_key = f"{self.schema[collection].key} (S)"
        types = {each["AttributeName"]: each["AttributeType"] for each in _definitions(table)}
        keys = ", ".join(
            f"{each['AttributeName']} ({types.get(each['AttributeName'], 'S')})"
            for each in table["KeySchema"]
        )
        if keys != declared_key:
            raise SchemaMismatchError(
                f"the key of the table {self.name(collection)} is {keys}, but {declared_key} is declared; "
                f"declare {collection} with the key of the table or set another table_prefix"
            )

    def _usable(
        self, collection: str, table: Mapping[str, Any], state: IndexState
    ) -> frozenset[str]:
        """The declared indexes that are active and complete, and match their declaration."""
        usable = active_indexes(table) & state.complete
        return frozenset(
            each.name
            for each in self.schema[collection].indexes
            if each.name in usable and not self.mismatch(collection, each, table)
        )

    # -- indexes made later ------------------------------------------------------------------

    async def index_state(self, collection: str, table: Mapping[str, Any]) -> IndexState:
        """What the table remembers of its indexes; one that was deleted meanwhile, it no longer does.

        Args:
            table: its description, which was read before.
        """
        names = frozenset(each["IndexName"] for each in _indexes(table))
        state = await self._first_state(collection, names)
        deleted = state.complete - names
        if deleted:
            with suppress(ActionDenied):
                await self.change_state(collection, lambda old: old.without(deleted))
        return state

    async def _first_state(self, collection: str, names: frozenset[str]) -> IndexState:
        """What the table remembers. If that is nothing, its indexes are complete if it is empty.

        Every program looks before it writes. So an index that is made later, also by hand, is known to
        be incomplete.
        """
        if collection in SYSTEM_NAMES:
            return IndexState()
        state = await self.state(collection)
        if state is None and await self._is_empty(collection, unknown=True):
            with suppress(ActionDenied, ConditionFailed):
                await self._put_state(collection, None, IndexState(names))
                return IndexState(names)
            state = await self.state(collection) or IndexState(names)
        return state or IndexState()

    async def state(self, collection: str) -> IndexState | None:
        """What the table remembers of its indexes; None if no program has looked at it before."""
        item = await self._state_item(collection)
        return None if item is None else state_of(item)

    async def _state_item(self, collection: str) -> Attributes | None:
        params = {
            "TableName": self.name(collection),
            "Key": self._state_key(collection),
            "ConsistentRead": True,
        }
        return (await self._client.read("GetItem", params)).get("Item")

    async def change_state(
        self, collection: str, change: Callable[[IndexState], IndexState]
    ) -> None:
        """Change what the table remembers; other processes may do so at the same time.

        Raises:
            UnavailableError: they did so each time.
        """
        retries = self._client.retries()
        while True:
            item = await self._state_item(collection)
            old = IndexState() if item is None else state_of(item)
            new = change(old)
            if new == old:
                return
            with suppress(ConditionFailed):
                await self._put_state(collection, item, new)
                return
            if not await retries.pause():
                raise UnavailableError(
                    f"other programs change the indexes of {self.name(collection)} at the same time"
                )

    async def _put_state(self, collection: str, old: Attributes | None, new: IndexState) -> None:
        """Replace what the table remembers.

        Args:
            old: the item that contains it.

        Raises:
            ConditionFailed: it has changed.
        """
        request: dict[str, Any] = {
            "TableName": self.name(collection),
            "Item": {**self._state_key(collection), **attributes_of(new)},
            "ConditionExpression": "attribute_not_exists(#c)",
            "ExpressionAttributeNames": {"#c": CONTENT},
        }
        if old is not None:
            request["ConditionExpression"] = "#c = :old"
            request["ExpressionAttributeValues"] = {":old": old[CONTENT]}
        await self._client.read("PutItem", request)

    def _state_key(self, collection: str) -> Attributes:
        return {self.schema[collection].key: {"S": STATE_ID}}

    def mismatch(self, collection: str, index: Index, table: Mapping[str, Any]) -> str:
        """How an existing index differs from its declaration, as a message; "" if it does not."""
        existing = next(each for each in _indexes(table) if each["IndexName"] == index.name)
        definition = self._index(collection, index)
        types = {each["AttributeName"]: each["AttributeType"] for each in _definitions(table)}
        attributes = self._attributes(collection, (index,))
        declared = {each["AttributeName"]: each["AttributeType"] for each in attributes}
        keys, declared_keys = (
            _keys(existing, types, declared),
            _keys(definition, declared, declared),
        )
        if keys != declared_keys:
            return f"its key is {', '.join(keys)} instead of {', '.join(declared_keys)}"
        projection = existing.get("Projection", {}).get("ProjectionType", "ALL")
        return "" if projection == "ALL" else f"its projection is {projection} instead of ALL"

    async def require_index(self, collection: str, index: Index) -> None:
        """Check again whether an index can be used that was not usable before.

        Raises:
            SchemaMismatchError: the index is missing or does not match its declaration.
            UnavailableError: the index is being created.
        """
        name = self.name(collection)
        table = await self.described(collection)
        if table is None:
            raise UnavailableError(f"the table {name} was deleted", retryable=False)
        if index in self.missing(collection, table):
            raise SchemaMismatchError(
                f"{name} has no index {index.name}; run `schema apply` to create it"
            )
        mismatch = self.mismatch(collection, index, table)
        if mismatch:
            raise SchemaMismatchError(mismatch_message(name, index, mismatch))
        self._ready[collection] = usable = await self._adopt(collection, table)
        if index.name in usable:
            return
        if index.name in active_indexes(table):
            raise SchemaMismatchError(incomplete_message(name, index))
        raise UnavailableError(f"the index {index.name} of {name} is being created")

    async def create(self) -> list[str]:
        """Create the missing declared tables and indexes; return a message for each.

        Waits until tables and indexes are active. Existing tables and indexes are not deleted or
        changed, except that auto scaling and point-in-time recovery are set as configured, time to live is
        enabled for collections that expire, and a stream for those with a change feed.
        """
        messages: list[str] = []
        system = [UNIQUE_COLLECTION.name] if self.schema.unique else []
        for collection in (*self.schema, *system):
            messages += await self._create_missing(collection)
        return messages

    async def _create_missing(self, collection: str) -> list[str]:
        messages: list[str] = []
        name = self.name(collection)
        if await self.described(collection) is None and await self._create(collection):
            messages.append(f"created {name}")
        table = await self.wait_until_active(collection)
        for index in self.missing(collection, table):
            await self.add_index(collection, index)
            messages.append(f"created {index.name} of {name}")
        if self.is_fed(collection) and view_of(table) is None:
            await self.enable_stream(collection)
            messages.append(f"enabled the stream of {name}")
        await self.wait_until_active(collection)
        await self._configure(collection)
        self._ready.pop(collection, None)
        await self.ensure(collection)
        return messages

    # -- inspecting --------------------------------------------------------------------------

    async def described(self, collection: str) -> dict[str, Any] | None:
        return await self._described(self.name(collection))

    async def _described(self, name: str) -> dict[str, Any] | None:
        try:
            response = await self._client.read("DescribeTable", {"TableName": name})
        except TableMissing:
            return None
        table: dict[str, Any] = response["Table"]
        return table

    async def wait_until_active(self, collection: str, seen: SeeTable = _ignore) -> dict[str, Any]:
        """Wait until the table and all its indexes are active; return its description.

        Args:
            seen: called with each description of the table.
        """
        seconds = _WAIT_SECONDS if seen is _ignore else _INDEX_SECONDS
        retries = self._client.retries(seconds)
        while True:
            table = await self.described(collection)
            if table is not None:
                seen(table)
            if table is not None and _is_active(table):
                return table
            if not await retries.pause():
                raise UnavailableError(
                    f"the table {self.name(collection)} was not active after {seconds:g} s. Check "
                    "its status (`aws dynamodb describe-table`), and try again when it is ACTIVE"
                )

    def missing(self, collection: str, table: Mapping[str, Any]) -> list[Index]:
        existing = {each["IndexName"] for each in _indexes(table)}
        return [each for each in self.schema[collection].indexes if each.name not in existing]

    async def compare(self) -> tuple[dict[str, Value], list[str]]:
        """A summary of the table of each collection, and messages about all differences."""
        found: dict[str, Value] = {}
        problems: list[str] = []
        for collection in self.schema:
            name = self.name(collection)
            table = await self.described(collection)
            if table is None:
                found[collection] = {"table": name, "status": "missing"}
                continue
            found[collection] = await self._summary(name, table)
            problems += await self._differences(collection, table)
        return found, problems

    async def _summary(self, name: str, table: Mapping[str, Any]) -> dict[str, Value]:
        throughput = table.get("ProvisionedThroughput", {})
        summary: dict[str, Value] = {
            "table": name,
            "status": table["TableStatus"],
            "items": table.get("ItemCount", 0),
            "bytes": table.get("TableSizeBytes", 0),
            "billing_mode": billing_mode(table),
            "read_capacity": throughput.get("ReadCapacityUnits", 0),
            "write_capacity": throughput.get("WriteCapacityUnits", 0),
            "indexes": {
                each["IndexName"]: each.get("IndexStatus", "ACTIVE")
                for each in table.get("GlobalSecondaryIndexes", ())
            },
        }
        has_recovery = await self.has_recovery(name)
        if has_recovery is not None:
            summary["point_in_time_recovery"] = has_recovery
        return summary

    async def has_recovery(self, table: str) -> bool | None:
        """Whether a table has point-in-time recovery; None if the policy does not allow reading it."""
        try:
            backups = await self._client.read("DescribeContinuousBackups", {"TableName": table})
        except ActionDenied:
            return None
        recovery = backups["ContinuousBackupsDescription"].get("PointInTimeRecoveryDescription", {})
        return bool(recovery.get("PointInTimeRecoveryStatus") == "ENABLED")

    async def _differences(self, collection: str, table: Mapping[str, Any]) -> list[str]:
        name = self.name(collection)
        problems = [
            f"{name} has no index {each.name}; run `schema apply` to create it"
            for each in self.missing(collection, table)
        ]
        for each in self.schema[collection].indexes:
            mismatch = each not in self.missing(collection, table) and self.mismatch(
                collection, each, table
            )
            if mismatch:
                problems.append(mismatch_message(name, each, mismatch))
        complete = (await self.index_state(collection, table)).complete
        problems += [
            incomplete_message(name, each)
            for each in self.schema[collection].indexes
            if each.name in active_indexes(table) - complete
        ]
        if table["TableStatus"] != "ACTIVE":
            problems.append(f"{name} is {table['TableStatus']}")
        if self.is_fed(collection):
            problems += filter(None, [problem_with(table, name)])
        key = [each["AttributeName"] for each in table["KeySchema"]]
        if key != [self.schema[collection].key]:
            problems.append(
                f"the key of {name} is {', '.join(key)} instead of {self.schema[collection].key}"
            )
        if billing_mode(table) != self._billing_mode:
            problems.append(
                f"the billing mode of {name} is {billing_mode(table)}, but {self._billing_mode} is "
                "configured"
            )
        return problems

    # -- creating ----------------------------------------------------------------------------

    @property
    def scaling(self) -> AutoScaling | None:
        configured = self.config.auto_scaling
        if isinstance(configured, AutoScaling):
            return configured if configured.enabled else None
        return AutoScaling() if configured else None

    @property
    def _billing_mode(self) -> str:
        # Tables with the billing mode PAY_PER_REQUEST have no capacity to scale.
        return "PROVISIONED" if self.scaling else self.config.billing_mode

    def _throughput(self) -> dict[str, Any]:
        if self._billing_mode != "PROVISIONED":
            return {}
        return {
            "ProvisionedThroughput": {
                "ReadCapacityUnits": max(self.config.read_capacity, 1),
                "WriteCapacityUnits": max(self.config.write_capacity, 1),
            }
        }

    def request(self, collection: str) -> dict[str, Any]:
        """The CreateTable request for the table of a collection."""
        declared = self.schema[collection]
        params: dict[str, Any] = {
            "TableName": self.name(collection),
            "BillingMode": self._billing_mode,
            "KeySchema": [{"AttributeName": declared.key, "KeyType": "HASH"}],
            "AttributeDefinitions": self._attributes(collection, declared.indexes),
            **self._throughput(),
        }
        if declared.indexes:
            params["GlobalSecondaryIndexes"] = [
                self._index(collection, each) for each in declared.indexes
            ]
        if self.is_fed(collection):
            params["StreamSpecification"] = SPECIFICATION
        return params

    async def _create(self, collection: str) -> bool:
        """Send CreateTable; return False if another process has created the table."""
        params = self.request(collection)
        retries = self._client.retries()
        while True:
            try:
                await self._client.call("CreateTable", params)
            except UnavailableError as exc:
                if await self.described(collection) is not None:
                    return False
                if not await retries.pause_after(exc):
                    raise
            else:
                return True

    def _attributes(self, collection: str, indexes: Sequence[Index]) -> list[dict[str, str]]:
        """The key attributes of the table and these indexes."""
        declared = self.schema[collection]
        types = {declared.key: "S"}
        for index in indexes:
            types.update({each.name: each.type for each in IndexShape(index, declared).keys})
        return [{"AttributeName": name, "AttributeType": kind} for name, kind in types.items()]

    def _index(self, collection: str, index: Index) -> dict[str, Any]:
        keys = [
            {"AttributeName": each.name, "KeyType": "RANGE" if each.is_sort else "HASH"}
            for each in IndexShape(index, self.schema[collection]).keys
        ]
        return {
            "IndexName": index.name,
            "KeySchema": keys,
            "Projection": {"ProjectionType": "ALL"},
            **self._throughput(),
        }

    async def have_changed(self, mapping: ItemMapping) -> bool:
        """Whether the table has got an index that this mapping does not maintain.

        Asked after the table refused an item: its indexes decide which values a key can contain.
        """
        collection = mapping.collection.name
        if self.mappings[collection] is mapping:
            with suppress(StorageError):  # the refusal is what counts
                await self.refresh(collection)
        return self.mappings[collection] is not mapping

    async def refresh(self, collection: str) -> None:
        """Look at the table again, for indexes that were made or completed since."""
        self._ready.pop(collection, None)
        await self.find(collection)
        if collection in self._unique:
            await self._begin_writing(collection)

    async def add_index(self, collection: str, index: Index, seen: SeeTable = _ignore) -> None:
        """Add an index to a table, and wait until it is active.

        DynamoDB creates one index of a table at a time. The table first remembers that the index is
        incomplete: it lacks entities of programs that do not know it, and those written before it
        was declared.
        """
        await self.change_state(collection, lambda state: state.without({index.name}))
        params = {
            "TableName": self.name(collection),
            "AttributeDefinitions": self._attributes(collection, (index,)),
            "GlobalSecondaryIndexUpdates": [{"Create": self._index(collection, index)}],
        }
        await self._update(
            collection, params, lambda table: index not in self.missing(collection, table), seen
        )

    async def enable_stream(self, collection: str) -> None:
        """Let the table have a stream of its changes."""
        params = {"TableName": self.name(collection), "StreamSpecification": SPECIFICATION}
        await self._update(collection, params, lambda table: view_of(table) is not None)

    async def _update(
        self,
        collection: str,
        params: Mapping[str, Any],
        is_done: Callable[[Mapping[str, Any]], bool],
        seen: SeeTable = _ignore,
    ) -> None:
        """Send UpdateTable until it is done, by this process or another one; wait until it is active."""
        retries = self._client.retries()
        while True:
            try:
                await self._client.call("UpdateTable", params)
            except (UnavailableError, StatementRefused) as exc:
                # Another process may be making the same change: check the table.
                if is_done(await self.wait_until_active(collection, seen)):
                    return
                is_refused = isinstance(exc, StatementRefused)
                if not await (retries.pause() if is_refused else retries.pause_after(exc)):
                    raise
            else:
                await self.wait_until_active(collection, seen)
                return

    async def _configure(self, collection: str) -> None:
        name = self.name(collection)
        if self.config.point_in_time_recovery:
            await self._client.read(
                "UpdateContinuousBackups",
                {
                    "TableName": name,
                    "PointInTimeRecoverySpecification": {"PointInTimeRecoveryEnabled": True},
                },
            )
        if self.schema[collection].expires is not None:
            await self.enable_time_to_live(collection)
        await self.scale(collection)

    async def enable_time_to_live(self, collection: str) -> None:
        """Let DynamoDB remove items at their `_t`, unless it removes them by another attribute, or the
        policy does not allow it."""
        if await self.time_to_live(collection) != "":
            return
        name = self.name(collection)
        specification = {"Enabled": True, "AttributeName": TIME_TO_LIVE}
        request = {"TableName": name, "TimeToLiveSpecification": specification}
        with suppress(ActionDenied, StatementRefused):  # the latter if another process was first
            await self._client.read("UpdateTimeToLive", request)

    async def time_to_live(self, collection: str) -> str | None:
        """The attribute by which DynamoDB removes items; "" if it removes none; None if that is unknown."""
        try:
            response = await self._client.read(
                "DescribeTimeToLive", {"TableName": self.name(collection)}
            )
        except ActionDenied:
            return None
        description = response["TimeToLiveDescription"]
        is_on = description.get("TimeToLiveStatus") in ("ENABLED", "ENABLING")
        return (description.get("AttributeName") or "") if is_on else ""

    async def scale(self, collection: str) -> None:
        """Enable auto scaling of the table and its indexes, if it is configured."""
        scaling = self.scaling
        if scaling is not None:
            async with self._scaling_client() as client:
                for resource in self.scaling_resources(collection):
                    for capacity in ("Read", "Write"):
                        await _enable_scaling(client, resource, capacity, scaling)

    def scaling_resources(self, collection: str) -> list[str]:
        """The resource ids of the table and its indexes, for auto scaling."""
        table = f"table/{self.name(collection)}"
        return [table, *(f"{table}/index/{each.name}" for each in self.schema[collection].indexes)]

    async def scaling_bounds(self, collection: str) -> dict[str, Any] | None:
        """The bounds of auto scaling by resource id; None if the policy does not allow reading them."""
        resources = self.scaling_resources(collection)
        found: dict[str, Any] = {}
        try:
            async with self._scaling_client() as client:
                for prefix in range(0, len(resources), _MAX_TARGETS):
                    pages = client.get_paginator("describe_scalable_targets").paginate(
                        ServiceNamespace="dynamodb",
                        ResourceIds=resources[prefix : prefix + _MAX_TARGETS],
                    )
                    async for page in pages:
                        for each in page["ScalableTargets"]:
                            capacity = "read" if "Read" in each["ScalableDimension"] else "write"
                            bounds = [each["MinCapacity"], each["MaxCapacity"]]
                            found.setdefault(each["ResourceId"], {})[f"{capacity}_capacity"] = (
                                bounds
                            )
        except ActionDenied:
            return None
        return found

    @asynccontextmanager
    async def _scaling_client(self) -> AsyncGenerator[Any, None]:
        connection = await self._client.connection()
        endpoint = None if os.environ.get(_SCALING_ENDPOINT) else self.config.endpoint
        try:
            async with connection.session.create_client(
                "application-autoscaling", region_name=connection.region, endpoint_url=endpoint
            ) as client:
                yield client
        except Exception as exc:
            raise scaling_error(exc) from exc


async def _enable_scaling(client: Any, resource: str, capacity: str, scaling: AutoScaling) -> None:
    """Enable auto scaling of one capacity of a table or index."""
    kind = "index" if "/index/" in resource else "table"
    target = {
        "ServiceNamespace": "dynamodb",
        "ResourceId": resource,
        "ScalableDimension": f"dynamodb:{kind}:{capacity}CapacityUnits",
    }
    low, high = (
        (scaling.min_read_capacity, scaling.max_read_capacity)
        if capacity == "Read"
        else (scaling.min_write_capacity, scaling.max_write_capacity)
    )
    await client.register_scalable_target(**target, MinCapacity=low, MaxCapacity=high)
    await client.put_scaling_policy(
        **target,
        PolicyName=f"{resource}-{capacity.lower()}",
        PolicyType="TargetTrackingScaling",
        TargetTrackingScalingPolicyConfiguration={
            "TargetValue": float(scaling.target_utilization),
            "PredefinedMetricSpecification": {
                "PredefinedMetricType": f"DynamoDB{capacity}CapacityUtilization"
            },
        },
    )


def _is_active(table: Mapping[str, Any]) -> bool:
    return table["TableStatus"] == "ACTIVE" and len(active_indexes(table)) == len(
        table.get("GlobalSecondaryIndexes", ())
    )


def _indexes(table: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    indexes: Sequence[Mapping[str, Any]] = table.get("GlobalSecondaryIndexes", ())
    return indexes


def _definitions(table: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    definitions: Sequence[Mapping[str, Any]] = table.get("AttributeDefinitions", ())
    return definitions


def _keys(
    part: Mapping[str, Any], types: Mapping[str, str], declared: Mapping[str, str]
) -> list[str]:
    """The key attributes of an index with their types; the partition key is first."""
    names = [
        each["AttributeName"]
        for each in sorted(part["KeySchema"], key=lambda each: each["KeyType"])
    ]
    return [f"{each} ({types.get(each) or declared.get(each, '?')})" for each in names]


def mismatch_message(table: str, index: Index, mismatch: str) -> str:
    return (
        f"{table}: the index {index.name} does not match its declaration: {mismatch}; queries do not "
        "use it: delete it and run `schema apply`"
    )


def incomplete_message(table: str, index: Index) -> str:
    return (
        f"{table}: queries do not use the index {index.name} yet, because it was made after the table; "
        "when all programs that do not know it have ended, run `schema apply --complete`"
    )


def _identities(table: Mapping[str, Any]) -> set[tuple[str, ...]]:
    """The identifiers of a table: its id, and for a global table also each replica's region and name.

    Raises:
        StorageError: the description contains no id.
    """
    name, arn = str(table.get("TableName", "")), str(table.get("TableArn", ""))
    if not table.get("TableId"):
        raise UnavailableError(
            f"the table {name} cannot be identified: the server returned no TableId",
            retryable=False,
        )
    found: set[tuple[str, ...]] = {(str(table["TableId"]),)}
    replicas = [str(each.get("RegionName", "")) for each in table.get("Replicas", ())]
    if replicas:
        # arn:aws:dynamodb:REGION:ACCOUNT:table/NAME
        parts = arn.split(":")
        region, account = (parts[3], parts[4]) if len(parts) > 5 else ("", "")
        found |= {(account, each, name) for each in {*replicas, region}}
    return found


def _check_name(name: str, setting: str, kind: str) -> None:
    if not _NAME.match(name):
        raise ConfigurationError(
            f"{setting}: {name[:300]!r} is not a valid name of a DynamoDB {kind}; a name has 3 to 255 "
            "characters of A-Z a-z 0-9 _ . -"
        )


def active_indexes(table: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(
        each["IndexName"]
        for each in _indexes(table)
        if each.get("IndexStatus", "ACTIVE") == "ACTIVE" and not each.get("Backfilling")
    )


def billing_mode(table: Mapping[str, Any]) -> str:
    # A table that has never used the billing mode PAY_PER_REQUEST has no summary.
    mode: str = table.get("BillingModeSummary", {}).get("BillingMode", "PROVISIONED")
    return mode
