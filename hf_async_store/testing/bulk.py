"""Cases 66 to 69: many changes at once, each of them as if alone."""

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
from hf_async_store.testing.harness import Harness, InjectsThrottling
from hf_async_store.values import UPDATED_AT, Entity, Key, utc_now

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from random import Random

    from hf_async_store.strategy import StorageStrategy

MANY = 1_000

Answer: TypeAlias = "int | bool | type[StorageError] | None"
"""What a change is answered: its outcome, or the class of its error."""


class BulkContract:
    """What batches and coalescing promise."""

    # 66 -------------------------------------------------------------------------------------

    async def test_66_mixed_changes_have_an_outcome_each(self, store: StorageStrategy) -> None:
        """At the seam itself: what the verbs send is never mixed as much as this."""
        await store.import_entities(
            "items",
            [{"item_id": each.key.id, "version": 3} for each in _mixed() if _is_there(each)],
        )
        changes = list(_mixed())
        outcomes = await store._engine.write_each(changes)
        expected = [_alone(each, 3 if _is_there(each) else None) for each in changes]
        assert [_answer(each) for each in outcomes] == expected
        records = await store._engine.fetch([each.key for each in changes])
        assert [None if each is None else each.version for each in records] == [
            _version_after(change, answer) for change, answer in zip(changes, expected, strict=True)
        ]

    async def test_66_a_burst_is_one_call(self, store: StorageStrategy) -> None:
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

    @pytest.mark.parametrize("verb", ["create", "save", "update", "delete", "import"])
    async def test_66_outcomes_in_input_order(self, store: StorageStrategy, verb: str) -> None:
        """Every third change fails, or for an import none can."""
        ids = [f"{each:02}" for each in range(30)]
        before = [each for each in ids if (int(each) % 3 == 0) is (verb == "create")]
        await store.create_entities("items", [{"item_id": each} for each in before])
        shuffled = ids[::2] + ids[1::2]
        if verb == "import":
            assert await _batch(store, verb, shuffled) == [7] * len(ids)
            return
        with pytest.raises(BatchError) as caught:
            await _batch(store, verb, shuffled)
        good: dict[str, Answer] = {"create": 1, "save": 2, "update": 2, "delete": True}
        error = AlreadyExistsError if verb == "create" else EntityNotFoundError
        assert [_answer(each) for each in caught.value.outcomes] == [
            good[verb] if int(each) % 3 else error for each in shuffled
        ]
        assert str(caught.value).startswith("10 of 30 ")
        assert caught.value.__cause__ in caught.value.outcomes

    async def test_66_one_conflict_leaves_the_others(self, store: StorageStrategy) -> None:
        entities = [{"item_id": f"{each:04}"} for each in range(MANY)]
        await store.create_entities("items", entities)
        await store.update_entity("items", "0500", {"label": "other"})
        changed = [{**each, "label": "new"} for each in entities]
        expected = {str(each["item_id"]): 1 for each in entities}
        with pytest.raises(BatchError) as caught:
            await store.save_entities("items", changed, expected)
        errors = [
            (place, each)
            for place, each in enumerate(caught.value.outcomes)
            if isinstance(each, StorageError)
        ]
        assert [place for place, _ in errors] == [500]
        assert isinstance(errors[0][1], ConcurrencyConflictError)
        assert errors[0][1].entity_id == "0500"
        found = await store.get_entities("items", list(expected))
        labels = [each and each["label"] for each in found]
        assert labels == ["new"] * 500 + ["other"] + ["new"] * (MANY - 501)

    async def test_66_one_bad_entity_refuses_the_batch(self, store: StorageStrategy) -> None:
        entities: list[dict[str, object]] = [{"item_id": f"{each:04}"} for each in range(MANY)]
        entities[700]["count"] = "seven"
        with pytest.raises(InvalidFieldError, match="items '0700'"):
            await store.create_entities("items", entities)
        assert await counted(store, "items", 0) == 0

    async def test_66_a_source_that_fails_writes_nothing(self, store: StorageStrategy) -> None:
        def source() -> Iterator[dict[str, object]]:
            yield {"item_id": "a"}
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await store.create_entities("items", source())
        assert await store.get_entity("items", "a") is None

    async def test_66_nothing_to_do(self, store: StorageStrategy) -> None:
        assert await store.create_entities("items", []) == []
        assert await store.save_entities("items", iter(())) == []
        assert await store.update_entities("items", {}) == []
        assert await store.delete_entities("items", []) == []
        assert await store.get_entities("items", []) == []
        assert await store.import_entities("items", []) == []

    # 67 -------------------------------------------------------------------------------------

    async def test_67_throttled_work_is_finished_or_reported(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        if not isinstance(harness, InjectsThrottling):
            pytest.skip("the harness cannot throttle: its engine never asks for less")
        ids = [f"{each:03}" for each in range(120)]
        await store.create_entities("items", [{"item_id": each} for each in ids])
        for requests in (1, 3, 1000):
            harness.throttle(requests)
            try:
                found = await store.get_entities("items", ids, timeout=5)
            except StorageError as exc:
                assert exc.retryable
                assert requests == 1000, "a few refusals are outlasted"
            else:
                assert None not in found, "what was not read yet is not missing"
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
        assert [_answer(each) for each in caught.value.outcomes] == [1, AlreadyExistsError, 1]
        assert (await get_existing(store, "items", "a"))["count"] == 1

    async def test_68_an_expected_version_is_for_the_first_of_them(
        self, store: StorageStrategy
    ) -> None:
        batch = [{"item_id": "a", "count": each} for each in range(3)]
        assert await store.save_entities("items", batch, {"a": ABSENT}) == [1, 2, 3]
        assert await store.save_entities("items", batch, {"a": 3}) == [4, 5, 6]
        with pytest.raises(BatchError) as caught:
            await store.save_entities("items", batch, {"a": 1})
        assert [_answer(each) for each in caught.value.outcomes] == [
            ConcurrencyConflictError,
            7,
            8,
        ]

    async def test_68_the_last_import_stays(self, store: StorageStrategy) -> None:
        batch = [{"item_id": "a", "version": each, "count": each} for each in (9, 4, 5)]
        assert await store.import_entities("items", batch) == [9, 4, 5]
        entity = await get_existing(store, "items", "a")
        assert (entity["version"], entity["count"]) == (5, 5)

    async def test_68_also_in_a_transaction(self, store: StorageStrategy) -> None:
        batch = [{"item_id": each, "count": place} for place, each in enumerate("abaab")]
        async with store.begin_transaction() as tx:
            assert await tx.save_entities("items", batch) == [1, 1, 2, 3, 2]
            assert await tx.delete_entities("items", ["a", "a"]) == [True, False]
        found = await payloads(store, "items", ["a", "b"])
        assert found == {"a": None, "b": {"item_id": "b", "count": 4}}

    async def test_68_a_repeated_read_is_answered_twice(self, store: StorageStrategy) -> None:
        await store.create_entity("items", {"item_id": "a"})
        found = await store.get_entities("items", ["a", "b", "a", "b"])
        assert [each is not None for each in found] == [True, False, True, False]

    async def test_68_with_a_thousand_of_them(self, store: StorageStrategy) -> None:
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
            "items", [{"item_id": each.key.id, "version": 3} for each in changes if _is_there(each)]
        )
        answers = await asyncio.gather(*(_single(store, each) for each in changes))
        assert answers == [
            _seen_by_verb(each, _alone(each, 3 if _is_there(each) else None)) for each in changes
        ]

    async def test_69_every_caller_has_an_error_of_its_own(self, store: StorageStrategy) -> None:
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
            asyncio.create_task(store.save_entity("items", {"item_id": key, "count": turn}))
            for turn in range(20)
            for key in keys
        ]
        versions = await asyncio.gather(*writes)
        assert versions == [turn + 1 for turn in range(20) for _ in keys]
        found = await store.get_entities("items", keys)
        assert [each and each["count"] for each in found] == [19] * len(keys)

    async def test_69_also_of_different_verbs(self, store: StorageStrategy) -> None:
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
        assert [_answer(each) for each in results] == [answer for _, answer in steps]
        assert payload(await store.get_entity("items", "a")) == {"item_id": "a", "label": "last"}

    async def test_69_everybody_reads_what_it_wrote(self, store: StorageStrategy) -> None:
        async def write_and_read(number: int) -> None:
            entity_id = f"item {number}"
            for turn in range(5):
                version = await store.save_entity("items", {"item_id": entity_id, "count": turn})
                entity = await get_existing(store, "items", entity_id)
                assert (entity["version"], entity["count"]) == (version, turn)
            await store.delete_entity("items", entity_id)
            assert await store.get_entity("items", entity_id) is None

        await asyncio.gather(*(write_and_read(each) for each in range(50)))

    async def test_69_random_work_is_answered_as_if_alone(self, store: StorageStrategy) -> None:
        """Each task works on a key of its own, so that it knows what it must be answered."""
        with seeded() as random:
            seeds = [random.randrange(2**32) for _ in range(40)]
            await asyncio.gather(*(_random_life(store, f"task {each}", each) for each in seeds))


# -- mixed changes, and what they are answered ----------------------------------------------


def _mixed() -> Iterator[Change]:
    """1,000 changes of each kind and condition; `_is_there` tells on what they meet."""
    at = utc_now()
    for number in range(MANY):
        key = Key("items", f"{number:04}")
        entity: Entity = {"item_id": key.id, "count": number, UPDATED_AT: at}
        kind = number % 10
        if kind == 0:
            yield Put(key, entity, at)
        elif kind == 1:
            yield Put(key, entity, at, ABSENT)
        elif kind == 2:
            yield Put(key, entity, at, 3)
        elif kind == 3:
            yield Put(key, entity, at, 2)
        elif kind == 4:
            yield Patch(key, {"label": "new", UPDATED_AT: at}, at)
        elif kind == 5:
            yield Patch(key, {"label": "new", UPDATED_AT: at}, at, 3)
        elif kind == 6:
            yield Patch(key, {"label": "new", UPDATED_AT: at}, at, 4)
        elif kind == 7:
            yield Delete(key)
        elif kind == 8:
            yield Delete(key, 3)
        else:
            yield Delete(key, 0)


def _is_there(change: Change) -> bool:
    """Whether the case stores an entity of version 3 before this change."""
    return int(change.key.id) // 10 % 2 == 0


def _alone(change: Change, version: int | None) -> Answer:
    """The outcome of a change that meets this version, by the words of the contract."""
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
        return 3 if _is_there(change) else None
    return None if isinstance(change, Delete) else answer


def _seen_by_verb(change: Change, answer: Answer) -> Answer:
    """A verb answers a delete by whether it was there."""
    if isinstance(change, Delete) and not isinstance(answer, type):
        return answer is not None
    return answer


def _answer(result: object) -> Answer:
    if isinstance(result, StorageError):
        return type(result)
    if isinstance(result, BaseException):
        raise result
    assert result is None or isinstance(result, int)
    return result


async def _single(store: StorageStrategy, change: Change) -> Answer:
    """The same change by the verb for one entity."""
    expected: Any = (
        {} if isinstance(change.expect, type(ANY)) else {"expected_version": change.expect}
    )
    try:
        if isinstance(change, Delete):
            return await store.delete_entity("items", change.key.id, **expected)
        if isinstance(change, Patch):
            fields = {"label": "new"}
            return await store.update_entity("items", change.key.id, fields, **expected)
        if change.expect is ABSENT:
            return await store.create_entity("items", change.entity)
        return await store.save_entity("items", change.entity, **expected)
    except StorageError as exc:
        return type(exc)


async def _batch(store: StorageStrategy, verb: str, ids: list[str]) -> list[Any]:
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


# -- a random life of one key ---------------------------------------------------------------


async def _random_life(store: StorageStrategy, entity_id: str, seed: int) -> None:
    from random import Random

    random = Random(seed)
    state: dict[str, Any] | None = None
    for _ in range(15):
        state = await _random_step(store, entity_id, random, state)
        found = await store.get_entity("items", entity_id)
        kept = None if found is None else {"count": found["count"], "version": found["version"]}
        assert kept == state


async def _random_step(
    store: StorageStrategy, entity_id: str, random: Random, state: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Do something to the key; returns what must be stored afterwards."""
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
    answer = _alone(change, version)
    assert await _single(store, change) == _seen_by_verb(change, answer)
    if isinstance(answer, type):
        return state
    if isinstance(change, Delete):
        return None
    return {
        "count": count if isinstance(change, Put) else state and state["count"],
        "version": answer,
    }
