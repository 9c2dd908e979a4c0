"""The contract on the SQL engine with PostgreSQL."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hf_async_store.testing.contract import StrategyContract
from tests.contract.harnesses import PostgreSQLHarness

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hf_async_store_bench.servers import PostgresServer


@pytest.mark.hf_sampled(by="class", one_in=12)
class TestPostgreSQL(StrategyContract):
    @pytest.fixture
    def harness(self, postgres_server: PostgresServer) -> Iterator[PostgreSQLHarness]:
        harness = PostgreSQLHarness(postgres_server)
        yield harness
        harness.close()
