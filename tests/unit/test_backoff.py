"""The pauses between attempts."""

from __future__ import annotations

from typing import Final

import pytest

from hf_async_store.backoff import Backoff


class Clock:
    """A clock that only sleeping advances."""

    def __init__(self) -> None:
        self.now = 100.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def _longest(low: float, high: float) -> float:
    assert low == 0
    return high


SECONDS: Final = 5.0


def _backoff(clock: Clock, seconds: float = SECONDS) -> Backoff:
    return Backoff(
        seconds, first=0.25, longest=1.0, clock=clock, sleep=clock.sleep, jitter=_longest
    )


async def test_pauses_double_up_to_the_longest() -> None:
    clock = Clock()
    backoff = _backoff(clock)
    for _ in range(5):
        assert await backoff.pause()
    assert clock.pauses == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert backoff.remaining == SECONDS - sum(clock.pauses)


async def test_no_attempt_begins_after_the_deadline() -> None:
    clock = Clock()
    backoff = _backoff(clock)
    while await backoff.pause():
        assert clock.now < 100.0 + SECONDS
    number = len(clock.pauses)
    assert not await backoff.pause(), "the deadline has not moved"
    assert len(clock.pauses) == number, "it waited although there is no next attempt"


@pytest.mark.parametrize("seconds", [0.0, -1.0])
async def test_without_time_there_is_no_second_attempt(seconds: float) -> None:
    clock = Clock()
    assert not await _backoff(clock, seconds).pause()
    assert clock.pauses == []


async def test_a_maximum_of_the_caller_does_not_affect_later_pauses() -> None:
    clock = Clock()
    backoff = _backoff(clock)
    assert await backoff.pause(up_to=0.125)
    assert await backoff.pause(up_to=50.0)
    assert await backoff.pause()
    assert clock.pauses == [0.125, 1.0, 0.25]


async def test_pauses_are_of_random_length() -> None:
    clock = Clock()
    backoff = Backoff(1e9, first=1.0, longest=1.0, clock=clock, sleep=clock.sleep)
    for _ in range(100):
        assert await backoff.pause()
    assert len({*clock.pauses}) > 90
    assert all(0 <= each <= 1 for each in clock.pauses)
