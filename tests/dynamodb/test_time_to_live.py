"""Expiry on DynamoDB: the attribute by which the service removes items, and its permissions."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import pytest

from hf_async_store import Collection, EntityNotFoundError, Expire, Field, in_
from hf_async_store.strategies.dynamodb.items import TIME_TO_LIVE
from hf_async_store.values import Key
from tests.dynamodb.proxy import Answer
from tests.dynamodb.support import new_prefix, store_at

if TYPE_CHECKING:
    from hf_async_store import DynamoDBStorageStrategy
    from tests.dynamodb.proxy import Proxy

FIELDS: Final = ["status", Field("done_at", "timestamp")]
PLAIN: Final = [Collection("jobs", key="job_id", fields=FIELDS, indexes=["status"])]
EXPIRING: Final = [
    Collection(
        "jobs",
        key="job_id",
        fields=FIELDS,
        indexes=["status"],
        expires=Expire("done_at", after=timedelta(hours=1), where={"status": in_(["DONE"])}),
    )
]
_AT: Final = datetime(2041, 5, 6, 7, 8, 9, 1, tzinfo=UTC)
_SECOND: Final = str(int(_AT.timestamp()) + 3601)


async def _item(store: DynamoDBStorageStrategy, job: str) -> dict[str, Any]:
    [item] = await store._dynamodb.reading.items([Key("jobs", job)], consistent=True)
    assert item is not None
    return item


async def _time_to_live(store: DynamoDBStorageStrategy) -> str | None:
    return await store._dynamodb.tables.time_to_live("jobs")


def _done(job: str) -> dict[str, object]:
    return {"job_id": job, "status": "DONE", "done_at": _AT}


async def test_every_write_keeps_the_attribute_current(proxy: Proxy) -> None:
    expires = {"N": _SECOND}
    async with store_at(proxy.url, collections=EXPIRING) as store:
        await store.create_entity("jobs", _done("j"))
        assert (await _item(store, "j"))[TIME_TO_LIVE] == expires
        await store.update_entity("jobs", "j", {"status": "OPEN"})
        assert TIME_TO_LIVE not in await _item(store, "j")
        await store.save_entity("jobs", _done("j"))
        assert (await _item(store, "j"))[TIME_TO_LIVE] == expires
        await store.save_entities("jobs", [_done("k"), {"job_id": "j"}])
        assert TIME_TO_LIVE not in await _item(store, "j")
        assert (await _item(store, "k"))[TIME_TO_LIVE] == expires
        async with store.begin_transaction() as tx:
            await tx.update_entity("jobs", "k", {"done_at": None})
            await tx.save_entity("jobs", _done("j"))
        assert TIME_TO_LIVE not in await _item(store, "k")
        assert (await _item(store, "j"))[TIME_TO_LIVE] == expires
        condition: dict[str, Any] = {"condition_expression": "attribute_exists(job_id)"}
        await store.update_entity("jobs", "j", {"status": "OPEN"}, **condition)
        assert TIME_TO_LIVE not in await _item(store, "j")
        await store.update_entity("jobs", "j", {"status": "DONE"}, **condition)
        assert (await _item(store, "j"))[TIME_TO_LIVE] == expires
        await store.import_entities("jobs", [_done("i")])
        assert (await _item(store, "i"))[TIME_TO_LIVE] == expires
        assert await store.get_entity("jobs", "i") == {
            **_done("i"),
            "done_at": "2041-05-06T07:08:09.000001Z",
            "version": 0,
        }


async def test_a_program_that_does_not_declare_it_removes_the_attribute(proxy: Proxy) -> None:
    # It might change the field, and the service would remove the item too early.
    prefix = new_prefix()
    async with store_at(proxy.url, prefix, EXPIRING) as store:
        await store.create_entities("jobs", [_done(each) for each in "abcd"])
    async with store_at(proxy.url, prefix, PLAIN) as other:
        await other.update_entity("jobs", "a", {"done_at": None})
        await other.update_entity("jobs", "b", {"other": 1}, expected_version=1)
        await other.save_entity("jobs", _done("c"))
        await other.update_entities("jobs", {"d": {"status": "OPEN"}})
        for each in "abcd":
            assert TIME_TO_LIVE not in await _item(other, each)
    async with store_at(proxy.url, prefix, EXPIRING) as store:
        await store.apply_schema()
        assert TIME_TO_LIVE not in await _item(store, "a")
        assert (await _item(store, "b"))[TIME_TO_LIVE] == {"N": _SECOND}


async def test_the_service_removes_by_it(proxy: Proxy) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix, PLAIN) as store:
        await store.create_entity("jobs", _done("j"))
        assert await _time_to_live(store) == ""
    async with store_at(proxy.url, prefix, EXPIRING) as store:
        removal = [each for each in await store.schema_changes() if each.kind == "removal"]
        assert [each.name for each in removal] == ["done_at"]
        await store.apply_schema()
        assert await _time_to_live(store) == TIME_TO_LIVE
        assert (await _item(store, "j"))[TIME_TO_LIVE] == {"N": _SECOND}
        assert [each for each in await store.schema_changes() if each.kind == "removal"] == []
    async with store_at(proxy.url, collections=EXPIRING) as new:
        await new.create_entity("jobs", _done("j"))
        assert await _time_to_live(new) == TIME_TO_LIVE
        await new.create_tables()


async def test_without_permission(proxy: Proxy) -> None:
    proxy.rule = lambda request: (
        Answer(400, {"__type": "AccessDeniedException", "message": "no"})
        if request.operation.endswith("TimeToLive")
        else None
    )
    async with store_at(proxy.url, collections=EXPIRING) as store:
        await store.create_entity("jobs", _done("j"))
        await store.create_tables()
        assert await _time_to_live(store) is None
        assert [each for each in await store.schema_changes() if each.kind == "removal"] == []


async def test_methods_of_dynamodb_alone(proxy: Proxy) -> None:
    async with store_at(proxy.url, collections=EXPIRING) as store:
        now = _AT
        store._set_clock(lambda: now, None)
        late = {**_done("late"), "done_at": _AT + timedelta(hours=1)}
        await store.create_entities("jobs", [_done("a"), _done("b"), late])

        async def found(limit: int | None) -> list[object]:
            values = {":status": "DONE"}
            entities = await store.query_by_gsi(
                "jobs", "status-index", "status = :status", values, limit=limit
            )
            return sorted(str(each["job_id"]) for each in entities)

        assert await found(None) == ["a", "b", "late"]
        now = _AT + timedelta(hours=1)
        assert await found(None) == ["late"]
        assert await found(1) == ["late"]
        with pytest.raises(EntityNotFoundError):
            await store.update_entity(
                "jobs",
                "a",
                {"done_at": None},
                condition_expression="status = :status",
                expression_values={":status": "DONE"},
            )
        await store.update_entity(
            "jobs",
            "late",
            {"done_at": None},
            condition_expression="status = :status",
            expression_values={":status": "DONE"},
        )
