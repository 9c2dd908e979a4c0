"""A clock for tests, by which both entities expire and leases of claims end."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from hf_async_store.claim_clock import Moment
from hf_async_store.errors import InvalidInputError
from hf_async_store.migration_routing import unrouted

if TYPE_CHECKING:
    from hf_async_store.strategy import StorageStrategy


class SettableClock:
    """The time of the machine, until it is advanced or set. It is never set back.

    It decides what has expired, and when leases of claims end, and it gives `created_at` and `updated_at`.
    It does not shorten waiting: a `timeout`, a `wait` and the renewal of a claim in the background take
    their time.
    """

    def __init__(self) -> None:
        self._ahead = timedelta()
        self._stopped: datetime | None = None

    def __call__(self) -> datetime:
        """The time, as `open_store(clock=...)` takes it."""
        return self._stopped or datetime.now(UTC) + self._ahead

    def now(self) -> Moment:
        """The time, as leases of claims need it."""
        return Moment("test", self().timestamp())

    def advance(
        self, *, days: float = 0, hours: float = 0, minutes: float = 0, seconds: float = 0
    ) -> None:
        """Let this time pass at once.

        Raises:
            InvalidInputError: it is negative.
        """
        passed = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
        if passed < timedelta():
            raise InvalidInputError("time passes forwards only")
        if self._stopped is not None:
            self._stopped += passed
        self._ahead += passed

    def stop_at(self, time: datetime | None = None) -> None:
        """Stop the clock at a time, by default now: from then on it shows this, until it is advanced.

        Raises:
            InvalidInputError: the time has no time zone, or is before what the clock shows.
        """
        now = self()
        stopped = now if time is None else time
        if stopped.tzinfo is None:
            raise InvalidInputError(f"{time} needs a time zone, such as datetime(..., tzinfo=UTC)")
        if stopped < now:
            raise InvalidInputError(
                f"the clock shows {now} and never goes back: take a later time, not {time}"
            )
        self._stopped = stopped

    def set_in(self, store: StorageStrategy) -> None:
        """Let the leases of the claims of a store end by this clock.

        For the rest, the store is opened with it: `open_store(..., clock=clock)`.
        """
        unrouted(store.engine).claim_clock = self
