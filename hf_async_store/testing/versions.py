"""Cases 26 to 34: expected versions, checked atomically with the write."""

from __future__ import annotations

import asyncio
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Final

import pytest

from hf_async_store.changes import ABSENT, Patch
from hf_async_store.errors import (
    AlreadyExistsError,
    BatchError,
    ConcurrencyConflictError,
    EntityNotFoundError,
    InvalidVersionError,
    StorageError,
)
from hf_async_store.testing.assertions import (
    all_refused_at_once,
    get_existing,
    payload,
    payloads,
    refused_at_once,
    typed,
)
from hf_async_store.testing.concurrency import failure_of, is_shared
from hf_async_store.testing.harness import (
    CONTRACT_COLLECTIONS,
    DropsAllResponses,
    DropsResponses,
    Harness,
    ObservesIO,
    skip_fault,
)
from hf_async_store.testing.process_workers import run_workers, winners
from hf_async_store.testing.repetitions import repetitions
from hf_async_store.values import Key, utc_now

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hf_async_store.strategy import StorageStrategy

ROUNDS: Final = repetitions(100)
WRITERS: Final = 50

_ENTITY: Final[dict[str, Any]] = {"item_id": "a", "label": "first", "data": {"n": [1]}}


async def _in_transaction(store: StorageStrategy, version: Any) -> int:
    async with store.begin_transaction() as tx:
        return await tx.update_entity("items", "a", {"label": "new"}, expected_version=version)


_WRITES: Final[dict[str, Callable[[StorageStrategy, Any], Awaitable[object]]]] = {
    "save": lambda store, version: store.save_entity(
        "items", {"item_id": "a", "label": "new"}, expected_version=version
    ),
    "update": lambda store, version: store.update_entity(
        "items", "a", {"label": "new"}, expected_version=version
    ),
    "delete": lambda store, version: store.delete_entity("items", "a", expected_version=version),
}
"""The verbs that take an expected version, on the item `a`."""


class VersionContract:
    """Versions and expected versions."""

    # 26 -------------------------------------------------------------------------------------

    async def test_26_every_write_increments_the_version(self, store: StorageStrategy) -> None:
        assert await store.create_entity("items", _ENTITY) == 1
        assert await store.save_entity("items", _ENTITY, expected_version=1) == 2
        assert await store.update_entity("items", "a", {"count": 1}, expected_version=2) == 3
        assert await store.save_entity("items", _ENTITY) == 4
        assert await store.update_entity("items", "a", {}) == 5
        assert await store.save_entities("items", [_ENTITY], {"a": 5}) == [6]
        assert await store.update_entities("items", {"a": {}}, {"a": 6}) == [7]
        assert await store.modify_entity("items", "a", lambda entity: entity) == 8
        async with store.begin_transaction() as tx:
            assert await tx.update_entity("items", "a", {}, expected_version=8) == 9
            assert await tx.save_entity("items", _ENTITY, expected_version=9) == 10
        assert (await get_existing(store, "items", "a"))["version"] == 10
        assert await store.delete_entities("items", ["a"], {"a": 10}) == [True]

    @pytest.mark.parametrize("verb", _WRITES)
    @pytest.mark.parametrize("stale", [0, 1, 2, 4, 2**63 - 1])
    async def test_26_a_stale_version_is_a_conflict_with_all_details(
        self, store: StorageStrategy, verb: str, stale: int
    ) -> None:
        await store.import_entities("items", [{**_ENTITY, "version": 3}])
        before = await get_existing(store, "items", "a")
        with pytest.raises(ConcurrencyConflictError) as caught:
            await _WRITES[verb](store, stale)
        _check_conflict(store, caught.value, before, expected=stale)
        assert typed(await store.get_entity("items", "a")) == typed(before)

    async def test_26_a_stale_version_in_a_batch(self, store: StorageStrategy) -> None:
        await store.create_entities("items", [_ENTITY, {"item_id": "b"}])
        before = await get_existing(store, "items", "a")
        batch = [{"item_id": "b", "label": "new"}, {"item_id": "a", "label": "new"}]
        with pytest.raises(BatchError) as caught:
            await store.save_entities("items", batch, {"a": 7, "b": 1})
        won, conflict = caught.value.outcomes
        assert won == 2
        assert isinstance(conflict, ConcurrencyConflictError)
        _check_conflict(store, conflict, before, expected=7)
        assert typed(await store.get_entity("items", "a")) == typed(before)

    # 27 -------------------------------------------------------------------------------------

    @pytest.mark.parametrize("verb", _WRITES)
    @pytest.mark.parametrize("version", [0, 1, 2])
    async def test_27_a_version_on_a_missing_entity_never_inserts(
        self, store: StorageStrategy, verb: str, version: int
    ) -> None:
        with pytest.raises(EntityNotFoundError) as caught:
            await _WRITES[verb](store, version)
        assert (caught.value.collection, caught.value.entity_id) == ("items", "a")
        assert await store.get_entity("items", "a") is None

    async def test_27_absent_on_an_existing_entity(self, store: StorageStrategy) -> None:
        new = {"item_id": "a", "label": "new"}
        assert await store.save_entity("items", _ENTITY, expected_version=ABSENT) == 1
        before = await get_existing(store, "items", "a")
        with pytest.raises(AlreadyExistsError) as caught:
            await store.save_entity("items", new, expected_version=ABSENT)
        assert (caught.value.collection, caught.value.entity_id) == ("items", "a")
        with pytest.raises(BatchError) as batch:
            await store.save_entities("items", [{"item_id": "b"}, new], {"a": ABSENT, "b": ABSENT})
        assert batch.value.outcomes[0] == 1
        assert isinstance(batch.value.outcomes[1], AlreadyExistsError)
        assert typed(await store.get_entity("items", "a")) == typed(before)

    # 28 -------------------------------------------------------------------------------------

    async def test_28_delete_honours_the_version(self, store: StorageStrategy) -> None:
        await store.create_entity("items", _ENTITY)
        await store.update_entity("items", "a", {"label": "second"})
        with pytest.raises(ConcurrencyConflictError):
            await store.delete_entity("items", "a", expected_version=1)
        assert (await get_existing(store, "items", "a"))["version"] == 2
        with pytest.raises(BatchError):
            await store.delete_entities("items", ["a"], {"a": 1})
        assert await store.delete_entity("items", "a", expected_version=2) is True
        assert await store.get_entity("items", "a") is None

    # 29 -------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "version",
        [None, "", "1", True, False, -1, -(2**63), 1.0, 2**63, [1], b"1", object()],
        ids=lambda version: f"{type(version).__name__} {str(version)[:8]}",
    )
    async def test_29_an_invalid_version_is_refused_before_io(
        self, harness: Harness, store: StorageStrategy, version: Any
    ) -> None:
        all_refused_at_once(
            InvalidVersionError,
            store.save_entity("items", _ENTITY, expected_version=version),
            store.update_entity("items", "a", {"label": "x"}, expected_version=version),
            store.delete_entity("items", "a", expected_version=version),
            store.save_entities("items", [_ENTITY], {"a": version}),
            store.update_entities("items", {"a": {"label": "x"}}, {"a": version}),
            store.delete_entities("items", ["a"], {"a": version}),
        )
        if isinstance(harness, ObservesIO):
            assert not harness.touched()

    async def test_29_an_invalid_version_is_refused_by_imports(
        self, store: StorageStrategy
    ) -> None:
        invalid_versions: tuple[object, ...] = (None, "", "1", True, -1, 1.0, [1], {})
        for version in invalid_versions:
            refused_at_once(
                store.import_entities("items", [{**_ENTITY, "version": version}]),
                InvalidVersionError,
            )

    async def test_29_absent_is_accepted_by_saves_only(self, store: StorageStrategy) -> None:
        all_refused_at_once(
            InvalidVersionError,
            store.update_entity("items", "a", {"label": "x"}, expected_version=ABSENT),
            store.delete_entity("items", "a", expected_version=ABSENT),
            store.update_entities("items", {"a": {}}, {"a": ABSENT}),
            store.delete_entities("items", ["a"], {"a": ABSENT}),
        )

    async def test_29_a_version_for_an_id_outside_the_batch_is_refused(
        self, store: StorageStrategy
    ) -> None:
        all_refused_at_once(
            InvalidVersionError,
            store.save_entities("items", [_ENTITY], {"b": 1}),
            store.update_entities("items", {"a": {}}, {"a": 1, "b": 1}),
            store.delete_entities("items", ["a"], {"A": 1}),
        )

    @pytest.mark.parametrize("verb", _WRITES)
    async def test_29_zero_is_version_0(self, store: StorageStrategy, verb: str) -> None:
        await store.import_entities("items", [{**_ENTITY, "version": 0}])
        assert (await get_existing(store, "items", "a"))["version"] == 0
        with pytest.raises(ConcurrencyConflictError):
            await _WRITES[verb](store, 1)
        assert await _WRITES[verb](store, 0) == 1  # or True, the result of a delete

    # 30 -------------------------------------------------------------------------------------

    async def test_30_user_data_cannot_forge_the_version(self, store: StorageStrategy) -> None:
        assert await store.create_entity("items", {**_ENTITY, "version": 99}) == 1
        for forged in (1, 99, 0, None, "1", 1.0, {"a": 1}):
            version = (await get_existing(store, "items", "a"))["version"]
            assert isinstance(version, int)
            assert await store.save_entity("items", {**_ENTITY, "version": forged}) == version + 1
            fields = {"label": "x", "version": forged}
            assert await store.update_entity("items", "a", fields) == version + 2
        entity = await get_existing(store, "items", "a")
        assert typed(entity["version"]) == typed(15)

    async def test_30_user_data_cannot_bypass_the_version_check(
        self, store: StorageStrategy
    ) -> None:
        await store.create_entity("items", _ENTITY)
        stale = {**_ENTITY, "version": 1}
        for expected in (0, 2, 7):
            with pytest.raises(ConcurrencyConflictError):
                await store.save_entity("items", stale, expected_version=expected)
            with pytest.raises(ConcurrencyConflictError):
                await store.update_entity("items", "a", stale, expected_version=expected)
        assert (await get_existing(store, "items", "a"))["version"] == 1

    async def test_30_a_nested_field_named_version_is_data(self, store: StorageStrategy) -> None:
        entity = {"item_id": "a", "data": {"version": "mine"}, "x": [{"version": 7}]}
        await store.save_entity("items", entity)
        assert typed(payload(await store.get_entity("items", "a"))) == typed(entity)

    # 31 -------------------------------------------------------------------------------------

    async def test_31_of_50_writers_from_one_version_one_wins(self, store: StorageStrategy) -> None:
        await store.create_entity("counters", {"counter_id": "race"})
        for version in range(1, ROUNDS + 1):
            assert await winners(store, "race", version, WRITERS) == [version + 1]
        assert (await get_existing(store, "counters", "race"))["version"] == ROUNDS + 1

    async def test_31_one_winner_among_different_verbs(self, store: StorageStrategy) -> None:
        writes = [*_WRITES.values(), _in_transaction]
        for _ in range(ROUNDS // 4):
            version = await store.save_entity("items", _ENTITY)
            results = await asyncio.gather(
                *(write(store, version) for _ in range(5) for write in writes),
                return_exceptions=True,
            )
            errors = [each for each in results if isinstance(each, BaseException)]
            assert len(results) - len(errors) == 1
            # After a successful delete the entity is missing.
            kinds = (ConcurrencyConflictError, EntityNotFoundError)
            assert [each for each in errors if not isinstance(each, kinds)] == []

    async def test_31_concurrent_write_each_calls(self, store: StorageStrategy) -> None:
        """Concurrent `Engine.write_each` calls, without the queue that orders the writes of each key."""
        concurrency = min(store.capabilities.write_concurrency, 8)
        await store.create_entity("counters", {"counter_id": "race"})
        for version in range(1, ROUNDS // 4 + 1):
            change = Patch(Key("counters", "race"), {"x": version}, utc_now(), version)
            outcomes = await asyncio.gather(
                *(store.engine.write_each([change]) for _ in range(concurrency))
            )
            won = [each for [each] in outcomes if each == version + 1]
            lost = [each for [each] in outcomes if isinstance(each, ConcurrencyConflictError)]
            assert (len(won), len(lost)) == (1, concurrency - 1)

    async def test_31_one_winner_among_two_stores(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        if not is_shared(harness.capabilities):
            pytest.skip("another store of this engine has other data")
        await store.create_entity("counters", {"counter_id": "race"})
        async with harness.store() as other:
            for version in range(1, ROUNDS // 4 + 1):
                won = await asyncio.gather(
                    winners(store, "race", version, 10), winners(other, "race", version, 10)
                )
                assert won[0] + won[1] == [version + 1]

    async def test_31_one_winner_among_processes(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        url = _shared_url(harness)
        if url is None:
            pytest.skip("the engine does not declare multi_process")
        await store.create_entity("counters", {"counter_id": "race"})
        work = {"counter_id": "race", "rounds": ROUNDS, "writers": 12}
        results = await run_workers(url, *[("version-race", work)] * 4)
        won = sorted(each for result in results for each in result)
        assert won == list(range(2, ROUNDS + 2)), (
            "a version was produced by no writer or by several"
        )
        assert (await get_existing(store, "counters", "race"))["version"] == ROUNDS + 1

    # 32 -------------------------------------------------------------------------------------

    async def test_32_a_compare_and_set_counter_keeps_every_increment(
        self, store: StorageStrategy
    ) -> None:
        tasks, times = 8, repetitions(200)
        await store.create_entity("counters", {"counter_id": "sum", "n": 0})
        await asyncio.gather(*(_increment_by_compare_and_set(store, times) for _ in range(tasks)))
        counter = await get_existing(store, "counters", "sum")
        assert (counter["n"], counter["version"]) == (tasks * times, tasks * times + 1)

    async def test_32_modify_entity_keeps_every_increment(self, store: StorageStrategy) -> None:
        async def increment(entity: dict[str, Any]) -> dict[str, Any]:
            await asyncio.sleep(0)  # let other tasks run between the read and the write
            return {**entity, "n": entity["n"] + 1}

        await store.create_entity("counters", {"counter_id": "sum", "n": 0})
        await asyncio.gather(
            *(store.modify_entity("counters", "sum", increment) for _ in range(20))
        )
        counter = await get_existing(store, "counters", "sum")
        assert (counter["n"], counter["version"]) == (20, 21)

    async def test_32_each_modification_of_one_entity_returns_its_own_version(
        self, store: StorageStrategy
    ) -> None:
        tasks, times = 8, 3  # they queue, and the engine may write several of them as one

        def increment(entity: dict[str, Any]) -> dict[str, Any]:
            return {**entity, "n": entity["n"] + 1}

        async def modify() -> list[dict[str, Any]]:
            return [
                await store.modify_entity("counters", "sum", increment, returning=True)
                for _ in range(times)
            ]

        await store.create_entity("counters", {"counter_id": "sum", "n": 0})
        each_found = await asyncio.gather(*(modify() for _ in range(tasks)))
        found = [each for one in each_found for each in one]
        assert sorted(each["n"] for each in found) == [*range(1, tasks * times + 1)]
        assert all(each["version"] == each["n"] + 1 for each in found)
        last = max(found, key=lambda each: each["n"])
        assert await get_existing(store, "counters", "sum") == last

    async def test_32_no_increment_of_several_processes_is_lost(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        url = _shared_url(harness)
        if url is None:
            pytest.skip("the engine does not declare multi_process")
        await store.create_entity("counters", {"counter_id": "sum", "n": 0})
        work = {"counter_id": "sum", "times": 50}
        results = await run_workers(url, *[("cas-counter", work)] * 4)
        counter = await get_existing(store, "counters", "sum")
        assert (counter["n"], counter["version"]) == (200, 201)
        assert sorted(each for result in results for each in result) == list(range(2, 202))

    async def test_32_no_save_of_another_process_is_lost(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        url = _shared_url(harness)
        if url is None:
            pytest.skip("the engine does not declare multi_process")
        names = [f"worker {number}" for number in range(4)]
        await run_workers(url, *(("save-many", {"prefix": each, "times": 50}) for each in names))
        ids = [f"{name}-{number}" for name in names for number in range(50)]
        found = await payloads(store, "items", ids)
        assert list(found.values()) == [
            {"item_id": each, "count": int(each.rpartition("-")[2])} for each in ids
        ]

    # 33 -------------------------------------------------------------------------------------

    async def test_33_concurrent_create_has_one_winner(self, store: StorageStrategy) -> None:
        for round_number in range(10):
            entity_id = f"round {round_number}"
            results = await asyncio.gather(
                *(
                    store.create_entity("items", {"item_id": entity_id, "count": number})
                    for number in range(WRITERS)
                ),
                return_exceptions=True,
            )
            won = [number for number, each in enumerate(results) if each == 1]
            lost = [each for each in results if isinstance(each, AlreadyExistsError)]
            assert (len(won), len(lost)) == (1, WRITERS - 1)
            found = payload(await store.get_entity("items", entity_id))
            assert found == {"item_id": entity_id, "count": won[0]}

    async def test_33_concurrent_create_in_transactions_has_one_winner(
        self, store: StorageStrategy
    ) -> None:
        async def create(number: int) -> int:
            async with store.begin_transaction() as tx:
                return await tx.create_entity("items", {"item_id": "one", "count": number})

        results = await asyncio.gather(*(create(each) for each in range(8)), return_exceptions=True)
        won = [number for number, each in enumerate(results) if each == 1]
        assert len(won) == 1
        for each in results:
            assert each == 1 or isinstance(each, AlreadyExistsError | ConcurrencyConflictError)
        assert payload(await store.get_entity("items", "one")) == {
            "item_id": "one",
            "count": won[0],
        }

    async def test_33_concurrent_create_in_processes_has_one_winner(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        url = _shared_url(harness)
        if url is None:
            pytest.skip("the engine does not declare multi_process")
        ids = [f"id {number}" for number in range(50)]
        names = ("one", "two", "three")
        results = await run_workers(
            url, *(("create-race", {"name": name, "ids": ids}) for name in names)
        )
        winner = {each: name for name, won in zip(names, results, strict=True) for each in won}
        assert sorted(each for won in results for each in won) == sorted(ids)
        assert await payloads(store, "items", ids) == {
            each: {"item_id": each, "label": winner[each]} for each in ids
        }

    # 34 -------------------------------------------------------------------------------------

    @pytest.mark.parametrize("verb", ["create", "save", "update", "delete", "transaction"])
    async def test_34_a_lost_response_is_not_a_conflict(
        self, harness: Harness, store: StorageStrategy, verb: str
    ) -> None:
        if not isinstance(harness, DropsResponses):
            skip_fault(harness, DropsResponses)
        before = {} if verb == "create" else {"a": await store.create_entity("items", _ENTITY)}
        await store.get_entity("items", "a")  # connects, so that the write is the next request
        harness.lose_next_answer()
        try:
            await _write_once(store, verb)
        except StorageError as exc:
            assert exc.outcome_unknown, (
                f"the answer to the commit was lost, or that to an earlier request: {exc!r}"
            )
        found = await store.get_entity("items", "a")
        if verb == "delete":
            assert found is None
        else:
            assert found is not None
            assert found["label"] == "new"
            assert found["version"] == before.get("a", 0) + 1

    @pytest.mark.parametrize("verb", ["create", "save", "update", "delete", "transaction"])
    async def test_34_if_every_response_is_lost_the_outcome_is_unknown(
        self, harness: Harness, verb: str
    ) -> None:
        if not isinstance(harness, DropsAllResponses):
            skip_fault(harness, DropsAllResponses)
        async with harness.store(CONTRACT_COLLECTIONS, **harness.hurried) as store:
            if verb != "create":
                await store.create_entity("items", _ENTITY)
            await store.create_entity("items", {"item_id": "other"})  # makes what entities need
            await store.get_entity("items", "a")  # connects, as above
            with harness.lose_answers():
                failure = await failure_of(_write_once(store, verb))
            # It may also succeed: an engine may find out by reading.
            if failure is not None:
                assert isinstance(failure, StorageError), failure
                assert failure.outcome_unknown, f"it was applied: {failure!r}"
                assert not failure.retryable, f"a repetition may be a conflict: {failure!r}"
            found = await store.get_entity("items", "a")
            if verb == "delete":
                assert found is None
            else:
                assert found is not None
                assert (found["label"], found["version"]) == ("new", 1 if verb == "create" else 2)


def _check_conflict(
    store: StorageStrategy,
    conflict: ConcurrencyConflictError,
    before: dict[str, Any],
    *,
    expected: int,
) -> None:
    assert (conflict.collection, conflict.entity_id) == ("items", "a")
    assert (conflict.expected, conflict.actual) == (expected, before["version"])
    assert not conflict.retryable, "the same call would fail again"
    assert not conflict.outcome_unknown
    if not store.capabilities.conflict_entity:
        assert conflict.current is None
    else:
        assert typed(conflict.current) == typed(deepcopy(before))


def _shared_url(harness: Harness) -> str | None:
    """The URL of the data for other processes; None if the engine does not declare multi_process."""
    url = harness.url()
    assert (url is not None) is harness.capabilities.multi_process
    return url


async def _increment_by_compare_and_set(store: StorageStrategy, times: int) -> None:
    """Add 1 `times` times: read, update with the version that was read, retry after a conflict."""
    while times:
        counter = await get_existing(store, "counters", "sum")
        n, version = counter["n"], counter["version"]
        assert isinstance(n, int)
        assert isinstance(version, int)
        try:
            await store.update_entity("counters", "sum", {"n": n + 1}, expected_version=version)
        except ConcurrencyConflictError:
            continue
        times -= 1


async def _write_once(store: StorageStrategy, verb: str) -> None:
    if verb == "create":
        await store.create_entity("items", {"item_id": "a", "label": "new"})
    elif verb == "transaction":
        await _in_transaction(store, 1)
    else:
        answer = await _WRITES[verb](store, 1)
        assert answer is True if verb == "delete" else answer == 2
