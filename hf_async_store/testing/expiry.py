"""Cases 114 to 117 of the contract: entities that expire, under a clock that the cases set."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import pytest

from hf_async_store.changes import ABSENT
from hf_async_store.errors import (
    AlreadyExistsError,
    BatchError,
    ConcurrencyConflictError,
    EntityNotFoundError,
    InvalidInputError,
    ReferenceViolationError,
    StorageError,
    TransactionAbortedError,
)
from hf_async_store.expiry import Expire
from hf_async_store.field_operations import increment
from hf_async_store.migration import backup_store, restore_store
from hf_async_store.query import EVERYTHING, Query, asc, contains, exists, in_, not_, path
from hf_async_store.schema import Collection, Field, Index
from hf_async_store.strategies import open_store
from hf_async_store.testing.concurrency import seeded
from hf_async_store.testing.repetitions import repetitions
from hf_async_store.values import Key

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from pathlib import Path
    from random import Random

    from hf_async_store.repository import RepositoryInterface
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.harness import Harness

EXPIRING: Final = (
    Collection("batches", key="batch_id"),
    Collection(
        "tasks",
        key="task_id",
        fields=["status", Field("completed_at", "timestamp")],
        indexes=[Index("status", "created_at")],
        expires=Expire(
            "completed_at", after=timedelta(days=30), where={"status": in_(["DONE", "FAILED"])}
        ),
    ),
    Collection("notes", key="note_id", fields=[Field("task_id", references="tasks"), "text"]),
    Collection(
        "steps",
        key="step_id",
        fields=[
            Field("task_id", references="tasks"),
            Field("batch_id", references="batches"),
            Field("expires_at", "timestamp"),
        ],
        expires=Expire("expires_at"),
    ),
    Collection(
        "sessions",
        key="session_id",
        fields=["user", Field("hits", "integer"), Field("expires_at", "timestamp")],
        indexes=["user", "expires_at"],
        expires=Expire("expires_at"),
        open=True,
    ),
    Collection(
        "folded",
        key="name",
        fields=["kind", Field("until", "timestamp")],
        expires=Expire("until", where={"kind": contains("temp", ignore_case=True)}),
    ),
)
"""Collections that expire; `folded` by a condition that not every engine can test itself."""

PLAIN: Final = tuple(
    Collection(
        each.name,
        key=each.key,
        fields=[field for field in each.fields.values() if field.name != each.key],
        indexes=each.indexes,
        open=each.open,
    )
    for each in EXPIRING
)
"""The same collections, as declared by a program that does not know that they expire."""

_START: Final = datetime(2040, 1, 1, tzinfo=UTC)
_TICK: Final = timedelta(microseconds=1)


class Time:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = _START

    def __call__(self) -> datetime:
        return self.now

    def after(self, **parts: float) -> datetime:
        """A later time."""
        return self.now + timedelta(**parts)

    def pass_by(self, **parts: float) -> None:
        """Let time pass."""
        self.now += timedelta(**parts)


def store_at(
    harness: Harness, time: Time, collections: Iterable[Collection] = EXPIRING
) -> StorageStrategy:
    """A store whose clock is this one, and which removes nothing in the background."""
    store = harness.store(collections)
    store._set_clock(time, None)
    return store


async def stored(store: StorageStrategy, collection: str) -> list[str]:
    """The ids of the entities that are physically there."""
    async with store.snapshot(expired=True) as reader:
        return sorted([each.key.id async for each in reader.select(Query(collection, EVERYTHING))])


async def fails(error: type[BaseException], work: Awaitable[object]) -> None:
    with pytest.raises(error):
        await work


def _ids(entities: Iterable[Any]) -> list[str]:
    return sorted(each["session_id"] for each in entities)


class ExpiryContract:
    """Expired entities are absent."""

    # -- 114: absent for every method ----------------------------------------------------------

    async def _two_sessions(self, store: StorageStrategy, time: Time) -> None:
        """`late` stays, `soon` expires in a minute."""
        minute = time.after(minutes=1)
        await store.create_entities(
            "sessions",
            [
                {"session_id": "late", "user": "u", "hits": 1, "expires_at": time.after(days=1)},
                {"session_id": "soon", "user": "u", "hits": 10, "expires_at": minute, "note": "x"},
            ],
        )

    async def _all_reads(self, store: RepositoryInterface) -> dict[str, Any]:
        """What every method that reads finds of the sessions."""
        pages = []
        cursor = None
        while True:
            page = await store.query_page("sessions", limit=1, cursor=cursor)
            pages += page.items
            cursor = page.cursor
            if cursor is None:
                break
        found: dict[str, list[Any]] = {
            "get": [await store.get_entity("sessions", each) for each in ("late", "soon")],
            "get many": await store.get_entities("sessions", ["late", "soon"]),
            "query": await store.query_entities("sessions"),
            "by index": await store.query_entities("sessions", {"user": "u"}),
            "by key": await store.query_entities("sessions", {"session_id": in_(["late", "soon"])}),
            "in order": await store.query_entities("sessions", order_by="expires_at", limit=5),
            "backwards": await store.query_entities("sessions", order_by="-expires_at", limit=5),
            "or": await store.query_entities("sessions", not_({"user": "v"})),
            "stream": [each async for each in store.stream_entities("sessions", {"user": "u"})],
            "pages": pages,
        }
        return {
            **{name: _ids(each for each in many if each) for name, many in found.items()},
            "count": await store.count_entities("sessions"),
            "count by index": await store.count_entities("sessions", {"user": "u"}),
            "exists": await store.count_entities("sessions", {path("note"): exists()}),
            "not exists": await store.count_entities("sessions", {path("note"): exists(False)}),
            "groups": await store.count_by("sessions", "user"),
            "sum": await store.sum_of("sessions", "hits"),
            "greatest": await store.max_of("sessions", "hits"),
            "least": await store.min_of("sessions", "hits"),
        }

    async def test_114_absent_for_every_read_at_once(self, harness: Harness) -> None:
        time = Time()
        async with store_at(harness, time) as store:
            await self._two_sessions(store, time)

            async def in_every_way() -> list[dict[str, Any]]:
                found = [await self._all_reads(store)]
                async with store.begin_transaction(read_only=True) as tx:
                    found.append(await self._all_reads(tx))
                if store.capabilities.queries_in_transaction != "outside":
                    async with store.begin_transaction() as tx:
                        found.append(await self._all_reads(tx))
                return found

            def expected(ids: list[str], hits: list[int], notes: int) -> dict[str, Any]:
                lists = ("get", "get many", "query", "by index", "by key", "in order", "backwards")
                return {
                    **dict.fromkeys((*lists, "or", "stream", "pages"), ids),
                    "count": len(ids),
                    "count by index": len(ids),
                    "exists": notes,
                    "not exists": len(ids) - notes,
                    "groups": [("u", len(ids))],
                    "sum": sum(hits),
                    "greatest": max(hits),
                    "least": min(hits),
                }

            time.now = time.after(minutes=1) - _TICK
            for each in await in_every_way():
                assert each == expected(["late", "soon"], [1, 10], 1)
            time.now += _TICK
            for each in await in_every_way():
                assert each == expected(["late"], [1], 0)
            assert await stored(store, "sessions") == ["late", "soon"], "nothing was removed"
            async with store.snapshot() as reader:
                keys = [Key("sessions", each) for each in ("late", "soon")]
                assert [each is not None for each in await reader.fetch(keys)] == [True, False]
                assert await reader.count(Query("sessions")) == 1
            plan = await store.explain_query("sessions", {"user": "u"})
            assert plan.access == ("index" if store.capabilities.indexes else "scan")

    async def test_114_absent_in_an_open_transaction(self, harness: Harness) -> None:
        time = Time()
        async with store_at(harness, time) as store:
            await self._two_sessions(store, time)
            async with store.begin_transaction() as tx:
                assert await tx.get_entity("sessions", "soon") is not None
                time.pass_by(minutes=1)
                assert await tx.get_entity("sessions", "soon") is None
                assert await tx.create_entity("sessions", {"session_id": "soon"}) == 1
                assert await tx.get_entity("sessions", "soon") is not None
            entity = await store.get_entity("sessions", "soon")
            assert entity is not None and entity["version"] == 1

    async def test_114_changes_by_filter_and_deletes_do_not_find_it(self, harness: Harness) -> None:
        time = Time()
        async with store_at(harness, time) as store:
            await self._two_sessions(store, time)
            time.pass_by(minutes=1)
            assert await store.update_where("sessions", None, {"user": "w"}) == 1
            assert await store.delete_entity("sessions", "soon") is False
            assert await store.delete_entities("sessions", ["soon", "late"]) == [False, True]
            assert await store.delete_where("sessions", None) == 0
            async with store.begin_transaction() as tx:
                assert await tx.delete_entity("sessions", "soon") is False
                assert await tx.delete_where("sessions", None) == 0

    async def test_114_the_id_can_be_created_again(self, harness: Harness) -> None:
        time = Time()
        async with store_at(harness, time) as store:
            ids = ("create", "save", "batch", "absent", "modify", "import", "expected")
            old: list[dict[str, object]] = [
                {"session_id": each, "user": "old", "expires_at": time.after(minutes=1)}
                for each in ids
            ]
            for _ in range(2):
                await store.save_entities("sessions", old)
            time.pass_by(minutes=1)

            def new(entity_id: str) -> dict[str, object]:
                return {"session_id": entity_id, "hits": 1}

            assert await store.create_entity("sessions", new("create")) == 1
            assert await store.save_entity("sessions", new("save")) == 1
            assert await store.create_entities("sessions", [new("batch")]) == [1]
            assert await store.create_entities("sessions", [new("absent")], if_absent=True) == [
                True
            ]
            assert await store.modify_entity("sessions", "modify", dict, default={"hits": 1}) == 1
            given = {**new("import"), "version": 7}
            assert await store.import_entities("sessions", [given]) == [7]
            expected = await store.save_entity("sessions", new("expected"), expected_version=ABSENT)
            assert expected == 1
            now = "2040-01-01T00:01:00.000000Z"
            for entity_id in ids:
                entity = await store.get_entity("sessions", entity_id)
                assert entity is not None
                assert "user" not in entity and "expires_at" not in entity
                if entity_id != "import":
                    assert (entity["version"], entity["created_at"]) == (1, now)
                await fails(AlreadyExistsError, store.create_entity("sessions", new(entity_id)))

    async def test_114_in_a_transaction_the_id_can_be_created_again(self, harness: Harness) -> None:
        time = Time()
        async with store_at(harness, time) as store:
            minute = time.after(minutes=1)
            old = [{"session_id": each, "expires_at": minute} for each in ("a", "b", "c")]
            await store.create_entities("sessions", old)
            time.pass_by(minutes=1)
            async with store.begin_transaction() as tx:
                assert await tx.create_entity("sessions", {"session_id": "a"}) == 1
                assert await tx.save_entity("sessions", {"session_id": "b"}) == 1
                assert await tx.update_entity("sessions", "b", {"hits": 2}) == 2
                assert await tx.modify_entity("sessions", "c", dict, default={"hits": 3}) == 1
                assert await tx.delete_entity("sessions", "a") is True
            assert _ids(await store.query_entities("sessions")) == ["b", "c"]

    async def test_114_one_of_several_creates_wins(self, harness: Harness) -> None:
        time = Time()
        async with store_at(harness, time) as store:
            for number in range(repetitions(25)):
                entity_id = f"s{number}"
                soon = {"session_id": entity_id, "expires_at": time.after(seconds=1)}
                await store.create_entity("sessions", soon)
                time.pass_by(seconds=1)

                async def create(mark: int, entity_id: str = entity_id) -> int | StorageError:
                    entity = {"session_id": entity_id, "hits": mark}
                    if mark % 2:
                        async with store.begin_transaction() as tx:
                            return await tx.create_entity("sessions", entity)
                    return await store.create_entity("sessions", entity)

                outcomes = await asyncio.gather(*map(create, range(6)), return_exceptions=True)
                won = [mark for mark, each in enumerate(outcomes) if each == 1]
                assert len(won) == 1, outcomes
                for each in outcomes:
                    assert each == 1 or isinstance(
                        each,
                        AlreadyExistsError | ConcurrencyConflictError | TransactionAbortedError,
                    )
                entity = await store.get_entity("sessions", entity_id)
                assert entity is not None
                assert (entity["version"], entity["hits"]) == (1, won[0])

    async def test_114_saves_beside_each_other_count_from_one(self, harness: Harness) -> None:
        time = Time()
        async with store_at(harness, time) as store:
            for number in range(repetitions(10)):
                entity = {"session_id": f"s{number}"}
                soon = {**entity, "expires_at": time.after(seconds=1)}
                assert await store.save_entity("sessions", soon) == 1
                time.pass_by(seconds=1)
                saves = [store.save_entity("sessions", entity) for _ in range(5)]
                assert sorted(await asyncio.gather(*saves)) == [1, 2, 3, 4, 5]

    async def test_114_a_condition_that_the_engine_cannot_test(self, harness: Harness) -> None:
        time = Time()
        async with store_at(harness, time) as store:
            entities: list[dict[str, object]] = [
                {"name": each, "kind": kind, "until": time.after(minutes=1)}
                for each, kind in (("a", "TEMPorary"), ("b", "temp"), ("c", "kept"), ("d", "Temp"))
            ]
            await store.create_entities("folded", entities)
            time.pass_by(minutes=1)
            assert [each["name"] for each in await store.query_entities("folded")] == ["c"]
            assert await store.count_entities("folded") == 1
            await fails(EntityNotFoundError, store.update_entity("folded", "a", {"kind": "kept"}))
            assert await store.create_entity("folded", {"name": "a"}) == 1
            assert await store.save_entity("folded", {"name": "b"}) == 1
            assert await store.save_entity("folded", {"name": "c"}) == 2
            assert await store.delete_entity("folded", "d") is False
            assert await store.purge_expired("folded") == 1
            assert await stored(store, "folded") == ["a", "b", "c"]

    async def test_114_changes_of_the_same_id_in_a_batch(self, harness: Harness) -> None:
        time = Time()
        async with store_at(harness, time) as store:
            past: dict[str, object] = {"session_id": "s", "expires_at": time.now}
            entity: dict[str, object] = {"session_id": "s"}
            # An entity that has expired when it is written is absent at once.
            assert await store.save_entities("sessions", [past, past, entity, entity]) == [
                1,
                1,
                1,
                2,
            ]
            assert await store.save_entities("sessions", [entity, past]) == [3, 4]
            assert await store.get_entity("sessions", "s") is None
            async with store.begin_transaction() as tx:
                assert await tx.create_entity("sessions", past) == 1
                assert await tx.create_entity("sessions", entity) == 1
                assert await tx.save_entity("sessions", past) == 2
                assert await tx.get_entity("sessions", "s") is None

    # -- 115: as if it were absent -------------------------------------------------------------

    async def test_115_an_update_never_revives_it(self, harness: Harness) -> None:
        time = Time()
        async with store_at(harness, time) as store:
            await self._two_sessions(store, time)
            time.pass_by(minutes=1)
            later = {"expires_at": time.after(days=1)}
            whole = {"session_id": "soon", **later}

            def changes(target: RepositoryInterface) -> list[Callable[[], Awaitable[object]]]:
                return [
                    lambda: target.update_entity("sessions", "soon", later),
                    lambda: target.update_entity("sessions", "soon", later, expected_version=1),
                    lambda: target.update_entity("sessions", "soon", later, returning=True),
                    lambda: target.update_entity("sessions", "soon", {"hits": increment(1)}),
                    lambda: target.save_entity("sessions", whole, expected_version=1),
                    lambda: target.delete_entity("sessions", "soon", expected_version=1),
                    lambda: target.modify_entity("sessions", "soon", lambda e: {**e, **later}),
                ]

            for change in changes(store):
                await fails(EntityNotFoundError, change())
            for number in range(len(changes(store))):
                with pytest.raises(EntityNotFoundError):
                    async with store.begin_transaction() as tx:
                        await changes(tx)[number]()
            with pytest.raises(EntityNotFoundError):
                async with store.begin_transaction() as tx:
                    await tx.conditional_update("sessions", "soon", later)
            with pytest.raises(BatchError) as failed:
                await store.update_entities("sessions", {"late": {"hits": 2}, "soon": later})
            first, second = failed.value.outcomes
            assert first == 2 and isinstance(second, EntityNotFoundError)
            assert await store.get_entity("sessions", "soon") is None
            assert await stored(store, "sessions") == ["late", "soon"]

    async def test_115_an_update_before_its_time_extends_it(self, harness: Harness) -> None:
        time = Time()
        async with store_at(harness, time) as store:
            await self._two_sessions(store, time)
            time.now = time.after(minutes=1) - _TICK
            assert await store.update_entity("sessions", "soon", {"expires_at": None}) == 2
            time.pass_by(days=9)
            entity = await store.get_entity("sessions", "soon")
            assert entity is not None and entity["expires_at"] is None

    async def test_115_references(self, harness: Harness) -> None:
        time = Time()
        async with store_at(harness, time) as store:
            if not store.capabilities.references:
                pytest.skip("the engine does not enforce references")
            done = {"task_id": "t", "status": "DONE", "completed_at": time.now}
            await store.create_entity("tasks", done)
            await store.create_entity("notes", {"note_id": "n", "task_id": "t"})
            await store.create_entity("notes", {"note_id": "o"})
            time.pass_by(days=30)
            assert await store.get_entity("tasks", "t") is None
            # The existing child stays readable and writable.
            assert await store.update_entity("notes", "n", {"text": "x"}) == 2
            assert await store.save_entity("notes", {"note_id": "n", "task_id": "t"}) == 3
            assert await store.update_entity("notes", "n", {"task_id": "t"}) == 4
            # A new reference fails, in every way.
            new = {"note_id": "m", "task_id": "t"}
            await fails(ReferenceViolationError, store.create_entity("notes", new))
            await fails(ReferenceViolationError, store.save_entity("notes", new))
            await fails(
                ReferenceViolationError, store.update_entity("notes", "o", {"task_id": "t"})
            )
            with pytest.raises(BatchError) as failed:
                await store.create_entities("notes", [{"note_id": "p"}, new])
            assert failed.value.outcomes[0] == 1
            assert isinstance(failed.value.outcomes[1], ReferenceViolationError)
            with pytest.raises(ReferenceViolationError):
                async with store.begin_transaction() as tx:
                    await tx.create_entity("notes", new)
            # Its removal waits for the last child.
            assert await store.purge_expired() == 0
            assert await stored(store, "tasks") == ["t"]
            await store.delete_entity("notes", "n")
            assert await store.purge_expired() == 1
            assert await stored(store, "tasks") == []

    async def test_115_a_parent_that_was_created_again(self, harness: Harness) -> None:
        time = Time()
        async with store_at(harness, time) as store:
            done = {"task_id": "t", "status": "DONE", "completed_at": time.now}
            await store.create_entity("tasks", done)
            await store.create_entity("notes", {"note_id": "n", "task_id": "t"})
            time.pass_by(days=30)
            assert await store.create_entity("tasks", {"task_id": "t", "status": "NEW"}) == 1
            assert await store.create_entity("notes", {"note_id": "m", "task_id": "t"}) == 1
            await store.save_entity("tasks", done)  # it has expired again
            if store.capabilities.references:
                await fails(
                    ReferenceViolationError,
                    store.create_entity("notes", {"note_id": "o", "task_id": "t"}),
                )

    async def test_115_expired_children_do_not_hold_their_parent(self, harness: Harness) -> None:
        time = Time()
        async with store_at(harness, time) as store:
            for number in range(2):
                batch = f"b{number}"
                await store.create_entity("batches", {"batch_id": batch})
                step = {"step_id": f"s{number}", "batch_id": batch}
                await store.create_entity("steps", {**step, "expires_at": time.after(minutes=1)})
            if store.capabilities.references:
                await fails(ReferenceViolationError, store.delete_entity("batches", "b0"))
            time.pass_by(minutes=1)
            assert await store.delete_entity("batches", "b0") is True
            async with store.begin_transaction() as tx:
                assert await tx.delete_entity("batches", "b1") is True
            assert await stored(store, "batches") == []

    # -- 114: removal --------------------------------------------------------------------------

    async def test_114_purge_removes_what_has_expired_alone(self, harness: Harness) -> None:
        time = Time()
        async with store_at(harness, time) as store:
            kept: list[dict[str, object]] = [
                {"session_id": "k1", "expires_at": time.after(minutes=2)},
                {"session_id": "k2", "expires_at": None},
                {"session_id": "k3"},
            ]
            soon = time.after(minutes=1)
            gone = [{"session_id": f"g{n:03}", "expires_at": soon} for n in range(450)]
            await store.create_entities("sessions", [*kept, *gone])
            assert await store.purge_expired() == 0
            time.pass_by(minutes=1)
            assert await store.purge_expired("sessions", limit=0) == 0
            assert await store.purge_expired("sessions", limit=3) == 3
            assert await store.purge_expired(limit=7) == 7
            assert len(await stored(store, "sessions")) == 443
            assert await store.purge_expired() == 440
            assert await stored(store, "sessions") == ["k1", "k2", "k3"]
            assert await store.purge_expired("sessions") == 0
            await fails(InvalidInputError, store.purge_expired("batches"))
            await fails(InvalidInputError, store.purge_expired(limit=-1))

    async def test_114_purge_children_before_parents(self, harness: Harness) -> None:
        time = Time()
        async with store_at(harness, time) as store:
            task = {"task_id": "t", "status": "DONE", "completed_at": time.now}
            await store.create_entity("tasks", task)
            step = {"step_id": "s", "task_id": "t", "expires_at": time.after(days=1)}
            await store.create_entity("steps", step)
            time.pass_by(days=31)
            assert await store.purge_expired() == 2
            assert await stored(store, "tasks") == await stored(store, "steps") == []

    async def test_114_purge_spares_what_was_created_again(self, harness: Harness) -> None:
        time = Time()
        async with store_at(harness, time) as store:
            for number in range(repetitions(25)):
                entity = {"session_id": f"s{number}"}
                await store.create_entity(
                    "sessions", {**entity, "expires_at": time.after(seconds=1)}
                )
                time.pass_by(seconds=1)
                await asyncio.gather(
                    store.purge_expired("sessions"), store.create_entity("sessions", entity)
                )
                found = await store.get_entity("sessions", f"s{number}")
                assert found is not None and found["version"] == 1

    async def test_114_removal_in_the_background(self, harness: Harness) -> None:
        time = Time()
        store = store_at(harness, time)
        store._set_clock(time, 0.02)
        async with store:
            await self._two_sessions(store, time)
            time.pass_by(minutes=1)
            for _ in range(1000):
                if await stored(store, "sessions") == ["late"]:
                    break
                await asyncio.sleep(0.02)
            assert await stored(store, "sessions") == ["late"]
            assert (await store.health())["ok"] is True

    async def test_114_a_program_that_does_not_declare_it(self, harness: Harness) -> None:
        if harness.url() is None:
            pytest.skip("one store at a time")
        time = Time()
        async with store_at(harness, time) as store, store_at(harness, time, PLAIN) as other:
            await self._two_sessions(store, time)
            time.pass_by(minutes=1)
            assert await store.get_entity("sessions", "soon") is None
            # The other one sees and changes it, until it is removed; that does not revive it.
            assert await other.get_entity("sessions", "soon") is not None
            assert await other.count_entities("sessions") == 2
            assert await other.update_entity("sessions", "soon", {"hits": 11}) == 2
            assert await store.get_entity("sessions", "soon") is None
            with pytest.raises(InvalidInputError):
                await other.purge_expired("sessions")
            assert await store.purge_expired() == 1
            assert await other.get_entity("sessions", "soon") is None
            recorded = {each.name: each for each in await other.recorded_collections()}
            assert recorded["sessions"].expires == Expire("expires_at")
            assert recorded["tasks"].expires is not None
            assert recorded["tasks"].expires.after == timedelta(days=30)

    # -- 116: backup and restore ---------------------------------------------------------------

    async def test_116_backup_and_restore_keep_the_time(
        self, harness: Harness, tmp_path: Path
    ) -> None:
        time = Time()
        async with store_at(harness, time) as store:
            await self._two_sessions(store, time)
            task = {"task_id": "t", "status": "DONE", "completed_at": time.now}
            await store.create_entity("tasks", task)
            await store.create_entity("notes", {"note_id": "n", "task_id": "t"})
            time.pass_by(days=30)
            # Also of a parent that has expired, which its child still needs.
            backup = await backup_store(store, tmp_path / "before.hfb")
            assert backup.counts["tasks"] == 1 and backup.counts["sessions"] == 2
        early = Time()
        async with open_store("memory:", collections=EXPIRING, clock=early) as copy:
            await restore_store(copy, backup.path)
            for entity_id in ("late", "soon"):
                assert await copy.get_entity("sessions", entity_id) is not None
            early.now = early.after(minutes=1)
            assert await copy.get_entity("sessions", "soon") is None
            early.now = early.after(days=30)
            assert await copy.get_entity("tasks", "t") is None
            assert await copy.get_entity("notes", "n") is not None

    async def test_116_restored_into_this_engine(self, harness: Harness, tmp_path: Path) -> None:
        time = Time()
        async with open_store("memory:", collections=EXPIRING, clock=time) as source:
            await self._two_sessions(source, time)
            task = {"task_id": "t", "status": "DONE", "completed_at": time.now}
            await source.create_entity("tasks", task)
            await source.create_entity("notes", {"note_id": "n", "task_id": "t"})
            backup = await backup_store(source, tmp_path / "before.hfb")
        time.pass_by(days=30)
        async with store_at(harness, time) as store:
            await restore_store(store, backup.path)
            assert await store.get_entity("sessions", "soon") is None
            assert await store.get_entity("tasks", "t") is None
            assert await store.get_entity("notes", "n") is not None
            assert await stored(store, "sessions") == ["late", "soon"]
            assert await store.create_entity("sessions", {"session_id": "soon"}) == 1

    # -- 117: the boundary ---------------------------------------------------------------------

    async def test_117_the_boundary_is_exact(self, harness: Harness) -> None:
        time = Time()
        at = _START + timedelta(days=40)
        async with store_at(harness, time) as store:
            await store.create_entity("sessions", {"session_id": "s", "expires_at": at})
            task = {"task_id": "t", "completed_at": at - timedelta(days=30)}
            await store.create_entity("tasks", {**task, "status": "DONE"})
            await store.create_entity("tasks", {**task, "task_id": "o", "status": "OPEN"})

            async def found() -> tuple[bool, bool, int, int]:
                session = await store.get_entity("sessions", "s")
                entity = await store.get_entity("tasks", "t")
                counts = [await store.count_entities(each) for each in ("sessions", "tasks")]
                return session is not None, entity is not None, counts[0], counts[1]

            time.now = at - _TICK
            assert await found() == (True, True, 1, 2)
            time.now = at
            assert await found() == (False, False, 0, 1)
            time.now = at + timedelta(days=365)
            assert await found() == (False, False, 0, 1)
            time.now = _START  # the store's time does not run backwards
            assert await found() == (False, False, 0, 1)

    async def test_117_what_is_no_timestamp_never_expires(self, harness: Harness) -> None:
        values: list[object] = [
            None,
            "",
            "soon",
            "2001",
            "2001-01-01",
            "2001-01-01T00:00:00.000000+00:00",
            "2001-01-01T00:00:00.0000000Z",
            " 2001-01-01T00:00:00.000000Z",
            "2001-01-01T00:00:00.000000Z\n",
            0,
            981173106,
            1.5,
            True,
            [],
            ["2001-01-01T00:00:00.000000Z"],
            {"at": "2001-01-01T00:00:00.000000Z"},
        ]
        planted = Collection(
            "sessions", key="session_id", fields=[Field("expires_at", "json")], open=True
        )
        time = Time()
        if harness.url() is None:
            pytest.skip("values of another type need another declaration on the same data")
        async with store_at(harness, time, [planted]) as other:
            await other.create_entities(
                "sessions",
                [{"session_id": f"{n:02}", "expires_at": each} for n, each in enumerate(values)],
            )
            past = {"session_id": "past", "expires_at": "2001-01-01T00:00:00.000000Z"}
            await other.create_entities("sessions", [{"session_id": "missing"}, past])
        collections = [each for each in EXPIRING if each.name == "sessions"]
        async with store_at(harness, time, collections) as store:
            alive = sorted([*(f"{n:02}" for n in range(len(values))), "missing"])
            assert _ids(await store.query_entities("sessions")) == alive
            assert await store.count_entities("sessions") == len(alive)
            assert await store.get_entity("sessions", "past") is None
            assert all(await store.get_entities("sessions", alive))
            for each in alive:
                assert await store.update_entity("sessions", each, {"hits": 1}) == 2
            assert await store.purge_expired() == 1
            assert await stored(store, "sessions") == alive

    async def test_117_random_times(self, harness: Harness) -> None:
        time = Time()
        with seeded() as random:
            await self._random_times(harness, time, random)

    async def _random_times(self, harness: Harness, time: Time, random: Random) -> None:
        async with store_at(harness, time) as store:
            moments = [time.now + timedelta(microseconds=n) for n in range(6)]
            expected: dict[str, tuple[str, datetime | None]] = {}
            for number in range(40):
                at = random.choice([*moments, None])
                status = random.choice(["DONE", "FAILED", "OPEN"])
                expected[f"t{number:02}"] = status, at
                completed = None if at is None else at - timedelta(days=30)
                task = {"task_id": f"t{number:02}", "status": status, "completed_at": completed}
                await store.create_entity("tasks", task)
            for moment in moments:
                time.now = moment
                alive = [
                    entity_id
                    for entity_id, (status, at) in expected.items()
                    if at is None or status == "OPEN" or at > moment
                ]
                found = await store.query_entities("tasks", order_by="task_id")
                assert [each["task_id"] for each in found] == alive
                done = await store.query_entities("tasks", {"status": "DONE"}, asc("created_at"))
                wanted = [each for each in alive if expected[each][0] == "DONE"]
                assert sorted(str(each["task_id"]) for each in done) == wanted
                by_key = await store.get_entities("tasks", list(expected))
                assert [each["task_id"] for each in by_key if each is not None] == alive
