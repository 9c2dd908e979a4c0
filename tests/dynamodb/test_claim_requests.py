"""The requests of claims: shared by the tasks of a store, and spread over what several stores have read."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import pytest

from hf_async_store import ClaimLostError, increment
from hf_async_store.changes import Record
from hf_async_store.strategies.dynamodb import candidates
from hf_async_store.strategies.dynamodb.candidates import Claimers
from hf_async_store.strategies.dynamodb.client import Client
from hf_async_store.strategies.dynamodb.errors import ResponseLost
from hf_async_store.values import Key
from tests.dynamodb.proxy import WRITES, Answer, Changed, Request
from tests.dynamodb.support import HOST_FACTORY, new_prefix, store_at

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hf_async_store import Claim, DynamoDBStorageStrategy
    from tests.dynamodb.proxy import Fault, Proxy, Rule

pytestmark = pytest.mark.hf_sampled


async def _fill(store: DynamoDBStorageStrategy, number: int) -> None:
    await store.create_entities("items", [{"item_id": f"i{n:03}"} for n in range(number)])


async def _claimed(store: DynamoDBStorageStrategy, limit: int = 1) -> list[str]:
    claims = await store.claim_entities("items", order_by="item_id", limit=limit)
    return [each.id for each in claims]


def _attempts(proxy: Proxy) -> int:
    """How many entities the requests tried to claim."""
    statements = [
        len(each.params["Statements"])
        for each in proxy.requests
        if each.operation == "BatchExecuteStatement"
    ]
    return sum(statements) + proxy.counted()["UpdateItem"]


async def test_104_claims_of_one_store_share_requests(proxy: Proxy) -> None:
    async with store_at(proxy.url) as store:
        await _fill(store, 48)
        proxy.requests.clear()
        one_by_one = await asyncio.gather(*[_claimed(store) for _ in range(8)])
        assert proxy.counted()["BatchExecuteStatement"] == 1
        together = await _claimed(store, 40)
        assert sorted([*chain(*one_by_one), *together]) == [f"i{n:03}" for n in range(48)]
        assert proxy.counted()["UpdateItem"] == 0
        assert _attempts(proxy) == 48
        assert proxy.counted()["BatchExecuteStatement"] <= 12


async def test_104_claimers_that_find_nothing_read_together(proxy: Proxy) -> None:
    async with store_at(proxy.url) as store:
        await _fill(store, 8)
        assert len(await _claimed(store, 8)) == 8
        proxy.requests.clear()
        assert await asyncio.gather(*[_claimed(store) for _ in range(8)]) == [[]] * 8
        # That of the first began before the others, which share another one; in 4 segments each.
        assert proxy.counted()["Scan"] <= 8


@asynccontextmanager
async def _overtaken(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Claim, list[Claim]]]:
    """A claim, of whose next request the answer is lost, after another store has claimed the entity; and
    the claim of that store."""
    prefix = new_prefix()
    async with store_at(proxy.url, prefix) as store, store_at(proxy.url, prefix) as other:
        await _fill(store, 1)
        [claim] = await store.claim_entities("items")
        call = Client.call
        taken: list[Claim] = []

        async def lost(client: Client, operation: str, params: Any) -> Any:
            answer = await call(client, operation, params)
            is_own = client is store._dynamodb.client
            if is_own and operation == "UpdateItem" and not taken:
                taken.extend(await other.claim_entities("items", wait=30.0))
                raise ResponseLost("the answer of DynamoDB was lost", outcome_unknown=True)
            return answer

        monkeypatch.setattr(Client, "call", lost)
        yield claim, taken


@pytest.mark.parametrize("after", [0.0, 0.001])
async def test_106_a_release_whose_answer_is_lost_before_another_claims(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, after: float
) -> None:
    async with _overtaken(proxy, monkeypatch) as (claim, taken):
        await claim.release(after=after)
        assert taken[0].attempts == 2
        with pytest.raises(ClaimLostError):
            await claim.release()
        await taken[0].finish()


async def test_106_a_finish_whose_answer_is_lost_before_another_claims(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ended the claim has left no trace: whether it was this finish is not known."""
    async with _overtaken(proxy, monkeypatch) as (claim, taken):
        with pytest.raises(ClaimLostError) as caught:
            await claim.finish()
        assert caught.value.outcome_unknown
        with pytest.raises(ClaimLostError) as caught:
            await claim.finish()
        assert not caught.value.outcome_unknown
        await taken[0].finish()


async def test_104_a_store_that_others_were_faster_than_reads_for_all(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "_KNOWN_SECONDS", 3600.0)
    claim = {"M": {"w": {"S": "other.1"}}}
    failed = {"__type": "#ConditionalCheckFailedException", "Item": {"_l": claim}}

    def rule(request: Request) -> Fault | None:
        if request.operation != "UpdateItem":
            return None
        proxy.rule = None
        return Answer(400, failed)

    async with store_at(proxy.url, collections=HOST_FACTORY) as store:
        at = "2026-01-01T00:00:00Z"
        waiting = [
            {"request_id": f"r{n:03}", "status": "PENDING", "created_at": at} for n in range(100)
        ]
        await store.create_entities("requests", waiting)

        async def limit_of_query(rule: Rule | None = None) -> int:
            await store.update_entity("requests", "r000", {"message": "new"})  # it reads anew
            proxy.requests.clear()
            proxy.rule = rule
            where = {"status": "PENDING"}
            assert len(await store.claim_entities("requests", where, order_by="created_at")) == 1
            queries = [each.params for each in proxy.requests if each.operation == "Query"]
            limit: int = queries[0]["Limit"]
            return limit

        assert await limit_of_query() < 30
        assert await limit_of_query(rule) < 30
        assert proxy.rule is None, "another claimer was faster"
        assert await limit_of_query() > 60


async def test_104_stores_share_the_candidates_out(proxy: Proxy) -> None:
    """Those that know of each other try few entities twice, and take them about in their order."""
    prefix = new_prefix()
    async with AsyncExitStack() as stack:
        stores = [
            await stack.enter_async_context(store_at(proxy.url, prefix, HOST_FACTORY))
            for _ in range(4)
        ]
        at = "2026-01-01T00:00:00.{:06}Z"
        waiting = [
            {"request_id": f"r{n:03}", "status": "PENDING", "created_at": at.format(n)}
            for n in range(120)
        ]
        await stores[0].create_entities("requests", waiting)
        found: list[str] = []

        async def claim(store: DynamoDBStorageStrategy, number: int) -> None:
            for _ in range(number):
                claims = await store.claim_entities(
                    "requests", {"status": "PENDING"}, order_by="created_at"
                )
                found.extend(each.id for each in claims)

        await asyncio.gather(*[claim(each, 4) for each in stores])  # they learn of each other
        proxy.requests.clear()
        await asyncio.gather(*[claim(each, 12) for each in stores])
        assert len(found) == len(set(found)) == 64
        claimed = 48
        assert claimed <= _attempts(proxy) <= 1.5 * claimed
        assert proxy.counted()["Query"] <= 16
        late = [abs(int(name[1:]) - place) for place, name in enumerate(found)]
        assert sum(late) / len(late) < 30
        # Each one also claims what would be that of others, when nothing else is left.
        only = [name for name in (f"r{n:03}" for n in range(120)) if name not in found]
        await claim(stores[0], len(only))
        assert sorted(found) == [f"r{n:03}" for n in range(120)]


async def test_104_an_ordinary_write_does_not_change_the_order(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "_SECONDS", 3600.0)
    monkeypatch.setattr(candidates, "_LONGEST", 3600.0)
    prefix, call = new_prefix(), Client.call
    async with store_at(proxy.url, prefix) as store, store_at(proxy.url, prefix) as other:
        await _fill(store, 20)
        written = False

        async def overtaken(client: Client, operation: str, params: Any) -> Any:
            nonlocal written
            if client is store._dynamodb.client and operation == "UpdateItem" and not written:
                written = True
                await other.update_entity("items", "i000", {"label": "new"})
            return await call(client, operation, params)

        monkeypatch.setattr(Client, "call", overtaken)
        assert [await _claimed(store) for _ in range(4)] == [[f"i{n:03}"] for n in range(1, 5)]
        assert written


async def test_104_what_a_conditional_update_frees_is_claimed_at_once(proxy: Proxy) -> None:
    async with store_at(proxy.url) as store:
        await _fill(store, 3)
        await store.update_entities("items", {"i001": {"label": "new"}, "i002": {"label": "new"}})

        async def claimed() -> list[str]:
            found = await store.claim_entities("items", {"label": "new"}, order_by="item_id")
            return [each.id for each in found]

        assert await claimed() == ["i001"]
        condition = "attribute_not_exists(label)"
        await store.update_entity("items", "i000", {"label": "new"}, condition_expression=condition)
        assert await claimed() == ["i000"]


async def test_104_stores_that_do_not_compete_claim_in_order(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "_SECONDS", 0.0)
    monkeypatch.setattr(candidates, "_PER_READING", 0)  # as if they claimed now and then
    prefix = new_prefix()
    async with store_at(proxy.url, prefix) as store, store_at(proxy.url, prefix) as other:
        await _fill(store, 20)
        found = []
        for _ in range(10):
            found += await _claimed(store) + await _claimed(other)
        assert found == [f"i{n:03}" for n in range(20)]


@pytest.mark.parametrize("number", [2, 8, 32])
def test_104_each_candidate_is_assigned_to_one_of_the_stores(number: int) -> None:
    names = [f"store{each}" for each in range(number)]
    free = [(Record(Key("items", f"i{each:04}"), {}), {}) for each in range(1024)]
    shares = []
    for name in names:
        claimers = Claimers(name)
        for other in names:
            claimers.note_faster(f"{other}.1")
        shares.append(claimers.share_of(free, 7))
    assert {sum(each) for each in zip(*shares, strict=True)} == {1}
    assert min(map(sum, shares)) > 1024 / number / 3


async def test_104_what_cannot_free_a_candidate_starts_no_new_reading(proxy: Proxy) -> None:
    async with store_at(proxy.url) as store:
        await store.create_entities(
            "items", [{"item_id": f"i{n:03}", "label": "new", "count": 0} for n in range(40)]
        )
        proxy.requests.clear()
        for number in range(20):
            [claim] = await store.claim_entities("items", {"label": "new"}, order_by="item_id")
            assert claim.id == f"i{number:03}"
            await store.save_entity("counters", {"counter_id": "c", "value": number})
            await claim.finish({"label": "done", "count": increment(1)})
        counted = proxy.counted()
        # A reading takes what an index without the order has, and lasts a second at least.
        assert counted["Query"] <= 8
        assert counted["TransactWriteItems"] == 0
        assert counted["GetItem"] <= 25  # one for each increment
        await store.update_entity("items", "i000", {"label": "new"})
        [claim] = await store.claim_entities("items", {"label": "new"}, order_by="item_id")
        assert (claim.id, claim.entity["count"]) == ("i000", 1)


async def test_104_a_claim_that_deletes_its_entity_starts_no_new_reading(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "_SECONDS", 3600.0)
    monkeypatch.setattr(candidates, "_LONGEST", 3600.0)
    async with store_at(proxy.url) as store:
        await _fill(store, 12)
        [first] = await store.claim_entities("items", order_by="item_id")
        await first.release()
        proxy.requests.clear()
        for number in range(9):
            [claim] = await store.claim_entities("items", order_by="item_id")
            assert claim.id == f"i{number:03}"
            if number % 3 == 0:
                await claim.delete()
            elif number % 3 == 1:
                async with claim.transaction() as tx:
                    await tx.create_entity("counters", {"counter_id": claim.id})
                await claim.delete()
            else:
                async with store.begin_transaction() as tx:
                    await tx.create_entity("counters", {"counter_id": claim.id})
                await claim.delete()
        counted = proxy.counted()
        assert counted["Query"] + counted["Scan"] <= 9  # it was 37
        async with store.begin_transaction() as tx:
            await tx.create_entity("items", {"item_id": "h"})
        [claim] = await store.claim_entities("items", order_by="item_id")
        assert claim.id == "h", "what a transaction has made is claimed in its order"


async def test_104_an_index_that_is_late_does_not_show_another_store(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may still show what the store itself has just claimed as free."""
    monkeypatch.setattr(candidates, "_KNOWN_SECONDS", 3600.0)
    late: list[dict[str, Any]] = []

    def replayed(response: dict[str, Any]) -> dict[str, Any]:
        late.append(response)
        return late[0]

    def rule(request: Request) -> Fault | None:
        return Changed(replayed) if request.operation == "Query" else None

    async with store_at(proxy.url, collections=HOST_FACTORY) as store:
        at = "2026-01-01T00:00:00Z"
        waiting = [
            {"request_id": f"r{n:03}", "status": "PENDING", "created_at": at} for n in range(17)
        ]
        await store.create_entities("requests", waiting)
        proxy.rule = rule
        found = []
        for _ in range(6):
            await store.update_entity("requests", "r016", {"message": "new"})  # it reads anew
            where = {"status": "PENDING"}
            claims = await store.claim_entities("requests", where, order_by="created_at")
            found += [each.id for each in claims]
        assert found == [f"r{n:03}" for n in range(6)]
        assert len(late) >= 6
        limits = {each.params["Limit"] for each in proxy.requests if each.operation == "Query"}
        assert max(limits) < 30


@pytest.mark.parametrize("whole", [True, False])
async def test_104_a_server_that_refuses_the_statements(proxy: Proxy, whole: bool) -> None:
    """Claims are then made by UpdateItem."""
    refused = {"Code": "ValidationError", "Message": "Statement wasn't well formed"}

    def refuse(response: dict[str, Any]) -> dict[str, Any]:
        return {"Responses": [{"Error": refused} for _ in response["Responses"]]}

    def rule(request: Request) -> Fault | None:
        if request.operation != "BatchExecuteStatement":
            return None
        error = {"__type": "ValidationException", "message": "not well formed"}
        return Answer(400, error) if whole else Changed(refuse)

    async with store_at(proxy.url) as store:
        await _fill(store, 3)
        proxy.rule = rule
        proxy.requests.clear()
        assert await _claimed(store, 2) == ["i000", "i001"]
        assert await _claimed(store, 2) == ["i002"]
        assert proxy.counted()["UpdateItem"] == 3
        proxy.rule = None
        assert {each.state for each in await store.claims("items")} == {"held"}


async def test_106_a_computed_change_under_a_claim_is_repeated_after_a_lost_answer(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its condition holds once only: what it was computed from is still stored."""
    lost: list[str] = []

    async with store_at(proxy.url) as store:
        await _fill(store, 2)
        claims = await store.claim_entities("items", order_by="item_id", limit=2)
        call = store._dynamodb.client.call

        async def losing(operation: str, params: Any) -> Any:
            if operation not in WRITES or lost[-1:] != ["next"]:
                return await call(operation, params)
            lost[-1] = operation
            if len(lost) == 2:
                await call(operation, params)
            raise ResponseLost("the answer of DynamoDB was lost", outcome_unknown=True)

        monkeypatch.setattr(store._dynamodb.client, "call", losing)
        for claim in claims:  # lost before and after it is applied
            lost.append("next")
            assert await claim.update({"count": increment(1)}) == 2
            assert lost[-1] != "next"
            await claim.finish({"count": increment(1)})
            entity = await store.get_entity("items", claim.id)
            assert entity is not None
            assert (entity["count"], entity["version"]) == (2, 3)
