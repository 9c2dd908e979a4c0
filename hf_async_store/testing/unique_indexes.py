"""Cases 96 and 99: unique indexes."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any, Final

import pytest
import pytest_asyncio

from hf_async_store.errors import (
    BatchError,
    ConcurrencyConflictError,
    ConfigurationError,
    InvalidFieldError,
    PartialChangeError,
    SchemaMismatchError,
    StorageError,
    TransactionAbortedError,
    UniqueViolationError,
)
from hf_async_store.field_operations import increment
from hf_async_store.query import ne, path
from hf_async_store.schema import Collection, Field, Index
from hf_async_store.strategies.memory import MemoryStorageStrategy
from hf_async_store.testing.assertions import get_existing
from hf_async_store.testing.concurrency import seeded
from hf_async_store.testing.harness import CONTRACT_COLLECTIONS
from hf_async_store.testing.process_workers import run_workers
from hf_async_store.testing.repetitions import repetitions
from hf_async_store.values import REMOVE

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Sequence
    from random import Random

    from hf_async_store.repository import RepositoryInterface
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.harness import Harness


def things(*unique: Index, plain: Sequence[Index] = ()) -> list[Collection]:
    fields = [
        Field("name"),
        Field("number", "number"),
        Field("flag", "boolean"),
        Field("at", "timestamp"),
        Field("zone"),
    ]
    return [Collection("things", key="thing_id", fields=fields, indexes=[*unique, *plain])]


BY_NAME: Final = Index("name", unique=True)
UNIQUE: Final = things(
    BY_NAME, Index("number", unique=True), Index("flag", "at", "zone", unique=True)
)
PLAIN: Final = things()
ITEMS: Final = [
    Collection("items", key="item_id", fields=["label"], indexes=[Index("label", unique=True)]),
    *(each for each in CONTRACT_COLLECTIONS if each.name == "counters"),
]


async def refusal_of(work: Awaitable[object]) -> UniqueViolationError:
    """The violation that `work` raises, by itself or as the only failure of a batch."""
    try:
        await work
    except UniqueViolationError as exc:
        return exc
    except BatchError as exc:
        [found] = [each for each in exc.outcomes if isinstance(each, StorageError)]
        assert isinstance(found, UniqueViolationError)
        return found
    raise AssertionError("there was no violation")


async def names_of(store: RepositoryInterface) -> dict[str, Any]:
    found = await store.query_entities("things", order_by="thing_id")
    return {str(each["thing_id"]): each.get("name") for each in found}


def thing(entity_id: str, name: object = None, **fields: object) -> dict[str, object]:
    return {"thing_id": entity_id, "name": name, **fields}


def _random_change(random: Random) -> tuple[str, Any]:
    """A verb, and its argument."""
    entity_id = random.choice("abcd")
    fields: dict[str, object] = {}
    if random.random() < 0.8:
        fields["name"] = random.choice(["x", "y", "z", None, "X"])
    if random.random() < 0.5:
        fields["number"] = random.choice([1, 1.0, 2, None])
    if random.random() < 0.5:
        fields |= {"flag": random.choice([True, False]), "zone": random.choice(["u", "v", None])}
        fields["at"] = "2026-01-01T00:00:00.000000Z"
    verb = random.choice(["create", "save", "update", "update", "delete"])
    return verb, (entity_id, fields)


async def _apply(store: RepositoryInterface, work: tuple[str, Any]) -> object:
    verb, (entity_id, fields) = work
    if verb == "create":
        return await store.create_entity("things", {"thing_id": entity_id, **fields})
    if verb == "save":
        return await store.save_entity("things", {"thing_id": entity_id, **fields})
    if verb == "update":
        return await store.update_entity("things", entity_id, fields)
    return await store.delete_entity("things", entity_id)


async def _outcome(store: StorageStrategy, works: Sequence[tuple[str, Any]]) -> object:
    """The results of a change, or of several in a transaction; or the error."""
    try:
        if len(works) == 1:
            return [await _apply(store, works[0])]
        async with store.begin_transaction() as tx:
            return [await _apply(tx, each) for each in works]
    except UniqueViolationError as exc:
        return exc.entity_id, exc.fields, exc.owner_id
    except StorageError as exc:
        return type(exc)


async def _contents(store: StorageStrategy) -> list[tuple[object, ...]]:
    names = ("thing_id", "name", "number", "flag", "zone", "version")
    found = await store.query_entities("things", order_by="thing_id")
    return [tuple([each.get(name) for name in names]) for each in found]


def _renamed(name: str) -> Any:
    return lambda entity: {**entity, "name": name}


class UniqueIndexContract:
    """Unique indexes."""

    @pytest_asyncio.fixture
    async def unique(
        self, harness: Harness, _nothing_is_left: None
    ) -> AsyncGenerator[StorageStrategy, None]:
        """An open store with unique indexes, and the things a and b."""
        if not harness.capabilities.unique_indexes:
            pytest.skip("the engine does not declare unique_indexes")
        async with harness.store(UNIQUE) as store:
            await store.create_entity("things", thing("a", "x", number=1))
            await store.create_entity("things", thing("b", "y", number=2))
            yield store

    @pytest.fixture
    def enforcing(self, harness: Harness) -> Harness:
        """The harness of an engine with unique indexes whose stores keep their data."""
        capabilities = harness.capabilities
        if not (capabilities.unique_indexes and capabilities.multi_process):
            pytest.skip("the engine has no unique indexes, or another store of it has other data")
        return harness

    async def test_99_without_the_capability_the_declaration_is_refused(
        self, harness: Harness
    ) -> None:
        if harness.capabilities.unique_indexes:
            async with harness.store(UNIQUE) as store:
                assert await store.query_entities("things") == []
            return
        with pytest.raises(ConfigurationError, match="things declares a unique index"):
            harness.store(UNIQUE)

    # -- 99: single changes ------------------------------------------------------------------

    async def test_99_the_error_names_the_owner(self, unique: StorageStrategy) -> None:
        error = await refusal_of(unique.create_entity("things", thing("c", "x")))
        assert (error.collection, error.entity_id, error.owner_id) == ("things", "c", "a")
        assert (error.fields, error.field) == (("name",), "name")
        assert (error.retryable, error.outcome_unknown) == (False, False)
        assert await unique.get_entity("things", "c") is None

    async def test_99_every_verb_is_refused_and_changes_nothing(
        self, unique: StorageStrategy
    ) -> None:
        before = await unique.query_entities("things", order_by="thing_id")
        for work in (
            unique.save_entity("things", thing("c", "x")),
            unique.save_entity("things", thing("b", "x")),
            unique.update_entity("things", "b", {"name": "x"}),
            unique.update_entity("things", "b", {"name": "x"}, expected_version=1),
            unique.update_entity("things", "b", {"number": increment(-1)}),
            unique.modify_entity("things", "b", _renamed("x")),
            unique.modify_entity("things", "c", _renamed("x"), default={"zone": "z"}),
            unique.create_entities("things", [thing("c", "x")], if_absent=True),
        ):
            assert (await refusal_of(work)).owner_id == "a"
        with pytest.raises(PartialChangeError) as caught:
            await unique.update_where("things", {path("thing_id"): "b"}, {"name": "x"})
        assert isinstance(caught.value.cause, UniqueViolationError)
        assert await unique.query_entities("things", order_by="thing_id") == before

    async def test_99_an_entity_keeps_its_own_value(self, unique: StorageStrategy) -> None:
        await unique.save_entity("things", thing("a", "x", number=1, zone="z"))
        await unique.update_entity("things", "a", {"name": "x"})
        await unique.update_entity("things", "a", {"number": 1.0})
        await unique.modify_entity("things", "a", _renamed("x"))
        assert (await get_existing(unique, "things", "a"))["version"] == 5

    async def test_99_a_value_is_freed(self, unique: StorageStrategy) -> None:
        for number, free in enumerate(
            (
                unique.update_entity("things", "a", {"name": "other"}),
                unique.update_entity("things", "c0", {"name": None}),
                unique.update_entity("things", "c1", {"name": REMOVE}),
                unique.save_entity("things", {"thing_id": "c2"}),
                unique.delete_entity("things", "c3"),
                unique.delete_where("things", {path("thing_id"): "c4"}),
                unique.update_where("things", {path("thing_id"): "c5"}, {"name": "third"}),
            )
        ):
            new = thing(f"c{number}", "x")
            await refusal_of(unique.create_entity("things", new))
            await free
            await unique.create_entity("things", new)
        await refusal_of(unique.create_entity("things", thing("d", "third")))

    async def test_99_null_and_missing_values_do_not_count(self, unique: StorageStrategy) -> None:
        await unique.create_entities("things", [thing(f"n{each}") for each in range(3)])
        await unique.create_entities("things", [{"thing_id": f"m{each}"} for each in range(3)])
        partly: list[dict[str, object]] = [
            {"flag": True, "at": None, "zone": "z"},
            {"flag": True, "zone": "z"},
            {"at": "2026-01-01T00:00:00.000000Z", "zone": "z"},
        ]
        for number, fields in enumerate([*partly, *partly]):
            await unique.create_entity("things", thing(f"p{number}", **fields))

    async def test_99_several_fields_together(self, unique: StorageStrategy) -> None:
        at = "2026-01-01T00:00:00.000000Z"
        await unique.update_entity("things", "a", {"flag": True, "at": at, "zone": "z"})
        await unique.update_entity("things", "b", {"flag": True, "at": at, "zone": "y"})
        error = await refusal_of(unique.update_entity("things", "b", {"zone": "z"}))
        assert (error.fields, error.owner_id) == (("flag", "at", "zone"), "a")
        assert error.field == "flag, at, zone"
        await unique.update_entity("things", "b", {"flag": False, "zone": "z"})
        await refusal_of(unique.update_entity("things", "b", {"flag": True}))
        whole = thing("c", flag=False, at=at, zone="z")
        assert (await refusal_of(unique.create_entity("things", whole))).owner_id == "b"

    async def test_99_which_values_are_the_same(self, harness: Harness) -> None:
        """An engine keeps the values of fields that it does not declare as they are."""
        if not harness.capabilities.unique_indexes:
            pytest.skip("the engine does not declare unique_indexes")
        long = "é" * 511
        texts = ("A", "a", "a ", "\u00e9", "e\u0301", "", long + "ab", long + "ac", "a\\x00'\"")
        async with harness.store(things(BY_NAME, Index("number", unique=True))) as store:
            for number, each in enumerate(texts):
                await store.create_entity("things", thing(f"t{number}", each))
            for number, each in enumerate(texts):
                error = await refusal_of(store.create_entity("things", thing("new", each)))
                assert error.owner_id == f"t{number}"
            await store.create_entity("things", thing("n1", number=1))
            await store.create_entity("things", thing("n2", number=2**53 + 1))
            await store.create_entity("things", thing("n3", number=float(2**53)))
            await store.create_entity("things", thing("n4", number=-0.0))
            same = (("n1", 1.0), ("n2", 2**53 + 1), ("n3", 2**53), ("n4", 0))
            for owner, value in same:
                error = await refusal_of(store.save_entity("things", thing("new", number=value)))
                assert error.owner_id == owner

    async def test_99_a_text_has_at_most_1024_bytes(self, unique: StorageStrategy) -> None:
        await unique.create_entity("things", thing("c", "é" * 512))
        for name in ("x" * 1025, "é" * 513):
            with pytest.raises(InvalidFieldError, match="name"):
                await unique.create_entity("things", thing("d", name))
            with pytest.raises(InvalidFieldError, match="name"):
                await unique.update_entity("things", "a", {"name": name})
        assert await unique.get_entity("things", "d") is None

    async def test_99_an_index_serves_queries(self, unique: StorageStrategy) -> None:
        found = await unique.query_entities("things", {"name": "x"})
        assert [each["thing_id"] for each in found] == ["a"]
        if unique.capabilities.indexes:
            plan = await unique.explain_query("things", {"name": "x"})
            assert (plan.access, plan.index) == ("index", "name-index")

    # -- 99: batches -------------------------------------------------------------------------

    async def test_99_in_a_batch_each_change_fails_alone(self, unique: StorageStrategy) -> None:
        new = [thing(f"c{n}", "x" if n == 3 else f"c{n}") for n in range(8)]
        for work, refused in (
            (unique.create_entities("things", new), "c3"),
            (unique.save_entities("things", new), "c3"),
            (
                unique.update_entities(
                    "things", {f"c{n}": {"name": "y" if n == 5 else f"d{n}"} for n in (4, 5, 6)}
                ),
                "c5",
            ),
        ):
            with pytest.raises(BatchError) as caught:
                await work
            outcomes = caught.value.outcomes
            [error] = [each for each in outcomes if isinstance(each, StorageError)]
            assert isinstance(error, UniqueViolationError)
            assert error.entity_id == refused
        names = await names_of(unique)
        assert [names[f"c{n}"] for n in (2, 4, 5, 6)] == ["c2", "d4", "c5", "d6"]
        assert "c3" not in names

    async def test_99_one_of_the_same_values_in_a_batch_wins(self, unique: StorageStrategy) -> None:
        new = [thing(f"c{n:02}", f"v{n % 5}") for n in range(40)]
        with pytest.raises(BatchError) as caught:
            await unique.create_entities("things", new)
        won = {str(new[n]["thing_id"]) for n, e in enumerate(caught.value.outcomes) if e == 1}
        stored = {key: name for key, name in (await names_of(unique)).items() if key[0] == "c"}
        assert stored.keys() == won
        assert sorted(stored.values()) == [f"v{n}" for n in range(5)]
        for number, each in enumerate(caught.value.outcomes):
            if each != 1:
                assert isinstance(each, UniqueViolationError)
                assert stored[each.owner_id] == new[number]["name"]

    async def test_99_an_import_is_refused(self, unique: StorageStrategy) -> None:
        new = [thing(f"c{n}", "x" if n == 3 else f"c{n}", version=7) for n in range(6)]
        error = await refusal_of(unique.import_entities("things", new))
        assert (error.entity_id, error.owner_id) == ("c3", "a")
        names = await names_of(unique)
        assert "c3" not in names
        assert names["c5"] == "c5"

    async def test_99_coalesced_changes_have_their_own_outcomes(
        self, unique: StorageStrategy
    ) -> None:
        changes = [unique.create_entity("things", thing(f"c{n}", f"v{n % 7}")) for n in range(30)]
        changes += [unique.update_entity("things", "b", {"zone": f"z{n}"}) for n in range(5)]
        changes += [unique.update_entity("things", "b", {"name": "x"})]
        outcomes = await asyncio.gather(*changes, return_exceptions=True)
        assert [type(each) for each in outcomes[30:35]] == [int] * 5
        assert isinstance(outcomes[35], UniqueViolationError)
        failed = [each for each in outcomes[:30] if isinstance(each, UniqueViolationError)]
        assert outcomes[:30].count(1) == 7
        assert len(failed) == 23

    # -- 99: transactions --------------------------------------------------------------------

    async def test_99_a_modification_that_waited_is_refused_alone(
        self, unique: StorageStrategy
    ) -> None:
        async def rename(name: str) -> int:
            return await unique.modify_entity("things", "m", lambda each: {**each, "name": name})

        await unique.create_entities("things", [thing("m"), thing("n", "taken")])
        names = ["taken", *"123456"]
        results = await asyncio.gather(*map(rename, names * 2), return_exceptions=True)
        refused = [isinstance(each, UniqueViolationError) for each in results]
        assert refused == [each == "taken" for each in names * 2]
        assert sorted(each for each in results if isinstance(each, int)) == [*range(2, 14)]

    async def test_99_a_transaction_is_refused(self, unique: StorageStrategy) -> None:
        for first, then in (
            (thing("c", "new"), thing("d", "x")),
            (thing("c", "new"), thing("d", "new")),
        ):
            with pytest.raises((UniqueViolationError, TransactionAbortedError)):
                async with unique.begin_transaction() as tx:
                    await tx.create_entity("things", first)
                    await tx.create_entity("things", then)
            assert (await names_of(unique)).keys() == {"a", "b"}

    async def test_99_a_transaction_moves_a_value(self, unique: StorageStrategy) -> None:
        async with unique.begin_transaction() as tx:
            await tx.update_entity("things", "a", {"name": "free"})
            await tx.create_entity("things", thing("c", "x"))
            await tx.delete_entity("things", "b")
            await tx.save_entities("things", [thing("d", "y"), thing("a", "z")])
        assert await names_of(unique) == {"a": "z", "c": "x", "d": "y"}
        for name, owner in (("x", "c"), ("y", "d"), ("z", "a")):
            assert (
                await refusal_of(unique.create_entity("things", thing("e", name)))
            ).owner_id == owner
        await unique.create_entity("things", thing("e", "free"))

    async def test_99_a_call_in_a_transaction_moves_values_in_its_order(
        self, unique: StorageStrategy
    ) -> None:
        async with unique.begin_transaction() as tx:
            await tx.create_entity("things", thing("c", "z"))
            await tx.update_entities(
                "things",
                {
                    "c": {"name": "free", "zone": "z"},
                    "a": {"name": "z"},
                    "b": {"name": "x", "zone": "z"},
                },
            )
            created = {"created_at": "2026-01-01T00:00:00.000000Z"}
            await tx.save_entities(
                "things", [thing("d", "d", **created), thing("a"), thing("e", "z", **created)]
            )
        assert await names_of(unique) == {"a": None, "b": "x", "c": "free", "d": "d", "e": "z"}

    async def test_99_values_are_checked_change_by_change(self, unique: StorageStrategy) -> None:
        """Two values cannot be swapped directly, as in SQL, but by way of a third one."""
        with pytest.raises((UniqueViolationError, TransactionAbortedError)):
            async with unique.begin_transaction() as tx:
                await tx.update_entity("things", "a", {"name": "y"})
                await tx.update_entity("things", "b", {"name": "x"})
        assert await names_of(unique) == {"a": "x", "b": "y"}
        async with unique.begin_transaction() as tx:
            await tx.update_entity("things", "a", {"name": None})
            await tx.update_entity("things", "b", {"name": "x"})
            await tx.update_entity("things", "a", {"name": "y"})
        assert await names_of(unique) == {"a": "y", "b": "x"}
        assert (await refusal_of(unique.create_entity("things", thing("c", "x")))).owner_id == "b"

    async def test_99_a_rollback_frees_values(self, unique: StorageStrategy) -> None:
        with pytest.raises(ZeroDivisionError):
            async with unique.begin_transaction() as tx:
                await tx.create_entity("things", thing("c", "new"))
                await tx.delete_entity("things", "a")
                raise ZeroDivisionError
        await unique.create_entity("things", thing("d", "new"))
        await refusal_of(unique.create_entity("things", thing("e", "x")))
        if not unique.capabilities.savepoints:
            return
        async with unique.begin_transaction() as tx:
            await tx.update_entity("things", "a", {"name": "outer"})
            with pytest.raises(ZeroDivisionError):
                async with tx.begin_transaction() as inner:
                    await inner.update_entity("things", "a", {"name": "inner"})
                    await inner.create_entity("things", thing("f", "outer"))
                    raise ZeroDivisionError
            await tx.create_entity("things", thing("g", "inner"))
        names = await names_of(unique)
        assert (names["a"], names["g"]) == ("outer", "inner")
        assert "f" not in names
        await refusal_of(unique.create_entity("things", thing("h", "outer")))

    async def test_99_random_changes_have_the_outcomes_of_the_memory_engine(
        self, unique: StorageStrategy
    ) -> None:
        with seeded() as random:
            async with MemoryStorageStrategy(collections=UNIQUE) as model:
                await model.create_entity("things", thing("a", "x", number=1))
                await model.create_entity("things", thing("b", "y", number=2))
                for _ in range(repetitions(200)):
                    works = [_random_change(random) for _ in range(random.choice((1, 1, 1, 2, 3)))]
                    found = [await _outcome(each, works) for each in (unique, model)]
                    assert found[0] == found[1], works
                    assert await _contents(unique) == await _contents(model)

    # -- 99: many at once --------------------------------------------------------------------

    async def test_99_one_of_many_creators_wins(self, unique: StorageStrategy) -> None:
        for number in range(repetitions(20)):
            name = f"v{number}"
            new = [thing(f"{name}-{n}", name) for n in range(16)]
            outcomes = await asyncio.gather(
                *(unique.create_entity("things", each) for each in new), return_exceptions=True
            )
            assert outcomes.count(1) == 1
            refused = [each for each in outcomes if isinstance(each, UniqueViolationError)]
            assert len(refused) == 15
            assert {each.owner_id for each in refused} == {str(new[outcomes.index(1)]["thing_id"])}

    async def test_99_one_of_many_transactions_wins(self, unique: StorageStrategy) -> None:
        async def create(number: int) -> bool:
            async def work(tx: RepositoryInterface) -> None:
                await tx.update_entity("things", "a" if number % 2 else "b", {"zone": str(number)})
                await tx.create_entity("things", thing(f"c{number}", "one"))

            try:
                await unique.run_transaction(work)
            except (UniqueViolationError, ConcurrencyConflictError):
                return False
            return True

        assert sum(await asyncio.gather(*map(create, range(8)))) == 1
        assert list((await names_of(unique)).values()).count("one") == 1

    async def test_99_one_creator_of_eight_processes_wins(self, enforcing: Harness) -> None:
        """The other processes do not declare the index."""
        rounds = repetitions(100, short=5)
        async with enforcing.store(ITEMS) as store:
            await store.create_entity("items", {"item_id": "first", "label": "first"})
            url = enforcing.url()
            assert url is not None
            winners: list[tuple[str, str]] = []
            for first in range(0, rounds, 20):
                some = list(range(first, min(first + 20, rounds)))
                works = [
                    ("unique-race", {"name": f"p{each}", "rounds": some, "tasks": 8})
                    for each in range(8)
                ]
                won = await run_workers(url, *works)
                winners += [(label, entity_id) for own in won for label, entity_id in own]
            assert sorted(label for label, _ in winners) == sorted(f"v{n}" for n in range(rounds))
            stored = await store.query_entities("items", {"item_id": ne("first")})
            assert sorted((str(e["label"]), str(e["item_id"])) for e in stored) == sorted(winners)

    async def test_99_programs_that_do_not_declare_it_enforce_it(self, enforcing: Harness) -> None:
        async with enforcing.store(UNIQUE) as store, enforcing.store(PLAIN) as other:
            await store.create_entity("things", thing("a", "x"))
            assert (
                await refusal_of(other.create_entity("things", thing("b", "x")))
            ).owner_id == "a"
            await other.create_entity("things", thing("b", "y"))
            await refusal_of(other.update_entity("things", "b", {"name": "x"}))
            await refusal_of(store.update_entity("things", "a", {"name": "y"}))
            with pytest.raises(InvalidFieldError, match="name"):
                await other.update_entity("things", "b", {"name": "x" * 1025})
            await other.delete_entity("things", "b")
            await store.update_entity("things", "a", {"name": "y"})
        async with enforcing.store(PLAIN) as other:
            await refusal_of(other.create_entity("things", thing("b", "y")))
            with pytest.raises((UniqueViolationError, TransactionAbortedError)):
                async with other.begin_transaction() as tx:
                    await tx.create_entity("things", thing("b", "y"))
        untyped = [Collection("things", key="thing_id", fields=[Field("name", "json")])]
        async with enforcing.store(untyped) as other:
            for value in ([1], {"a": 1}):
                with pytest.raises(InvalidFieldError, match="name"):
                    await other.save_entity("things", thing("b", value))
            for entity_id, each in (("t", True), ("one", 1), ("text", "1")):
                await other.save_entity("things", thing(entity_id, each))
            assert (
                await refusal_of(other.save_entity("things", thing("b", 1.0)))
            ).owner_id == "one"

    # -- 96: declared on existing data -------------------------------------------------------

    async def test_96_unique_declared_on_data_with_duplicates(self, enforcing: Harness) -> None:
        async with enforcing.store(PLAIN) as store:
            for number, name in enumerate(("x", "x", "y", None, "x", "z" * 2000)):
                await store.save_entity("things", thing(f"t{number}", name))
        async with enforcing.store(things(BY_NAME)) as store:
            before = await store.query_entities("things", order_by="thing_id")
            [change] = [each for each in await store.schema_changes() if each.kind == "unique"]
            assert (change.collection, change.name, change.blocking) == (
                "things",
                "name-index",
                True,
            )
            assert ": 4;" in change.detail
            assert "'t0', 't1', 't4', 't5'; '" in change.detail
            pair = re.search(r"; '(t\d)' and '(t\d)' both have name 'x'$", change.detail)
            assert pair is not None
            assert {pair[1], pair[2]} < {"t0", "t1", "t4"}
            with pytest.raises(SchemaMismatchError, match=r"things\.name-index.*'t0', 't1'"):
                await store.apply_schema(complete=True)
            assert await store.query_entities("things", order_by="thing_id") == before
            assert "name-index" in str((await store.health())["problems"])
            # It is enforced once it is applied.
            await store.create_entity("things", thing("t6", "y"))
            for entity_id in ("t1", "t4", "t5", "t6"):
                await store.update_entity("things", entity_id, {"name": entity_id})
            kinds = [each.kind for each in await store.schema_changes()]
            assert "unique" not in kinds
            assert "unique index" in kinds
            await store.apply_schema(complete=True)
            assert await store.schema_changes() == []
            assert (await store.health())["problems"] == []
            await self._is_enforced(store)
        async with enforcing.store(PLAIN) as other:
            await self._is_enforced(other)

    async def _is_enforced(self, store: StorageStrategy) -> None:
        assert (await refusal_of(store.create_entity("things", thing("new", "x")))).owner_id == "t0"
        assert (
            await refusal_of(store.update_entity("things", "t3", {"name": "y"}))
        ).owner_id == "t2"

    async def test_96_new_programs_that_ran_before_it_was_applied_enforce_it(
        self, enforcing: Harness
    ) -> None:
        """As in a rollout: the new program is started, and then another one applies its declaration."""
        async with enforcing.store(PLAIN) as old:
            await old.save_entity("things", thing("t0", "x"))
            await old.save_entity("things", thing("long", "z" * 2000))
        async with (
            enforcing.store(things(BY_NAME)) as new,
            enforcing.store(things(BY_NAME)) as tool,
        ):
            await new.create_entity("things", thing("t1", "y"))
            async with new.begin_transaction() as tx:
                await tx.update_entity("things", "long", {"zone": "z"})
            await new.update_entity("things", "long", {"name": "short"})
            await tool.apply_schema(complete=True)
            await new.create_entity("things", thing("t2", "z"))
            for name, owner in (("x", "t0"), ("y", "t1"), ("short", "long"), ("z", "t2")):
                for store in (new, tool):
                    error = await refusal_of(store.create_entity("things", thing("new", name)))
                    assert error.owner_id == owner

    async def test_96_a_program_that_does_not_declare_it_may_apply(
        self, enforcing: Harness
    ) -> None:
        async with enforcing.store(PLAIN) as store:
            for entity_id in ("t0", "t1"):
                await store.save_entity("things", thing(entity_id, "x", zone="z"))
        async with enforcing.store(things(BY_NAME)) as store:
            await store.create_entity("things", thing("t2", "y"))
            with pytest.raises(SchemaMismatchError, match=r"things\.name-index"):
                await store.apply_schema(complete=True)
        async with enforcing.store(things(plain=[Index("zone")])) as other:
            await other.apply_schema(complete=True)
            assert await other.schema_changes() == []
            assert await other.count_entities("things", {"zone": "z"}) == 2
            await other.create_entity("things", thing("t3", "x"))
            await other.delete_entities("things", ["t1", "t3"])
            await other.apply_schema(complete=True)
        async with enforcing.store(things(BY_NAME)) as store:
            assert "unique index" in [each.kind for each in await store.schema_changes()]
            await store.apply_schema(complete=True)
            await refusal_of(store.create_entity("things", thing("new", "x")))

    async def test_96_unique_declared_on_an_empty_collection(self, enforcing: Harness) -> None:
        async with enforcing.store(PLAIN) as store:
            await store.save_entity("things", thing("t0", "x"))
            await store.delete_entity("things", "t0")
        async with enforcing.store(things(BY_NAME)) as store:
            await store.create_entity("things", thing("t0", "x"))
            await store.create_entity("things", thing("t2", "y"))
            await store.create_entity("things", thing("t3"))
            await self._is_enforced(store)
            assert not {each.kind for each in await store.schema_changes()} & {
                "unique",
                "unique index",
            }
        async with enforcing.store(PLAIN) as other:
            await self._is_enforced(other)

    async def test_96_an_existing_index_becomes_unique(self, enforcing: Harness) -> None:
        async with enforcing.store(things(Index("name"))) as store:
            for number, name in enumerate(("x", "v", "y", None)):
                await store.save_entity("things", thing(f"t{number}", name))
        async with enforcing.store(things(BY_NAME)) as store, enforcing.store(PLAIN) as old:
            await old.update_entity("things", "t1", {"name": "w"})
            await asyncio.gather(store.apply_schema(complete=True), store.apply_schema())
            assert await store.schema_changes() == []
            await self._is_enforced(store)
            [recorded] = [
                each for each in await store.recorded_collections() if each.name == "things"
            ]
            assert [each.unique for each in recorded.indexes] == [True]
        async with enforcing.store(things(Index("name"))) as store:
            await store.update_entity("things", "t1", {"zone": "z"})
            await self._is_enforced(store)
            [recorded] = [
                each for each in await store.recorded_collections() if each.name == "things"
            ]
            assert [each.unique for each in recorded.indexes] == [True]
