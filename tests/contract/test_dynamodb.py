"""The contract on DynamoDB."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.contract.expected import AttributesOfTheDeclaration, ItemsOfTheirDeclaration
from tests.contract.harnesses import DynamoDBHarness

if TYPE_CHECKING:
    from tests.dynamodb.proxy import Proxy


class TestDynamoDB(ItemsOfTheirDeclaration, AttributesOfTheDeclaration):
    @pytest.fixture
    def harness(self, dynamodb_proxy: Proxy) -> Iterator[DynamoDBHarness]:
        harness = DynamoDBHarness(dynamodb_proxy)
        yield harness
        dynamodb_proxy.rule = None
        dynamodb_proxy.requests.clear()
