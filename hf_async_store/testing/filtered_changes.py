"""Case 101: changes of all entities that match a filter."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import pytest

from hf_async_store.errors import (
    ConcurrencyConflictError,
    EntityNotFoundError,
    InvalidFieldError,
    InvalidQueryError,
    PartialChangeError,
    ReferenceViolationError,
    TransactionAbortedError,
    TransactionTooLargeError,
)
from hf_async_store.field_operations import add_to_set, append, increment
from hf_async_store.query import eq, gte, lt, not_, path
from hf_async_store.testing.assertions import all_refused_at_once, get_existing, payload
from hf_async_store.testing.concurrency import seeded
from hf_async_store.testing.field_operations import TASKS
from hf_async_store.testing.process_workers import run_workers
from hf_async_store.testing.repetitions import repetitions
from hf_async_store.values import REMOVE, version_of

if TYPE_CHECKING:
    from random import Random

    from hf_async_store.query import Path
    from hf_async_store.repository import RepositoryInterface
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.harness import Harness

# Undeclared fields: no index, which may lag behind, serves these filters.
_STATE: Final = path("state")
_RANK: Final = path("rank")
_PENDING: Final[dict[Path, object]] = {_STATE: "PENDING"}


async def _create(store: RepositoryInterface, number: int, state: str = "PENDING") -> list[str]:
    """Create this number of jobs, whose ranks are in the reverse order of their ids."""
    ids = [f"{each:04}" for each in range(number)]
    await store.create_entities(
        "counters",
        [
            {"counter_id": each, "state": state, "rank": number - place}
            for place, each in enumerate(ids)
        ],
    )
    return ids


async def _states(store: RepositoryInterface) -> dict[str, object]:
    return {
        str(each["counter_id"]): each["state"]
        for each in await store.query_entities("counters", order_by="counter_id")
    }


class FilteredChangeContract:
    """What `update_where` and `delete_where` guarantee."""

    async def test_101_exactly_the_matches_are_changed(self, store: StorageStrategy) -> None:
        ids = await _create(store, 10)
        assert await store.update_where("counters", {_RANK: gte(8)}, {"state": "RUNNING"}) == 3
        states = await _states(store)
        assert [each for each in ids if states[each] == "RUNNING"] == ids[:3]
        assert await store.update_where("counters", {_STATE: "NO SUCH"}, {"state": "x"}) == 0
        changes = {"state": REMOVE, path("log", "by"): append("x"), "rank": increment(100)}
        assert await store.update_where("counters", {_STATE: "RUNNING"}, changes) == 3
        assert payload(await store.get_entity("counters", ids[0])) == {
            "counter_id": ids[0],
            "rank": 110,
            "log": {"by": ["x"]},
        }
        assert (await get_existing(store, "counters", ids[0]))["version"] == 3
        assert (await get_existing(store, "counters", ids[9]))["version"] == 1
        assert await store.delete_where("counters", {_RANK: lt(4)}) == 3
        assert await store.delete_where("counters", None) == 7
        assert await store.delete_where("counters", None) == 0

    async def test_101_order_and_limit(self, store: StorageStrategy) -> None:
        ids = await _create(store, 10)
        change = {"state": "RUNNING"}
        done = await store.update_where("counters", _PENDING, change, order_by=_RANK, limit=3)
        assert done == 3
        states = await _states(store)
        assert [each for each in ids if states[each] == "RUNNING"] == ids[-3:]
        assert await store.update_where("counters", _PENDING, change, limit=0) == 0
        assert await store.delete_where("counters", _PENDING, order_by="-counter_id", limit=2) == 2
        assert set(await _states(store)) == set(ids) - set(ids[5:7])
        deleted = await store.delete_where(
            "counters", _PENDING, order_by="counter_id", limit=2, returning=True
        )
        assert [each["counter_id"] for each in deleted] == ids[:2]
        assert payload(deleted[0]) == {"counter_id": ids[0], "state": "PENDING", "rank": 10}
        assert deleted[0]["version"] == 1

    async def test_101_the_first_of_an_indexed_order(self, store: StorageStrategy) -> None:
        """Some values are so long, or of such a type, that an index alone may not tell their order."""
        if store.capabilities.query_isolation == "eventual":
            pytest.skip("queries are eventually consistent")
        long = "x" * 300
        labels = ["a", "b", long, f"{long}1", f"{long}0", None, "", "é", "c"]
        with seeded() as random:
            for _ in range(repetitions(5)):
                values = [(random.choice(labels), random.randrange(3)) for _ in range(20)]
                random.shuffle(labels)
                items: list[dict[str, object]] = [
                    {"item_id": f"{n:02}", "label": label, "count": count, "data": {"n": n}}
                    for n, (label, count) in enumerate(values)
                ]
                items[0].pop("label")
                items[1]["data"] = "y" * 30_000
                await store.save_entities("items", items)
                order: list[str] = random.choice([["label"], ["-label"], ["count", "label"], []])
                filters: Any = random.choice(
                    [None, {"count": 1}, {"count": gte(1)}, {"label": "b"}]
                )
                limit = random.randrange(1, 8)
                before = await store.query_entities("items", filters, order)
                change: dict[str, Any] = random.choice(
                    [{"ratio": 1.5}, {"count": 7}, {"label": REMOVE}]
                )
                done = await store.update_where(
                    "items", filters, change, order_by=order, limit=limit
                )
                assert done == min(limit, len(before))
                for place, old in enumerate(before):
                    new = await get_existing(store, "items", str(old["item_id"]))
                    changes = change if place < limit else {}
                    expected = {**(payload(old) or {}), **changes}
                    assert payload(new) == {k: v for k, v in expected.items() if v is not REMOVE}
                    assert version_of(new) == version_of(old) + (place < limit)

    async def test_101_each_entity_once_although_the_change_moves_it_in_the_order(
        self, store: StorageStrategy
    ) -> None:
        """More entities than there are in a batch; each change moves its entity to the end."""
        number = 700
        await _create(store, number)
        change = {"rank": increment(number)}
        assert await store.update_where("counters", None, change, order_by=_RANK) == number
        ranks = [each["rank"] for each in await store.query_entities("counters", order_by=_RANK)]
        assert ranks == list(range(number + 1, 2 * number + 1))
        assert await store.delete_where("counters", {_RANK: gte(number + 1)}) == number

    async def test_101_several_tasks_share_the_matches(self, store: StorageStrategy) -> None:
        number, limit = repetitions(60), 7
        await _create(store, number)

        async def take(task: int) -> int:
            done = 0
            while True:
                taken = await store.update_where(
                    "counters",
                    _PENDING,
                    {"state": "RUNNING", "by": append(task)},
                    order_by=_RANK,
                    limit=limit,
                )
                assert taken <= limit
                done += taken
                if not taken:
                    return done

        counts = await asyncio.gather(*map(take, range(6)))
        assert sum(counts) == number
        jobs = await store.query_entities("counters")
        assert all(len(each["by"]) == 1 for each in jobs)  # type: ignore[arg-type]
        taken_by = [each["by"][0] for each in jobs]  # type: ignore[index]
        assert [taken_by.count(task) for task in range(6)] == counts

    async def test_101_64_tasks_take_one_each(self, store: StorageStrategy) -> None:
        ids = await _create(store, 16)

        async def take(task: int) -> int:
            change = {"state": "RUNNING", "by": append(task)}
            return await store.update_where("counters", _PENDING, change, order_by=_RANK, limit=1)

        taken = await asyncio.gather(*map(take, range(TASKS)))
        assert sorted(taken) == [0] * (TASKS - len(ids)) + [1] * len(ids)
        jobs = await store.query_entities("counters")
        takers = [each["by"] for each in jobs]
        assert sorted(takers) == [[task] for task, number in enumerate(taken) if number]  # type: ignore[type-var]

    @pytest.mark.parametrize("verb", ["update", "delete"])
    async def test_101_several_processes_share_the_matches(
        self, harness: Harness, store: StorageStrategy, verb: str
    ) -> None:
        url = harness.url() if harness.capabilities.multi_process else None
        if url is None:
            pytest.skip("the engine does not declare multi_process")
        number = repetitions(16)
        await _create(store, number)
        names = [f"w{each}" for each in range(8)]
        counts = await run_workers(
            url, *[("take-matching", {"name": each, "verb": verb, "limit": 3}) for each in names]
        )
        assert sum(counts) == number
        jobs = await store.query_entities("counters")
        takers = [each["by"] for each in jobs]
        if verb == "delete":
            assert takers == []
        else:
            assert [takers.count([each]) for each in names] == counts

    async def test_101_what_stops_matching_is_never_deleted(self, store: StorageStrategy) -> None:
        with seeded() as random:
            for _ in range(repetitions(5)):
                ids = await _create(store, 30)
                kept, _ = await asyncio.gather(
                    _keep_some(store, random, ids), store.delete_where("counters", _PENDING)
                )
                await store.delete_where("counters", _PENDING)
                assert await _states(store) == dict.fromkeys(sorted(kept), "KEPT")
                await store.delete_where("counters", None)

    async def test_101_the_first_failure_ends_it(self, store: StorageStrategy) -> None:
        ids = await _create(store, 5)
        await store.update_entity("counters", ids[3], {"rank": "none"})
        with pytest.raises(PartialChangeError) as caught:
            await store.update_where(
                "counters", None, {"rank": increment(1)}, order_by="counter_id"
            )
        assert isinstance(caught.value.cause, InvalidFieldError)
        assert caught.value.__cause__ is caught.value.cause
        found = await store.get_entities("counters", ids)
        changed = [each and each["version"] for each in found]
        assert changed.count(2) == caught.value.done + 1
        assert changed[3] == 2

    async def test_101_a_parent_with_children_ends_it(self, store: StorageStrategy) -> None:
        if not store.capabilities.references:
            pytest.skip("the engine does not enforce references")
        await store.create_entities("templates", [{"template_id": each} for each in "abc"])
        await store.create_entity("requests", {"request_id": "r", "template_id": "b"})
        with pytest.raises(PartialChangeError) as caught:
            await store.delete_where("templates", None, order_by="template_id", returning=True)
        assert isinstance(caught.value.cause, ReferenceViolationError)
        assert len(caught.value.entities) == caught.value.done
        assert await store.get_entity("templates", "b") is not None
        assert await store.count_entities("templates") == 3 - caught.value.done

    async def test_101_in_a_transaction_all_or_nothing(self, store: StorageStrategy) -> None:
        if store.capabilities.queries_in_transaction == "outside":
            pytest.skip("queries are not part of a transaction")
        ids = await _create(store, 6)
        async with store.begin_transaction() as tx:
            await tx.update_entity("counters", ids[0], {"state": "OTHER"})
            await tx.create_entity("counters", {"counter_id": "new", "state": "PENDING"})
            change = {"state": "RUNNING", "by": add_to_set(1)}
            assert await tx.update_where("counters", _PENDING, change, limit=4) == 4
            assert await tx.update_where("counters", _PENDING, change) == 2
            assert await tx.update_where("counters", _PENDING, change) == 0
            deleted = await tx.delete_where("counters", {_STATE: "OTHER"}, returning=True)
            assert [each["counter_id"] for each in deleted] == [ids[0]]
        assert await _states(store) == dict.fromkeys([*ids[1:], "new"], "RUNNING")
        await store.update_entity("counters", ids[3], {"by": "none"})
        with pytest.raises(TransactionAbortedError):
            async with store.begin_transaction() as tx:
                with pytest.raises(InvalidFieldError):
                    await tx.update_where("counters", None, {"by": append(2), "state": "x"})
        assert set((await _states(store)).values()) == {"RUNNING"}

    async def test_101_more_than_fit_into_a_transaction(self, store: StorageStrategy) -> None:
        most = store.capabilities.max_transaction_changes
        if most is None:
            pytest.skip("the engine declares no such limit")
        await _create(store, most + 1)
        with pytest.raises(TransactionTooLargeError):
            async with store.begin_transaction() as tx:
                await tx.delete_where("counters", None)
        assert await store.delete_where("counters", None) == most + 1

    async def test_101_arguments_are_refused_before_io(self, store: StorageStrategy) -> None:
        wrong: Any = "PENDING"
        wrong_order: Any = 5
        all_refused_at_once(
            InvalidQueryError,
            store.update_where("items", wrong, {"label": "x"}),
            store.update_where("items", None, {"label": "x"}, limit=-1),
            store.update_where("items", None, {"label": "x"}, order_by=wrong_order),
            store.delete_where("items", wrong),
            store.delete_where("items", None, limit=-1),
        )
        all_refused_at_once(InvalidFieldError, store.update_where("items", None, {"count": "x"}))

    async def test_101_deleted_meanwhile_is_no_failure(self, store: StorageStrategy) -> None:
        ids = await _create(store, 40)
        changed, deleted, _ = await asyncio.gather(
            store.update_where("counters", not_({_STATE: "x"}), {"seen": True}),
            store.delete_where("counters", {_STATE: eq("PENDING")}),
            store.delete_entities("counters", ids[::2]),
        )
        assert changed <= len(ids)
        assert deleted <= len(ids)
        assert await store.delete_where("counters", None) == 0


async def _keep_some(store: StorageStrategy, random: Random, ids: list[str]) -> set[str]:
    """Change some of the jobs that still exist, one after another; returns their ids."""
    kept: set[str] = set()
    for entity_id in random.sample(ids, 15):
        job = await store.get_entity("counters", entity_id)
        if job is not None:
            try:
                await store.update_entity(
                    "counters", entity_id, {"state": "KEPT"}, expected_version=version_of(job)
                )
            except (ConcurrencyConflictError, EntityNotFoundError):
                continue
            kept.add(entity_id)
    return kept
