"""Reads: by key in batches, and queries by the access path that `query_planner` chose."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import msgspec

from hf_async_store.changes import Record
from hf_async_store.driver import QueryPlan
from hf_async_store.errors import InvalidQueryError, UnavailableError
from hf_async_store.event_loop import Chunks, computed, pause
from hf_async_store.generators import Owned
from hf_async_store.query import (
    EVERYTHING,
    And,
    Comparison,
    Filter,
    Not,
    Query,
    compile_filter,
    compile_order,
    ordered,
    position_key,
)
from hf_async_store.strategies.dynamodb.codec import is_plain_name
from hf_async_store.strategies.dynamodb.errors import TABLE_REMEDY, StatementRefused, TableMissing
from hf_async_store.strategies.dynamodb.expressions import FilterTranslator, Names
from hf_async_store.strategies.dynamodb.index_keys import (
    ALL_PARTITIONS,
    PARTITION,
    sort_attribute,
)
from hf_async_store.strategies.dynamodb.items import (
    CREATED_SUBSTITUTE,
    DECLARATION_DIGEST,
    DOC,
    ItemMapping,
)
from hf_async_store.strategies.dynamodb.partitions import (
    PARALLEL,
    counted,
    gather,
    items_in,
    merged,
)
from hf_async_store.strategies.dynamodb.query_planner import Access, Span, plan_access
from hf_async_store.strategies.dynamodb.request_retry import throttled
from hf_async_store.values import CREATED_AT, MAX_KEY_BYTES, VERSION, Entity, Key

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from collections.abc import Set as AbstractSet

    from hf_async_store.lifetimes import Lifetime
    from hf_async_store.schema import Index
    from hf_async_store.strategies.dynamodb.client import Client
    from hf_async_store.strategies.dynamodb.codec import Attributes
    from hf_async_store.strategies.dynamodb.dax import Cache
    from hf_async_store.strategies.dynamodb.index_keys import SortKey
    from hf_async_store.strategies.dynamodb.tables import Tables

Result = TypeVar("Result")

MAX_KEYS: Final = 100
"""Source: DynamoDB API Reference, BatchGetItem."""

MAX_EXPRESSION: Final = 4_000
"""Source: DynamoDB service quotas, "Expression parameters": 4 KB."""

_SEGMENTS: Final = 4
_ROWS_PER_MATCH: Final = 4
_DECODE_BATCH: Final = 100


class Reading:
    """The reads of an engine."""

    def __init__(self, client: Client, tables: Tables, cache: Cache | None) -> None:
        self._client = client
        self._tables = tables
        self._cache = cache
        self.is_consistent = client.config.consistent_reads

    # -- by key ------------------------------------------------------------------------------

    async def fetch(
        self, keys: Sequence[Key], *, consistent: bool | None = None
    ) -> list[Record | None]:
        """As `Engine.fetch`."""
        items = await self.items(keys, consistent=consistent)
        mappings = self._tables.mappings
        return [
            None if item is None else mappings[key.collection].record(item)
            async for chunk in Chunks(zip(keys, items, strict=True), _DECODE_BATCH)
            for key, item in chunk
        ]

    async def items(
        self,
        keys: Sequence[Key],
        *,
        consistent: bool | None = None,
    ) -> list[Attributes | None]:
        """The items of these keys, in their order.

        Args:
            consistent: overrides the configured consistency.
        """
        existing = await self._existing(keys)
        if consistent is None:
            consistent = self.is_consistent
        if len(keys) == 1:
            return [await self._get(keys[0], consistent) if existing else None]
        found: dict[tuple[str, str], Attributes] = {}
        table_keys = list(
            dict.fromkeys(
                (self._tables.name(each.collection), each)
                for each in keys
                if each.collection in existing
            )
        )
        batches = [
            table_keys[each : each + MAX_KEYS] for each in range(0, len(table_keys), MAX_KEYS)
        ]
        reads = [self._get_batch(each, consistent, found) for each in batches]
        if len(reads) == 1:
            await reads[0]
        else:
            await gather(reads)
        return [found.get((self._tables.name(each.collection), each.id)) for each in keys]

    async def item(self, key: Key) -> Attributes | None:
        """The current item, read consistently."""
        [item] = await self.items((key,), consistent=True)
        return item

    async def _existing(self, keys: Iterable[Key]) -> set[str]:
        """The collections of these keys whose table exists; the others are empty."""
        existing = {each.collection for each in keys}
        for collection in list(existing):
            if (
                not self._tables.is_ready(collection)
                and await self._tables.find(collection) is None
            ):
                existing.discard(collection)
        return existing

    async def _get(self, key: Key, consistent: bool) -> Attributes | None:
        mapping = self._tables.mappings[key.collection]
        params = {
            "TableName": self._tables.name(key.collection),
            "Key": {mapping.key: {"S": key.id}},
            "ConsistentRead": consistent,
        }
        response = await self.read("GetItem", params)
        return cast("Attributes | None", response.get("Item"))

    async def _get_batch(
        self,
        table_keys: Sequence[tuple[str, Key]],
        consistent: bool,
        found: dict[tuple[str, str], Attributes],
    ) -> None:
        requests: dict[str, dict[str, Any]] = {}
        for table, key in table_keys:
            mapping = self._tables.mappings[key.collection]
            request = requests.get(table)
            if request is None:
                request = requests[table] = {"Keys": [], "ConsistentRead": consistent}
            request["Keys"].append({mapping.key: {"S": key.id}})
        keys = {table: self._key_of(table) for table in requests}
        retries = self._client.retries()
        while True:
            response = await self.read("BatchGetItem", {"RequestItems": requests})
            for table, items in response["Responses"].items():
                name = keys[table]
                for item in items:
                    found[table, item[name]["S"]] = item
            requests = response.get("UnprocessedKeys") or {}
            if not requests:
                return
            if not await retries.pause():
                remaining = sum(len(each["Keys"]) for each in requests.values())
                raise throttled(f"the read of {remaining} keys")

    def _key_of(self, table: str) -> str:
        return self._tables.mappings[self._tables.collection_of(table)].key

    async def read(self, operation: str, params: Mapping[str, Any]) -> dict[str, Any]:
        try:
            if self._cache is not None and self._cache.can_serve(operation, params):
                return await self._cache.read(operation, params)
            return await self._client.read(operation, params)
        except TableMissing as exc:
            raise UnavailableError(
                f"a table or an index was deleted while the store was open: {exc}. {TABLE_REMEDY}",
                retryable=False,
            ) from exc

    # -- queries -----------------------------------------------------------------------------

    async def access(self, query: Query) -> Access | None:
        """The access path of a query; None if the table does not exist, so that no row matches.

        Raises:
            InvalidQueryError: the query requires a scan, and `allow_scan` is off.
        """
        active = await self._tables.find(query.collection)
        if active is None:
            return None
        if query.paged and not query.order and not query.by_id:
            active = frozenset()  # the first page was in the order of the table
        access = await self._planned(query, active)
        if access.is_scan and not self._client.config.allow_scan:
            raise InvalidQueryError(
                f"no key or index of {query.collection} can serve this query, and allow_scan is "
                "off; declare an index for a field that the query compares"
            )
        return access

    async def first_page(self, query: Query) -> Query:
        """As `Engine.first_page`: without an order, the pages of a scan are in the order of the table."""
        if query.order:
            return query
        by_id = msgspec.structs.replace(query, by_id=True)
        access = await self.access(by_id)
        return by_id if query.by_id or access is None or not access.is_scan else query

    async def _planned(self, query: Query, active: AbstractSet[str]) -> Access:
        plan = partial(plan_access, query, self._tables.mappings[query.collection], active)
        return await computed(plan, long=query.has_many_values)

    async def _rows(
        self, query: Query, access: Access, items: dict[str, Attributes] | None = None
    ) -> _Rows:
        mapping = self._tables.mappings[query.collection]
        make = partial(_Rows, self, query, access, mapping, items)
        return await computed(make, long=query.has_many_values)

    async def select(
        self, query: Query, items: dict[str, Attributes] | None = None
    ) -> AsyncGenerator[Record, None]:
        """As `Engine.select`.

        Args:
            items: gets the items of the matching entities, by id.
        """
        if query.limit == 0:
            return
        access = await self.access(query)
        if access is None:
            return
        mapping = self._tables.mappings[query.collection]
        rows = await self._rows(query, access, items)
        async with Owned(rows.in_order()) as found:
            async for entity in found:
                yield Record(Key(query.collection, cast("str", entity[mapping.key])), entity)

    async def count(self, query: Query) -> int:
        """As `Engine.count`."""
        access = await self.access(query)
        if access is None:
            return 0
        rows = await self._rows(query, access)
        if access.ids is None and rows.is_exact:
            return await rows.count_matches()
        number = 0
        async with Owned(rows.matching()) as batches:
            async for batch in batches:
                number += len(batch)
        return number

    async def by_index(
        self,
        collection: str,
        index: Index,
        condition: str,
        names: Names,
        limit: int | None,
        descending: bool,
        lifetime: Lifetime | None,
    ) -> list[Entity]:
        """The entities that satisfy a key condition on an index, in the order of the index.

        Args:
            condition: a KeyConditionExpression with placeholders of `names`; without the partition
                key, if that is `_p`.
            lifetime: by which entities may have expired.
        """
        active = await self._tables.find(collection)
        if active is None or limit == 0:
            return []
        if index.name not in active:
            await self._tables.require_index(collection, index)
        mapping = self._tables.mappings[collection]
        shape = next(each for each in mapping.shapes if each.index.name == index.name)
        params = {
            "TableName": self._tables.name(collection),
            "IndexName": index.name,
            "ScanIndexForward": not descending,
        }
        requests: list[dict[str, Any]] = []
        for partition in ALL_PARTITIONS if shape.is_spread else (None,):
            own, expression = names.copy(), condition
            if partition is not None:
                expression += f" AND {own.name(PARTITION)} = {own.value(partition)}"
            requests.append({**params, **own.request(KeyConditionExpression=expression)})
        sources = [self.pages("Query", each, limit) for each in requests]
        source = (
            merged(sources, shape.position_in, descending=descending)
            if shape.is_spread
            else items_in(sources[0])
        )
        entities: list[Entity] = []
        try:
            async with Owned(source) as groups:
                async for items in groups:
                    for start in range(0, len(items), _DECODE_BATCH):
                        batch = items[start : start + _DECODE_BATCH]
                        found = map(mapping.entity, filter(mapping.is_entity, batch))
                        entities += [
                            e for e in found if lifetime is None or not lifetime.is_over(e)
                        ]
                        await pause()
                    if limit is not None and len(entities) >= limit:
                        return entities[:limit]
        except StatementRefused as exc:
            raise InvalidQueryError(str(exc)) from exc
        return entities

    async def explain(self, query: Query) -> QueryPlan:
        """As `Engine.explain`."""
        mapping = self._tables.mappings[query.collection]
        active = await self._tables.find(query.collection)
        if active is None:  # the first write creates the table with all indexes
            active = frozenset(each.name for each in mapping.collection.indexes)
        access = await self._planned(query, active)
        rows = await self._rows(query, access)
        table = self._tables.name(query.collection)
        filtered = ", filtered by DynamoDB" if rows.filter_expression else ""
        residual, consistent = not rows.is_exact, self.is_consistent
        if access.ids is not None:
            detail = f"BatchGetItem of {len(access.ids)} keys of {table}"
            where = query.where
            residual = not (isinstance(where, Comparison) and where.path == (mapping.key,))
        elif access.shape is None:
            allowed = "" if self._client.config.allow_scan else "; rejected: allow_scan is off"
            detail = f"Scan of {table}{filtered}{allowed}"
        else:
            consistent = False
            detail = (
                f"Query of {len(access.spans)} partitions of {access.shape.index.name} of "
                f"{table}{filtered}; an index is eventually consistent"
            )
        return QueryPlan(
            access="key" if access.ids is not None else "scan" if access.is_scan else "index",
            index=None if access.shape is None else access.shape.index.name,
            residual=residual,
            sorted_here=bool(query.order or query.by_id) and not access.is_ordered,
            consistent=consistent,
            detail=detail,
        )

    async def pages(
        self,
        operation: str,
        params: Mapping[str, Any],
        hint: int | None = None,
        *,
        grows: bool = True,
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The pages of a Query or Scan, including empty ones, up to the last.

        Args:
            hint: the number of rows to examine for the first page; doubled for each further page,
                and unlimited once it has exceeded 1000. None for no limit.
            grows: if false, it is the number of rows for every page.
        """
        start: Mapping[str, Any] = {}
        while True:
            limit = {} if hint is None else {"Limit": hint}
            response = await self.read(operation, {**params, **start, **limit})
            yield response
            last = response.get("LastEvaluatedKey")
            if not last:
                return
            start = {"ExclusiveStartKey": last}
            if grows:
                hint = None if hint is None or hint > 1000 else hint * 2

    def table(self, collection: str) -> str:
        return self._tables.name(collection)


class _Rows:
    """The rows of one query."""

    def __init__(
        self,
        reading: Reading,
        query: Query,
        access: Access,
        mapping: ItemMapping,
        items: dict[str, Attributes] | None = None,
    ) -> None:
        self._reading = reading
        self._query = query
        self._items = items
        self._access = access
        self._mapping = mapping
        self._names = Names()
        self._matches = compile_filter(query.where)
        self.filter_expression = ""
        self.is_exact = False
        self._is_bounded = _without(query.where, (*access.implied, *access.bounds)) == EVERYTHING
        if access.ids is None:
            self._translate_filter()

    def _translate_filter(self) -> None:
        access, mapping = self._access, self._mapping
        where = _without(self._query.where, access.implied)
        if where == EVERYTHING:
            self.is_exact = True
            return
        keys = () if access.shape is None else access.shape.keys
        excluded = frozenset(each.name for each in keys)
        translated = FilterTranslator(mapping, self._names, excluded).translate(where)
        if translated is not None:
            self.filter_expression = translated.expression
            self.is_exact = translated.is_exact

    # -- order of the rows -------------------------------------------------------------------

    async def in_order(self) -> AsyncGenerator[Entity, None]:
        """The entities of the query, in its order."""
        query = self._query
        if self._access.is_ordered:
            source = self._by_index_order()
        elif query.order or query.by_id:
            source = self._sorted()
        else:
            source = self._unsorted()
        number = 0
        async with Owned(source) as rows:
            async for entity in rows:
                yield entity
                number += 1
                if number == query.limit:
                    return

    async def _sorted(self) -> AsyncGenerator[Entity, None]:
        key = self._mapping.key

        async def with_ids() -> AsyncGenerator[list[tuple[str, Entity]], None]:
            async with Owned(self.matching()) as found:
                async for batch in found:
                    yield [(cast("str", each[key]), each) for each in batch]

        async with Owned(with_ids()) as found, Owned(ordered(found, self._query)) as rows:
            async for _, entity in rows:
                yield entity

    async def _unsorted(self) -> AsyncGenerator[Entity, None]:
        async with Owned(self.matching(limited=True)) as batches:
            async for batch in batches:
                for entity in batch:
                    yield entity

    async def _by_index_order(self) -> AsyncGenerator[Entity, None]:
        """The rows in the order of the index; rows with equal sort keys are sorted here."""
        query, access, key = self._query, self._access, self._mapping.key
        assert access.shape is not None
        position_in = access.shape.position_in
        sort_key_of = compile_order(query)
        after = None if query.after is None else position_key(query, query.after)
        sources = (
            [self._first_pages(access.spans[0])]
            if self._is_limited_exactly
            else [self._span_pages(each, hint=self._hint()) for each in access.spans]
        )

        def group_of(item: Attributes) -> SortKey:
            return access.group_of(position_in(item))

        number = 0  # of items in all groups
        async with Owned(merged(sources, group_of, descending=access.descending)) as groups:
            async for items in groups:
                found: list[tuple[Any, Entity]] = []
                for item in items:
                    number += 1
                    if number % _DECODE_BATCH == 0:
                        await pause()
                    entity = self._match(item)
                    if entity is not None:
                        sort_key = sort_key_of(cast("str", entity[key]), entity)
                        if after is None or sort_key > after:
                            found.append((sort_key, entity))
                for _, entity in sorted(found, key=itemgetter(0)):
                    yield entity

    # -- matching rows -----------------------------------------------------------------------

    def _match(self, item: Attributes) -> Entity | None:
        """The entity of an item, if it matches."""
        entity = self._mapping.entity(item)
        if not self._matches(entity):
            return None
        if self._items is not None:
            self._items[self._mapping.id_of(item)] = item
        return entity

    async def matching(self, *, limited: bool = False) -> AsyncGenerator[list[Entity], None]:
        """The matching entities in batches, in no defined order.

        Args:
            limited: read about as many rows as the limit of the query requires.
        """
        if self._access.ids is not None:
            keys = [Key(self._query.collection, each) for each in self._access.ids]
            for start in range(0, len(keys), MAX_KEYS * _SEGMENTS):
                found = await self._reading.items(keys[start : start + MAX_KEYS * _SEGMENTS])
                yield [
                    entity
                    for each in found
                    if each is not None and (entity := self._match(each)) is not None
                ]
            return
        async with Owned(items_in(self._pages(limited=limited))) as pages:
            async for items in pages:
                while items:
                    batch = [
                        entity
                        for item in items[:_DECODE_BATCH]
                        if self._mapping.is_entity(item)
                        and (entity := self._match(item)) is not None
                    ]
                    # To free all items of several pages at once would hold the event loop.
                    del items[:_DECODE_BATCH]
                    yield batch
                    await pause()

    async def count_matches(self) -> int:
        """The number of matching rows, counted by DynamoDB."""
        if self._access.is_scan:
            return await counted(self._scanned(limited=False, counting=True))
        spans, number = self._access.spans, 0
        for start in range(0, len(spans), PARALLEL):
            part = spans[start : start + PARALLEL]
            number += sum(await gather([counted(self._span_pages(e, counting=True)) for e in part]))
        return number

    async def _pages(self, *, limited: bool) -> AsyncGenerator[dict[str, Any], None]:
        if self._access.is_scan:
            sources: Iterable[AsyncGenerator[dict[str, Any], None]] = (self._scanned(limited),)
        else:
            hint = self._hint() if limited else None
            sources = (self._span_pages(each, hint=hint) for each in self._access.spans)
        for source in sources:
            async with Owned(source) as pages:
                async for page in pages:
                    yield page

    @property
    def _reads_only_matches(self) -> bool:
        return self.is_exact and not self.filter_expression

    @property
    def _is_limited_exactly(self) -> bool:
        """Whether the first rows of a single span are the result, except for their order."""
        is_limited = self._query.limit is not None and self._query.after is None
        return is_limited and self._reads_only_matches and len(self._access.spans) == 1

    async def _first_pages(self, span: Span) -> AsyncGenerator[dict[str, Any], None]:
        """One row more than the limit of the query, and the rows that are equal to the last of them."""
        shape, limit = self._access.shape, self._query.limit
        assert shape is not None
        assert limit is not None
        left, params = limit + 1, self._query_params(span)
        last: Attributes = {}
        while True:
            page = await self._reading.read("Query", {**params, "Limit": left})
            items: list[Attributes] = page["Items"]
            left -= len(items)
            last = items[-1] if items else last
            yield page
            if not page.get("LastEvaluatedKey"):
                return
            params["ExclusiveStartKey"] = page["LastEvaluatedKey"]
            if left <= 0:
                break
        group = self._access.span_of(span, shape.position_in(last))
        params = {**self._query_params(group), "ExclusiveStartKey": params["ExclusiveStartKey"]}
        async with Owned(self._reading.pages("Query", params)) as pages:
            async for page in pages:
                yield page

    def _span_pages(
        self, span: Span, *, hint: int | None = None, counting: bool = False
    ) -> AsyncGenerator[dict[str, Any], None]:
        if hint is not None and self._access.is_ordered and len(self._access.spans) > 1:
            hint = hint // len(self._access.spans) + _ROWS_PER_MATCH
        return self._reading.pages("Query", self._query_params(span, counting=counting), hint)

    async def _scanned(
        self, limited: bool, counting: bool = False
    ) -> AsyncGenerator[dict[str, Any], None]:
        params = self._scan_params(counting=counting)
        if limited and (self._query.limit is not None or self._query.after is not None):
            # Sequentially, in the order of the table, so that a query can continue after a cursor.
            if self._query.after is not None:
                params["ExclusiveStartKey"] = {self._mapping.key: {"S": self._query.after.id}}
            source = self._reading.pages("Scan", params, self._hint())
        else:
            source = _parallel_scan(self._reading, params)
        async with Owned(source) as pages:
            async for page in pages:
                yield page

    def _hint(self) -> int | None:
        limit = self._query.limit
        if limit is None:
            return None
        if self._is_bounded:
            return min(limit + 1 + (self._query.after is not None), 5_000)
        return min(32 + limit * _ROWS_PER_MATCH, 5_000)

    # -- requests ----------------------------------------------------------------------------

    def _query_params(self, span: Span, *, counting: bool = False) -> dict[str, Any]:
        shape = self._access.shape
        assert shape is not None
        names = self._names.copy()
        condition = f"{names.name(shape.partition.name)} = {names.value(span.partition)}"
        if shape.sort is not None:
            condition += _sort_condition(span, names, shape.sort.name)
        params: dict[str, Any] = {
            "TableName": self._reading.table(self._query.collection),
            "IndexName": shape.index.name,
        }
        if self._access.descending:
            params["ScanIndexForward"] = False
        return self._with_expressions(params, names, counting, KeyConditionExpression=condition)

    def _scan_params(self, *, counting: bool = False) -> dict[str, Any]:
        names = self._names.copy()
        params: dict[str, Any] = {
            "TableName": self._reading.table(self._query.collection),
            "ConsistentRead": self._reading.is_consistent,
        }
        return self._with_expressions(params, names, counting)

    def _with_expressions(
        self, params: dict[str, Any], names: Names, counting: bool, **expressions: str
    ) -> dict[str, Any]:
        filters = [self.filter_expression] if self.filter_expression else []
        if counting:
            params["Select"] = "COUNT"
            if self._access.is_scan:
                # Exclude probe items, which another process may have written.
                longest = names.value({"N": str(MAX_KEY_BYTES)})
                filters.append(f"size({names.name(self._mapping.key)}) <= {longest}")
        else:
            projection = self._projection(names)
            if projection is not None:
                expressions["ProjectionExpression"] = projection
        if filters:
            expressions["FilterExpression"] = " AND ".join(filters)
        params.update(names.request(**expressions))
        return params

    def _projection(self, names: Names) -> str | None:
        """The attributes needed for the requested fields, the filter and the order.

        Returns None if the whole item must be read.
        """
        if self._query.fields is None:
            return None
        wanted = {*self._query.fields, self._mapping.key, VERSION, *_fields_in(self._query.where)}
        wanted |= {str(each.path[0]) for each in self._query.order}
        if DOC in wanted or not all(map(is_plain_name, wanted)):
            return None
        # Items of other declarations or programs may store a field elsewhere than the store does.
        paths = [names.path(path) for name in sorted(wanted) for path in ((name,), (DOC, name))]
        paths.append(names.name(DECLARATION_DIGEST))
        shape = self._access.shape
        if shape is not None and shape.sort is not None:
            paths.append(names.name(shape.sort.name))
        if CREATED_AT in wanted:
            paths.append(names.name(CREATED_SUBSTITUTE))
        projection = ", ".join(dict.fromkeys(paths))  # a path twice is an error
        return projection if len(projection) <= MAX_EXPRESSION else None


def _sort_condition(span: Span, names: Names, attribute: str) -> str:
    if span.low is None and span.high is None:
        return ""
    name = names.name(attribute)
    if span.low is not None and span.low == span.high:
        return f" AND {name} = {names.value(sort_attribute(span.low))}"
    if span.low is None or span.high is None:
        sign, bound = (">=", span.low) if span.high is None else ("<=", span.high)
        return f" AND {name} {sign} {names.value(sort_attribute(bound))}"
    low, high = (names.value(sort_attribute(each)) for each in (span.low, span.high))
    return f" AND {name} BETWEEN {low} AND {high}"


async def _parallel_scan(
    reading: Reading, params: Mapping[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """The pages of a scan in parallel segments."""
    starts: list[Mapping[str, Any]] = [
        {"Segment": each, "TotalSegments": _SEGMENTS} for each in range(_SEGMENTS)
    ]
    while starts:
        pages = await gather([reading.read("Scan", {**params, **each}) for each in starts])
        for page in pages:
            yield page
        starts = [
            {**start, "ExclusiveStartKey": page["LastEvaluatedKey"]}
            for start, page in zip(starts, pages, strict=True)
            if page.get("LastEvaluatedKey")
        ]


def _without(where: Filter, implied: Sequence[Comparison]) -> Filter:
    """The filter without the parts that hold in any case."""
    parts = where.parts if isinstance(where, And) else (where,)
    rest = tuple(each for each in parts if each not in implied)
    return rest[0] if len(rest) == 1 else And(rest)


def _fields_in(where: Filter) -> Iterator[str]:
    """The top-level fields that a filter refers to."""
    if isinstance(where, Comparison):
        yield str(where.path[0])
    elif isinstance(where, Not):
        yield from _fields_in(where.part)
    else:
        for each in where.parts:
            yield from _fields_in(each)
