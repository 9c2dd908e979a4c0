"""The contract on an observed store: tracing changes no answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider

from hf_async_store.integrations.opentelemetry import OpenTelemetryObserver
from hf_async_store.testing.contract import StrategyContract
from hf_async_store.testing.harness import CONTRACT_COLLECTIONS
from tests.contract.harnesses import MemoryHarness

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hf_async_store import Collection, StorageStrategy


class _ObservedHarness(MemoryHarness):
    def __init__(self, observer: OpenTelemetryObserver | None) -> None:
        self._observer = observer
        super().__init__()

    def store(
        self, collections: Iterable[Collection] = CONTRACT_COLLECTIONS, **settings: object
    ) -> StorageStrategy:
        store = super().store(collections, **settings)
        if self._observer is not None:
            store._observe(self._observer)
        return store


@pytest.mark.hf_sampled(by="class")
class TestObserved(StrategyContract):
    @pytest.fixture
    def harness(self, request: pytest.FixtureRequest) -> Iterator[MemoryHarness]:
        traces = TracerProvider(shutdown_on_exit=False)
        metrics = MeterProvider([InMemoryMetricReader()], shutdown_on_exit=False)
        observer = OpenTelemetryObserver(traces, metrics, root_spans=True)
        # The cases of observers have one of their own.
        yield _ObservedHarness(None if "_148_" in request.node.name else observer)
        metrics.shutdown()
        traces.shutdown()
