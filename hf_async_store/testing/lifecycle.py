"""Cases 70, 74 to 76 and 134: errors, opening and closing, and the identity of a store.

Case 71, the error class for each failure of a disk or server, is covered by the tests of each
engine, because only they can cause such failures.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import pickle
import sys
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from urllib.parse import urlsplit

import pytest

from hf_async_store.errors import (
    AlreadyExistsError,
    BatchError,
    ConcurrencyConflictError,
    EntityNotFoundError,
    EventLoopMismatchError,
    InvalidCursorError,
    InvalidFieldError,
    InvalidKeyError,
    InvalidQueryError,
    InvalidVersionError,
    OperationTimeoutError,
    ReferenceViolationError,
    RetriesExhaustedError,
    StorageError,
    StoreClosedError,
    TransactionAbortedError,
    TransactionClosedError,
    TransactionReentryError,
    TransactionTooLargeError,
    UnknownCollectionError,
    UnsupportedValueError,
)
from hf_async_store.strategies import open_store
from hf_async_store.testing.assertions import (
    all_refused_at_once,
    done_at_once,
    get_existing,
    nothing_is_left,
    payload,
    payloads,
    refused_at_once,
)
from hf_async_store.testing.cancellation import hold, reset, usable
from hf_async_store.testing.concurrency import (
    HANG_SECONDS,
    has_ended,
    is_shared,
    second_store,
)
from hf_async_store.testing.harness import CONTRACT_COLLECTIONS, Harness, ObservesIO
from hf_async_store.testing.process_workers import run_workers
from hf_async_store.values import normalise

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from hf_async_store.strategy import StorageStrategy

Verb: TypeAlias = "Callable[[StorageStrategy], Awaitable[object]]"

SECRET: Final = "s3cr3t-0f-the-caller"  # noqa: S105 - must never appear in errors or logs
_DRIVERS: Final = (
    "sqlalchemy",
    "aiosqlite",
    "sqlite3",
    "asyncpg",
    "aiobotocore",
    "botocore",
    "aiohttp",
    "rich",
    "pytest",
)


class LifecycleContract:
    """Errors, and opening and closing of a store."""

    # 70 -------------------------------------------------------------------------------------

    async def test_70_the_properties_of_every_error(self, store: StorageStrategy) -> None:
        await store.create_entity("templates", {"template_id": "t", "name": SECRET})
        await store.create_entity("requests", {"request_id": "r", "template_id": "t"})
        await store.create_entity("items", {"item_id": "a", "label": SECRET, "x": [SECRET]})
        for kind, cause in _CALLS_BY_ERROR.items():
            if kind is ReferenceViolationError and not store.capabilities.references:
                continue
            if kind is TransactionTooLargeError and not store.capabilities.max_transaction_changes:
                continue
            _check_error(await _error_of(kind, cause(store)))

    async def test_70_errors_of_a_store_that_is_closed(self, harness: Harness) -> None:
        async with harness.store() as store:
            pass
        _check_error(await _error_of(StoreClosedError, store.get_entity("items", "a")))

    async def test_70_a_timeout_reports_whether_the_write_was_applied(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        await store.create_entity("items", {"item_id": "a", "count": 0})
        timed_out: OperationTimeoutError | None = None
        async with second_store(harness, store) as other:
            with suppress(ConcurrencyConflictError):
                async with store.begin_transaction() as tx:
                    await tx.update_entity("items", "a", {"count": 1})
                    # If it does not have to wait for the transaction, it does not time out.
                    rival = asyncio.create_task(
                        other.update_entity("items", "a", {"label": "rival"}, timeout=0.05)
                    )
                    await has_ended(rival)
            try:
                await rival
            except OperationTimeoutError as exc:
                timed_out = exc
        entity = await get_existing(store, "items", "a")
        if timed_out is None:
            assert entity["label"] == "rival"
        else:
            assert timed_out.retryable is not timed_out.outcome_unknown
            assert timed_out.outcome_unknown or "label" not in entity
            _check_error(timed_out)

    async def test_70_a_sufficient_timeout_raises_no_error(self, store: StorageStrategy) -> None:
        await store.create_entity("items", {"item_id": "a"}, timeout=60)
        assert await store.get_entity("items", "a", timeout=60) is not None
        assert len(await store.query_entities("items", {"item_id": "a"}, timeout=60)) == 1
        async with store.begin_transaction() as tx:
            assert await tx.update_entity("items", "a", {}, timeout=60) == 2

    async def test_70_logs_and_descriptions_contain_no_secret(
        self, harness: Harness, store: StorageStrategy, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.DEBUG, logger="hf_async_store"):
            await store.save_entity("items", {"item_id": "a", "label": SECRET, "x": SECRET})
            await store.query_entities("items", {"label": SECRET})
            with suppress(StorageError):
                await store.create_entity("items", {"item_id": "a", "label": SECRET})
            shown = f"{store!r} {store.describe()} {await store.health()}"
        records = [each for each in caplog.records if each.name.startswith("hf_async_store")]
        shown += " ".join(f"{each.getMessage()} {each.__dict__}" for each in records)
        assert SECRET not in shown
        password = urlsplit(harness.url() or "").password
        assert not password or password not in shown

    async def test_70_what_a_store_tells_of_itself(self, store: StorageStrategy) -> None:
        """`health` and `describe` of one that works: no problem, and nothing that is stored, as JSON."""
        await store.save_entity("items", {"item_id": "a", "label": SECRET})
        for told in (await store.health(), store.describe()):
            assert told.get("problems", []) == []
            assert normalise(told) == told, "it cannot be written as JSON"
            assert SECRET not in str(told)

    # 74 -------------------------------------------------------------------------------------

    async def test_74_a_second_close_does_nothing(self, harness: Harness) -> None:
        store = await harness.store().open()
        await store.save_entity("items", {"item_id": "a"})
        await store.close()
        await store.close()
        await nothing_is_left(harness)

    async def test_74_two_closes_at_once(self, harness: Harness) -> None:
        store = await harness.store().open()
        writes = [
            asyncio.create_task(store.save_entity("items", {"item_id": str(each)}))
            for each in range(10)
        ]
        await asyncio.sleep(0)
        await asyncio.gather(store.close(), store.close())
        assert await asyncio.gather(*writes) == [1] * 10, "a submitted write was not completed"
        await nothing_is_left(harness)

    async def test_74_close_of_a_store_that_was_never_open(self, harness: Harness) -> None:
        store = harness.store()
        await store.close()
        with pytest.raises(StoreClosedError):
            await store.open()

    async def test_74_use_after_close(self, harness: Harness) -> None:
        async with harness.store() as store:
            await store.save_entity("items", {"item_id": "a"})
            tx = store.begin_transaction()
            rows = store.stream_entities("items")
        _check_all_verbs_refuse(store)
        refused_at_once(tx.__aenter__(), StoreClosedError)
        refused_at_once(anext(rows), StoreClosedError)
        with pytest.raises(StoreClosedError):
            await store.open()

    async def test_74_use_before_open(self, harness: Harness) -> None:
        store = harness.store()
        _check_all_verbs_refuse(store)
        async with store:
            assert await store.get_entity("items", "a") is None
            with pytest.raises(StoreClosedError):
                await store.open()

    async def test_74_use_from_another_loop(self, store: StorageStrategy) -> None:
        await store.save_entity("items", {"item_id": "a"})

        async def use() -> None:
            all_refused_at_once(
                EventLoopMismatchError,
                store.get_entity("items", "a"),
                store.save_entity("items", {"item_id": "a"}),
                store.query_entities("items"),
                store.begin_transaction().__aenter__(),
            )

        await asyncio.to_thread(asyncio.run, use())
        assert await store.save_entity("items", {"item_id": "a"}) == 2

    async def test_74_close_in_another_loop(self, store: StorageStrategy) -> None:
        """It is refused, and the store stays usable. (Typically, a fixture has another loop.)"""
        await store.save_entity("items", {"item_id": "a"})

        async def close() -> None:
            with pytest.raises(EventLoopMismatchError):
                await store.close()

        await asyncio.to_thread(asyncio.run, close())
        assert await store.save_entity("items", {"item_id": "a"}) == 2

    async def test_74_a_transaction_in_another_loop(self, store: StorageStrategy) -> None:
        await reset(store)
        async with store.begin_transaction() as tx:
            await tx.update_entity("items", "a", {"label": "ours"})

            async def use() -> None:
                all_refused_at_once(
                    EventLoopMismatchError,
                    tx.get_entity("items", "a"),
                    tx.save_entity("items", {"item_id": "a"}),
                    tx.query_entities("items"),
                    tx.__aexit__(None, None, None),
                )
                with pytest.raises(EventLoopMismatchError):
                    tx.begin_transaction()

            await asyncio.to_thread(asyncio.run, use())
        assert (await get_existing(store, "items", "a"))["label"] == "ours"

    async def test_70_reads_that_time_out_have_no_unknown_outcome(
        self, store: StorageStrategy
    ) -> None:
        await reset(store)
        for seconds in (0, 0.0001, 0.001):
            for read in (
                lambda at: store.get_entity("items", "a", timeout=at),
                lambda at: store.get_entities("items", ["a", "b"], timeout=at),
                lambda at: store.query_entities("items", {"label": "before"}, timeout=at),
                lambda at: store.query_page("items", timeout=at),
                lambda at: store.count_entities("items", timeout=at),
            ):
                await _succeeds_or_times_out(read(seconds))
            with suppress(TransactionAbortedError):
                async with store.begin_transaction() as tx:
                    await _succeeds_or_times_out(tx.get_entity("items", "a", timeout=seconds))
        await usable(store)

    async def test_70_a_write_that_times_out_in_the_queue_is_not_applied(
        self, store: StorageStrategy
    ) -> None:
        await store.save_entity("items", {"item_id": "a", "count": -1})
        for number in range(40):
            before = (await get_existing(store, "items", "a"))["count"]
            first = asyncio.create_task(store.update_entity("items", "a", {"label": "first"}))
            await asyncio.sleep(0)
            try:
                await store.update_entity("items", "a", {"count": number}, timeout=number / 8000)
            except OperationTimeoutError as exc:
                _check_error(exc)
                await first
                await store.update_entity(
                    "items", "a", {}
                )  # applied after the update, if that was sent
                if not exc.outcome_unknown:
                    assert (await get_existing(store, "items", "a"))["count"] == before
            else:
                await first
                assert (await get_existing(store, "items", "a"))["count"] == number

    async def test_74_use_after_a_fork(self, harness: Harness) -> None:
        url = harness.url()
        if url is None:
            pytest.skip("the engine does not declare multi_process")
        [result] = await run_workers(url, ("fork", {"name": "parent"}))
        assert result == {"not refused in the child": None, "version in the parent": 2}

    async def test_74_an_abandoned_stream_releases_its_resources(
        self, store: StorageStrategy
    ) -> None:
        await store.create_entities("items", [{"item_id": f"{each:03}"} for each in range(300)])
        for _ in range(30):  # more than any pool has connections
            async for _row in store.stream_entities("items"):
                break
        gc.collect(1)
        await _wait_for_other_tasks()
        await usable(store)
        assert await store.save_entity("items", {"item_id": "000"}) == 2

    async def test_74_an_abandoned_stream_in_a_transaction_releases_its_resources(
        self, store: StorageStrategy
    ) -> None:
        await store.create_entities("items", [{"item_id": f"{each:03}"} for each in range(300)])
        async with store.begin_transaction() as tx:
            async for _row in tx.stream_entities("items"):
                break
            gc.collect(1)
            await tx.save_entity("items", {"item_id": "000"})
        await _wait_for_other_tasks()
        await usable(store)

    async def test_74_close_with_a_transaction_open(self, harness: Harness) -> None:
        """The transaction may commit or fail, but an acknowledged commit must not be lost."""
        store = await harness.store().open()
        entered, leave = asyncio.Event(), asyncio.Event()
        await reset(store)
        holder = asyncio.create_task(hold(store, entered, leave))
        await entered.wait()
        closing = asyncio.create_task(store.close())
        await has_ended(closing)
        leave.set()
        await asyncio.wait({closing, holder}, timeout=HANG_SECONDS)
        assert closing.done(), "close does not end"
        closing.result()
        error = holder.exception()
        assert error is None or isinstance(error, StorageError)
        await nothing_is_left(harness)
        if is_shared(harness.capabilities):
            async with harness.store() as fresh:
                committed = (await get_existing(fresh, "items", "a")).get("count") == 99
            assert committed or error is not None

    # 75 -------------------------------------------------------------------------------------

    @pytest.mark.parametrize("attempt", range(3))
    async def test_75_three_processes_open_a_new_store_at_once(
        self, harness: Harness, attempt: int
    ) -> None:
        url = harness.url()
        assert (url is not None) is harness.capabilities.multi_process
        if url is None:
            pytest.skip("the engine does not declare multi_process")
        names = [f"process {each}" for each in range(3)]
        results = await run_workers(url, *(("first-use", {"name": each}) for each in names))
        expected = [{"item_id": each, "data": {"by": each}, "label": "twice"} for each in names]
        assert [payload(each) for each in results] == expected
        async with harness.store() as store:
            assert list((await payloads(store, "items", names)).values()) == expected

    async def test_75_three_stores_of_one_process_open_at_once(self, harness: Harness) -> None:
        if not is_shared(harness.capabilities):
            pytest.skip("another store of this engine has other data")
        stores = [await harness.store().open() for _ in range(3)]
        try:
            versions = await asyncio.gather(
                *(
                    each.create_entity("items", {"item_id": str(number)})
                    for number, each in enumerate(stores)
                )
            )
            assert versions == [1, 1, 1]
            for each in stores:
                assert None not in await each.get_entities("items", ["0", "1", "2"])
        finally:
            for each in stores:
                await each.close()

    # 76 -------------------------------------------------------------------------------------

    async def test_76_opening_does_no_io(self, harness: Harness) -> None:
        store = harness.store()
        done_at_once(store.open())
        described = store.describe()
        assert described["engine"] == harness.capabilities.engine != ""
        assert normalise(described) == described, "the description cannot be written as JSON"
        store.begin_transaction()
        store.stream_entities("items")
        if isinstance(harness, ObservesIO):
            assert not harness.touched()
        await store.close()
        if isinstance(harness, ObservesIO):
            assert not harness.touched()

    async def test_76_importing_imports_no_driver(self) -> None:
        code = (
            "import sys, json, hf_async_store; "
            f"print(json.dumps([each for each in {_DRIVERS!r} if each in sys.modules]))"
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        assert process.returncode == 0
        assert json.loads(out) == []

    # 134 ------------------------------------------------------------------------------------

    async def test_134_two_stores_on_the_same_data_are_the_same_store(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        """`is_same_store` is symmetric; an empty store of another engine is a different store."""
        await store.save_entity("items", {"item_id": "a"})
        async with second_store(harness, store) as other, open_store("memory:") as foreign:
            for one, two in ((store, other), (other, store), (store, store)):
                assert await one.engine.is_same_store(two.engine)
            for one, two in ((store, foreign), (foreign, store)):
                assert not await one.engine.is_same_store(two.engine)

    async def test_134_exists_does_not_create_the_store(self, harness: Harness) -> None:
        if not harness.capabilities.durable:
            pytest.skip("the engine is not durable")
        async with harness.store() as store:
            assert not await store.exists()
            assert await store.engine.undeclared() == []
            assert not await store.exists()
            await store.save_entity("items", {"item_id": "a"})
            assert await store.exists()
        async with harness.store() as store:
            assert await store.exists()

    async def test_134_undeclared_collections_are_reported(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        await store.save_entity("items", {"item_id": "a"})
        await store.save_entity("counters", {"counter_id": "n"})
        assert await store.engine.undeclared() == []
        if is_shared(harness.capabilities):
            fewer = [each for each in CONTRACT_COLLECTIONS if each.name != "counters"]
            async with harness.store(fewer) as other:
                assert "counters" in await other.engine.undeclared()


# -- 70: one call for each error ------------------------------------------------------------


async def _error_of(kind: type[StorageError], work: Awaitable[object]) -> StorageError:
    with pytest.raises(kind) as caught:
        await work
    assert type(caught.value) is kind
    return caught.value


def _check_error(error: StorageError) -> None:
    """Assert the properties that every error has."""
    assert str(error)
    assert type(error.retryable) is bool
    assert type(error.outcome_unknown) is bool
    shown = "".join(traceback.format_exception(error)) + repr(error)
    assert SECRET not in shown, "an error must not contain stored data"
    for twin in (error.copy(), pickle.loads(pickle.dumps(error))):  # noqa: S301 - pickled here
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert (twin.retryable, twin.outcome_unknown) == (error.retryable, error.outcome_unknown)
    if isinstance(error, BatchError | TransactionAbortedError | RetriesExhaustedError):
        assert isinstance(error.__cause__, StorageError), "the error has no cause"


async def _succeeds_or_times_out(read: Awaitable[object]) -> None:
    try:
        await read
    except OperationTimeoutError as exc:
        assert (exc.retryable, exc.outcome_unknown) == (True, False)


async def _write_to_orphan(store: StorageStrategy) -> None:
    await store.update_entity("requests", "r", {"template_id": "nobody", "status": SECRET})


async def _abort(store: StorageStrategy) -> None:
    async with store.begin_transaction() as tx:
        with suppress(EntityNotFoundError):
            await tx.update_entity("items", "nobody", {"label": SECRET})
        await tx.save_entity("items", {"item_id": "b", "label": SECRET})


async def _suppress_failure(store: StorageStrategy) -> None:
    async with store.begin_transaction() as tx:
        with suppress(EntityNotFoundError):
            await tx.update_entity("items", "nobody", {"label": SECRET})


async def _use_after_end(store: StorageStrategy) -> None:
    async with store.begin_transaction() as tx:
        pass
    await tx.save_entity("items", {"item_id": "b", "label": SECRET})


async def _reenter(store: StorageStrategy) -> None:
    async with store.begin_transaction():
        await store.save_entity("items", {"item_id": "b", "label": SECRET})


async def _overfill(store: StorageStrategy) -> None:
    limit = store.capabilities.max_transaction_changes
    assert limit is not None
    async with store.begin_transaction() as tx:
        for number in range(limit + 1):
            await tx.save_entity("items", {"item_id": f"many {number}", "label": SECRET})


async def _always_conflict(store: StorageStrategy) -> None:
    async def change(entity: Any) -> Any:
        await store.update_entity("items", "a", {})  # another write always comes first
        return entity

    await store.modify_entity("items", "a", change, retry_seconds=0)


_CALLS_BY_ERROR: Final[Mapping[type[StorageError], Verb]] = {
    UnknownCollectionError: lambda store: store.save_entity("nothing", {"x": SECRET}),
    InvalidKeyError: lambda store: store.save_entity("items", {"item_id": "", "label": SECRET}),
    UnsupportedValueError: lambda store: store.save_entity(
        "items", {"item_id": "a", "label": SECRET, "x": {SECRET.encode()}}
    ),
    InvalidFieldError: lambda store: store.save_entity("items", {"item_id": "a", "count": SECRET}),
    InvalidVersionError: lambda store: store.save_entity(
        "items", {"item_id": "a", "label": SECRET}, expected_version=-1
    ),
    InvalidQueryError: lambda store: store.query_entities("items", {"label": SECRET}, limit=-1),
    InvalidCursorError: lambda store: store.query_page("items", {"label": SECRET}, cursor="x"),
    EntityNotFoundError: lambda store: store.update_entity("items", "nobody", {"label": SECRET}),
    AlreadyExistsError: lambda store: store.create_entity(
        "items", {"item_id": "a", "label": SECRET}
    ),
    ConcurrencyConflictError: lambda store: store.update_entity(
        "items", "a", {"label": SECRET}, expected_version=9
    ),
    ReferenceViolationError: _write_to_orphan,
    BatchError: lambda store: store.create_entities("items", [{"item_id": "a", "label": SECRET}]),
    TransactionAbortedError: _abort,
    TransactionClosedError: _use_after_end,
    TransactionReentryError: _reenter,
    TransactionTooLargeError: _overfill,
    RetriesExhaustedError: _always_conflict,
}

# -- 74: open and closed --------------------------------------------------------------------


def _check_all_verbs_refuse(store: StorageStrategy) -> None:
    all_refused_at_once(
        StoreClosedError,
        store.get_entity("items", "a"),
        store.get_entities("items", ["a"]),
        store.create_entity("items", {"item_id": "a"}),
        store.save_entity("items", {"item_id": "a"}),
        store.update_entity("items", "a", {}),
        store.delete_entity("items", "a"),
        store.create_entities("items", [{"item_id": "a"}]),
        store.save_entities("items", [{"item_id": "a"}]),
        store.update_entities("items", {"a": {}}),
        store.delete_entities("items", ["a"]),
        store.import_entities("items", [{"item_id": "a"}]),
        store.modify_entity("items", "a", lambda entity: entity),
        store.query_entities("items"),
        store.query_page("items"),
        store.count_entities("items"),
        store.explain_query("items"),
        store.test_connection(),
        store.health(),
        store.begin_transaction().__aenter__(),
        store.run_transaction(lambda tx: tx.get_entity("items", "a")),
        anext(store.stream_entities("items")),
    )


async def _wait_for_other_tasks() -> None:
    """Wait for the tasks in which the event loop closes abandoned iterators."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=HANG_SECONDS)
