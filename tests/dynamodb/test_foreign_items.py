"""Items that other programs wrote into the tables."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import pytest

from hf_async_store import (
    BatchError,
    Collection,
    ConcurrencyConflictError,
    CorruptionError,
    Field,
    path,
)
from tests.dynamodb.proxy import Changed
from tests.dynamodb.support import new_prefix, store_at

if TYPE_CHECKING:
    from hf_async_store import DynamoDBStorageStrategy
    from tests.dynamodb.proxy import Fault, Proxy, Request

pytestmark = pytest.mark.hf_sampled

THINGS: Final = [Collection("things", key="id", fields=[Field("price", "number")])]
THEIRS: Final[dict[str, Any]] = {
    "tags": {"SS": ["42"]},
    "numbers": {"NS": ["1", "2"]},
    "blob": {"B": "AP8="},
    "price": {"N": "3.14159265358979323846"},
    "doc": {"S": "their text"},
}


async def _put(store: DynamoDBStorageStrategy, entity_id: str, **attributes: Any) -> None:
    table = store._dynamodb.tables.name("things")
    item = {"id": {"S": entity_id}, **attributes}
    await store._dynamodb.client.call("PutItem", {"TableName": table, "Item": item})


async def _item(store: DynamoDBStorageStrategy, entity_id: str) -> dict[str, Any]:
    table = store._dynamodb.tables.name("things")
    params = {"TableName": table, "Key": {"id": {"S": entity_id}}, "ConsistentRead": True}
    item: dict[str, Any] = (await store._dynamodb.client.call("GetItem", params))["Item"]
    return item


async def _in_transaction(store: DynamoDBStorageStrategy, verb: str) -> None:
    async with store.begin_transaction() as tx:
        if verb == "save":
            await tx.save_entity("things", {"id": "theirs"})
        else:
            await tx.update_entity("things", "theirs", {"n": 3})


@pytest.mark.parametrize(
    "version",
    [{"S": "v1"}, {"NULL": True}, {"N": "1.5"}, {"N": "-1"}, {"N": "9" * 30}, {"L": []}],
    ids=str,
)
async def test_an_invalid_version(proxy: Proxy, version: dict[str, Any]) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix, THINGS) as store:
        await store.create_entities("things", [{"id": each} for each in "ab"])
        await _put(store, "theirs", version=version, n={"N": "1"})
        assert await store.get_entity("things", "theirs"), "the item cannot be read"
        assert len(await store.query_entities("things")) == 3
        works = {
            "a": store.update_entity("things", "a", {"n": 2}),
            "theirs": store.update_entity("things", "theirs", {"n": 2}),
            "b": store.update_entity("things", "b", {"n": 2}),
        }
        got = dict(
            zip(works, await asyncio.gather(*works.values(), return_exceptions=True), strict=True)
        )
        assert (got["a"], got["b"]) == (2, 2)
        for work in (
            lambda: store.update_entity("things", "theirs", {"n": 2}),
            lambda: store.update_entity("things", "theirs", {"n": 2}, expected_version=1),
            lambda: store.save_entity("things", {"id": "theirs"}),
            lambda: store.save_entity("things", {"id": "theirs"}, expected_version=1),
            lambda: store.delete_entity("things", "theirs", expected_version=1),
            lambda: store.update_entity(
                "things", "theirs", {"n": 2}, condition_expression="attribute_exists(n)"
            ),
        ):
            with pytest.raises(CorruptionError) as caught:
                await work()
            assert f"{prefix}_things" in str(caught.value)
            assert "theirs" in str(caught.value)
            assert not caught.value.outcome_unknown
        with pytest.raises(BatchError) as batch:
            await store.save_entities("things", [{"id": each} for each in ("a", "theirs", "b")])
        first, theirs, third = batch.value.outcomes
        assert (first, third) == (3, 3)
        assert isinstance(theirs, CorruptionError)
        for verb in ("save", "update"):
            with pytest.raises(CorruptionError):
                await _in_transaction(store, verb)
        assert (await _item(store, "theirs"))["version"] == version, "the item was changed"
        assert await store.delete_entity("things", "theirs")
        assert await store.create_entity("things", {"id": "theirs"}) == 1


async def test_attributes_named_like_internal_ones(proxy: Proxy) -> None:
    """Such attributes used to be missing in the entity, and were lost when it was written."""
    async with store_at(proxy.url, collections=THINGS) as store:
        await store.create_entity("things", {"id": "a"})
        await _put(store, "theirs", _owner={"S": "ann"}, _type={"S": "thing"})
        found = await store.get_entity("things", "theirs")
        assert found is not None
        assert (found["_owner"], found["_type"]) == ("ann", "thing")
        await store.update_entity("things", "theirs", {"n": 1})
        found = await store.get_entity("things", "theirs")
        assert found is not None
        assert (found["_owner"], found["_type"], found["n"]) == ("ann", "thing", 1)


@pytest.mark.parametrize("text", ["42", "nan", "inf", "1e5", " 1.0"])
async def test_a_string_set_of_one_string_is_not_decoded_as_a_float(
    proxy: Proxy, text: str
) -> None:
    async with store_at(proxy.url, collections=THINGS) as store:
        await store.create_entity("things", {"id": "a"})
        await _put(store, "theirs", tags={"SS": [text]})
        found = await store.get_entity("things", "theirs")
        assert found is not None
        assert found["tags"] == [text]
        assert await store.update_entity("things", "theirs", {"n": 1}) == 1


Update = Callable[["DynamoDBStorageStrategy", str], Awaitable[object]]


async def _update_in_transaction(store: DynamoDBStorageStrategy, entity_id: str) -> None:
    async with store.begin_transaction() as tx:
        await tx.update_entity("things", entity_id, {"touched": True})


UPDATES: Final[dict[str, Update]] = {
    "plain": lambda store, each: store.update_entity("things", each, {"touched": True}),
    "expecting": lambda store, each: store.update_entity(
        "things", each, {"touched": True}, expected_version=0
    ),
    "where": lambda store, each: store.update_entity(
        "things", each, {"touched": True}, condition_expression="attribute_exists(tags)"
    ),
    "transaction": _update_in_transaction,
}


def _stored(item: dict[str, Any], name: str) -> Any:
    """The attribute of a field, wherever it is stored."""
    document = item.get("doc", {}).get("M", {})
    return document[name] if name in document else item.get(name)


@pytest.mark.parametrize("name", THEIRS)
async def test_an_update_keeps_attributes_of_another_program(proxy: Proxy, name: str) -> None:
    async with store_at(proxy.url, collections=THINGS) as store:
        await store.create_entity("things", {"id": "a"})
        await _put(store, "theirs", **THEIRS)
        await store.update_entity("things", "theirs", {"touched": True})
        now = await _item(store, "theirs")
        expected = {"B": b"\x00\xff"} if name == "blob" else THEIRS[name]
        assert expected in (now.get(name), now.get("doc", {}).get("M", {}).get(name))


@pytest.mark.parametrize("how", UPDATES)
async def test_every_update_keeps_attributes_of_another_program(proxy: Proxy, how: str) -> None:
    """Also if the item is later rewritten because of another declaration."""
    prefix = new_prefix()
    theirs = {**THEIRS, "doc": {"L": [{"NS": ["1.50"]}]}, "created_at": {"N": "17.10"}}
    expected = {**theirs, "blob": {"B": b"\x00\xff"}, "created_at": {"N": "17.1"}}
    expected["doc"] = {"L": [{"NS": ["1.5"]}]}
    async with store_at(proxy.url, prefix, THINGS) as store:
        await store.create_entity("things", {"id": "a"})
        await _put(store, "theirs", **theirs)
        before = await store.get_entity("things", "theirs")
        await UPDATES[how](store, "theirs")
        after = await store.get_entity("things", "theirs")
        assert before is not None
        assert after is not None
        for each in ("touched", "version", "updated_at"):
            before[each] = after[each]
        assert after == before
        assert (after["version"], after["touched"]) == (1, True)
    other = [Collection("things", key="id", fields=["touched", "tags"])]
    async with store_at(proxy.url, prefix, other) as store:
        await store.update_entity("things", "theirs", {"touched": "again"})
        item = await _item(store, "theirs")
        for name in expected.keys() - {"created_at"}:
            assert _stored(item, name) == expected[name], name
        assert item["_c"] == expected["created_at"]


@pytest.mark.parametrize("how", UPDATES)
@pytest.mark.parametrize(
    ("name", "attribute"),
    [
        ("_w", {"N": "5"}),
        ("_s", {"S": "large"}),
        ("_f", {"L": []}),
        ("_c", {"S": "2020"}),
        ("_b_side", {"S": "left"}),
        ("_b_side", {"S": "1"}),
        ("hidden", {"S": "by an entry of doc"}),
    ],
)
async def test_an_attribute_that_an_update_would_remove_is_refused(
    proxy: Proxy, how: str, name: str, attribute: dict[str, Any]
) -> None:
    async with store_at(proxy.url, collections=THINGS) as store:
        await store.create_entity("things", {"id": "a"})
        attributes = {"tags": {"SS": ["x"]}, "doc": {"M": {"hidden": {"S": "x"}}}, name: attribute}
        await _put(store, "theirs", **attributes)
        before = await _item(store, "theirs")
        with pytest.raises(CorruptionError) as caught:
            await UPDATES[how](store, "theirs")
        assert "theirs" in str(caught.value)
        assert name in str(caught.value)
        assert not caught.value.outcome_unknown
        assert await _item(store, "theirs") == before
        # A save replaces the whole entity.
        await store.save_entity("things", {"id": "theirs", "n": 1})
        found = await store.get_entity("things", "theirs")
        assert found is not None
        assert (found["n"], found["version"]) == (1, 1)


async def test_deletes_of_many_items_of_another_program(proxy: Proxy) -> None:
    """A deleted item without a version used to be taken for a missing one."""
    async with store_at(proxy.url, collections=THINGS) as store:
        await store.create_entity("things", {"id": "a"})
        ids = [f"theirs {n}" for n in range(8)]
        for each in ids:
            await _put(store, each, tags={"SS": ["x"]})
        assert await store.delete_entities("things", [*ids, "nobody"]) == [True] * 8 + [False]


async def test_fields_of_another_program_can_be_selected(proxy: Proxy) -> None:
    async with store_at(proxy.url, collections=THINGS) as store:
        await store.create_entity("things", {"id": "a"})
        await _put(store, "theirs", tags={"SS": ["x", "y"]}, doc={"S": "text"}, big={"S": "x"})
        for fields in (["tags"], ["doc", "tags"]):
            [_, found] = await store.query_entities(
                "things", order_by="id", fields=[*map(path, fields)]
            )
            assert found["tags"] == ["x", "y"]
            assert "big" not in found
            assert ("doc" in found) == ("doc" in fields)


async def test_an_attribute_of_another_program_named_doc(proxy: Proxy) -> None:
    async with store_at(proxy.url, collections=THINGS) as store:
        await store.create_entity("things", {"id": "a"})
        await _put(store, "theirs", doc={"S": "their text"})
        found = await store.get_entity("things", "theirs")
        assert found is not None
        assert found["doc"] == "their text"


@pytest.mark.parametrize("verb", ["update", "save"])
async def test_an_item_that_another_declaration_rewrote(proxy: Proxy, verb: str) -> None:
    """A rewrite keeps the token, so the cached token alone does not prove the form of the item."""
    prefix = new_prefix()
    undeclared = [Collection("things", key="id")]
    async with (
        store_at(proxy.url, prefix, THINGS) as store,
        store_at(proxy.url, prefix, undeclared) as other,
    ):
        await store.save_entity("things", {"id": "a", "price": 1})
        with pytest.raises(ConcurrencyConflictError):
            await other.update_entity(
                "things",
                "a",
                {"n": 1},
                condition_expression="price = :price",
                expression_values={":price": 99},
            )
        if verb == "update":
            assert await store.update_entity("things", "a", {"price": 5}) == 2
        else:
            assert await store.save_entity("things", {"id": "a", "price": 5}) == 2
        for each in (store, other):
            entity = await each.get_entity("things", "a")
            assert entity is not None
            assert entity["price"] == 5


async def test_an_update_of_another_program_between_read_and_write(proxy: Proxy) -> None:
    """The first update of an item without a version gives it one, which the write must notice."""
    async with store_at(proxy.url, new_prefix(), THINGS) as store:
        await store.create_entity("things", {"id": "first"})
        await _put(store, "theirs", price={"N": "1"})
        table = store._dynamodb.tables.name("things")
        params = {
            "TableName": table,
            "Key": {"id": {"S": "theirs"}},
            "UpdateExpression": "SET price = :price, version = :version",
            "ExpressionAttributeValues": {":price": {"N": "2"}, ":version": {"N": "1"}},
        }

        async def overtaken() -> None:
            async with store.begin_transaction() as tx:
                entity = await tx.get_entity("things", "theirs")
                assert entity is not None
                await tx.update_entity("things", "theirs", {"seen": entity["price"]})
                await store._dynamodb.client.call("UpdateItem", params)

        with pytest.raises(ConcurrencyConflictError):
            await overtaken()
        assert (await _item(store, "theirs"))["price"] == {"N": "2"}


async def test_attributes_in_the_response_to_a_put_are_not_taken_for_the_item(proxy: Proxy) -> None:
    async with store_at(proxy.url, new_prefix(), THINGS) as store:
        await store.create_entity("things", {"id": "first"})
        await _put(store, "theirs", version={"N": "7"})

        def rule(request: Request) -> Fault | None:
            is_put = request.operation == "PutItem"
            return Changed(lambda body: {**body, "Attributes": {}}) if is_put else None

        proxy.rule = rule
        assert await store.update_entity("things", "theirs", {"n": 1}) == 8


async def test_a_projection_contains_no_path_twice(proxy: Proxy) -> None:
    """DynamoDB rejects that; fields of a caller may have the names of the store's attributes."""
    async with store_at(proxy.url, new_prefix(), THINGS) as store:
        await store.create_entity("things", {"id": "first"})
        assert len(await store.query_entities("things", fields=[path("_c"), "created_at"])) == 1
    params = [each.params for each in proxy.requests if each.operation == "Scan"][-1]
    paths = params["ProjectionExpression"].split(", ")
    assert len(set(paths)) == len(paths)
