"""Unique indexes on DynamoDB: the markers, and when they are complete."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hf_async_store import (
    Collection,
    Field,
    Index,
    InvalidQueryError,
    TransactionTooLargeError,
    UniqueViolationError,
)
from tests.dynamodb.proxy import Cut
from tests.dynamodb.support import new_prefix, store_at

if TYPE_CHECKING:
    from tests.dynamodb.proxy import Fault, Proxy, Request

FIELDS = ["name", Field("n", "integer")]
PLAIN = [Collection("hosts", key="host_id", fields=FIELDS)]
UNIQUE = [
    Collection("hosts", key="host_id", fields=FIELDS, indexes=[Index("name", unique=True)]),
]


def host(number: int, **more: object) -> dict[str, object]:
    return {"host_id": f"h{number}", "name": f"web-{number}", **more}


async def test_only_changes_of_unique_values_are_transactions(proxy: Proxy) -> None:
    async with store_at(proxy.url, collections=UNIQUE) as store:
        await store.create_entities("hosts", [host(each) for each in range(3)])
        proxy.requests.clear()
        await store.update_entity("hosts", "h1", {"n": 1})
        assert "TransactWriteItems" not in [each.operation for each in proxy.requests]
        await store.update_entity("hosts", "h1", {"name": "other"})
        assert "TransactWriteItems" in [each.operation for each in proxy.requests]


async def test_a_lost_answer_is_no_violation(proxy: Proxy) -> None:
    async with store_at(proxy.url, collections=UNIQUE) as store:
        await store.create_entity("hosts", host(1))

        def rule(request: Request) -> Fault | None:
            if request.operation != "TransactWriteItems":
                return None
            proxy.rule = None
            return Cut(applied=True)

        proxy.rule = rule
        assert await store.create_entity("hosts", host(2)) == 1
        proxy.rule = rule
        assert await store.update_entity("hosts", "h2", {"name": "web-3"}) == 2
        await store.create_entity("hosts", host(4, name="web-2"))


async def test_the_value_of_an_entity_that_another_program_deleted_is_free(proxy: Proxy) -> None:
    async with store_at(proxy.url, collections=UNIQUE) as store:
        await store.create_entity("hosts", host(1))
        tables = store._dynamodb.tables
        await store._dynamodb.client.read(
            "DeleteItem", {"TableName": tables.name("hosts"), "Key": {"host_id": {"S": "h1"}}}
        )
        await store.create_entity("hosts", host(2, name="web-1"))
        with pytest.raises(UniqueViolationError, match="'h2'"):
            await store.create_entity("hosts", host(1))


async def test_an_index_of_existing_entities_needs_complete(proxy: Proxy) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix, PLAIN) as store:
        await store.save_entities("hosts", [host(each) for each in range(40)])
    async with store_at(proxy.url, prefix, UNIQUE) as store:
        await store.apply_schema()
        assert "unique index" in {each.kind for each in await store.schema_changes()}
        await store.create_entity("hosts", host(50, name="web-1"))
        await store.delete_entity("hosts", "h50")
        await store.apply_schema(complete=True)
        assert await store.schema_changes() == []
        with pytest.raises(UniqueViolationError, match="'h1'"):
            await store.create_entity("hosts", host(50, name="web-1"))
    async with store_at(proxy.url, prefix, PLAIN) as store:
        with pytest.raises(UniqueViolationError, match="'h39'"):
            await store.create_entity("hosts", host(50, name="web-39"))


async def test_tables_that_were_created_before(proxy: Proxy) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix, UNIQUE) as store:
        created = await store.create_tables()
        assert [each.split("_")[-1] for each in created] == ["hosts", "unique"]
    async with store_at(proxy.url, prefix, PLAIN) as store:
        await store.create_entity("hosts", host(1))
        with pytest.raises(UniqueViolationError):
            await store.create_entity("hosts", host(2, name="web-1"))
        assert await store.undeclared() == []


async def test_what_cannot_be_combined(proxy: Proxy) -> None:
    async with store_at(proxy.url, collections=UNIQUE) as store:
        await store.create_entity("hosts", host(1))
        condition = "attribute_exists(host_id)"
        await store.update_entity("hosts", "h1", {"n": 1}, condition_expression=condition)
        with pytest.raises(InvalidQueryError, match="unique index"):
            await store.update_entity(
                "hosts", "h1", {"name": "other"}, condition_expression=condition
            )
        hosts = [host(100 + number) for number in range(51)]  # each with its marker
        with pytest.raises(TransactionTooLargeError):
            await store.run_transaction(lambda tx: tx.create_entities("hosts", hosts))
        await store.run_transaction(lambda tx: tx.create_entities("hosts", hosts[:50]))
        assert await store.get_entity("hosts", "h149") is not None
