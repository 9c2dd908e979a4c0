"""Declarations that change: `schema_changes`, `apply_schema`, and programs with two declarations."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

import pytest

from hf_async_store import (
    Collection,
    Field,
    Index,
    InvalidCursorError,
    SchemaMismatchError,
    UnavailableError,
    gt,
    path,
)
from hf_async_store.driver import SchemaChange
from hf_async_store.strategies.dynamodb import schema_changes, tables
from tests.dynamodb.proxy import Answer, Changed
from tests.dynamodb.support import new_prefix, store_at

if TYPE_CHECKING:
    from hf_async_store import DynamoDBStorageStrategy
    from tests.dynamodb.proxy import Fault, Proxy, Request

pytestmark = pytest.mark.hf_sampled

FIELDS: Final = ["owner", Field("size", "integer"), Field("due_at", "timestamp")]
BEFORE: Final = [Collection("jobs", key="job_id", fields=["owner"], indexes=["owner"])]
AFTER: Final = [
    Collection(
        "jobs",
        key="job_id",
        fields=FIELDS,
        indexes=["owner", Index("owner", "due_at"), Index("owner", "size", "due_at"), "size"],
    )
]


def job(number: int) -> dict[str, Any]:
    return {
        "job_id": f"j{number:03}",
        "owner": f"o{number % 3}",
        "size": number,
        "due_at": f"2026-01-{number % 28 + 1:02}T00:00:00.000000Z",
    }


async def _filled(proxy: Proxy, prefix: str, count: int = 30) -> None:
    async with store_at(proxy.url, prefix, BEFORE) as store:
        await store.save_entities("jobs", [job(each) for each in range(count)])


async def _changes(store: DynamoDBStorageStrategy) -> list[SchemaChange]:
    return await store._dynamodb.schema_changes()


async def _used(store: DynamoDBStorageStrategy) -> set[str | None]:
    asked: list[tuple[Any, Any]] = [
        ({"owner": "o1"}, "due_at"),
        ({"owner": "o1"}, ["size", "due_at"]),
        ({"size": gt(3)}, "size"),
    ]
    plans = [await store.explain_query("jobs", *each, limit=5) for each in asked]
    return {each.index for each in plans}


NEW: Final = {"owner-due_at-index", "owner-size-due_at-index", "size-index"}


async def test_indexes_declared_later_are_used_when_older_programs_have_ended(proxy: Proxy) -> None:
    prefix = new_prefix()
    await _filled(proxy, prefix)
    async with store_at(proxy.url, prefix, AFTER) as store:
        found = await _changes(store)
        assert [(each.kind, each.name) for each in found] == [
            *(("index", each) for each in sorted(NEW)),
            ("items", ""),
        ]
        assert "30 entities" in found[-1].detail
        assert not any(each.blocking for each in found)
        old = await store_at(proxy.url, prefix, BEFORE).open()
        reported: list[tuple[str, str, int, int | None]] = []
        await store._dynamodb.apply_schema(
            progress=lambda change, *how: reported.append((change.kind, change.name, *how))
        )
        assert {(kind, name) for kind, name, *_ in reported} == {
            *(("index", each) for each in NEW),
            ("items", ""),
        }
        [(done, total)] = [how for kind, _, *how in reported if kind == "items"]
        assert done == total
        assert {each.name for each in await _changes(store)} == NEW
        assert await _used(store) == {"owner-index", None}
        # A program that does not know the indexes writes items without their keys.
        await old.save_entity("jobs", job(31))
        await old.update_entity("jobs", "j001", {"size": 100})
        await old.close()
        await store._dynamodb.apply_schema(complete=True)
        assert await _changes(store) == []
        assert await _used(store) == NEW
        assert (await store.health())["ok"]
        assert await store.count_entities("jobs") == len(await store.query_entities("jobs")) == 31
        biggest = await store.query_entities("jobs", {"size": gt(3)}, "-size", 3)
        assert [each["job_id"] for each in biggest] == ["j001", "j031", "j029"]
        assert len(await store.query_entities("jobs", {"owner": "o1"}, "due_at")) == 11
    async with store_at(proxy.url, prefix, AFTER) as store:
        assert await _used(store) == NEW
    # A program that is opened now maintains the indexes, although it does not declare them.
    async with (
        store_at(proxy.url, prefix, BEFORE) as old,
        store_at(proxy.url, prefix, AFTER) as new,
    ):
        await old.save_entity("jobs", job(40))
        await old.update_entity("jobs", "j002", {"size": "large"})
        await old.update_entity("jobs", "j003", {"due_at": None, "owner": "o1"})
        biggest = await new.query_entities("jobs", None, "-size", 3)
        assert [each["job_id"] for each in biggest] == ["j002", "j001", "j040"]
        found_first = await new.query_entities("jobs", {"owner": "o1"}, "due_at", 1)
        assert [each["job_id"] for each in found_first] == ["j003"]


async def test_an_undeclared_collection_s_table_is_left_alone_and_a_new_store_lacks_nothing(
    proxy: Proxy,
) -> None:
    async with store_at(proxy.url, collections=AFTER) as store:
        assert await _changes(store) == []
        await store._dynamodb.apply_schema(complete=True)
        assert not await store._dynamodb.exists()
        await store.save_entity("jobs", job(1))
        assert await _changes(store) == []
        assert await _used(store) == NEW


async def test_the_type_of_an_indexed_field_changes_after_its_index_was_dropped(
    proxy: Proxy,
) -> None:
    prefix = new_prefix()
    texts = [
        Collection("jobs", key="job_id", fields=["owner", "size"], indexes=[Index("owner", "size")])
    ]
    numbers = [
        Collection(
            "jobs",
            key="job_id",
            fields=["owner", Field("size", "integer")],
            indexes=[Index("owner", "size")],
        )
    ]
    async with store_at(proxy.url, prefix, texts) as store:
        await store.save_entities(
            "jobs", [{"job_id": f"t{n}", "owner": "o", "size": f"{n}"} for n in range(3)]
        )
    async with store_at(proxy.url, prefix, numbers) as store:
        await store.save_entity("jobs", {"job_id": "n", "owner": "o", "size": 5})
        found = await store.query_entities("jobs", {"owner": "o"}, "size")
        assert [each["size"] for each in found] == [5, "0", "1", "2"]
        assert (await store.explain_query("jobs", {"owner": "o"})).access == "scan"
        assert "delete it" in (await _changes(store))[0].detail
        with pytest.raises(SchemaMismatchError, match="delete it"):
            await store._dynamodb.apply_schema()
        drop = [{"Delete": {"IndexName": "owner-size-index"}}]
        params = {"TableName": f"{prefix}_jobs", "GlobalSecondaryIndexUpdates": drop}
        await store._dynamodb.client.call("UpdateTable", params)
    async with store_at(proxy.url, prefix, numbers) as store:
        await store._dynamodb.apply_schema(complete=True)
        assert (await store.explain_query("jobs", {"owner": "o"})).access == "index"
        found = await store.query_entities("jobs", {"owner": "o"}, "size")
        assert [each["size"] for each in found] == [5, "0", "1", "2"]


async def test_the_progress_of_an_index_is_that_of_describe_table(proxy: Proxy) -> None:
    prefix = new_prefix()
    await _filled(proxy, prefix)
    looks = 0

    def described(response: dict[str, Any]) -> dict[str, Any]:
        nonlocal looks
        response["Table"]["ItemCount"] = 30
        for each in response["Table"].get("GlobalSecondaryIndexes", ()):
            if each["IndexName"] != "size-index":
                continue
            looks += 1
            if looks < 6:
                each.update(IndexStatus="CREATING", Backfilling=True, ItemCount=looks)
        return response

    async with store_at(proxy.url, prefix, AFTER) as store:
        await store.count_entities("jobs")

        def rule(request: Request) -> Fault | None:
            return Changed(described) if request.operation == "DescribeTable" else None

        proxy.rule = rule
        reported: list[tuple[int, int | None]] = []
        await store._dynamodb.apply_schema(
            progress=lambda change, *how: (
                reported.append(how) if change.name == "size-index" else None
            )
        )
        assert reported[-1] == (30, 30)
        counts = [done for done, total in reported[:-1] if total == 30]
        assert counts == [1, 2, 3, 4, 5]


WRITES: Final = ("UpdateTable", "PutItem", "DescribeTable", "Scan", "GetItem")


async def test_an_interrupted_apply_can_be_run_again(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each request in turn, the process that applies the schema ends."""
    monkeypatch.setattr(schema_changes, "_PAGE_SIZE", 4)
    prefix = new_prefix()
    await _filled(proxy, prefix, 10)
    for number in range(200):
        left = number

        def rule(request: Request) -> Fault | None:
            nonlocal left
            if request.operation not in WRITES or request.is_migration_check:
                return None
            left -= 1
            return None if left >= 0 else Answer(400, {"__type": "ValidationException"})

        async with store_at(proxy.url, prefix, AFTER) as store:
            proxy.rule = rule
            try:
                await store._dynamodb.apply_schema(complete=True)
            except Exception:
                pass
            else:
                break
            finally:
                proxy.rule = None
        async with store_at(proxy.url, prefix, AFTER) as store:
            found = await store.query_entities("jobs", {"size": gt(3)}, "-size", 3)
            assert [each["size"] for each in found] == [9, 8, 7]
    async with store_at(proxy.url, prefix, AFTER) as store:
        assert await _changes(store) == []
        assert await _used(store) == NEW
        found = await store.query_entities("jobs", None, "size")
        assert [each["size"] for each in found] == list(range(10))
    assert number > 10


async def test_two_programs_apply_while_others_write(proxy: Proxy) -> None:
    prefix = new_prefix()
    await _filled(proxy, prefix, 60)
    stores = [await store_at(proxy.url, prefix, AFTER).open() for _ in range(3)]
    try:
        await asyncio.gather(
            *(each._dynamodb.apply_schema(complete=True) for each in stores[:2]),
            *(stores[2].update_entity("jobs", f"j{n:03}", {"size": 100 + n}) for n in range(60)),
        )
        assert await _changes(stores[0]) == []
        found = await stores[0].query_entities("jobs", None, "size")
        assert [each["size"] for each in found] == [100 + n for n in range(60)]
        assert await _used(stores[0]) == NEW
    finally:
        for each in stores:
            await each.close()


async def test_a_condition_on_a_field_that_only_another_program_declares(proxy: Proxy) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix, AFTER) as store:
        await store.save_entity("jobs", job(5))
    async with store_at(proxy.url, prefix, BEFORE) as store:
        for size, expected in ((5, 2), (6, 3)):
            version = await store.update_entity(
                "jobs",
                "j005",
                {"size": size + 1},
                condition_expression="size = :size AND owner = :owner",
                expression_values={":size": size, ":owner": "o2"},
            )
            assert version == expected
        assert (await store.query_entities("jobs", {path("size"): 7}))[0]["job_id"] == "j005"


async def test_entities_are_rewritten_at_a_bounded_rate(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema_changes, "_REWRITES_PER_SECOND", 50.0)
    prefix = new_prefix()
    await _filled(proxy, prefix, 20)
    async with store_at(proxy.url, prefix, AFTER) as store:
        began = time.monotonic()
        await store._dynamodb.apply_schema()
        assert time.monotonic() - began >= 0.4
        proxy.requests.clear()
        await store._dynamodb.apply_schema()
        assert set(proxy.counted()) <= {"DescribeTable", "GetItem", "Scan"}, "nothing is rewritten"


async def test_without_permission_to_describe_tables(proxy: Proxy) -> None:
    """The declared indexes are assumed to exist, except for those that are known to be incomplete."""
    prefix = new_prefix()
    await _filled(proxy, prefix, 3)
    async with store_at(proxy.url, prefix, AFTER) as store:
        await store.create_tables()
    proxy.rule = lambda request: (
        Answer(400, {"__type": "AccessDeniedException", "message": "no"})
        if request.operation == "DescribeTable"
        else None
    )
    async with store_at(proxy.url, prefix, AFTER) as store:
        assert await _used(store) == {"owner-index", None}
        found = await store.query_entities("jobs", {"owner": "o1"}, "due_at")
        assert [each["job_id"] for each in found] == ["j001"]


@pytest.mark.parametrize(
    "verb", ["save", "expect", "update", "batch", "condition", "transaction", "import", "modify"]
)
async def test_a_running_program_can_write_values_that_a_later_index_cannot_contain(
    proxy: Proxy, verb: str
) -> None:
    prefix, declared = new_prefix(), Collection("jobs", key="job_id", fields=FIELDS)
    async with store_at(proxy.url, prefix, [declared]) as old:
        await old.create_entities("jobs", [job(1), job(2)])
        async with store_at(proxy.url, prefix, AFTER) as new:
            await new.apply_schema()
            await _write_without_size(old, verb)
            await new.apply_schema(complete=True)
            found = await new.query_entities("jobs", {"size": None}, "size")
            assert [each["job_id"] for each in found] == ["j001"]
            [stored] = await old.get_entities("jobs", ["j001"])
            assert stored is not None
            assert stored["version"] == (0 if verb == "import" else 2)


async def _write_without_size(store: DynamoDBStorageStrategy, verb: str) -> None:
    entity = {**job(1), "size": None}
    if verb == "save":
        await store.save_entity("jobs", entity)
    elif verb == "expect":
        await store.save_entity("jobs", entity, expected_version=1)
    elif verb == "update":
        await store.update_entity("jobs", "j001", {"size": None})
    elif verb == "batch":
        await store.update_entities("jobs", {"j001": {"size": None}, "j002": {"owner": ""}})
    elif verb == "condition":
        await store.update_entity(
            "jobs", "j001", {"size": None}, condition_expression="attribute_exists(owner)"
        )
    elif verb == "transaction":
        async with store.begin_transaction() as transaction:
            await transaction.update_entity("jobs", "j001", {"size": None})
    elif verb == "import":
        await store.import_entities("jobs", [entity])
    else:
        await store.modify_entity("jobs", "j001", lambda each: {**each, "size": None})


# -- indexes made by others -----------------------------------------------------------------


async def _make_by_hand(store: DynamoDBStorageStrategy) -> None:
    """Make the declared index of a store as an administrator does."""
    made = store._dynamodb.tables
    [index] = [each for each in made.schema["jobs"].indexes if each.name == "size-index"]
    update = {
        "TableName": made.name("jobs"),
        "AttributeDefinitions": made._attributes("jobs", (index,)),
        "GlobalSecondaryIndexUpdates": [{"Create": made._index("jobs", index)}],
    }
    await store._dynamodb.client.call("UpdateTable", update)
    await made.wait_until_active("jobs")


SIZES: Final = [Collection("jobs", key="job_id", fields=FIELDS, indexes=["owner", "size"])]


@pytest.mark.parametrize("count", [0, 12])
async def test_an_index_that_somebody_made_is_used_when_it_was_completed(
    proxy: Proxy, count: int
) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix, BEFORE) as old:
        await old.save_entities("jobs", [job(each) for each in range(count)])
        await old.count_entities("jobs")
        if not count:
            await old.create_tables()
            await old.count_entities("jobs")
        async with store_at(proxy.url, prefix, SIZES) as new:
            await _make_by_hand(new)
        async with store_at(proxy.url, prefix, SIZES) as new:
            await old.save_entity("jobs", job(100))
            for _ in range(2):
                found = await new.query_entities("jobs", {"size": gt(3)}, "-size", 1)
                assert [each["size"] for each in found] == [100]
                assert (await new.explain_query("jobs", {"size": gt(3)})).access == "scan"
                assert [each.name for each in await _changes(new)][:1] == ["size-index"]
                assert "do not use the index size-index" in str((await new.health())["problems"])
                await new.apply_schema()
    async with store_at(proxy.url, prefix, SIZES) as new:
        await new.apply_schema(complete=True)
        assert (await new.explain_query("jobs", {"size": gt(3)})).index == "size-index"
        assert await new.count_entities("jobs", {"size": gt(3)}) == max(count - 4, 0) + 1
        assert await _changes(new) == []


async def test_a_table_made_by_others_with_its_indexes_is_complete(proxy: Proxy) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix, AFTER) as store:
        await store._dynamodb.client.call("CreateTable", store._dynamodb.tables.request("jobs"))
        await store.save_entities("jobs", [job(each) for each in range(5)])
    async with store_at(proxy.url, prefix, AFTER) as store:
        assert await _used(store) == NEW
        assert await _changes(store) == []


async def test_an_index_that_somebody_deleted_and_made_again(proxy: Proxy) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix, SIZES) as store:
        await store.save_entities("jobs", [job(each) for each in range(5)])
        drop = [{"Delete": {"IndexName": "size-index"}}]
        params = {"TableName": f"{prefix}_jobs", "GlobalSecondaryIndexUpdates": drop}
        await store._dynamodb.client.call("UpdateTable", params)
    async with store_at(proxy.url, prefix, BEFORE) as old:
        await old.save_entity("jobs", job(100))
    async with store_at(proxy.url, prefix, SIZES) as store:
        await _make_by_hand(store)
    async with store_at(proxy.url, prefix, SIZES) as store:
        found = await store.query_entities("jobs", {"size": gt(3)}, "-size", 1)
        assert [each["size"] for each in found] == [100]
        await store.apply_schema(complete=True)
        assert (await store.explain_query("jobs", {"size": gt(3)})).index == "size-index"


async def test_an_index_that_is_not_active_in_time(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_INDEX_SECONDS", 0.2)
    prefix = new_prefix()
    await _filled(proxy, prefix, 3)

    def described(response: dict[str, Any]) -> dict[str, Any]:
        for each in response["Table"].get("GlobalSecondaryIndexes", ()):
            if each["IndexName"] == "size-index":
                each["IndexStatus"] = "CREATING"
        return response

    proxy.rule = lambda request: (
        Changed(described) if request.operation == "DescribeTable" else None
    )
    async with store_at(proxy.url, prefix, SIZES) as store:
        with pytest.raises(UnavailableError, match=r"not active after 0\.2 s"):
            await store.apply_schema()


# -- pages without an order -----------------------------------------------------------------


async def _rest(store: DynamoDBStorageStrategy, filters: Any, cursor: str | None) -> list[str]:
    found: list[str] = []
    while cursor is not None:
        page = await store.query_page("jobs", filters, limit=3, cursor=cursor)
        found += [str(each["job_id"]) for each in page.items]
        cursor = page.cursor
    return found


async def test_pages_without_an_order_go_on_when_their_index_can_be_used(proxy: Proxy) -> None:
    prefix, filters = new_prefix(), {"size": gt(3)}
    await _filled(proxy, prefix, 30)
    wanted = [f"j{each:03}" for each in range(4, 30)]
    async with store_at(proxy.url, prefix, AFTER) as store:
        first = await store.query_page("jobs", filters, limit=3)
        with pytest.raises(InvalidCursorError):
            async with store.begin_transaction() as tx:
                await tx.query_page("jobs", filters, limit=3, cursor=first.cursor)
        with pytest.raises(InvalidCursorError):
            await store.query_page("jobs", filters, "job_id", limit=3, cursor=first.cursor)
        await store.apply_schema(complete=True)
        rest = await _rest(store, filters, first.cursor)
        assert sorted([*(str(each["job_id"]) for each in first.items), *rest]) == wanted
        second = await store.query_page("jobs", filters, limit=3)
        assert [each["job_id"] for each in second.items] == wanted[:3]
    async with store_at(proxy.url, prefix, BEFORE) as store:
        rest = await _rest(store, {path("size"): gt(3)}, second.cursor)
        assert rest == wanted[3:], "the index is not declared here"
        assert await store.delete_where("jobs", {path("size"): gt(3)}) == 26
