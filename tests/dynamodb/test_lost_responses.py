"""A write with every kind of response, including late ones: its result is always correct.

A write that succeeds was applied once. A write that fails without `outcome_unknown` was not applied,
and will never be, whatever requests are still pending and whatever happens to the entity. No write is
applied twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_async_store import DynamoDBStorageStrategy, StorageError, UnavailableError, increment
from hf_async_store.strategies.dynamodb import request_retry
from hf_async_store.strategies.dynamodb.errors import ResponseLost, conflict, translate
from tests.dynamodb.proxy import WRITES, Cut, Fault, Request
from tests.dynamodb.support import new_prefix, store_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hf_async_store_bench.servers import DynamoDBServer
    from tests.dynamodb.proxy import Proxy

pytestmark = pytest.mark.hf_sampled

Verb = Callable[[DynamoDBStorageStrategy, str], Awaitable[object]]


def _save(store: DynamoDBStorageStrategy, entity_id: str, **expected: int) -> Awaitable[object]:
    return store.save_entity("items", {"item_id": entity_id, "label": "ours"}, **expected)


def _save_all(store: DynamoDBStorageStrategy, entity_id: str, **expected: int) -> Awaitable[object]:
    """With `created_at`, so that nothing of the stored entity is kept."""
    entity = {"item_id": entity_id, "label": "ours", "created_at": "2024-01-01T00:00:00Z"}
    return store.save_entity("items", entity, **expected)


async def _transaction(store: DynamoDBStorageStrategy, entity_id: str) -> int:
    async with store.begin_transaction() as tx:
        return await tx.update_entity("items", entity_id, {"label": "ours"})


VERBS: Final[dict[str, Verb]] = {
    "create": lambda store, each: store.create_entity("items", {"item_id": each, "label": "ours"}),
    "save": _save,
    "save expecting": lambda store, each: _save(store, each, expected_version=2),
    "save all": _save_all,
    "save all expecting": lambda store, each: _save_all(store, each, expected_version=2),
    "update": lambda store, each: store.update_entity("items", each, {"label": "ours"}),
    "update expecting": lambda store, each: store.update_entity(
        "items", each, {"label": "ours"}, expected_version=2
    ),
    "increment": lambda store, each: store.update_entity("items", each, {"count": increment(1)}),
    "update where": lambda store, each: store.update_entity(
        "items", each, {"label": "ours"}, condition_expression="attribute_exists(item_id)"
    ),
    "delete": lambda store, each: store.delete_entity("items", each),
    "delete expecting": lambda store, each: store.delete_entity("items", each, expected_version=2),
    "transaction": _transaction,
}

ANSWERS: Final = (
    "good",
    "cut before",
    "cut after",
    "late",
    "500 before",
    "500 after",
    "throttled",
    "conflict",
    "refused",
    "no table",
    "down",
)
RIVALS: Final = ("none", "none", "none", "update", "delete", "new life")


class _Between:
    """Wraps the client of a store, and returns randomly chosen responses."""

    def __init__(self, call: Callable[..., Awaitable[dict[str, Any]]], rival: _Rival) -> None:
        self._call = call
        self._rival = rival
        self.answers: list[tuple[str, str]] = []
        self.late: list[tuple[str, Any]] = []
        self.landed = 0
        self.is_down = False
        self.inserts = False
        self._one_at_a_time = asyncio.Lock()

    async def call(self, operation: str, params: Any) -> dict[str, Any]:
        if self.is_down:
            raise UnavailableError("DynamoDB cannot be reached")
        if operation not in WRITES or not self.answers:
            return await self.pass_on(operation, params)
        answer, rival = self.answers.pop(0)
        try:
            return await self._answer(answer, operation, params)
        finally:
            # After status 500 for an insert, the store reads the entity, and inserts it again if it
            # is missing. A delete in between would not be noticed. Decision 033 accepts that.
            if not (self.inserts and answer == "500 after" and rival != "update"):
                async with self._one_at_a_time:
                    await self._rival.act(rival)

    async def _answer(self, answer: str, operation: str, params: Any) -> dict[str, Any]:
        if answer in ("cut before", "cut after", "late"):
            if answer == "cut after":
                await self._applied(operation, params)
            elif answer == "late":
                self.late.append((operation, params))
            raise ResponseLost("the answer of DynamoDB was lost", outcome_unknown=True)
        if answer in ("500 before", "500 after"):
            if answer == "500 after":
                await self._applied(operation, params)
            raise translate("InternalServerError", "", 500, {})
        if answer == "throttled":
            raise translate("ThrottlingException", "", 400, {})
        if answer == "conflict":
            raise conflict()
        if answer == "refused":
            raise translate("ValidationException", "?", 400, {})
        if answer == "no table":
            raise translate("ResourceNotFoundException", "", 400, {})
        self.is_down = answer == "down"
        if self.is_down:
            raise UnavailableError("DynamoDB cannot be reached")
        return await self.pass_on(operation, params)

    async def _applied(self, operation: str, params: Any) -> None:
        with suppress(StorageError):  # its response is lost, too
            await self.pass_on(operation, params)

    async def pass_on(self, operation: str, params: Any) -> dict[str, Any]:
        if operation not in WRITES:
            return await self._call(operation, params)
        async with self._one_at_a_time:
            before = await self._rival.token()
            try:
                return await self._call(operation, params)
            finally:
                self.landed += await self._rival.token() != before


class _Rival:
    """Another writer of the same entity, without injected faults."""

    def __init__(self, store: DynamoDBStorageStrategy) -> None:
        self._store = store
        self.id = ""

    async def token(self) -> object:
        engine = self._store._dynamodb
        key = {"item_id": {"S": self.id}}
        params = {"TableName": engine.tables.name("items"), "Key": key, "ConsistentRead": True}
        answer = await engine.client.read("GetItem", params)
        return answer.get("Item", {}).get("_w")

    async def act(self, what: str) -> None:
        if what == "none":
            return
        there = await self.token() is not None
        if what == "update" and there:
            await self._store.update_entity("items", self.id, {"count": 1})
        elif what in ("delete", "new life") and there:
            await self._store.delete_entity("items", self.id)
        if what == "new life":
            await self.be_at(2)

    async def be_at(self, version: int) -> None:
        """Delete the entity and create it again, up to this version."""
        await self._store.create_entity("items", {"item_id": self.id, "label": "theirs"})
        for _ in range(version - 1):
            await self._store.update_entity("items", self.id, {"count": 2})


class _Bench:
    def __init__(self, url: str) -> None:
        prefix = new_prefix()
        self.store = store_at(url, prefix, retry_timeout=0.1)
        self.other = store_at(url, prefix)
        self.number = 0

    async def open(self) -> None:
        await self.store.open()
        await self.other.open()
        await self.store.create_entity("items", {"item_id": "first"})
        self.call = self.store._dynamodb.client.call

    async def close(self) -> None:
        await self.store.close()
        await self.other.close()

    async def one(
        self,
        verb: str,
        answers: list[tuple[str, str]],
        among: bool,
        careful: bool,
        there: str,
        later: int,
    ) -> None:
        rival = _Rival(self.other)
        self.number += 1
        rival.id = f"life {self.number}"
        if there == "theirs":
            await rival.be_at(2)
        elif there == "ours":  # the store caches the written token
            await self.store.create_entity("items", {"item_id": rival.id})
            await self.store.update_entity("items", rival.id, {"label": "before"})
        between = _Between(self.call, rival)
        between.answers = answers
        between.inserts = verb in ("create", "save", "save all")
        engine = self.store._dynamodb
        engine.writes._write_cache._disabled_until = 0.0
        engine.writes._read_first_until = float("inf") if careful else 0.0
        engine.client.call = between.call  # type: ignore[method-assign]  # for this example
        work = VERBS[verb](self.store, rival.id)
        beside = [_save(self.store, f"beside {self.number}")] if among else []
        [outcome, *_] = await asyncio.gather(work, *beside, return_exceptions=True)
        # Delete and recreate the entity; then late requests arrive.
        between.is_down = False
        if later:
            await rival.act("delete")
            await rival.be_at(later)
        for operation, params in between.late:
            await between._applied(operation, params)
        engine.client.call = self.call  # type: ignore[method-assign]
        if not isinstance(outcome, BaseException):
            assert between.landed == (outcome is not False), (
                "the write succeeded, but was not applied once"
            )
        elif isinstance(outcome, StorageError):
            assert between.landed <= 1, f"the write was applied {between.landed} times"
            assert outcome.outcome_unknown or not between.landed, (
                f"the write was applied, but failed with {outcome!r}"
            )
        else:
            raise outcome


@pytest.fixture(scope="module")
def bench(dynamodb_server: DynamoDBServer) -> Iterator[tuple[asyncio.Runner, _Bench]]:
    with asyncio.Runner() as runner:
        bench = _Bench(dynamodb_server.endpoint_url)
        runner.run(bench.open())
        yield runner, bench
        runner.run(bench.close())


@pytest.fixture(autouse=True, scope="module")
def short_pauses() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request_retry, "_FIRST_PAUSE", 0.001)
        yield


@pytest.mark.parametrize("verb", VERBS)
@settings(max_examples=60)
@example(answers=[("late", "none")], among=False, careful=False, there="theirs", later=2)
@given(
    answers=st.lists(st.tuples(st.sampled_from(ANSWERS), st.sampled_from(RIVALS)), max_size=4),
    among=st.booleans(),
    careful=st.booleans(),
    there=st.sampled_from(("not", "ours", "theirs")),
    later=st.sampled_from((0, 1, 2, 3)),
)
def test_the_result_of_a_write_is_correct(
    bench: tuple[asyncio.Runner, _Bench],
    verb: str,
    answers: list[tuple[str, str]],
    among: bool,
    careful: bool,
    there: str,
    later: int,
) -> None:
    runner, each = bench
    runner.run(each.one(verb, list(answers), among, careful, there, later))


async def test_a_connection_reset_after_the_request_was_sent(proxy: Proxy) -> None:
    """aiobotocore raises the same error as for a server that cannot be reached."""
    async with store_at(proxy.url) as store:
        await store.create_entity("items", {"item_id": "a"})
        reset = 0

        def rule(request: Request) -> Fault | None:
            nonlocal reset
            if request.operation not in WRITES or reset:
                return None
            reset += 1
            return Cut(applied=True, reset=True)

        for version, verb in ((2, "save"), (3, "update"), (4, "update where")):
            reset = 0
            proxy.rule = rule
            assert await VERBS[verb](store, "a") == version
            assert reset
        reset = 0
        with pytest.raises(UnavailableError) as caught:
            await store.delete_entity("items", "a")
        assert caught.value.outcome_unknown
