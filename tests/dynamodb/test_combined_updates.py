"""Updates of one entity that wait together share a read and a write; each has its own outcome."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import pytest

from hf_async_store import (
    Collection,
    EntityNotFoundError,
    Field,
    InvalidFieldError,
    StorageError,
    increment,
)
from hf_async_store.strategies.dynamodb import request_retry
from hf_async_store.strategies.dynamodb.client import Client
from hf_async_store.strategies.dynamodb.errors import ResponseLost, conflict, translate
from hf_async_store.testing.assertions import get_existing
from hf_async_store.testing.concurrency import seeded
from hf_async_store.testing.repetitions import repetitions
from hf_async_store.values import Key
from tests.dynamodb.proxy import WRITES, Answer, Fault, Request
from tests.dynamodb.support import new_prefix, store_at

if TYPE_CHECKING:
    from collections.abc import Awaitable
    from random import Random

    from hf_async_store import DynamoDBStorageStrategy
    from hf_async_store.values import Entity
    from tests.dynamodb.proxy import Proxy

pytestmark = pytest.mark.hf_sampled


def _counted_up(
    store: DynamoDBStorageStrategy, number: int, name: str = "a"
) -> list[Awaitable[int]]:
    return [store.update_entity("items", name, {"count": increment(1)}) for _ in range(number)]


async def test_increments_share_requests(proxy: Proxy) -> None:
    async with store_at(proxy.url) as store:
        await store.create_entity("items", {"item_id": "a", "count": 0})
        proxy.requests.clear()
        assert await asyncio.gather(*_counted_up(store, 50)) == list(range(2, 52))
        assert (await get_existing(store, "items", "a"))["count"] == 50
        assert proxy.counted() == {"GetItem": 3, "PutItem": 2}


async def test_modifications_share_requests(proxy: Proxy) -> None:
    def one_more(entity: Entity) -> Entity:
        entity["count"] += 1  # type: ignore[operator]  # it is a number
        return entity

    async with store_at(proxy.url) as store:
        await store.create_entity("items", {"item_id": "a", "count": 0})
        first = store._retry_queue.ticket(Key("items", "a"))
        await first.acquire(1)
        work = [asyncio.create_task(store.modify_entity("items", "a", one_more)) for _ in range(40)]
        for _ in range(3):
            await asyncio.sleep(0)  # they queue
        proxy.requests.clear()
        first.release()
        assert sorted(await asyncio.gather(*work)) == list(range(2, 42))
        assert (await get_existing(store, "items", "a"))["count"] == 40
        assert len(proxy.requests) < 8


async def test_each_version_is_in_the_feed(proxy: Proxy) -> None:
    fed = Collection("fed", key="id", fields=[Field("count", "integer")], feed=timedelta(hours=1))
    async with store_at(proxy.url, collections=[fed]) as store:
        await store.create_entity("fed", {"id": "a", "count": 0})
        proxy.requests.clear()
        work = [store.update_entity("fed", "a", {"count": increment(1)}) for _ in range(4)]
        assert await asyncio.gather(*work) == [2, 3, 4, 5]
        assert proxy.counted()["PutItem"] == 4


async def test_others_may_come_first(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix, call = new_prefix(), Client.call
    async with store_at(proxy.url, prefix) as store, store_at(proxy.url, prefix) as other:
        await store.create_entity("items", {"item_id": "a", "count": 0})
        overtaken = 0

        async def overtaking(client: Client, operation: str, params: Any) -> Any:
            nonlocal overtaken
            if operation == "PutItem" and client is store._dynamodb.client and overtaken < 3:
                overtaken += 1
                await other.update_entity("items", "a", {"count": increment(100)})
            return await call(client, operation, params)

        monkeypatch.setattr(Client, "call", overtaking)
        assert await asyncio.gather(*_counted_up(store, 5)) == [5, 6, 7, 8, 9]
        assert (await get_existing(store, "items", "a"))["count"] == 305


async def test_who_was_overtaken_pauses_now_and_then(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a pause before each attempt, it would wait for ever behind stores that do not pause."""
    prefix, call, pause = new_prefix(), Client.call, request_retry.Retries.pause
    async with store_at(proxy.url, prefix) as store, store_at(proxy.url, prefix) as other:
        await store.create_entity("items", {"item_id": "a", "count": 0})
        overtaken = pauses = 0

        async def overtaking(client: Client, operation: str, params: Any) -> Any:
            nonlocal overtaken
            if operation == "PutItem" and client is store._dynamodb.client and overtaken < 20:
                overtaken += 1
                await other.update_entity("items", "a", {"count": increment(100)})
            return await call(client, operation, params)

        async def counted(retries: request_retry.Retries, up_to: float | None = None) -> bool:
            nonlocal pauses
            pauses += 1
            return await pause(retries, up_to)

        monkeypatch.setattr(Client, "call", overtaking)
        monkeypatch.setattr(request_retry.Retries, "pause", counted)
        assert await asyncio.gather(*_counted_up(store, 2)) == [22, 23]
        assert pauses == 2


@pytest.mark.long
async def test_every_store_has_its_turn(proxy: Proxy) -> None:
    prefix = new_prefix()
    async with AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(store_at(proxy.url, prefix)) for _ in range(6)]
        await stores[0].create_entity("items", {"item_id": "a", "count": 0})
        done = [0] * len(stores)

        async def count_up(place: int) -> None:
            while max(done) < 100:
                await asyncio.gather(*_counted_up(stores[place], 8))
                done[place] += 1

        await asyncio.gather(*map(count_up, range(len(stores))))
        assert min(done) >= 20, done
        assert (await get_existing(stores[0], "items", "a"))["count"] == 8 * sum(done)


async def test_a_refused_update_does_not_affect_the_others(proxy: Proxy) -> None:
    async with store_at(proxy.url) as store:
        await store.create_entity("items", {"item_id": "a", "count": 0, "free": "text"})
        wrong = store.update_entity("items", "a", {"free": increment(1)})
        found = await asyncio.gather(
            *_counted_up(store, 2), wrong, *_counted_up(store, 2), return_exceptions=True
        )
        assert isinstance(found.pop(2), InvalidFieldError)
        assert found == [2, 3, 4, 5]
        found = await asyncio.gather(*_counted_up(store, 3, "nobody"), return_exceptions=True)
        assert [type(each) for each in found] == [EntityNotFoundError] * 3
        assert len({id(each) for each in found}) == 3


async def test_what_the_server_refuses_is_written_one_by_one(proxy: Proxy) -> None:
    def rule(request: Request) -> Fault | None:
        if "poison" not in str(request.params):
            return None
        return Answer(400, {"__type": "com.amazon#ValidationException", "message": "no"})

    async with store_at(proxy.url) as store:
        await store.create_entity("items", {"item_id": "a", "count": 0})
        proxy.rule = rule
        wrong = store.update_entity("items", "a", {"count": increment(1), "label": "poison"})
        found = await asyncio.gather(
            *_counted_up(store, 2), wrong, *_counted_up(store, 2), return_exceptions=True
        )
        assert isinstance(found.pop(2), StorageError)
        assert found == [2, 3, 4, 5]


_ANSWERS: Final = ("good", "good", "cut before", "cut after", "failed after", "throttled", "busy")


class _Faulty:
    """The client of a store, with random responses to writes."""

    def __init__(self, random: Random, client: Client) -> None:
        self._random = random
        self._call = client.call

    async def call(self, operation: str, params: Any) -> Any:
        answer = self._random.choice(_ANSWERS) if operation in WRITES else "good"
        if answer == "throttled":
            raise translate("ThrottlingException", "", 400, {})
        if answer == "busy":
            raise conflict()
        response = None if answer == "cut before" else await self._call(operation, params)
        if answer == "failed after":
            raise translate("InternalServerError", "", 500, {})
        if response is None or answer == "cut after":
            raise ResponseLost("the answer of DynamoDB was lost", outcome_unknown=True)
        return response


async def test_outcomes_are_true_whatever_is_answered(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_retry, "_FIRST_PAUSE", 0.001)
    prefix = new_prefix()
    with seeded() as random:
        async with (
            store_at(proxy.url, prefix, retry_timeout=0.05) as store,
            store_at(proxy.url, prefix) as other,
        ):
            await store.create_entity("items", {"item_id": "first"})
            faulty = _Faulty(random, store._dynamodb.client)
            for number in range(repetitions(60, 12)):
                name = f"i{number}"
                await other.create_entity("items", {"item_id": name, "count": 0})
                with monkeypatch.context() as patch:
                    patch.setattr(store._dynamodb.client, "call", faulty.call)
                    found = await asyncio.gather(
                        *_counted_up(store, 6, name),
                        *_counted_up(other, random.randint(0, 2), name),
                        return_exceptions=True,
                    )
                entity = await get_existing(other, "items", name)
                done = [each for each in found if isinstance(each, int)]
                failed = [each for each in found if isinstance(each, StorageError)]
                unknown = [each for each in failed if each.outcome_unknown]
                assert len(done) + len(failed) == len(found)
                assert len(set(done)) == len(done)
                assert len(done) <= entity["count"] <= len(done) + len(unknown)  # type: ignore[operator]
                assert entity["version"] == entity["count"] + 1  # type: ignore[operator]
