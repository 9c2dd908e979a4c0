"""Cases 72, 73 and 126: the cancellation of every operation, at every moment."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec
import pytest

from hf_async_store.errors import (
    AlreadyExistsError,
    BatchError,
    ConcurrencyConflictError,
    EntityNotFoundError,
    OperationTimeoutError,
    StorageError,
    StoreClosedError,
)
from hf_async_store.field_operations import increment
from hf_async_store.testing.assertions import (
    get_existing,
    nothing_is_left,
    payload,
    payloads,
    typed,
)
from hf_async_store.testing.cancellation_stepper import at_turn, cancelled_at, turns, was_cancelled
from hf_async_store.testing.concurrency import (
    HANG_SECONDS,
    failure_of,
    has_ended,
    is_shared,
    second_store,
    seeded,
)
from hf_async_store.testing.harness import HoldsWrites, skip_fault
from hf_async_store.values import INT_MAX

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from hf_async_store.repository import RepositoryInterface
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.harness import Harness
    from hf_async_store.values import Entity

Verb: TypeAlias = "Callable[[StorageStrategy], Awaitable[object]]"
VerbOnOne: TypeAlias = "Callable[[StorageStrategy, str], Awaitable[object]]"
VerbWithTimeout: TypeAlias = "Callable[[StorageStrategy, float | None], Awaitable[object]]"

# -- the verbs ------------------------------------------------------------------------------

State: TypeAlias = "dict[tuple[str, str], dict[str, object] | None]"

_KEYS: Final = (
    ("items", "a"),
    ("items", "b"),
    ("items", "c"),
    ("items", "d"),
    ("counters", "n"),
)
_A: Final = {"item_id": "a", "label": "before", "data": {"n": [1]}}
_B: Final = {"item_id": "b", "label": "before"}
_C: Final = {"item_id": "c", "label": "new", "due_at": "2024-01-01"}
_D: Final = {"item_id": "d", "label": "new"}
_N: Final = {"counter_id": "n", "value": 1}
_AFTER: Final = {"item_id": "a", "label": "after"}
_BOTH: Final = {"a": {"label": "after"}, "b": {"label": "after"}}


class _Verb(msgspec.Struct, frozen=True):
    """A verb on the items and the counter of `reset`.

    Attributes:
        atomic: it takes effect completely or not at all; otherwise that holds for each entity.
        reads: it writes nothing, so that the stored state is compared only once, at the end.
    """

    work: Verb
    atomic: bool = True
    reads: bool = False


async def _walk(repository: RepositoryInterface) -> None:
    async with aclosing(repository.stream_entities("items", order_by="-label")) as rows:
        async for _row in rows:
            pass


async def _pages(repository: RepositoryInterface) -> None:
    page = await repository.query_page("items", limit=1)
    await repository.query_page("items", limit=1, cursor=page.cursor)


async def _modify(repository: RepositoryInterface) -> None:
    async def change(entity: Any) -> Any:
        await asyncio.sleep(0)
        return {**entity, "label": "after"}

    await repository.modify_entity("items", "a", change)


async def _writes(tx: RepositoryInterface) -> None:
    await tx.create_entity("items", _C)
    await tx.update_entity("items", "a", {"label": "after"}, expected_version=1)
    await tx.delete_entity("items", "b")
    await tx.save_entity("counters", {"counter_id": "n", "value": 2})


async def _transaction(store: StorageStrategy) -> None:
    async with store.begin_transaction() as tx:
        await _writes(tx)


async def _read_write(store: StorageStrategy) -> None:
    async with store.begin_transaction() as tx:
        entity = await get_existing(tx, "items", "a")
        rows = await tx.query_entities("items", {"label": "before"})
        await tx.count_entities("items")
        await tx.conditional_update("items", "a", {"label": "after", "count": len(rows)})
        await tx.save_entities("items", [_C, _D])
        assert entity["label"] == "before"


async def _read_only(store: StorageStrategy) -> None:
    async with store.begin_transaction() as tx:
        await tx.get_entity("items", "a")
        await tx.get_entities("items", ["a", "b", "c"])
        await _walk(tx)


async def _rolled_back(store: StorageStrategy) -> None:
    with suppress(ZeroDivisionError):
        async with store.begin_transaction() as tx:
            await _writes(tx)
            raise ZeroDivisionError


async def _nested(store: StorageStrategy) -> None:
    async with store.begin_transaction() as tx:
        await tx.update_entity("items", "a", {"label": "after"})
        if not store.capabilities.savepoints:
            return
        async with tx.begin_transaction() as inner:
            await inner.create_entity("items", _C)
        with suppress(ZeroDivisionError):
            async with tx.begin_transaction() as inner:
                await inner.delete_entity("items", "b")
                raise ZeroDivisionError


VERBS: Final[Mapping[str, _Verb]] = {
    "create": _Verb(lambda store: store.create_entity("items", _C)),
    "save": _Verb(lambda store: store.save_entity("items", {**_A, "label": "after"})),
    "save of a version": _Verb(
        lambda store: store.save_entity("items", {**_A, "label": "after"}, expected_version=1)
    ),
    "update": _Verb(lambda store: store.update_entity("items", "a", {"label": "after"})),
    "delete": _Verb(lambda store: store.delete_entity("items", "a")),
    "get": _Verb(lambda store: store.get_entity("items", "a"), reads=True),
    "create many": _Verb(lambda store: store.create_entities("items", [_C, _D]), atomic=False),
    "save many": _Verb(lambda store: store.save_entities("items", [_A, _C]), atomic=False),
    "update many": _Verb(lambda store: store.update_entities("items", _BOTH), atomic=False),
    "increment": _Verb(lambda store: store.update_entity("counters", "n", {"value": increment()})),
    "update and return": _Verb(
        lambda store: store.update_entity("items", "a", {"label": "after"}, returning=True)
    ),
    "update where": _Verb(
        lambda store: store.update_where("items", {"label": "before"}, {"label": "after"}),
        atomic=False,
    ),
    "delete where": _Verb(
        lambda store: store.delete_where("items", {"item_id": "a"}, order_by="label")
    ),
    "clear": _Verb(lambda store: store.clear("items"), atomic=False),
    "count by": _Verb(lambda store: store.count_by("items", "label"), reads=True),
    "delete many": _Verb(
        lambda store: store.delete_entities("items", ["a", "b", "c"]), atomic=False
    ),
    "import many": _Verb(
        lambda store: store.import_entities("items", [{**_A, "version": 5}, _C]), atomic=False
    ),
    "get many": _Verb(lambda store: store.get_entities("items", ["a", "b", "c"]), reads=True),
    "modify": _Verb(_modify),
    "query": _Verb(
        lambda store: store.query_entities("items", {"label": "before"}, "-label"), reads=True
    ),
    "stream": _Verb(_walk, reads=True),
    "pages": _Verb(_pages, reads=True),
    "count": _Verb(lambda store: store.count_entities("items", {"label": "before"}), reads=True),
    "explain": _Verb(lambda store: store.explain_query("items", {"label": "before"}), reads=True),
    "test connection": _Verb(lambda store: store.test_connection(), reads=True),
    "health": _Verb(lambda store: store.health(), reads=True),
    "transaction": _Verb(_transaction),
    "transaction that reads": _Verb(_read_write),
    "transaction that only reads": _Verb(_read_only, reads=True),
    "transaction rolled back": _Verb(_rolled_back),
    "nested transaction": _Verb(_nested),
    "run transaction": _Verb(lambda store: store.run_transaction(_writes)),
}


_VERBS_THAT_WAIT: Final[Mapping[str, Verb]] = {
    "update": lambda store: store.update_entity("items", "a", {"label": "after"}),
    "transaction": lambda store: store.run_transaction(
        lambda tx: tx.update_entity("items", "a", {"label": "after"})
    ),
    "read": lambda store: store.get_entity("items", "a"),
    "query": lambda store: store.query_entities("items"),
    "batch": lambda store: store.update_entities("items", _BOTH),
}


_CANCELLED_TASKS: Final = 12
_SLOW_SECONDS: Final = 10.0
"""A write that does not wait for a lock takes less time, also under load."""
_ROUNDS: Final = 12


async def _modify_one(store: StorageStrategy, entity_id: str) -> None:
    await store.modify_entity("items", entity_id, lambda entity: {**entity, "label": "after"})


async def _transact_one(store: StorageStrategy, entity_id: str) -> None:
    async with store.begin_transaction() as tx:
        await tx.update_entity("items", entity_id, {"label": "after"})


_VERBS_ON_ONE: Final[Mapping[str, VerbOnOne]] = {
    "update": lambda store, each: store.update_entity("items", each, {"label": "after"}),
    "save": lambda store, each: store.save_entity("items", {"item_id": each, "label": "after"}),
    "delete": lambda store, each: store.delete_entity("items", each),
    "modify": _modify_one,
    "update many": lambda store, each: store.update_entities("items", {each: {"label": "after"}}),
    "import": lambda store, each: store.import_entities(
        "items", [{"item_id": each, "label": "after", "version": 7}]
    ),
    "transaction": _transact_one,
    "run transaction": lambda store, each: store.run_transaction(
        lambda tx: tx.update_entity("items", each, {"label": "after"})
    ),
}


_VERBS_WITH_TIMEOUT: Final[Mapping[str, VerbWithTimeout]] = {
    "update": lambda store, at: store.update_entity("items", "a", {"label": "after"}, timeout=at),
    "save": lambda store, at: store.save_entity("items", _AFTER, timeout=at),
    "delete": lambda store, at: store.delete_entity("items", "a", timeout=at),
    "compute": lambda store, at: store.update_entity(
        "items", "a", {"label": "after", "count": increment(1)}, timeout=at
    ),
    "update many": lambda store, at: store.update_entities(
        "items", {"a": {"label": "after"}}, timeout=at
    ),
}


class CancellationContract:
    """What holds after an operation was cancelled."""

    # 72 -------------------------------------------------------------------------------------

    @pytest.mark.parametrize("name", VERBS)
    async def test_72_cancel_at_every_await(
        self, harness: Harness, store: StorageStrategy, name: str
    ) -> None:
        await _cancel_everywhere(harness, store, VERBS[name])

    @pytest.mark.parametrize("name", [name for name, each in VERBS.items() if not each.reads])
    async def test_72_cancel_repeatedly_during_cleanup(
        self, harness: Harness, store: StorageStrategy, name: str
    ) -> None:
        await _cancel_everywhere(harness, store, VERBS[name], and_on=True)

    async def test_72_cancel_at_every_await_of_the_first_use(self, harness: Harness) -> None:
        """Each attempt opens a new store on the same data, until an attempt is no longer cancelled: a
        store must complete the initialisation that a cancelled one began."""
        for turn in turns():
            entity = {"item_id": "first", "data": {"turn": turn}}
            async with harness.store() as store:
                cancelled = await cancelled_at(turn, store.create_entity("items", entity))
                await _wait_for_earlier_writes(store)
                found = payload(await store.get_entity("items", "first"))
                assert found in ((None, entity) if cancelled else (entity,))
                await store.delete_entity("items", "first")
                await usable(store)
            await nothing_is_left(harness)
            if not cancelled:
                break

    async def test_72_cancel_at_every_await_of_a_close(self, harness: Harness) -> None:
        for turn in turns():
            store = await harness.store().open()
            await store.save_entity("items", {"item_id": "acknowledged", "count": turn})
            waiting = asyncio.create_task(store.save_entity("items", {"item_id": "waiting"}))
            await asyncio.sleep(0)
            cancelled = await cancelled_at(turn, store.close())
            if cancelled and not await _is_closed(store):
                await store.close()
            with suppress(StorageError):
                await waiting
            await nothing_is_left(harness)
            if is_shared(harness.capabilities):
                async with harness.store() as fresh:
                    assert (await get_existing(fresh, "items", "acknowledged"))["count"] == turn
                    there = await fresh.get_entity("items", "waiting") is not None
                    assert there or waiting.exception() is not None
                    await fresh.delete_entity("items", "waiting")
            if not cancelled:
                break

    @pytest.mark.parametrize("where", ["this store", "another store"])
    @pytest.mark.parametrize("name", _VERBS_THAT_WAIT)
    async def test_72_cancel_while_it_waits_for_a_transaction(
        self, harness: Harness, store: StorageStrategy, name: str, where: str
    ) -> None:
        if where == "this store":
            await self._cancel_while_waiting(store, store, _VERBS_THAT_WAIT[name])
        else:
            async with second_store(harness, store) as other:
                await self._cancel_while_waiting(other, store, _VERBS_THAT_WAIT[name])

    async def _cancel_while_waiting(
        self, holding: StorageStrategy, store: StorageStrategy, work: Verb
    ) -> None:
        for turn in range(12):
            await reset(store)
            entered, leave = asyncio.Event(), asyncio.Event()
            holder = asyncio.create_task(hold(holding, entered, leave))
            await entered.wait()
            task = asyncio.create_task(_run(store, work))
            asked: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            with at_turn(
                turn,
                lambda: asked.set_result(task.cancel()),  # noqa: B023 - called within this iteration
                or_at_rest=True,
            ) as rest:
                # Do not wait for the end of the task: a cancelled write may have to wait until the
                # batch that it is part of is done, so the open transaction must end first.
                first_event: set[asyncio.Future[Any]] = {task, asked}
                await asyncio.wait(first_event, return_when=asyncio.FIRST_COMPLETED)
            leave.set()
            [held] = await asyncio.gather(holder, return_exceptions=True)
            await asyncio.wait({task}, timeout=HANG_SECONDS)
            cancelled = was_cancelled(task, [asked.done() and asked.result()])
            await _wait_for_earlier_writes(store)
            entity = await get_existing(store, "items", "a")
            if isinstance(held, BaseException):
                assert isinstance(held, ConcurrencyConflictError)
            else:
                assert entity["count"] == 99, "a committed write is lost"
            assert entity["label"] in ("before", "after")
            if rest.reached or not cancelled:
                break
        await usable(store)

    async def test_72_a_cancelled_write_does_not_affect_its_batch(
        self, store: StorageStrategy
    ) -> None:
        """Of several writes that share one commit, one is cancelled, at each event-loop iteration."""
        ids = [f"neighbour {each}" for each in range(8)]
        await store.create_entities("items", [{"item_id": each} for each in ids])
        for count, turn in enumerate(turns(), 2):
            tasks = [
                asyncio.create_task(store.update_entity("items", each, {"count": count}))
                for each in ids
            ]
            asked: list[bool] = []
            with at_turn(turn, lambda: asked.append(tasks[3].cancel())):  # noqa: B023
                await asyncio.wait(tasks, timeout=HANG_SECONDS)
            versions = [each.result() for each in tasks if each is not tasks[3]]
            assert versions == [count] * 7
            cancelled = was_cancelled(tasks[3], asked)
            await _wait_for_earlier_writes(store, [("items", each) for each in ids])
            entity = await get_existing(store, "items", ids[3])
            if not cancelled:
                assert entity["count"] == count
                break
            # It was applied or not, never in part; and the next round needs equal versions.
            if entity.get("count") != count:
                await store.update_entity("items", ids[3], {"count": count})

    async def test_72_cancel_before_the_task_starts(self, store: StorageStrategy) -> None:
        """A write that is not part of a batch yet is removed from the queue."""
        task = asyncio.create_task(store.create_entity("items", {"item_id": "a"}))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await store.create_entity("items", {"item_id": "a"}) == 1

    # 126 ------------------------------------------------------------------------------------

    @pytest.mark.parametrize("name", _VERBS_ON_ONE)
    async def test_126_a_cancelled_write_is_not_applied_later(
        self, harness: Harness, store: StorageStrategy, name: str
    ) -> None:
        """Many writes are cancelled at random moments; a read right afterwards returns the final state."""
        ids = [f"late {each}" for each in range(_CANCELLED_TASKS)]
        work = _VERBS_ON_ONE[name]
        async with second_store(harness, store) as other:
            with seeded() as random:
                for number in range(_ROUNDS):
                    await store.import_entities(
                        "items", [{"item_id": each, "label": "before"} for each in ids]
                    )
                    tasks = [asyncio.create_task(_run_on(store, work, each)) for each in ids]
                    for _ in range(random.randrange(4)):
                        await asyncio.sleep(0)
                    await asyncio.sleep(random.choice((0, 0, 0.001, 0.005)))
                    chosen = random.sample(tasks, random.randrange(1, _CANCELLED_TASKS + 1))
                    for each in chosen:
                        each.cancel()
                    await asyncio.wait(chosen, timeout=HANG_SECONDS)
                    assert all(each.done() for each in chosen), "a cancelled task does not end"
                    cancelled_ids = [
                        each for each, task in zip(ids, tasks, strict=True) if task.cancelled()
                    ]
                    at_once = await payloads(store, "items", cancelled_ids)
                    await asyncio.wait(tasks, timeout=HANG_SECONDS)
                    for each in tasks:
                        _check_end_of_racing_task(each)
                    if number % 4 == 0:
                        await asyncio.sleep(0.05)
                    await _wait_for_earlier_writes(store, [("items", each) for each in ids])
                    assert await payloads(store, "items", cancelled_ids) == at_once
                    assert await payloads(other, "items", cancelled_ids) == at_once

    @pytest.mark.parametrize("name", _VERBS_ON_ONE)
    async def test_126_a_write_on_its_way_is_not_applied_after_its_cancellation(
        self, harness: Harness, store: StorageStrategy, name: str
    ) -> None:
        """It is cancelled after its request was sent, and before the engine has received it."""
        if not isinstance(harness, HoldsWrites):
            skip_fault(harness, HoldsWrites)
        await store.create_entity("items", {"item_id": "a", "label": "before"})
        async with second_store(harness, store) as other, asyncio.timeout(HANG_SECONDS):
            held = harness.hold_next_write()
            task = asyncio.create_task(_run_on(store, _VERBS_ON_ONE[name], "a"))
            await held.arrived()
            task.cancel()
            has_raised = await has_ended(task)
            at_once = await payloads(other, "items", ["a"]) if has_raised else None
            await held.release()
            await asyncio.wait({task})
            found = await payloads(other, "items", ["a"])
            if has_raised and task.cancelled():
                assert found == at_once, "it was applied after CancelledError was raised"
        await usable(store)

    async def test_126_after_a_timeout_of_the_caller_the_state_is_final(
        self, store: StorageStrategy
    ) -> None:
        """`asyncio.timeout` of the caller cancels the write, unlike the `timeout` of a verb."""
        await store.save_entity("items", {"item_id": "a", "count": -1})
        for number in range(40):
            try:
                async with asyncio.timeout(number / 4000):
                    await store.update_entity("items", "a", {"count": number})
            except TimeoutError:
                at_once = (await get_existing(store, "items", "a"))["count"]
                await _wait_for_earlier_writes(store, [("items", "a")])
                assert (await get_existing(store, "items", "a"))["count"] == at_once
            else:
                assert (await get_existing(store, "items", "a"))["count"] == number

    @pytest.mark.parametrize("end", ["timeout", "cancellation"])
    @pytest.mark.parametrize("name", _VERBS_WITH_TIMEOUT)
    async def test_126_a_write_is_withdrawn_while_it_waits(
        self, harness: Harness, store: StorageStrategy, name: str, end: str
    ) -> None:
        """Another store has what it waits for. What was not begun then is not applied later."""
        await store.create_entity("items", {"item_id": "a", "label": "before"})
        timeout = 0.05 if end == "timeout" else None
        async with second_store(harness, store) as other:
            entered, leave = asyncio.Event(), asyncio.Event()
            holder = asyncio.create_task(hold(other, entered, leave))
            await entered.wait()
            task = asyncio.create_task(_run_for(store, _VERBS_WITH_TIMEOUT[name], timeout))
            if not await has_ended(task):
                task.cancel()
                await has_ended(task)  # on some engines, it waits for the transaction
            leave.set()
            [held] = await asyncio.gather(holder, return_exceptions=True)
            assert held is None or isinstance(held, ConcurrencyConflictError)
            await asyncio.wait({task})
            error = None if task.cancelled() else task.exception()
            at_once = await payloads(store, "items", ["a"])
            await _wait_for_earlier_writes(store, [("items", "a")])
            if error is None:
                assert await payloads(other, "items", ["a"]) == at_once
            else:
                assert isinstance(error, OperationTimeoutError)
                if not error.outcome_unknown:
                    assert (await get_existing(store, "items", "a"))["label"] == "before"

    @pytest.mark.parametrize("name", _VERBS_WITH_TIMEOUT)
    async def test_126_a_write_that_waits_for_the_store_is_known_not_to_be_applied(
        self, harness: Harness, store: StorageStrategy, name: str
    ) -> None:
        """Another store is in a transaction with another entity. If the write waits for it, the engine has
        a lock of the whole store, and must not take changes before it: see `Engine.write_unblocked`."""
        if not is_shared(harness.capabilities):
            pytest.skip("another store of this engine has other data")
        await reset(store)
        entered, leave = asyncio.Event(), asyncio.Event()
        async with harness.store() as other, asyncio.timeout(HANG_SECONDS):
            holder = asyncio.create_task(hold(other, entered, leave, "b"))
            await entered.wait()
            error = await failure_of(_VERBS_WITH_TIMEOUT[name](store, 0.1))
            later = asyncio.create_task(store.save_entity("items", _C))
            if isinstance(error, OperationTimeoutError) and error.outcome_unknown:
                # It was slow, without having to wait, if a later one ends before the transaction.
                await asyncio.wait({later}, timeout=_SLOW_SECONDS)
                assert later.done(), "the changes were taken before the lock of the store was free"
            leave.set()
            [held] = await asyncio.gather(holder, return_exceptions=True)
            assert held is None or isinstance(held, ConcurrencyConflictError)
            assert await later == 1
        if error is not None:
            assert isinstance(error, OperationTimeoutError)
            if not error.outcome_unknown:
                assert (await get_existing(store, "items", "a"))["label"] == "before"

    # 73 -------------------------------------------------------------------------------------

    async def test_73_after_500_cancellations_the_whole_pool_is_usable(
        self, store: StorageStrategy
    ) -> None:
        await reset(store)
        works = [each.work for each in VERBS.values()]
        with seeded() as random:
            for _ in range(50):
                tasks = [asyncio.create_task(_run(store, random.choice(works))) for _ in range(10)]
                with at_turn(random.randrange(12), lambda: [each.cancel() for each in tasks]):  # noqa: B023
                    await asyncio.wait(tasks, timeout=HANG_SECONDS)
                for each in tasks:
                    assert each.done(), "a cancelled task does not end"
                    _check_end_of_racing_task(each)
        await _wait_for_earlier_writes(store)
        await usable(store, at_once=40)


# -- the state afterwards -------------------------------------------------------------------


async def _run(store: StorageStrategy, work: Verb) -> None:
    await work(store)


async def _run_on(store: StorageStrategy, work: VerbOnOne, entity_id: str) -> None:
    await work(store, entity_id)


async def _run_for(store: StorageStrategy, work: VerbWithTimeout, timeout: float | None) -> None:
    await work(store, timeout)


async def _cancel_everywhere(
    harness: Harness, store: StorageStrategy, verb: _Verb, *, and_on: bool = False
) -> None:
    """Cancel a verb at each event-loop iteration, until it ends before that; check the state after each
    attempt."""
    await reset(store)
    before = await _state(store)
    await _run(store, verb.work)
    after = await _state(store)
    assert verb.reads is False or before == after
    async with second_store(harness, store) as other:
        for turn in turns():
            if not verb.reads:
                await reset(store)
            cancelled = await cancelled_at(turn, _run(store, verb.work), and_on=and_on)
            if not (verb.reads and cancelled):
                at_once = await _state(store)
                await _wait_for_earlier_writes(store)
                for each in (store, other):
                    found = await _state(each)
                    _check_state(verb, before, found, after, cancelled=cancelled)
                    # Case 126: the state right after the cancellation is final.
                    assert found == at_once, "a write took effect after CancelledError was raised"
            if not cancelled:
                break
    await usable(store)


async def reset(store: StorageStrategy) -> None:
    """Store the items a and b and the counter n at version 1; delete the items c and d."""
    await asyncio.gather(
        store.import_entities("items", [{**_A, "version": 1}, {**_B, "version": 1}]),
        store.import_entities("counters", [{**_N, "version": 1}]),
        store.delete_entities("items", ["c", "d"]),
    )


async def _wait_for_earlier_writes(
    store: StorageStrategy, keys: Sequence[tuple[str, str]] = _KEYS
) -> None:
    """Wait until cancelled writes have ended: writes of one key are applied in order.

    The writes that this function makes fail, because no entity has that version.
    """
    writes = (
        store.update_entity(collection, entity_id, {}, expected_version=INT_MAX)
        for collection, entity_id in keys
    )
    for each in await asyncio.gather(*writes, return_exceptions=True):
        assert isinstance(each, ConcurrencyConflictError | EntityNotFoundError), repr(each)


async def _state(store: StorageStrategy) -> State:
    """The stored entities of `_KEYS`, with their versions."""
    items = [entity_id for collection, entity_id in _KEYS if collection == "items"]
    entities = [*await store.get_entities("items", items), await store.get_entity("counters", "n")]
    return dict(zip(_KEYS, map(_with_version, entities), strict=True))


def _with_version(entity: Entity | None) -> dict[str, object] | None:
    return None if entity is None else {**(payload(entity) or {}), "version": entity["version"]}


def _check_state(
    verb: _Verb, before: State, found: State, after: State, *, cancelled: bool
) -> None:
    if not cancelled:
        assert typed(_by_name(found)) == typed(_by_name(after))
    elif verb.atomic:
        assert found in (before, after), "the operation took effect in part"
    else:
        for key, each in found.items():
            assert each in (before[key], after[key])


def _by_name(state: State) -> dict[str, object]:
    return {f"{collection} {entity_id}": each for (collection, entity_id), each in state.items()}


def _check_end_of_racing_task(task: asyncio.Task[Any]) -> None:
    """Assert that a verb, racing with others, succeeded, was cancelled or failed by the race."""
    error = None if task.cancelled() else task.exception()
    lost = (ConcurrencyConflictError, EntityNotFoundError, AlreadyExistsError, BatchError)
    if error is not None and not isinstance(error, (*lost, AssertionError)):
        raise error


async def usable(store: StorageStrategy, *, at_once: int = 3) -> None:
    """Assert that reads, writes, queries and transactions succeed, several at the same time."""
    await reset(store)

    async def work(number: int) -> None:
        entity_id = f"usable {number}"

        async def write(tx: RepositoryInterface) -> None:
            await tx.save_entity("items", {"item_id": entity_id})
            await tx.get_entity("items", "a")

        await store.run_transaction(write)
        await store.delete_entity("items", entity_id)
        await store.query_entities("items", {"item_id": "a"})

    everything = asyncio.gather(*(work(each) for each in range(at_once)))
    await asyncio.wait_for(everything, HANG_SECONDS)


async def hold(
    store: StorageStrategy, entered: asyncio.Event, leave: asyncio.Event, entity_id: str = "a"
) -> None:
    """A transaction that has written and stays open until `leave` is set."""
    async with store.begin_transaction() as tx:
        await tx.update_entity("items", entity_id, {"count": 99})
        entered.set()
        await leave.wait()


async def _is_closed(store: StorageStrategy) -> bool:
    """Whether a read is refused at once; one that has begun is cancelled, because a coroutine that is only
    closed lets go on what the engine awaits in tasks of its own."""
    read = asyncio.create_task(_run(store, lambda store: store.get_entity("items", "a")))
    await asyncio.sleep(0)
    read.cancel()
    await asyncio.wait({read}, timeout=HANG_SECONDS)
    return not read.cancelled() and isinstance(read.exception(), StoreClosedError)
