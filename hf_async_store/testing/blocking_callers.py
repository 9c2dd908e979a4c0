"""Case 125: blocking callers, a suite of its own.

class TestMyEngine(BlockingContract):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> Harness:
        return MyHarness(tmp_path)
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

import pytest

from hf_async_store.errors import (
    BatchError,
    ClaimLostError,
    ConcurrencyConflictError,
    EventLoopMismatchError,
    InvalidInputError,
    LockTimeoutError,
    OperationTimeoutError,
    RetriesExhaustedError,
    StoreClosedError,
    TransactionAbortedError,
    TransactionReentryError,
)
from hf_async_store.query import Page, gt
from hf_async_store.sync import JSONStore, Store, Transaction, blocking_store
from hf_async_store.testing.assertions import no_complaints, payload
from hf_async_store.testing.concurrency import HANG_SECONDS, PATIENCE, is_shared
from hf_async_store.values import REMOVE

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from hf_async_store.testing.harness import Harness
    from hf_async_store.values import Entity

Result = TypeVar("Result")
Step: TypeAlias = "Callable[[Any], Any]"

_THREADS: Final = 64
_SAVES: Final = 10

_SINGLE_STEPS: Final[tuple[Step, ...]] = (
    lambda s: s.create_entity("items", {"item_id": "a", "count": 1, "label": "x"}),
    lambda s: s.save_entity("items", {"item_id": "b", "count": 2}, expected_version=0),
    lambda s: s.save_entity("items", {"item_id": "b", "count": 2, "data": [1, {"n": None}]}),
    lambda s: s.update_entity("items", "a", {"label": REMOVE, "count": 3}, expected_version=1),
    lambda s: s.get_entity("items", "a", timeout=60),
    lambda s: s.get_entity("items", "nobody"),
    lambda s: s.modify_entity("items", "a", lambda entity: {**entity, "label": "modified"}),
    lambda s: s.delete_entity("items", "nobody"),
    lambda s: s.create_entities("items", [{"item_id": f"c{n}", "count": n} for n in range(5)]),
    lambda s: s.save_entities("items", ({"item_id": f"c{n}"} for n in range(2)), {"c0": 1}),
    lambda s: s.update_entities("items", {"c1": {"count": 9}, "c2": {"count": 8}}),
    lambda s: s.get_entities("items", ["c1", "nobody", "c2"]),
    lambda s: s.delete_entities("items", iter(["c3", "nobody"])),
    lambda s: s.import_entities("items", [{"item_id": "old", "version": 7}]),
)
_QUERY_STEPS: Final[tuple[Step, ...]] = (
    lambda s: s.query_entities("items", {"count": gt(1)}, "-count", 3, fields=["count"]),
    lambda s: s.query_page("items", order_by="item_id", limit=2),
    lambda s: s.count_entities("items", {"count": gt(1)}),
    lambda s: s.stream_entities("items", order_by="item_id"),
    lambda s: s.stream_entities("items", {"count": gt(1)}, "count", limit=1),
)
_STORE_STEPS: Final[tuple[Step, ...]] = (
    lambda s: s.explain_query("items", {"label": "x"}),
    lambda s: s.exists(),
    lambda s: s.undeclared(),
    lambda s: s.describe(),
    lambda s: s.collections,
    lambda s: s.capabilities,
)
_REFUSED_STEPS: Final[tuple[Step, ...]] = (
    lambda s: s.create_entity("items", {"item_id": "a"}),
    lambda s: s.create_entities("items", [{"item_id": "a"}, {"item_id": "new"}]),
    lambda s: s.update_entity("items", "nobody", {}),
    lambda s: s.save_entity("items", {"item_id": "a"}, expected_version=1),
    lambda s: s.save_entity("items", {"item_id": "a", "x": float("nan")}),
    lambda s: s.save_entity("items", {"item_id": ""}),
    lambda s: s.get_entity("nobody", "a"),
    lambda s: s.get_entity("items", "a", timeout="soon"),
    lambda s: s.get_entity("items"),
    lambda s: s.query_entities("items", {"count": {"$gt": 1}}),
    lambda s: s.query_page("items", cursor="!"),
    lambda s: s.stream_entities("items", limit=-1),
    lambda s: s.modify_entity("items", "nobody", lambda entity: entity),
    lambda s: s.modify_entity("items", "a", None),
    lambda s: s.modify_entity("items", "a", lambda entity: 1 / 0),
    lambda s: s.modify_entity("items", "a", lambda entity: None),
    lambda s: s.run_transaction("work"),
    lambda s: s.begin_transaction("chaos"),
    lambda s: s.delete_entities("items", ["c0", "c1", "c2", "c4", "a", "b", "old", "new"]),
)


def _shown(value: object) -> object:
    """A result, without what differs from run to run: timestamps and cursors."""
    if isinstance(value, dict) and "item_id" in value:
        return payload(value), value["version"]
    if isinstance(value, list):
        return [_shown(each) for each in value]
    if isinstance(value, Page):
        return _shown(value.items), value.cursor is None
    return value


def _failure(exc: Exception) -> object:
    outcomes = [type(each) for each in exc.outcomes] if isinstance(exc, BatchError) else None
    return type(exc), str(exc), outcomes


def _answer(store: object, step: Step) -> object:
    try:
        result = step(store)
        return _shown(list(result) if hasattr(result, "__next__") else result)
    except Exception as exc:  # noqa: BLE001 - compared with that of the other store
        return _failure(exc)


async def _async_answer(store: object, step: Step) -> object:
    try:
        result = step(store)
        if hasattr(result, "__anext__"):
            return _shown([each async for each in result])
        return _shown(await result if inspect.isawaitable(result) else result)
    except Exception as exc:  # noqa: BLE001 - compared with that of the other store
        return _failure(exc)


async def _async_answers(harness: Harness, steps: tuple[Step, ...]) -> list[object]:
    async with harness.store() as store:
        return [await _async_answer(store, each) for each in steps]


async def _async_answers_in_transaction(harness: Harness, steps: tuple[Step, ...]) -> list[object]:
    answers: list[object] = []
    async with harness.store() as store:
        with suppress(ZeroDivisionError):
            async with store.begin_transaction() as tx:
                answers += [await _async_answer(tx, each) for each in steps]
                raise ZeroDivisionError
    return answers


def _in_threads(
    count: int, work: Callable[[int], Result], *, timeout: float = HANG_SECONDS
) -> list[Result]:
    """The results of `work(0)` to `work(count - 1)`, each called in a thread of its own."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count), timeout=timeout))


def _in_thread(work: Callable[[], Result]) -> Result:
    return _in_threads(1, lambda _: work())[0]


@contextmanager
def _transaction_in_another_thread(store: Store) -> Iterator[None]:
    """Another thread has a transaction that has changed item `a`, until this context is left."""
    changed, leave = threading.Event(), threading.Event()

    def work() -> None:
        with store.begin_transaction() as tx:
            tx.update_entity("items", "a", {"label": "held"})
            changed.set()
            assert leave.wait(HANG_SECONDS)

    with ThreadPoolExecutor(1) as pool:
        holder = pool.submit(work)
        assert changed.wait(HANG_SECONDS)
        try:
            yield
        finally:
            leave.set()
        holder.result(HANG_SECONDS)


def _event_loop_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if "event-loop" in each.name]


_ERRORS_OF_EXIT: Final = ("Traceback", "never awaited", "destroyed", "ignored", "Fatal")

_INTERRUPTED_PROGRAM: Final = """
import os, signal, sys, threading, time
from hf_async_store.sync import open_store

signal.signal(signal.SIGINT, signal.default_int_handler)

def interrupted(call):
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    began = time.monotonic()
    try:
        call()
    except KeyboardInterrupt:
        return time.monotonic() - began < 10
    finally:
        timer.join()

def labels(store):
    return store.get_entity("templates", "a").get("label"), store.get_entity("templates", "b")

def sleep_in(tx):
    tx.update_entity("templates", "a", {"label": "wrong"})
    time.sleep(30)

def stay_in_transaction(store):
    with store.begin_transaction() as tx:
        sleep_in(tx)

def wait_for_writer(store):
    entered, leave = threading.Event(), threading.Event()
    def hold():
        with store.begin_transaction() as tx:
            tx.update_entity("templates", "a", {"label": "held"})
            entered.set()
            leave.wait()
    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait()
    def write():
        with store.begin_transaction() as tx:
            tx.update_entity("templates", "a", {"label": "wrong"})
            time.sleep(30)  # the engine may not wait for the other transaction
    try:
        print(interrupted(write))
    finally:
        leave.set()
        holder.join()

with open_store(sys.argv[1]) as store:
    store.save_entity("templates", {"template_id": "a", "label": "right"})
    print(interrupted(lambda: stay_in_transaction(store)))
    print(interrupted(lambda: store.run_transaction(sleep_in)))
    print(interrupted(lambda: store.modify_entity("templates", "a", lambda entity: time.sleep(30))))
    print(labels(store))
    wait_for_writer(store)
    print(labels(store), store.update_entity("templates", "a", {"label": "usable"}))
print(interrupted(lambda: time.sleep(30)), threading.active_count())
"""

_UNCLOSED_PROGRAM: Final = """
import sys, threading
from contextlib import suppress
from hf_async_store import StorageError
from hf_async_store.sync import open_store

store = open_store(sys.argv[1]).open()
store.save_entity("templates", {"template_id": "acknowledged"})
how = sys.argv[2]
if how == "transaction":
    tx = store.begin_transaction().__enter__()
    tx.save_entity("templates", {"template_id": "never"})
elif how == "stream":
    stream = store.stream_entities("templates")
    next(stream)
elif how == "threads":
    saved = threading.Event()
    def work():
        with suppress(StorageError):
            while True:
                store.save_entity("templates", {"template_id": "other"})
                saved.set()
    for _ in range(4):
        threading.Thread(target=work, daemon=True).start()
    saved.wait()
elif how == "abandon":
    store.abandon()
elif how == "exit":
    sys.exit(3)
"""


def _program(text: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a program."""
    ended = subprocess.run(  # noqa: S603 - the programs above
        [sys.executable, "-X", "dev", "-c", text, *arguments],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.hf_sampled
class BlockingContract:
    """Case 125."""

    @pytest.fixture
    def harness(self) -> Harness:
        raise NotImplementedError(
            "a subclass of BlockingContract must define the fixture `harness`"
        )

    @pytest.fixture(autouse=True)
    def _nothing_is_left(self, harness: Harness) -> Generator[None, None, None]:
        with no_complaints():
            yield
            gc.collect(1)
            assert _event_loop_threads() == []
            assert harness.leaks() == []

    @pytest.fixture
    def store(self, harness: Harness, _nothing_is_left: None) -> Generator[Store, None, None]:
        with blocking_store(harness.store()) as store:
            yield store

    # -- the same answers and errors ---------------------------------------------------------

    def test_125_the_same_answers_and_errors(self, harness: Harness) -> None:
        steps = (*_SINGLE_STEPS, *_QUERY_STEPS, *_STORE_STEPS, *_REFUSED_STEPS)
        expected = asyncio.run(_async_answers(harness, steps))
        with blocking_store(harness.store()) as store:
            for step, answer in zip(steps, expected, strict=True):
                assert _answer(store, step) == answer, inspect.getsource(step)

    def test_125_the_same_answers_and_errors_in_a_transaction(self, harness: Harness) -> None:
        steps = (
            (*_SINGLE_STEPS, *_QUERY_STEPS) if self._queries_own_writes(harness) else _SINGLE_STEPS
        )
        steps = (*steps, *_REFUSED_STEPS[:1], *steps)
        expected = asyncio.run(_async_answers_in_transaction(harness, steps))
        with (
            blocking_store(harness.store()) as store,
            suppress(ZeroDivisionError),
            store.begin_transaction() as tx,
        ):
            for step, answer in zip(steps, expected, strict=True):
                assert _answer(tx, step) == answer, inspect.getsource(step)
            raise ZeroDivisionError

    @staticmethod
    def _queries_own_writes(harness: Harness) -> bool:
        return harness.capabilities.queries_in_transaction != "outside"

    def test_125_timeouts(self, store: Store) -> None:
        store.save_entity("items", {"item_id": "a"})
        # An engine may let the first writer win: then the transaction fails.
        with (
            suppress(ConcurrencyConflictError),
            _transaction_in_another_thread(store),
            suppress(OperationTimeoutError),
        ):
            store.update_entity("items", "a", {"label": "rival"}, timeout=0.05)
        assert store.get_entity("items", "a", timeout=60) is not None

    # -- lifecycle ---------------------------------------------------------------------------

    def test_125_opening_and_closing(self, harness: Harness) -> None:
        store = blocking_store(harness.store())
        with pytest.raises(StoreClosedError, match="not open"):
            store.get_entity("items", "a")
        assert _event_loop_threads() == []
        with store:
            store.save_entity("items", {"item_id": "a"})
            stream = store.stream_entities("items")
            with pytest.raises(StoreClosedError):
                store.open()
            with blocking_store(harness.store()) as other:
                assert len(_event_loop_threads()) == 1
                assert store.is_same_store(store)
                assert store.is_same_store(other) is is_shared(harness.capabilities)
        store.close()
        for refused in (
            lambda: store.get_entity("items", "a"),
            lambda: store.begin_transaction(),
            lambda: store.stream_entities("items"),
            lambda: next(stream),
            lambda: store.open(),
        ):
            with pytest.raises(StoreClosedError):
                refused()
        never_opened = blocking_store(harness.store())
        never_opened.close()
        with pytest.raises(StoreClosedError):
            never_opened.open()

    def test_125_closing_while_other_threads_use_the_store(self, harness: Harness) -> None:
        store = blocking_store(harness.store()).open()
        begun = threading.Barrier(5, timeout=HANG_SECONDS)

        def work(number: int) -> int:
            begun.wait()
            acknowledged = 0
            if number:
                with suppress(StoreClosedError):
                    while True:
                        acknowledged += store.save_entity(
                            "items", {"item_id": f"{number}-{acknowledged}"}
                        )
            else:
                store.close()
            return acknowledged

        counts = _in_threads(5, work)
        if is_shared(harness.capabilities):
            with blocking_store(harness.store()) as again:
                for number, count in enumerate(counts):
                    ids = [f"{number}-{each}" for each in range(count)]
                    assert None not in again.get_entities("items", ids)

    # -- threads -----------------------------------------------------------------------------

    def test_125_threads_share_commits(self, store: Store) -> None:
        writes = store._target._writes
        run, sizes = writes._run, []

        async def counted(take: Any) -> Any:
            sizes.append(len(take()))
            await asyncio.sleep(0.005)  # as a disk or a network takes
            return await run(take)

        writes._run = counted
        begun = threading.Barrier(_THREADS, timeout=HANG_SECONDS)

        def work(number: int) -> None:
            begun.wait()
            for each in range(_SAVES):
                version = store.save_entity("items", {"item_id": f"{number}-{each}"})
                assert version == 1

        _in_threads(_THREADS, work)
        assert sum(sizes) == _THREADS * _SAVES
        # Tasks would form batches of all threads, or of the engine's maximum.
        most = min(_THREADS, store.capabilities.write_batch)
        assert len(sizes) <= 4 * sum(sizes) / most, sizes

    def test_125_threads_compete_for_an_entity(self, store: Store) -> None:
        for each in ("modified", "in transactions"):
            store.save_entity("counters", {"counter_id": each, "n": 0})

        def increment(entity: Entity) -> Entity:
            n = entity["n"]
            assert isinstance(n, int)
            return {**entity, "n": n + 1}

        def in_transaction(tx: Transaction) -> None:
            entity = tx.get_entity("counters", "in transactions")
            assert entity is not None
            tx.save_entity("counters", increment(entity))

        def work(number: int) -> None:
            for each in range(4):
                if (number + each) % 2:
                    store.modify_entity("counters", "modified", increment)
                else:
                    store.run_transaction(in_transaction)

        _in_threads(8, work)
        found = store.get_entities("counters", ["modified", "in transactions"])
        assert [each and each["n"] for each in found] == [16, 16]

    def test_125_a_transaction_belongs_to_its_thread(self, store: Store) -> None:
        store.save_entity("items", {"item_id": "a", "label": "old"})
        with store.begin_transaction() as tx:
            tx.update_entity("items", "a", {"label": "new"})
            for refused in (
                lambda: store.get_entity("items", "a"),
                lambda: store.save_entity("items", {"item_id": "b"}),
                lambda: list(store.stream_entities("items")),
                lambda: store.begin_transaction().__enter__(),
                lambda: store.run_transaction(lambda other: None),
            ):
                with pytest.raises(TransactionReentryError):
                    refused()
            seen = _in_thread(lambda: store.get_entity("items", "a"))
            assert payload(seen) == {"item_id": "a", "label": "old"}
            with store.begin_transaction(read_only=True) as snapshot:
                assert payload(snapshot.get_entity("items", "a")) == payload(seen)
        assert payload(store.get_entity("items", "a")) == {"item_id": "a", "label": "new"}

    def test_125_threads_that_have_ended_leave_nothing(self, store: Store) -> None:
        _in_threads(8, lambda _: store.get_entity("items", "a"))
        loop_thread = store._opened()
        for _ in range(100):
            store.get_entity("items", "a")
            if len(loop_thread.callers) == 1:
                return
            threading.Event().wait(0.02)
        raise AssertionError(f"{len(loop_thread.callers)} tasks are left")

    def test_125_threads_in_one_transaction_take_turns(self, store: Store) -> None:
        with store.begin_transaction() as tx:
            _in_threads(8, lambda n: tx.save_entity("items", {"item_id": str(n)}))
            assert tx.get_entity("items", "7") is not None
        assert None not in store.get_entities("items", map(str, range(8)))

    def test_125_transactions_and_savepoints(self, store: Store) -> None:
        store.save_entity("items", {"item_id": "a"})
        with pytest.raises(ZeroDivisionError), store.begin_transaction() as tx:
            tx.delete_entity("items", "a")
            raise ZeroDivisionError
        with pytest.raises(KeyboardInterrupt), store.begin_transaction() as tx:
            tx.delete_entity("items", "a")
            raise KeyboardInterrupt
        with pytest.raises(TransactionAbortedError), store.begin_transaction() as tx:
            tx.delete_entity("items", "a")
            with suppress(Exception):
                tx.update_entity("items", "nobody", {})
        entity = store.get_entity("items", "a")
        assert entity is not None
        if not store.capabilities.savepoints:
            return
        with store.begin_transaction() as tx:
            with suppress(ZeroDivisionError), tx.begin_transaction() as nested:
                nested.update_entity("items", "a", {"label": "never"})
                raise ZeroDivisionError
            with tx.begin_transaction() as nested:
                nested.save_entity("items", {"item_id": "b"})
                with pytest.raises(TransactionReentryError):
                    tx.get_entity("items", "a")
            assert tx.get_entity("items", "a") == entity
            assert tx.conditional_update("items", "a", {"label": "x"}) == 2
        assert None not in store.get_entities("items", ["a", "b"])

    # -- functions of the caller -------------------------------------------------------------

    def test_125_functions_are_called_in_the_calling_thread(self, store: Store) -> None:
        store.save_entity("items", {"item_id": "a", "count": 0})
        threads: list[threading.Thread] = []

        def items() -> Iterator[dict[str, object]]:
            item: dict[str, object] = {"data": []}
            for number in range(3):
                threads.append(threading.current_thread())
                assert store.get_entity("items", "a") is not None
                data = item["data"]
                assert isinstance(data, list)
                data.append(number)
                yield {**item, "item_id": str(number)}

        def change(entity: Entity) -> Entity:
            threads.append(threading.current_thread())
            assert store.count_entities("counters") == 0  # other calls of the store are possible
            with store.begin_transaction(read_only=True) as tx:
                tx.get_entity("items", "a")
            return {**entity, "count": 1}

        def work(tx: Transaction) -> int:
            threads.append(threading.current_thread())
            with pytest.raises(TransactionReentryError):
                store.get_entity("items", "a")
            return tx.modify_entity("items", "a", lambda entity: {**entity, "count": 2})

        def transform(entity: Entity) -> dict[str, object]:
            threads.append(threading.current_thread())
            assert store.get_entity("items", str(entity["item_id"])) is not None
            return {"label": "new"} if "label" not in entity else {}

        store.save_entities("items", items())
        assert store.modify_entity("items", "a", change) == 2
        assert store.run_transaction(work) == 3
        reported: list[int] = []
        transformed = store.apply_schema(
            lambda change, done, total: reported.append(done), transform={"items": transform}
        )
        assert transformed == 4
        assert 4 in reported
        assert store.count_entities("items", {"label": "new"}) == 4
        assert set(threads) == {threading.current_thread()}
        found = store.get_entities("items", ["0", "1", "2"])
        assert [each and each["data"] for each in found] == [[0], [0, 1], [0, 1, 2]]

    def test_125_functions_that_fail_or_are_not_plain(self, store: Store) -> None:
        store.save_entity("items", {"item_id": "a"})

        def fails(tx: Transaction) -> None:
            tx.delete_entity("items", "a")
            raise ZeroDivisionError

        async def coroutine(argument: object) -> None:
            del argument

        is_async: Any = coroutine
        with pytest.raises(ZeroDivisionError):
            store.run_transaction(fails)
        with pytest.raises(InvalidInputError, match="async"):
            store.run_transaction(is_async)
        with pytest.raises(InvalidInputError, match="async"):
            store.modify_entity("items", "a", is_async)
        with pytest.raises(InvalidInputError, match="async"):
            store.apply_schema(transform={"items": is_async})
        assert store.delete_entity("items", "a", expected_version=1)

    def test_125_a_function_is_called_again_after_a_conflict(self, store: Store) -> None:
        store.save_entity("items", {"item_id": "a", "count": 0})
        calls = []

        def change(entity: Entity) -> Entity:
            calls.append(entity["version"])
            if len(calls) == 1:
                store.update_entity("items", "a", {"label": "rival"})
            return {**entity, "count": 1}

        assert store.modify_entity("items", "a", change) == 3
        assert calls == [1, 2]

        def always_late(entity: Entity) -> Entity:
            store.update_entity("items", "a", {"label": "rival"})
            return {**entity, "count": 2}

        with pytest.raises(RetriesExhaustedError):
            store.modify_entity("items", "a", always_late, retry_seconds=0.05)

    # -- streams, snapshots, locks -----------------------------------------------------------

    def test_125_streams(self, store: Store) -> None:
        store.create_entities("items", [{"item_id": f"{n:03}"} for n in range(150)])
        self._until(store, 150)
        ids = [each["item_id"] for each in store.stream_entities("items", order_by="item_id")]
        assert ids == [f"{n:03}" for n in range(150)]
        for _ in store.stream_entities("items"):
            break
        with store.stream_entities("items") as stream:
            next(stream)
            assert _in_thread(lambda: next(stream)) is not None
            _in_thread(stream.close)
            stream.close()
            with pytest.raises(StopIteration):
                next(stream)
        stream = store.stream_entities("items")
        read = _in_threads(4, lambda _: [each["item_id"] for each in stream])
        assert sorted(str(each) for part in read for each in part) == ids
        dropped = store.stream_entities("items")
        next(dropped)
        del dropped
        unread = store.stream_entities("items", order_by="item_id")
        next(unread)
        store.close()
        with pytest.raises(StoreClosedError):
            list(unread)

    @staticmethod
    def _until(store: Store, count: int) -> None:
        """Queries may be eventually consistent."""
        for _ in range(100):
            if store.count_entities("items") == count:
                return
            threading.Event().wait(0.1)

    def test_125_snapshots(self, store: Store) -> None:
        store.save_entity("items", {"item_id": "a", "label": "old"})
        self._until(store, 1)
        with store.snapshot() as snapshot:
            key = store.collections["items"].key_of("a")
            assert snapshot.fetch([key])[0] is not None  # it begins with the first read
            _in_thread(lambda: store.update_entity("items", "a", {"label": "new"}))
            record = snapshot.fetch([key])[0]
            assert record is not None
            if store.capabilities.query_isolation == "snapshot":
                assert record.entity["label"] == "old"

    def test_125_locks(self, store: Store) -> None:
        if not isinstance(store, JSONStore):
            pytest.skip("the engine has no acquire_write_lock")
        store.save_entity("items", {"item_id": "a"})
        with store.acquire_write_lock():
            data = store.read_file()
            data["items"]["b"] = {"item_id": "b", "version": 1}
            store.write_file(data)
            with pytest.raises(TransactionReentryError):
                store.get_entity("items", "a")

            def lock() -> None:
                with store.acquire_read_lock(timeout=PATIENCE):
                    pass

            with pytest.raises(LockTimeoutError):
                _in_thread(lock)
        with store.acquire_read_lock():
            assert set(store.read_file()["items"]) == {"a", "b"}
        store.checkpoint()
        assert isinstance(store.backups(), list)

    # -- event loops, processes, signals -----------------------------------------------------

    def test_125_claims_and_named_locks(self, store: Store) -> None:
        if not store.capabilities.claims:
            pytest.skip("the engine has no claims")
        for each in "ab":
            store.create_entity("items", {"item_id": each})
        [claim] = store.claim_entities("items", {"item_id": "a"}, lease=1.5)
        with claim:
            time.sleep(2)  # it is renewed meanwhile
            assert claim.update({"count": 1}) == claim.version == 2
            with claim.transaction() as tx:
                tx.update_entity("items", "b", {"count": 1})
            claim.finish({"label": "done"})
        assert store.claims("items") == []
        [claim] = store.claim_entities("items", {"item_id": "a"}, lease=0.6)
        with pytest.raises(ClaimLostError), claim:
            assert store.break_claim("items", claim.id)
            time.sleep(0.5)
        with pytest.raises(ZeroDivisionError), store.lock("x"):
            raise ZeroDivisionError
        with store.lock("x") as held, store.permits("x", 1):
            assert (held.collection, held.id) == ("hf_locks", "x")
            with pytest.raises(LockTimeoutError), store.lock("x", timeout=0.01):
                pass
        assert store.claims("hf_locks") == []

    def test_125_in_a_running_event_loop_it_is_refused(self, harness: Harness) -> None:
        store = blocking_store(harness.store()).open()
        tx = store.begin_transaction()
        stream = store.stream_entities("items")

        async def use() -> None:
            for refused in (
                lambda: store.get_entity("items", "a"),
                lambda: store.modify_entity("items", "a", lambda entity: entity),
                lambda: store.run_transaction(lambda tx: None),
                lambda: next(stream),
                lambda: tx.__enter__(),
                lambda: store.close(),
                lambda: blocking_store(harness.store()).open(),
                lambda: blocking_store(harness.store()).get_entity("items", "a"),
            ):
                with pytest.raises(EventLoopMismatchError, match="event loop"):
                    refused()
            assert await asyncio.to_thread(store.save_entity, "items", {"item_id": "a"}) == 1

        asyncio.run(use())
        store.close()

    def test_125_after_a_fork_it_is_refused(self, store: Store) -> None:
        store.save_entity("items", {"item_id": "a"})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # about forks with threads
            child = os.fork()
        if not child:
            code = 1
            try:
                refused: list[Callable[[], object]] = [
                    lambda: store.get_entity("items", "a"),
                    lambda: store.begin_transaction().__enter__(),
                    lambda: store.run_transaction(lambda tx: None),
                    store.close,
                ]
                for each in refused:
                    with pytest.raises(EventLoopMismatchError, match="fork"):
                        each()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert store.save_entity("items", {"item_id": "a"}) == 2

    @pytest.mark.parametrize("how", ["ends", "transaction", "stream", "threads", "abandon", "exit"])
    def test_125_an_unclosed_store_lets_the_process_end(self, harness: Harness, how: str) -> None:
        url = harness.url()
        if url is None:
            pytest.skip("the engine does not declare multi_process")
        code, _, errors = _program(_UNCLOSED_PROGRAM, url, how)
        assert code == (3 if how == "exit" else 0), errors
        assert ("ResourceWarning: unclosed store" in errors) is (how != "abandon")
        assert not [each for each in _ERRORS_OF_EXIT if each in errors], errors
        with blocking_store(harness.store()) as store:
            assert store.get_entity("templates", "acknowledged") is not None
            assert store.get_entity("templates", "never") is None

    def test_125_ctrl_c_cancels_the_call(self, harness: Harness) -> None:
        url = harness.url() or "memory:"
        code, output, errors = _program(_INTERRUPTED_PROGRAM, url)
        assert code == 0, errors
        assert output.splitlines() == [
            "True",
            "True",
            "True",
            "('right', None)",
            "True",
            "('held', None) 3",
            "True 1",
        ], errors
