"""Claims on engines in memory: what they remember of the entities that they passed over."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from hf_async_store import (
    Claim,
    ClaimLostError,
    Collection,
    Expire,
    StorageStrategy,
    claim_records,
    desc,
    in_,
    ne,
    open_store,
    passed_over,
)
from hf_async_store.claim_clock import Moment
from hf_async_store.migration_routing import unrouted
from hf_async_store.schema import CLAIM_COLLECTION
from hf_async_store.strategies.memory import MemoryEngine

if TYPE_CHECKING:
    from pathlib import Path

JOBS = [Collection("jobs", key="job_id", fields=["status", "rank"], indexes=["status"])]
_FILTERS: list[dict[str, object]] = [{"status": "new"}, {"status": in_(["new", "begun"])}, {}]
_ORDERS: list[Any] = [None, "rank", desc("rank"), ["status", desc("job_id")]]


class Model:
    """Random changes of a store, and claims, each compared with what a reader of everything expects.

    Args:
        store: what claims.
        other: makes some of the changes: another store with the same entities, or the same.
    """

    def __init__(self, seed: int, store: StorageStrategy, other: StorageStrategy) -> None:
        self.random = Random(seed)
        self.stores = store, other
        self.seconds = 1000.0
        self.era = "first"
        self.claims: list[Claim] = []
        for each in self.stores:
            unrouted(each.engine).claim_clock = self

    def now(self) -> Moment:
        return Moment(self.era, self.seconds)

    async def run(self, steps: int) -> None:
        for _ in range(steps):
            step = self.random.choice([self.change, self.claim, self.claim, self.use, self.wait])
            await step()

    async def change(self) -> None:
        store, entity_id = self.random.choice(self.stores), f"{self.random.randrange(40):02}"
        if self.random.random() < 0.2:
            await store.delete_entity("jobs", entity_id)
            return
        status = self.random.choice(["new", "new", "begun", "done"])
        entity = {"job_id": entity_id, "status": status, "rank": self.random.choice("abcde")}
        await store.save_entity("jobs", entity)

    async def claim(self) -> None:
        store, filters = self.stores[0], self.random.choice(_FILTERS)
        order, limit = self.random.choice(_ORDERS), self.random.choice([1, 1, 2, 7])
        most = self.random.choice([None, None, 2])
        expected = await self._expected(filters, order, limit, most)
        found = await store.claim_entities(
            "jobs",
            filters,
            order_by=order,
            limit=limit,
            lease=self.random.choice([1.0, 5.0, 50.0]),
            max_attempts=most,
        )
        assert [each.id for each in found] == expected
        self.claims += found

    async def _expected(
        self, filters: dict[str, object], order: Any, limit: int, most: int | None
    ) -> list[str]:
        store = self.stores[0]
        matching = await store.query_entities("jobs", filters, order_by=order)
        known = {each.id: each for each in await store.claims("jobs")}
        busy = {
            each.id
            for each in known.values()
            if each.state != "free" or (most is not None and each.attempts >= most)
        }
        return [each["job_id"] for each in matching if each["job_id"] not in busy][:limit]

    async def use(self) -> None:
        if not self.claims:
            return
        claim = self.claims.pop(self.random.randrange(len(self.claims)))
        use = self.random.choice(
            [
                claim.release,
                claim.finish,
                claim.renew,
                claim.delete,
                lambda: claim.release(after=2.0),
                lambda: claim.update({"rank": self.random.choice("abcde")}),
                lambda: self.random.choice(self.stores).break_claim("jobs", claim.id),
            ]
        )
        try:
            await use()
        except ClaimLostError:
            pass

    async def wait(self) -> None:
        self.seconds += self.random.choice([0.5, 2.0, 10.0])
        if self.random.random() < 0.03:
            self.era += "."  # the machine was started again


@pytest.mark.hf_sampled
@pytest.mark.parametrize("most", [passed_over._MOST_CHANGES, 3])
@pytest.mark.parametrize("url", ["memory:", "json:store.json", "json:store.json, two stores"])
async def test_104_the_first_free_entities_are_claimed_whatever_happened_since(
    url: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(passed_over, "_MOST_CHANGES", most)
    monkeypatch.setattr(passed_over, "_MOST_QUERIES", 4)
    seed = Random().randrange(2**32)
    location, _, two = url.partition(",")
    async with open_store(location, collections=JOBS) as store:
        if two:
            async with open_store(location, collections=JOBS) as other:
                await _run(seed, store, other)
        else:
            await _run(seed, store, store)


async def _run(seed: int, store: StorageStrategy, other: StorageStrategy) -> None:
    try:
        await Model(seed, store, other).run(600)
    except BaseException as exc:
        exc.add_note(f"the model with the seed {seed}")
        raise


@pytest.mark.parametrize("url", ["memory:", "json:store.json"])
async def test_104_what_is_held_is_read_once(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    read = claim_records.state_in
    number = 0

    def counted(*args: Any) -> Any:
        nonlocal number
        number += 1
        return read(*args)

    monkeypatch.setattr(claim_records, "state_in", counted)
    expiring = Collection(
        "jobs", key="job_id", fields=["status"], indexes=["status"], expires=Expire("until")
    )
    until = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    async with open_store(url, collections=[expiring]) as store:
        jobs = [{"job_id": f"{each:04}", "status": "new", "until": until} for each in range(700)]
        await store.create_entities("jobs", jobs)
        held = await store.claim_entities("jobs", {"status": "new"}, limit=600, lease=600.0)
        for expected in ["0600", "0601", "0250", "0602", "0000"]:
            number = 0
            [claim] = await store.claim_entities("jobs", {"status": "new"}, lease=600.0)
            assert claim.id == expected
            if expected != "0600":  # that one reads what was free before
                assert number < 40
            if expected == "0601":
                await held[250].release()
            if expected == "0602":
                await store.delete_entity("jobs", "0000")
                await store.create_entity("jobs", jobs[0])


def known_of(store: StorageStrategy) -> list[passed_over.PassedOver]:
    """What is remembered for claims of jobs in memory."""
    engine = unrouted(store.engine)
    assert isinstance(engine, MemoryEngine)
    tables = engine._stored.tables
    found = {
        id(each): each
        for name in ("jobs", CLAIM_COLLECTION.name)
        for each in tables[name].listeners.values()
    }
    return [each for each in found.values() if isinstance(each, passed_over.PassedOver)]


def size_of(over: passed_over.PassedOver) -> int:
    return len(over._of) + len(over._ends) + len(over._free) + len(over._first)


@pytest.mark.parametrize("kind", ["exhausted", "held", "deleted"])
async def test_104_what_is_remembered_does_not_grow_by_changes(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passed_over, "_MOST_CHANGES", 20)
    most = None if kind == "held" else 1
    async with open_store("memory:", collections=JOBS) as store:
        await store.create_entities("jobs", [{"job_id": f"{each:02}"} for each in range(3)])
        held = await store.claim_entities("jobs", limit=3, lease=60.0, max_attempts=most)
        if kind != "held":
            for each in held:
                await each.release()
        for number in range(200):
            if kind == "deleted":
                await store.create_entity("jobs", {"job_id": f"new{number}"})
                [claim] = await store.claim_entities("jobs", lease=60.0, max_attempts=most)
                await claim.release()
            else:
                await store.update_entity("jobs", "01", {"rank": f"{number}"})
            assert await store.claim_entities("jobs", lease=60.0, max_attempts=most) == []
            if kind == "deleted":
                await store.delete_entity("jobs", f"new{number}")
        [over] = known_of(store)
        assert size_of(over) < 60


async def test_104_what_is_remembered_of_many_queries_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(passed_over, "_MOST_QUERIES", 2)
    async with open_store("memory:", collections=JOBS) as store:
        await store.create_entities("jobs", [{"job_id": f"{each:02}"} for each in range(30)])
        await store.claim_entities("jobs", limit=30, lease=60.0)
        for number in range(10):
            filters = {"status": ne(f"{number}")}
            assert await store.claim_entities("jobs", filters, lease=60.0) == []
        assert len([each for each in known_of(store) if size_of(each)]) == 2
