"""Traces and metrics of a store by OpenTelemetry. Needs the extra `opentelemetry`.

    from hf_async_store.integrations.opentelemetry import OpenTelemetryObserver

    store = open_store("json:data", observer=OpenTelemetryObserver())

Names and attributes are those of the stable database semantic conventions
(https://opentelemetry.io/docs/specs/semconv/database/): the span name `{operation} {collection}`, and
`db.system.name`, `db.operation.name`, `db.collection.name`, `db.operation.batch.size`, `error.type` and
the metric `db.client.operation.duration`. They list no JSON files and no memory, which have the system
names `hf_async_store.json` and `hf_async_store.memory`. Neither ids and values nor the texts of errors are
recorded.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar, Token
from time import perf_counter
from typing import Final, NamedTuple, cast
from weakref import WeakSet

from opentelemetry import context as contexts
from opentelemetry import metrics, trace

import hf_async_store
from hf_async_store.observer import Event, Observation, Observer, Operation, StoreObserver

_SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.33.0"
_SYSTEMS: Final = {
    "dynamodb": "aws.dynamodb",
    "json": "hf_async_store.json",
    "memory": "hf_async_store.memory",
}
"""The names of systems that differ from the names of their engines."""

_SECONDS: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
"""The boundaries of the buckets of durations, by the conventions."""

_NOT_SAMPLED: Final = trace.set_span_in_context(
    trace.NonRecordingSpan(trace.SpanContext(1, 1, is_remote=False)), contexts.Context()
)
"""The context of a commit of which no operation is recorded."""

_PENDING_DURATIONS: Final = 32
"""How many durations are recorded together, which takes a fraction of the time that each alone does."""


_RUNNING: Final[ContextVar[trace.Span | None]] = ContextVar("running", default=None)
"""The span of the method that runs. To ask for this is ten times faster than for the current span."""


class _Decision(NamedTuple):
    """What is known about the span of a context, which most calls of a task have in common."""

    context: contexts.Context
    span: trace.Span
    is_sampled: bool
    is_none: bool


_DECISION: Final[ContextVar[_Decision | None]] = ContextVar("decision", default=None)
"""The last decision of the task."""


def _decision(context: contexts.Context) -> _Decision:
    known = _DECISION.get()
    if known is not None and known.context is context:
        return known
    span = trace.get_current_span(context)
    parent = span.get_span_context()  # perhaps that of another process
    is_sampled = span.is_recording() or parent.trace_flags.sampled
    made = _Decision(context, span, is_sampled, is_none=not parent.is_valid)
    _DECISION.set(made)
    return made


def _sampled_span() -> trace.Span | None:
    """The current span, if it is sampled."""
    context = contexts.get_current()
    if not context:
        return None
    known = _decision(context)
    return known.span if known.is_sampled else None


class OpenTelemetryObserver(Observer):
    """Records spans and metrics of the stores that are opened with it.

    A method has a span if it is called within a sampled span; a commit or round trip, if one of the methods
    that share it has one. It is a child of the first of them, and each of them has a link to it.

    Args:
        tracer_provider, meter_provider: by default, the global ones.
        root_spans: record also the methods that are called outside of any span, each as a trace.
        method_spans: whether methods that share a commit or round trip have spans of their own. Otherwise
            the spans within which they are called have the links to it: to record a link takes a sixth of
            the time. Methods that are called outside of any span are not recorded then.
    """

    def __init__(
        self,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
        *,
        root_spans: bool = False,
        method_spans: bool = True,
    ) -> None:
        name, version = hf_async_store.__name__, hf_async_store.__version__
        self.root_spans = root_spans
        self.method_spans = method_spans
        self.tracer = trace.get_tracer(name, version, tracer_provider, _SCHEMA_URL)
        meter = metrics.get_meter(name, version, meter_provider, _SCHEMA_URL)
        self._histogram = meter.create_histogram(
            "db.client.operation.duration",
            unit="s",
            description="Duration of database client operations.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self.counters: Mapping[Event, metrics.Counter] = {
            "conflict": meter.create_counter(
                "hf_async_store.conflicts", "{conflict}", "Changes and transactions refused."
            ),
            "retry": meter.create_counter(
                "hf_async_store.retries", "{retry}", "Further attempts after conflicts."
            ),
            "lost claim": meter.create_counter(
                "hf_async_store.lost_claims", "{claim}", "Claims and locks that were lost."
            ),
        }
        meter.create_observable_gauge(
            "hf_async_store.waiting_calls",
            [self._collect],
            "{call}",
            "Calls that wait for a shared commit or round trip.",
        )
        self._durations: deque[tuple[float, Mapping[str, str], contexts.Context | None]] = deque()
        self._stores: WeakSet[_ObservedStore] = WeakSet()
        self._lock = threading.Lock()  # metrics are collected in another thread

    def observe(self, engine: str, waiting: Callable[[], Mapping[str, int]]) -> StoreObserver:
        store = _ObservedStore(self, _SYSTEMS.get(engine, engine), waiting)
        with self._lock:
            self._stores.add(store)
        return store

    def measure(
        self, seconds: float, attributes: Mapping[str, str], context: contexts.Context | None
    ) -> None:
        """Record the duration of an operation, at the latest when the metrics are collected."""
        self._durations.append((seconds, attributes, context))
        if len(self._durations) >= _PENDING_DURATIONS:
            self._record_durations()

    def _record_durations(self) -> None:
        with suppress(IndexError):  # another thread may do the same
            while True:
                self._histogram.record(*self._durations.popleft())

    def _collect(self, options: metrics.CallbackOptions) -> Iterable[metrics.Observation]:
        """The numbers of calls that wait. Such functions are called before histograms are collected."""
        del options
        self._record_durations()
        with self._lock:
            stores = list(self._stores)
        numbers: dict[tuple[str, str], int] = {}
        for each in stores:
            for name, number in each.waiting().items():
                numbers[each.system, name] = numbers.get((each.system, name), 0) + number
        return [
            metrics.Observation(number, {"db.system.name": system, "db.operation.name": name})
            for (system, name), number in numbers.items()
        ]


class _ObservedStore(StoreObserver):
    def __init__(
        self,
        observer: OpenTelemetryObserver,
        system: str,
        waiting: Callable[[], Mapping[str, int]],
    ) -> None:
        self.observer = observer
        self.system = system
        self.waiting = waiting
        self.caller = _RUNNING.get if observer.method_spans else _sampled_span
        self._attributes: dict[tuple[str, str | None], dict[str, str]] = {}

    def attributes(self, name: str, collection: str | None) -> dict[str, str]:
        """The attributes of an operation, which may not be modified."""
        found = self._attributes.get((name, collection))
        if found is None:
            found = {"db.system.name": self.system, "db.operation.name": name}
            if collection is not None:
                found["db.collection.name"] = collection
            self._attributes[name, collection] = found
        return found

    def records(self, within: Observation | None) -> bool:
        if within is not None:
            return cast("_Operation", within).is_recorded
        return self.observer.method_spans and self._is_in_trace()

    def _is_in_trace(self) -> bool:
        context = contexts.get_current()
        if not context:  # what follows takes several times as long
            return self.observer.root_spans
        known = _decision(context)
        return known.is_sampled or (known.is_none and self.observer.root_spans)

    def operation(self, operation: Operation, within: Observation | None) -> Observation:
        if within is None:
            # Whether what is not measured is recorded was asked before.
            is_recorded = not operation.measured or self._is_in_trace()
            return _Operation(self, operation, None, is_recorded=is_recorded)
        outer = cast("_Operation", within)
        return _Operation(self, operation, outer.span, is_recorded=outer.is_recorded)

    def shared(self, operation: Operation, callers: Sequence[object]) -> Observation:
        return _SharedOperation(self, operation, cast("Sequence[trace.Span]", callers))

    def count(self, event: Event, collection: str | None, number: int = 1) -> None:
        attributes = {"db.system.name": self.system}
        if collection is not None:
            attributes["db.collection.name"] = collection
        self.observer.counters[event].add(number, attributes)


class _Operation(Observation):
    """An operation, which has a span if it is recorded, and a duration if it is measured."""

    def __init__(
        self,
        store: _ObservedStore,
        operation: Operation,
        parent: trace.Span | None,
        *,
        is_recorded: bool,
    ) -> None:
        self._store = store
        self._operation = operation
        self._parent = parent
        self.is_recorded = is_recorded
        self.span: trace.Span | None = None
        self._running: Token[trace.Span | None] | None = None
        self._attached: Token[contexts.Context] | None = None
        self._started = 0.0

    def start(self, *, current: bool) -> None:
        operation = self._operation
        if operation.measured:
            self._started = perf_counter()
        if not self.is_recorded:
            return
        self.span = span = self._new_span()
        if current:
            self._running = _RUNNING.set(span)
            # What shares a commit runs in its context.
            if operation.measured or self._parent is not None:
                self._attached = contexts.attach(trace.set_span_in_context(span))

    def _new_span(self) -> trace.Span:
        name, collection = self._operation.name, self._operation.collection
        size = self._operation.size
        attributes: Mapping[str, str | int] = self._store.attributes(name, collection)
        if size is not None and size > 1:
            attributes = {**attributes, "db.operation.batch.size": size}
        context = contexts.get_current()
        return self._store.observer.tracer.start_span(
            name if collection is None else f"{name} {collection}",
            context if self._parent is None else trace.set_span_in_context(self._parent, context),
            trace.SpanKind.CLIENT,
            attributes,
        )

    def end(self, error: BaseException | None) -> None:
        kind = None if error is None else type(error).__qualname__
        operation = self._operation
        if operation.measured:
            attributes = self._store.attributes(operation.name, operation.collection)
            if kind is not None:
                attributes = {**attributes, "error.type": kind}
            context = None if self.span is None else trace.set_span_in_context(self.span)
            self._store.observer.measure(perf_counter() - self._started, attributes, context)
        if self._attached is not None:
            contexts.detach(self._attached)
        if self._running is not None:
            _RUNNING.reset(self._running)
        if self.span is not None:
            if kind is not None:
                self.span.set_attribute("error.type", kind)
                self.span.set_status(trace.StatusCode.ERROR)
            self.span.end()


class _SharedOperation(_Operation):
    """A commit or round trip: a child of the first of the methods that share it, and linked from all."""

    def __init__(
        self, store: _ObservedStore, operation: Operation, callers: Sequence[trace.Span]
    ) -> None:
        # A caller that was cancelled, or whose time has passed, has ended. One of another process cannot be
        # given links.
        self._callers = [each for each in callers if each.is_recording()]
        parent = self._callers[0] if self._callers else None
        super().__init__(store, operation, parent, is_recorded=parent is not None)

    def start(self, *, current: bool) -> None:
        super().start(current=current)
        if self.span is None:
            # The context is that of the method that once happened to be the first.
            if contexts.get_current():
                self._running = _RUNNING.set(None)
                self._attached = contexts.attach(_NOT_SAMPLED)
            return
        own = self.span.get_span_context()
        for each in self._callers:
            each.add_link(own)
