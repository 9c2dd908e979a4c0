"""Long work of many tasks does not make the iterations of the event loop longer."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any, Final

import pytest

from hf_async_store import event_loop
from hf_async_store.event_loop import Chunks, computed_in_pieces, long_work, pause

TASKS: Final = 30
PIECES: Final = 5
LONG: Final = 0.003
"""Seconds of a piece: more than the time in an iteration."""


class Pieces:
    """Pieces of several tasks, on a clock that they alone advance."""

    def __init__(self) -> None:
        self.now = 0.0
        self.done: list[int] = []

    def piece(self, task: int, seconds: float) -> None:
        self.now += seconds
        self.done.append(task)

    async def work(self, task: int, seconds: float) -> None:
        for _ in range(PIECES):
            await pause()
            self.piece(task, seconds)

    async def longest_iteration(self, work: Callable[[int], Coroutine[Any, Any, None]]) -> float:
        """Do the work of all tasks; returns how long the longest iteration was."""
        works = asyncio.gather(*map(work, range(TASKS)))
        longest, last = 0.0, self.now
        while not works.done():
            await asyncio.sleep(0)
            longest, last = max(longest, self.now - last), self.now
        await works
        return longest


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> Pieces:
    pieces = Pieces()
    monkeypatch.setattr(event_loop, "monotonic", lambda: pieces.now)
    return pieces


async def test_an_iteration_has_one_long_piece(pieces: Pieces) -> None:
    assert await pieces.longest_iteration(partial(pieces.work, seconds=LONG)) == pytest.approx(LONG)


async def test_an_iteration_has_several_short_pieces(pieces: Pieces) -> None:
    longest = await pieces.longest_iteration(partial(pieces.work, seconds=LONG / 10))
    assert LONG / 5 < longest < LONG


async def test_tasks_take_turns(pieces: Pieces) -> None:
    await pieces.longest_iteration(partial(pieces.work, seconds=LONG))
    rounds = [pieces.done[start : start + TASKS] for start in range(0, TASKS * PIECES, TASKS)]
    assert [sorted(each) for each in rounds] == [[*range(TASKS)]] * PIECES


async def test_the_first_chunks_of_several_tasks_share_an_iteration(pieces: Pieces) -> None:
    async def work(task: int) -> None:
        async for _ in Chunks(range(4), 2):
            pieces.piece(task, LONG)

    assert await pieces.longest_iteration(work) == pytest.approx(LONG)


async def test_a_single_chunk_does_not_wait(pieces: Pieces) -> None:
    async def work(task: int) -> None:
        async for _ in Chunks(range(4), 4):
            pieces.piece(task, LONG)

    assert await pieces.longest_iteration(work) == pytest.approx(TASKS * LONG)


async def test_what_is_computed_in_pieces_is_long_work(pieces: Pieces) -> None:
    def computed(task: int) -> Iterator[int]:
        for each in range(5):
            pieces.piece(task, LONG)
            yield each

    async def work(task: int) -> None:
        assert await computed_in_pieces(computed(task), 1) == [0, 1, 2, 3, 4]

    assert await pieces.longest_iteration(work) == pytest.approx(LONG)


async def test_pieces_of_one_task_are_done_while_there_is_time(pieces: Pieces) -> None:
    work, iterations = long_work(), 0
    ended = asyncio.Event()

    async def count() -> None:
        nonlocal iterations
        while not ended.is_set():
            await asyncio.sleep(0)
            iterations += 1

    counting = asyncio.ensure_future(count())
    for _ in range(100):
        await work.pause_if_due()
        pieces.piece(0, LONG / 10)
    ended.set()
    await counting
    assert 10 < iterations < 50


async def test_a_cancelled_task_stops_no_other(pieces: Pieces) -> None:
    tasks = [asyncio.ensure_future(pieces.work(each, LONG)) for each in range(TASKS)]
    for number, each in enumerate(tasks):
        if number % 3:
            each.cancel()
        await asyncio.sleep(0)
    await asyncio.wait(tasks)
    assert [each.cancelled() for each in tasks] == [bool(each % 3) for each in range(TASKS)]


async def test_those_who_come_later_wait_longer(pieces: Pieces) -> None:
    """In each iteration, another task has a piece to do, as with the responses of a server."""

    async def one_piece() -> None:
        await long_work().pause_if_due()
        pieces.piece(TASKS, LONG)

    tasks = [asyncio.ensure_future(pieces.work(each, LONG)) for each in range(3)]
    others = []
    while not all(each.done() for each in tasks):
        others.append(asyncio.ensure_future(one_piece()))
        await asyncio.sleep(0)
        assert len(others) < 20 * PIECES, "the other tasks have all the time"
    await asyncio.wait(others)


async def test_to_cancel_many_tasks_takes_little_time() -> None:
    async def work() -> None:
        while True:
            await pause()

    async def seconds(wait: Callable[[], Coroutine[Any, Any, object]]) -> float:
        tasks = [asyncio.ensure_future(wait()) for _ in range(2000)]
        for _ in range(3):
            await asyncio.sleep(0)
        began = time.process_time()
        for each in tasks:
            each.cancel()
        await asyncio.wait(tasks)
        return time.process_time() - began

    assert await seconds(work) < 10 * await seconds(asyncio.Event().wait)


async def test_a_coroutine_that_is_closed_stops_no_other(pieces: Pieces) -> None:
    others = asyncio.gather(*(pieces.work(each, LONG) for each in range(3)))
    await asyncio.sleep(0)
    waiting = pause()
    waiting.send(None)
    waiting.close()
    await others
    assert len(pieces.done) == 3 * PIECES


def test_a_loop_that_ends_amid_long_work_is_freed(pieces: Pieces) -> None:
    async def abandon() -> weakref.ref[asyncio.AbstractEventLoop]:
        for each in range(3):
            asyncio.ensure_future(pieces.work(each, LONG))  # noqa: RUF006  # cancelled with the loop
        await asyncio.sleep(0)
        return weakref.ref(asyncio.get_running_loop())

    loop = asyncio.run(abandon())
    gc.collect()
    assert loop() is None


def test_a_loop_that_is_closed_with_tasks_is_freed(pieces: Pieces) -> None:
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # which gets the tasks that are destroyed
    waiting = [pieces.work(each, LONG) for each in range(TASKS)]
    tasks = [loop.create_task(each) for each in waiting]
    for _ in range(3):
        loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    closed = weakref.ref(loop)
    del loop, tasks, waiting
    gc.collect()
    assert closed() is None
