"""Contract case 125 on each engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hf_async_store.testing.blocking_callers import BlockingContract
from tests.contract.harnesses import (
    DynamoDBHarness,
    JSONHarness,
    MemoryHarness,
    PostgreSQLHarness,
    SQLiteHarness,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hf_async_store_bench.servers import PostgresServer
    from tests.dynamodb.proxy import Proxy


class TestMemory(BlockingContract):
    @pytest.fixture
    def harness(self) -> MemoryHarness:
        return MemoryHarness()


class TestJSON(BlockingContract):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> JSONHarness:
        return JSONHarness(tmp_path, "db.json")


@pytest.mark.hf_sampled(by="class")
class TestSQLite(BlockingContract):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> SQLiteHarness:
        return SQLiteHarness(tmp_path)


@pytest.mark.hf_sampled(by="class")
class TestPostgreSQL(BlockingContract):
    @pytest.fixture
    def harness(self, postgres_server: PostgresServer) -> Iterator[PostgreSQLHarness]:
        harness = PostgreSQLHarness(postgres_server)
        yield harness
        harness.close()


@pytest.mark.hf_sampled(by="class")
class TestDynamoDB(BlockingContract):
    @pytest.fixture
    def harness(self, dynamodb_proxy: Proxy) -> Iterator[DynamoDBHarness]:
        yield DynamoDBHarness(dynamodb_proxy)
        dynamodb_proxy.rule = None
        dynamodb_proxy.requests.clear()
