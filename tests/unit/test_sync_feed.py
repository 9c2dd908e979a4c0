"""Change feeds of the blocking store, and of typed collections."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest

from hf_async_store import (
    Collection,
    ConfigurationError,
    EntityMismatchError,
    EntityNotFoundError,
    InvalidCursorError,
    InvalidInputError,
    OperationTimeoutError,
    StoreClosedError,
    SubscriptionAdvancedError,
    open_store,
    sync,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


class Job(msgspec.Struct):
    job_id: str
    status: str = "NEW"


JOBS = [
    Collection.from_model(Job, key="job_id", feed=3600),
    Collection("copies", key="copy_id"),
]
_SECONDS = 20.0


@pytest.fixture
def store() -> Iterator[sync.Store]:
    with sync.open_store("memory:", collections=JOBS) as store:
        store.create_entity("jobs", {"job_id": "a", "status": "NEW"})
        yield store


def test_125_a_thread_watches_what_another_one_writes(store: sync.Store) -> None:
    with ThreadPoolExecutor(1) as thread, store.watch("jobs", {"status": "DONE"}) as changes:
        told = thread.submit(next, changes)
        time.sleep(0.05)
        assert not told.done()
        store.update_entity("jobs", "a", {"status": "RUNNING"})
        store.update_entity("jobs", "a", {"status": "DONE"})
        change = told.result(_SECONDS)
        assert (change.kind, change.id, change.version) == ("put", "a", 3)
        assert change.token == changes.token
    with store.watch("jobs", since=change.token) as changes:
        store.delete_entity("jobs", "a")
        assert next(changes).kind == "delete"
    with pytest.raises(InvalidInputError, match="ended"):
        next(changes)
    with pytest.raises(InvalidCursorError), store.watch("jobs", since="x"):
        pass


def test_125_subscriptions_in_transactions(store: sync.Store) -> None:
    with store.subscribe("copy", "jobs") as changes:
        store.create_entity("jobs", {"job_id": "b"})
        change = next(changes)
        with store.begin_transaction() as tx:
            tx.create_entity("copies", {"copy_id": change.id})
            changes.advance(change, tx)
        with pytest.raises(SubscriptionAdvancedError):
            changes.advance(change)
        assert changes.name == "copy"
    assert [each.name for each in store.subscriptions()] == ["copy"]
    assert store.drop_subscription("copy")


def test_125_wait_for(store: sync.Store) -> None:
    assert store.wait_for("jobs", "a", timeout=_SECONDS)["version"] == 1
    with pytest.raises(EntityNotFoundError):
        store.wait_for("jobs", "b", timeout=_SECONDS)
    with pytest.raises(OperationTimeoutError):
        store.wait_for("jobs", "a", {"status": "DONE"}, timeout=0.01)
    timer = threading.Timer(0.05, store.update_entity, ["jobs", "a", {"status": "DONE"}])
    timer.start()
    assert store.wait_for("jobs", "a", {"status": "DONE"}, timeout=_SECONDS)["version"] == 2
    timer.join()


def test_125_closing_ends_a_thread_that_watches() -> None:
    store = sync.open_store("memory:", collections=JOBS).open()

    def watch() -> None:
        with store.watch("jobs") as changes:
            next(changes)

    with ThreadPoolExecutor(1) as thread:
        watching = thread.submit(watch)
        time.sleep(0.1)
        store.close()
        with pytest.raises(StoreClosedError):
            watching.result(_SECONDS)


def test_112_typed_collections_of_a_blocking_store(store: sync.Store) -> None:
    jobs = store.typed(Job)
    assert jobs.wait_for("a", timeout=_SECONDS) == Job("a")
    with jobs.watch({"status": "DONE"}) as changes:
        jobs.save(Job("a", "DONE"))
        change = next(changes)
        assert (change.kind, change.id, change.instance) == ("put", "a", Job("a", "DONE"))


async def test_109_typed_collections() -> None:
    async with open_store("memory:", collections=JOBS) as store:
        jobs = store.typed(Job)
        async with jobs.watch() as changes:
            await jobs.create(Job("a"))
            await store.import_entities("jobs", [{"job_id": "b", "status": None, "version": 2}])
            await jobs.delete("a")
            first = await anext(changes)
            assert (first.version, first.instance) == (1, Job("a"))
            with pytest.raises(EntityMismatchError):
                await anext(changes)
            deleted = await anext(changes)
            assert (deleted.kind, deleted.version, deleted.instance) == ("delete", 1, None)
            assert deleted.token == changes.token
        async with jobs.watch(since=first.token) as changes:
            with pytest.raises(EntityMismatchError):
                await anext(changes)
        await jobs.create(Job("c"))
        waiting = asyncio.create_task(jobs.wait_for("c", {"status": "DONE"}, timeout=_SECONDS))
        await asyncio.sleep(0.01)
        await jobs.save(Job("c", "DONE"))
        assert await waiting == Job("c", "DONE")
        async with store.begin_transaction() as tx:
            typed: Any = tx.typed(Job)  # type checkers refuse it
            with pytest.raises(InvalidInputError, match="by a store"):
                await typed.wait_for("c", timeout=_SECONDS)
            with pytest.raises(InvalidInputError, match="by a store"):
                async with typed.watch():
                    pass


def test_113_the_retention_of_a_declaration() -> None:
    for wrong in (0, -1, True, "1", float("nan"), float("inf")):
        with pytest.raises(ConfigurationError, match="feed"):
            Collection("jobs", key="job_id", feed=cast("Any", wrong))


def test_125_closing_leaves_the_contexts_that_threads_are_in() -> None:
    def close_inside() -> None:
        store = sync.open_store("memory:", collections=JOBS).open()
        with store.watch("jobs"), store.subscribe("copy", "jobs"):
            store.create_entity("jobs", {"job_id": "a"})
            stream = store.stream_entities("jobs")
            assert next(stream)["job_id"] == "a"
            store.close()

    for _ in range(20):  # the event loop would end their generators in any order
        with pytest.raises(StoreClosedError):
            close_inside()
