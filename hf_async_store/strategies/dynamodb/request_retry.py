"""Retries of requests until success or the time limit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, TypeVar

from hf_async_store.backoff import Backoff
from hf_async_store.errors import StorageError, ThrottledError, UnavailableError
from hf_async_store.strategies.dynamodb.errors import UnexpectedResponse

Result = TypeVar("Result")

_FIRST_PAUSE: Final = 0.02
_MAX_PAUSE_SECONDS: Final = 2.0
_MAX_BAD_RESPONSES: Final = 3
"""After this many invalid responses the cause is assumed to be permanent: a proxy or another server."""


class Retries(Backoff):
    """The retries of one operation: whether another attempt is worthwhile, and the pause before it.

    Args:
        seconds: no attempt begins later than this after the first one.
        closing: once it is set, there are no more attempts.
    """

    def __init__(self, seconds: float, closing: asyncio.Event) -> None:
        super().__init__(
            seconds,
            first=_FIRST_PAUSE,
            longest=_MAX_PAUSE_SECONDS,
            sleep=self._wait,
            what="a request",
        )
        self._closing = closing
        self._bad_responses = 0

    async def _wait(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closing.wait()

    async def pause(self, up_to: float | None = None) -> bool:
        """As `Backoff.pause`; also returns False if the store is being closed."""
        return await super().pause(up_to) and not self._closing.is_set()

    async def pause_after(self, after: StorageError) -> bool:
        """Wait before the next attempt.

        Returns False without waiting if the time limit would be exceeded or another attempt cannot
        succeed after this error.
        """
        if isinstance(after, UnexpectedResponse):
            self._bad_responses += 1
            if self._bad_responses == _MAX_BAD_RESPONSES:
                return False
        elif not after.retryable:
            return False
        return await self.pause()


def is_safe_to_retry(exc: Exception) -> bool:
    """Whether a failed request certainly changed nothing and may succeed later."""
    return isinstance(exc, UnavailableError) and not exc.outcome_unknown


async def retry(attempt: Callable[[], Awaitable[Result]], retries: Retries) -> Result:
    """Call `attempt`, an idempotent request, until it succeeds, and return its result.

    Raises:
        UnavailableError: the last one, when the time limit is reached.
        StorageError: an error that a retry cannot resolve.
    """
    while True:
        try:
            return await attempt()
        except StorageError as exc:
            if not isinstance(exc, UnavailableError) or not await retries.pause_after(exc):
                exc.outcome_unknown = False
                raise


def throttled(what: str) -> ThrottledError:
    return ThrottledError(
        f"DynamoDB throttled the requests until retry_timeout had passed; not completed: {what}. Try "
        "again later, or increase the capacity of the table"
    )
