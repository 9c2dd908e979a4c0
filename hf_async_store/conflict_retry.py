"""Lost races: how compare-and-set is tried again.

Against another process there is nothing but to try again, after a pause that grows with what an attempt
takes. Tasks of one store need not race one another: those that lost a race for an entity take
turns at it, first come, first served.
"""

from __future__ import annotations

import asyncio
import random
from asyncio import sleep
from collections import deque
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Final, TypeVar

from hf_async_store.errors import (
    ConcurrencyConflictError,
    RetriesExhaustedError,
    StorageError,
    TransactionAbortedError,
)
from hf_async_store.values import Key

Result = TypeVar("Result")

RETRY_SECONDS: Final = 30.0

_MAX_PAUSE_SECONDS: Final = 1.0
_BACKOFF_FACTOR_QUEUED: Final = 4
"""How many attempts a pause lasts at most where tasks take turns: only processes race."""

_BACKOFF_FACTOR_UNQUEUED: Final = 32
"""The same where they do not."""

_MAX_TICKET_SECONDS: Final = 1.0
"""Seconds after which the next may begin beside the one whose turn it is: that one may be waiting for
something else, even for one that waits behind it."""


async def retry_conflicts(
    attempt: Callable[[], Awaitable[Result]], seconds: float, turn: Ticket | None = None
) -> Result:
    """`attempt` until it meets no conflict, with full jitter between the tries.

    Args:
        turn: is taken after a conflict, and at once where others have lost one. None: pauses have to do.

    Raises:
        RetriesExhaustedError: conflicts until `seconds` were over, the last one as cause.
    """
    now = monotonic()
    deadline = now + seconds
    tries = 0
    if turn is not None and turn.is_taken:
        await turn.acquire(seconds)
        now = monotonic()
    while True:
        began = now
        tries += 1
        try:
            return await attempt()
        except StorageError as exc:
            conflict = _conflict_in(exc)
            if conflict is None:
                raise
            now = monotonic()
            # Where an attempt takes long, so does that of the one who won.
            most = _BACKOFF_FACTOR_UNQUEUED if turn is None else _BACKOFF_FACTOR_QUEUED
            longest = (now - began) * min(2 * tries, most)
            pause = random.uniform(0, min(longest, _MAX_PAUSE_SECONDS))
            if now + pause >= deadline:
                raise RetriesExhaustedError(
                    f"conflicts in each of {tries} tries over {seconds} s; the last: {conflict}",
                    collection=conflict.collection,
                    entity_id=conflict.entity_id,
                    expected=conflict.expected,
                    actual=conflict.actual,
                    current=conflict.current,
                    retryable=True,
                ) from exc
        if turn is not None and not turn.is_held:
            await turn.acquire(deadline - now)
        else:
            await sleep(pause)
        now = monotonic()


def _conflict_in(exc: StorageError) -> ConcurrencyConflictError | None:
    """The conflict that ended an attempt, also where its transaction swallowed it and then aborted."""
    if isinstance(exc, ConcurrencyConflictError):
        return None if exc.outcome_unknown else exc
    if isinstance(exc, TransactionAbortedError) and isinstance(exc.__cause__, StorageError):
        return _conflict_in(exc.__cause__)
    return None


class FairRetryQueue:
    """Who of the tasks of one store may try next to change an entity for which there was a race.

    A turn is no lock: whoever has none may try as well, and compare-and-set decides. So it may end
    at any moment, and nothing can be wrong but how long somebody waits.
    """

    def __init__(self) -> None:
        self._queues: dict[Key, _Waiters] = {}

    @property
    def contended(self) -> bool:
        """Whether anybody has a turn."""
        return bool(self._queues)

    async def retry(
        self, key: Key, attempt: Callable[[], Awaitable[Result]], seconds: float
    ) -> Result:
        """`retry_conflicts`, in turn with the others that try so for this key.

        Where nobody lost a race yet, it costs nothing and waits for nobody.
        """
        turn = Ticket(self._queues, key)
        try:
            return await retry_conflicts(attempt, seconds, turn)
        finally:
            turn.release()


class Ticket:
    """The turns of one task at one key."""

    __slots__ = ("_key", "_queues")

    def __init__(self, queues: dict[Key, _Waiters], key: Key) -> None:
        self._queues = queues
        self._key = key

    @property
    def is_taken(self) -> bool:
        """Whether somebody has it."""
        return self._key in self._queues

    @property
    def is_held(self) -> bool:
        queue = self._queues.get(self._key)
        return queue is not None and queue.holder is self

    async def acquire(self, seconds: float) -> None:
        """Wait until it is this one's turn, or `seconds` are over."""
        queue = self._queues.get(self._key)
        if queue is None:
            self._queues[self._key] = _Waiters(self)
            return
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        queue.waiting.append((self, waiter))
        if queue.timer is None:
            self._watch(queue)
        bound = loop.call_later(seconds, _wake, waiter)
        try:
            await waiter
        finally:
            bound.cancel()

    def release(self) -> None:
        """It is over, if there was one."""
        queue = self._queues.get(self._key)
        if queue is not None and queue.holder is self:
            self._pass_on(queue)

    def _pass_on(self, queue: _Waiters) -> None:
        if queue.timer is not None:
            queue.timer.cancel()
            queue.timer = None
        while queue.waiting:
            queue.holder, waiter = queue.waiting.popleft()
            if not waiter.done():  # cancelled, or out of time
                waiter.set_result(None)
                if queue.waiting:
                    self._watch(queue)
                return
        del self._queues[self._key]

    def _watch(self, queue: _Waiters) -> None:
        loop = asyncio.get_running_loop()
        queue.timer = loop.call_later(_MAX_TICKET_SECONDS, self._pass_on, queue)


class _Waiters:
    """Those who want to change one entity: the one whose turn it is, and those who wait for theirs."""

    __slots__ = ("holder", "timer", "waiting")

    def __init__(self, holder: Ticket) -> None:
        self.holder = holder
        self.waiting: deque[tuple[Ticket, asyncio.Future[None]]] = deque()
        self.timer: asyncio.TimerHandle | None = None


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
