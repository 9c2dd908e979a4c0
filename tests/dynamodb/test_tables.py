"""Tables: how they are created, by whom, and how they are described."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hf_async_store import HOST_FACTORY, Collection, ConfigurationError, Index, UnavailableError
from hf_async_store.testing.harness import skip_engine
from tests.dynamodb.proxy import Answer, Fault, Request
from tests.dynamodb.support import new_prefix, store_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hf_async_store import DynamoDBStorageStrategy
    from tests.dynamodb.proxy import Proxy


pytestmark = pytest.mark.hf_sampled


async def described(store: DynamoDBStorageStrategy, table: str) -> dict[str, Any]:
    answer = await store._dynamodb.client.call("DescribeTable", {"TableName": table})
    found: dict[str, Any] = answer["Table"]
    return found


async def test_the_spec_s_tables_and_indexes(proxy: Proxy) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix, HOST_FACTORY) as store:
        made = await store.create_tables()
        assert made == [
            f"created {prefix}_{each}" for each in ("templates", "requests", "machines")
        ]
        keys = {"templates": "template_id", "requests": "request_id", "machines": "machine_id"}
        indexes = {}
        for name, key in keys.items():
            table = await described(store, f"{prefix}_{name}")
            assert table["KeySchema"] == [{"AttributeName": key, "KeyType": "HASH"}]
            assert table["BillingModeSummary"]["BillingMode"] == "PAY_PER_REQUEST"
            indexes[name] = {each["IndexName"] for each in table.get("GlobalSecondaryIndexes", ())}
        assert indexes == {
            "templates": set(),
            "requests": {
                "template_id-created_at-index",
                "request_type-index",
                "status-created_at-index",
                "created_at-index",
            },
            "machines": {
                "request_id-created_at-index",
                "return_request_id-index",
                "name-index",
                "status-created_at-index",
                "created_at-index",
            },
        }
        assert await store.create_tables() == []
        report = await store.health()
        assert report["ok"]
        tables: Any = report["tables"]
        assert tables["machines"]["status"] == "ACTIVE"
        assert tables["machines"]["indexes"]["name-index"] == "ACTIVE"


async def test_capacity_and_recovery_as_configured(proxy: Proxy) -> None:
    prefix = new_prefix()
    settings = {
        "billing_mode": "PROVISIONED",
        "read_capacity": 7,
        "write_capacity": 9,
        "point_in_time_recovery": True,
    }
    async with store_at(proxy.url, prefix, HOST_FACTORY, **settings) as store:
        await store.create_entity("requests", {"request_id": "r"})  # created at the first use
        table = await described(store, f"{prefix}_requests")
        for each in (table, *table["GlobalSecondaryIndexes"]):
            capacity = each["ProvisionedThroughput"]
            assert (capacity["ReadCapacityUnits"], capacity["WriteCapacityUnits"]) == (7, 9)
        await store.create_tables()
        tables: Any = (await store.health())["tables"]
        assert all(each["point_in_time_recovery"] for each in tables.values())
        assert tables["requests"]["billing_mode"] == "PROVISIONED"
    async with store_at(proxy.url, prefix, HOST_FACTORY) as store:
        problems = (await store.health())["problems"]
        assert (
            f"the billing mode of {prefix}_requests is PROVISIONED, but PAY_PER_REQUEST is configured"
            in problems  # type: ignore[operator]
        )


async def test_existing_and_declared_tables_are_compared(proxy: Proxy) -> None:
    prefix = new_prefix()
    before = [
        Collection("items", key="item_id", fields=["label", "kind"], indexes=[Index("label")]),
        Collection("odd", key="odd_id"),
    ]
    settings = {"billing_mode": "PROVISIONED", "read_capacity": 7, "write_capacity": 9}
    async with store_at(proxy.url, prefix, before, **settings) as store:
        assert (await store.compare_tables())["items"]["status"] == "missing"  # type: ignore[index,call-overload]
        await store.create_tables()
        for each in (await store.compare_tables()).values():
            assert each["existing"] == each["declared"]  # type: ignore[index,call-overload]
            assert each["differences"] == []  # type: ignore[index,call-overload]
    after = [
        Collection("items", key="item_id", fields=["label", "kind"], indexes=[Index("kind")]),
        Collection("odd", key="other_id"),
        Collection("new", key="new_id"),
    ]
    settings |= {"read_capacity": 8, "point_in_time_recovery": True}
    async with store_at(proxy.url, prefix, after, **settings) as store:
        found: Any = await store.compare_tables()
    assert found["items"]["differences"] == [
        f"{prefix}_items: read_capacity is 7, but the declared value is 8",
        f"{prefix}_items has no index kind-index; run `schema apply` to create it",
        f"{prefix}_items has an index label-index that is not declared",
        f"{prefix}_items: point_in_time_recovery is off, but the declared value is on",
    ]
    assert (
        f"{prefix}_odd: key is odd_id, but the declared value is other_id"
        in found["odd"]["differences"]
    )
    assert found["new"]["existing"] is None
    assert found["new"]["differences"] == [
        f"{prefix}_new is missing; run `create-tables` to create it"
    ]


async def test_point_in_time_recovery_without_permission_to_read_it(proxy: Proxy) -> None:
    proxy.rule = lambda request: (
        Answer(400, {"__type": "AccessDeniedException", "message": "no"})
        if request.operation == "DescribeContinuousBackups"
        else None
    )
    async with store_at(proxy.url, point_in_time_recovery=False) as store:
        await store.create_tables()
        found: Any = await store.compare_tables()
        assert found["items"]["existing"]["point_in_time_recovery"] is None
        [told] = found["items"]["differences"]
        assert told.endswith(
            "the policy does not allow reading point_in_time_recovery; the declared value is off"
        )


async def test_concurrent_creation_of_tables(proxy: Proxy) -> None:
    prefix = new_prefix()
    stores = [await store_at(proxy.url, prefix, HOST_FACTORY).open() for _ in range(6)]
    try:
        made = await asyncio.gather(*(each.create_tables() for each in stores))
        assert sorted(each for some in made for each in some) == [
            f"created {prefix}_{each}" for each in ("machines", "requests", "templates")
        ]
    finally:
        for each in stores:
            await each.close()


async def test_a_table_is_waited_for(proxy: Proxy) -> None:
    looks = 0

    def rule(request: Request) -> Fault | None:
        nonlocal looks
        if request.operation != "DescribeTable" or looks >= 4:
            return None
        looks += 1
        if looks == 1:
            return Answer(400, {"__type": "ResourceNotFoundException", "message": "no such table"})
        table = {"TableStatus": "CREATING", "KeySchema": [], "TableName": "t"}
        return Answer(200, {"Table": table})

    proxy.rule = rule
    async with store_at(proxy.url) as store:
        assert await store.create_entity("counters", {"counter_id": "c"}) == 1
    assert looks == 4
    assert proxy.counted()["CreateTable"] == 2, "the second is the table with the declarations"


async def test_without_permission_to_describe_tables_they_are_assumed_to_exist(
    proxy: Proxy,
) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix) as store:
        await store.create_tables()

    def rule(request: Request) -> Fault | None:
        if request.operation in ("DescribeTable", "CreateTable"):
            return Answer(400, {"__type": "AccessDeniedException", "message": "no"})
        return None

    proxy.rule = rule
    async with store_at(proxy.url, prefix) as store:
        assert await store.create_entity("items", {"item_id": "a", "label": "x"}) == 1
        assert len(await store.query_entities("items", {"label": "x"})) == 1
        assert "denies access" in str((await store.health())["problems"])


async def test_a_table_that_was_deleted_is_not_created_again(proxy: Proxy) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix) as store:
        await store.create_entity("items", {"item_id": "a"})
        await store._dynamodb.client.call("DeleteTable", {"TableName": f"{prefix}_items"})
        for work in (
            store.get_entity("items", "a"),
            store.create_entity("items", {"item_id": "b"}),
            store.update_entity("items", "a", {}),
            store.query_entities("items"),
            store.save_entity("items", {"item_id": "a"}),
        ):
            with pytest.raises(UnavailableError, match="was deleted"):
                await work
        await store.create_tables()
        assert await store.create_entity("items", {"item_id": "b"}) == 1


async def test_nothing_is_sent_before_the_first_use(proxy: Proxy) -> None:
    async with store_at(proxy.url) as store:
        store.describe()
    assert proxy.requests == []


def test_no_region_no_credentials_no_profile(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))

    async def get(**settings: Any) -> None:
        async with store_at(proxy.url, **settings) as store:
            await store.get_entity("items", "a")

    from hf_async_store import PermissionDeniedError

    with pytest.raises(ConfigurationError, match="region"):
        asyncio.run(get(region=None))
    with pytest.raises(PermissionDeniedError, match="credentials"):
        asyncio.run(get())
    with pytest.raises(ConfigurationError, match="profile"):
        asyncio.run(get(profile="nobody"))


# -- auto scaling ---------------------------------------------------------------------------


@pytest.fixture
def moto(tmp_path: Path) -> Iterator[str]:
    """A server with the auto scaling API, which the usual test server does not have."""
    beside = Path(sys.prefix) / "servers" / "bin" / "moto_server"
    program = shutil.which("moto_server") or (str(beside) if beside.exists() else None)
    if program is None:
        skip_engine("moto", "the server for auto scaling is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 30
        while True:
            with socket.socket() as connection:
                if connection.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(True, marks=pytest.mark.long),
        {
            "enabled": True,
            "min_read_capacity": 2,
            "max_write_capacity": 50,
            "target_utilization": 60,
        },
    ],
    ids=["true", "block"],
)
async def test_auto_scaling(
    moto: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, given: Any
) -> None:
    """The API checks that the tables exist, so this test creates the tables on the same server."""
    prefix = new_prefix()
    async with store_at(moto, prefix, HOST_FACTORY, auto_scaling=given, read_timeout=60) as store:
        await store.create_tables()
        await store.create_tables()
        beside: Any = await store.compare_tables()
        for each in beside.values():
            assert each["existing"]["auto_scaling"] == each["declared"]["auto_scaling"]
        connection = await store._dynamodb.client.connection()
        async with connection.session.create_client(
            "application-autoscaling", region_name="us-east-1", endpoint_url=moto
        ) as client:
            targets = await client.describe_scalable_targets(ServiceNamespace="dynamodb")
            policies = await client.describe_scaling_policies(ServiceNamespace="dynamodb")
    tables = {f"table/{prefix}_{each.name}" for each in HOST_FACTORY}
    indexes = {
        f"table/{prefix}_{each.name}/index/{index.name}"
        for each in HOST_FACTORY
        for index in each.indexes
    }
    found = {
        (each["ResourceId"], each["ScalableDimension"]): (each["MinCapacity"], each["MaxCapacity"])
        for each in targets["ScalableTargets"]
        if prefix in each["ResourceId"]
    }
    low, high = (1, 100) if given is True else (2, 50)
    assert found == {
        **{(each, "dynamodb:table:ReadCapacityUnits"): (low, 100) for each in tables},
        **{(each, "dynamodb:table:WriteCapacityUnits"): (1, high) for each in tables},
        **{(each, "dynamodb:index:ReadCapacityUnits"): (low, 100) for each in indexes},
        **{(each, "dynamodb:index:WriteCapacityUnits"): (1, high) for each in indexes},
    }
    tracked = [
        each["TargetTrackingScalingPolicyConfiguration"]
        for each in policies["ScalingPolicies"]
        if prefix in each["ResourceId"]
    ]
    assert len(tracked) == len(found)
    assert {each["TargetValue"] for each in tracked} == {70.0 if given is True else 60.0}


async def test_auto_scaling_of_an_index_that_is_made_later(moto: str) -> None:
    prefix = new_prefix()
    for indexes in ([], ["owner", "host"]):
        declared = [Collection("jobs", key="job_id", fields=["owner", "host"], indexes=indexes)]
        async with store_at(moto, prefix, declared, auto_scaling=True, read_timeout=60) as store:
            if indexes:
                await store._dynamodb.apply_schema()
            else:
                await store.create_tables()
            beside: Any = await store.compare_tables()
            each = beside["jobs"]
            assert each["existing"]["auto_scaling"] == each["declared"]["auto_scaling"]


async def test_auto_scaling_that_is_refused(proxy: Proxy) -> None:
    """The test server has no such API."""
    async with store_at(proxy.url, auto_scaling=True) as store:
        with pytest.raises(UnavailableError):
            await store.create_tables()


async def test_auto_scaling_that_cannot_be_reached(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_APPLICATION_AUTO_SCALING", "http://127.0.0.1:1")
    async with store_at(proxy.url, auto_scaling=True) as store:
        with pytest.raises(UnavailableError, match="Application Auto Scaling cannot be reached"):
            await store.create_tables()
