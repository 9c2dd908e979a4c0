"""Spans and metrics by OpenTelemetry."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import context, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from hf_async_store import (
    ConcurrencyConflictError,
    InvalidQueryError,
    StorageStrategy,
    migration_routing,
    open_store,
    sync,
)
from hf_async_store.integrations.opentelemetry import OpenTelemetryObserver
from hf_async_store.migration import live
from hf_async_store.observer import Observation, Operation
from hf_async_store.query import Query

SECRET = "s3cr3t-0f-the-caller"


class Telemetry:
    """Providers in memory, and an observer that uses them."""

    def __init__(self, *, sampled: bool = True, **options: bool) -> None:
        sampler = None if sampled else ParentBased(ALWAYS_OFF)
        self._exporter = InMemorySpanExporter()
        self._traces = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        self._traces.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._reader = InMemoryMetricReader()
        self._metrics = MeterProvider([self._reader], shutdown_on_exit=False)
        self.tracer = self._traces.get_tracer("application")
        self.observer = OpenTelemetryObserver(self._traces, self._metrics, **options)

    def spans(self, name: str | None = None) -> list[ReadableSpan]:
        finished = self._exporter.get_finished_spans()
        return [each for each in finished if name is None or each.name == name]

    def names(self) -> list[str]:
        return sorted(each.name for each in self.spans())

    def points(self, metric: str) -> dict[tuple[str, ...], Any]:
        """The points of a metric by the values of their attributes."""
        found = self._reader.get_metrics_data()
        return {
            tuple(str(value) for value in (point.attributes or {}).values()): point
            for resource in (() if found is None else found.resource_metrics)
            for scope in resource.scope_metrics
            for each in scope.metrics
            if each.name == metric
            for point in each.data.data_points
        }


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry()


@pytest.fixture(params=["memory:", "json:{}/a.json", "sqlite:{}/a.db"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.param).format(tmp_path)


def of(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.span_id


def parent_of(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


SYSTEMS = {"memory": "hf_async_store.memory", "json": "hf_async_store.json", "sqlite": "sqlite"}


async def test_methods_have_spans_that_are_linked_to_their_commit(
    url: str, telemetry: Telemetry
) -> None:
    system = SYSTEMS[url.partition(":")[0]]
    async with open_store(url, observer=telemetry.observer) as store:
        with telemetry.tracer.start_as_current_span("request"):
            await asyncio.gather(
                *(store.save_entity("machines", {"machine_id": each}) for each in "abc")
            )
    [request], [commit] = telemetry.spans("request"), telemetry.spans("commit machines")
    saves = telemetry.spans("save_entity machines")
    assert [parent_of(each) for each in saves] == [id_of(request)] * 3
    assert parent_of(commit) in map(id_of, saves)
    assert [[link.context.span_id for link in each.links] for each in saves] == [
        [id_of(commit)]
    ] * 3
    assert {each.kind for each in [commit, *saves]} == {trace.SpanKind.CLIENT}
    named = {"db.system.name": system, "db.collection.name": "machines"}
    assert of(commit) == {**named, "db.operation.name": "commit", "db.operation.batch.size": 3}
    assert of(saves[0]) == {**named, "db.operation.name": "save_entity"}


async def test_the_spans_of_the_program_are_linked_to_commits(url: str) -> None:
    telemetry = Telemetry(method_spans=False)
    async with open_store(url, observer=telemetry.observer) as store:
        await store.save_entity("machines", {"machine_id": "a"})
        with telemetry.tracer.start_as_current_span("request"):
            await asyncio.gather(
                *(store.save_entity("machines", {"machine_id": each}) for each in "abc")
            )
            await store.count_entities("machines")
            async with store.begin_transaction() as tx:
                await tx.update_entity("machines", "a", {"status": "RUNNING"})
    [request], [commit] = telemetry.spans("request"), telemetry.spans("commit machines")
    assert parent_of(commit) == id_of(request)
    assert [each.context.span_id for each in request.links] == [id_of(commit)]
    of_methods = ["count_entities machines", "transaction", "update_entity machines"]
    assert telemetry.names() == ["commit machines", *of_methods[:1], "request", *of_methods[1:]]
    measured = telemetry.points("db.client.operation.duration")
    assert measured[SYSTEMS[url.partition(":")[0]], "commit", "machines"].count == 2


async def test_a_snapshot_lasts_until_it_is_left(url: str, telemetry: Telemetry) -> None:
    async with open_store(url, observer=telemetry.observer) as store:
        with telemetry.tracer.start_as_current_span("request"):
            with suppress(ZeroDivisionError):
                async with store.snapshot():
                    assert not telemetry.spans()
                    raise ZeroDivisionError
            async with store.snapshot() as reader:
                assert await reader.count(Query("machines")) == 0
    [failed, snapshot] = telemetry.spans("snapshot")
    assert of(failed)["error.type"] == "ZeroDivisionError"
    assert of(snapshot)["db.operation.name"] == "snapshot"


async def test_a_span_that_begins_or_ends_between_two_calls_counts(telemetry: Telemetry) -> None:
    """What is known about a context is not taken for another one."""
    async with open_store("memory:", observer=telemetry.observer) as store:
        await store.get_entity("machines", "a")
        for _ in range(2):
            with telemetry.tracer.start_as_current_span("request"):
                await store.get_entity("machines", "a")
                unsampled = trace.NonRecordingSpan(trace.SpanContext(1, 1, is_remote=True))
                with trace.use_span(unsampled):
                    await store.get_entity("machines", "a")
                await store.get_entity("machines", "a")
            await store.get_entity("machines", "a")
    requests = [id_of(each) for each in telemetry.spans("request")]
    gets = telemetry.spans("get_entity machines")
    assert [parent_of(each) for each in gets] == [each for each in requests for _ in range(2)]


async def test_an_error_is_its_type(telemetry: Telemetry) -> None:
    async with open_store("memory:", observer=telemetry.observer) as store:
        await store.create_entity("machines", {"machine_id": SECRET})
        with telemetry.tracer.start_as_current_span("request"):
            with pytest.raises(ConcurrencyConflictError):
                await store.update_entity("machines", SECRET, {}, expected_version=9)
            with pytest.raises(InvalidQueryError):
                await store.query_entities("machines", SECRET)  # type: ignore[arg-type]
    [update] = telemetry.spans("update_entity machines")
    assert of(update)["error.type"] == "ConcurrencyConflictError"
    assert (update.status.status_code, update.status.description) == (trace.StatusCode.ERROR, None)
    assert not any(each.events for each in telemetry.spans()), "an exception has a text"
    assert SECRET not in "".join(each.to_json() for each in telemetry.spans())
    system = "hf_async_store.memory"
    measured = telemetry.points("db.client.operation.duration")
    assert measured[system, "query_entities", "machines", "InvalidQueryError"].count == 1
    assert telemetry.points("hf_async_store.conflicts")[system, "machines"].value == 1


async def test_the_calls_in_a_transaction_are_its_parts(telemetry: Telemetry) -> None:
    async with open_store("memory:", observer=telemetry.observer) as store:
        with telemetry.tracer.start_as_current_span("request"):
            async with store.begin_transaction() as tx:
                await tx.save_entity("machines", {"machine_id": "a"})
                async with tx.begin_transaction() as inner:
                    await inner.get_entity("machines", "a")
    [transaction], [savepoint] = telemetry.spans("transaction"), telemetry.spans("savepoint")
    [save], [get] = telemetry.spans("save_entity machines"), telemetry.spans("get_entity machines")
    assert parent_of(save) == parent_of(savepoint) == id_of(transaction)
    assert parent_of(get) == id_of(savepoint)


async def call_everything(store: StorageStrategy) -> None:
    await store.save_entity("machines", {"machine_id": "a"})
    await store.query_page("machines")
    async for _ in store.stream_entities("machines"):
        pass
    async with store.begin_transaction() as tx:
        await tx.get_entity("machines", "a")


@pytest.mark.parametrize("inside", [True, False])
async def test_what_is_not_sampled_has_no_spans(inside: bool) -> None:
    telemetry = Telemetry(sampled=not inside)
    async with open_store("memory:", observer=telemetry.observer) as store:
        if inside:
            with telemetry.tracer.start_as_current_span("request"):
                await call_everything(store)
        else:
            await call_everything(store)
    assert telemetry.names() == []
    measured = telemetry.points("db.client.operation.duration")
    assert {each[1] for each in measured} == {
        *("commit", "query_page", "stream_entities", "transaction"),
    }


async def test_methods_outside_of_spans_on_request() -> None:
    telemetry = Telemetry(root_spans=True)
    async with open_store("memory:", observer=telemetry.observer) as store:
        await call_everything(store)
    assert telemetry.names() == [
        *("commit machines", "get_entity machines", "query_page machines"),
        *("save_entity machines", "stream_entities machines", "transaction"),
    ]
    [save], [commit] = telemetry.spans("save_entity machines"), telemetry.spans("commit machines")
    assert parent_of(save) is None
    assert parent_of(commit) == id_of(save)


async def test_a_parent_in_another_process(telemetry: Telemetry) -> None:
    header = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    remote = context.attach(TraceContextTextMapPropagator().extract(header))
    try:
        async with open_store("memory:", observer=telemetry.observer) as store:
            await store.save_entity("machines", {"machine_id": "a"})
    finally:
        context.detach(remote)
    [save] = telemetry.spans("save_entity machines")
    assert parent_of(save) == 0xB7AD6B7169203331


async def test_a_cancelled_caller(telemetry: Telemetry) -> None:
    async with open_store("memory:", observer=telemetry.observer) as store:
        async with store.begin_transaction():
            pass
        with telemetry.tracer.start_as_current_span("request"):
            saving = asyncio.create_task(store.save_entity("machines", {"machine_id": "a"}))
            never = asyncio.create_task(store.save_entity("machines", {"machine_id": "b"}))
            never.cancel()  # before it began
            await asyncio.sleep(0)
            saving.cancel()
            await asyncio.gather(saving, never, return_exceptions=True)
    [save] = telemetry.spans("save_entity machines")
    assert of(save)["error.type"] == "CancelledError"


def test_blocking_callers(telemetry: Telemetry) -> None:
    with sync.open_store("memory:", observer=telemetry.observer) as store:
        with telemetry.tracer.start_as_current_span("request"):
            store.save_entity("machines", {"machine_id": "a"})
        store.save_entity("machines", {"machine_id": "b"})
    [request], [save] = telemetry.spans("request"), telemetry.spans("save_entity machines")
    assert parent_of(save) == id_of(request)


async def test_calls_that_wait_are_counted(telemetry: Telemetry, tmp_path: Path) -> None:
    metric = "hf_async_store.waiting_calls"
    async with (
        open_store(f"sqlite:{tmp_path}/one.db", observer=telemetry.observer) as one,
        open_store(f"sqlite:{tmp_path}/two.db", observer=telemetry.observer) as two,
    ):
        calls = []
        for name in "ab":  # while the first is written, the second waits
            for store in (one, two):
                entity = {"machine_id": name}
                calls.append(asyncio.create_task(store.save_entity("machines", entity)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        waiting = {each[1]: point.value for each, point in telemetry.points(metric).items()}
        assert waiting == {"commit": 2, "fetch": 0}
        await asyncio.gather(*calls)
        assert {each.value for each in telemetry.points(metric).values()} == {0}


def test_engines_have_the_names_of_the_conventions(telemetry: Telemetry) -> None:
    def system_of(engine: str) -> object:
        with telemetry.tracer.start_as_current_span("request"):
            observed = telemetry.observer.observe(engine, dict).operation(Operation("x"), None)
            observed.start(current=True)
            observed.end(None)
        return of(telemetry.spans("x")[-1])["db.system.name"]

    assert system_of("dynamodb") == "aws.dynamodb"
    assert system_of("postgresql") == "postgresql"
    assert system_of("somebody") == "somebody"


def test_nothing_is_imported_that_is_not_used() -> None:
    code = (
        "import sys, asyncio, hf_async_store as h, hf_async_store.sync\n"
        "async def main():\n"
        "    async with h.open_store('memory:') as store:\n"
        "        await store.save_entity('machines', {'machine_id': 'a'})\n"
        "asyncio.run(main())\n"
        "print([each for each in sys.modules if 'telemetry' in each])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


async def test_a_store_without_an_observer_has_its_own_classes() -> None:
    async with open_store("memory:") as store:
        assert type(store).__mro__[0].save_entity is StorageStrategy.save_entity
        assert store._writes.observer is None
    assert Observation().end(None) is None  # type: ignore[func-returns-value]


@pytest.fixture(autouse=True)
def _no_warnings_of_telemetry(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """For example of spans that have ended, or of contexts that were left by another task."""
    yield
    assert [each for each in caplog.records if "telemetry" in each.name] == []


async def test_a_live_migration(
    telemetry: Telemetry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (migration_routing, live):
        monkeypatch.setattr(module, "LEASE_SECONDS", 0.6)
    source, target = f"sqlite:{tmp_path}/a.db", f"json:{tmp_path}/b.json"
    async with open_store(source, follow_moves=[target], observer=telemetry.observer) as store:
        await store.save_entity("machines", {"machine_id": "a"})
        async with live.LiveMigration(source, target) as migration:
            assert (await migration.start()).phase == "SWITCHED"
        with telemetry.tracer.start_as_current_span("request"):
            await store.save_entity("machines", {"machine_id": "b"})
    async with open_store(target, follow_moves=[source]) as moved:
        assert await moved.get_entity("machines", "b")
    [commit], [save] = telemetry.spans("commit machines"), telemetry.spans("save_entity machines")
    assert [each.context.span_id for each in save.links] == [id_of(commit)]
    assert of(commit)["db.system.name"] == "sqlite", "as it was opened"
