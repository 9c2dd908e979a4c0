"""The contract on PostgreSQL behind a pgbouncer with transaction pooling, if one is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hf_async_store.testing import rollout
from hf_async_store.testing.contract import StrategyContract
from hf_async_store.testing.process_workers import run_workers
from hf_async_store_bench.servers import ServerUnavailable
from tests.contract.harnesses import PgbouncerHarness
from tests.pgbouncer import pgbouncer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hf_async_store_bench.servers import PostgresServer


# The whole contract a second time on the same engine: `make test-long` runs it.
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def address(postgres_server: PostgresServer) -> Iterator[str]:
    try:
        with pgbouncer(postgres_server) as found:
            yield found
    except ServerUnavailable as exc:
        # Not a separate engine, so that a run without it is complete.
        pytest.skip(str(exc))


class TestPgbouncer(StrategyContract):
    @pytest.fixture
    def harness(self, postgres_server: PostgresServer, address: str) -> Iterator[PgbouncerHarness]:
        harness = PgbouncerHarness(postgres_server, address)
        yield harness
        harness.close()

    async def test_95_old_and_new_processes_under_load_while_the_schema_is_applied(
        self, harness: PgbouncerHarness, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The programs are behind pgbouncer; the process that applies the schema is not."""

        async def run(url: str, *works: tuple[str, dict[str, object]]) -> list[object]:
            direct = {"apply": {"url": harness.direct_url()}}
            return await run_workers(
                url, *((role, {**given, **direct.get(role, {})}) for role, given in works)
            )

        monkeypatch.setattr(rollout, "run_workers", run)
        await super().test_95_old_and_new_processes_under_load_while_the_schema_is_applied(harness)
