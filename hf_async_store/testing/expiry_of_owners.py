"""Cases 99, 107 and 114 of the contract where they meet: unique values and claims of expired entities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from hf_async_store.errors import ClaimLostError, ReferenceViolationError, UniqueViolationError
from hf_async_store.expiry import Expire
from hf_async_store.schema import Collection, Field, Index
from hf_async_store.testing.claims import uses_of
from hf_async_store.testing.expiry import EXPIRING, Time, store_at, stored
from hf_async_store.testing.unique_indexes import refusal_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable

    from hf_async_store.claims import Claim
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.harness import Harness

OWNERS: Final = (
    Collection(
        "names",
        key="name_id",
        fields=["name", "zone", Field("until", "timestamp")],
        indexes=[Index("name", unique=True), Index("zone", "name", unique=True)],
        expires=Expire("until"),
    ),
    Collection("uses", key="use_id", fields=[Field("name_id", references="names")]),
)
"""Names that are unique while they have not expired."""

JOBS: Final = (
    Collection(
        "jobs",
        key="job_id",
        fields=["state", Field("until", "timestamp")],
        indexes=["state"],
        expires=Expire("until"),
    ),
)

_NAMES: Final = ["a", "b", "c", "d", "e", "f"]


async def _lost(work: Awaitable[object]) -> None:
    with pytest.raises(ClaimLostError):
        await work


class OwnerExpiryContract:
    """Unique values and claims of entities that have expired."""

    # -- an expired unique value is free -----------------------------------------------------

    def _owners(self, harness: Harness, time: Time) -> StorageStrategy:
        if not harness.capabilities.unique_indexes:
            pytest.skip("the engine does not declare unique_indexes")
        return store_at(harness, time, OWNERS)

    async def _expired_owners(
        self, store: StorageStrategy, time: Time, names: Iterable[str] = _NAMES
    ) -> None:
        """Let each name belong to the entity old-NAME, which has just expired."""
        soon = {"until": time.after(seconds=1)}
        owners = [{"name_id": f"old-{each}", "name": each, "zone": "z", **soon} for each in names]
        await store.create_entities("names", owners)
        with pytest.raises(UniqueViolationError):
            await store.create_entity("names", {"name_id": "new", "name": next(iter(names))})
        time.pass_by(seconds=1)

    async def test_114_an_expired_unique_value_is_free(self, harness: Harness) -> None:
        time = Time()

        def new(entity_id: str, name: str) -> dict[str, object]:
            return {"name_id": entity_id, "name": name, "zone": "z"}

        async with self._owners(harness, time) as store:
            await store.create_entity("names", {"name_id": "p"})
            await self._expired_owners(store, time)
            assert await store.create_entity("names", new("na", "a")) == 1
            assert await store.save_entity("names", new("nb", "b")) == 1
            assert await store.update_entity("names", "p", {"name": "c", "zone": "z"}) == 2
            assert await store.create_entities("names", [new("nd", "d"), new("ne", "e")]) == [1, 1]
            assert await store.modify_entity("names", "nf", dict, default=new("nf", "f")) == 1
            for each, owner in zip("abcdef", ["na", "nb", "p", "nd", "ne", "nf"], strict=True):
                error = await refusal_of(store.create_entity("names", new("late", each)))
                assert (error.owner_id, error.fields) == (owner, ("name",))
                # Its old id is as free as any other, its old value is not.
                with pytest.raises(UniqueViolationError):
                    await store.create_entity("names", new(f"old-{each}", each))
            await store.purge_expired()
            for each in _NAMES:
                with pytest.raises(UniqueViolationError):
                    await store.create_entity("names", new("late", each))
            assert await store.delete_entity("names", "na")
            assert await store.create_entity("names", new("late", "a")) == 1
            assert await stored(store, "names") == ["late", "nb", "nd", "ne", "nf", "p"]

    async def test_114_in_a_transaction_an_expired_unique_value_is_free(
        self, harness: Harness
    ) -> None:
        time = Time()
        async with self._owners(harness, time) as store:
            await store.create_entity("names", {"name_id": "p"})
            await self._expired_owners(store, time)
            async with store.begin_transaction() as tx:
                await tx.create_entity("names", {"name_id": "na", "name": "a", "zone": "z"})
                await tx.update_entity("names", "p", {"name": "b", "zone": "z"})
                await tx.create_entity("names", {"name_id": "old-c", "name": "c", "zone": "z"})
            with pytest.raises(UniqueViolationError):
                async with store.begin_transaction() as tx:
                    await tx.create_entity("names", {"name_id": "late", "name": "a"})
            with pytest.raises(ZeroDivisionError):
                async with store.begin_transaction() as tx:
                    await tx.create_entity("names", {"name_id": "nd", "name": "d"})
                    raise ZeroDivisionError
            assert await store.create_entity("names", {"name_id": "nd", "name": "d"}) == 1
            found = await store.query_entities("names", order_by="name_id")
            assert [(each["name_id"], each["name"], each["version"]) for each in found] == [
                ("na", "a", 1),
                ("nd", "d", 1),
                ("old-c", "c", 1),
                ("p", "b", 2),
            ]

    async def test_114_the_expired_owner_has_children(self, harness: Harness) -> None:
        """Nothing can remove it as long as they exist; its value is free all the same."""
        time = Time()
        async with self._owners(harness, time) as store:
            soon = {"until": time.after(seconds=1)}
            await store.create_entity("names", {"name_id": "old", "name": "x", **soon})
            await store.create_entity("uses", {"use_id": "u", "name_id": "old"})
            time.pass_by(seconds=1)
            assert await store.create_entity("names", {"name_id": "new", "name": "x"}) == 1
            with pytest.raises(UniqueViolationError):
                await store.create_entity("names", {"name_id": "late", "name": "x"})
            assert await store.update_entity("uses", "u", {"note": "still there"}) == 2
            await store.purge_expired()
            assert await store.delete_entity("uses", "u")
            await store.purge_expired()
            assert await stored(store, "names") == ["new"]
            with pytest.raises(UniqueViolationError):
                await store.create_entity("names", {"name_id": "late", "name": "x"})

    async def test_114_a_value_expires_again_and_again(self, harness: Harness) -> None:
        """Several expired owners of one value are stored at once."""
        time = Time()
        async with self._owners(harness, time) as store:
            for number in range(4):
                soon = {"name_id": f"n{number}", "name": "x", "until": time.after(seconds=1)}
                assert await store.create_entity("names", soon) == 1
                with pytest.raises(UniqueViolationError):
                    await store.create_entity("names", {"name_id": "late", "name": "x"})
                time.pass_by(seconds=1)
            assert await store.create_entity("names", {"name_id": "n0", "name": "x"}) == 1
            with pytest.raises(UniqueViolationError):
                await store.create_entity("names", {"name_id": "n1", "name": "x"})
            assert await store.create_entity("names", {"name_id": "n1", "name": "y"}) == 1
            await store.purge_expired()
            assert await stored(store, "names") == ["n0", "n1"]

    async def test_114_an_index_is_added_beside_freed_values(self, harness: Harness) -> None:
        if not harness.capabilities.multi_process:
            pytest.skip("each store of this engine is empty at first")
        time = Time()
        names, uses = OWNERS
        more = Collection(
            "names",
            key="name_id",
            fields=["name", "zone", Field("until", "timestamp")],
            indexes=[*names.indexes, "until"],
            expires=names.expires,
        )
        async with self._owners(harness, time) as store:
            await self._expired_owners(store, time, ["x"])
            await store.create_entity("names", {"name_id": "new", "name": "x"})
        async with store_at(harness, time, [more, uses]) as store:
            await store.apply_schema(complete=True)
            with pytest.raises(UniqueViolationError):
                await store.create_entity("names", {"name_id": "late", "name": "x"})
            assert await store.purge_expired() == 1
            assert await stored(store, "names") == ["new"]

    # -- expiry ends a claim -----------------------------------------------------------------

    def _jobs(
        self, harness: Harness, time: Time, collections: Iterable[Collection] = JOBS
    ) -> StorageStrategy:
        if not harness.capabilities.claims:
            pytest.skip("the engine has no claims")
        return store_at(harness, time, collections)

    async def _claimed(
        self, store: StorageStrategy, time: Time, ids: Iterable[str] = ("a",)
    ) -> list[Claim]:
        """Claims of new jobs, which expire in a second."""
        for each in ids:
            job = {"job_id": each, "state": "new", "until": time.after(seconds=1)}
            await store.create_entity("jobs", job)
        return await store.claim_entities("jobs", order_by="job_id", limit=10, lease=600.0)

    async def _refused(self, store: StorageStrategy, claim: Claim) -> None:
        for each in uses_of(claim, {"state": "late"}, {"job_id": "beside"}).values():
            await _lost(each())
        assert await store.get_entity("jobs", "beside") is None

    async def test_114_expiry_ends_a_claim(self, harness: Harness) -> None:
        time = Time()
        async with self._jobs(harness, time) as store:
            [claim] = await self._claimed(store, time)
            await claim.update({"state": "old"})
            time.pass_by(seconds=1)
            await self._refused(store, claim)
            assert await store.claims("jobs") == []
            assert await store.claim_entities("jobs") == []
            assert await store.count_entities("jobs") == 0

    async def test_114_a_holder_may_extend_what_it_has_claimed(self, harness: Harness) -> None:
        time = Time()
        async with self._jobs(harness, time) as store:
            [claim] = await self._claimed(store, time)
            await claim.update({"until": time.after(seconds=5)})
            time.pass_by(seconds=4)
            await claim.renew()
            await claim.update({"state": "done"})
            time.pass_by(seconds=1)
            await self._refused(store, claim)

    async def test_114_a_change_under_a_claim_refers_to_what_has_expired(
        self, harness: Harness
    ) -> None:
        time = Time()
        async with self._jobs(harness, time, EXPIRING) as store:
            if not store.capabilities.references:
                pytest.skip("the engine does not enforce references")
            await store.create_entity("batches", {"batch_id": "b"})
            done = {"status": "DONE", "completed_at": time.now}
            await store.create_entities("tasks", [{"task_id": "t"}, {"task_id": "u", **done}])
            step = {"step_id": "s", "batch_id": "b", "expires_at": time.after(days=1)}
            await store.create_entity("steps", step)
            await store.create_entity("notes", {"note_id": "n", "task_id": "t"})
            time.pass_by(days=30)
            [note] = await store.claim_entities("notes")
            with pytest.raises(ReferenceViolationError):
                await note.finish({"task_id": "u"})
            await note.finish({"text": "kept"})
            [batch] = await store.claim_entities("batches")
            await batch.delete()
            assert await stored(store, "batches") == await stored(store, "steps") == []
            assert await store.claims("batches") == await store.claims("notes") == []

    async def test_114_expiry_by_a_condition_that_the_engine_cannot_test_ends_a_claim(
        self, harness: Harness
    ) -> None:
        time = Time()
        async with self._jobs(harness, time, EXPIRING) as store:
            entity = {"name": "a", "kind": "TEMP", "until": time.after(minutes=1)}
            await store.create_entity("folded", entity)
            [claim] = await store.claim_entities("folded", lease=600.0)
            assert await claim.update({"until": time.after(minutes=2)}) == 2
            time.pass_by(minutes=1)
            assert await claim.update({"kind": "temp"}) == 3
            time.pass_by(minutes=1)
            await _lost(claim.update({"kind": "kept"}))
            await _lost(claim.finish({"kind": "kept"}))
            await _lost(claim.delete())
            assert await stored(store, "folded") == ["a"]

    async def test_107_what_is_created_after_an_expiry_is_unclaimed(self, harness: Harness) -> None:
        time = Time()

        def again(entity_id: str) -> dict[str, object]:
            return {"job_id": entity_id, "state": "again"}

        async with self._jobs(harness, time) as store:
            claims = await self._claimed(store, time, "abcd")
            assert [each.id for each in claims] == ["a", "b", "c", "d"]
            time.pass_by(seconds=1)
            assert await store.create_entity("jobs", again("a")) == 1
            assert await store.save_entity("jobs", again("b")) == 1
            async with store.begin_transaction() as tx:
                await tx.create_entity("jobs", again("c"))
            assert await store.create_entities("jobs", [again("d"), again("e")]) == [1, 1]
            for each in claims:
                await self._refused(store, each)
            found = await store.claim_entities("jobs", order_by="job_id", limit=10, lease=600.0)
            assert [each.id for each in found] == ["a", "b", "c", "d", "e"]
            assert {each.attempts for each in found} == {1}
            for each in claims:
                await self._refused(store, each)
            await found[0].finish({"state": "done"})
            entity = await store.get_entity("jobs", "a")
            assert entity is not None
            assert (entity["state"], entity["version"]) == ("done", 2)
