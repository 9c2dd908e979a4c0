"""What a store tells somebody who observes it: a tracer, or a collector of metrics.

An `Observer` is passed to `open_store`. None of its methods is given an id, a value, or the text of an
error; an exception is passed so that its type can be recorded. A store without an observer does not
call anything here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

from msgspec import Struct

from hf_async_store.errors import InvalidInputError

Event: TypeAlias = Literal["conflict", "retry", "lost claim"]


class Operation(Struct, frozen=True):
    """A method that is called, the transaction around several, or a commit that several share.

    Attributes:
        name: that of the method, such as `save_entity`; `transaction`, `savepoint`; `commit`, `fetch`.
        collection: None if it is not one declared collection.
        size: how many changes or keys it consists of, if that is known and more than one entity may be
            meant.
        measured: whether it is an operation of the database by itself. A method whose changes or reads
            share a commit or round trip is not: that one is.
    """

    name: str
    collection: str | None = None
    size: int | None = None
    measured: bool = True


class Observation:
    """One operation that is observed. The default does nothing."""

    def start(self, *, current: bool) -> None:
        """The operation begins.

        Args:
            current: what it consists of runs in this context until `end`, which is called in it, too.
        """

    def end(self, error: BaseException | None) -> None:
        """The operation has ended, by an exception or without one."""


class StoreObserver:
    """Observes one store. Its methods are called in the event loop of the store, and must not fail.

    Attributes:
        caller: identifies the running operation for the commits that carry it; None if it is not recorded.
    """

    caller: Callable[[], object | None] = staticmethod(lambda: None)

    def records(self, within: Observation | None) -> bool:
        """Whether a method that is called now is to be observed although it is not `measured`.

        Args:
            within: the transaction in which it is called.
        """
        return False

    def operation(self, operation: Operation, within: Observation | None) -> Observation:
        """A method is called, or a transaction entered."""
        return Observation()

    def shared(self, operation: Operation, callers: Sequence[object]) -> Observation:
        """A commit or round trip begins that several operations may share.

        Args:
            callers: those of its operations that are recorded, each once.
        """
        return Observation()

    def count(self, event: Event, collection: str | None, number: int = 1) -> None:
        """Something has happened.

        Args:
            event: a change was refused, or a transaction ended, because of a concurrent one; after a
                conflict, the store tries again; a claim or lock was lost.
        """


class Observer:
    """Observes any number of stores."""

    def observe(self, engine: str, waiting: Callable[[], Mapping[str, int]]) -> StoreObserver:
        """Begin to observe a store.

        Args:
            engine: its name, as in `Capabilities`.
            waiting: how many calls wait for a shared commit or round trip, by its name. It may be called
                in any thread.
        """
        return StoreObserver()


def check_observer(observer: object) -> None:
    """Raise `InvalidInputError` for an argument that is not an `Observer`."""
    if not isinstance(observer, Observer):
        raise InvalidInputError(f"observer must be an Observer, not {type(observer).__name__}")
