"""The methods of the driver interface that applications reach only now and then, or on some engines."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final

import msgspec
import pytest

from hf_async_store.changes import ChangeMarker, Patch, Put
from hf_async_store.driver import Engine
from hf_async_store.errors import ConcurrencyConflictError, StoreClosedError
from hf_async_store.generators import Owned
from hf_async_store.query import Comparison, Query
from hf_async_store.schema import Collection
from hf_async_store.testing.cancellation_stepper import cancelled_at, turns
from hf_async_store.testing.concurrency import is_shared
from hf_async_store.testing.feed import feed_of, second, stranger
from hf_async_store.testing.harness import CONTRACT_COLLECTIONS, FEED_COLLECTIONS
from hf_async_store.values import Key, canonical, utc_now

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_async_store.changes import Outcome
    from hf_async_store.driver import Reader
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.harness import Harness
    from hf_async_store.values import Entity

_MARKS: Final = Collection("marks", key="mark_id")
_LATER: Final = Collection("later", key="later_id")
_NEVER_DECLARED: Final = Collection("never_declared", key="never_id")
_LATER_SECONDS: Final = 0.005
_SOON: Final = 5.0
"""Within so many seconds, a wait of a minute must notice a change."""


def _put(entity_id: str, mark: str | None = None, **expected: int) -> Put:
    """A change of an item, with a change marker if it is named."""
    entity: Entity = {"item_id": entity_id, "label": "even", "updated_at": utc_now()}
    marked: Entity = {"mark_id": mark, "of": entity_id, "version": 1}
    marker = None if mark is None else ChangeMarker(Key("marks", mark), marked)
    put = Put(Key("items", entity_id), entity, utc_now(), mark=marker)
    return msgspec.structs.replace(put, **expected)


async def _marks(store: StorageStrategy) -> set[str]:
    records = await store.engine.fetch([Key("marks", each) for each in "abcd"])
    return {each.key.id for each in records if each is not None}


class DriverContract:
    """Case 124, and part of case 134."""

    # -- snapshots -----------------------------------------------------------------------------

    async def test_124_a_snapshot_has_what_was_written(self, store: StorageStrategy) -> None:
        """Also where queries lag behind: then, so may the snapshot, but not its reads by key."""
        for number in range(3):
            label = "even" if number % 2 == 0 else "odd"
            await store.save_entity("items", {"item_id": f"{number}", "label": label})
        query = Query("items", Comparison(("label",), "eq", "even"))
        for _ in range(100):
            if await store.count_entities("items", {"label": "even"}) == 2:
                break
            await asyncio.sleep(0.05)
        await _check_reader(store.engine, query, "items", ["0", "2"])
        async with store.snapshot() as reader:
            await _check_reader(reader, query, "items", ["0", "2"])
            found = await reader.fetch([Key("items", each) for each in ("1", "nobody", "1")])
            assert [each and each.entity["label"] for each in found] == ["odd", None, "odd"]

    async def test_124_a_transaction_counts_what_it_selects(self, store: StorageStrategy) -> None:
        if store.capabilities.queries_in_transaction == "outside":
            pytest.skip("queries do not see the transaction")
        query = Query("items", Comparison(("label",), "eq", "even"))
        async with store.engine.session(None) as session:
            for each in ("0", "2"):
                assert await session.write([_put(each)]) == [1]
            await _check_reader(session, query, "items", ["0", "2"])

    async def test_124_matches_are_changed_in_one_step(self, store: StorageStrategy) -> None:
        for number in range(3):
            label = "even" if number % 2 == 0 else "odd"
            await store.save_entity("items", {"item_id": f"{number}", "label": label})
        query = Query("items", Comparison(("label",), "eq", "even"), limit=10)
        change = Patch(Key("items", ""), {"label": "new"}, utc_now(), 0)
        found = await store.engine.change_matches(query, change)
        if found is None:
            return  # it reads and writes separately
        assert [each["item_id"] for each in found.entities] == ["0", "2"]
        assert [each.id for each in found.keys] == ["0", "2"]
        assert [each["version"] for each in found.entities] == [1, 1]
        assert found.outcomes == [2, 2]
        labels = [each["label"] for each in await store.query_entities("items")]
        assert labels == ["new", "odd", "new"]

    # -- declarations --------------------------------------------------------------------------

    async def test_124_an_entity_is_fetched_without_a_declaration(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        await store.save_entity("counters", {"counter_id": "a", "n": 1})
        counters = store.collections["counters"]
        fewer = [each for each in CONTRACT_COLLECTIONS if each.name != "counters"]
        await _check_undeclared(store.engine, counters)
        if is_shared(harness.capabilities):
            async with harness.store(fewer) as other:
                await _check_undeclared(other.engine, counters)
        assert await store.undeclared() == []

    async def test_124_declarations_are_recorded_and_merged(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        await store.save_entity("items", {"item_id": "a"})
        declared = {each.name for each in CONTRACT_COLLECTIONS}
        assert {each.name for each in await store.engine.declarations()} == declared
        if not is_shared(harness.capabilities):
            return
        async with harness.store([_LATER]) as other:
            await other.save_entity("later", {"later_id": "a"})
            for at in (store, other):
                recorded = {each.name: each for each in await at.engine.declarations()}
                assert recorded.keys() == declared | {"later"}
                assert recorded["items"].indexes == store.collections["items"].indexes

    async def test_124_an_index_that_is_not_there_is_listed(self, harness: Harness) -> None:
        """An index declared on data is used at once, or listed by `schema_changes` until it is."""
        if not (harness.capabilities.durable and harness.capabilities.indexes):
            pytest.skip("the engine is not durable, or has no indexes")
        plain = Collection("things", key="thing_id", fields=["name"])
        async with harness.store([plain]) as store:
            for number in range(300):
                await store.save_entity("things", {"thing_id": f"{number}", "name": f"{number}"})
        indexed = Collection("things", key="thing_id", fields=["name"], indexes=["name"])
        async with harness.store([indexed]) as store:
            if await store.engine.schema_changes() == []:
                assert await _is_used(store), "schema_changes hides what the store lacks"
            await store.apply_schema(complete=True)
            assert await store.engine.schema_changes() == []
            assert await _is_used(store)

    # -- reads by key --------------------------------------------------------------------------

    async def test_124_keys_may_repeat(self, store: StorageStrategy) -> None:
        await store.save_entity("items", {"item_id": "a", "label": "first"})
        await store.save_entity("items", {"item_id": "b", "label": "second"})
        keys = [Key("items", each) for each in ("b", "a", "nobody", "b", "a")]
        async with store.engine.session(None) as session, store.snapshot() as snapshot:
            for reader in (store.engine, session, snapshot):
                found = await reader.fetch(keys)
                labels = [each and each.entity["label"] for each in found]
                assert labels == ["second", "first", None, "second", "first"]

    # -- writes in the task of their caller ------------------------------------------------------

    async def test_124_a_cancellable_write_ends_with_its_task(self, store: StorageStrategy) -> None:
        """And it lets other tasks run, even if it is refused. Both also hold for the other way to write."""

        async def write(put: Put) -> list[Outcome]:
            work = store.engine.write_cancellable([put])
            return await (store._write([put], None) if work is None else work)

        await store.save_entity("items", {"item_id": "x"})
        key = [Key("items", "x")]
        for turn in turns():
            cancelled = await cancelled_at(turn, write(_put("x")))
            found = await store.engine.fetch(key)
            await asyncio.sleep(_LATER_SECONDS)
            assert await store.engine.fetch(key) == found, "it was written after its task had ended"
            if not cancelled:
                break
        others: list[str] = []
        asyncio.get_running_loop().call_soon(others.append, "ran")
        [refused] = await write(_put("x", expect=99))
        assert isinstance(refused, ConcurrencyConflictError)
        assert others, "a caller who tries again and again would stop all others"

    # -- change markers ------------------------------------------------------------------------

    async def test_124_a_marker_is_written_with_its_change(self, harness: Harness) -> None:
        if not harness.capabilities.change_markers:
            pytest.skip("the engine declares no change markers")
        async with harness.store([*CONTRACT_COLLECTIONS, _MARKS]) as store:
            outcomes = await store.engine.write_each([_put("x", "a"), _put("x", "b", expect=7)])
            _check_refused(outcomes)
            assert await _marks(store) == {"a"}
            assert await store.engine.write_unblocked(lambda: [_put("x", "c")]) == [2]
            assert await _marks(store) == {"a", "c"}

    async def test_124_a_marker_is_part_of_a_transaction(self, harness: Harness) -> None:
        if not harness.capabilities.change_markers:
            pytest.skip("the engine declares no change markers")
        async with harness.store([*CONTRACT_COLLECTIONS, _MARKS]) as store:
            with pytest.raises(ZeroDivisionError):
                async with store.engine.session(None) as session:
                    await session.write([_put("x", "a")])
                    raise ZeroDivisionError
            assert await _marks(store) == set()
            async with store.engine.session(None) as session:
                assert await session.write([_put("x", "b")]) == [1]
            assert await _marks(store) == {"b"}
            entity = await store.engine.fetch([Key("marks", "b")])
            assert entity[0] is not None
            assert entity[0].entity["of"] == "x"

    # -- feeds ---------------------------------------------------------------------------------

    async def test_124_a_wait_for_a_feed_ends_with_a_change(self, harness: Harness) -> None:
        """By the store that waits, and by another one."""
        feed_of(harness)
        async with harness.store(FEED_COLLECTIONS) as store, second(harness, store) as other:
            await store.save_entity("notes", {"note_id": "first"})  # the feed is recorded
            for number, writer in enumerate((store, other)):
                position = await store.engine.feed_position("notes")
                wait = asyncio.create_task(store.engine.feed_changed({"notes": position}, 60.0))
                await asyncio.sleep(0.05)
                await writer.save_entity("notes", {"note_id": f"{number}"})
                done, _ = await asyncio.wait([wait], timeout=_SOON)
                wait.cancel()
                await asyncio.gather(wait, return_exceptions=True)
                assert done, "a change does not end the wait for the feed"

    async def test_124_a_wait_for_a_feed_ends_in_time(self, harness: Harness) -> None:
        feed_of(harness)
        async with harness.store(FEED_COLLECTIONS) as store:
            await store.save_entity("notes", {"note_id": "first"})
            position = await store.engine.feed_position("notes")
            async with asyncio.timeout(_SOON):
                await store.engine.feed_changed({"notes": position}, 0.05)
            assert (await store.engine.read_feed("notes", position, 10)).position == position

    # -- methods of one engine -----------------------------------------------------------------

    async def test_124_a_method_of_its_own_reaches_the_engine(self, store: StorageStrategy) -> None:
        """What a method runs in that only this engine has: it sees what is stored, and in a session what
        the session has written."""
        await store.save_entity("items", {"item_id": "a"})
        for writes in (False, True):
            async with store.engine.direct("its_own", writes=writes) as engine:
                assert engine is not None, "there is no engine for a method of its own"
                assert await engine.fetch([Key("items", "a")]) != [None]
        async with store.engine.session(None) as session:
            assert await session.write([_put("b")]) == [1]
            await store.engine.check_direct("its_own")
            own = await session.direct("its_own")
            assert await own.fetch([Key("items", "b")]) != [None]

    # -- probe and identity --------------------------------------------------------------------

    async def test_124_a_probe_reaches_the_store(self, harness: Harness) -> None:
        """It writes, so an engine that has released its resources cannot do it."""
        if not harness.capabilities.durable:
            pytest.skip("the engine is not durable")
        async with harness.store() as store:
            await store.save_entity("items", {"item_id": "a"})
            await store.engine.probe()
            await store.engine.probe()
            assert await store.count_entities("items") == 1
            assert await store.undeclared() == []
        with pytest.raises(StoreClosedError):
            await store.engine.probe()

    async def test_124_a_session_cannot_commit_after_close(self, harness: Harness) -> None:
        async with harness.store() as store, AsyncExitStack() as stack:
            await store.save_entity("items", {"item_id": "a"})
            session = await stack.enter_async_context(store.engine.session(None))
            await session.write([_put("b")])
            await store.close()
            with pytest.raises(StoreClosedError):
                await stack.aclose()

    async def test_134_a_store_on_other_data_is_another_store(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        await store.save_entity("items", {"item_id": "a"})
        async with stranger(harness, CONTRACT_COLLECTIONS) as other:
            await other.save_entity("items", {"item_id": "a"})
            assert not await store.is_same_store(other)
            assert not await other.is_same_store(store)


async def _check_reader(reader: Reader, query: Query, name: str, ids: Sequence[str]) -> None:
    """All ways to read what matches a query agree."""
    assert await reader.count(query) == len(ids)
    async with Owned(reader.select(query)) as selected:
        records = [each async for each in selected]
    assert sorted(each.key.id for each in records) == list(ids)
    assert {each.key.collection for each in records} == {name}
    entities = sorted(canonical(each.entity) for each in records)
    async with Owned(reader.select_batches(query)) as batches:
        assert sorted([canonical(each) async for batch in batches for each in batch]) == entities
    if isinstance(reader, Engine) and (few := await reader.select_at_once(query)) is not None:
        assert sorted(map(canonical, few)) == entities


async def _is_used(store: StorageStrategy) -> bool:
    """Whether a query by name uses the index."""
    return (await store.explain_query("things", {"name": "7"})).access == "index"


async def _check_undeclared(engine: Engine, counters: Collection) -> None:
    record = await engine.fetch_undeclared(counters, "a")
    assert record is not None
    assert (record.entity["n"], record.version) == (1, 1)
    assert await engine.fetch_undeclared(counters, "b") is None
    assert await engine.fetch_undeclared(_NEVER_DECLARED, "a") is None


def _check_refused(outcomes: Sequence[Outcome]) -> None:
    assert outcomes[0] == 1
    assert isinstance(outcomes[1], ConcurrencyConflictError)
