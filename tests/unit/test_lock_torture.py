"""The locks under cancellation at every moment: random, at each step, and compared with a model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hf_async_store import locks
from hf_async_store.errors import LockTimeoutError
from hf_async_store.locks import LockManager, Mode, ReaderWriterLock
from hf_async_store.testing.repetitions import repetitions

if TYPE_CHECKING:
    from pathlib import Path

Section = AbstractAsyncContextManager[None]
Enter = Callable[[Mode, float | None], Section]


def assert_free(lock: ReaderWriterLock) -> None:
    assert (lock.readers, lock.has_writer, lock.waiting) == (0, False, 0)


def section_of(lock: ReaderWriterLock) -> Enter:
    return lambda mode, timeout: (lock.reading if mode == "read" else lock.writing)(timeout)


def section_of_manager(manager: LockManager) -> Enter:
    return lambda mode, timeout: (manager.shared if mode == "read" else manager.exclusive)(timeout)


@pytest.fixture
def no_poll_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Polls at each event-loop iteration, so that a few iterations reach every await."""
    for name in ("_FIRST_PAUSE", "_MAX_PAUSE_SECONDS", "_NEXT_IN_LINE_PAUSE"):
        monkeypatch.setattr(locks, name, 0)


@pytest.fixture
def managers(tmp_path: Path, no_poll_delay: None) -> Iterator[list[LockManager]]:
    """Three lock managers of one path, which exclude one another like processes."""
    made = [LockManager(tmp_path / "store.lock") for _ in range(3)]
    yield made
    for each in made:
        each.close()


def assert_manager_free(manager: LockManager) -> None:
    assert_free(manager._tasks)
    assert_free(manager._gate)
    assert (manager._main.held, manager._turnstile.held, manager._sharers) == (None, None, 0)


# -- random tasks ---------------------------------------------------------------------------


class RandomTasks:
    """Tasks that acquire the sections of one lock at random, and are cancelled at random."""

    def __init__(self, seed: int, sections: list[Enter]) -> None:
        self._random = Random(seed)
        self._sections = sections
        self._readers = 0
        self._writers = 0
        self.cancelled = 0
        self.visits = 0

    async def run_tasks(self, visitors: int) -> None:
        tasks: set[asyncio.Task[None]] = set()
        finished: list[asyncio.Task[None]] = []
        while visitors or tasks:
            if visitors and self._random.random() < 0.5:
                visitors -= 1
                tasks.add(asyncio.create_task(self._visit()))
            if tasks and self._random.random() < 0.3:
                self._random.choice(sorted(tasks, key=id)).cancel()
            if self._random.random() < 0.6:
                await asyncio.sleep(0)
            done = {each for each in tasks if each.done()}
            tasks -= done
            finished += done
        for each in finished:
            if each.cancelled():
                self.cancelled += 1
            else:
                each.result()

    async def _visit(self) -> None:
        rng = self._random
        mode: Mode = "read" if rng.random() < 0.6 else "write"
        section = rng.choice(self._sections)(mode, rng.choice((None, None, None, 0, 0.0005)))
        around = asyncio.timeout(rng.choice((None, None, 0, 0.0003)))
        with suppress(LockTimeoutError, TimeoutError):
            async with around, section:
                self._acquired(mode)
                try:
                    for _ in range(rng.randrange(4)):
                        await asyncio.sleep(0)
                finally:
                    self._released(mode)

    def _acquired(self, mode: Mode) -> None:
        self.visits += 1
        assert not self._writers
        if mode == "read":
            self._readers += 1
        else:
            assert not self._readers
            self._writers += 1

    def _released(self, mode: Mode) -> None:
        if mode == "read":
            self._readers -= 1
        else:
            self._writers -= 1


async def test_random_tasks_on_a_lock() -> None:
    cancelled = visits = 0
    for seed in range(60):
        lock = ReaderWriterLock()
        storm = RandomTasks(seed, [section_of(lock)])
        async with asyncio.timeout(60):
            await storm.run_tasks(visitors=200)
        assert_free(lock)
        async with lock.writing(timeout=0):
            pass
        cancelled += storm.cancelled
        visits += storm.visits
    assert cancelled > 3000
    assert visits > 1000


async def test_random_tasks_on_lock_managers(managers: list[LockManager]) -> None:
    cancelled = visits = 0
    for seed in range(20):
        storm = RandomTasks(seed, [section_of_manager(each) for each in managers])
        async with asyncio.timeout(60):
            await storm.run_tasks(visitors=150)
        for each in managers:
            assert_manager_free(each)
            async with each.exclusive(timeout=0):
                pass
        cancelled += storm.cancelled
        visits += storm.visits
    assert cancelled > 500
    assert visits > 300


# -- step by step ---------------------------------------------------------------------------


async def hold(section: Section, turns: int) -> None:
    async with section:
        for _ in range(turns):
            await asyncio.sleep(0)


async def turn(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def cancelled_after(
    turns: int, before: list[Section], victim: Section, after: list[Section]
) -> bool:
    """Cancel `victim` after that many event-loop iterations; returns whether it had not ended yet.

    The other tasks start in the given order, each some iterations after the previous one, and must
    all end.
    """
    others = []
    for each in before:
        others.append(asyncio.create_task(hold(each, 5)))
        await turn(1)
    task = asyncio.create_task(hold(victim, 3))
    others += [asyncio.create_task(hold(each, 2)) for each in after]
    await turn(turns)
    alive = task.cancel()
    async with asyncio.timeout(60):
        with suppress(asyncio.CancelledError):
            await task
        await asyncio.gather(*others)
    return alive


MODES: list[Mode] = ["read", "write"]


@pytest.mark.parametrize("before", MODES)
@pytest.mark.parametrize("victim", MODES)
@pytest.mark.parametrize("after", MODES)
async def test_a_task_using_a_lock_cancelled_at_every_iteration(
    before: Mode, victim: Mode, after: Mode
) -> None:
    turns, alive = 0, True
    while alive:
        lock = ReaderWriterLock()
        enter = section_of(lock)
        alive = await cancelled_after(
            turns,
            [enter(before, None), enter("write", None)],
            enter(victim, None),
            [enter(after, None), enter("read", 60)],
        )
        assert_free(lock)
        async with lock.writing(timeout=0):
            pass
        turns += 1
    assert turns > 8


@pytest.mark.parametrize("before", MODES)
@pytest.mark.parametrize("victim", MODES)
@pytest.mark.parametrize("after", MODES)
async def test_a_task_using_a_manager_cancelled_at_every_iteration(
    before: Mode, victim: Mode, after: Mode, managers: list[LockManager]
) -> None:
    here, there, third = map(section_of_manager, managers)
    turns, alive = 0, True
    while alive:
        alive = await cancelled_after(
            turns,
            [there(before, None), third("write", None)],
            here(victim, None),
            [here(after, None), here("read", None), there("read", None)],
        )
        for each in managers:
            assert_manager_free(each)
            async with each.exclusive(timeout=0):
                pass
        turns += 1
    assert turns > 8


# -- with a model ---------------------------------------------------------------------------


class SteppedLoop(asyncio.SelectorEventLoop):
    """An event loop that is run, and whose clock is advanced, by explicit calls."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def turn(self, number: int) -> None:
        for _ in range(number):
            self.call_soon(self.stop)
            self.run_forever()


@dataclass(eq=False)
class Visitor:
    mode: Mode
    deadline: float | None
    leave: asyncio.Event
    inside: bool = False
    task: asyncio.Task[None] = field(init=False)

    async def visit(self, lock: ReaderWriterLock, timeout: float | None) -> None:
        async with section_of(lock)(self.mode, timeout):
            self.inside = True
            try:
                await self.leave.wait()
            finally:
                self.inside = False


class Queue:
    """A minimal model of the lock: the waiting tasks and the holders."""

    def __init__(self) -> None:
        self.waiting: list[Visitor] = []
        self.inside: list[Visitor] = []

    def come(self, visitor: Visitor) -> None:
        self.waiting.append(visitor)
        self._admit()

    def go(self, visitor: Visitor) -> None:
        """Remove a task from the holders or from the queue."""
        (self.inside if visitor in self.inside else self.waiting).remove(visitor)
        self._admit()

    def pass_time(self, now: float) -> None:
        while late := [each for each in self.waiting if each.deadline and each.deadline <= now]:
            self.go(min(late, key=lambda each: each.deadline or 0))

    def _admit(self) -> None:
        while self.waiting and self._fits(self.waiting[0]):
            self.inside.append(self.waiting.pop(0))

    def _fits(self, visitor: Visitor) -> bool:
        return not self.inside or {each.mode for each in (*self.inside, visitor)} == {"read"}


ENOUGH_ITERATIONS = 20
ITERATIONS = st.sampled_from([ENOUGH_ITERATIONS, 0, 1, 2])
"""The number of event-loop iterations after a step. Often not all pending callbacks have run then: so
tasks are cancelled, and locks released, between a hand-over and the moment when the new holder runs."""


class LockComparedWithModel(RuleBasedStateMachine):
    """Tasks acquire, release, are cancelled or time out; the lock and the model must agree."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = SteppedLoop()
        self.lock = ReaderWriterLock()
        self.model = Queue()
        self.all: list[Visitor] = []
        self.turns = ENOUGH_ITERATIONS

    def run(self, turns: int) -> None:
        self.turns = turns
        self.loop.turn(turns)

    @rule(
        visitors=st.lists(
            st.tuples(st.sampled_from(MODES), st.none() | st.integers(1, 3)),
            min_size=1,
            max_size=4,
        ),
        turns=ITERATIONS,
    )
    def come(self, visitors: list[tuple[Mode, int | None]], turns: int) -> None:
        for mode, timeout in visitors:
            # All deadlines differ, because the loop may fire timers with equal deadlines in any order.
            exact = None if timeout is None else timeout + len(self.all) * 1e-6
            deadline = None if exact is None else self.loop.now + exact
            visitor = Visitor(mode, deadline, asyncio.Event())
            visitor.task = self.loop.create_task(visitor.visit(self.lock, exact))
            self.all.append(visitor)
            self.model.come(visitor)
        self.run(turns)

    @precondition(lambda self: self.model.inside)
    @rule(data=st.data(), turns=ITERATIONS)
    def leave(self, data: st.DataObject, turns: int) -> None:
        visitor = data.draw(st.sampled_from(self.model.inside))
        visitor.leave.set()
        self.model.go(visitor)
        self.run(turns)

    @precondition(lambda self: self.model.inside or self.model.waiting)
    @rule(data=st.data(), turns=ITERATIONS)
    def cancel(self, data: st.DataObject, turns: int) -> None:
        visitor = data.draw(st.sampled_from([*self.model.inside, *self.model.waiting]))
        visitor.task.cancel()
        self.model.go(visitor)
        self.run(turns)

    @rule(seconds=st.integers(1, 3))
    def pass_time(self, seconds: int) -> None:
        self.run(ENOUGH_ITERATIONS)
        self.loop.now += seconds
        self.model.pass_time(self.loop.now)
        self.run(ENOUGH_ITERATIONS)

    @invariant()
    def it_is_as_the_model_says(self) -> None:
        lock = self.lock
        assert not (lock.readers and lock.has_writer)
        if not lock.readers and not lock.has_writer:
            assert all(each.done() for each in lock._queue)
        if self.turns == ENOUGH_ITERATIONS:
            inside = self.model.inside
            assert [each for each in self.all if each.inside] == [
                each for each in self.all if each in inside
            ]
            assert lock.readers == sum(each.mode == "read" for each in inside)
            assert lock.has_writer == any(each.mode == "write" for each in inside)
            assert [task for task, _ in lock._queue.values()] == [
                each.task for each in self.model.waiting
            ]

    def teardown(self) -> None:
        for each in self.all:
            each.task.cancel()
        self.run(ENOUGH_ITERATIONS)
        self.loop.close()
        for each in self.all:
            assert each.task.done()
            if not each.task.cancelled():
                assert isinstance(each.task.exception(), LockTimeoutError | None)
        assert_free(self.lock)


TestLockComparedWithModel = LockComparedWithModel.TestCase
TestLockComparedWithModel.settings = settings(
    max_examples=repetitions(200), stateful_step_count=40, deadline=None
)
