"""Cases 148 and 149: what an observer of a store is told, and what is logged."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

import pytest

from hf_async_store.errors import (
    AlreadyExistsError,
    ClaimLostError,
    ConcurrencyConflictError,
    InvalidInputError,
    StorageError,
    UnknownCollectionError,
)
from hf_async_store.observer import Event, Observation, Observer, Operation, StoreObserver
from hf_async_store.query import path
from hf_async_store.strategies import open_store
from hf_async_store.sync import blocking_store

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.harness import Harness
    from hf_async_store.values import Entity

SECRET: Final = "s3cr3t-0f-the-caller"  # noqa: S105 - must not be told
_TASKS: Final = 8

_running: ContextVar[Told | None] = ContextVar("running", default=None)


class Told(Observation):
    """One operation, as an observer was told of it."""

    def __init__(self, operation: Operation, parent: Told | None, callers: Sequence[Told]) -> None:
        self.operation = operation
        self.parent = parent
        self.callers = callers
        self.ended = 0
        self.error: type[BaseException] | None = None
        self._before: Told | None = None
        self._is_current = False

    def start(self, *, current: bool) -> None:
        self._is_current = current
        if current:
            self._before = _running.get()
            self.parent = self.parent or self._before
            _running.set(self)

    def end(self, error: BaseException | None) -> None:
        self.ended += 1
        self.error = None if error is None else type(error)
        if self._is_current:
            assert _running.get() is self, "it ended in another context"
            _running.set(self._before)


class Recorder(Observer, StoreObserver):
    """Records everything."""

    def __init__(self) -> None:
        self.engine = ""
        self.waiting: Callable[[], Mapping[str, int]] = dict
        self.operations: list[Told] = []
        self.events: list[tuple[Event, str | None, int]] = []
        self.caller = _running.get

    def observe(self, engine: str, waiting: Callable[[], Mapping[str, int]]) -> StoreObserver:
        self.engine, self.waiting = engine, waiting
        return self

    def records(self, within: Observation | None) -> bool:
        return True

    def operation(self, operation: Operation, within: Observation | None) -> Observation:
        assert within is None or isinstance(within, Told)
        return self._told(Told(operation, within, ()))

    def shared(self, operation: Operation, callers: Sequence[object]) -> Observation:
        return self._told(Told(operation, None, [each for each in callers if type(each) is Told]))

    def _told(self, told: Told) -> Told:
        self.operations.append(told)
        return told

    def count(self, event: Event, collection: str | None, number: int = 1) -> None:
        self.events.append((event, collection, number))

    def named(self, name: str) -> list[Told]:
        return [each for each in self.operations if each.operation.name == name]

    def only(self, name: str) -> Told:
        [found] = self.named(name)
        return found


def _observed(harness: Harness) -> tuple[StorageStrategy, Recorder]:
    store, recorder = harness.store(), Recorder()
    store._observe(recorder)
    return store, recorder


class ObservationContract:
    """What an observer is told, and what is logged, on each engine."""

    # 148 ------------------------------------------------------------------------------------

    async def test_148_methods_streams_and_transactions(self, harness: Harness) -> None:
        store, recorder = _observed(harness)
        async with store:
            assert recorder.engine == harness.capabilities.engine
            await store.create_entities("items", [{"item_id": each} for each in "abc"])
            assert len(await store.query_entities("items")) == 3
            async with aclosing(store.stream_entities("items")) as items:
                async for _ in items:
                    break
            async with store.begin_transaction() as tx:
                await tx.update_entity("items", "a", {"label": "x"})
            with pytest.raises(UnknownCollectionError):
                await store.get_entity(SECRET, "a")
        assert [each.ended for each in recorder.operations] == [1] * len(recorder.operations)
        created = recorder.only("create_entities")
        assert created.operation == Operation("create_entities", "items", 3, measured=False)
        assert recorder.only("query_entities").operation == Operation("query_entities", "items")
        assert recorder.only("stream_entities").error is None, "a stream may end early"
        transaction = recorder.only("transaction")
        assert transaction.operation == Operation("transaction")
        assert recorder.only("update_entity").parent is transaction
        failed = recorder.only("get_entity")
        assert (failed.operation.collection, failed.error) == (None, UnknownCollectionError)

    async def test_148_a_shared_commit_is_told_who_shares_it(self, harness: Harness) -> None:
        store, recorder = _observed(harness)
        async with store:
            await store.get_entity("items", "a")  # creates what the first call does
            saves = [store.save_entity("items", {"item_id": str(each)}) for each in range(_TASKS)]
            await asyncio.gather(*saves)
            assert not any(recorder.waiting().values())
        saved = recorder.named("save_entity")
        assert len(saved) == _TASKS
        commits = recorder.named("commit")
        assert sum(each.operation.size or 0 for each in commits) == _TASKS
        assert {each.operation.collection for each in commits} == {"items"}
        for each in saved:
            assert len([commit for commit in commits if each in commit.callers]) == 1

    async def test_148_conflicts_retries_and_lost_claims(self, harness: Harness) -> None:
        store, recorder = _observed(harness)
        async with store:
            await store.create_entity("items", {"item_id": "a", "label": "new"})
            with pytest.raises(ConcurrencyConflictError):
                await store.update_entity("items", "a", {}, expected_version=9)
            assert recorder.events == [("conflict", "items", 1)]
            attempts = 0

            async def change(entity: Entity) -> Entity:
                nonlocal attempts
                attempts += 1
                if attempts == 1:
                    await store.update_entity("items", "a", {"label": "other"})
                return entity

            await store.modify_entity("items", "a", change)
            assert recorder.events[1:] == [("conflict", "items", 1), ("retry", "items", 1)]
            if harness.capabilities.claims:
                await self._lose_a_claim(store, recorder)

    async def _lose_a_claim(self, store: StorageStrategy, recorder: Recorder) -> None:
        [claim] = await store.claim_entities("items")
        await store.break_claim("items", "a")
        for _ in range(2):
            with pytest.raises(ClaimLostError):
                await claim.update({"label": "late"})
        assert recorder.events[3:] == [("lost claim", "items", 1)], "a claim is lost once"
        assert [each.error for each in recorder.named("claim.update")] == [ClaimLostError] * 2
        assert recorder.named("claim.update")[0].operation == Operation("claim.update", "items")
        async with store.lock(SECRET):
            pass
        assert recorder.only("lock").operation == Operation("lock")

    async def test_148_nothing_that_is_stored_is_told(self, harness: Harness) -> None:
        store, recorder = _observed(harness)
        entity = {"item_id": SECRET, "label": SECRET, "data": {SECRET: SECRET}}
        async with store:
            await store.create_entity("items", entity)
            await store.save_entities("items", [entity])
            await store.update_where("items", {"label": SECRET}, {"data": SECRET})
            await store.query_page("items", {"label": SECRET})
            await store.count_by("items", "label")
            async with store.begin_transaction() as tx:
                await tx.get_entity("items", SECRET)
            for call in (
                store.create_entity("items", entity),
                store.update_entity("items", SECRET, {"label": SECRET}, expected_version=99),
                store.query_entities(SECRET, {SECRET: SECRET}),
                store.save_entity(collection="items", entity={SECRET: SECRET}),
            ):
                with suppress(StorageError):
                    await call
        told = [(each.operation, each.error) for each in recorder.operations]
        assert SECRET not in repr(told) + repr(recorder.events)

    async def test_148_an_observer_is_checked(self) -> None:
        for wrong in (object(), Recorder):
            with pytest.raises(InvalidInputError, match="observer"):
                open_store("memory:", observer=wrong)  # type: ignore[arg-type]

    async def test_148_blocking_callers_pass_their_context(self, harness: Harness) -> None:
        store, recorder = _observed(harness)
        outer = Told(Operation("request"), None, ())

        def call() -> None:
            _running.set(outer)
            with blocking_store(store) as blocking:
                blocking.save_entity("items", {"item_id": "a"})
                with blocking.begin_transaction() as tx:
                    tx.save_entity("items", {"item_id": "b"})
                assert [each["item_id"] for each in blocking.stream_entities("items")]

        await asyncio.to_thread(call)
        first, second = recorder.named("save_entity")
        assert first.parent is outer
        assert second.parent is recorder.only("transaction")

    # 149 ------------------------------------------------------------------------------------

    async def test_149_the_log_contains_no_ids_values_or_secrets(
        self, harness: Harness, caplog: pytest.LogCaptureFixture
    ) -> None:
        for name in (None, "hf_async_store"):  # of everything, drivers included
            caplog.set_level(logging.DEBUG, name)
        entity = {"item_id": SECRET, "label": SECRET, "data": {SECRET: SECRET}}
        attempts = 0
        async with harness.store() as store:
            await store.create_entity("items", entity)

            async def change(found: Entity) -> Entity:
                nonlocal attempts
                attempts += 1
                if attempts == 1:
                    await store.update_entity("items", SECRET, {"label": SECRET})
                return found

            await store.modify_entity("items", SECRET, change)
            await store.query_entities("items", {"label": SECRET}, [path("data", "x"), "label"])
            await store.update_where("items", {"label": SECRET}, {"data": SECRET})
            async with store.begin_transaction() as tx:
                await tx.save_entities("items", [entity])
            with pytest.raises(AlreadyExistsError):
                await store.create_entity("items", entity)
            if harness.capabilities.claims:
                [claim] = await store.claim_entities("items", owner=SECRET)
                await store.break_claim("items", SECRET)
                with pytest.raises(ClaimLostError):
                    await claim.update({"label": SECRET})
            await store.apply_schema()
            await store.delete_entity("items", SECRET)
        shown = "\n".join(map(logging.Formatter().format, caplog.records))
        assert SECRET not in shown
        own = {(each.name, each.levelname, each.getMessage()) for each in caplog.records}
        retried = "trying again after a conflict in items"
        assert ("hf_async_store.retries", "DEBUG", retried) in own
        if harness.capabilities.claims:
            assert ("hf_async_store.claims", "INFO", "a claim of items was lost") in own
        [opened] = [each for each in caplog.records if each.name == "hf_async_store.store"]
        assert opened.levelname == "INFO"
        assert f"'engine': '{harness.capabilities.engine}'" in opened.getMessage()
