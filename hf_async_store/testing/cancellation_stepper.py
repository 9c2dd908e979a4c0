"""Cancellation of a task at every event-loop iteration, one after another.

An iteration (a "turn" in the names below) begins when the loop polls its selector for events.
Whatever a verb awaits, be it a lock, a thread or a socket, it resumes only in a later iteration. So
cancelling it before the first iteration, then before the second and so on, until it ends before
that, cancels it at every await, and also between the moment at which the awaited event happens and
the moment at which the task resumes. The loop still sleeps between iterations, so that a write that
waits 5 ms for a disk has about 10 iterations and not 10,000.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest

from hf_async_store.testing.concurrency import HANG_SECONDS
from hf_async_store.testing.repetitions import sampled

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

_IDLE_SECONDS: Final = 0.2
"""After so many seconds without an event, the task is assumed to wait for another one."""

_POLL_SECONDS: Final = 0.001


class Rest:
    """Whether the loop became idle before the iteration was reached."""

    reached = False


@contextmanager
def at_turn(
    number: int, act: Callable[[], object], *, or_at_rest: bool = False, and_on: bool = False
) -> Iterator[Rest]:
    """Call `act` before the event-loop iteration of this number; 0 is the next one.

    Args:
        or_at_rest: also call it if the loop becomes idle before that iteration.
        and_on: also call it before every later iteration.
    """
    selector = getattr(asyncio.get_running_loop(), "_selector", None)
    if selector is None:
        pytest.skip("this event loop has no selector, so that its iterations cannot be counted")
    poll = selector.select
    rest = Rest()
    turn = 0

    def select(timeout: float | None = None) -> Any:
        nonlocal turn
        turn += 1
        if turn <= number:
            if not or_at_rest or (timeout is not None and timeout <= _IDLE_SECONDS):
                return poll(timeout)
            events = poll(_IDLE_SECONDS)
            if events:
                return events
            rest.reached = True
            turn = number + 1
        if turn == number + 1:
            act()
            return poll(0)
        if and_on:
            act()
            return poll(0 if timeout == 0 else _POLL_SECONDS)
        return poll(timeout)

    selector.select = select
    try:
        yield rest
    finally:
        del selector.select


async def cancelled_at(turn: int, work: Coroutine[Any, Any, Any], *, and_on: bool = False) -> bool:
    """Run `work` in a task and cancel it at this event-loop iteration.

    Args:
        and_on: cancel it again at every later iteration, during its cleanup.

    Returns:
        Whether it was cancelled; False if it ended before the iteration.

    Raises:
        AssertionError: the task was cancelled but did not end with CancelledError.
        Exception: `work` failed before it was cancelled.
    """
    task = asyncio.create_task(work)
    asked: list[bool] = []
    with at_turn(turn, lambda: asked.append(task.cancel()), and_on=and_on):
        await asyncio.wait({task}, timeout=HANG_SECONDS)
    return was_cancelled(task, asked)


def was_cancelled(task: asyncio.Task[Any], asked: list[bool]) -> bool:
    """Whether a task was cancelled; if so, asserts that it ended with CancelledError.

    Args:
        asked: the results of the calls of `task.cancel`.
    """
    assert task.done(), "the task does not end"
    if any(asked):
        assert task.cancelled(), (
            f"the task suppressed its cancellation and ended with {_ending(task)}"
        )
        return True
    task.result()
    return False


def _ending(task: asyncio.Task[Any]) -> str:
    error = task.exception()
    return f"the result {task.result()!r}" if error is None else repr(error)


def turns() -> Iterator[int]:
    """The event-loop iterations to cancel at: each of the first 40, later ones more sparsely; unless
    the run is a full one, every sixth of them."""
    return iter(sampled(_all_turns()))


def _all_turns() -> Iterator[int]:
    turn = 0
    while turn < 10_000:
        yield turn
        turn += 1 + turn // 40
    raise AssertionError("the work does not end within 10,000 event-loop iterations")
