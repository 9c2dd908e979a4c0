"""Identity of stores, whether they exist, and whether their tables match the declaration."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import pytest

from hf_async_store import (
    Collection,
    Field,
    Index,
    PermissionDeniedError,
    SchemaMismatchError,
    StorageError,
    StoreNotFoundError,
    open_store,
)
from hf_async_store.schema import SYSTEM_COLLECTIONS
from tests.dynamodb.proxy import Answer, Changed
from tests.dynamodb.support import new_prefix, store_at

if TYPE_CHECKING:
    from hf_async_store import DynamoDBStorageStrategy
    from tests.dynamodb.proxy import Proxy

THINGS = [Collection("things", key="id", fields=["owner", "status"], indexes=["owner"])]


async def _make_table(store: DynamoDBStorageStrategy, **parts: Any) -> None:
    """The table of `things`, created by another program."""
    request = {**store._dynamodb.tables.request("things"), **parts}
    await store._dynamodb.client.call("CreateTable", request)


# -- existence -------------------------------------------------------------------------------


async def test_reads_of_an_absent_store_return_nothing_and_create_nothing(
    proxy: Proxy,
) -> None:
    async with store_at(proxy.url) as store:
        assert not await store.exists()
        assert await store.get_entity("items", "a") is None
        assert await store.get_entities("items", ["a", "b"]) == [None, None]
        assert await store.query_entities("items") == []
        assert await store.query_entities("items", {"label": "x"}, "-created_at") == []
        assert await store.count_entities("items") == 0
        assert (await store.query_page("items", limit=2)).items == []
        async with aclosing(store.stream_entities("items")) as rows:
            assert [each async for each in rows] == []
        assert await store.query_by_gsi("items", "label-index", "label = :l", {":l": "x"}) == []
        plan = await store.explain_query("items", {"label": "x"})
        assert (plan.access, plan.index) == ("index", "label-index")
        async with store.begin_transaction() as tx:
            assert await tx.get_entity("items", "a") is None
            assert await tx.get_entities("items", ["b", "c"]) == [None, None]
            assert await tx.query_entities("items") == []
        async with store.snapshot() as reader:
            assert await reader.fetch([]) == []
        await store.test_connection()
        await store.health()
        await store.compare_tables()
        assert await store.engine.undeclared() == []
        assert not await store.exists()
        assert proxy.counted()["CreateTable"] == 0
        # The first write creates it, and the table with the declarations.
        assert await store.create_entity("items", {"item_id": "a"}) == 1
        assert await store.exists()
        assert await store.get_entity("items", "a")
        assert proxy.counted()["CreateTable"] == 2


async def test_a_transaction_checks_reads_of_a_table_that_did_not_exist(
    proxy: Proxy,
) -> None:
    """Everything that it read is a condition of its commit, also a missing entity."""
    prefix = new_prefix()
    async with store_at(proxy.url, prefix) as store, store_at(proxy.url, prefix) as other:

        async def lose() -> None:
            async with store.begin_transaction() as tx:
                assert await tx.get_entity("counters", "c") is None
                await other.create_entity("counters", {"counter_id": "c"})
                await tx.create_entity("items", {"item_id": "a"})

        with pytest.raises(StorageError) as caught:
            await lose()
        assert caught.value.retryable
        assert await store.get_entity("items", "a") is None


async def test_exists_without_permission_for_describe_table(proxy: Proxy) -> None:
    prefix = new_prefix()
    denied = Answer(400, {"__type": "AccessDeniedException", "message": "no"})
    proxy.rule = lambda request: denied if request.operation == "DescribeTable" else None
    async with store_at(proxy.url, prefix) as store:
        assert not await store.exists()
        assert await store.get_entity("items", "a") is None
        assert await store.query_entities("items") == []
        proxy.rule = None
        async with store_at(proxy.url, prefix) as other:
            await other.create_entity("items", {"item_id": "a"})
        proxy.rule = lambda request: denied if request.operation == "DescribeTable" else None
        assert await store.exists()
        assert await store.get_entity("items", "a")


# -- identity --------------------------------------------------------------------------------


async def test_two_urls_of_one_store(proxy: Proxy, tmp_path: Any) -> None:
    prefix, elsewhere = new_prefix(), new_prefix()
    other_url = proxy.url.replace("127.0.0.1", "localhost")
    async with (
        store_at(proxy.url, prefix) as one,
        store_at(other_url, prefix, THINGS) as same,
        store_at(proxy.url, elsewhere) as another,
        open_store(f"json:{tmp_path}/data") as of_another_kind,
    ):
        with pytest.raises(StoreNotFoundError):
            await one.engine.is_same_store(another.engine)
        await one.create_entity("items", {"item_id": "a"})
        assert not await one.engine.is_same_store(another.engine)
        await another.create_entity("items", {"item_id": "a"})
        assert await one.engine.is_same_store(one.engine)
        assert await one.engine.is_same_store(same.engine), "whatever is declared"
        assert await same.engine.is_same_store(one.engine)
        assert not await one.engine.is_same_store(another.engine)
        assert not await one.engine.is_same_store(of_another_kind.engine)
        assert not await same.exists(), "nothing was made"


async def test_replicas_of_a_global_table_are_one_store(proxy: Proxy) -> None:
    """Their tables have different ids, but a delete in one replica applies to all."""
    prefix = new_prefix()

    def described(region: str, table_id: str) -> Changed:
        def change(body: dict[str, Any]) -> dict[str, Any]:
            if "Table" in body:
                name = body["Table"]["TableName"]
                body["Table"]["TableId"] = table_id
                body["Table"]["TableArn"] = f"arn:aws:dynamodb:{region}:123:table/{name}"
                others = {"eu-west-1", "us-east-1"} - {region}
                body["Table"]["Replicas"] = [{"RegionName": each} for each in others]
            return body

        return Changed(change)

    async with store_at(proxy.url, prefix) as one, store_at(proxy.url, prefix) as two:
        await one.create_entity("items", {"item_id": "a"})
        seen: dict[int, Changed] = {}

        def rule(request: Any) -> Changed | None:
            if request.operation != "DescribeTable":
                return None
            side = len(seen) // len(one._schema)
            seen[len(seen)] = answer = described(
                ("us-east-1", "eu-west-1")[min(side, 1)], str(side)
            )
            return answer

        proxy.rule = rule
        assert await one.engine.is_same_store(two.engine)


async def test_a_server_that_returns_no_table_id(proxy: Proxy) -> None:
    def without_id(body: dict[str, Any]) -> dict[str, Any]:
        body.get("Table", {}).pop("TableId", None)
        return body

    async with store_at(proxy.url) as one, store_at(proxy.url) as two:
        await one.create_entity("items", {"item_id": "a"})
        await two.create_entity("items", {"item_id": "a"})
        proxy.rule = lambda request: Changed(without_id)
        with pytest.raises(StorageError, match="TableId"):
            await one.engine.is_same_store(two.engine)


async def test_tables_that_no_collection_declares(proxy: Proxy) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix) as store, store_at(proxy.url, prefix, THINGS) as other:
        await other.create_tables()
        await store.create_entity("items", {"item_id": "a"})
        assert await store.engine.undeclared() == ["things"]
        assert await other.engine.undeclared() == ["items"]
        pages = 0

        def in_pages(body: dict[str, Any]) -> dict[str, Any]:
            nonlocal pages
            pages += 1
            names = body["TableNames"]
            return (
                {"TableNames": names[:1], "LastEvaluatedTableName": names[0]}
                if len(names) > 1
                else body
            )

        proxy.rule = lambda request: (
            Changed(in_pages) if request.operation == "ListTables" else None
        )
        assert await store.engine.undeclared() == ["things"]
        assert pages > 1
        denied = Answer(400, {"__type": "AccessDeniedException", "message": "no"})
        proxy.rule = lambda request: denied
        with pytest.raises(PermissionDeniedError):
            await store.engine.undeclared()


async def test_migration_tables_are_not_reported_as_undeclared(
    proxy: Proxy,
) -> None:
    prefix = new_prefix()
    async with (
        store_at(proxy.url, prefix) as store,
        store_at(proxy.url, prefix, [*THINGS, *SYSTEM_COLLECTIONS]) as other,
    ):
        await other.create_tables()
        for each in (store, other):
            assert not {"hf_move", "hf_marks"} & {*await each.engine.undeclared()}
        assert await store.engine.undeclared() == ["things"]
        assert await other.engine.undeclared() == []


# -- differences from the declaration --------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "kind", "more"),
    [("pk", "S", []), ("id", "N", []), ("id", "S", [{"AttributeName": "at", "KeyType": "RANGE"}])],
    ids=["another", "a number", "with a sort key"],
)
async def test_a_table_with_another_key(proxy: Proxy, key: str, kind: str, more: list[Any]) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix, THINGS) as store:
        await _make_table(
            store,
            KeySchema=[{"AttributeName": key, "KeyType": "HASH"}, *more],
            AttributeDefinitions=[
                {"AttributeName": key, "AttributeType": kind},
                {"AttributeName": "owner", "AttributeType": "S"},
                *({"AttributeName": each["AttributeName"], "AttributeType": "S"} for each in more),
            ],
        )
        for work in (
            store.get_entity("things", "a"),
            store.query_entities("things"),
            store.create_entity("things", {"id": "a"}),
            store.query_by_gsi("things", "owner-index", "owner = :o", {":o": "x"}),
            store.update_entity("things", "a", {}, condition_expression="attribute_exists(id)"),
        ):
            with pytest.raises(SchemaMismatchError, match=f"{prefix}_things is {key}"):
                await work
        report = await store.health()
        assert f"{prefix}_things is {key}" in str(report["problems"])


@pytest.mark.parametrize(
    ("key", "kind", "projection"),
    [("owner", "S", "KEYS_ONLY"), ("status", "S", "ALL"), ("owner", "N", "ALL")],
    ids=["projection", "key", "type"],
)
async def test_an_index_with_another_definition_is_not_used(
    proxy: Proxy, key: str, kind: str, projection: str
) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix, THINGS) as store:
        await _make_table(
            store,
            AttributeDefinitions=[
                {"AttributeName": "id", "AttributeType": "S"},
                {"AttributeName": key, "AttributeType": kind},
            ],
            GlobalSecondaryIndexes=[
                {
                    "IndexName": "owner-index",
                    "KeySchema": [{"AttributeName": key, "KeyType": "HASH"}],
                    "Projection": {"ProjectionType": projection},
                }
            ],
        )
        if kind == "S":
            await store.save_entity(
                "things", {"id": "x", "owner": "ann", "status": "new", "size": 3}
            )
            for where in ({"owner": "ann"}, {"owner": "ann", "status": "new"}):
                [found] = await store.query_entities("things", where)
                assert found["size"] == 3
                assert await store.count_entities("things", where) == 1
                assert (await store.explain_query("things", where)).access == "scan"
        report = await store.health()
        assert not report["ok"]
        assert "owner-index" in str(report["problems"])
        compared: Any = await store.compare_tables()
        assert compared["things"]["differences"] or kind == "N"
        with pytest.raises(SchemaMismatchError, match="owner-index"):
            await store.query_by_gsi("things", "owner-index", "owner = :o", {":o": "ann"})


async def test_an_index_that_was_created_meanwhile(proxy: Proxy) -> None:
    prefix = new_prefix()
    bare = [Collection("things", key="id", fields=[Field("owner", "text")])]
    async with store_at(proxy.url, prefix, bare) as store:
        await store.create_entity("things", {"id": "a"})
    indexed = [Collection("things", key="id", fields=["owner"], indexes=[Index("owner")])]
    async with store_at(proxy.url, prefix, indexed) as store:
        with pytest.raises(SchemaMismatchError, match="schema apply"):
            await store.query_by_gsi("things", "owner-index", "owner = :o", {":o": "x"})
        async with store_at(proxy.url, prefix, indexed) as other:
            await other.create_tables()
            with pytest.raises(SchemaMismatchError, match="--complete"):
                await store.query_by_gsi("things", "owner-index", "owner = :o", {":o": "x"})
            await other._dynamodb.apply_schema(complete=True)
        assert await store.query_by_gsi("things", "owner-index", "owner = :o", {":o": "x"}) == []
