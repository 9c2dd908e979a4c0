"""Fixtures of the tests of the DynamoDB strategy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.dynamodb.proxy import Proxy


@pytest.fixture
def proxy(dynamodb_proxy: Proxy) -> Iterator[Proxy]:
    """The proxy of the run, without rules and recorded requests of earlier tests."""
    dynamodb_proxy.rule = None
    dynamodb_proxy.requests.clear()
    dynamodb_proxy.looks.clear()
    yield dynamodb_proxy
    dynamodb_proxy.rule = None
    dynamodb_proxy.requests.clear()
    dynamodb_proxy.looks.clear()
