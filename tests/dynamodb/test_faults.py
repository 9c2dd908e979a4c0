"""Faults of the network and the service: no write is lost or applied twice, no entity is "missing".

Each task uses its own entities, so the expected state is known: the version is the number of
acknowledged writes, possibly plus writes whose outcome was reported as unknown.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING, Any, Final

import pytest

from hf_async_store import (
    BatchError,
    ClaimLostError,
    ConcurrencyConflictError,
    StorageError,
    ThrottledError,
    UnavailableError,
)
from hf_async_store.claim_clock import boot_seconds
from hf_async_store.testing.concurrency import seeded
from hf_async_store_bench.acked_writes import AckedWrites, writing
from tests.dynamodb.proxy import (
    WRITES,
    Answer,
    Cut,
    Failed,
    Fault,
    Late,
    Partly,
    Proxy,
    Request,
    failed,
    throttled,
)
from tests.dynamodb.support import new_prefix, store_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hf_async_store import Claim, DynamoDBStorageStrategy
    from hf_async_store_bench.servers import DynamoDBServer

pytestmark = pytest.mark.hf_sampled

TASKS: Final = 12
STEPS: Final = 12
_STALL_SECONDS: Final = 20.0


@pytest.fixture
def proxy(dynamodb_server: DynamoDBServer) -> Iterator[Proxy]:
    """A separate proxy: requests that a fault leaves pending must not affect another test."""
    with Proxy(dynamodb_server.endpoint_url) as proxy:
        yield proxy


def _conflict(request: Request) -> Fault:
    if request.operation == "BatchExecuteStatement":
        error = {"Error": {"Code": "TransactionConflict", "Message": "under way"}}
        return Answer(200, {"Responses": [error] * len(request.params["Statements"])})
    if request.operation in ("TransactWriteItems", "TransactGetItems"):
        reasons = [{"Code": "TransactionConflict"}] * len(request.params["TransactItems"])
        return Answer(
            400,
            {
                "__type": "com.amazonaws#TransactionCanceledException",
                "CancellationReasons": reasons,
            },
        )
    return Answer(400, {"__type": "com.amazonaws#TransactionConflictException"})


def _statement_failed(request: Request) -> Fault | None:
    if request.operation != "BatchExecuteStatement":
        return failed()
    error = {"Error": {"Code": "InternalServerError", "Message": "?"}}
    return Answer(200, {"Responses": [error] * len(request.params["Statements"])})


FAULTS: Final[dict[str, Callable[[Request], Fault | None]]] = {
    "throttled": lambda request: throttled(),
    "conflicts": lambda request: _conflict(request) if request.operation in WRITES else None,
    "unprocessed": lambda request: Partly(),
    "500 before": lambda request: failed(),
    "500 after": lambda request: Failed(),
    "500 of a statement": _statement_failed,
    "cut before": lambda request: Cut(applied=False),
    "cut after": lambda request: Cut(applied=True),
    "reset after": lambda request: Cut(applied=True, reset=True),
    "late": lambda request: Late(0.8),
}


class Known:
    """The expected state of one entity."""

    def __init__(self, entity_id: str) -> None:
        self.id = entity_id
        self.versions: set[int] = {0}
        """The versions that it may have; 0 if it may be missing."""
        self.values: set[object] = {None}

    def judge(self, entity: dict[str, Any] | None) -> None:
        version = 0 if entity is None else entity["version"]
        assert version in self.versions, f"{self.id} is at {version}, not {self.versions}"
        if entity is not None:
            assert entity["count"] in self.values, f"{self.id}: {entity}, not {self.values}"

    def landed(self, version: int, value: object) -> None:
        self.versions, self.values = {version}, {value}

    def may_have_landed(self, version: int | None, value: object) -> None:
        more = {0} if version is None else {each + 1 for each in self.versions}
        self.versions |= more
        self.values.add(value)


async def _life(store: DynamoDBStorageStrategy, entity_id: str, random: Random) -> Known:
    known = Known(entity_id)
    for step in range(STEPS):
        try:
            await _step(store, known, random, step)
        except ConcurrencyConflictError as exc:
            assert exc.retryable, "a conflict without another writer must be retryable"
            assert not exc.outcome_unknown
        except StorageError as exc:
            assert isinstance(exc, UnavailableError), repr(exc)
        entity = await store.get_entity("items", entity_id)
        known.judge(entity)
        if len(known.versions) > 1:
            # The write may still be applied later, but it cannot affect another id.
            known = Known(f"{known.id}'")
            entity_id = known.id
    return known


async def _step(store: DynamoDBStorageStrategy, known: Known, random: Random, step: int) -> None:
    [version] = known.versions
    value = random.random()
    entity = {"item_id": known.id, "count": step, "label": "x"}
    kind = random.choice(("save", "update", "expect", "transaction", "delete", "condition"))
    try:
        if not version:
            landed = await (
                store.create_entity("items", entity)
                if value < 0.5
                else store.save_entity("items", entity)
            )
        elif kind == "save":
            landed = await store.save_entity("items", entity)
        elif kind == "update":
            landed = await store.update_entity("items", known.id, {"count": step})
        elif kind == "expect":
            landed = await store.update_entity(
                "items", known.id, {"count": step}, expected_version=version
            )
        elif kind == "condition":
            landed = await store.update_entity(
                "items",
                known.id,
                {"count": step},
                condition_expression="version = :v",
                expression_values={":v": version},
            )
        elif kind == "transaction":
            async with store.begin_transaction() as tx:
                landed = await tx.update_entity("items", known.id, {"count": step})
                await tx.save_entity("counters", {"counter_id": known.id, "count": step})
        else:
            assert await store.delete_entity("items", known.id)
            known.landed(0, None)
            return
    except StorageError as exc:
        if exc.outcome_unknown:
            gone = version and kind == "delete"
            known.may_have_landed(None if gone else version, step)
        raise
    assert landed == version + 1, f"{kind} of {known.id} at {version} made it {landed}"
    known.landed(landed, step)


@pytest.mark.parametrize("name", FAULTS)
async def test_work_under_faults(proxy: Proxy, name: str) -> None:
    with seeded() as random:
        chance = Random(random.random())
        burst = 0

        def rule(request: Request) -> Fault | None:
            nonlocal burst
            if request.operation == "DescribeTable":
                return None
            if not burst and chance.random() < 0.1:
                burst = chance.randrange(1, 4)
            if not burst:
                return None
            burst -= 1
            return FAULTS[name](request)

        async with store_at(proxy.url, read_timeout=0.4, retry_timeout=20) as store:
            await store.create_entity("items", {"item_id": "first"})
            await store.create_entity("counters", {"counter_id": "first"})
            proxy.rule = rule
            lives = await asyncio.gather(
                *(_life(store, f"life {n}", Random(random.random())) for n in range(TASKS))
            )
            proxy.rule = None
            await asyncio.sleep(1 if name == "late" else 0)
            for each in lives:
                each.judge(await store.get_entity("items", each.id))


@pytest.mark.parametrize("name", FAULTS)
async def test_batches_under_faults(proxy: Proxy, name: str) -> None:
    """Each write of a batch is applied once, or reported."""
    ids = [f"{n:03}" for n in range(200)]
    async with store_at(proxy.url, read_timeout=0.4, retry_timeout=20) as store:
        await store.create_entity("items", {"item_id": "first"})
        left = 0

        def rule(request: Request) -> Fault | None:
            nonlocal left
            if left <= 0:
                return None
            left -= 1
            return FAULTS[name](request)

        proxy.rule = rule
        versions = dict.fromkeys(ids, 0)
        unknown: dict[str, int] = dict.fromkeys(ids, 0)
        for verb in ("create", "save", "update", "expect"):
            left = 5
            outcomes = await _batch(store, verb, ids, versions)
            for each, outcome in zip(ids, outcomes, strict=True):
                if isinstance(outcome, StorageError):
                    assert isinstance(outcome, UnavailableError | ConcurrencyConflictError)
                    unknown[each] += outcome.outcome_unknown
                else:
                    assert versions[each] < outcome <= versions[each] + unknown[each] + 1
                    versions[each], unknown[each] = outcome, 0
        left = 5
        found = await store.get_entities("items", ids)
        assert None not in found, "an entity that was not read must not be reported as missing"
        for each, entity in zip(ids, found, strict=True):
            assert entity is not None
            assert versions[each] <= entity["version"] <= versions[each] + unknown[each]
        left = 5
        assert await store.count_entities("items") == len(ids) + 1
        left = 5
        assert len(await store.query_entities("items", {"label": "update"})) <= len(ids)
        left = 5
        imported = await store.import_entities(
            "items", [{"item_id": each, "version": 9} for each in ids]
        )
        assert imported == [9] * len(ids)


async def _batch(
    store: DynamoDBStorageStrategy, verb: str, ids: list[str], versions: dict[str, int]
) -> list[Any]:
    entities = [{"item_id": each, "label": verb} for each in ids]
    updates = {each: {"label": verb} for each in ids}
    try:
        if verb == "create":
            return list(await store.create_entities("items", entities))
        if verb == "save":
            return list(await store.save_entities("items", entities))
        if verb == "update":
            return list(await store.update_entities("items", updates))
        now = await store.get_entities("items", ids)
        for each, entity in zip(ids, now, strict=True):
            assert entity is not None
            versions[each] = int(str(entity["version"]))
        return list(await store.update_entities("items", updates, dict(versions)))
    except BatchError as exc:
        return list(exc.outcomes)


async def test_71_throttling_that_does_not_end_is_reported(proxy: Proxy) -> None:
    async with store_at(proxy.url, retry_timeout=0.3) as store:
        await store.create_entity("items", {"item_id": "a"})
        proxy.rule = lambda request: throttled()
        works = (
            store.get_entity("items", "a"),
            store.get_entities("items", ["a", "b"]),
            store.create_entity("items", {"item_id": "b"}),
            store.save_entity("items", {"item_id": "a"}),
            store.update_entity("items", "a", {}),
            store.delete_entity("items", "a"),
            store.query_entities("items"),
            store.count_entities("items", {"label": "x"}),
        )
        for work in works:
            with pytest.raises(ThrottledError) as caught:
                await work
            assert caught.value.retryable
            assert not caught.value.outcome_unknown
        with pytest.raises(ThrottledError):
            async with store.begin_transaction() as tx:
                await tx.save_entity("items", {"item_id": "a"})
        proxy.rule = None
        entity = await store.get_entity("items", "a")
        assert entity is not None
        assert entity["version"] == 1
        assert await store.get_entity("items", "b") is None


async def test_106_a_claim_whose_response_was_lost_is_recognised(proxy: Proxy) -> None:
    async with store_at(proxy.url) as store:
        await store.create_entity("items", {"item_id": "a"})
        async with store.lock("first"):
            pass

        def rule(request: Request) -> Fault | None:
            if request.operation not in (
                "BatchExecuteStatement",
                "UpdateItem",
                "TransactWriteItems",
            ):
                return None
            proxy.rule = None
            return Cut(applied=True)

        async def claim() -> Claim:
            proxy.rule = rule
            [claim] = await store.claim_entities("items", owner="worker")
            assert proxy.rule is None, "no response was lost"
            proxy.rule = rule
            return claim

        ends: list[Callable[[Claim], Awaitable[None]]] = [
            lambda each: each.release(),
            lambda each: each.release(after=0.0),
            lambda each: each.finish(),
            lambda each: each.finish({"label": "done"}),
            lambda each: each.delete(),
        ]
        for end in ends:
            claimed = await claim()
            await end(claimed)
            assert proxy.rule is None, "no response was lost"
            assert [each.state for each in await store.claims("items")] in ([], ["free"])
            with pytest.raises(ClaimLostError):
                await claimed.renew()
        proxy.rule = rule
        async with store.lock("x", timeout=0.0):
            proxy.rule = rule
        assert await store.claims("hf_locks") == []


async def test_105_a_holder_stops_before_a_clock_that_is_ahead_ends_its_lease(proxy: Proxy) -> None:
    async with store_at(proxy.url, max_clock_skew=5.0) as store:
        await store.create_entity("items", {"item_id": "a"})
        [claim] = await store.claim_entities("items", lease=30.0)
        await claim.renew()
        assert claim.deadline <= boot_seconds() + 25.0


async def test_a_write_whose_response_was_lost_is_recognised(proxy: Proxy) -> None:
    async with store_at(proxy.url) as store:
        await store.create_entity("items", {"item_id": "first"})
        await store.create_entity("counters", {"counter_id": "first"})

        async def losing(work: Any) -> Any:
            def rule(request: Request) -> Fault | None:
                if request.operation not in WRITES:
                    return None
                proxy.rule = None
                return Cut(applied=True)

            proxy.rule = rule
            try:
                return await work
            finally:
                assert proxy.rule is None, "no response was lost"

        item = {"item_id": "a", "label": "new"}
        assert await losing(store.create_entity("items", item)) == 1
        assert await losing(store.save_entity("items", item)) == 2
        assert await losing(store.save_entity("items", item, expected_version=2)) == 3
        assert await losing(store.update_entity("items", "a", {"count": 1})) == 4
        assert await losing(store.update_entity("items", "a", {}, expected_version=4)) == 5
        assert (
            await losing(
                store.update_entity(
                    "items",
                    "a",
                    {},
                    condition_expression="attribute_exists(label)",
                )
            )
            == 6
        )
        assert await losing(store.create_entities("items", [{"item_id": "b"}])) == [1]

        async def transaction() -> int:
            async with store.begin_transaction() as tx:
                await tx.create_entity("counters", {"counter_id": "a"})
                return await tx.update_entity("items", "a", {"count": 2})

        assert await losing(transaction()) == 7
        with pytest.raises(UnavailableError) as caught:
            await losing(store.delete_entity("items", "a"))
        assert caught.value.outcome_unknown, "it cannot be determined whose delete was applied"
        assert await store.get_entity("items", "a") is None


async def test_71_a_stall_ends_with_the_read_timeout(proxy: Proxy) -> None:
    async with store_at(proxy.url, read_timeout=0.3, retry_timeout=5) as store:
        await store.create_entity("items", {"item_id": "a"})
        stalled = 0

        def rule(request: Request) -> Fault | None:
            nonlocal stalled
            if request.is_migration_check:  # the periodic check, sent in between
                return None
            stalled += 1
            return Cut(applied=False, stall=_STALL_SECONDS) if stalled == 1 else None

        for work in (
            lambda: store.get_entity("items", "a"),
            lambda: store.save_entity("items", {"item_id": "a"}, expected_version=1),
            lambda: store.query_entities("items", {"label": "x"}),
            lambda: store.update_entity("items", "a", {}, expected_version=2),
        ):
            stalled = 0
            proxy.rule = rule
            started = asyncio.get_running_loop().time()
            await work()
            assert asyncio.get_running_loop().time() - started < _STALL_SECONDS
            assert stalled > 1
        stalled = 0
        with pytest.raises(UnavailableError) as caught:
            await store.save_entity("items", {"item_id": "a"})
        assert caught.value.outcome_unknown, "the write may still be pending"
        # After such an outcome the store reads first, and can then write again.
        stalled = 0
        assert await store.save_entity("items", {"item_id": "a"}) == 4


async def test_71_a_server_that_cannot_be_reached(proxy: Proxy) -> None:
    async with store_at("http://127.0.0.1:1", retry_timeout=0.2) as store:
        for work in (
            store.get_entity("items", "a"),
            store.create_entity("items", {"item_id": "a"}),
            store.query_entities("items"),
        ):
            with pytest.raises(UnavailableError) as caught:
                await work
            assert caught.value.retryable
            assert not caught.value.outcome_unknown
        report = await store.health()
        assert not report["ok"]
        assert "cannot be reached" in str(report["problems"])


async def test_84_a_server_that_is_unavailable_under_load(
    dynamodb_server: DynamoDBServer,
) -> None:
    """The proxy is stopped instead of the server, which would lose all data."""
    prefix = new_prefix()
    with Proxy(dynamodb_server.endpoint_url) as proxy:
        async with store_at(proxy.url, prefix, retry_timeout=10) as store:
            await store.create_entity("counters", {"counter_id": "c", "n": 0})
            writes = AckedWrites()
            down = asyncio.Event()

            async def work(number: int) -> None:
                for _ in range(20):
                    with suppress(UnavailableError), writing(writes):
                        await store.update_entity("counters", "c", {f"n{number}": 1})
                    if writes.acknowledged > 40 and not down.is_set():
                        down.set()
                        proxy.rule = lambda request: Cut(applied=False)
                        await asyncio.sleep(0.5)
                        proxy.rule = None

            await asyncio.gather(*(work(n) for n in range(16)))
            entity = await store.get_entity("counters", "c")
            assert entity is not None
            assert down.is_set()
            assert writes.wrong_version(int(str(entity["version"])), first=1) is None
