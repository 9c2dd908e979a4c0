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
from typing import Any, Final, Protocol, TypeAlias

import msgspec

from hf_async_store.changes import ABSENT, Precondition, Put
from hf_async_store.conflict_retry import Made, Ticket
from hf_async_store.driver import run_to_completion
from hf_async_store.errors import (
    ConcurrencyConflictError,
    EntityNotFoundError,
    InvalidFieldError,
    StorageError,
    UnsupportedValueError,
)
from hf_async_store.preconditions import changed
from hf_async_store.schema import Collection
from hf_async_store.values import VERSION, Entity, Key, copy_entity, version_of

Modify: TypeAlias = Callable[[Entity], Any]

_MOST: Final = 64
"""The maximum number of changes that share a write."""

_ITERATIONS: Final = 2
"""After so many iterations of the event loop, the tasks that shared a write, and have changed the entity
again, are in the queue again."""


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


class SharedWrite:
    """What a task has made, and the changes of the tasks that follow it in the queue.

    Attributes:
        made: what is written.
    """

    def __init__(self, ticket: Ticket, made: Made) -> None:
        self.made = made
        self._ends: list[tuple[asyncio.Future[Entity | Exception], Entity | Exception]] = []
        try:
            self._take_steps(ticket)
        except BaseException:  # for example KeyboardInterrupt
            for end, _ in self._ends:
                end.set_result(ConcurrencyConflictError("nothing was written", retryable=True))
            raise
        if self._ends:
            put, version = self.made.put, version_of(self.made.entity)
            entity = {name: each for name, each in self.made.entity.items() if name != VERSION}
            put = msgspec.structs.replace(
                put, entity=entity, expect=made.put.expect, import_version=version
            )
            self.made = self.made._replace(put=put)

    def _take_steps(self, ticket: Ticket) -> None:
        while len(self._ends) < _MOST and (other := ticket.follower) is not None:
            assert other.step is not None
            try:
                self.made = other.step(copy_entity(self.made.entity))
            except NotSharedError:
                other.step = None
                break
            except Exception as exc:  # noqa: BLE001  # whatever the function raises is for its own caller
                self._ends.append((ticket.take_follower(), exc))
            else:
                self._ends.append((ticket.take_follower(), self.made.entity))

    async def run(self, write: Write, timeout: float | None) -> Entity:
        """Write it, and tell the tasks; returns what is stored.

        If the caller is cancelled, it is completed first.
        """
        if not self._ends:
            return await write(self.made, timeout)
        await run_to_completion(self._run(write))
        for _ in range(_ITERATIONS):
            await asyncio.sleep(0)
        return self.made.entity

    async def _run(self, write: Write) -> None:
        try:
            await write(self.made, None)
        except BaseException as exc:
            error = StorageError("the shared write was interrupted", outcome_unknown=True)
            error = exc if isinstance(exc, StorageError) else error
            for end, _ in self._ends:
                end.set_result(error.copy())
            raise
        for end, outcome in self._ends:
            end.set_result(outcome)


def shared_outcome(ticket: Ticket) -> Entity:
    """What the step of a ticket made, once it was written; or raises why it was not."""
    assert ticket.outcome is not None
    outcome, ticket.outcome = ticket.outcome.result(), None
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _keeps_references(declared: Collection, put: Put, stored: Entity | None) -> bool:
    """Whether the references of an entity are as they were stored."""
    return stored is not None and all(
        put.entity.get(each.name) == stored.get(each.name) for each in declared.references
    )
