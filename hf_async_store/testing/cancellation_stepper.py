"""Cancellation at every turn of the event loop, one after another.

A turn of the loop begins where it looks for events. Whatever a verb awaits, be it a lock, a thread
or a socket, it goes on only in some later turn; so to cancel before the first turn, the second and
so on, until the verb ends first, is to cancel it at every await, and also at the moments at which
what it waited for was granted but it has not run yet. Turns come at their natural pace: the loop
sleeps between them, so that a write that waits 5 ms for a disk has 10 of them and not 10,000.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest

from hf_async_store.testing.concurrency import HANG_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

_AT_REST: Final = 0.2
"""When nothing comes for so long, nothing will: a task waits for somebody else."""


_BRIEFLY: Final = 0.001


class Rest:
    """Whether the loop came to rest before a turn."""

    reached = False


@contextmanager
def at_turn(
    number: int, act: Callable[[], object], *, or_at_rest: bool = False, and_on: bool = False
) -> Iterator[Rest]:
    """Call `act` before the loop's turn of this number, 0 being the next.

    Args:
        or_at_rest: or when the loop has nothing to do before that turn comes.
        and_on: and before every later turn.
    """
    selector = getattr(asyncio.get_running_loop(), "_selector", None)
    if selector is None:
        pytest.skip("this event loop does not show its turns")
    look = selector.select
    rest = Rest()
    turn = 0

    def select(timeout: float | None = None) -> Any:
        nonlocal turn
        turn += 1
        if turn <= number:
            if not or_at_rest or (timeout is not None and timeout <= _AT_REST):
                return look(timeout)
            events = look(_AT_REST)
            if events:
                return events
            rest.reached = True
            turn = number + 1
        if turn == number + 1:
            act()
            return look(0)
        if and_on:
            act()
            return look(0 if timeout == 0 else _BRIEFLY)
        return look(timeout)

    selector.select = select
    try:
        yield rest
    finally:
        del selector.select


async def cancelled_at(turn: int, work: Coroutine[Any, Any, Any], *, and_on: bool = False) -> bool:
    """Do `work` in a task that is cancelled at this turn; whether it was, before it ended.

    Args:
        and_on: cancel it again at every later turn, while it still cleans up.

    Raises:
        AssertionError: the task ended otherwise than by its cancellation.
        Exception: it failed before.
    """
    task = asyncio.create_task(work)
    asked: list[bool] = []
    with at_turn(turn, lambda: asked.append(task.cancel()), and_on=and_on):
        await asyncio.wait({task}, timeout=HANG_SECONDS)
    return was_cancelled(task, asked)


def was_cancelled(task: asyncio.Task[Any], asked: list[bool]) -> bool:
    """Whether a task ended by a cancellation; one that took it must not end in another way."""
    assert task.done(), "it hangs"
    if any(asked):
        assert task.cancelled(), f"it swallowed its cancellation, and ended by {_ending(task)}"
        return True
    task.result()
    return False


def _ending(task: asyncio.Task[Any]) -> str:
    error = task.exception()
    return f"the result {task.result()!r}" if error is None else repr(error)


def turns() -> Iterator[int]:
    """The turns to cancel at: each of the first 40, later ones more sparsely."""
    turn = 0
    while turn < 10_000:
        yield turn
        turn += 1 + turn // 40
    raise AssertionError("it never ends")
