"""The contract on DynamoDB."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from hf_async_store.testing.contract import StrategyContract
from tests.contract.harnesses import DynamoDBHarness

if TYPE_CHECKING:
    from tests.dynamodb.proxy import Proxy


# A request takes ten times longer than on the other engines.
@pytest.mark.hf_sampled(by="class", one_in=12)
class TestDynamoDB(StrategyContract):
    @pytest.fixture
    def harness(self, dynamodb_proxy: Proxy) -> Iterator[DynamoDBHarness]:
        harness = DynamoDBHarness(dynamodb_proxy)
        yield harness
        dynamodb_proxy.rule = None
        dynamodb_proxy.requests.clear()
