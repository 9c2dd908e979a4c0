"""Unique indexes on SQLite and PostgreSQL: changes that depend on one another, and the schema."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import asyncpg  # type: ignore[import-untyped]  # it has no types
import pytest

from hf_async_store import (
    BatchError,
    Collection,
    Field,
    Index,
    InvalidInputError,
    SchemaMismatchError,
    UniqueViolationError,
    increment,
    open_store,
)
from hf_async_store.unique import stored_digest
from tests.contract.harnesses import ask, execute

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_async_store import StorageStrategy

FIELDS = ["name", "zone", Field("n", "integer")]
PLAIN = [Collection("hosts", key="host_id", fields=FIELDS)]
UNIQUE = [
    Collection(
        "hosts",
        key="host_id",
        fields=FIELDS,
        indexes=[Index("name", unique=True), Index("zone", "n", unique=True)],
    )
]
INDEX = '"hosts-name-unique"'


def host(number: int, **more: object) -> dict[str, object]:
    return {"host_id": f"h{number:04}", "name": f"web-{number}", "n": number, **more}


async def names(store: StorageStrategy) -> dict[str, object]:
    return {str(each["host_id"]): each["name"] for each in await store.query_entities("hosts")}


async def assert_complete(url: str) -> None:
    """Every row has its digests, and the indexes are valid."""
    connection = await asyncpg.connect(url)
    try:
        for doc, *found in await connection.fetch(
            'SELECT doc, "name-unique", "zone-n-unique" FROM "hosts-entities"'
        ):
            entity = json.loads(doc)
            fields: Sequence[tuple[str, ...]] = (("name",), ("zone", "n"))
            assert found == [stored_digest(entity, each) for each in fields]
    finally:
        await connection.close()
    assert ask(url, "SELECT indexrelid::regclass FROM pg_index WHERE NOT indisvalid") == []


async def test_changes_of_different_statements_in_one_call_keep_their_order(url: str) -> None:
    async with open_store(url, collections=UNIQUE) as store:
        await store.create_entities("hosts", [host(each) for each in range(4)])
        async with store.begin_transaction() as tx:
            # A rotation by way of null, in one call: whole entities, and then patches.
            await tx.save_entities(
                "hosts",
                [host(0, name=None), host(1, name="web-0"), host(2, name="web-1")],
            )
            await tx.update_entities(
                "hosts", {"h0000": {"name": "web-2"}, "h0003": {"n": increment(10)}}
            )
        found = await names(store)
        assert [found[f"h000{each}"] for each in range(4)] == ["web-2", "web-0", "web-1", "web-3"]
        with pytest.raises(UniqueViolationError, match="'h0001'"):
            await store.create_entity("hosts", host(9, name="web-0"))


async def test_a_part_of_the_fields_is_changed(url: str) -> None:
    async with open_store(url, collections=UNIQUE) as store:
        await store.create_entities("hosts", [host(1, zone="a"), host(2, zone="a")])
        with pytest.raises(UniqueViolationError) as caught:
            await store.update_entity("hosts", "h0001", {"n": increment(1)})
        assert (caught.value.fields, caught.value.owner_id) == (("zone", "n"), "h0002")
        with pytest.raises(UniqueViolationError):
            await store.update_entity("hosts", "h0001", {"n": 2})
        await store.update_entities("hosts", {"h0002": {"n": 3}, "h0001": {"zone": "b"}})
        await store.update_entity("hosts", "h0001", {"n": 3})
        with pytest.raises(UniqueViolationError):
            await store.update_entity("hosts", "h0001", {"zone": "a"})


async def test_few_of_many_rows_are_refused(url: str) -> None:
    async with open_store(url, collections=UNIQUE) as store:
        await store.create_entities("hosts", [host(each) for each in range(0, 300, 100)])
        new = [host(each, host_id=f"n{each:04}") for each in range(300)]
        with pytest.raises(BatchError) as caught:
            await store.create_entities("hosts", new)
        refused = [
            number
            for number, each in enumerate(caught.value.outcomes)
            if isinstance(each, UniqueViolationError)
        ]
        assert refused == [0, 100, 200]
        assert await store.count_entities("hosts") == 300


async def test_the_same_values_that_are_written_meanwhile_are_found(url: str) -> None:
    async with open_store(url, collections=PLAIN) as store:
        await store.save_entities("hosts", [host(1), host(2, name="web-1")])
    async with open_store(url, collections=UNIQUE) as store:
        engine: Any = store.engine
        with pytest.raises(SchemaMismatchError, match="name cannot be unique"):
            await engine.apply_schema()
        await store.update_entity("hosts", "h0002", {"name": "web-2"})
        await store.apply_schema()
        with pytest.raises(UniqueViolationError):
            await store.update_entity("hosts", "h0002", {"name": "web-1"})


async def test_two_programs_apply_it_beside_writers(database: str) -> None:
    async with open_store(database, collections=PLAIN) as old:
        await old.save_entities("hosts", [host(each) for each in range(600)])
        async with (
            open_store(database, collections=UNIQUE) as one,
            open_store(database, collections=UNIQUE) as other,
        ):
            stopped = False

            async def write() -> int:
                number = 600
                while not stopped:
                    await old.save_entity("hosts", host(number, zone="z"))
                    await old.update_entity("hosts", f"h{number - 600:04}", {"zone": "y"})
                    number += 1
                return number - 600

            writing = asyncio.create_task(write())
            await asyncio.gather(one.apply_schema(), other.apply_schema())
            stopped = True
            assert await writing > 0
        with pytest.raises(UniqueViolationError):
            await old.save_entity("hosts", host(9999, name="web-3"))
    await assert_complete(database)


async def test_an_invalid_index_is_built_again(database: str) -> None:
    async with open_store(database, collections=PLAIN) as store:
        await store.save_entities("hosts", [host(each) for each in range(20)])
    async with open_store(database, collections=UNIQUE) as store:
        engine: Any = store.engine
        # As if the values had been compared before another program wrote the same ones.
        await store.update_entity("hosts", "h0001", {"name": "web-2"})
        with pytest.raises(SchemaMismatchError, match="name cannot be unique"):
            await engine.apply_schema()
        assert ask(database, "SELECT indexrelid::regclass FROM pg_index WHERE NOT indisvalid") == []
        with pytest.raises(asyncpg.UniqueViolationError):
            execute(
                database,
                f'CREATE UNIQUE INDEX CONCURRENTLY {INDEX} ON "hosts-entities" ("name-unique")',
            )
        await store.update_entity("hosts", "h0001", {"name": "web-1"})
        kinds = {each.kind for each in await store.schema_changes()}
        assert "unique index" in kinds
        assert "unique" not in kinds
        await store.apply_schema()
        assert await store.schema_changes() == []
        with pytest.raises(UniqueViolationError):
            await store.update_entity("hosts", "h0001", {"name": "web-2"})
    await assert_complete(database)


async def test_constraints_of_others_are_told_apart(database: str) -> None:
    async with open_store(database, collections=UNIQUE) as store:
        await store.create_entities("hosts", [host(1, zone="a"), host(2, zone="b")])
        execute(
            database,
            "CREATE UNIQUE INDEX zones ON \"hosts-entities\" ((doc ->> 'zone'))",
        )
        with pytest.raises(InvalidInputError, match="zones"):
            await store.update_entity("hosts", "h0001", {"zone": "b"})
        with pytest.raises(UniqueViolationError):
            await store.update_entity("hosts", "h0001", {"name": "web-2"})


async def test_transactions_do_not_conflict_while_an_index_is_not_complete(database: str) -> None:
    async with open_store(database, collections=PLAIN) as store:
        await store.save_entities("hosts", [host(each) for each in range(2000)])
    async with open_store(database, collections=UNIQUE) as store:
        engine: Any = store.engine
        await store.update_entity("hosts", "h0001", {"name": "web-2"})
        with pytest.raises(SchemaMismatchError, match="name cannot be unique"):
            await engine.apply_schema()
        await store.update_entity("hosts", "h0001", {"zone": "z"})

        async def create(number: int) -> None:
            async with store.begin_transaction() as tx:
                await tx.create_entity("hosts", host(number))

        async with store.begin_transaction() as tx:
            await tx.create_entity("hosts", host(5000))
            await asyncio.create_task(create(6000))
        assert await store.count_entities("hosts") == 2002


@pytest.mark.parametrize("length", range(49, 57))
async def test_a_violation_is_told_where_names_are_cut(database: str, length: int) -> None:
    """The names of the table and of the index are cut at different lengths."""
    prefix = "p" * (length - 40)
    long = Collection(
        "c" * 40,
        key="id",
        fields=["f", "n" * 48],
        indexes=[Index("f", unique=True), Index("n" * 48, unique=True)],
    )
    async with open_store(f"{database}?table_prefix={prefix}", collections=[long]) as store:
        await store.create_entity(long.name, {"id": "a", "f": "x", "n" * 48: "x"})
        for each in ("f", "n" * 48):
            with pytest.raises(UniqueViolationError) as caught:
                await store.create_entity(long.name, {"id": "b", each: "x"})
            assert (caught.value.fields, caught.value.owner_id) == ((each,), "a")


OUTER = Collection(
    "t", key="id", fields=["x", "name"], indexes=[Index("x", "name", unique=True), "x"]
)
INNER = Collection("x", key="id", fields=["name"], indexes=[Index("name", unique=True)])


@pytest.mark.parametrize("declared", ["at once", "on no entities", "on entities"])
async def test_an_index_of_another_store_has_the_same_name(url: str, declared: str) -> None:
    """`x` with the prefix `t-`, and an index of `t` that begins with the field `x`."""
    plain = Collection("t", key="id", fields=["x", "name"])
    other = f"{url}?table_prefix=t-"
    async with open_store(url, collections=[plain]) as store:
        if declared != "at once":
            await store.save_entity("t", {"id": "a", "x": "1", "name": "1"})
        if declared == "on no entities":
            await store.delete_entity("t", "a")
    async with open_store(other, collections=[INNER]) as store:
        await store.create_entity("x", {"id": "a", "name": "1"})
    async with open_store(url, collections=[OUTER]) as store:
        entity = {"id": "b", "x": "1", "name": "1"}
        for _ in range(2):
            begun = declared == "on entities"
            work = store.apply_schema() if begun else store.save_entity("t", entity)
            with pytest.raises(SchemaMismatchError, match="t-x-name-(unique|index)"):
                await work
    async with open_store(other, collections=[INNER]) as store:
        with pytest.raises(UniqueViolationError):
            await store.create_entity("x", {"id": "b", "name": "1"})
        assert await store.query_entities("x", {"name": "1"}, fields=["name"]) != []
