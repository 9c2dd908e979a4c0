"""The requests of claims: shared by the tasks of a store, and spread over what several stores have read."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import pytest

from hf_async_store import ClaimLostError
from hf_async_store.strategies.dynamodb import candidates
from hf_async_store.strategies.dynamodb.client import Client
from hf_async_store.strategies.dynamodb.errors import ResponseLost
from tests.dynamodb.proxy import Answer, Changed, Request
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
            if operation == "UpdateItem" and not taken:
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


async def test_104_a_store_that_others_were_faster_than_spreads(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "_SPREAD_SECONDS", 3600.0)
    failed = {"Code": "ConditionalCheckFailed", "Message": "The conditional request failed"}

    def rule(request: Request) -> Fault | None:
        if request.operation != "BatchExecuteStatement":
            return None
        proxy.rule = None
        return Answer(200, {"Responses": [{"Error": failed}]})

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
        assert await limit_of_query() > 100


async def test_104_an_index_that_is_late_does_not_spread_the_claims_of_one_store(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may still show what the store itself has just claimed as free."""
    monkeypatch.setattr(candidates, "_SPREAD_SECONDS", 3600.0)
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
