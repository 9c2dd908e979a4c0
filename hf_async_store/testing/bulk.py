"""Cases 66 to 69: batches and coalesced operations, each change with the outcome that it has alone."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

from hf_async_store.changes import ABSENT, ANY, PRESENT, Change, Delete, Patch, Put
from hf_async_store.errors import (
    AlreadyExistsError,
    BatchError,
    ConcurrencyConflictError,
    EntityNotFoundError,
    InvalidFieldError,
    StorageError,
    ThrottledError,
)
from hf_async_store.testing.assertions import counted, get_existing, payload, payloads
from hf_async_store.testing.concurrency import seeded
from hf_async_store.testing.harness import Harness, InjectsThrottling, skip_fault
from hf_async_store.values import CREATED_AT, UPDATED_AT, VERSION, Entity, Key, Value, utc_now

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from random import Random

    from hf_async_store.strategy import StorageStrategy

MANY = 1_000

Answer: TypeAlias = "int | bool | type[StorageError] | None"
"""The result of a change: its outcome, or the class of its error."""


class BulkContract:
    """What batches and coalescing guarantee."""

    # 66 -------------------------------------------------------------------------------------

    async def test_66_each_of_many_mixed_changes_has_its_outcome(
        self, store: StorageStrategy
    ) -> None:
        """Calls `Engine.write_each` directly: the public verbs never send such a mixture."""
        await store.import_entities(
            "items",
            [{"item_id": each.key.id, "version": 3} for each in _mixed() if _exists_before(each)],
        )
        changes = list(_mixed())
        outcomes = await store.engine.write_each(changes)
        expected = [
            _expected_outcome(each, 3 if _exists_before(each) else None) for each in changes
        ]
        assert [_result_or_error_class(each) for each in outcomes] == expected
        records = await store.engine.fetch([each.key for each in changes])
        assert [None if each is None else each.version for each in records] == [
            _version_after(change, answer) for change, answer in zip(changes, expected, strict=True)
        ]

    async def test_66_large_batches_of_each_verb(self, store: StorageStrategy) -> None:
        entities = [{"item_id": f"{each:04}", "count": each} for each in range(MANY)]
        assert await store.create_entities("items", entities) == [1] * MANY
        ids = [str(each["item_id"]) for each in entities]
        assert [payload(each) for each in await store.get_entities("items", ids)] == entities
        updates = {each: {"label": each} for each in ids}
        assert await store.update_entities("items", updates, dict.fromkeys(ids, 1)) == [2] * MANY
        backwards = ids[::-1]
        found = await store.get_entities("items", backwards)
        assert [each and each["label"] for each in found] == backwards
        assert await store.delete_entities("items", [*ids[:10], "never"]) == [True] * 10 + [False]
        assert await counted(store, "items", MANY - 10) == MANY - 10

    async def test_66_batches_set_the_fields_of_the_store(self, store: StorageStrategy) -> None:
        entities: list[Entity] = [{"item_id": f"{each:02}", "count": each} for each in range(16)]
        ids = [str(each["item_id"]) for each in entities]

        async def saved(**fields: Value) -> list[Entity]:
            await store.save_entities("items", [{**each, **fields} for each in entities])
            return [each for each in await store.get_entities("items", ids) if each is not None]

        given: Value = "2020-01-01T00:00:00.000000Z"
        first, second = await saved(), await saved(version=7, updated_at=given)
        third = await saved(created_at=given)
        assert [each[VERSION] for each in (*first, *second, *third)] == [1] * 16 + [2] * 16 + [
            3
        ] * 16
        for before, after in zip(first, second, strict=True):
            assert before.get(UPDATED_AT) == before[CREATED_AT] == after[CREATED_AT]
            assert str(after[UPDATED_AT]) >= str(before[UPDATED_AT])
        assert [each[CREATED_AT] for each in third] == [given] * 16
        imported = [{**each, "updated_at": given, "version": 9} for each in entities]
        assert await store.import_entities("items", imported) == [9] * 16
        assert await store.get_entities("items", ids) == imported

    @pytest.mark.parametrize("verb", ["create", "save", "update", "delete", "import"])
    async def test_66_outcomes_in_input_order(self, store: StorageStrategy, verb: str) -> None:
        """Every third change fails, except in an import, in which none can fail."""
        ids = [f"{each:02}" for each in range(30)]
        before = [each for each in ids if (int(each) % 3 == 0) is (verb == "create")]
        await store.create_entities("items", [{"item_id": each} for each in before])
        shuffled = ids[::2] + ids[1::2]
        if verb == "import":
            assert await _call_batch_verb(store, verb, shuffled) == [7] * len(ids)
            return
        with pytest.raises(BatchError) as caught:
            await _call_batch_verb(store, verb, shuffled)
        good: dict[str, Answer] = {"create": 1, "save": 2, "update": 2, "delete": True}
        error = AlreadyExistsError if verb == "create" else EntityNotFoundError
        assert [_result_or_error_class(each) for each in caught.value.outcomes] == [
            good[verb] if int(each) % 3 else error for each in shuffled
        ]
        assert str(caught.value).startswith("10 of 30 ")
        assert caught.value.__cause__ in caught.value.outcomes

    async def test_66_a_conflict_does_not_affect_the_other_changes(
        self, store: StorageStrategy
    ) -> None:
        entities = [{"item_id": f"{each:04}"} for each in range(MANY)]
        await store.create_entities("items", entities)
        await store.update_entity("items", "0500", {"label": "other"})
        changed = [{**each, "label": "new"} for each in entities]
        expected = {str(each["item_id"]): 1 for each in entities}
        with pytest.raises(BatchError) as caught:
            await store.save_entities("items", changed, expected)
        errors = [
            (index, each)
            for index, each in enumerate(caught.value.outcomes)
            if isinstance(each, StorageError)
        ]
        assert [index for index, _ in errors] == [500]
        assert isinstance(errors[0][1], ConcurrencyConflictError)
        assert errors[0][1].entity_id == "0500"
        found = await store.get_entities("items", list(expected))
        labels = [each and each["label"] for each in found]
        assert labels == ["new"] * 500 + ["other"] + ["new"] * (MANY - 501)

    async def test_66_an_invalid_entity_refuses_the_whole_batch(
        self, store: StorageStrategy
    ) -> None:
        entities: list[dict[str, object]] = [{"item_id": f"{each:04}"} for each in range(MANY)]
        entities[700]["count"] = "seven"
        with pytest.raises(InvalidFieldError, match="items '0700'"):
            await store.create_entities("items", entities)
        assert await counted(store, "items", 0) == 0

    async def test_66_a_failing_iterable_writes_nothing(self, store: StorageStrategy) -> None:
        def source() -> Iterator[dict[str, object]]:
            yield {"item_id": "a"}
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await store.create_entities("items", source())
        assert await store.get_entity("items", "a") is None

    async def test_66_empty_batches(self, store: StorageStrategy) -> None:
        assert await store.create_entities("items", []) == []
        assert await store.save_entities("items", iter(())) == []
        assert await store.update_entities("items", {}) == []
        assert await store.delete_entities("items", []) == []
        assert await store.get_entities("items", []) == []
        assert await store.import_entities("items", []) == []

    # 67 -------------------------------------------------------------------------------------

    async def test_67_throttled_operations_are_completed_or_reported(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        if not isinstance(harness, InjectsThrottling):
            skip_fault(harness, InjectsThrottling)
        ids = [f"{each:03}" for each in range(120)]
        await store.create_entities("items", [{"item_id": each} for each in ids])
        for requests in (1, 3, 1000):
            harness.throttle(requests)
            try:
                found = await store.get_entities("items", ids, timeout=5)
            except StorageError as exc:
                assert exc.retryable
                assert requests == 1000, (
                    "a few throttled requests must be retried until they succeed"
                )
            else:
                assert None not in found, (
                    "an entity that was not read must not be reported as missing"
                )
            harness.throttle(0)
        await self._throttled_writes(harness, store, ids)

    async def _throttled_writes(
        self, harness: InjectsThrottling, store: StorageStrategy, ids: list[str]
    ) -> None:
        harness.throttle(3)
        outcomes: list[Any]
        try:
            outcomes = await store.update_entities("items", {each: {"count": 1} for each in ids})
        except BatchError as exc:
            outcomes = exc.outcomes
        finally:
            harness.throttle(0)
        found = await store.get_entities("items", ids)
        for outcome, entity in zip(outcomes, found, strict=True):
            assert entity is not None
            assert outcome == entity["version"] or isinstance(outcome, ThrottledError)

    # 68 -------------------------------------------------------------------------------------

    async def test_68_a_repeated_id_applies_in_input_order(self, store: StorageStrategy) -> None:
        def item(entity_id: str, count: int) -> dict[str, object]:
            return {"item_id": entity_id, "count": count}

        batch = [item("a", 1), item("b", 1), item("a", 2), item("a", 3), item("b", 2)]
        assert await store.save_entities("items", batch) == [1, 1, 2, 3, 2]
        assert await payloads(store, "items", ["a", "b"]) == {"a": item("a", 3), "b": item("b", 2)}
        assert await store.delete_entities("items", ["a", "b", "a"]) == [True, True, False]
        with pytest.raises(BatchError) as caught:
            await store.create_entities("items", [item("a", 1), item("a", 2), item("b", 3)])
        assert [_result_or_error_class(each) for each in caught.value.outcomes] == [
            1,
            AlreadyExistsError,
            1,
        ]
        assert (await get_existing(store, "items", "a"))["count"] == 1

    async def test_68_an_expected_version_applies_to_the_first_occurrence(
        self, store: StorageStrategy
    ) -> None:
        batch = [{"item_id": "a", "count": each} for each in range(3)]
        assert await store.save_entities("items", batch, {"a": ABSENT}) == [1, 2, 3]
        assert await store.save_entities("items", batch, {"a": 3}) == [4, 5, 6]
        with pytest.raises(BatchError) as caught:
            await store.save_entities("items", batch, {"a": 1})
        assert [_result_or_error_class(each) for each in caught.value.outcomes] == [
            ConcurrencyConflictError,
            7,
            8,
        ]

    async def test_68_the_last_import_of_a_repeated_id_is_stored(
        self, store: StorageStrategy
    ) -> None:
        batch = [{"item_id": "a", "version": each, "count": each} for each in (9, 4, 5)]
        assert await store.import_entities("items", batch) == [9, 4, 5]
        entity = await get_existing(store, "items", "a")
        assert (entity["version"], entity["count"]) == (5, 5)

    async def test_68_repeated_ids_in_a_transaction(self, store: StorageStrategy) -> None:
        batch = [{"item_id": each, "count": index} for index, each in enumerate("abaab")]
        async with store.begin_transaction() as tx:
            assert await tx.save_entities("items", batch) == [1, 1, 2, 3, 2]
            assert await tx.delete_entities("items", ["a", "a"]) == [True, False]
        found = await payloads(store, "items", ["a", "b"])
        assert found == {"a": None, "b": {"item_id": "b", "count": 4}}

    async def test_68_a_repeated_id_is_read_twice(self, store: StorageStrategy) -> None:
        await store.create_entity("items", {"item_id": "a"})
        found = await store.get_entities("items", ["a", "b", "a", "b"])
        assert [each is not None for each in found] == [True, False, True, False]

    async def test_68_repeated_ids_in_a_large_batch(self, store: StorageStrategy) -> None:
        batch = [{"item_id": str(each % 7), "count": each} for each in range(MANY)]
        expected = [1 + each // 7 for each in range(MANY)]
        assert await store.save_entities("items", batch) == expected
        found = await store.get_entities("items", map(str, range(7)))
        assert [each and each["count"] for each in found] == [
            max(each for each in range(MANY) if each % 7 == last) for last in range(7)
        ]

    # 69 -------------------------------------------------------------------------------------

    async def test_69_errors_reach_their_own_caller_only(self, store: StorageStrategy) -> None:
        changes = [each for each in _mixed() if int(each.key.id) < 200]
        await store.import_entities(
            "items",
            [{"item_id": each.key.id, "version": 3} for each in changes if _exists_before(each)],
        )
        answers = await asyncio.gather(*(_call_verb(store, each) for each in changes))
        assert answers == [
            _as_verb_result(each, _expected_outcome(each, 3 if _exists_before(each) else None))
            for each in changes
        ]

    async def test_69_each_caller_gets_a_separate_error_object(
        self, store: StorageStrategy
    ) -> None:
        await store.create_entity("items", {"item_id": "a"})
        results = await asyncio.gather(
            *(store.update_entity("items", "a", {}, expected_version=9) for _ in range(20)),
            *(store.create_entity("items", {"item_id": "a"}) for _ in range(20)),
            return_exceptions=True,
        )
        assert all(isinstance(each, StorageError) for each in results)
        assert len({id(each) for each in results}) == len(results)
        currents = [each.current for each in results if isinstance(each, ConcurrencyConflictError)]
        shared = [each for each in currents if each is not None]
        assert len({id(each) for each in shared}) == len(shared)

    async def test_69_order_per_key_is_kept(self, store: StorageStrategy) -> None:
        keys = [f"key {each}" for each in range(10)]
        writes = [
            asyncio.create_task(store.save_entity("items", {"item_id": key, "count": number}))
            for number in range(20)
            for key in keys
        ]
        versions = await asyncio.gather(*writes)
        assert versions == [number + 1 for number in range(20) for _ in keys]
        found = await store.get_entities("items", keys)
        assert [each and each["count"] for each in found] == [19] * len(keys)

    async def test_69_order_per_key_is_kept_across_verbs(self, store: StorageStrategy) -> None:
        steps: list[tuple[Callable[[], Awaitable[object]], Answer]] = [
            (lambda: store.create_entity("items", {"item_id": "a"}), 1),
            (lambda: store.update_entity("items", "a", {"count": 1}, expected_version=1), 2),
            (lambda: store.create_entity("items", {"item_id": "a"}), AlreadyExistsError),
            (lambda: store.delete_entity("items", "a", expected_version=2), True),
            (lambda: store.delete_entity("items", "a"), False),
            (lambda: store.update_entity("items", "a", {}), EntityNotFoundError),
            (lambda: store.save_entity("items", {"item_id": "a"}, expected_version=ABSENT), 1),
            (lambda: store.save_entity("items", {"item_id": "a"}), 2),
            (
                lambda: store.save_entity("items", {"item_id": "a"}, expected_version=1),
                ConcurrencyConflictError,
            ),
            (lambda: store.update_entity("items", "a", {"label": "last"}), 3),
        ]
        results = await asyncio.gather(*(step() for step, _ in steps), return_exceptions=True)
        assert [_result_or_error_class(each) for each in results] == [answer for _, answer in steps]
        assert payload(await store.get_entity("items", "a")) == {"item_id": "a", "label": "last"}

    async def test_69_each_caller_reads_its_own_writes(self, store: StorageStrategy) -> None:
        async def write_and_read(number: int) -> None:
            entity_id = f"item {number}"
            for count in range(5):
                version = await store.save_entity("items", {"item_id": entity_id, "count": count})
                entity = await get_existing(store, "items", entity_id)
                assert (entity["version"], entity["count"]) == (version, count)
            await store.delete_entity("items", entity_id)
            assert await store.get_entity("items", entity_id) is None

        await asyncio.gather(*(write_and_read(each) for each in range(50)))

    async def test_69_random_operations_return_what_they_return_alone(
        self, store: StorageStrategy
    ) -> None:
        """Each task changes only its own key, so that the expected results are known."""
        with seeded() as random:
            seeds = [random.randrange(2**32) for _ in range(40)]
            await asyncio.gather(*(_random_changes(store, f"task {each}", each) for each in seeds))


# -- mixed changes and their expected outcomes ----------------------------------------------


def _mixed() -> Iterator[Change]:
    """1,000 changes of all kinds and preconditions; `_exists_before` tells whether the entity exists."""
    at = utc_now()
    for number in range(MANY):
        key = Key("items", f"{number:04}")
        entity: Entity = {"item_id": key.id, "count": number, UPDATED_AT: at}
        label: Entity = {"label": "new", UPDATED_AT: at}
        kinds: tuple[Change, ...] = (
            Put(key, entity, at),
            Put(key, entity, at, ABSENT),
            Put(key, entity, at, 3),
            Put(key, entity, at, 2),
            Patch(key, {**label}, at),
            Patch(key, {**label}, at, 3),
            Patch(key, {**label}, at, 4),
            Delete(key),
            Delete(key, 3),
            Delete(key, 0),
        )
        yield kinds[number % len(kinds)]


def _exists_before(change: Change) -> bool:
    """Whether the test stores an entity of version 3 under the key before the change."""
    return int(change.key.id) // 10 % 2 == 0


def _expected_outcome(change: Change, version: int | None) -> Answer:
    """The outcome that the contract requires if the entity has this version, or None if it is missing."""
    expect = change.expect
    if expect is ABSENT:
        return AlreadyExistsError if version is not None else 1
    if expect is not ANY and version is None:
        return EntityNotFoundError
    if expect not in (ANY, PRESENT, version):
        return ConcurrencyConflictError
    if isinstance(change, Delete):
        return version
    return 1 if version is None else version + 1


def _version_after(change: Change, answer: Answer) -> int | None:
    if isinstance(answer, type):
        return 3 if _exists_before(change) else None
    return None if isinstance(change, Delete) else answer


def _as_verb_result(change: Change, answer: Answer) -> Answer:
    """The same result as the public verb returns it: for a delete, whether the entity existed."""
    if isinstance(change, Delete) and not isinstance(answer, type):
        return answer is not None
    return answer


def _result_or_error_class(result: object) -> Answer:
    if isinstance(result, StorageError):
        return type(result)
    if isinstance(result, BaseException):
        raise result
    assert result is None or isinstance(result, int)
    return result


async def _call_verb(store: StorageStrategy, change: Change) -> Answer:
    """Make the change with the public verb for one entity; the result, or the class of the error."""
    expected: Any = (
        {} if isinstance(change.expect, type(ANY)) else {"expected_version": change.expect}
    )
    try:
        if isinstance(change, Delete):
            return await store.delete_entity("items", change.key.id, **expected)
        if isinstance(change, Patch):
            fields = {"label": "new"}
            version: int = await store.update_entity("items", change.key.id, fields, **expected)
            return version
        if change.expect is ABSENT:
            return await store.create_entity("items", change.entity)
        return await store.save_entity("items", change.entity, **expected)
    except StorageError as exc:
        return type(exc)


async def _call_batch_verb(store: StorageStrategy, verb: str, ids: list[str]) -> list[Any]:
    entities = [{"item_id": each, "label": "new"} for each in ids]
    versions = dict.fromkeys(ids, 1)
    if verb == "create":
        return await store.create_entities("items", entities)
    if verb == "save":
        return await store.save_entities("items", entities, versions)
    if verb == "update":
        updates = {each: {"label": "new"} for each in ids}
        return await store.update_entities("items", updates, versions)
    if verb == "delete":
        return await store.delete_entities("items", ids, versions)
    return await store.import_entities("items", [{**each, "version": 7} for each in entities])


# -- random changes of one key --------------------------------------------------------------


async def _random_changes(store: StorageStrategy, entity_id: str, seed: int) -> None:
    from random import Random

    random = Random(seed)
    state: dict[str, Any] | None = None
    for _ in range(15):
        state = await _random_change(store, entity_id, random, state)
        found = await store.get_entity("items", entity_id)
        kept = None if found is None else {"count": found["count"], "version": found["version"]}
        assert kept == state


async def _random_change(
    store: StorageStrategy, entity_id: str, random: Random, state: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Make a random change of the key; returns the state that must be stored afterwards."""
    version = None if state is None else state["version"]
    condition = random.choice([ANY, 0 if version is None else version, 77])
    change: Change
    count = random.randrange(100)
    key, at = Key("items", entity_id), ""
    kind = random.choice(["create", "save", "update", "delete"])
    if kind == "create":
        change = Put(key, {"item_id": entity_id, "count": count}, at, ABSENT)
    elif kind == "save":
        change = Put(key, {"item_id": entity_id, "count": count}, at, condition)
    elif kind == "update":
        change = Patch(key, {"label": "new"}, at, PRESENT if condition is ANY else condition)
    else:
        change = Delete(key, condition)
    answer = _expected_outcome(change, version)
    assert await _call_verb(store, change) == _as_verb_result(change, answer)
    if isinstance(answer, type):
        return state
    if isinstance(change, Delete):
        return None
    return {
        "count": count if isinstance(change, Put) else state and state["count"],
        "version": answer,
    }
