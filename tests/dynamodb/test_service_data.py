"""What of botocore's data files is kept in memory, and that endpoints are those of botocore."""

from __future__ import annotations

import gc
from typing import Any

import pytest
from botocore.loaders import Loader  # type: ignore[import-untyped]  # it has no types
from botocore.regions import EndpointResolver  # type: ignore[import-untyped]

from hf_async_store.strategies.dynamodb.service_data import WITH_ENDPOINTS, ServiceData
from tests.dynamodb.support import store_at

REGIONS = ("us-east-1", "eu-west-1", "cn-north-1", "us-gov-west-1", "us-iso-east-1", "xx-new-1")


def containers(root: object) -> int:
    """The number of lists and dicts in a value."""
    seen: set[int] = set()
    left: list[Any] = [root]
    while left:
        each = left.pop()
        if isinstance(each, dict | list | tuple) and id(each) not in seen:
            seen.add(id(each))
            left += gc.get_referents(each)
    return len(seen)


async def test_an_open_store_keeps_little_of_the_data_files() -> None:
    async with store_at("http://127.0.0.1:1") as store:
        connection = await store._dynamodb.client.connection()
        loader = connection.session.get_component("data_loader")
        assert containers(loader._cache) < 2_000  # 30,000 with the data of all services
        assert str(connection.client.meta.endpoint_url) == "http://127.0.0.1:1"


@pytest.mark.parametrize("service", WITH_ENDPOINTS)
def test_the_endpoints_of_services_are_those_of_botocore(service: str) -> None:
    own, complete = (
        EndpointResolver(each.load_data("endpoints")) for each in (ServiceData(), Loader())
    )
    for region in REGIONS:
        for options in ({}, {"use_fips_endpoint": True}, {"use_dualstack_endpoint": True}):
            found = own.construct_endpoint(service, region, **options)
            assert found == complete.construct_endpoint(service, region, **options)


@pytest.mark.parametrize("service", ["dynamodb", "dynamodbstreams"])
def test_the_metadata_is_that_of_botocore(service: str) -> None:
    own = ServiceData().load_service_model(service, "service-2")["metadata"]
    metadata = Loader().load_service_model(service, "service-2")["metadata"]
    # Later versions of botocore have added these.
    added = {each: own[each] for each in ("auth", "protocols")}
    named = {"signingName": metadata["endpointPrefix"], **added, **metadata}
    assert own == {each: named[each] for each in own}


def test_the_models_of_other_services_are_complete() -> None:
    for service in ("sts", "sso", "application-autoscaling"):
        model = ServiceData().load_service_model(service, "service-2")
        assert model == Loader().load_service_model(service, "service-2")
