"""The contract on the SQL engine with PostgreSQL."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.contract.expected import OneStatementForAll
from tests.contract.harnesses import PostgreSQLHarness

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hf_async_store_bench.servers import PostgresServer


class TestPostgreSQL(OneStatementForAll):
    @pytest.fixture
    def harness(self, postgres_server: PostgresServer) -> Iterator[PostgreSQLHarness]:
        harness = PostgreSQLHarness(postgres_server)
        yield harness
        harness.close()
