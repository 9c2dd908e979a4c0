"""Tasks that queue for an entity in `modify_entity` share a write."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any

import pytest

from hf_async_store import (
    Collection,
    ConcurrencyConflictError,
    Field,
    InvalidInputError,
    OperationTimeoutError,
    StorageStrategy,
    UnavailableError,
    open_store,
)
from hf_async_store.changes import Delete, Patch
from hf_async_store.strategies.memory import MemoryEngine
from hf_async_store.values import Entity, Key

AT = "2026-01-01T00:00:00.000000Z"
KEY = Key("jobs", "a")
JOBS = [Collection("jobs", key="id", fields=[Field("parent", references="jobs")], open=True)]
NAME: ContextVar[str] = ContextVar("name", default="")


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many changes each write has."""
    found: list[int] = []
    write = MemoryEngine.write_each

    async def noted(self: MemoryEngine, changes: Any) -> Any:
        found.append(len(changes))
        return await write(self, changes)

    monkeypatch.setattr(MemoryEngine, "write_each", noted)
    monkeypatch.setattr(MemoryEngine, "shares_changes", lambda self, key: True)
    return found


@pytest.fixture
async def store(writes: list[int]) -> AsyncIterator[StorageStrategy]:
    async with open_store("memory://", collections=JOBS) as store:
        await store.save_entity("jobs", {"id": "a", "log": []})
        await store.save_entity("jobs", {"id": "b"})
        writes.clear()
        yield store


def logged(name: str) -> Callable[[Entity], Entity]:
    def change(entity: Entity) -> Entity:
        entity["log"].append(name)  # type: ignore[union-attr]  # it is a list
        return entity

    return change


async def queued(store: StorageStrategy, *changes: Any, **options: Any) -> list[asyncio.Task[Any]]:
    """A task for each change, which all got into the queue at once."""
    holder = store._retry_queue.ticket(KEY)
    await holder.acquire(1)
    tasks = [
        asyncio.create_task(store.modify_entity("jobs", "a", each, **options)) for each in changes
    ]
    for _ in range(3):
        await asyncio.sleep(0)
    holder.release()
    return tasks


async def stored(store: StorageStrategy) -> Entity:
    entity = await store.get_entity("jobs", "a")
    assert entity is not None
    return entity


async def test_one_write_and_a_version_for_each(store: StorageStrategy, writes: list[int]) -> None:
    tasks = await queued(store, *map(logged, "xyz"), returning=True)
    found = await asyncio.gather(*tasks)
    assert [(each["log"], each["version"]) for each in found] == [
        (["x"], 2),
        (["x", "y"], 3),
        (["x", "y", "z"], 4),
    ]
    assert await stored(store) == found[-1]
    assert writes == [1]
    assert not store._retry_queue.contended


async def test_after_a_conflict_each_tries_again(
    store: StorageStrategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of a function comes from what was committed, not from what was made for the others."""
    seen: list[object] = []
    write = MemoryEngine.write_each

    async def overtaken(self: MemoryEngine, changes: Any) -> Any:
        monkeypatch.setattr(MemoryEngine, "write_each", write)
        await write(self, [Patch(KEY, {"log": ["other"]}, AT)])
        return await write(self, changes)

    monkeypatch.setattr(MemoryEngine, "write_each", overtaken)

    def refuses(entity: Entity) -> Entity:
        seen.append(list(entity["log"]))  # type: ignore[arg-type]  # it is a list
        raise LookupError

    first, second, third = await queued(store, logged("x"), refuses, logged("y"))
    await asyncio.wait([first, second, third])
    assert isinstance(second.exception(), LookupError)
    assert seen[0] == ["x"]
    assert seen[-1] == ["other", "x"]
    assert (await stored(store))["log"] == ["other", "x", "y"]
    assert sorted([first.result(), third.result()]) == [3, 4]


async def test_an_error_of_a_function_is_its_own(store: StorageStrategy, writes: list[int]) -> None:
    def wrong(entity: Entity) -> Any:
        return None

    def stops(entity: Entity) -> Any:
        raise StopIteration

    tasks = await queued(store, logged("x"), wrong, stops, logged("y"))
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [found[0], found[3]] == [2, 3]
    assert "the function returned NoneType" in str(found[1])
    assert "StopIteration" in str(found[2])
    assert writes == [1]


async def test_an_asynchronous_function_and_a_reference_are_written_alone(
    store: StorageStrategy, writes: list[int]
) -> None:
    async def waits(entity: Entity) -> Entity:
        await asyncio.sleep(0)
        return logged("w")(entity)

    def refers(entity: Entity) -> Entity:
        return {**logged("r")(entity), "parent": "b"}

    tasks = await queued(store, logged("x"), waits, logged("y"), refers, logged("z"))
    assert await asyncio.gather(*tasks) == [2, 3, 4, 5, 6]
    assert (await stored(store))["log"] == list("xwyrz")
    assert writes == [1] * 4, "y is written with w, whose function had ended"


async def test_a_cancelled_task_ends_after_its_change_was_written(
    store: StorageStrategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, gate = asyncio.Event(), asyncio.Event()
    write = MemoryEngine.write_each

    async def slow(self: MemoryEngine, changes: Any) -> Any:
        began.set()
        await gate.wait()
        return await write(self, changes)

    monkeypatch.setattr(MemoryEngine, "write_each", slow)
    first, second, third = await queued(store, *map(logged, "xyz"))
    await began.wait()
    first.cancel()
    second.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not first.done()
    assert not second.done()
    gate.set()
    await asyncio.wait([first, second, third])
    assert first.cancelled()
    assert second.cancelled()
    assert third.result() == 4
    assert (await stored(store))["log"] == list("xyz")
    assert not store._retry_queue.contended


async def test_a_failure_of_the_write_is_that_of_all(
    store: StorageStrategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(self: MemoryEngine, changes: Any) -> Any:
        raise ConcurrencyConflictError("lost", outcome_unknown=True)

    monkeypatch.setattr(MemoryEngine, "write_each", fails)
    tasks = await queued(store, *map(logged, "xyz"))
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(each) for each in found] == [ConcurrencyConflictError] * 3
    assert len(set(map(id, found))) == 3


async def test_a_function_runs_in_the_context_of_its_caller(store: StorageStrategy) -> None:
    async def modify(name: str) -> None:
        NAME.set(name)
        await store.modify_entity("jobs", "a", lambda each: logged(NAME.get())(each))

    holder = store._retry_queue.ticket(KEY)
    await holder.acquire(1)
    tasks = [asyncio.create_task(modify(each)) for each in "xyz"]
    for _ in range(3):
        await asyncio.sleep(0)
    holder.release()
    await asyncio.gather(*tasks)
    assert (await stored(store))["log"] == list("xyz")


async def test_one_with_a_timeout_writes_itself(store: StorageStrategy, writes: list[int]) -> None:
    tasks = await queued(store, *map(logged, "xyz"), timeout=30.0)
    assert await asyncio.gather(*tasks) == [2, 3, 4]
    assert writes == [1, 1, 1]


async def test_one_with_a_timeout_does_not_write_for_others(
    store: StorageStrategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would have to wait for their write."""
    gate = asyncio.Event()
    write = MemoryEngine.write_each

    async def slow(self: MemoryEngine, changes: Any) -> Any:
        await gate.wait()
        return await write(self, changes)

    monkeypatch.setattr(MemoryEngine, "write_each", slow)
    holder = store._retry_queue.ticket(KEY)
    await holder.acquire(1)
    first = asyncio.create_task(store.modify_entity("jobs", "a", logged("x"), timeout=0.05))
    await asyncio.sleep(0)
    second = asyncio.create_task(store.modify_entity("jobs", "a", logged("y")))
    await asyncio.sleep(0)
    holder.release()
    done, _ = await asyncio.wait([first], timeout=10)
    gate.set()
    assert done
    assert isinstance(first.exception(), OperationTimeoutError)
    await second


async def test_a_cancellation_in_a_function_is_for_its_own_task(store: StorageStrategy) -> None:
    def cancelled(entity: Entity) -> Any:
        raise asyncio.CancelledError

    tasks = await queued(store, logged("x"), logged("y"), cancelled, logged("z"))
    done, _ = await asyncio.wait(tasks, timeout=10)
    assert [each in done and each.cancelled() for each in tasks] == [False, False, True, False]
    assert (await stored(store))["log"] == list("xyz")
    assert not store._retry_queue.contended


async def test_after_the_entity_was_deleted_a_default_counts(
    store: StorageStrategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = MemoryEngine.write_each

    async def overtaken(self: MemoryEngine, changes: Any) -> Any:
        monkeypatch.setattr(MemoryEngine, "write_each", write)
        await write(self, [Delete(KEY)])
        return await write(self, changes)

    monkeypatch.setattr(MemoryEngine, "write_each", overtaken)
    tasks = await queued(store, *map(logged, "xyz"), default={"log": []})
    assert sorted(await asyncio.gather(*tasks)) == [1, 2, 3]
    assert sorted((await stored(store))["log"]) == list("xyz")  # type: ignore[type-var, arg-type]


async def test_what_the_database_refuses_is_refused_for_one(
    store: StorageStrategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = MemoryEngine.write_each

    async def refusing(self: MemoryEngine, changes: Any) -> Any:
        if any("bad" in each.entity["log"] for each in changes):
            raise InvalidInputError("a constraint rejects the change")
        return await write(self, changes)

    monkeypatch.setattr(MemoryEngine, "write_each", refusing)
    tasks = await queued(store, *map(logged, ["x", "bad", "y"]))
    first, bad, last = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(bad, InvalidInputError)
    assert [first, last] == [2, 3]
    assert (await stored(store))["log"] == ["x", "y"]


async def test_a_function_that_raised_has_no_unknown_outcome(
    store: StorageStrategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = MemoryEngine.write_each

    async def lost(self: MemoryEngine, changes: Any) -> Any:
        monkeypatch.setattr(MemoryEngine, "write_each", write)
        await write(self, changes)
        raise UnavailableError("lost", outcome_unknown=True)

    def refuses(entity: Entity) -> Any:
        raise LookupError(entity["log"])

    monkeypatch.setattr(MemoryEngine, "write_each", lost)
    tasks = await queued(store, logged("x"), refuses, logged("y"))
    first, second, third = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(first, UnavailableError)
    assert isinstance(third, UnavailableError)
    assert isinstance(second, LookupError)
    assert second.args == (["x", "y"],), "what is stored, not what was made for the others"


async def test_all_tasks_end_if_all_are_cancelled_before_the_write(store: StorageStrategy) -> None:
    shared = asyncio.get_running_loop().create_future()

    def last(entity: Entity) -> Entity:
        if not shared.done():
            shared.set_result(None)  # this task runs next, before that of the write
        return entity

    tasks = await queued(store, logged("x"), logged("y"), last)
    await shared
    for each in asyncio.all_tasks() - {asyncio.current_task()}:
        each.cancel()
    done, _ = await asyncio.wait(tasks, timeout=10)
    assert done == {*tasks}
    assert not store._retry_queue.contended


async def test_a_function_refuses_what_is_stored_not_what_was_handed_on(
    store: StorageStrategy,
) -> None:
    """The answer to the write of the task before may come after later changes of others."""
    seen: list[object] = []

    def refuses(entity: Entity) -> Any:
        seen.append(entity["log"])
        raise LookupError

    holder = store._retry_queue.ticket(KEY)
    await holder.acquire(1)
    old = await stored(store)
    await store.update_entity("jobs", "a", {"log": ["other"]})
    task = asyncio.create_task(store.modify_entity("jobs", "a", refuses))
    await asyncio.sleep(0)
    store._retry_queue.hand_on(KEY, old)
    holder.release()
    with pytest.raises(LookupError):
        await task
    assert seen == [[], ["other"]]


async def test_a_function_that_ends_the_program(store: StorageStrategy) -> None:
    """The tasks whose changes were made, and will not be written with the others, try again."""

    class EndError(BaseException):
        pass

    times = 0

    def ends(entity: Entity) -> Entity:
        nonlocal times
        times += 1
        raise EndError

    first, second, third = await queued(store, logged("x"), logged("y"), ends)
    _, waiting = await asyncio.wait([first, second, third], timeout=20)
    assert not waiting
    assert isinstance(first.exception(), EndError)
    assert isinstance(third.exception(), EndError)
    assert second.result() == 2
    assert times == 2
    assert (await stored(store))["log"] == ["y"]
