"""Retries after conflicts: how a failed compare-and-set is repeated.

After a conflict with another process, an attempt can only be repeated, after a pause that grows with the
duration of the attempts. Tasks of the same store need not compete: after a conflict on an entity,
they queue for it, first come, first served.
"""

from __future__ import annotations

import asyncio
from asyncio import sleep
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic
from typing import Final, TypeAlias, TypeVar

from msgspec import Struct, field

from hf_async_store.backoff import Backoff
from hf_async_store.changes import Put
from hf_async_store.driver import run_to_completion
from hf_async_store.errors import (
    ConcurrencyConflictError,
    RetriesExhaustedError,
    StorageError,
    SubscriptionAdvancedError,
    TransactionAbortedError,
)
from hf_async_store.values import Entity, Key

Result = TypeVar("Result")

Step: TypeAlias = Callable[[Entity], "Made"]
"""Makes the change of a task from an entity."""

RETRY_SECONDS: Final = 30.0

_MAX_PAUSE_SECONDS: Final = 1.0
_BACKOFF_FACTOR_QUEUED: Final = 4
"""The maximum pause, as a multiple of the duration of an attempt, if tasks queue: then only processes
compete."""

_BACKOFF_FACTOR_UNQUEUED: Final = 32
"""The same if tasks do not queue."""

_MAX_TICKET_SECONDS: Final = 1.0
"""Seconds after which the next task in the queue may start although the current one has not finished:
the current one may be waiting for something else, even for a task behind it in the queue."""

_MAX_HANDED_ON: Final = 3
"""How many tasks of a queue, one after the other, get the entity from the task before them. The next one
reads it: otherwise another process, which must read it, would hardly ever come first."""


class Made(Struct, frozen=True):
    """A change that was made and not written yet, and the entity after it.

    Attributes:
        may_be_shared: others may be written with it.
    """

    put: Put
    entity: Entity
    may_be_shared: bool


async def retry_conflicts(
    attempt: Callable[[], Awaitable[Result]],
    seconds: float,
    ticket: Ticket | None = None,
    before_retry: Callable[[str | None], object] | None = None,
) -> Result:
    """Await `attempt()`, and again after each conflict, with pauses of random length (full jitter).

    Args:
        ticket: queues after a conflict, and before the first attempt if there is a queue for the key
            already. None: pauses only.
        before_retry: called before each further attempt with the collection of the conflict, if known.

    Raises:
        RetriesExhaustedError: there were conflicts until `seconds` had passed; the last one is the
            cause.
    """
    backoff = Backoff(seconds, first=0, longest=_MAX_PAUSE_SECONDS, clock=monotonic, sleep=sleep)
    attempts = 0
    if ticket is not None and ticket.queue_exists:
        await ticket.acquire(seconds)
    while True:
        started = monotonic()
        attempts += 1
        try:
            return await attempt()
        except StorageError as exc:
            conflict = conflict_in(exc)
            if conflict is None:
                raise
            if not await _wait(backoff, ticket, monotonic() - started, attempts):
                raise RetriesExhaustedError(
                    f"each of {attempts} attempts in {seconds:g} s ended with a conflict (the last: "
                    f"{conflict}). Reduce the number of concurrent writers, or increase the time limit "
                    "(retry_seconds of run_transaction and modify_entity)",
                    collection=conflict.collection,
                    entity_id=conflict.entity_id,
                    expected=conflict.expected,
                    actual=conflict.actual,
                    current=conflict.current,
                    retryable=True,
                ) from exc
            if before_retry is not None:
                before_retry(conflict.collection)


async def _wait(backoff: Backoff, ticket: Ticket | None, seconds: float, attempts: int) -> bool:
    """Wait before the next attempt; return False if it would be too late.

    Args:
        seconds: the duration of the last attempt. If it takes long, a competing one probably takes as
            long.
    """
    if ticket is not None and ticket.key is not None and not ticket.is_current:
        if backoff.remaining <= 0:
            return False
        await ticket.acquire(backoff.remaining)
        return True
    factor = _BACKOFF_FACTOR_UNQUEUED if ticket is None else _BACKOFF_FACTOR_QUEUED
    return await backoff.pause(seconds * min(2 * attempts, factor))


def conflict_in(exc: BaseException | None) -> ConcurrencyConflictError | None:
    """The conflict that ended an attempt, directly or as the cause of an aborted transaction.

    None for other errors, for a conflict whose outcome is unknown, and where each attempt would end so.
    """
    if isinstance(exc, SubscriptionAdvancedError):
        return None
    if isinstance(exc, ConcurrencyConflictError):
        return None if exc.outcome_unknown else exc
    if isinstance(exc, TransactionAbortedError):
        return conflict_in(exc.__cause__)
    return None


class FairRetryQueue:
    """The order in which the tasks of one store retry their changes of an entity after a conflict.

    The queue is not a lock: a task outside the queue may change the entity as well, and compare-and-set
    decides. So it affects only how long tasks wait, never the correctness of a change.
    """

    def __init__(self) -> None:
        self._queues: dict[Key, _KeyQueue] = {}

    @property
    def contended(self) -> bool:
        """Whether there is a queue for any key."""
        return bool(self._queues)

    def hand_on(self, key: Key, written: Entity) -> None:
        """If there is a queue for a key, its next task need not read the entity that was just written."""
        queue = self._queues.get(key)
        if queue is not None and queue.handed_on < _MAX_HANDED_ON:
            queue.written = written
            queue.handed_on += 1
        elif queue is not None:
            queue.handed_on = 0

    def has_handed_on(self, key: Key) -> bool:
        """Whether `handed_on` has an entity."""
        queue = self._queues.get(key)
        return queue is not None and queue.given is not None

    def handed_on(self, key: Key) -> Entity | None:
        """The entity of a key as the previous task of its queue wrote it, once."""
        queue = self._queues.get(key)
        if queue is None:
            return None
        given, queue.given = queue.given, None
        return given

    async def retry_transaction(
        self,
        attempt: Callable[[TransactionTicket], Awaitable[Result]],
        seconds: float,
        before_retry: Callable[[str | None], object] | None = None,
    ) -> Result:
        """`retry_conflicts` for a transaction, whose entity is known only after a conflict."""
        ticket = TransactionTicket(self._queues, None, seconds=seconds)
        try:
            return await retry_conflicts(lambda: ticket.run(attempt), seconds, ticket, before_retry)
        finally:
            ticket.release()

    async def retry(
        self,
        key: Key,
        attempt: Callable[[], Awaitable[Result]],
        seconds: float,
        before_retry: Callable[[str | None], object] | None = None,
    ) -> Result:
        """`retry_conflicts`, queued with the other calls for this key after a conflict.

        Without a conflict, it does not wait and causes no overhead.
        """
        return await self.retry_with(self.ticket(key), attempt, seconds, before_retry)

    def ticket(self, key: Key, step: Step | None = None) -> Ticket:
        """A ticket for `retry_with`."""
        return Ticket(self._queues, key, step)

    async def retry_with(
        self,
        ticket: Ticket,
        attempt: Callable[[], Awaitable[Result]],
        seconds: float,
        before_retry: Callable[[str | None], object] | None = None,
    ) -> Result:
        """As `retry`; if the step of the ticket was taken, an attempt returns its outcome."""
        try:
            return await retry_conflicts(attempt, seconds, ticket, before_retry)
        finally:
            ticket.release()


class Ticket(Struct, eq=False):
    """The position of one task in the queue for one key; without a key, it is in no queue.

    Attributes:
        step: what the task does when it is its turn, if the task before it may do it: see `modifications`.
        outcome: of the step, once that task has taken it.
    """

    queues: dict[Key, _KeyQueue]
    key: Key | None
    step: Step | None = None
    outcome: asyncio.Future[Entity | Exception] | None = None

    @property
    def _queue(self) -> _KeyQueue | None:
        return None if self.key is None else self.queues.get(self.key)

    @property
    def queue_exists(self) -> bool:
        """Whether any task is in the queue for the key."""
        return self._queue is not None

    @property
    def is_current(self) -> bool:
        """Whether this is the first ticket of the queue, whose task may try."""
        queue = self._queue
        return queue is not None and queue.current is self

    async def acquire(self, seconds: float) -> None:
        """Enter the queue; wait until this ticket is the first one, or `seconds` have passed."""
        assert self.key is not None
        queue = self._queue
        if queue is None:
            self.queues[self.key] = _KeyQueue(self.key, self)
            return
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        # It is from before this task came, which must see what others have changed since.
        queue.written = None
        queue.waiting.append((self, waiter))
        if queue.timer is None:
            self._start_timer(queue)
        timeout = loop.call_later(seconds, _wake, waiter)
        try:
            await waiter
        finally:
            timeout.cancel()
            if self.outcome is not None and not self.outcome.done():
                # Also if this task is cancelled: its change is being written.
                await run_to_completion(asyncio.wait([self.outcome]))

    @property
    def follower(self) -> Ticket | None:
        """The next ticket of the queue, if this is the first one, and the other has a step."""
        queue = self._queue
        if queue is None or queue.current is not self:
            return None
        while queue.waiting and queue.waiting[0][1].done():
            queue.waiting.popleft()
        return queue.waiting[0][0] if queue.waiting and queue.waiting[0][0].step else None

    def take_follower(self) -> asyncio.Future[Entity | Exception]:
        """Take `follower` out of the queue; returns the future of its outcome, which must be set."""
        queue = self._queue
        assert queue is not None
        other, waiter = queue.waiting.popleft()
        other.outcome = waiter.get_loop().create_future()
        other.outcome.add_done_callback(lambda _: _wake(waiter))
        return other.outcome

    def release(self) -> None:
        """Leave the first position of the queue, if this ticket has it."""
        queue = self._queue
        if queue is not None and queue.current is self:
            self._advance(queue)

    def _advance(self, queue: _KeyQueue) -> None:
        """Let the next waiting task try; without one, delete the queue."""
        if queue.timer is not None:
            queue.timer.cancel()
            queue.timer = None
        # Only to the next one, which may be a transaction: after it, the entity may be another.
        queue.given, queue.written = queue.written, None
        while queue.waiting:
            queue.current, waiter = queue.waiting.popleft()
            if not waiter.done():  # it is done if its task was cancelled or its time has passed
                waiter.set_result(None)
                if queue.waiting:
                    self._start_timer(queue)
                return
        del self.queues[queue.key]

    def _start_timer(self, queue: _KeyQueue) -> None:
        loop = asyncio.get_running_loop()
        queue.timer = loop.call_later(_MAX_TICKET_SECONDS, self._advance, queue)


class TransactionTicket(Ticket, eq=False):
    """The ticket of a transaction that is repeated after conflicts.

    Its key is the entity that a conflict names, else the first one that the transaction wrote, else the
    first one that it read.
    """

    seconds: float = RETRY_SECONDS
    written: Key | None = None
    read: Key | None = None

    async def run(self, attempt: Callable[[TransactionTicket], Awaitable[Result]]) -> Result:
        """One attempt; chooses the key if it ends in a conflict."""
        self.written = self.read = None
        try:
            return await attempt(self)
        except StorageError as exc:
            conflict = conflict_in(exc)
            if conflict is not None:
                self._choose(conflict)
            raise

    async def enter(self, keys: Sequence[Key], *, writes: bool, may_wait: bool) -> None:
        """Before the transaction reads or writes `keys`: if it `may_wait`, wait in their queue."""
        if may_wait and self.key is None and self.queues:
            self.key = next((each for each in keys if each in self.queues), None)
            if self.key is not None:
                await self.acquire(self.seconds)
        if keys and writes:
            self.written = self.written or keys[0]
        elif keys:
            self.read = self.read or keys[0]

    def _choose(self, conflict: ConcurrencyConflictError) -> None:
        key = self.written or self.read
        if conflict.collection is not None and conflict.entity_id is not None:
            key = Key(conflict.collection, conflict.entity_id)
        if key is not None and key != self.key:
            self.release()
            self.key = key


class _KeyQueue(Struct, eq=False):
    """The queue for a key: the ticket whose task may try, and the waiting ones.

    `timer` advances the queue if the current task takes too long. `written` is the entity that the
    current task wrote when all that wait now waited already, `given` the one that the previous task wrote;
    `handed_on` counts how often, in a row, one was kept for the next task.
    """

    key: Key
    current: Ticket
    waiting: deque[tuple[Ticket, asyncio.Future[None]]] = field(default_factory=deque)
    timer: asyncio.TimerHandle | None = None
    written: Entity | None = None
    given: Entity | None = None
    handed_on: int = 0


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
