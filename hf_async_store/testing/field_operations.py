"""Cases 100 and 130: changes computed from stored values, and the entities that writes return."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import pytest

from hf_async_store.changes import ABSENT, Patch
from hf_async_store.errors import (
    BatchError,
    ConcurrencyConflictError,
    EntityNotFoundError,
    InvalidFieldError,
    StorageError,
    TransactionAbortedError,
    UnsupportedValueError,
)
from hf_async_store.field_operations import (
    add_to_set,
    append,
    increment,
    read_update,
    remove_from_set,
)
from hf_async_store.query import path
from hf_async_store.testing.assertions import (
    all_refused_at_once,
    get_existing,
    payload,
    typed,
)
from hf_async_store.testing.harness import DropsResponses, Harness, skip_fault
from hf_async_store.testing.process_workers import run_workers
from hf_async_store.testing.repetitions import repetitions
from hf_async_store.values import INT_MAX, INT_MIN, REMOVE, UPDATED_AT, Key, utc_now

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hf_async_store.field_operations import UpdateMap
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.values import Entity

TASKS: Final = 64

# Stored fields, the update, and the fields afterwards; None if the update is refused.
_Case: TypeAlias = "tuple[dict[str, Any], dict[Any, object], dict[str, Any] | None]"

_OPERATIONS: Final[tuple[_Case, ...]] = (
    ({}, {"n": increment()}, {"n": 1}),
    ({"n": 5}, {"n": increment(-7)}, {"n": -2}),
    ({"n": INT_MAX - 1}, {"n": increment(1)}, {"n": INT_MAX}),
    ({"n": INT_MAX}, {"n": increment(1)}, None),
    ({"n": INT_MIN}, {"n": increment(-1)}, None),
    ({"n": 1.0}, {"n": increment(1)}, None),
    ({"n": True}, {"n": increment(1)}, None),
    ({"n": None}, {"n": increment(1)}, None),
    ({"n": "1"}, {"n": increment(1)}, None),
    ({"n": [1]}, {"n": increment(1)}, None),
    ({"count": 2}, {"count": increment(3)}, {"count": 5}),
    ({"ratio": 2}, {"ratio": increment(3)}, {"ratio": 5}),
    ({"ratio": 2.5}, {"ratio": increment(3)}, None),
    ({"data": 2}, {"data": increment(3)}, {"data": 5}),
    ({}, {"l": append("x")}, {"l": ["x"]}),
    ({"l": [1]}, {"l": append([2])}, {"l": [1, [2]]}),
    ({"data": []}, {"data": append({"a": None})}, {"data": [{"a": None}]}),
    ({"l": "x"}, {"l": append("x")}, None),
    ({"l": None}, {"l": append("x")}, None),
    ({"l": {}}, {"l": append("x")}, None),
    ({}, {"l": add_to_set(1)}, {"l": [1]}),
    ({"l": [1, True, "1"]}, {"l": add_to_set(1.0)}, {"l": [1, True, "1"]}),
    ({"l": [True]}, {"l": add_to_set(1)}, {"l": [True, 1]}),
    ({"l": [{"a": [1]}]}, {"l": add_to_set({"a": [1.0]})}, {"l": [{"a": [1]}]}),
    ({"l": 1}, {"l": add_to_set(1)}, None),
    ({}, {"l": remove_from_set(1)}, {}),
    ({"l": [1, True, 1.0, "1"]}, {"l": remove_from_set(1)}, {"l": [True, "1"]}),
    ({"l": [None]}, {"l": remove_from_set(None)}, {"l": []}),
    ({"l": 1}, {"l": remove_from_set(1)}, None),
    ({"n": 1, "m": 2}, {"n": increment(), "m": 5, "o": append(1)}, {"n": 2, "m": 5, "o": [1]}),
)

_NESTED: Final[tuple[_Case, ...]] = (
    ({}, {path("a", "b", "c"): 1}, {"a": {"b": {"c": 1}}}),
    (
        {"a": {"x": 1, "b": {"y": 2}}},
        {path("a", "b", "c"): None},
        {"a": {"x": 1, "b": {"y": 2, "c": None}}},
    ),
    ({"a": {"x": 1}}, {path("a", "x"): REMOVE}, {"a": {}}),
    ({"a": {"x": 1}}, {path("a", "y", "z"): REMOVE}, {"a": {"x": 1}}),
    ({}, {path("a", "y"): REMOVE}, {}),
    ({"a": {"n": 1}}, {path("a", "n"): increment(2)}, {"a": {"n": 3}}),
    ({}, {path("a", "n"): increment(2)}, {"a": {"n": 2}}),
    ({}, {path("a", "n"): remove_from_set(2)}, {}),
    ({"a": {"n": "x"}}, {path("a", "n"): increment(2)}, None),
    ({"a": 1}, {path("a", "b"): 1}, None),
    ({"a": None}, {path("a", "b"): 1}, None),
    ({"a": [1]}, {path("a", "b"): 1}, None),
    ({"a": 1}, {path("a", "b"): REMOVE}, None),
    ({"data": [{"s": 1}, {"s": 2}]}, {path("data", 1, "s"): 3}, {"data": [{"s": 1}, {"s": 3}]}),
    ({"data": [1]}, {path("data", 1): 3}, None),
    ({"data": {}}, {path("data", 0): 3}, None),
    ({}, {path("data", 0): 3}, None),
    ({"data": [1, 2]}, {path("data", 0): 3, path("data", 1): 4}, {"data": [3, 4]}),
    ({"a.b": 1}, {path("a", "b"): 2, path("c", "d.e"): 3}, {"a": {"b": 2}, "c": {"d.e": 3}}),
    ({"b": 1}, {path("b"): 2}, {"b": 2}),
    ({"b": 1}, {path("b"): REMOVE}, {}),
)


def _after(case: _Case) -> dict[str, Any]:
    stored, _, expected = case
    return stored if expected is None else {**_unchanged(case), **expected}


def _unchanged(case: _Case) -> dict[str, Any]:
    """The stored fields that the update does not name."""
    stored, update, _ = case
    named = {key if isinstance(key, str) else key.parts[0] for key in update}
    return {name: each for name, each in stored.items() if name not in named}


async def _singly(store: StorageStrategy, updates: dict[str, UpdateMap]) -> list[object]:
    return await asyncio.gather(
        *(store.update_entity("items", each, fields) for each, fields in updates.items()),
        return_exceptions=True,
    )


async def _together(store: StorageStrategy, updates: dict[str, UpdateMap]) -> list[object]:
    try:
        return list(await store.update_entities("items", updates))
    except BatchError as exc:
        return list(exc.outcomes)


async def _in_transactions(store: StorageStrategy, updates: dict[str, UpdateMap]) -> list[object]:
    results: list[object] = []
    for entity_id, fields in updates.items():
        try:
            async with store.begin_transaction() as tx:
                results.append(await tx.update_entity("items", entity_id, fields))
        except StorageError as exc:
            results.append(exc)
    return results


_WAYS: Final[
    dict[str, Callable[[StorageStrategy, dict[str, UpdateMap]], Awaitable[list[object]]]]
] = {"singly": _singly, "together": _together, "in transactions": _in_transactions}


class FieldOperationContract:
    """What field operations, nested changes, defaults and returned entities guarantee."""

    # 100 ------------------------------------------------------------------------------------

    @pytest.mark.parametrize("way", _WAYS)
    @pytest.mark.parametrize("cases", [_OPERATIONS, _NESTED], ids=["operations", "nested"])
    async def test_100_operations_and_nested_changes(
        self, store: StorageStrategy, cases: tuple[_Case, ...], way: str
    ) -> None:
        ids = [f"{number:02}" for number in range(len(cases))]
        await store.create_entities(
            "items",
            [{"item_id": each, **case[0]} for each, case in zip(ids, cases, strict=True)],
        )
        updates: dict[str, UpdateMap] = dict(zip(ids, (case[1] for case in cases), strict=True))
        answers = await _WAYS[way](store, updates)
        expected = [InvalidFieldError if case[2] is None else int for case in cases]
        assert list(map(type, answers)) == expected
        found = await store.get_entities("items", ids)
        for entity_id, case, entity in zip(ids, cases, found, strict=True):
            assert entity is not None
            assert typed(payload(entity)) == typed({"item_id": entity_id, **_after(case)}), case
            assert entity["version"] == (1 if case[2] is None else 2)

    async def test_100_operations_that_no_entity_allows_are_refused_before_io(
        self, store: StorageStrategy
    ) -> None:
        refused: list[dict[Any, object]] = [
            {"n": increment(1.5)},  # type: ignore[arg-type]
            {"n": increment("1")},  # type: ignore[arg-type]
            {"n": increment(True)},
            {"label": increment(1)},
            {"due_at": append(1)},
            {"active": add_to_set(True)},
            {"count": append(1)},
            {path("label", "x"): 1},
            {"item_id": append("x")},
            {path("item_id", "x"): 1},
            {"version": increment(1)},
            {path("a", "b"): 1, "a": {}},
            {path("a", "b"): 1, path("a", "b", "c"): 2},
            {path("a"): 1, "a": 2},
            {path("data", 0): REMOVE},
            {path(): 1},
        ]
        all_refused_at_once(
            InvalidFieldError,
            *(store.update_entity("items", "a", each) for each in refused),
            store.update_where("items", None, {"label": increment(1)}),
            store.update_where("items", None, {"item_id": "b"}),
        )
        all_refused_at_once(
            UnsupportedValueError,
            store.create_entity("items", {"item_id": "a", "n": increment(1)}),
            store.update_entity("items", "a", {"n": [increment(1)]}),
            store.update_entity("items", "a", {"n": append({1})}),
            store.update_entity("items", "a", {"n": increment(2**63)}),
        )

    async def test_100_the_preconditions_of_an_update_hold(self, store: StorageStrategy) -> None:
        with pytest.raises(EntityNotFoundError):
            await store.update_entity("items", "a", {"n": increment()})
        assert await store.get_entity("items", "a") is None
        await store.create_entity("items", {"item_id": "a"})
        with pytest.raises(ConcurrencyConflictError):
            await store.update_entity("items", "a", {"n": increment()}, expected_version=2)
        assert await store.update_entity("items", "a", {"n": increment()}, expected_version=1) == 2
        assert payload(await store.get_entity("items", "a")) == {"item_id": "a", "n": 1}

    async def test_100_size_and_depth_are_limited(self, store: StorageStrategy) -> None:
        piece = "x" * 110_000
        await store.create_entity("items", {"item_id": "a", "l": [piece] * 3})
        with pytest.raises(UnsupportedValueError):
            await store.update_entity("items", "a", {"l": append(piece)})
        deep: Any = []
        for _ in range(28):
            deep = [deep]
        await store.update_entity("items", "a", {path("d", "e"): deep})
        with pytest.raises(UnsupportedValueError, match=r"^f"):
            await store.update_entity("items", "a", {path("f", "e", "g", "h"): deep})
        assert await store.update_entity("items", "a", {"n": increment()}) == 3

    async def test_100_the_same_entity_several_times_in_a_batch(
        self, store: StorageStrategy
    ) -> None:
        await store.create_entities("counters", [{"counter_id": each} for each in "ab"])
        declared = store.collections["counters"]

        at = utc_now()
        updates = [
            Patch(
                Key("counters", entity_id),
                {**read_update(declared, entity_id, fields), UPDATED_AT: at},
                at,
            )
            for entity_id, fields in (
                ("a", {"n": increment(1)}),
                ("b", {"n": increment(10), "log": append(1)}),
                ("a", {"n": increment(2), "log": append(1)}),
                ("a", {"n": "text"}),
                ("a", {"n": increment(3)}),
                ("a", {"n": 7}),
                ("a", {"n": increment(4), "log": append(2)}),
            )
        ]
        outcomes = await store.engine.write_each(updates)
        assert [each if isinstance(each, int) else type(each) for each in outcomes] == [
            2,
            2,
            3,
            4,
            InvalidFieldError,
            5,
            6,
        ]
        found = await store.get_entities("counters", ["a", "b"])
        assert [each and (each["n"], each["log"]) for each in found] == [(11, [1, 2]), (10, [1])]

    async def test_100_operations_in_one_transaction(self, store: StorageStrategy) -> None:
        await store.create_entities("counters", [{"counter_id": each} for each in "ab"])
        async with store.begin_transaction() as tx:
            await tx.update_entity("counters", "a", {"n": increment(2)})
            await tx.update_entity("counters", "a", {"n": increment(3), path("m", "x"): append(1)})
            assert payload(await tx.get_entity("counters", "a")) == {
                "counter_id": "a",
                "n": 5,
                "m": {"x": [1]},
            }
            await tx.create_entity("counters", {"counter_id": "c"})
            await tx.update_entities("counters", {each: {"n": increment(1)} for each in "abc"})
        found = await store.get_entities("counters", [*"abc"])
        assert [each and each["n"] for each in found] == [6, 1, 1]
        with pytest.raises(TransactionAbortedError):
            async with store.begin_transaction() as tx:
                await tx.update_entity("counters", "a", {"n": increment(1)})
                with pytest.raises(InvalidFieldError):
                    await tx.update_entity("counters", "a", {"n": append(1)})
        assert (await get_existing(store, "counters", "a"))["n"] == 6

    async def test_100_no_increment_of_many_tasks_is_lost(self, store: StorageStrategy) -> None:
        times = repetitions(5)
        await store.create_entity("counters", {"counter_id": "sum"})

        async def count(number: int) -> None:
            for _ in range(times):
                await store.update_entity(
                    "counters", "sum", {"n": increment(1), "by": add_to_set(number)}
                )

        await asyncio.gather(*map(count, range(TASKS)))
        counter = await get_existing(store, "counters", "sum")
        assert (counter["n"], counter["version"]) == (TASKS * times, TASKS * times + 1)
        assert sorted(counter["by"]) == list(range(TASKS))  # type: ignore[arg-type, type-var]

    async def test_100_no_increment_of_several_processes_is_lost(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        url = harness.url() if harness.capabilities.multi_process else None
        if url is None:
            pytest.skip("the engine does not declare multi_process")
        times, processes = repetitions(25), 8
        await store.create_entity("counters", {"counter_id": "sum"})
        work = {"counter_id": "sum", "times": times}
        results = await run_workers(url, *[("operations", work)] * processes)
        counter = await get_existing(store, "counters", "sum")
        total = processes * times
        assert (counter["n"], counter["version"]) == (total, total + 1)
        assert sorted(each for result in results for each in result) == list(range(2, total + 2))

    async def test_100_an_increment_without_a_response_is_applied_once(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        if not isinstance(harness, DropsResponses):
            skip_fault(harness, DropsResponses)
        await store.create_entity("counters", {"counter_id": "sum"})
        await store.get_entity("counters", "sum")
        harness.lose_next_answer()
        try:
            await store.update_entity("counters", "sum", {"n": increment(1)})
        except StorageError as exc:
            assert exc.outcome_unknown
        counter = await get_existing(store, "counters", "sum")
        assert (counter["n"], counter["version"]) == (1, 2)

    # 130 ------------------------------------------------------------------------------------

    async def test_130_modify_creates_from_a_default(self, store: StorageStrategy) -> None:
        default = {"n": 10, "l": []}

        def add(entity: Entity) -> Entity:
            entity["n"] += 1  # type: ignore[operator]
            return entity

        assert await store.modify_entity("counters", "a", add, default=default) == 1
        assert await store.modify_entity("counters", "a", add, default=default) == 2
        assert default == {"n": 10, "l": []}
        expected = {"counter_id": "a", "n": 12, "l": []}
        assert payload(await store.get_entity("counters", "a")) == expected
        async with store.begin_transaction() as tx:
            assert await tx.modify_entity("counters", "b", add, default=default) == 1
            assert await tx.modify_entity("counters", "b", add, default=default) == 2
        with pytest.raises(EntityNotFoundError):
            await store.modify_entity("counters", "c", add)
        all_refused_at_once(
            InvalidFieldError, store.modify_entity("items", "c", add, default={"count": "x"})
        )
        wrong: Any = [("n", 0)]
        all_refused_at_once(
            UnsupportedValueError,
            store.modify_entity("items", "c", add, default=wrong),
            store.update_entity("items", "c", wrong),
            store.update_where("items", None, wrong),
        )

    async def test_130_many_tasks_modify_a_missing_entity(self, store: StorageStrategy) -> None:
        def add(entity: Entity) -> Entity:
            return {**entity, "n": entity["n"] + 1}  # type: ignore[operator]

        versions = await asyncio.gather(
            *(store.modify_entity("counters", "a", add, default={"n": 0}) for _ in range(20))
        )
        assert sorted(versions) == list(range(1, 21))
        assert (await get_existing(store, "counters", "a"))["n"] == 20

    async def test_130_modify_begins_with_the_default_after_a_deletion(
        self, store: StorageStrategy
    ) -> None:
        seen: list[object] = []

        async def add(entity: Entity) -> Entity:
            seen.append(entity["n"])
            await store.delete_entity("counters", "a")  # as another task might meanwhile
            return {**entity, "n": entity["n"] + 1}  # type: ignore[operator]

        await store.create_entity("counters", {"counter_id": "a", "n": 7})
        assert await store.modify_entity("counters", "a", add, default={"n": 0}) == 1
        assert seen == [7, 0]
        with pytest.raises(EntityNotFoundError):
            await store.modify_entity("counters", "a", add)

    async def test_130_create_if_absent(self, store: StorageStrategy) -> None:
        await store.create_entity("items", {"item_id": "a", "label": "old"})
        new = [{"item_id": each, "label": "new"} for each in "abcb"]
        created = await store.create_entities("items", new, if_absent=True)
        assert created == [False, True, True, False]
        async with store.begin_transaction() as tx:
            await tx.create_entity("items", {"item_id": "d"})
            more = [{"item_id": each, "label": "new"} for each in "adee"]
            assert await tx.create_entities("items", more, if_absent=True) == [
                False,
                False,
                True,
                False,
            ]
        assert await store.create_entities("items", [], if_absent=True) == []
        found = await store.get_entities("items", [*"abcde"])
        assert [each and each.get("label") for each in found] == ["old", "new", "new", None, "new"]
        assert [each and each["version"] for each in found] == [1] * 5

    async def test_130_each_entity_is_created_by_one_of_many_tasks(
        self, store: StorageStrategy
    ) -> None:
        ids = [f"{number:02}" for number in range(20)]

        async def create(number: int) -> list[bool]:
            entities = [{"item_id": each, "count": number} for each in ids]
            return await store.create_entities("items", entities, if_absent=True)

        created = await asyncio.gather(*map(create, range(10)))
        assert [sum(each) for each in zip(*created, strict=True)] == [1] * len(ids)
        found = await store.get_entities("items", ids)
        winners = [each.index(True) for each in zip(*created, strict=True)]
        assert [each and each["count"] for each in found] == winners

    async def test_130_updates_return_the_entity_as_written(self, store: StorageStrategy) -> None:
        await store.create_entities("items", [{"item_id": each, "data": [1]} for each in "ab"])
        change = {"data": append(2), "label": "x", path("u", "v"): 1}
        written = await store.update_entity("items", "a", change, returning=True)
        assert typed(written) == typed(await store.get_entity("items", "a"))
        written["data"].append(3)  # type: ignore[union-attr]
        assert (await get_existing(store, "items", "a"))["data"] == [1, 2]
        pair = await store.update_entities(
            "items", {"b": {"count": 2}, "a": {"count": 1}}, {"a": 2}, returning=True
        )
        assert typed(pair) == typed(await store.get_entities("items", [*"ba"]))
        modified = await store.modify_entity(
            "items", "a", lambda each: {**each, "count": 5}, returning=True
        )
        assert typed(modified) == typed(await store.get_entity("items", "a"))
        created = await store.modify_entity(
            "items", "c", lambda each: each, default={"label": "new"}, returning=True
        )
        assert typed(created) == typed(await store.get_entity("items", "c"))
        async with store.begin_transaction() as tx:
            written = await tx.update_entity("items", "a", {"count": increment()}, returning=True)
            assert (written["count"], written["version"]) == (6, 5)
            written = await tx.update_entity("items", "a", {"count": increment()}, returning=True)
        assert typed(written) == typed(await store.get_entity("items", "a"))

    async def test_130_errors_of_updates_that_return_entities(self, store: StorageStrategy) -> None:
        await store.create_entity("items", {"item_id": "a"})
        with pytest.raises(EntityNotFoundError):
            await store.update_entity("items", "x", {"count": 1}, returning=True)
        with pytest.raises(ConcurrencyConflictError):
            await store.update_entity(
                "items", "a", {"count": 1}, expected_version=2, returning=True
            )
        with pytest.raises(BatchError) as caught:
            await store.update_entities(
                "items", {"a": {"count": 1}, "x": {"count": 1}}, returning=True
            )
        written, error = caught.value.outcomes
        assert typed(written) == typed(await store.get_entity("items", "a"))
        assert isinstance(error, EntityNotFoundError)
        with pytest.raises(TransactionAbortedError):
            async with store.begin_transaction() as tx:
                with pytest.raises(EntityNotFoundError):
                    await tx.update_entities(
                        "items", {"a": {"count": 2}, "x": {"count": 1}}, returning=True
                    )
        assert (await get_existing(store, "items", "a"))["count"] == 1

    async def test_130_many_tasks_get_the_entity_that_each_has_written(
        self, store: StorageStrategy
    ) -> None:
        await store.create_entity("counters", {"counter_id": "a"})
        written = await asyncio.gather(
            *(
                store.update_entity("counters", "a", {"n": increment(), "by": task}, returning=True)
                for task in range(20)
            )
        )
        assert [each["by"] for each in written] == list(range(20))
        assert sorted((each["n"], each["version"]) for each in written) == [
            (n, n + 1) for n in range(1, 21)
        ]

    async def test_130_a_default_is_created_on_condition_that_it_is_absent(
        self, store: StorageStrategy
    ) -> None:
        calls = 0

        async def change(entity: Entity) -> Entity:
            nonlocal calls
            calls += 1
            if calls == 1:
                await store.save_entity(
                    "counters", {"counter_id": "a", "n": 5}, expected_version=ABSENT
                )
            return {**entity, "n": entity["n"] + 1}  # type: ignore[operator]

        assert await store.modify_entity("counters", "a", change, default={"n": 0}) == 2
        assert calls == 2
        assert (await get_existing(store, "counters", "a"))["n"] == 6
