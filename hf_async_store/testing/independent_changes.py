"""Case 135: a change that is blocked or refused neither delays nor affects its neighbours.

Neighbours are changes that are queued at the same time, by other callers or by one batch. They share
commits and round trips, but must not share delays or errors.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import pytest

from hf_async_store.errors import (
    AlreadyExistsError,
    BatchError,
    ConcurrencyConflictError,
    EntityNotFoundError,
    ReferenceViolationError,
    StorageError,
    UnsupportedValueError,
)
from hf_async_store.field_operations import append, increment
from hf_async_store.testing.assertions import get_existing, payloads
from hf_async_store.testing.concurrency import HANG_SECONDS, seeded
from hf_async_store.testing.harness import Harness, InjectsRowLocks, RefusesLabels, skip_fault
from hf_async_store.testing.repetitions import repetitions
from hf_async_store.values import INT_MAX, MAX_ENTITY_BYTES, REMOVE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.values import Entity

Verb: TypeAlias = "Callable[[StorageStrategy], Awaitable[object]]"
Change: TypeAlias = "Callable[[StorageStrategy, str], Awaitable[object]]"

_UNBLOCKED_SECONDS: Final = 15.0
"""A change that does not wait for a lock takes less time, also under load."""

_IDS: Final = tuple(f"neighbour {each}" for each in range(9))
_TIME: Final = "2026-01-01T00:00:00.000000Z"
_HEAVY: Final = "x" * (MAX_ENTITY_BYTES - 1000)


async def _add_too_much(store: StorageStrategy) -> None:
    await store.update_entity("items", "heavy", {"more": "x" * 2000})


REFUSED: Final[Mapping[type[StorageError] | str, tuple[type[StorageError], Verb]]] = {
    "a version that is not there": (
        ConcurrencyConflictError,
        lambda store: store.update_entity("items", "there", {"count": 1}, expected_version=7),
    ),
    "an entity that is not there": (
        EntityNotFoundError,
        lambda store: store.update_entity("items", "nobody", {"count": 1}),
    ),
    "an id that is taken": (
        AlreadyExistsError,
        lambda store: store.create_entity("items", {"item_id": "there"}),
    ),
    "the last version there is": (
        UnsupportedValueError,
        lambda store: store.update_entity("items", "last", {"count": 1}),
    ),
    "too heavy with what is stored": (UnsupportedValueError, _add_too_much),
    "a parent that is not there": (
        ReferenceViolationError,
        lambda store: store.save_entity("requests", {"request_id": "r", "template_id": "nobody"}),
    ),
    "a parent that has children": (
        ReferenceViolationError,
        lambda store: store.delete_entity("templates", "parent"),
    ),
}
"""Changes that the store can refuse only when it applies them, with the expected errors."""


_CHANGES: Final[tuple[Change, ...]] = (
    lambda store, name: store.save_entity("items", {"item_id": name, "count": 5}),
    lambda store, name: store.save_entity("items", {"item_id": name, "label": "saved"}),
    lambda store, name: store.save_entity("items", {"item_id": name}, expected_version=2),
    lambda store, name: store.save_entity("items", {"item_id": name, "created_at": _TIME}),
    lambda store, name: store.create_entity("items", {"item_id": name, "count": 7}),
    lambda store, name: store.update_entity("items", name, {"count": increment(2)}),
    lambda store, name: store.update_entity("items", name, {"count": increment(1)}),
    lambda store, name: store.update_entity("items", name, {"label": increment(1)}),
    lambda store, name: store.update_entity("items", name, {"tags": append("tag")}),
    lambda store, name: store.update_entity("items", name, {"label": REMOVE, "ratio": 0.5}),
    lambda store, name: store.update_entity("items", name, {"count": 1}, expected_version=3),
    lambda store, name: store.update_entity("items", name, {"label": "x"}, expected_version=1),
    lambda store, name: store.delete_entity("items", name),
    lambda store, name: store.delete_entity("items", name, expected_version=2),
)
"""Changes of one entity, some of which are refused."""


class IndependentChangeContract:
    """Effects of a change on its neighbours."""

    @pytest.mark.parametrize("name", REFUSED)
    async def test_135_a_refused_change_does_not_affect_its_neighbours(
        self, store: StorageStrategy, name: str
    ) -> None:
        error, verb = REFUSED[str(name)]
        if error is ReferenceViolationError and not store.capabilities.references:
            pytest.skip("the engine does not enforce references")
        await _prepare(store)
        for position in (0, 4, 8):  # before, among and after its neighbours
            work: list[Awaitable[object]] = [
                store.save_entity("items", {"item_id": each, "count": position}) for each in _IDS
            ]
            work.insert(position, verb(store))
            outcomes = await asyncio.gather(*work, return_exceptions=True)
            refused = outcomes.pop(position)
            assert isinstance(refused, error), repr(refused)
            assert [each for each in outcomes if not isinstance(each, int)] == []
            found = await payloads(store, "items", _IDS)
            assert [each and each["count"] for each in found.values()] == [position] * len(_IDS)

    async def test_135_changes_of_one_entity_at_once_and_one_after_the_other(
        self, store: StorageStrategy
    ) -> None:
        """They may share a commit, but the outcomes are those of changes in their order."""
        await _prepare(store)
        with seeded() as random:
            for number in range(repetitions(60, 12)):
                changes = [random.choice(_CHANGES) for _ in range(random.randint(2, 12))]
                first = random.choice([None, {"count": 1, "label": "stored"}])
                at_once = await _changed(store, f"at once {number}", first, changes, _at_once)
                in_turn = await _changed(store, f"in turn {number}", first, changes, _in_turn)
                assert at_once == in_turn

    async def test_135_references_of_changes_of_one_entity(self, store: StorageStrategy) -> None:
        if not store.capabilities.references:
            pytest.skip("the engine does not enforce references")
        await _prepare(store)

        def saved(parent: str) -> Awaitable[object]:
            return store.save_entity("requests", {"request_id": "one", "template_id": parent})

        def named(name: str) -> Awaitable[object]:
            return store.update_entity("requests", "one", {"status": name})

        outcomes = await asyncio.gather(
            *(saved("nobody"), named("a"), saved("parent"), named("b"), saved("parent")),
            *(named("c"), saved("nobody"), named("d")),
            return_exceptions=True,
        )
        assert list(map(_described, outcomes)) == [
            *("ReferenceViolationError", "EntityNotFoundError", 1, 2, 3, 4),
            *("ReferenceViolationError", 5),
        ]
        stored = await get_existing(store, "requests", "one")
        assert (stored["template_id"], stored["status"]) == ("parent", "d")

    async def test_135_many_refused_changes_in_one_batch(self, store: StorageStrategy) -> None:
        """Several refused changes in one batch of one caller: each change has its own outcome."""
        await _prepare(store)
        ids = [f"many {each:03}" for each in range(200)]
        await store.create_entities("items", [{"item_id": each} for each in ids])
        wrong = set(ids[::7])
        with pytest.raises(BatchError) as caught:
            await store.update_entities(
                "items",
                {each: {"label": "after"} for each in ids},
                {each: 9 if each in wrong else 1 for each in ids},
            )
        for each, outcome in zip(ids, caught.value.outcomes, strict=True):
            assert isinstance(outcome, ConcurrencyConflictError) if each in wrong else outcome == 2
        found = await payloads(store, "items", ids)
        assert {each for each, entity in found.items() if entity == {"item_id": each}} == wrong

    async def test_135_a_change_refused_by_the_database_does_not_affect_its_neighbours(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        if not isinstance(harness, RefusesLabels):
            skip_fault(harness, RefusesLabels)
        await _prepare(store)
        harness.refuse_label("poison")
        labels = ["a", "b", "poison", "c", "d"]
        outcomes = await asyncio.gather(
            *(
                store.save_entity("items", {"item_id": f"poison {each}", "label": each})
                for each in labels
            ),
            return_exceptions=True,
        )
        refused = outcomes.pop(2)
        assert isinstance(refused, StorageError)
        assert (refused.retryable, refused.outcome_unknown) == (False, False)
        assert outcomes == [1] * 4
        batch = [{"item_id": f"batch {each}", "label": each} for each in labels]
        with pytest.raises(BatchError) as caught:
            await store.save_entities("items", batch)
        assert [isinstance(each, StorageError) for each in caught.value.outcomes] == [
            each == "poison" for each in labels
        ]
        assert (await payloads(store, "items", ["batch a", "batch poison"]))["batch poison"] is None

    async def test_135_a_change_refused_by_the_database_among_others_of_its_entity(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        if not isinstance(harness, RefusesLabels):
            skip_fault(harness, RefusesLabels)
        await _prepare(store)
        harness.refuse_label("poison")
        changes: list[dict[str, Any]] = [{"count": increment(1)}, {"label": "poison"}] * 2
        outcomes = await asyncio.gather(
            *(store.update_entity("items", "there", each) for each in changes),
            return_exceptions=True,
        )
        assert [isinstance(each, StorageError) for each in outcomes] == [False, True, False, True]
        stored = await get_existing(store, "items", "there")
        assert (outcomes[0], outcomes[2], stored["version"]) == (2, 3, 3)
        assert (stored["count"], stored.get("label")) == (2, None)

    async def test_135_a_blocked_change_does_not_delay_its_neighbours(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        if not isinstance(harness, InjectsRowLocks):
            skip_fault(harness, InjectsRowLocks)
        await _prepare(store)
        await store.save_entities("items", [{"item_id": each} for each in _IDS])
        async with harness.hold("items", "there"):
            blocked = asyncio.create_task(store.update_entity("items", "there", {"count": 1}))
            later = [
                asyncio.create_task(store.update_entity("items", "there", {"count": increment(1)}))
                for _ in range(3)
            ]
            free = [
                asyncio.create_task(store.update_entity("items", each, {"count": 1}))
                for each in _IDS[:4]
            ]
            try:
                _, waiting = await asyncio.wait(free, timeout=_UNBLOCKED_SECONDS)
                assert not waiting, "writes of the same batch wait for the blocked one"
                free = [
                    asyncio.create_task(store.update_entity("items", each, {"count": 1}))
                    for each in _IDS[4:]
                ]
                _, waiting = await asyncio.wait(free, timeout=_UNBLOCKED_SECONDS)
                assert not waiting, "later writes wait for the blocked one"
                assert not blocked.done()
                assert not any(each.done() for each in later)
            finally:
                tasks = [blocked, *later, *free]
                for each in tasks:
                    each.cancel()
                cancelled = asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.wait_for(cancelled, HANG_SECONDS)
        assert await store.update_entity("items", "there", {"count": 2}) > 1


async def _changed(
    store: StorageStrategy,
    name: str,
    first: Mapping[str, object] | None,
    changes: Sequence[Change],
    outcomes_of: Callable[[Sequence[Awaitable[object]]], Awaitable[list[object]]],
) -> object:
    """The outcomes of changes of one entity, and what is stored then."""
    if first is not None:
        await store.save_entity("items", {"item_id": name, **first})
    outcomes = await outcomes_of([change(store, name) for change in changes])
    stored = await store.get_entity("items", name)
    return list(map(_described, outcomes)), _without_id(stored)


async def _at_once(changes: Sequence[Awaitable[object]]) -> list[object]:
    return await asyncio.gather(*changes, return_exceptions=True)


async def _in_turn(changes: Sequence[Awaitable[object]]) -> list[object]:
    outcomes: list[object] = []
    for each in changes:
        try:
            outcomes.append(await each)
        except StorageError as exc:
            outcomes.append(exc)
    return outcomes


def _described(outcome: object) -> object:
    if isinstance(outcome, ConcurrencyConflictError):
        return "conflict", outcome.expected, outcome.actual
    return type(outcome).__name__ if isinstance(outcome, BaseException) else outcome


def _without_id(entity: Entity | None) -> object:
    """An entity without its id and the times at which it was written."""
    if entity is None:
        return None
    written = {"item_id", "created_at", "updated_at"} - {
        name for name, each in entity.items() if each == _TIME
    }
    return {name: each for name, each in entity.items() if name not in written}


async def _prepare(store: StorageStrategy) -> None:
    await asyncio.gather(
        store.save_entity("items", {"item_id": "there"}),
        store.save_entity("items", {"item_id": "heavy", "text": _HEAVY}),
        store.import_entities("items", [{"item_id": "last", "version": INT_MAX}]),
        store.save_entity("templates", {"template_id": "parent"}),
    )
    child: dict[str, Any] = {"request_id": "child", "template_id": "parent"}
    await store.save_entity("requests", child)
    assert (await get_existing(store, "items", "there"))["version"] == 1
