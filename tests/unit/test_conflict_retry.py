"""Retries after conflicts, and the fair queue for the tasks of one process that retry."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

import pytest

from hf_async_store import (
    ConcurrencyConflictError,
    OperationTimeoutError,
    RetriesExhaustedError,
    UnavailableError,
    conflict_retry,
    open_store,
)
from hf_async_store.conflict_retry import FairRetryQueue, Ticket, TransactionTicket, retry_conflicts
from hf_async_store.transaction import Transaction
from hf_async_store.values import Entity, Key

KEY = Key("counters", "c")
OTHER = Key("counters", "other")
SECONDS = 30.0


class Counter:
    """A compare-and-set value; reading and writing it takes several event-loop iterations."""

    def __init__(self, turns: int = 2) -> None:
        self.value = 0
        self.attempts = 0
        self.turns = turns

    async def increment(self) -> int:
        self.attempts += 1
        seen = self.value
        for _ in range(self.turns):
            await asyncio.sleep(0)
        if seen != self.value:
            raise ConcurrencyConflictError("lost", collection="counters", entity_id="c")
        self.value += 1
        return self.value


def conflict() -> ConcurrencyConflictError:
    return ConcurrencyConflictError("lost", collection="counters", entity_id="c")


async def settled(*tasks: asyncio.Task[int]) -> None:
    async with asyncio.timeout(SECONDS):
        await asyncio.wait(tasks)


# -- retries ----------------------------------------------------------------------------------


async def held(turns: FairRetryQueue) -> tuple[asyncio.Event, asyncio.Task[int]]:
    """A task that is at the head of the queue until the event is set."""
    gate = asyncio.Event()

    async def gated() -> int:
        await gate.wait()
        return 1

    holder = asyncio.create_task(turns.retry(KEY, once_lost(gated), SECONDS))
    await asyncio.sleep(0.01)
    return gate, holder


async def test_work_without_a_conflict_runs_once() -> None:
    counter = Counter()
    assert await retry_conflicts(counter.increment, SECONDS) == 1
    assert counter.attempts == 1


async def test_pauses_are_proportional_to_the_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses are proportional to the duration of an attempt, and at most one second."""
    now = 0.0
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        nonlocal now
        pauses.append(seconds)
        now += seconds

    def attempts(took: float, count: int) -> Callable[[], Awaitable[int]]:
        left = count

        async def attempt() -> int:
            nonlocal now, left
            now += took
            left -= 1
            if left:
                raise conflict()
            return 1

        return attempt

    monkeypatch.setattr(conflict_retry, "monotonic", lambda: now)
    monkeypatch.setattr(conflict_retry, "sleep", sleep)
    longest = []
    for took in (0.0001, 0.001, 0.02, 3.0):
        pauses.clear()
        assert await retry_conflicts(attempts(took, 200), 10_000) == 1
        assert len(pauses) == 199
        longest.append(max(pauses))
        assert pauses[0] <= 2 * took
    assert longest[0] < longest[1] < longest[2] <= longest[3] <= 1.0
    assert longest[1] < 0.05


@pytest.mark.parametrize("seconds", [0.0, 0.3])
async def test_retries_end_at_the_time_limit(seconds: float) -> None:
    tries = 0

    async def attempt() -> int:
        nonlocal tries
        tries += 1
        raise conflict()

    for retried in (lambda: retry_conflicts(attempt, seconds), lambda: taking(attempt, seconds)):
        tries = 0
        with pytest.raises(RetriesExhaustedError) as caught:
            await retried()
        assert isinstance(caught.value.__cause__, ConcurrencyConflictError)
        assert tries == 1 if not seconds else tries > 1


def taking(attempt: Callable[[], Awaitable[int]], seconds: float) -> Awaitable[int]:
    return FairRetryQueue().retry(KEY, attempt, seconds)


# -- the queue --------------------------------------------------------------------------------


async def test_tasks_without_a_conflict_do_not_wait() -> None:
    turns = FairRetryQueue()
    inside = 0

    async def attempt() -> int:
        nonlocal inside
        inside += 1
        await asyncio.sleep(0.01)
        assert inside == 8, "all attempts run at the same time"
        assert not turns.contended
        return 1

    await asyncio.gather(*(turns.retry(KEY, attempt, SECONDS) for _ in range(8)))


async def test_tasks_of_one_process_have_one_conflict_each() -> None:
    turns, counter = FairRetryQueue(), Counter()

    async def steps() -> None:
        for _ in range(50):
            await turns.retry(KEY, counter.increment, SECONDS)

    await asyncio.gather(*(steps() for _ in range(16)))
    assert counter.value == 16 * 50
    assert counter.attempts < counter.value + 2 * 16
    assert not turns.contended


async def test_tasks_retry_in_the_order_of_their_conflicts() -> None:
    turns, counter = FairRetryQueue(), Counter()
    done: list[int] = []

    async def steps(number: int) -> None:
        for _ in range(20):
            await turns.retry(KEY, counter.increment, SECONDS)
            done.append(number)

    await asyncio.gather(*(steps(each) for each in range(8)))
    for start in range(16, 8 * 19, 8):
        assert sorted(done[start : start + 8]) == [*range(8)], (
            "every task succeeds once before any succeeds twice"
        )


async def test_keys_do_not_wait_for_one_another() -> None:
    turns = FairRetryQueue()
    gate = asyncio.Event()

    async def stuck() -> int:
        await gate.wait()
        return 1

    first = asyncio.create_task(turns.retry(KEY, once_lost(stuck), SECONDS))
    await asyncio.sleep(0.01)
    assert turns.contended
    counter = Counter()
    assert await turns.retry(OTHER, counter.increment, SECONDS) == 1
    gate.set()
    await first
    assert not turns.contended


def once_lost(then: Callable[[], Awaitable[int]]) -> Callable[[], Awaitable[int]]:
    lost = False

    async def attempt() -> int:
        nonlocal lost
        if not lost:
            lost = True
            raise conflict()
        return await then()

    return attempt


async def test_a_task_cancelled_in_the_queue_does_not_block_others() -> None:
    turns = FairRetryQueue()
    gate, holder = await held(turns)
    counter = Counter()
    waiting = [asyncio.create_task(turns.retry(KEY, counter.increment, SECONDS)) for _ in range(5)]
    await asyncio.sleep(0)
    for each in (0, 2, 4):
        waiting[each].cancel()
    gate.set()
    await settled(holder, *waiting)
    assert [each.cancelled() for each in waiting] == [True, False, True, False, True]
    assert counter.value == 2
    assert not turns.contended


async def test_a_task_cancelled_at_the_head_of_the_queue_wakes_the_next() -> None:
    turns = FairRetryQueue()
    gate, holder = await held(turns)
    counter = Counter()
    second, third = [
        asyncio.create_task(turns.retry(KEY, counter.increment, SECONDS)) for _ in range(2)
    ]
    await asyncio.sleep(0)
    holder.add_done_callback(lambda _: second.cancel())  # before the task that was woken runs
    gate.set()
    await settled(holder, second, third)
    assert second.cancelled()
    assert third.result() == 1
    assert not turns.contended


async def test_cancellations_at_any_moment() -> None:
    chance = random.Random(7)
    turns = FairRetryQueue()
    counter = Counter()
    won = 0

    async def step() -> int:
        nonlocal won
        value = await turns.retry(KEY, counter.increment, SECONDS)
        won += 1
        return value

    for _ in range(200):
        tasks = [asyncio.create_task(step()) for _ in range(10)]
        for each in chance.sample(tasks, 6):
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
            each.cancel()
        await settled(*tasks)
        assert not turns.contended
    assert counter.value == won


@pytest.mark.parametrize("between", [0, 1])
async def test_an_entity_is_handed_on_to_the_next_task_only(between: int) -> None:
    """A task between the two, such as a transaction, may have changed it; a later one must not see less
    than others do."""
    turns = FairRetryQueue()
    entity: Entity = {"id": "c", "version": 5}
    got: list[Entity | None] = []

    async def write() -> int:
        turns.hand_on(KEY, entity)
        return 1

    async def something_else() -> int:
        return 1

    async def take() -> int:
        got.extend([turns.handed_on(KEY), turns.handed_on(KEY)])
        return 1

    gate, holder = await held(turns)
    tasks = [
        asyncio.create_task(turns.retry(KEY, each, SECONDS))
        for each in (write, *between * [something_else], take)
    ]
    await asyncio.sleep(0)
    gate.set()
    await settled(holder, *tasks)
    assert got == [None if between else entity, None]


async def test_after_three_tasks_that_were_handed_an_entity_one_reads() -> None:
    turns = FairRetryQueue()
    got: list[bool] = []

    async def attempt() -> int:
        got.append(turns.handed_on(KEY) is not None)
        turns.hand_on(KEY, {"id": "c"})
        return 1

    gate, holder = await held(turns)
    tasks = [asyncio.create_task(turns.retry(KEY, attempt, SECONDS)) for _ in range(9)]
    await asyncio.sleep(0)
    gate.set()
    await settled(holder, *tasks)
    assert got == [False, True, True, True, False, True, True, True, False]


async def test_a_failed_task_wakes_the_next() -> None:
    turns = FairRetryQueue()

    async def fails() -> int:
        await asyncio.sleep(0.01)
        raise UnavailableError("gone")

    counter = Counter()
    first = asyncio.create_task(turns.retry(KEY, once_lost(fails), SECONDS))
    await asyncio.sleep(0)
    second = asyncio.create_task(turns.retry(KEY, counter.increment, SECONDS))
    await settled(first, second)
    assert isinstance(first.exception(), UnavailableError)
    assert second.result() == 1


async def test_a_slow_task_does_not_hold_its_queue_position_forever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A task that waits for a later task must not block it forever."""
    monkeypatch.setattr(conflict_retry, "_MAX_TICKET_SECONDS", 0.02)
    turns = FairRetryQueue()
    done = asyncio.Event()

    async def waits_for_the_others() -> int:
        await done.wait()
        return 1

    counter = Counter()
    first = asyncio.create_task(turns.retry(KEY, once_lost(waits_for_the_others), SECONDS))
    await asyncio.sleep(0.001)
    others = [asyncio.create_task(turns.retry(KEY, counter.increment, SECONDS)) for _ in range(9)]
    await settled(*others)
    assert counter.value == 9
    done.set()
    assert await first == 1
    assert not turns.contended


async def test_waiting_in_the_queue_ends_at_the_time_limit() -> None:
    turns = FairRetryQueue()
    gate, holder = await held(turns)
    began = time.monotonic()
    counter = Counter()
    assert await turns.retry(KEY, counter.increment, 0.02) == 1, "it makes one attempt nevertheless"
    assert await turns.retry(KEY, counter.increment, 0) == 2

    async def always() -> int:
        raise conflict()

    with pytest.raises(RetriesExhaustedError):
        await turns.retry(KEY, always, 0.02)
    assert time.monotonic() - began < 0.9, "a task may hold its position in the queue for a second"
    gate.set()
    await holder


# -- the verb ---------------------------------------------------------------------------------


async def test_a_change_may_modify_the_same_entity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conflict_retry, "_MAX_TICKET_SECONDS", 0.02)
    async with open_store("memory:") as store:
        await store.save_entity("templates", {"template_id": "t", "count": 0})
        nested = False

        async def change(entity: Entity) -> Entity:
            nonlocal nested
            if not nested or entity["version"] == 2:
                nested = True
                await store.modify_entity("templates", "t", lambda found: {**found, "name": "n"})
            return {**entity, "count": 1}

        await store.modify_entity("templates", "t", change, retry_seconds=10)
        found = await store.get_entity("templates", "t") or {}
        assert (found["name"], found["count"]) == ("n", 1)


@pytest.mark.parametrize("tasks", [2, 16])
async def test_concurrent_modifications_are_fair(tasks: int) -> None:
    """If many tasks modify one entity in a closed loop, all of them make similar progress."""
    async with open_store("memory:") as store:
        await store.save_entity("templates", {"template_id": "t", "count": 0})
        counts = [0] * tasks

        async def loop(number: int) -> None:
            while sum(counts) < 100 * tasks:
                await store.modify_entity(
                    "templates", "t", lambda found: {**found, "count": found["count"] + 1}
                )
                counts[number] += 1

        await asyncio.gather(*map(loop, range(tasks)))
        found = await store.get_entity("templates", "t") or {}
        assert found["count"] == sum(counts)
        assert min(counts) >= 80, counts


# -- transactions ------------------------------------------------------------------------------


async def test_a_task_does_not_get_an_entity_that_was_written_before_it_came() -> None:
    """Another process may have changed the entity since, and the task may decide by it."""
    turns = FairRetryQueue()
    gate, transaction_gate = asyncio.Event(), asyncio.Event()

    async def write() -> int:
        await gate.wait()
        turns.hand_on(KEY, {"version": 2})
        return 2

    async def attempt(ticket: TransactionTicket) -> int:
        await ticket.enter([KEY], writes=True, may_wait=True)
        await transaction_gate.wait()
        return 3

    async def read() -> int:
        return 0 if turns.handed_on(KEY) is None else 1

    first = asyncio.create_task(turns.retry(KEY, once_lost(write), SECONDS))
    await asyncio.sleep(0)
    second = asyncio.create_task(turns.retry_transaction(attempt, SECONDS))
    await asyncio.sleep(0)
    gate.set()
    await settled(first)
    late = asyncio.create_task(turns.retry(KEY, read, SECONDS))
    await asyncio.sleep(0)
    transaction_gate.set()
    await settled(second, late)
    assert late.result() == 0


async def test_a_transaction_waits_before_its_first_call_if_there_is_a_queue() -> None:
    turns = FairRetryQueue()
    gate, first = await held(turns)
    entered: list[str] = []

    async def attempt(ticket: TransactionTicket) -> int:
        await ticket.enter([OTHER, KEY], writes=False, may_wait=True)
        entered.append("first call")
        return 1

    async def other(ticket: TransactionTicket) -> int:
        await ticket.enter([OTHER], writes=True, may_wait=True)
        await ticket.enter([KEY], writes=True, may_wait=False)  # its session has begun
        entered.append("another entity")
        return 2

    waiting = asyncio.create_task(turns.retry_transaction(attempt, SECONDS))
    assert await turns.retry_transaction(other, SECONDS) == 2
    await asyncio.sleep(0)
    assert entered == ["another entity"]
    gate.set()
    await settled(first, waiting)
    assert entered == ["another entity", "first call"]
    assert not turns.contended


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (conflict(), KEY),
        (ConcurrencyConflictError("lost"), OTHER),
    ],
)
async def test_a_transaction_queues_for_the_entity_of_its_conflict(
    error: ConcurrencyConflictError, wanted: Key
) -> None:
    turns = FairRetryQueue()
    keys: list[Key | None] = []

    async def attempt(ticket: TransactionTicket) -> int:
        keys.append(ticket.key)
        await ticket.enter([Key("counters", "read first")], writes=False, may_wait=True)
        await ticket.enter([OTHER], writes=True, may_wait=False)
        if len(keys) == 1:
            raise error
        assert ticket.is_current
        return 1

    assert await turns.retry_transaction(attempt, SECONDS) == 1
    assert keys == [None, wanted]
    assert not turns.contended


T = Key("templates", "t")


async def test_a_transaction_that_has_begun_does_not_wait_in_a_queue() -> None:
    """It holds locks of the engine, for which those in the queue wait."""
    async with open_store("memory:") as store:
        await store.save_entity("templates", {"template_id": "t", "count": 0})
        first = Ticket(store._retry_queue._queues, T)
        await first.acquire(SECONDS)

        async def work(tx: Transaction) -> None:
            await tx.count_entities("templates")
            await tx.get_entity("templates", "t")

        began = time.monotonic()
        await store.run_transaction(work)
        assert time.monotonic() - began < 0.5
        first.release()


async def test_a_read_only_transaction_does_not_wait_in_a_queue() -> None:
    async with open_store("memory:") as store:
        first = Ticket(store._retry_queue._queues, T)
        await first.acquire(SECONDS)
        began = time.monotonic()
        await store.run_transaction(lambda tx: tx.get_entity("templates", "t"), read_only=True)
        assert time.monotonic() - began < 0.5
        first.release()


async def test_waiting_in_a_queue_is_part_of_the_timeout_of_a_call() -> None:
    async with open_store("memory:") as store:
        first = Ticket(store._retry_queue._queues, T)
        await first.acquire(SECONDS)
        began = time.monotonic()
        with pytest.raises(OperationTimeoutError):
            await store.run_transaction(lambda tx: tx.get_entity("templates", "t", timeout=0.01))
        assert time.monotonic() - began < 0.5
        first.release()
