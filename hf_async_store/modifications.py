"""One call of `modify_entity`; and how the tasks that queue for an entity share a write.

The first one makes the changes of those behind it, each on the result of the one before, and writes what
the last one leaves, with its version, on condition that the stored version is still the one it read. So all
of them are written, or none, and then each tries again. A call returns, or raises what its function raised,
only after the entity that the function was given has been committed.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping
from contextvars import copy_context
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

import msgspec
from msgspec.structs import replace

from hf_async_store.changes import ABSENT, Precondition, Put
from hf_async_store.conflict_retry import Made, Ticket
from hf_async_store.driver import run_to_completion
from hf_async_store.errors import (
    ConcurrencyConflictError,
    EntityNotFoundError,
    InvalidFieldError,
    InvalidInputError,
    ReferenceViolationError,
    StorageError,
    UnsupportedValueError,
)
from hf_async_store.preconditions import changed
from hf_async_store.schema import Collection
from hf_async_store.values import VERSION, Entity, Key, copy_entity, version_of

Modify: TypeAlias = Callable[[Entity], Any]

_MOST: Final = 64
"""The maximum number of changes that share a write."""

_ITERATIONS: Final = 3
"""After so many iterations of the event loop, the tasks that shared a write, and have changed the entity
again, are in the queue again."""

_REFUSALS: Final = (InvalidInputError, ReferenceViolationError)
"""The errors of a write that may be due to one of the changes."""

_NOT_WRITTEN: Final = ConcurrencyConflictError("the shared write was not made", retryable=True)


class Write(Protocol):
    """Writes what an attempt has made; returns the entity as written."""

    def __call__(self, made: Made, timeout: float | None, /) -> Awaitable[Entity]: ...


class NotSharedError(Exception):
    """The task must make this change itself."""


class Modifying:
    """A function of a caller that changes an entity.

    Args:
        default: what it gets if the entity does not exist; None: that is an error.
        put: returns the change that writes an entity.
    """

    def __init__(
        self,
        declared: Collection,
        key: Key,
        change: Modify,
        default: Mapping[str, object] | None,
        put: Callable[[Mapping[str, object], Precondition], Put],
    ) -> None:
        self._declared = declared
        self._key = key
        self._change = change
        self._default = default
        self._put = put
        self._context = copy_context()

    async def make(self, current: Entity | None) -> Made:
        """Call the function with the current entity, which it may change in place."""
        stored = None if current is None else dict(current)
        if current is None:
            if self._default is None:
                raise EntityNotFoundError(self._key.collection, self._key.id)
            current = copy_entity(self._default)
        result = self._change(current)
        return self._made(await result if inspect.isawaitable(result) else result, stored)

    def step(self, current: Entity) -> Made:
        """As `make`, for a task that writes for this one, in the context of this one.

        Raises:
            NotSharedError: the function is asynchronous, or changes a reference.
        """
        stored = dict(current)
        result = self._context.run(self._change, current)
        if inspect.isawaitable(result):
            if inspect.iscoroutine(result):
                result.close()
            raise NotSharedError
        made = self._made(result, stored)
        if not made.may_be_shared:
            raise NotSharedError
        return made

    def _made(self, new: object, stored: Entity | None) -> Made:
        key, name = self._key, self._declared.key
        if not isinstance(new, Mapping):
            raise UnsupportedValueError(
                f"modify_entity: the function returned {type(new).__name__}, not the entity"
            )
        if new.get(name, key.id) != key.id:
            raise InvalidFieldError(f"{key.collection}.{name} is the key and cannot be changed")
        put = self._put(new, ABSENT if stored is None else version_of(stored))
        written = changed(put, stored)
        assert written is not None, "only a delete writes nothing"
        return Made(put, written, _keeps_references(self._declared, put, stored))


class _End(NamedTuple):
    """The task of a change that another one writes: the future of its outcome, and the outcome if it is
    written."""

    ticket: Ticket
    told: asyncio.Future[Entity | Exception]
    outcome: Entity | Exception


class SharedWrite:
    """What a task has made, and the changes of the tasks that follow it in the queue.

    Attributes:
        made: what is written.
    """

    def __init__(self, ticket: Ticket, made: Made) -> None:
        self.made = self._own = made
        self._ends: list[_End] = []
        try:
            while len(self._ends) < _MOST and (other := ticket.follower) is not None:
                self._add(ticket, other)
        except BaseException:
            self._tell(_NOT_WRITTEN)
            raise
        if self._ends:
            put, version = self.made.put, version_of(self.made.entity)
            entity = {name: each for name, each in self.made.entity.items() if name != VERSION}
            expect = made.put.expect
            put = msgspec.structs.replace(
                put, entity=entity, expect=expect, import_version=version, shared=True
            )
            self.made = replace(self.made, put=put)

    def _add(self, ticket: Ticket, other: Ticket) -> None:
        assert other.step is not None
        outcome: Entity | Exception
        try:
            self.made = other.step(copy_entity(self.made.entity))
            outcome = self.made.entity
        except (NotSharedError, asyncio.CancelledError):
            other.step = None  # so that it is nobody's follower
            return
        except Exception as exc:  # noqa: BLE001  # whatever the function raises is for its own caller
            outcome = exc
        self._ends.append(_End(other, ticket.take_follower(), outcome))

    async def run(self, write: Write) -> Entity:
        """Write it, and tell the tasks; returns what is stored.

        If the caller is cancelled, it is completed first.
        """
        if not self._ends:
            return await write(self.made, None)
        writing = asyncio.ensure_future(write(self.made, None))
        # Called also if the task of the write is cancelled before it begins.
        writing.add_done_callback(lambda ended: self._tell(_failure(ended)))
        try:
            await run_to_completion(writing)
        except _REFUSALS:
            return await write(self._own, None)
        for _ in range(_ITERATIONS):
            await asyncio.sleep(0)
        return self.made.entity

    def _tell(self, failure: StorageError | None) -> None:
        """Tell the tasks how the write ended. A task that may have another outcome alone tries again."""
        for other, end, outcome in self._ends:
            if failure is None:
                end.set_result(outcome)
                continue
            if isinstance(failure, _REFUSALS):
                other.step = None
            again = isinstance(failure, (*_REFUSALS, EntityNotFoundError))
            again = again or isinstance(outcome, Exception)
            end.set_result(_NOT_WRITTEN.copy() if again else failure.copy())


def shared_outcome(ticket: Ticket) -> Entity:
    """What the step of a ticket made, once it was written; or raises why it was not."""
    assert ticket.outcome is not None
    outcome, ticket.outcome = ticket.outcome.result(), None
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _failure(writing: asyncio.Future[Entity]) -> StorageError | None:
    exc = None if writing.cancelled() else writing.exception()
    if not writing.cancelled() and (exc is None or isinstance(exc, StorageError)):
        return exc
    return StorageError("the shared write was interrupted", outcome_unknown=True)


def _keeps_references(declared: Collection, put: Put, stored: Entity | None) -> bool:
    """Whether the references of an entity are as they were stored."""
    return stored is not None and all(
        put.entity.get(each.name) == stored.get(each.name) for each in declared.references
    )
