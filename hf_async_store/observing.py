"""Makes a store tell its observer what it does.

The methods of a store, its transactions and its claims are observed by subclasses, which are made when a
store is opened with an observer. So a store without one pays nothing for this.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import cache, partial, wraps
from typing import Any, ClassVar, Final, Generic, Self, TypeVar

from msgspec import Struct

from hf_async_store.claims import Claim
from hf_async_store.conflict_retry import conflict_in
from hf_async_store.errors import ConcurrencyConflictError
from hf_async_store.generators import Owned
from hf_async_store.observer import Observation, Operation, StoreObserver
from hf_async_store.observer import check_observer as check_observer
from hf_async_store.transaction import Transaction

Kind = TypeVar("Kind", bound=type[Any])
Item = TypeVar("Item")
Result = TypeVar("Result")

_SHARED: Final = frozenset(
    f"{verb}_{what}"
    for verb in ("create", "save", "update", "delete", "get", "import")
    for what in ("entity", "entities")
)
"""The methods of a store whose changes and reads share commits and round trips, which are measured."""

_LIFECYCLE: Final = ("open", "close")
_MANY: Final = ("entities", "updates", "ids")
"""The names of arguments that have an item for each change or key."""


# -- methods --------------------------------------------------------------------------------


class _Method(Struct, frozen=True):
    """A method that is observed.

    Attributes:
        has_collection: its first argument is the name of a collection.
        many: the name of its second argument, if that has an item for each change or key.
    """

    observer: StoreObserver
    name: str
    measured: bool
    has_collection: bool
    many: str | None

    def begin(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Observation:
        collection = target.collection if self.name.startswith("claim.") else None
        if self.has_collection:
            given = args[0] if args else kwargs.get("collection")
            # A name that is not declared may be anything, even a value.
            collection = given if isinstance(given, str) and given in target._schema else None
        size = None
        if self.many is not None:
            items = args[1] if len(args) > 1 else kwargs.get(self.many)
            size = len(items) if isinstance(items, Collection) else None
        operation = Operation(self.name, collection, size, self.measured)
        return self.observer.operation(operation, target._observation)


def observed_store(kind: Kind, observer: StoreObserver) -> Kind:
    """The type of an observed store, with those of its transactions and claims."""
    plain: type = kind  # a type variable is not hashable for mypy
    names = {each: each for each in _asynchronous(plain)} | {"_acquired": "lock"}
    claims = {each: f"claim.{each}" for each in _asynchronous(Claim)}
    return _observed_type(
        kind,
        observer,
        names,
        lambda name: name not in _SHARED,
        snapshot=_observed_context(kind.snapshot, observer),
        transaction_type=_observed_transaction(kind.transaction_type, observer),
        _claim_type=_observed_type(Claim, observer, claims, lambda name: True),
    )


def _observed_type(
    kind: Kind,
    observer: StoreObserver,
    names: Mapping[str, str],
    is_measured: Callable[[str], bool],
    **attributes: object,
) -> Kind:
    """A subclass whose methods are observed.

    Args:
        names: of its methods, and what they are called as operations.
        is_measured: whether a method is `Operation.measured`.
        attributes: further ones of the class.
    """
    methods = {
        name: _observing(getattr(kind, name), observer, shown, is_measured(name))
        for name, shown in names.items()
    }
    namespace = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    made: Kind = type(  # type: ignore[assignment]
        kind.__name__, (kind,), {"_observation": None, **namespace, **methods, **attributes}
    )
    return made


@cache
def _asynchronous(kind: type) -> list[str]:
    """The names of the public methods that are awaited, or iterated over by `async for`."""
    return [
        name
        for name, method in inspect.getmembers_static(kind)
        if not name.startswith("_")
        and name not in _LIFECYCLE
        and (inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method))
    ]


@cache
def _first_arguments(method: Callable[..., Any]) -> tuple[str, str]:
    """The names of the first two arguments after `self`; "" for each that there is not."""
    names = [*inspect.signature(method).parameters, "", ""]
    return names[1], names[2]


def _observing(
    method: Callable[..., Any], observer: StoreObserver, name: str, measured: bool
) -> Callable[..., Any]:
    first, second = _first_arguments(method)
    many = second if second in _MANY else None
    records = observer.records
    begin = _Method(observer, name, measured, first == "collection", many).begin
    run = _observed_stream if inspect.isasyncgenfunction(method) else _observed

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not measured and not records(self._observation):
            return method(self, *args, **kwargs)
        return run(begin(self, args, kwargs), partial(method, self, *args, **kwargs))

    return call


async def _observed(observation: Observation, work: Callable[[], Awaitable[Result]]) -> Result:
    """Await `work()` as an operation."""
    observation.start(current=True)
    try:
        result = await work()
    except BaseException as exc:
        observation.end(exc)
        raise
    observation.end(None)
    return result


async def _observed_stream(
    observation: Observation, source: Callable[[], AsyncGenerator[Item, None]]
) -> AsyncGenerator[Item, None]:
    # Not as the current operation: what the caller does between two items is not part of it.
    observation.start(current=False)
    try:
        async with Owned(source()) as items:
            async for each in items:
                yield each
    except GeneratorExit:
        observation.end(None)
        raise
    except BaseException as exc:
        observation.end(exc)
        raise
    observation.end(None)


def _observed_context(
    method: Callable[..., AbstractAsyncContextManager[Item]], observer: StoreObserver
) -> Callable[..., AbstractAsyncContextManager[Item]]:
    """A method whose result is entered, which is an operation until that is left."""

    @asynccontextmanager
    @wraps(method)
    async def entered(*args: Any, **kwargs: Any) -> AsyncGenerator[Item, None]:
        observation = observer.operation(Operation(method.__name__), None)
        observation.start(current=False)
        try:
            async with method(*args, **kwargs) as value:
                yield value
        except BaseException as exc:
            observation.end(exc)
            raise
        observation.end(None)

    return entered


# -- transactions ---------------------------------------------------------------------------


class _ObservedTransaction(Transaction):
    """A transaction that is an operation, with the calls in it as parts."""

    _observer: ClassVar[StoreObserver] = StoreObserver()
    _observation: Observation | None = None

    async def __aenter__(self) -> Self:
        parent = self._parent
        name = "transaction" if parent is None else "savepoint"
        within = parent._observation if isinstance(parent, _ObservedTransaction) else None
        observation = self._observer.operation(Operation(name, measured=parent is None), within)
        observation.start(current=False)
        try:
            entered = await super().__aenter__()
        except BaseException as exc:
            observation.end(exc)
            raise
        self._observation = observation
        return entered

    async def __aexit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        try:
            await super().__aexit__(kind, exc, traceback)
        except BaseException as failure:
            self._note_end(failure)
            raise
        self._note_end(exc)

    def _note_end(self, error: BaseException | None) -> None:
        conflict = conflict_in(error)
        if conflict is not None and self._parent is None:
            self._observer.count("conflict", conflict.collection)
        if self._observation is not None:
            self._observation.end(error)


def _observed_transaction(kind: type[Transaction], observer: StoreObserver) -> type[Transaction]:
    class Observed(_ObservedTransaction, kind):  # type: ignore[misc,valid-type]
        _observer = observer

    for each in ("__module__", "__name__", "__qualname__"):
        setattr(Observed, each, getattr(kind, each))
    names = {each: each for each in _asynchronous(kind)}
    return _observed_type(Observed, observer, names, lambda name: False)


# -- shared commits and round trips -----------------------------------------------------------


class SharedOperations(Generic[Item, Result]):
    """Observes the batches of a `Coalescer`.

    Args:
        name: of each batch as an operation.
        collection: the collection of an item.
    """

    def __init__(
        self, observer: StoreObserver, name: str, collection: Callable[[Item], str]
    ) -> None:
        self._observer = observer
        self._name = name
        self._collection = collection
        self.caller = observer.caller

    async def run(
        self,
        items: Sequence[Item],
        callers: Sequence[object],
        work: Callable[[], Awaitable[Sequence[Result]]],
    ) -> Sequence[Result]:
        """Await `work()`, the results of a batch."""
        names = set(map(self._collection, items))
        collection = names.pop() if len(names) == 1 else None
        operation = Operation(self._name, collection, len(items))
        results = await _observed(self._observer.shared(operation, callers), work)
        conflicts = [each for each in results if isinstance(each, ConcurrencyConflictError)]
        if conflicts:
            self._observer.count("conflict", collection, len(conflicts))
        return results
