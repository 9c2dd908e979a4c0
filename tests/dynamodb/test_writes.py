"""Write requests in special cases: other servers, old items, unusual names, limits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest

from hf_async_store import (
    REMOVE,
    AlreadyExistsError,
    Collection,
    ConcurrencyConflictError,
    EntityNotFoundError,
    TransactionTooLargeError,
    UnsupportedValueError,
)
from hf_async_store.changes import PRESENT, ChangeMarker, Delete, Patch, Put
from hf_async_store.testing.assertions import payload
from hf_async_store.values import INT_MAX, MAX_ENTITY_BYTES, Key
from tests.dynamodb.proxy import Answer, Changed, Fault, Request
from tests.dynamodb.support import CONTRACT_COLLECTIONS, new_prefix, store_at

if TYPE_CHECKING:
    from hf_async_store import DynamoDBStorageStrategy
    from tests.dynamodb.proxy import Proxy


pytestmark = pytest.mark.hf_sampled


async def _everything(store: DynamoDBStorageStrategy) -> None:
    """Each verb for one and for many entities, with the expected results."""
    ids = [f"i{n:02}" for n in range(30)]
    entities = [{"item_id": each, "label": "x", "extra": 1.0} for each in ids]
    assert await store.create_entity("items", {"item_id": "a"}) == 1
    assert await store.save_entity("items", {"item_id": "a", "count": 1}) == 2
    assert await store.update_entity("items", "a", {"count": 2}) == 3
    assert await store.update_entity("items", "a", {"count": 3}, expected_version=3) == 4
    assert await store.create_entities("items", entities) == [1] * 30
    assert await store.save_entities("items", entities) == [2] * 30
    assert await store.update_entities("items", {each: {"count": 1} for each in ids}) == [3] * 30
    with pytest.raises(AlreadyExistsError):
        await store.create_entity("items", {"item_id": "a"})
    with pytest.raises(EntityNotFoundError):
        await store.update_entity("items", "nobody", {})
    with pytest.raises(ConcurrencyConflictError):
        await store.delete_entity("items", "a", expected_version=9)
    with pytest.raises(EntityNotFoundError):
        await store.delete_entity("items", "nobody", expected_version=9)
    assert await store.delete_entity("items", "a", expected_version=4)
    assert not await store.delete_entity("items", "a")
    assert await store.delete_entities("items", [*ids, "nobody"]) == [True] * 30 + [False]
    assert await store.count_entities("items") == 0


async def test_a_server_that_does_not_return_values_of_statements(proxy: Proxy) -> None:
    def strip(answer: dict[str, Any]) -> dict[str, Any]:
        responses = [
            {name: each for name, each in response.items() if name != "Item"}
            for response in answer["Responses"]
        ]
        return {**answer, "Responses": responses}

    def rule(request: Request) -> Fault | None:
        return Changed(strip) if request.operation == "BatchExecuteStatement" else None

    proxy.rule = rule
    async with store_at(proxy.url) as store:
        await _everything(store)


async def test_a_save_that_loses_the_race_to_insert_keeps_counting(proxy: Proxy) -> None:
    """The read finds no item, and another store inserts one before the insert of this store."""
    prefix = new_prefix()

    def without_a(answer: dict[str, Any]) -> dict[str, Any]:
        [(table, items)] = answer["Responses"].items()
        return {
            **answer,
            "Responses": {table: [each for each in items if each["item_id"] != {"S": "a"}]},
        }

    def rule(request: Request) -> Fault | None:
        if request.operation != "BatchGetItem":
            return None
        proxy.rule = None
        return Changed(without_a)

    async with store_at(proxy.url, prefix) as store, store_at(proxy.url, prefix) as other:
        await other.create_entity("items", {"item_id": "a", "label": "theirs"})
        await store.create_entity("items", {"item_id": "b"})
        proxy.rule = rule
        assert await store.save_entities("items", [{"item_id": "a"}, {"item_id": "b"}]) == [2, 2]
        assert proxy.rule is None
        assert await store.update_entity("items", "a", {"label": "ours"}) == 3
        assert await other.update_entity("items", "a", {"label": "theirs"}, expected_version=3) == 4


def _refuses(what: str) -> Any:
    def rule(request: Request) -> Fault | None:
        if request.operation != "BatchExecuteStatement":
            return None
        statements = request.params["Statements"]
        if not any(what in each["Statement"] for each in statements):
            return None
        error = {"Error": {"Code": "ValidationError", "Message": "not understood"}}
        return Answer(200, {"Responses": [error] * len(statements)})

    return rule


@pytest.mark.parametrize("what", ["VALUE ?", "RETURNING", "UPDATE", "PARTIQL", '"'])
async def test_a_server_that_does_not_support_a_form_of_statements(proxy: Proxy, what: str) -> None:
    proxy.rule = _refuses(what)
    async with store_at(proxy.url) as store:
        await _everything(store)


async def test_inserts_in_the_long_form(proxy: Proxy) -> None:
    proxy.rule = _refuses("VALUE ?")
    async with store_at(proxy.url) as store:
        await store.create_entity("items", {"item_id": "a"})
        proxy.requests.clear()
        await store.create_entities("items", [{"item_id": f"{n}"} for n in range(30)])
        assert proxy.counted() == {"BatchExecuteStatement": 2}, (
            "the supported form is determined once"
        )


async def test_a_concurrent_delete_is_not_taken_for_the_own_one(proxy: Proxy) -> None:
    """A statement that deletes nothing also succeeds."""
    async with store_at(proxy.url) as store:
        for verb in ("single", "many"):
            for round_number in range(5):
                ids = [f"{verb} {round_number} {n}" for n in range(30)]
                await store.create_entities("items", [{"item_id": each} for each in ids])
                async with store_at(
                    proxy.url, store.describe()["configuration"]["table_prefix"]
                ) as other:  # type: ignore[index,call-overload,arg-type]
                    results = await asyncio.gather(
                        *(
                            each.delete_entities("items", ids if verb == "many" else ids[:1])
                            for each in (store, other, store, other)
                        )
                    )
                for answers in zip(*results, strict=True):
                    assert sum(answers) == 1


async def test_an_item_of_another_program(proxy: Proxy) -> None:
    """The item has neither a version nor a token."""
    async with store_at(proxy.url) as store:
        await store.create_entity("items", {"item_id": "first"})
        table = store.describe()["tables"]["items"]  # type: ignore[index,call-overload]
        client = store._dynamodb.client
        for name in "abcd":
            item = {"item_id": {"S": name}, "label": {"S": "x"}, "SS": {"SS": ["one", "two"]}}
            await client.call("PutItem", {"TableName": table, "Item": item})
        entity = await store.get_entity("items", "a")
        assert entity == {"item_id": "a", "label": "x", "SS": ["one", "two"], "version": 0}
        assert len(await store.query_entities("items", {"label": "x"})) == 4
        assert await store.update_entity("items", "a", {"count": 1}, expected_version=0) == 1
        assert await store.save_entity("items", {"item_id": "b", "count": 1}) == 1
        assert await store.delete_entity("items", "c")
        async with store.begin_transaction() as tx:
            assert await tx.update_entity("items", "d", {"count": 1}) == 1
        for name in "abd":
            found = await store.get_entity("items", name)
            assert found is not None
            assert (found["version"], found["count"]) == (1, 1)
            assert await store.update_entity("items", name, {"count": 2}) == 2


SAVES: dict[str, Callable[[DynamoDBStorageStrategy, dict[str, Any]], Awaitable[object]]] = {
    "alone": lambda store, entity: store.save_entity("items", entity),
    "expecting": lambda store, entity: store.save_entity("items", entity, expected_version=1),
    "among others": lambda store, entity: store.save_entities(
        "items", [entity, {"item_id": "beside"}]
    ),
}


@pytest.mark.parametrize("how", SAVES)
async def test_a_save_removes_fields_that_are_no_longer_declared(proxy: Proxy, how: str) -> None:
    prefix = new_prefix()
    before = [Collection("items", key="item_id", fields=["old", "kept"])]
    after = [Collection("items", key="item_id", fields=["kept", "new"])]
    entity = {"item_id": "a", "old": "o", "kept": "k", "new": {"any": 1}}
    async with store_at(proxy.url, prefix, before) as store:
        await store.create_entities("items", [entity, {**entity, "item_id": "beside"}])
    async with store_at(proxy.url, prefix, after) as store:
        assert payload(await store.get_entity("items", "a")) == entity
        saved: dict[str, Any] = {"item_id": "a", "kept": "k2"}
        await SAVES[how](store, saved)
        found = await store.get_entity("items", "a")
        assert found is not None
        assert (payload(found), found["version"]) == (saved, 2)
        proxy.requests.clear()
        assert await store.save_entity("items", {**saved, "new": "n"}) == 3
        assert proxy.counted() == {"UpdateItem": 1}, "only the first one reads"
        assert payload(await store.get_entity("items", "a")) == {**saved, "new": "n"}


UPDATES: dict[str, dict[str, Any]] = {
    "plain": {},
    "expecting": {"expected_version": 1},
    "where": {"condition_expression": "kept = :k", "expression_values": {":k": "k"}},
    "where new": {"condition_expression": "new = :n", "expression_values": {":n": "1"}},
}


@pytest.mark.parametrize("how", UPDATES)
async def test_an_update_of_an_item_of_another_declaration(proxy: Proxy, how: str) -> None:
    prefix = new_prefix()
    before = [Collection("items", key="item_id", fields=["old", "kept"])]
    after = [Collection("items", key="item_id", fields=["kept", "new", "newer"])]
    entity = {"item_id": "a", "old": "o", "kept": "k", "new": "1", "newer": "1"}
    async with store_at(proxy.url, prefix, before) as store:
        await store.create_entity("items", entity)
    async with store_at(proxy.url, prefix, after) as store:
        assert (
            await store.update_entity("items", "a", {"new": "2", "old": REMOVE}, **UPDATES[how])
            == 2
        )
        expected = {"item_id": "a", "kept": "k", "new": "2", "newer": "1"}
        assert payload(await store.get_entity("items", "a")) == expected
        proxy.requests.clear()
        assert await store.update_entity("items", "a", {"newer": "2"}) == 3
        assert proxy.counted() == {"BatchExecuteStatement": 1}, "only the first one reads"
        assert payload(await store.get_entity("items", "a")) == {**expected, "newer": "2"}


def _statements(proxy: Proxy) -> list[str]:
    return [
        each["Statement"]
        for request in proxy.requests
        if request.operation == "BatchExecuteStatement"
        for each in request.params["Statements"]
    ]


async def test_an_update_uses_the_token_that_its_store_wrote_last(proxy: Proxy) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix) as store, store_at(proxy.url, prefix) as other:
        await store.create_entity("items", {"item_id": "a"})
        for version, write in enumerate(
            (
                store.update_entity("items", "a", {"count": 1}),
                store.save_entity("items", {"item_id": "a"}),
                store.update_entity("items", "a", {"count": 2}, expected_version=3),
                _in_transaction(store, "a"),
                store.update_entity("items", "a", {"count": 3}),
            ),
            2,
        ):
            assert await write == version
        for each in _statements(proxy):
            assert "RETURNING" not in each
        # After a write of another store, the cached state is not used for a while.
        assert await other.update_entity("items", "a", {"label": "theirs"}) == 7
        proxy.requests.clear()
        assert await store.update_entity("items", "a", {"count": 4}) == 8
        assert ["RETURNING" in each for each in _statements(proxy)] == [False, True]
        proxy.requests.clear()
        assert await store.update_entity("items", "a", {"count": 5}) == 9
        assert ["RETURNING" in each for each in _statements(proxy)] == [True]
        found = await store.get_entity("items", "a")
        assert payload(found) == {"item_id": "a", "count": 5, "label": "theirs"}


async def test_a_single_save_replaces_what_its_store_wrote_last(proxy: Proxy) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix) as store, store_at(proxy.url, prefix) as other:
        version = await store.create_entity("items", {"item_id": "a", "label": "x", "old": 1})
        entity = {"item_id": "a", "created_at": "2024-01-01T00:00:00.000000Z", "new": [1]}
        proxy.requests.clear()
        for version in (2, 3):
            assert await store.save_entity("items", entity) == version
        assert await store.save_entity("items", entity, expected_version=3) == 4
        assert await store.update_entity("items", "a", {"label": "y"}) == 5
        assert await store.save_entity("items", entity) == 6
        assert proxy.counted() == {"PutItem": 4, "BatchExecuteStatement": 1}
        found = dict(await store.get_entity("items", "a") or {})
        assert {**entity, "updated_at": found["updated_at"], "version": 6} == found
        # A claim stays, and does not mean that the cached state was stale.
        [claim] = await other.claim_entities("items", {"item_id": "a"}, limit=1)
        assert await store.save_entity("items", entity) == 7
        assert [each.state for each in await store.claims("items")] == ["held"]
        proxy.requests.clear()
        assert await store.update_entity("items", "a", {"label": "y"}) == 8
        assert "RETURNING" not in "".join(_statements(proxy))
        await claim.release()
        # A write of another store is not overwritten unseen.
        assert await other.update_entity("items", "a", {"label": "theirs"}) == 9
        assert await store.save_entity("items", entity) == 10
        with pytest.raises(ConcurrencyConflictError):
            await store.save_entity("items", entity, expected_version=9)


async def test_single_saves_of_a_claimed_entity_are_one_request_each(proxy: Proxy) -> None:
    async with store_at(proxy.url) as store:
        entity = {"item_id": "a", "created_at": "2024-01-01T00:00:00.000000Z"}
        await store.save_entity("items", entity)
        [claim] = await store.claim_entities("items")
        await store.save_entity("items", entity)  # finds the claim
        proxy.requests.clear()
        for version in (3, 4):
            assert await store.save_entity("items", entity) == version
        assert await store.save_entity("items", entity, expected_version=4) == 5
        assert await store.update_entity("items", "a", {"label": "y"}) == 6
        assert await store.save_entity("items", entity) == 7
        assert proxy.counted() == {"UpdateItem": 3, "BatchExecuteStatement": 2}
        [info] = await store.claims("items")
        assert (info.state, info.token) == ("held", claim.token)
        await claim.release()
        proxy.requests.clear()
        assert await store.save_entity("items", entity) == 8
        assert proxy.counted() == {"UpdateItem": 1}


async def _in_transaction(store: DynamoDBStorageStrategy, entity_id: str) -> int:
    async with store.begin_transaction() as tx:
        return await tx.update_entity("items", entity_id, {"count": 0})


@pytest.mark.parametrize(
    "name", ["a.b", "a'b", 'a"b', "", "x" * 9000, "\U0001f600", "[0]", "_w", "SET", "doc", "?"]
)
async def test_unusual_field_names_in_updates(proxy: Proxy, name: str) -> None:
    async with store_at(proxy.url) as store:
        await store.create_entity("items", {"item_id": "a", "kept": 1})
        assert await store.update_entity("items", "a", {name: {"deep": [1.0]}, "label": "x"}) == 2
        assert await store.update_entity("items", "a", {name: -0.0}, expected_version=2) == 3
        found = payload(await store.get_entity("items", "a"))
        assert found == {"item_id": "a", "kept": 1, name: -0.0, "label": "x"}
        from hf_async_store import REMOVE

        assert await store.update_entity("items", "a", {name: REMOVE}) == 4
        found = payload(await store.get_entity("items", "a"))
        assert found == {"item_id": "a", "kept": 1, "label": "x"}


async def test_the_size_of_updates_near_the_limit_is_exact(proxy: Proxy) -> None:
    async with store_at(proxy.url) as store:
        filler = "x" * (MAX_ENTITY_BYTES - 400)
        await store.create_entity("items", {"item_id": "a", "filler": filler, "n": 0})
        for n in range(20):  # by the estimated size the first ones would not fit
            assert await store.update_entity("items", "a", {"n": n, "label": "y" * 50}) == n + 2
        with pytest.raises(UnsupportedValueError):
            await store.update_entity("items", "a", {"more": "z" * 500})
        with pytest.raises(UnsupportedValueError):
            await store.update_entity("items", "a", {"more": "z" * 500}, expected_version=21)
        with pytest.raises(UnsupportedValueError):
            await store.update_entity(
                "items", "a", {"more": "z" * 500}, condition_expression="attribute_exists(n)"
            )
        assert (
            await store.update_entity(
                "items", "a", {"n": 9}, condition_expression="attribute_exists(n)"
            )
            == 22
        )


async def test_the_maximum_version_cannot_be_incremented(proxy: Proxy) -> None:
    async with store_at(proxy.url) as store:
        await store.import_entities("items", [{"item_id": "a", "version": INT_MAX - 1}])
        assert await store.update_entity("items", "a", {"count": 1}) == INT_MAX
        for write in (
            store.update_entity("items", "a", {"count": 2}),
            store.update_entity("items", "a", {"count": 2}, expected_version=INT_MAX),
            store.save_entity("items", {"item_id": "a"}),
            store.save_entity("items", {"item_id": "a"}, expected_version=INT_MAX),
        ):
            with pytest.raises(UnsupportedValueError):
                await write
        with pytest.raises(ConcurrencyConflictError):
            await store.update_entity("items", "a", {}, expected_version=3)
        entity = await store.get_entity("items", "a")
        assert entity is not None
        assert (entity["version"], entity["count"]) == (INT_MAX, 1)
        assert await store.delete_entity("items", "a")


async def test_an_imported_null_or_missing_created_at_is_kept(proxy: Proxy) -> None:
    async with store_at(proxy.url) as store:
        imported: list[dict[str, object]] = [
            {"item_id": "null", "created_at": None},
            {"item_id": "missing"},
        ]
        await store.import_entities("items", imported)
        for _ in range(2):
            for name in ("null", "missing"):
                await store.save_entity("items", {"item_id": name, "label": "x"})
                await store.update_entity("items", name, {"count": 1})
            await store.save_entities("items", [{"item_id": each} for each in ("null", "missing")])
            null = await store.get_entity("items", "null")
            missing = await store.get_entity("items", "missing")
            assert null is not None
            assert missing is not None
            assert null["created_at"] is None
            assert "created_at" not in missing
        assert len(await store.query_entities("items", order_by="created_at")) == 2


async def test_a_mark_is_committed_with_its_change(proxy: Proxy) -> None:
    collections = (*CONTRACT_COLLECTIONS, Collection("marks", key="mark_id"))
    async with store_at(proxy.url, None, collections) as store:
        at = "2026-01-01T00:00:00.000000Z"

        def mark(name: str) -> ChangeMarker:
            return ChangeMarker(Key("marks", name), {"mark_id": name, "of": "t", "version": 1})

        key = Key("items", "t")
        put = Put(key, {"item_id": "t"}, at, mark=mark("1"))
        stale = Put(key, {"item_id": "t"}, at, expect=7, mark=mark("2"))
        patch = Patch(key, {"label": "x"}, at, mark=mark("3"))
        gone = Delete(key, mark=mark("4"))
        imported = Put(key, {"item_id": "t"}, at, import_version=8, mark=mark("5"))
        changes = [put, stale, patch, gone, imported]
        outcomes = await store.engine.write_each(changes)
        assert isinstance(outcomes[1], ConcurrencyConflictError)
        assert [outcomes[0], *outcomes[2:]] == [1, 2, 2, 8]
        found = await store.get_entities("marks", list("12345"))
        assert [each is not None for each in found] == [True, False, True, True, True]
        assert found[0] == mark("1").entity


async def test_reads_of_a_transaction_count_towards_its_limit(proxy: Proxy) -> None:
    async with store_at(proxy.url) as store:
        ids = [f"{n:03}" for n in range(101)]
        await store.create_entities("items", [{"item_id": each} for each in ids])
        async with store.begin_transaction() as tx:
            await tx.get_entities("items", ids[:99])
            await tx.update_entity("items", ids[99], {"count": 1})

        async def too_much() -> None:
            async with store.begin_transaction() as tx:
                await tx.get_entities("items", ids[:100])
                await tx.update_entity("items", ids[100], {"count": 1})

        with pytest.raises(TransactionTooLargeError):
            await too_much()
        entity = await store.get_entity("items", ids[100])
        assert entity is not None
        assert entity["version"] == 1


async def test_the_requests_of_a_transaction(proxy: Proxy) -> None:
    async with store_at(proxy.url) as store:
        await store.create_entities("items", [{"item_id": each} for each in "abc"])
        proxy.requests.clear()
        async with store.begin_transaction() as tx:
            await tx.get_entities("items", ["a", "b", "nobody"])
        assert proxy.counted() == {"TransactGetItems": 1}, (
            "a single snapshot read needs no check at commit"
        )
        proxy.requests.clear()
        async with store.begin_transaction() as tx:
            await tx.get_entity("items", "a")
            await tx.get_entity("items", "b")
        assert proxy.counted() == {"GetItem": 2, "TransactGetItems": 1}
        proxy.requests.clear()
        async with store.begin_transaction() as tx:
            await tx.get_entity("items", "a")
            await tx.save_entities("items", [{"item_id": "b"}, {"item_id": "new"}])
            await tx.delete_entity("items", "c")
        assert proxy.counted()["TransactWriteItems"] == 1
        [*_, commit] = proxy.requests
        actions = [next(iter(each)) for each in commit.params["TransactItems"]]
        assert sorted(actions) == ["ConditionCheck", "Delete", "Put", "Put"]
        assert commit.params["ClientRequestToken"]


async def test_a_replacement_that_requires_the_entity(proxy: Proxy) -> None:
    """No verb sends this change, but `Engine.write_each` accepts it."""
    async with store_at(proxy.url) as store:
        at = "2026-01-01T00:00:00.000000Z"

        def put(entity_id: str) -> Put:
            return Put(Key("items", entity_id), {"item_id": entity_id}, at, expect=PRESENT)

        [outcome] = await store.engine.write_each([put("a")])
        assert isinstance(outcome, EntityNotFoundError)
        await store.create_entities("items", [{"item_id": "a"}, {"item_id": "b"}])
        assert await store.engine.write_each([put("a")]) == [2]
        outcomes = await store.engine.write_each([put("a"), put("b"), put("c")])
        assert outcomes[:2] == [3, 2]
        assert isinstance(outcomes[2], EntityNotFoundError)
        assert await store.get_entity("items", "c") is None


async def test_a_condition_on_an_item_of_another_program(proxy: Proxy) -> None:
    async with store_at(proxy.url) as store:
        await store.create_entity("items", {"item_id": "first"})
        table = store.describe()["tables"]["items"]  # type: ignore[index,call-overload]
        item = {"item_id": {"S": "a"}, "label": {"S": "x"}, "doc": {"M": {}}}
        await store._dynamodb.client.call("PutItem", {"TableName": table, "Item": item})
        version = await store.update_entity(
            "items",
            "a",
            {"count": 1},
            condition_expression="label = :x",
            expression_values={":x": "x"},
        )
        assert version == 1
        assert await store.update_entity("items", "a", {"count": 2}) == 2
        assert await store.save_entity("items", {"item_id": "a"}) == 3
