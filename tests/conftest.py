"""What all suites share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from hf_async_store.testing.harness import leave_out
from hf_async_store.testing.servers import PostgresServer, ServerUnavailable, postgres

if TYPE_CHECKING:
    from collections.abc import Iterator

# Time says how loaded a machine is, and nothing about the product.
settings.register_profile(
    "suite", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A PostgreSQL for the whole run; a run without one says so."""
    try:
        with postgres() as server:
            yield server
    except ServerUnavailable as exc:
        leave_out("postgresql", str(exc))
