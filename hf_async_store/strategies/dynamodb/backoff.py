"""Trying again: with full jitter, until it is done or the time is up."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from hf_async_store.errors import StorageError, ThrottledError, UnavailableError
from hf_async_store.strategies.dynamodb.errors import BadAnswer

Result = TypeVar("Result")

_FIRST_PAUSE: Final = 0.02
_MAX_PAUSE_SECONDS: Final = 2.0
_MOST_BAD_ANSWERS: Final = 3
"""What is no answer so many times is no accident: another server, or a proxy."""


class Backoff:
    """The pauses of one piece of work.

    Args:
        seconds: after which no further try begins.
    """

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._pause = _FIRST_PAUSE
        self._bad_answers = 0

    async def pause(self, after: StorageError | None = None) -> bool:
        """Wait; False, at once, if the time would be up, or another try can help nothing.

        Args:
            after: what the last try met.
        """
        if isinstance(after, BadAnswer):
            self._bad_answers += 1
            if self._bad_answers == _MOST_BAD_ANSWERS:
                return False
        elif after is not None and not after.retryable:
            return False
        sleep = random.uniform(0, self._pause)
        if time.monotonic() + sleep >= self._deadline:
            return False
        self._pause = min(self._pause * 2, _MAX_PAUSE_SECONDS)
        await asyncio.sleep(sleep)
        return True


def is_safe_to_retry(exc: Exception) -> bool:
    """Whether it is known that a request did nothing, and it may do it later."""
    return isinstance(exc, UnavailableError) and not exc.outcome_unknown


async def retry(
    attempt: Callable[[], Awaitable[Result]], seconds: float, *, idempotent: bool
) -> Result:
    """`attempt` until it succeeds.

    Args:
        harmless: it may be done twice, so that a lost answer is no obstacle.

    Raises:
        UnavailableError: the last one, when the time is up.
        StorageError: whatever no other try will change.
    """
    backoff = Backoff(seconds)
    while True:
        try:
            return await attempt()
        except UnavailableError as exc:
            if not (idempotent or is_safe_to_retry(exc)) or not await backoff.pause(exc):
                exc.outcome_unknown = exc.outcome_unknown and not idempotent
                raise
        except StorageError as exc:
            exc.outcome_unknown = exc.outcome_unknown and not idempotent
            raise


def throttled(what: str) -> ThrottledError:
    return ThrottledError(f"DynamoDB asked for less until the time was up; not done: {what}")
