"""Case 97: transforms of stored entities, and references whose parents are missing."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import pytest

from hf_async_store.errors import InvalidInputError, SchemaMismatchError
from hf_async_store.schema import Collection, Field
from hf_async_store.testing.assertions import get_existing
from hf_async_store.testing.cancellation_stepper import cancelled_at, turns
from hf_async_store.values import CREATED_AT, REMOVE, UPDATED_AT, VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.harness import Harness
    from hf_async_store.values import Entity

OLD: Final = [
    Collection("things", key="thing_id", fields=["status", "place"], indexes=["status"]),
    Collection("parts", key="part_id", fields=["thing_id"]),
]
NEW: Final = [
    Collection(
        "things",
        key="thing_id",
        fields=["state", Field("city", required=True), "street"],
        indexes=["state", "city"],
    ),
    OLD[1],
]
COUNT: Final = 21


def moved(entity: Entity) -> Mapping[str, object] | None:
    """Rename one field, split another one, and fill a new one."""
    changes: dict[str, object] = {}
    if "status" in entity:
        changes.update(state=entity["status"], status=REMOVE)
    if "place" in entity:
        city, _, street = str(entity["place"]).partition(", ")
        changes.update(city=city, street=street, place=REMOVE)
    return changes


async def fill(store: StorageStrategy) -> None:
    things = [
        {"thing_id": f"t{n:02}", "status": f"s{n % 3}", "place": f"c{n % 2}, road {n}", "n": n}
        for n in range(COUNT)
    ]
    await store.save_entities("things", things)


async def check_moved(store: StorageStrategy) -> None:
    found = sorted(await store.query_entities("things"), key=lambda each: str(each["thing_id"]))
    assert len(found) == COUNT
    for number, each in enumerate(found):
        assert each["n"] == number
        assert not {"status", "place"} & each.keys()
        assert each["state"] == f"s{number % 3}"
        assert (each["city"], each["street"]) == (f"c{number % 2}", f"road {number}")
    assert await store.count_entities("things", {"state": "s1"}) == COUNT // 3
    assert await store.count_entities("things", {"city": "c1"}) == COUNT // 2
    assert await store.schema_changes() == []


class TransformContract:
    """Case 97, for transforms."""

    @pytest.fixture
    def lasting(self, harness: Harness) -> Harness:
        """The harness; skipped if its stores are always empty at first."""
        if not (harness.capabilities.durable or harness.capabilities.multi_process):
            pytest.skip("each store of this engine is empty at first")
        return harness

    async def test_97_fields_are_renamed_split_and_filled(self, lasting: Harness) -> None:
        async with lasting.store(OLD) as store:
            await fill(store)
            before = await get_existing(store, "things", "t04")
        reported: list[tuple[str, int]] = []
        async with lasting.store(NEW) as store:
            with pytest.raises(SchemaMismatchError, match="city"):
                await store.apply_schema()
            transformed = await store.apply_schema(
                lambda change, done, total: reported.append((change.kind, done)),
                complete=True,
                transform={"things": moved},
            )
            assert transformed == COUNT
            await check_moved(store)
            after = await get_existing(store, "things", "t04")
            assert after[VERSION] == 2
            assert after[CREATED_AT] == before[CREATED_AT]
            assert str(after[UPDATED_AT]) > str(before[UPDATED_AT])
            assert ("transform", COUNT) in reported

            async def again(entity: Entity) -> Mapping[str, object] | None:
                await asyncio.sleep(0)
                return moved(entity)

            transforms = {"things": again, "parts": again}
            assert await store.apply_schema(transform=transforms) == 0
            assert await get_existing(store, "things", "t04") == after, "nothing is done twice"

    async def test_97_a_transform_that_would_change_each_time_is_refused(
        self, harness: Harness
    ) -> None:
        async with harness.store(OLD) as store:
            await store.save_entity("things", {"thing_id": "t", "n": 1})
            with pytest.raises(InvalidInputError, match="'t' each time"):
                await store.apply_schema(
                    transform={"things": lambda entity: {"n": int(str(entity["n"])) + 1}}
                )
            assert (await get_existing(store, "things", "t"))["n"] == 1

    async def test_97_a_transform_is_interrupted_and_repeated(self, lasting: Harness) -> None:
        async with lasting.store(OLD) as store:
            await fill(store)
        async with lasting.store(NEW) as store:
            for turn in turns():
                if not await cancelled_at(turn, store.apply_schema(transform={"things": moved})):
                    break
            await store.apply_schema(complete=True, transform={"things": moved})
            await check_moved(store)
            assert {each[VERSION] for each in await store.query_entities("things")} == {2}

    async def test_97_a_transform_loses_no_concurrent_change(self, lasting: Harness) -> None:
        async with lasting.store(OLD) as store:
            await fill(store)
        async with lasting.store(OLD) as old, lasting.store(NEW) as new:
            writing = asyncio.Event()

            async def write() -> None:
                for number in range(COUNT):
                    await old.update_entity("things", f"t{number:02}", {"more": number})
                    writing.set()

            async def slow(entity: Entity) -> Mapping[str, object] | None:
                await writing.wait()
                await asyncio.sleep(0.001)
                return moved(entity)

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(write())
                tasks.create_task(new.apply_schema(transform={"things": slow}))
                tasks.create_task(new.apply_schema(transform={"things": moved}))
            # An old program writes the old field once more: the next run brings it to the new one.
            await old.update_entity("things", "t05", {"status": "s2", "place": "c1, road 5"})
            assert (await get_existing(new, "things", "t05"))["status"] == "s2"
            await new.apply_schema(complete=True, transform={"things": moved})
            await check_moved(new)
            found = await new.query_entities("things")
            assert sorted(int(str(each["more"])) for each in found) == list(range(COUNT))

    async def test_97_a_function_may_move_one_form_by_and_by(self, lasting: Harness) -> None:
        """Both names are kept while old programs run: what they write last is copied."""

        def copied(entity: Entity) -> Mapping[str, object] | None:
            return {"state": entity["status"]} if "status" in entity else None

        async with lasting.store(OLD) as old, lasting.store(NEW) as new:
            await old.save_entity("things", {"thing_id": "t", "status": "a"})
            transform = {"things": lambda entity: {**(copied(entity) or {}), "city": "c"}}
            await new.apply_schema(transform=transform)
            await old.update_entity("things", "t", {"status": "b"})
            assert await old.count_entities("things", {"status": "b"}) == 1
            await new.apply_schema(complete=True, transform=transform)
            assert await new.count_entities("things", {"state": "b"}) == 1
            assert await old.count_entities("things", {"status": "b"}) == 1

    async def test_97_references_that_stored_data_breaks_are_listed(self, lasting: Harness) -> None:
        later = [
            OLD[0],
            Collection("parts", key="part_id", fields=[Field("thing_id", references="things")]),
        ]
        async with lasting.store(OLD) as store:
            await fill(store)
            for number in range(9):
                parent = f"t{number:02}" if number % 2 else f"nobody {number % 3}"
                await store.save_entity("parts", {"part_id": f"p{number}", "thing_id": parent})
            await store.save_entity("parts", {"part_id": "null", "thing_id": None})
        async with lasting.store(later) as store:
            listed = [each for each in await store.schema_changes() if each.kind == "reference"]
            if not lasting.capabilities.references:
                assert listed == []
                return
            [change] = listed
            assert (change.collection, change.name) == ("parts", "thing_id")
            assert ": 5;" in change.detail
            assert "'p0', 'p2', 'p4', 'p6', 'p8'" in change.detail
            await store.apply_schema(complete=True)
            assert [each.kind for each in await store.schema_changes()] == ["reference"]
            assert await store.count_entities("parts") == 10
            await store.update_entity("parts", "p0", {"n": 1})
            for number in range(3):
                await store.save_entity("things", {"thing_id": f"nobody {number}"})
            assert await store.schema_changes() == []
