"""Cases 98 and 133: several stores in one database, next to what belongs to other programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from hf_async_store.errors import ConfigurationError, SchemaMismatchError
from hf_async_store.migration_routing import MigrationRouter
from hf_async_store.schema import Collection, Field, Index
from hf_async_store.testing.assertions import get_existing
from hf_async_store.testing.harness import SharesDatabase, skip_fault

if TYPE_CHECKING:
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.harness import Harness

COLLECTIONS: Final = [
    Collection(
        "things",
        key="thing_id",
        fields=["group", Field("size", "integer")],
        indexes=["group", Index("group", "size")],
    ),
    Collection("parts", key="part_id", fields=[Field("thing_id", references="things")]),
]
PLAIN: Final = ("plain_", "Other-1.")
ODD: Final = (
    'My "quoted" 100% name; -- ',
    "Größe.' ? :x $1 (y) ",
    "long" * 15 + "_one",
    "long" * 15 + "_two",
    "\U0001f980" * 12,
)
"""Names that an engine accepts and keeps apart, or refuses before any I/O."""


class SharedDatabaseContract:
    """Cases 98 and 133."""

    @pytest.fixture
    def shared(self, harness: Harness) -> SharesDatabase:
        """The harness, if its engine can keep several stores in one database."""
        if not isinstance(harness, SharesDatabase):
            skip_fault(harness, SharesDatabase)
        return harness

    async def test_133_stores_with_unusual_names_in_one_database(
        self, harness: Harness, shared: SharesDatabase
    ) -> None:
        accepted = [each for each in ODD if self._is_accepted(shared, each)]
        names = [None, *PLAIN, *accepted]

        def store_of(name: str | None) -> StorageStrategy:
            if name is None:
                return harness.store(COLLECTIONS)
            return shared.neighbour(name, COLLECTIONS)

        for number, name in enumerate(names):
            async with store_of(name) as store:
                assert await store.count_entities("things") == 0
                await self._fill(store, number)
        for number, name in enumerate(names):
            async with store_of(name) as store:
                await self._check(store, number)
                for other in (name, names[number - 1]):
                    async with store_of(other) as second:
                        assert await store.is_same_store(second) is (other == name)
        engines = [store_of(name).engine for name in names]
        found = [each._own_location() for each in engines if isinstance(each, MigrationRouter)]
        locations = [each for each in found if each is not None]
        assert len(set(locations)) == len(locations), "two stores have the same location"

    def _is_accepted(self, shared: SharesDatabase, name: str) -> bool:
        try:
            shared.neighbour(name, COLLECTIONS)
        except ConfigurationError:
            return False
        return True

    async def _fill(self, store: StorageStrategy, number: int) -> None:
        things = [{"thing_id": f"t{n}", "group": f"g{n % 2}", "size": n} for n in range(number + 2)]
        await store.save_entities("things", things)
        await store.save_entity("parts", {"part_id": "p", "thing_id": "t1"})
        async with store.begin_transaction() as tx:
            await tx.update_entity("things", "t1", {"n": number})
            await tx.delete_entity("things", "t0")
        await store.apply_schema(complete=True)
        assert await store.schema_changes() == []

    async def _check(self, store: StorageStrategy, number: int) -> None:
        assert await store.count_entities("things") == number + 1
        assert (await get_existing(store, "things", "t1"))["n"] == number
        found = await store.query_entities("things", {"group": "g1"}, order_by="-size")
        assert [each["size"] for each in found] == list(range(1, number + 2, 2))[::-1]
        report = await store.health()
        assert report["ok"], report["problems"]
        assert await store.undeclared() == []
        recorded = {each.name for each in await store.recorded_collections()}
        assert recorded == {"things", "parts"}

    @pytest.mark.parametrize("first", ["things", "others"])
    async def test_98_nothing_of_a_transaction_with_a_refused_collection_is_written(
        self, harness: Harness, shared: SharesDatabase, first: str
    ) -> None:
        name = await shared.occupy("things")
        before = await shared.occupant()
        others = Collection("others", key="other_id")
        changes = {"things": {"thing_id": "t"}, "others": {"other_id": "o"}}
        order = sorted(changes, key=lambda each: each != first)
        async with harness.store([*COLLECTIONS, others]) as store:
            with pytest.raises(SchemaMismatchError):
                async with store.begin_transaction() as tx:
                    for collection in order:
                        await tx.save_entity(collection, changes[collection])
        assert await shared.occupant() == before
        async with harness.store([others]) as store:
            try:
                found = await store.get_entity("others", "o")
            except SchemaMismatchError as exc:
                # All collections are in one table, which is the occupied one.
                assert name in str(exc)
            else:
                assert found is None

    async def test_98_what_has_the_name_of_a_table_is_refused_and_left_alone(
        self, harness: Harness, shared: SharesDatabase
    ) -> None:
        name = await shared.occupy("things")
        before = await shared.occupant()
        async with harness.store(COLLECTIONS) as store:
            for _ in range(2):
                with pytest.raises(SchemaMismatchError) as caught:
                    await store.save_entity("things", {"thing_id": "t"})
                assert name in str(caught.value)
                assert "table_prefix" in str(caught.value)
            with pytest.raises(SchemaMismatchError):
                await store.apply_schema()
        async with shared.neighbour("own_", COLLECTIONS) as store:
            await self._fill(store, 0)
        assert await shared.occupant() == before
